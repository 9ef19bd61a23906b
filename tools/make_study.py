"""The study: what each criterion and search removes from small models, and each way to heal it.

    python tools/make_study.py                      # the embedded model: some minutes on two cores
    python tools/make_study.py --shared ../shared   # and the real models of that directory: an hour

One removal by every criterion at each budget; each is measured as it is, with linear maps folded in
(`shortllm heal`), folded into the block before (`shortllm merge --blocks`), and after the same LoRA
steps for all; always on text that neither criterion nor healing saw. Removals that several criteria
agree on are done once. Writes docs/study.md, docs/study.json and docs/images/study.svg; the runs
behind it stay in --runs, where what is up to date is not made again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shortllm
from shortllm import EvaluationOptions, RetrainOptions
from shortllm.checkpoint.source import open_checkpoint
from shortllm.files import fingerprint, write_text
from shortllm.format import spans
from shortllm.reporting.plots import (
    COLOURS,
    drawn,
    line_style,
    mark_heights,
    standalone,
)

DOCS = Path(__file__).parents[1] / "docs"
CRITERIA = ("ppl", "taylor", "influence", "angular", "greedy", "evolve", "local", "auto")
SINGLE = CRITERIA[:5]
"""What `auto` is held against."""
RATIOS = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5)
WAYS = ("none", "linear", "merge", "lora")
SAMPLES = 160
HELD_OUT = 0.6
"""Part of the samples that searches do not see, and `auto` decides by."""
STEPS = 50
SEGMENTS = 200

INTRO = """# Which blocks, and how to heal

