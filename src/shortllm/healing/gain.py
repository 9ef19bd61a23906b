"""Multiply the hidden state behind a gap by a factor, in the weights that there are.

Where blocks are missing, the hidden state is shorter than what later blocks were trained on, and
what they add weighs too much. The norm in front of each of them ignores the scale of the hidden
state, and so does the norm in front of the head. So a model that multiplies the hidden state `x`
behind a gap by α computes the same as one that divides by α whatever is added to it from there on:

    α x + o + m              =   α (x + o/α + m/α)        o, m: what attention and MLP add

    projection, norm         weights, gains and biases of what is added are divided by α
    no norm in front         weights of projections that read the hidden state as it is
                             (olmo2) are multiplied by α

The paper multiplies the embedding and all blocks before the gap instead, which changes the logits
of models whose head is the embedding. Several gaps: each block is divided by the product of the
factors before it.

Source: Prune&Comp, arXiv:2507.18212. How α is found: `least_squares.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.structure import is_projection
from shortllm.checkpoint.tensors import read_tensor
from shortllm.errors import UnsupportedModelError
from shortllm.healing.experts import Factor
from shortllm.healing.folding import TOKENS, Added, Fold, find_foldable, watching
from shortllm.model.decoder import BlockCall, Decoder
from shortllm.model.loading import TYPES
from shortllm.surgery.derived import require_stored, stored_name

PROBE = 2.0
"""The factor that is tried: a power of two, so that nothing is rounded in any precision."""

TOLERANCE = 1e-3
"""How much may change, relative to what a block adds: the epsilon of a norm does not scale."""


@dataclass(frozen=True, slots=True)
class Scalable:
    """What has to be changed in a block so that its output scales with its input, and how to write
    changes."""

    added: list[Added]
    """Divided by the factor."""
    readers: list[str] = field(default_factory=list)
    """Projections that read the hidden state as it is: multiplied by the factor."""

    def divided(self, checkpoint: Checkpoint, b: int, factor: float, fold: Fold) -> Fold:
        """`fold`, and what else of block `b` changes, for a hidden state divided by the factor."""
        found = dict(fold)
        if factor == 1:
            return found
        for added in self.added:
            for output in added.experts:
                held = found.get(output.name, output.factor(torch.ones(1)))
                assert isinstance(held, Factor)
                found[output.name] = replace(held, value=held.value / factor)
            offset = added.norm.offset if added.norm is not None else 0
            _multiply(checkpoint, b, f"{added.name}.weight", 1 / factor, found, offset)
            _multiply(checkpoint, b, f"{added.name}.bias", 1 / factor, found)
        for name in self.readers:
            _multiply(checkpoint, b, f"{name}.weight", factor, found)
        return found

    def weights(
        self, checkpoint: Checkpoint, b: int, factor: float, fold: Fold
    ) -> Iterator[tuple[str, Tensor]]:
        """The stored tensors of all that, by their names within the block, one at a time."""
        outputs = {one.name: one for added in self.added for one in added.experts}
        for name, new in self.divided(checkpoint, b, factor, fold).items():
            if isinstance(new, Tensor):
                yield name, new
            elif name in outputs:
                yield from outputs[name].weights(checkpoint, b, new)
            else:
                held = checkpoint.tensors[stored_name(checkpoint, b, name)]
                yield name, new.times(read_tensor(held))


def _multiply(
    checkpoint: Checkpoint, b: int, name: str, factor: float, fold: Fold, offset: int = 0
) -> None:
    """Multiply a tensor of a block in `fold`, if it is stored."""
    entry = checkpoint.tensors.get(stored_name(checkpoint, b, name))
    if entry is not None:
        new, times = fold.get(name), Factor(torch.tensor(factor), TYPES[entry.dtype], offset)
        fold[name] = times.times(new) if isinstance(new, Tensor) else times


def divisors(gains: Mapping[int, float], blocks: Collection[int]) -> dict[int, float]:
    """What to divide each of the blocks that are left by: the product of the factors before it."""
    found: dict[int, float] = {}
    product = 1.0
    for b in sorted(blocks):
        if product != 1.0:
            found[b] = product
        product *= gains.get(b, 1.0)
    return found


@torch.no_grad()
def find_scalable(
    checkpoint: Checkpoint, decoder: Decoder, blocks: Collection[int]
) -> dict[int, Scalable] | None:
    """How to scale each of `blocks`, by experiment; None if one of them, or the head, cannot be."""
    try:
        added = find_foldable(checkpoint, decoder, sorted(blocks))
    except UnsupportedModelError:
        return None
    ids_BT = torch.arange(1, TOKENS + 1)[None] % decoder.vocabulary
    entry = decoder.enter(ids_BT)
    stream_BTD = entry.stream_BTD.clone()
    found: dict[int, Scalable] = {}
    for b in decoder.through(range(decoder.block_count)):
        after_BTD = decoder.apply(b, stream_BTD.clone(), entry.calls[b])
        if b in added:
            found[b] = Scalable(added[b])
            _find_readers(decoder, b, entry.calls[b], stream_BTD, found[b])
            scaled_BTD = PROBE * _scaled(decoder, b, entry.calls[b], stream_BTD, found[b])[0]
            if not _equal(scaled_BTD, after_BTD, relative_to=after_BTD - stream_BTD):
                return None
            for name in found[b].readers:
                require_stored(checkpoint, b, name, needed_to="scale what a projection reads")
        stream_BTD = after_BTD
    with decoder.tail() as logits:
        intact_BTV, scaled_BTV = (
            logits(one, ids_BT.to(decoder.device)) for one in (stream_BTD, stream_BTD / PROBE)
        )
    return found if _equal(scaled_BTV, intact_BTV, relative_to=intact_BTV) else None


def _find_readers(
    decoder: Decoder, b: int, call: BlockCall, stream_BTD: Tensor, scalable: Scalable
) -> None:
    """Add the projections that read the hidden state as it is: their inputs scale with it.

    One after the other, as what is behind a reader is only as it was once that one is known.
    """
    _, intact = _scaled(decoder, b, call, stream_BTD, scalable, factor=1.0)
    new: list[str] | None = None
    while new is None or new:
        _, scaled = _scaled(decoder, b, call, stream_BTD, scalable)
        new = [
            name
            for name, given in scaled.items()
            if name not in scalable.readers and given.any()
            and torch.equal(PROBE * given, intact[name])
        ]  # fmt: skip
        scalable.readers.extend(new)


def _scaled(
    decoder: Decoder,
    b: int,
    call: BlockCall,
    stream_BTD: Tensor,
    scalable: Scalable,
    *,
    factor: float = PROBE,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the block returns for the hidden state divided by a factor, its weights scaled; and what
    each projection got."""
    block = decoder.blocks[b]
    names = [name for name, one in block.named_modules() if is_projection(one)]

    def multiply(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (factor * args[0], *args[1:])

    def divide(module: Any, args: Any, output: Tensor) -> Tensor:
        return output / factor

    with watching(block, names) as seen, ExitStack() as hooks:
        for added in scalable.added:
            hooks.enter_context(block.get_submodule(added.name).register_forward_hook(divide))
        for name in scalable.readers:
            module = block.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(multiply))
        after_BTD = decoder.apply(b, stream_BTD / factor, call)
    return after_BTD, {name: given for name, (given, _) in seen.items()}


def _equal(one: Tensor, other: Tensor, *, relative_to: Tensor) -> bool:
    difference = (one.float() - other.float()).norm()
    return bool(difference <= TOLERANCE * relative_to.float().norm())
