"""Lines over a common axis: speed, loss, and the perplexity left by several criteria."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shortllm.reporting.plots import (
    COLOURS,
    LOG_RANGE,
    Plot,
    legend_above,
    line_style,
    mark_heights,
    tick,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[float, float]]

DASHED: dict[str, Any] = {
    "color": COLOURS["muted"], "linestyle": (0, (4, 3)), "linewidth": 1.2, "zorder": 2
}  # fmt: skip
"""Look of a line that was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Points of one line; without a style it gets the next colour and marker."""

    name: str
    points: Points
    style: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """An area between two heights at each place."""

    name: str
    places: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinePlot(Plot):
    """Lines over a common horizontal axis."""

    lines: Sequence[Line]
    x_label: str
    y_label: str
    ticks: Mapping[float, str] | None = None
    """Labels of the horizontal axis by place; default: whole numbers."""
    doubling: bool = False
    """Horizontal axis in powers of two, vertical axis from zero."""
    log_spread: float = math.inf
    """Highest over lowest point from which the vertical axis is logarithmic."""
    band: Band | None = None
    mark: float | None = None
    """Place of a vertical line."""
    listed_by_end: bool = False
    """Legend at the side, in the order in which the lines end."""
    name: str = ""
    """What is drawn, where labels and lines do not tell."""

    @property
    def heights(self) -> list[float]:
        """Everything that is drawn; what is infinite is not."""
        every = [y for line in self.lines for _, y in line.points]
        if self.band is not None:
            every += [*self.band.low, *self.band.high]
        return [height for height in every if math.isfinite(height)]

    @property
    def is_log(self) -> bool:
        """Whether the low lines would be too close to each other on a linear axis."""
        return min(self.heights) > 0 and max(self.heights) > self.log_spread * min(self.heights)

    @property
    def _height(self) -> float:
        return max(3.6, 0.2 * len(self.lines) + 0.7) if self.listed_by_end else 2.9

    def _alt(self) -> str:
        names = ", ".join(line.name for line in self.lines)
        kind = f"Line chart{f' of {self.name}' if self.name else ''}"
        band = f", and a band for {self.band.name}" if self.band else ""
        return f"{kind}: {self.y_label} against {self.x_label}, one line for each of {names}{band}."

    def _draw(self, axes: Axes) -> None:
        if self.band is not None:
            axes.fill_between(
                self.band.places, self.band.low, self.band.high, color=COLOURS["band"],
                linewidth=0, zorder=1, label=self.band.name,
            )  # fmt: skip
        for place, line in enumerate(self.lines):
            style = line.style or line_style(place)
            axes.plot(*zip(*line.points, strict=True), label=line.name, **{"zorder": 3, **style})
        if self.mark is not None:
            axes.axvline(self.mark, color=COLOURS["protected"], linewidth=0.8, linestyle="--")
        self._draw_axes(axes)
        self._draw_legend(axes)

    def _draw_axes(self, axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        low, high = min(self.heights), max(self.heights)
        if self.doubling:
            axes.set_xscale("log", base=2)
        if self.is_log:
            axes.set_yscale("log")
            axes.set_ylim(low / 1.15, 1.15 * min(high, LOG_RANGE * low))
        elif self.doubling:
            axes.set_ylim(bottom=0)
        if self.ticks is None:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        else:
            axes.set_xticks(list(self.ticks), list(self.ticks.values()))
        mark_heights(axes, math.log10(high / low) if self.is_log else None)
        axes.set(xlabel=self.x_label, ylabel=self.y_label)

    def _draw_legend(self, axes: Axes) -> None:
        if not self.listed_by_end:
            legend_above(axes, handlelength=2.0)
            return
        handles, names = axes.get_legend_handles_labels()
        ends = {line.name: line.points[-1][1] for line in self.lines if line.style is not DASHED}
        order = sorted(range(len(names)), key=lambda i: -ends.get(names[i], -math.inf))
        axes.legend(
            [handles[i] for i in order], [names[i] for i in order], loc="upper left",
            bbox_to_anchor=(1.0, 1.0), handlelength=2.6, labelspacing=0.55,
        )  # fmt: skip


def marked(places: Sequence[float]) -> dict[float, str]:
    """A tick with its number at each place."""
    return {place: tick(place) for place in sorted(set(places))}
