"""The report of a run: one self-contained HTML page and a model card, made from the result files.

    run.json  calibration.json  scores.json  plan.json  target.json
    healed/heal.json  retrained/retrain.json  quantized/quantize.json  eval.json  bench.json
                                │  loading.py     read, and refused where two do not belong together
                                ▼
    sections.py ──────────►  what each section shows: plain values and phrases
      verdict.py               the one sentence at the top
      healing.py speed.py zeroshot.py retraining.py quantizing.py   some sections by themselves
      protocol.py              how it was measured, in phrases
      wording.py               numbers and units
      names.py                 models and files by name, never the machine's directories
      citations.py             the paper behind a criterion
      plots/                   SVG that follows the page's colours
                                │  rendering.py   templates/, which escape all data
                                ▼
                          report.html  README.md  pruned/README.md  retrained/README.md

A comparison of criteria has a page of its own, made the same way: comparison.json, comparison.py,
comparison.html. So have several runs side by side: runs.py, runs.html.j2; and width
beside depth: units.py, units.html.j2.

A section is a function that takes the loaded results and returns what its partial template
`templates/sections/NAME.html.j2` shows, or None where the run has nothing to show; a new stage adds
a function, a partial, and a line in `SECTIONS`. Equal files give equal bytes: what differs between
two equal runs (times, cost, dates, directories) is not shown.

    shortllm report runs/my-run
"""

from __future__ import annotations

import os
from pathlib import Path

from shortllm.files import translate_os_errors, write_text
from shortllm.quantizing.options import QUANTIZED
from shortllm.reporting.loading import load_comparison, load_results, load_units
from shortllm.reporting.rendering import (
    is_our_card,
    render_comparison,
    render_model_card,
    render_page,
    render_units,
)
from shortllm.run_directory import PRUNED

__all__ = ["write_comparison", "write_report", "write_units"]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` and the model card `README.md` of a run; returns the page's path.

    The card is also laid into `pruned/`, the healed and the quantized checkpoints, so that it
    travels with the models; the README that came there with the original stays beside it as
    `README.original.md`.

    Raises:
        ResultFileError: a needed result file is missing or damaged, or two do not belong together.
        OutputError: the run directory cannot be written.
    """
    results = load_results(run_dir)
    page = render_page(results)
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
        ResultFileError: a result file is missing or damaged, or two do not belong together.
        OutputError: the run directory cannot be written.
    """
    write_text(run_dir / "comparison.html", render_comparison(load_comparison(run_dir)))
    return run_dir / "comparison.html"


def write_units(run_dir: Path) -> Path:
    """Write `units.html` of a comparison of width and depth; returns its path.

    Raises:
        ResultFileError: a result file is missing or damaged.
        OutputError: the run directory cannot be written.
    """
    write_text(run_dir / "units.html", render_units(load_units(run_dir)))
    return run_dir / "units.html"


def _keep_original_card(checkpoint: Path) -> None:
    """Move a README that is not ours aside; ours, from an earlier report, may be overwritten."""
    readme = checkpoint / "README.md"
    if not readme.exists():
        return
    with translate_os_errors(checkpoint):
        if not is_our_card(readme.read_text(encoding="utf-8", errors="replace")):
            os.replace(readme, checkpoint / "README.original.md")
