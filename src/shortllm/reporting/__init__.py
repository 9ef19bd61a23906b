"""The report of a run: one self-contained HTML page and a model card, written from result files.

    run.json  scores.json  plan.json  eval.json  bench.json  retrained/retrain.json ...
                  │  load.py       reads them, and refuses what does not belong together
                  ▼
    run_page.py runs_page.py comparison.py      what each kind of page shows
      healing.py measurements.py protocol.py    some of the sections
      charts.py plots.py                        kinds of plots, as SVG in the page's colours
                  │  parts.py      sections as lists of paragraphs, figures, tables ...
                  ▼
    templates/page.html.j2, templates/model_card.md.j2   all data is escaped

Equal files give equal bytes: what differs between two equal runs (times, cost, dates, directories)
is not shown.

    shortllm report runs/my-run
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from shortllm.calls import accepts
from shortllm.files import require_file_target, translate_os_errors, write_text
from shortllm.options import OneOrMore
from shortllm.run_directory import require_results

if TYPE_CHECKING:
    from jinja2 import Environment

    from shortllm.reporting.load import RunResults
    from shortllm.reporting.parts import Page
    from shortllm.reporting.runs_page import ComparedModel

__all__ = ["compare", "render", "report", "write_comparison", "write_report", "write_units"]


@accepts()
def report(run_dir: Path) -> Path:
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
    require_results(run_dir)
    if (run_dir / "comparison.json").exists() and not (run_dir / "plan.json").exists():
        return write_comparison(run_dir)
    return write_report(run_dir)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` and the model card `README.md` of a run; returns the page's path.

    The card is also copied to the checkpoints of the run. A README that came there with the
    original model is kept as `README.original.md`.
    """
    from shortllm.quantizing.options import QUANTIZED
    from shortllm.reporting.load import load_results
    from shortllm.reporting.run_page import run_page
    from shortllm.run_directory import PRUNED

    results = load_results(run_dir)
    page = run_page(results)
    text = render(page)
    last = [PRUNED, *results.healed_by][-1]
    write_text(run_dir / "README.md", _model_card(page, results, last))
    for name in (PRUNED, *results.healed_by, QUANTIZED):
        if (run_dir / name).is_dir():
            _keep_original_card(run_dir / name)
            write_text(run_dir / name / "README.md", _model_card(page, results, name))
    write_text(run_dir / "report.html", text)
    return run_dir / "report.html"


def write_comparison(run_dir: Path) -> Path:
    """Write `comparison.html` of a comparison of criteria; returns its path."""
    from shortllm.reporting.comparison import criteria_page
    from shortllm.reporting.load import load_comparison

    write_text(run_dir / "comparison.html", render(criteria_page(load_comparison(run_dir))))
    return run_dir / "comparison.html"


def write_units(run_dir: Path) -> Path:
    """Write `units.html` of a comparison of width and depth; returns its path."""
    from shortllm.reporting.comparison import units_page
    from shortllm.reporting.load import load_units

    write_text(run_dir / "units.html", render(units_page(load_units(run_dir))))
    return run_dir / "units.html"


@accepts()
def compare(runs: OneOrMore[Path], *, out: Path = Path("compare.html")) -> list[ComparedModel]:
    """Several runs on one page: every model, quality against size and against latency.

    Args:
        runs: directories of finished runs: one or several.
        out: the page.
    Returns:
        One entry per model; an original that several runs share is listed once.
    Raises:
        ResultFileError: a directory without a finished run.
        OutputError: the page cannot be written.
    """
    for one in runs:
        require_results(one)
    require_file_target(out)
    from shortllm.reporting.load import load_runs
    from shortllm.reporting.runs_page import compared_models, runs_page

    found = load_runs(runs)
    models = compared_models(found)
    write_text(out, render(runs_page(found, models)))
    return models


# ---- templates, which escape everything that comes from data


def render(page: Page) -> str:
    """A self-contained HTML page."""
    from shortllm.reporting.plots import PALETTE

    return _templates().get_template("page.html.j2").render(page=page, palette=PALETTE) + "\n"


def _model_card(page: Page, results: RunResults, directory: str) -> str:
    """The model card for the checkpoint `directory`: Markdown with the Hub's YAML front matter."""
    from shortllm import criteria
    from shortllm.reporting import protocol
    from shortllm.reporting.run_page import key_figures
    from shortllm.run_directory import PRUNED

    criterion = criteria.find(results.plan.criterion)
    template = _templates().get_template("model_card.md.j2")
    return template.render(
        page=page,
        directory=directory,
        base_model=protocol.hub_id(results.plan.model),
        plan=results.plan,
        figures=key_figures(results).plain(),
        measured=bool(results.protocols()),
        protocol=protocol.protocol_rows(results),
        command=protocol.command_line(results.run.command),
        paper=criterion.paper if criterion else None,
        healed=directory != PRUNED and bool(results.healed_by),
        state=_state_of(results, directory),
    ) + "\n"  # fmt: skip


def _state_of(results: RunResults, directory: str) -> str | None:
    """Which of a run's several checkpoints one is; None where there is only one."""
    from shortllm.quantizing.options import QUANTIZED
    from shortllm.run_directory import HEALED, PRUNED

    if not results.healed_by:
        return None
    if directory == PRUNED:
        return "the shortened model before it was healed or retrained"
    if directory == QUANTIZED:
        return "the best model of the run, quantized"
    done = "healed without training" if directory == HEALED else "retrained"
    return f"the shortened model, {done} (method {results.healed_by[directory]})"


def _keep_original_card(checkpoint: Path) -> None:
    """Move a README that is not ours aside; ours, from an earlier report, may be overwritten."""
    readme = checkpoint / "README.md"
    if not readme.exists():
        return
    with translate_os_errors(checkpoint):
        text = readme.read_text(encoding="utf-8", errors="replace")
        front = re.match(r"---\n(.*?)^---$", text, flags=re.DOTALL | re.MULTILINE)
        if front is None or "\n- shortllm\n" not in front[1]:  # our tag
            os.replace(readme, checkpoint / "README.original.md")


def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("shortllm.reporting"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = _escape_markdown
    environment.filters["json"] = lambda text: json.dumps(text, ensure_ascii=False)
    return environment


def _escape_markdown(text: str) -> str:
    """Data as plain words inside Markdown: no markup, no table border, no line break."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))
