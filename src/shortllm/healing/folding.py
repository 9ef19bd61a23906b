"""Find the projections of a block whose outputs are added to the hidden state, in any family.

By experiment: numbers are added to the output of one projection after the other. If the block's
output moves by exactly that, times one factor (1 in most families, the residual multiplier of
granite), only an addition follows the projection, and a map of its output can be folded into its
weights. An expert is followed by a choice: there the output moves differently, and the experiment
is made with the module that returns the sum of all of them (`experts.py`). Where norms follow
attention and MLP (gemma2, olmo2), it is made with these.

The last one is looked for first. The output of the attention of a serial block also goes into its
MLP, so others are looked for while those behind them return what they returned before. A map is
folded into the weights, for the file and for a model in memory:

    x ─► W ─► M ─► T          becomes          x ─► Tᵀ W ─► M T

Shapes: I inputs and D outputs of the projection.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.structure import is_projection
from shortllm.checkpoint.tensors import read_tensor
from shortllm.errors import UnsupportedModelError
from shortllm.healing.experts import (
    FLOATS,
    Factor,
    Output,
    around_stacked,
    find_outputs,
    find_stored,
)
from shortllm.model.decoder import Decoder, Entry
from shortllm.surgery.derived import require_stored, stored_name

TOKENS = 4

SIZES = (1.0, 30.0)
"""How far outputs are moved, relative to the hidden state; only an addition passes both."""

Fold = dict[str, Tensor | Factor]
"""New weights as they are stored, or what weights are multiplied by, by their names within the
block."""


@dataclass(frozen=True, slots=True)
class NormGains:
    """The gains of a norm."""

    weight_D: Tensor
    offset: int
    """What is added to the weight: 1 in gemma, else 0."""


@dataclass(frozen=True, slots=True)
class Added:
    """A projection, a norm, or experts, whose output is added to the hidden state."""

    name: str
    """Within the block."""
    scale: float
    """Factor that the block multiplies the output with before it adds it."""
    transposed: bool = False
    """Whether the matrix is stored as inputs x outputs."""
    norm: NormGains | None = None
    """For a norm, its gains."""
    source: Added | None = None
    """For a norm, the projection that it gets its input from."""
    experts: tuple[Output, ...] = ()
    """For experts, what their output is proportional to."""
    block: int = 0
    """The number of its block."""

    @property
    def projection(self) -> Added:
        """The projection in front of a norm."""
        assert self.source is not None
        return self.source

    def gains(self) -> Tensor:
        """What a norm multiplies its channels with, float64 `[D]`."""
        assert self.norm is not None
        return self.norm.weight_D.double() + self.norm.offset


def find_added(
    decoder: Decoder, blocks: Sequence[int], checkpoint: Checkpoint | None = None
) -> dict[int, list[Added]]:
    """For each of `blocks` the modules whose output is added to the hidden state, one or more, none
    of which gets what a later one returns: projections and experts, or where a norm follows, norms.

    With a checkpoint, experts have the names of their stored tensors.
    """
    obstacle = decoder.obstacle()
    if obstacle is not None:
        raise UnsupportedModelError(obstacle)
    ids_BT = torch.arange(1, TOKENS + 1)[None] % decoder.vocabulary
    entry = decoder.enter(ids_BT)
    found: dict[int, list[Added]] = {}
    for b in decoder.through(blocks):
        found[b] = [replace(one, block=b) for one in _find(decoder, b, entry)]
        if checkpoint is not None:
            others = [one for other in found.values() for added in other for one in added.experts]
            found[b] = _with_stored(checkpoint, decoder, b, found[b], others)
    return found


def find_foldable(
    checkpoint: Checkpoint, decoder: Decoder, blocks: Sequence[int]
) -> dict[int, list[Added]]:
    """The same, if the checkpoint stores their weights as floats."""
    found = find_added(decoder, blocks, checkpoint)
    for b, modules in found.items():
        for added in (*modules, *(one.source for one in modules if one.source is not None)):
            if added.experts:
                continue
            entry = require_stored(
                checkpoint, b, added.name, needed_to="fold a map into a projection"
            )
            if entry.dtype not in FLOATS:
                raise UnsupportedModelError(
                    f"{checkpoint.id} stores '{entry.name}' as {entry.dtype}, and a map cannot be "
                    "folded into quantized weights. Give the unquantized model"
                )
    return found


def _with_stored(
    checkpoint: Checkpoint,
    decoder: Decoder,
    b: int,
    modules: Sequence[Added],
    others: Sequence[Output],
) -> list[Added]:
    """The modules of block `b`, experts with the names of their stored tensors.

    Experts with no such names are left out if they are not the last module, which is changed.

    Args:
        others: those of experts of other blocks: under the same names are the same tensors.
    """
    found: list[Added] = []
    for added in modules:
        outputs: list[Output] = []
        for one in added.experts:
            weight = decoder.blocks[b].get_parameter(one.name)
            alike = (
                other for other in others if _is_stored_like(checkpoint, b, one, weight, other)
            )
            known = next(alike, None)
            stored = None if known else find_stored(checkpoint, b, weight, one.axis)
            if stored is not None:
                known = replace(one, stored=stored[0], dtype=stored[1])
            if known is not None:
                outputs.append(known)
            elif added is modules[-1]:
                raise UnsupportedModelError(
                    f"{checkpoint.id} stores '{one.name}' of block {b} neither as the model has it "
                    "nor expert by expert, so what its experts add cannot be changed. If it is "
                    "quantized, give the unquantized model"
                )
        if len(outputs) == len(added.experts):
            found.append(replace(added, experts=tuple(outputs)))
    return found


def _is_stored_like(
    checkpoint: Checkpoint, b: int, one: Output, weight: Tensor, other: Output
) -> bool:
    """Whether a parameter of block `b` is stored under the names that another block has for it."""
    entries = [checkpoint.tensors.get(stored_name(checkpoint, b, name)) for name in other.stored]
    elements = sum(entry.elements for entry in entries if entry and entry.dtype in FLOATS)
    return one.name == other.name and elements == weight.numel()


@torch.no_grad()
def _find(decoder: Decoder, b: int, entry: Entry) -> list[Added]:
    block, width = decoder.blocks[b], entry.stream_BTD.shape[-1]
    named = {
        name: one for name, one in block.named_modules() if is_projection(one) or _gains_of(one)
    }
    stacked = around_stacked(block)
    with watching(block, [*named, *stacked]) as seen:
        decoder.apply(b, entry.stream_BTD.clone(), entry.calls[b])
    outputs = {
        name: output
        for name, (_, output) in seen.items()
        if output.shape[-1] == width and output.numel() == entry.stream_BTD.numel()
    }
    held: dict[str, Tensor] = {}

    def look(projections: bool) -> list[Added]:
        """The projections, or the norms, that are not known yet."""
        found: list[Added] = []
        for name in reversed(outputs):  # in the order in which they run
            if name in held or name not in named or is_projection(named[name]) is not projections:
                continue
            scale = _scale(decoder, b, entry, name, outputs[name], held)
            if scale is not None:
                found.insert(0, _added(named, name, scale, seen))
                held[name] = outputs[name]
        return found

    found = look(projections=True)
    experts: list[Added] = []
    for name in stacked:
        inside = any(name.startswith(f"{one.name}.") for one in experts)
        around = any(one.startswith(f"{name}.") for one in held)
        if name not in outputs or inside or around:
            continue
        scale = _scale(decoder, b, entry, name, outputs[name], held)
        parameters = () if scale is None else _outputs_of(decoder, b, entry, name)
        if scale is not None and parameters:
            experts.append(Added(name, scale, experts=parameters))
            held[name] = outputs[name]
    before = look(projections=True) if experts else []
    found = [*before, *experts, *found] or look(projections=False)
    if found:
        return found
    config: Any = decoder.model.config
    raise UnsupportedModelError(
        f"block {b} of model type '{config.model_type}' has no linear projection, norm or experts "
        "whose output is added to the hidden state unchanged, so nothing can be folded into it. "
        "Retrain the model instead, with `shortllm retrain`"
    )


def _outputs_of(decoder: Decoder, b: int, entry: Entry, name: str) -> tuple[Output, ...]:
    """What the output of experts is proportional to; empty if there is no such."""
    module = decoder.blocks[b].get_submodule(name)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        copied = tuple(one.clone() if isinstance(one, Tensor) else one for one in args)
        calls.append((copied, kwargs))

    with module.register_forward_pre_hook(keep, with_kwargs=True):
        decoder.apply(b, entry.stream_BTD.clone(), entry.calls[b])
    axes = find_outputs(module, *calls[0]) or {}
    return tuple(
        Output(f"{name}.{own}", axis, module.get_parameter(own).dtype) for own, axis in axes.items()
    )


def _added(
    named: Mapping[str, nn.Module],
    name: str,
    scale: float,
    seen: Mapping[str, tuple[Tensor, Tensor]],
) -> Added:
    """What is known of a module whose output is added to the hidden state."""
    module = named[name]
    if is_projection(module):
        return Added(name, scale, transposed=not isinstance(module, nn.Linear))
    given = seen[name][0]
    source = next(
        (
            Added(other, 1.0, transposed=not isinstance(named[other], nn.Linear))
            for other, (_, output) in seen.items()
            if other in named and is_projection(named[other]) and output.shape == given.shape
            and torch.equal(output, given)
        ),
        None,
    )  # fmt: skip
    return Added(name, scale, norm=_gains_of(module), source=source)


def _gains_of(module: nn.Module) -> NormGains | None:
    """The gains of a norm, by what it returns with gains of zero and one; None for others."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or list(module.children()):
        return None
    probe: Any = copy.deepcopy(module).float()
    states = torch.linspace(-1.0, 2.0, weight.numel(), device=weight.device)[None]
    found = []
    for value in (0.0, 1.0):
        for parameter in probe.parameters():
            parameter.detach().fill_(value if parameter is probe.weight else 0.0)
        try:
            found.append(probe(states).flatten())
        except TypeError:  # one that gets a gate too
            return None
    unit = found[1] - found[0]
    offset = (found[0] @ unit / (unit @ unit)).item()
    if not abs(offset - round(offset)) < 1e-3:
        return None
    return NormGains(weight.detach(), round(offset))


