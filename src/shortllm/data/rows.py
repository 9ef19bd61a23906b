"""Rows of text with their origin, which copy nothing and keep their numbers in the source."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

from shortllm.errors import DataError


class Texts(Protocol):
    """What rows may be stored in: a list, packed bytes, or a column of a data set on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...


@dataclass(frozen=True, slots=True, eq=False)
class Rows(Sequence[str]):
    """Rows of text with their origin: a view on `texts[start:stop]` that copies nothing.

    `start` and `stop` are row numbers of the whole source, so that a result file can name them.
    """

    source: str
    texts: Texts
    start: int
    stop: int

    @classmethod
    def of(cls, source: str, texts: Texts) -> Rows:
        """All of `texts`.

        Raises:
            DataError: there are none.
        """
        if len(texts) == 0:
            raise DataError(f"'{source}' holds no rows. Give a file or a split with text in it")
        return cls(source, texts, 0, len(texts))

    def span(self, start: int, stop: int) -> Rows:
        """The rows `[start, stop)` of this view; they keep their numbers in the whole source.

        Raises:
            DataError: the span reaches outside this view.
        """
        if not 0 <= start <= stop <= len(self):
            raise DataError(
                f"'{self.source}' has {len(self)} rows here: [{start}, {stop}) is not among them"
            )
        return Rows(self.source, self.texts, self.start + start, self.start + stop)

    def __len__(self) -> int:
        return self.stop - self.start

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(self.start, self.stop)[index]
        text: object = self.texts[number]
        if not isinstance(text, str):
            raise DataError(
                f"row {number} of '{self.source}' is not text but {type(text).__name__}"
            )
        return text


def split_held_out(rows: Rows) -> tuple[Rows, Rows]:
    """(calibration, evaluation): the first half of the rows, and the rest.

    The rule for data with one split only, so that no row is measured that blocks were chosen on.

    Raises:
        DataError: fewer than two rows.
    """
    if len(rows) < 2:
        raise DataError(
            f"'{rows.source}' has {len(rows)} row: calibration and evaluation need one each. "
            "Give a source with more rows, or two sources"
        )
    half = len(rows) // 2
    return rows.span(0, half), rows.span(half, len(rows))


def same_text(one: Rows, other: Rows) -> bool:
    """Whether two sources hold the same rows, also under two spellings of one file's name."""
    if one.source == other.source:
        return True
    whole, whole_other = one.texts, other.texts
    count = len(whole)
    places = {0, count // 2, count - 1}
    return len(whole_other) == count and all(whole[i] == whole_other[i] for i in places)


class PackedTexts:
    """Strings in one buffer: a row costs its UTF-8 bytes and 8 more.

    A lone surrogate (broken JSON escapes have them, no tokenizer takes them) becomes `?`.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])
        for text in texts:
            self._bytes += text.encode("utf-8", "replace")
            self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int, /) -> str:
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8")
