"""A whole run on the embedded model: its files, what is redone, being killed anywhere."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import children
import pytest

import shortllm
from shortllm import embedded, pipeline
from shortllm.data.options import CalibrationOptions
from shortllm.errors import OutputError, ShortLLMError
from shortllm.evaluation.options import Evaluation, EvaluationOptions
from shortllm.evaluation.texts import prepare_texts
from shortllm.files import LOCK, hold, releasing
from shortllm.pruning.records import BlockScores, PrunePlan
from shortllm.recipe import Recipe
from shortllm.run_directory import LOG, claim_directory

RECIPE = Recipe(
    budget=shortllm.Budget(remove=2),
    calibration=CalibrationOptions(samples=4, length=64),
    evaluation=EvaluationOptions(max_segments=12, continuations=1, new_tokens=8),
)
COMMAND = ["shortllm", "run", "embedded", "--remove", "2"]


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a run but its log, without the part that may differ between equal runs."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name not in (LOCK, LOG):
            data = path.read_bytes()
            if path.name in ("scores.json", "prune.json"):
                data = json.dumps({**json.loads(data), "cost": None}).encode()
            found[str(path.relative_to(directory))] = data
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    directory = tmp_path_factory.mktemp("run") / "finished"
    pipeline.run(recipe=RECIPE, out=directory, command=COMMAND)
    return directory


def test_a_run_writes_every_file_of_the_run_directory(finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if path.name != LOCK}
    assert names == {
        "run.json",
        "run.log",
        "calibration.safetensors",
        "calibration.json",
        "scores.json",
        "plan.json",
        "pruned",
        "eval.json",
        "report.html",
        "README.md",
    }
    scores = BlockScores.load(finished / "scores.json")
    plan = PrunePlan.load(finished / "plan.json")
    evaluation = Evaluation.load(finished / "eval.json")
    assert len(scores.importance) == scores.model.blocks
    assert plan.scores == scores.fingerprint
    assert [model.name for model in evaluation.models] == ["original", "pruned"]
    original, pruned = evaluation.models
    assert pruned.model.blocks == original.model.blocks - 2
    assert pruned.perplexity[0].perplexity > original.perplexity[0].perplexity
    config = json.loads((finished / "pruned" / "config.json").read_text())
    assert config["shortllm"]["removed_blocks"] == plan.removed
    assert config["num_hidden_layers"] == len(plan.kept)


def test_the_same_run_again_does_nothing(
    finished: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    monkeypatch.setattr("shortllm.model.loading.load_model", None)  # needing the model would fail
    with caplog.at_level(logging.INFO, logger="shortllm"):
        pipeline.run(recipe=RECIPE, out=finished, command=COMMAND)
    for name in ("scores.json", "pruned", "eval.json"):
        assert f"{name} is up to date, skipped" in caplog.text
    pruned = finished / "pruned" / "model.safetensors"
    assert pruned.stat().st_mtime_ns == before[pruned]


def test_another_budget_reuses_the_scores_and_redoes_the_rest(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(finished, directory)
    other = RECIPE.model_copy(update={"budget": shortllm.Budget(remove=3)})
    with caplog.at_level(logging.INFO, logger="shortllm"):
        with pytest.raises(OutputError, match=r"budget.remove: 2, now 3\)\. .*--overwrite"):
            pipeline.run(recipe=other, out=directory, command=COMMAND)
        assert contents(directory) == contents(finished)
        result = pipeline.run(recipe=other, out=directory, command=COMMAND, overwrite=True)
    assert "scores.json is up to date, skipped" in caplog.text
    assert "pruned is up to date" not in caplog.text
    assert len(result.plan.removed) == 3
    assert shortllm.open_checkpoint(str(result.checkpoints["pruned"])).block_count == 9


def scoring_has_begun(directory: Path) -> bool:
    return (directory / "calibration.json").exists()


def scoring_has_ended(directory: Path) -> bool:
    return (directory / "scores.json").exists()


def surgery_has_begun(directory: Path) -> bool:
    return (directory / "pruned.partial" / "model.safetensors").exists()


def evaluation_has_begun(directory: Path) -> bool:
    return (directory / "pruned").exists()


def evaluation_has_ended(directory: Path) -> bool:
    return (directory / "eval.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        scoring_has_begun,
        scoring_has_ended,
        surgery_has_begun,
        evaluation_has_begun,
        evaluation_has_ended,
    ],
)
def test_killed_at_any_moment_the_same_command_completes_with_the_same_files(
    moment: Callable[[Path], bool], finished: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "killed"
    ended = children.killed_when(
        lambda: moment(directory), children.run, RECIPE.model_dump_json(), directory, COMMAND
    )
    assert moment(directory), "the moment never came"
    assert ended == -signal.SIGKILL, "the run ended before it could be killed"
    pipeline.run(recipe=RECIPE, out=directory, command=COMMAND)
    assert contents(directory) == contents(finished)


def test_a_directory_with_other_things_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not empty and not a run of shortllm"):
        pipeline.run(recipe=RECIPE, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_of_another_model_is_refused(finished: Path, tmp_path: Path) -> None:
    run_file = tmp_path / "run.json"
    run_file.write_text(
        (finished / "run.json").read_text().replace('"fingerprint": "', '"fingerprint": "0')
    )
    (tmp_path / "scores.json").write_bytes((finished / "scores.json").read_bytes())
    with pytest.raises(OutputError, match="is a run of another model"):
        pipeline.run(recipe=RECIPE, out=tmp_path)


def test_too_little_space_is_found_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 99, 1))
    with pytest.raises(OutputError, match="MiB are needed, 1 bytes are free"):
        pipeline.run(recipe=RECIPE, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        pipeline.run(recipe=RECIPE, out=tmp_path / "file")
    with pytest.raises(OutputError, match="is a file"):
        pipeline.run(recipe=RECIPE, out=tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criterion": "perplexity"}, "unknown criterion 'perplexity'"),
        ({"budget": shortllm.Budget(remove=11)}, "cannot remove 11 of 12 blocks: 5 are protected"),
        ({"model": "no/such/model"}, "no such directory"),
        ({"calibration": CalibrationOptions(data="wikitxt2")}, "Did you mean 'wikitext2'"),
        ({"calibration": CalibrationOptions(length=4096)}, "Use --sampler packed|exceed the"),
        ({"evaluation": EvaluationOptions(length=4096)}, "exceed the 512 positions"),
        ({"calibration": CalibrationOptions(data="a", file=Path("b"))}, "Leave one of them out"),
        ({"device": "cuda:99"}, "--device cuda:99 cannot be used"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(
    changes: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shortllm.model.loading.load_model", None)
    with pytest.raises(ShortLLMError, match=message):
        pipeline.run(recipe=RECIPE.model_copy(update=changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_killed_start_does_not_lock_the_directory(tmp_path: Path) -> None:
    (tmp_path / "run.json.partial").write_text("{")
    checkpoint = shortllm.open_checkpoint("embedded")
    claim_directory(tmp_path, checkpoint)


HOLD = """
import sys, time
from pathlib import Path
from shortllm.files import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_into_a_directory_is_told_who_holds_it(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, directory], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=f"being written by process {holder.pid} on .* since"):
            pipeline.run(recipe=RECIPE, out=directory)
        assert [path.name for path in directory.iterdir()] == [LOCK]
    finally:
        holder.kill()
        holder.wait()
    pipeline.run(recipe=RECIPE, out=directory)  # a killed process holds nothing
    with releasing():
        hold(directory)  # and neither does a run that has ended
    assert (directory / "report.html").exists()


