"""Results as Python and notebooks show them, and the notebook of the documentation.

SHORTLLM_WRITE_GOLDEN=1 pytest tests/test_notebook.py -k runs      write its outputs again
"""

from __future__ import annotations

import base64
import builtins
import os
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest

import shortllm
from shortllm import progress
from shortllm.comparison.options import UnitsComparison
from shortllm.errors import ShortLLMError
from shortllm.reporting import views

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
SMALL: dict[str, Any] = {"samples": 2, "length": 32}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One of each kind, of the embedded model."""
    place = tmp_path_factory.mktemp("results")
    matplotlib.use("agg")
    run = shortllm.run(
        "embedded", remove=3, out=place / "run", eval_length=64, max_segments=4, heal="linear",
        continuations=0, device="cpu", tasks=[], retrain=[], **SMALL,
        bench=shortllm.BenchmarkOptions(runs=2, warmup=1, new_tokens=[2], batches=[1, 2]),
    )  # fmt: skip
    comparison = shortllm.compare_criteria(
        "embedded", criteria=["magnitude", "last"], ratios=[0.25], random=2, max_segments=2,
        out=place / "comparison", **SMALL,
    )  # fmt: skip
    one = {"parameters": 3, "missed": 0.0}
    units = UnitsComparison(
        model=run.plan.model, asked={"remove": 3}, fingerprint="",
        candidates=[
            {"name": "ppl", "unit": "depth", **one},
            {"name": "flap", "unit": "width", **one},
        ],
    )  # fmt: skip
    return {
        "scores": shortllm.BlockScores.load(place / "run" / "scores.json"),
        "plan": run.plan,
        "evaluation": run.evaluation,
        "benchmark": run.benchmark,
        "comparison": comparison,
        "units": units,
        "healing": run.healing,
        "run": run,
    }


KINDS = ("scores", "plan", "evaluation", "benchmark", "comparison", "units", "healing", "run")
PLOTTED = ("scores", "plan", "evaluation", "benchmark", "comparison", "run")
FRAMES = {
    "scores": 12,
    "plan": 12,
    "evaluation": 3,
    "benchmark": 4,
    "comparison": 4,
    "units": 2,
}
"""Kind of result -> rows of its data frame."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_is_one_short_line(kind: str, results: dict[str, Any]) -> None:
    result = results[kind]
    assert repr(result) == f"{type(result).__name__}({result})"
    assert len(repr(result)) < 250 and "\n" not in repr(result)


def test_the_line_says_what_matters(results: dict[str, Any]) -> None:
    plan, scores = results["plan"], results["scores"]
    least = sorted(range(12), key=lambda block: scores.importance[block])[:5]
    assert str(scores) == (
        f"embedded: 12 blocks by ppl, least important first: {', '.join(map(str, least))}, ..."
    )
    assert str(plan).startswith("embedded: 12 -> 9 blocks, without ")
    pruned = results["evaluation"].models[1].perplexity[0]
    assert f"pruned {pruned.perplexity:.3f} ± " in str(results["evaluation"])
    assert "pruned" in str(results["benchmark"]) and "times as fast (batch 1" in str(
        results["benchmark"]
    )
    assert str(results["evaluation"]) in repr(results["run"])
    assert str(results["healing"]).endswith("9 blocks, by linear")


def test_records_show_what_is_not_at_its_default() -> None:
    assert repr(shortllm.HealOptions(ridge=0.1)) == "HealOptions(ridge=0.1)"
    long = repr(shortllm.Budget(blocks=list(range(100))))
    assert long == "Budget(blocks=[0, 1, 2, 3, 4, 5, ...])"


@pytest.mark.parametrize("kind", KINDS)
def test_a_notebook_shows_a_table_and_the_plot(kind: str, results: dict[str, Any]) -> None:
    result = results[kind]
    html = result._repr_html_()
    assert html.count("<table>") >= (kind != "healing")
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
    assert len(images) == (kind in PLOTTED)
    for one in images:
        assert base64.b64decode(one).startswith(b"<svg")
    assert "<svg" not in html and "<script" not in html


def test_names_are_escaped(results: dict[str, Any]) -> None:
    scores = results["scores"].model_copy(update={"criterion": "<b>ppl</b>"})
    assert "<b>" not in scores._repr_html_() and "&lt;b&gt;" in scores._repr_html_()


@pytest.mark.parametrize("kind", FRAMES)
def test_a_data_frame_has_the_documented_columns(kind: str, results: dict[str, Any]) -> None:
    result = results[kind]
    frame = result.to_dataframe()
    assert len(frame) == FRAMES[kind]
    said = set(re.findall(r"`(\w+)`", type(result).to_dataframe.__doc__))
    assert said == set(frame.columns)


