"""A model held in memory, cut into the three parts a walk over blocks needs.

    enter(ids)              token ids -> stream entering block 0, arguments of every block call
    apply(b, stream, call)  one block, called exactly as the model's own forward calls it
    tail()                  the model's own final norm and head, applied to any stream

Nothing of a family is written here. The arguments (masks, rotary tables, positions, whatever a type
adds) are recorded from the model's own forward, in which every block is replaced by a recorder that
hands its input through. The tail is the model's own forward too, with the last block replaced by
one that hands out the stream to be scored. Replacing means setting `forward` on the block instance,
so the module tree, its names and its attributes stay as they are.

Shapes: B samples, T tokens per sample, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shortllm.errors import UnsupportedModelError
from shortllm.model.blocks import find_blocks

Forward = Callable[..., Any]

CHECKED_TOKENS = 8
"""Tokens with which a model is checked once before its blocks are called one by one."""


@dataclass(frozen=True, slots=True)
class BlockCall:
    """Everything but the stream that the model's forward hands to one block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stream_name: str | None
    """Keyword under which the stream is handed over; None if it is the first argument."""

    def on(self, forward: Forward, stream_BTD: Tensor) -> Any:
        """Call `forward` (a block, or a block's own forward) on another stream."""
        if self.stream_name is None:
            return forward(stream_BTD, *self.args, **self.kwargs)
        return forward(*self.args, **{**self.kwargs, self.stream_name: stream_BTD})

    @staticmethod
    def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
        """Part the arguments of a block into the stream and the rest."""
        if args:
            return args[0], BlockCall(args[1:], kwargs, None)
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return kwargs["hidden_states"], BlockCall((), rest, "hidden_states")


@dataclass(frozen=True, slots=True)
class Entry:
    """A batch on its way into the blocks: ids, the stream entering block 0, a call per block."""

    ids_BT: Tensor
    stream_BTD: Tensor
    calls: list[BlockCall]


class _Reached(Exception):
    """Leaves the model's forward once what was wanted of it has been seen."""


