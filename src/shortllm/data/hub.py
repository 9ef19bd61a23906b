"""Rows of data sets on the Hugging Face Hub, through `datasets`."""

from __future__ import annotations

import os
from typing import Any

from shortllm.data.built_ins import BUILT_INS, HubPlace
from shortllm.data.local import choose_column, supported
from shortllm.data.rows import Rows
from shortllm.errors import DataError, did_you_mean


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
