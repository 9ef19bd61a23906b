"""What the documents show is what the files beside them hold."""

from __future__ import annotations

from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", ["reproduce_ppl", "reproduce_perplexity"])
def test_the_script_in_the_text_is_the_script(name: str) -> None:
    text = (DOCS / f"{name}.md").read_text()
    script = (DOCS / f"{name}.py").read_text()
    assert f"```python\n{script}```\n" in text
