"""What a user allows surgery to do; read by everything that removes blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import ClassVar

from pydantic import Field

from shortllm.options import Options

_accepted: ContextVar[bool] = ContextVar("accepted", default=False)

ACCEPT = "--accept-unknown-references"


@contextmanager
def accepting_unknown_references() -> Iterator[None]:
    """Within the context, references to blocks that no rule covers stay as they are."""
    before = _accepted.set(True)
    try:
        yield
    finally:
        _accepted.reset(before)


def accepts_unknown_references() -> bool:
    """Whether references to blocks that no rule covers may stay as they are."""
    return _accepted.get()


class SurgeryOptions(Options):
    """What surgery does with references to blocks that it does not understand."""

    panel: ClassVar[str] = "Safety"

    accept_unknown_references: bool = Field(
        default=False,
        description="Remove blocks although a file refers to blocks in a way that no rule covers. "
        "The reference stays as it is and is named in the result.",
    )

    def applied(self) -> AbstractContextManager[None]:
        """A context in which such references are accepted, if these options say so."""
        return accepting_unknown_references() if self.accept_unknown_references else nullcontext()
