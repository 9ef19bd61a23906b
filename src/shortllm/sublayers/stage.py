"""The stage: from a checkpoint to one without some of its attentions and MLPs.

Output projections of removed sublayers are written as zeros, every other byte is copied. A block
that loses both sublayers is removed, as by a plan.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm import __version__
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.surgery import (
    PROVENANCE,
    carried_files,
    carried_fingerprint,
    check_removal,
    renumbered_tensors,
    require_apart,
)
from shortllm.checkpoint.tensors import TensorEntry, read_tensor_table
from shortllm.checkpoint.tokenizer import write_special_tokens
from shortllm.checkpoint.writer import write_tensors
from shortllm.errors import CriterionError, DataError, OutputError, UnsupportedModelError
from shortllm.files import PARTIAL, fingerprint, partial_directory, require_writable
from shortllm.journal import Journal
from shortllm.metrics import perplexity
from shortllm.results import Cost
from shortllm.runtime import peak_memory, progress, versions
from shortllm.stages import Session
from shortllm.sublayers.options import SublayerOptions
from shortllm.sublayers.record import RECORD, DroppedSublayer, SublayerDrop
from shortllm.sublayers.structure import (
    PARTS,
    Outputs,
    Sublayer,
    find_sublayers,
    whole_blocks,
    without_sublayers,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shortllm.calibration import Calibration
    from shortllm.model.decoder import Decoder

log = logging.getLogger(__name__)

ZEROS = f"zeros{PARTIAL}"
"""File, without space on the disk, that zeros are copied from while a checkpoint is written."""


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
    """
    candidates = options.candidates(checkpoint.info())
    if options.criterion is not None and calibration is None:
        raise DataError(f"--criterion {options.criterion} looks at text. Give calibration ids")
    require_apart(checkpoint.directory, target)
    require_free(target)
    expected = drop_fingerprint(checkpoint, options, calibration, session)
    if is_made_by(target, expected):
        log.info("%s is up to date, skipped", target)
        return SublayerDrop.load(target / RECORD)
    _refuse_quantized(checkpoint)
    require_writable(target.absolute().parent, checkpoint.bytes)
    work = target.with_name(f"{target.name}.choosing{PARTIAL}")
    started = time.monotonic()
    decoder = session.decoder(checkpoint)
    outputs = find_sublayers(decoder, sorted({b for b, _ in candidates}))
    _require_stored(checkpoint, outputs)
    intact, dropped = None, [DroppedSublayer(block=b, part=p, value=None) for b, p in candidates]
    if options.criterion is not None and calibration is not None:
        journal = Journal(work, expected)
        intact, dropped = _choose(
            decoder, outputs, candidates, options, calibration, session, journal
        )
    _write(
        checkpoint, options, target, dropped, intact, outputs,
        calibration=calibration, session=session, expected=expected, started=started,
    )  # fmt: skip
    shutil.rmtree(work, ignore_errors=True)
    return SublayerDrop.load(target / RECORD)


def drop_fingerprint(
    checkpoint: Checkpoint,
    options: SublayerOptions,
    calibration: Calibration | None,
    session: Session,
) -> str:
    """Of everything the checkpoint without sublayers depends on."""
    text = calibration is not None and options.criterion is not None
    return fingerprint(
        {
            "model": checkpoint.fingerprint,
            "other files": carried_fingerprint(checkpoint.directory),
            "sublayers": options.model_dump(mode="json"),
            "calibration": calibration.info.tokens_fingerprint if calibration and text else None,
            "dtype": session.dtype(checkpoint),
            "device": session.device.type,
        }
    )


def require_free(target: Path) -> None:
    """Refuse a target that holds something else than a checkpoint of this stage.

    Raises:
        OutputError: it is a file, or a directory with other things in it.
    """
    if target.is_file():
        raise OutputError(f"--out {target} is a file. Give a directory")
    if target.is_dir() and any(target.iterdir()) and not (target / RECORD).is_file():
        raise OutputError(f"{target} holds something else. Choose another --out, or delete it")


def is_made_by(target: Path, expected: str) -> bool:
    """Whether `target` is a finished checkpoint of this stage with this fingerprint."""
    try:
        record = SublayerDrop.load(target / RECORD)
        read_tensor_table(target)
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # what the package raises is a ValueError
        return False
    held = (config.get(PROVENANCE) or {}).get("fingerprint")
    return record.fingerprint == held == expected


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    if getattr(checkpoint.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{checkpoint.id} is quantized, and its projections cannot be set to zero. Give the "
            "unquantized model"
        )


