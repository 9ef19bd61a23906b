"""Atomic files and directories."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shortllm.errors import OutputError
from shortllm.files import partial_directory, require_file_target, write_text


@pytest.mark.parametrize("finished", [True, False])
def test_leftovers_of_a_kill_inside_the_swap_are_removed(tmp_path: Path, finished: bool) -> None:
    for name in ("out.partial", "out.old.partial", *(["out"] if finished else [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old.txt").touch()
    with partial_directory(tmp_path / "out") as directory:
        assert not (tmp_path / "out.old.partial").exists()
        (directory / "new.txt").touch()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new.txt"]


@pytest.mark.parametrize("target", [".", "..", "../here"])
def test_the_present_directory_is_not_replaced(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "out" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    with (
        pytest.raises(OutputError, match="cannot be replaced from inside. Choose another --out"),
        partial_directory(Path(target)),
    ):
        raise AssertionError("not reached")
    assert list(tmp_path.rglob("*")) == [tmp_path / "out", here]
    with partial_directory(Path("../other")) as directory:
        (directory / "new.txt").touch()
    assert (tmp_path / "out" / "other" / "new.txt").exists()


def test_a_link_as_target_fills_what_it_points_at(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    with partial_directory(tmp_path / "out") as directory:
        (directory / "new.txt").touch()
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "new.txt").exists()


HOLD = """
import sys, time
from pathlib import Path
from shortllm.files import partial_directory
with partial_directory(Path(sys.argv[1])) as directory:
    (directory / "theirs.txt").touch()
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_that_write_one_checkpoint_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, target]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=f"{target} is being written by process {holder.pid}"):
            with partial_directory(target):
                raise AssertionError("not reached")
        assert (tmp_path / "out.partial" / "theirs.txt").exists()
    finally:
        holder.kill()
        holder.wait()
    with partial_directory(target) as directory:  # a killed process holds nothing
        (directory / "ours.txt").touch()
    assert [path.name for path in target.iterdir()] == ["ours.txt"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_swap_that_fails_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    with partial_directory(target) as directory:
        (directory / "old.txt").touch()
    replace = os.replace

    def failing(source: Path, to: Path) -> None:
        if source.name == "out.partial":
            raise OSError("the machine has other worries")
        replace(source, to)

    monkeypatch.setattr("shortllm.files.os.replace", failing)
    with pytest.raises(OSError, match="other worries"), partial_directory(target) as directory:
        (directory / "new.txt").touch()
    assert [path.name for path in target.iterdir()] == ["old.txt"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(
        OutputError, match=f"{tmp_path} is a directory; give .*{tmp_path}/eval.json"
    ):
        require_file_target(tmp_path)
    require_file_target(tmp_path / "new" / "eval.json")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file is a file"):
        require_file_target(tmp_path / "file" / "eval.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_are_replaced_whole_and_readable_as_the_user_has_set(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_text(path, "old")
    write_text(path, "größer")
    assert path.read_bytes() == "größer".encode()
    assert [other.name for other in path.parent.iterdir()] == [path.name]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
