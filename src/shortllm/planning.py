"""Scores and a budget in, a plan out: which blocks go, in which order, and why. Pure, no torch.

The budget is a number of blocks, a ratio of the blocks, a ratio of the parameters, or the blocks
themselves; a target for what is left is first turned into a number of blocks (targets.py). The
first and last blocks are protected by default (the "+" of Taylor+ and magnitude+), and those that
others depend on always; of equally important blocks the later goes first.

Where the kinds of blocks repeat (attention of two kinds in turn), a plan can be made of whole
periods: what is left repeats in the same way, which is what other programs expect of such a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from shortllm.errors import BudgetError
from shortllm.files import fingerprint
from shortllm.published import Published
from shortllm.results.plan import PrunePlan, Size
from shortllm.results.record import ModelInfo, Record
from shortllm.results.scores import BlockScores, Search

PROTECT_FIRST = 4
PROTECT_LAST = 2


TARGETS = ("target_params", "target_memory", "target_speedup")


class Budget(Record):
    """How much goes, and what may not; exactly one of the amounts or targets is given."""

    remove: int | None = Field(default=None, description="number of blocks")
    ratio: float | None = Field(
        default=None, description="part of the blocks, rounded to the nearest number"
    )
    param_ratio: float | None = Field(
        default=None, description="part of all parameters; as few blocks as reach it"
    )
    blocks: list[int] | None = Field(
        default=None, description="exactly these blocks; protection does not apply"
    )
    target_params: int | None = Field(default=None, description="parameters left, at the most")
    target_memory: int | None = Field(
        default=None, description="bytes of weights and cache left, at the most"
    )
    target_speedup: float | None = Field(
        default=None, description="how many times as fast as the intact model, at the least"
    )
    contiguous: bool | None = Field(
        default=None,
        description="one span of blocks; default: where the criterion scores spans",
    )
    protect_first: int | None = Field(
        default=None, description="leading blocks kept; default 4, at most a quarter of the blocks"
    )
    protect_last: int | None = Field(
        default=None, description="trailing blocks kept; default 2, at most a quarter of the blocks"
    )
    period_aligned: bool = Field(
        default=False, description="remove only whole periods of the pattern of blocks"
    )

    def asked(self) -> dict[str, Any]:
        """The one way the amount was given, e.g. `{"remove": 3}`.

        Raises:
            BudgetError: none or several were given, or the number is impossible for every model.
        """
        amounts = {
            name: getattr(self, name)
            for name in ("remove", "ratio", "param_ratio", "blocks", *TARGETS)
        }
        given = {name: value for name, value in amounts.items() if value is not None}
        if len(given) != 1:
            raise BudgetError(
                f"{'no budget' if not given else 'several budgets'} given. Give one of --remove "
                "6 (blocks), "
                "--ratio 0.2 (of the blocks), --param-ratio 0.2 (of the parameters), --blocks "
                "3,4,5, --target-params 1.0B, --target-memory 8GiB or --target-speedup 1.3"
            )
        for name in ("ratio", "param_ratio"):
            value = given.get(name)
            if value is not None and not 0 < value < 1:
                raise BudgetError(f"--{name.replace('_', '-')} {value} is not between 0 and 1")
        if self.remove is not None and self.remove < 1:
            raise BudgetError(f"--remove {self.remove} removes nothing. Give 1 or more")
        if self.target_speedup is not None and not self.target_speedup > 1:
            raise BudgetError(
                f"--target-speedup {self.target_speedup} is no speed-up. Give more than 1, e.g. 1.3"
            )
        return given

    def target(self) -> tuple[str, float] | None:
        """Name and value of the target, where the amount was given as one."""
        for name in TARGETS:
            value = getattr(self, name)
            if value is not None:
                return name, value
        return None

    def protected(self, count: int) -> list[int]:
        """Blocks of a model of `count` blocks that may not be removed, ascending.

        Raises:
            BudgetError: a negative protection.
        """
        if self.blocks is not None:
            return []
        first, last = self.protect_first, self.protect_last
        if (first or 0) < 0 or (last or 0) < 0:
            raise BudgetError("--protect-first and --protect-last cannot be negative")
        first = min(PROTECT_FIRST, count // 4) if first is None else first
        last = min(PROTECT_LAST, count // 4) if last is None else last
        return [block for block in range(count) if block < first or block >= count - last]


def check_budget(budget: Budget, model: ModelInfo) -> None:
    """Refuse, before any scoring, a budget that no scores could meet.

    Raises:
        BudgetError: naming what is free and the largest budget that works.
    """
    _amount(budget, model)


def protected_blocks(budget: Budget, model: ModelInfo) -> list[int]:
    """Blocks that may not be removed, by the budget or since others depend on them, ascending."""
    fixed = model.fixed if budget.blocks is None else {}
    return sorted({*budget.protected(model.blocks), *fixed})


def removable(budget: Budget, model: ModelInfo) -> list[list[int]]:
    """What goes together and may go, ascending: single blocks, or whole periods of them."""
    protected = set(protected_blocks(budget, model))
    return [unit for unit in _units(budget, model) if not protected.intersection(unit)]


def _units(budget: Budget, model: ModelInfo) -> list[list[int]]:
    size = model.period if budget.period_aligned else 1
    return [list(range(start, start + size)) for start in range(0, model.blocks - size + 1, size)]


def _amount(budget: Budget, model: ModelInfo) -> int | None:
    """Number of blocks to remove; None where it depends on which blocks go.

    Raises:
        BudgetError: more than is unprotected, nothing, all, or not whole periods.
    """
    count = model.blocks
    units = removable(budget, model)
    free = sum(map(len, units))
    protected = len(protected_blocks(budget, model))
    asked = budget.asked()
    assert budget.target() is None, "targets.resolve comes first"
    size = model.period if budget.period_aligned else 1
    if budget.blocks is not None:
        _check_given(budget.blocks, count)
        _check_whole_periods(budget, model)
        return len(budget.blocks)
    if budget.param_ratio is not None:
        _check_parameters(budget.param_ratio, units, model)
        return None
    number = budget.remove
    if number is None:
        number = round(asked["ratio"] * count / size) * size
    if number == 0:
        raise BudgetError(
            f"--ratio {budget.ratio} of {count} blocks is less than half "
            f"{'a block' if size == 1 else f'a period of {size} blocks'}. Ask for "
            f"{size / count:.3f} or more"
        )
    most = min(free, count - size)
    if number > most:
        way_out = f"Ask for {most} or fewer" if most else "Nothing is free"
        relief = ", or pass --protect-first 0 --protect-last 0" if protected else ""
        whole = f" and only whole periods of {size} go" if size > 1 else ""
        raise BudgetError(
            f"cannot remove {number} of {count} blocks: {protected} are protected"
            f"{whole}{'' if protected else ' and one must stay'}. {way_out}{relief}"
        )
    if number % size:
        lower, upper = number // size * size, (number // size + 1) * size
        nearest = [str(n) for n in (lower, upper) if 0 < n <= most]
        raise BudgetError(
            f"cannot remove {number} blocks in whole periods of {size}. "
            f"Ask for {' or '.join(nearest)}, or leave out --period-aligned"
        )
    return number


def _check_parameters(ratio: float, units: list[list[int]], model: ModelInfo) -> None:
    """All that may go must hold the part of the parameters asked for, something staying."""
    sizes = sorted(_parameters(unit, model) for unit in units)
    free = sum(map(len, units))
    if free == model.blocks:
        sizes.pop()  # one block must stay
    available = sum(sizes) / model.parameters
    if ratio > available:
        raise BudgetError(
            f"cannot remove {ratio:.1%} of the parameters: the {free} "
            "unprotected of "
            f"{model.blocks} blocks hold {available:.1%}. Ask for less, or pass --protect-first 0 "
            "--protect-last 0"
        )


def _parameters(blocks: Sequence[int], model: ModelInfo) -> int:
    return sum(model.parameters_per_block[block] for block in blocks)


def _check_whole_periods(budget: Budget, model: ModelInfo) -> None:
    """Explicit block numbers must be whole periods, where these are asked for."""
    given = set(budget.blocks or ())
    whole = {b for unit in _units(budget, model) if given.issuperset(unit) for b in unit}
    if given != whole:
        raise BudgetError(
            f"block {min(given - whole)} is named without the rest of its period: periods of "
            f"{model.period} blocks start at multiples of {model.period}. Name all of its blocks, "
            "or leave out --period-aligned"
        )


def _check_given(blocks: list[int], count: int) -> None:
    """Explicit block numbers must be distinct, exist, and leave something."""
    outside = [block for block in blocks if not 0 <= block < count]
    if outside:
        raise BudgetError(
            f"there is no block {outside[0]}: the model's blocks are 0 to {count - 1}"
        )
    if len(set(blocks)) != len(blocks):
        raise BudgetError(f"--blocks names a block twice: {','.join(map(str, blocks))}")
    if not 0 < len(blocks) < count:
        raise BudgetError(
            f"--blocks must name at least one and at most {count - 1} of the {count} blocks"
        )


def removal_order(importance: Sequence[float], protected: Sequence[int]) -> list[int]:
    """Unprotected blocks, least important first; of equals the later first."""
    free = set(range(len(importance))) - set(protected)
    return sorted(free, key=lambda block: (importance[block], -block))


def _unit_order(importance: Sequence[float], units: Sequence[Sequence[int]]) -> list[list[int]]:
    """What goes together, least important first; its importance is the sum of its blocks'."""
    totals = {tuple(unit): sum(importance[block] for block in unit) for unit in units}
    return [list(unit) for unit in sorted(totals, key=lambda unit: (totals[unit], -unit[0]))]


