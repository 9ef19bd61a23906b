"""A causal language model as entry, blocks and tail, whatever its family.

    enter(ids)              token ids -> stream entering block 0, arguments of every block call
    through(order)          the blocks one after the other, each with its weights present
    apply(b, stream, call)  one block, called exactly as the model's own forward calls it
    tail()                  the model's own final norm and head, applied to any stream

The arguments (masks, rotary tables, positions, whatever a type adds) are recorded from the model's
own forward, with a recorder in place of every block. The tail is the model's own forward too, with
a stand-in for the last block that returns the stream to be scored. Stand-ins are set as `forward`
of the block instance, so the module tree, its names and its attributes stay as they are.

Shapes: B samples, T tokens per sample, D width (of any further shape in a few types), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shortllm.checkpoint.config import text_config
from shortllm.checkpoint.structure import find_blocks
from shortllm.errors import UnsupportedModelError
from shortllm.model.bypass import bypassed

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class BlockCall:
    """The arguments of one block in the model's forward, except the stream."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stream_name: str | None
    """Keyword of the stream; None if it is the first argument."""

    def on(self, forward: Forward, stream_BTD: Tensor) -> Any:
        """Call `forward` (a block, or a block's own forward) on another stream."""
        if self.stream_name is None:
            return forward(stream_BTD, *self.args, **self.kwargs)
        return forward(*self.args, **{**self.kwargs, self.stream_name: stream_BTD})

    @staticmethod
    def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
        """Split the arguments of a block into the stream and the rest."""
        if args:
            return args[0], BlockCall(args[1:], kwargs, None)
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return kwargs["hidden_states"], BlockCall((), rest, "hidden_states")


def equal_arguments(one: Any, other: Any, *, opaque: bool) -> bool:
    """Deep equality of call arguments by value; other objects of one type are equal if `opaque`."""
    if one is other:
        return True
    equal = partial(equal_arguments, opaque=opaque)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if type(one) is type(other):
        return bool(one == other) if isinstance(one, (bool, int, float, str)) else opaque
    return False


CHECKED_TOKENS = 8
"""Tokens with which a model is checked once before its blocks are called one by one."""


class BlockWeights(Protocol):
    """Where the weights of the blocks are while they are not in use (see streamed.py)."""

    def through(self, order: Sequence[int]) -> Iterator[int]:
        """The numbers of `order`, each while the weights of that block are in the model."""

    def holding(self, blocks: Sequence[int]) -> AbstractContextManager[None]:
        """Within the context the weights of these blocks are in the model too."""

    def stand_in(self) -> AbstractContextManager[None]:
        """Within the context all blocks have random weights, in the memory of one block."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A batch on its way into the blocks: ids, the stream entering block 0, a call per block."""

    ids_BT: Tensor
    stream_BTD: Tensor
    calls: list[BlockCall]
    _stacked: dict[int, list[BlockCall]] = field(default_factory=dict)

    def call(self, decoder: Decoder, b: int, copies: int = 1) -> BlockCall:
        """How block `b` is called on `copies` stacked streams of the batch."""
        if copies == 1:
            return self.calls[b]
        if copies not in self._stacked:
            self._stacked[copies] = decoder.enter(self.ids_BT.repeat(copies, 1)).calls
        return self._stacked[copies][b]


def _stream_of(output: Any) -> Tensor:
    """The stream among what a block returns."""
    return output[0] if isinstance(output, (tuple, list)) else output  # type: ignore[no-any-return]


class _Reached(Exception):
    """Leaves the model's forward early."""