def test_no_row_both_calibrates_and_is_measured(tmp_path: Path) -> None:
    rows = [f"{number}. {row}" for number, row in enumerate(embedded.rows("test", 40))]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    checkpoint = shortllm.open_checkpoint("embedded")
    spelled = f"{tmp_path}/../{tmp_path.name}/rows.json"
    for calibrating, measuring in ((str(path), str(path)), (str(path), spelled)):
        texts = prepare_texts(
            checkpoint,
            CalibrationOptions(data=calibrating, samples=2, length=64),
            EvaluationOptions(data=[measuring]),
        )
        assert texts.calibration is not None and texts.calibration.info.rows == (0, 20)
        assert (texts.evaluation[0].rows.start, texts.evaluation[0].held_out) == (20, True)
    texts.calibration.save(tmp_path / "earlier")
    again = prepare_texts(
        checkpoint,
        CalibrationOptions(file=tmp_path / "earlier"),
        EvaluationOptions(data=[str(path)]),
    )
    assert again.evaluation[0].rows.start == 20


def test_a_damaged_result_is_made_again(finished: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(finished, directory)
    weights = directory / "pruned" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (directory / "eval.json").write_text("{}")
    pipeline.run(recipe=RECIPE, out=directory, command=COMMAND)
    assert contents(directory) == contents(finished)


def test_blocks_by_hand_need_no_scoring(tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"budget": shortllm.Budget(blocks=[4, 6])})
    result = pipeline.run(recipe=recipe, out=tmp_path / "run", command=COMMAND)
    assert result.plan.removed == [4, 6]
    assert not (tmp_path / "run" / "scores.json").exists()
    assert not (tmp_path / "run" / "calibration.json").exists()
    assert result.report.exists()
