"""How plots become pieces of SVG that live inside the page and follow its colour scheme.

Each plot is drawn once with fixed placeholder colours, which are then replaced by the CSS variables
of the page (`--kept`, `--removed`, ...): one drawing serves light, dark and print. Text stays text,
in the page's font. A plot comes in two widths: a phone shows the same letter size as a desk.
Equal inputs give equal bytes: fixed id salt, no date, no random ids.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_RANGE = 1e6
"""A logarithmic axis spans at most this."""
NARROW_COLUMNS = 3
"""Columns of the legend above a narrow plot."""

# Placeholders: any distinct colours; `_as_inline_svg` puts the CSS variable of that name in place.
COLOURS = {
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
LINES = 8
"""Colours of lines; the ninth line has the first colour and is dashed."""
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1.2)))

_STANDALONE = {
    "ink": "#1b1d21",
    "muted": "#5d626b",
    "rule": "#dcdcd6",
    "kept": "#2f6193",
    "removed": "#bb4a1e",
    "protected": "#767d88",
    "removed-tint": "#f9e3d8",
    "protected-tint": "#eceef0",
    "band": "#e4e4dd",
    "line-1": "#0072b2",
    "line-2": "#d55e00",
    "line-3": "#008a62",
    "line-4": "#b3589a",
    "line-5": "#3c9dd0",
    "line-6": "#c98500",
    "line-7": "#7a4a22",
    "line-8": "#8a1f4f",
    "sans": "sans-serif",
}
"""What stands for the page's variables in a plot that is a file of its own."""

Width = Literal["wide", "narrow"]


def line_style(place: int) -> dict[str, Any]:
    """Colour, marker and width of a line; of those that coincide the thinner is on top."""
    return {
        "color": COLOURS[f"line-{place % LINES + 1}"],
        "linewidth": 3.0 - 0.24 * (place % LINES),
        "linestyle": DASHES[place // LINES % len(DASHES)],
        "marker": MARKERS[place % LINES],
        "markersize": 7.5 - 0.45 * (place % LINES),
        "markerfacecolor": "none",
        "markeredgewidth": 1.2,
    }


def mark_heights(axes: Axes, decades: float, *, log: bool, whole: bool = False) -> None:
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
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.grid(axis="y", color=COLOURS["rule"], linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)


def plain_frame(axes: Axes, *, bottom: bool) -> None:
    """At most a line at the bottom, and ticks without strokes."""
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom" and bottom)
        spine.set_color(COLOURS["muted"])
    axes.tick_params(which="both", length=0, colors=COLOURS["muted"], labelcolor=COLOURS["ink"])


def tick(value: float) -> str:
    """The number at a mark of an axis."""
    if value and not 1e-4 <= abs(value) < 1e6:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}".replace("-", "−")
    return f"{value:,.10g}".replace("-", "−")


def drawn(
    draw: Callable[..., None],
    *,
    width: Width,
    size: tuple[float, float],
    alt: str,
    grid: tuple[int, int] | None = None,
) -> str:
    """What `draw(axes, narrow=...)` draws, as an inline `<svg>` element.

    Args:
        size: inches.
        grid: rows and columns of plots; `draw` then gets an array of so many axes.
    """
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
        axes = figure.subplots(*grid, squeeze=False) if grid else figure.add_subplot()
        draw(axes, narrow=width == "narrow")
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
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text.strip()


def standalone(svg: str) -> str:
    """An inline plot as a file of its own, on white."""
    colours = ";".join(f"--{name}:{value}" for name, value in _STANDALONE.items())
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff;{colours}"'
    return svg.replace("<svg", opening, 1) + "\n"
