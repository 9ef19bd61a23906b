"""How plots look, and their SVG: drawn once by matplotlib, and styled by the page.

A drawing has the light colours of `PALETTE` and is a complete SVG file. Inside a page, CSS rules
that select these colours replace them by the dark ones, scale the drawing to the column, and set
the page's font. Equal inputs give equal bytes: fixed ids, no date.
"""

from __future__ import annotations

import base64
import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shortllm.reporting.parts import Figure, Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

PALETTE = {
    "ink": ("#1b1d21", "#e6e5e0"),
    "muted": ("#5d626b", "#a0a4ac"),
    "rule": ("#dcdcd6", "#33373e"),
    "band": ("#e4e4dd", "#2b2f36"),
    "kept": ("#2f6193", "#6ea6d8"),
    "removed": ("#bb4a1e", "#f0895a"),
    "removed-tint": ("#f9e3d8", "#4a2a1c"),
    "protected": ("#767d88", "#9aa1ac"),
    "protected-tint": ("#eceef0", "#2c3037"),
    "line-1": ("#0072b2", "#5aa9e0"),
    "line-2": ("#d55e00", "#f0803c"),
    "line-3": ("#008a62", "#35c69a"),
    "line-4": ("#b3589a", "#e29ccd"),
    "line-5": ("#3c9dd0", "#9bd6f5"),
    "line-6": ("#c98500", "#f2bb4d"),
    "line-7": ("#7a4a22", "#c9986a"),
    "line-8": ("#8a1f4f", "#e0689a"),
}
"""The colours of page and plots by name: on light paper, and on dark paper."""
COLOURS = {name: light for name, (light, _) in PALETTE.items()}
LINES = 8
"""Colours of lines; the ninth line has the first colour and is dashed."""
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1.2)))
WIDTH = 6.4
"""Inches. A page shows a drawing at about 1.7 times this size, a phone at about 1."""
LOG_RANGE = 1e6
"""Largest range of a logarithmic axis."""

_INK, _MUTED = COLOURS["ink"], COLOURS["muted"]
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "text.parse_math": False,  # a criterion's name is data, never markup
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 8.5,
    "hatch.linewidth": 0.8,
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False,
    "axes.edgecolor": _MUTED, "axes.labelcolor": _MUTED, "axes.axisbelow": True,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": COLOURS["rule"], "grid.linewidth": 0.6,
    "xtick.color": _MUTED, "xtick.labelcolor": _INK, "xtick.major.size": 0, "xtick.minor.size": 0,
    "ytick.color": _MUTED, "ytick.labelcolor": _INK, "ytick.major.size": 0, "ytick.minor.size": 0,
    "legend.frameon": False, "legend.labelcolor": _INK, "legend.borderpad": 0,
    "legend.borderaxespad": 0.4, "legend.columnspacing": 1.4, "legend.handlelength": 1.6,
}  # fmt: skip


class Plot(ABC):
    """A plot as a part of a page: subclasses say what it shows, and draw it."""

    __slots__ = ()

    @property
    def _height(self) -> float:
        """Inches."""
        return 2.9

    @abstractmethod
    def _alt(self) -> str:
        """What the plot shows, in words."""

    @abstractmethod
    def _draw(self, axes: Axes) -> None: ...

    def figure(self, caption: str = "") -> Figure:
        """The drawing with its description."""
        alt = self._alt()
        return Figure(drawn(self._draw, size=(WIDTH, self._height), alt=alt), alt, caption)

    def image(self) -> Image:
        """The drawing on white, as an image."""
        figure = self.figure()
        data = base64.b64encode(standalone(figure.svg).encode()).decode()
        return Image(figure.alt, f"data:image/svg+xml;base64,{data}")

    def draw_on(self, axes: Axes | None = None) -> Axes:
        """Draw on given axes, or on those of a new figure, which notebooks show."""
        import matplotlib

        with matplotlib.rc_context(_SETTINGS):
            if axes is None:
                from matplotlib import pyplot

                figure = pyplot.figure(figsize=(WIDTH, self._height), layout="constrained")
                axes = figure.add_subplot()
            self._draw(axes)
        return axes


def drawn(
    draw: Callable[..., None],
    *,
    size: tuple[float, float],
    alt: str,
    grid: tuple[int, int] | None = None,
) -> str:
    """What `draw(axes)` draws on `size` inches; with `grid` it gets an array of axes."""
    import matplotlib
    from matplotlib.figure import Figure as MatplotlibFigure

    name = f"plot-{hashlib.sha256(alt.encode()).hexdigest()[:10]}"
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure = MatplotlibFigure(figsize=size, layout="constrained")
        draw(figure.subplots(*grid, squeeze=False) if grid else figure.add_subplot())
        return _svg(figure, name)


def _svg(figure: MatplotlibFigure, name: str) -> str:
    """The `<svg>` element, whose ids are unique within a page."""
    stream = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=no_metadata)
    text = stream.getvalue()
    return text[text.index("<svg") :].replace('<g id="', f'<g id="{name}-').strip()


def standalone(svg: str) -> str:
    """The content of an SVG file with this drawing, on white."""
    return svg.replace("<svg", '<svg style="background: #fff"', 1) + "\n"


def line_style(place: int) -> dict[str, Any]:
    """Colour, marker and width of a line; later lines are thinner, so that equal ones both show."""
    return {
        "color": COLOURS[f"line-{place % LINES + 1}"],
        "linewidth": 3.0 - 0.24 * (place % LINES),
        "linestyle": DASHES[place // LINES % len(DASHES)],
        "marker": MARKERS[place % LINES],
        "markersize": 7.5 - 0.45 * (place % LINES),
        "markerfacecolor": "none",
        "markeredgewidth": 1.2,
    }


def mark_heights(axes: Axes, decades: float | None, *, whole: bool = False) -> None:
    """Ticks of the vertical axis; `decades` is the range of a logarithmic one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    locator: LogLocator | MaxNLocator
    if decades is None:
        locator = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=whole)
    else:
        locator = LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1,), numticks=12)
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def legend_above(axes: Axes, *, ncols: int = 4, **changes: Any) -> None:
    """A legend above the plot."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=ncols, **changes)


def tick(value: float) -> str:
    """The number at a tick of an axis."""
    if value and not 1e-4 <= abs(value) < 1e6:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}".replace("-", "−")
    return f"{value:,.10g}".replace("-", "−")
