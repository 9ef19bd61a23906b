"""A full disk: said before the work or cleanly in the midst of it, and the same command goes on."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import WAYS, SmallDisk, can_mount, listing, small_disk, small_files
from families import opened, saved
from families import shortened as without
from retraining import options, shortened, text

import shortllm
from shortllm import files
from shortllm.checkpoint.source import open_checkpoint
from shortllm.checkpoint.tensors import SAFETENSORS
from shortllm.errors import OutputError
from shortllm.files import partial_directory, write_text
from shortllm.journal import Journal
from shortllm.model.hidden_states import StreamMemory
from shortllm.retraining import retrain as retraining

FULL = r"no space left on the disk of .*: .* are free.*Nothing half-written was kept. Make space"
ROOM = 64 * 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of 64 MiB, to be made as small as a test needs it."""
    with small_disk(tmp_path / "disk", ROOM) as found:
        if found is None:
            pytest.skip("nothing can be mounted here (root is needed); see the other ways")
        yield found


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks before heavy work pass, and the space is gone afterwards."""

    def passes(directory: Path, needed_bytes: int = 0) -> None: ...

    # its code, so that modules that imported it by name are changed too
    monkeypatch.setattr(files.require_writable, "__code__", passes.__code__)


@pytest.fixture
def scarce(request: pytest.FixtureRequest, tmp_path: Path, unchecked: None) -> Scarce:
    """A directory, and a context in which only so many bytes can be written in it."""
    return Scarce(request.param, tmp_path / "scarce")


class Scarce:
    def __init__(self, way: str, place: Path) -> None:
        self.way, self.place = way, place
        if way == "small disk" and not can_mount():
            pytest.skip("nothing can be mounted here (root is needed); see the other way")
        if way != "small disk":
            place.mkdir()

    @contextmanager
    def room(self, size: int) -> Iterator[None]:
        if self.way != "small disk":
            with small_files(size):
                yield
            return
        if not self.place.exists():
            self.disk = SmallDisk(self.place, ROOM)
        held = ROOM - self.disk.free()
        self.disk.resize(held + max(size, 4096))
        filler = None if size else self.disk.fill()
        try:
            yield
        finally:
            self.disk.resize(ROOM)
            if filler is not None:
                filler.unlink()


@pytest.fixture(autouse=True)
def unmounted(tmp_path: Path) -> Iterator[None]:
    yield
    while os.path.ismount(tmp_path / "scarce"):
        os.system(f"umount --lazy {tmp_path / 'scarce'}")


def leftovers(place: Path) -> list[str]:
    return [path.name for path in place.rglob("*.partial")]


# ---- surgery


def test_too_little_room_is_said_before_surgery(disk: SmallDisk) -> None:
    source = saved("llama")
    before, target = listing(source), disk.place / "short"
    disk.resize(48 * 2**10)
    with pytest.raises(OutputError, match=r"KiB are needed, .* are free. Make space and run the"):
        shortllm.prune(str(source), [1], target, verify=False)
    assert list(disk.place.iterdir()) == [] and listing(source) == before
    disk.resize(ROOM)
    assert shortllm.prune(str(source), [1], target) == target
    assert open_checkpoint(target).block_count == 5 and listing(source) == before


@pytest.mark.parametrize("scarce", WAYS, indirect=True)
@pytest.mark.parametrize("size", [0, 200, 8 * 2**10, 64 * 2**10])
def test_a_disk_that_fills_up_during_surgery(scarce: Scarce, size: int, tmp_path: Path) -> None:
    source = shutil.copytree(saved("llama"), tmp_path / "source")
    before, target = listing(source), scarce.place / "short"
    with scarce.room(size), pytest.raises(OutputError, match=FULL):
        shortllm.prune(str(source), [1], target, verify=False)
    assert not target.exists() and not leftovers(scarce.place)
    assert listing(source) == before
    shortllm.prune(str(source), [1], target)
    assert (target / SAFETENSORS).read_bytes() == (
        without(opened("llama"), [1], tmp_path / "same") / SAFETENSORS
    ).read_bytes()


@pytest.mark.parametrize("scarce", WAYS, indirect=True)
def test_an_earlier_checkpoint_is_left_as_it_was(scarce: Scarce) -> None:
    with scarce.room(ROOM // 2):
        target = without(opened("llama"), [1], scarce.place / "short")
    before = listing(target)
    with scarce.room(8 * 2**10), pytest.raises(OutputError, match=FULL):
        without(opened("llama"), [2], target)
    assert listing(target) == before and not leftovers(scarce.place)
    without(opened("llama"), [2], target)
    assert listing(target) != before


@pytest.mark.parametrize("scarce", WAYS, indirect=True)
def test_a_full_temporary_directory_is_told_apart(
    scarce: Scarce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scarce.room(ROOM // 2):
        pass
    monkeypatch.setattr("tempfile.tempdir", str(scarce.place))
    with scarce.room(0), pytest.raises(OutputError, match="or set TMPDIR to another directory"):
        without(opened("llama"), [1], tmp_path / "short")
    assert not (tmp_path / "short").exists()


# ---- the other checkpoints that are made


def made_by_width(model: Path, out: Path, place: Path) -> None:
    chosen = shortllm.WidthOptions(ratio=0.5, importance="l1", start=0, end=4)
    shortllm.width(str(model), out, options=chosen)


def made_by_heal(model: Path, out: Path, place: Path) -> None:
    data = str(text(place / "text.jsonl"))
    shortllm.heal(str(model), out, data=data, samples=8, length=32)


def made_by_dropping(model: Path, out: Path, place: Path) -> None:
    shortllm.drop_sublayers(str(model), out, options=shortllm.SublayerOptions(mlp=[1]))


@pytest.mark.parametrize("scarce", WAYS, indirect=True)
@pytest.mark.parametrize("make", [made_by_width, made_by_heal, made_by_dropping])
def test_a_disk_that_fills_up_while_others_write(
    make: Callable[[Path, Path, Path], None], scarce: Scarce, tmp_path: Path
) -> None:
    short = shortened(tmp_path)
    before, target = listing(short), scarce.place / "made"
    text(tmp_path / "text.jsonl")
    with scarce.room(100 * 2**10), pytest.raises(OutputError, match=FULL):
        make(short, target, tmp_path)
    assert not target.exists() and not leftovers(scarce.place)
    assert listing(short) == before
    make(short, target, tmp_path)
    assert open_checkpoint(target).block_count == 4


# ---- retraining


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return str(text(tmp_path / "rows.jsonl"))


def test_too_little_room_is_said_before_training(
    disk: SmallDisk, tmp_path: Path, rows: str
) -> None:
    short = shortened(tmp_path)
    disk.resize(256 * 2**10)
    with pytest.raises(OutputError, match=r"KiB are needed, .* are free. Make space and run the"):
        shortllm.retrain(str(short), disk.place / "retrained", options=options(data=rows))
    assert list(disk.place.iterdir()) == []


STATE_BYTES = {"lora": 2**16, "full": 2**19}
"""Less than a state on a small disk that holds the text too, and less than its largest file."""


@pytest.mark.parametrize("scarce", WAYS, indirect=True)
@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_during_training(
    method: str,
    scarce: Scarce,
    tmp_path: Path,
    rows: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    short, target = shortened(tmp_path), scarce.place / "retrained"
    chosen = options(method=method, data=rows, micro_batch=2)
    expected = tmp_path / "expected"
    shortllm.retrain(str(short), expected, options=chosen, device="cpu")
    before = listing(short)
    size = STATE_BYTES[method] * (2 if scarce.way == "small disk" else 1)
    with scarce.room(size), pytest.raises(OutputError, match=FULL):
        shortllm.retrain(str(short), target, options=chosen, device="cpu")
    assert not target.exists()
    states = scarce.place / "retrained.training.partial" / "states"
    held = sorted(path.name for path in states.iterdir())
    assert all((states / name / "trainer_state.json").is_file() for name in held)
    assert listing(short) == before
    with caplog.at_level(logging.INFO, logger="shortllm"):
        shortllm.retrain(str(short), target, options=chosen, device="cpu")
    assert ("resuming from step" in caplog.text) == bool(held)
    assert not leftovers(scarce.place)
    assert (target / SAFETENSORS).read_bytes() == (expected / SAFETENSORS).read_bytes()


def test_a_disk_that_fills_up_while_the_retrained_model_is_written(
    disk: SmallDisk,
    unchecked: None,
    tmp_path: Path,
    rows: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    short, target = shortened(tmp_path), disk.place / "retrained"
    chosen = options(data=rows)
    original = retraining._save
    fillers = []

    def crowded(*arguments: Any, **keywords: Any) -> None:
        disk.resize(ROOM - disk.free() + 100 * 2**10)
        fillers.append(disk.place)
        original(*arguments, **keywords)

    monkeypatch.setattr(retraining, "_save", crowded)
    with pytest.raises(OutputError, match=FULL + "|about .* are needed"):
        shortllm.retrain(str(short), target, options=chosen, device="cpu")
    assert fillers and not target.exists()
    assert [path.name for path in disk.place.iterdir()] == ["retrained.training.partial"]
    disk.resize(ROOM)
    monkeypatch.setattr(retraining, "_save", original)
    with caplog.at_level(logging.INFO, logger="shortllm"):
        record = shortllm.retrain(str(short), target, options=chosen, device="cpu")
    assert "resuming from step 6" in caplog.text and record.steps == 6
    assert open_checkpoint(target).block_count == 4 and not leftovers(disk.place)


# ---- files of results, journals and streams


@pytest.mark.parametrize("scarce", WAYS, indirect=True)
def test_a_result_is_whole_or_as_before(scarce: Scarce) -> None:
    with scarce.room(ROOM // 2):
        write_text(scarce.place / "plan.json", "before")
    with scarce.room(2**14), pytest.raises(OutputError, match=f"{FULL}|about 100 KiB are needed"):
        write_text(scarce.place / "plan.json", "x" * 100 * 2**10)
    assert [path.name for path in scarce.place.iterdir()] == ["plan.json"]
    assert (scarce.place / "plan.json").read_text() == "before"


@pytest.mark.parametrize("scarce", WAYS, indirect=True)
def test_an_interrupted_pass_keeps_what_it_had(scarce: Scarce) -> None:
    with scarce.room(ROOM // 2):
        Journal(scarce.place / "work", "w").commit({"at": 1}, {"sums": torch.arange(4.0)})
    journal = Journal(scarce.place / "work", "w")
    with scarce.room(2**14), pytest.raises(OutputError, match=FULL):
        journal.commit({"at": 2}, {"sums": torch.zeros(2**16)})
    again = Journal(scarce.place / "work", "w")
    assert again.position() == {"at": 1}
    assert torch.equal(again.tensor("sums"), torch.arange(4.0))


@pytest.mark.parametrize("scarce", WAYS, indirect=True)
def test_streams_take_their_room_at_once(scarce: Scarce) -> None:
    """A file that is mapped and grows while it is written to would have the process killed."""
    with scarce.room(ROOM // 2):
        pass
    memory = StreamMemory(limit=0, directory=scarce.place / "streams")
    with scarce.room(2**16), pytest.raises(OutputError, match="or raise --max-memory"):
        memory.allocate((2**8, 2**10), torch.float32, torch.device("cpu"))
    assert not list((scarce.place / "streams").glob("*"))
    assert memory.allocate((2**8, 2**10), torch.float32, torch.device("cpu")).fill_(1.0).all()


@pytest.mark.parametrize("scarce", WAYS, indirect=True)
@pytest.mark.parametrize("library", ["torch", "safetensors"])
def test_what_libraries_say_of_a_full_disk_is_understood(scarce: Scarce, library: str) -> None:
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(2**18)}
    with scarce.room(ROOM // 2):
        pass
    with scarce.room(2**16), pytest.raises(OutputError, match=FULL):
        with partial_directory(scarce.place / "out") as directory:
            if library == "torch":
                torch.save(tensors, directory / "optimizer.pt")
            else:
                save_file(tensors, directory / "model.safetensors")
    assert list(scarce.place.iterdir()) == []
