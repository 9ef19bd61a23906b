"""Find the heads and neurons of a block by experiment, whatever the family.

Every linear projection of the block returns fixed numbers, whatever its input. Then the probe
changes one output after the other, and what changes elsewhere shows what belongs together:

    which projections     those whose outputs reach the block's output by the residual alone (o,
                          down), and those whose outputs reach one of these (q, k, v; gate, up)
    which is attention    the one where a token's numbers reach later tokens
    which units           a row that changes a channel is coupled with it; all that is coupled by
                          any chain is one unit: a kv head with its query heads, or a neuron
    are units alike       shifting the numbers of all units by one shifts the results by one

So matrices of several parts, in any order, need no rule, and the probe detects what cannot be cut:
a norm over all heads, a head that all share, slopes or sinks that depend on a head's number,
experts.

Shapes: N copies of a sample, T tokens, R outputs of a projection, C inputs of one, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shortllm.checkpoint.config import block_shapes, text_config
from shortllm.checkpoint.structure import block_signature, is_projection
from shortllm.errors import UnsupportedModelError
from shortllm.model.decoder import Decoder, Entry
from shortllm.width_pruning.groups import BlockGroups, Sublayer

TOKENS = 3
"""Tokens of a sample: with only one, no query would change anything; with two, few would."""

PROBE_BYTES = 2**26
"""Bound on the numbers that all projections return at once."""

CHANGE = -8.0
"""Factor that changes a number: the sign because of ReLU, the size because of norms."""

DRAWS = 4
"""How often a row without effect gets new numbers: an activation such as ReLU may hide it."""


def find_groups(decoder: Decoder, blocks: Sequence[int]) -> dict[int, BlockGroups]:
    """The heads and neurons of each of `blocks`; blocks built alike are probed once."""
    return _of_kinds(decoder, blocks, lambda b: _Probe(decoder, b).groups())


def find_outputs(decoder: Decoder, blocks: Sequence[int]) -> dict[int, tuple[str, str]]:
    """The names of the output projections of each block's attention and MLP, within the block."""
    return _of_kinds(
        decoder, blocks, lambda b: _Probe(decoder, b, "lose single sublayers").outputs()
    )


def _of_kinds(
    decoder: Decoder, blocks: Sequence[int], find: Callable[[int], Any]
) -> dict[int, Any]:
    """What `find` returns for each block; those built alike are probed once."""
    obstacle = decoder.obstacle()
    if obstacle is not None:
        raise UnsupportedModelError(obstacle)
    alike: dict[Any, list[int]] = {}
    for b in blocks:
        alike.setdefault(_kind(decoder.blocks[b]), []).append(b)
    members = {same[0]: same for same in alike.values()}
    found: dict[int, Any] = {}
    for b in decoder.through(list(members)):
        found |= dict.fromkeys(members[b], find(b))
    return found


def _kind(block: nn.Module) -> tuple[tuple[str, Any], ...]:
    """How a block is built, except for numbers that its forward reads."""
    return tuple(
        (place, value)
        for place, value in block_signature(block).items()
        if place.startswith(("shape of ", "class of "))
    )


class _Reached(Exception):
    """Leaves the block once the wanted input has been seen."""


