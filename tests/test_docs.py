"""What the documents show is what the files beside them hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import file_tree
import pytest
import torch
from families import loaded, score, token_ids

from shortllm import criteria
from shortllm.model.decoder import Decoder

DOCS = Path(__file__).parents[1] / "docs"


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
    blocks = re.findall(
        r"```python\n(.*?)```", (DOCS / "add_a_criterion.md").read_text(), re.DOTALL
    )
    names: dict[str, Any] = {"__name__": "flips"}
    for code in blocks:
        exec(compile(code, "add_a_criterion.md", "exec"), names)
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
