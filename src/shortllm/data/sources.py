"""The table of built-in names: their splits, and where the rows lie locally and on the Hub.

Rows of data sets on the Hugging Face Hub, through `datasets`.

A data source is one string: `load_rows` takes it apart and gives its rows.

A data source as a stream of whole records, for training: `open_records`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from shortllm.data.rows import (
    PACKED_SUFFIXES,
    TEXT_SUFFIXES,
    PackedTexts,
    Rows,
    choose_column,
    file_records,
    file_texts,
    kind_of,
    record_texts,
    supported,
)
from shortllm.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from shortllm.embedded.world import Split


DATA_VARIABLE = "SHORTLLM_DATA"
"""Environment variable naming the directory where built-in names are looked up first."""


@dataclass(frozen=True, slots=True)
class HubPlace:
    """Where rows lie on the Hugging Face Hub; `files` limits the download to these."""

    name: str
    config: str | None
    split: str
    files: str | None = None
    revision: str | None = None


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


def data_directory() -> Path | None:
    """The directory named by SHORTLLM_DATA, None where it is unset or empty.

    Raises:
        DataError: it is no directory.
    """
    named = os.environ.get(DATA_VARIABLE)
    if not named:
        return None
    directory = Path(named).expanduser()
    if not directory.is_dir():
        raise DataError(
            f"{DATA_VARIABLE} is '{named}', which is no directory. Correct it or unset it"
        )
    return directory


def local_files(patterns: tuple[str, ...]) -> list[Path]:
    """The files of the first pattern that matches below SHORTLLM_DATA, sorted by name."""
    directory = data_directory()
    if directory is None:
        return []
    for pattern in patterns:
        for packed in ("", *PACKED_SUFFIXES):
            files = sorted(directory.glob(pattern + packed))
            if files:
                return files
    return []


def local_hint(name: str, split: str) -> str:
    """Where the local copy would have been found, and which splits of the same name are there."""
    patterns = BUILT_INS[name].local
    wanted = " or ".join(patterns[split])
    directory = data_directory()
    if directory is None:
        return (
            "Without the Hub, give a local file (--data FILE), or set "
            f"{DATA_VARIABLE} to a directory that holds {wanted}"
        )
    there = [other for other in patterns if local_files(patterns[other])]
    found = f" ({', '.join(f'{name}:{other}' for other in there)} is there)" if there else ""
    return (
        f"{DATA_VARIABLE}={directory} holds no {wanted}{found}. Put it there, or give a local file"
    )


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


def hub_rows(place: HubPlace, column: str | None, *, source: str, or_else: str = "") -> Rows:
    """The rows of a Hub data set; `or_else` adds to the error what else would have been taken."""
    dataset = load_hub(place, source, or_else)
    texts = [
        name
        for name, feature in dataset.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    return Rows.of(
        source, HubColumn(dataset, choose_column(source, dataset.column_names, texts, column))
    )


def load_hub(place: HubPlace, source: str, or_else: str, *, streaming: bool = False) -> Any:
    """The data set itself: on disk, or with `streaming` read over the network as it is used.

    Raises:
        DataError: `datasets` is not installed, or the Hub does not give it.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"'{source}' is a Hub data set, which needs datasets. "
            "Install it with: pip install 'shortllm[data]'"
        ) from error
    files = {place.split: place.files} if place.files else None
    try:
        return datasets.load_dataset(
            place.name,
            place.config,
            split=place.split,
            data_files=files,
            revision=place.revision,
            streaming=streaming,
        )
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(_hub_failure(place, error, or_else)) from error


def _hub_failure(place: HubPlace, error: Exception, or_else: str) -> str:
    """What was asked of the Hub, what it said, and which ways remain."""
    asked = ":".join(part for part in (place.name, place.config, place.split) if part)
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    message = f"cannot load '{asked}' from the Hugging Face Hub: {said}. "
    if "/" not in place.name:
        message += f"It is no built-in name either.{did_you_mean(place.name, BUILT_INS)}. "
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        message += "HF_HUB_OFFLINE is set, so only its cache was asked. "
    return message + (or_else or f"Without the Hub, give a local file ({supported()})")


logger = logging.getLogger(__name__)

Role = Literal["calibration", "evaluation"]
"""What rows are for; it decides only which split a name without a split means."""

EMBEDDED_TRAIN_ROWS = 4096
"""The embedded world's train split has no end; this many rows of it are one data source."""


def load_rows(source: str, *, column: str | None = None, role: Role = "evaluation") -> Rows:
    """The rows of a data source (data/__init__.py has the grammar).

    `column` is the same as `#column` in the source. Without either it is `text`, else `page`,
    `sentence`, `content`, else the only text column. `role` chooses the split of a source that
    names none: of a built-in by the table there, of a Hub data set `train` to calibrate and `test`
    to evaluate.

    Raises:
        DataError: an unknown name, a missing, unreadable or empty file, an unclear column, a data
            set the Hub does not give, or `datasets` is not installed.
    """
    name, column = split_column(source, column)
    if not name:
        raise DataError(_unknown(name))
    head, _, split = name.partition(":")
    if head in BUILT_INS:
        return _built_in_rows(head, split, column, role)
    path = Path(name).expanduser()
    if path.is_file():
        return Rows.of(source, PackedTexts(file_texts(path, column)))
    if path.is_dir():
        raise DataError(f"'{name}' is a directory. Name one file in it ({supported()})")
    if looks_like_path(name):
        raise DataError(f"no such file: {name} (seen from {Path.cwd()})")
    if nearly_built_in(name):
        raise DataError(_unknown(name))
    parts = [part or None for part in name.split(":", 2)] + [None, None]
    place = HubPlace(head, parts[1], parts[2] or ("train" if role == "calibration" else "test"))
    return hub_rows(place, column, source=f"{head}:{parts[1] or ''}:{place.split}")


