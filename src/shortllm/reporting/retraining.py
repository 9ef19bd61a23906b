"""How a retraining went, for the report: its loss curves, and its key figures in words.

context = retraining_section(Retraining.load(run_dir / "retrained" / "retrain.json"))
"""

from __future__ import annotations

from typing import Any

from shortllm.reporting.plots.losses import LossPlot
from shortllm.reporting.wording import counted, number, short_count
from shortllm.retraining.options import Retraining

Context = dict[str, Any]

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


def retraining_section(record: Retraining) -> Context:
    """What is shown of one retraining: the plot, a line, and rows of (what, how)."""
    plot = LossPlot(curves=dict(record.curves), best_step=record.best_step)
    held_out = dict(record.curves.get("held_out", ()))
    kept = held_out.get(record.best_step)
    fall = ""
    if kept is not None:
        first = next(iter(held_out.values()))
        fall = f", held-out loss {number(first, 4)} → {number(kept, 4)}"
    return {
        "wide": plot.svg("wide"),
        "narrow": plot.svg("narrow"),
        "summary": f"{METHODS[record.method]}: {record.steps:,} steps{fall}",
        "rows": [(what, how) for what, how in _rows(record) if how],
    }


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
