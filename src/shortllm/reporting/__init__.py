"""The report of a run: one self-contained HTML page and a model card, written from result files.

    run.json  scores.json  plan.json  eval.json  bench.json  retrained/retrain.json ...
                  │  load.py       reads them, and refuses what does not belong together
                  ▼
    run_page.py runs_page.py units_page.py criteria_page.py   what each kind of page shows
      blocks.py healing.py measurements.py protocol.py        some of the sections
      comparison.py                                           the table of models
      plots/                                                  SVG in the page's colours
                  │  parts.py      sections as lists of paragraphs, figures, tables ...
                  ▼
    page.py       templates/page.html.j2, templates/model_card.md.j2: all data is escaped

Equal files give equal bytes: what differs between two equal runs (times, cost, dates, directories)
is not shown.

    shortllm report runs/my-run
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shortllm.files import require_file_target, translate_os_errors, write_text
from shortllm.quantizing.options import QUANTIZED
from shortllm.run_directory import PRUNED

if TYPE_CHECKING:
    from shortllm.reporting.comparison import ComparedModel

__all__ = ["report", "write_comparison", "write_report", "write_runs", "write_units"]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` and the model card `README.md` of a run; returns the page's path.

    The card is also copied to the checkpoints of the run. A README that came there with the
    original model is kept as `README.original.md`.

    Raises:
        ResultFileError: a needed file is missing or damaged, or two files do not belong together.
        OutputError: the run directory cannot be written.
    """
    from shortllm.reporting import run_page
    from shortllm.reporting.load import load_results
    from shortllm.reporting.page import render_model_card, render_page

    results = load_results(run_dir)
    page = render_page(run_page.head(results), run_page.sections_of(results))
    write_text(run_dir / "README.md", render_model_card(results, PRUNED))
    for name in (PRUNED, *results.healed_by, QUANTIZED):
        if (run_dir / name).is_dir():
            _keep_original_card(run_dir / name)
            write_text(run_dir / name / "README.md", render_model_card(results, name))
    write_text(run_dir / "report.html", page)
    return run_dir / "report.html"


def write_comparison(run_dir: Path) -> Path:
    """Write `comparison.html` of a comparison of criteria; returns its path.

    Raises:
        ResultFileError: a file is missing or damaged, or two files do not belong together.
        OutputError: the run directory cannot be written.
    """
    from shortllm.reporting.criteria_page import criteria_head, criteria_sections
    from shortllm.reporting.load import load_comparison
    from shortllm.reporting.page import render_page

    results = load_comparison(run_dir)
    page = render_page(criteria_head(results), criteria_sections(results))
    write_text(run_dir / "comparison.html", page)
    return run_dir / "comparison.html"


def write_units(run_dir: Path) -> Path:
    """Write `units.html` of a comparison of width and depth; returns its path.

    Raises:
        ResultFileError: a file is missing or damaged.
        OutputError: the run directory cannot be written.
    """
    from shortllm.reporting.load import load_units
    from shortllm.reporting.page import render_page
    from shortllm.reporting.units_page import units_head, units_sections

    results = load_units(run_dir)
    write_text(run_dir / "units.html", render_page(units_head(results), units_sections(results)))
    return run_dir / "units.html"


def write_runs(directories: Sequence[Path], out: Path) -> list[ComparedModel]:
    """Write the page of several runs to the file `out`; returns the models of its table.

    Raises:
        ResultFileError: a directory without a finished run.
        OutputError: the file cannot be written.
    """
    from shortllm.reporting.load import load_runs
    from shortllm.reporting.page import render_page
    from shortllm.reporting.runs_page import compared_models, runs_head, runs_sections

    require_file_target(out)
    runs = load_runs(directories)
    models = compared_models(runs)
    write_text(out, render_page(runs_head(runs, models), runs_sections(runs, models)))
    return models


def _keep_original_card(checkpoint: Path) -> None:
    """Move a README that is not ours aside; ours, from an earlier report, may be overwritten."""
    from shortllm.reporting.page import is_our_card

    readme = checkpoint / "README.md"
    if not readme.exists():
        return
    with translate_os_errors(checkpoint):
        if not is_our_card(readme.read_text(encoding="utf-8", errors="replace")):
            os.replace(readme, checkpoint / "README.original.md")


def report(run_dir: Path | str) -> Path:
    """Write the page of a run directory from its files.

    That is report.html and the model card, or comparison.html where the directory contains a
    comparison instead of a plan.

    Args:
        run_dir: a directory of a finished run.
    Returns:
        The page.
    Raises:
        ResultFileError: no finished run, or files that do not belong together.
    """
    directory = Path(run_dir)
    if (directory / "comparison.json").exists() and not (directory / "plan.json").exists():
        return write_comparison(directory)
    return write_report(directory)
