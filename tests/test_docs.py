"""What the documents show is what the files beside them hold."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_script_in_the_text_is_the_script() -> None:
    text = (DOCS / "reproduce_ppl.md").read_text()
    assert f"```python\n{(DOCS / 'reproduce_ppl.py').read_text()}```\n" in text
