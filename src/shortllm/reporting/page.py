"""Pages and model cards from their templates, which escape everything that comes from data."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shortllm.reporting import run_page
from shortllm.reporting.load import RunResults
from shortllm.reporting.methods import criterion_info
from shortllm.reporting.parts import Head, Section
from shortllm.reporting.plots import PALETTE
from shortllm.reporting.protocol import command_line, hub_id, protocol_rows

if TYPE_CHECKING:
    from jinja2 import Environment


def render_page(head: Head, sections: Sequence[Section]) -> str:
    """A self-contained HTML page."""
    template = _templates().get_template("page.html.j2")
    return template.render(head=head, sections=sections, palette=PALETTE) + "\n"


def render_model_card(results: RunResults, directory: str) -> str:
    """The model card for the checkpoint `directory`: Markdown with the Hub's YAML front matter."""
    plan = results.plan
    context: dict[str, Any] = {
        "head": run_page.head(results),
        "directory": directory,
        "base_model": hub_id(plan.model),
        "plan": plan,
        "figures": run_page.key_figures(results).plain(),
        "measured": bool(results.protocols()),
        "protocol": protocol_rows(results),
        "command": command_line(results.run.command),
        "paper": criterion_info(plan.criterion or "").paper,
        "healed": bool(results.healed_by),
    }
    return _templates().get_template("model_card.md.j2").render(context) + "\n"


def is_our_card(text: str) -> bool:
    """Whether a README is a card from `model_card.md.j2`: its front matter has our tag."""
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
