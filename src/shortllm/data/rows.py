"""Rows of text or conversations with their origin, and the local files they are read from.

The suffix of a file says what it contains; `.gz` or `.xz` may follow it.

    .txt .text .raw .tokens   a row is a line without its line end (LF, CR or CRLF)
    .jsonl                    one record per line
    .json                     a list of records or of texts, or JSON lines (as C4 has them)
    .csv                      a line of column names, then records; every value is a text
    .parquet                  records by columns

Files are read as streams. The loaders of `datasets` are not used for them because they guess types
(a text that looks like a date or a number, or says `NA`, would change) and lock files in the user's
cache, which may be read-only. Rows of a Hub data set stay on disk, memory-mapped.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, cast, overload

from shortllm.data.shapes import Form, Reading, Row, read_rows, reading_of
from shortllm.errors import DataError

TEXT_SUFFIXES = (".txt", ".text", ".raw", ".tokens")

RECORD_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

PACKED_SUFFIXES = (".gz", ".xz")

UNREADABLE = (OSError, EOFError, RecursionError, lzma.LZMAError, zlib.error, csv.Error, ValueError)
"""What reading a damaged file raises."""

CHUNK_CHARACTERS = 2**20
"""Characters in one Arrow buffer, about."""


class ArrowTexts:
    """A column of strings in Arrow buffers, in memory or memory-mapped; conversations as JSON."""

    def __init__(self, column: Any, decode: Callable[[str], Row] | None = None) -> None:
        self._column = column
        self._decode = decode

    @classmethod
    def of(cls, rows: Iterable[Row]) -> ArrowTexts:
        """Copy rows of one kind into memory: a row costs its UTF-8 bytes and 8 more."""
        import pyarrow as pa

        rows = iter(rows)
        first = list(islice(rows, 1))
        talks = bool(first) and not isinstance(first[0], str)
        texts = (json.dumps(row) if talks else cast(str, row) for row in chain(first, rows))
        chunks, buffer, size = [], [], 0
        for text in texts:
            buffer.append(text)
            size += len(text) + 1
            if size >= CHUNK_CHARACTERS:
                chunks.append(pa.array(buffer, pa.large_string()))
                buffer, size = [], 0
        chunks.append(pa.array(buffer, pa.large_string()))
        decode = json.loads if talks else None
        return cls(pa.chunked_array(chunks, pa.large_string()), decode)

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int) -> Row:
        text: str = self._column[index].as_py()
        return text if self._decode is None else self._decode(text)


class HubConversations:
    """The conversations of a Hub data set, which stay on disk."""

    def __init__(self, dataset: Any, reading: Reading, source: str) -> None:
        self._dataset, self._reading, self._source = dataset, reading, source

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Row:
        return self._reading.read(self._dataset[index], self._source, index)


Stored = Sequence[Row] | Sequence[str] | ArrowTexts | HubConversations


@dataclass(frozen=True, slots=True, eq=False)
class Rows(Sequence[Row]):
    """Texts or conversations with their origin: a view on `texts[start:stop]` that copies nothing.

    `start` and `stop` are row numbers in the whole source, so that a result file can name them.
    """

    source: str
    texts: Stored
    start: int
    stop: int

    @classmethod
    def of(cls, source: str, texts: Stored) -> Rows:
        """All of `texts`, at least one."""
        if len(texts) == 0:
            raise DataError(f"'{source}' has no rows. Give a file or a split with text in it")
        return cls(source, texts, 0, len(texts))

    def span(self, start: int, stop: int) -> Rows:
        """The rows `[start, stop)` of this view; they keep their numbers in the whole source."""
        return Rows(self.source, self.texts, self.start + start, self.start + stop)

    def __len__(self) -> int:
        return self.stop - self.start

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(self.start, self.stop)[index]
        row: object = self.texts[number]
        if not isinstance(row, str | list):
            raise DataError(f"row {number} of '{self.source}' is not text but {type(row).__name__}")
        return row


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Records:
    """The records of a data source: each call reads them from the start, never all in memory."""

    source: str
    """The data source with its split filled in."""
    named: str | None
    """What was named with `#`: a column, or the columns of some fields."""
    lines: bool
    """Whether records are lines of a text file, which are not documents of their own."""
    files: tuple[Path, ...]
    """The local files they are read from; empty for a Hub data set and the embedded world."""
    read: Callable[[], Iterator[Any]]
    """Yields from the first record on: a text, or a dict."""

    def rows(self, form: Form = "auto") -> Iterator[Row]:
        """Each record as a text or a conversation, by the rule of `load_rows`."""
        return read_rows(self.source, self.read(), self.named, form)


def split_held_out(rows: Rows) -> tuple[Rows, Rows]:
    """(calibration, evaluation): the first half of the rows, and the rest."""
    if len(rows) < 2:
        raise DataError(
            f"'{rows.source}' has {len(rows)} row: calibration and evaluation need one each. "
            "Give a source with more rows, or two sources"
        )
    half = len(rows) // 2
    return rows.span(0, half), rows.span(half, len(rows))


def same_text(one: Rows, other: Rows) -> bool:
    """Whether two sources have the same rows, also under two spellings of one file's name."""
    if one.source == other.source:
        return True
    whole, whole_other = one.texts, other.texts
    count = len(whole)
    places = {0, count // 2, count - 1}
    return len(whole_other) == count and all(whole[i] == whole_other[i] for i in places)


def supported() -> str:
    """The kinds of files there are, for messages."""
    return (
        f"{', '.join(TEXT_SUFFIXES + RECORD_SUFFIXES)}; each plain, {' or '.join(PACKED_SUFFIXES)}"
    )


def kind_of(path: Path) -> str:
    """The suffix that says what a file contains, without that of its packing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind not in TEXT_SUFFIXES + RECORD_SUFFIXES:
        raise DataError(f"cannot tell what kind of data is in {path}. Supported: {supported()}")
    return kind


def file_rows(
    path: Path, named: str | None, line_rule: Callable[[str], str] = str
) -> Iterator[Row]:
    """The rows of one file; `line_rule` is applied to the lines of a text file."""
    kind = kind_of(path)
    if kind in TEXT_SUFFIXES:
        return map(line_rule, file_records(path, named))
    columns = None
    if kind == ".parquet":  # the other columns are not read
        for record in file_records(path, peek=True):
            columns = list(reading_of(str(path), record, named).columns.values())
    return read_rows(str(path), file_records(path, named, columns=columns), named)


def file_records(
    path: Path,
    named: str | None = None,
    *,
    columns: Sequence[str] | None = None,
    peek: bool = False,
) -> Iterator[Any]:
    """The records of one file: dicts, or the lines of a text file, which has no columns.

    Of a parquet file only some `columns` can be read, or with `peek` only the first record.
    """
    kind = kind_of(path)
    if kind in TEXT_SUFFIXES and named is not None:
        raise DataError(f"{path} is a text file and has no column '{named}'. Leave the column out")
    with _readable(path):
        if kind == ".csv":
            yield from _csv_records(path)
        elif kind == ".parquet":
            yield from _parquet_records(path, columns, peek)
        else:
            yield from _lines(path) if kind in TEXT_SUFFIXES else _json_records(path, kind)


def load_records(path: Path) -> list[dict[str, Any]]:
    """All records of a file at once."""
    records = list(file_records(path))
    if not records or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path} is not a list of records. Give one JSON object per line")
    return records


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn an error while reading a file into a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"cannot read {path} as {kind_of(path)[1:]}: {error}") from error


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return lzma.open(path, "rb") if suffix == ".xz" else path.open("rb")


def _lines(path: Path) -> Iterator[str]:
    """Lines without their ends, split as the text loader of `datasets` does: at CR, LF or both."""
    with io.TextIOWrapper(_open(path), encoding="utf-8") as stream:
        for line in stream:
            yield line.removesuffix("\n")


def _json_records(path: Path, kind: str) -> Iterator[Any]:
    """Records of JSON lines, or of a `.json` file that is one list."""
    if kind == ".json":
        with _open(path) as stream:
            if stream.read(4096).lstrip().startswith(b"["):
                stream.seek(0)
                yield from map(_without_surrogates, json.load(stream))
                return
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                yield _without_surrogates(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise DataError(f"line {number} of {path} is not JSON: {error}") from error


def _without_surrogates(record: Any) -> Any:
    """A record with `?` for each lone surrogate (`"\\ud800"`), which no tokenizer takes."""
    if isinstance(record, dict):
        return {key: _without_surrogates(value) for key, value in record.items()}
    if isinstance(record, list):
        return [_without_surrogates(value) for value in record]
    if isinstance(record, str) and not record.isascii():
        return record.encode("utf-8", "replace").decode("utf-8")
    return record


def _csv_records(path: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the 128 kB that csv allows
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as stream:
        yield from csv.DictReader(stream, strict=True)


def _parquet_records(path: Path, columns: Sequence[str] | None, peek: bool) -> Iterator[Any]:
    """The records of a parquet file, batch by batch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open(path) as stream:
        packed = path.suffix.lower() in PACKED_SUFFIXES
        file = pq.ParquetFile(pa.BufferReader(stream.read()) if packed else stream)
        size = {"batch_size": 1} if peek else {}
        records = chain.from_iterable(
            batch.to_pylist()
            for batch in file.iter_batches(columns=columns and list(columns), **size)
        )
        yield from islice(records, 1 if peek else None)
