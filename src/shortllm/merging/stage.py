"""The stage: from a checkpoint to one whose blocks are folded into one another."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from shortllm.checkpoint.shorten_config import refuse_type
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.errors import ShortLLMError
from shortllm.files import require_writable
from shortllm.merging.options import MERGE_FILE, MergeOptions, Merging
from shortllm.model.session import Session
from shortllm.pruning.budget import gaps_of
from shortllm.records import Cost
from shortllm.runtime import peak_memory, progress, versions
from shortllm.surgery.apply import (
    PROVENANCE,
    check_removal,
    provenance_of,
    renumbered_tensors,
    require_apart,
)
from shortllm.surgery.made import finished, made_fingerprint, require_free, write_changed

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.data.calibration import Calibration
    from shortllm.merging.laco import Merged
    from shortllm.model.decoder import Decoder


log = logging.getLogger(__name__)


def merge(
    checkpoint: Checkpoint,
    options: MergeOptions,
    target: Path,
    *,
    calibration: Calibration,
    session: Session,
) -> Merging:
    """Fold blocks into one another, and write what is left as checkpoint `target`.

    A target that is up to date is left alone; another one that this stage made is replaced. What is
    written is loaded again and compared with the sums in memory, before it gets its name.

    Raises:
        UnsupportedModelError: blocks that cannot be added, or not be removed rightly.
        ShortLLMError: no merge exceeds the threshold.
        CheckpointError: the result does not compute what was meant.
        OutputError: the target cannot be written, or holds something else.
    """
    require_apart(checkpoint.directory, target)
    require_free(target, MERGE_FILE)
    options.check(checkpoint.block_count)
    refuse_type(checkpoint.config)
    expected = made_fingerprint(
        checkpoint,
        calibration=calibration,
        dtype=session.dtype(checkpoint),
        device=session.device.type,
        merge=options.model_dump(mode="json"),
    )
    found = finished(target, expected, Merging, MERGE_FILE)
    if found is not None:
        return found
    require_writable(target.absolute().parent, checkpoint.bytes)
    _merge(checkpoint, options, target, calibration, session, expected)
    return Merging.load(target / MERGE_FILE)


def _merge(
    checkpoint: Checkpoint,
    options: MergeOptions,
    target: Path,
    calibration: Calibration,
    session: Session,
    expected: str,
) -> None:
    """Find the sums, write, compare."""
    from shortllm.merging.laco import (
        Merger,
        fold_named,
        merged_tensors,
        original_blocks,
        require_alike,
        sweep,
    )
    from shortllm.surgery.verify import caches_rightly, verify_shortened

    started = time.monotonic()
    decoder = session.decoder(checkpoint)
    require_alike(checkpoint, decoder)
    count = checkpoint.block_count
    with progress("merging", _work(decoder, options, calibration.ids.numel())) as advance:
        merger = Merger(
            decoder,
            checkpoint,
            calibration.ids,
            session.memory(),
            first=_places(options, count)[0],
            advance=advance,
        )
        if options.blocks is None:
            swept = sweep(merger, original_blocks(count), options)
        else:
            swept = fold_named(merger, original_blocks(count), options.blocks)
    if len(swept.blocks) == count:
        best = max(one.cosine for one in swept.tries)
        raise ShortLLMError(
            f"no merge leaves a mean cosine above {options.threshold}; the best comes to "
            f"{best:.3f}. Give a lower --threshold, or a smaller --most-merged"
        )
    kept = [one.block for one in swept.blocks]
    config = check_removal(checkpoint, kept)
    logits = _logits(decoder, checkpoint, swept.blocks, session)
    cached = caches_rightly(decoder)

    def verify(written: Path) -> None:
        verify_shortened(
            str(target), session.decoder(open_checkpoint(written)), logits, cached=cached
        )

    record = Merging(
        model=checkpoint.info(),
        options=options.model_dump(mode="json"),
        tries=swept.tries,
        kept=kept,
        removed=sorted(set(range(count)) - set(kept)),
        sums={one.block: dict(one.counts) for one in swept.blocks if one.changed},
        cosine=swept.cosine,
        calibration=calibration.info.tokens_fingerprint,
        dtype=session.dtype(checkpoint),
        versions=versions(),
        cost=Cost(seconds=round(time.monotonic() - started, 3), peak_bytes=peak_memory()),
        fingerprint=expected,
    )
    prefix = checkpoint.block_names.prefix
    new = (
        (f"{prefix}.{place}.{name}", tensor)
        for place, one in enumerate(swept.blocks)
        if one.changed
        for name, tensor in merged_tensors(checkpoint, one)
    )
    provenance = provenance_of(
        checkpoint,
        record.removed,
        criterion="merge",
        merged={str(block): counts for block, counts in record.sums.items()},
        fingerprint=record.fingerprint,
    )
    entries = renumbered_tensors(checkpoint, kept)
    size = sum(entry.bytes for entry in entries.values())
    with progress("writing the merged checkpoint", size) as advance:
        write_changed(
            checkpoint, entries, new, {**config, PROVENANCE: provenance},
            target, record, MERGE_FILE, advance=advance, verify=verify,
        )  # fmt: skip


def _places(options: MergeOptions, count: int) -> list[int]:
    """Blocks that others may be folded into, ascending."""
    if options.blocks is not None:
        return [gap.start - 1 for gap in gaps_of(options.blocks)]
    return list(range(options.protect_first, count - options.protect_last - 1))


def _work(decoder: Decoder, options: MergeOptions, tokens: int) -> float:
    """Floating-point operations if every place is tried and all above it kept: the most it can
    take."""
    from shortllm.model.hidden_states import block_flops

    count = decoder.block_count
    one = [block_flops(decoder, b) for b in range(count)]
    return tokens * (sum(one) + sum(sum(one[place:]) for place in _places(options, count)))


def _logits(
    decoder: Decoder, checkpoint: Checkpoint, blocks: list[Merged], session: Session
) -> Tensor:
    """What the merged model computes on the probe, float32 `[2, 24, V]`."""
    import torch

    from shortllm.merging.laco import Merger
    from shortllm.surgery.verify import probe_ids

    ids_BT = probe_ids(decoder.model.config)
    place = next(place for place, one in enumerate(blocks) if one.changed)
    first = blocks[place].block
    merger = Merger(decoder, checkpoint, ids_BT, session.memory(), first=first)
    stream_BTD = merger.final(blocks, place).to(decoder.device)
    with decoder.tail() as logits, torch.no_grad():
        return logits(stream_BTD, ids_BT.to(decoder.device)).float().cpu()
