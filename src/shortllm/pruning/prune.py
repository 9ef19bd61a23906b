"""Write the checkpoint without the blocks of a plan, and verify it.

shortllm prune MODEL --plan runs/steps --out short
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from shortllm import criteria
from shortllm.calls import accepts
from shortllm.checkpoint.gguf import read_gguf
from shortllm.checkpoint.hub import ModelSource, is_gguf, locate_gguf, named_revision
from shortllm.checkpoint.options import SurgeryOptions
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.writer import MAX_SHARD_BYTES
from shortllm.errors import CheckpointError, OutputError
from shortllm.files import fingerprint
from shortllm.model import Session
from shortllm.options import OneOrMore
from shortllm.pruning.budget import Budget, require_plan_or_blocks
from shortllm.pruning.planning import build_plan
from shortllm.pruning.records import PrunePlan, Pruning, load_plan
from shortllm.registry import cited
from shortllm.runtime import Runtime
from shortllm.surgery.apply import check_removal, renumbered_tensors
from shortllm.surgery.companions import carried_fingerprint
from shortllm.surgery.derived import (
    Draft,
    copying,
    derive,
    on_probe,
    verifying,
)
from shortllm.surgery.gguf import shorten_gguf
from shortllm.surgery.origin import provenance_of
from shortllm.surgery.verify import on_image


@accepts(runtime=Runtime, surgery=SurgeryOptions)
def prune(
    model: ModelSource,
    plan: PrunePlan | Path | str | OneOrMore[int] | None = None,
    out: Path | None = None,
    *,
    blocks: OneOrMore[int] | None = None,
    runtime: Runtime,
    surgery: SurgeryOptions,
    revision: str | None = None,
    verify: bool = True,
    drop_heads: bool = False,
) -> Path:
    """Write the shortened checkpoint.

    Args:
        model: a checkpoint directory, a Hub id, or a loaded model.
        plan: a plan, a plan.json, a run directory, or the numbers of the blocks to remove.
        out: the new checkpoint directory, which also gets prune.json. Or, for a GGUF file, the new
            one, NAME.gguf: its tensors stay quantized as they are, and it is not computed with.
        blocks: the numbers of the blocks to remove, instead of a plan.
        runtime: where to compute; its fields can be given as keywords.
        surgery: `accept_unknown_references`; it can be given as a keyword.
        revision: of a Hub model.
        verify: load the original and the result and compare what they compute. Otherwise only names
            and structure are checked.
        drop_heads: leave out prediction heads (MTP), and what config.json says of them. Otherwise
            they stay unchanged, behind the last block if they were there.
    Returns:
        `out`.
    Raises:
        BudgetError: neither a plan nor blocks, or both; or blocks that the model lacks.
        UnsupportedModelError: removing these blocks would give a wrong model, or a file refers to
            blocks in a way that no rule covers.
        CheckpointError: the plan is another model's, or the result does not compute what it should.
        OutputError: `out` contains something else or cannot be written.
    """
    if out is None:
        raise TypeError(
            "prune(): missing a required argument: 'out'. Call shortllm.prune(model, plan, out) or "
            "shortllm.prune(model, blocks=[3, 4], out=out)"
        )
    require_plan_or_blocks(plan, blocks)
    if plan is None:
        plan = blocks or []
    elif isinstance(plan, (str, Path)):
        plan = load_plan(Path(plan))
    if is_gguf(out):
        return prune_gguf(model, plan, out, revision=revision, drop_heads=drop_heads)
    if isinstance(plan, PrunePlan) and revision is None and plan.model.id == model:
        revision = plan.model.revision
    checkpoint = open_checkpoint(model, revision=revision)
    if not isinstance(plan, PrunePlan):
        plan = build_plan(Budget(blocks=plan), model=checkpoint.info())
    session = Session(runtime) if verify else None
    prune_from(checkpoint, plan, out, session=session, drop_heads=drop_heads)
    return out


def prune_gguf(
    model: str,
    plan: PrunePlan | Sequence[int],
    out: Path,
    *,
    revision: str | None = None,
    drop_heads: bool = False,
) -> Path:
    """Remove blocks from a GGUF file, whose weights stay quantized as they are."""
    source, revision = named_revision(model, revision)
    if not is_gguf(source):
        raise OutputError(
            f"--out {out} is a GGUF file, but {model} is not one. Write a directory instead, and "
            "convert it with `shortllm export --gguf`"
        )
    if drop_heads:
        raise OutputError(
            "--drop-heads: the prediction heads of a GGUF file stay. Drop them from the checkpoint "
            "that it was converted from, and convert the result"
        )
    if isinstance(plan, PrunePlan) and revision is None and plan.model.id == model:
        revision = plan.model.revision
    path, commit = locate_gguf(source, revision)
    file, origin = read_gguf(path), {}
    if commit is not None:
        origin = {"source": str(source), "revision": commit}
    if not isinstance(plan, PrunePlan):
        shorten_gguf(file, plan, out, **origin)
        return out
    known, same = plan.model.gguf, plan.model.blocks == file.blocks
    if known is None or not same or known.sha256 != file.sha256:
        raise CheckpointError(
            f"the plan is for {plan.model.id}, not for {model}. Make one from its own scores: "
            f"shortllm score {model} --out DIR, then shortllm plan DIR. Or name the blocks with "
            "--blocks"
        )
    shorten_gguf(file, plan.removed, out, **origin, **chosen_by(plan.criterion))
    return out


def prune_from(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    target: Path,
    *,
    session: Session | None = None,
    drop_heads: bool = False,
) -> Pruning:
    """Apply a plan to an open checkpoint; without a session the result is not computed with."""
    if plan.model.fingerprint != checkpoint.fingerprint:
        raise CheckpointError(
            f"the plan is for {plan.model.id} ({plan.model.blocks} blocks), but {checkpoint.id} is "
            "another checkpoint or was changed since. Make one from its own scores: shortllm score "
            f"{checkpoint.id} --out DIR, then shortllm plan DIR"
        )
    return write_pruned(
        checkpoint,
        plan.kept,
        target,
        criterion=plan.criterion,
        session=session,
        drop_heads=drop_heads,
    )


def write_pruned(
    checkpoint: Checkpoint,
    kept: Sequence[int],
    target: Path,
    *,
    criterion: str | None = None,
    session: Session | None = None,
    drop_heads: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Pruning:
    """Write the checkpoint of the blocks `kept`, ascending, with prune.json."""
    removed = sorted(set(range(checkpoint.block_count)) - set(kept))

    def draft() -> Draft:
        config = check_removal(checkpoint, kept, drop_heads=drop_heads)
        entries = renumbered_tensors(checkpoint, kept, drop_heads=drop_heads)
        return Draft(
            record={
                "options": {"verify": session is not None, "drop_heads": drop_heads},
                "criterion": criterion,
                "kept": list(kept),
                "removed": removed,
            },
            config=config,
            provenance=provenance_of(checkpoint, removed, **chosen_by(criterion)),
            bytes=sum(entry.bytes for entry in entries.values()),
            write=copying(entries, max_shard_bytes=max_shard_bytes),
            verify=_verifying(checkpoint, removed, target, session),
            kept=kept,
            drop_heads=drop_heads,
        )

    special = checkpoint.special_tokens
    expected = fingerprint(
        {
            "model": checkpoint.fingerprint,
            "other files": carried_fingerprint(checkpoint.directory),
            "kept": list(kept),
            "criterion": criterion,
            **({"special tokens": special} if special else {}),
            **({"drop heads": drop_heads} if checkpoint.prediction_heads else {}),
        }
    )
    choices = {"removed": removed, "drop_heads": drop_heads}
    return derive(Pruning, target, checkpoint, draft, expected=expected, choices=choices)


def chosen_by(criterion: str | None) -> dict[str, str | None]:
    """What the provenance says of the criterion, which may be one that is not registered here."""
    return {"criterion": criterion, "paper": cited(criteria.find(criterion))}


def _verifying(
    checkpoint: Checkpoint, removed: Sequence[int], target: Path, session: Session | None
) -> Callable[[Path], None]:
    """A comparison with the original whose removed blocks are bypassed."""
    if session is None:
        return lambda written: None
    decoder = session.decoder(checkpoint)
    logits, cached = on_probe(decoder, removed)
    return verifying(target, session, logits, cached=cached, image=on_image(decoder, removed))
