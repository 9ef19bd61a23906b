"""Lines of stages in a log, bars on a terminal, how much commands say, and the log of a run."""

from __future__ import annotations

import io
import logging
import sys
import time
from pathlib import Path

import pytest

import shortllm
from shortllm import progress
from shortllm.cli import main
from shortllm.errors import OutputError
from shortllm.files import hold, releasing
from shortllm.progress import expect_stages, numbered_stages, stage
from shortllm.run_directory import LOG, write_run_file


@pytest.fixture(autouse=True)
def log_of_stages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="shortllm")


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    """What was said of stages, without times."""
    told = [one for one in caplog.records if one.name == "shortllm.progress"]
    return [one.getMessage() for one in told if one.levelno >= level]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def call(*command: object) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, command)))
    return int(ended.value.code or 0)


def test_stages_say_when_they_begin_and_end(caplog: pytest.LogCaptureFixture) -> None:
    with numbered_stages():
        with stage("prepare", delayed=True):
            expect_stages(3)
        with stage("score"), progress.progress("scoring by ppl", 10) as advance:
            advance(5)
        with stage("prune"):
            pass
    assert lines(caplog) == [
        "[1/3] prepare done in 0 s, 0 s elapsed",
        "[2/3] score begins, 0 s elapsed",
        "[2/3] score done in 0 s, 0 s elapsed",
        "[3/3] prune begins, 0 s elapsed",
        "[3/3] prune done in 0 s, 0 s elapsed",
    ]
    assert "[2/3] score: scoring by ppl" in lines(caplog, logging.DEBUG)


@pytest.mark.parametrize(("amount", "said"), [(1, "25%, X left"), (1e-4, "0%")])
def test_a_line_now_and_then_says_how_far_it_is(
    amount: float, said: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.02)
    monkeypatch.setattr(progress, "_lasting", lambda seconds: "X")
    with stage("heal"), progress.progress("healing", 4) as advance:
        advance(amount)
        deadline = time.monotonic() + 30
        while len(lines(caplog)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)  # without a word from the work itself
    assert set(lines(caplog)[1:-1]) == {f"[1/1] heal: healing {said}, X elapsed"}


def test_a_mistake_is_not_preceded_by_a_stage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 1e6)  # loading torch can take a minute
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(OutputError):
        shortllm.prune("embedded", [4], tmp_path / "full")
    assert lines(caplog) == []


def test_public_functions_are_stages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shortllm.prune("embedded", [4], tmp_path / "short", verify=False)
    assert [one.partition(",")[0] for one in lines(caplog)] == [
        "[1/1] prune begins", "[1/1] prune done in 0 s"
    ]  # fmt: skip
    caplog.clear()
    with numbered_stages(1), stage("all"):
        shortllm.prune("embedded", [5], tmp_path / "other", verify=False)
    assert all(one.startswith("[1/1] all") for one in lines(caplog))


def test_a_bar_names_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with numbered_stages(6):
        for name in ("score", "heal"):
            with stage(name), progress.progress(f"{name} by [x]", 2) as advance:
                advance(1)
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "[1/6] score: score by [x]" in shown and "[2/6] heal: heal by [x]" in shown


@pytest.mark.parametrize("flag", ["", "--quiet", "--verbose"])
def test_how_much_a_command_says(
    flag: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["prune", "embedded", "--blocks", "4", "--no-verify", "--out", tmp_path / "x"]
    assert call(*command, *filter(None, [flag])) == 0
    out, err = capfd.readouterr()
    assert "12 -> 11 blocks" in out
    assert ("[1/1] prune begins" in err) == (flag != "--quiet")
    assert ("prune: writing x" in err) == (flag == "--verbose")
    if flag == "--quiet":
        assert err == ""


def test_on_a_terminal_there_are_bars_and_no_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for flag, bar in (("", True), ("--quiet", False)):
        monkeypatch.setattr(sys, "stderr", Terminal())
        place = tmp_path / f"x{flag}"
        command = ["prune", "embedded", "--blocks", "4", "--no-verify", "--out", place]
        assert call(*command, *filter(None, [flag])) == 0
        shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
        assert ("[1/1] prune: writing" in shown) == bar and "begins" not in shown


def test_quiet_and_verbose_exclude_each_other(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("recipes", "list", "--quiet", "--verbose") == 2
    assert "--quiet and --verbose exclude each other" in capfd.readouterr().err


def test_a_run_keeps_its_log(tmp_path: Path) -> None:
    checkpoint = shortllm.open_checkpoint("embedded")

    @releasing()
    def work(*, fails: bool) -> None:
        write_run_file(tmp_path, {}, checkpoint, ["shortllm", "run", "a b"])
        with stage("heal"):
            hold(tmp_path)
            if fails:
                raise OutputError("no room")

    work(fails=False)
    with pytest.raises(OutputError):
        work(fails=True)
    logging.getLogger("shortllm").warning("after it")
    log = (tmp_path / LOG).read_text()
    assert log.count("shortllm run 'a b'") == 2 and log.count("INFO [1/1] heal begins") == 2
    assert log.count("heal done") == 1 and "OutputError: no room" in log and "after" not in log
