"""The page of several runs: the Pareto front, what is not drawn, and what has to fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from test_standard_errors import run_of

from shortllm.reporting import compare
from shortllm.reporting.charts import Point, TradePlot
from shortllm.reporting.load import load_runs
from shortllm.reporting.plots import WIDTH, drawn
from shortllm.reporting.runs_page import compared_models, runs_table

NLLS = [2.0 + n / 1000 for n in range(150)]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs on one text, of which the smaller model is also the better; one on another text."""
    return [
        run_of(tmp_path / name, removed, NLLS, [n + worse for n in NLLS], source=source)
        for name, removed, worse, source in (
            ("a", (5,), 0.3, "wikitext2"),
            ("b", (5, 7), 0.2, "wikitext2"),
            ("c", (8,), 0.2, "ptb"),
        )
    ]


def test_the_front_is_a_word_in_the_table_and_in_the_results(runs: list[Path]) -> None:
    models = compared_models(load_runs(runs))
    fronts = {one.full_name: one.front for one in models}
    on_it = {"perplexity": ["parameters"]}
    assert fronts == {"acme/tiny": on_it, "a: pruned": {}, "b: pruned": on_it, "c: pruned": {}}
    head, rows = runs_table(models).plain()
    column = head.index("Pareto front (of perplexity and)")
    assert [row[column] for row in rows] == ["parameters", "", "parameters", ""]


def test_a_run_that_is_not_drawn_is_named_with_the_reason(runs: list[Path], tmp_path: Path) -> None:
    from healthy import benchmark

    page = tmp_path / "compare.html"
    compare(runs, out=page)
    assert "Not in this plot: c: pruned (not measured on wikitext2)." in page.read_text()
    benchmark(fingerprints=("ab" * 32, "ab" * 32)).save(runs[1] / "bench.json")
    compare(runs, out=page)
    assert "a: pruned (no comparable latency)" in page.read_text()


def test_tables_and_plots_scroll_in_boxes_of_their_own(runs: list[Path], tmp_path: Path) -> None:
    compare(runs, out=tmp_path / "compare.html")
    page = (tmp_path / "compare.html").read_text()
    assert page.count("<table>") == len(re.findall(r'<div class="scroll">\s*<table>', page)) > 0
    assert page.count("<svg") == len(re.findall(r'<div class="plot"[^>]*>\s*<svg', page)) > 0
    assert re.search(r"\.scroll, \.plot \{[^}]*overflow-x: auto;", page)


def plot_of(*names: str) -> TradePlot:
    """A point for each run, and an original."""
    points = [
        Point(number=n, name="pruned", group=name, kind="pruned", x=n, y=100.0 - n)
        for n, name in enumerate((None, *names), start=1)
    ]
    return TradePlot(points=points, x_label="size", y_label="loss")


@pytest.mark.parametrize("letters", [4, 12, 25, 100])
@pytest.mark.parametrize("count", [2, 9, 12])
def test_a_legend_is_not_wider_than_its_plot(letters: int, count: int) -> None:
    def look(axes: Axes) -> None:
        plot._draw(axes)
        axes.figure.draw_without_rendering()
        legend = axes.get_legend()
        assert legend is not None
        place, bounds = legend.get_window_extent(), axes.figure.bbox
        assert place.x1 <= bounds.x1 and place.y1 <= bounds.y1
        assert axes.get_window_extent().width > 0.75 * bounds.width
        seen.append(place)

    names = [f"{n:02}-{'ppl-three-blocks-removed-' * 5}"[:letters] for n in range(count)]
    plot, seen = plot_of(*names), list[object]()
    drawn(look, size=(WIDTH, plot._height), alt="")
    assert seen


def test_points_at_nearly_one_place_share_a_label() -> None:
    plot = plot_of("a", "b", "c")
    near = Point(number=9, name="pruned", group="c", kind="pruned", x=2.0, y=98.01)
    axes = Figure().add_subplot()
    TradePlot(points=[*plot.points, near], x_label="size", y_label="loss")._draw(axes)
    assert sorted(text.get_text() for text in axes.texts) == ["1", "2, 9", "3", "4"]


def test_runs_beyond_the_last_colour_have_other_marks() -> None:
    plot = plot_of(*(f"run{n}" for n in range(10)))
    axes = Figure().add_subplot()
    plot._draw(axes)
    marks = {
        (line.get_color(), line.get_marker()) for line in axes.lines if line.get_label()[0] == "r"
    }
    assert len(marks) == 10
