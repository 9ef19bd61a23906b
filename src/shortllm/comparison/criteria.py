"""What each criterion removes at several budgets, and the perplexity that is left.

    scores by each criterion ─► a plan per budget ─┐
    seeded random draws ───────────────────────────┴─► one walk over all removed sets ─► Comparison

Removed sets that begin alike share their block passes, and equal ones are measured once. The text
measured on is kept apart from the text scored on, as in a run.

    shortllm compare-criteria MODEL --data stories.jsonl --out runs/compare
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from shortllm import run_directory as rundir
from shortllm.calls import accepts
from shortllm.checkpoint.hub import EMBEDDED, ModelSource
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.comparison.options import (
    ComparedBudget,
    Comparison,
    ComparisonOptions,
    Contender,
    LeftOut,
    RemovedSet,
)
from shortllm.criteria import Criterion, resolve, resolve_all
from shortllm.data.calibration import on_text, resolve_calibration
from shortllm.data.options import CalibrationOptions
from shortllm.errors import BudgetError, CriterionError, DataError
from shortllm.evaluation.evaluate import resolve_evaluation
from shortllm.evaluation.options import EvaluationOptions
from shortllm.evaluation.texts import EvaluationText, prepare_texts, text_directory
from shortllm.files import PARTIAL, fingerprint, releasing
from shortllm.model import Session
from shortllm.progress import numbered_stages, progress, stage
from shortllm.pruning.budget import Budget, most_blocks, removal_options
from shortllm.pruning.planning import build_plan
from shortllm.pruning.records import BlockScores, removal_order
from shortllm.pruning.score import score_in, text_to_heal_with
from shortllm.records import Cost, ModelInfo
from shortllm.runtime import Ranks, Runtime, join_ranks, peak_memory, versions

RANDOM = "random"
"""The criterion that every other one must beat."""

Measured = Mapping[frozenset[int], list[float]]
"""Removed blocks -> mean NLL of each segment, nats."""

Choice = tuple[Criterion, list[list[int]]]
"""A criterion, and the blocks that it removes at each budget, the first to go first."""

Scored = tuple[Criterion, str | None, BlockScores]
"""A criterion, the text where texts are compared, and the scores."""


def default_directory(model: str) -> Path:
    """`runs/<model>-comparison`."""
    return Path("runs") / f"{rundir.short_name(model)}-comparison"


# ---- what is compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is compared, checked against the model."""

    options: ComparisonOptions
    criteria: list[Criterion]
    budgets: list[ComparedBudget]
    left_out: list[LeftOut]
    protected: list[int]
    """Blocks that no removal may touch."""


def prepare_question(
    model: ModelInfo, options: ComparisonOptions, criteria: Sequence[Criterion]
) -> Question:
    """Fit criteria and ratios to a model.

    Ratios that come to the same number of blocks are one budget; those that no removal can meet are
    left out with the reason. A criterion that removes blocks itself gets the largest budget.
    """
    protected = _budget(options, remove=1).protected(model.blocks)
    budgets: dict[int, list[float]] = {}
    left_out: list[LeftOut] = []
    for ratio in sorted(set(options.ratios)):
        try:
            most = most_blocks(_budget(options, ratio=ratio), model)
            budgets.setdefault(most, []).append(ratio)
        except BudgetError as error:
            left_out.append(LeftOut(ratio=ratio, reason=str(error)))
    if not budgets:
        raise BudgetError(f"there is no removal to compare: {left_out[0].reason}")
    return Question(
        options=options,
        criteria=[_fitted(one, options, model, list(budgets)) for one in criteria],
        budgets=[ComparedBudget(blocks=n, ratios=found) for n, found in budgets.items()],
        left_out=left_out,
        protected=protected,
    )


def _budget(options: ComparisonOptions, **amount: float) -> Budget:
    ends = options.model_dump(include={"protect_first", "protect_last"})
    return Budget.model_validate(amount | ends)


