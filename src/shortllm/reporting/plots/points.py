"""Models as points: perplexity on one axis, and quality against cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from shortllm.format import number
from shortllm.reporting.parts import Figure
from shortllm.reporting.plots import (
    COLOURS,
    LINES,
    MARKERS,
    WIDTH,
    drawn,
    label_axes,
    legend_above,
    mark_heights,
    plain_frame,
    tick,
)

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
class TradePlot:
    """Quality on the vertical axis, cost on the horizontal one."""

    points: Sequence[Point]
    x_label: str
    y_label: str
    higher_is_better: bool = False
    numbered: bool = True

    @property
    def is_log(self) -> bool:
        """Whether the good models would be too close to each other on a linear axis."""
        heights = [point.y for point in self.points]
        return min(heights) > 0 and max(heights) > LOG_SPREAD * min(heights)

    def figure(self) -> Figure:
        """The plot as a part of a page."""
        return drawn(self._draw, size=(WIDTH, 3.4), alt=self._description())

    def _description(self) -> str:
        best = front(self.points, higher_is_better=self.higher_is_better)
        numbers = ", ".join(str(point.number) for point in best)
        return (
            f"{len(self.points)} models by {self.y_label} and {self.x_label}. No model is better "
            f"in both than those with the numbers {numbers}."
        )

    def _draw(self, axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        best = front(self.points, higher_is_better=self.higher_is_better)
        axes.step(
            [point.x for point in best], [point.y for point in best], where="post",
            color=COLOURS["muted"], linewidth=1.0, linestyle=_DASHES, zorder=1,
        )  # fmt: skip
        groups = list(dict.fromkeys(point.group for point in self.points if point.group))
        for point in self.points:
            place = groups.index(point.group) if point.group else 0
            colour = COLOURS[f"line-{place % LINES + 1}"] if point.group else COLOURS["ink"]
            axes.plot(
                [point.x], [point.y], linestyle="none", zorder=3, color=colour,
                marker="s" if point.group is None else MARKERS[place % LINES], markersize=7,
                markerfacecolor="none" if point.kind == "pruned" else colour,
            )  # fmt: skip
        if self.numbered:
            self._draw_numbers(axes)
        if self.is_log:
            axes.set_yscale("log")
        heights = [point.y for point in self.points]
        decades = math.log10(max(heights) / min(heights)) if min(heights) > 0 else 0.0
        mark_heights(axes, decades, log=self.is_log)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        axes.margins(x=0.08, y=0.1)
        label_axes(axes, self.x_label, self.y_label)
        plain_frame(axes)
        self._draw_legend(axes, groups)

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

    def _draw_legend(self, axes: Axes, groups: Sequence[str]) -> None:
        from matplotlib.lines import Line2D

        entries = [
            Line2D(
                [], [], linestyle="none", marker=MARKERS[place % LINES], label=group,
                color=COLOURS[f"line-{place % LINES + 1}"], markersize=6, markerfacecolor="none",
            )
            for place, group in enumerate(groups)
        ]  # fmt: skip
        if any(point.group is None for point in self.points):
            entries.append(
                Line2D([], [], linestyle="none", marker="s", color=COLOURS["ink"], markersize=6,
                       label="original")
            )  # fmt: skip
        entries.append(
            Line2D([], [], linestyle=_DASHES, color=COLOURS["muted"], label="no model is better")
        )
        legend_above(axes, handles=entries, ncols=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class DotPlot:
    """A dot per model, at the end of a line from the first model's value."""

    names: Sequence[str]
    values: Sequence[float]
    colours: Sequence[str]
    """One of the page's colours for each model."""
    label: str

    @property
    def is_log(self) -> bool:
        """Whether the low values would be too close to each other on a linear axis."""
        return max(self.values) > LOG_DOTS * min(self.values)

    def figure(self) -> Figure:
        """The plot as a part of a page."""
        size = (WIDTH, 0.6 + 0.25 * len(self.names))
        return drawn(self._draw, size=size, alt=self._description())

    def _description(self) -> str:
        said = [
            f"{name} {number(value)}" for name, value in zip(self.names, self.values, strict=True)
        ]
        return f"Dot plot of {self.label}: {', '.join(said)}."

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
        if self.is_log:
            axes.set_xscale("log")
            axes.set_xlim(low / (high / low) ** 0.05, high * (high / low) ** 0.2)
        else:
            spread = (high - low) or high
            axes.set_xlim(low - 0.05 * spread, high + 0.2 * spread)
        axes.set_yticks(range(len(self.names)), self.names)
        axes.invert_yaxis()
        axes.margins(y=0.15)
        axes.xaxis.set_visible(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(length=0, labelcolor=COLOURS["ink"])
        axes.set_title(
            self.label + (", logarithmic" if self.is_log else ""), loc="left", fontsize=8.5,
            color=COLOURS["muted"],
        )  # fmt: skip
