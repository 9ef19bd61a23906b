"""Retraining interrupted anywhere, and shared by processes: the same weights as without."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import children
import families
import pytest
import retraining as tiny
import torch
from safetensors.torch import load_file

import shortllm
from shortllm.retraining import CONFIGS, training
from shortllm.retraining.setup import work_directory
from shortllm.retraining.trainer import ObjectiveTrainer

pytest.importorskip("peft")
slow = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "data": "alpaca.jsonl", "length": 256, "max_steps": 12},
    "full": {"method": "full", "data": "text.jsonl", "max_steps": 12},
    "distill": {"method": "distill", "data": "text.jsonl", "top_k": 8, "max_steps": 12},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("retraining")
    tiny.shortened(directory)
    tiny.text(directory / "text.jsonl")
    tiny.instructions(directory / "alpaca.jsonl")
    return directory


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> Callable[[str], Path]:
    """The checkpoint of a kind, made once in this process."""

    def made(kind: str) -> Path:
        out = place / f"whole-{kind}"
        if not out.exists():
            retrain(place, out, options_of(place, kind))
        return out

    return made


def retrain(place: Path, out: Path, options: shortllm.RetrainOptions) -> shortllm.Retraining:
    return shortllm.retrain(str(place / "short"), out, options=options, device="cpu")


def options_of(place: Path, kind: str, **changes: Any) -> shortllm.RetrainOptions:
    chosen = {**KINDS[kind], **changes}
    return tiny.options(**{**chosen, "data": str(place / chosen["data"])})


def arguments_of(place: Path, out: Path, options: shortllm.RetrainOptions) -> list[str]:
    """The command line that means the same."""
    given = options.model_dump(exclude_defaults=True, exclude={"report_to"})
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    short = str(place / "short")
    return ["-m", "shortllm", "retrain", short, f"--out={out}", "--device=cpu", *flags]


def equal_weights(one: Path, other: Path, **tolerance: float) -> None:
    found, expected = (load_file(path / "model.safetensors") for path in (one, other))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **(tolerance or {"rtol": 0.0, "atol": 0.0}))


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "data is read": lambda work: (work / "corpus").is_dir(),
    "first state is written": lambda work: (work / "states" / "writing.partial").is_dir(),
    "a state is there": lambda work: (work / "states" / "checkpoint-4").is_dir(),
    "training has ended": lambda work: (work / "states" / "checkpoint-12").is_dir(),
}


@pytest.mark.parametrize(
    ("kind", "moment"),
    [("full", "a state is there"),
     *(pytest.param("lora", moment, marks=slow) for moment in MOMENTS),
     pytest.param("distill", "first state is written", marks=slow)],
)  # fmt: skip
def test_killed_at_any_moment_the_same_call_ends_with_the_same_weights(
    kind: str, moment: str, place: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    out = tmp_path / "killed"
    options = options_of(place, kind)
    work = work_directory(out)
    [_, _, *words] = arguments_of(place, out, options)
    ended = children.killed_when(lambda: MOMENTS[moment](work), children.command, words)
    assert ended == -signal.SIGKILL, "the training ended before it could be killed"
    assert work.is_dir() and not out.exists()
    assert_same(retrain(place, out, options), out, uninterrupted(kind))


def assert_same(record: shortllm.Retraining, out: Path, whole: Path) -> None:
    """The weights and the record but for its cost."""
    equal_weights(out, whole)
    expected = shortllm.Retraining.load(whole / "retrain.json")
    assert record.curves == expected.curves
    assert record.model_dump(exclude={"cost"}) == expected.model_dump(exclude={"cost"})


@pytest.mark.parametrize("kind", ["lora", pytest.param("distill", marks=slow)])
def test_interrupted_at_every_stage_the_last_call_ends_with_the_same_weights(
    kind: str,
    place: Path,
    tmp_path: Path,
    uninterrupted: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each try comes a little further, and resumes where the one before stopped."""
    publish = ObjectiveTrainer._publish

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    def interrupt_after_step_4(trainer: ObjectiveTrainer, *arguments: Any) -> None:
        publish(trainer, *arguments)
        if trainer.state.global_step == 4:
            raise KeyboardInterrupt

    caplog.set_level("INFO", logger="shortllm")
    out = tmp_path / "interrupted"
    for owner, name, stop, left in (
        (training, "train", interrupt, "corpus"),
        (ObjectiveTrainer, "_publish", interrupt, "states/writing.partial"),
        (ObjectiveTrainer, "_publish", interrupt_after_step_4, "states/checkpoint-4"),
        (ObjectiveTrainer, "load_best", interrupt, "states/checkpoint-12"),
    ):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(owner, name, stop)
            retrain(place, out, options_of(place, kind))
        assert (work_directory(out) / left).is_dir() and not out.exists()
    assert_same(retrain(place, out, options_of(place, kind)), out, uninterrupted(kind))
    assert caplog.text.count("tokenizing") <= 2, "once here, once for the uninterrupted one"
    assert "resuming from step 4" in caplog.text and "resuming from step 12" in caplog.text


def test_another_recipe_does_not_resume_the_work(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    left = work_directory(out)
    (left / "states" / "checkpoint-4").mkdir(parents=True)
    (left / "fingerprint.txt").write_text("another")
    caplog.set_level("INFO", logger="shortllm")
    retrain(place, out, options_of(place, "full", max_steps=2))
    assert "work for another recipe, which is deleted" in caplog.text
    assert "resuming from" not in caplog.text


def launch(arguments: list[str], *flags: str) -> subprocess.CompletedProcess[str]:
    """Two processes by accelerate, whose own --cpu would start but one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2",
        "--mixed_precision", "no", "--main_process_port", str(port), *flags, *arguments,
    ]  # fmt: skip
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


@slow
@pytest.mark.parametrize("kind", ["full", "distill"])
def test_two_processes_train_as_one(
    kind: str, place: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    out = tmp_path / "two"
    done = launch(arguments_of(place, out, options_of(place, kind)), "--multi_gpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoint:") == 1
    equal_weights(out, uninterrupted(kind), rtol=1e-3, atol=1e-4)
    two, one = (
        shortllm.Retraining.load(path / "retrain.json") for path in (out, uninterrupted(kind))
    )
    assert (two.processes, one.processes) == (2, 1)
    assert two.tokens_seen == one.tokens_seen
    for name, curve in one.curves.items():
        losses = [loss for _, loss in two.curves[name]]
        assert losses == pytest.approx([loss for _, loss in curve], rel=1e-4)


@slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_sharded_processes_end_with_a_plain_checkpoint(
    kind: str, place: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    out = tmp_path / "sharded"
    options = options_of(place, kind, **({"dropout": 0.0} if kind == "lora" else {}))
    done = launch(
        arguments_of(place, out, options), "--config_file", str(CONFIGS / "fsdp_8gpu.yaml")
    )
    assert done.returncode == 0, done.stderr
    families.load(out)
    record = shortllm.Retraining.load(out / "retrain.json")
    assert (record.processes, record.sharded) == (2, True)
    if kind == "full":
        equal_weights(out, uninterrupted(kind), rtol=1e-3, atol=1e-4)
