"""Text by name: a *data source* is one string, and `load_rows` turns it into rows of text.

    stories.jsonl.gz                  a local file; `stories.jsonl.gz#summary` picks a column
    wikitext:wikitext-2-raw-v1:test   a Hub data set: name[:config[:split]], also with `#column`
    wikitext2   ptb:test   embedded   a built-in name, with a split where the default is not meant

Local files are `.txt`, `.text`, `.raw`, `.tokens` (a row is a line without its line end), `.jsonl`,
`.json` and `.parquet` (a row is one record's text), each plain or packed as `.gz` or `.xz`. A
built-in name is looked up first below the directory named by SHORTLLM_DATA, then on the Hub; the
default split depends on what the rows are for:

    name        to calibrate  to evaluate  other splits       below SHORTLLM_DATA
    wikitext2   train         test         validation         wikitext2/wiki.{train,valid,test}.raw
    ptb         train         validation   test               ptb/ptb.{train,valid,test}.txt
    bookcorpus  train         train                           bookcorpus.txt, bookcorpus/*
    c4          train         validation                      c4/train*, c4/{validation,heldout}*
    alpaca      train         train        (the answers)      alpaca/train.jsonl, alpaca/*.json
    embedded    calibration   test         train, validation  (made by this package)

WikiText-2, PTB and BookCorpus give the same rows from either place; of C4 and Alpaca a local copy
may hold other documents. Rows stay packed or on disk until they are read, so the 74 million rows of
BookCorpus never become a Python list.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import lzma
import os
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, cast, overload

from shortllm.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from shortllm.embedded.world import Split

logger = logging.getLogger(__name__)

Role = Literal["calibration", "evaluation"]
"""What rows are for; it decides only which split a name without a split means."""

DATA_VARIABLE = "SHORTLLM_DATA"
"""Environment variable naming the directory where built-in names are looked up first."""

TEXT_SUFFIXES = (".txt", ".text", ".raw", ".tokens")
RECORD_SUFFIXES = (".jsonl", ".json", ".parquet")
PACKED_SUFFIXES = (".gz", ".xz")
DEFAULT_COLUMNS = ("text", "page", "sentence", "content")
"""Columns taken without being named, the first that exists."""

EMBEDDED_TRAIN_ROWS = 4096
"""The embedded world's train split has no end; this many rows of it are one data source."""


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


def load_rows(source: str, *, column: str | None = None, role: Role = "evaluation") -> Rows:
    """The rows of a data source (the module's docstring has the grammar).

    `column` is the same as `#column` in the source. Without either it is `text`, else `page`,
    `sentence`, `content`, else the only text column. `role` chooses the split of a source that
    names none: of a built-in by the table above, of a Hub data set `train` to calibrate and `test`
    to evaluate.

    Raises:
        DataError: an unknown name, a missing, unreadable or empty file, an unclear column, a data
            set the Hub does not give, or `datasets` is not installed.
    """
    name, column = _split_column(source, column)
    if not name:
        raise DataError(_unknown(name))
    head, _, split = name.partition(":")
    if head in BUILT_INS:
        return _built_in_rows(head, split, column, role)
    path = Path(name).expanduser()
    if path.is_file():
        return Rows.of(source, PackedTexts(_file_texts(path, column)))
    if path.is_dir():
        raise DataError(f"'{name}' is a directory. Name one file in it ({_supported()})")
    if _looks_like_path(name):
        raise DataError(f"no such file: {name} (seen from {Path.cwd()})")
    if "/" not in name and ":" not in name and get_close_matches(name, BUILT_INS, cutoff=0.6):
        raise DataError(_unknown(name))
    parts = [part or None for part in name.split(":", 2)] + [None, None]
    place = HubPlace(head, parts[1], parts[2] or ("train" if role == "calibration" else "test"))
    return _hub_rows(place, column, source=f"{head}:{parts[1] or ''}:{place.split}")


