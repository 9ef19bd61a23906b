"""The study on a real model: SmolLM2-135M-Instruct, dequantized from 4 bits.

    python tools/make_real_study.py --shared ../shared
    python tools/make_real_study.py --shared ../shared --model gemma-3-270m.gguf --name gemma3

A tenth, a fifth and three tenths of the blocks removed by each criterion and search; as they are,
healed without training, and after 200 steps of LoRA on text and on Alpaca. Perplexity on WikiText-2
and on held-out C4, the seven tasks of Shortened LLaMA, and speed. Every measured row goes into
docs/NAME.json at once, and rows that are there are not measured again: `--minutes` ends a sitting.
Writes docs/NAME.md with table and plot from the rows there are, and for SmolLM2 the first table of
the README.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import shortllm
from shortllm.files import write_text
from shortllm.format import spans
from shortllm.reporting.plots import COLOURS, drawn, line_style, mark_heights, standalone

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README_TABLE = ("<!-- smollm2 -->\n", "<!-- end of smollm2 -->\n")
"""What is around the table in the README."""
CRITERIA = ("ppl", "kl", "taylor", "influence", "angular", "auto", "greedy", "local")
SINGLE = CRITERIA[:5]
SEARCHES = ("auto", "local")
RATIOS = (0.1, 0.2, 0.3)
WAYS = ("none", "regression", "linear", "lora-text", "lora-alpaca")
TRAINED = ("ppl", "auto")
"""Criteria whose sets are also trained and run on the tasks, which takes the most time."""
README_WAYS = {
    "none": "blocks removed by {name}",
    "regression": "{name}, healed without training",
    "lora-text": "{name}, LoRA on text, 200 steps",
    "lora-alpaca": "{name}, LoRA on Alpaca, 200 steps",
}
SAMPLES, LENGTH = 16, 512
"""Text that the blocks are scored on: as long as the windows that measure."""
WINDOWS, WINDOW = 16, 512
STEPS, BATCH, ROW, LIMIT = 200, 4, 128, 200
DTYPE = "float32"
"""Computed alike, and in a bearable time, on a CPU without units for bfloat16."""

INTRO = """# A real model: {title}

{title}, {blocks} blocks, dequantized from the GGUF file that its publisher's package
carries (4-bit weights): the numbers are those of the quantized weights, not of the original ones.

- Blocks were scored on {samples} samples of {length} tokens of C4; the first four and the last two
  were protected.
- *linear* and *regression* are methods of `shortllm heal`, on 48 samples of 256 tokens of the same
  text; *lora-text* and *lora-alpaca* are {steps} steps of LoRA on C4 or on Alpaca, each of {batch}
  rows of {row} tokens.
- Perplexity on {windows} windows of {window} tokens of WikiText-2, and of C4 documents that nothing
  else saw. Tasks: mean of the seven of Shortened LLaMA, first {limit} documents of each, with its
  standard error. Rows and tasks that are not in the table were not measured yet.
- Computed in {dtype} on two CPU cores. `python tools/make_real_study.py --shared ../shared` writes
  this page and [{name}.json]({name}.json).

![Perplexity on WikiText-2 against the part of the blocks removed](images/{name}.svg)

