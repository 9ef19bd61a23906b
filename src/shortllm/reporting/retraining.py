"""How a retraining went, for the report: its loss curves, and its key figures in words.

context = retraining_section(Retraining.load(run_dir / "retrained" / "retrain.json"))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from shortllm.reporting.plots import _COLOURS, _as_inline_svg
from shortllm.reporting.wording import counted, number, short_count
from shortllm.results import Retraining

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Context = dict[str, Any]
Curve = Sequence[tuple[int, float]]

METHODS = {
    "lora": "LoRA adapters on every projection, merged into the weights",
    "full": "all weights, continued pretraining",
    "distill": "all weights, towards what the unpruned model says",
    "last-blocks": "the head and the last blocks",
}
PACKING = {
    "stream": "documents end to end, no padding",
    "fit": "as many whole documents to a window as fit",
    "alone": "one document to a window",
}
BOUNDARIES = {
    "apart": "documents of a window do not see each other (positions begin anew)",
    "joined": "documents of a window see those before them",
    "alone": "",
}
STOPPED = {
    "steps": "ran to its last step",
    "patience": "stopped early: the held-out loss no longer fell",
    "minutes": "stopped when its time was up",
}

STYLES: dict[str, dict[str, Any]] = {
    "train": {"color": _COLOURS["muted"], "linewidth": 0.8, "alpha": 0.7},
    "held_out": {"color": _COLOURS["kept"], "linewidth": 1.8, "marker": "o", "markersize": 3.5},
}
"""Look of the curves that every retraining has; evaluation sets are told apart by dashes."""

DASHES = ("--", ":", "-.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPlot:
    """Loss against steps: training, held-out, and each evaluation set."""

    curves: dict[str, Curve]
    best_step: int

    def svg(self, width: Literal["wide", "narrow"]) -> str:
        """The plot as an inline `<svg>` element, for a page column or for a phone."""
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        with matplotlib.rc_context(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": f"shortllm-loss-{width}",
                "text.parse_math": False,  # a data source's name is data, never markup
                "font.size": 8.5,
            }
        ):
            size = (7.6, 3.0) if width == "wide" else (3.6, 2.9)
            figure = Figure(figsize=size, layout="constrained")
            FigureCanvasAgg(figure)
            self._draw(figure.add_subplot(), columns=4 if width == "wide" else 2)
            return _as_inline_svg(figure, alt=self._description())

    def _description(self) -> str:
        said = [
            f"{label(name)} from {number(curve[0][1], 4)} to {number(curve[-1][1], 4)}"
            for name, curve in self.curves.items()
        ]
        return f"Line chart of loss against steps: {', '.join(said)}. Best at {self.best_step}."

    def _draw(self, axes: Axes, *, columns: int) -> None:
        others = [name for name in self.curves if name not in STYLES]
        for name, curve in self.curves.items():
            steps, losses = zip(*curve, strict=True)
            style = STYLES.get(name) or {
                "color": _COLOURS["removed"],
                "linewidth": 1.3,
                "linestyle": DASHES[others.index(name) % len(DASHES)],
            }
            axes.plot(steps, losses, label=label(name), **style)
        axes.axvline(self.best_step, color=_COLOURS["protected"], linewidth=0.8, linestyle="--")
        axes.set_xlabel("step", color=_COLOURS["muted"])
        axes.set_ylabel("loss [nats per token]", color=_COLOURS["muted"])
        axes.grid(axis="y", color=_COLOURS["rule"], linewidth=0.6)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(_COLOURS["muted"])
        axes.tick_params(length=0, labelcolor=_COLOURS["ink"])
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False,
            labelcolor=_COLOURS["ink"], borderpad=0,
        )  # fmt: skip


def label(name: str) -> str:
    """What a curve is called in the plot."""
    return {"train": "training", "held_out": "held out (the best is kept)"}.get(name, name)


def retraining_section(record: Retraining) -> Context:
    """What the section shows: plots, and rows of (what, how)."""
    plot = LossPlot(curves=dict(record.curves), best_step=record.best_step)
    return {
        "wide": plot.svg("wide"),
        "narrow": plot.svg("narrow"),
        "rows": [(what, how) for what, how in _rows(record) if how],
        "losses": _losses(record),
    }


def _losses(record: Retraining) -> list[dict[str, str]]:
    """Of each evaluation set the loss at its first evaluation and at the state that was kept."""
    found = []
    for name, curve in record.curves.items():
        kept = dict(curve).get(record.best_step)
        if name != "train" and kept is not None:
            first, best = number(curve[0][1], 4), number(kept, 4)
            found.append({"name": label(name), "first": first, "best": best})
    return found


def _rows(record: Retraining) -> list[tuple[str, str]]:
    data = record.data
    return [
        ("method", METHODS[record.method]),
        ("trained", f"{short_count(record.trained_parameters)} parameters"),
        ("teacher", record.teacher.id if record.teacher else ""),
        ("data", f"{data.source}, {counted(data.documents, 'document')}, {data.held_out} held out"),
        ("windows", f"{data.windows} of {data.length} tokens, {PACKING[data.packing]}"),
        ("boundaries", BOUNDARIES[data.boundaries]),
        ("steps", f"{record.steps}, best at {record.best_step}; {STOPPED[record.stopped]}"),
        ("tokens seen", short_count(record.tokens_seen)),
    ]
