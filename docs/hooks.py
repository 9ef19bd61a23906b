"""What mkdocs adds to docs/: pages that are derived from other files and from the package.

index.md, contributing.md, changelog.md   README.md, CONTRIBUTING.md, CHANGELOG.md
commands.md                               every command with its flags, from the command line
options.md                                a table of every options record that it names
methods.md                                the tables of criteria
notebook.md                               notebook.ipynb with its stored outputs

The page of the Python functions is mkdocstrings'; `Sections` parts docstrings as it reads them.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parents[1]
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Page -> the file of the repository that it shows."""
MARKER = re.compile(r"^<!-- options: ([\w.]+)\.(\w+)(?: (\w+))? -->$", re.MULTILINE)
"""Where a page has the table of an options record: its module and name, then the key that it has
in a recipe, or `own` to leave out what the record inherits or nests."""

CRITERIA = re.compile(r"^<!-- criteria: (\w+) -->$", re.MULTILINE)
"""Where a page has the table of all criteria, or of the searches among them."""

NEEDS = {
    "streams": "forward",
    "last token": "forward",
    "similarities": "forward",
    "logits": "walk",
    "choices": "walk",
    "removals": "rounds",
    "sets": "rounds",
}
"""What a criterion needs -> what the table calls it, where that is another word."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for page, source in PAGES.items():
        text = (REPOSITORY / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_from_docs(text)))
    files.append(File.generated(config, "commands.md", content=command_page()))
    for notebook in Path(config["docs_dir"]).glob("*.ipynb"):
        page = f"{notebook.stem}.md"
        files.append(File.generated(config, page, content=notebook_page(notebook)))
    return files


def notebook_page(notebook: Path) -> str:
    """A notebook as Markdown: its text, its code, and what its cells showed."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += _shown(cell.get("outputs", []))
    title, *others = parts
    file = f'<a href="{notebook.name}" download>The notebook itself</a>'
    return "\n\n".join([title, file, *others]) + "\n"


def _shown(outputs: list[dict[str, Any]]) -> Iterator[str]:
    """What a cell showed, as HTML that Markdown leaves alone: without blank lines."""
    for output in outputs:
        data = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
        if "text/html" in data:
            shown = re.sub(r"\n\s*", "\n", data["text/html"])
        elif "image/png" in data:
            source = data["image/png"].replace("\n", "")
            alt = html.escape(data.get("text/plain", ""))
            shown = f'<img alt="{alt}" src="data:image/png;base64,{source}">'
        else:
            shown = f"<pre>{html.escape(data.get('text/plain', ''))}</pre>"
        yield f'<div class="output">\n{shown.strip()}\n</div>'


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to a file next to docs/ and to a notebook lead to its page, and markers become tables
    of options."""
    for page, source in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    markdown = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", markdown)
    return CRITERIA.sub(criteria_table, MARKER.sub(options_table, markdown))


def criteria_table(marker: re.Match[str]) -> str:
    """The registered criteria, each with its help, options, needs and paper."""
    from shortllm import criteria

    searches = marker[1] == "searches"
    lines = ["| name | what it computes | options | needs | source |", "|---|---|---|---|---|"]
    for one in criteria.listed():
        if (one.needs == "sets") is not searches:
            continue
        options = ", ".join(f"`{name}`" for name in one.defaults)
        paper = one.paper
        source = one.source if paper is None else f"{paper.short}, [{paper.arxiv}]({paper.url})"
        cells = (f"`{one.name}`", one.help, options, NEEDS.get(one.needs, one.needs), source)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def options_table(marker: re.Match[str]) -> str:
    """The options of a record: flag, key, default, and what each does."""
    from shortllm.options import table_rows

    module, name, section = marker.groups()
    kind = getattr(import_module(f"shortllm.{module}"), name)
    lines = ["| flag | key | default | meaning |", "|---|---|---|---|"]
    for flag, key, default, description in table_rows(kind):
        if section != "own" or key in kind.__annotations__:
            place = key if section in (None, "own") else f"{section}.{key}"
            cells = [f"`{cell}`" if cell else "" for cell in (flag, place, default)]
            lines.append(f"| {' | '.join(cells)} | {description.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


class Sections(griffe.Extension):
    """A blank line before each section of a docstring, where ours have none."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change what was read; the source stays as it is."""
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"\n+(Args|Returns|Raises):\n", r"\n\n\1:\n", text)


def _from_docs(text: str) -> str:
    """Links of the repository's root as docs/ has them."""
    for page, source in PAGES.items():
        text = text.replace(f"]({source}", f"]({page}")
    return text.replace("](docs/", "](")


def command_page() -> str:
    """All commands as Markdown, by typer's own `typer utils docs`."""
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from shortllm.cli import app

    command = get_command(app)
    with command.make_context("shortllm", [], resilient_parsing=True) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="shortllm")
    text = text[text.index("\n## ") :]  # behind the list of commands, which cuts what they do short
    text = re.sub(r"^\* `--help`: .*\n", "", text, flags=re.MULTILINE)
    return "# Commands\n\n`shortllm COMMAND --help` prints the same.\n" + text