def build_plan(
    budget: Budget,
    *,
    model: ModelInfo,
    scores: BlockScores | None = None,
    published: Published | None = None,
) -> PrunePlan:
    """Choose the blocks.

    Args:
        scores: needed unless the budget names the blocks itself.
        published: an order of blocks to go by instead of scores.
    Raises:
        BudgetError: the budget cannot be met, or there are no scores to choose by.
    """
    count = model.blocks
    protected = protected_blocks(budget, model)
    number = _amount(budget, model)
    if budget.blocks is not None:
        order = list(budget.blocks)
        scores = published = None
    elif published is not None:
        scores = None
        order = _published_order(budget, published, model, number)
    elif scores is None:
        raise BudgetError("a budget without block numbers needs scores. Run `shortllm score` first")
    else:
        order = _order(budget, scores, model, number)
    removed = sorted(order)
    freed = _parameters(removed, model)
    asked = budget.asked()
    return PrunePlan(
        model=model,
        criterion=scores.criterion if scores else published.criterion if published else None,
        kept=[block for block in range(count) if block not in set(removed)],
        removed=removed,
        protected=protected,
        order=order,
        asked=asked,
        reached=Size(
            blocks=len(removed),
            block_ratio=len(removed) / count,
            parameters=freed,
            parameter_ratio=freed / model.parameters,
        ),
        reason=(
            _published_reason(published, removed, protected, model)
            if published
            else _reason(scores, removed, protected, model, budget)
        ),
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
    """Refuse, before any work, a published order that no plan can be made of.

    Raises:
        BudgetError: it speaks of other blocks than the model has, or something else is asked for.
    """
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


def _published_order(
    budget: Budget, published: Published, model: ModelInfo, number: int | None
) -> list[int]:
    """The blocks that go, the published order's first ones that may.

    Raises:
        BudgetError: see `check_published_order`.
    """
    check_published_order(budget, published, model)
    place = {block: float(rank) for rank, block in enumerate(published.order)}
    ranks = [place[block] for block in range(model.blocks)]
    ordered = _unit_order(ranks, removable(budget, model))
    if number is None:
        number = _reaching(budget.param_ratio or 0.0, ordered, model)
    return [block for unit in ordered for block in unit][:number]


def _order(budget: Budget, scores: BlockScores, model: ModelInfo, number: int | None) -> list[int]:
    """The blocks that go, in the order in which they go.

    Raises:
        BudgetError: the scores do not reach that far.
    """
    units = removable(budget, model)
    if _is_contiguous(budget, scores):
        span = _span(budget, scores, model, number)
        outside = [block for block in range(model.blocks) if block not in span]
        return removal_order(scores.importance, outside)
    if scores.removed is not None:
        return _searched(budget, scores, model, number)
    if scores.order is not None:
        return _followed(budget, scores, model, number)
    ordered = _unit_order(scores.importance, units)
    if number is None:
        number = _reaching(budget.param_ratio or 0.0, ordered, model)
    return [block for unit in ordered for block in unit][:number]


def _followed(
    budget: Budget, scores: BlockScores, model: ModelInfo, number: int | None
) -> list[int]:
    """The beginning of a removal order that a criterion found block by block.

    Raises:
        BudgetError: it is too short, holds protected blocks, or whole periods are asked for.
    """
    name, order = scores.criterion, scores.order or []
    if budget.period_aligned and model.period > 1:
        raise BudgetError(
            f"'{name}' removes single blocks, one after the other. Leave out --period-aligned, or "
            "score by another criterion"
        )
    if number is None:
        number = _reaching(budget.param_ratio or 0.0, [[block] for block in order], model)
    if number > len(order):
        raise BudgetError(
            f"the scores by '{name}' hold the order of {len(order)} removals, and {number} were "
            f"asked for. Score again with --option {name}.rounds={number}"
        )
    protected = set(protected_blocks(budget, model))
    taken = [block for block in order[:number] if block in protected]
    if taken:
        raise BudgetError(
            f"the scores by '{name}' remove block {taken[0]}, which is protected. Score again with "
            f"the same protection (--option {name}.protect_first=... and protect_last=...)"
        )
    return order[:number]


def _searched(
    budget: Budget, scores: BlockScores, model: ModelInfo, number: int | None
) -> list[int]:
    """The set of blocks that a criterion searched for, which answers its own size alone.

    Raises:
        BudgetError: another size is asked for, or the set holds blocks that may not go.
    """
    name, removed = scores.criterion, scores.removed or []
    again = f"Score again with --option {name}"
    if number is not None and number != len(removed):
        raise BudgetError(
            f"the scores by '{name}' hold the best removal of {len(removed)} blocks that it found, "
            f"and of no other number; {number} were asked for. {again}.remove={number}"
        )
    held = _parameters(removed, model) / model.parameters
    if number is None and held < (budget.param_ratio or 0.0):
        raise BudgetError(
            f"the {len(removed)} blocks that '{name}' searched for hold {held:.1%} of the "
            f"parameters, and {budget.param_ratio:.1%} were asked for. {again}.remove="
            f"{most_blocks(budget, model)}"
        )
    units = removable(budget, model)
    apart = sorted(set(removed).difference(*(u for u in units if set(removed).issuperset(u))))
    taken = [block for block in apart if block in protected_blocks(budget, model)]
    if taken:
        raise BudgetError(
            f"the scores by '{name}' remove block {taken[0]}, which is protected. {again}."
            "protect_first=... and protect_last=..., as in the budget"
        )
    if apart:
        raise BudgetError(
            f"the scores by '{name}' remove block {apart[0]} without the rest of its period. "
            f"{again}.period_aligned=true"
        )
    return list(scores.order or removed)


def _is_contiguous(budget: Budget, scores: BlockScores | None) -> bool:
    """Whether one span goes: as asked, or where the criterion scores spans."""
    spans = scores is not None and scores.spans is not None
    return spans if budget.contiguous is None else budget.contiguous


def _span(budget: Budget, scores: BlockScores, model: ModelInfo, number: int | None) -> range:
    """The least important span of removable blocks that meets the budget.

    Raises:
        BudgetError: the criterion scores no spans, or protected blocks leave no room.
    """
    if scores.spans is None:
        raise BudgetError(
            f"criterion '{scores.criterion}' scores no spans of blocks. Leave out --contiguous, or "
            "score by 'angular'"
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
        if number is not None or _parameters(span, model) >= enough:
            return span
    raise BudgetError(
        "no span of unprotected blocks is that large. Ask for less, or pass --scattered to remove "
        "single blocks, or --protect-first 0 --protect-last 0"
    )


def most_blocks(budget: Budget, model: ModelInfo) -> int:
    """The largest number of blocks that a plan for this budget can remove.

    Raises:
        BudgetError: see `check_budget`.
    """
    number = _amount(budget, model)
    if number is not None:
        return number
    units = sorted(removable(budget, model), key=lambda unit: _parameters(unit, model))
    enough = (budget.param_ratio or 0.0) * model.parameters
    freed = taken = 0
    for unit in units:
        freed += _parameters(unit, model)
        taken += len(unit)
        if freed >= enough:
            break
    return min(taken, model.blocks - 1)


def _reaching(ratio: float, units: Sequence[Sequence[int]], model: ModelInfo) -> int:
    """How many blocks, in the order of `units`, hold at least `ratio` of all parameters."""
    freed = number = 0
    for unit in units:
        freed += _parameters(unit, model)
        number += len(unit)
        if freed >= ratio * model.parameters and number < model.blocks:
            return number
    raise BudgetError(
        f"no removal of some but not all blocks takes {ratio:.1%} of the parameters. Ask for less"
    )


def _published_reason(
    published: Published, removed: list[int], protected: list[int], model: ModelInfo
) -> str:
    """One sentence for a reader of the plan."""
    kept_safe = f"; blocks {', '.join(map(str, protected))} were protected" if protected else ""
    return (
        f"Blocks {', '.join(map(str, removed))} come first in the order published for the "
        f"criterion '{published.criterion}' ({published.source}) among the "
        f"{model.blocks - len(protected)} blocks that may go{kept_safe}. Nothing was scored."
    )


def _reason(
    scores: BlockScores | None,
    removed: list[int],
    protected: list[int],
    model: ModelInfo,
    budget: Budget,
) -> str:
    """One sentence for a reader of the plan."""
    blocks = ", ".join(map(str, removed))
    if scores is None:
        return f"Blocks {blocks} of {model.blocks} were named by hand."
    kept_safe = f"; blocks {', '.join(map(str, protected))} were protected" if protected else ""
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
    free = model.blocks - len(protected)
    return f"Blocks {blocks} {chosen} among the {free} blocks that may go{periods}{kept_safe}."


def _search_reason(search: Search, criterion: str) -> str:
    """How a searched set came about."""
    found = search.found
    if found.criterion != criterion:
        others = [one for one in search.candidates if one.criterion != found.criterion]
        beaten = ", ".join(f"{one.criterion} {_figure(one.held_out)}" for one in others)
        return (
            f"are those of the criterion '{found.criterion}', which '{criterion}' chose: without "
            f"them the perplexity of {search.held_out_samples} calibration samples kept apart is "
            f"{_figure(found.held_out)}, and by no other candidate lower ({beaten})"
        )
    unit = "perplexity" if search.fitness == "ppl" else "KL divergence"
    begun = next(one for one in search.candidates if one.criterion == search.start)
    better = "that found nothing better than its start"
    if found.removed != begun.removed:
        better = (
            f"that brought the {unit} of the search text from {_figure(begun.value)} to "
            f"{_figure(found.value)}"
        )
    return f"were chosen by the search '{criterion}' from the plan by '{search.start}', {better}"


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.5g}"
