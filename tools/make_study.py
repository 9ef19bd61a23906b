"""The study: what each criterion and search removes from small models, and each way to heal it.

    python tools/make_study.py                      # the embedded model: some minutes on two cores
    python tools/make_study.py --shared ../shared   # and the real models of that directory: an hour

One removal by every criterion at each budget; each is measured as it is, healed by two methods of
`shortllm heal`, folded into the block before (`shortllm merge --blocks`), and after the same LoRA
steps for all; always on text that neither criterion nor healing saw. Removals that several criteria
agree on are done once. What is measured goes into docs/study.json at once, and what is there is not
measured again. Writes docs/study.md and docs/images/study.svg from it.
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
from shortllm.checkpoint.source import open_checkpoint
from shortllm.files import write_text
from shortllm.format import spans
from shortllm.reporting.plots import (
    COLOURS,
    drawn,
    line_style,
    mark_heights,
    standalone,
)

DOCS = Path(__file__).parents[1] / "docs"
SINGLE = ("ppl", "taylor", "influence", "angular", "greedy")
"""What `auto` is held against."""
SEARCHES = ("evolve", "local", "auto")
HEAL_AWARE = "auto, healed"
"""`auto` that judges by what is left after healing."""
CRITERIA = (*SINGLE, *SEARCHES, HEAL_AWARE)
RATIOS = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5)
METHODS = ("linear", "regression")
WAYS = ("none", *METHODS, "merge", "lora")
SAMPLES = 160
HELD_OUT = 0.6
"""Part of the samples that searches do not see, and `auto` decides by."""
STEPS = 50
SEGMENTS = 200

INTRO = """# Which blocks, and how to heal

