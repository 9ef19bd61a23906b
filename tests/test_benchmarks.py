"""The benchmark scripts run from a checkout, on shapes small enough for a test; times are not
looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import load

from shortllm.checkpoint.source import open_checkpoint

REPOSITORY = Path(__file__).parents[1]
SMALL = ["--samples", "2", "--length", "16"]


def run(*command: str | Path) -> Any:
    """The JSON of a benchmark's last line."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(REPOSITORY / "src")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_random_checkpoint_is_a_whole_one(tmp_path: Path) -> None:
    script = REPOSITORY / "benchmarks" / "random_checkpoint.py"
    command = [sys.executable, script, "tiny", tmp_path / "model", "--blocks", "3"]
    subprocess.run(command, check=True)
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.block_count == 3
    model = load(tmp_path / "model")
    weights = dict(model.named_parameters())
    assert (weights["model.norm.weight"] == 1).all()
    assert 0.019 < weights["lm_head.weight"].std().item() < 0.021


@pytest.mark.slow
def test_the_gpu_benchmark_runs_without_a_gpu(tmp_path: Path) -> None:
    script, out = REPOSITORY / "benchmarks" / "gpu.sh", tmp_path / "results" / "gpu.json"
    small = ["--shape", "tiny", "--device", "cpu", "--rounds", "1", *SMALL]
    found = run("sh", script, *small, "--out", out)
    assert json.loads(out.read_text()) == found
    for name in ("ppl", "taylor", "influence"):
        assert found[name]["flops"] > 0 and found[name]["share_of_matrix_rate"] > 0, name
        assert found[name]["peak_bytes"] > found["model_bytes"]
    assert found["plain"]["timed_blocks"] == 2 and found["plain"]["seconds"] > 0


@pytest.mark.slow
def test_the_speed_benchmark_runs_without_a_gpu_and_goes_on(tmp_path: Path) -> None:
    script = REPOSITORY / "benchmarks" / "gpu.sh"
    command = ["sh", script, "speed", "--tiny", "--plain", "--out", tmp_path]
    found = run(*command)["plain"]
    assert [model["model"]["blocks"] for model in found["models"]] == [4, 3, 2]
    cells = [(one["batch"], one["new_tokens"], one["status"]) for one in found["measurements"]]
    assert cells == [(1, 8, "ok")] * 3 + [(2, 8, "ok")] * 3
    kept = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {"bench.json", "bench.csv", "bench-speedup.svg"} <= kept and "bench.partial" not in kept
    finished = tmp_path / "plain" / "bench.json"
    partial = {**found, "measurements": found["measurements"][:3]}
    (tmp_path / "plain" / "bench.partial").write_text(json.dumps(partial))
    finished.unlink()
    again = run(*command)["plain"]
    assert run(*command)["plain"] == again
    assert again["measurements"][:3] == found["measurements"][:3]
    assert len(again["measurements"]) == 6 and json.loads(finished.read_text()) == again


@pytest.mark.slow
def test_the_streamed_benchmark_measures_and_deletes(tmp_path: Path) -> None:
    script = REPOSITORY / "benchmarks" / "larger_than_memory.py"
    some = ["--criteria", "influence,angular", "--plain-blocks", "2", "--resident-blocks", "0"]
    found = run(sys.executable, script, "tiny", "--dir", tmp_path, *SMALL, *some)
    measured = found["bfloat16"]["influence,angular"]
    assert measured["flops"] > 0 and measured["predicted_seconds"] > 0
    assert measured["peak_bytes"] > 0 and measured["predicted_peak_bytes"] > 0
    assert found["bfloat16"]["plain"]["measured_blocks"] == 2
    assert not list(tmp_path.iterdir())
