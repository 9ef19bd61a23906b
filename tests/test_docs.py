"""Every block of the documents runs, and what they show is what the files beside them hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import file_tree
import pytest
import torch
import typer
from documents import LANGUAGES, PAGES, REPOSITORY, Reader, code_spans, commands, fences
from families import loaded, score, token_ids

from shortllm import criteria
from shortllm.cli import app
from shortllm.model.decoder import Decoder

DOCS = REPOSITORY / "docs"
BY_NAME = {"ids": lambda page: page.stem}


@pytest.fixture
def reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Reader:
    return Reader(tmp_path, monkeypatch, lambda: "".join(capfd.readouterr()))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, **BY_NAME)
def test_every_block_runs(page: Path, reader: Reader) -> None:
    for fence in fences(page):
        assert fence.language in LANGUAGES, f"{fence}: give it one of {', '.join(LANGUAGES)}"
    reader.read(page)


@pytest.mark.parametrize("page", PAGES, **BY_NAME)
def test_every_command_in_the_text_can_be_typed(page: Path, reader: Reader) -> None:
    for span in code_spans(page):
        if re.match(r"(shortllm|python|pip|make|sh) \S", span):
            [command] = commands(span)
            reader.look(command, f"{page.name}: {span}")


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


@pytest.mark.parametrize("page", PAGES, **BY_NAME)
def test_every_flag_in_the_text_exists(page: Path) -> None:
    known = flags()
    for span in code_spans(page):
        if span.startswith("--"):
            for word in re.findall(r"(?<!\S)--[a-z][a-z-]*", span):
                assert word in known, f"{page.name}: no command has {word}"


@pytest.mark.parametrize("name", ["reproduce_ppl", "reproduce_perplexity"])
def test_the_script_in_the_text_is_the_script(name: str) -> None:
    text = (DOCS / f"{name}.md").read_text()
    script = (DOCS / f"{name}.py").read_text()
    assert f"```python\n{script}```\n" in text


def test_the_tree_names_every_file() -> None:
    written = file_tree.BLOCK.findall(file_tree.PAGE.read_text(encoding="utf-8"))
    assert written == [file_tree.tree()], "run: python tests/file_tree.py --write"


@pytest.mark.parametrize("top", [1, 3])
def test_the_criterion_in_the_text_works(top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteria, "_REGISTRY", dict(criteria._REGISTRY))
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
