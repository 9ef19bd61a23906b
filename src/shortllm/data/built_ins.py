"""The table of built-in names: their splits, and where the rows lie locally and on the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shortllm.data.local import PACKED_SUFFIXES
from shortllm.errors import DataError

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
