"""Models as numbered points of quality against cost, and the line of those that none beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from shortllm.reporting.plots.drawing import (  # fmt: skip
    COLOURS,
    LINES,
    MARKERS,
    NARROW_COLUMNS,
    Width,
    drawn,
    mark_heights,
    plain_frame,
    tick,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_SPREAD = 4.0
"""Highest over lowest quality from which on their axis is logarithmic."""

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
    """The points that no other beats in both: least `x`, and of those the best `y`; by `x`."""
    sign = -1 if higher_is_better else 1
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, sign * point.y)):
        if not best or sign * point.y < sign * best[-1].y:
            best.append(point)
    return best


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoPlot:
    """Quality upwards or, of perplexities, downwards; cost to the right."""

    points: Sequence[Point]
    x_label: str
    y_label: str
    higher_is_better: bool = False
    numbered: bool = True

    @property
    def is_log(self) -> bool:
        """Whether a linear axis would press the good models together."""
        heights = [point.y for point in self.points]
        return min(heights) > 0 and max(heights) > LOG_SPREAD * min(heights)

    def svg(self, width: Width) -> str:
        """The plot as an inline `<svg>` element, for a page column or for a phone."""
        size = (7.6, 3.8) if width == "wide" else (3.6, 3.8)
        return drawn(self._draw, width=width, size=size, alt=self._description())

    def _description(self) -> str:
        best = front(self.points, higher_is_better=self.higher_is_better)
        numbers = ", ".join(str(point.number) for point in best)
        return (
            f"{len(self.points)} models by {self.y_label} and {self.x_label}; none beats the "
            f"numbers {numbers}."
        )

    def _draw(self, axes: Axes, *, narrow: bool) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        best = front(self.points, higher_is_better=self.higher_is_better)
        axes.step(
            [point.x for point in best], [point.y for point in best], where="post",
            color=COLOURS["muted"], linewidth=1.0, linestyle=(0, (4, 2)), zorder=1,
            label="none better",
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
                axes.annotate(
                    str(point.number), (point.x, point.y), xytext=(6, 4), fontsize=8,
                    textcoords="offset points", color=COLOURS["ink"],
                )  # fmt: skip
        if self.is_log:
            axes.set_yscale("log")
        heights = [point.y for point in self.points]
        decades = math.log10(max(heights) / min(heights)) if min(heights) > 0 else 0.0
        mark_heights(axes, decades, log=self.is_log)
        axes.xaxis.set_major_locator(
            MaxNLocator(nbins=4 if narrow else 8, steps=[1, 2, 2.5, 5, 10])
        )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        axes.margins(x=0.08, y=0.1)
        axes.set_xlabel(self.x_label, color=COLOURS["muted"])
        axes.set_ylabel(self.y_label, color=COLOURS["muted"])
        plain_frame(axes, bottom=True)
        self._draw_legend(axes, groups, narrow=narrow)

    def _draw_legend(self, axes: Axes, groups: Sequence[str], *, narrow: bool) -> None:
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
            Line2D([], [], linestyle=(0, (4, 2)), color=COLOURS["muted"], label="none better")
        )
        axes.legend(
            handles=entries, loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False,
            ncols=2 if narrow else NARROW_COLUMNS + 1, labelcolor=COLOURS["ink"], borderpad=0,
            borderaxespad=0.4, columnspacing=1.2, handlelength=1.6,
        )  # fmt: skip
