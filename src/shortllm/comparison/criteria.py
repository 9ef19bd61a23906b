"""Scores by each criterion, a plan per budget, and one walk over all removed sets."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm import run_directory as rundir
from shortllm.checkpoint.hub import EMBEDDED
from shortllm.checkpoint.source import Checkpoint
from shortllm.comparison.options import (
    FLOOR,
    Comparison,
    ComparisonOptions,
    Contender,
    Question,
    RemovedSet,
)
from shortllm.criteria.selection import resolve
from shortllm.data.calibration import resolve_calibration
from shortllm.data.options import CalibrationOptions
from shortllm.evaluation.evaluate import resolve_evaluation
from shortllm.evaluation.options import EvaluationOptions
from shortllm.evaluation.texts import prepare_texts
from shortllm.files import PARTIAL, fingerprint, releasing
from shortllm.model.session import Session
from shortllm.pruning.planning import build_plan, removal_order
from shortllm.pruning.records import BlockScores
from shortllm.pruning.score import score_in
from shortllm.records import Cost, ModelInfo
from shortllm.runtime import ALONE, Ranks, join_ranks, peak_memory, progress, versions

if TYPE_CHECKING:
    from shortllm.evaluation.perplexity import EvaluationText


def default_directory(model: str) -> Path:
    """`runs/<model>-comparison`."""
    return Path("runs") / f"{rundir.short_name(model)}-comparison"


@releasing()
def compare_in(
    directory: Path,
    checkpoint: Checkpoint,
    question: Question,
    options: ComparisonOptions,
    *,
    session: Session,
    command: Sequence[str] = (),
) -> Comparison:
    """Scores, comparison.json and comparison.html in a run directory, unless up to date.

    All processes measure; the main one writes.
    """
    from shortllm.reporting import write_comparison

    ranks = join_ranks()
    if ranks.is_main:
        rundir.claim_directory(directory, checkpoint)
    calibration, evaluation = _resolved(options, checkpoint)
    scoring = any(one.needs_text for one in question.asked)
    texts = prepare_texts(checkpoint, calibration, evaluation, scoring=scoring)
    [text] = texts.evaluation
    if ranks.is_main:
        chosen = {
            "model": checkpoint.id,
            "options": {one.name: one.options for one in question.asked},
            **options.model_dump(mode="json"),
            "calibration": calibration.model_dump(mode="json"),
            **session.runtime.model_dump(mode="json"),
        }
        rundir.write_run_file(directory, chosen, checkpoint, command)
    scores = score_in(directory, checkpoint, question.asked, texts.calibration, session, ranks)
    path, work = directory / "comparison.json", directory / f"comparing{PARTIAL}"
    expected = comparison_fingerprint(checkpoint, question, scores, text, session)
    found = rundir.finished(Comparison, path, expected)
    if found is None:
        found = compare(
            checkpoint, question, scores, text, session=session, directory=work, ranks=ranks
        )
        if ranks.is_main:
            found.save(path)
        ranks.wait()  # the journal is needed until the result is safe
        shutil.rmtree(work, ignore_errors=True)
    if ranks.is_main:
        write_comparison(directory)
    return found


def _resolved(
    options: ComparisonOptions, checkpoint: Checkpoint
) -> tuple[CalibrationOptions, EvaluationOptions]:
    """The texts, with the defaults that depend on the model filled in."""
    embedded = checkpoint.id == EMBEDDED
    calibration = resolve_calibration(options.calibration, checkpoint.model_type, embedded=embedded)
    given = options.evaluation
    evaluation = resolve_evaluation(
        EvaluationOptions(
            data=[given.data] if given.data else [],
            length=given.length,
            bos=given.bos,
            max_segments=given.max_segments,
        ),
        embedded=embedded,
        every=bool(calibration.bos_every_sample),
        calibrated_on=options.calibration.data,
    )
    return calibration, evaluation.model_copy(update={"data": evaluation.data[:1]})


def compare(
    checkpoint: Checkpoint,
    question: Question,
    scores: dict[str, BlockScores],
    text: EvaluationText,
    *,
    session: Session,
    directory: Path | None = None,
    ranks: Ranks = ALONE,
) -> Comparison:
    """Perplexity without the blocks that each criterion, and each random draw, removes.

    Args:
        scores: by the names of the criteria.
        directory: where the progress of a long walk over streamed blocks is kept.
        ranks: the processes that share the segments.
    Raises:
        BudgetError: scores that hold no removal of that size.
        CheckpointError: the intact model's loss is no number.
        UnsupportedModelError: the model's blocks cannot be called one by one.
    """
    from shortllm.evaluation.perplexity import as_perplexity
    from shortllm.journal import Journal
    from shortllm.model.walk import NOTHING, mean_nlls, walk_flops

    info = checkpoint.info()
    chosen, drawn = _chosen(info, question, scores), _drawn(info, question)
    sets = {frozenset(order) for one in (*chosen, *drawn) for order in one.orders}
    removals = [NOTHING, *sorted(sets, key=sorted)]
    expected = comparison_fingerprint(checkpoint, question, scores, text, session)
    ids_BT = ranks.mine(text.segments.ids)
    decoder, started = session.decoder(checkpoint), time.monotonic()
    own = None if directory is None else directory / f"rank{ranks.rank}of{ranks.count}"
    work = walk_flops(decoder, removals, *ids_BT.shape)
    with progress(f"perplexity of {len(sets)} shortened models", work) as advance:
        nlls = mean_nlls(
            decoder, ids_BT, removals, ranks=ranks, advance=advance,
            memory=session.memory(directory), journal=Journal(own, expected),
        )  # fmt: skip
    measured = dict(zip(removals, nlls, strict=True))
    return Comparison(
        model=info,
        protected=question.protected(info.blocks),
        budgets=question.budgets,
        left_out=question.left_out,
        criteria=[one.measured(measured) for one in chosen],
        random=[one.measured(measured) for one in drawn],
        intact=as_perplexity(text, measured[NOTHING]),
        calibration=next((s.calibration for s in scores.values() if s.calibration), None),
        models=len(sets),
        dtype=session.dtype(checkpoint),
        versions=versions(),
        cost=Cost(seconds=round(time.monotonic() - started, 3), peak_bytes=peak_memory()),
        fingerprint=expected,
    )


def comparison_fingerprint(
    checkpoint: Checkpoint,
    question: Question,
    scores: dict[str, BlockScores],
    text: EvaluationText,
    session: Session,
) -> str:
    """Of everything the comparison depends on."""
    from shortllm.data.calibration import tokens_fingerprint

    return fingerprint(
        {
            "model": checkpoint.fingerprint,
            "scores": [(name, found.fingerprint) for name, found in scores.items()],
            "budgets": [budget.model_dump() for budget in question.budgets],
            "left out": [left.model_dump() for left in question.left_out],
            "protected": question.protected(checkpoint.block_count),
            "draws": question.draws,
            "text": [text.rows.source, tokens_fingerprint(text.segments.ids)],
            "dtype": session.dtype(checkpoint),
            "device": session.device.type,
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Removals:
    """What one criterion removes at each budget, in order."""

    criterion: str
    options: dict[str, Any]
    source: str
    scores: str | None
    orders: list[list[int]]

    def measured(self, nlls: dict[frozenset[int], float]) -> Contender:
        return Contender(
            criterion=self.criterion,
            options=self.options,
            source=self.source,
            scores=self.scores,
            sets=[_removed_set(order, nlls[frozenset(order)]) for order in self.orders],
        )


def _removed_set(order: list[int], nll: float) -> RemovedSet:
    from shortllm.model.metrics import perplexity

    ppl = perplexity(nll)
    return RemovedSet(
        order=order,
        nll=nll if math.isfinite(nll) else None,
        perplexity=ppl if math.isfinite(ppl) else None,
    )


def _chosen(
    model: ModelInfo, question: Question, scores: dict[str, BlockScores]
) -> list[_Removals]:
    """The plans of each criterion."""
    return [
        _Removals(
            criterion=one.name,
            options=one.options,
            source=one.criterion.source,
            scores=scores[one.name].fingerprint,
            orders=[
                build_plan(question.budget(n.blocks), model=model, scores=scores[one.name]).order
                for n in question.budgets
            ],
        )
        for one in question.asked
    ]


def _drawn(model: ModelInfo, question: Question) -> list[_Removals]:
    """What plans by `random` with the seeds 0, 1, ... remove."""
    found = []
    for seed in range(question.draws):
        one = resolve(FLOOR, {"seed": seed})
        order = removal_order(one.call(model.blocks), question.protected(model.blocks))
        found.append(
            _Removals(
                criterion=one.name,
                options=one.options,
                source=one.criterion.source,
                scores=None,
                orders=[order[: budget.blocks] for budget in question.budgets],
            )
        )
    return found
