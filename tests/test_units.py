"""Width against depth at the same number of parameters: sizes, stages, page, command line."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

import shortllm
from shortllm.benchmark.options import Benchmark, BenchmarkOptions
from shortllm.cli import main
from shortllm.comparison.options import DEPTH, WIDTH, UnitsComparison
from shortllm.comparison.width_vs_depth import asked_methods
from shortllm.data.options import CalibrationOptions
from shortllm.errors import BudgetError, CriterionError, RecipeError, ShortLLMError
from shortllm.evaluation.options import Evaluation, EvaluationOptions
from shortllm.model import Session
from shortllm.recipe import Recipe
from shortllm.reporting.comparison import units_models, units_table
from shortllm.reporting.load import load_units
from shortllm.retraining.options import RetrainOptions
from shortllm.width_pruning.groups import options_to_remove
from shortllm.width_pruning.options import WidthOptions, WidthPruning
from shortllm.width_pruning.structure import find_groups

RECIPE = Recipe(
    budget=shortllm.Budget(remove=2),
    calibration=CalibrationOptions(samples=4, length=64),
    healing=shortllm.HealOptions(calibration={"samples": 64, "length": 64}),
    retraining=[
        RetrainOptions(
            length=64, batch=2, max_steps=2, eval_every=2, held_out=4, learning_rate=1e-3,
            report_to=[],
        )
    ],
    evaluation=EvaluationOptions(max_segments=12, continuations=0),
    benchmark=BenchmarkOptions(batches=[1, 2], new_tokens=[4], warmup=1, runs=2),
)  # fmt: skip
METHODS = (*DEPTH, *WIDTH)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("units") / "run"
    shortllm.compare_units(recipe=RECIPE, out=directory)
    return directory


@pytest.mark.slow
def test_all_candidates_have_nearly_the_same_number_of_parameters(place: Path) -> None:
    units = UnitsComparison.load(place / "units.json")
    assert [(one.name, one.unit) for one in units.candidates] == [
        ("ppl", "depth"),
        ("taylor", "depth"),
        ("flap", "width"),
        ("llm-pruner", "width"),
        ("wanda-sp", "width"),
    ]
    goal = shortllm.open_checkpoint(place / "ppl").parameters
    for one in units.candidates:
        found = shortllm.open_checkpoint(place / one.name).parameters
        assert found == one.parameters
        assert abs(found / goal - 1) == abs(one.missed) < 0.01
        assert (one.healed, one.retrained) == (f"{one.name}-healed", f"{one.name}-retrained")
    assert shortllm.open_checkpoint(place / "ppl").block_count == 10
    assert shortllm.open_checkpoint(place / "flap").block_count == 12


@pytest.mark.slow
def test_each_is_healed_retrained_measured_and_timed(place: Path) -> None:
    evaluation = Evaluation.load(place / "eval.json")
    names = [entry.name for entry in evaluation.models]
    derived = [name + way for way in ("-healed", "-retrained") for name in METHODS]
    assert names == ["original", *METHODS, *derived]
    benchmark = Benchmark.load(place / "bench.json")
    assert [one.name for one in benchmark.models] == ["original", *METHODS]
    assert len(benchmark.measurements) == 2 * 6
    for made in derived:
        before = shortllm.open_checkpoint(place / made.rpartition("-")[0])
        after = shortllm.open_checkpoint(place / made)
        assert after.parameters == before.parameters and after.fingerprint != before.fingerprint
    narrowed = WidthPruning.load(place / "flap-healed" / "width.json").blocks
    assert any(one.repaired for one in narrowed)
    losses = {entry.name: entry.perplexity[0].nll for entry in evaluation.models}
    assert losses["ppl-healed"] < losses["ppl"] and losses["flap-healed"] < losses["flap"]


@pytest.mark.slow
def test_the_page_has_every_number_of_the_table(place: Path) -> None:
    results = load_units(place)
    table = units_table(results)
    assert len(table.rows) == 1 + 2 * 5
    assert all(len(row.cells) == len(table.head.cells) for row in table.rows)
    page = (place / "units.html").read_text()
    for row in table.rows:
        assert all(re.search(f"{re.escape(cell.text)} ?<", page) for cell in row.cells)
    models = units_models(results)
    assert [one.kind for one in models] == ["original", *["pruned", "healed", "retrained"] * 5]
    assert models[1].latency_s == models[2].latency_s, "healing does not change the shape"
    assert page.count("<svg") >= 3 and "arXiv:2305.11627" in page and "arXiv:2312.11983" in page
    assert str(place.parent) not in page


@pytest.mark.slow
def test_the_same_again_does_nothing(
    place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in place.glob("*/model.safetensors")}
    with caplog.at_level(logging.INFO, logger="shortllm"):
        shortllm.compare_units(recipe=RECIPE, out=place)
    assert len(before) == 15
    assert all(path.stat().st_mtime_ns == before[path] for path in before)
    assert caplog.text.count("is up to date, skipped") >= 12


@pytest.mark.parametrize(
    "share",
    [pytest.param(0.15, marks=pytest.mark.slow), 0.2, pytest.param(0.35, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("method", WIDTH)
def test_ratios_are_found_for_a_number_of_parameters(
    method: str, share: float, tmp_path: Path
) -> None:
    checkpoint = shortllm.open_checkpoint("embedded")
    session = Session(device="cpu")
    options = WidthOptions.model_validate({"method": method, "ratio": 0.5, "bias": None})
    filled = options.resolved(checkpoint.block_count)
    assert filled.start is not None and filled.end is not None
    groups = find_groups(session.decoder(checkpoint), range(filled.start, filled.end))
    asked = int(share * checkpoint.parameters)
    found = options_to_remove(asked, filled, groups)
    made = shortllm.width(
        "embedded", tmp_path / "narrow", options=found, device="cpu", samples=2, length=32
    )
    assert abs(made.reached.removed - asked) < 0.01 * checkpoint.parameters
    assert WidthPruning.load(tmp_path / "narrow" / "width.json") == made


def test_more_than_there_is_cannot_go() -> None:
    checkpoint = shortllm.open_checkpoint("embedded")
    session = Session(device="cpu")
    groups = find_groups(session.decoder(checkpoint), range(2))
    options = WidthOptions(ratio=0.5).resolved(12)
    with pytest.raises(BudgetError, match="cannot be removed from 2 blocks"):
        options_to_remove(checkpoint.parameters // 2, options, groups)
    with pytest.raises(BudgetError, match="at least one head of 2 and one neuron from each block"):
        options_to_remove(10_000, options, groups)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["flap"], "no criterion of depth was named"),
        (
            ["ppl", "flapp"],
            "'flapp' is neither a criterion nor a width method. Did you mean 'flap'.",
        ),
        (["ppl", "ppl"], "given twice"),
    ],
)
def test_names_of_methods(names: list[str], message: str) -> None:
    with pytest.raises(CriterionError, match=message):
        asked_methods(names)


def test_models_without_heads_of_their_own_are_refused_before_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPE.model_copy(update={"budget": shortllm.Budget(remove=11)})
    with pytest.raises(ShortLLMError, match="cannot remove 11 of 12 blocks"):
        shortllm.compare_units(recipe=recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_quantizes_is_refused(tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"quantization": shortllm.QuantizeOptions()})
    with pytest.raises(RecipeError, match="the recipe quantizes"):
        shortllm.compare_units(recipe=recipe, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "batches"),
    [
        (["--set", "benchmark.runs=1"], [1, 4, 16, 64]),
        (["--set", "benchmark.batches=[3]"], [3]),
        (["--batch", "2,5", "--set", "benchmark.batches=[3]"], [2, 5]),
    ],
)
def test_batch_sizes_are_the_recipes_unless_typed(
    flags: list[str], batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Recipe] = []

    def stop(recipe: Recipe, **kwargs: object) -> None:
        seen.append(recipe)
        raise ShortLLMError("enough")

    monkeypatch.setattr(shortllm, "compare_units", stop, raising=False)
    with pytest.raises(SystemExit):
        main(["compare-units", *flags])
    assert seen[0].benchmark is not None and seen[0].benchmark.batches == batches


def test_on_the_command_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [
        "compare-units", "embedded", "--out", out, "--methods", "ppl,wanda-sp", "--remove", 2,
        "--samples", 2, "--length", 32, "--max-segments", 4, "--tasks", "", "--retrain", "none",
        "--batch", 1, "--set", "benchmark.new_tokens=[2]", "--set", "benchmark.warmup=1",
        "--set", "benchmark.runs=1",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main([str(one) for one in arguments])
    printed, _ = capfd.readouterr()
    assert not stopped.value.code
    assert "wanda-sp" in printed and "units.html" in printed and "healed" not in printed
    recipe = json.loads((out / "run.json").read_text())["recipe"]
    assert recipe["budget"]["remove"] == 2 and recipe["retraining"] == []
    assert recipe["methods"] == ["ppl", "wanda-sp"]
