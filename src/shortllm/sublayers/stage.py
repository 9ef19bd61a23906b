"""The stage: from a checkpoint to one without some of its attentions and MLPs.

Output projections of removed sublayers are written as zeros, every other byte is copied. A block
that loses both sublayers is removed, as by a plan.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.errors import CriterionError, DataError, UnsupportedModelError
from shortllm.files import PARTIAL, require_writable
from shortllm.journal import Journal
from shortllm.model.metrics import perplexity
from shortllm.model.session import Session
from shortllm.records import Cost
from shortllm.runtime import peak_memory, progress, versions
from shortllm.sublayers.options import RECORD, DroppedSublayer, SublayerDrop, SublayerOptions
from shortllm.sublayers.structure import (
    PARTS,
    Outputs,
    Sublayer,
    find_sublayers,
    whole_blocks,
    without_sublayers,
)
from shortllm.sublayers.writing import write_dropped, zeroed_names
from shortllm.surgery.apply import check_removal, renumbered_tensors, require_apart
from shortllm.surgery.derived import finished, made_fingerprint, require_free, require_stored

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from shortllm.data.calibration import Calibration
    from shortllm.model.decoder import Decoder

log = logging.getLogger(__name__)


def drop_sublayers(
    checkpoint: Checkpoint,
    options: SublayerOptions,
    target: Path,
    *,
    calibration: Calibration | None,
    session: Session,
) -> SublayerDrop:
    """Choose the sublayers, and write the checkpoint without them, with sublayers.json.

    A target that is up to date is left alone; another one that this stage made is replaced. What is
    written is loaded again and compared with the source whose sublayers and blocks are passed by,
    before it gets its name.

    Args:
        calibration: None where the sublayers are named.
    Raises:
        UnsupportedModelError: the sublayers of this model cannot go one by one.
        BudgetError: the model has no such sublayers, or not so many.
        CriterionError: the criterion gives numbers that cannot be ranked.
        CheckpointError: the result does not compute what was meant.
        OutputError: the target cannot be written, or holds something else.
        DataError: a criterion, and no text.
    """
    candidates = options.candidates(checkpoint.info())
    if options.criterion is not None and calibration is None:
        raise DataError(f"--criterion {options.criterion} looks at text. Give calibration ids")
    require_apart(checkpoint.directory, target)
    require_free(target, RECORD)
    expected = made_fingerprint(
        checkpoint,
        calibration=None if options.criterion is None else calibration,
        dtype=session.dtype(checkpoint),
        device=session.device.type,
        sublayers=options.model_dump(mode="json"),
    )
    found = finished(target, expected, SublayerDrop, RECORD)
    if found is not None:
        return found
    _refuse_quantized(checkpoint)
    require_writable(target.absolute().parent, checkpoint.bytes)
    work = target.with_name(f"{target.name}.choosing{PARTIAL}")
    started = time.monotonic()
    outputs, intact, dropped = _find(
        checkpoint, options, candidates, calibration, session, Journal(work, expected)
    )
    _write(
        checkpoint, options, target, dropped, intact, outputs,
        calibration=calibration, session=session, expected=expected, started=started,
    )  # fmt: skip
    shutil.rmtree(work, ignore_errors=True)
    return SublayerDrop.load(target / RECORD)


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    if getattr(checkpoint.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{checkpoint.id} is quantized, and its projections cannot be set to zero. Give the "
            "unquantized model"
        )


def _find(
    checkpoint: Checkpoint,
    options: SublayerOptions,
    candidates: Sequence[Sublayer],
    calibration: Calibration | None,
    session: Session,
    journal: Journal,
) -> tuple[Outputs, float | None, list[DroppedSublayer]]:
    """The output projections, the intact perplexity if it was measured, and what goes, in order."""
    decoder = session.decoder(checkpoint)
    outputs = find_sublayers(decoder, sorted({b for b, _ in candidates}))
    for b, names in outputs.items():
        for name in names.values():
            require_stored(checkpoint, b, name, so_that="they cannot be set to zero")
    if options.criterion is None or calibration is None:
        named = [DroppedSublayer(block=b, part=part, value=None) for b, part in candidates]
        return outputs, None, named
    ids_BT = calibration.ids
    intact, dropped = _choose(decoder, outputs, candidates, options, ids_BT, session, journal)
    return outputs, intact, dropped


def _choose(
    decoder: Decoder,
    outputs: Outputs,
    candidates: Sequence[Sublayer],
    options: SublayerOptions,
    ids_BT: Tensor,
    session: Session,
    journal: Journal,
) -> tuple[float | None, list[DroppedSublayer]]:
    """The intact model's perplexity, if it was measured, and what goes, in order."""
    from shortllm.model.walk import walk_flops
    from shortllm.sublayers.influence import Variants, influence, remove_one_by_one, rounds_flops

    number = options.remove
    assert number is not None
    if options.criterion == "sublayer-influence":
        with progress(
            "sublayers by influence",
            walk_flops(decoder, [frozenset()], *ids_BT.shape, head=False),
        ) as advance:
            found = influence(decoder, outputs, ids_BT, advance=advance)
        values = {one: found[one] for one in candidates}
        for (b, part), value in values.items():
            _require_finite(b, part, value, options)
        ranked = sorted(candidates, key=lambda one: (values[one], -one[0], PARTS.index(one[1])))
        order = [(one, values[one]) for one in ranked[:number]]
        return None, [DroppedSublayer(block=b, part=p, value=v) for (b, p), v in order]
    variants = Variants(decoder, outputs)
    work = rounds_flops(variants, candidates, number, *ids_BT.shape)
    with progress("sublayers by perplexity", work) as advance:
        intact, order = remove_one_by_one(
            variants, ids_BT, candidates, number,
            advance=advance, memory=session.memory(), journal=journal,
        )  # fmt: skip
    for (b, part), value in order:
        _require_finite(b, part, perplexity(value), options)
    return perplexity(intact), [
        DroppedSublayer(block=b, part=p, value=perplexity(v)) for (b, p), v in order
    ]


