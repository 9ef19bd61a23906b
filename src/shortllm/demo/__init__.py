"""The demo page: one prompt, several models side by side.

models.py    the models of the page, and the embedded ones, shortened on first use
generate.py  text while it is generated, what that took, and limits
page.py      the page, and its server

shortllm demo --original MODEL --depth SHORT
"""

from __future__ import annotations

from collections.abc import Iterable

from shortllm.errors import ShortLLMError


def named_models(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Model locations by name; refuses names that are blank or repeated."""
    found: dict[str, str] = {}
    for name, location in pairs:
        if not name.strip() or not location.strip():
            raise ShortLLMError(
                f"--model '{name}={location}' must have the form NAME=MODEL, "
                "for example short=runs/short"
            )
        if name in found:
            raise ShortLLMError(f"two models are called '{name}'. Give each its own name")
        found[name] = location
    return found