def _split_column(source: str, column: str | None) -> tuple[str, str | None]:
    """`FILE#column` as (FILE, column); a `#` in an existing file's name belongs to the name."""
    if "#" not in source or Path(source).expanduser().is_file():
        return source, column
    name, _, named = source.rpartition("#")
    if column not in (None, named):
        raise DataError(
            f"'{source}' names the column '{named}', but '{column}' was asked for too. Choose one"
        )
    if not named:
        raise DataError(f"'{source}' names no column after '#'. Leave out the '#', or name one")
    return name, named


def _looks_like_path(name: str) -> bool:
    """Whether an absent `name` was meant as a file: it starts like a path or has a suffix."""
    if name.startswith(("/", "./", "../", "~")) or "\\" in name:
        return True
    return ":" not in name and Path(name).suffix[1:].isalpha()


def _unknown(name: str) -> str:
    return (
        f"unknown data source '{name}'.{did_you_mean(name, BUILT_INS)}, "
        f"a local file ({_supported()}), or a Hub data set as name:config:split"
    )


def _supported() -> str:
    return (
        f"{', '.join(TEXT_SUFFIXES + RECORD_SUFFIXES)}; each plain, {' or '.join(PACKED_SUFFIXES)}"
    )


# ---- local files


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


def _file_texts(
    path: Path, column: str | None, line_rule: Callable[[str], str] = str
) -> Iterator[str]:
    """The texts of one file; `line_rule` is applied to the lines of a text file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind not in TEXT_SUFFIXES + RECORD_SUFFIXES:
        raise DataError(f"cannot tell what kind of data {path} holds. Supported: {_supported()}")
    if kind in TEXT_SUFFIXES and column is not None:
        raise DataError(f"{path} is a text file and has no column '{column}'. Leave the column out")
    try:
        if kind in TEXT_SUFFIXES:
            yield from map(line_rule, _lines(path))
        elif kind == ".parquet":
            yield from _parquet_texts(path, column)
        else:
            yield from _record_texts(path, _json_records(path, kind), column)
    except DataError:
        raise
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
        raise DataError(f"cannot read {path} as {kind[1:]}: {error}") from error


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
                yield from json.load(stream)
                return
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"line {number} of {path} is not JSON: {error}") from error


def _record_texts(path: Path, records: Iterator[Any], column: str | None) -> Iterator[str]:
    """One text per record; the first record decides which column. Records may be plain strings."""
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
            chosen = _choose_column(str(path), list(record), text_columns, column)
        if not isinstance(record.get(chosen), str):
            raise DataError(f"row {number} of {path} has no text in column '{chosen}'")
        yield record[chosen]


def _parquet_texts(path: Path, column: str | None) -> Iterator[str]:
    """The texts of one column, read batch by batch."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            "reading .parquet needs pyarrow. Install it with: pip install 'shortllm[data]'"
        ) from error
    with _open(path) as stream:
        packed = path.suffix.lower() in PACKED_SUFFIXES
        file = pq.ParquetFile(pa.BufferReader(stream.read()) if packed else stream)
        schema = file.schema_arrow
        text_columns = [
            field.name
            for field in schema
            if str(field.type) in ("string", "large_string", "string_view")
        ]
        chosen = _choose_column(str(path), schema.names, text_columns, column)
        number = 0
        for batch in file.iter_batches(columns=[chosen]):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str):
                    raise DataError(f"row {number} of {path} has no text in column '{chosen}'")
                yield text
                number += 1


def _choose_column(where: str, names: list[str], text_names: list[str], column: str | None) -> str:
    """The asked column if it exists; without one a default name, else the only column of text."""
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


# ---- Hub data sets


@dataclass(frozen=True, slots=True)
class HubPlace:
    """Where rows lie on the Hugging Face Hub; `files` limits the download to these."""

    name: str
    config: str | None
    split: str
    files: str | None = None
    revision: str | None = None


