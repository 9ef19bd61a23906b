"""Criteria compared: every number is that of a plain evaluation, nothing is done twice."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import shortllm
from shortllm import criteria, embedded, journal
from shortllm.cli import main
from shortllm.comparison.options import (
    Comparison,
    ComparisonText,
    Contender,
    RemovedSet,
    standings,
    verdict,
)
from shortllm.data.options import CalibrationOptions
from shortllm.errors import CriterionError, DataError, OutputError, ResultFileError, ShortLLMError
from shortllm.evaluation.options import EvaluationOptions, Perplexity
from shortllm.evaluation.texts import prepare_texts
from shortllm.files import overwriting
from shortllm.format import number, spans
from shortllm.model import Session
from shortllm.model.decoder import Decoder
from shortllm.model.metrics import next_token_nll
from shortllm.pruning.records import BlockScores

NAMES = ["ppl", "angular", "greedy", "even"]
RATIOS = [0.08, 0.1, 0.3, 0.9]
CALIBRATION = CalibrationOptions(samples=2, length=32)
CHECK = 2 * 12
"""Calls of blocks with which a model is checked before a walk."""
EVALUATION = ComparisonText(length=32, max_segments=3)


def compared(out: Path, **changes: Any) -> Comparison:
    """A small comparison on the embedded model."""
    chosen: dict[str, Any] = {
        "criteria": NAMES, "ratios": RATIOS, "random": 3, "calibration": CALIBRATION,
        "evaluation": EVALUATION, "command": ["shortllm", "compare-criteria"], "device": "cpu",
    }  # fmt: skip
    return shortllm.compare_criteria("embedded", out=out, **chosen | changes)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison, only to be read."""
    path = tmp_path_factory.mktemp("comparison") / "finished"
    compared(path)
    return path


@pytest.fixture
def found(directory: Path) -> Comparison:
    return Comparison.load(directory / "comparison.json")


def without_cost(path: Path) -> dict[str, Any]:
    return {**json.loads(path.read_text()), "cost": None}


# ------------------------------------------------------------------ what is measured


def test_every_perplexity_is_that_of_a_plain_evaluation(found: Comparison) -> None:
    checkpoint = shortllm.open_checkpoint("embedded")
    recipe = shortllm.Recipe(
        calibration=CALIBRATION, evaluation=EvaluationOptions(length=32, max_segments=3)
    ).resolved(checkpoint.model_type)
    [text] = prepare_texts(checkpoint, recipe.calibration, recipe.evaluation).evaluation
    ids_BT = text.segments.ids
    assert ids_BT.shape == (3, 32)
    decoder = Session(device="cpu").decoder(checkpoint)
    assert isinstance(decoder, Decoder)

    def plain(removed: list[int]) -> float:
        with decoder.without(removed), torch.no_grad():
            logits = decoder.model(input_ids=ids_BT, use_cache=False).logits
        return next_token_nll(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).mean().item()

    assert found.intact.nll == pytest.approx(plain([]), rel=1e-5)
    for one in (*found.criteria, *found.random):
        for removed in one.sets:
            assert removed.nll == pytest.approx(plain(removed.order), rel=1e-5)
            assert removed.perplexity == pytest.approx(math.exp(removed.nll or 0.0))
    different = {frozenset(s.order) for one in (*found.criteria, *found.random) for s in one.sets}
    assert found.models == len(different)


def test_what_is_removed_is_what_a_plan_removes(found: Comparison, directory: Path) -> None:
    assert [one.criterion for one in found.criteria] == NAMES
    assert found.protected == [0, 1, 2, 10, 11]
    for one in found.criteria:
        scores = BlockScores.load(directory / f"scores-{one.criterion}.json")
        assert one.scores == scores.fingerprint
        for budget, removed in zip(found.budgets, one.sets, strict=True):
            made = shortllm.plan(scores, remove=budget.blocks)
            assert removed.order == made.order
    by_name = {one.criterion: one for one in found.criteria}
    few, many = (removed.order for removed in by_name["greedy"].sets)
    assert by_name["greedy"].options["rounds"] == 4 and many[: len(few)] == few
    span = sorted(by_name["angular"].sets[-1].order)
    assert span == list(range(span[0], span[0] + 4))


