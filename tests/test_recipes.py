"""The recipes that come with the package: each parsed and tried on the shape of its model; what
was published, and ours beside it."""

from __future__ import annotations

import json
import logging
import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import build, config_of, save
from test_cli import call

import shortllm
from shortllm import embedded, pipeline
from shortllm.benchmark.options import BenchmarkOptions
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.criteria import resolve
from shortllm.errors import BudgetError, CheckpointError, RecipeError
from shortllm.evaluation.options import (
    EvaluatedModel,
    Evaluation,
    EvaluationOptions,
    Perplexity,
    TaskScore,
)
from shortllm.evaluation.task_names import EMBEDDED_TASKS, METRICS, task_names
from shortllm.format import number
from shortllm.pruning.budget import check_budget, protected_blocks
from shortllm.pruning.planning import build_plan
from shortllm.published import (
    Published,
    PublishedFigures,
    compared_blocks,
    published_comparison,
)
from shortllm.recipe import Recipe, changed, load_recipe, parse_recipe, recipe_names, recipe_text
from shortllm.records import ModelInfo
from shortllm.released import measure_released, released_recipes
from shortllm.retraining import setup
from shortllm.surgery.apply import check_removal

RECIPES = {name: load_recipe(name) for name in recipe_names()}
PUBLISHED = [name for name, recipe in RECIPES.items() if recipe.published is not None]

SHAPES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "baffo32/decapoda-research-llama-7B-hf": ("llama", 32, {}),
    "meta-llama/Llama-2-7b-hf": ("llama", 32, {}),
    "meta-llama/Meta-Llama-3-8B": ("llama", 32, {}),
    "lmsys/vicuna-7b-v1.3": ("llama", 32, {}),
    "lmsys/vicuna-13b-v1.3": ("llama", 40, {}),
    "rishiraj/CatPPT-base": ("mistral", 32, {}),
    "google/gemma-2b": ("gemma", 18, {}),
    "google/gemma-7b": ("gemma", 28, {}),
    "Qwen/Qwen3-0.6B": ("qwen3", 28, {}),
    "Qwen/Qwen3-1.7B": ("qwen3", 28, {}),
    "Qwen/Qwen3-8B": ("qwen3", 36, {}),
    "meta-llama/Llama-3.2-1B": ("llama-tied", 16, {}),
    "meta-llama/Llama-3.2-3B": ("llama-tied", 28, {}),
    "google/gemma-3-1b-pt": ("gemma3_text", 26, {"sliding_window_pattern": 6}),
    "HuggingFaceTB/SmolLM3-3B": ("smollm3", 36, {"no_rope_layer_interval": 4}),
    "allenai/OLMo-2-0425-1B": ("olmo2", 16, {}),
}
"""Model of a recipe -> variant of its type, number of its blocks, and what sets the pattern."""

RELEASED = {
    "llama-1-7b-ppl": "nota-ai/st-llama-1-5.5b-ppl",
    "llama-1-7b-taylor": "nota-ai/st-llama-1-5.5b-taylor",
    "vicuna-7b-v1.3-ppl": "nota-ai/st-vicuna-v1.3-5.5b-ppl",
    "vicuna-7b-v1.3-taylor": "nota-ai/st-vicuna-v1.3-5.5b-taylor",
    "vicuna-13b-v1.3-ppl": "nota-ai/st-vicuna-v1.3-10.5b-ppl",
    "vicuna-13b-v1.3-taylor": "nota-ai/st-vicuna-v1.3-10.5b-taylor",
    "vicuna-7b-v1.3-cpt-20": "nota-ai/cpt_st-vicuna-v1.3-5.5b-ppl",
    "vicuna-7b-v1.3-cpt-45": "nota-ai/cpt_st-vicuna-v1.3-3.7b-ppl",
    "vicuna-7b-v1.3-cpt-60": "nota-ai/cpt_st-vicuna-v1.3-2.7b-ppl",
    "vicuna-7b-v1.3-cpt-80": "nota-ai/cpt_st-vicuna-v1.3-1.5b-ppl",
}


@cache
def shaped(model: str, directory: Path) -> Checkpoint:
    """A tiny checkpoint with the type, the number of blocks and the pattern of a recipe's model."""
    if model == "embedded":
        return open_checkpoint(model)
    variant, blocks, pattern = SHAPES[model]
    config = config_of(variant, num_hidden_layers=blocks, **pattern)
    return open_checkpoint(save(build(config), directory / model.replace("/", "--")))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