def test_data_frames_have_the_numbers(results: dict[str, Any]) -> None:
    scores, plan = results["scores"], results["plan"]
    frame = scores.to_dataframe().set_index("block")
    assert list(frame.importance) == scores.importance and frame["rank"].min() == 1
    assert list(frame.delta_nll) == scores.delta_nll
    frame = plan.to_dataframe().set_index("block")
    assert list(frame.index[frame.status == "removed"]) == plan.removed
    assert list(frame.order.dropna().sort_values().index) == plan.order
    assert list(frame.new_block.dropna()) == list(range(9))
    frame = results["evaluation"].to_dataframe().set_index("model")
    assert frame.value["original"] == results["evaluation"].models[0].perplexity[0].perplexity
    assert frame.delta_nll["pruned"] > 0 and frame.bytes["pruned"] < frame.bytes["original"]
    frame = results["benchmark"].to_dataframe()
    assert (frame[frame.model == "original"].speedup == 1).all()
    frame = results["comparison"].to_dataframe()
    assert frame.random.sum() == 2 and list(frame.removed.map(len)) == list(frame.blocks)


def test_pandas_is_asked_for_by_name(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return imported(name, *arguments, **more)

    imported: Callable[..., Any] = builtins.__import__
    monkeypatch.setattr("builtins.__import__", absent)
    with pytest.raises(ShortLLMError, match="needs pandas. Install it with: pip install pandas"):
        results["scores"].to_dataframe()


@pytest.mark.parametrize("kind", PLOTTED)
def test_plots_are_drawn_on_axes(kind: str, results: dict[str, Any], tmp_path: Path) -> None:
    from matplotlib import pyplot

    for name in views.plots_of(results[kind]):
        axes = results[kind].plot(name)
        assert axes.has_data()
        axes.figure.savefig(tmp_path / "plot.svg")
        pyplot.close(axes.figure)
        assert (tmp_path / "plot.svg").read_bytes().startswith(b"<?xml")
    figure, given = pyplot.subplots()
    assert results[kind].plot(ax=given) is given and given.has_data()
    pyplot.close(figure)


def test_other_plots_are_refused(results: dict[str, Any]) -> None:
    with pytest.raises(ShortLLMError, match="unknown plot 'throughput'. .*'throughput-2'"):
        results["benchmark"].plot("throughput")
    with pytest.raises(ShortLLMError, match="there is nothing to plot in Healing"):
        results["healing"].plot()


def test_records_of_results_load_neither_torch_nor_pandas() -> None:
    code = (
        "import sys, shortllm; shortllm.BlockScores, shortllm.Evaluation, shortllm.Comparison;"
        "assert not {'torch', 'pandas', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_notebooks_have_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = types.SimpleNamespace(kernel=object(), config={})
    module = types.SimpleNamespace(get_ipython=lambda: shell)
    assert not progress._in_notebook() or "IPython" in sys.modules
    monkeypatch.setitem(sys.modules, "IPython", module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tqdm, where ipywidgets is not installed
        with progress.progress("scoring by ppl", 2) as advance:
            advance(1)
    assert "[1/1] scoring by ppl" in capsys.readouterr().err


# ---- the notebook of the documentation


def read() -> Any:
    return pytest.importorskip("nbformat").read(NOTEBOOK, as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [one for cell in notebook.cells if cell.cell_type == "code" for one in cell.outputs]


def check(notebook: Any) -> None:
    """Every code cell gave what it is there for, and no error."""
    shown = outputs(notebook)
    assert not [one for one in shown if one.output_type in ("error", "stream")]
    html = [one.data["text/html"] for one in shown if "text/html" in one.get("data", {})]
    assert len(html) == 6 and sum("<table" in one for one in html) == 5  # healing is one line
    assert sum("data:image/svg+xml" in one for one in html) == 3
    assert sum("dataframe" in one for one in html) == 2
    assert sum("image/png" in one.get("data", {}) for one in shown) == 1


def test_the_stored_outputs_are_whole() -> None:
    notebook = read()
    check(notebook)
    assert str(Path.home()) not in NOTEBOOK.read_text() and "/tmp" not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = read()
    client.NotebookClient(
        notebook,
        timeout=600,
        startup_timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":  # bars
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    if os.environ.get("SHORTLLM_WRITE_GOLDEN"):
        notebook.metadata.language_info = {"name": "python"}
        nbformat.write(notebook, NOTEBOOK)
    check(notebook)