class _Probe:
    """A block whose projections return given numbers."""

    def __init__(self, decoder: Decoder, b: int, aim: str = "be made narrower") -> None:
        self._aim = aim
        self._decoder = decoder
        self._b = b
        self._config: Any = decoder.model.config
        named = decoder.blocks[b].named_modules()
        self._modules: dict[str, Any] = {name: m for name, m in named if is_projection(m)}
        self._eps = torch.finfo(decoder.dtype).eps
        self._generator = torch.Generator().manual_seed(0)
        self._base: dict[str, Tensor] = {}
        self._draw()
        width = sum(base.numel() for base in self._base.values()) or 1
        self._copies = max(2, min(512, PROBE_BYTES // (width * decoder.dtype.itemsize)))
        self._entries: dict[int, Entry] = {}

    def _refusal(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"model type '{self._config.model_type}' cannot {self._aim}: "
            f"block {self._b} {reason}. Remove whole blocks with `shortllm prune`"
        )

    def _draw(self) -> None:
        """Draw numbers `[T, R]` for every projection, none of them near zero."""
        for name, module in self._modules.items():
            weight = module.weight
            rows = weight.shape[0 if isinstance(module, nn.Linear) else 1]
            noise = torch.randn(TOKENS, rows, generator=self._generator)
            base = noise + 0.5 * torch.where(noise < 0, -1.0, 1.0)
            self._base[name] = base.to(self._decoder.device, self._decoder.dtype)

    @torch.no_grad()
    def _run(
        self, values: dict[str, Tensor], until: str | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The input of each projection, `[N, T, C]`, and the block's output, `[N, T, D]`.

        Args:
            values: what some projections return, `[N, T, R]`; the others return the same N times.
            until: the projection to stop at; then there is no output.
        """
        seen: dict[str, Tensor] = {}
        count = len(next(iter(values.values())))
        if count not in self._entries:
            ids_BT = torch.arange(1, TOKENS + 1)[None] % self._decoder.vocabulary
            self._entries[count] = self._decoder.enter(ids_BT.repeat(count, 1))
        entry = self._entries[count]

        def stand_in(name: str) -> Callable[..., Tensor]:
            def forward(given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                seen[name] = given.reshape(count, TOKENS, -1)
                if name == until:
                    raise _Reached
                result = values.get(name, self._base[name]).expand(count, -1, -1)
                # a copy, as some blocks add to it in place
                result = result.clone(memory_format=torch.contiguous_format)
                return result.reshape(*given.shape[:-1], -1)

            return forward

        try:
            for name, module in self._modules.items():
                module.forward = stand_in(name)
            return seen, self._decoder.apply(self._b, entry.stream_BTD, entry.calls[self._b])
        except _Reached:
            return seen, None
        finally:
            for module in self._modules.values():
                module.__dict__.pop("forward", None)

    def _given(self, output: str, values: dict[str, Tensor]) -> Tensor:
        """The input of the projection `output`, `[N, T, C]`; nothing after it runs."""
        return self._run(values, output)[0][output]

    def outputs(self, sublayers: dict[str, list[str]] | None = None) -> tuple[str, str]:
        """The output projections of the attention and of the MLP."""
        sublayers = self._sublayers() if sublayers is None else sublayers
        mixing = {name: self._mixes(name, inputs) for name, inputs in sublayers.items()}
        if sorted(mixing.values()) != [False, True]:
            held = ", ".join(f"'{name}'" for name in sublayers) or "none"
            raise self._refusal(
                "is not one attention and one MLP of linear projections (found projections back "
                f"into the stream: {held})"
            )
        attention, mlp = sorted(sublayers, key=lambda name: not mixing[name])
        return attention, mlp

    def groups(self) -> BlockGroups:
        """The heads and neurons of the block."""
        sublayers = self._sublayers()
        attention, mlp = self.outputs(sublayers)
        heads = self._coupled(attention, sublayers[attention], "heads")
        neurons = self._coupled(mlp, sublayers[mlp], "neurons")
        shapes = block_shapes(self._config)
        own = shapes[self._b] if shapes is not None else {}
        count = own.get("num_attention_heads") or text_config(self._config).num_attention_heads
        if count % heads.units or len(heads.unit_of_channel_C) % count:
            raise self._refusal(
                f"has {count} query heads, which its {heads.units} separate parts of "
                f"{heads.unit_width} channels do not share evenly"
            )
        modules = self._modules.items()
        return BlockGroups(
            heads,
            neurons,
            count // heads.units,
            width=self._base[attention].shape[1],
            transposed=frozenset(n for n, m in modules if not isinstance(m, nn.Linear)),
        )

    def _sublayers(self) -> dict[str, list[str]]:
        """Output projection -> its input projections."""
        names = list(self._modules)
        if not names:
            raise self._refusal("has no linear projection")
        values = {name: self._base[name].repeat(len(names) + 1, 1, 1) for name in names}
        for place, name in enumerate(names):
            values[name][place + 1] *= CHANGE
        seen, output = self._run(values)
        assert output is not None
        unused = [name for name in names if name not in seen]
        if unused:
            raise self._refusal(f"does not send every token through '{unused[0]}'")
        direct = dict(zip(names, self._moved(output).any(1).tolist(), strict=True))
        feeds = {name: self._moved(given).any(1).tolist() for name, given in seen.items()}
        found = {
            output: [
                name
                for place, name in enumerate(names)
                if feeds[output][place] and not direct[name]
            ]
            for output in names
            if direct[output]
        }
        used = {*found, *(name for inputs in found.values() for name in inputs)}
        other = next((name for name in names if name not in used), None)
        if other is not None or not all(found.values()):
            named = other or next(name for name, inputs in found.items() if not inputs)
            raise self._refusal(f"uses '{named}' neither as input nor as output of a sublayer")
        return found

    def _moved(self, given_NTC: Tensor) -> Tensor:
        """Whether a channel of any token differs from that of copy 0, for the others `[N-1, C]`.

        All copies go through the same operations, so a channel that is not reached differs by
        rounding at most, of what a result is summed up from too; a query may move a result by
        little more.
        """
        given = given_NTC.float()
        first = given[:1].abs()
        allowed = 4 * self._eps * first + max(1e-5, self._eps) * first.max()
        return ((given[1:] - given[:1]).abs() > allowed).any(1)

    def _mixes(self, output: str, inputs: list[str]) -> bool:
        """Whether a change at the first token reaches the output at the last one."""
        values = {name: self._base[name].repeat(2, 1, 1) for name in inputs}
        for value in values.values():
            value[1, 0] *= CHANGE
        given = self._given(output, values)
        return bool(self._moved(given[:, -1:]).any())

    def _coupled(self, output: str, inputs: list[str], kind: str) -> Sublayer:
        """The units of a sublayer."""
        channels = self._given(output, {inputs[0]: self._base[inputs[0]][None]}).shape[-1]
        sizes = [self._base[name].shape[1] for name in inputs]
        links = [self._links(output, name) for name in inputs]
        rows = [row + sum(sizes[:place]) for place, (row, _) in enumerate(links)]
        reached = [channel for _, channel in links]
        unit_R, unit_C = _components(torch.cat(rows), torch.cat(reached), channels)
        parts = dict(zip(inputs, torch.split(unit_R, sizes), strict=True))
        sublayer = Sublayer(output, unit_C, parts)
        if sublayer.units == 1:
            raise self._refusal(
                f"has {kind} that cannot be removed one by one: all are coupled (by a shared head, "
                "or a norm over all of them)"
            )
        for units in (unit_C, *parts.values()):
            sizes_U = torch.bincount(units, minlength=sublayer.units)
            if not bool((sizes_U == sizes_U[0]).all()):
                raise self._refusal(f"has {kind} of different sizes")
        self._require_alike(sublayer, kind)
        return sublayer

    def _links(self, output: str, name: str) -> tuple[Tensor, Tensor]:
        """Pairs of a row of `name` and an input channel of `output` that it reaches."""
        pending = list(range(self._base[name].shape[1]))
        rows: list[Tensor] = []
        channels: list[Tensor] = []
        for _ in range(DRAWS):
            missed: list[int] = []
            for start in range(0, len(pending), self._copies - 1):
                row_N = torch.tensor(pending[start : start + self._copies - 1])
                values = self._base[name].repeat(len(row_N) + 1, 1, 1)
                place_N = torch.arange(len(row_N))
                values[place_N + 1, :, row_N] *= CHANGE
                moved_NC = self._moved(self._given(output, {name: values})).cpu()
                place, channel = moved_NC.nonzero(as_tuple=True)
                rows.append(row_N[place])
                channels.append(channel)
                missed += row_N[~moved_NC.any(1)].tolist()
            pending = missed
            if not pending:
                return torch.cat(rows), torch.cat(channels)
            self._draw()
        raise self._refusal(f"has a row {pending[0]} of '{name}' without effect")

    def _require_alike(self, sublayer: Sublayer, kind: str) -> None:
        """Refuse units that differ by more than their weights."""

        def places(unit_of: Tensor) -> Tensor:
            return unit_of.argsort(stable=True).view(sublayer.units, -1)

        values = {}
        for name, units in sublayer.unit_of_row_R.items():
            rows_UR = places(units)
            values[name] = self._base[name].repeat(2, 1, 1)
            values[name][1][:, rows_UR.flatten()] = self._base[name][
                :, rows_UR.roll(1, 0).flatten()
            ]
        given_NTC = self._given(sublayer.output, values).float()
        channels_UC = places(sublayer.unit_of_channel_C)
        moved_on = given_NTC[0][:, channels_UC.roll(1, 0).flatten()]
        found = given_NTC[1][:, channels_UC.flatten()]
        allowed = max(8 * self._eps, 1e-4) * given_NTC[0].abs().max()
        if not bool((moved_on - found).abs().max() <= allowed):
            raise self._refusal(
                f"has {kind} that differ by more than their projections (a slope, a sink or a "
                "scale for each)"
            )


def _components(rows: Tensor, channels: Tensor, channel_count: int) -> tuple[Tensor, Tensor]:
    """The unit of every row and of every channel, from coupled pairs.

    Units are numbered by their first channel.
    """
    row_count = int(rows.max()) + 1
    label_C = torch.arange(channel_count)
    while True:
        label_R = torch.full((row_count,), channel_count).scatter_reduce(
            0, rows, label_C[channels], "amin"
        )
        following_C = label_C.scatter_reduce(0, channels, label_R[rows], "amin")
        if torch.equal(following_C, label_C):
            break
        label_C = following_C
    firsts, unit_C = torch.unique(label_C, return_inverse=True)
    return torch.searchsorted(firsts, label_R), unit_C