def _fitted(
    one: Criterion, options: ComparisonOptions, model: ModelInfo, budgets: Sequence[int]
) -> Criterion:
    """A criterion that removes blocks itself with the limits of the comparison."""
    if one.name == RANDOM:
        raise CriterionError(
            f"'{RANDOM}' is part of every comparison. Leave it out of --criterion, and set the "
            "number of draws with --random 10"
        )
    if one.needs == "sets" and len(budgets) > 1:
        raise CriterionError(
            f"'{one.name}' searches for the best removal of one size, and the --ratios come to "
            f"{len(budgets)}. Give one of them, or leave {one.name} out"
        )
    limits = removal_options(one, _budget(options, remove=max(budgets)), model)
    for name in limits:
        if one.options[name] != one.defaults[name]:
            raise CriterionError(
                f"{one.name}.{name} follows from --ratios, --protect-first and --protect-last "
                "here. Leave the option out"
            )
    return resolve(one.name, one.options | limits) if limits else one


def _require_effect(options: ComparisonOptions, criteria: Sequence[Criterion]) -> None:
    """Refuse texts that nothing would be scored on."""
    if not options.texts:
        return
    if not any(one.needs_text for one in criteria):
        names = ", ".join(one.name for one in criteria)
        raise CriterionError(f"--text has no effect: {names} need no text. Leave --text out")
    heals = any(one.healing for one in criteria)
    own = options.calibration
    if own.file is not None or own.columns is not None or (own.data is not None and not heals):
        raise DataError(
            "--text names what is scored on, so --data, --columns and --calibration have no "
            "effect. Leave them out, and give the text to measure on as --eval-data"
        )


def _texts(
    options: ComparisonOptions, checkpoint: Checkpoint
) -> tuple[CalibrationOptions, EvaluationOptions]:
    """The texts, with the defaults that depend on the model filled in."""
    embedded, given = checkpoint.id == EMBEDDED, options.evaluation
    calibration = resolve_calibration(options.calibration, checkpoint.model_type, embedded=embedded)
    evaluation = resolve_evaluation(
        EvaluationOptions(**given.model_dump() | {"data": [given.data] if given.data else []}),
        embedded=embedded,
        every=bool(calibration.bos_every_sample),
        calibrated_on=options.calibration.texts,
    )
    return calibration, evaluation.model_copy(update={"data": evaluation.data[:1]})


# ---- the comparison


