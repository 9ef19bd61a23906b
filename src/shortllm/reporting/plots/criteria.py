"""A line per criterion over a band of random removals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shortllm.reporting.plots.drawing import (
    COLOURS,
    DASHES,
    LOG_RANGE,
    NARROW_COLUMNS,
    Width,
    drawn,
    line_style,
    mark_heights,
    plain_frame,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_PERPLEXITIES = 4.0
"""Largest over smallest perplexity from which on their axis is logarithmic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriterionLine:
    """One criterion: a height for each number of removed blocks."""

    name: str
    heights: Sequence[float]
    baseline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonPlot:
    """A line per criterion over a band of random draws, each from the intact model on."""

    blocks: Sequence[int]
    """Numbers of removed blocks, ascending from 0."""
    of: int
    lines: Sequence[CriterionLine]
    low: Sequence[float]
    mean: Sequence[float]
    high: Sequence[float]
    y_label: str

    @property
    def heights(self) -> list[float]:
        """All that is drawn; what is infinite is not."""
        every = [*self.low, *self.high, *(height for line in self.lines for height in line.heights)]
        return [height for height in every if math.isfinite(height)]

    @property
    def is_log(self) -> bool:
        """Whether a linear axis would press the good lines together."""
        return max(self.heights) > LOG_PERPLEXITIES * min(self.heights)

    def svg(self, width: Width) -> str:
        """The plot as an inline `<svg>` element, for a page column or for a phone."""
        entries = len(self.lines) + 2
        rows = math.ceil(entries / NARROW_COLUMNS)
        wide, narrow = (7.6, max(4.1, 0.2 * entries + 0.5)), (3.6, 3.8 + 0.2 * rows)
        size = wide if width == "wide" else narrow
        return drawn(self._draw, width=width, size=size, alt=self._description())

    def _description(self) -> str:
        names = ", ".join(line.name for line in self.lines)
        return (
            f"Line chart of {self.y_label} against removed blocks, one line for each of {names}, "
            "and a band for random removals."
        )

    def _draw(self, axes: Axes, *, narrow: bool) -> None:
        axes.fill_between(
            self.blocks, self.low, self.high, color=COLOURS["band"], linewidth=0, zorder=1,
            label="random, range",
        )  # fmt: skip
        axes.plot(
            self.blocks, self.mean, color=COLOURS["muted"], linestyle=DASHES[3], linewidth=1.6,
            zorder=2, label="random, mean",
        )  # fmt: skip
        coloured = [line for line in self.lines if not line.baseline]
        baselines = [line for line in self.lines if line.baseline]
        for place, line in enumerate(coloured):
            axes.plot(self.blocks, line.heights, label=line.name, zorder=4, **line_style(place))
        for place, line in enumerate(baselines):
            axes.plot(
                self.blocks, line.heights, label=line.name, zorder=3, color=COLOURS["muted"],
                linestyle=DASHES[1 + place % 2], linewidth=1.2, marker="<>"[place % 2],
                markersize=4.5,
            )  # fmt: skip
        if self.is_log:
            low, high = min(self.heights), max(self.heights)
            axes.set_yscale("log")
            axes.set_ylim(low / 1.15, 1.15 * min(high, LOG_RANGE * low))
        self._draw_axes(axes, narrow=narrow)
        self._draw_legend(axes, narrow=narrow)

    def _draw_axes(self, axes: Axes, *, narrow: bool) -> None:
        axes.set_xticks(
            self.blocks,
            [f"{n}\n{100 * n / self.of:.0f} %" if n else "0" for n in self.blocks],
        )
        axes.set_xlabel(f"blocks removed, of {self.of}", color=COLOURS["muted"])
        axes.set_ylabel(self.y_label, color=COLOURS["muted"])
        mark_heights(axes, math.log10(max(self.heights) / min(self.heights)), log=self.is_log)
        plain_frame(axes, bottom=True)

    def _draw_legend(self, axes: Axes, *, narrow: bool) -> None:
        """In the order in which the lines end, highest first, as far as that can be said."""
        handles, names = axes.get_legend_handles_labels()
        ends = {line.name: line.heights[-1] for line in self.lines}
        order = sorted(range(len(names)), key=lambda i: -ends.get(names[i], -math.inf))
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
        if narrow:
            place = {"loc": "lower left", "bbox_to_anchor": (-0.12, 1.0), "ncols": NARROW_COLUMNS}
        axes.legend(
            [handles[i] for i in order], [names[i] for i in order], frameon=False,
            labelcolor=COLOURS["ink"], handlelength=2.0 if narrow else 2.6, borderpad=0,
            borderaxespad=0.4, columnspacing=1.0, labelspacing=0.55, **place,
        )  # fmt: skip
