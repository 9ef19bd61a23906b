"""Merge blocks: fold them into one another, from the top down, by the differences of their weights.

    W_l  ←  W_l + Σ_{k=1..m} (W_{l+k} - W_l)          and blocks l+1 .. l+m are removed

A merge is kept if the final hidden states still point in the direction of the original's. A high
cosine can hide a broken model, so the record also has the perplexity of both models. Blocks below
`l` are the original ones, so a try begins with the original's hidden state at `l`. Every remaining
block is a sum of original blocks, which is all that is stored of it; weights are read, and added in
float32, when they are needed.

    shortllm merge MODEL --threshold 0.65 --out DIR

Source: Yang et al. 2024, LaCo, arXiv:2402.11187.

Shapes: B samples, T tokens, D width.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from shortllm.calls import accepts
from shortllm.checkpoint.hub import ModelSource
from shortllm.checkpoint.options import SurgeryOptions
from shortllm.checkpoint.shorten_config import refuse_type, structurally_protected
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tensors import read_tensor
from shortllm.data.calibration import Calibration, calibrate
from shortllm.errors import CheckpointError, ShortLLMError, UnsupportedModelError
from shortllm.merging.options import Merge, MergeOptions, Merging
from shortllm.model import Session
from shortllm.model.decoder import Decoder
from shortllm.model.hidden_states import SampleGroups, StreamMemory
from shortllm.model.metrics import cosine, next_token_nll, perplexity
from shortllm.model.walk import slice_tokens, targets, token_slices
from shortllm.papers import LACO
from shortllm.progress import Advance, progress
from shortllm.pruning.budget import gaps_of
from shortllm.runtime import Runtime
from shortllm.surgery.apply import check_removal, renumbered_tensors
from shortllm.surgery.companions import companions_of, require_rules
from shortllm.surgery.derived import (
    Draft,
    copying,
    derive,
    derived_fingerprint,
    stored_name,
    verifying,
)
from shortllm.surgery.origin import provenance_of
from shortllm.surgery.verify import kv_cache_matches, probe_ids

log = logging.getLogger(__name__)

Sum = Mapping[int, int]
"""How often each original block is in a sum; negative if it is subtracted."""

Sums = Mapping[int, Sum]
"""Remaining block -> the sum in its place, in order."""


@accepts(options=MergeOptions, runtime=Runtime, surgery=SurgeryOptions)
def merge(
    model: ModelSource,
    out: Path,
    *,
    options: MergeOptions,
    runtime: Runtime,
    surgery: SurgeryOptions,
    revision: str | None = None,
) -> Merging:
    """Fold blocks into one another, from the top down, and write a plain checkpoint.

    Source: Yang et al. 2024, LaCo, arXiv:2402.11187.

    Args:
        model: a checkpoint directory, a Hub id, or a loaded model.
        out: the new checkpoint directory, which also gets merge.json.
        options: which blocks to merge; their fields can be given as keywords.
        runtime: where to compute; its fields can be given as keywords.
        surgery: `accept_unknown_references`; it can be given as a keyword.
        revision: of a Hub model.
    Returns:
        The content of merge.json: every try with its cosine, and the perplexity before and after.
    Raises:
        ShortLLMError: too few blocks are free, or no merge exceeds the threshold.
        UnsupportedModelError: the blocks of this model cannot be added or removed.
        CheckpointError: the result does not compute what it should.
        OutputError: `out` contains something else or cannot be written.
    """
    checkpoint = open_checkpoint(model, revision=revision)
    check_blocks(options, checkpoint.block_count)
    ids = calibrate(checkpoint, options.calibration)
    return merge_from(checkpoint, options, out, calibration=ids, session=Session(runtime))


def merge_from(
    checkpoint: Checkpoint,
    options: MergeOptions,
    target: Path,
    *,
    calibration: Calibration,
    session: Session,
) -> Merging:
    """The same for an open checkpoint and calibration ids."""
    count, memory = checkpoint.block_count, session.memory()
    check_blocks(options, count)
    refuse_type(checkpoint.config)
    require_rules(companions_of(checkpoint))
    if options.blocks is not None:
        check_removal(checkpoint, [b for b in range(count) if b not in options.blocks])
    expected = derived_fingerprint(
        checkpoint,
        calibration=calibration,
        session=session,
        merge=options.model_dump(mode="json", exclude={"calibration"}),
    )

    def draft() -> Draft:
        decoder = session.decoder(checkpoint)
        require_alike(checkpoint, decoder)
        with progress("merging", _block_passes(options, count)) as advance:
            merger = Merger(decoder, checkpoint, calibration.ids, memory, advance)
            sums, tries = _chosen(merger, options, structurally_protected(checkpoint.config))
        kept, changed = list(sums), changed_blocks(sums)
        removed = sorted(set(range(count)) - set(kept))
        config = check_removal(checkpoint, kept)
        last = [one for one in tries if one.kept][-1]
        if not math.isfinite(last.perplexity or math.inf):
            raise CheckpointError(
                f"with these blocks merged, the loss of {checkpoint.id} is not finite. Fold fewer "
                "blocks, or remove them with `shortllm prune`"
            )
        record = {
            "options": options.model_dump(mode="json", exclude={"calibration"}),
            "tries": tries,
            "kept": kept,
            "removed": removed,
            "sums": changed,
            "cosine": last.cosine,
            "intact_perplexity": merger.compared(original_blocks(count))[1],
            "perplexity": last.perplexity,
            "calibration": calibration.info.tokens_fingerprint,
            "dtype": session.dtype(checkpoint),
        }
        probe = Merger(decoder, checkpoint, probe_ids(decoder.model.config), memory)
        new = (
            (stored_name(checkpoint, kept.index(b), name), tensor)
            for b, one in changed.items()
            for name, tensor in merged_tensors(checkpoint, one)
        )
        merged = {str(b): one for b, one in changed.items()}
        entries = renumbered_tensors(checkpoint, kept)
        return Draft(
            record=record,
            config=config,
            provenance=provenance_of(
                checkpoint, removed, criterion="merge", paper=str(LACO), merged=merged
            ),
            bytes=sum(entry.bytes for entry in entries.values()),
            write=copying(entries, new),
            verify=verifying(target, session, probe.logits(sums), cached=kv_cache_matches(decoder)),
            kept=kept,
        )

    record = derive(
        Merging,
        target,
        checkpoint,
        draft,
        expected=expected,
        choices=options.model_dump(mode="json"),
    )
    if record.broken is not None:
        log.warning("%s: %s", target, record.broken)
    return record


def check_blocks(options: MergeOptions, count: int) -> None:
    """Refuse what cannot be done with this many blocks."""
    if options.blocks is not None:
        if 0 in options.blocks:
            raise ShortLLMError("block 0 has no block before it to fold it into. Give others")
        outside = [b for b in options.blocks if not 0 < b < count]
        if outside:
            raise ShortLLMError(
                f"there is no block {outside[0]} among {count}. Give numbers from 1 to {count - 1}"
            )
        return
    free = count - options.protect_first - options.protect_last
    if free < 2:
        raise ShortLLMError(
            f"a merge takes two blocks, and of {count} all but {max(free, 0)} are protected. "
            "Give smaller --protect-first and --protect-last"
        )
    if options.remove is not None and options.remove >= free:
        raise ShortLLMError(
            f"--remove {options.remove}: at most {free - 1} of {free} unprotected blocks can go. "
            f"Give --remove {free - 1} or less"
        )


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

    @torch.no_grad()
    def __init__(
        self,
        decoder: Decoder,
        checkpoint: Checkpoint,
        ids_BT: Tensor,
        memory: StreamMemory,
        advance: Advance = lambda passes: None,
    ) -> None:
        """Run the original model once; `advance` is told of each pass through a block."""
        self.block_count = decoder.block_count
        self._decoder = decoder
        self._checkpoint = checkpoint
        self._advance = advance
        self._ids_BT = ids_BT.to(decoder.device)
        self._groups = SampleGroups(decoder, ids_BT, memory)
        self._entering = self._groups.allocate(self.block_count + 1)
        """The original's stream entering each block, and leaving the last."""
        self._groups.entering(self._entering[0])
        for b in decoder.through(range(self.block_count)):
            self._entering[b + 1] = self._entering[b]
            self._groups.apply(b, self._entering[b + 1])
            advance(1)

    @torch.no_grad()
    def _final(self, sums: Sums) -> Tensor:
        """The final hidden state, `[B, T, D]`."""
        changed = changed_blocks(sums)
        lowest = min(changed, default=self.block_count)  # below it, all blocks are original
        stream_BTD = self._groups.allocate().copy_(self._entering[lowest])
        for b in self._decoder.through([b for b in sums if b >= lowest]):
            if b in changed:
                self._put(b, sums[b])
            try:
                self._groups.apply(b, stream_BTD)
            finally:
                if b in changed and not self._decoder.streamed:
                    self._put(b, {b: 1})
            self._advance(1)
        return stream_BTD

    def _put(self, b: int, one: Sum) -> None:
        """Replace the weights of a block in memory."""
        state = self._decoder.blocks[b].state_dict()
        for name, tensor in merged_tensors(self._checkpoint, one):
            if name in state:  # some checkpoints also store buffers
                state[name].copy_(tensor)

    def tried(self, sums: Sums, block: int, merged: Sequence[int], above: float = -2.0) -> Merge:
        """A try of folding blocks into `block`, kept if its cosine is `above` a number."""
        found, perplexity = self.compared(sums)
        return Merge(
            block=block,
            merged=list(merged),
            cosine=found,
            perplexity=perplexity,
            kept=found > above,
        )

    def compared(self, sums: Sums) -> tuple[float, float]:
        """Mean over tokens of the cosine between the final hidden states and the original's, and
        the perplexity on the calibration samples."""
        final_BTD, wanted_BTD = self._final(sums), self._entering[-1]
        total = 0.0
        for rows in self._groups.rows:
            total += cosine(final_BTD[rows], wanted_BTD[rows]).double().sum().item()
        return total / self._ids_BT.numel(), self._perplexity(final_BTD)

    @torch.no_grad()
    def _perplexity(self, final_BTD: Tensor) -> float:
        total, decoder, ids_BT = 0.0, self._decoder, self._ids_BT
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


