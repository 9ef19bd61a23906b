"""The report of a run: one self-contained HTML page and a model card, written from result files.

    run.json  scores.json  plan.json  eval.json  bench.json  retrained/retrain.json ...
                  │  load.py       reads them, and refuses what does not belong together
                  ▼
    run_page.py runs_page.py                    what each kind of page shows
    comparison.py draft_page.py
      recovery.py measurements.py protocol.py   some of the sections
      charts.py plots.py                        kinds of plots, as SVG in the page's colours
                  │  parts.py      sections as lists of paragraphs, figures, tables ...
                  ▼
    templates/page.html.j2   all data is escaped
    surgery/card.py          the model cards

Equal files give equal bytes: what differs between two equal runs (times, cost, dates, directories)
is not shown.

    shortllm report runs/my-run
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shortllm.calls import accepts
from shortllm.files import require_file_target, write_text
from shortllm.options import OneOrMore
from shortllm.run_directory import require_results

if TYPE_CHECKING:
    from jinja2 import Environment

    from shortllm.reporting.parts import Page
    from shortllm.reporting.runs_page import ComparedRuns

__all__ = [
    "compare",
    "render",
    "report",
    "write_comparison",
    "write_draft",
    "write_report",
    "write_units",
]


@accepts()
def report(run_dir: Path) -> Path:
    """Write the page of a run directory from its files.

    That is report.html and the model card, or where the directory contains something else than a
    plan the page of that: comparison.html, or draft.html.

    Args:
        run_dir: a directory of a finished run.
    Returns:
        The page.
    Raises:
        ResultFileError: no finished run, or files that do not belong together.
    """
    require_results(run_dir)
    if (run_dir / "comparison.json").exists() and not (run_dir / "plan.json").exists():
        return write_comparison(run_dir)
    if (run_dir / "draft.json").exists() and not (run_dir / "plan.json").exists():
        return write_draft(run_dir)
    return write_report(run_dir)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` of a run, and the model cards of its checkpoints with what was measured.

    The card of the last one that was healed or retrained is that of the run. Returns the page.
    """
    from shortllm.reporting.load import load_results
    from shortllm.reporting.run_page import measured, run_page
    from shortllm.surgery.card import CARD, card_of, write_card

    results = load_results(run_dir)
    text = render(run_page(results))
    names = results.checkpoints_in(run_dir)
    cards = {name: card_of(run_dir / name, name, measured(results, name)) for name in names}
    for name, card in cards.items():
        write_card(run_dir / name, card)
        write_text(run_dir / CARD, card)
    write_text(run_dir / "report.html", text)
    return run_dir / "report.html"


def write_comparison(run_dir: Path) -> Path:
    """Write `comparison.html` of a comparison of criteria; returns its path."""
    from shortllm.reporting.comparison import criteria_page
    from shortllm.reporting.load import load_comparison

    write_text(run_dir / "comparison.html", render(criteria_page(load_comparison(run_dir))))
    return run_dir / "comparison.html"


def write_draft(run_dir: Path) -> Path:
    """Write `draft.html` of a draft; returns its path."""
    from shortllm.reporting.draft_page import draft_page
    from shortllm.reporting.load import load_draft

    write_text(run_dir / "draft.html", render(draft_page(*load_draft(run_dir))))
    return run_dir / "draft.html"


def write_units(run_dir: Path) -> Path:
    """Write `units.html` of a comparison of width and depth; returns its path."""
    from shortllm.reporting.comparison import units_page
    from shortllm.reporting.load import load_units

    write_text(run_dir / "units.html", render(units_page(load_units(run_dir))))
    return run_dir / "units.html"


@accepts()
def compare(runs: OneOrMore[Path], *, out: Path = Path("compare.html")) -> ComparedRuns:
    """Several runs on one page: every model, quality against size and against latency.

    Args:
        runs: directories of finished runs: one or several.
        out: the page.
    Returns:
        `models`, one entry per model (an original that several runs share is listed once), and
        the page.
    Raises:
        ResultFileError: a directory without a finished run.
        OutputError: the page cannot be written.
    """
    for one in runs:
        require_results(one)
    require_file_target(out)
    from shortllm.reporting.load import load_runs
    from shortllm.reporting.runs_page import ComparedRuns, compared_models, runs_page, runs_plots

    found = load_runs(runs)
    models = compared_models(found)
    write_text(out, render(runs_page(found, models)))
    return ComparedRuns(models=models, page=out, plots=runs_plots(found, models))


# ---- templates, which escape everything that comes from data


def render(page: Page) -> str:
    """A self-contained HTML page."""
    from shortllm.reporting.plots import PALETTE

    return templates().get_template("page.html.j2").render(page=page, palette=PALETTE) + "\n"


def templates() -> Environment:
    """The templates of pages and of their parts."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("shortllm.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