class HubColumn:
    """One column of a `datasets.Dataset`; a row is read from disk when asked for."""

    def __init__(self, dataset: Any, column: str) -> None:
        self._dataset = dataset.select_columns(column)
        self._column = column

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int, /) -> str:
        text: str = self._dataset[index][self._column]
        return text


def _hub_rows(place: HubPlace, column: str | None, *, source: str, or_else: str = "") -> Rows:
    """The rows of a Hub data set; `or_else` adds to the error what else would have been taken."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"'{source}' is a Hub data set, which needs datasets. "
            "Install it with: pip install 'shortllm[data]'"
        ) from error
    files = {place.split: place.files} if place.files else None
    try:
        dataset = datasets.load_dataset(
            place.name, place.config, split=place.split, data_files=files, revision=place.revision
        )
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(_hub_failure(place, error, or_else)) from error
    texts = [
        name
        for name, feature in dataset.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    return Rows.of(
        source, HubColumn(dataset, _choose_column(source, dataset.column_names, texts, column))
    )


def _hub_failure(place: HubPlace, error: Exception, or_else: str) -> str:
    """What was asked of the Hub, what it said, and which ways remain."""
    asked = ":".join(part for part in (place.name, place.config, place.split) if part)
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    message = f"cannot load '{asked}' from the Hugging Face Hub: {said}. "
    if "/" not in place.name:
        message += f"It is no built-in name either.{did_you_mean(place.name, BUILT_INS)}. "
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        message += "HF_HUB_OFFLINE is set, so only its cache was asked. "
    return message + (or_else or f"Without the Hub, give a local file ({_supported()})")


# ---- built-in names


def _wikitext_line(line: str) -> str:
    """A line as the Hub's WikiText has it: a blank one is empty, any other keeps its line end."""
    return line + "\n" if line.strip() else ""


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A built-in name: its default splits, and per split the local files and the place on the Hub.

    A local pattern is relative to SHORTLLM_DATA, stands also for its `.gz` and `.xz`, and may match
    several files, read in the order of their names; the first pattern that matches is taken.
    """

    calibration: str
    evaluation: str
    local: dict[str, tuple[str, ...]]
    hub: dict[str, HubPlace] = field(default_factory=dict)
    column: str | None = None
    line_rule: Callable[[str], str] = str


def _parquet_branch(name: str, config: str, split: str) -> HubPlace:
    """The Hub's conversion of a data set that is a script, which `datasets` 4 no longer runs."""
    return HubPlace(name, None, split, f"{config}/{split}/*.parquet", "refs/convert/parquet")


BUILT_INS: dict[str, BuiltIn] = {
    "wikitext2": BuiltIn(
        calibration="train",
        evaluation="test",
        local={
            "train": ("wikitext2/wiki.train.raw",),
            "validation": ("wikitext2/wiki.valid.raw",),
            "test": ("wikitext2/wiki.test.raw",),
        },
        hub={
            split: HubPlace("Salesforce/wikitext", "wikitext-2-raw-v1", split)
            for split in ("train", "validation", "test")
        },
        line_rule=_wikitext_line,
    ),
    "ptb": BuiltIn(
        calibration="train",
        evaluation="validation",
        local={
            "train": ("ptb/ptb.train.txt",),
            "validation": ("ptb/ptb.valid.txt",),
            "test": ("ptb/ptb.test.txt",),
        },
        hub={
            split: _parquet_branch("ptb-text-only/ptb_text_only", "penn_treebank", split)
            for split in ("train", "validation", "test")
        },
        line_rule=str.strip,
    ),
    "bookcorpus": BuiltIn(
        calibration="train",
        evaluation="train",
        local={
            "train": (
                "bookcorpus.txt",
                "bookcorpus/*.txt",
                "bookcorpus/*.jsonl",
                "bookcorpus/*.parquet",
            )
        },
        hub={"train": _parquet_branch("bookcorpus/bookcorpus", "plain_text", "train")},
    ),
    # On the Hub one file of each split, as the pruning papers take it: all of train is 305 GB.
    "c4": BuiltIn(
        calibration="train",
        evaluation="validation",
        local={
            "train": ("c4/train*.jsonl", "c4/c4-train*.json"),
            "validation": ("c4/validation*.jsonl", "c4/c4-validation*.json", "c4/heldout*.jsonl"),
        },
        hub={
            "train": HubPlace("allenai/c4", None, "train", "en/c4-train.00000-of-01024.json.gz"),
            "validation": HubPlace(
                "allenai/c4", None, "validation", "en/c4-validation.00000-of-00008.json.gz"
            ),
        },
    ),
    "alpaca": BuiltIn(
        calibration="train",
        evaluation="train",
        local={"train": ("alpaca/train.jsonl", "alpaca/*.json")},
        hub={"train": HubPlace("yahma/alpaca-cleaned", None, "train")},
        column="output",
    ),
    "embedded": BuiltIn(
        calibration="calibration",
        evaluation="test",
        local={split: () for split in ("train", "calibration", "validation", "test")},
    ),
}


