"""The source of every command stays as it is, and may lie where nobody can write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disks import can_mount, listing, read_only
from retraining import options, shortened, text

import shortllm
from shortllm import pipeline
from shortllm.data.options import CalibrationOptions
from shortllm.errors import OutputError
from shortllm.evaluation.options import EvaluationOptions


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, what it was shortened from, and rows of text; never written in."""
    directory = tmp_path_factory.mktemp("sources")
    shortened(directory)
    text(directory / "rows.jsonl")
    return directory


def calls(place: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """Every command that reads a model, on quick terms."""
    name, rows = str(place / "short"), str(place / "rows.jsonl")
    ids = CalibrationOptions(data=rows, samples=2, length=16)
    measured = EvaluationOptions(
        data=[rows], length=16, max_segments=2, continuations=1, new_tokens=2, prompt="There"
    )
    recipe = shortllm.Recipe(
        model=name, calibration=ids, evaluation=measured, budget=shortllm.Budget(remove=1)
    )
    quick = shortllm.BenchmarkOptions(new_tokens=[2], warmup=1, runs=1)
    return {
        "info": lambda: shortllm.info(name),
        "score": lambda: shortllm.score(
            name, criterion=["ppl", "taylor"], calibration=ids, out=out
        ),
        "score, streamed": lambda: shortllm.score(name, calibration=ids, out=out, stream=True),
        "prune": lambda: shortllm.prune(name, [1], out),
        "eval": lambda: shortllm.evaluate([name], options=measured),
        "bench": lambda: shortllm.bench([name], options=quick, device="cpu"),
        "run": lambda: pipeline.run(recipe=recipe, out=out),
        "heal": lambda: shortllm.heal(
            name, out, data=rows, samples=4, length=16
        ),
        "merge": lambda: shortllm.merge(
            name, out, data=rows, samples=2, length=16, threshold=-0.99, remove=1
        ),
        "width": lambda: shortllm.width(
            name, out, options=shortllm.WidthOptions(ratio=0.5, importance="l1", start=0, end=4)
        ),
        "drop-sublayers": lambda: shortllm.drop_sublayers(
            name, out, options=shortllm.SublayerOptions(mlp=[1])
        ),
        "retrain": lambda: shortllm.retrain(
            name, out, options=options(data=rows, method="distill", max_steps=2), device="cpu"
        ),
        "export-lint": lambda: shortllm.export_lint(name),
        "compare-criteria": lambda: shortllm.compare_criteria(
            name, criteria=["ppl", "magnitude"], random=1, ratios=[0.25], calibration=ids,
            eval_length=16, max_segments=2, out=out,
        ),
    }  # fmt: skip


NAMES = list(calls(Path(), Path()))


@pytest.mark.parametrize("name", NAMES)
def test_a_source_that_cannot_be_written(name: str, place: Path, tmp_path: Path) -> None:
    before = listing(place)
    with read_only(place):
        calls(place, tmp_path / "out")[name]()
    assert listing(place) == before


def test_an_output_in_such_a_place_is_refused(place: Path) -> None:
    if os.geteuid() == 0 and not can_mount():
        pytest.skip("root may write everywhere, and nothing can be mounted read-only here")
    before = listing(place)
    with read_only(place):
        for command in (
            lambda: shortllm.prune(str(place / "short"), [1], place / "out"),
            lambda: shortllm.score(str(place / "short"), criterion="last", out=place / "out"),
        ):
            with pytest.raises(OutputError, match="no permission to write in .*another --out"):
                command()
    assert listing(place) == before