def _block_passes(options: MergeOptions, count: int) -> int:
    """At most how often a block is run: every place is tried, and everything above it kept."""
    places: Collection[int] = range(options.protect_first, count - options.protect_last - 1)
    if options.blocks is not None:
        places = [gap.start - 1 for gap in gaps_of(options.blocks)]
    return count + sum(count - place for place in places)


def _chosen(
    merger: Merger, options: MergeOptions, fixed: Mapping[int, str]
) -> tuple[Sums, list[Merge]]:
    """The merged blocks, and every try: of the named blocks, else of a sweep."""
    if options.blocks is None:
        return sweep(merger, options, fixed)
    sums, tries = original_blocks(merger.block_count), []
    for gap in reversed(gaps_of(options.blocks)):
        sums = folded(sums, gap.start - 1, len(gap.blocks))
        tries.append(merger.tried(sums, gap.start - 1, gap.blocks))
    return sums, tries


def sweep(
    merger: Merger, options: MergeOptions, fixed: Mapping[int, str]
) -> tuple[Sums, list[Merge]]:
    """Merge from the top down, as long as the final hidden states stay similar.

    Args:
        fixed: blocks that cannot go, with the reason.
    """
    count, most = merger.block_count, options.max_merged
    sums, tries = original_blocks(count), list[Merge]()
    place = max(count - options.protect_last - 1 - most, options.protect_first)
    while place >= options.protect_first:
        blocks = list(sums)
        others = min(most, len(blocks) - options.protect_last - 1 - place)
        if options.remove is not None:
            others = min(others, options.remove - (count - len(blocks)))
        if others < 1:
            break
        above = blocks[place + 1 : place + 1 + others]
        gone = list(takewhile(lambda b: b not in fixed, above))
        if not gone:
            place -= 1
            continue
        tried = folded(sums, blocks[place], len(gone))
        tries.append(merger.tried(tried, blocks[place], gone, above=options.threshold))
        if tries[-1].kept:
            sums = tried
            place = min(place - options.interval, len(sums) - options.protect_last - 1 - most)
        else:
            place -= 1
    if not tries:
        raise UnsupportedModelError(
            f"no block can be folded into the one before it: {'; '.join(set(fixed.values()))}"
        )
    if len(sums) == count:
        best = max(one.cosine for one in tries)
        raise ShortLLMError(
            f"no merge leaves a mean cosine above {options.threshold}; the best reaches "
            f"{best:.3f}. Give a lower --threshold, or a smaller --max-merged"
        )
    return sums, tries
