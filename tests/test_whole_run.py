"""A run with retraining and benchmark, the recipe it follows, and several runs on one page."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import children
import pytest

import shortllm
from shortllm import pipeline
from shortllm.benchmark.options import Benchmark, BenchmarkOptions
from shortllm.cli import main
from shortllm.data.options import CalibrationOptions
from shortllm.errors import RecipeError, ResultFileError, ShortLLMError
from shortllm.evaluation.options import Evaluation, EvaluationOptions, Perplexity
from shortllm.recipe import Recipe, changed, load_recipe, recipe_names
from shortllm.reporting.charts import Point, front
from shortllm.reporting.load import load_results, load_runs
from shortllm.reporting.recovery import recovered
from shortllm.reporting.run_page import verdict
from shortllm.reporting.runs_page import compared_models
from shortllm.retraining.options import Retraining, RetrainOptions

QUICK = {"length": 64, "batch": 2, "max_steps": 4, "eval_every": 2, "held_out": 4, "report_to": []}
RECIPE = Recipe(
    budget=shortllm.Budget(remove=2),
    calibration=CalibrationOptions(samples=4, length=64),
    retraining=[
        RetrainOptions.model_validate({"method": "lora", "learning_rate": 3e-3, **QUICK}),
        RetrainOptions.model_validate({"method": "full", "learning_rate": 1e-3, **QUICK}),
    ],
    evaluation=EvaluationOptions(max_segments=12, continuations=0),
    benchmark=BenchmarkOptions(new_tokens=[4], warmup=1, runs=2),
)


@pytest.fixture(scope="module")
def retrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "retrained"
    pipeline.run(recipe=RECIPE, out=directory)
    return directory


def test_every_way_of_retraining_makes_a_checkpoint_that_is_measured(retrained: Path) -> None:
    evaluation = Evaluation.load(retrained / "eval.json")
    names = [entry.name for entry in evaluation.models]
    assert names == ["original", "pruned", "retrained-lora", "retrained-full"]
    pruned = evaluation.models[1].model
    of_the_run = (retrained / "README.md").read_text()
    for name in names[2:]:
        record = Retraining.load(retrained / name / "retrain.json")
        assert record.model.fingerprint == pruned.fingerprint and record.steps == 4
        assert [step for step, _ in record.curves["held_out"]] == [0, 2, 4]
        checkpoint = shortllm.open_checkpoint(retrained / name)
        assert checkpoint.block_count == 10
        card = (retrained / name / "README.md").read_text()
        assert f'path = "{name}"  #' in card and f"- retrained by {record.method}, on" in card
        assert f"|  | original | {name} |\n" in card
        assert (card == of_the_run) == (name == names[-1])
    card = (retrained / "pruned" / "README.md").read_text()
    assert "retrained by" not in card and "neither healed nor retrained" in card
    assert "|  | original | pruned |\n" in card
    assert (retrained / "retrained-lora" / "adapter" / "adapter_model.safetensors").exists()
    benchmark = Benchmark.load(retrained / "bench.json")
    assert [one.name for one in benchmark.models] == ["original", "pruned"]


def test_the_report_shows_recovery_and_speed(retrained: Path) -> None:
    page = (retrained / "report.html").read_text()
    for part in ("Recovery", "retrained-lora", "Speed and memory"):
        assert part in page
    results = load_results(retrained)
    before, removed = results.perplexities("original"), results.perplexities("pruned")
    after = results.perplexities("retrained-full")
    [key] = before
    share = recovered(before[key], removed[key], after[key])
    assert share is not None and f"{100 * share:.1f}".replace("-", "−") in page


@pytest.mark.parametrize(
    ("scatter", "said"), [(0.05, "It generates"), (0.5, "latencies vary by ± 50.0\u202f%")]
)
def test_a_speed_that_scatters_is_no_verdict(scatter: float, said: str, retrained: Path) -> None:
    results = load_results(retrained)
    assert results.benchmark is not None
    measurements = [
        one.model_copy(update={"latency_mean_s": 1.0, "latency_std_s": scatter})
        for one in results.benchmark.measurements
    ]
    benchmark = results.benchmark.model_copy(update={"measurements": measurements})
    assert said in verdict(replace(results, benchmark=benchmark))


def test_the_same_run_again_skips_all_of_it(
    retrained: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in retrained.rglob("*.safetensors")}
    monkeypatch.setattr("shortllm.model.loading.load_model", None)  # needing a model would fail
    with caplog.at_level(logging.INFO, logger="shortllm"):
        pipeline.run(recipe=RECIPE, out=retrained)
    for name in (
        "scores.json",
        "pruned",
        "retrained-lora",
        "retrained-full",
        "eval.json",
        "bench.json",
    ):
        assert f"{name}" in caplog.text and caplog.text.count("is up to date, skipped") == 6
    weights = [path for path in before if "calibration" not in path.name]
    assert len(weights) == 4
    assert all(path.stat().st_mtime_ns == before[path] for path in weights)


def test_another_plan_retrains_and_leaves_nothing_stale(retrained: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(retrained, directory)
    other = RECIPE.model_copy(
        update={"budget": shortllm.Budget(remove=3), "retraining": [RECIPE.retraining[1]]}
    )
    result = pipeline.run(recipe=other, out=directory, overwrite=True)
    assert list(result.checkpoints) == ["pruned", "retrained"]
    assert shortllm.open_checkpoint(directory / "retrained").block_count == 9
    # what an earlier recipe has retrained stays on disk, and out of the report
    assert (directory / "retrained-lora").is_dir()
    assert list(load_results(directory).retraining) == ["retrained"]
    assert "retrained-lora" not in (directory / "report.html").read_text()


@pytest.mark.slow
def test_killed_while_retraining_the_same_command_completes_with_the_same_weights(
    retrained: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "killed"
    state = directory / "retrained-full.training.partial" / "states" / "checkpoint-2"
    ended = children.killed_when(
        state.is_dir,
        children.run, RECIPE.model_dump_json(exclude_unset=True), directory,
    )  # fmt: skip
    assert ended == -signal.SIGKILL, "the run ended before it could be killed"
    assert (directory / "retrained-lora" / "retrain.json").exists()
    assert not (directory / "retrained-full").exists()
    pipeline.run(recipe=RECIPE, out=directory)
    for name in ("retrained-lora", "retrained-full"):
        file = f"{name}/model.safetensors"
        assert (directory / file).read_bytes() == (retrained / file).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retraining.method": "full", "retraining.length": 4096}, "exceed the 512 positions"),
        ({"retraining.data": "no_such_text"}, "no_such_text"),
        ({"retraining.batch": 3, "retraining.micro_batch": 2}, "does not divide"),
        ({"benchmark.new_tokens": [4096]}, "exceed the 512 positions"),
        ({"benchmark.runs": 0}, "benchmark.runs 0: must be greater than or equal to 1"),
        ({"stream": True}, "does not fit into memory, but retraining and bench"),
    ],
)
def test_mistakes_of_late_stages_are_found_before_scoring(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shortllm.model.loading.load_model", None)
    with pytest.raises(ShortLLMError, match=message):
        pipeline.run(recipe=changed(RECIPE, change), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Recipes and flags.


def test_names_of_retrained_models() -> None:
    full = RetrainOptions(method="full")
    assert list(Recipe(retraining=[full]).retrained) == ["retrained"]
    several = Recipe(retraining=[full, RetrainOptions(), full])
    assert list(several.retrained) == ["retrained-full", "retrained-lora", "retrained-full-2"]
    assert Recipe.model_validate({"retraining": {"method": "full"}}).retraining == [full]


def test_the_recipes_of_the_embedded_model() -> None:
    assert {"embedded", "embedded-retraining"} <= set(recipe_names())
    recipe = load_recipe("embedded")
    assert recipe.model == "embedded" and recipe.benchmark is not None
    assert [one.method for one in recipe.retraining] == ["lora", "full"]
    steps = {one.max_steps for one in load_recipe("embedded-retraining").retraining}
    assert len(steps) == 1, "a comparison of methods gives each the same number of steps"


def test_changes_keep_what_they_do_not_name() -> None:
    recipe = changed(load_recipe("embedded"), {"retraining.max_steps": 7, "budget.protect_last": 0})
    assert [one.max_steps for one in recipe.retraining] == [7, 7]
    assert [one.learning_rate for one in recipe.retraining] == [3e-3, 1e-3]
    assert recipe.budget == shortllm.Budget(ratio=0.25, protect_last=0)
    assert changed(Recipe(), {"benchmark.batches": [2]}).benchmark == BenchmarkOptions(batches=[2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: x\n", "unknown field 'modle'. Did you mean 'model'"),
        ("evaluation: {taks: [a]}\n", "unknown field 'evaluation.taks'. Did you mean 'tasks'"),
        ("retraining: {rnak: 4}\n", "unknown field 'retraining.rnak'. Did you mean 'rank'"),
        ("quantization: {grup_size: 3}\n", "'quantization.grup_size'. Did you mean 'group_size'"),
        ("benchmark: {batch: 3}\n", "'benchmark.batch'. Did you mean 'batches'"),
        ("calibration: {samples: many}\n", "calibration.samples many: must be a valid integer"),
        ("model: [a\n", "is not a recipe in YAML"),
        ("just words\n", "contains no fields"),
        ("", "contains no fields"),
    ],
)
def test_a_recipe_that_cannot_be_used_says_why(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "my.yaml")
    assert message in str(caught.value)


def test_an_unknown_recipe_is_named_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="no recipe is called 'embeded'. Did you mean 'embedded'"):
        load_recipe("embeded")
    with pytest.raises(RecipeError, match="there is no recipe nowhere.yaml"):
        load_recipe("nowhere.yaml")


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return int(stopped.value.code or 0), out, err


def recipe_of(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Recipe:
    """What `run` makes of a command line; nothing is run."""
    seen: list[Recipe] = []

    def stop(recipe: Recipe, **kwargs: Any) -> None:
        seen.append(recipe)
        raise ShortLLMError("enough")

    monkeypatch.setattr(shortllm, "run", stop, raising=False)
    monkeypatch.setattr("shortllm.cli.early.check_recipe", lambda *given: None)
    with pytest.raises(SystemExit):
        main(["run", *map(str, arguments)])
    return seen[0]


def test_flags_go_before_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(
        "model: somewhere\ncriterion: taylor\noptions: {power: 2}\nbudget: {remove: 4}\n"
        "calibration: {samples: 3}\nretraining: {method: lora, rank: 4}\nbenchmark: {runs: 5}\n"
    )
    plain = recipe_of(monkeypatch, "--recipe", file)
    assert plain == load_recipe(file)
    # flags that were not typed do not bring their defaults
    assert plain.calibration.samples == 3 and plain.criterion == "taylor"
    other = recipe_of(
        monkeypatch, "elsewhere", "--recipe", file, "--ratio", "0.5", "--no-bench", "--tasks",
        "boolq,piqa", "--retrain", "lora,full", "--set", "retraining.max_steps=9",
    )  # fmt: skip
    assert other.model == "elsewhere" and other.budget == shortllm.Budget(ratio=0.5)
    assert other.benchmark is None and other.evaluation.tasks == ["boolq", "piqa"]
    assert [(one.method, one.rank, one.max_steps) for one in other.retraining] == [
        ("lora", 4, 9),
        ("full", 8, 9),
    ]
    options = recipe_of(monkeypatch, "--recipe", file, "--option", "taylor.power=1")
    assert options.options == {"power": "1"} and options.criterion == "taylor"


def test_without_a_model_the_embedded_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recipe_of(monkeypatch) == load_recipe("embedded")
    assert recipe_of(monkeypatch, "embedded").retraining == load_recipe("embedded").retraining
    assert recipe_of(monkeypatch, "my/model") == Recipe(model="my/model")
    assert recipe_of(monkeypatch, "--retrain", "none").retraining == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--retrain", "lroa"], "unknown retraining method 'lroa'. Did you mean 'lora'"),
        (["--set", "retraining"], "must have the form FIELD=VALUE"),
        (["--set", "retrainin.rank=3"], "unknown field 'retrainin'"),
        (["--set", "model.name=3"], "there is nothing in model to set"),
        (["--recipe", "embeded"], "Did you mean 'embedded'"),
    ],
)
def test_mistakes_in_flags(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capfd, "run", *arguments)
    assert code == 2 and message in err and not out


# Several runs.


def test_runs_side_by_side(
    retrained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "magnitude"
    pipeline.run(
        recipe=changed(RECIPE, {"criterion": "magnitude", "retraining": [], "benchmark": None}),
        out=other,
    )
    page = tmp_path / "page.html"
    code, out, _ = call(capfd, "compare", retrained, other, "--out", page, "--json")
    assert code == 0
    models = json.loads(out)
    assert [(one["run"], one["name"]) for one in models] == [
        (None, "original"),
        ("retrained", "pruned"),
        ("retrained", "retrained-lora"),
        ("retrained", "retrained-full"),
        ("magnitude", "pruned"),
    ]
    evaluation = Evaluation.load(retrained / "eval.json")
    by_name = {one.name: one.perplexity[0].perplexity for one in evaluation.models}
    [text] = models[0]["perplexity"]
    assert [one["perplexity"][text] for one in models[:4]] == list(by_name.values())
    assert models[1]["speedup"] == models[2]["speedup"] and models[4]["speedup"] is None
    assert models[0]["speedup"] == 1.0
    html = page.read_text()
    assert html.count("<svg") == 2 and "https:" not in html and "src=" not in html
    assert str(tmp_path) not in html
    compared = shortllm.compare([retrained, other], out=page)
    assert compared.models == compared_models(load_runs([retrained, other]))
    assert str(compared) == "5 models of 2 runs"
    frame = compared.to_dataframe()
    assert list(frame["kind"]) == ["original", "pruned", "retrained", "retrained", "pruned"]
    assert list(frame[f"perplexity {text}"][:4]) == list(by_name.values())
    assert compared._repr_html_().count("<tr>") == 6
    assert len(compared.plot().collections) > 0


def test_texts_of_different_protocols_stay_apart(retrained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(retrained, other)
    evaluation = json.loads((other / "eval.json").read_text())
    for model in evaluation["models"]:
        model["perplexity"][0]["tokens_fingerprint"] = "other tokens"
    (other / "eval.json").write_text(json.dumps(evaluation))
    models = compared_models(load_runs([retrained, other]))
    assert len(models[0].perplexity) == 2, "the original was measured on both"
    assert all(len(one.perplexity) == 1 for one in models[1:])
    assert len({text for one in models for text in one.perplexity}) == 2


def test_mistakes_of_compare(retrained: Path, tmp_path: Path) -> None:
    with pytest.raises(ResultFileError, match="given twice"):
        load_runs([retrained, retrained / "."])
    with pytest.raises(ResultFileError, match="plan.json is missing"):
        load_runs([tmp_path])
    copy = tmp_path / "retrained"
    shutil.copytree(retrained, copy)
    assert list(load_runs([retrained, copy])) == [
        f"{place.parent.name}/retrained" for place in (retrained, copy)
    ]
    (copy / "eval.json").unlink()
    with pytest.raises(ResultFileError, match="has no eval.json"):
        load_runs([copy])


def test_the_front_is_what_no_point_beats() -> None:
    places = [(1.0, 9.0), (2.0, 5.0), (2.0, 6.0), (3.0, 5.0), (4.0, 2.0), (2.0, 5.0)]
    points = [
        Point(number=number, name="pruned", group="run", kind="pruned", x=x, y=y)
        for number, (x, y) in enumerate(places)
    ]
    assert [point.number for point in front(points, higher_is_better=False)] == [0, 1, 5, 4]
    assert [point.number for point in front(points, higher_is_better=True)] == [0]


def test_recovery_is_measured_in_nats() -> None:
    def of(nll: float) -> Perplexity:
        return Perplexity(
            source="x", length=8, bos="none", segments=1, predictions=7, tokens_fingerprint="t",
            nll=nll, perplexity=2.0,
        )  # fmt: skip

    assert recovered(of(1.0), of(2.0), of(1.25)) == 0.75
    assert recovered(of(1.0), of(2.0), of(2.5)) == -0.5
    assert recovered(of(2.0), of(2.0), of(1.0)) is None