def _built_in_rows(name: str, split: str, column: str | None, role: Role) -> Rows:
    """The rows of a built-in name: made here, else from SHORTLLM_DATA, else from the Hub."""
    built_in = BUILT_INS[name]
    split = split or (built_in.calibration if role == "calibration" else built_in.evaluation)
    if split not in built_in.local:
        raise DataError(f"'{name}' has no split '{split}'.{did_you_mean(split, built_in.local)}")
    source = f"{name}:{split}" + (f"#{column}" if column else "")
    if name == "embedded":
        return _embedded_rows(source, split, column)
    column = column or built_in.column
    files = _local_files(built_in.local[split])
    if files:
        logger.info("%s is read from %s", source, ", ".join(map(str, files)))
        texts = chain.from_iterable(_file_texts(file, column, built_in.line_rule) for file in files)
        return Rows.of(source, PackedTexts(texts))
    return _hub_rows(built_in.hub[split], column, source=source, or_else=_local_hint(name, split))


def _embedded_rows(source: str, split: str, column: str | None) -> Rows:
    if column is not None:
        raise DataError(
            f"'{source}': embedded rows are plain text without columns. Leave the column out"
        )
    from shortllm.embedded import rows

    count = EMBEDDED_TRAIN_ROWS if split == "train" else None
    return Rows.of(source, rows(cast("Split", split), count))


def _data_directory() -> Path | None:
    """The directory named by SHORTLLM_DATA, None where it is unset or empty."""
    named = os.environ.get(DATA_VARIABLE)
    if not named:
        return None
    directory = Path(named).expanduser()
    if not directory.is_dir():
        raise DataError(
            f"{DATA_VARIABLE} is '{named}', which is no directory. Correct it or unset it"
        )
    return directory


def _local_files(patterns: tuple[str, ...]) -> list[Path]:
    """The files of the first pattern that matches below SHORTLLM_DATA, sorted by name."""
    directory = _data_directory()
    if directory is None:
        return []
    for pattern in patterns:
        for packed in ("", *PACKED_SUFFIXES):
            files = sorted(directory.glob(pattern + packed))
            if files:
                return files
    return []


def _local_hint(name: str, split: str) -> str:
    """Where the local copy would have been found, and which splits of the same name are there."""
    patterns = BUILT_INS[name].local
    wanted = " or ".join(patterns[split])
    directory = _data_directory()
    if directory is None:
        return (
            "Without the Hub, give a local file (--data FILE), or set "
            f"{DATA_VARIABLE} to a directory that holds {wanted}"
        )
    there = [other for other in patterns if _local_files(patterns[other])]
    found = f" ({', '.join(f'{name}:{other}' for other in there)} is there)" if there else ""
    return (
        f"{DATA_VARIABLE}={directory} holds no {wanted}{found}. Put it there, or give a local file"
    )
