"""A dot per model on a common axis, at the end of a line from the first model's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shortllm.reporting.plots.drawing import COLOURS, Width, drawn
from shortllm.reporting.wording import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_SPREAD = 10.0
"""Highest over lowest value from which on the axis is logarithmic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DotPlot:
    """Positive values of named models, the first on top; the axis need not begin at 0."""

    names: Sequence[str]
    values: Sequence[float]
    colours: Sequence[str]
    """For each model one of the page's colours."""
    label: str

    @property
    def is_log(self) -> bool:
        """Whether a linear axis would press the low values together."""
        return max(self.values) > LOG_SPREAD * min(self.values)

    def svg(self, width: Width) -> str:
        """The plot as an inline `<svg>` element, for a page column or for a phone."""
        height = 0.7 + 0.27 * len(self.names)
        size = (7.6, height) if width == "wide" else (3.6, height)
        return drawn(self._draw, width=width, size=size, alt=self._description())

    def _description(self) -> str:
        said = [
            f"{name} {number(value)}" for name, value in zip(self.names, self.values, strict=True)
        ]
        return f"Dot plot of {self.label}: {', '.join(said)}."

    def _draw(self, axes: Axes, *, narrow: bool) -> None:
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
