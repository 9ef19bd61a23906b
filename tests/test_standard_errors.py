"""Standard errors over segments, paired differences, and runs of different segments compared."""

from __future__ import annotations

import math
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from test_reporting import evaluated, make_run, perplexity, words

import shortllm
from shortllm.data.rows import Rows
from shortllm.evaluation.options import Evaluation, Perplexity, paired_difference
from shortllm.evaluation.texts import EvaluationText, Segments, measure_perplexity
from shortllm.format import change_of_perplexity, with_error
from shortllm.model.decoder import Decoder
from shortllm.reporting import compare, write_report
from shortllm.reporting.load import load_runs
from shortllm.reporting.runs_page import compared_models


def measured(nlls: list[float], source: str = "wikitext2", **fields: object) -> Perplexity:
    """A perplexity with the NLL of each of its segments."""
    mean = float(np.mean(nlls))
    error = float(np.std(nlls, ddof=1) / len(nlls) ** 0.5)
    return perplexity(
        math.exp(mean), source=source, segments=len(nlls), segment_nlls=nlls,
        stderr=math.exp(mean) * error, tokens_fingerprint=f"{source}-{len(nlls)}", **fields,
    )  # fmt: skip


def run_of(directory: Path, removed: tuple[int, ...], *nlls: list[float], source: str) -> Path:
    """A run whose models have these NLLs."""
    make_run(directory, removed=removed, by_hand=True)
    models = [
        evaluated(name, blocks, 100_000 * blocks, 1.0, "").model_copy(
            update={"perplexity": [measured(own, source)]}
        )
        for name, blocks, own in zip(
            ("original", "pruned"), (12, 12 - len(removed)), nlls, strict=True
        )
    ]
    Evaluation(fingerprint="e0" * 32, dtype="float32", models=models).save(directory / "eval.json")
    plan = (directory / "plan.json").read_text().replace("300000", str(100_000 * len(removed)))
    (directory / "plan.json").write_text(plan)
    return directory


def test_errors_are_those_of_the_mean_over_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shortllm.model.walk.FEWEST_TOKENS", 5)  # slices end inside segments
    monkeypatch.setattr("shortllm.model.walk.CPU_LOSS_BYTES", 1)
    model = families.loaded("llama")
    ids_ST = torch.randint(0, 60, (7, 9))
    text = EvaluationText(
        rows=Rows.of("text", ["a"]), held_out=False, segments=Segments(ids=ids_ST, bos="none")
    )
    found = measure_perplexity(Decoder(model), text)
    alone = [model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in ids_ST]
    assert found.segment_nlls == pytest.approx(alone, abs=1e-5)
    assert found.nll == pytest.approx(np.mean(alone), rel=1e-6)
    error = np.std(alone, ddof=1) / math.sqrt(7)
    assert found.stderr == pytest.approx(found.perplexity * error, rel=1e-4)


def test_a_difference_is_paired_by_segment() -> None:
    before, after = [1.0, 2.0, 3.0, 4.0], [1.1, 2.1, 3.2, 4.1]
    found = paired_difference(before, after)
    assert found is not None and found.stderr is not None
    assert found.nll == pytest.approx(0.125) and found.stderr == pytest.approx(0.025)
    assert found.is_clear and paired_difference(before, after[:3]) is None
    assert str(found) == "+13.3 ± 2.8\u202f%"
    assert measured(after).difference_from(measured(before)) == found
    assert measured(after).difference_from(measured(before, source="ptb")) is None


def test_a_single_segment_has_no_error() -> None:
    found = paired_difference([1.0], [1.5])
    assert found is not None and found.stderr is None and not found.is_clear


