"""Loss against steps of a retraining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shortllm.reporting.plots.drawing import COLOURS, Width, drawn, plain_frame
from shortllm.reporting.wording import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Sequence[tuple[int, float]]

STYLES: dict[str, dict[str, Any]] = {
    "train": {"color": COLOURS["muted"], "linewidth": 0.8, "alpha": 0.7},
    "held_out": {"color": COLOURS["kept"], "linewidth": 1.8, "marker": "o", "markersize": 3.5},
}
"""Look of the curves that every retraining has; evaluation sets are told apart by dashes."""

DASHES = ("--", ":", "-.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPlot:
    """Loss against steps: training, held-out, and each evaluation set."""

    curves: dict[str, Curve]
    best_step: int

    def svg(self, width: Width) -> str:
        """The plot as an inline `<svg>` element, for a page column or for a phone."""
        size = (7.6, 3.0) if width == "wide" else (3.6, 2.9)
        return drawn(self._draw, width=width, size=size, alt=self._description())

    def _description(self) -> str:
        said = [
            f"{label(name)} from {number(curve[0][1], 4)} to {number(curve[-1][1], 4)}"
            for name, curve in self.curves.items()
        ]
        return f"Line chart of loss against steps: {', '.join(said)}. Best at {self.best_step}."

    def _draw(self, axes: Axes, *, narrow: bool) -> None:
        others = [name for name in self.curves if name not in STYLES]
        for name, curve in self.curves.items():
            steps, losses = zip(*curve, strict=True)
            style = STYLES.get(name) or {
                "color": COLOURS["removed"],
                "linewidth": 1.3,
                "linestyle": DASHES[others.index(name) % len(DASHES)],
            }
            axes.plot(steps, losses, label=label(name), **style)
        axes.axvline(self.best_step, color=COLOURS["protected"], linewidth=0.8, linestyle="--")
        axes.set_xlabel("step", color=COLOURS["muted"])
        axes.set_ylabel("loss [nats per token]", color=COLOURS["muted"])
        axes.grid(axis="y", color=COLOURS["rule"], linewidth=0.6)
        axes.set_axisbelow(True)
        plain_frame(axes, bottom=True)
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2 if narrow else 4, frameon=False,
            labelcolor=COLOURS["ink"], borderpad=0,
        )  # fmt: skip


def label(name: str) -> str:
    """What a curve is called in the plot."""
    return {"train": "training", "held_out": "held out (the best is kept)"}.get(name, name)
