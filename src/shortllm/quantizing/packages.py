"""Whether llm-compressor is installed, and whether it admits the installed packages.

llm-compressor names the newest torch and transformers it was tested with. pip resolves the extra to
versions that fit, but a package upgraded afterwards breaks that without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version

from shortllm.errors import ShortLLMError

LIBRARY = "llmcompressor"
RECORDED = (LIBRARY, "compressed-tensors")
"""Packages whose versions go into the record."""


def require_extra() -> None:
    """Refuse at once if what quantizing takes is not installed, or not in versions that fit.

    Raises:
        ShortLLMError: naming what to install.
    """
    try:
        own = version(LIBRARY)
    except PackageNotFoundError:
        raise ShortLLMError(
            "quantizing needs llm-compressor. Install it with: pip install 'shortllm[quantize]'"
        ) from None
    problems = not_admitted(requires(LIBRARY) or [])
    if problems:
        found = ", ".join(f"{name} {held}" for name, held, _ in problems)
        wanted = " ".join(f"'{name}{asked}'" for name, _, asked in problems)
        raise ShortLLMError(
            f"{LIBRARY} {own} does not admit the installed {found}. Install what it admits, best "
            f"in an environment of its own: pip install 'shortllm[quantize]' {wanted}"
        )


def not_admitted(requirements: Iterable[str]) -> list[tuple[str, str, str]]:
    """(package, installed version, admitted versions) of each requirement that is not met.

    Args:
        requirements: as a package's metadata states them, e.g. `torch<=2.14.0,>=2.10.0`.
    """
    from packaging.requirements import Requirement

    problems = []
    for text in requirements:
        asked = Requirement(text)
        if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
            continue
        try:
            held = version(asked.name)
        except PackageNotFoundError:
            held = "none"
        if held == "none" or not asked.specifier.contains(held, prereleases=True):
            problems.append((asked.name, held, str(asked.specifier)))
    return problems


def extra_versions() -> dict[str, str]:
    """Versions of the packages that only quantizing takes."""
    return {name: version(name) for name in RECORDED}
