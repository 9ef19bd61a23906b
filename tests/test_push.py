"""Checkpoints and runs sent to a stand-in of the Hub: what arrives, and what never does."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import retraining
from hub_server import TOKEN, HubServer

import shortllm
from shortllm.checkpoint import hub as our_hub
from shortllm.cli import main
from shortllm.errors import CheckpointError, OutputError
from shortllm.surgery.origin import LOCAL

TEXT: dict[str, Any] = {"samples": 4, "length": 16}
CODES = {
    "nobody": (None, "not logged in to the Hub. Type `hf auth login`"),
    "stranger": ("hf_other", "me/model: the Hub does not know the token"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, what was made of it step by step, and a run, all on a file of text there."""
    place = tmp_path_factory.mktemp("alice")
    retraining.shortened(place)
    rows = retraining.text(place / "rows.jsonl")
    shortllm.heal(place / "short", place / "healed", data=rows, **TEXT)
    options = retraining.options(data=str(rows), method="lora")
    shortllm.retrain(place / "healed", place / "adapted", options=options)
    command = [
        "run", place / "whole", "--out", place / "run", "--remove", 2, "--data", rows,
        "--samples", 4, "--length", 16, "--eval-data", rows, "--eval-length", 32,
        "--max-segments", 2, "--continuations", 0, "--heal", "linear", "--bench",
        "--set", "healing.calibration.samples=4", "--set", "benchmark.runs=1",
        "--set", "benchmark.warmup=1", "--set", "benchmark.new_tokens=[2]", "--device", "cpu",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="0"):
        main(list(map(str, command)))
    return place


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The only Hub there is, with a user who is logged in."""
    with HubServer() as server:
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        our_hub.hub_answers.cache_clear()
        yield server
    our_hub.hub_answers.cache_clear()


@pytest.mark.parametrize(
    ("given", "checkpoint"),
    [("short", "short"), ("healed", "healed"), ("adapted", "adapted"), ("run", "run/healed"),
     ("run/pruned", "run/pruned")],
)  # fmt: skip
def test_what_is_sent_loads_and_names_no_place(
    given: str, checkpoint: str, place: Path, hub: HubServer, tmp_path: Path
) -> None:
    commit = shortllm.push_to_hub(place / given, "model", private=True)
    assert commit.repo_url.repo_id == "me/model" and hub.private == {"me/model": True}
    for secret in (str(Path.home()), str(Path.cwd()), str(place.parent), place.name, LOCAL):
        assert secret == "/" or secret.encode() not in hub.sent, secret
    files = hub.files["me/model"]
    for name, content in files.items():
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
    for weights in (place / checkpoint).glob("*.safetensors"):
        assert files[weights.name] == weights.read_bytes()
    sent, here = shortllm.load(tmp_path), shortllm.load(place / checkpoint)
    assert sent.config.num_hidden_layers == here.config.num_hidden_layers
    card = files["README.md"].decode()
    assert 'path = "me/model"' in card and "- shortllm\n" in card
    results = {name for name in files if name.startswith("results/")}
    if given.startswith("run"):
        assert "| perplexity, rows.jsonl" in card
        assert results == {f"results/{name}" for name in (
            "report.html", "scores.json", "plan.json", "eval.json", "bench.json"
        )}  # fmt: skip
        sent_evaluation = json.loads(files["results/eval.json"])
        here_evaluation = json.loads((place / "run" / "eval.json").read_text())
        assert sent_evaluation["models"][0]["perplexity"][0]["source"] == "rows.jsonl"
        for one, other in zip(sent_evaluation["models"], here_evaluation["models"], strict=True):
            assert one["perplexity"][0]["nll"] == other["perplexity"][0]["nll"]
    else:
        assert not results


def test_a_repository_with_other_content_is_spoken_of(
    place: Path, hub: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    hub.files["me/model"] = dict.fromkeys(
        ("config.json", "notes.txt", "model-00001-of-00002.safetensors", ".gitattributes"), b""
    )
    hub.private["me/model"] = True
    caplog.set_level(logging.WARNING, logger="shortllm")
    shortllm.push_to_hub(place / "short", "me/model", private=True)
    assert caplog.messages == [
        "me/model has files of an earlier commit: replacing config.json, deleting "
        "model-00001-of-00002.safetensors, keeping notes.txt"
    ]
    assert "notes.txt" in hub.files["me/model"]
    assert [name for name in hub.files["me/model"] if name.endswith(".safetensors")] == [
        "model.safetensors"
    ]
    assert hub.messages == [f"Upload short with shortllm {shortllm.__version__}"]


def test_nothing_private_goes_to_a_public_repository(place: Path, hub: HubServer) -> None:
    shortllm.push_to_hub(place / "short", "me/model")
    with pytest.raises(OutputError, match="me/model exists and is public. Make it private"):
        shortllm.push_to_hub(place / "healed", "me/model", private=True)
    assert len(hub.messages) == 1


@pytest.mark.parametrize("who", CODES)
def test_who_may_not_send_is_told_what_to_type(
    who: str, place: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, message = CODES[who]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    with pytest.raises(OutputError, match=message):
        shortllm.push_to_hub(place / "short", "me/model")
    assert hub.files == {}


def test_other_names_are_refused(place: Path, hub: HubServer) -> None:
    with pytest.raises(OutputError, match="nothing was sent to other/model: the token may not"):
        shortllm.push_to_hub(place / "short", "other/model")
    with pytest.raises(OutputError, match="'a//b' is not a possible name .* Give OWNER/NAME"):
        shortllm.push_to_hub(place / "short", "a//b")


def test_without_a_network_nothing_is_tried(place: Path) -> None:
    our_hub.hub_answers.cache_clear()
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE is set, so the Hub is not asked"):
        shortllm.push_to_hub(place / "short", "me/model")


def test_what_is_no_checkpoint_of_ours_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for given, message in (
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path / "empty", "neither a checkpoint nor a run with one"),
        (place / "whole", "was not written by shortllm: .* hf upload"),
    ):
        with pytest.raises(CheckpointError, match=message):
            shortllm.push_to_hub(given, "me/model")


def test_a_checkpoint_next_to_a_plan_is_sent_alone(
    place: Path, hub: HubServer, tmp_path: Path
) -> None:
    shutil.copytree(place / "short", tmp_path / "short")
    shutil.copy(place / "run" / "plan.json", tmp_path)
    shortllm.push_to_hub(tmp_path / "short", "model")
    assert not any(name.startswith("results/") for name in hub.files["me/model"])


def test_the_command_prints_the_address(
    place: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (
        ([], f"{hub.address}/me/model\n"),
        (["--json"], json.dumps({"repository": f"{hub.address}/me/model", "commit": "1" * 40})),
    ):
        with pytest.raises(SystemExit, match="0"):
            main(["push", str(place / "short"), "model", "--private", *arguments])
        assert capsys.readouterr().out.strip() == said.strip()
