"""Whether a data source is there, found out before torch, a tokenizer or a model is loaded.

A source that is misspelt, a file that is missing or of an unknown kind, a column that it does not
have, and a data set of the Hub that is neither in the cache nor within reach are refused. Messages
about the Hub name the built-in texts that are here.
"""

from __future__ import annotations

from pathlib import Path

from shortllm.checkpoint.hub import cached, hub_answers, why_not_asked
from shortllm.data.rows import TEXT_SUFFIXES, file_records, kind_of, supported
from shortllm.data.shapes import Form, reading_of
from shortllm.data.sources import (
    BUILT_INS,
    DATA_VARIABLE,
    Role,
    _local_files,
    _local_hint,
    _resolve,
    _Resolved,
    data_directory,
    mixture,
    prompts_of,
)
from shortllm.errors import DataError

WHOLE_BYTES = 2**26
"""A `.json` file is one list that is read as a whole; a larger one is left for later."""


def require_at_hand(
    source: str, *, role: Role, form: Form = "auto", what: str = "", option: str = "--data"
) -> None:
    """Refuse a data source, or one of a mixture, that is not there or cannot be read.

    Args:
        role: what its rows are for; text to measure on is never a mixture.
        form: the kind of rows that is wanted.
        what: what messages call it, where nobody named it, e.g. `the default text`.
        option: the flag that names another one.
    """
    for one in [source] if role == "evaluation" else mixture(source):
        if role == "calibration":
            one = prompts_of(one) or one
        found = _resolve(one, role)
        if found.place is not None:
            if not cached(found.place.name, "datasets") and not hub_answers():
                raise DataError(_not_here(found, role, what=what, option=option))
        for file in found.files[:1]:
            _check_first_record(file, found, form)


def texts_at_hand() -> list[str]:
    """The built-in texts that can be read without the Hub, with their splits."""
    return [
        f"{name}:{split}"
        for name, built_in in BUILT_INS.items()
        for split, patterns in built_in.local.items()
        if patterns and _local_files(patterns)
    ]


def _check_first_record(file: Path, found: _Resolved, form: Form) -> None:
    """Read the first record: its columns must be those of one kind of rows."""
    if kind_of(file) == ".json" and file.stat().st_size > WHOLE_BYTES:
        return
    for record in file_records(file, found.named, peek=True):
        if kind_of(file) not in TEXT_SUFFIXES:
            reading_of(found.source, record, found.named, form)
        return


def _not_here(found: _Resolved, role: Role, *, what: str, option: str) -> str:
    """Why a data set of the Hub cannot be read, what is here instead, and what to type."""
    assert found.place is not None
    source = found.source if found.built_in is not None else found.source.removesuffix("::train")
    named = f"{what}, '{source}'," if what else f"'{source}'"
    said = f"{named} is not here, and {why_not_asked()}. "
    here = texts_at_hand()
    if here:
        defaults = (f"{name}:{one.default_split(role)}" for name, one in BUILT_INS.items())
        best = next((one for one in defaults if one in here), here[0])
        return f"{said}Here are: {', '.join(here)}. Type e.g. {option} {best}, or name a file"
    if found.built_in is not None and data_directory() is not None:
        return said + _local_hint(found.source.partition(":")[0], found.split)
    return (
        f"{said}Give a file of text ({option} FILE; {supported()}), or set {DATA_VARIABLE} to a "
        "directory with copies of the built-in texts. Only to try things: "
        f"{option} embedded, generated text"
    )
