"""A Hub model is resolved to a commit once; what later commands use is that commit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, config_of, save
from hub import commit_of, fill_cache, move
from retraining import options, text, whole
from safetensors.torch import load_file, save_file

import shortllm
from shortllm import pipeline
from shortllm.checkpoint.source import open_checkpoint
from shortllm.checkpoint.tensors import SAFETENSORS
from shortllm.data.options import CalibrationOptions
from shortllm.errors import CheckpointError, OutputError
from shortllm.evaluation.options import EvaluationOptions

ID = "acme/tiny"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return whole(tmp_path / "old")


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """The same model with other weights."""
    directory = whole(tmp_path / "new")
    tensors = load_file(directory / SAFETENSORS)
    changed = {name: tensor * 1.01 for name, tensor in tensors.items()}
    save_file(changed, directory / SAFETENSORS, metadata={"format": "pt"})
    return directory


@pytest.fixture
def repository(old: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`acme/tiny` in the cache: the branch stands at the old model, a tag at the new one."""
    return fill_cache(tmp_path / "cache", ID, {"main": old, "v2": new}, monkeypatch)


def calibration(place: Path) -> CalibrationOptions:
    return CalibrationOptions(data=str(text(place / "rows.jsonl")), samples=2, length=16)


def measured(place: Path) -> EvaluationOptions:
    rows = str(text(place / "rows.jsonl"))
    return EvaluationOptions(data=[rows], length=16, max_segments=2, continuations=0)


def recipe(place: Path, **changes: Any) -> shortllm.Recipe:
    return shortllm.Recipe(
        model=ID,
        calibration=calibration(place),
        evaluation=measured(place),
        budget=shortllm.Budget(remove=2),
        **changes,
    )


def test_a_branch_a_tag_and_a_commit(repository: Path, old: Path, new: Path) -> None:
    for source, revision, expected in (
        (ID, None, old),
        (ID, "main", old),
        (ID, "v2", new),
        (f"{ID}@v2", None, new),
        (f"{ID}@{commit_of(new)}", None, new),
        (ID, commit_of(old), old),
        (f"{ID}@main", "main", old),
    ):
        checkpoint = open_checkpoint(source, revision=revision)
        assert (checkpoint.id, checkpoint.revision) == (ID, commit_of(expected))
        assert checkpoint.directory == repository / "snapshots" / commit_of(expected)
        assert checkpoint.info().revision == commit_of(expected)


@pytest.mark.parametrize(
    "source, revision, message",
    [
        (f"{ID}@v2", "main", "names revision v2, and --revision names main. Give one of them"),
        (f"{ID}@", None, "is not of the form MODEL@REVISION"),
        (f"{ID}@v3", None, "not in the local Hub cache at revision v3"),
        ("acme/other@main", None, "not in the local Hub cache at revision main"),
    ],
)
def test_a_revision_that_there_is_not(
    source: str, revision: str | None, message: str, repository: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(source, revision=revision)


def test_a_directory_may_have_the_sign_in_its_name(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old.rename("tiny@home")
    for source in ("./tiny@home", str(tmp_path / "tiny@home"), "tiny@home"):
        checkpoint = open_checkpoint(source)
        assert (checkpoint.id, checkpoint.revision) == (source, None)
    with pytest.raises(CheckpointError, match="no such directory: ./tiny@work"):
        open_checkpoint("./tiny@work")
    Path("acme").mkdir()
    Path("tiny@home").rename("acme/tiny")
    assert open_checkpoint("acme/tiny").revision is None
    with pytest.raises(CheckpointError, match="'acme/tiny' is a local directory and has no rev"):
        open_checkpoint("acme/tiny@main")


def test_a_run_stays_at_its_commit(
    repository: Path, old: Path, new: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, asked = tmp_path / "run", recipe(tmp_path)
    first = pipeline.run(recipe=asked, out=run)
    move(repository, "main", new)
    with caplog.at_level(logging.INFO, logger="shortllm"):
        again = pipeline.run(recipe=asked, out=run)
    assert f"continuing with revision {commit_of(old)} of {run}" in caplog.text
    assert again.evaluation == first.evaluation and again.plan == first.plan
    held = json.loads((run / "run.json").read_text())
    assert held["model"]["revision"] == commit_of(old) == first.plan.model.revision
    provenance = json.loads((run / "pruned" / "config.json").read_text())["shortllm"]
    assert (provenance["source"], provenance["revision"]) == (ID, commit_of(old))
    fresh = pipeline.run(recipe=asked, out=tmp_path / "fresh")
    assert fresh.plan.model.revision == commit_of(new)
    with pytest.raises(OutputError, match="is a run of another model"):
        pipeline.run(recipe=recipe(tmp_path, revision="main"), out=run)


def test_stages_of_one_run_do_not_mix(
    repository: Path, old: Path, new: Path, tmp_path: Path
) -> None:
    """The branch moves after every command."""
    run, short, retrained = tmp_path / "run", tmp_path / "short", tmp_path / "retrained"
    shortllm.score(ID, calibration=calibration(tmp_path), out=run)
    move(repository, "main", new)
    shortllm.score(ID, calibration=calibration(tmp_path), out=run)  # up to date
    plan = shortllm.plan(run, remove=2)
    shortllm.prune(ID, run, short)
    assert plan.model.revision == commit_of(old)
    kept = load_file(short / SAFETENSORS)
    originals = load_file(old / SAFETENSORS)
    assert torch.equal(kept["model.norm.weight"], originals["model.norm.weight"])
    evaluation = shortllm.evaluate([ID, str(short)], options=measured(tmp_path))
    revisions = [one.model.revision for one in evaluation.models]
    assert revisions == [commit_of(old), None]
    both = shortllm.evaluate([f"{ID}@v2", str(short)], options=measured(tmp_path))
    assert both.models[0].model.revision == commit_of(new)  # as asked
    chosen = options(
        data=str(text(tmp_path / "rows.jsonl")), method="distill", max_steps=2, eval_every=1
    )
    record = shortllm.retrain(str(short), retrained, options=chosen, device="cpu")
    assert record.teacher is not None and record.teacher.revision == commit_of(old)


def test_a_target_is_counted_on_the_model_that_was_scored(
    repository: Path, old: Path, new: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    scores = shortllm.score(ID, criterion="magnitude", out=run)
    move(repository, "main", new)
    most = scores.model.parameters - 1
    plan = shortllm.plan(run, target_params=most, protect_first=0, protect_last=0)
    assert len(plan.removed) == 1 and plan.model.revision == commit_of(old)


def test_the_network_is_not_needed_for_what_is_there(
    repository: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that is in the cache is found, also where the Hub cannot be reached."""
    asked: list[str] = []

    def unreachable(*arguments: Any, **keywords: Any) -> None:
        asked.append("Hub")
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.list_repo_tree", unreachable)
    checkpoint = open_checkpoint(f"{ID}@{commit_of(old)}")
    assert checkpoint.revision == commit_of(old) and asked


def test_an_unfinished_download_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = save(build(config_of("llama")), tmp_path / "partial")
    (partial / SAFETENSORS).unlink()
    fill_cache(tmp_path / "cache", ID, {"main": partial}, monkeypatch)
    with pytest.raises(CheckpointError, match="no weights.*Was the download finished"):
        open_checkpoint(ID)