# ---- each recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_model(name: str, shapes: Path) -> None:
    recipe = RECIPES[name]
    checkpoint = shaped(recipe.model, shapes)
    recipe = recipe.resolved(checkpoint.model_type)
    assert recipe.about and "\n" not in recipe.about
    asked = resolve(recipe.criterion, recipe.options)
    assert asked.name == recipe.criterion
    recipe.budget.asked()
    check_budget(recipe.budget, checkpoint.info())
    assert len(recipe.retraining) >= 1
    for options in recipe.retraining:
        assert setup.resolve(options, checkpoint).data
    assert set(task_names(recipe.evaluation.tasks)) <= {*METRICS, *EMBEDDED_TASKS}
    is_gemma = checkpoint.model_type.startswith("gemma")
    assert recipe.calibration.bos_every_sample is is_gemma
    assert recipe.evaluation.bos == ("every" if is_gemma else "first")
    # a removal scattered over the blocks: those that go and those that stay are of every kind
    free = set(range(checkpoint.block_count)) - set(
        protected_blocks(recipe.budget, checkpoint.info())
    )
    number = recipe.budget.remove or round(0.25 * checkpoint.block_count)
    step = len(free) / number
    gone = {sorted(free)[int(place * step)] for place in range(number)}
    if recipe.published is not None:
        gone = set(build_plan(
            recipe.budget, model=checkpoint.info(), published=recipe.published
        ).removed)  # fmt: skip
    assert len(gone) == number
    kept = [block for block in range(checkpoint.block_count) if block not in gone]
    config = check_removal(checkpoint, kept)
    assert config["num_hidden_layers"] == len(kept)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_order_gives_the_published_blocks(name: str, shapes: Path) -> None:
    recipe = RECIPES[name]
    published = recipe.published
    assert published is not None and published.criterion == recipe.criterion
    info = shaped(recipe.model, shapes).info()
    plan = build_plan(recipe.budget, model=info, published=published)
    first = [block for block in published.order if 4 <= block < info.blocks - 2]
    assert plan.order == first[: recipe.budget.remove]
    assert plan.protected == [0, 1, 2, 3, info.blocks - 2, info.blocks - 1]
    assert plan.criterion == published.criterion and plan.scores is None
    assert "arXiv:2402.02834" in plan.reason and "Nothing was scored" in plan.reason
    if "-cpt-" not in name:
        assert plan.removed == published.removed
    assert len(published.values) == info.blocks


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_order_follows_from_the_published_values(name: str) -> None:
    published = RECIPES[name].published
    assert published is not None
    values = [math.inf if value is None else value for value in published.values]
    ordered = [values[block] for block in published.order]
    assert ordered == sorted(ordered)


def test_the_ten_released_checkpoints() -> None:
    found = released_recipes(RECIPES)
    assert {n: r.published.checkpoint for n, r in found.items() if r.published} == RELEASED
    parameters = {6: "5.5b", 15: "3.7b", 20: "2.7b", 26: "1.5b"}
    for name, recipe in found.items():
        removed = recipe.budget.remove
        assert removed is not None
        if "7b" in name:
            left = 6_738_415_616 - removed * 202_383_360
            assert f"{left / 1e9:.1f}b" == parameters[removed]
            assert parameters[removed] in RELEASED[name]
        if "-cpt-" in name:
            assert recipe.retraining[0].method == "full"
            assert recipe.published is not None and recipe.published.released is None


@pytest.mark.shared
def test_recipes_hold_what_was_published(shared: Path) -> None:
    facts = json.loads((shared / "design" / "published.json").read_text())
    by_model: dict[str, dict[str, Recipe]] = {}
    for name in PUBLISHED:
        if "-cpt-" not in name:
            by_model.setdefault(RECIPES[name].model, {})[RECIPES[name].criterion] = RECIPES[name]
    expected = {one["hub_id"]: set(one["criteria"]) for one in facts["models"].values()}
    assert {model: set(found) for model, found in by_model.items()} == expected
    for key, model in facts["models"].items():
        for criterion, fact in model["criteria"].items():
            recipe = by_model[model["hub_id"]][criterion]
            published = recipe.published
            assert published is not None
            assert published.order == fact["order_least_important_first"]
            values = fact.get("ppl_when_removed") or fact["block_score"]
            assert published.values == [v if math.isfinite(v) else None for v in values]
            assert len(published.removed) == model["removed_blocks_in_published_model"]
            assert recipe.budget.remove == model["removed_blocks_in_published_model"]
            calibration = dict(fact["calibration"])
            assert recipe.calibration.data == calibration.pop("dataset")
            assert recipe.calibration.model_dump(include=set(calibration)) == calibration
            [lora], fact_lora = recipe.retraining, model["lora"]
            assert (lora.method, lora.rank, lora.epochs) == (
                "lora", fact_lora["r"], fact_lora["epochs"],
            )  # fmt: skip
            assert (lora.learning_rate, lora.batch, lora.micro_batch) == (
                fact_lora["learning_rate"],
                fact_lora["batch_size"],
                fact_lora["micro_batch_size"],
            )
            results = facts["evaluation_results"]
            assert_figures(published.original, results.get(key))
            released = (published.checkpoint or "/").split("/")[1]
            assert_figures(published.released, results.get(released))