def _require_finite(b: int, part: str, value: float, options: SublayerOptions) -> None:
    if not math.isfinite(value):
        raise CriterionError(
            f"criterion '{options.criterion}' gives {value} for the {part} of block {b}, which "
            "cannot be ranked. Try --dtype float32, and look for extreme weights"
        )


def _write(
    checkpoint: Checkpoint,
    options: SublayerOptions,
    target: Path,
    dropped: list[DroppedSublayer],
    intact: float | None,
    outputs: Outputs,
    *,
    calibration: Calibration | None,
    session: Session,
    expected: str,
    started: float,
) -> None:
    """Write, load again, compare."""
    from shortllm.surgery.verify import verify_shortened

    gone: list[Sublayer] = [(one.block, one.part) for one in dropped]
    fixed = checkpoint.info().fixed
    whole = [b for b in whole_blocks(gone) if b not in fixed]
    zeroed = [one for one in gone if one[0] not in whole]
    kept = [b for b in range(checkpoint.block_count) if b not in whole]
    config, entries = dict(checkpoint.raw_config), dict(checkpoint.tensors)
    if whole:
        config, entries = check_removal(checkpoint, kept), renumbered_tensors(checkpoint, kept)
    names = zeroed_names(checkpoint, outputs, zeroed, kept)
    logits, cached = _expected(checkpoint, outputs, zeroed, whole, session)
    record = SublayerDrop(
        model=checkpoint.info(),
        criterion=options.criterion,
        options=options.model_dump(mode="json", exclude={"criterion"}),
        dropped=dropped,
        intact=intact,
        removed_blocks=whole,
        zeroed_parameters=sum(entries[name].elements for name in names),
        parameters=sum(entry.elements for entry in entries.values()),
        bytes=sum(entry.bytes for entry in entries.values()),
        calibration=(
            calibration.info.tokens_fingerprint if calibration and options.criterion else None
        ),
        dtype=session.dtype(checkpoint),
        versions=versions(),
        cost=Cost(seconds=round(time.monotonic() - started, 3), peak_bytes=peak_memory()),
        fingerprint=expected,
    )
    zeros = {name: entries[name] for name in names}

    def verify(written: Path) -> None:
        verify_shortened(
            str(target), session.decoder(open_checkpoint(written)), logits, cached=cached
        )

    with progress("writing the checkpoint", record.bytes) as advance:
        write_dropped(
            checkpoint, entries, zeros, config, target, record, advance=advance, verify=verify
        )


def _expected(
    checkpoint: Checkpoint,
    outputs: Outputs,
    zeroed: Sequence[Sublayer],
    whole: Sequence[int],
    session: Session,
) -> tuple[Tensor, bool]:
    """What the result must compute, and whether it must with a cache too.

    A function of its own, so that the source is let go before the result is loaded.
    """
    from shortllm.surgery.verify import bypass_logits, caches_rightly

    decoder = session.decoder(checkpoint)
    with without_sublayers(decoder, outputs, zeroed):
        logits = bypass_logits(decoder, whole)
    return logits, caches_rightly(decoder)