@releasing()
@accepts(comparison=ComparisonOptions, runtime=Runtime)
def compare_criteria(
    model: ModelSource = "embedded",
    *,
    comparison: ComparisonOptions,
    runtime: Runtime,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    out: Path | None = None,
    revision: str | None = None,
    command: Sequence[str] = (),
) -> Comparison:
    """What each criterion removes at several budgets, and the perplexity that is left.

    Writes the scores, comparison.json and comparison.html; what is up to date is skipped. Under
    `accelerate launch` or `torchrun` all processes share the samples, as in `score`.

    Args:
        model: a checkpoint directory, a Hub id, or a loaded model.
        comparison: what to compare; its fields can be given as keywords.
        runtime: where to compute; its fields can be given as keywords.
        options: for each criterion its options.
        out: run directory. Default: `runs/<model>-comparison`.
        revision: of a Hub model.
        command: the command line, for run.json.
    Returns:
        What each criterion and each random draw removes, and what is left.
    Raises:
        ShortLLMError: any kind, before the model is loaded wherever that can be known.
    """
    from shortllm.reporting import write_comparison

    directory = out or default_directory(model)
    checkpoint = open_checkpoint(model, revision=rundir.pinned(model, revision, directory))
    criteria = resolve_all(comparison.criteria, options or {})
    _require_effect(comparison, criteria)
    question = prepare_question(checkpoint.info(), comparison, criteria)
    session, ranks = Session(runtime), join_ranks()
    calibration, evaluation = _texts(comparison, checkpoint)
    chosen = {
        "model": checkpoint.id,
        "options": {one.name: one.options for one in question.criteria},
        **comparison.model_dump(mode="json"),
        "calibration": calibration.model_dump(mode="json"),
        **runtime.model_dump(mode="json"),
    }
    if ranks.is_main:
        rundir.claim_directory(directory, checkpoint, chosen)
    scoring = any(one.needs_text for one in question.criteria)
    compared = [on_text(calibration, text) for text in comparison.texts]
    # text that the model writes is kept in the directory at once, which must then be that of a run
    early = any(one.is_written for one in compared)
    if ranks.is_main and early:
        rundir.write_run_file(directory, chosen, checkpoint, command)
    texts = prepare_texts(
        checkpoint,
        calibration,
        evaluation,
        scoring=scoring and not comparison.texts,
        others=compared,
        session=session,
        directory=directory,
    )
    [text] = texts.evaluation
    if ranks.is_main:
        if not early:
            rundir.write_run_file(directory, chosen, checkpoint, command)
        rundir.delete_texts(directory, from_number=len(comparison.texts))
    healing = text_to_heal_with(checkpoint, question.criteria, calibration)
    with numbered_stages(2):
        with stage("score"):
            scored: list[Scored] = []
            for number, one in enumerate(texts.others or [texts.calibration]):
                place = text_directory(directory, number) if texts.others else directory
                by_name = score_in(
                    place, checkpoint, question.criteria, one, session, ranks, healing=healing
                )
                name = one.info.source if one is not None and texts.others else None
                scored += [(by, name, by_name[by.name]) for by in question.criteria]
        with stage("eval"):
            found = _measured(directory, checkpoint, question, scored, text, session, ranks)
    if ranks.is_main:
        write_comparison(directory)
    return found


def _measured(
    directory: Path,
    checkpoint: Checkpoint,
    question: Question,
    scores: Sequence[Scored],
    text: EvaluationText,
    session: Session,
    ranks: Ranks,
) -> Comparison:
    """comparison.json, unless up to date. All processes measure; the main one writes."""
    from shortllm.journal import Journal
    from shortllm.model.walk import NOTHING, sample_nlls, walk_flops

    path, work = directory / "comparison.json", directory / f"comparing{PARTIAL}"
    expected = _fingerprint(checkpoint, question, scores, text, session)
    known = rundir.finished(Comparison, path, expected)
    if known is not None:
        return known
    info = checkpoint.info()
    chosen, drawn = _chosen(info, question, scores), _drawn(info, question)
    sets = {frozenset(order) for _, orders in (*chosen, *drawn) for order in orders}
    removals = [NOTHING, *sorted(sets, key=sorted)]
    ids_BT = ranks.mine(text.segments.ids)
    decoder, started = session.decoder(checkpoint), time.monotonic()
    journal = Journal(work / f"rank{ranks.rank}of{ranks.count}", expected)
    flops = walk_flops(decoder, removals, *ids_BT.shape)
    with progress(f"perplexity of {len(sets)} shortened models", flops) as advance:
        nlls_MS = sample_nlls(
            decoder, ids_BT, removals, ranks=ranks, advance=advance, memory=session.memory(work),
            journal=journal,
        )  # fmt: skip
    measured = dict(zip(removals, nlls_MS.tolist(), strict=True))
    best = [
        _lowest([orders[place] for _, orders in chosen], measured)
        for place in range(len(question.budgets))
    ]
    found = Comparison(
        model=info,
        protected=question.protected,
        budgets=question.budgets,
        left_out=question.left_out,
        criteria=[
            _contender(one, orders, measured, best, scores=by.fingerprint, text=name)
            for (one, orders), (_, name, by) in zip(chosen, scores, strict=True)
        ],
        random=[_contender(one, orders, measured, best) for one, orders in drawn],
        intact=text.perplexity(measured[NOTHING]),
        calibration=next((s.calibration for _, of, s in scores if s.calibration and not of), None),
        models=len(sets),
        dtype=session.dtype(checkpoint),
        versions=versions(),
        cost=Cost(seconds=round(time.monotonic() - started, 3), peak_bytes=peak_memory()),
        fingerprint=expected,
    )
    if ranks.is_main:
        found.save(path)
    ranks.wait()  # the journal is needed until the result is safe
    shutil.rmtree(work, ignore_errors=True)
    return found


