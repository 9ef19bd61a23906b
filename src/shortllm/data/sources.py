"""A data source is one string: `load_rows` takes it apart and gives its rows."""

from __future__ import annotations

import logging
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from shortllm.data.built_ins import BUILT_INS, HubPlace, local_files, local_hint
from shortllm.data.hub import hub_rows
from shortllm.data.local import file_texts, supported
from shortllm.data.rows import PackedTexts, Rows
from shortllm.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from shortllm.embedded.world import Split

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