Perplexity on held-out text after each criterion and search removed a tenth to a half of the blocks.
Each shortened model is measured as it is (*none*), healed without training by linear maps
([`heal`](heal.md)), with the removed blocks folded into the one before them
([`merge --blocks`](heal.md#merging)), and after the same {steps} steps of LoRA. Scores used
{samples} samples of 128 tokens; searches used {searched:.0%} of them, and `auto` decided by the
others. The stories models are measured on every fifth story of the data set, and scored and healed
on the rest; books5M is measured on six books that it never saw.
`python tools/make_study.py --shared ../shared` writes this page and [study.json](study.json).

![Perplexity against the part of the blocks removed, by model and way to heal](images/study.svg)

"""


@dataclass(frozen=True)
class Studied:
    """A model, the text it is scored and healed on, and the text it is measured on."""

    name: str
    model: str
    text: str
    held_out: str


def studied_models(shared: Path | None, runs: Path) -> list[Studied]:
    models = [Studied("embedded", "embedded", "embedded", "embedded")]
    if shared is not None:
        books = shared / "data" / "books"
        on_books = (str(books / "train.jsonl.xz"), str(books / "valid.jsonl.xz"))
        on_stories = split(shared / "data" / "stories" / "train.jsonl.gz", runs / "stories")
        models += [
            Studied(name, str(shared / "models" / name), *texts)
            for name, texts in (
                ("books5M", on_books),
                ("stories10L", on_stories),
                ("stories10L-redundant", on_stories),
                ("stories260K", on_stories),
            )
        ]
    return models


def split(source: Path, target: Path) -> tuple[str, str]:
    """The rows of a file but every fifth, and every fifth, as files of their own."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        lines = file.readlines()
    parts = {"rest": [line for i, line in enumerate(lines) if i % 5], "fifth": lines[::5]}
    target.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        write_text(target / f"{name}.jsonl", "".join(part))
    return str(target / "rest.jsonl"), str(target / "fifth.jsonl")


def study(one: Studied, runs: Path) -> list[dict[str, Any]]:
    """A row per budget and removed set."""
    blocks = open_checkpoint(one.model).block_count
    rows: list[dict[str, Any]] = []
    evaluation = EvaluationOptions(data=[one.held_out], max_segments=SEGMENTS, continuations=0)
    for remove in sorted({int(ratio * blocks + 1e-9) for ratio in RATIOS} - {0}):
        found = shortllm.compare_criteria(
            one.model,
            criteria=list(CRITERIA),
            options={name: {"held_out": HELD_OUT} for name in ("evolve", "local", "auto")},
            ratios=[(remove + 0.01) / blocks],
            data=one.text,
            samples=SAMPLES,
            eval_data=one.held_out,
            max_segments=SEGMENTS,
            out=runs / f"{one.name}-{remove}",
        )
        sets: dict[frozenset[int], list[str]] = {}
        for contender in found.criteria:
            sets.setdefault(frozenset(contender.sets[0].order), []).append(contender.criterion)
        for removed, criteria in sets.items():
            print(f"{one.name}: without {sorted(removed)} ({', '.join(criteria)})", flush=True)
            measured = healed(one, sorted(removed), evaluation, runs)
            rows.append(
                {
                    "model": one.name, "blocks": blocks, "removed": sorted(removed),
                    "criteria": criteria, "intact": found.intact.perplexity, **measured,
                }
            )  # fmt: skip
    return rows


def healed(
    one: Studied, removed: list[int], evaluation: EvaluationOptions, runs: Path
) -> dict[str, float]:
    """Held-out perplexity without these blocks, and after each way to heal."""
    directory = runs / f"{one.name}-without-{'-'.join(map(str, removed))}"
    paths = {way: directory / way for way in WAYS}
    shortllm.prune(one.model, removed, paths["none"])
    shortllm.heal(str(paths["none"]), paths["linear"], method="linear", data=one.text)
    shortllm.merge(one.model, paths["merge"], blocks=removed, data=one.text)
    shortllm.retrain(
        str(paths["none"]), paths["lora"],
        options=RetrainOptions(
            data=one.text, form="text", length=128, batch=8, max_steps=STEPS, rows=4000,
            learning_rate=1e-3, schedule="cosine", held_out=20, report_to=[],
        ),
    )  # fmt: skip
    made = [open_checkpoint(str(path)).fingerprint for path in paths.values()]
    expected, kept = fingerprint([made, evaluation.model_dump()]), directory / "measured.json"
    if kept.exists() and (measured := json.loads(kept.read_text()))["fingerprint"] == expected:
        return measured["perplexity"]  # type: ignore[no-any-return]
    models = shortllm.evaluate([str(path) for path in paths.values()], options=evaluation).models
    found = {way: one.perplexity[0].perplexity for way, one in zip(WAYS, models, strict=True)}
    write_text(kept, json.dumps({"fingerprint": expected, "perplexity": found}))
    return found


def plot(rows: list[dict[str, Any]]) -> str:
    """A row of plots per model, a column per way to heal, a line per criterion."""
    names = list(dict.fromkeys(row["model"] for row in rows))

    def draw(grid: Any) -> None:
        for i, name in enumerate(names):
            own = [row for row in rows if row["model"] == name]
            heights = [row[way] for row in own for way in WAYS if way != "merge"]
            low, high = own[0]["intact"], max(heights)
            for j, way in enumerate(WAYS):
                axes = grid[i][j]
                for place, criterion in enumerate(CRITERIA):
                    points = [(0.0, own[0]["intact"])] + [
                        (100 * len(row["removed"]) / row["blocks"], row[way])
                        for row in own if criterion in row["criteria"]
                    ]  # fmt: skip
                    axes.plot(*zip(*points, strict=True), label=criterion, **line_style(place))
                axes.set_yscale("log")
                axes.set_ylim(low / 1.05, high * 1.1)
                mark_heights(axes, 1.0)
                if i == 0:
                    axes.set_title(way, color=COLOURS["ink"], fontsize=9)
                if j == 0:
                    axes.set_ylabel(name, color=COLOURS["ink"])
                if i == len(names) - 1:
                    axes.set_xlabel("% of the blocks removed", color=COLOURS["muted"])
        grid[0][0].figure.legend(
            *grid[0][0].get_legend_handles_labels(), loc="outside upper center", frameon=False,
            ncols=len(CRITERIA), labelcolor=COLOURS["ink"],
        )  # fmt: skip

    alt = "Perplexity against the part of the blocks removed, by model, criterion and healing."
    size = (10.5, 2.4 * len(names) + 0.6)
    return standalone(drawn(draw, size=size, alt=alt, grid=(len(names), len(WAYS))))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line per removed set; those found by several criteria once."""
    lines = [
        "| model | gone | by | blocks | none | linear | merge | LoRA |",
        "|---|---:|---|---|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        lines.append(f"| **{name}** | 0 | | | {own[0]['intact']:.4g} | | | |")
        for count in sorted({len(row["removed"]) for row in own}):
            here = [row for row in own if len(row["removed"]) == count]
            best = {way: min(row[way] for row in here) for way in WAYS}
            for row in here:
                cells = [
                    f"**{row[way]:.4g}**" if row[way] == best[way] else f"{row[way]:.4g}"
                    for way in WAYS
                ]
                of = f"{count}\N{NO-BREAK SPACE}of\N{NO-BREAK SPACE}{row['blocks']}"
                by = ", ".join(f"`{criterion}`" for criterion in row["criteria"])
                lines.append(f"| | {of} | {by} | {spans(row['removed'])} | {' | '.join(cells)} |")
    return lines


def findings(rows: list[dict[str, Any]]) -> list[str]:
    """What the numbers say, counted."""
    by = {
        (row["model"], len(row["removed"]), criterion): row
        for row in rows for criterion in row["criteria"]
    }  # fmt: skip
    budgets = sorted({(row["model"], len(row["removed"])) for row in rows})
    beyond, best = [], 0
    for model, count in budgets:
        single = min(by[model, count, criterion]["none"] for criterion in SINGLE)
        own = by[model, count, "auto"]["none"]
        best += own <= single
        if own > 1.01 * single:
            beyond.append(f"{model} without {count}: {own:.4g} against {single:.4g}")
    lines = [
        f"- `auto` is at least as good as the best of {', '.join(f'`{one}`' for one in SINGLE)} in "
        f"{best} of {len(budgets)} budgets, and more than 1 % worse in {len(beyond)}"
        + (f" ({'; '.join(beyond)})." if beyond else "."),
    ]
    for way in WAYS[1:]:
        better = sum(row[way] < row["none"] for row in rows)
        lines.append(
            f"- `{way}` lowers the perplexity of {better} of {len(rows)} shortened models."
        )
    quarter = {
        name: next(
            row for row in rows
            if row["model"] == name and len(row["removed"]) == max(1, row["blocks"] // 4)
            and "ppl" in row["criteria"]
        )
        for name in dict.fromkeys(row["model"] for row in rows)
    }  # fmt: skip
    gains = ", ".join(f"{n} {row['none']:.4g} to {row['linear']:.4g}" for n, row in quarter.items())
    lines.append(f"- A quarter removed by `ppl`, `linear`: {gains}.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, help="directory with models/ and data/")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--only", help="make what is missing of this model, and write no page")
    arguments = parser.parse_args()
    logging.getLogger("shortllm").setLevel(logging.ERROR)
    models = studied_models(arguments.shared, arguments.runs)
    chosen = [one for one in models if arguments.only in (None, one.name)]
    rows = [row for one in chosen for row in study(one, arguments.runs)]
    if arguments.only is not None:
        return
    write_text(DOCS / "study.json", json.dumps(rows, indent=1) + "\n")
    write_text(DOCS / "images" / "study.svg", plot(rows))
    intro = INTRO.format(steps=STEPS, samples=SAMPLES, searched=1 - HELD_OUT)
    write_text(
        DOCS / "study.md", "\n".join([intro + "\n".join(findings(rows)), "", *table(rows)]) + "\n"
    )


if __name__ == "__main__":
    main()