def assert_figures(figures: PublishedFigures | None, fact: dict[str, Any] | None) -> None:
    assert (figures is None) == (fact is None)
    if figures is None or fact is None:
        return
    for bos, key in (("first", "ppl_bos_first_segment_only"), ("every", "ppl_bos_every_segment")):
        assert figures.perplexity[bos] == {  # type: ignore[index]
            "wikitext2:test": fact[key]["ppl_wikitext2"],
            "ptb:validation": fact[key]["ppl_ptb"],
        }
        assert figures.parameters == fact[key]["params"]
        assert figures.memory_mib[bos] == fact[key]["mem"]  # type: ignore[index]
    tasks = {name: score for name, (_, score) in fact.get("zero_shot", {}).items()}
    assert figures.tasks_mean == tasks.pop("AVE", None)
    assert figures.tasks == tasks


def test_an_unknown_field_is_refused_with_those_there_are() -> None:
    content = yaml.safe_load(recipe_text("llama-1-7b-ppl"))
    for place, message in (
        (("published", "orignal"), "unknown field 'published.orignal'. Did you mean 'original'"),
        (("published", "original", "taks"), "'published.original.taks'. Did you mean 'tasks'"),
        (("specialtokens",), "unknown field 'specialtokens'. Did you mean 'special_tokens'"),
    ):
        spoiled = json.loads(json.dumps(content))
        holder = spoiled
        for part in place[:-1]:
            holder = holder[part]
        holder[place[-1]] = {}
        with pytest.raises(RecipeError) as caught:
            parse_recipe(spoiled, "my.yaml")
        assert message in str(caught.value) and "my.yaml" in str(caught.value)


def test_a_list_is_no_model() -> None:
    with pytest.raises(RecipeError, match=r"my.yaml: model: a model is .* not \['one', 'other'\]"):
        parse_recipe({"model": ["one", "other"]}, "my.yaml")


@pytest.mark.parametrize("value", [math.inf, "\ud800"])
def test_options_that_no_file_can_hold_are_refused(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"my.yaml: options: must hold what JSON in UTF-8 can"):
        parse_recipe({"options": {"power": value}}, "my.yaml")


# ---- the command line


def test_recipes_are_listed_and_shown(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capfd, "recipes", "list")
    assert code == 0
    for name, recipe in RECIPES.items():
        assert name in out and recipe.model in out and recipe.about in out
    code, out, _ = call(capfd, "recipes", "list", "--json")
    listed = {one["name"]: one for one in json.loads(out)}
    assert set(listed) == set(RECIPES) and listed["gemma-7b-taylor"]["removes"] == 5
    code, out, _ = call(capfd, "recipes", "show", "gemma-2b-ppl")
    assert code == 0 and parse_recipe(yaml.safe_load(out), "shown") == RECIPES["gemma-2b-ppl"]
    code, _, err = call(capfd, "recipes", "show", "gema-2b-ppl")
    assert code == 2 and "Did you mean 'gemma-2b-ppl'" in err
    code, _, err = call(capfd, "recipes", "run", "published", "--remove", "3")
    assert code == 2 and "so 'budget' has no effect" in err
    code, _, err = call(capfd, "recipes", "run", "published", "--retrain", "lora")
    assert code == 2 and "so '--retrain' has no effect" in err