class ResidentModel:
    """A causal language model in memory, seen as entry, blocks and tail."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self.blocks_name, self.blocks = find_blocks(model, model.config)
        self._head: Any = model.get_output_embeddings()  # type: ignore[operator]
        self._extras: dict[type[nn.Module], int | None] = {}
        self._checked = False

    @property
    def block_count(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def vocabulary(self) -> int:
        """Entries of the output distribution."""
        return int(self._head.weight.shape[0])

    @property
    def head_elements(self) -> int:
        """Weights of the output projection."""
        return int(self._head.weight.numel())

    @torch.inference_mode()
    def enter(self, ids_BT: Tensor) -> Entry:
        """Run the model's forward up to the blocks and record how it calls each of them.

        Raises:
            UnsupportedModelError: the forward does not run each block once and in order, or a block
                receives state of earlier blocks besides the stream.
        """
        ids_BT = ids_BT.to(self.device)
        stream_BTD, calls = self._record(ids_BT)
        if stream_BTD.shape[:2] != ids_BT.shape or stream_BTD.ndim != 3:
            raise UnsupportedModelError(
                f"the stream entering the blocks of '{self.blocks_name}' has shape "
                f"{list(stream_BTD.shape)} for ids of shape {list(ids_BT.shape)}; "
                "a stream [samples, tokens, width] is needed"
            )
        if not self._checked:
            probe_BT = ids_BT[:1, :CHECKED_TOKENS]
            self._check_arguments(probe_BT)
            self._check_walk(probe_BT)
            self._checked = True
        return Entry(ids_BT, stream_BTD, calls)

    @torch.inference_mode()
    def apply(self, b: int, stream_BTD: Tensor, call: BlockCall) -> Tensor:
        """The stream after block `b`, `[B, T, D]`."""
        output = call.on(self.blocks[b], stream_BTD)
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

    @torch.inference_mode()
    def run_blocks(self, ids_BT: Tensor) -> Tensor:
        """The stream after the last block, before the final norm, by the model's plain forward."""
        found: list[Tensor] = []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        handle = self.blocks[-1].register_forward_hook(hook)
        try:
            self.model(input_ids=ids_BT.to(self.device), use_cache=False)
        except _Reached:
            pass
        finally:
            handle.remove()
        return found[0]

    @contextmanager
    def tail(self) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """Within the context, a function `(stream_BTD, ids_BT) -> logits_BTV`: final norm and head.

        Both work token by token, so any cut of a stream along B and T may be given.
        """
        current: list[Tensor] = []

        def stand_in(b: int, original: Forward) -> Forward:
            last = b == self.block_count - 1

            def forward(*args: Any, **kwargs: Any) -> Any:
                stream, _ = BlockCall.split(args, kwargs)
                return self._as_output(b, current[0] if last else stream)

            return forward

        def logits(stream_BTD: Tensor, ids_BT: Tensor) -> Tensor:
            current[:] = [stream_BTD]
            return self.model(input_ids=ids_BT, use_cache=False).logits  # type: ignore[no-any-return]

        self._learn_outputs()
        with torch.inference_mode(), self._replaced(stand_in):
            yield logits

    @contextmanager
    def without(self, removed: Collection[int]) -> Iterator[None]:
        """Within the context the model's forward hands the stream past the blocks `removed`.

        For forwards without a cache: cached generation counts positions by block 0.
        """

        def stand_in(b: int, original: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                return self._as_output(b, BlockCall.split(args, kwargs)[0])

            return forward if b in removed else original

        self._learn_outputs()
        with self._replaced(stand_in):
            yield

    def _learn_outputs(self) -> None:
        """Before stand-ins are used: learn what blocks return, refuse types they are wrong for."""
        if not self._checked:
            self.enter(torch.arange(CHECKED_TOKENS)[None] % self.vocabulary)

    def _record(self, ids_BT: Tensor, *, shift: float = 0.0) -> tuple[Tensor, list[BlockCall]]:
        """The stream entering block 0 and each block's call.

        Blocks hand their input through, changed by `shift`, and are not run, but for one of each
        class to learn what it returns.
        """
        streams: list[Tensor] = []
        calls: list[BlockCall] = []

        def recorder(b: int, original: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if b != len(calls):
                    raise self._wrong_order(f"block {b} at place {len(calls)}")
                stream, call = BlockCall.split(args, kwargs)
                streams.append(stream)
                calls.append(call)
                if self._unknown(b):
                    self._learn_output(b, call.on(original, stream))
                if len(calls) == self.block_count:
                    raise _Reached
                return self._as_output(b, stream + shift if shift else stream)

            return forward

        with self._replaced(recorder):
            try:
                self.model(input_ids=ids_BT, use_cache=False)
            except _Reached:
                return streams[0], calls
        raise self._wrong_order(f"{len(calls)} of the {self.block_count} blocks")

    def _wrong_order(self, found: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"the model's forward called {found} of '{self.blocks_name}'; "
            "each block must be called once, in order"
        )

    def _check_arguments(self, ids_BT: Tensor) -> None:
        """Refuse types whose blocks are handed state of earlier blocks."""
        _, plain = self._record(ids_BT)
        _, shifted = self._record(ids_BT, shift=1.0)
        for b, (one, other) in enumerate(zip(plain, shifted, strict=True)):
            if not _equal((one.args, one.kwargs), (other.args, other.kwargs)):
                raise UnsupportedModelError(
                    f"block {b} of '{self.blocks_name}' receives state of earlier blocks besides "
                    "the stream; removing single blocks is not defined for this model type"
                )

    def _check_walk(self, ids_BT: Tensor) -> None:
        """Refuse types whose blocks keep state, in themselves or in a store they are all handed.

        A second, different stream is sent through each block after the intact one: if any of it is
        remembered, the intact stream no longer ends where the plain forward ends.
        """
        expected_BTD = self.run_blocks(ids_BT)
        intact_BTD, calls = self._record(ids_BT)
        other_BTD = intact_BTD.flip(-1)
        for b, call in enumerate(calls):
            intact_BTD = self.apply(b, intact_BTD, call)
            other_BTD = self.apply(b, other_BTD, call)
        scale = expected_BTD.abs().max()
        if not (intact_BTD - expected_BTD).abs().max() <= 1e-2 * scale and scale.isfinite():
            raise UnsupportedModelError(
                f"the blocks of '{self.blocks_name}' share state besides the stream; removing "
                "single blocks is not defined for this model type"
            )

    def _unknown(self, b: int) -> bool:
        return type(self.blocks[b]) not in self._extras

    def _learn_output(self, b: int, output: Any) -> None:
        """Blocks return a tensor in most types, a tuple in a few; a stand-in must do the same."""
        self._extras[type(self.blocks[b])] = len(output) - 1 if isinstance(output, tuple) else None

    def _as_output(self, b: int, stream: Tensor) -> Any:
        """What a stand-in for block `b` returns; attention weights beside the stream are None."""
        extras = self._extras[type(self.blocks[b])]
        return stream if extras is None else (stream, *[None] * extras)

    @contextmanager
    def _replaced(self, make: Callable[[int, Forward], Forward]) -> Iterator[None]:
        """Give every block instance another `forward` until the context ends."""
        try:
            for b, block in enumerate(self.blocks):
                block.forward = make(b, block.forward)
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)


def _equal(one: Any, other: Any) -> bool:
    """Deep equality of call arguments; tensors by value, other objects by their type."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return type(one) is type(other)
