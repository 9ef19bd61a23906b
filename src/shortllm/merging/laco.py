"""Blocks folded into one another, from the top down, by adding the differences of their weights.

    W_l  ←  W_l + Σ_{k=1..m} (W_{l+k} - W_l)          and blocks l+1 .. l+m are removed

A merge is kept if the final hidden states still point in the direction of the original's. Blocks
below `l` are the original ones, so a try begins with the original's hidden state at `l` and runs
the merged block and the remaining ones above it. Every remaining block is a sum of original blocks,
which is all that is stored of it; weights are read, and added in float32, when they are needed.

Source: Yang et al. 2024, LaCo, arXiv:2402.11187.

Shapes: B samples, T tokens, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tensors import read_tensor
from shortllm.errors import UnsupportedModelError
from shortllm.merging.options import Merge, MergeOptions
from shortllm.model.decoder import Decoder
from shortllm.model.hidden_states import SampleGroups, StreamMemory, block_flops
from shortllm.model.metrics import cosine, next_token_nll, perplexity
from shortllm.model.walk import slice_tokens, targets, token_slices
from shortllm.pruning.budget import gaps_of
from shortllm.runtime import Advance


@dataclass(frozen=True, slots=True)
class Merged:
    """A block as a sum of original blocks."""

    block: int
    """The original block whose place it has."""
    counts: Counter[int] = field(hash=False)
    """How often each original block is in the sum; negative if it is subtracted."""

    @property
    def changed(self) -> bool:
        """Whether other blocks were folded into it."""
        return self.counts != Counter({self.block: 1})


def original_blocks(count: int) -> list[Merged]:
    """The blocks of the original model."""
    return [Merged(b, Counter({b: 1})) for b in range(count)]


def merged(blocks: Sequence[Merged], place: int, others: int) -> list[Merged]:
    """The blocks with the `others` after `place` folded into the one there."""
    one = blocks[place]
    counts: Counter[int] = Counter()
    for block, times in one.counts.items():
        counts[block] += times * (1 - others)
    for other in blocks[place + 1 : place + 1 + others]:
        for block, times in other.counts.items():
            counts[block] += times
    present = Counter({block: times for block, times in sorted(counts.items()) if times})
    return [*blocks[:place], Merged(one.block, present), *blocks[place + 1 + others :]]


def require_alike(checkpoint: Checkpoint, decoder: Decoder) -> None:
    """Refuse models whose blocks cannot be added to one another."""
    shapes = [_shapes(checkpoint, b) for b in range(checkpoint.block_count)]
    for b, block in enumerate(decoder.blocks):
        names = set(block.state_dict())
        if not names <= set(shapes[b]):
            name = sorted(names - set(shapes[b]))[0]
            raise UnsupportedModelError(
                f"{checkpoint.id} stores block {b} under other names than its model's (no "
                f"'{name}'), so blocks cannot be added. Save it again with transformers' "
                "save_pretrained"
            )
        if shapes[b] != shapes[0]:
            raise UnsupportedModelError(
                f"blocks 0 and {b} of {checkpoint.id} are not built alike, so they cannot be "
                "merged. Remove whole blocks with `shortllm prune`"
            )
        if any(dtype not in ("F64", "F32", "F16", "BF16") for _, dtype in shapes[b].values()):
            raise UnsupportedModelError(
                f"{checkpoint.id} is quantized, so its weights cannot be added. Give the "
                "unquantized model"
            )


def _shapes(checkpoint: Checkpoint, b: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each tensor of a block, by its name within the block."""
    head = f"{checkpoint.block_names.prefix}.{b}."
    return {
        name.removeprefix(head): (entry.shape, entry.dtype)
        for name, entry in checkpoint.tensors.items()
        if name.startswith(head)
    }


def merged_tensors(checkpoint: Checkpoint, one: Merged) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a merged block by their names within it, in their stored type."""
    prefix = checkpoint.block_names.prefix
    for name in _shapes(checkpoint, one.block):
        total: Tensor | None = None
        for block, times in one.counts.items():
            part = read_tensor(checkpoint.tensors[f"{prefix}.{block}.{name}"])
            stored = part.dtype
            part = times * part.to(torch.promote_types(stored, torch.float32))
            total = part if total is None else total + part
        assert total is not None
        yield name, total.to(stored)


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What the sweep found."""

    blocks: list[Merged]
    """Blocks of the merged model."""
    tries: list[Merge]
    cosine: float