"""


class Study:
    """The rows there are, and how to measure the others before the time is over."""

    def __init__(self, model: Path, name: str, shared: Path, runs: Path, minutes: float) -> None:
        self.model, self.name, self.runs = str(model), name, runs / name
        self.data = shared / "data"
        self.end = time.monotonic() + 60 * minutes
        self.path = DOCS / f"{name}.json"
        self.found: dict[str, Any] = {"sets": {}, "rows": []}
        if self.path.exists():
            self.found = json.loads(self.path.read_text())
        settings = {"samples": SAMPLES, "length": LENGTH, "dtype": DTYPE}
        if minutes and self.found.get("settings") != settings:  # nothing of it can be compared
            self.found = {"settings": settings, "sets": {}, "rows": []}

    def save(self) -> None:
        write_text(self.path, json.dumps(self.found, indent=1) + "\n")

    def row(self, removed: list[int], way: str) -> dict[str, Any]:
        """The row of one model, with what was measured of it so far."""
        for row in self.found["rows"]:
            if (row["removed"], row["way"]) == (removed, way):
                return row  # type: ignore[no-any-return]
        row = {"removed": removed, "way": way}
        self.found["rows"].append(row)
        return row

    def choose(self, criteria: tuple[str, ...]) -> None:
        """What these criteria remove at each budget."""
        if criteria[0] in self.found["sets"] or time.monotonic() > self.end:
            return
        start = time.monotonic()
        sets: dict[str, list[list[int]]] = {}
        # a search finds the best removal of one size
        several = [[ratio] for ratio in RATIOS] if criteria[0] in SEARCHES else [list(RATIOS)]
        for ratios in several:
            compared = shortllm.compare_criteria(
                self.model,
                criteria=list(criteria),
                random=1,
                ratios=ratios,
                data=str(self.data / "c4" / "train_sample.jsonl.gz"),
                samples=SAMPLES,
                length=LENGTH,
                eval_data=str(self.data / "wikitext2" / "wiki.test.raw"),
                max_segments=4,
                dtype=DTYPE,
                out=self.runs / "choice" / f"{criteria[0]}-{len(ratios)}-{ratios[0]}",
            )
            self.found["blocks"] = compared.model.blocks
            for contender in compared.criteria:
                own = [sorted(one.order) for one in contender.sets]
                sets.setdefault(contender.criterion, []).extend(own)
        self.found["sets"] |= sets
        seconds = round(time.monotonic() - start)
        self.found.setdefault("seconds", {})[", ".join(criteria)] = seconds
        self.save()

    def measure(self, ways: tuple[str, ...], *, tasks: bool = False) -> None:
        """Each way to heal of each set, the cheapest first."""
        sets: dict[str, list[list[int]]] = self.found["sets"]
        jobs: list[tuple[list[int], str]] = [([], "none")]
        for way in ways:
            names = TRAINED if tasks or way.startswith("lora") else tuple(sets)
            chosen = {tuple(one) for name in names for one in sets.get(name, [])}
            middle = RATIOS[1] * self.found["blocks"]
            nearest = sorted(chosen, key=lambda one: (abs(len(one) - middle), one))
            jobs += [(list(one), way) for one in nearest]
        for removed, way in jobs:
            row = self.row(removed, way)
            missing = "tasks" if tasks else "wikitext2"
            if missing in row or time.monotonic() > self.end:
                continue
            start = time.monotonic()
            path = self.made(removed, way)
            made = time.monotonic()
            row.update(self.tasks(path) if tasks else self.perplexities(path))
            row.setdefault("seconds", {})[missing] = round(time.monotonic() - made)
            row["seconds"].setdefault("made", round(made - start))
            self.save()
            print(
                removed,
                way,
                {k: v for k, v in row.items() if k not in ("removed", "way")},
                flush=True,
            )

    def made(self, removed: list[int], way: str) -> Path:
        """The checkpoint of a row."""
        if not removed:
            return Path(self.model)
        directory = self.runs / ("without-" + "-".join(map(str, removed)))
        text = str(self.data / "c4" / "train_sample.jsonl.gz")
        short = shortllm.prune(self.model, removed, directory / "none", verify=False)
        out = directory / way
        if way in ("linear", "regression"):
            shortllm.heal(
                str(short), out, method=way, data=text, samples=48, length=256, dtype=DTYPE
            )  # fmt: skip
        elif way.startswith("lora"):
            alpaca = str(self.data / "alpaca" / "train.jsonl.gz")
            own = {"data": text, "rows": 1500} if way == "lora-text" else {"data": alpaca}
            shortllm.retrain(
                str(short), out, max_steps=STEPS, batch=BATCH, length=ROW, held_out=32,
                eval_every=50,
                report_to=[], dtype=DTYPE, **own,
            )  # fmt: skip
        return out

    def perplexities(self, path: Path) -> dict[str, float]:
        texts = {
            "wikitext2": self.data / "wikitext2" / "wiki.test.raw",
            "c4": self.data / "c4" / "heldout_sample.jsonl.gz",
        }
        found = shortllm.evaluate(
            [str(path)], data=[str(one) for one in texts.values()], length=WINDOW,
            max_segments=WINDOWS, continuations=0, dtype=DTYPE,
        )  # fmt: skip
        values = [one.perplexity for one in found.models[0].perplexity]
        return dict(zip(texts, values, strict=True))

    def tasks(self, path: Path) -> dict[str, Any]:
        found = shortllm.evaluate(
            [str(path)], data=[str(self.data / "wikitext2" / "wiki.test.raw")], max_segments=1,
            tasks=["paper"], task_data=self.data, limit=LIMIT, continuations=0, batch_size=16,
            dtype=DTYPE,
        )  # fmt: skip
        [model] = found.models
        errors = [one.stderr or 0.0 for one in model.zeroshot]
        return {
            "tasks": {one.task: one.score for one in model.zeroshot},
            "tasks_mean": model.zeroshot_mean,
            "tasks_stderr": sum(error**2 for error in errors) ** 0.5 / len(errors),
        }

    def speed(self) -> None:
        """Speed and memory of the intact model and of one model of each size, in turn."""
        if "speed" in self.found or time.monotonic() > self.end:
            return
        sizes = {len(own): own for own in self.found["sets"]["ppl"]}
        short = [str(self.made(own, "none")) for own in sizes.values()]
        found = shortllm.bench(
            [self.model, *short], warmup=2, runs=10, new_tokens=[64], dtype=DTYPE
        )  # fmt: skip
        self.found["speed"] = [
            {
                "removed": size,
                "tokens_per_s": one.tokens_per_s,
                "speedup": found.speedup(one),
                "first_token_s": one.first_token_s,
            }
            for size, one in zip((0, *sizes), found.measurements, strict=True)
        ]
        self.save()

    # ---- the page

    def write(self, title: str) -> None:
        rows = [
            row
            for row in self.found["rows"]
            if "wikitext2" in row and (self.by(row["removed"]) or not row["removed"])
        ]
        if not any(row["removed"] for row in rows):
            return
        write_text(DOCS / "images" / f"{self.name}.svg", self.plot(rows))
        intro = INTRO.format(
            title=title, name=self.name, blocks=self.found["blocks"], steps=STEPS, batch=BATCH,
            row=ROW, windows=WINDOWS, window=WINDOW, limit=LIMIT, **self.found["settings"],
        )  # fmt: skip
        lines = [
            *self.findings(rows), "", *self.table(rows), "", *self.speeds(), "", *self.costs()
        ]  # fmt: skip
        write_text(DOCS / f"{self.name}.md", intro + "\n".join(lines) + "\n")

    def write_readme(self) -> None:
        """The first table of the README: what is left at each budget, by WikiText-2 and C4."""
        known = {(tuple(row["removed"]), row["way"]): row for row in self.found["rows"]}
        sizes = [len(own) for own in self.found["sets"]["ppl"]]
        heading = " | ".join(
            f"{size} removed ({size / self.found['blocks']:.0%})" for size in sizes
        )
        lines = [f"| | {heading} |", "|---|" + "---:|" * len(sizes)]
        for name in TRAINED:
            for way, words in README_WAYS.items():
                rows = [known.get((tuple(one), way)) for one in self.found["sets"].get(name, [])]
                if not rows or not all(row and "c4" in row for row in rows):
                    continue
                cells = [f"{row['wikitext2']:.1f} / {row['c4']:.1f}" for row in rows if row]
                lines.append(f"| {words.format(name=f'`{name}`')} | {' | '.join(cells)} |")
        path, (start, end) = ROOT / "README.md", README_TABLE
        before, _, rest = path.read_text().partition(start)
        _, _, after = rest.partition(end)
        write_text(path, before + start + "\n".join(lines) + "\n" + end + after)

    def by(self, removed: list[int]) -> list[str]:
        return [name for name, own in self.found["sets"].items() if removed in own]

    def findings(self, rows: list[dict[str, Any]]) -> list[str]:
        """What the numbers say, counted."""
        plain = {tuple(row["removed"]): row for row in rows if row["way"] == "none"}
        lines = []
        for way in WAYS[1:]:
            healed = {tuple(row["removed"]): row for row in rows if row["way"] == way}
            if not healed:
                continue
            better = sum(healed[one]["wikitext2"] < plain[one]["wikitext2"] for one in healed)
            lines.append(f"- `{way}` lowers the perplexity of {better} of {len(healed)} models.")
        for place, ratio in enumerate(RATIOS):
            sets = {n: tuple(own[place]) for n, own in self.found["sets"].items()}
            known = {name: plain[one]["c4"] for name, one in sets.items() if one in plain}
            singles = [known[name] for name in SINGLE if name in known]
            if "auto" in known and singles:
                lines.append(
                    f"- {ratio:.0%}: `auto` {known['auto']:.4g} on held-out C4, the best single "
                    f"criterion {min(singles):.4g} ({known['auto'] / min(singles) - 1:+.1%})."
                )
        return lines

    def table(self, rows: list[dict[str, Any]]) -> list[str]:
        lines = [
            "| gone | by | blocks | healed | WikiText-2 | C4 | tasks |",
            "|---:|---|---|---|---:|---:|---:|",
        ]
        order = {way: place for place, way in enumerate(WAYS)}
        key = lambda row: (len(row["removed"]), row["removed"], order[row["way"]])  # noqa: E731
        for row in sorted(rows, key=key):
            by = ", ".join(f"`{one}`" for one in self.by(row["removed"]))
            tasks = ""
            if "tasks_mean" in row:
                tasks = f"{100 * row['tasks_mean']:.1f} ± {100 * row['tasks_stderr']:.1f}"
            way = "" if row["way"] == "none" else row["way"]
            lines.append(
                f"| {len(row['removed'])} | {by} | {spans(row['removed'])} | {way} | "
                f"{row['wikitext2']:.4g} | {row['c4']:.4g} | {tasks} |"
            )
        return lines

    def speeds(self) -> list[str]:
        lines = [
            "| 64 tokens generated | tokens/s | times as fast | first token |",
            "|---|---:|---:|---:|",
        ]
        return lines + [
            f"| {one['removed'] or 'none'} removed | {one['tokens_per_s']:.1f} | "
            f"{one['speedup']:.2f} | {1000 * one['first_token_s']:.0f} ms |"
            for one in self.found["speed"]
        ]

    def costs(self) -> list[str]:
        choosing = self.found.get("seconds", {})
        said = "; ".join(f"{name} {seconds} s" for name, seconds in choosing.items())
        return [f"Choosing the blocks of all three budgets took, on two cores: {said}."]

    def plot(self, rows: list[dict[str, Any]]) -> str:
        """A plot per way to heal, a line per criterion."""
        ways = [way for way in WAYS if any(row["way"] == way and row["removed"] for row in rows)]
        known = {(tuple(row["removed"]), row["way"]): row["wikitext2"] for row in rows}
        intact = known[(), "none"]

        def draw(grid: Any) -> None:
            for j, way in enumerate(ways):
                axes = grid[0][j]
                for place, (name, own) in enumerate(self.found["sets"].items()):
                    points = [(0.0, intact)] + [
                        (100 * len(one) / self.found["blocks"], known[tuple(one), way])
                        for one in own if (tuple(one), way) in known
                    ]  # fmt: skip
                    axes.plot(*zip(*points, strict=True), label=name, **line_style(place))
                axes.set_yscale("log")
                axes.set_ylim(intact / 1.05, 1.1 * max(known.values()))
                mark_heights(axes, 1.0)
                axes.set_title(way, color=COLOURS["ink"], fontsize=9)
                axes.set_xlabel("% of the blocks removed", color=COLOURS["muted"])
            grid[0][0].set_ylabel("perplexity on WikiText-2", color=COLOURS["ink"])
            grid[0][0].figure.legend(
                *grid[0][0].get_legend_handles_labels(), loc="outside upper center",
                frameon=False, ncols=len(CRITERIA), labelcolor=COLOURS["ink"],
            )  # fmt: skip

        alt = "Perplexity against the part of the blocks removed, by criterion and healing."
        return standalone(drawn(draw, size=(10.5, 3.4), alt=alt, grid=(1, len(ways))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True, help="directory with models/, data/")
    parser.add_argument("--model", type=Path, help="default: SmolLM2 in the shared directory")
    parser.add_argument("--name", default="smollm2", help="of the page")
    parser.add_argument("--title", default="SmolLM2-135M-Instruct")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--minutes", type=float, default=1e6, help="start nothing after so long")
    given = parser.parse_args()
    logging.getLogger("shortllm").setLevel(logging.ERROR)
    smollm = given.shared / "models" / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    study = Study(given.model or smollm, given.name, given.shared, given.runs, given.minutes)
    for criteria in (SINGLE, ("auto",)):
        study.choose(criteria)
        study.speed()
        study.measure(("none",))
    study.measure(WAYS)
    study.measure(WAYS, tasks=True)
    for criteria in (("greedy",), ("local",)):
        study.choose(criteria)
        study.measure(WAYS)
    study.write(given.title)
    if given.name == "smollm2":
        study.write_readme()


if __name__ == "__main__":
    main()
