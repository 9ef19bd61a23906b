"""The command line prints, writes and fingerprints what it did: see `golden.py`."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import golden
import pytest


def require_same(kind: str, found: dict[str, str], expected: dict[str, str]) -> None:
    """Fail with what differs, and how to accept it."""
    assert expected, f"no goldens: run python tests/golden.py --write {kind}"
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is new" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        if diff := golden.difference(expected[name], found[name]):
            problems.append(f"{name}:\n{diff}")
    if problems:
        hint = f"If this is wanted: python tests/golden.py --write {kind}"
        pytest.fail("\n\n".join([*problems, hint]), pytrace=False)


def kept(kind: str) -> dict[str, str]:
    """File name -> text of the goldens of a kind."""
    return {path.name: path.read_text(encoding="utf-8") for path in golden.kept(kind)}


def test_help() -> None:
    if version("typer") != golden.TYPER.read_text(encoding="utf-8").strip():
        pytest.skip("the goldens were written with another version of typer")
    require_same("help", golden.help_texts(), kept("help"))


def test_files_of_a_run(tmp_path: Path) -> None:
    require_same("run", golden.run_files(tmp_path), kept("run"))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("base", marks=pytest.mark.slow),
        pytest.param("training", marks=pytest.mark.slow),
        pytest.param("units", marks=pytest.mark.slow),
        pytest.param("quantizing", marks=pytest.mark.slow),
    ],
)
def test_fingerprints(kind: str, tmp_path: Path) -> None:
    name = f"{kind}.json"
    found = {name: golden.fingerprint_text(tmp_path, kind)}
    require_same("fingerprints", found, {name: kept("fingerprints")[name]})


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("ppl 1.8711, 3 blocks", "ppl 1.8712, 3 blocks", True),
        ("ppl 1.8711, 3 blocks", "ppl 1.9, 3 blocks", False),
        ("ppl 1.8711, 3 blocks", "ppl 1.8711, 4 blocks", False),
        ("version 1.2.3", "version 1.2.4", False),
        ("−0.25 %", "-0.25 %", True),
        ("0.0", "0.0000000001", True),
    ],
)
def test_only_last_digits_may_differ(one: str, other: str, same: bool) -> None:
    assert (golden.difference(one, other) == "") == same
