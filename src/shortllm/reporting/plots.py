"""Plots of the report as pieces of SVG that live inside the page and follow its colour scheme.

Each plot is drawn once with fixed placeholder colours, which are then replaced by the CSS variables
of the page (`--kept`, `--removed`, ...): one drawing serves light, dark and print. Text stays text,
in the page's font. A plot comes in two widths: a phone shows the same letter size as a desk.
Equal inputs give equal bytes: fixed id salt, no date, no random ids.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from shortllm.reporting.loading import Status

LOG_SPREAD = 30.0
"""Largest over smallest bar from which on the axis is logarithmic."""
LOG_RANGE = 1e6
"""A logarithmic axis spans at most this; what lies below is marked at its foot."""
LOG_PERPLEXITIES = 4.0
"""Largest over smallest perplexity from which on their axis is logarithmic."""
MARKER_PT = 6.5
"""Size of the marker that stands for a bar."""
FLAT_SPREAD = 0.15
"""Bars that differ by less than this part of the largest get an axis that does not start at 0."""

# Placeholders: any distinct colours; `_as_inline_svg` puts the CSS variable of that name in place.
_COLOURS = {
    "ink": "#101112",
    "muted": "#606162",
    "rule": "#d0d1d2",
    "kept": "#305080",
    "removed": "#c05030",
    "removed-tint": "#f0d0c0",
    "protected": "#707880",
    "protected-tint": "#e0e2e4",
    "band": "#e8e9e7",
    **{f"line-{number}": f"#a0b0c{number}" for number in range(1, 9)},
}
_LINES = 8
"""Colours of lines; the ninth line has the first colour and is dashed."""
_NARROW_COLUMNS = 3
"""Columns of the legend above a narrow plot."""
_MARKERS = "osD^vPX*"
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1.2)))
_HATCHES: dict[Status, str | None] = {"kept": None, "removed": "//////", "protected": "------"}


Width = Literal["wide", "narrow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityPlot:
    """One bar per original block; `heights` and `statuses` are in block order."""

    heights: Sequence[float]
    statuses: Sequence[Status]
    y_label: str
    below_label: str = "too small for the axis"
    """What the marker of a bar that a logarithmic axis cannot show means."""
    span: tuple[int, int] | None = None
    """First and last block of a span that went as one."""

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

    def svg(self, width: Width) -> str:
        """The plot as an inline `<svg>` element, for a page column or for a phone."""
        size = (7.6, 3.3) if width == "wide" else (3.6, 3.1)
        return _drawn(self._draw, width=width, size=size, alt=self._description())

    def _description(self) -> str:
        removed = [str(block) for block, status in enumerate(self.statuses) if status == "removed"]
        return (
            f"Bar chart, one bar for each of {len(self.heights)} blocks: {self.y_label}. "
            f"Removed: {', '.join(removed) or 'none'}."
        )

    def _draw(self, axes: Axes, *, narrow: bool) -> None:
        from matplotlib.markers import CARETDOWN

        floor = self.log_floor
        foot = self.linear_floor if floor is None else floor
        below = [block for block, h in enumerate(self.heights) if floor is not None and h <= floor]
        pitch_pt = (205 if narrow else 505) / len(self.heights)
        self._draw_bars(axes, foot, skip=set(below), pitch_pt=pitch_pt)
        if floor is not None:
            axes.set_yscale("log")
            axes.set_ylim(floor, max(self.heights) * (max(self.heights) / floor) ** 0.08)
        elif foot:
            axes.set_ylim(bottom=foot)
        if self.span is not None:
            first, last = self.span
            axes.axvspan(first - 0.5, last + 0.5, color=_COLOURS["band"], linewidth=0, zorder=0)
        for status in ("kept", "removed", "protected"):
            of_status = [block for block in below if self.statuses[block] == status]
            if of_status:
                axes.plot(
                    of_status, [foot] * len(of_status), linestyle="none", marker=CARETDOWN,
                    markersize=MARKER_PT, color=_COLOURS[status], clip_on=False, zorder=4,
                )  # fmt: skip
        self._draw_crosses(axes, foot, below=set(below), pitch_pt=pitch_pt)
        self._draw_axes(axes, narrow=narrow)
        self._draw_legend(axes, narrow=narrow, below=bool(below))

    def _draw_bars(self, axes: Axes, foot: float, *, skip: set[int], pitch_pt: float) -> None:
        """Bars by status, told apart by colour and by hatch."""
        for status in ("kept", "removed", "protected"):
            blocks = [b for b, s in enumerate(self.statuses) if s == status and b not in skip]
            axes.bar(
                blocks, [self.heights[b] - foot for b in blocks], bottom=foot, width=0.78, zorder=2,
                **_bar_style(status, pitch_pt=pitch_pt),
            )  # fmt: skip

    def _draw_crosses(self, axes: Axes, foot: float, *, below: set[int], pitch_pt: float) -> None:
        """A cross over each removed block, whether it has a bar or the marker of none."""
        for block, status in enumerate(self.statuses):
            if status == "removed":
                axes.annotate(
                    "×", (block, max(self.heights[block], foot)), ha="center",
                    xytext=(0, 0.75 * MARKER_PT if block in below else 1.5),
                    textcoords="offset points", fontsize=min(10, max(4.5, 1.1 * pitch_pt)),
                    color=_COLOURS["removed"],
                )  # fmt: skip

    def _draw_axes(self, axes: Axes, *, narrow: bool) -> None:
        from matplotlib.ticker import MaxNLocator

        count = len(self.heights)
        axes.set_xlim(-0.7, count - 0.3)
        axes.xaxis.set_major_locator(
            MaxNLocator(nbins=8 if narrow else 16, integer=True, min_n_ticks=1)
        )
        axes.set_xlabel("block (index in the original model)", color=_COLOURS["muted"])
        axes.set_ylabel(self.y_label, color=_COLOURS["muted"])
        floor = self.log_floor
        decades = 0.0 if floor is None else math.log10(max(self.heights) / floor)
        whole = all(float(height).is_integer() for height in self.heights)
        _mark_heights(axes, decades, log=floor is not None, whole=whole)
        at_zero = floor is None and not self.linear_floor
        if at_zero:
            axes.axhline(0, color=_COLOURS["ink"], linewidth=0.8, zorder=3)
        _plain_frame(axes, bottom=not at_zero)

    def _draw_legend(self, axes: Axes, *, narrow: bool, below: bool) -> None:
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
            entries.append(Patch(label="removed as one span", facecolor=_COLOURS["band"]))
        if below:
            entries.append(
                Line2D([], [], linestyle="none", marker="v", markersize=0.7 * MARKER_PT,
                       color=_COLOURS["muted"], label=self.below_label)
            )  # fmt: skip
        axes.legend(
            handles=entries, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2 if narrow else 4,
            frameon=False, labelcolor=_COLOURS["ink"], borderaxespad=0.4, handlelength=1.6,
            handleheight=0.9, columnspacing=1.4, borderpad=0,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
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
    lines: Sequence[Line]
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
        rows = math.ceil(entries / _NARROW_COLUMNS)
        wide, narrow = (7.6, max(4.1, 0.2 * entries + 0.5)), (3.6, 3.8 + 0.2 * rows)
        size = wide if width == "wide" else narrow
        return _drawn(self._draw, width=width, size=size, alt=self._description())

    def _description(self) -> str:
        names = ", ".join(line.name for line in self.lines)
        return (
            f"Line chart of {self.y_label} against removed blocks, one line for each of {names}, "
            "and a band for random removals."
        )

    def _draw(self, axes: Axes, *, narrow: bool) -> None:
        axes.fill_between(
            self.blocks, self.low, self.high, color=_COLOURS["band"], linewidth=0, zorder=1,
            label="random, range",
        )  # fmt: skip
        axes.plot(
            self.blocks, self.mean, color=_COLOURS["muted"], linestyle=_DASHES[3], linewidth=1.6,
            zorder=2, label="random, mean",
        )  # fmt: skip
        coloured = [line for line in self.lines if not line.baseline]
        baselines = [line for line in self.lines if line.baseline]
        for place, line in enumerate(coloured):
            axes.plot(self.blocks, line.heights, label=line.name, zorder=4, **_line_style(place))
        for place, line in enumerate(baselines):
            axes.plot(
                self.blocks, line.heights, label=line.name, zorder=3, color=_COLOURS["muted"],
                linestyle=_DASHES[1 + place % 2], linewidth=1.2, marker="<>"[place % 2],
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
        axes.set_xlabel(f"blocks removed, of {self.of}", color=_COLOURS["muted"])
        axes.set_ylabel(self.y_label, color=_COLOURS["muted"])
        _mark_heights(axes, math.log10(max(self.heights) / min(self.heights)), log=self.is_log)
        _plain_frame(axes, bottom=True)

    def _draw_legend(self, axes: Axes, *, narrow: bool) -> None:
        """In the order in which the lines end, highest first, as far as that can be said."""
        handles, names = axes.get_legend_handles_labels()
        ends = {line.name: line.heights[-1] for line in self.lines}
        order = sorted(range(len(names)), key=lambda i: -ends.get(names[i], -math.inf))
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
        if narrow:
            place = {"loc": "lower left", "bbox_to_anchor": (-0.12, 1.0), "ncols": _NARROW_COLUMNS}
        axes.legend(
            [handles[i] for i in order], [names[i] for i in order], frameon=False,
            labelcolor=_COLOURS["ink"], handlelength=2.0 if narrow else 2.6, borderpad=0,
            borderaxespad=0.4, columnspacing=1.0, labelspacing=0.55, **place,
        )  # fmt: skip


def _line_style(place: int) -> dict[str, Any]:
    """Colour, marker and width of a line; of those that coincide the thinner is on top."""
    return {
        "color": _COLOURS[f"line-{place % _LINES + 1}"],
        "linewidth": 3.0 - 0.24 * (place % _LINES),
        "linestyle": _DASHES[place // _LINES % len(_DASHES)],
        "marker": _MARKERS[place % _LINES],
        "markersize": 7.5 - 0.45 * (place % _LINES),
        "markerfacecolor": "none",
        "markeredgewidth": 1.2,
    }


def _mark_heights(axes: Axes, decades: float, *, log: bool, whole: bool = False) -> None:
    """Ticks, their labels and grid lines of the vertical axis; `whole`: of whole numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if log:
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1,), numticks=12)
        )
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        locator = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=whole)
        axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.grid(axis="y", color=_COLOURS["rule"], linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)


