"""Merge blocks: from a checkpoint to one whose blocks are sums of the original ones.

A high cosine can hide a broken model, so the record also has the perplexity of both models on the
calibration text.

    shortllm merge MODEL --threshold 0.65 --out DIR
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from shortllm.checkpoint.shorten_config import refuse_type
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.data.calibration import Calibration
from shortllm.data.texts import calibrate
from shortllm.errors import ShortLLMError
from shortllm.merging.laco import (
    Merger,
    Sums,
    changed_blocks,
    fold_named,
    merged_tensors,
    original_blocks,
    require_alike,
    sweep,
)
from shortllm.merging.options import Merge, MergeOptions, Merging
from shortllm.model.decoder import Decoder
from shortllm.model.hidden_states import block_flops
from shortllm.model.session import Session
from shortllm.options import accepts
from shortllm.pruning.budget import gaps_of
from shortllm.runtime import Runtime, progress
from shortllm.surgery.apply import check_removal, provenance_of, renumbered_tensors
from shortllm.surgery.derived import (
    Draft,
    copying,
    derive,
    derived_fingerprint,
    stored_name,
    verifying,
)
from shortllm.surgery.verify import kv_cache_matches, probe_ids


@accepts(options=MergeOptions, runtime=Runtime)
def merge(
    model: str,
    out: Path | str,
    *,
    options: MergeOptions,
    runtime: Runtime,
    revision: str | None = None,
) -> Merging:
    """Fold blocks into one another, from the top down, and write a plain checkpoint.

    Source: Yang et al. 2024, LaCo, arXiv:2402.11187.

    Args:
        model: a checkpoint directory or Hub id.
        out: the new checkpoint directory, which also gets merge.json.
        options: which blocks to merge; their fields can be given as keywords.
        runtime: where to compute; its fields can be given as keywords.
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
    return merge_from(checkpoint, options, Path(out), calibration=ids, session=Session(runtime))


def merge_from(
    checkpoint: Checkpoint,
    options: MergeOptions,
    target: Path,
    *,
    calibration: Calibration,
    session: Session,
) -> Merging:
    """The same for an open checkpoint and calibration ids."""
    check_blocks(options, checkpoint.block_count)
    refuse_type(checkpoint.config)
    expected = derived_fingerprint(
        checkpoint,
        calibration=calibration,
        session=session,
        merge=options.model_dump(mode="json", exclude={"calibration"}),
    )

    def draft() -> Draft:
        return _draft(checkpoint, options, target, calibration, session)

    return derive(Merging, target, checkpoint, draft, expected=expected)


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


def _draft(
    checkpoint: Checkpoint,
    options: MergeOptions,
    target: Path,
    calibration: Calibration,
    session: Session,
) -> Draft:
    """Find the sums, and describe the checkpoint derived from them."""
    decoder, memory, count = session.decoder(checkpoint), session.memory(), checkpoint.block_count
    merger, sums, tries = _swept(decoder, checkpoint, options, calibration.ids, session)
    kept = list(sums)
    config = check_removal(checkpoint, kept)
    changed = changed_blocks(sums)
    probe = Merger(
        decoder, checkpoint, probe_ids(decoder.model.config), memory, first=min(changed)
    )  # fmt: skip
    removed = sorted(set(range(count)) - set(kept))
    record = {
        "options": options.model_dump(mode="json", exclude={"calibration"}),
        "tries": tries,
        "kept": kept,
        "removed": removed,
        "sums": changed,
        "cosine": [one.cosine for one in tries if one.kept][-1],
        "intact_perplexity": merger.perplexity(original_blocks(count)),
        "perplexity": merger.perplexity(sums),
        "calibration": calibration.info.tokens_fingerprint,
        "dtype": session.dtype(checkpoint),
    }
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
        provenance=provenance_of(checkpoint, removed, criterion="merge", merged=merged),
        bytes=sum(entry.bytes for entry in entries.values()),
        write=copying(entries, new),
        verify=verifying(target, session, probe.logits(sums), cached=kv_cache_matches(decoder)),
    )


def _swept(
    decoder: Decoder,
    checkpoint: Checkpoint,
    options: MergeOptions,
    ids_BT: Tensor,
    session: Session,
) -> tuple[Merger, Sums, list[Merge]]:
    """What is folded into what, and every try."""
    require_alike(checkpoint, decoder)
    count = checkpoint.block_count
    places = range(options.protect_first, count - options.protect_last - 1)
    into = [gap.start - 1 for gap in gaps_of(options.blocks)] if options.blocks else list(places)
    # at most: every place is tried, and everything above it kept
    flops = [block_flops(decoder, b) for b in range(count)]
    work = ids_BT.numel() * (sum(flops) + sum(sum(flops[place:]) for place in into))
    original = original_blocks(count)
    with progress("merging", work) as advance:
        merger = Merger(
            decoder, checkpoint, ids_BT, session.memory(), first=into[0], advance=advance
        )  # fmt: skip
        if options.blocks is None:
            sums, tries = sweep(merger, original, options)
        else:
            sums, tries = fold_named(merger, original, options.blocks)
    if len(sums) == count:
        best = max(one.cosine for one in tries)
        raise ShortLLMError(
            f"no merge leaves a mean cosine above {options.threshold}; the best reaches "
            f"{best:.3f}. Give a lower --threshold, or a smaller --max-merged"
        )
    return merger, sums, tries
