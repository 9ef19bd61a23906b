"""Mistakes of first users, of `tools/mistakes.py`: what the command line answers to each."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from shortllm.checkpoint.hub import hub_answers
from shortllm.cli import main

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import mistakes  # type: ignore[import-not-found]

QUICK = [one for one in mistakes.MISTAKES if not one.model and "{" not in one.command]


@pytest.mark.parametrize("mistake", QUICK, ids=lambda one: one.command)
def test_a_mistake_is_answered_with_what_to_type(
    mistake: mistakes.Mistake,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mistakes.prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(mistake.command))
    out, err = capfd.readouterr()
    assert mistakes.problem_of(mistake, int(stopped.value.code or 0), out, err) is None
    assert sorted(tmp_path.rglob("*")) == before


def test_checks_load_neither_torch_nor_transformers(tmp_path: Path) -> None:
    """In one process: a command that loaded them would be known by the modules it leaves."""
    import subprocess

    mistakes.prepare(tmp_path)
    code = (
        "import shlex, sys, mistakes\n"
        "from shortllm.cli import main\n"
        "for one in mistakes.MISTAKES:\n"
        "    if one.model or '{' in one.command:\n"
        "        continue\n"
        "    try:\n"
        "        main(shlex.split(one.command))\n"
        "    except SystemExit:\n"
        "        pass\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'gradio'} & set(sys.modules)\n"
        "    assert not heavy, (one.command, heavy)\n"
    )
    path = f"{Path(mistakes.__file__).parent}:{Path(__file__).parents[1] / 'src'}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**mistakes.environment(), "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr.splitlines()[-1]


def test_the_hub_is_asked_once_and_for_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    asked: list[tuple[object, ...]] = []

    def refuse(place: tuple[str, int], timeout: float) -> socket.socket:
        asked.append((*place, timeout))
        raise OSError("no network")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.test:8000")
    monkeypatch.setattr("shortllm.checkpoint.hub.getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", refuse)
    hub_answers.cache_clear()
    try:
        assert not hub_answers() and not hub_answers()
        assert asked == [("hub.test", 8000, 2.0)]
    finally:
        hub_answers.cache_clear()
