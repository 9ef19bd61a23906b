"""Models as points: perplexity on one axis, and quality against cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from shortllm.format import number
from shortllm.reporting.plots import COLOURS, LINES, MARKERS, Plot, legend_above, mark_heights, tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_SPREAD = 4.0
"""Highest over lowest quality from which its axis is logarithmic."""
LOG_DOTS = 10.0
"""The same for dots on one axis."""
_DASHES = (0, (4, 2))

Kind = Literal["original", "pruned", "retrained", "quantized"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A model: its number in the table, the run it is from (None: an original), and its place."""

    number: int
    group: str | None
    kind: Kind
    x: float
    y: float


def front(points: Sequence[Point], *, higher_is_better: bool) -> list[Point]:
    """The points that no other point beats in both `x` (lower is better) and `y`; sorted by `x`."""
    sign = -1 if higher_is_better else 1
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, sign * point.y)):
        if not best or sign * point.y < sign * best[-1].y:
            best.append(point)
    return best


@dataclass(frozen=True, slots=True, kw_only=True)
class TradePlot(Plot):
    """Quality on the vertical axis, cost on the horizontal one."""

    points: Sequence[Point]
    x_label: str
    y_label: str
    higher_is_better: bool = False
    numbered: bool = True

    @property
    def _height(self) -> float:
        return 3.4

    def _alt(self) -> str:
        best = front(self.points, higher_is_better=self.higher_is_better)
        numbers = ", ".join(str(point.number) for point in best)
        return (
            f"{len(self.points)} models by {self.y_label} and {self.x_label}. No model is better "
            f"in both than those with the numbers {numbers}."
        )

    def _draw(self, axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        groups = list(dict.fromkeys(point.group for point in self.points if point.group))
        styles: dict[str | None, dict[str, Any]] = {
            group: {"color": COLOURS[f"line-{i % LINES + 1}"], "marker": MARKERS[i % LINES]}
            for i, group in enumerate(groups)
        }
        if any(point.group is None for point in self.points):
            styles[None] = {"color": COLOURS["ink"], "marker": "s"}
        for group, style in styles.items():  # only the legend has these
            fill = style["color"] if group is None else "none"
            axes.plot(
                [], [], linestyle="none", markersize=6, markerfacecolor=fill,
                label=group or "original", **style,
            )  # fmt: skip
        for point in self.points:
            style = styles[point.group]
            fill = "none" if point.kind == "pruned" else style["color"]
            axes.plot(
                [point.x], [point.y], linestyle="none", zorder=3, markersize=7,
                markerfacecolor=fill, **style,
            )  # fmt: skip
        best = front(self.points, higher_is_better=self.higher_is_better)
        axes.step(
            [point.x for point in best], [point.y for point in best], where="post", linewidth=1.0,
            color=COLOURS["muted"], linestyle=_DASHES, zorder=1, label="no model is better",
        )  # fmt: skip
        if self.numbered:
            self._draw_numbers(axes)
        low, high = min(point.y for point in self.points), max(point.y for point in self.points)
        # the good models would be too close to each other on a linear axis
        is_log = low > 0 and high > LOG_SPREAD * low
        if is_log:
            axes.set_yscale("log")
        mark_heights(axes, math.log10(high / low) if is_log else None)
        axes.set(xlabel=self.x_label, ylabel=self.y_label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        axes.margins(x=0.08, y=0.1)
        legend_above(axes, ncols=5)

    def _draw_numbers(self, axes: Axes) -> None:
        """A label for each point; points at the same place share one."""
        places: dict[tuple[float, float], list[str]] = {}
        for point in self.points:
            places.setdefault((point.x, point.y), []).append(str(point.number))
        for place, numbers in places.items():
            axes.annotate(
                ", ".join(numbers), place, xytext=(6, 4), fontsize=8, textcoords="offset points",
                color=COLOURS["ink"],
            )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DotPlot(Plot):
    """A dot per model, at the end of a line from the first model's value."""

    names: Sequence[str]
    values: Sequence[float]
    colours: Sequence[str]
    """One of the page's colours for each model."""
    label: str

    @property
    def _height(self) -> float:
        return 0.6 + 0.25 * len(self.names)

    def _alt(self) -> str:
        pairs = zip(self.names, self.values, strict=True)
        said = ", ".join(f"{name} {number(value)}" for name, value in pairs)
        return f"Dot plot of {self.label}: {said}."

    def _draw(self, axes: Axes) -> None:
        first = self.values[0]
        axes.axvline(first, color=COLOURS["rule"], linewidth=1.0, zorder=1)
        for place, (value, colour) in enumerate(zip(self.values, self.colours, strict=True)):
            axes.plot([first, value], [place, place], color=COLOURS[colour], linewidth=2, zorder=2)
            axes.plot([value], [place], "o", color=COLOURS[colour], markersize=7, zorder=3)
            axes.annotate(
                number(value), (value, place), xytext=(8, 0), textcoords="offset points",
                va="center", color=COLOURS["ink"],
            )  # fmt: skip
        low, high = min(self.values), max(self.values)
        is_log = high > LOG_DOTS * low
        if is_log:
            axes.set_xscale("log")
            axes.set_xlim(low / (high / low) ** 0.05, high * (high / low) ** 0.2)
        else:
            spread = (high - low) or high
            axes.set_xlim(low - 0.05 * spread, high + 0.2 * spread)
        axes.set_yticks(range(len(self.names)), self.names)
        axes.invert_yaxis()
        axes.margins(y=0.15)
        axes.grid(visible=False)
        axes.xaxis.set_visible(False)
        axes.spines.bottom.set_visible(False)
        axes.set_title(
            self.label + (", logarithmic" if is_log else ""), loc="left", fontsize=8.5,
            color=COLOURS["muted"],
        )  # fmt: skip
