"""Tasks: local documents, scores against a plain measurement, runs, mistakes, report."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shortllm
from shortllm import embedded, pipeline
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.cli import main
from shortllm.errors import CheckpointError, DataError, ShortLLMError
from shortllm.evaluation.evaluate import mean_score
from shortllm.evaluation.options import Evaluation, EvaluationOptions
from shortllm.evaluation.task_names import EMBEDDED_TASKS, METRICS, check_tasks, task_names
from shortllm.evaluation.tasks import TaskSet, load_tasks, measure_tasks, require_harness
from shortllm.model import Session
from shortllm.recipe import Recipe
from shortllm.reporting import run_page, write_report
from shortllm.reporting.load import load_results
from shortllm.reporting.measurements import task_table, tasks_section

pytest.importorskip("lm_eval")

PLACES = ("river", "garden", "market", "attic", "hall", "cellar")


def choices(place: int) -> dict[str, list[str]]:
    return {"text": [PLACES[place], PLACES[place - 1], PLACES[place - 2]], "label": list("ABC")}


DOCUMENTS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "boolq": (
        "boolq/validation.jsonl",
        lambda i: {
            "passage": f"The lamp is in the {PLACES[i]}.",
            "question": f"is the lamp in the {PLACES[i % 4]}",
            "idx": i,
            "label": int(i < 4),
        },
    ),
    "piqa": (
        "piqa/validation.jsonl.gz",
        lambda i: {
            "goal": "Find the lamp",
            "sol1": f"Walk to the {PLACES[i]}.",
            "sol2": f"Walk from the {PLACES[i]} to the {PLACES[i - 1]}.",
            "label": i % 2,
        },
    ),
    "hellaswag": (
        "hellaswag/validation.jsonl",
        lambda i: {
            "activity_label": "Walking",
            "ctx_a": f"Tom is in the {PLACES[i]}.",
            "ctx_b": "he",
            "endings": [f"walks to the {PLACES[i - j]}." for j in range(4)],
            "label": str(i % 4),
        },
    ),
    "winogrande": (
        "winogrande/validation.jsonl",
        lambda i: {
            "sentence": f"The _ was carried to the {PLACES[i]}.",
            "option1": "lamp",
            "option2": "mirror",
            "answer": str(1 + i % 2),
        },
    ),
    "arc_easy": (
        "arc/ARC-Easy/test.jsonl",
        lambda i: {"question": "Where is it?", "choices": choices(i), "answerKey": "ABC"[i % 3]},
    ),
    "arc_challenge": (
        "arc/ARC-Challenge/test.json",
        lambda i: {"question": "Where was it?", "choices": choices(i), "answerKey": "ABC"[i % 3]},
    ),
    "openbookqa": (
        "openbookqa/test.jsonl",
        lambda i: {"question_stem": "It is in the", "choices": choices(i), "answerKey": "B"},
    ),
}
"""Task -> its file, and its document number i in the columns of the Hub's data set."""


