"""A data source as a stream of whole records, for training: `open_records`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from shortllm.data.built_ins import BUILT_INS, HubPlace, local_files, local_hint
from shortllm.data.hub import load_hub
from shortllm.data.local import TEXT_SUFFIXES, file_records, kind_of, record_texts
from shortllm.data.sources import (
    embedded_rows,
    load_rows,
    looks_like_path,
    nearly_built_in,
    split_column,
)
from shortllm.errors import DataError, did_you_mean

logger = logging.getLogger(__name__)


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
