"""A criterion is one new file: commands, runs, reports and docs know it without another edit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import shortllm

DOCS = Path(__file__).parents[1] / "docs"

PROGRAM = """
import json, sys
from pathlib import Path
import shortllm
from shortllm import criteria
from shortllm.cli import main
from shortllm.schemas import schema

assert Path(shortllm.__file__).parent == Path("{package}"), shortllm.__file__
assert "torch" not in sys.modules
assert criteria.names_by_need("logits") == ["flips", "ppl", "kl", "acceptance"]
assert "flips" in criteria.compared()

def call(*words):
    try:
        main(list(words))
    except SystemExit as stopped:
        assert not stopped.code, words

sys.path.insert(0, "{docs}")
import hooks

assert "| `flips` | " in hooks.on_page_markdown("<!-- criteria: scores -->")

small = ["--samples", "2", "--length", "32"]
call("score", "--help")
call("score", "embedded", "--criterion", "flips,ppl", "--option", "flips.top=3", *small,
     "--out", "{out}/scores")
call("run", "embedded", "--criterion", "flips", "--remove", "2", *small, "--max-segments", "2",
     "--retrain", "none", "--no-bench", "--tasks", "", "--out", "{out}/run")
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the file that the guide shows."""
    package = tmp_path_factory.mktemp("one-file") / "shortllm"
    shutil.copytree(
        Path(shortllm.__file__).parent, package, copy_function=os.symlink,
        ignore=shutil.ignore_patterns("__pycache__"),
    )  # fmt: skip
    page = (DOCS / "add_a_criterion.md").read_text(encoding="utf-8")
    first = re.search(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert first is not None
    for file in ("__init__.py", "criteria/__init__.py"):  # whose place says where the package is
        text = (package / file).read_text(encoding="utf-8")
        (package / file).unlink()
        (package / file).write_text(text, encoding="utf-8")
    (package / "criteria" / "flips.py").write_text(first[1], encoding="utf-8")
    return package


def test_a_new_file_is_a_criterion_everywhere(package: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(package=package, out=tmp_path, docs=DOCS)],
        env={**os.environ, "PYTHONPATH": str(package.parent), "COLUMNS": "200"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"flips,\s+ppl,\s+kl", done.stdout), done.stdout
    scores = json.loads((tmp_path / "scores" / "scores-flips.json").read_text())
    assert scores["options"] == {"top": 3} and len(set(scores["importance"])) > 1
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "share of changed predictions" in page and "arxiv.org/abs/2407.09141" in page
    [card] = (tmp_path / "run").glob("*/README.md")
    assert "Accuracy is Not All You Need" in card.read_text(encoding="utf-8")