class Merger:
    """A model whose blocks are sums of its original ones, on calibration samples."""

    def __init__(
        self,
        decoder: Decoder,
        checkpoint: Checkpoint,
        ids_BT: Tensor,
        memory: StreamMemory,
        *,
        first: int = 0,
        advance: Advance = lambda work: None,
    ) -> None:
        """Run the original model once.

        Args:
            first: the lowest block that may be changed.
        """
        self._decoder = decoder
        self._checkpoint = checkpoint
        self._first = first
        self._advance = advance
        self._tokens = ids_BT.numel()
        self._ids_BT = ids_BT.to(decoder.device)
        self._groups = SampleGroups(decoder, ids_BT, memory)
        count = decoder.block_count
        self._entering = self._groups.allocate(count + 1 - first)
        """The original's stream entering each block from `first` on, and leaving the last."""
        stream_BTD = self._groups.entering()
        for b in decoder.through(range(count)):
            if b >= first:
                self._entering[b - first] = stream_BTD
            self._apply(b, stream_BTD)
        self._entering[count - first] = stream_BTD

    @torch.no_grad()
    def _apply(self, b: int, stream_BTD: Tensor) -> None:
        """Take a stream through block `b`, in place."""
        self._groups.apply(b, stream_BTD)
        self._advance(block_flops(self._decoder, b) * self._tokens)

    def final(self, blocks: Sequence[Merged], place: int) -> Tensor:
        """The final hidden state, `[B, T, D]`; below `place` all blocks are original."""
        entering_BTD = self._entering[blocks[place].block - self._first]
        stream_BTD = self._groups.allocate().copy_(entering_BTD)
        above = blocks[place:]
        order = self._decoder.through([one.block for one in above])
        for one, b in zip(above, order, strict=True):
            if one.changed:
                _put(self._decoder, self._checkpoint, one)
            try:
                self._apply(b, stream_BTD)
            finally:
                if one.changed and not self._decoder.streamed:
                    _put(self._decoder, self._checkpoint, Merged(b, Counter({b: 1})))
        return stream_BTD

    def cosine_similarity(self, blocks: Sequence[Merged], place: int) -> float:
        """Mean over tokens of the cosine between this model's final hidden states and the
        original's."""
        found_BTD, wanted_BTD = self.final(blocks, place), self._entering[-1]
        total = 0.0
        for rows in self._groups.rows:
            total += cosine(found_BTD[rows], wanted_BTD[rows]).double().sum().item()
        return total / self._tokens

    @torch.no_grad()
    def perplexity(self, blocks: Sequence[Merged] | None) -> float:
        """Perplexity on the calibration samples; of the original model if `blocks` is None."""
        final_BTD = self._entering[-1]
        if blocks is not None:
            final_BTD = self.final(blocks, lowest_changed(blocks))
        total, decoder, ids_BT = 0.0, self._decoder, self._ids_BT
        with decoder.tail() as logits:
            for rows, columns in token_slices(ids_BT, slice_tokens(decoder)):
                piece_BTD = final_BTD[rows, columns].to(decoder.device)
                logits_NV = logits(piece_BTD, ids_BT[rows, columns]).flatten(0, 1)
                target_N = targets(ids_BT, rows, columns)
                total += next_token_nll(logits_NV, target_N).double().sum().item()
        return perplexity(total / (len(ids_BT) * (ids_BT.shape[1] - 1)))


def lowest_changed(blocks: Sequence[Merged]) -> int:
    """Place of the lowest block that others were folded into."""
    return next(place for place, one in enumerate(blocks) if one.changed)


@torch.no_grad()
def _put(decoder: Decoder, checkpoint: Checkpoint, one: Merged) -> None:
    """Replace the weights of a block in memory."""
    state = decoder.blocks[one.block].state_dict()
    for name, tensor in merged_tensors(checkpoint, one):
        if name in state:  # some checkpoints also store buffers
            state[name].copy_(tensor)


def fold_named(merger: Merger, blocks: list[Merged], named: Collection[int]) -> Swept:
    """Fold each gap of named blocks into the block before it, from the top down."""
    tries: list[Merge] = []
    for gap in reversed(gaps_of(named)):
        place, others = gap.start - 1, len(gap.blocks)
        blocks = merged(blocks, place, others)
        similarity = merger.cosine_similarity(blocks, place)
        tries.append(Merge(block=place, merged=gap.blocks, cosine=similarity, kept=True))
    return Swept(blocks=blocks, tries=tries, cosine=tries[-1].cosine)


def sweep(merger: Merger, blocks: list[Merged], options: MergeOptions) -> Swept:
    """Merge from the top down, as long as the final hidden states stay similar."""
    tries: list[Merge] = []
    count, similarity = len(blocks), 1.0
    most = options.max_merged
    place = max(count - options.protect_last - 1 - most, options.protect_first)
    while place >= options.protect_first:
        others = min(most, len(blocks) - options.protect_last - 1 - place)
        if options.remove is not None:
            others = min(others, options.remove - (count - len(blocks)))
        if others < 1:
            break
        tried = merged(blocks, place, others)
        found = merger.cosine_similarity(tried, place)
        kept = found > options.threshold
        gone = [one.block for one in blocks[place + 1 : place + 1 + others]]
        tries.append(Merge(block=blocks[place].block, merged=gone, cosine=found, kept=kept))
        if kept:
            blocks, similarity = tried, found
            highest = len(blocks) - options.protect_last - 1 - most
            place = min(place - options.interval, highest)
        else:
            place -= 1
    return Swept(blocks=blocks, tries=tries, cosine=similarity)