@contextmanager
def watching(block: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within the context, what modules of a block are called with and return; those that run more
    than once are left out."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    again: set[str] = set()

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if name in seen or not args or not isinstance(output, Tensor):
            again.add(name)
        else:
            seen[name] = (args[0].clone(), output.clone())

    with ExitStack() as hooks:
        for name in names:
            hook = partial(keep, name)
            hooks.enter_context(block.get_submodule(name).register_forward_hook(hook))
        yield seen
    for name in again:
        seen.pop(name, None)


def _scale(
    decoder: Decoder, b: int, entry: Entry, name: str, output: Tensor, held: Mapping[str, Tensor]
) -> float | None:
    """The factor with which the output is added to the hidden state; None if it is not."""
    sizes = (one.float().square().mean().sqrt().item() for one in (output, entry.stream_BTD))
    size = max(sizes) or 1.0
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(output.shape, generator=generator).to(output)
    before = _moved(decoder, b, entry, name, torch.zeros_like(output), held)
    found: list[float] = []
    for times in SIZES:
        step = (output + times * size * noise) - output  # what is left after rounding
        after = _moved(decoder, b, entry, name, step, held)
        change = (after - before).double().flatten()
        wanted = step.double().flatten()
        scale = (change @ wanted / (wanted @ wanted)).item()
        if not scale:
            return None
        rounding = 8 * torch.finfo(output.dtype).eps * max(
            after.abs().max().item(), before.abs().max().item()
        )  # fmt: skip
        allowed = 1e-4 * (scale * wanted).abs().max().item() + rounding
        if not (change - scale * wanted).abs().max().item() <= allowed:
            return None
        found.append(scale)
    if not abs(found[0] - found[1]) <= 1e-2 * abs(found[1]):
        return None
    return 1.0 if abs(found[1] - 1.0) < 1e-3 else found[1]  # a rounding error


def _moved(
    decoder: Decoder, b: int, entry: Entry, name: str, step: Tensor, held: Mapping[str, Tensor]
) -> Tensor:
    """The block's output if `step` is added to the output of a projection, and those of others are
    held."""

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + step

    def hold(kept: Tensor, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return kept.clone()  # falcon adds to it in place

    block = decoder.blocks[b]
    with ExitStack() as hooks:
        hooks.enter_context(block.get_submodule(name).register_forward_hook(add))
        for other, kept in held.items():
            hook = partial(hold, kept)
            hooks.enter_context(block.get_submodule(other).register_forward_hook(hook))
        return decoder.apply(b, entry.stream_BTD.clone(), entry.calls[b])


def fold(checkpoint: Checkpoint, b: int, added: Added, change_DD: Tensor) -> Fold:
    """The weights of a projection followed by the map `I + change_DD`, in their stored type."""
    change_DD = change_DD.cpu()
    found: Fold = {}
    for kind in ("weight", "bias"):
        name = f"{added.name}.{kind}"
        entry = checkpoint.tensors.get(stored_name(checkpoint, b, name))
        if entry is not None:
            held = read_tensor(entry)
            before = held.double()
            from_left = kind == "weight" and not added.transposed
            change = change_DD.T @ before if from_left else before @ change_DD
            found[name] = (before + change).to(held.dtype)
    return found


def refit(checkpoint: Checkpoint, b: int, added: Added, change_ID: Tensor) -> Fold:
    """The weights of a projection plus `change_ID`, in their stored type."""
    held = read_tensor(checkpoint.tensors[stored_name(checkpoint, b, f"{added.name}.weight")])
    change = change_ID.cpu() if added.transposed else change_ID.cpu().T
    return {f"{added.name}.weight": (held.double() + change).to(held.dtype)}


def regain(checkpoint: Checkpoint, b: int, added: Added, change_DD: Tensor) -> Fold:
    """The gains of a norm, and its bias, times `1 + change_DD` of each channel."""
    assert added.norm is not None
    factor_D = 1 + change_DD.diagonal().cpu()
    found: Fold = {}
    for kind, offset in (("weight", added.norm.offset), ("bias", 0)):
        name = f"{added.name}.{kind}"
        entry = checkpoint.tensors.get(stored_name(checkpoint, b, name))
        if entry is not None:
            held = read_tensor(entry)
            found[name] = ((held.double() + offset) * factor_D - offset).to(held.dtype)
    return found


def rescale(checkpoint: Checkpoint, b: int, added: Added, change_DD: Tensor) -> Fold:
    """What weights of experts are multiplied by so that the output is times `1 + change_DD` of each
    channel."""
    factor_D = 1 + change_DD.diagonal().cpu()
    return {one.name: one.factor(factor_D) for one in added.experts}


@contextmanager
def folded_into(
    decoder: Decoder, folds: Mapping[int, Fold], gains: Mapping[int, float] | None = None
) -> Iterator[None]:
    """Within the context, the decoder computes with other weights, in memory or streamed, and
    multiplies the hidden state behind some blocks by a factor."""
    replaced: dict[nn.Module, dict[str, nn.Parameter | Factor]] = {}
    with ExitStack() as hooks:
        for b, gain in (gains or {}).items():
            hook = partial(_multiply, gain)
            hooks.enter_context(decoder.blocks[b].register_forward_hook(hook))
        for b, tensors in folds.items():
            for name, new in tensors.items():
                path, _, own = name.rpartition(".")
                weights = replaced.setdefault(decoder.blocks[b].get_submodule(path), {})
                if isinstance(new, Factor):
                    weights[own] = replace(new, value=new.value.to(decoder.device))
                else:
                    here = new.to(decoder.device, decoder.dtype)
                    weights[own] = nn.Parameter(here, requires_grad=False)
        for module, weights in replaced.items():
            module.forward = partial(_with_weights, module, weights)
            hooks.callback(module.__dict__.pop, "forward", None)
        yield


def _with_weights(
    module: Any, weights: dict[str, nn.Parameter | Factor], *args: Any, **kwargs: Any
) -> Any:
    """Call a module with some other weights; streamed ones are in the module only meanwhile."""
    own = {name: module._parameters[name] for name in weights}
    for name, new in weights.items():
        if isinstance(new, Factor):
            new = nn.Parameter(new.times(own[name].detach()), requires_grad=False)
        module._parameters[name] = new
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        module._parameters.update(own)


def _multiply(gain: float, module: nn.Module, args: Any, output: Any) -> Any:
    """The output of a block with its hidden state multiplied."""
    if isinstance(output, (tuple, list)):
        return type(output)([gain * output[0], *output[1:]])
    return gain * output