def _require_stored(checkpoint: Checkpoint, outputs: Outputs) -> None:
    """Refuse checkpoints whose tensors are called otherwise than the model's parameters."""
    for b, names in outputs.items():
        for name in names.values():
            stored = _stored(checkpoint, b, name, "weight")
            if stored not in checkpoint.tensors:
                raise UnsupportedModelError(
                    f"{checkpoint.id} stores the weights of '{name}' of block {b} under another "
                    f"name than '{stored}', so that they cannot be set to zero. Save it again with "
                    "transformers' save_pretrained"
                )


def _stored(checkpoint: Checkpoint, b: int, name: str, kind: str) -> str:
    return f"{checkpoint.block_names.prefix}.{b}.{name}.{kind}"


def _choose(
    decoder: Decoder,
    outputs: Outputs,
    candidates: Sequence[Sublayer],
    options: SublayerOptions,
    calibration: Calibration,
    session: Session,
    journal: Journal,
) -> tuple[float | None, list[DroppedSublayer]]:
    """The intact model's perplexity, if it was measured, and what goes, in order."""
    from shortllm.model.walk import walk_flops
    from shortllm.sublayers.measuring import Variants, influence, remove_one_by_one, rounds_flops

    number, ids_BT = options.remove, calibration.ids
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
    from shortllm.checkpoint.verify import bypass_logits, caches_rightly, verify_shortened

    gone: list[Sublayer] = [(one.block, one.part) for one in dropped]
    fixed = checkpoint.info().fixed
    whole = [b for b in whole_blocks(gone) if b not in fixed]
    zeroed = [one for one in gone if one[0] not in whole]
    kept = [b for b in range(checkpoint.block_count) if b not in whole]
    config, entries = dict(checkpoint.raw_config), dict(checkpoint.tensors)
    if whole:
        config, entries = check_removal(checkpoint, kept), renumbered_tensors(checkpoint, kept)
    names = _zeroed_names(checkpoint, outputs, zeroed, kept)
    decoder = session.decoder(checkpoint)
    with without_sublayers(decoder, outputs, zeroed):
        logits = bypass_logits(decoder, whole)
    cached = caches_rightly(decoder)
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
    config[PROVENANCE] = _provenance(checkpoint, record)
    carried = [name for name in carried_files(checkpoint.directory, target) if name.name != RECORD]
    with (
        progress("writing the checkpoint", record.bytes) as advance,
        partial_directory(target) as directory,
    ):
        for name in carried:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.directory / name, directory / name)
        write_special_tokens(checkpoint, directory)
        entries |= _zeros(directory / ZEROS, {name: entries[name] for name in names})
        write_tensors(directory, entries, advance=advance)
        (directory / ZEROS).unlink(missing_ok=True)
        text = json.dumps(config, indent=2) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
        written = session.decoder(open_checkpoint(directory))
        verify_shortened(str(target), written, logits, cached=cached)
        record.save(directory / RECORD)


def _zeroed_names(
    checkpoint: Checkpoint, outputs: Outputs, zeroed: Sequence[Sublayer], kept: Sequence[int]
) -> list[str]:
    """The new names of the weights and biases that become zero."""
    number = {old: new for new, old in enumerate(kept)}
    found = []
    for b, part in zeroed:
        for kind in ("weight", "bias"):
            stored = _stored(checkpoint, b, outputs[b][part], kind)
            if stored in checkpoint.tensors:
                found.append(checkpoint.block_names.renumbered(stored, number[b]))
    return found


def _zeros(file: Path, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors as zeros, all taken from one file that has as many as the largest."""
    if not entries:
        return {}
    with open(file, "wb") as stream:
        stream.truncate(max(entry.bytes for entry in entries.values()))
    return {name: replace(entry, file=file, offset=0) for name, entry in entries.items()}


def _provenance(checkpoint: Checkpoint, record: SublayerDrop) -> dict[str, Any]:
    """What config.json says of where the checkpoint comes from."""
    return {
        "version": __version__,
        "source": checkpoint.id,
        "revision": checkpoint.revision,
        "source_blocks": checkpoint.block_count,
        "removed_blocks": record.removed_blocks,
        "criterion": record.criterion,
        "sublayers": {part: record.blocks(part) for part in PARTS},
        "fingerprint": record.fingerprint,
        "parent": checkpoint.raw_config.get(PROVENANCE),
    }
