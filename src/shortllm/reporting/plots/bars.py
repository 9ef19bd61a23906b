"""One bar per block: its importance by the criterion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shortllm.reporting.parts import Status
from shortllm.reporting.plots import COLOURS, LOG_RANGE, Plot, legend_above, mark_heights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_SPREAD = 30.0
"""Largest over smallest bar from which the axis is logarithmic."""
MARKER_PT = 6.5
"""Size of the marker in place of a bar."""
FLAT_SPREAD = 0.15
"""Bars that differ by less than this part of the largest get an axis that does not start at 0."""
SPAN_PT = 420
"""Width of all bars together, in points."""
_HATCHES: dict[Status, str | None] = {"kept": None, "removed": "//////", "protected": "------"}


@dataclass(frozen=True, slots=True, kw_only=True)
class BarPlot(Plot):
    """One bar per original block; `heights` and `statuses` are in block order."""

    heights: Sequence[float]
    statuses: Sequence[Status]
    y_label: str
    below_label: str = "too small for the axis"
    """Legend of bars that a logarithmic axis cannot show."""
    span: tuple[int, int] | None = None
    """First and last block of a span that was removed as one."""

    @property
    def log_floor(self) -> float | None:
        """Foot of the logarithmic axis, or None where a linear one shows all bars well."""
        positive = [height for height in self.heights if height > 0]
        if not positive or max(positive) < LOG_SPREAD * min(positive):
            return None
        return max(min(positive) / 1.6, max(positive) / LOG_RANGE)

    @property
    def linear_floor(self) -> float:
        """Foot of the linear axis: 0, or just below the lowest bar where all are nearly equal."""
        low, high = min(self.heights), max(self.heights)
        if low > 0 and high - low < FLAT_SPREAD * high:
            step = 10.0 ** math.floor(math.log10(max(high - low, high * 1e-6)))
            return max(0.0, math.floor((low - 0.3 * (high - low)) / step) * step)
        return 0.0

    def _alt(self) -> str:
        removed = [str(block) for block, status in enumerate(self.statuses) if status == "removed"]
        return (
            f"Bar chart, one bar for each of {len(self.heights)} blocks: {self.y_label}. "
            f"Removed: {', '.join(removed) or 'none'}."
        )

    def _draw(self, axes: Axes) -> None:
        floor, pitch_pt = self.log_floor, SPAN_PT / len(self.heights)
        foot = self.linear_floor if floor is None else floor
        hidden = {
            b for b, height in enumerate(self.heights) if floor is not None and height <= floor
        }
        for status in ("kept", "removed", "protected"):
            blocks = [b for b, s in enumerate(self.statuses) if s == status and b not in hidden]
            axes.bar(
                blocks, [self.heights[b] - foot for b in blocks], bottom=foot, width=0.78, zorder=2,
                **_bar_style(status, pitch_pt=pitch_pt),
            )  # fmt: skip
        if floor is not None:
            axes.set_yscale("log")
            axes.set_ylim(floor, max(self.heights) * (max(self.heights) / floor) ** 0.08)
        elif foot:
            axes.set_ylim(bottom=foot)
        if self.span is not None:
            first, last = self.span
            axes.axvspan(first - 0.5, last + 0.5, color=COLOURS["band"], linewidth=0, zorder=0)
        for block, status in enumerate(self.statuses):
            if block in hidden:
                axes.plot(
                    [block], [foot], linestyle="none", marker="v", markersize=MARKER_PT,
                    color=COLOURS[status], clip_on=False, zorder=4,
                )  # fmt: skip
            if status == "removed":
                axes.annotate(
                    "×", (block, max(self.heights[block], foot)), ha="center",
                    xytext=(0, MARKER_PT if block in hidden else 1.5), color=COLOURS["removed"],
                    textcoords="offset points", fontsize=min(10, max(4.5, 1.1 * pitch_pt)),
                )  # fmt: skip
        self._draw_axes(axes)
        self._draw_legend(axes, below=bool(hidden))

    def _draw_axes(self, axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        count = len(self.heights)
        axes.set_xlim(-0.7, count - 0.3)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
        floor = self.log_floor
        at_zero = floor is None and not self.linear_floor
        if at_zero:
            axes.axhline(0, color=COLOURS["ink"], linewidth=0.8, zorder=3)
        axes.spines.bottom.set_visible(not at_zero)
        axes.set(xlabel="block (index in the original model)", ylabel=self.y_label)
        whole = all(float(height).is_integer() for height in self.heights)
        decades = None if floor is None else math.log10(max(self.heights) / floor)
        mark_heights(axes, decades, whole=whole)

    def _draw_legend(self, axes: Axes, *, below: bool) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        names: dict[Status, str] = {
            "kept": "kept", "removed": "removed (×)", "protected": "kept, protected"
        }  # fmt: skip
        entries: list[Patch | Line2D] = [
            Patch(label=f"{name}: {self.statuses.count(status)}", **_bar_style(status))
            for status, name in names.items()
            if status in self.statuses
        ]
        if self.span is not None:
            entries.append(Patch(label="removed as one span", facecolor=COLOURS["band"]))
        if below:
            entries.append(
                Line2D([], [], linestyle="none", marker="v", markersize=0.7 * MARKER_PT,
                       color=COLOURS["muted"], label=self.below_label)
            )  # fmt: skip
        legend_above(axes, handles=entries, handleheight=0.9)


def _bar_style(status: Status, *, pitch_pt: float = 100) -> dict[str, Any]:
    colour = COLOURS[status]
    # Slanted lines merge on the thinnest bars: there plain colour and the cross must do.
    if status == "kept" or (status == "removed" and pitch_pt < 4):
        return {"facecolor": colour, "edgecolor": colour, "linewidth": 0.0}
    return {
        "facecolor": COLOURS[f"{status}-tint"],
        "edgecolor": colour,
        "linewidth": min(0.9, 0.12 * pitch_pt),
        "hatch": _HATCHES[status],
    }
