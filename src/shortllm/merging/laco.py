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
from collections.abc import Collection, Iterator, Mapping

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

Sum = Mapping[int, int]
"""How often each original block is in a sum; negative if it is subtracted."""

Sums = Mapping[int, Sum]
"""Remaining block -> the sum in its place, in order."""


def original_blocks(count: int) -> Sums:
    """The blocks of the original model."""
    return {b: {b: 1} for b in range(count)}


def folded(sums: Sums, block: int, others: int) -> Sums:
    """The blocks with the `others` after `block` folded into it."""
    names = list(sums)
    gone = names[names.index(block) + 1 :][:others]
    total: Counter[int] = Counter()
    for one, share in ((block, 1 - others), *((other, 1) for other in gone)):
        for original, times in sums[one].items():
            total[original] += share * times
    found = {original: times for original, times in sorted(total.items()) if times}
    return {b: found if b == block else one for b, one in sums.items() if b not in gone}


def changed_blocks(sums: Sums) -> dict[int, Sum]:
    """The blocks that others were folded into, ascending."""
    return {b: one for b, one in sums.items() if one != {b: 1}}


def require_alike(checkpoint: Checkpoint, decoder: Decoder) -> None:
    """Refuse models whose blocks cannot be added to one another."""
    first = _shapes(checkpoint, 0)
    for b, block in enumerate(decoder.blocks):
        shapes = _shapes(checkpoint, b)
        missing = sorted(set(block.state_dict()) - set(shapes))
        if missing:
            raise UnsupportedModelError(
                f"{checkpoint.id} stores block {b} under other names than its model's (no "
                f"'{missing[0]}'), so blocks cannot be added. Save it again with transformers' "
                "save_pretrained"
            )
        if shapes != first:
            raise UnsupportedModelError(
                f"blocks 0 and {b} of {checkpoint.id} are not built alike, so they cannot be "
                "merged. Remove whole blocks with `shortllm prune`"
            )
    if any(dtype not in ("F64", "F32", "F16", "BF16") for _, dtype in first.values()):
        raise UnsupportedModelError(
            f"{checkpoint.id} is quantized, so its weights cannot be added. Give the unquantized "
            "model"
        )


def _shapes(checkpoint: Checkpoint, b: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each tensor of a block, by its name within the block."""
    head = f"{checkpoint.block_names.prefix}.{b}."
    return {
        name.removeprefix(head): (entry.shape, entry.dtype)
        for name, entry in checkpoint.tensors.items()
        if name.startswith(head)
    }


def merged_tensors(checkpoint: Checkpoint, one: Sum) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a sum by their names within a block, in their stored type."""
    prefix = checkpoint.block_names.prefix
    for name in _shapes(checkpoint, 0):
        total: Tensor | None = None
        for block, times in one.items():
            part = read_tensor(checkpoint.tensors[f"{prefix}.{block}.{name}"])
            share = times * part.to(torch.promote_types(part.dtype, torch.float32))
            total = share if total is None else total + share
        assert total is not None
        yield name, total.to(part.dtype)


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
        """Run the original model once; `first` is the lowest block that may be changed."""
        self._decoder = decoder
        self._checkpoint = checkpoint
        self._first = first
        self._advance = advance
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
        self._advance(block_flops(self._decoder, b) * self._ids_BT.numel())

    def _final(self, sums: Sums) -> Tensor:
        """The final hidden state, `[B, T, D]`."""
        changed = changed_blocks(sums)
        if not changed:
            return self._entering[-1]
        lowest = min(changed)  # below it, all blocks are original
        stream_BTD = self._groups.allocate().copy_(self._entering[lowest - self._first])
        for b in self._decoder.through([b for b in sums if b >= lowest]):
            if b in changed:
                self._put(b, sums[b])
            try:
                self._apply(b, stream_BTD)
            finally:
                if b in changed and not self._decoder.streamed:
                    self._put(b, {b: 1})
        return stream_BTD

    @torch.no_grad()
    def _put(self, b: int, one: Sum) -> None:
        """Replace the weights of a block in memory."""
        state = self._decoder.blocks[b].state_dict()
        for name, tensor in merged_tensors(self._checkpoint, one):
            if name in state:  # some checkpoints also store buffers
                state[name].copy_(tensor)

    def cosine_similarity(self, sums: Sums) -> float:
        """Mean over tokens of the cosine between the final hidden states and the original's."""
        found_BTD, wanted_BTD = self._final(sums), self._entering[-1]
        total = 0.0
        for rows in self._groups.rows:
            total += cosine(found_BTD[rows], wanted_BTD[rows]).double().sum().item()
        return total / self._ids_BT.numel()

    @torch.no_grad()
    def perplexity(self, sums: Sums) -> float:
        """Perplexity on the calibration samples."""
        final_BTD, total, decoder, ids_BT = self._final(sums), 0.0, self._decoder, self._ids_BT
        with decoder.tail() as logits:
            for rows, columns in token_slices(ids_BT, slice_tokens(decoder)):
                piece_BTD = final_BTD[rows, columns].to(decoder.device)
                logits_NV = logits(piece_BTD, ids_BT[rows, columns]).flatten(0, 1)
                target_N = targets(ids_BT, rows, columns)
                total += next_token_nll(logits_NV, target_N).double().sum().item()
        return perplexity(total / (len(ids_BT) * (ids_BT.shape[1] - 1)))

    @torch.no_grad()
    def logits(self, sums: Sums) -> Tensor:
        """What the model computes, float32 `[B, T, V]`."""
        stream_BTD = self._final(sums).to(self._decoder.device)
        with self._decoder.tail() as logits:  # bypasses the blocks, so the stream comes first
            return logits(stream_BTD, self._ids_BT).float().cpu()


def fold_named(merger: Merger, sums: Sums, named: Collection[int]) -> tuple[Sums, list[Merge]]:
    """Fold each gap of named blocks into the block before it, from the top down."""
    tries: list[Merge] = []
    for gap in reversed(gaps_of(named)):
        sums = folded(sums, gap.start - 1, len(gap.blocks))
        found = merger.cosine_similarity(sums)
        tries.append(Merge(block=gap.start - 1, merged=gap.blocks, cosine=found, kept=True))
    return sums, tries


def sweep(merger: Merger, sums: Sums, options: MergeOptions) -> tuple[Sums, list[Merge]]:
    """Merge from the top down, as long as the final hidden states stay similar."""
    tries: list[Merge] = []
    count, most = len(sums), options.max_merged
    place = max(count - options.protect_last - 1 - most, options.protect_first)
    while place >= options.protect_first:
        blocks = list(sums)
        others = min(most, len(blocks) - options.protect_last - 1 - place)
        if options.remove is not None:
            others = min(others, options.remove - (count - len(blocks)))
        if others < 1:
            break
        tried = folded(sums, blocks[place], others)
        found = merger.cosine_similarity(tried)
        kept = found > options.threshold
        gone = blocks[place + 1 : place + 1 + others]
        tries.append(Merge(block=blocks[place], merged=gone, cosine=found, kept=kept))
        if kept:
            sums = tried
            place = min(place - options.interval, len(sums) - options.protect_last - 1 - most)
        else:
            place -= 1
    return sums, tries
