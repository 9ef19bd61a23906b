"""Remove single attentions and MLPs: a plain checkpoint whose output projections are zeros there.

Every other byte is copied. A block that loses both sublayers is removed, as by a plan.

    shortllm drop-sublayers MODEL --criterion sublayer-ppl --remove 4 --out DIR
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tensors import TensorEntry
from shortllm.data.texts import calibrate
from shortllm.errors import BudgetError, CriterionError, DataError, UnsupportedModelError
from shortllm.files import PARTIAL
from shortllm.journal import Journal
from shortllm.model.session import Session
from shortllm.options import accepts
from shortllm.protection import protected_in
from shortllm.records import ModelInfo
from shortllm.runtime import Runtime
from shortllm.sublayers.criteria import CRITERIA, Ranking, Task
from shortllm.sublayers.options import DroppedSublayer, SublayerDrop, SublayerOptions
from shortllm.sublayers.structure import (
    PARTS,
    Outputs,
    Sublayer,
    find_sublayers,
    whole_blocks,
    without_sublayers,
)
from shortllm.surgery.apply import check_removal, provenance_of, renumbered_tensors
from shortllm.surgery.derived import (
    Draft,
    copying,
    derive,
    derived_fingerprint,
    require_stored,
    stored_name,
    verifying,
)

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.data.calibration import Calibration


@accepts(options=SublayerOptions, runtime=Runtime)
def drop_sublayers(
    model: str,
    out: Path | str,
    *,
    options: SublayerOptions,
    runtime: Runtime,
    revision: str | None = None,
) -> SublayerDrop:
    """Write a plain checkpoint without some of the attentions and MLPs.

    Their output projections become zeros: the checkpoint loads everywhere and keeps its size and
    speed. Blocks that lose both sublayers are removed.

    Args:
        model: a checkpoint directory or Hub id.
        out: the new checkpoint directory, which also gets sublayers.json.
        options: which sublayers to remove; their fields can be given as keywords.
        runtime: where to compute; its fields can be given as keywords.
        revision: of a Hub model.
    Returns:
        The content of sublayers.json.
    Raises:
        UnsupportedModelError: the sublayers of this model cannot be removed one by one.
        BudgetError: the model lacks such sublayers, or has too few.
        CriterionError: nothing says what to remove, or the scores cannot be ranked.
        CheckpointError: the result does not compute what it should.
        OutputError: `out` contains something else or cannot be written.
    """
    checkpoint = open_checkpoint(model, revision=revision)
    candidates(options, checkpoint.info())
    ids = calibrate(checkpoint, options.calibration) if options.criterion else None
    return drop_from(checkpoint, options, Path(out), calibration=ids, session=Session(runtime))


def drop_from(
    checkpoint: Checkpoint,
    options: SublayerOptions,
    target: Path,
    *,
    calibration: Calibration | None,
    session: Session,
) -> SublayerDrop:
    """The same for an open checkpoint; `calibration` is None where the sublayers are named."""
    allowed = candidates(options, checkpoint.info())
    if options.criterion is not None and calibration is None:
        raise DataError(f"--criterion {options.criterion} needs text. Give calibration ids")
    if getattr(checkpoint.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{checkpoint.id} is quantized, so its projections cannot be set to zero. Give the "
            "unquantized model"
        )
    seen = calibration if options.criterion is not None else None
    expected = derived_fingerprint(
        checkpoint,
        calibration=seen,
        session=session,
        sublayers=options.model_dump(mode="json", exclude={"calibration"}),
    )
    work = target.with_name(f"{target.name}.choosing{PARTIAL}")

    def draft() -> Draft:
        chosen = _choose(checkpoint, options, allowed, seen, session, Journal(work, expected))
        return _draft(checkpoint, options, chosen, target, seen, session)

    record = derive(
        SublayerDrop, target, checkpoint, draft, expected=expected, needed_bytes=checkpoint.bytes
    )
    shutil.rmtree(work, ignore_errors=True)
    return record


def candidates(options: SublayerOptions, model: ModelInfo) -> list[Sublayer]:
    """What may be removed, ascending: the named sublayers, or those of unprotected blocks."""
    named: list[Sublayer] = sorted(
        [(b, PARTS[0]) for b in options.attention] + [(b, PARTS[1]) for b in options.mlp]
    )
    if named:
        _check_named(options, model, len(named))
        return named
    if options.criterion is None or options.remove is None:
        raise CriterionError(
            "nothing says which sublayers to remove. Give --criterion "
            f"{' or '.join(CRITERIA.names())} with --remove 4, or name blocks with "
            "--attention 3,4 and --mlp 7"
        )
    protected = set(protected_in(model, options.protect_first, options.protect_last))
    kinds = PARTS if options.parts == "joint" else (options.parts,)
    found = [(b, part) for b in range(model.blocks) if b not in protected for part in kinds]
    most = min(len(found), 2 * model.blocks - 1)
    if not 0 < options.remove <= most:
        raise BudgetError(
            f"cannot remove {options.remove} sublayers: {len(found)} may go ({', '.join(kinds)} "
            f"of {model.blocks - len(protected)} unprotected blocks). Give 1 to {most}"
            + (", or pass --protect-first 0 --protect-last 0" if protected else "")
        )
    return found


def _check_named(options: SublayerOptions, model: ModelInfo, count: int) -> None:
    """Refuse names next to a criterion, and names the model lacks."""
    if options.criterion is not None or options.remove is not None:
        raise CriterionError(
            "--attention and --mlp name what to remove, so --criterion and --remove have no "
            "effect. Leave out one or the other"
        )
    for flag, blocks in (("--attention", options.attention), ("--mlp", options.mlp)):
        outside = [b for b in blocks if not 0 <= b < model.blocks]
        if outside:
            raise BudgetError(f"{flag} {outside[0]}: the model has blocks 0 to {model.blocks - 1}")
        if len(set(blocks)) != len(blocks):
            raise BudgetError(f"{flag} names a block twice: {','.join(map(str, blocks))}")
    if count == 2 * model.blocks:
        raise BudgetError("every sublayer is named. Name fewer: something must remain")


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What to remove, in order, and where sublayers end."""

    outputs: Outputs
    dropped: list[DroppedSublayer]
    intact: float | None = None