def _fingerprint(
    checkpoint: Checkpoint,
    question: Question,
    scores: Sequence[Scored],
    text: EvaluationText,
    session: Session,
) -> str:
    """Of everything the comparison depends on."""
    from shortllm.data.calibration import tokens_fingerprint

    return fingerprint(
        {
            "model": checkpoint.fingerprint,
            "scores": [(one.name, found.fingerprint) for one, _, found in scores],
            "budgets": [budget.model_dump() for budget in question.budgets],
            "left out": [left.model_dump() for left in question.left_out],
            "protected": question.protected,
            "draws": question.options.random,
            "text": [text.rows.source, tokens_fingerprint(text.segments.ids)],
            "dtype": session.dtype(checkpoint),
            "device": session.device.type,
        }
    )


def _chosen(model: ModelInfo, question: Question, scores: Sequence[Scored]) -> list[Choice]:
    """What the plans of each criterion remove, by each text."""
    budgets = [_budget(question.options, remove=one.blocks) for one in question.budgets]
    return [
        (
            one,
            [build_plan(budget, model=model, scores=found).order for budget in budgets],
        )
        for one, _, found in scores
    ]


def _drawn(model: ModelInfo, question: Question) -> list[Choice]:
    """What plans by `random` with the seeds 0, 1, ... remove."""
    found = []
    for seed in range(question.options.random):
        one = resolve(RANDOM, {"seed": seed})
        order = removal_order(one.call(model.blocks), question.protected)
        found.append((one, [order[: budget.blocks] for budget in question.budgets]))
    return found


def _lowest(orders: Sequence[list[int]], measured: Measured) -> frozenset[int]:
    """The removal with the lowest loss of some."""
    sets = [frozenset(order) for order in orders]
    means = {one: fmean(measured[one]) for one in sets}
    return min(sets, key=lambda one: math.inf if math.isnan(means[one]) else means[one])


def _contender(
    one: Criterion,
    orders: Sequence[list[int]],
    measured: Measured,
    best: Sequence[frozenset[int]],
    *,
    scores: str | None = None,
    text: str | None = None,
) -> Contender:
    """One row of the comparison, with its distance from the best of each budget."""
    sets = [
        _removed_set(order, measured[frozenset(order)], measured[lowest])
        for order, lowest in zip(orders, best, strict=True)
    ]
    return Contender(
        criterion=one.name,
        text=text,
        options=one.options,
        source=one.source,
        scores=scores,
        sets=sets,
    )


def _removed_set(order: list[int], nlls: list[float], lowest: list[float]) -> RemovedSet:
    """What is left without some blocks; None where what was measured is not a number."""
    from shortllm.evaluation.options import paired_difference
    from shortllm.evaluation.statistics import standard_error
    from shortllm.model.metrics import perplexity

    nll, error = fmean(nlls), standard_error(nlls)
    found = perplexity(nll)
    values = {"nll": nll, "perplexity": found, "stderr": None if error is None else found * error}
    finite = {name: one for name, one in values.items() if one is not None and math.isfinite(one)}
    is_known = "perplexity" in finite and math.isfinite(fmean(lowest))
    behind = paired_difference(lowest, nlls) if is_known else None
    unknown = {"nll": None, "perplexity": None}
    return RemovedSet.model_validate({"order": order, **unknown, **finite, "behind": behind})
