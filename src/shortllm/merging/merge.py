"""Merge blocks: from a checkpoint to one whose blocks are sums of the original ones.

A high cosine can hide a broken model, so the record also has the perplexity of both models on the
calibration text.

    shortllm merge MODEL --threshold 0.65 --out DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shortllm.checkpoint.shorten_config import refuse_type
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.data.texts import calibrate
from shortllm.errors import ShortLLMError
from shortllm.merging.options import MergeOptions, Merging
from shortllm.model.session import Session
from shortllm.options import accepts
from shortllm.pruning.budget import gaps_of
from shortllm.runtime import Runtime, progress
from shortllm.surgery.apply import check_removal, provenance_of, renumbered_tensors
from shortllm.surgery.derived import Draft, copying, derive, derived_fingerprint, verifying

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.data.calibration import Calibration
    from shortllm.merging.laco import Merged, Swept
    from shortllm.model.decoder import Decoder


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
    return derive(
        Merging,
        target,
        checkpoint,
        lambda: _draft(checkpoint, options, target, calibration, session),
        expected=expected,
    )


def check_blocks(options: MergeOptions, count: int) -> None:
    """Refuse what cannot be done with this many blocks."""
    for block in options.blocks or ():
        if not 0 <= block < count:
            raise ShortLLMError(
                f"there is no block {block} among {count}. Give numbers from 1 to {count - 1}"
            )
        if block == 0:
            raise ShortLLMError("block 0 has no block before it to fold it into. Give others")
    if options.blocks is not None:
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
    """Find the sums, and describe the checkpoint made of them."""
    from shortllm.merging.laco import merged_tensors
    from shortllm.surgery.verify import kv_cache_matches

    swept, perplexities = _swept(checkpoint, options, calibration.ids, session)
    kept = [one.block for one in swept.blocks]
    config = check_removal(checkpoint, kept)
    logits = _logits(session.decoder(checkpoint), checkpoint, swept.blocks, session)
    cached = kv_cache_matches(session.decoder(checkpoint))
    removed = sorted(set(range(checkpoint.block_count)) - set(kept))
    sums = {one.block: dict(one.counts) for one in swept.blocks if one.changed}
    record = {
        "options": options.model_dump(mode="json", exclude={"calibration"}),
        "tries": swept.tries,
        "kept": kept,
        "removed": removed,
        "sums": sums,
        "cosine": swept.cosine,
        "intact_perplexity": perplexities[0],
        "perplexity": perplexities[1],
        "calibration": calibration.info.tokens_fingerprint,
        "dtype": session.dtype(checkpoint),
    }
    prefix = checkpoint.block_names.prefix
    new = (
        (f"{prefix}.{place}.{name}", tensor)
        for place, one in enumerate(swept.blocks)
        if one.changed
        for name, tensor in merged_tensors(checkpoint, one)
    )
    merged = {str(block): counts for block, counts in sums.items()}
    entries = renumbered_tensors(checkpoint, kept)
    return Draft(
        record=record,
        config=config,
        provenance=provenance_of(checkpoint, removed, criterion="merge", merged=merged),
        bytes=sum(entry.bytes for entry in entries.values()),
        write=copying(entries, new),
        verify=verifying(target, session, logits, cached=cached),
    )


def _swept(
    checkpoint: Checkpoint, options: MergeOptions, ids_BT: Tensor, session: Session
) -> tuple[Swept, tuple[float, float]]:
    """What the sweep finds, and the perplexity of the original and the merged model."""
    from shortllm.merging.laco import Merger, fold_named, original_blocks, require_alike, sweep

    decoder = session.decoder(checkpoint)
    require_alike(checkpoint, decoder)
    count = checkpoint.block_count
    first = _places(options, count)[0]
    with progress("merging", _work(decoder, options, ids_BT.numel())) as advance:
        merger = Merger(decoder, checkpoint, ids_BT, session.memory(), first=first, advance=advance)
        if options.blocks is None:
            swept = sweep(merger, original_blocks(count), options)
        else:
            swept = fold_named(merger, original_blocks(count), options.blocks)
    if len(swept.blocks) == count:
        best = max(one.cosine for one in swept.tries)
        raise ShortLLMError(
            f"no merge leaves a mean cosine above {options.threshold}; the best reaches "
            f"{best:.3f}. Give a lower --threshold, or a smaller --max-merged"
        )
    return swept, (merger.perplexity(None), merger.perplexity(swept.blocks))


def _places(options: MergeOptions, count: int) -> list[int]:
    """Blocks that others may be folded into, ascending."""
    if options.blocks is not None:
        return [gap.start - 1 for gap in gaps_of(options.blocks)]
    return list(range(options.protect_first, count - options.protect_last - 1))


def _work(decoder: Decoder, options: MergeOptions, tokens: int) -> float:
    """Floating-point operations if every place is tried and everything above it kept: at most."""
    from shortllm.model.hidden_states import block_flops

    count = decoder.block_count
    one = [block_flops(decoder, b) for b in range(count)]
    return tokens * (sum(one) + sum(sum(one[place:]) for place in _places(options, count)))


def _logits(
    decoder: Decoder, checkpoint: Checkpoint, blocks: list[Merged], session: Session
) -> Tensor:
    """What the merged model computes on the probe, float32 `[2, 24, V]`."""
    import torch

    from shortllm.merging.laco import Merger, lowest_changed
    from shortllm.surgery.verify import probe_ids

    ids_BT = probe_ids(decoder.model.config)
    place = lowest_changed(blocks)
    merger = Merger(decoder, checkpoint, ids_BT, session.memory(), first=blocks[place].block)
    stream_BTD = merger.final(blocks, place).to(decoder.device)
    with decoder.tail() as logits, torch.no_grad():
        return logits(stream_BTD, ids_BT.to(decoder.device)).float().cpu()