ORDER = [5, 0, 7, 6, 3, 4, 8, 1, 2, 11, 9, 10]
"""Of the embedded model's 12 blocks; 0 to 2, 10 and 11 are protected."""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A recipe of one's own, as if something were published about the embedded model."""
    content = {
        "model": str(embedded.MODEL_DIR),
        "about": "mine",
        "criterion": "ppl",
        "budget": {"remove": 3},
        "evaluation": {"data": ["wikitext2"], "continuations": 0},
        "published": {
            "source": "a paper",
            "criterion": "ppl",
            "order": ORDER,
            "removed": [4, 5, 7],
            "original": {
                "perplexity": {"first": {"wikitext2:test": 12.5}, "every": {"wikitext2:test": 99}}
            },
        },
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small texts under the names of the paper's."""
    rows = embedded.rows("test", 24)
    for place in ("wikitext2/wiki.test.raw", "ptb/ptb.valid.txt"):
        path = tmp_path / "data" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(rows[:16] if "ptb" in place else rows) + "\n")
    monkeypatch.setenv("SHORTLLM_DATA", str(tmp_path / "data"))


@pytest.mark.usefixtures("texts")
def test_a_run_by_the_published_order_scores_nothing(
    own: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    code, said, err = call(
        capfd, "recipes", "run", own, "--use-published-order", "--out", out, "--no-bench"
    )
    assert code == 0, err
    plan = shortllm.PrunePlan.load(out / "plan.json")
    assert plan.order == [5, 7, 6] and plan.protected == [0, 1, 2, 10, 11]
    assert not (out / "scores.json").exists() and not (out / "calibration.json").exists()
    assert "compared with the published results (a paper)" in said
    assert "The published model lacks blocks 4, 5, 7; 2 of these were removed here as well" in said
    [row] = [line for line in said.splitlines() if "wikitext2:test, BOS first" in line]
    original = Evaluation.load(out / "eval.json").models[0].perplexity[0].perplexity
    assert f"12.500  {number(original, 5)}  " in row
    assert "BOS every" not in said
    page = (out / "report.html").read_text()
    assert "Against published results" in page and "perplexity wikitext2:test, BOS first" in page
    assert "published.order" not in page  # it has its section, not rows among the choices
    content = json.loads((out / "run.json").read_text())["recipe"]
    assert content["use_published_order"] and content["published"]["order"] == ORDER


def test_a_published_order_that_cannot_be_followed_is_refused_before_work(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shortllm.model.loading.load_model", None)
    recipe = changed(load_recipe(own), {"use_published_order": True})
    assert pipeline.default_directory(recipe).name == "model-ppl-remove3-published-order"
    for changes, error, message in (
        ({"published": None}, RecipeError, "needs a recipe of a published model"),
        ({"published.order": list(range(9))}, BudgetError, "one of 9 blocks, and .* has 12"),
        ({"budget": {"blocks": [4]}}, BudgetError, "--blocks and --use-published-order both"),
        ({"budget.contiguous": True}, BudgetError, "--contiguous and --use-published-order both"),
    ):
        with pytest.raises(error, match=message):
            pipeline.run(recipe=changed(recipe, changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- ours beside the published


def measured(name: str, **changes: Any) -> EvaluatedModel:
    info = ModelInfo(
        id="x", model_type="llama", blocks=8, parameters=90, bytes=360, fingerprint="f"
    )
    about = {"length": 128, "bos": "first", "segments": 2, "predictions": 9, "nll": 1.0}
    perplexity = Perplexity.model_validate(
        {"source": "ptb:validation", "tokens_fingerprint": "f", "perplexity": 3.0, **about}
        | changes
    )
    scores = [
        TaskScore(
            task=task, metric=metric, score=0.5, documents=9, documents_fingerprint="f", shots=0
        )
        for task, metric in METRICS.items()
    ]
    return EvaluatedModel(
        name=name, model=info, perplexity=[perplexity], zeroshot=scores, zeroshot_mean=0.5
    )


FIGURES = PublishedFigures(
    perplexity={"first": {"ptb:validation": 4.0}, "every": {"ptb:validation": 5.0}},
    tasks=dict.fromkeys(METRICS, 60.0),
    tasks_mean=60.0,
    parameters=100,
)


def test_only_numbers_of_one_protocol_stand_side_by_side() -> None:
    published = Published(
        source="a paper", criterion="ppl", order=[0, 1], original=FIGURES, released=FIGURES
    )

    def rows(
        name: str = "original", *, options: EvaluationOptions | None = None, **changes: Any
    ) -> dict[str, tuple[float, float]]:
        evaluation = Evaluation(models=[measured(name, **changes)], dtype="x", fingerprint="f")
        found = published_comparison(published, evaluation, options or EvaluationOptions())
        assert all(row.model == name for row in found)
        return {row.quantity: (row.ours, row.published) for row in found}

    first, every = "perplexity ptb:validation, BOS first", "perplexity ptb:validation, BOS every"
    found = rows()
    assert found[first] == (3.0, 4.0) and every not in found
    assert found["parameters"] == (90, 100)
    assert found["boolq acc [%]"] == (50.0, 60.0) and found["mean of tasks [%]"] == (50.0, 60.0)
    assert len(found) == 2 + len(METRICS) + 1
    assert rows(bos="every")[every] == (3.0, 5.0)
    assert rows("retrained") == rows("retrained-lora") == found
    assert rows("pruned") == {}  # what was published had been retrained
    for changes in ({"length": 2048}, {"source": "ptb:test"}, {"split": "held-out"}):
        assert first not in rows(**changes)
    assert first not in rows(options=EvaluationOptions(max_segments=5))
    assert set(rows(options=EvaluationOptions(limit=5))) == {first, "parameters"}


def test_blocks_are_compared_in_words() -> None:
    published = Published(source="s", criterion="ppl", order=[0, 1, 2], removed=[1, 2])
    assert compared_blocks(published, [2, 1]) == "Blocks 1, 2 were removed, as published."
    assert "1 of these were removed here as well, and 1 other." in compared_blocks(
        published, [0, 1]
    )


# ---- released checkpoints


@pytest.mark.slow
@pytest.mark.usefixtures("texts")
def test_released_checkpoints_are_measured_one_after_the_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(checkpoint: str | None) -> Recipe:
        return Recipe(
            evaluation=EvaluationOptions(
                data=["wikitext2", "ptb"], continuations=0, tasks=["shortllm_who"], limit=3
            ),
            benchmark=BenchmarkOptions(new_tokens=[2], warmup=1, runs=1),
            published=Published(
                source="a paper",
                checkpoint=checkpoint,
                criterion="ppl",
                order=[0],
                released=FIGURES,
            ),
            dtype="float32",
        )

    source = embedded.MODEL_DIR
    local = shutil.copytree(source, tmp_path / "released-one")
    recipes = {
        "one": recipe(str(local)),
        "gone": recipe("nobody/has-this"),
        "never-released": recipe(None),
        "two": recipe(str(source)),
    }
    out = tmp_path / "published"
    found = measure_released(recipes, out=out)
    assert set(found.measured) == {"one", "two"} and set(found.failed) == {"gone"}
    assert "not in the local Hub cache" in found.failed["gone"]
    one = found.measured["one"]
    protocols = [(p.source, p.bos, p.length) for p in one.evaluated.perplexity]
    assert protocols == [
        (text, bos, 128)
        for bos in ("first", "every")
        for text in ("wikitext2:test", "ptb:validation")
    ]
    assert [score.task for score in one.evaluated.zeroshot] == ["shortllm_who"]
    assert one.benchmark is not None and one.benchmark.measurements[0].tokens_per_s
    assert {row.quantity: row.published for row in one.comparison} == {
        "parameters": 100,
        "perplexity ptb:validation, BOS first": 4.0,
        "perplexity ptb:validation, BOS every": 5.0,
    }
    names = {path.name for path in (out / "one").iterdir()}
    assert {"run.json", "eval.json", "zeroshot.csv", "bench.json"} <= names
    table = found.table.read_text().splitlines()
    assert len(table) == 7 and table[0] == "recipe,checkpoint,quantity,ours,published"

    monkeypatch.setattr("shortllm.model.loading.load_model", None)  # needing a model would fail
    monkeypatch.setattr("shortllm.benchmark.bench.load_model", None)
    with caplog.at_level(logging.INFO, logger="shortllm"):
        again = measure_released(recipes, out=out)
    assert again == found and caplog.text.count("eval.json is up to date") == 2


@pytest.mark.usefixtures("texts")
def test_recipes_run_published_prints_a_table_and_says_what_is_missing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "recipes"
    directory.mkdir()
    for name, checkpoint in (("here", str(embedded.MODEL_DIR)), ("gone", "nobody/has-this")):
        figures = FIGURES.model_dump(mode="json")
        published = {
            "source": "a paper", "checkpoint": checkpoint, "criterion": "ppl", "order": [0],
            "released": figures,
        }  # fmt: skip
        (directory / f"{name}.yaml").write_text(yaml.safe_dump({"published": published}))
    monkeypatch.setattr("shortllm.recipe.DIRECTORY", directory)
    flags = [
        "--out", tmp_path / "out", "--no-bench", "--continuations", "0", "--eval-data", "ptb",
        "--device", "cpu",
    ]  # fmt: skip
    code, out, _ = call(capfd, "recipes", "run", "published", *flags)
    assert code == 2
    lines = out.splitlines()
    assert lines[0] == "ours | published" and lines[2].startswith("model ")
    assert "| 4.000" in lines[2] and "| 5.000" in lines[2] and "– | 60.000" in lines[2]
    assert lines[-1].startswith("left out: gone ('nobody/has-this' is not a local directory")
    code, out, _ = call(capfd, "recipes", "run", "published", *flags, "--json")
    assert code == 2 and set(json.loads(out)["failed"]) == {"gone"}


# ---- special tokens


@pytest.fixture
def misled(tmp_path: Path) -> Path:
    """The embedded model with files that name other special tokens than it was trained with."""
    directory = shutil.copytree(embedded.MODEL_DIR, tmp_path / "misled")
    right, wrong = load_tokenizer(open_checkpoint("embedded")), 7
    token = right.convert_ids_to_tokens(wrong)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((directory / name).read_text())
        content |= {"bos_token_id": wrong, "pad_token_id": 3}
        (directory / name).write_text(json.dumps(content))
    content = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(content | {"bos_token": token}))
    content = json.loads((directory / "tokenizer.json").read_text())
    template = json.dumps(content["post_processor"])
    template = template.replace(json.dumps(right.bos_token), json.dumps(token))
    template = template.replace(f'"ids": [{right.bos_token_id}]', f'"ids": [{wrong}]')
    content["post_processor"] = json.loads(template)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(open_checkpoint(directory))("There").input_ids[0] == wrong
    return directory


def test_special_tokens_are_put_right_where_text_is_tokenized_and_in_what_is_written(
    misled: Path, tmp_path: Path
) -> None:
    right = load_tokenizer(open_checkpoint("embedded"))
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(list(embedded.rows("test", 60))))
    recipe = Recipe.model_validate(
        {
            "model": str(misled),
            "special_tokens": {
                "bos": right.bos_token_id, "eos": right.eos_token_id, "pad": right.pad_token_id,
            },
            "budget": {"remove": 2},
            "calibration": {
                "data": str(rows), "samples": 2, "length": 32, "bos_every_sample": True,
            },
            "evaluation": {"max_segments": 4, "continuations": 0, "bos": "every"},
        }
    )  # fmt: skip
    result = pipeline.run(recipe=recipe, out=tmp_path / "run")
    same = pipeline.run(
        recipe=recipe.model_copy(update={"model": "embedded", "special_tokens": {}}),
        out=tmp_path / "same",
    )
    ours, theirs = ([one.perplexity[0] for one in run.evaluation.models] for run in (result, same))
    assert ours == theirs and ours[0].bos == "every"
    assert result.plan.removed == same.plan.removed
    pruned = result.checkpoints["pruned"]
    for name in ("config.json", "generation_config.json"):
        content = json.loads((pruned / name).read_text())
        assert content["bos_token_id"] == right.bos_token_id
        assert content["pad_token_id"] == right.pad_token_id
    written = load_tokenizer(open_checkpoint(pruned))
    assert written.bos_token_id == right.bos_token_id
    for text in ("There was a drum.", ""):
        assert written(text).input_ids == right(text).input_ids
    wrong = pipeline.run(
        recipe=recipe.model_copy(update={"special_tokens": {}}), out=tmp_path / "run"
    )
    assert wrong.evaluation.models[0].perplexity[0] != ours[0]
    assert json.loads((pruned / "config.json").read_text())["bos_token_id"] == 7


def test_a_special_token_that_does_not_exist_is_named(misled: Path) -> None:
    with pytest.raises(CheckpointError, match="has no token 99999 to use as "):
        load_tokenizer(open_checkpoint(misled, special_tokens={"bos": 99999}))


def test_a_conversion_without_any_special_token_is_put_right(tmp_path: Path) -> None:
    """As that of decapoda: empty strings, where the vocabulary begins with <unk>, <s>, </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory = shutil.copytree(embedded.MODEL_DIR, tmp_path / "empty")
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LlamaTokenizer"}
        )
    )
    special = RECIPES["llama-1-7b-ppl"].special_tokens
    found = load_tokenizer(open_checkpoint(directory, special_tokens=special))
    assert found("a").input_ids == [1, 5]
    assert (found.bos_token_id, found.eos_token_id, found.unk_token_id) == (1, 2, 0)
