"""Budgets, protection, ties, and what a plan says of itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from shortllm.criteria import require_finite
from shortllm.errors import BudgetError, CriterionError, ResultFileError
from shortllm.planning import Budget, build_plan, check_budget, most_blocks, removal_order
from shortllm.results import BlockScores, ModelInfo, PrunePlan


def model(blocks: int = 12, per_block: list[int] | None = None, outside: int = 100) -> ModelInfo:
    per_block = per_block or [100] * blocks
    total = sum(per_block) + outside
    return ModelInfo(
        id="tiny",
        model_type="llama",
        blocks=len(per_block),
        parameters=total,
        parameters_per_block=per_block,
        bytes=2 * total,
        fingerprint="f",
    )


def scores(importance: list[float], about: ModelInfo) -> BlockScores:
    return BlockScores(
        model=about,
        criterion="ppl",
        importance=importance,
        values=importance,
        dtype="float32",
        fingerprint="s",
    )


def planned(importance: list[float], **budget: object) -> PrunePlan:
    about = model(len(importance))
    return build_plan(Budget(**budget), model=about, scores=scores(importance, about))  # type: ignore[arg-type]


def test_least_important_unprotected_blocks_go() -> None:
    plan = planned([0, 0, 0, 9, 3, 1, 2, 8, 7, 6, 0, 0], remove=3)
    assert plan.protected == [0, 1, 2, 10, 11]
    assert plan.order == [5, 6, 4]
    assert plan.removed == [4, 5, 6]
    assert plan.kept == [0, 1, 2, 3, 7, 8, 9, 10, 11]
    assert plan.reached.parameters == 300
    assert plan.reached.parameter_ratio == 300 / 1300
    assert "criterion 'ppl'" in plan.reason


def test_later_block_goes_first_on_a_tie() -> None:
    assert removal_order([1.0, 2.0, 1.0, 1.0], []) == [3, 2, 0, 1]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (32, [0, 1, 2, 3, 30, 31]),
        (10, [0, 1, 8, 9]),
        (5, [0, 4]),
        (3, []),
        (16, [0, 1, 2, 3, 14, 15]),
    ],
)
def test_default_protection_shrinks_for_short_models(count: int, expected: list[int]) -> None:
    assert Budget(remove=1).protected(count) == expected


def test_explicit_protection_is_taken_as_given() -> None:
    assert Budget(remove=1, protect_first=0, protect_last=3).protected(4) == [1, 2, 3]
    assert Budget(remove=1, protect_first=0, protect_last=0).protected(40) == []


@pytest.mark.parametrize(("ratio", "expected"), [(0.25, 3), (0.2, 2), (0.21, 3), (0.05, 1)])
def test_ratio_of_blocks_is_rounded(ratio: float, expected: int) -> None:
    assert len(planned([float(b) for b in range(12)], ratio=ratio).removed) == expected


def test_ratio_of_parameters_takes_as_few_blocks_as_reach_it() -> None:
    about = model(per_block=[10, 10, 50, 300, 50, 10, 10, 10], outside=50)
    made = build_plan(
        Budget(param_ratio=0.3, protect_first=0, protect_last=0),
        model=about,
        scores=scores([9, 9, 0, 1, 2, 9, 9, 9], about),
    )
    assert made.order == [2, 3]
    assert made.reached.parameters == 350
    assert made.reached.parameter_ratio == pytest.approx(0.7)


def test_blocks_named_by_hand_need_no_scores_and_ignore_protection() -> None:
    made = build_plan(Budget(blocks=[11, 0]), model=model())
    assert (made.removed, made.order, made.protected, made.criterion) == (
        [0, 11],
        [11, 0],
        [],
        None,
    )
    assert "by hand" in made.reason


def test_plan_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    made = planned([float(b) for b in range(12)], remove=2)
    made.save(path)
    assert PrunePlan.load(path) == made
    assert not list(path.parent.glob("*.partial"))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "no budget given. Give one of --remove"),
        ({"remove": 1, "ratio": 0.5}, "several budgets"),
        ({"remove": 0}, "removes nothing"),
        ({"remove": 8}, "cannot remove 8 of 12 blocks: 5 are protected. Ask for 7 or fewer"),
        (
            {"remove": 12, "protect_first": 0, "protect_last": 0},
            "one must stay. Ask for 11 or fewer",
        ),
        ({"ratio": 1.5}, "not between 0 and 1"),
        ({"ratio": 0.01}, "less than half a block"),
        ({"param_ratio": 0.6}, "the 7 unprotected of 12 blocks hold 53.8%"),
        ({"blocks": [12]}, "no block 12: the model's blocks are 0 to 11"),
        ({"blocks": [1, 1]}, "names a block twice"),
        ({"blocks": list(range(12))}, "at most 11"),
        ({"remove": 1, "protect_first": -1}, "cannot be negative"),
    ],
)
def test_impossible_budgets(budget: dict[str, object], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        check_budget(Budget(**budget), model())  # type: ignore[arg-type]


def test_budget_without_scores_says_what_to_run() -> None:
    with pytest.raises(BudgetError, match="Run `shortllm score` first"):
        build_plan(Budget(remove=1), model=model())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_cannot_be_ranked_name_the_block(bad: float) -> None:
    with pytest.raises(CriterionError, match="for block 2"):
        require_finite("ppl", [1.0, 2.0, bad])


def test_a_ratio_of_parameters_never_takes_every_block() -> None:
    about = model(5, outside=100)
    free = {"protect_first": 0, "protect_last": 0}
    with pytest.raises(BudgetError, match="hold 66.7%"):
        check_budget(Budget(param_ratio=0.8, **free), about)
    made = build_plan(
        Budget(param_ratio=0.66, **free), model=about, scores=scores([1.0] * 5, about)
    )
    assert made.kept == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": [1, 0, 2, 3, 4, 5, 6, 7, 8, 9]}, "kept must list block numbers once each"),
        ({"kept": [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]}, "kept must list block numbers once each"),
        ({"kept": [0, 1, 2, 99]}, "must share out the 12 blocks"),
        ({"order": [3, 4]}, "order must hold the removed blocks"),
    ],
)
def test_a_plan_file_that_is_no_plan_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    made = planned([9, 9, 9, 9, 9, 9, 9, 9, 1, 1, 9, 9], remove=2)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**made.model_dump(mode="json"), **change}))
    with pytest.raises(ResultFileError, match=message):
        PrunePlan.load(path)


def spans(importance: list[float], lengths: list[list[float]]) -> BlockScores:
    return scores(importance, model(len(importance))).model_copy(
        update={"criterion": "angular", "spans": lengths}
    )


SPANS = spans([5, 1, 4, 2, 3, 6], [[5, 1, 4, 2, 3, 6], [9, 8, 7, 2, 3], [9, 5, 6, 5], [7, 6, 5]])


@pytest.mark.parametrize(
    "budget, removed, order",
    [
        ({"remove": 2}, [3, 4], [3, 4]),
        ({"remove": 2, "contiguous": False}, [1, 3], [1, 3]),
        ({"remove": 3}, [3, 4, 5], [3, 4, 5]),  # of equal spans the later one
        ({"remove": 3, "protect_last": 1}, [1, 2, 3], [1, 3, 2]),
        ({"param_ratio": 0.2}, [3, 4], [3, 4]),
    ],
)
def test_a_criterion_of_spans_removes_the_least_important_span(
    budget: dict[str, object], removed: list[int], order: list[int]
) -> None:
    asked = Budget(**{"protect_first": 0, "protect_last": 0, **budget})  # type: ignore[arg-type]
    plan = build_plan(asked, model=SPANS.model, scores=SPANS)
    assert (plan.removed, plan.order) == (removed, order)
    assert ("are the span" in plan.reason) == (budget.get("contiguous") is None)


def test_a_span_is_only_to_be_had_from_a_criterion_that_scores_spans() -> None:
    with pytest.raises(BudgetError, match="'ppl' scores no spans of blocks. Leave out --contiguou"):
        planned([1, 2, 3, 4], remove=2, contiguous=True)


def test_a_removal_order_is_followed_as_far_as_it_goes() -> None:
    about = model(6)
    greedy = scores([5, 1, 0, 4, 3, 2], about).model_copy(
        update={"criterion": "greedy", "order": [2, 1]}
    )
    free = {"protect_first": 0, "protect_last": 0}
    assert build_plan(Budget(remove=1, **free), model=about, scores=greedy).order == [2]
    plan = build_plan(Budget(remove=2, **free), model=about, scores=greedy)
    assert plan.order == [2, 1]
    assert "were removed one after the other by the criterion 'greedy'" in plan.reason
    with pytest.raises(BudgetError, match="hold the order of 2 removals, and 3 .*greedy.rounds=3"):
        build_plan(Budget(remove=3, **free), model=about, scores=greedy)
    with pytest.raises(BudgetError, match="remove block 2, which is protected. Score again with"):
        build_plan(Budget(remove=2, protect_first=3, protect_last=0), model=about, scores=greedy)


@pytest.mark.parametrize(
    "budget, most",
    [({"remove": 3}, 3), ({"ratio": 0.25}, 3), ({"param_ratio": 0.2}, 4), ({"blocks": [1, 2]}, 2)],
)
def test_the_most_blocks_that_a_budget_can_take(budget: dict[str, object], most: int) -> None:
    """Of 1,300 parameters 20 % are 260: three average blocks, but four of the smallest."""
    about = model(per_block=[100, 100, 100, 160, 80, 80, 80, 80, 120, 200, 100, 100], outside=0)
    assert most_blocks(Budget(**budget), about) == most  # type: ignore[arg-type]