def test_errors_as_text() -> None:
    assert with_error(36.0214, 0.4107) == "36.02 ± 0.41"
    assert with_error(1.79834, 0.0123) == "1.798 ± 0.012"
    assert with_error(2227.6, 55.3) == "2,228 ± 55"
    assert with_error(None, None) == "–" and with_error(5.0, None) == "5.000"
    assert change_of_perplexity(math.log(12), 0.05) == "×\u202f12.0 ± 0.60"
    assert change_of_perplexity(-0.01, 0.02) == "−1.0 ± 2.0\u202f%"
    assert change_of_perplexity(0.0, 0.0) == "±0\u202f%"
    assert change_of_perplexity(1000.0, None).startswith("×")


def test_eval_prints_and_records_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from shortllm.cli.output import print_evaluation

    shortllm.prune("embedded", [5, 6], tmp_path / "short", verify=False)
    found = shortllm.evaluate(
        ["embedded", str(tmp_path / "short")], data=["embedded"], length=32, max_segments=8
    )
    first, second = (model.perplexity[0] for model in found.models)
    assert first.difference is None and second.difference == second.difference_from(first)
    assert len(first.segment_nlls) == 8
    print_evaluation(found)
    told = capsys.readouterr().out
    assert f"{first}" in told and f"{second} ({second.difference})" in told
    assert "Only 8 segments of embedded:test were measured: below 100" in told


def test_a_report_has_errors_and_says_where_segments_are_few(tmp_path: Path) -> None:
    nlls = [2.0 + n / 100 for n in range(20)]
    run = run_of(tmp_path, (5, 7), nlls, [n + 0.3 + n / 50 for n in nlls], source="wikitext2")
    page = words(write_report(run).read_text())
    assert "8.125 ± 0.11" in page and "+40.762 ± 0.037 %" in page
    assert "Only 20 segments of wikitext2 were measured" in page
    card = words((run / "README.md").read_text())
    assert "| 8.125 ± 0.11 | 11.44 ± 0.15 (+40.762 ± 0.037 %) |" in card


def test_runs_of_different_segments_are_compared_with_a_warning(tmp_path: Path) -> None:
    long = [2.0 + n / 1000 for n in range(150)]
    runs = [
        run_of(tmp_path / "a", (5, 7), long, [n + 0.3 for n in long], source="wikitext2"),
        run_of(tmp_path / "b", (5, 6, 7), long, [n * 1.2 for n in long], source="wikitext2"),
        run_of(tmp_path / "c", (5,), long[:30], [n + 0.1 for n in long[:30]], source="wikitext2"),
        run_of(tmp_path / "d", (8,), long, [n + 0.2 for n in long], source="ptb"),
    ]
    models = {one.full_name: one for one in compared_models(load_runs(runs))}
    [above] = models["b: pruned"].above_lowest.values()
    assert above.is_clear and not models["a: pruned"].above_lowest
    compare(runs, out=tmp_path / "compare.html")
    page = words((tmp_path / "compare.html").read_text())
    assert "a and b on wikitext2, 150 segments of 2,048 tokens, BOS first; c on" in page
    assert "c on wikitext2, 30 segments of 2,048 tokens" in page
    assert ">other segments</text>" in page and ">Pareto front</text>" in page
    assert "Not in this plot: d: pruned (not measured on wikitext2, 150 segments" in page
    assert "Only 30 segments of wikitext2 were measured" in page
    front = page[page.index("Pareto front of perplexity") :].partition("</p>")[0]
    assert "a: pruned (" in front and "c: pruned" not in front


def test_runs_of_the_same_segments_need_no_warning(tmp_path: Path) -> None:
    nlls = [2.0 + n / 1000 for n in range(150)]
    runs = [
        run_of(tmp_path / name, removed, nlls, [n + 0.3 for n in nlls], source="wikitext2")
        for name, removed in (("a", (5, 7)), ("b", (6,)))
    ]
    compare(runs, out=tmp_path / "compare.html")
    page = (tmp_path / "compare.html").read_text()
    assert "different segments" not in page and "other segments" not in page
    assert "Not in this plot" not in page
