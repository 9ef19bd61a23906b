"""Where attention and MLP are added to the hidden state, and a model without some of them.

A sublayer ends in its output projection, whose result is added to the hidden state, after a norm in
some families. A projection that returns zeros therefore removes the sublayer, if a norm of zeros is
zero. Each block is checked for that: without both sublayers it must return its input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shortllm.errors import UnsupportedModelError
from shortllm.model.decoder import Decoder
from shortllm.width_pruning.structure import find_outputs

Part = Literal["attention", "mlp"]
PARTS: tuple[Part, Part] = ("attention", "mlp")

Sublayer = tuple[int, Part]
"""Number of a block, and which part of it."""

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


def whole_blocks(removed: Collection[Sublayer]) -> list[int]:
    """Blocks that lose both sublayers, ascending."""
    gone = set(removed)
    return sorted(b for b, part in gone if part == "attention" and (b, "mlp") in gone)