def test_random_removals_are_those_of_plans_by_random(found: Comparison) -> None:
    assert [one.options for one in found.random] == [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    for one in found.random:
        scores = shortllm.score("embedded", criterion="random", options={"random": one.options})
        made = shortllm.plan(scores, remove=4)
        assert one.sets[-1].order == made.order
    assert len({tuple(one.sets[-1].order) for one in found.random}) == 3


def test_ratios_of_the_same_blocks_are_one_budget(found: Comparison) -> None:
    assert [(budget.blocks, budget.ratios) for budget in found.budgets] == [
        (1, [0.08, 0.1]),
        (4, [0.3]),
    ]
    [left] = found.left_out
    assert left.ratio == 0.9
    assert left.reason.startswith("cannot remove 11 of 12 blocks: 5 are protected. Ask for 7")


def test_measured_rows_are_kept_apart_from_scored_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(embedded.rows("test", 40)))
    one = compared(
        tmp_path / "run", criteria=["ppl"], ratios=[0.1], random=1,
        calibration=CALIBRATION.model_copy(update={"data": str(path)}),
    )  # fmt: skip
    calibrated = json.loads((tmp_path / "run" / "calibration.json").read_text())
    assert calibrated["rows"] == [0, 20]
    assert one.intact.rows == (20, 40) and one.intact.split == "held-out"


def test_the_defaults_are_the_criteria_of_any_model() -> None:
    """Without random, searches, and those for drafts or by questions."""
    others = criteria.names_by_need("sets", "choices")
    assert sorted([*criteria.compared(), "acceptance", "random", *others]) == criteria.names()


def test_without_text_to_score_on_all_rows_are_measured(tmp_path: Path) -> None:
    one = compared(tmp_path / "run", criteria=["last", "magnitude"], ratios=[0.1])
    assert one.calibration is None and one.intact.split is None
    assert not (tmp_path / "run" / "calibration.json").exists()
    assert (tmp_path / "run" / "comparison.html").exists()


def test_streamed_blocks_and_streams_in_a_file_change_nothing(
    found: Comparison, tmp_path: Path
) -> None:
    other = compared(tmp_path / "run", stream=True, max_memory=0)
    for one, same in zip(
        (*found.criteria, *found.random), (*other.criteria, *other.random), strict=True
    ):
        for a, b in zip(one.sets, same.sets, strict=True):
            assert a.order == b.order and b.nll == pytest.approx(a.nll, rel=1e-5)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(found: Comparison, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [
        "compare-criteria", "--criterion", ",".join(NAMES), "--ratios", ",".join(map(str, RATIOS)),
        "--random", "3", "--samples", "2", "--length", "32", "--eval-length", "32",
        "--max-segments", "3", "--device", "cpu", "--out", str(run),
    ]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launcher, "-m", "shortllm", *arguments], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Lowest perplexity") == 1
    other = Comparison.load(run / "comparison.json")
    assert other.fingerprint == found.fingerprint and not list(run.glob("*.partial"))
    for one, same in zip(found.criteria, other.criteria, strict=True):
        for a, b in zip(one.sets, same.sets, strict=True):
            assert a.order == b.order and b.nll == pytest.approx(a.nll, rel=1e-5)


# ------------------------------------------------------------------ what is not done again


