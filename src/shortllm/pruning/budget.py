"""A budget: how much to remove and what to keep, checked before any scoring. Pure, no torch.

It is a number of blocks, a ratio of the blocks or of the parameters, or the blocks themselves; a
target for the rest is first turned into a number of blocks: one of size or speed by targets.py, one
of quality by trying (quality.py). The first and last blocks
are protected by default (the "+" of Taylor+ and magnitude+), and those that others depend on
always. If the kinds of blocks repeat (e.g. two kinds of attention in turn), a plan can consist of
whole periods, so that the rest repeats in the same way, as other programs expect.

Removed blocks leave gaps, each with the kept block before it:

    kept     0  1        4  5     7        gap (1, [2, 4))   gap (5, [6, 7))
    removed        2  3        6
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ByteSize, Field

from shortllm.criteria import Criterion
from shortllm.errors import BudgetError
from shortllm.evaluation.quality import QualityTargets, option_of
from shortllm.format import counted
from shortllm.options import Flag
from shortllm.records import ModelInfo, protected_ends, protected_in

TARGETS = ("target_params", "target_memory", "target_speedup")
"""The amounts of a budget that describe the size or speed of what remains."""

AMOUNTS = ("remove", "ratio", "param_ratio", "blocks", *TARGETS)
"""Fields of a budget that say how much to remove, of which one is given."""

ASKED = (*AMOUNTS, *QualityTargets.model_fields)
"""Fields of a budget that decide how much is removed."""

ProtectFirst = Annotated[
    int | None,
    Field(description="Keep this many blocks at the start. Default: 4, at most a quarter of all."),
]
ProtectLast = Annotated[
    int | None,
    Field(description="Keep this many blocks at the end. Default: 2, at most a quarter of all."),
]
"""Types of the options that protect blocks."""


def parameters_in(text: Any) -> Any:
    """`1.0B`, `350M` or a plain number as a count of parameters; a number as it is."""
    if not isinstance(text, str):
        return text
    number = text.strip().rstrip("KkMmBbTt ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        return int(round(float(number) * 10.0 ** {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}[unit]))
    except (ValueError, KeyError, OverflowError):
        raise ValueError("not a number of parameters such as 1.0B or 350M") from None


class Budget(QualityTargets):
    """How much to remove, and what to keep: one amount or target, or targets of quality.

    With targets of quality, as many blocks go as these allow, and at least as many as a target of
    size or speed next to them needs.
    """

    panel: ClassVar[str] = "Budget"

    remove: int | None = Field(default=None, ge=1, description="Number of blocks to remove.")
    ratio: float | None = Field(
        default=None, gt=0, lt=1, description="Part of the blocks to remove, e.g. 0.25."
    )
    param_ratio: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Part of all parameters to remove, with as few blocks as reach it.",
    )
    blocks: Annotated[list[int] | None, Flag(metavar="3,4,8-10")] = Field(
        default=None, description="Remove exactly these blocks, counted from 0."
    )
    target_params: Annotated[
        int | None,
        BeforeValidator(parameters_in, json_schema_input_type=int | str | None),
        Flag(metavar="1.0B"),
    ] = Field(default=None, description="Keep at most this many parameters, e.g. 1.0B or 350M.")
    target_memory: Annotated[ByteSize | None, Flag(metavar="8GiB")] = Field(
        default=None, description="Need at most this much memory for weights and cache, e.g. 8GiB."
    )
    target_speedup: float | None = Field(
        default=None,
        gt=1,
        description="Be at least this many times as fast, measured here, e.g. 1.3.",
    )
    contiguous: Annotated[bool | None, Flag(name="--contiguous/--scattered")] = Field(
        default=None,
        description="Remove one span of blocks, or single blocks. Default: a span where the "
        "criterion scores spans.",
    )
    protect_first: ProtectFirst = None
    protect_last: ProtectLast = None
    period_aligned: bool = Field(
        default=False,
        description="Remove only whole periods where the kinds of blocks repeat, as llama.cpp and "
        "vLLM expect.",
    )

    def asked(self) -> dict[str, Any]:
        """How the amount was given, e.g. `{"remove": 3}` or `{"max_ppl_increase": "5%"}`."""
        amounts = {n: getattr(self, n) for n in AMOUNTS if getattr(self, n) is not None}
        quality = self.quality()
        if len(amounts) > 1 or not (amounts or quality):
            raise BudgetError(
                f"{'several budgets' if amounts else 'no budget'} given. Give one of "
                "--remove 6 (blocks), --ratio 0.2 (of the blocks), --param-ratio 0.2 (of the "
                "parameters), --blocks 3,4,5, --target-params 1.0B, --target-memory 8GiB or "
                "--target-speedup 1.3; or the most that quality allows: --max-ppl-increase 5%, "
                "--min-task-mean 95%"
            )
        fixed = [name for name in amounts if name not in TARGETS]
        if quality and fixed:
            flag = f"--{fixed[0].replace('_', '-')}"
            raise BudgetError(
                f"{option_of(next(iter(quality)))} finds the number of blocks, and {flag} gives "
                f"it. Leave {flag} out; to test a run of a fixed size, use `shortllm check`"
            )
        return amounts | quality

    def sized(self, number: int) -> Budget:
        """The same with a number of blocks in place of all targets."""
        without = dict.fromkeys(ASKED)
        return self.model_copy(update={**without, "remove": number})

    def target(self) -> tuple[str, float] | None:
        """Name and value of the target, where the amount was given as one."""
        given = ((name, getattr(self, name)) for name in TARGETS)
        return next((one for one in given if one[1] is not None), None)

    def protected(self, count: int) -> list[int]:
        """Blocks of a model of `count` blocks that may not be removed, ascending."""
        if self.blocks is not None:
            return []
        return protected_ends(count, self.protect_first, self.protect_last)


def check_budget(budget: Budget, model: ModelInfo) -> None:
    """Refuse, before any scoring, a budget that no scores can meet."""
    amount_of(budget, model)


def require_no_quality(budget: Budget) -> None:
    """Refuse targets of quality where nothing is measured."""
    if quality := budget.quality():
        raise BudgetError(
            f"{option_of(next(iter(quality)))} needs text to measure on and tries several sizes, "
            "which only `shortllm run` and `shortllm plan` do. Give --remove or --ratio"
        )


def require_plan_or_blocks(plan: object, blocks: object) -> None:
    """Refuse a plan next to named blocks, and neither."""
    if (plan is None) == (blocks is None):
        raise BudgetError("give either --plan plan.json or --blocks 3,4,8")


def protected_blocks(budget: Budget, model: ModelInfo) -> list[int]:
    """Blocks that may not be removed, by the budget or because others depend on them, ascending."""
    if budget.blocks is not None:
        return []
    return protected_in(model, budget.protect_first, budget.protect_last)


def removable(budget: Budget, model: ModelInfo) -> list[list[int]]:
    """Units that may be removed, ascending: single blocks, or whole periods of them."""
    protected = set(protected_blocks(budget, model))
    return [unit for unit in _units(budget, model) if not protected.intersection(unit)]


def free_units(budget: Budget, model: ModelInfo) -> list[list[int]]:
    """The same, so that one is kept."""
    units = removable(budget, model)
    if sum(map(len, units)) == model.blocks:
        units.pop()
    if not units:
        raise BudgetError(
            f"none of the {model.blocks} blocks can be removed. Pass --protect-first 0 "
            "--protect-last 0"
        )
    return units


def _units(budget: Budget, model: ModelInfo) -> list[list[int]]:
    size = model.period if budget.period_aligned else 1
    return [list(range(start, start + size)) for start in range(0, model.blocks - size + 1, size)]


def amount_of(budget: Budget, model: ModelInfo) -> int | None:
    """Number of blocks to remove; None where it depends on which blocks go."""
    count = model.blocks
    units = removable(budget, model)
    free = sum(map(len, units))
    protected = len(protected_blocks(budget, model))
    asked = budget.asked()
    assert budget.target() is None, "targets.resolve comes first"
    require_no_quality(budget)
    size = model.period if budget.period_aligned else 1
    if budget.blocks is not None:
        _check_named(budget.blocks, budget, model)
        return len(budget.blocks)
    if budget.param_ratio is not None:
        _check_parameters(budget.param_ratio, units, model)
        return None
    number = budget.remove or round(asked["ratio"] * count / size) * size
    if number == 0:
        raise BudgetError(
            f"--ratio {budget.ratio} of {count} blocks is less than half "
            f"{'a block' if size == 1 else f'a period of {size} blocks'}. Ask for "
            f"{size / count:.3f} or more"
        )
    most = min(free, count - size)
    if number > most:
        hint = f"Ask for {most} or fewer" if most else "Nothing is free"
        relief = ", or pass --protect-first 0 --protect-last 0" if protected else ""
        whole = f" and only whole periods of {size} go" if size > 1 else ""
        raise BudgetError(
            f"cannot remove {number} of {count} blocks: {protected} are protected"
            f"{whole}{'' if protected else ' and one must stay'}. {hint}{relief}"
        )
    if number % size:
        lower, upper = number // size * size, (number // size + 1) * size
        nearest = [str(n) for n in (lower, upper) if 0 < n <= most]
        raise BudgetError(
            f"cannot remove {counted(number, 'block')} in whole periods of {size}. "
            f"Ask for {' or '.join(nearest)}, or leave out --period-aligned"
        )
    return number


def _check_parameters(ratio: float, units: list[list[int]], model: ModelInfo) -> None:
    """The removable blocks must have the requested part of the parameters, with one block kept."""
    sizes = sorted(parameters_of(unit, model) for unit in units)
    free = sum(map(len, units))
    if free == model.blocks:
        sizes.pop()  # one block must stay
    available = sum(sizes) / model.parameters
    if ratio > available:
        raise BudgetError(
            f"cannot remove {ratio:.1%} of the parameters: the {free} unprotected of "
            f"{model.blocks} blocks have {available:.1%}. Ask for less, or pass --protect-first 0 "
            "--protect-last 0"
        )


def parameters_of(blocks: Sequence[int], model: ModelInfo) -> int:
    """Parameters of these blocks together."""
    return sum(model.parameters_per_block[block] for block in blocks)


def _check_named(blocks: list[int], budget: Budget, model: ModelInfo) -> None:
    """Named blocks must be distinct, exist, leave something, and be whole periods if requested."""
    last = model.blocks - 1
    outside = [block for block in blocks if not 0 <= block <= last]
    if outside:
        raise BudgetError(f"there is no block {outside[0]}: the model's blocks are 0 to {last}")
    if len(set(blocks)) != len(blocks):
        raise BudgetError(f"--blocks names a block twice: {','.join(map(str, blocks))}")
    if not 0 < len(blocks) <= last:
        raise BudgetError(
            f"--blocks must name at least one and at most {last} of the {model.blocks} blocks"
        )
    whole = {b for unit in _units(budget, model) if set(blocks).issuperset(unit) for b in unit}
    if whole != set(blocks):
        raise BudgetError(
            f"block {min(set(blocks) - whole)} is named without the rest of its period: periods of "
            f"{model.period} blocks start at multiples of {model.period}. Name all of its blocks, "
            "or leave out --period-aligned"
        )


def most_blocks(budget: Budget, model: ModelInfo) -> int:
    """The largest number of blocks that a plan for this budget can remove."""
    number = amount_of(budget, model)
    if number is not None:
        return number
    smallest = sorted(removable(budget, model), key=lambda unit: parameters_of(unit, model))
    return reaching(budget, smallest, model)


def reaching(budget: Budget, units: Sequence[Sequence[int]], model: ModelInfo) -> int:
    """How many blocks, in the order of `units`, have the requested part of all parameters."""
    ratio, freed, number = budget.param_ratio or 0.0, 0, 0
    for unit in units:
        freed += parameters_of(unit, model)
        number += len(unit)
        if freed >= ratio * model.parameters and number < model.blocks:
            return number
    raise BudgetError(
        f"no removal of some but not all blocks takes {ratio:.1%} of the parameters. Ask for less"
    )


def removal_options(resolved: Criterion, budget: Budget, model: ModelInfo) -> dict[str, Any]:
    """The options by which a criterion that removes blocks itself meets a budget; else none."""
    if not resolved.removes_blocks:
        return {}
    searches = resolved.needs == "sets"
    return {
        "remove" if searches else "rounds": most_blocks(budget, model),
        "protect_first": budget.protect_first,
        "protect_last": budget.protect_last,
        **({"period_aligned": budget.period_aligned} if searches else {}),
    }


@dataclass(frozen=True, slots=True)
class Gap:
    """Removed blocks `[start, stop)`, counted in the original."""

    start: int
    stop: int

    @property
    def before(self) -> int | None:
        """The block before, which is kept; None where the gap is at the very start."""
        return self.start - 1 if self.start else None

    @property
    def blocks(self) -> list[int]:
        """The removed blocks, ascending."""
        return list(range(self.start, self.stop))


def gaps_of(removed: Collection[int]) -> list[Gap]:
    """The gaps that removed blocks leave, in their order."""
    gaps: list[Gap] = []
    for block in sorted(removed):
        if gaps and gaps[-1].stop == block:
            gaps[-1] = Gap(gaps[-1].start, block + 1)
        else:
            gaps.append(Gap(block, block + 1))
    return gaps
