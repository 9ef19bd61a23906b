"""Which text to choose blocks by: what each text removes, and what the shorter model can do.

    python tools/which_text.py MODEL --out runs/texts --text c4 --text wikitext2 --text alpaca \
        --text generated:alpaca --answers-only --tasks arc_easy,piqa --limit 200

Every text scores the blocks by one criterion. Each removal is written, and all models are measured
on the same texts, tasks and probe. Writes texts.json, and prints its table as Markdown. Run it
again to resume.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import shortllm
from shortllm.data.calibration import on_text
from shortllm.data.options import CalibrationOptions
from shortllm.evaluation.probe.record import Probe, Share
from shortllm.evaluation.statistics import standard_error
from shortllm.files import write_text
from shortllm.format import number, spans


def main() -> None:
    """Score, plan, prune and measure; then the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", action="append", required=True, help="may be repeated")
    parser.add_argument("--answers-only", action="store_true", help="where there are answers")
    parser.add_argument("--criterion", default="ppl")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--ratios", default="0.1,0.2")
    parser.add_argument("--eval-data", action="append", default=[], help="may be repeated")
    parser.add_argument("--max-segments", type=int, default=64)
    parser.add_argument("--tasks", default="arc_easy,piqa")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--dtype", default="auto")
    asked = parser.parse_args()
    found = compared(asked)
    asked.out.mkdir(parents=True, exist_ok=True)
    write_text(asked.out / "texts.json", json.dumps(found, indent=1) + "\n")
    print("\n".join(table(found)))


def compared(asked: argparse.Namespace) -> dict[str, Any]:
    """What each text removes at each ratio, and the measurements of all models."""
    removals: dict[str, dict[str, list[int]]] = {}
    models = {"original": asked.model}
    options = CalibrationOptions(
        samples=asked.samples, length=asked.length, answers_only=asked.answers_only
    )
    for n, text in enumerate(asked.text):
        scores = shortllm.score(
            asked.model, criterion=asked.criterion, calibration=on_text(options, text),
            dtype=asked.dtype, out=asked.out / f"text-{n}",
        )  # fmt: skip
        for ratio in asked.ratios.split(","):
            plan = shortllm.plan(scores, ratio=float(ratio))
            removals.setdefault(ratio, {})[text] = plan.removed
            name = "without-" + "-".join(map(str, plan.removed))
            if name not in models:
                models[name] = str(asked.out / name)
                if not (asked.out / name).exists():
                    shortllm.prune(asked.model, plan, asked.out / name)
    measured = shortllm.evaluate(
        list(models.values()),
        data=asked.eval_data, max_segments=asked.max_segments, tasks=asked.tasks.split(","),
        limit=asked.limit, probe=True, dtype=asked.dtype, out=asked.out / "eval.json",
    )  # fmt: skip
    return {
        "model": asked.model,
        "criterion": asked.criterion,
        "samples": asked.samples,
        "length": asked.length,
        "answers_only": asked.answers_only,
        "documents": asked.limit,
        "removals": removals,
        "models": {
            name: {
                **{text.source: [text.perplexity, text.stderr] for text in one.perplexity},
                **{task.task: [task.score, task.stderr] for task in one.zeroshot},
                **probed(one.probe),
            }
            for name, one in zip(models, measured.models, strict=True)
        },
    }


def probed(probe: Probe | None) -> dict[str, list[float | None]]:
    """The share of all exercises of the probe that are written, and how open answers repeat."""
    assert probe is not None, "the probe was requested"
    solved = Share.of([int(o) == 1 for one in probe.capabilities for o in one.written.outcomes])
    again = probe.answers.repeated if probe.answers else []
    return {
        "probe": [solved.share, solved.stderr],
        "repetition": [probe.repetition, standard_error(again)],
    }


def table(found: dict[str, Any]) -> list[str]:
    """A row per ratio and text, as Markdown."""
    columns = list(found["models"]["original"])
    rows = [("", "chosen by", "without", *columns)]
    rows.append(("", "original", "", *cells(found["models"]["original"], columns)))
    for ratio, by_text in found["removals"].items():
        for text, removed in by_text.items():
            values = found["models"]["without-" + "-".join(map(str, removed))]
            shown = cells(values, columns)
            rows.append((f"{100 * float(ratio):g} %", text, spans(removed), *shown))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---" * 3 + "|---:" * len(columns) + "|", *lines[1:]]


def cells(values: dict[str, list[float | None]], columns: list[str]) -> list[str]:
    """Numbers with their standard errors."""
    return [f"{number(values[one][0])} ± {number(values[one][1], 2)}" for one in columns]


if __name__ == "__main__":
    main()
