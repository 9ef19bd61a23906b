"""Targets of quality: which numbers of blocks are tried, what is taken, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from test_cli import SMALL, call

import shortllm
from shortllm.errors import BudgetError, ShortLLMError, TargetMissedError
from shortllm.evaluation.options import Evaluation
from shortllm.evaluation.quality import QualityTargets, increase_shown, nats_in, share_in
from shortllm.pruning import size_search
from shortllm.pruning.budget import Budget
from shortllm.pruning.quality_target import BYPASSED, QualityTarget, most_that_meet, sizes_of
from shortllm.pruning.size_search import SIZES

QUICK = ("--max-segments", "12", "--continuations", "0", *SMALL)
HEAL = (
    "--heal", "regression", "--set", "healing.calibration.samples=8",
    "--set", "healing.calibration.length=64", "--set", "healing.before=1",
)  # fmt: skip
PLAIN = ("--retrain", "none", "--no-bench", "--tasks", "")


# ---- which numbers are tried


def tries(met: Sequence[bool], **how: Any) -> tuple[int | None, list[int]]:
    """The size that is found where size 1, 2, ... meets a target or not, and the sizes tried."""
    tried: list[int] = []

    def meet(sizes: Sequence[int]) -> list[bool]:
        assert list(sizes) == sorted(set(sizes)) and not set(sizes) & set(tried)
        tried.extend(sizes)
        return [met[size - 1] for size in sizes]

    return most_that_meet(meet, range(1, len(met) + 1), **how), tried


@given(
    st.integers(1, 60), st.integers(0, 60), st.integers(1, 6), st.one_of(st.none(), st.integers())
)
def test_the_most_is_found_where_quality_falls(
    count: int, most: int, together: int, start: int | None
) -> None:
    most = min(most, count)
    start = None if start is None else 1 + start % count
    found, tried = tries(
        [size <= most for size in range(1, count + 1)], together=together, start=start
    )
    assert found == (most or None)
    assert len(tried) <= (2 * together + 2) * math.ceil(math.log2(count + 1)) + 2


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 5), st.integers(0, 39))
def test_what_is_found_was_tried_and_the_next_one_fails(
    met: list[bool], together: int, start: int
) -> None:
    """Also where quality rises and falls."""
    for begin in (None, 1 + start % len(met)):
        found, tried = tries(met, together=together, start=begin)
        if found is None:
            assert 1 in tried and not met[0]
        else:
            assert found in tried and met[found - 1]
            assert found == len(met) or (found + 1 in tried and not met[found])


def test_several_at_once_and_a_start_that_is_near() -> None:
    falls = [size <= 6 for size in range(1, 25)]
    assert tries(falls, together=4) == (6, [5, 10, 15, 20, 6, 7, 8, 9])
    assert tries(falls, start=6) == (6, [6, 7])
    assert tries(falls, start=4) == (6, [4, 5, 7, 6])
    assert tries(falls, start=9) == (6, [9, 8, 6, 7])
    assert tries([False, False], start=2) == (None, [2, 1])


def test_numbers_of_blocks_leave_protected_ones_and_one_more() -> None:
    model = shortllm.open_checkpoint("embedded").info()
    assert sizes_of(Budget(max_ppl_increase="5%"), model) == list(range(1, 8))
    free = Budget(max_ppl_increase="5%", protect_first=0, protect_last=0)
    assert sizes_of(free, model) == list(range(1, 12))
    whole = free.model_copy(update={"period_aligned": True})
    assert sizes_of(whole, model.model_copy(update={"period": 3})) == [3, 6, 9]


# ---- what people type


def test_increases_and_parts_as_people_write_them() -> None:
    targets = QualityTargets(max_ppl_increase=" 5.0 %", min_task_mean="95%")
    assert targets.quality() == {"max_ppl_increase": "5%", "min_task_mean": "95%"}
    assert nats_in("5%") == pytest.approx(math.log(1.05)) and nats_in("0.1nats") == 0.1
    assert share_in("95%") == 0.95
    shown = [(0.11650, "12.34%", "+12.356 %"), (0.0488, "5%", "+5.0 %"), (-0.01, "5%", "-1.0 %")]
    shown += [(0.0488, "0.1nats", "+0.0488 nats"), (9.0, "5%", "x 8,103")]
    for nats, asked, expected in shown:
        assert increase_shown(nats, asked) == expected
    for wrong in ("5", "-5%", "5 percent", "nats", 0.05):
        with pytest.raises(ShortLLMError, match="max_ppl_increase .*must be 0 or more with its"):
            QualityTargets(max_ppl_increase=wrong)  # type: ignore[arg-type]
    with pytest.raises(ShortLLMError, match=r"min_task_mean 0.1nats: .* e.g. 5%"):
        QualityTargets(min_task_mean="0.1nats")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_ppl_increase": "5%", "remove": 3}, "and --remove gives it. Leave --remove out"),
        ({"min_task_mean": "95%", "param_ratio": 0.1}, "and --param-ratio gives it"),
        ({}, "no budget given.*--max-ppl-increase 5%"),
        ({"max_ppl_increase": "5%", "target_speedup": 2, "target_params": 5}, "several budgets"),
    ],
)
def test_budgets_that_say_too_much(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**given).asked()


def test_a_function_that_measures_nothing_refuses_them() -> None:
    with pytest.raises(BudgetError, match="which only `shortllm run` and `shortllm plan` do"):
        shortllm.shorten("embedded", max_ppl_increase="5%", criterion="magnitude")
    with pytest.raises(BudgetError, match="which only `shortllm run` and `shortllm plan` do"):
        shortllm.shorten("embedded", max_ppl_increase="5%", target_speedup=1.2)


# ---- a run


def embedded_run(capfd: pytest.CaptureFixture[str], out: Path, *more: object) -> tuple[int, str]:
    code, _, err = call(capfd, "run", "embedded", *QUICK, *PLAIN, "--out", out, *more)
    return code, err


def test_a_run_takes_the_most_blocks_that_perplexity_allows(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, err = embedded_run(capfd, tmp_path / "run", "--max-ppl-increase", "8%")
    assert code == 0, err
    found = QualityTarget.load(tmp_path / "run" / "quality.json")
    evaluation = Evaluation.load(tmp_path / "run" / "eval.json")
    intact, pruned = evaluation.models
    rise = pruned.perplexity[0].nll - intact.perplexity[0].nll
    assert found.remove == 12 - pruned.model.blocks and rise <= math.log(1.08)
    written = found.find(found.remove, bypassed=False)
    assert written is not None and written.model == "pruned"
    assert written.requirements[0].value == pytest.approx(rise, abs=1e-9)
    next_one = found.find(found.remove + 1, bypassed=True)
    assert next_one is not None and not next_one.passed and next_one.model == BYPASSED
    bypassed = found.find(found.remove, bypassed=True)
    assert bypassed is not None
    assert bypassed.requirements[0].value == pytest.approx(rise, abs=1e-5)
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["asked"] == {
        "remove": found.remove
    }
    assert not (tmp_path / "run" / SIZES).exists()
    assert "--max-ppl-increase 8%" in (tmp_path / "run" / "report.html").read_text()

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(size_search, "sample_nlls", never)
    monkeypatch.setattr(size_search, "evaluate_models", never)
    code, err = embedded_run(capfd, tmp_path / "run", "--max-ppl-increase", "8%")
    assert code == 0 and "pruned is up to date, skipped" in err


def test_with_healing_it_is_the_healed_model_that_meets_it_and_more_blocks_go(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after the second number that was written, the run goes on with the third."""
    arguments = ("--max-ppl-increase", "8%", *HEAL)
    measure, measured = size_search.evaluate_models, list[str]()

    def interrupted(models: Any, *args: Any, **kwargs: Any) -> Any:
        measured.append(models[0][0])
        if measured.count("healed") == 3:
            raise KeyboardInterrupt
        return measure(models, *args, **kwargs)

    monkeypatch.setattr(size_search, "evaluate_models", interrupted)
    out = tmp_path / "run"
    code, err = embedded_run(capfd, out, *arguments)
    assert code == 130, err
    before = QualityTarget.load(out / "quality.json")
    written = [one.remove for one in before.tried if one.model == "healed"]
    assert len(written) == 2 and before.remove is None
    monkeypatch.setattr(size_search, "evaluate_models", measure)
    code, err = embedded_run(capfd, out, *arguments)
    assert code == 0, err
    found = QualityTarget.load(out / "quality.json")
    assert found.tried[: len(before.tried)] == before.tried
    unhealed = max(one.remove for one in found.tried if one.model == BYPASSED and one.passed)
    assert found.remove is not None and found.remove > unhealed
    intact, pruned, healed = Evaluation.load(out / "eval.json").models
    rises = [one.perplexity[0].nll - intact.perplexity[0].nll for one in (pruned, healed)]
    assert rises[1] <= math.log(1.08) < rises[0]
    assert found.reached is not None and found.reached.model == "healed"
    assert found.reached.requirements[0].value == pytest.approx(rises[1], abs=1e-9)
    assert "healed is up to date, skipped" in err and not (out / SIZES).exists()