def write(path: Path, records: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".json":
        text = json.dumps(records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with six documents of each of the seven tasks."""
    directory = tmp_path_factory.mktemp("tasks")
    for file, document in DOCUMENTS.values():
        write(directory / file, [document(i) for i in range(6)])
    return directory


def evaluate(*models: str, **options: Any) -> Evaluation:
    return shortllm.evaluate(models, options=EvaluationOptions(continuations=0, **options))


def loaded(tasks: list[str], **options: Any) -> TaskSet:
    return load_tasks(EvaluationOptions(tasks=tasks, **options))


def scores(evaluation: Evaluation, model: int = 0) -> dict[str, float]:
    return {score.task: score.score for score in evaluation.models[model].zeroshot}


def test_sets_are_spelled_out_and_every_name_is_taken_once() -> None:
    assert task_names(["paper"]) == list(METRICS)
    assert task_names(["embedded"]) == [f"shortllm_{task.name}" for task in embedded.tasks()]
    assert task_names(["piqa", " sciq", "paper", ""])[:3] == ["piqa", "sciq", "boolq"]
    assert len(task_names(["piqa", "paper", "embedded"])) == len(METRICS) + len(EMBEDDED_TASKS)


def test_the_seven_tasks_from_local_files(data: Path, tmp_path: Path) -> None:
    evaluation = shortllm.evaluate(
        ["embedded"],
        tasks=["paper"],
        options=EvaluationOptions(task_data=data, continuations=0),
        out=tmp_path / "eval.json",
    )
    [model] = evaluation.models
    assert {score.task: score.metric for score in model.zeroshot} == METRICS
    assert model.perplexity == []
    for score in model.zeroshot:
        assert (score.documents, score.shots) == (6, 0)
        assert score.score * 6 == pytest.approx(round(score.score * 6))
        # that of a share among six
        expected = (score.score * (1 - score.score) / 5) ** 0.5
        assert score.stderr == pytest.approx(expected)
    values = [score.score for score in model.zeroshot]
    assert model.zeroshot_mean == pytest.approx(sum(values) / 7)
    assert evaluation.versions["lm_eval"] == require_harness()
    assert Evaluation.load(tmp_path / "eval.json") == evaluation

    tasks, metrics, percent = csv.reader((tmp_path / "zeroshot.csv").read_text().splitlines())
    assert tasks == [*METRICS, "AVE"]
    assert metrics == [*METRICS.values(), "n/a"]
    assert [float(cell) for cell in percent[:-1]] == pytest.approx([100 * v for v in values])
    assert float(percent[-1]) == pytest.approx(sum(float(cell) for cell in percent[:-1]) / 7)


def test_the_labels_of_the_files_are_the_ones_compared_with(data: Path, tmp_path: Path) -> None:
    """With two choices, turning every label over turns the accuracy over."""
    plain = evaluate("embedded", tasks=["boolq", "piqa"], task_data=data)
    for name in ("boolq", "piqa"):
        file, document = DOCUMENTS[name]
        turned = [{**document(i), "label": 1 - document(i)["label"]} for i in range(6)]
        write(tmp_path / file, turned)
    other = evaluate("embedded", tasks=["boolq", "piqa"], task_data=tmp_path)
    assert scores(other) == {
        task: pytest.approx(1 - score) for task, score in scores(plain).items()
    }
    assert 0 < sum(scores(plain).values()) < 2


def test_the_directory_of_SHORTLLM_DATA_is_looked_up(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = loaded(["openbookqa"], task_data=data)
    monkeypatch.setenv("SHORTLLM_DATA", str(data))
    assert loaded(["openbookqa"]).documents == given.documents


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model without five of its blocks."""
    return shortllm.prune(
        "embedded", [3, 4, 5, 6, 7], tmp_path_factory.mktemp("short") / "short", verify=False
    )


@pytest.mark.slow
def test_embedded_tasks_score_as_a_plain_measurement_does(short: Path) -> None:
    """Both models: the harness, with documents loaded once, against torch and nothing else."""
    from measure import task_accuracy

    evaluation = evaluate("embedded", str(short), tasks=["embedded"], limit=20)
    for place, directory in enumerate((embedded.MODEL_DIR, short)):
        checkpoint = shortllm.open_checkpoint(str(directory))
        model = Session(device="cpu").decoder(checkpoint).model
        tokenizer = load_tokenizer(checkpoint)
        for task, score in zip(embedded.tasks(), evaluation.models[place].zeroshot, strict=True):
            assert score.task == f"shortllm_{task.name}"
            acc, acc_norm = task_accuracy(model, tokenizer, task.documents()[:20])
            assert score.score == pytest.approx(acc)
            assert score.others["acc_norm"] == pytest.approx(acc_norm)
    whole, shortened = (model.zeroshot_mean for model in evaluation.models)
    assert whole is not None and shortened is not None and shortened < whole - 0.1


def test_what_was_asked_is_in_the_fingerprint(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "copy")
    names = ["boolq", "openbookqa"]
    one = loaded(names, task_data=data, limit=4)
    assert loaded(names, task_data=tmp_path / "copy", limit=4).fingerprint == one.fingerprint
    file, document = DOCUMENTS["boolq"]
    write(tmp_path / "copy" / file, [document(i) for i in range(5)])
    assert loaded(names, task_data=tmp_path / "copy", limit=4).fingerprint == one.fingerprint
    changed = {**document(3), "label": 1 - document(3)["label"]}
    write(tmp_path / "copy" / file, [*(document(i) for i in range(3)), changed])
    others = [
        loaded(names, task_data=tmp_path / "copy", limit=4),
        loaded(names, task_data=data, limit=5),
        loaded(names[:1], task_data=data, limit=4),
        loaded(names, task_data=data, limit=4, batch_size=3),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_a_mean_is_one_of_accuracies_only(data: Path) -> None:
    found = evaluate("embedded", tasks=["boolq", "openbookqa"], task_data=data).models[0].zeroshot
    assert mean_score(found) == pytest.approx((found[0].score + found[1].score) / 2)
    perplexity = found[0].model_copy(update={"metric": "word_perplexity", "score": 31.0})
    assert mean_score([perplexity, found[1]]) is None
    assert mean_score([]) is None


RECIPE = Recipe(
    budget=shortllm.Budget(blocks=[5, 6, 7]),
    evaluation=EvaluationOptions(
        max_segments=8, continuations=0, tasks=["shortllm_where", "shortllm_count"], limit=12
    ),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "run"
    pipeline.run(recipe=RECIPE, out=directory)
    return directory


def test_a_run_puts_the_tasks_to_both_models_once(
    finished: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluation = Evaluation.load(finished / "eval.json")
    rows = list(csv.reader((finished / "zeroshot.csv").read_text().splitlines()))
    assert rows[0] == ["model", "shortllm_where", "shortllm_count", "AVE"]
    assert rows[1] == ["metric", "acc", "acc", "n/a"]
    for row, model in zip(rows[2:], evaluation.models, strict=True):
        assert row[0] == model.name
        means = [*(score.score for score in model.zeroshot), model.zeroshot_mean]
        assert [float(cell) for cell in row[1:]] == pytest.approx([100 * m for m in means])
        assert model.perplexity[0].perplexity > 1

    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    (directory / "zeroshot.csv").unlink()
    with monkeypatch.context() as context, caplog.at_level(logging.INFO, logger="shortllm"):
        context.setattr("shortllm.model.loading.load_model", None)  # needing the model would fail
        pipeline.run(recipe=RECIPE, out=directory)
    assert "eval.json is up to date, skipped" in caplog.text
    assert (directory / "zeroshot.csv").read_bytes() == (finished / "zeroshot.csv").read_bytes()

    for change in ({"limit": 5}, {"tasks": []}):
        changed = RECIPE.evaluation.model_copy(update=change)
        recipe = RECIPE.model_copy(update={"evaluation": changed})
        pipeline.run(recipe=recipe, out=directory, overwrite=True)
        measured = Evaluation.load(directory / "eval.json").models[1].zeroshot
        assert [score.documents for score in measured] == ([5, 5] if changed.tasks else [])
    assert not (directory / "zeroshot.csv").exists()


def test_the_report_shows_every_score(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = load_results(finished)
    original, pruned = results.evaluated["original"], results.evaluated["pruned"]
    head, rows = task_table([original, pruned]).plain()
    assert head == ("task", "original", "pruned")
    for row, before, after in zip(rows, original.zeroshot, pruned.zeroshot, strict=False):
        assert row[0] == f"{before.task} (acc [%], 12 documents)"
        numbers = [re.findall(r"[\d.]+", text)[0] for text in row[1:3]]
        assert numbers == [f"{100 * score.score:.2f}" for score in (before, after)]
        points = re.sub(r"[^\d.±−]", "", row[2].split("(")[1]).replace("−", "-").strip("±")
        assert float(points) == pytest.approx(100 * (after.score - before.score), abs=0.05)
    assert [row[0].split(" ")[0] for row in rows] == ["shortllm_where", "shortllm_count", "mean"]

    monkeypatch.setattr(run_page, "sections_of", lambda results: [tasks_section(results)])
    page = write_report(finished).read_text()
    assert "<h2>Tasks</h2>" in page and "shortllm_where" in page
    assert f"lm-evaluation-harness {require_harness()}" in page
    for row in rows:
        assert all(text in page for cell in row[1:] for text in cell.strip(")").split(" ("))


def test_a_run_without_tasks_has_no_such_section(finished: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    content = json.loads((directory / "eval.json").read_text())
    for model in content["models"]:
        model["zeroshot"] = []
    (directory / "eval.json").write_text(json.dumps(content))
    assert tasks_section(load_results(directory)) is None


def test_a_group_scores_by_its_own_metric_and_a_tag_by_its_tasks(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    (tmp_path / "both.yaml").write_text(
        "group: both\n"
        "task: [shortllm_where, shortllm_who]\n"
        "aggregate_metric_list:\n"
        "  - {metric: acc, aggregation: mean, weight_by_size: true}\n"
    )
    singly = loaded(["shortllm_where", "shortllm_who"], limit=10)
    index = TaskManager(include_defaults=False, include_path=[embedded.TASKS_DIR, tmp_path])
    group = loaded(["shortllm_where"], limit=10).__class__(
        loaded=dict(index.load(["both"])),
        members={"both": ["shortllm_where", "shortllm_who"]},
        documents=singly.documents,
        examples={},
        prompts=singly.prompts,
        limit=10,
        batch_size=8,
        version=singly.version,
    )
    checkpoint = shortllm.open_checkpoint("embedded")
    model = Session(device="cpu").decoder(checkpoint).model
    tokenizer = load_tokenizer(checkpoint)
    where, who = measure_tasks(model, tokenizer, singly, name="one")
    [both] = measure_tasks(model, tokenizer, group, name="one")
    assert (both.task, both.metric, both.documents) == ("both", "acc", 20)
    assert both.score == pytest.approx((where.score + who.score) / 2)


@pytest.mark.slow
def test_any_other_task_of_the_harness_by_its_name(tmp_path: Path) -> None:
    records = [
        {
            "support": f"The lamp is in the {place}.",
            "question": "Where is the lamp?",
            "correct_answer": f"the {place}",
            **{f"distractor{j}": f"the {PLACES[i - j]}" for j in (1, 2, 3)},
        }
        for i, place in enumerate(PLACES)
    ]
    write(tmp_path / "sciq" / "test.jsonl", records)
    found = evaluate("embedded", tasks=["sciq"], task_data=tmp_path).models[0].zeroshot
    assert [(score.task, score.metric, score.documents) for score in found] == [("sciq", "acc", 6)]
    tagged = evaluate("embedded", tasks=["shortllm_embedded"], limit=2).models[0].zeroshot
    assert {score.task for score in tagged} == set(EMBEDDED_TASKS)


@pytest.mark.parametrize(
    "known", ["boolq", "paper", "shortllm_embedded", "mmlu_anatomy", "ai2_arc", "agieval_cn"]
)
def test_names_are_known_without_the_harness(known: str) -> None:
    check_tasks([known])


@pytest.mark.parametrize(
    ("name", "near"), [("bolq", "boolq"), ("mmlu_anatomi", "mmlu_anatomy"), ("chatt", "chat")]
)
def test_unknown_names_are_refused_without_the_harness(name: str, near: str) -> None:
    with pytest.raises(ShortLLMError, match=f"unknown task '{name}'. Did you mean '{near}'"):
        check_tasks(["boolq", name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["boolk"], "unknown task 'boolk'. Did you mean 'boolq'.*Available: paper, chat, embedded"),
        (["shortllm_embedded", "embedded"], "requested twice, by 'shortllm_embedded' and by"),
    ],
)
def test_names_that_cannot_be_are_refused(asked: list[str], message: str) -> None:
    with pytest.raises(ShortLLMError, match=message):
        loaded(asked)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (None, r"has no boolq/validation.jsonl for task 'boolq'"),
        ([], "is not a list of records"),
        (["text"], "is not a list of records"),
        ([{"question": "is it", "label": 1}], "documents of task 'boolq' cannot be used.*passage"),
    ],
)
def test_documents_that_cannot_be_used_are_refused(
    records: list[Any] | None, message: str, tmp_path: Path
) -> None:
    if records is not None:
        write(tmp_path / "boolq" / "validation.jsonl", records)
    with pytest.raises(DataError, match=message):
        loaded(["boolq"], task_data=tmp_path)


def test_without_local_documents_the_hub_is_asked() -> None:
    with pytest.raises(DataError, match=r"'piqa' cannot be used: .*piqa.* give --task-data DIR"):
        loaded(["piqa"])


def test_a_streamed_model_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"stream": True})
    with pytest.raises(ShortLLMError, match="read one block at a time .* Leave --tasks out"):
        pipeline.run(recipe=recipe, out=tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_without_the_extra_the_error_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['lm_eval'] = None; from shortllm.cli import main; main()"
    command = [sys.executable, "-c", code, "eval", "embedded", "--tasks", "embedded"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'shortllm[eval]'" in done.stderr and "Traceback" not in done.stderr


def test_a_model_that_answers_nan_is_no_model_at_chance() -> None:
    checkpoint = shortllm.open_checkpoint("embedded")
    model: Any = Session(device="cpu").decoder(checkpoint).model
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    tasks = loaded(["shortllm_where"], limit=2)
    with pytest.raises(CheckpointError, match="logits are NaN"):
        measure_tasks(model, load_tokenizer(checkpoint), tasks, name="broken")


def test_the_command_prints_a_table_or_one_line_of_json(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "embedded", "--tasks", "boolq,shortllm_count", "--task-data", str(data)]
    command += ["--limit", "5", "--batch-size", "3", "--out", str(tmp_path / "mine.json")]
    with pytest.raises(SystemExit):
        main(command)
    out, err = capfd.readouterr()
    tasks = (r"boolq \(acc \[%\], .*\) +\d+\.\d\d ± \d", r"shortllm_count \(acc")
    for line in (*tasks, r"mean \[%\] +\d"):
        assert re.search(line, out)
    # no bars and no advice of the harness
    [note] = [line for line in err.splitlines() if "[1/1] eval" not in line]
    assert "task boolq is read from " in note
    assert (tmp_path / "mine-zeroshot.csv").is_file()
    with pytest.raises(SystemExit):
        main([*command, "--json"])
    out, _ = capfd.readouterr()
    assert out.count("\n") == 1
    assert [score["documents"] for score in json.loads(out)["models"][0]["zeroshot"]] == [5, 5]


@pytest.mark.slow
@pytest.mark.shared
def test_scores_equal_those_of_the_harness_alone(shared: Path, tmp_path: Path) -> None:
    """Its own command, on the shortened checkpoint, with descriptions of the tasks not ours."""
    short = shortllm.prune(
        str(shared / "models" / "stories260K"), [2], tmp_path / "short", verify=False
    )
    ours = evaluate(str(short), tasks=["paper"], task_data=shared / "data", limit=20)
    makes = shared / "lm_eval_tasks" / "make_tasks.py"
    subprocess.run([sys.executable, makes, tmp_path / "tasks"], check=True, capture_output=True)
    names = ",".join(f"{task}_local" for task in METRICS)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={short},dtype=float32", "--batch_size", "8"]
    command += ["--include_path", tmp_path / "tasks", "--tasks", names, "--limit", "20"]
    command += ["--output_path", tmp_path / "out"]
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(command, check=True, capture_output=True, env=environment)
    [written] = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]
    for score in ours.models[0].zeroshot:
        alone = theirs[f"{score.task}_local"]
        assert score.score == pytest.approx(alone[f"{score.metric},none"], abs=1e-12)
        assert score.stderr == pytest.approx(alone[f"{score.metric}_stderr,none"], abs=1e-12)
        for metric, value in score.others.items():
            assert value == pytest.approx(alone[f"{metric},none"], abs=1e-12)
    assert len(theirs) == len(METRICS)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("text", ["wikitext2/wiki.test.raw", "ptb/ptb.valid.txt"])
@pytest.mark.parametrize("name", ["stories260K", "stories10L", "stories10L-redundant", "books5M"])
def test_perplexity_is_reproduced_by_the_script_in_docs(
    name: str,
    text: str,
    shared: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The two protocols, the longer one as long as the model has positions, and both BOS rules."""
    model, file = str(shared / "models" / name), str(shared / "data" / text)
    monkeypatch.setenv("SHORTLLM_DATA", str(shared / "data"))
    script = Path(__file__).parents[1] / "docs" / "reproduce_perplexity.py"
    positions = shortllm.open_checkpoint(model).config.max_position_embeddings
    for length, count in ((128, 24), (min(2048, positions - 1), 4)):
        for bos in ("first", "every"):
            arguments = [model, file, str(length), bos, str(count)]
            monkeypatch.setattr(sys, "argv", [str(script), *arguments])
            capsys.readouterr()
            runpy.run_path(str(script))
            printed = float(capsys.readouterr().out)
            [measured] = shortllm.evaluate(
                [model],
                options=EvaluationOptions(
                    data=[text.split("/")[0]],
                    length=length,
                    bos=bos,
                    max_segments=count,
                    continuations=0,
                ),
                dtype="float32",
            ).models
            assert measured.perplexity[0].segments == count
            assert measured.perplexity[0].perplexity == pytest.approx(printed, rel=1e-5)