def test_the_same_comparison_again_does_nothing(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (directory / "comparison.json").read_bytes()
    monkeypatch.setattr("shortllm.model.loading.load_model", None)  # needing the model would fail
    with caplog.at_level(logging.INFO, logger="shortllm"):
        compared(directory)
    assert "comparison.json is up to date, skipped" in caplog.text
    assert (directory / "comparison.json").read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"ratios": [0.1, 0.2, 0.3]},
        {"random": 4},
        {"evaluation": EVALUATION.model_copy(update={"max_segments": 2})},
    ],
)
def test_another_question_reuses_the_scores_only(
    changes: dict[str, Any], directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    monkeypatch.setattr("shortllm.pruning.score.score_blocks", None)  # scoring would fail
    before = (copy / "run.json").read_bytes()
    with pytest.raises(OutputError, match="was made with other choices"):
        compared(copy, **changes)
    assert (copy / "run.json").read_bytes() == before
    with overwriting():
        compared(copy, **changes)
    old, new = (Comparison.load(path / "comparison.json") for path in (directory, copy))
    assert new.fingerprint != old.fingerprint
    assert len(new.random) == changes.get("random", 3)
    assert new.intact.segments == (2 if "evaluation" in changes else 3)


def test_interrupted_it_leaves_nothing_half_done_and_goes_on(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MIN_INTERVAL_S", 0.0)
    monkeypatch.setattr(journal, "WORK_PER_COMMIT", 0)
    run = tmp_path / "run"
    shutil.copytree(directory, run)
    for name in ("comparison.json", "comparison.html"):
        (run / name).unlink()
    applied: list[int] = []
    apply = Decoder.apply

    def stopping(self: Decoder, b: int, *rest: Any) -> Any:
        applied.append(b)
        if len(applied) > CHECK and b == 8:
            raise KeyboardInterrupt
        return apply(self, b, *rest)

    monkeypatch.setattr(Decoder, "apply", stopping)
    with pytest.raises(KeyboardInterrupt):
        compared(run, stream=True)
    assert not (run / "comparison.json").exists() and not (run / "comparison.html").exists()
    resumed: list[int] = []

    def counting(self: Decoder, b: int, *rest: Any) -> Any:
        resumed.append(b)
        return apply(self, b, *rest)

    monkeypatch.setattr(Decoder, "apply", counting)
    compared(run, stream=True)
    # the walk goes on behind block 7
    assert sorted(set(resumed[CHECK:])) == [8, 9, 10, 11]
    assert not list(run.glob("*.partial"))
    ours, whole = (without_cost(path / "comparison.json") for path in (run, directory))
    assert ours["fingerprint"] == whole["fingerprint"]
    for one, same in zip(ours["criteria"], whole["criteria"], strict=True):
        assert [s["nll"] for s in one["sets"]] == pytest.approx([s["nll"] for s in same["sets"]])


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criteria": ["plp"]}, "unknown criterion 'plp'. Did you mean 'ppl'"),
        ({"criteria": ["ppl", "random"]}, "'random' is part of every comparison. Leave it out"),
        ({"criteria": []}, "must name criteria, each once"),
        ({"options": {"taylor": {"power": 2}}}, "option of criterion 'taylor' was given"),
        ({"options": {"greedy": {"rounds": 2}}}, "greedy.rounds follows from --ratios"),
        ({"ratios": [0.1, 1.5]}, "less than 1"),
        ({"ratios": [0.9]}, "no removal to compare: cannot remove 11 of 12.*Ask for 7 or fewer"),
        ({"ratios": [0.01]}, "no removal to compare: .* less than half a block"),
        ({"ratios": []}, "at least 1 item"),
        ({"random": 0}, "random 0: must be greater than or equal to 1"),
        ({"protect_first": -1}, "cannot be negative"),
        ({"evaluation": ComparisonText(length=4096)}, "exceed the 512 positions"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shortllm.model.loading.load_model", None)
    with pytest.raises(ShortLLMError, match=message):
        compared(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_table_with_holes_is_refused(directory: Path, tmp_path: Path) -> None:
    content = json.loads((directory / "comparison.json").read_text())
    content["criteria"][1]["sets"].pop()
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    with pytest.raises(ResultFileError, match=r"angular must have a removal for each of \[1, 4\]"):
        Comparison.load(tmp_path / "comparison.json")


# ------------------------------------------------------------------ what is shown


def made(values: dict[str, list[float | None]], drawn: list[list[float | None]]) -> Comparison:
    """A comparison with these perplexities at the budgets of one block, two blocks, ..."""

    def contender(name: str, found: list[float | None]) -> Contender:
        sets = [
            RemovedSet(order=list(range(n)), nll=value and math.log(value), perplexity=value)
            for n, value in enumerate(found, start=1)
        ]
        source = "baseline" if name in ("last", "random") else "a paper"
        return Contender(criterion=name, source=source, sets=sets)

    count = len(drawn[0])
    return Comparison(
        model={
            "id": "a<b", "model_type": "llama", "blocks": 10, "parameters": 1, "bytes": 1,
            "fingerprint": "f",
        },
        protected=[], fingerprint="f", models=3, dtype="float32",
        budgets=[{"blocks": n, "ratios": [n / 10]} for n in range(1, count + 1)],
        criteria=[contender(name, found) for name, found in values.items()],
        random=[contender("random", found) for found in drawn],
        intact=Perplexity(
            source="t", length=8, bos="first", segments=1, predictions=7, nll=math.log(2),
            tokens_fingerprint="t", perplexity=2.0,
        ),
    )  # fmt: skip


def test_who_wins_and_who_is_no_better_than_chance() -> None:
    record = made(
        {"ppl": [3, 4, None], "kl": [3, 6, None], "last": [9, 8, None]},
        [[5, 5, 7], [7, 9, 9]],
    )
    one, two, three = standings(record)
    assert (one.name, one.blocks, one.best) == ("10 %", 1, ["ppl", "kl"])
    assert (one.random_mean, one.beat_mean, one.beat_all) == (6, 2, 2)
    assert (two.best, two.random_mean, two.beat_mean, two.beat_all) == (["ppl"], 7, 2, 1)
    assert (three.best, three.beat_mean) == ([], 0)
    assert verdict(record) == (
        "Lowest perplexity: ppl at 2 of 3 budgets; kl at 1. At each budget 0 to 2 of 3 criteria "
        "are better than the mean of 2 random removals."
    )
    one = made({"ppl": [3], "kl": [3], "last": [3]}, [[4]])
    assert verdict(one).startswith("Lowest perplexity: ppl, kl and last at 1 of 1 budget. At each")


def test_spans() -> None:
    assert spans([7, 2, 3, 8, 9, 10]) == "2, 3, 7–10"
    assert spans([4]) == "4" and spans([]) == ""


def test_the_page_shows_the_numbers_and_nothing_of_the_machine(
    directory: Path, found: Comparison
) -> None:
    page = (directory / "comparison.html").read_text()
    assert verdict(found) in page
    for one in found.criteria:
        for removed in one.sets:
            assert f">{removed.perplexity:.3f} <span" in page and removed.behind is not None
            assert f"± {number(removed.stderr, 2)}</span>" in page
            assert f"<td>{spans(removed.order)}</td>" in page
    for name, paper in (("angular", "2403.17887"), ("greedy", "2402.09025"), ("ppl", "2402.02834")):
        assert re.search(rf"\b{name}\b[^\n]*: [^\n]*{paper}", page)
    assert "inner = ppl, rounds = 4" in page
    assert "Left out: 90.0" in page and "3 segments of 32 tokens" in page
    assert page.count("<svg") == 1
    assert re.findall(r"\bsrc=|@import|<link|<script|url\((?!#)", page) == []
    assert str(directory.parent) not in page


def test_a_page_of_other_names_is_escaped_and_a_lost_perplexity_is_a_dash(
    directory: Path, tmp_path: Path
) -> None:
    record = made({"<i>": [3, None], "last": [30, 4000]}, [[5, 5], [7, None]])
    for path in directory.glob("run.json"):
        shutil.copy(path, tmp_path)
    record.save(tmp_path / "comparison.json")
    page = shortllm.report(tmp_path).read_text()
    assert "<i>" not in page and "&lt;i&gt;" in page and "a&lt;b" in page
    assert "<td>–</td>" in page.replace(' class="worse"', "") and "nan" not in page
    assert "The axis is logarithmic." in page
    shutil.copy(directory / "calibration.json", tmp_path)
    record.model_copy(update={"calibration": "others"}).save(tmp_path / "comparison.json")
    with pytest.raises(ResultFileError, match="comparison.json and .* have different tokens"):
        shortllm.report(tmp_path)
    (tmp_path / "run.json").unlink()
    record.save(tmp_path / "comparison.json")
    with pytest.raises(ResultFileError, match="run.json is missing.* shortllm compare-criteria"):
        shortllm.report(tmp_path)


def test_equal_files_give_an_equal_page(directory: Path, tmp_path: Path) -> None:
    for path in directory.glob("*.json"):
        shutil.copy(path, tmp_path)
    content = json.loads((tmp_path / "comparison.json").read_text())
    content["cost"]["seconds"] = 1e6
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    written = shortllm.report(tmp_path)
    assert written.read_bytes() == (directory / "comparison.html").read_bytes()


def test_the_command(
    directory: Path, found: Comparison, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(directory, run)
    arguments = [
        "compare-criteria", "--criterion", "ppl,angular, greedy,even", "--ratios", "0.08,0.1,.3,.9",
        "--random", "3", "--samples", "2", "--length", "32", "--eval-length", "32",
        "--max-segments", "3", "--device", "cpu", "--out", str(run),
    ]  # fmt: skip

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    code, out, _ = call(*arguments)
    assert code == 0 and f"report: {run / 'comparison.html'}" in out
    lines = {
        first: cells[-2:] for first, *cells in (re.split(" {2,}", one) for one in out.split("\n"))
    }
    for one in found.criteria:
        columns = zip(standings(found), one.sets, lines[one.criterion], strict=True)
        for column, removed, cell in columns:
            assert removed.behind is not None
            marked = one.criterion in column.best or not removed.behind.is_clear
            error = f" (± {number(removed.stderr, 2)})"
            assert cell == f"{number(removed.perplexity)}{'*' * marked}{error}"
    means = [number(column.random_mean) for column in standings(found)]
    assert lines["random, mean of 3"] == means
    assert "8/10 % (1 of 12)" in out and "left out: 90 % (cannot remove 11" in out
    assert verdict(found) in out
    code, out, _ = call(*arguments, "--json")
    assert code == 0 and out.count("\n") == 1
    assert json.loads(out)["fingerprint"] == found.fingerprint
    code, out, err = call("compare-criteria", "--ratios", "a,b", "--out", str(run))
    assert (code, out) == (2, "") and "--ratios a: must be a valid number" in err


def test_texts_are_compared_as_criteria_are(tmp_path: Path) -> None:
    def by(out: str, **named: Any) -> Comparison:
        return shortllm.compare_criteria(
            "embedded", criteria=["ppl"], ratios=[0.25], samples=3, length=32, random=1,
            max_segments=4, eval_data="embedded", out=tmp_path / out, **named,
        )  # fmt: skip

    texts = ["embedded:train", "embedded:calibration", "generated:embedded"]
    found = by("texts", texts=texts)
    names = [*texts[:2], "generated:embedded:calibration"]
    assert [one.name for one in found.criteria] == [f"ppl on {text}" for text in names]
    alone = by("alone", data=texts[0])
    [one], [other] = alone.criteria[0].sets, found.criteria[0].sets
    assert (one.order, one.perplexity) == (other.order, other.perplexity)
    assert found.calibration is None and alone.calibration is not None
    written = (tmp_path / "texts" / "text-2" / "calibration.json").read_text()
    assert '"source": "generated:embedded:calibration"' in written
    assert "ppl on embedded:train" in (tmp_path / "texts" / "comparison.html").read_text()
    assert set(found.to_dataframe()["text"].dropna()) == set(names)
    with pytest.raises(OutputError):  # results of texts are results
        by("texts", texts=texts[:1])
    by("texts", texts=texts[:1], overwrite=True)
    assert [path.name for path in (tmp_path / "texts").glob("text-*")] == ["text-0"]


def test_texts_without_effect_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(CriterionError, match="--text has no effect: magnitude need no text"):
        shortllm.compare_criteria(criteria=["magnitude"], texts=["embedded"], out=out)
    with pytest.raises(DataError, match="so --data, --columns and --calibration have no effect"):
        shortllm.compare_criteria(criteria=["ppl"], texts=["embedded"], data="embedded", out=out)
    assert not out.exists()
