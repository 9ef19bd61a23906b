"""Every block of the documents runs, and what they show is true."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import hooks
import pytest
import torch
import typer
from documents import LANGUAGES, PAGES, REPOSITORY, Reader, code_spans, commands, fences
from families import loaded, saved, score, token_ids

import shortllm
import shortllm.healing.methods
import shortllm.quantizing.methods
import shortllm.retraining.methods
import shortllm.sublayers.criteria
import shortllm.width_pruning.methods
from shortllm import criteria, healing, quantizing, retraining, sublayers, width_pruning
from shortllm.cli import app
from shortllm.model.decoder import Decoder
from shortllm.options import Options

DOCS = REPOSITORY / "docs"
FIRST = {"README", "add_a_criterion", "add_a_baseline", "add_an_architecture_rule"}
"""Pages that run in every test run; of the others it checks recipes, commands and flags."""


@pytest.fixture
def reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Reader:
    return Reader(tmp_path, monkeypatch, lambda: "".join(capfd.readouterr()))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[] if page.stem in FIRST else [pytest.mark.slow])
        for page in PAGES
    ],
)
def test_every_block_runs(page: Path, reader: Reader) -> None:
    reader.read(page)


def test_every_recipe_and_command_can_be_typed(reader: Reader) -> None:
    known = flags()
    for page in PAGES:
        for fence in fences(page):
            assert fence.language in LANGUAGES, f"{fence}: give it one of {', '.join(LANGUAGES)}"
        reader.check(page)
        for span in code_spans(page):
            if re.match(r"(shortllm|python|pip|make|sh) (?!COMMAND)\S", span):
                [command] = commands(span)
                reader.look(command, f"{page.name}: {span}")
            elif span.startswith("--"):
                for word in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", span):
                    assert word in known, f"{page.name}: no command has {word}"


def rows_of(page: str) -> dict[str, list[str]]:
    """Each name in a row's first cell -> the other cells, as the site shows the page."""
    found = {}
    for line in hooks.on_page_markdown((DOCS / page).read_text()).splitlines():
        if line.startswith("| `"):
            first, *cells = re.split(r"\s*\|\s*", line.strip("| "))
            found |= {name: cells for name in re.findall(r"`([\w-]+)`", first)}
    return found


def test_the_table_of_methods_tells_of_every_criterion() -> None:
    rows, searches = rows_of("methods.md"), rows_of("search.md")
    for name in criteria.names():
        registered, cells = criteria.get(name), rows[name]
        assert hooks.NEEDS.get(registered.needs, registered.needs) in cells, name
        arxiv = re.search(r"arXiv:(\S+)", registered.source)
        assert arxiv is None or f"arxiv.org/abs/{arxiv[1]}" in cells[-1], name
        told = searches if registered.needs == "sets" else re.findall(r"`(\w+)`", cells[1])
        assert registered.defaults.keys() <= set(told), name


def test_the_table_of_methods_has_every_method_and_its_paper() -> None:
    methods = [
        *width_pruning.methods.METHODS,
        *quantizing.methods.METHODS,
        *retraining.methods.METHODS,
        *sublayers.criteria.CRITERIA,
        *healing.methods.METHODS,
        *criteria.listed(),
    ]
    rows = rows_of("methods.md")
    assert rows.keys() == {*(one.name for one in methods), "merge"}
    for one in methods:
        assert one.paper is None or one.paper.url in rows[one.name][-1], one.name


def test_the_page_of_options_has_every_record_that_users_see() -> None:
    records = {
        name: named for name in shortllm.__all__ if _is_options(named := getattr(shortllm, name))
    }
    page = (DOCS / "options.md").read_text()
    shown = re.findall(r"^<!-- options: ([\w.]+)\.(\w+)", page, re.MULTILINE)
    for module, name in shown:
        assert _is_options(getattr(import_module(f"shortllm.{module}"), name))
    assert records.keys() <= {name for _, name in shown}


def _is_options(named: Any) -> bool:
    return isinstance(named, type) and issubclass(named, Options)


def test_the_entry_of_a_shortened_checkpoint_is_as_shown(tmp_path: Path) -> None:
    shortllm.prune(str(saved("llama")), [2], tmp_path / "short", verify=False)
    written = json.loads((tmp_path / "short" / "config.json").read_text())["shortllm"]
    [shown] = [one for one in fences(DOCS / "file_formats.md") if one.language == "json"]
    of_a_hub_model = written.keys() - {"source_fingerprint"}
    assert json.loads(shown.text)["shortllm"].keys() == of_a_hub_model


def flags() -> set[str]:
    """All flags of ours: of the commands, and of the scripts in benchmarks/ and docs/."""
    found = {"--help"}
    groups = [typer.main.get_command(app)]
    for command in groups:
        groups += getattr(command, "commands", {}).values()
        for parameter in command.params:
            found |= {*parameter.opts, *parameter.secondary_opts}
    for script in (*REPOSITORY.glob("benchmarks/*.py"), *DOCS.glob("*.py")):
        found |= set(re.findall(r'"(--[a-z-]+)"', script.read_text()))
    return found


def test_the_script_in_the_text_is_the_script() -> None:
    for script in DOCS.glob("reproduce_*.py"):
        assert f"```python\n{script.read_text()}```\n" in script.with_suffix(".md").read_text()


@pytest.mark.parametrize("top", [1, 3])
def test_the_criterion_in_the_text_works(top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteria._REGISTRY, "_entries", dict(criteria._REGISTRY._entries))
    names: dict[str, Any] = {"__name__": "flips"}
    blocks = [one for one in fences(DOCS / "add_a_criterion.md") if one.language == "python"]
    for block in blocks:
        exec(compile(block.text, str(block), "exec"), names)
    assert len(blocks) == 2
    assert names["scores"]["flips"].options == {"top": 5} and len(names["plan"].removed) == 3
    assert names["plan"].criterion == "flips"

    decoder, ids_BT = Decoder(loaded("llama")), token_ids()
    found = score(decoder, ids_BT, "flips", options={"flips": {"top": top}})["flips"]
    with torch.no_grad():
        intact = decoder.model(input_ids=ids_BT, use_cache=False).logits[:, :-1].argmax(-1)
        for b in range(decoder.block_count):
            with decoder.without([b]):
                logits = decoder.model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
            better = (logits > logits.gather(-1, intact[..., None])).sum(-1)
            assert found.importance[b] == pytest.approx((better >= top).float().mean().item())
    assert found.intact == 0.0 and min(found.importance) > 0.1
