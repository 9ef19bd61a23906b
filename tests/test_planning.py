"""Budgets, protection, ties, and what a plan says of itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from shortllm.criteria import require_finite
from shortllm.errors import BudgetError, CriterionError, ResultFileError, ShortLLMError
from shortllm.options import options_from
from shortllm.pruning.budget import Budget, check_budget, most_blocks, removable
from shortllm.pruning.planning import build_plan
from shortllm.pruning.records import BlockScores, PrunePlan, load_plan, removal_order
from shortllm.pruning.ties import undecided
from shortllm.records import ModelInfo


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


def periodic(period: int = 3, blocks: int = 14, **changes: Any) -> ModelInfo:
    """A model whose kinds of blocks repeat; the last period is not whole."""
    return model(blocks).model_copy(update={"period": period, **changes})


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
        ({"remove": 8}, "cannot remove 8 of 12 blocks: 5 are protected. Ask for 7 or fewer"),
        (
            {"remove": 12, "protect_first": 0, "protect_last": 0},
            "one must stay. Ask for 11 or fewer",
        ),
        ({"ratio": 0.01}, "less than half a block"),
        ({"param_ratio": 0.6}, "the 7 unprotected of 12 blocks have 53.8%"),
        ({"blocks": [12]}, "no block 12: the model's blocks are 0 to 11"),
        ({"blocks": [1, 1]}, "names a block twice"),
        ({"blocks": list(range(12))}, "at most 11"),
        ({"remove": 1, "protect_first": -1}, "cannot be negative"),
    ],
)
def test_impossible_budgets(budget: dict[str, object], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        check_budget(Budget(**budget), model())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "budget",
    [{"remove": 0}, {"ratio": 1.5}, {"ratio": 0}, {"param_ratio": 1}, {"target_speedup": 1.0}],
)
def test_amounts_out_of_range_are_refused_by_name(budget: dict[str, Any]) -> None:
    with pytest.raises(ShortLLMError, match=f"{next(iter(budget))}.*(greater|less) than"):
        options_from(Budget, budget)


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
    with pytest.raises(BudgetError, match="have 66.7%"):
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


@pytest.mark.parametrize(
    ("importance", "remove", "said"),
    [
        ([5, 1, 1, 1, 3, 5], 1, "Block 3 was chosen over 1 and 2, which score the same: of equ"),
        (
            [5, 1, 1.003, 3, 4, 5],
            1,
            "Block 1 was chosen over 2, which scores alike (within 0.3 %)",
        ),
        ([5, 1, 2, 2.001, 2.002, 5], 3, "Blocks 2 and 3 were chosen over 4, which scores alike"),
        (
            [5, 3, 3, 1, 3, 5],
            1,
            "Blocks 1, 2 and 4 score the same: of equals the later goes first.",
        ),
        ([5, 1, 1.001, 3, 4, 5], 2, None),  # two alike that both go
        ([5, 1, 2, 3, 4, 5], 2, None),
        ([1.001, 1, 2, 3, 4, 5], 1, None),  # block 0 is protected
    ],
)
def test_blocks_that_score_alike_at_the_border_are_named(
    importance: list[float], remove: int, said: str | None
) -> None:
    plan = planned(importance, remove=remove, protect_first=1, protect_last=1)
    assert (said or "chosen over") in plan.reason if said else "chosen over" not in plan.reason


def test_blocks_within_the_noise_of_the_samples_are_named() -> None:
    about = model(4)
    samples = [[9.0, 9.0, 9.0], [0.9, 1.0, 1.1], [1.4, 0.9, 1.0], [1.9, 2.0, 2.1]]
    found = scores([9.0, 2.72, 3.0, 7.4], about).model_copy(update={"samples": samples})
    budget = Budget(remove=1, protect_first=0, protect_last=0)
    plan = build_plan(budget, model=about, scores=found)
    assert plan.reason.endswith(
        "Block 1 was chosen over 2, which scores alike (within 9.4 %, the noise of the samples)."
    )
    assert plan.near_ties == [1, 2]
    assert undecided(plan.removed, plan.near_ties, True) == (
        "blocks 1 (removed) and 2 (kept) are within noise; more --samples would decide"
    )
    alone = found.model_copy(update={"samples": [[value] for [value, *_] in samples]})
    plain = build_plan(budget, model=about, scores=alone)
    assert "chosen over" not in plain.reason and not plain.near_ties
    assert undecided(plain.removed, plain.near_ties, True) == ""


def test_periods_and_spans_that_score_alike_are_named() -> None:
    about = periodic(blocks=6)
    found = scores([1, 1, 1, 1, 1, 1.001], about)
    free = {"protect_first": 0, "protect_last": 0}
    plan = build_plan(Budget(remove=3, period_aligned=True, **free), model=about, scores=found)
    assert "Blocks 0–2 were chosen over 3–5, which score alike (within 0.1 %)." in plan.reason
    about = model(4)
    spans = [[9, 3, 3.001, 9], [9, 4, 4.001], [8, 8], [9]]
    found = scores([9, 3, 3, 9], about).model_copy(update={"criterion": "angular", "spans": spans})
    plan = build_plan(Budget(remove=2, **free), model=about, scores=found)
    assert "Blocks 1, 2 were chosen over 2, 3, which score alike" in plan.reason
    assert plan.near_ties == [1, 3]  # block 2 goes in either case


def test_places_are_no_near_ties() -> None:
    about = model(400)
    found = scores([float(b) for b in range(400)], about).model_copy(update={"criterion": "last"})
    assert "alike" not in build_plan(Budget(remove=300), model=about, scores=found).reason


def test_one_block_is_spoken_of_as_one() -> None:
    plan = planned([5, 1, 3, 4, 6, 7], remove=1, protect_first=0, protect_last=1)
    assert plan.reason == (
        "Block 1 has the lowest importance by the criterion 'ppl' among the 5 unprotected blocks; "
        "block 5 was protected."
    )
    assert planned([1, 2], blocks=[1]).reason == "Block 1 was named by hand, of 2."
    assert planned([1, 2, 3], blocks=[1, 2]).reason.startswith("Blocks 1, 2 were named by hand")


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
    with pytest.raises(BudgetError, match="have the order of 2 removals, and 3 .*greedy.rounds=3"):
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


# --- whole periods and blocks that others depend on -----------------------------------------------


def plan_of(about: ModelInfo, importance: list[float], **budget: Any) -> PrunePlan:
    return build_plan(Budget(**budget), model=about, scores=scores(importance, about))


RISING = [float(b) for b in range(14)]


def test_whole_periods_go_by_the_sum_of_their_importance() -> None:
    # periods 0-2, 3-5, 6-8, 9-11; blocks 12 and 13 are no whole one
    importance = [0.0, 0.0, 9.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.0, 5.0, 5.0, 0.0, 0.0]
    free = {"period_aligned": True, "protect_first": 0, "protect_last": 0}
    plan = plan_of(periodic(), importance, remove=6, **free)
    assert plan.order == [6, 7, 8, 3, 4, 5]
    assert plan.removed == [3, 4, 5, 6, 7, 8]
    assert "in whole periods of 3 blocks" in plan.reason
    assert plan.fingerprint != plan_of(periodic(), importance, remove=6).fingerprint


def test_a_period_with_a_protected_block_stays() -> None:
    plan = plan_of(periodic(), RISING, remove=3, period_aligned=True, protect_first=1)
    assert plan.removed == [3, 4, 5]


def test_a_ratio_is_rounded_to_whole_periods() -> None:
    assert plan_of(periodic(), RISING, ratio=0.3, period_aligned=True).removed == [3, 4, 5]
    with pytest.raises(BudgetError, match="less than half a period of 3 blocks. Ask for 0.214"):
        check_budget(Budget(ratio=0.1, period_aligned=True), periodic())


def test_parameters_are_reached_by_whole_periods() -> None:
    plan = plan_of(periodic(), RISING, param_ratio=0.25, period_aligned=True, protect_first=0)
    assert plan.removed == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "budget, message",
    [
        ({"remove": 4}, "cannot remove 4 blocks in whole periods of 3. Ask for 3 or 6, or leave"),
        ({"remove": 1}, "in whole periods of 3. Ask for 3, or leave out --period-aligned"),
        ({"remove": 10}, "only whole periods of 3 go. Ask for 9 or fewer"),
        ({"param_ratio": 0.7}, "the 9 unprotected of 14 blocks have 60.0%"),
        ({"blocks": [3, 4, 5, 7]}, "block 7 is named without the rest of its period"),
        ({"blocks": [12, 13]}, "block 12 is named without the rest of its period"),
    ],
)
def test_budgets_that_are_not_whole_periods(budget: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        check_budget(Budget(period_aligned=True, **budget), periodic())


def test_whole_periods_named_by_hand() -> None:
    check_budget(Budget(period_aligned=True, blocks=[3, 5, 4]), periodic())


def test_blocks_that_never_repeat_leave_nothing_to_go() -> None:
    with pytest.raises(BudgetError, match="only whole periods of 14 go. Nothing is free"):
        check_budget(Budget(period_aligned=True, remove=14), periodic(14))


def test_where_all_blocks_are_alike_nothing_changes() -> None:
    plain = planned([3.0, 1.0, 2.0, 0.0] * 3, remove=3)
    aligned = planned([3.0, 1.0, 2.0, 0.0] * 3, remove=3, period_aligned=True)
    assert (aligned.order, aligned.reason) == (plain.order, plain.reason)


def test_blocks_that_others_depend_on_are_protected() -> None:
    about = periodic(1, fixed={5: "its keys serve others"})
    plan = plan_of(about, [9.0] * 5 + [0.0, 1.0] + [9.0] * 7, remove=1)
    assert plan.removed == [6]
    assert 5 in plan.protected
    assert removable(Budget(remove=1), about)[0] == [3]
    assert ModelInfo.model_validate_json(about.model_dump_json()) == about
    # named by hand, surgery has the last word
    check_budget(Budget(blocks=[5]), about)


def test_what_is_no_plan_says_what_a_plan_is(tmp_path: Path) -> None:
    about = model(4)
    scores([1, 2, 3, 4], about).save(tmp_path / "scores.json")
    (tmp_path / "broken.json").write_text("{'removed': [3]}")
    (tmp_path / "list.json").write_text("[3, 4]")
    for name in ("scores.json", "broken.json", "list.json"):
        with pytest.raises(ResultFileError) as caught:
            load_plan(tmp_path / name)
        assert f"{name} is not a valid plan.json: " in str(caught.value)
        assert "A plan is the file plan.json that `shortllm plan` writes" in str(caught.value)
        assert "--blocks 3,4,8" in str(caught.value) and "PrunePlan" not in str(caught.value)
    with pytest.raises(ResultFileError, match="there is no plan in .*Or name the .*--blocks"):
        load_plan(tmp_path)
