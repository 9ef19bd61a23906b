"""Where attention and MLP are added to the hidden state, and a model without some of them.

A sublayer ends in its output projection, whose result is added to the hidden state, after a norm in
some families. A projection that returns zeros therefore removes the sublayer, if a norm of zeros is
zero. Each block is checked for that: without both sublayers it must return its input.

Shapes: B samples, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from shortllm.errors import UnsupportedModelError
from shortllm.model.decoder import BlockCall, Decoder, Entry
from shortllm.width_pruning.structure import find_outputs

Part = Literal["attention", "mlp"]
PARTS: tuple[Part, Part] = ("attention", "mlp")

Sublayer = tuple[int, Part]
"""Number of a block, and which part of it."""

VARIANTS: tuple[tuple[Part, ...], ...] = ((), ("attention",), ("mlp",))
"""What each of the three variants of a block lacks."""

Outputs = Mapping[int, Mapping[Part, str]]
"""For a block the names, within it, of the output projections of its attention and its MLP."""


def find_sublayers(decoder: Decoder, blocks: Sequence[int]) -> Outputs:
    """The output projections of each of `blocks`."""
    found = {
        b: dict(zip(PARTS, names, strict=True))
        for b, names in find_outputs(decoder, blocks).items()
    }
    entry = decoder.enter(torch.arange(1, 4)[None] % decoder.vocabulary)
    for b in decoder.through(list(blocks)):
        with without_sublayers(decoder, found, [(b, part) for part in PARTS]), torch.no_grad():
            after_BTD = decoder.apply(b, entry.stream_BTD, entry.calls[b])
        if not torch.equal(after_BTD.to(entry.stream_BTD), entry.stream_BTD):
            config: Any = decoder.model.config
            raise UnsupportedModelError(
                f"model type '{config.model_type}' cannot lose single sublayers: "
                f"block {b} changes the hidden state even if its attention and its MLP return "
                "zeros (a norm over the sum, or a norm with a bias). Remove whole blocks with "
                "`shortllm prune`"
            )
    return found


@contextmanager
def without_sublayers(
    decoder: Decoder, outputs: Outputs, removed: Iterable[Sublayer]
) -> Iterator[None]:
    """Within the context, the sublayers `removed` add nothing to the hidden state."""
    handles: list[Any] = []
    try:
        for b, part in removed:
            module = decoder.blocks[b].get_submodule(outputs[b][part])
            handles.append(module.register_forward_hook(_nothing))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nothing(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


class Variants:
    """A decoder to `walk` over in which each block counts as three.

    They are the whole block, the block without its attention, and without its MLP; a model has at
    most one of them. So models that begin alike share their passes here too.
    """

    def __init__(self, decoder: Decoder, outputs: Outputs) -> None:
        self._decoder = decoder
        self._outputs = outputs
        self.block_count = len(VARIANTS) * decoder.block_count
        self.blocks = [block for block in decoder.blocks for _ in VARIANTS]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def as_decoder(self) -> Decoder:
        """The same object, typed as a decoder for functions that use these methods only."""
        return cast(Decoder, self)

    def without(self, removed: Collection[Sublayer]) -> frozenset[int]:
        """A model without some sublayers, as the set of variants that it lacks."""
        gone = set(removed)
        kept = set()
        for b in range(self._decoder.block_count):
            lacking = tuple(part for part in PARTS if (b, part) in gone)
            if lacking in VARIANTS:
                kept.add(len(VARIANTS) * b + VARIANTS.index(lacking))
        return frozenset(range(self.block_count)) - kept

    def round(self, gone: frozenset[Sublayer], left: Sequence[Sublayer]) -> list[frozenset[int]]:
        """The models without `gone` and one of `left`; in the first round the intact one too."""
        sets = [gone | {one} for one in left]
        return [self.without(one) for one in (sets if gone else [gone, *sets])]

    def enter(self, ids_BT: Tensor) -> Entry:
        """Enter the model; each block's call is made once per variant."""
        entry = self._decoder.enter(ids_BT)
        calls = [call for call in entry.calls for _ in VARIANTS]
        return Entry(entry.ids_BT, entry.stream_BTD, calls)

    def through(self, order: Sequence[int]) -> Iterator[int]:
        """The variants in order, each while its block's weights are in memory."""
        of_block: dict[int, list[int]] = {}
        for v in order:
            of_block.setdefault(v // len(VARIANTS), []).append(v)
        for b in self._decoder.through(list(of_block)):
            yield from of_block[b]

    def apply(self, v: int, stream_BTD: Tensor, call: BlockCall) -> Tensor:
        """The hidden state after a block that lacks what the variant lacks."""
        b, variant = divmod(v, len(VARIANTS))
        lacking = [(b, part) for part in VARIANTS[variant]]
        with without_sublayers(self._decoder, self._outputs, lacking):
            return self._decoder.apply(b, stream_BTD, call)
