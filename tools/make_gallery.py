"""The gallery: criteria, and width against depth, on small models, as plots and a page.

    python tools/make_gallery.py                     # the embedded model: some minutes on two cores
    python tools/make_gallery.py --shared ../shared  # and the real models of that directory

Writes docs/gallery.md and docs/images/gallery/*.svg. The runs behind it stay in --runs, where
what is up to date is not made again.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import shortllm
from shortllm import BenchmarkOptions, CalibrationOptions, EvaluationOptions, Recipe, RetrainOptions
from shortllm.files import write_text
from shortllm.reporting.comparison import criteria_plot, units_models, units_table
from shortllm.reporting.load import load_units
from shortllm.reporting.measurements import all_plots
from shortllm.reporting.parts import Figure
from shortllm.reporting.plots import standalone
from shortllm.reporting.runs_page import common_cell, trade_plots

DOCS = Path(__file__).parents[1] / "docs"
IMAGES = DOCS / "images" / "gallery"
RATIO = 0.2
INTRO = """# Gallery

Small models, every criterion, and width against depth at one size: a fifth of the parameters
removed, then the same {steps} steps of LoRA for all. Open marks are models that were not retrained.
Speeds were measured on two processor cores; compare their ratios, not their values. books5M was
retrained on books, and both texts are of another kind. `python tools/make_gallery.py --shared
../shared` writes this page.

"""
CITED = {
    "criteria": "what each criterion removes, and the perplexity that is left",
    "perplexity-latency": "perplexity against latency at one size",
    "throughput": "throughput against batch size",
}


TEXTS = {
    "embedded:test": "own test text",
    "wikitext2:test": "WikiText-2",
    "valid.jsonl.gz#page": "stories",
}
"""What the table calls the texts."""


@dataclass(frozen=True)
class Shown:
    """A model of the gallery, and the text it is scored, retrained and measured on."""

    name: str
    model: str
    calibration: str
    training: str
    texts: list[str]


def shown_models(shared: Path | None) -> list[Shown]:
    """The embedded model, and those of the directory with real ones."""
    models = [Shown("embedded", "embedded", "embedded", "embedded", ["embedded"])]
    if shared is None:
        return models
    stories = str(shared / "data" / "stories" / "train.jsonl.gz")
    books = str(shared / "data" / "books" / "train.jsonl.xz")
    texts = ["wikitext2", str(shared / "data" / "stories" / "valid.jsonl.gz#page")]
    for name in ("stories260K", "stories10L", "stories10L-redundant", "books5M"):
        text = books if name == "books5M" else stories
        models.append(Shown(name, str(shared / "models" / name), text, text, texts))
    return models


def recipe_of(one: Shown, steps: int) -> Recipe:
    """A fifth of the parameters removed, the same LoRA for all."""
    return Recipe(
        model=one.model,
        budget=shortllm.Budget(param_ratio=RATIO),
        calibration=CalibrationOptions(data=one.calibration),
        retraining=[
            RetrainOptions(
                data=one.training, form="text", length=128, batch=8, max_steps=steps, rows=4000,
                learning_rate=2e-3, schedule="cosine", held_out=20, report_to=[],
            )
        ],
        evaluation=EvaluationOptions(data=one.texts, max_segments=400, continuations=0),
        benchmark=BenchmarkOptions(batches=[1, 4, 16, 64], new_tokens=[32], warmup=1, runs=5),
    )  # fmt: skip


Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def section_of(one: Shown, runs: Path, steps: int) -> tuple[Table, str]:
    """Make what is missing, draw the plots; the model's table, and its plots in Markdown."""
    plots: dict[str, Figure] = {}
    found = shortllm.compare_criteria(
        one.model,
        data=one.calibration,
        eval_data=one.texts[-1],
        out=runs / f"{one.name}-criteria",
    )
    plots["criteria"] = criteria_plot(found).figure()
    directory = runs / f"{one.name}-units"
    shortllm.compare_units(recipe=recipe_of(one, steps), out=directory)
    results = load_units(directory)
    cell = common_cell(results.benchmark)
    for name, plot in trade_plots(units_models(results), cell, of_runs=False).items():
        plots[name] = plot.figure()
    speed = all_plots(results.benchmark)
    plots["throughput"] = next(p for name, p in speed.items() if "throughput" in name).figure()
    lines = [f"## {one.name}", ""]
    for name, figure in plots.items():
        write_text(IMAGES / f"{one.name}-{name}.svg", standalone(figure.svg))
        lines += [f"![{one.name}: {CITED[name]}](images/gallery/{one.name}-{name}.svg)", ""]
    head, rows = units_table(results).plain()  # without memory, most of which is the libraries'
    for source, text in TEXTS.items():
        head = tuple(name.replace(source, text) for name in head)
    return (head[:-1], [row[:-1] for row in rows]), "\n".join(lines)


def joined(tables: dict[str, Table]) -> str:
    """The tables of all models as one; of those measured on other texts as one more."""
    lines = []
    for head in dict.fromkeys(head for head, _ in tables.values()):
        lines += [f"| model | {' | '.join(head)} |", f"|---|---|{'---:|' * (len(head) - 1)}"]
        for name, (own, rows) in tables.items():
            if own == head:
                lines += [f"| {name} | {' | '.join(row)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, help="directory with models/ and data/")
    parser.add_argument("--runs", type=Path, default=Path("runs/gallery"))
    parser.add_argument("--steps", type=int, default=100, help="of training")
    arguments = parser.parse_args()
    if arguments.shared is not None:
        os.environ.setdefault("SHORTLLM_DATA", str(arguments.shared / "data"))
    tables: dict[str, Table] = {}
    sections = []
    for one in shown_models(arguments.shared):
        tables[one.name], section = section_of(one, arguments.runs, arguments.steps)
        sections.append(section)
    page = [INTRO.format(steps=arguments.steps) + joined(tables), *sections]
    write_text(DOCS / "gallery.md", "\n".join(page))


if __name__ == "__main__":
    main()
