"""One small tree of errors. Each says what was requested, what is true, and what to type next.

ShortLLMError (a ValueError)      the command line prints the message and exits with code 2
├── CheckpointError               a model directory or Hub id that cannot be read or written
│   ├── NotFiniteError            a model whose loss is not finite
│   └── UnsupportedModelError     a readable model whose blocks cannot be removed
├── DataError                     text or token ids that cannot be used
├── CriterionError                an unknown criterion, or scores that cannot be ranked
├── BudgetError                   a plan that is impossible
├── RecipeError                   a recipe that cannot be read, or that requests what does not exist
├── OutputError                   an output directory that may not or cannot be written
├── ResultFileError               a result file of an earlier stage that cannot be read
└── TargetMissedError             what was measured misses what was requested; code 3
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class ShortLLMError(ValueError):
    """Base of every error a user can cause; its message is complete without a traceback."""

    exit_code: ClassVar[int] = 2
    """Of the command line."""

    def __str__(self) -> str:
        # a downloaded file may hold control codes in the names that messages quote
        return "".join(
            one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode()
            for one in super().__str__()
        )


class CheckpointError(ShortLLMError):
    """A model directory or Hub id cannot be read, or what was written is not what was meant."""


class NotFiniteError(CheckpointError):
    """The loss of a model is not finite."""


class UnsupportedModelError(CheckpointError):
    """The model can be read, but removing blocks from it would give a wrong model."""


class DataError(ShortLLMError):
    """Text or token ids are missing, unreadable or too few."""


class CriterionError(ShortLLMError):
    """A criterion is unknown, or its scores cannot be ranked."""


class BudgetError(ShortLLMError):
    """The requested removal is impossible for this model and protection."""


class RecipeError(ShortLLMError):
    """A recipe is missing or damaged, or has unknown fields or values that do not fit."""


class OutputError(ShortLLMError):
    """The output directory contains something else, or cannot be written."""


class ResultFileError(ShortLLMError):
    """A result file of an earlier stage is missing, damaged or of another kind."""


class TargetMissedError(ShortLLMError):
    """All was measured, and it misses what was requested."""

    exit_code = 3


def install_hint(extra: str) -> str:
    """What to type to install an extra of this package, from an index or from its sources."""
    return f"pip install 'shortllm[{extra}]', or in a checkout: pip install '.[{extra}]'"


def first_line_of(error: BaseException) -> str:
    """What an error of a library says, in one line without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def did_you_mean(name: str, available: Iterable[str]) -> str:
    """The tail of an "unknown name" message: the nearest name, if any is near, and all names."""
    names = sorted(available)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"{hint} Available: {', '.join(names)}"
