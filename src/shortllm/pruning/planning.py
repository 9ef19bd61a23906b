"""From scores and a budget to a plan: which blocks are removed, in which order, and why.

budget.py says how many blocks, and which may be removed. Of equally important blocks the later one
is removed first.

    shortllm plan runs/steps --ratio 0.25
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from shortllm import criteria
from shortllm.calls import accepts
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.criteria.search import FITNESS, Search, held_out_by
from shortllm.data.calibration import BOS_EVERY_SAMPLE, check_length, tokens_fingerprint
from shortllm.data.options import CalibrationInfo
from shortllm.data.rows import Rows
from shortllm.data.sources import load_rows
from shortllm.errors import BudgetError, CheckpointError
from shortllm.evaluation.evaluate import evaluation_fingerprint, resolve_evaluation
from shortllm.evaluation.options import Evaluation, EvaluationOptions
from shortllm.evaluation.texts import EvaluationText, evaluation_segments_of, rows_after
from shortllm.files import fingerprint, require_file_target
from shortllm.format import counted, named_blocks, number
from shortllm.model import Session
from shortllm.pruning import targets
from shortllm.pruning.advice import against
from shortllm.pruning.budget import (
    Budget,
    amount_of,
    most_blocks,
    parameters_of,
    protected_blocks,
    reaching,
    removable,
)
from shortllm.pruning.quality_target import QualityTarget, sizes_of
from shortllm.pruning.records import BlockScores, PrunePlan, Size, removal_order, scores_path
from shortllm.pruning.size_search import SizeSearch, plans_of
from shortllm.pruning.ties import Compared, Ties, near_ties
from shortllm.published import Published
from shortllm.records import ModelInfo
from shortllm.run_directory import run_file
from shortllm.runtime import DeviceOptions

log = logging.getLogger(__name__)


@accepts(budget=Budget, runtime=DeviceOptions)
def plan(
    scores: BlockScores | Path,
    *,
    budget: Budget,
    runtime: DeviceOptions,
    out: Path | None = None,
    eval_data: str | None = None,
) -> PrunePlan:
    """Choose blocks by their scores.

    Args:
        scores: scores, a scores.json, or a run directory, which then also gets plan.json.
        budget: how much to remove; its fields can be given as keywords, e.g. `remove=6`.
        runtime: for a target of speed, memory or quality; its fields can be given as keywords.
        out: where to save the plan. Default: plan.json next to the scores, if those are a file.
            How a target became a number of blocks is saved next to it as target.json, and for
            targets of quality as quality-plan.json.
        eval_data: text to measure on for a target of quality. Default: that of the run.
    Returns:
        The blocks to keep and to remove, in which order, and why.
    Raises:
        BudgetError: a budget that cannot be met.
        CheckpointError: a target, and the model that was scored is no longer there.
        TargetMissedError: no removal meets the targets of quality.
    """
    if eval_data is not None and not budget.quality():
        log.warning("--eval-data has no effect without --max-ppl-increase")
    searched, home = bool(budget.quality()), None
    if not isinstance(scores, BlockScores):
        file = scores_path(scores)
        out, home = out or file.with_name("plan.json"), file.parent
        scores = BlockScores.load(file)
    if out is not None:
        require_file_target(out)
    directory = None if out is None else out.parent
    target = None
    if budget.target() is not None or budget.quality():
        checkpoint, session = _scored_model(scores), Session(runtime)
        measured = _to_measure_on(budget, scores, checkpoint, home, eval_data)
        budget, target = targets.resolve(budget, checkpoint, session, directory=directory)
        if measured is not None:
            assert directory is not None, "scores without a directory have no text"
            budget = _allowed(budget, scores, checkpoint, session, *measured, directory)
    chosen = build_plan(budget, model=scores.model, scores=scores)
    for line in against(chosen, scores, _calibration(scores, home)):
        log.warning("%s", line)
    if out is not None:
        targets.keep(target, out.parent)
        chosen.save(out)
        if not searched:
            (out.parent / QualityTarget.PLANNED).unlink(missing_ok=True)
    return chosen


def _calibration(scores: BlockScores, home: Path | None) -> CalibrationInfo | None:
    """What is known of the text that blocks were scored on."""
    path = home and home / "calibration.json"
    if path is None or scores.calibration is None or not path.exists():
        return None
    found = CalibrationInfo.load(path)
    return found if found.tokens_fingerprint == scores.calibration else None


def _scored_model(scores: BlockScores) -> Checkpoint:
    """The model that was scored, which must be as it was."""
    checkpoint = open_checkpoint(scores.model.id, revision=scores.model.revision)
    if checkpoint.fingerprint != scores.model.fingerprint:
        raise CheckpointError(
            f"{checkpoint.id} was changed after it was scored, so a target for it cannot be "
            "turned into a number of blocks. Score it again with `shortllm score`"
        )
    return checkpoint


def _to_measure_on(
    budget: Budget,
    scores: BlockScores,
    checkpoint: Checkpoint,
    run: Path | None,
    eval_data: str | None,
) -> tuple[EvaluationText, EvaluationOptions] | None:
    """The text that targets of quality are measured on, and how; None without such targets."""
    if not budget.quality():
        return None
    if budget.min_task_mean is not None:
        raise BudgetError(
            "--min-task-mean: tasks are not measured while a plan is made. Use `shortllm run`"
        )
    if run is not None and eval_data is not None:
        return _given_text(eval_data, checkpoint, _calibration(scores, run), run)
    if run is None or not (run / "eval.json").exists():
        raise BudgetError(
            "--max-ppl-increase needs text to measure on, and the scores are not those of a "
            "finished `shortllm run`. Give their directory, and the text as --eval-data"
        )
    return _text_of_run(run / "eval.json", checkpoint)


def _given_text(
    source: str, checkpoint: Checkpoint, scored_on: CalibrationInfo | None, run: Path
) -> tuple[EvaluationText, EvaluationOptions]:
    """Other text than that of the run, measured in the same way, without the rows scored on."""
    given = run_file(run).get("recipe", {}).get("evaluation", {})
    options = resolve_evaluation(
        EvaluationOptions.model_validate(given),
        embedded=False,
        every=checkpoint.model_type in BOS_EVERY_SAMPLE,
    )
    check_length(checkpoint, options.length, "--eval-length", before=options.before_window)
    rows = load_rows(source)
    free = rows_after(rows, [scored_on] if scored_on else [])
    return _segmented(checkpoint, free, options, held_out=free is not rows), options


def _text_of_run(file: Path, checkpoint: Checkpoint) -> tuple[EvaluationText, EvaluationOptions]:
    """The first text that a run measured, cut as it was there."""
    intact, *_ = Evaluation.load(file).models
    if not intact.perplexity or intact.model.fingerprint != checkpoint.fingerprint:
        raise BudgetError(
            f"--max-ppl-increase: {file} has no perplexity of {checkpoint.id}. Give the text to "
            "measure on as --eval-data"
        )
    measured = intact.perplexity[0]
    options = EvaluationOptions(
        length=measured.length, bos=measured.bos, max_segments=measured.segments
    )
    rows = load_rows(measured.source)
    if measured.rows is not None:
        rows = rows.span(*measured.rows)
    text = _segmented(checkpoint, rows, options, held_out=measured.split is not None)
    if tokens_fingerprint(text.segments.ids) != measured.tokens_fingerprint:
        raise BudgetError(
            f"--max-ppl-increase: {measured.source} is not the text any more that {file} measured. "
            "Give the text to measure on as --eval-data"
        )
    return text, options


def _segmented(
    checkpoint: Checkpoint, rows: Rows, options: EvaluationOptions, *, held_out: bool
) -> EvaluationText:
    segments = evaluation_segments_of(checkpoint, rows, load_tokenizer(checkpoint), options)
    return EvaluationText(rows=rows, held_out=held_out, segments=segments)


def _allowed(
    budget: Budget,
    scores: BlockScores,
    checkpoint: Checkpoint,
    session: Session,
    text: EvaluationText,
    evaluation: EvaluationOptions,
    directory: Path,
) -> Budget:
    """The budget with the number of blocks that targets of quality allow, without healing."""
    plans = plans_of(
        sizes_of(budget, scores.model),
        lambda number: build_plan(budget.sized(number), model=scores.model, scores=scores),
    )
    models = [("original", checkpoint)]
    inputs = {
        "asked": budget.quality(),
        "at least": budget.remove,
        "plans": [plan.fingerprint for plan in plans.values()],
        "evaluation": evaluation_fingerprint(models, [text], evaluation, session),
    }
    search = SizeSearch(
        directory=directory,
        file=QualityTarget.PLANNED,
        checkpoint=checkpoint,
        session=session,
        budget=budget,
        sizes=list(plans),
        plan_of=plans.__getitem__,
        text=text,
        evaluation=evaluation,
        fingerprint=fingerprint(inputs),
        hints=["`shortllm run` with --heal regression"],
    )
    return budget.sized(search.run())


def build_plan(
    budget: Budget,
    *,
    model: ModelInfo,
    scores: BlockScores | None = None,
    published: Published | None = None,
) -> PrunePlan:
    """Choose the blocks: those the budget names, or by a published order, or by scores."""
    if not model.parameters_per_block:
        raise BudgetError(
            f"the scores do not have the size of each block of {model.id}. Score it again with "
            "`shortllm score`"
        )
    protected = protected_blocks(budget, model)
    number = amount_of(budget, model)
    if budget.blocks is not None:
        order = list(budget.blocks)
        scores = published = None
    elif published is not None:
        scores = None
        check_published_order(budget, published, model)
        ranks = [float(published.order.index(block)) for block in range(model.blocks)]
        order = _least_important(ranks, budget, model, number)
    elif scores is None:
        raise BudgetError("a budget without block numbers needs scores. Run `shortllm score` first")
    else:
        order = _order(budget, scores, model, number)
    removed = sorted(order)
    freed = parameters_of(removed, model)
    asked = budget.asked()
    ties = _ties(scores, removed, model, budget) if scores else Ties()
    return PrunePlan(
        model=model,
        criterion=scores.criterion if scores else published.criterion if published else None,
        kept=[block for block in range(model.blocks) if block not in removed],
        removed=removed,
        protected=protected,
        order=order,
        asked=asked,
        reached=Size(
            blocks=len(removed),
            block_ratio=len(removed) / model.blocks,
            parameters=freed,
            parameter_ratio=freed / model.parameters,
        ),
        reason=_reason(scores, published, removed, protected, model, budget, ties),
        near_ties=ties.blocks,
        scores=scores.fingerprint if scores else None,
        fingerprint=fingerprint(
            {
                "model": model.fingerprint,
                "scores": scores.fingerprint if scores else None,
                "asked": asked,
                "contiguous": budget.contiguous,
                "protected": protected,
                **({"period": model.period} if budget.period_aligned else {}),
                **({"published": published.order} if published else {}),
            }
        ),
    )


def check_published_order(budget: Budget, published: Published, model: ModelInfo) -> None:
    """Refuse, before any work, a published order that does not fit the model or the budget."""
    if sorted(published.order) != list(range(model.blocks)):
        raise BudgetError(
            f"the published order is one of {len(published.order)} blocks, and {model.id} has "
            f"{model.blocks}. Leave out --use-published-order"
        )
    for flag, asked in (("--blocks", budget.blocks), ("--contiguous", budget.contiguous)):
        if asked:
            raise BudgetError(
                f"{flag} and --use-published-order both say which blocks go. Leave one of them out"
            )


def _least_important(
    importance: Sequence[float], budget: Budget, model: ModelInfo, number: int | None
) -> list[int]:
    """The removed blocks in removal order, unit by unit."""
    totals = _totals(importance, budget, model)
    units = sorted(totals, key=lambda unit: (totals[unit], -unit[0]))
    if number is None:
        number = reaching(budget, units, model)
    return [block for unit in units for block in unit][:number]


def _totals(
    importance: Sequence[float], budget: Budget, model: ModelInfo
) -> dict[tuple[int, ...], float]:
    """The importance of each removable unit, which counts as the sum of its blocks."""
    return {
        tuple(unit): sum(importance[block] for block in unit) for unit in removable(budget, model)
    }


def _order(budget: Budget, scores: BlockScores, model: ModelInfo, number: int | None) -> list[int]:
    if _is_contiguous(budget, scores):
        span = _span(budget, scores, model, number)
        outside = [block for block in range(model.blocks) if block not in span]
        return removal_order(scores.importance, outside)
    if scores.removed is not None:
        return _searched(budget, scores, model, number)
    if scores.order is not None:
        return _followed(budget, scores, model, number)
    return _least_important(scores.importance, budget, model, number)


def _followed(
    budget: Budget, scores: BlockScores, model: ModelInfo, number: int | None
) -> list[int]:
    """The beginning of a removal order that a criterion found block by block."""
    name, order = scores.criterion, scores.order or []
    if budget.period_aligned and model.period > 1:
        raise BudgetError(
            f"'{name}' removes single blocks, one after the other. Leave out --period-aligned, or "
            "score by another criterion"
        )
    if number is None:
        number = reaching(budget, [[block] for block in order], model)
    if number > len(order):
        raise BudgetError(
            f"the scores by '{name}' have the order of {len(order)} removals, and {number} were "
            f"requested. Score again with --option {name}.rounds={number}"
        )
    _require_unprotected(name, order[:number], budget, model)
    return order[:number]


def _require_unprotected(
    criterion: str, removed: Sequence[int], budget: Budget, model: ModelInfo
) -> None:
    """Refuse the removal of a criterion that ran with less protection than the budget has."""
    protected = protected_blocks(budget, model)
    for block in removed:
        if block in protected:
            raise BudgetError(
                f"the scores by '{criterion}' remove block {block}, which is protected. Score "
                f"again with --option {criterion}.protect_first=... and protect_last=..., as in "
                "the budget"
            )


def _searched(
    budget: Budget, scores: BlockScores, model: ModelInfo, number: int | None
) -> list[int]:
    """The set of blocks that a criterion searched for, which is valid for its own size alone."""
    name, removed = scores.criterion, scores.removed or []
    again = f"Score again with --option {name}"
    if number is not None and number != len(removed):
        raise BudgetError(
            f"the scores by '{name}' have the best removal of {counted(len(removed), 'block')} "
            f"that it found, and of no other number; {number} were requested. "
            f"{again}.remove={number}"
        )
    held = parameters_of(removed, model) / model.parameters
    if number is None and held < (budget.param_ratio or 0.0):
        raise BudgetError(
            f"of the parameters, {held:.1%} are in the {counted(len(removed), 'block')} that "
            f"'{name}' searched for, and {budget.param_ratio:.1%} were requested. {again}.remove="
            f"{most_blocks(budget, model)}"
        )
    units = removable(budget, model)
    apart = sorted(set(removed).difference(*(u for u in units if set(removed).issuperset(u))))
    _require_unprotected(name, apart, budget, model)
    if apart:
        raise BudgetError(
            f"the scores by '{name}' remove block {apart[0]} without the rest of its period. "
            f"{again}.period_aligned=true"
        )
    return list(scores.order or removed)


def _is_contiguous(budget: Budget, scores: BlockScores) -> bool:
    """Whether one span is removed: as requested, or because the criterion scores spans."""
    return scores.spans is not None if budget.contiguous is None else budget.contiguous


def _span(budget: Budget, scores: BlockScores, model: ModelInfo, number: int | None) -> range:
    """The least important span of removable blocks that meets the budget."""
    if scores.spans is None:
        raise BudgetError(
            f"criterion '{scores.criterion}' scores no spans of blocks. Leave out --contiguous, or "
            f"score by {' or '.join(map(repr, criteria.names_by_need('last token')))}"
        )
    units = removable(budget, model)
    size = len(units[0]) if units else 1
    lengths = [number] if number is not None else range(size, model.blocks, size)
    for n in lengths:
        starts = _starts(units, n)
        if not starts:
            break
        values = scores.spans[n - 1]
        start = min(starts, key=lambda s: (values[s], -s))
        span = range(start, start + n)
        enough = (budget.param_ratio or 0.0) * model.parameters
        if number is not None or parameters_of(span, model) >= enough:
            return span
    raise BudgetError(
        "no span of unprotected blocks is that large. Ask for less, or pass --scattered to remove "
        "single blocks, or --protect-first 0 --protect-last 0"
    )


def _starts(units: Sequence[Sequence[int]], length: int) -> list[int]:
    """Where spans of this many removable blocks begin."""
    size = len(units[0]) if units else 1
    runs = [units[i : i + length // size] for i in range(len(units) - length // size + 1)]
    return [run[0][0] for run in runs if run[-1][-1] - run[0][0] == length - 1]


def _ties(scores: BlockScores, removed: Sequence[int], model: ModelInfo, budget: Budget) -> Ties:
    """What the plan must say of blocks that score like removed ones, if they were compared."""
    if _is_contiguous(budget, scores) and scores.spans is not None:
        length, values = len(removed), scores.spans[len(removed) - 1]
        starts = _starts(removable(budget, model), length)
        spans = {tuple(range(start, start + length)): values[start] for start in starts}
        return near_ties(Compared(spans, {}), {tuple(removed)})
    found = criteria.find(scores.criterion)
    measured = found is None or (found.needs != "nothing" and found.label != criteria.PLACE)
    if scores.order is not None or scores.removed is not None or not measured:
        return Ties()
    totals = _totals(scores.importance, budget, model)
    samples = {
        unit: [sum(of_blocks) for of_blocks in zip(*(scores.samples[b] for b in unit), strict=True)]
        for unit in totals
        if scores.samples is not None
    }
    gone = [unit for unit in totals if set(unit) <= set(removed)]
    return near_ties(Compared(totals, samples), gone)


def _reason(
    scores: BlockScores | None,
    published: Published | None,
    removed: list[int],
    protected: list[int],
    model: ModelInfo,
    budget: Budget,
    ties: Ties,
) -> str:
    """One sentence for a reader of the plan."""
    free = model.blocks - len(protected)
    kept_safe = f"; {named_blocks(protected, 'were')} protected" if protected else ""

    def they(verb: str) -> str:
        return named_blocks(removed, verb).capitalize()

    if published is not None:
        return (
            f"{they('come')} first in the order published for the criterion "
            f"'{published.criterion}' ({published.source}) among the {free} unprotected blocks"
            f"{kept_safe}. Nothing was scored."
        )
    if scores is None:
        return f"{they('were')} named by hand, of {model.blocks}."
    if _is_contiguous(budget, scores):
        chosen = f"{they('are')} the span with the lowest importance by the criterion"
    elif scores.search is not None:
        return f"{_search_reason(scores.search, scores.criterion, they)}{kept_safe}."
    elif scores.order is not None:
        one = "" if len(removed) == 1 else " one after the other"
        chosen = f"{they('were')} removed{one} by the criterion"
    else:
        chosen = f"{they('have')} the lowest importance by the criterion"
    whole = budget.period_aligned and model.period > 1
    periods = f", in whole periods of {model.period} blocks" if whole else ""
    said = f"{chosen} '{scores.criterion}' among the {free} unprotected blocks{periods}{kept_safe}."
    return f"{said} {ties.sentence}".rstrip()


def _search_reason(search: Search, criterion: str, they: Callable[[str], str]) -> str:
    found = search.found
    one = len(found.removed) == 1
    it = "it" if one else "them"
    if found.criterion != criterion:
        others = [one for one in search.candidates if one.criterion != found.criterion]
        measured = FITNESS[held_out_by(search.fitness)]
        beaten = ", ".join(f"{one.criterion} {number(one.held_out, 5)}" for one in others)
        return (
            f"{they('are')} {'that' if one else 'those'} of the criterion '{found.criterion}', "
            f"which '{criterion}' chose: without {it} the {measured} of {search.held_out_samples} "
            f"held-out calibration samples is {number(found.held_out, 5)}, the lowest of all "
            f"candidates ({beaten})"
        )
    unit = FITNESS[search.fitness]
    if search.start is None:
        return (
            f"{they('were')} found by the search '{criterion}': without {it} the {unit} of the "
            f"search text is {number(found.value, 5)}"
        )
    begun = next(one for one in search.candidates if one.criterion == search.start)
    better = "that found nothing better than its start"
    if found.removed != begun.removed:
        better = (
            f"that brought the {unit} of the search text from {number(begun.value, 5)} to "
            f"{number(found.value, 5)}"
        )
    return (
        f"{they('were')} chosen by the search '{criterion}' from the plan by '{search.start}', "
        f"{better}"
    )
