"""Remove single attentions and MLPs: a plain checkpoint whose output projections are zeros there.

Every other byte is copied. A block that loses both sublayers is removed, as by a plan.

    shortllm drop-sublayers MODEL --criterion sublayer-ppl --remove 4 --out DIR
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from shortllm.calls import accepts
from shortllm.checkpoint.hub import ModelSource
from shortllm.checkpoint.options import SurgeryOptions
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tensors import read_tensor
from shortllm.data.calibration import Calibration, calibrate
from shortllm.errors import BudgetError, CriterionError
from shortllm.files import PARTIAL, hold, releasing
from shortllm.journal import Journal
from shortllm.model import Session
from shortllm.model.decoder import Decoder
from shortllm.records import ModelInfo, protected_in
from shortllm.registry import cited
from shortllm.runtime import Runtime
from shortllm.sublayers.criteria import CRITERIA, Ranking, Task
from shortllm.sublayers.options import DroppedSublayer, SublayerDrop, SublayerOptions
from shortllm.sublayers.structure import (
    PARTS,
    Outputs,
    Sublayer,
    find_sublayers,
    without_sublayers,
)
from shortllm.surgery.apply import check_removal, renumbered_tensors
from shortllm.surgery.derived import (
    Draft,
    copying,
    derive,
    derived_fingerprint,
    on_probe,
    require_stored,
    require_unquantized,
    stored_name,
    verifying,
)
from shortllm.surgery.origin import provenance_of


@accepts(options=SublayerOptions, runtime=Runtime, surgery=SurgeryOptions)
def drop_sublayers(
    model: ModelSource,
    out: Path,
    *,
    options: SublayerOptions,
    runtime: Runtime,
    surgery: SurgeryOptions,
    revision: str | None = None,
) -> SublayerDrop:
    """Write a plain checkpoint without some of the attentions and MLPs.

    Their output projections become zeros: the checkpoint loads everywhere and keeps its size and
    speed. Blocks that lose both sublayers are removed.

    Args:
        model: a checkpoint directory, a Hub id, or a loaded model.
        out: the new checkpoint directory, which also gets sublayers.json.
        options: which sublayers to remove; their fields can be given as keywords.
        runtime: where to compute; its fields can be given as keywords.
        surgery: `accept_unknown_references`; it can be given as a keyword.
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
    return drop_from(checkpoint, options, out, calibration=ids, session=Session(runtime))


@releasing()
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
    require_unquantized(checkpoint, "its projections cannot be set to zero")
    seen = calibration if options.criterion is not None else None
    expected = derived_fingerprint(
        checkpoint,
        calibration=seen,
        session=session,
        sublayers=options.model_dump(mode="json", exclude={"calibration"}),
    )
    work = target.with_name(f"{target.name}.choosing{PARTIAL}")

    def draft() -> Draft:
        return _draft(checkpoint, options, allowed, target, seen, session, work, expected)

    choices = options.model_dump(mode="json")
    record = derive(
        SublayerDrop,
        target,
        checkpoint,
        draft,
        expected=expected,
        choices=choices,
        needed_bytes=checkpoint.bytes,
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


def _choose(
    decoder: Decoder,
    outputs: Outputs,
    options: SublayerOptions,
    allowed: Sequence[Sublayer],
    ids_BT: Tensor | None,
    session: Session,
    work: Path,
    expected: str,
) -> tuple[list[DroppedSublayer], float | None]:
    """What to remove, in order, and the perplexity of the intact model if it was measured."""
    if options.criterion is None:
        return [DroppedSublayer(block=b, part=part, value=None) for b, part in allowed], None
    assert options.remove is not None and ids_BT is not None
    hold(work)
    task = Task(
        decoder=decoder,
        outputs=outputs,
        candidates=allowed,
        remove=options.remove,
        ids_BT=ids_BT,
        memory=session.memory(),
        journal=Journal(work, expected),
    )
    ranking: Ranking = CRITERIA.get(options.criterion).function(task)
    for (b, part), value in ranking.order:
        if not math.isfinite(value):
            raise CriterionError(
                f"the score of the {part} of block {b} is {value}, which cannot be ranked. Try "
                "--dtype float32, and look for extreme weights"
            )
    order = ranking.order[: options.remove]
    return [DroppedSublayer(block=b, part=part, value=v) for (b, part), v in order], ranking.intact


def _draft(
    checkpoint: Checkpoint,
    options: SublayerOptions,
    allowed: Sequence[Sublayer],
    target: Path,
    calibration: Calibration | None,
    session: Session,
    work: Path,
    expected: str,
) -> Draft:
    """Choose, and describe the checkpoint without the chosen sublayers."""
    decoder = session.decoder(checkpoint)
    outputs = find_sublayers(decoder, sorted({b for b, _ in allowed}))
    for b, names in outputs.items():
        for name in names.values():
            require_stored(checkpoint, b, name, needed_to="set sublayers to zero")
    ids_BT = calibration.ids if calibration else None
    dropped, intact = _choose(decoder, outputs, options, allowed, ids_BT, session, work, expected)
    gone: list[Sublayer] = [(one.block, one.part) for one in dropped]
    removable = sorted(outputs.keys() - checkpoint.info().fixed.keys())
    whole = [b for b in removable if all((b, part) in gone for part in PARTS)]
    zeroed = [one for one in gone if one[0] not in whole]
    kept = [b for b in range(checkpoint.block_count) if b not in whole]
    config, entries = dict(checkpoint.raw_config), dict(checkpoint.tensors)
    if whole:
        config, entries = check_removal(checkpoint, kept), renumbered_tensors(checkpoint, kept)
    names_zeroed = zeroed_names(checkpoint, outputs, zeroed, kept)
    with without_sublayers(decoder, outputs, zeroed):
        logits, cached = on_probe(decoder, whole)
    size = sum(entry.bytes for entry in entries.values())
    record = {
        "criterion": options.criterion,
        "options": options.model_dump(mode="json", exclude={"criterion", "calibration"}),
        "dropped": dropped,
        "intact": intact,
        "removed_blocks": whole,
        "zeroed_parameters": sum(entries[name].elements for name in names_zeroed),
        "parameters": sum(entry.elements for entry in entries.values()),
        "bytes": size,
        "calibration": calibration.info.tokens_fingerprint if calibration else None,
        "dtype": session.dtype(checkpoint),
    }
    parts = {part: sorted(b for b, other in gone if other == part) for part in PARTS}
    return Draft(
        record=record,
        config=config,
        provenance=provenance_of(
            checkpoint,
            whole,
            criterion=options.criterion,
            paper=cited(CRITERIA.find(options.criterion)),
            sublayers=parts,
        ),
        bytes=size,
        write=copying(
            entries, ((name, read_tensor(entries[name]).zero_()) for name in names_zeroed)
        ),
        verify=verifying(target, session, logits, cached=cached),
        kept=kept if whole else None,
    )


def zeroed_names(
    checkpoint: Checkpoint, outputs: Outputs, zeroed: Sequence[Sublayer], kept: Sequence[int]
) -> list[str]:
    """The new names of the weights and biases that become zero."""
    found = []
    for b, part in zeroed:
        for kind in ("weight", "bias"):
            stored = stored_name(checkpoint, b, f"{outputs[b][part]}.{kind}")
            if stored in checkpoint.tensors:
                found.append(checkpoint.block_names.renumbered(stored, kept.index(b)))
    return found
