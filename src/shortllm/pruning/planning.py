"""From scores and a budget to a plan: which blocks are removed, in which order, and why.

budget.py says how many blocks, and which may be removed. Of equally important blocks the later one
is removed first.

    shortllm plan runs/steps --ratio 0.25
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shortllm import criteria
from shortllm.calls import accepts
from shortllm.checkpoint.source import open_checkpoint
from shortllm.criteria.search import Search
from shortllm.errors import BudgetError, CheckpointError
from shortllm.files import fingerprint, require_file_target
from shortllm.format import number
from shortllm.model import Session
from shortllm.pruning import targets
from shortllm.pruning.budget import (
    Budget,
    amount_of,
    most_blocks,
    parameters_of,
    protected_blocks,
    reaching,
    removable,
)
from shortllm.pruning.records import BlockScores, PrunePlan, Size, removal_order, scores_path
from shortllm.published import Published
from shortllm.records import ModelInfo
from shortllm.runtime import DeviceOptions


@accepts(budget=Budget, runtime=DeviceOptions)
def plan(
    scores: BlockScores | Path,
    *,
    budget: Budget,
    runtime: DeviceOptions,
    out: Path | None = None,
) -> PrunePlan:
    """Choose blocks by their scores.

    Args:
        scores: scores, a scores.json, or a run directory, which then also gets plan.json.
        budget: how much to remove; its fields can be given as keywords, e.g. `remove=6`.
        runtime: for a target of speed or memory; its fields can be given as keywords.
        out: where to save the plan. Default: plan.json next to the scores, if those are a file.
            How a target became a number of blocks is saved next to it as target.json.
    Returns:
        The blocks to keep and to remove, in which order, and why.
    Raises:
        BudgetError: a budget that cannot be met.
        CheckpointError: a target, and the model that was scored is no longer there.
    """
    if not isinstance(scores, BlockScores):
        file = scores_path(scores)
        out = out or file.with_name("plan.json")
        scores = BlockScores.load(file)
    if out is not None:
        require_file_target(out)
    target = None
    if budget.target() is not None:
        checkpoint = open_checkpoint(scores.model.id, revision=scores.model.revision)
        if checkpoint.fingerprint != scores.model.fingerprint:
            raise CheckpointError(
                f"{checkpoint.id} was changed after it was scored, so a target for it cannot be "
                "turned into a number of blocks. Score it again with `shortllm score`"
            )
        directory = None if out is None else out.parent
        budget, target = targets.resolve(budget, checkpoint, Session(runtime), directory=directory)
    chosen = build_plan(budget, model=scores.model, scores=scores)
    if out is not None:
        targets.keep(target, out.parent)
        chosen.save(out)
    return chosen


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
        reason=_reason(scores, published, removed, protected, model, budget),
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
    """The removed blocks in removal order, unit by unit; a unit counts as the sum of its blocks."""
    totals = {
        tuple(unit): sum(importance[block] for block in unit) for unit in removable(budget, model)
    }
    units = sorted(totals, key=lambda unit: (totals[unit], -unit[0]))
    if number is None:
        number = reaching(budget, units, model)
    return [block for unit in units for block in unit][:number]


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
            f"the scores by '{name}' have the best removal of {len(removed)} blocks that it found, "
            f"and of no other number; {number} were requested. {again}.remove={number}"
        )
    held = parameters_of(removed, model) / model.parameters
    if number is None and held < (budget.param_ratio or 0.0):
        raise BudgetError(
            f"the {len(removed)} blocks that '{name}' searched for have {held:.1%} of the "
            f"parameters, and {budget.param_ratio:.1%} were requested. {again}.remove="
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
        runs = [units[i : i + n // size] for i in range(len(units) - n // size + 1)]
        starts = [run[0][0] for run in runs if run[-1][-1] - run[0][0] == n - 1]
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


def _reason(
    scores: BlockScores | None,
    published: Published | None,
    removed: list[int],
    protected: list[int],
    model: ModelInfo,
    budget: Budget,
) -> str:
    """One sentence for a reader of the plan."""
    blocks, free = ", ".join(map(str, removed)), model.blocks - len(protected)
    kept_safe = f"; blocks {', '.join(map(str, protected))} were protected" if protected else ""
    if published is not None:
        return (
            f"Blocks {blocks} come first in the order published for the criterion "
            f"'{published.criterion}' ({published.source}) among the {free} unprotected blocks"
            f"{kept_safe}. Nothing was scored."
        )
    if scores is None:
        return f"Blocks {blocks} of {model.blocks} were named by hand."
    if _is_contiguous(budget, scores):
        chosen = f"are the span with the lowest importance by the criterion '{scores.criterion}'"
    elif scores.search is not None:
        return f"Blocks {blocks} {_search_reason(scores.search, scores.criterion)}{kept_safe}."
    elif scores.order is not None:
        chosen = f"were removed one after the other by the criterion '{scores.criterion}'"
    else:
        chosen = f"have the lowest importance by the criterion '{scores.criterion}'"
    whole = budget.period_aligned and model.period > 1
    periods = f", in whole periods of {model.period} blocks" if whole else ""
    return f"Blocks {blocks} {chosen} among the {free} unprotected blocks{periods}{kept_safe}."


def _search_reason(search: Search, criterion: str) -> str:
    found = search.found
    if found.criterion != criterion:
        others = [one for one in search.candidates if one.criterion != found.criterion]
        beaten = ", ".join(f"{one.criterion} {number(one.held_out, 5)}" for one in others)
        return (
            f"are those of the criterion '{found.criterion}', which '{criterion}' chose: without "
            f"them the perplexity of {search.held_out_samples} held-out calibration samples is "
            f"{number(found.held_out, 5)}, the lowest of all candidates ({beaten})"
        )
    unit = "perplexity" if search.fitness == "ppl" else "KL divergence"
    if search.start is None:
        return (
            f"are those that the search '{criterion}' found: without them the {unit} of the search "
            f"text is {number(found.value, 5)}"
        )
    begun = next(one for one in search.candidates if one.criterion == search.start)
    better = "that found nothing better than its start"
    if found.removed != begun.removed:
        better = (
            f"that brought the {unit} of the search text from {number(begun.value, 5)} to "
            f"{number(found.value, 5)}"
        )
    return f"were chosen by the search '{criterion}' from the plan by '{search.start}', {better}"
