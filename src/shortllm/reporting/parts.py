"""The parts that a page is built from: paragraphs, figures, tables, strips of blocks, lists.

A section of a page is a function from results to a list of parts; `templates/page.html.j2` has one
macro for each kind of part and escapes all text. A table has the same rows on a page, in a model
card and, by `Table.plain`, in a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from shortllm.papers import Paper

Item = TypeVar("Item")
Status = Literal["kept", "removed", "protected"]
"""What a plan does with a block."""


class Part:
    """Anything that a section can contain."""

    __slots__ = ()

    @property
    def kind(self) -> str:
        """Name of its macro in the template."""
        return type(self).__name__.lower()


@dataclass(frozen=True, slots=True)
class Paragraph(Part):
    """Text of its own, or a note about what is above it."""

    text: str
    look: Literal["", "note"] = "note"


@dataclass(frozen=True, slots=True)
class Heading(Part):
    """A heading within a section."""

    text: str


@dataclass(frozen=True, slots=True)
class Figure(Part):
    """An inline `<svg>` element with its description, and a caption below it."""

    svg: str
    alt: str
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Image(Part):
    """A figure as an image of its own, for pages that do not show `<svg>` elements."""

    alt: str
    source: str
    """A `data:` address."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: its text, a smaller line below it, muted text before it, and its CSS class."""

    text: str
    detail: str = ""
    lead: str = ""
    look: str = ""

    @property
    def plain(self) -> str:
        """The cell in one line; the best of a column has a star."""
        star = "*" if self.look == "best" else ""
        return f"{self.lead}{self.text}{star}{f' ({self.detail})' if self.detail else ''}"


@dataclass(frozen=True, slots=True)
class Row:
    """Cells of one line, and its CSS class."""

    cells: Sequence[Cell]
    look: str = ""

    @property
    def plain(self) -> tuple[str, ...]:
        """The cells as text; the best row has a star after its first cell."""
        first, *others = (cell.plain for cell in self.cells)
        return (f"{first}*" if self.look == "best" else first, *others)


@dataclass(frozen=True, slots=True)
class Table(Part):
    """Rows below a head; the first cell of each row is its name."""

    head: Row
    rows: Sequence[Row]

    def plain(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Head and rows as text, for a terminal."""
        return self.head.plain, [row.plain for row in self.rows]


def row(*cells: Cell | str, look: str = "") -> Row:
    """A row of cells, of which plain ones may be given as text."""
    return Row([cell if isinstance(cell, Cell) else Cell(cell) for cell in cells], look)


Column = tuple["Cell | str", "Callable[[Item], Cell | str]"]
"""Heading of a column, and what it shows of an item."""


def table_of(
    items: Iterable[Item],
    columns: Sequence[Column[Item]],
    look: Callable[[Item], str] = lambda _: "",
) -> Table:
    """A row for each item, a cell for each column; `look` is the CSS class of a row."""
    return Table(
        row(*(heading for heading, _ in columns)),
        [row(*(show(item) for _, show in columns), look=look(item)) for item in items],
    )


@dataclass(frozen=True, slots=True)
class Strip(Part):
    """The blocks of a model in order, and what the colours mean."""

    statuses: Sequence[Status]
    key: Sequence[tuple[Status, str]] = ()
    ends: bool = True
    """Whether embedding and head are shown."""

    def cells(self) -> Iterator[tuple[int, Status, int | None]]:
        """Each block with its status and its index in the shortened model."""
        new = 0
        for block, status in enumerate(self.statuses):
            yield block, status, None if status == "removed" else new
            new += status != "removed"


@dataclass(frozen=True, slots=True)
class Terms(Part):
    """Names with their descriptions."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Details(Part):
    """Parts that can be folded away."""

    summary: str
    parts: Sequence[Part]
    open: bool = False


@dataclass(frozen=True, slots=True)
class Samples(Part):
    """Texts with their labels side by side: a row for each sample, a column for each model."""

    prompt: str
    rows: Sequence[Sequence[tuple[str, str]]]


@dataclass(frozen=True, slots=True)
class Command(Part):
    """A command line, word by word."""

    words: Sequence[str]


@dataclass(frozen=True, slots=True)
class Citation(Part):
    """The paper that defines some methods."""

    names: Sequence[str]
    paper: Paper


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with its parts; the name is the anchor in the page."""

    name: str
    heading: str
    parts: Sequence[Part]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A whole page: the model, what happened to it, the verdict, and the sections below."""

    name: str
    revision: str = ""
    title: str
    verdict: str
    version: str
    sections: Sequence[Section]
