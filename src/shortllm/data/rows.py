"""Rows of text with their origin, which copy nothing and keep their numbers in the source.

What a local file holds: its kind by its suffix, and its texts or records one after the other.

Everything is a stream; what goes wrong while a file is read is a DataError that names it.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast, overload

from shortllm.errors import DataError, did_you_mean


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


TEXT_SUFFIXES = (".txt", ".text", ".raw", ".tokens")

RECORD_SUFFIXES = (".jsonl", ".json", ".parquet")

PACKED_SUFFIXES = (".gz", ".xz")

UNREADABLE = (OSError, EOFError, RecursionError, lzma.LZMAError, zlib.error, ValueError)
"""What reading a damaged file raises."""

DEFAULT_COLUMNS = ("text", "page", "sentence", "content")
"""Columns taken without being named, the first that exists."""


def supported() -> str:
    """The kinds of files there are, for messages."""
    return (
        f"{', '.join(TEXT_SUFFIXES + RECORD_SUFFIXES)}; each plain, {' or '.join(PACKED_SUFFIXES)}"
    )


def file_texts(
    path: Path, column: str | None, line_rule: Callable[[str], str] = str
) -> Iterator[str]:
    """The texts of one file; `line_rule` is applied to the lines of a text file."""
    kind = kind_of(path)
    with _readable(path, kind, column):
        if kind in TEXT_SUFFIXES:
            yield from map(line_rule, _lines(path))
        elif kind == ".parquet":
            yield from _parquet_texts(path, column)
        else:
            yield from record_texts(path, _json_records(path, kind), column)


def file_records(path: Path, column: str | None) -> Iterator[Any]:
    """The records of one file: lines of a text file, else what each record holds."""
    kind = kind_of(path)
    with _readable(path, kind, column):
        if kind in TEXT_SUFFIXES:
            yield from _lines(path)
        elif kind == ".parquet":
            with _parquet(path) as file:
                for batch in file.iter_batches():
                    yield from batch.to_pylist()
        else:
            yield from _json_records(path, kind)


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, without that of its packing.

    Raises:
        DataError: none that is known.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind not in TEXT_SUFFIXES + RECORD_SUFFIXES:
        raise DataError(f"cannot tell what kind of data {path} holds. Supported: {supported()}")
    return kind


@contextmanager
def _readable(path: Path, kind: str, column: str | None) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a DataError that names it."""
    if kind in TEXT_SUFFIXES and column is not None:
        raise DataError(f"{path} is a text file and has no column '{column}'. Leave the column out")
    try:
        yield
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"cannot read {path} as {kind[1:]}: {error}") from error


def load_records(path: Path) -> list[dict[str, Any]]:
    """The records of a `.jsonl` or `.json` file, plain or packed, with all their columns.

    Raises:
        DataError: it cannot be read, or holds anything but records.
    """
    kind = ".json" if ".json" in (suffix.lower() for suffix in path.suffixes) else ".jsonl"
    try:
        records = list(_json_records(path, kind))
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"cannot read {path} as {kind[1:]}: {error}") from error
    if not records or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path} is no list of records. Give one JSON object per line")
    return records


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return lzma.open(path, "rb") if suffix == ".xz" else path.open("rb")


def _lines(path: Path) -> Iterator[str]:
    """Lines without their ends, as the text loader of `datasets` cuts them: at CR, LF or both."""
    with io.TextIOWrapper(_open(path), encoding="utf-8") as stream:
        for line in stream:
            yield line.removesuffix("\n")


def _json_records(path: Path, kind: str) -> Iterator[Any]:
    """Records of JSON lines, or of a `.json` file that is one list (C4's hold JSON lines)."""
    if kind == ".json":
        with _open(path) as stream:
            if stream.read(4096).lstrip().startswith(b"["):
                stream.seek(0)
                yield from map(_in_whole_letters, json.load(stream))
                return
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                yield _in_whole_letters(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise DataError(f"line {number} of {path} is not JSON: {error}") from error


def _in_whole_letters(record: Any) -> Any:
    """A record whose texts hold `?` for what is half a letter in JSON (`"\\ud800"`): no tokenizer
    takes that."""
    if isinstance(record, dict):
        return {key: _in_whole_letters(value) for key, value in record.items()}
    if isinstance(record, str) and not record.isascii():
        return record.encode("utf-8", "replace").decode("utf-8")
    return record


def record_texts(path: Path | str, records: Iterator[Any], column: str | None) -> Iterator[str]:
    """One text per record; the first record decides which column. Records may be plain strings.

    Raises:
        DataError: a record without text in that column.
    """
    chosen: str | None = None
    for number, record in enumerate(records):
        if isinstance(record, str) and column is None:
            yield record
            continue
        if not isinstance(record, dict):
            raise DataError(
                f"row {number} of {path} is a {type(record).__name__}, not a record"
                + (f" with a column '{column}'" if column else "")
            )
        if chosen is None:
            text_columns = [key for key, value in record.items() if isinstance(value, str)]
            chosen = choose_column(str(path), list(record), text_columns, column)
        if not isinstance(record.get(chosen), str):
            raise DataError(f"row {number} of {path} has no text in column '{chosen}'")
        yield record[chosen]


def _parquet_texts(path: Path, column: str | None) -> Iterator[str]:
    """The texts of one column, read batch by batch."""
    with _parquet(path) as file:
        schema = file.schema_arrow
        text_columns = [
            field.name
            for field in schema
            if str(field.type) in ("string", "large_string", "string_view")
        ]
        chosen = choose_column(str(path), schema.names, text_columns, column)
        number = 0
        for batch in file.iter_batches(columns=[chosen]):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str):
                    raise DataError(f"row {number} of {path} has no text in column '{chosen}'")
                yield text
                number += 1


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """A parquet file to read from, unpacked."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            "reading .parquet needs pyarrow. Install it with: pip install 'shortllm[data]'"
        ) from error
    with _open(path) as stream:
        packed = path.suffix.lower() in PACKED_SUFFIXES
        yield pq.ParquetFile(pa.BufferReader(stream.read()) if packed else stream)


def choose_column(where: str, names: list[str], text_names: list[str], column: str | None) -> str:
    """The asked column if it exists; without one a default name, else the only column of text.

    Raises:
        DataError: there is no such column, or none that is clear.
    """
    if column is not None:
        if column in names:
            return column
        raise DataError(f"{where} has no column '{column}'.{did_you_mean(column, names)}")
    for name in DEFAULT_COLUMNS:
        if name in text_names:
            return name
    if len(text_names) == 1:
        return text_names[0]
    if not text_names:
        raise DataError(f"{where} has no column of text. Columns: {', '.join(names)}")
    raise DataError(
        f"{where} has {len(text_names)} columns of text, "
        f"none of them named {', '.join(DEFAULT_COLUMNS)}. "
        f"Name one, as in {where}#{text_names[0]}. Columns: {', '.join(names)}"
    )
