"""The kinds of plots: a bar per block, lines, quality against cost, and a dot per model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

from shortllm.format import listed, number
from shortllm.reporting.parts import Status
from shortllm.reporting.plots import (
    COLOURS,
    LINES,
    LOG_RANGE,
    MARKERS,
    Plot,
    legend_above,
    line_style,
    mark_heights,
    tick,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_BARS = 30.0
LOG_QUALITY = 4.0
LOG_DOTS = 10.0
"""Highest over lowest value from which an axis is logarithmic, by kind of plot."""
MARKER_PT = 6.5
"""Size of the marker in place of a bar."""
FLAT_SPREAD = 0.15
"""Bars that differ by less than this part of the largest get an axis that does not start at 0."""
LABEL_WIDTH = 44
"""Letters in a line of a label at the side."""
LABEL_PARTS = (0.02, 0.045)
"""Distances from which two points have labels of their own, as parts of the axes."""
SPAN_PT = 420
"""Width of all bars together, in points."""
LEGEND_LETTERS = 82
"""Letters in a line of a legend above a plot, with seven for each mark."""
LEGEND_ENDS = ("original", "other segments", "Pareto front")
"""What a legend of models has after the runs."""


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
    errors: Sequence[float] = ()
    """Standard error of each height; empty where it is not known."""
    near: Sequence[int] = ()
    """Blocks whose place before or behind the cut may be chance."""

    @property
    def log_floor(self) -> float | None:
        """Foot of the logarithmic axis, or None where a linear one shows all bars well."""
        positive = [height for height in self.heights if height > 0]
        if not positive or max(positive) < LOG_BARS * min(positive):
            return None
        return max(min(positive) / 1.6, max(positive) / LOG_RANGE)

    @property
    def linear_floor(self) -> float:
        """Foot of the linear axis: 0, or just below the lowest bar where all are nearly equal."""
        low, high = min(self.heights), max(self.heights)
        if low > 0 and 0 < high - low < FLAT_SPREAD * high:
            step = 10.0 ** math.floor(math.log10(max(high - low, high * 1e-6)))
            return max(0.0, math.floor((low - 0.3 * (high - low)) / step) * step)
        return 0.0

    def _alt(self) -> str:
        removed = [str(b) for b, status in enumerate(self.statuses) if status == "removed"]
        return (
            f"Bar chart, one bar for each of {len(self.heights)} blocks: {self.y_label}. "
            f"Removed: {', '.join(removed) or 'none'}."
        )

    def _draw(self, axes: Axes) -> None:
        floor, pitch_pt = self.log_floor, SPAN_PT / len(self.heights)
        foot = self.linear_floor if floor is None else floor
        hidden = [b for b, h in enumerate(self.heights) if floor is not None and h <= floor]
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
            above = (self.errors[block] if self.errors else 0.0) * (block not in hidden)
            marks = "×" * (status == "removed") + "≈" * (block in self.near)
            if above:
                height = self.heights[block]
                low = height - max(foot, height - above) if height > foot else 0.0
                axes.errorbar(
                    [block], [height], yerr=[[low], [above]], color=COLOURS["ink"],
                    linewidth=0.9, capsize=min(2.0, 0.2 * pitch_pt), zorder=3,
                )  # fmt: skip
            if marks:
                axes.annotate(
                    marks, (block, max(self.heights[block] + above, foot)), ha="center",
                    xytext=(0, MARKER_PT if block in hidden else 1.5), color=COLOURS["removed"],
                    textcoords="offset points", fontsize=min(10, max(4.5, 1.1 * pitch_pt)),
                )  # fmt: skip
        self._draw_axes(axes)
        self._draw_legend(axes, below=bool(hidden))

    def _draw_axes(self, axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        axes.set_xlim(-0.7, len(self.heights) - 0.3)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
        floor = self.log_floor
        at_zero = floor is None and not self.linear_floor
        if at_zero:
            axes.axhline(0, color=COLOURS["ink"], linewidth=0.8, zorder=3)
        axes.spines.bottom.set_visible(not at_zero)
        axes.set(xlabel="block (index in the original model)", ylabel=self.y_label)
        decades = None if floor is None else math.log10(max(self.heights) / floor)
        mark_heights(axes, decades, whole=all(float(h).is_integer() for h in self.heights))

    def _draw_legend(self, axes: Axes, *, below: bool) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        names: dict[Status, str] = {
            "kept": "kept", "removed": "removed (×)", "protected": "kept, protected"
        }  # fmt: skip
        entries: list[Patch | Line2D] = [
            Patch(label=f"{name}: {self.statuses.count(status)}", **_bar_style(status))
            for status, name in names.items()
            if status in self.statuses and len(set(self.statuses)) > 1
        ]
        if self.span is not None:
            entries.append(Patch(label="removed as one span", facecolor=COLOURS["band"]))
        if below:
            entries.append(
                Line2D([], [], linestyle="none", marker="v", markersize=0.7 * MARKER_PT,
                       color=COLOURS["muted"], label=self.below_label)
            )  # fmt: skip
        if entries:
            legend_above(axes, handles=entries, handleheight=0.9)


def _bar_style(status: Status, *, pitch_pt: float = 100) -> dict[str, Any]:
    colour = COLOURS[status]
    # Slanted lines merge on the thinnest bars: there plain colour and the cross must do.
    if status == "kept" or (status == "removed" and pitch_pt < 4):
        return {"facecolor": colour, "edgecolor": colour, "linewidth": 0.0}
    return {
        "facecolor": COLOURS[f"{status}-tint"], "edgecolor": colour,
        "linewidth": min(0.9, 0.12 * pitch_pt), "hatch": ("/" if status == "removed" else "-") * 6,
    }  # fmt: skip


# ---- lines

DASHED: dict[str, Any] = {
    "color": COLOURS["muted"], "linestyle": (0, (4, 3)), "linewidth": 1.2, "zorder": 2
}  # fmt: skip
"""Look of a line that was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Points of one line; without a style it gets the next colour and marker."""

    name: str
    points: Sequence[tuple[float, float]]
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


# ---- points

Kind = Literal["original", "pruned", "healed", "retrained", "quantized"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A model: its number in the table, its name, the run it is from (None: an original), and its
    place."""

    number: int
    name: str
    group: str | None
    kind: Kind
    x: float
    y: float
    error: float | None = None
    """Standard error of `y`."""
    rough: bool = False
    """Whether `y` was measured on other segments than that of most models."""


