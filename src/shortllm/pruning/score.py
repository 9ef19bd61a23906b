"""Score every block of a model by one criterion, or by several in as few passes as possible.

shortllm score MODEL --criterion ppl,kl --data my_text.jsonl --out runs/steps
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm.calls import accepts
from shortllm.checkpoint.hub import EMBEDDED, ModelSource
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.criteria import Criterion, resolve_all
from shortllm.data.calibration import calibrate, resolve_calibration, without_text_of
from shortllm.data.options import CalibrationOptions, SampledText
from shortllm.files import fingerprint, releasing
from shortllm.healing.options import HealOptions
from shortllm.journal import Journal, journal_directory
from shortllm.model import Session
from shortllm.progress import progress
from shortllm.pruning.records import BlockScores
from shortllm.pruning.scoring import MOST_TO_CHOOSE, Scorer, require_plain_weights
from shortllm.pruning.search_space import score_all, work_of_all
from shortllm.records import Cost
from shortllm.run_directory import claim_directory, delete, finished, pinned, write_run_file
from shortllm.runtime import (
    ALONE,
    Ranks,
    ScoringRuntime,
    check_attention,
    join_ranks,
    peak_memory,
    versions,
)

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.data.calibration import Calibration


@accepts(calibration=CalibrationOptions, runtime=ScoringRuntime)
def score(
    model: ModelSource = "embedded",
    *,
    criterion: str | list[str] = "ppl",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    calibration: CalibrationOptions,
    runtime: ScoringRuntime,
    out: Path | None = None,
    revision: str | None = None,
    command: Sequence[str] = (),
) -> Any:
    """Importance of every block of a model by one criterion, or by several.

    Under `accelerate launch` or `torchrun` all processes share the samples, each of them gets the
    result, and the main one writes it.

    Args:
        model: a checkpoint directory, a Hub id, or a loaded model.
        criterion: a name, or several.
        options: for each criterion its options, e.g. `{"taylor": {"power": 2}}`.
        calibration: the text to score on; its fields can be given as keywords.
        runtime: where to compute; its fields can be given as keywords.
        out: run directory for the calibration and scores.json; scores-NAME.json for each of several
            criteria. An interrupted pass is resumed there.
        revision: of a Hub model.
        command: the command line, for run.json.
    Returns:
        `BlockScores`; for several criteria a dict of them by name.
    Raises:
        ShortLLMError: any kind, before the model is loaded wherever that can be known.
    """
    names = [criterion] if isinstance(criterion, str) else criterion
    criteria = resolve_all(names, options or {})
    checkpoint = open_checkpoint(model, revision=pinned(model, revision, out))
    ranks = join_ranks()
    embedded = checkpoint.id == EMBEDDED
    text = resolve_calibration(calibration, checkpoint.model_type, embedded=embedded)
    chosen = {
        "model": model,
        "criterion": ",".join(names),
        "options": {name: dict(given) for name, given in (options or {}).items()},
        "calibration": text.model_dump(mode="json"),
        **runtime.model_dump(mode="json"),
    }
    session = Session(runtime)
    check_attention(session.attention, session.device)
    if out is not None and ranks.is_main:
        claim_directory(out, checkpoint, chosen)
    needs_text = any(one.needs_text for one in criteria)
    ids = None
    if needs_text:
        ids = calibrate(checkpoint, calibration, session=session, directory=out)
    healing = text_to_heal_with(checkpoint, criteria, calibration)
    if out is None:
        found = score_blocks(
            checkpoint, ids, criteria, healing=healing, session=session, ranks=ranks
        )
    else:
        with releasing():
            if ranks.is_main:
                write_run_file(out, chosen, checkpoint, command)
            found = score_in(out, checkpoint, criteria, ids, session, ranks, healing=healing)
    return found[names[0]] if isinstance(criterion, str) else found


def text_to_heal_with(
    checkpoint: Checkpoint, criteria: Sequence[Criterion], text: SampledText
) -> Calibration | None:
    """More of the text, if any of the criteria measures healed models."""
    from shortllm.healing.heal import healing_text

    methods = [one.healing for one in criteria if one.healing is not None]
    if not methods:
        return None
    return calibrate(checkpoint, healing_text(HealOptions(method=methods[0]), checkpoint, text))


def _to_choose_with(healing: Calibration, scored: Calibration | None) -> Tensor:
    """The samples that candidates are healed on: not those that they are measured on."""
    apart = healing.ids if scored is None else without_text_of(healing.ids, scored.ids)
    return apart[:MOST_TO_CHOOSE]


def score_blocks(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    criteria: Sequence[Criterion],
    *,
    session: Session,
    healing: Calibration | None = None,
    directory: Path | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, BlockScores]:
    """One importance per block by each criterion.

    `directory` keeps the progress of long passes, so that they can be resumed; delete it once the
    scores are safe.
    """
    require_plain_weights(checkpoint, criteria)
    expected = {
        one.name: scores_fingerprint(checkpoint, one, calibration, session, healing)
        for one in criteria
    }
    own = None if directory is None else directory / f"rank{ranks.rank}of{ranks.count}"
    read = calibration if any(one.needs_text for one in criteria) else None
    scorer = Scorer(
        checkpoint=checkpoint,
        open_decoder=lambda: session.decoder(checkpoint),
        ids_BT=None if read is None else ranks.mine(read.ids),
        counted_BT=(None if read is None or read.counted is None else ranks.mine(read.counted)),
        healing_BT=None if healing is None else ranks.mine(_to_choose_with(healing, read)),
        ranks=ranks,
        memory=session.memory(directory),
        journal=Journal(own, fingerprint(expected)),
    )
    started = time.monotonic()
    named = ", ".join(one.name for one in criteria)
    with progress(f"scoring by {named}", work_of_all(scorer, criteria)) as scorer.advance:
        found = score_all(scorer, criteria)
    cost = Cost(seconds=round(time.monotonic() - started, 3), peak_bytes=peak_memory())
    return {
        one.name: BlockScores(
            model=checkpoint.info(),
            criterion=one.name,
            options=one.options,
            **asdict(found[one.name]),
            calibration=(
                calibration.info.tokens_fingerprint if calibration and one.needs_text else None
            ),
            dtype=session.dtype(checkpoint),
            versions=versions(),
            cost=cost,
            fingerprint=expected[one.name],
        )
        for one in criteria
    }


def score_in(
    directory: Path,
    checkpoint: Checkpoint,
    criteria: Sequence[Criterion],
    calibration: Calibration | None,
    session: Session,
    ranks: Ranks = ALONE,
    *,
    healing: Calibration | None = None,
) -> dict[str, BlockScores]:
    """Write calibration.* and the scores of each criterion, unless they are up to date.

    A single criterion has scores.json, several have scores-NAME.json. All processes score; the main
    one writes.
    """
    if ranks.is_main:
        if calibration is None:
            delete(directory.glob("calibration.*"))
        else:
            calibration.save(directory)
    files = {
        one.name: directory / ("scores.json" if len(criteria) == 1 else f"scores-{one.name}.json")
        for one in criteria
    }
    found: dict[str, BlockScores] = {}
    for one in criteria:
        expected = scores_fingerprint(checkpoint, one, calibration, session, healing)
        if (scores := finished(BlockScores, files[one.name], expected)) is not None:
            found[one.name] = scores
    ranks.wait()  # until all have looked, nobody writes
    missing = [one for one in criteria if one.name not in found]
    if missing:
        journal = journal_directory(directory)
        found |= score_blocks(
            checkpoint,
            calibration,
            missing,
            session=session,
            healing=healing,
            directory=journal,
            ranks=ranks,
        )
        if ranks.is_main:
            for one in missing:
                found[one.name].save(files[one.name])
        ranks.wait()  # the journal is needed until the scores are safe
        shutil.rmtree(journal, ignore_errors=True)
    return {one.name: found[one.name] for one in criteria}


def scores_fingerprint(
    checkpoint: Checkpoint,
    criterion: Criterion,
    calibration: Calibration | None,
    session: Session,
    healing: Calibration | None = None,
) -> str:
    """The fingerprint of everything the scores of one criterion depend on."""
    inputs: dict[str, Any] = {
        "model": checkpoint.fingerprint,
        "criterion": criterion.name,
        "options": criterion.options,
    }
    computed = {
        "dtype": session.dtype(checkpoint),
        "device": session.device.type,
        **({"attention": session.attention} if session.attention else {}),
    }
    if criterion.needs_text and calibration is not None:
        inputs |= {
            "calibration": calibration.info.tokens_fingerprint,
            **computed,
        }
    if criterion.needs == "removals" and criterion.scored_by().compares:
        inputs["compared_with"] = "intact"  # not with what the round before left
    if criterion.items is not None:
        from shortllm.evaluation.choices import load_items

        inputs["items"] = load_items(checkpoint, *criterion.items).fingerprint
        inputs |= computed
    if criterion.healing is not None and healing is not None:
        inputs["healing"] = healing.info.tokens_fingerprint
    return fingerprint(inputs)