Perplexity on held-out text after each criterion and search removed a tenth to a half of the blocks.
Each shortened model is measured as it is (*none*), healed without training by two methods of
[`heal`](heal.md), with the removed blocks folded into the one before them
([`merge --blocks`](heal.md#merging)), and after the same {steps} steps of LoRA. *auto, healed* is
`auto` that judges models after healing. Scores used
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


class Study:
    """The rows there are: one for each removed set of a model."""

    def __init__(self, runs: Path) -> None:
        self.runs, self.path = runs, DOCS / "study.json"
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            self.rows = json.loads(self.path.read_text())

    def save(self) -> None:
        write_text(self.path, json.dumps(self.rows, indent=1) + "\n")

    def of(self, name: str, count: int) -> list[dict[str, Any]]:
        """The rows of a model without `count` blocks."""
        here = ((row["model"], len(row["removed"])) for row in self.rows)
        return [row for row, key in zip(self.rows, here, strict=True) if key == (name, count)]

    def study(self, one: Studied) -> None:
        """Choose and measure what is missing of a model."""
        blocks = open_checkpoint(one.model).block_count
        for count in sorted({int(ratio * blocks + 1e-9) for ratio in RATIOS} - {0}):
            known = {name for row in self.of(one.name, count) for name in row["criteria"]}
            missing = [name for name in CRITERIA if name not in known]
            for names in (set(missing) - {HEAL_AWARE}, set(missing) & {HEAL_AWARE}):
                if names:
                    self.choose(one, blocks, count, sorted(names, key=CRITERIA.index))
            for row in self.of(one.name, count):
                self.measure(one, row)

    def choose(self, one: Studied, blocks: int, count: int, names: list[str]) -> None:
        """What these criteria remove."""
        criteria = [name.partition(",")[0] for name in names]
        options: dict[str, dict[str, Any]] = {
            name: {"held_out": HELD_OUT} for name in SEARCHES if name in criteria
        }
        if names == [HEAL_AWARE]:
            options["auto"]["healing"] = "regression"
        found = shortllm.compare_criteria(
            one.model,
            criteria=criteria,
            options=options,
            ratios=[(count + 0.01) / blocks],
            data=one.text,
            samples=SAMPLES,
            eval_data=one.held_out,
            max_segments=SEGMENTS,
            out=self.runs / f"{one.name}-{count}-{names[0]}",
        )
        for contender in found.criteria:
            name = HEAL_AWARE if names == [HEAL_AWARE] else contender.criterion
            if name not in names:
                continue
            removed = sorted(contender.sets[0].order)
            rows = [row for row in self.of(one.name, count) if row["removed"] == removed]
            if not rows:
                rows.append(
                    {
                        "model": one.name, "blocks": blocks, "removed": removed, "criteria": [],
                        "intact": found.intact.perplexity,
                    }
                )  # fmt: skip
                self.rows += rows
            rows[0]["criteria"] = sorted([*rows[0]["criteria"], name], key=CRITERIA.index)
        self.save()

    def measure(self, one: Studied, row: dict[str, Any]) -> None:
        """Held-out perplexity of a row after each way that is missing."""
        missing = [way for way in WAYS if way not in row]
        if not missing:
            return
        name = f"{one.name}-without-{'-'.join(map(str, row['removed']))}"
        paths = [made(one, row["removed"], way, self.runs / name) for way in missing]
        found = shortllm.evaluate(
            [str(path) for path in paths], data=[one.held_out], max_segments=SEGMENTS,
            continuations=0,
        )  # fmt: skip
        for way, model in zip(missing, found.models, strict=True):
            row[way] = model.perplexity[0].perplexity
        print(one.name, row, flush=True)
        self.save()


def made(one: Studied, removed: list[int], way: str, directory: Path) -> Path:
    """The checkpoint without these blocks, after one way to heal."""
    out = directory / way
    if way == "merge":
        shortllm.merge(one.model, out, blocks=removed, data=one.text)
        return out
    shortllm.prune(one.model, removed, directory / "none")
    short = str(directory / "none")
    if way in METHODS:
        shortllm.heal(short, out, method=way, data=one.text)
    elif way == "lora":
        shortllm.retrain(
            short, out, data=one.text, form="text", length=128, batch=8, max_steps=STEPS, rows=4000,
            learning_rate=1e-3, schedule="cosine", held_out=20, report_to=[],
        )  # fmt: skip
    return out


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
        f"| model | gone | by | blocks | {' | '.join(WAYS)} |",
        "|---|---:|---|---|" + "---:|" * len(WAYS),
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        lines.append(f"| **{name}** | 0 | | | {own[0]['intact']:.4g} |{' |' * (len(WAYS) - 1)}")
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
    healed = ", ".join(
        f"{n} {row['none']:.4g} to {row['regression']:.4g}" for n, row in quarter.items()
    )
    lines.append(f"- A quarter removed by `ppl`, `regression`: {healed}.")
    ratios = [row["regression"] / row["linear"] for row in rows]
    lines.append(counted("`regression` against `linear`", ratios))
    ratios = [
        by[model, count, HEAL_AWARE]["regression"] / by[model, count, "auto"]["regression"]
        for model, count in budgets
    ]
    lines.append(counted("Healed, the choice of `auto, healed` against that of `auto`", ratios))
    return lines


def counted(what: str, ratios: list[float]) -> str:
    """A line about perplexities relative to others."""
    lower, worse = sum(one < 1 for one in ratios), sum(one > 1.01 for one in ratios)
    return (
        f"- {what}: lower in {lower} of {len(ratios)}, more than 1 % higher in {worse}; between "
        f"{min(ratios) - 1:+.1%} and {max(ratios) - 1:+.1%}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, help="directory with models/ and data/")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--only", help="measure what is missing of this model, and write no page")
    arguments = parser.parse_args()
    logging.getLogger("shortllm").setLevel(logging.ERROR)
    models = studied_models(arguments.shared, arguments.runs)
    study = Study(arguments.runs)
    for one in models:
        if arguments.only in (None, one.name):
            study.study(one)
    if arguments.only is not None:
        return
    rows = study.rows
    write_text(DOCS / "images" / "study.svg", plot(rows))
    intro = INTRO.format(steps=STEPS, samples=SAMPLES, searched=1 - HELD_OUT)
    write_text(
        DOCS / "study.md", "\n".join([intro + "\n".join(findings(rows)), "", *table(rows)]) + "\n"
    )


if __name__ == "__main__":
    main()