def split_column(source: str, column: str | None) -> tuple[str, str | None]:
    """`FILE#column` as (FILE, column); a `#` in an existing file's name belongs to the name.

    Raises:
        DataError: two columns, or none behind the `#`.
    """
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


def looks_like_path(name: str) -> bool:
    """Whether an absent `name` was meant as a file: it starts like a path or has a suffix."""
    if name.startswith(("/", "./", "../", "~")) or "\\" in name:
        return True
    return ":" not in name and Path(name).suffix[1:].isalpha()


def nearly_built_in(name: str) -> bool:
    """Whether an unknown `name` was more likely meant as a built-in one than as a Hub data set."""
    plain = "/" not in name and ":" not in name
    return plain and bool(get_close_matches(name, BUILT_INS, cutoff=0.6))


def _unknown(name: str) -> str:
    return (
        f"unknown data source '{name}'.{did_you_mean(name, BUILT_INS)}, "
        f"a local file ({supported()}), or a Hub data set as name:config:split"
    )


def _built_in_rows(name: str, split: str, column: str | None, role: Role) -> Rows:
    """The rows of a built-in name: made here, else from SHORTLLM_DATA, else from the Hub."""
    built_in = BUILT_INS[name]
    split = split or (built_in.calibration if role == "calibration" else built_in.evaluation)
    if split not in built_in.local:
        raise DataError(f"'{name}' has no split '{split}'.{did_you_mean(split, built_in.local)}")
    source = f"{name}:{split}" + (f"#{column}" if column else "")
    if name == "embedded":
        return embedded_rows(source, split, column)
    column = column or built_in.column
    files = local_files(built_in.local[split])
    if files:
        logger.info("%s is read from %s", source, ", ".join(map(str, files)))
        texts = chain.from_iterable(file_texts(file, column, built_in.line_rule) for file in files)
        return Rows.of(source, PackedTexts(texts))
    return hub_rows(built_in.hub[split], column, source=source, or_else=local_hint(name, split))


def embedded_rows(source: str, split: str, column: str | None) -> Rows:
    """A split of the embedded world's text.

    Raises:
        DataError: a column was named.
    """
    if column is not None:
        raise DataError(
            f"'{source}': embedded rows are plain text without columns. Leave the column out"
        )
    from shortllm.embedded import rows

    count = EMBEDDED_TRAIN_ROWS if split == "train" else None
    return Rows.of(source, rows(cast("Split", split), count))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Records:
    """The records of a data source, read anew at each call and never all in memory."""

    source: str
    """The data source with its split filled in."""
    column: str | None
    """The column that was asked for with `#`."""
    lines: bool
    """Whether records are lines of a text file, which are no documents of their own."""
    files: tuple[Path, ...]
    """The local files they are read from; none for what is made here or lies on the Hub."""
    read: Callable[[], Iterator[Any]]
    """Begin with the first record: a text, or a dict."""

    def texts(self) -> Iterator[str]:
        """The text of each record, by the rule of `load_rows`."""
        return record_texts(self.source, self.read(), self.column)


def open_records(source: str) -> Records:
    """A data source as whole records, for training: without a split its `train` is meant.

    The grammar is that of `load_rows`, but nothing is held in memory, and a record keeps all its
    columns (of `alpaca` not the answers alone).

    Raises:
        DataError: as `load_rows`, of a file's content when it is read.
    """
    name, column = split_column(source, None)
    head, _, split = name.partition(":")
    if head in BUILT_INS:
        return _built_in_records(head, split or "train", column)
    path = Path(name).expanduser()
    if path.is_file():
        kind = kind_of(path)
        return Records(
            source=source,
            column=column,
            lines=kind in TEXT_SUFFIXES,
            files=(path,),
            read=lambda: file_records(path, column),
        )
    if not name or path.is_dir() or looks_like_path(name) or nearly_built_in(name):
        load_rows(source)  # raises, saying what is wrong with such a name
    parts = [part or None for part in name.split(":", 2)] + [None, None]
    return _hub_records(HubPlace(head, parts[1], parts[2] or "train"), column)


def _built_in_records(name: str, split: str, column: str | None) -> Records:
    built_in = BUILT_INS[name]
    if split not in built_in.local:
        raise DataError(f"'{name}' has no split '{split}'.{did_you_mean(split, built_in.local)}")
    source = f"{name}:{split}"
    if name == "embedded":
        rows = embedded_rows(source, split, column)
        return Records(source=source, column=None, lines=False, files=(), read=lambda: iter(rows))
    files = tuple(local_files(built_in.local[split]))
    if not files:
        return _hub_records(built_in.hub[split], column, or_else=local_hint(name, split))
    logger.info("%s is read from %s", source, ", ".join(map(str, files)))
    return Records(
        source=source,
        column=column,
        lines=kind_of(files[0]) in TEXT_SUFFIXES,
        files=files,
        read=lambda: chain.from_iterable(file_records(file, column) for file in files),
    )


def _hub_records(place: HubPlace, column: str | None, *, or_else: str = "") -> Records:
    source = f"{place.name}:{place.config or ''}:{place.split}"
    dataset = load_hub(place, source, or_else, streaming=True)
    return Records(source=source, column=column, lines=False, files=(), read=lambda: iter(dataset))