def test_a_search_is_made_for_each_number_and_its_scores_are_those_of_the_run(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, err = embedded_run(
        capfd, out, "--max-ppl-increase", "8%", "--criterion", "local",
        "--option", "local.start=magnitude", "--option", "local.evaluations=12",
    )  # fmt: skip
    assert code == 0, err
    found = QualityTarget.load(out / "quality.json")
    scores = shortllm.BlockScores.load(out / "scores.json")
    assert scores.removed is not None and len(scores.removed) == found.remove
    assert scores.options["remove"] == found.remove
    plan = shortllm.PrunePlan.load(out / "plan.json")
    assert plan.scores == scores.fingerprint and plan.removed == sorted(scores.removed)


def test_an_order_of_removals_is_scored_once(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, err = embedded_run(
        capfd, out, "--max-ppl-increase", "0.08nats", "--criterion", "greedy",
        "--option", "greedy.inner=magnitude",
    )  # fmt: skip
    assert code == 0, err
    assert len(shortllm.BlockScores.load(out / "scores.json").order or []) == 7
    assert QualityTarget.load(out / "quality.json").remove is not None


def test_nothing_that_meets_it_is_exit_code_3_with_what_would(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, err = embedded_run(capfd, out, "--max-ppl-increase", "0.1%")
    assert code == 3
    assert "error: no removal meets --max-ppl-increase 0.1%: without 1 block, the fewest" in err
    assert "What may help: --heal regression, --retrain distill, --criterion auto" in err
    found = QualityTarget.load(out / "quality.json")
    assert found.remove is None and found.find(1, bypassed=True) is not None
    assert (out / "scores.json").exists() and not (out / "plan.json").exists()


def test_a_loss_that_is_not_finite_is_a_miss(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = size_search.sample_nlls

    def broken(decoder: Any, ids: Any, removals: Any, **how: Any) -> Any:
        nlls = measure(decoder, ids, removals, **how)
        for place, removed in enumerate(removals):
            if len(removed) > 1:
                nlls[place] = math.inf
        return nlls

    monkeypatch.setattr(size_search, "sample_nlls", broken)
    code, err = embedded_run(capfd, tmp_path / "run", "--max-ppl-increase", "50%")
    assert code == 0 and "a loss that is not finite, misses the target" in err
    found = QualityTarget.load(tmp_path / "run" / "quality.json")
    assert found.remove == 1
    lost = found.find(2, bypassed=True)
    assert lost is not None and not lost.passed and not lost.requirements


def test_only_what_matters_makes_a_search_start_again(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, asked = tmp_path / "run", ("--max-ppl-increase", "8%")
    assert embedded_run(capfd, out, *asked)[0] == 0
    before = QualityTarget.load(out / "quality.json").fingerprint
    same = ("--overwrite", "--prompt", "A drum", "--eval-data", "embedded")
    for more, equal in ((same, True), (("--overwrite", "--max-segments", "9"), False)):
        assert embedded_run(capfd, out, *asked, *more)[0] == 0
        assert (QualityTarget.load(out / "quality.json").fingerprint == before) == equal
    (out / SIZES / "3").mkdir(parents=True)
    assert embedded_run(capfd, out, "--remove", "1", "--overwrite")[0] == 0
    assert not (out / SIZES).exists() and not (out / "quality.json").exists()


def test_a_target_of_size_next_to_it_is_the_least(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = ("--max-ppl-increase", "8%", "--target-params")
    code, err = embedded_run(capfd, tmp_path / "both", *asked, "4.4M")
    assert code == 0, err
    found = QualityTarget.load(tmp_path / "both" / "quality.json")
    assert found.at_least == 1 and (found.remove or 0) >= 1
    assert (tmp_path / "both" / "target.json").exists()
    code, err = embedded_run(capfd, tmp_path / "none", *asked, "2.8M")
    assert code == 3
    assert "needs 5 blocks removed or more, and --max-ppl-increase 8% allows" in err
    strict = ("--max-ppl-increase", "0.1%", "--target-params", "2.8M")
    code, err = embedded_run(capfd, tmp_path / "healed", *strict, *HEAL)
    assert code == 3
    assert "without 5 blocks (healed), which the target of size or speed needs, it is" in err
    tried = QualityTarget.load(tmp_path / "healed" / "quality.json").tried
    assert min(one.remove for one in tried if one.model == "healed") == 5
    assert not (tmp_path / "healed" / SIZES).exists()


@pytest.mark.slow
def test_tasks_of_a_retrained_model(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, _, err = call(
        capfd, "run", "embedded", *QUICK, "--no-bench", "--tasks", "shortllm_where", "--limit", 40,
        "--retrain", "full", "--set", "retraining.max_steps=20", "--set",
        "retraining.eval_every=20", "--max-ppl-increase", "20%", "--min-task-mean", "80%",
        "--out", out,
    )  # fmt: skip
    assert code == 0, err
    found = QualityTarget.load(out / "quality.json")
    evaluation = Evaluation.load(out / "eval.json")
    intact, retrained = evaluation.models[0], evaluation.models[-1]
    assert found.reached is not None and found.reached.model == "retrained"
    assert retrained.zeroshot_mean is not None and intact.zeroshot_mean is not None
    values = {one.name: one.value for one in found.reached.requirements}
    assert values["min_task_mean"] == retrained.zeroshot_mean / intact.zeroshot_mean >= 0.8
    assert values["max_ppl_increase"] <= math.log(1.2)


@pytest.mark.real
@pytest.mark.slow
def test_healing_a_real_model_lets_more_blocks_go(
    smollm_gguf: Path, shared: Path, tmp_path: Path
) -> None:
    model, text = str(smollm_gguf), shared / "data" / "c4"
    how: dict[str, Any] = {
        "data": str(text / "train_sample.jsonl.gz"),
        "eval_data": str(text / "heldout_sample.jsonl.gz"),
        "max_segments": 32,
        "continuations": 0,
        "probe": False,
        "max_ppl_increase": "12%",
        "dtype": "bfloat16",
    }
    plain = shortllm.run(model, out=tmp_path / "plain", **how)
    healed = shortllm.run(model, heal="linear", out=tmp_path / "healed", **how)
    assert 1 <= len(plain.plan.removed) < len(healed.plan.removed)
    for result in (plain, healed):
        intact, *_, last = result.evaluation.models
        assert last.perplexity[0].nll - intact.perplexity[0].nll <= math.log(1.12)
        assert shortllm.check(result.directory, max_ppl_increase="12%").passed
        assert not shortllm.check(result.directory, max_ppl_increase="0.5%").passed


def test_tasks_have_to_be_named(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, err = embedded_run(capfd, tmp_path / "run", "--min-task-mean", "95%")
    assert code == 2 and "--min-task-mean needs tasks to measure. Add e.g. --tasks" in err
    assert not (tmp_path / "run").exists()


# ---- a plan


def test_a_plan_measures_removals_on_the_text_of_the_run(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, err = embedded_run(capfd, out, "--max-ppl-increase", "8%")
    assert code == 0, err
    of_run = (out / "quality.json").read_bytes()
    code, printed, err = call(capfd, "plan", out, "--max-ppl-increase", "8%")
    assert code == 0, err
    found = QualityTarget.load(out / "quality-plan.json")
    before = QualityTarget.load(out / "quality.json")
    again = {one.remove: one.requirements for one in before.tried if one.model == BYPASSED}
    assert all(one.requirements == again[one.remove] for one in found.tried)
    assert f"12 -> {12 - (found.remove or 0)} blocks" in printed
    assert {one.model for one in found.tried} == {BYPASSED}
    code, _, err = call(capfd, "plan", out, "--max-ppl-increase", "0.1%")
    assert code == 3 and "`shortllm run` with --heal regression" in err
    code, _, err = call(capfd, "plan", out, "--min-task-mean", "95%")
    assert code == 2 and "tasks are not measured while a plan is made" in err
    code, _, _ = call(capfd, "plan", out, "--remove", "2")
    assert code == 0 and not (out / "quality-plan.json").exists()
    assert (out / "quality.json").read_bytes() == of_run
    code, _, err = call(capfd, "plan", out, "--remove", "2", "--eval-data", "embedded")
    assert code == 0 and "--eval-data has no effect without --max-ppl-increase" in err
    code, _, err = call(capfd, "plan", out, "--max-ppl-increase", "8%", "--eval-data", "embedded")
    assert code == 0, err
    evaluation = Evaluation.load(out / "eval.json")
    [intact, *_] = evaluation.models
    measured = intact.perplexity[0]
    changed = measured.model_copy(update={"tokens_fingerprint": "other"})
    intact = intact.model_copy(update={"perplexity": [changed]})
    evaluation.model_copy(update={"models": [intact]}).save(out / "eval.json")
    code, _, err = call(capfd, "plan", out, "--max-ppl-increase", "8%")
    assert code == 2 and "is not the text any more that" in err


def test_text_that_a_plan_is_given_leaves_out_the_rows_scored_on(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, text = tmp_path / "steps", tmp_path / "text.jsonl"
    rows = [{"text": "There was a drum in the school. The drum was red. " * 20}] * 4
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = ("score", "embedded", "--data", text, "--samples", "4", "--length", "32")
    code, _, err = call(capfd, *scored, "--out", out)
    assert code == 0, err
    code, _, err = call(capfd, "plan", out, "--max-ppl-increase", "8%", "--eval-data", text)
    assert code == 2 and "the calibration was drawn from all rows of" in err


def test_a_plan_from_scores_alone_needs_the_text(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    scored = ("score", "embedded", "--criterion", "magnitude", "--out", tmp_path / "steps")
    assert call(capfd, *scored)[0] == 0
    asked = ("plan", tmp_path / "steps", "--max-ppl-increase", "50%")
    code, _, err = call(capfd, *asked)
    assert code == 2 and "Give their directory, and the text as --eval-data" in err
    text = tmp_path / "text.txt"
    text.write_text("There was a drum in the school. The drum was red.\n" * 200)
    code, _, err = call(capfd, *asked, "--eval-data", text)
    assert code in (0, 3), err
    assert QualityTarget.load(tmp_path / "steps" / "quality-plan.json").tried


def test_the_record_refuses_what_it_is_not() -> None:
    with pytest.raises(ValidationError):
        QualityTarget.model_validate({"fingerprint": "", "asked": {}})
    assert issubclass(TargetMissedError, ShortLLMError) and TargetMissedError.exit_code == 3