def _plain_frame(axes: Axes, *, bottom: bool) -> None:
    """At most a line at the bottom, and ticks without strokes."""
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom" and bottom)
        spine.set_color(_COLOURS["muted"])
    axes.tick_params(which="both", length=0, colors=_COLOURS["muted"], labelcolor=_COLOURS["ink"])


def _bar_style(status: Status, *, pitch_pt: float = 100) -> dict[str, Any]:
    colour = _COLOURS[status]
    # Slanted lines merge on the thinnest bars: there plain colour and the cross must do.
    if status == "kept" or (status == "removed" and pitch_pt < 4):
        return {"facecolor": colour, "edgecolor": colour, "linewidth": 0.0}
    return {
        "facecolor": _COLOURS[f"{status}-tint"],
        "edgecolor": colour,
        "linewidth": min(0.9, 0.12 * pitch_pt),
        "hatch": _HATCHES[status],
    }


def _tick(value: float) -> str:
    if value and not 1e-4 <= abs(value) < 1e6:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}".replace("-", "−")
    return f"{value:,.10g}".replace("-", "−")


def _drawn(draw: Callable[..., None], *, width: Width, size: tuple[float, float], alt: str) -> str:
    """What `draw(axes, narrow=...)` draws, as an inline `<svg>` element."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": f"shortllm-{width}",
            "text.parse_math": False,  # a criterion's name is data, never markup
            "font.size": 8.5,
            "hatch.linewidth": 0.8,
        }
    ):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.add_subplot(), narrow=width == "narrow")
        return _as_inline_svg(figure, alt=alt)


def _as_inline_svg(figure: Figure, *, alt: str) -> str:
    """The figure as one `<svg>` without ids of groups, sizes, fonts or colours of its own."""
    from html import escape

    stream = io.StringIO()
    figure.savefig(
        stream,
        format="svg",
        transparent=True,
        metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
    )
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None
    opening = f'<svg {view_box[0]} role="img" aria-label="{escape(alt)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"\n\s*", "\n", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.DOTALL
    )  # would leak
    text = re.sub(r"font: (?:\w+ )*?([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", text)
    for name, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text.strip()
