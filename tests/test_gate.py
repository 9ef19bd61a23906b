"""The gate: what is asked of a measured model, exit codes, and results of another model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from test_cli import call

import shortllm
from shortllm.benchmark.options import BenchmarkOptions
from shortllm.errors import ResultFileError, ShortLLMError
from shortllm.evaluation.options import EvaluatedModel, Evaluation, TaskScore
from shortllm.evaluation.probe.record import Probe
from shortllm.evaluation.quality import GateOptions
from shortllm.gate import requirements_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gate") / "run"
    shortllm.run(
        "embedded", remove=2, heal="linear", samples=4, length=64, max_segments=8, continuations=0,
        benchmark=BenchmarkOptions(new_tokens=[4], warmup=1, runs=2), criterion="magnitude",
        out=out,
    )  # fmt: skip
    return out


def models_of(run: Path) -> tuple[EvaluatedModel, EvaluatedModel, EvaluatedModel]:
    intact, pruned, healed = Evaluation.load(run / "eval.json").models
    return intact, pruned, healed


def rise_of(one: EvaluatedModel, intact: EvaluatedModel) -> float:
    return one.perplexity[0].nll - intact.perplexity[0].nll


def test_the_exit_code_says_whether_all_is_met(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    intact, pruned, healed = models_of(run)
    percent = 100 * math.expm1(rise_of(healed, intact))
    code, out, _ = call(capfd, "check", run, "--max-ppl-increase", f"{percent + 0.01:.4f}%")
    assert code == 0 and "healed: passed" in out and "perplexity on embedded" in out
    tight = ("--max-ppl-increase", f"{percent - 0.01:.4f}%")
    code, out, _ = call(capfd, "check", run, *tight, "--min-speedup", "0.01")
    assert code == 3 and "healed: failed" in out
    assert [line.split()[-1] for line in out.splitlines()[1:3]] == ["failed", "passed"]
    nats = f"{rise_of(pruned, intact) + 1e-4:.6f}nats"
    code, out, _ = call(capfd, "check", run, "--max-ppl-increase", nats, "--name", "pruned")
    assert code == 0 and "pruned: passed" in out and "nats" in out
    code, out, _ = call(capfd, "check", run / "healed", *tight, "--json")
    found = json.loads(out)
    assert code == 3 and found["model"] == "healed" and found["compared"] is True
    [one] = found["requirements"]
    assert found["passed"] is one["passed"] is False
    assert one["value"] == rise_of(healed, intact) > one["limit"]


def test_the_slowest_cell_of_the_benchmark_counts(run: Path) -> None:
    benchmark = shortllm.Benchmark.load(run / "bench.json")
    speedups = [benchmark.speedup(one) for one in benchmark.measurements if one.model == "pruned"]
    found = shortllm.check(run, min_speedup=0.01)
    [one] = found.requirements
    assert one.value == min(filter(None, speedups)) and one.passed
    assert "speed-up of pruned, batch 1, 4 new tokens" in one.of  # a healed model has its shapes
    assert not shortllm.check(run, min_speedup=1000).passed
    assert list(found.to_dataframe()["passed"]) == [True]


def test_a_benchmark_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    benchmark = shortllm.Benchmark.load(run / "bench.json")
    (tmp_path / "eval.json").write_bytes((run / "eval.json").read_bytes())
    for place in range(2):
        models = list(benchmark.models)
        other = models[place].model.model_copy(update={"fingerprint": "other"})
        models[place] = models[place].model_copy(update={"model": other})
        benchmark.model_copy(update={"models": models}).save(tmp_path / "bench.json")
        with pytest.raises(ResultFileError, match="different models. Measure both again"):
            shortllm.check(tmp_path, min_speedup=0.01)


def test_the_mean_of_tasks_is_a_part_of_the_intact_one(run: Path) -> None:
    intact, pruned, _ = models_of(run)

    def with_score(model: EvaluatedModel, score: float) -> EvaluatedModel:
        task = TaskScore(task="a", metric="acc", score=score, documents=1, documents_fingerprint="")
        return model.model_copy(update={"zeroshot": [task], "zeroshot_mean": score})

    for asked, passed in (("90%", True), ("91%", False)):
        options = GateOptions(min_task_mean=asked)
        [one] = requirements_of(options, with_score(pruned, 0.45), with_score(intact, 0.5))
        assert one.passed == passed and one.value == pytest.approx(0.9)
    with pytest.raises(ResultFileError, match="the evaluation has no tasks. Measure with --tasks"):
        requirements_of(options, pruned, intact)
    without_mean = with_score(pruned, 0.5).model_copy(update={"zeroshot_mean": None})
    with pytest.raises(ResultFileError, match="the tasks a have no mean"):
        requirements_of(options, without_mean, with_score(intact, 0.5))


def test_repetition_is_that_of_the_probe(run: Path) -> None:
    intact, _, healed = models_of(run)
    probe = Probe(version="1", items_fingerprint="", capabilities=[], repetition=0.045)
    probed = healed.model_copy(update={"probe": probe})
    for asked, passed in (("4.5%", True), ("4.4%", False)):
        [one] = requirements_of(GateOptions(max_repetition=asked), probed, intact)
        assert one.passed == passed and one.value == 0.045 and one.measured == "4.5 %"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "nothing to check. Give one or more of --max-ppl-increase, --min-task-mean, --min-"),
        (
            {"max_repetition": "5%"},
            "'healed' has no open answers of a probe. .* --probe",
        ),
        ({"max_ppl_increase": "5%", "name": "heald"}, "is called 'heald'. Did you mean 'healed'"),
        ({"min_task_mean": "5%"}, "--min-task-mean: the evaluation has no tasks"),
    ],
)
def test_what_cannot_be_checked(run: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ShortLLMError, match=message):
        shortllm.check(run, **asked)


def test_results_of_other_weights_are_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("eval.json", "run.json"):
        (copy / name).write_bytes((run / name).read_bytes())
    assert not shortllm.check(copy, max_ppl_increase="1000%").compared  # results alone
    (copy / "healed").mkdir()
    for path in (run / "healed").iterdir():
        (copy / "healed" / path.name).write_bytes(path.read_bytes())
    assert shortllm.check(copy, max_ppl_increase="1000%").compared
    weights = copy / "healed" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    save_file({**tensors, name: tensors[name] * 1.01}, weights, {"format": "pt"})
    with pytest.raises(ResultFileError, match="is not the model in eval.json any more"):
        shortllm.check(copy, max_ppl_increase="1000%")
    (copy / "bench.json").unlink(missing_ok=True)
    with pytest.raises(
        ResultFileError,
        match="bench.json is missing. Give the same .shortllm run. again with --bench",
    ):
        shortllm.check(copy, min_speedup=1, name="pruned")


def test_one_model_is_nothing_to_compare(tmp_path: Path, run: Path) -> None:
    evaluation = Evaluation.load(run / "eval.json")
    evaluation.model_copy(update={"models": evaluation.models[:1]}).save(tmp_path / "eval.json")
    with pytest.raises(ResultFileError, match="has one model. A gate compares"):
        shortllm.check(tmp_path, max_ppl_increase="5%")
    with pytest.raises(ResultFileError, match="no such directory"):
        shortllm.check(tmp_path / "none", max_ppl_increase="5%")


def test_a_gate_loads_neither_torch_nor_transformers(run: Path) -> None:
    code = (
        f"import sys, shortllm; shortllm.check({str(run)!r}, max_ppl_increase='900%');"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
