"""The page and the model card from their templates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shortllm.reporting import comparison, sections
from shortllm.reporting import runs as page_of_runs
from shortllm.reporting import units as page_of_units
from shortllm.reporting.citations import CITATIONS
from shortllm.reporting.loading import ComparisonResults, RunResults, UnitsResults
from shortllm.reporting.names import hub_id
from shortllm.reporting.protocol import describe_protocol
from shortllm.reporting.runs import ComparedModel

if TYPE_CHECKING:
    from jinja2 import Environment


def render_page(results: RunResults) -> str:
    """The HTML page; everything that comes from data is escaped by the templates."""
    contexts = [(name, title, describe(results)) for name, title, describe in sections.SECTIONS]
    return _page("report", sections.head(results), contexts)


def render_comparison(results: ComparisonResults) -> str:
    """The HTML page of a comparison of criteria."""
    contexts = [(name, title, describe(results)) for name, title, describe in comparison.SECTIONS]
    return _page("comparison", comparison.head(results), contexts)


def render_units(results: UnitsResults) -> str:
    """The HTML page that sets width beside depth."""
    return _page("units", page_of_units.head(results), page_of_units.sections(results))


def render_runs(runs: Mapping[str, RunResults], models: Sequence[ComparedModel]) -> str:
    """The HTML page of several runs."""
    columns, rows = page_of_runs.table(models)
    cell = page_of_runs.common_cell(runs)
    contexts = [
        (
            "trade",
            "Quality against cost",
            page_of_runs.trade(models, cell),
        ),
        ("models", "Every model", {"columns": columns, "rows": rows}),
        ("removals", "What was removed", page_of_runs.removals(runs)),
    ]
    return _page("runs", page_of_runs.head(runs, models), contexts)


def _page(
    name: str, head: dict[str, Any], contexts: Sequence[tuple[str, str, dict[str, Any] | None]]
) -> str:
    shown = [
        {"name": section, "heading": heading, "context": context}
        for section, heading, context in contexts
        if context is not None
    ]
    template = _templates().get_template(f"{name}.html.j2")
    return template.render(head=head, sections=shown) + "\n"


def render_model_card(results: RunResults, directory: str) -> str:
    """The model card: Markdown with the Hub's YAML front matter.

    Args:
        directory: the name of the checkpoint that it shows how to load.
    """
    plan = results.plan
    card = (
        _templates()
        .get_template("model_card.md.j2")
        .render(
            head=sections.head(results),
            directory=directory,
            base_model=hub_id(plan.model),
            plan=plan,
            protected=sorted(plan.protected),
            figures=sections.key_figures(results),
            protocol=describe_protocol(results),
            criterion=plan.criterion,
            citation=CITATIONS.get(plan.criterion or ""),
            healed=bool(results.healed_by),
        )
    )
    return card + "\n"


def is_our_card(text: str) -> bool:
    """Whether a README is a card from `model_card.md.j2`: its front matter carries our tag."""
    front = re.match(r"---\n(.*?)^---$", text, flags=re.DOTALL | re.MULTILINE)
    return front is not None and "\n- shortllm\n" in front[1]


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