def front(points: Sequence[Point], *, higher_is_better: bool) -> list[Point]:
    """The Pareto front, by `x`: no other point is at least as good in `y` at a lower `x`, or better
    at the same `x`; without rough ones."""
    sign = -1 if higher_is_better else 1
    best: list[Point] = []
    exact = [point for point in points if not point.rough]
    for point in sorted(exact, key=lambda point: (point.x, sign * point.y)):
        equal = best and (point.x, point.y) == (best[-1].x, best[-1].y)
        if not best or equal or sign * point.y < sign * best[-1].y:
            best.append(point)
    return best


def _in_legend(name: str) -> str:
    """A name that fits into a line of a legend."""
    most = LEGEND_LETTERS - 15
    return name if len(name) <= most else f"{name[: most - 1]}…"


@dataclass(frozen=True, slots=True, kw_only=True)
class TradePlot(Plot):
    """Quality on the vertical axis, cost on the horizontal one."""

    points: Sequence[Point]
    x_label: str
    y_label: str
    higher_is_better: bool = False
    numbered: bool = True
    missing: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names of models that lack one of both, by the reason."""

    @property
    def front(self) -> list[Point]:
        """The Pareto front of its points."""
        return front(self.points, higher_is_better=self.higher_is_better)

    @property
    def best(self) -> str:
        """The points of the Pareto front by their labels: numbers of rows, or names."""
        return listed([point.number if self.numbered else point.name for point in self.front])

    @property
    def _groups(self) -> list[str]:
        """The runs, in the order of the legend."""
        return list(dict.fromkeys(point.group for point in self.points if point.group))

    @property
    def _legend_columns(self) -> int:
        """As many columns as the names leave room for; a column is filled before the next."""
        names = (*map(_in_legend, self._groups), *LEGEND_ENDS)
        letters = [len(name) + 7 for name in names]

        def width(columns: int) -> int:
            rows, longer = divmod(len(letters), columns)
            starts = [n * rows + min(n, longer) for n in range(columns + 1)]
            return sum(max(letters[n:m], default=0) for n, m in itertools.pairwise(starts))

        return next((n for n in range(6, 1, -1) if width(n) <= LEGEND_LETTERS), 1)

    @property
    def _height(self) -> float:
        entries = len(self._groups) + len(LEGEND_ENDS)
        return 3.2 + 0.18 * math.ceil(entries / self._legend_columns)

    def _alt(self) -> str:
        return (
            f"{len(self.points)} models by {self.y_label} and {self.x_label}. On the Pareto front: "
            f"{self.best}."
        )

    def _draw(self, axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        styles: dict[str | None, dict[str, Any]] = {
            group: {
                "color": COLOURS[f"line-{i % LINES + 1}"],
                "marker": MARKERS[(i + i // LINES) % LINES],
            }
            for i, group in enumerate(self._groups)
        }
        if any(point.group is None for point in self.points):
            styles[None] = {"color": COLOURS["ink"], "marker": "s"}
        for group, style in styles.items():  # only the legend has these
            name = "original" if group is None else _in_legend(group)
            style |= {"linestyle": "none", "markerfacecolor": "none" if group else style["color"]}
            axes.plot([], [], markersize=6, label=name, **style)
        for point in self.points:
            style = styles[point.group]
            style["markerfacecolor"] = "none" if point.kind == "pruned" else style["color"]
            axes.plot([point.x], [point.y], zorder=3, markersize=7, **style)
            if point.error:
                axes.errorbar(
                    [point.x], [point.y], [point.error], color=style["color"], linewidth=1, zorder=2
                )
        self._draw_rings(axes)
        axes.step(
            [point.x for point in self.front], [point.y for point in self.front], where="post",
            linewidth=1.0,
            color=COLOURS["muted"], linestyle=(0, (4, 2)), zorder=1, label="Pareto front",
        )  # fmt: skip
        low, high = min(point.y for point in self.points), max(point.y for point in self.points)
        # the good models would be too close to each other on a linear axis
        is_log = low > 0 and high > LOG_QUALITY * low
        if is_log:
            axes.set_yscale("log")
        mark_heights(axes, math.log10(high / low) if is_log else None)
        axes.set(xlabel=self.x_label, ylabel=fill(self.y_label, LABEL_WIDTH))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        axes.margins(x=0.08, y=0.1)
        legend_above(axes, ncols=self._legend_columns)
        self._draw_numbers(axes)

    def _draw_rings(self, axes: Axes) -> None:
        """A ring around what was measured on other segments."""
        rough = [point for point in self.points if point.rough]
        if rough:
            ring: dict[str, Any] = {"marker": "o", "linestyle": "none", "markerfacecolor": "none",
                                    "color": COLOURS["muted"], "markeredgewidth": 0.8}  # fmt: skip
            places = [point.x for point in rough], [point.y for point in rough]
            axes.plot(*places, markersize=14, **ring)
            axes.plot([], [], markersize=9, label="other segments", **ring)

    def _draw_numbers(self, axes: Axes) -> None:
        """Label the points; those too close for labels of their own share one."""
        if not self.numbered:
            return
        axes.autoscale_view()
        to_parts = axes.transScale + axes.transLimits
        places = to_parts.transform([(point.x, point.y) for point in self.points])
        shared: list[list[int]] = []
        for i in sorted(range(len(places)), key=lambda i: (places[i][0], -places[i][1])):
            last = shared[-1][-1] if shared else None
            if last is None or any(abs(places[i] - places[last]) > LABEL_PARTS):
                shared.append([])
            shared[-1].append(i)
        for members in shared:
            first = self.points[members[0]]
            numbers = sorted(self.points[i].number for i in members)
            axes.annotate(
                ", ".join(map(str, numbers)), (first.x, first.y),
                xytext=(6, 4), fontsize=8, textcoords="offset points", color=COLOURS["ink"],
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
