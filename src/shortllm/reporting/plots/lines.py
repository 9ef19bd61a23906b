"""Lines over a common axis: speed against batch size, and against blocks removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shortllm.reporting.plots.drawing import COLOURS, Width, drawn, line_style, plain_frame, tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_SPREAD = 10.0
"""Highest over lowest point from which on an axis of batch plots is logarithmic."""

_STYLES = (("kept", "o"), ("removed", "s"), ("protected", "^"), ("ink", "D"), ("muted", "v"))
"""Colour and marker of few lines; of more each has a colour of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Points of one line; an ideal one is dashed and has no markers."""

    name: str
    points: Sequence[tuple[float, float]]
    ideal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LinePlot:
    """Lines over a common horizontal axis."""

    lines: Sequence[Line]
    x_label: str
    y_label: str
    doubling: bool = False
    """Horizontal axis in powers of two; the vertical one from zero, or logarithmic as well."""

    @property
    def is_log(self) -> bool:
        """Whether a linear vertical axis would press the low points together."""
        heights = [y for line in self.lines for _, y in line.points]
        return self.doubling and max(heights) > LOG_SPREAD * min(heights)

    def svg(self, width: Width) -> str:
        """The plot as an inline `<svg>` element, for a page column or for a phone."""
        size = (7.6, 3.3) if width == "wide" else (3.6, 3.3)
        return drawn(self._draw, width=width, size=size, alt=self._description())

    def _description(self) -> str:
        names = ", ".join(line.name for line in self.lines)
        return f"Line chart of {self.y_label} against {self.x_label}, one line for each of {names}."

    def _draw(self, axes: Axes, *, narrow: bool) -> None:
        measured = [line for line in self.lines if not line.ideal]
        for place, line in enumerate(measured):
            style = line_style(place)
            if len(measured) <= len(_STYLES):
                colour, marker = _STYLES[place]
                style = {
                    "color": COLOURS[colour], "marker": marker, "markersize": 4.5, "linewidth": 1.6
                }  # fmt: skip
            axes.plot(*zip(*line.points, strict=True), label=line.name, zorder=3, **style)
        for line in self.lines:
            if line.ideal:
                axes.plot(
                    *zip(*line.points, strict=True), label=line.name, color=COLOURS["muted"],
                    linestyle=(0, (4, 3)), linewidth=1.2, zorder=2,
                )  # fmt: skip
        self._draw_axes(axes)
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2 if narrow else 4, frameon=False,
            labelcolor=COLOURS["ink"], borderaxespad=0.4, columnspacing=1.4, borderpad=0,
        )  # fmt: skip

    def _draw_axes(self, axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

        places = sorted({x for line in self.lines for x, _ in line.points})
        if self.doubling:
            axes.set_xscale("log", base=2)
        if self.is_log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
            if self.doubling:
                axes.set_ylim(bottom=0)
        axes.set_xticks(places, [tick(x) for x in places])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        axes.set_xlabel(self.x_label, color=COLOURS["muted"])
        axes.set_ylabel(self.y_label, color=COLOURS["muted"])
        axes.grid(axis="y", color=COLOURS["rule"], linewidth=0.6, zorder=0)
        axes.set_axisbelow(True)
        plain_frame(axes, bottom=True)