def _choose(
    checkpoint: Checkpoint,
    options: SublayerOptions,
    allowed: Sequence[Sublayer],
    calibration: Calibration | None,
    session: Session,
    journal: Journal,
) -> _Chosen:
    """Find the output projections, and choose by the criterion where there is one."""
    decoder = session.decoder(checkpoint)
    outputs = find_sublayers(decoder, sorted({b for b, _ in allowed}))
    for b, names in outputs.items():
        for name in names.values():
            require_stored(checkpoint, b, name, needed_to="set sublayers to zero")
    if calibration is None:
        named = [DroppedSublayer(block=b, part=part, value=None) for b, part in allowed]
        return _Chosen(outputs, named)
    assert options.remove is not None and options.criterion is not None
    task = Task(
        decoder=decoder,
        outputs=outputs,
        candidates=allowed,
        remove=options.remove,
        ids_BT=calibration.ids,
        memory=session.memory(),
        journal=journal,
    )
    ranking: Ranking = CRITERIA.get(options.criterion).function(task)
    scored = [DroppedSublayer(block=b, part=part, value=v) for (b, part), v in ranking.order]
    _require_finite(scored)
    return _Chosen(outputs, scored[: options.remove], ranking.intact)


def _require_finite(scored: Sequence[DroppedSublayer]) -> None:
    """Refuse scores that cannot be ranked."""
    for one in scored:
        if one.value is not None and not math.isfinite(one.value):
            raise CriterionError(
                f"the score of the {one.part} of block {one.block} is {one.value}, which cannot "
                "be ranked. Try --dtype float32, and look for extreme weights"
            )


def _draft(
    checkpoint: Checkpoint,
    options: SublayerOptions,
    chosen: _Chosen,
    target: Path,
    calibration: Calibration | None,
    session: Session,
) -> Draft:
    """Config, weights and record of the checkpoint without the chosen sublayers."""
    gone: list[Sublayer] = [(one.block, one.part) for one in chosen.dropped]
    fixed = checkpoint.info().fixed
    whole = [b for b in whole_blocks(gone) if b not in fixed]
    zeroed = [one for one in gone if one[0] not in whole]
    kept = [b for b in range(checkpoint.block_count) if b not in whole]
    config, entries = dict(checkpoint.raw_config), dict(checkpoint.tensors)
    if whole:
        config, entries = check_removal(checkpoint, kept), renumbered_tensors(checkpoint, kept)
    names = zeroed_names(checkpoint, chosen.outputs, zeroed, kept)
    logits, cached = _expected(checkpoint, chosen.outputs, zeroed, whole, session)
    size = sum(entry.bytes for entry in entries.values())
    record = {
        "criterion": options.criterion,
        "options": options.model_dump(mode="json", exclude={"criterion", "calibration"}),
        "dropped": chosen.dropped,
        "intact": chosen.intact,
        "removed_blocks": whole,
        "zeroed_parameters": sum(entries[name].elements for name in names),
        "parameters": sum(entry.elements for entry in entries.values()),
        "bytes": size,
        "calibration": calibration.info.tokens_fingerprint if calibration else None,
        "dtype": session.dtype(checkpoint),
    }
    provenance = provenance_of(
        checkpoint,
        whole,
        criterion=options.criterion,
        sublayers={part: sorted(b for b, other in gone if other == part) for part in PARTS},
    )
    zeros = {name: entries[name] for name in names}
    return Draft(
        record=record,
        config=config,
        provenance=provenance,
        bytes=size,
        write=copying(entries, lambda directory: _zeros(directory, zeros)),
        verify=verifying(target, session, logits, cached=cached),
    )


def _expected(
    checkpoint: Checkpoint,
    outputs: Outputs,
    zeroed: Sequence[Sublayer],
    whole: Sequence[int],
    session: Session,
) -> tuple[Tensor, bool]:
    """What the result must compute, and whether it must with a cache too.

    A function of its own, so that the source is released before the result is loaded.
    """
    from shortllm.surgery.verify import bypass_logits, kv_cache_matches

    decoder = session.decoder(checkpoint)
    with without_sublayers(decoder, outputs, zeroed):
        logits = bypass_logits(decoder, whole)
    return logits, kv_cache_matches(decoder)


def zeroed_names(
    checkpoint: Checkpoint, outputs: Outputs, zeroed: Sequence[Sublayer], kept: Sequence[int]
) -> list[str]:
    """The new names of the weights and biases that become zero."""
    number = {old: new for new, old in enumerate(kept)}
    found = []
    for b, part in zeroed:
        for kind in ("weight", "bias"):
            stored = stored_name(checkpoint, b, f"{outputs[b][part]}.{kind}")
            if stored in checkpoint.tensors:
                found.append(checkpoint.block_names.renumbered(stored, number[b]))
    return found


def _zeros(directory: Path, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors as zeros, all read from one sparse file as long as the largest."""
    if not entries:
        return {}
    directory.mkdir()
    file = directory / "zeros"
    with open(file, "wb") as stream:
        stream.truncate(max(entry.bytes for entry in entries.values()))
    return {name: replace(entry, file=file, offset=0) for name, entry in entries.items()}