class Decoder:
    """A causal language model, seen as entry, blocks and tail."""

    def __init__(self, model: nn.Module, weights: BlockWeights | None = None) -> None:
        self.model = model.eval()
        self.blocks_name, self.blocks = find_blocks(model, model.config)
        self._weights = weights
        self._head: Any = model.get_output_embeddings()  # type: ignore[operator]
        self._extras: dict[type[nn.Module], int | None] = {}
        self._obstacle: str | None = None
        self._checked = False
        self.stream_dtype = self.dtype
        """Type of the stream before and after every block; known after the check."""
        self._stream_shape = torch.Size()

    @property
    def streamed(self) -> bool:
        """Whether block weights are read when needed."""
        return self._weights is not None

    @property
    def block_count(self) -> int:
        """Blocks in memory or in the files."""
        return len(self.blocks)

    @property
    def _embedding(self) -> Tensor:
        return self.model.get_input_embeddings().weight  # type: ignore[operator, no-any-return]

    @property
    def device(self) -> torch.device:
        """Where the embeddings are, and blocks compute."""
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """The computation type."""
        return self._embedding.dtype

    @property
    def vocabulary(self) -> int:
        """Entries of the output distribution."""
        if self._head is None:
            return int(text_config(self.model.config).vocab_size)
        return int(self._head.weight.shape[0])

    @property
    def head_elements(self) -> int:
        """Weights of the output projection."""
        return int((self._embedding if self._head is None else self._head.weight).numel())

    def obstacle(self) -> str | None:
        """Why the blocks cannot be called one by one; None where they can.

        They can if the model's forward runs each block once and in order, hands it nothing that
        depends on earlier blocks but the stream, and no block keeps state for a later one.
        """
        self._check()
        return self._obstacle

    @property
    def stream_width(self) -> int:
        """Numbers per token in the stream."""
        self._check()
        return self._stream_shape.numel()

    @torch.no_grad()
    def enter(self, ids_BT: Tensor) -> Entry:
        """Run the model's forward up to the blocks and record how it calls each of them."""
        obstacle = self.obstacle()
        if obstacle is not None:
            raise UnsupportedModelError(obstacle)
        ids_BT = ids_BT.to(self.device)
        stream_BTD, calls = self._record(ids_BT)
        return Entry(ids_BT, stream_BTD.to(self.stream_dtype), calls)

    def through(self, order: Sequence[int]) -> Iterator[int]:
        """The block numbers of `order`; each block can be applied while its number is current."""
        return iter(order) if self._weights is None else self._weights.through(order)

    def holding(self, blocks: Sequence[int]) -> AbstractContextManager[None]:
        """Within the context these blocks can be applied too."""
        return nullcontext() if self._weights is None else self._weights.holding(blocks)

    def apply(self, b: int, stream_BTD: Tensor, call: BlockCall) -> Tensor:
        """The stream after block `b`, `[B, T, D]`."""
        return _stream_of(call.on(self.blocks[b], stream_BTD))

    @contextmanager
    def tail(self) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """Within the context, a function `(stream_BTD, ids_BT) -> logits_BTV`: final norm and head.

        Both work token by token, so any cut of a stream along B and T may be given; gradients pass.
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

        self._check()
        with self._replaced(stand_in):
            yield logits

    @contextmanager
    def without(self, removed: Collection[int]) -> Iterator[None]:
        """Within the context the forward hands the stream past the blocks `removed`: `bypassed`."""
        assert not self.streamed, "the plain forward needs all blocks"
        with bypassed(self.model, removed, self._probe()):
            yield

    def _probe(self) -> Tensor:
        """A few token ids, `[1, 8]`."""
        return (torch.arange(CHECKED_TOKENS, device=self.device) % self.vocabulary)[None]

    @torch.no_grad()
    def _check(self) -> None:
        """Once: learn what blocks return, and whether they can be called one by one."""
        if self._checked:
            return
        self._checked = True
        probe_BT = self._probe()
        with self._weights.stand_in() if self._weights else nullcontext():
            try:
                expected_BTD = self._learn_outputs(probe_BT)
                self._check_stream(probe_BT)
                self._check_arguments(probe_BT)
                self._check_walk(probe_BT, expected_BTD)
            except UnsupportedModelError as error:
                self._obstacle = str(error)
            except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
                self._obstacle = (
                    f"the blocks of '{self.blocks_name}' cannot be called one by one: {error}"
                )

    def _learn_outputs(self, ids_BT: Tensor) -> Tensor:
        """Blocks return a tensor in most types, a tuple in a few; a stand-in must do the same.

        Returns the stream after the last block, before the final norm.
        """
        called: list[int] = []
        streams: list[Tensor] = []

        def learn(b: int, original: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                output = original(*args, **kwargs)
                extras = len(output) - 1 if isinstance(output, (tuple, list)) else None
                self._extras[type(self.blocks[b])] = extras
                streams.append(_stream_of(output).clone())
                self.stream_dtype = torch.promote_types(self.stream_dtype, streams[-1].dtype)
                called.append(b)
                return output

            return forward

        with self._replaced(learn):
            self.model(input_ids=ids_BT, use_cache=False)
        if called != list(range(self.block_count)):
            wrong = next((f"block {b} at place {i}" for i, b in enumerate(called) if i != b), None)
            raise self._wrong_order(wrong or f"{len(called)} of the {self.block_count} blocks")
        return streams[-1]

    def _record(self, ids_BT: Tensor, *, shift: float = 0.0) -> tuple[Tensor, list[BlockCall]]:
        """The stream entering block 0 and each block's call; stand-ins add `shift` to it."""
        streams: list[Tensor] = []
        calls: list[BlockCall] = []

        def recorder(b: int, original: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                stream, call = BlockCall.split(args, kwargs)
                streams.append(stream)
                calls.append(call)
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

    def _check_stream(self, ids_BT: Tensor) -> None:
        """Refuse types whose stream is not kept by sample and token."""
        stream, _ = self._record(ids_BT)
        self._stream_shape = stream.shape[2:]
        if stream.shape[:2] != ids_BT.shape or stream.ndim < 3:
            raise UnsupportedModelError(
                f"the stream entering the blocks of '{self.blocks_name}' has shape "
                f"{list(stream.shape)} for ids of shape {list(ids_BT.shape)}; "
                "a stream [samples, tokens, width] is needed"
            )

    def _check_arguments(self, ids_BT: Tensor) -> None:
        """Refuse types whose blocks are handed state of earlier blocks."""
        pairs = zip(self._record(ids_BT)[1], self._record(ids_BT, shift=1.0)[1], strict=True)
        for b, (one, other) in enumerate(pairs):
            if not equal_arguments((one.args, one.kwargs), (other.args, other.kwargs), opaque=True):
                raise UnsupportedModelError(
                    f"block {b} of '{self.blocks_name}' receives state of earlier blocks besides "
                    "the stream; removing single blocks is not defined for this model type"
                )

    def _check_walk(self, ids_BT: Tensor, expected_BTD: Tensor) -> None:
        """Refuse types whose blocks keep state, in themselves or in a store they are all handed.

        A second stream goes through each block after the intact one: if any of it is remembered,
        the intact stream no longer ends at `expected_BTD`, where the plain forward ended.
        """
        intact_BTD, calls = self._record(ids_BT)
        other_BTD = intact_BTD.flip(-1)
        for b, call in enumerate(calls):
            intact_BTD = self.apply(b, intact_BTD, call)
            other_BTD = self.apply(b, other_BTD, call)
        scale = expected_BTD.abs().max()
        difference = (intact_BTD - expected_BTD).abs().max()
        if scale.isfinite() and not difference <= 1e-2 * scale:
            raise UnsupportedModelError(
                f"the blocks of '{self.blocks_name}' share state besides the stream; removing "
                "single blocks is not defined for this model type"
            )

    def _as_output(self, b: int, stream: Tensor) -> Any:
        """What a stand-in for block `b` returns; other outputs than the stream are None."""
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
