"""Scores and a budget in, a plan out: which blocks go, in which order, and why. Pure, no torch.

The budget is a number of blocks, a ratio of the blocks, a ratio of the parameters, or the blocks
themselves; a target for what is left is first turned into a number of blocks (targets.py). The
first and last blocks are protected by default (the "+" of Taylor+ and magnitude+); of equally
important blocks the later goes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from shortllm.errors import BudgetError
from shortllm.files import fingerprint
from shortllm.results import BlockScores, ModelInfo, PrunePlan, Record, Size

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
    _amount(budget, budget.protected(model.blocks), model.parameters_per_block, model.parameters)


def _amount(
    budget: Budget, protected: list[int], parameters_per_block: Sequence[int], parameters: int
) -> int | None:
    """Number of blocks to remove; None where it depends on which blocks go.

    Raises:
        BudgetError: more than is unprotected, nothing, or all.
    """
    count = len(parameters_per_block)
    free = [block for block in range(count) if block not in set(protected)]
    asked = budget.asked()
    assert budget.target() is None, "targets.resolve comes first"
    if budget.blocks is not None:
        _check_given(budget.blocks, count)
        return len(budget.blocks)
    if budget.param_ratio is not None:
        sizes = sorted(parameters_per_block[block] for block in free)
        if len(free) == count:
            sizes.pop()  # one block must stay
        available = sum(sizes) / parameters
        if budget.param_ratio > available:
            raise BudgetError(
                f"cannot remove {budget.param_ratio:.1%} of the parameters: the {len(free)} "
                "unprotected of "
                f"{count} blocks hold {available:.1%}. Ask for less, or pass --protect-first 0 "
                "--protect-last 0"
            )
        return None
    number = budget.remove if budget.remove is not None else round(asked["ratio"] * count)
    if number == 0:
        raise BudgetError(
            f"--ratio {budget.ratio} of {count} blocks is less than half a block. Ask for "
            f"{1 / count:.3f} or more"
        )
    most = min(len(free), count - 1)
    if number > most:
        way_out = f"Ask for {most} or fewer" if most else "Nothing is free"
        relief = ", or pass --protect-first 0 --protect-last 0" if protected else ""
        raise BudgetError(
            f"cannot remove {number} of {count} blocks: {len(protected)} are protected"
            f"{'' if protected else ' and one must stay'}. {way_out}{relief}"
        )
    return number


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


def build_plan(budget: Budget, *, model: ModelInfo, scores: BlockScores | None = None) -> PrunePlan:
    """Choose the blocks.

    Args:
        scores: needed unless the budget names the blocks itself.
    Raises:
        BudgetError: the budget cannot be met, or there are no scores to choose by.
    """
    count, parameters_per_block = model.blocks, model.parameters_per_block
    protected = budget.protected(count)
    number = _amount(budget, protected, parameters_per_block, model.parameters)
    if budget.blocks is not None:
        order = list(budget.blocks)
        scores = None
    elif scores is None:
        raise BudgetError("a budget without block numbers needs scores. Run `shortllm score` first")
    else:
        order = _order(budget, scores, protected, number, parameters_per_block, model.parameters)
    removed = sorted(order)
    freed = sum(parameters_per_block[block] for block in removed)
    asked = budget.asked()
    return PrunePlan(
        model=model,
        criterion=scores.criterion if scores else None,
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
        reason=_reason(scores, removed, protected, count, _is_contiguous(budget, scores)),
        scores=scores.fingerprint if scores else None,
        fingerprint=fingerprint(
            {
                "model": model.fingerprint,
                "scores": scores.fingerprint if scores else None,
                "asked": asked,
                "contiguous": budget.contiguous,
                "protected": protected,
            }
        ),
    )


def _order(
    budget: Budget,
    scores: BlockScores,
    protected: list[int],
    number: int | None,
    parameters_per_block: Sequence[int],
    parameters: int,
) -> list[int]:
    """The blocks that go, in the order in which they go.

    Raises:
        BudgetError: the scores do not reach that far.
    """
    if _is_contiguous(budget, scores):
        span = _span(budget, scores, protected, number, parameters_per_block, parameters)
        outside = [b for b in range(len(parameters_per_block)) if b not in span]
        return removal_order(scores.importance, outside)
    order = scores.order or removal_order(scores.importance, protected)
    if number is None:
        number = _reaching(budget.param_ratio or 0.0, order, parameters_per_block, parameters)
    if number > len(order):
        raise BudgetError(
            f"the scores by '{scores.criterion}' hold the order of {len(order)} removals, and "
            f"{number} were asked for. Score again with --option {scores.criterion}.rounds={number}"
        )
    taken = [block for block in order[:number] if block in set(protected)]
    if taken:
        raise BudgetError(
            f"the scores by '{scores.criterion}' remove block {taken[0]}, which is protected. "
            "Score again with the same protection (--option "
            f"{scores.criterion}.protect_first=... and protect_last=...)"
        )
    return order[:number]


def _is_contiguous(budget: Budget, scores: BlockScores | None) -> bool:
    """Whether one span goes: as asked, or where the criterion scores spans."""
    spans = scores is not None and scores.spans is not None
    return spans if budget.contiguous is None else budget.contiguous


def _span(
    budget: Budget,
    scores: BlockScores,
    protected: list[int],
    number: int | None,
    parameters_per_block: Sequence[int],
    parameters: int,
) -> range:
    """The least important span of unprotected blocks that meets the budget.

    Raises:
        BudgetError: the criterion scores no spans, or protected blocks leave no room.
    """
    if scores.spans is None:
        raise BudgetError(
            f"criterion '{scores.criterion}' scores no spans of blocks. Leave out --contiguous, or "
            "score by 'angular'"
        )
    count = len(parameters_per_block)
    for n in range(number or 1, (number or count - 1) + 1):
        free = [s for s in range(count - n + 1) if not set(range(s, s + n)) & set(protected)]
        if not free:
            break
        start = min(free, key=lambda s: (scores.spans[n - 1][s], -s))  # type: ignore[index]
        span = range(start, start + n)
        freed = sum(parameters_per_block[block] for block in span)
        if number is not None or freed >= (budget.param_ratio or 0.0) * parameters:
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
    protected = budget.protected(model.blocks)
    number = _amount(budget, protected, model.parameters_per_block, model.parameters)
    if number is not None:
        return number
    sizes = sorted(
        size for b, size in enumerate(model.parameters_per_block) if b not in set(protected)
    )
    freed = 0
    for n, size in enumerate(sizes, start=1):
        freed += size
        if freed >= (budget.param_ratio or 0.0) * model.parameters:
            return min(n, model.blocks - 1)
    return min(len(sizes), model.blocks - 1)


def _reaching(
    ratio: float, order: Sequence[int], parameters_per_block: Sequence[int], parameters: int
) -> int:
    """How many blocks of `order` hold at least `ratio` of all parameters."""
    freed = 0
    for number, block in enumerate(order, start=1):
        freed += parameters_per_block[block]
        if freed >= ratio * parameters and number < len(parameters_per_block):
            return number
    raise BudgetError(
        f"no removal of some but not all blocks takes {ratio:.1%} of the parameters. Ask for less"
    )


def _reason(
    scores: BlockScores | None,
    removed: list[int],
    protected: list[int],
    count: int,
    contiguous: bool,
) -> str:
    """One sentence for a reader of the plan."""
    blocks = ", ".join(map(str, removed))
    if scores is None:
        return f"Blocks {blocks} of {count} were named by hand."
    kept_safe = f"; blocks {', '.join(map(str, protected))} were protected" if protected else ""
    free = count - len(protected)
    if contiguous:
        chosen = f"are the span with the lowest importance by the criterion '{scores.criterion}'"
    elif scores.order is not None:
        chosen = f"were removed one after the other by the criterion '{scores.criterion}'"
    else:
        chosen = f"have the lowest importance by the criterion '{scores.criterion}'"
    return f"Blocks {blocks} {chosen} among the {free} blocks that may go{kept_safe}."
