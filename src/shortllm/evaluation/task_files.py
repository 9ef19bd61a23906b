"""Documents of tasks from local files, put in the place of those that the harness would download.

    DIR/boolq/validation.jsonl   DIR/mmlu_anatomy/test.jsonl   DIR/arc/ARC-Easy/test.jsonl

A task is then described by a file that includes the harness's own description and changes where
its documents come from; groups and tags find it by its name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm.data.rows import PACKED_SUFFIXES, load_records
from shortllm.data.sources import data_directory
from shortllm.errors import DataError
from shortllm.evaluation.task_names import OWN_DIRS

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

DATA_FOLDERS = {"arc_easy": "arc/ARC-Easy", "arc_challenge": "arc/ARC-Challenge"}
"""Where local documents lie if not in a folder named like the task."""

RECORD_SUFFIXES = (".jsonl", ".json")


def with_local_files(
    index: Any, shots: Mapping[str, int | None], given: Path | None, written: Path
) -> Any:
    """An index by which the tasks that have local documents are read from there.

    Args:
        index: the harness's tasks by name.
        shots: requested name -> requested number of examples.
        given: the directory that must have all of them; else SHORTLLM_DATA may.
        written: a directory for the descriptions, empty.
    """
    directory = given or data_directory()
    if directory is None:
        return index
    folders: set[Path] = set()
    for name, number in shots.items():
        files: list[Path] = []
        for entry in entries_of(index, name):
            if entry.yaml_path is None:  # a tag
                continue
            folders.add(entry.yaml_path.parent)
            if is_task(entry) and entry.yaml_path.parent not in OWN_DIRS:
                files += _redirect(entry, number, directory, given is not None, written)
        if files:
            few = len(files) < 3
            where = ", ".join(map(str, files)) if few else f"{len(files)} files in {directory}"
            log.info("task %s is read from %s", name, where)
    if not any(written.iterdir()):
        return index
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False, include_path=[*sorted(folders), written])


def _redirect(
    entry: Any, shots: int | None, directory: Path, required: bool, written: Path
) -> list[Path]:
    """Describe a task with its local documents, if they are there; their files."""
    files = _files(entry, shots, directory, required=required)
    if files:
        description = _description(entry.name, entry.yaml_path, entry.cfg, files)
        (written / f"{entry.name}.yaml").write_text(description)
    return list(files.values())


def entries_of(index: Any, name: str) -> Iterator[Any]:
    """What the index has by a name: a task, or a group or tag with all that belongs to it."""
    entry = index.task_index.get(name)
    if entry is None:  # a group describes it in its own file
        return
    yield entry
    if not is_task(entry):
        for member in _member_names(sorted(entry.tags) if entry.cfg is None else entry.cfg["task"]):
            yield from entries_of(index, member)


def is_task(entry: Any) -> bool:
    """Whether an entry of the index is one task, not a group or a tag."""
    return entry.cfg is not None and isinstance(entry.cfg.get("task"), str)


def _member_names(members: Any) -> Iterator[str]:
    """The names in a group's list, whose items may also be groups with lists of their own."""
    for one in members if isinstance(members, list) else [members]:
        if isinstance(one, dict):
            yield from _member_names(one.get("task", one.get("group")))
        elif one is not None:
            yield one


def folder_of(task: str) -> str:
    """The folder of a task's documents."""
    return DATA_FOLDERS.get(task, task)


def _files(entry: Any, shots: int | None, directory: Path, *, required: bool) -> dict[str, Path]:
    """The files of a task's splits in `directory`; empty if not all are there and none must be."""
    folder = directory / folder_of(entry.name)
    splits = _splits(entry.cfg, shots)
    if not splits and required:
        raise DataError(
            f"task '{entry.name}' gets its documents by code of its own, which --task-data cannot "
            "replace. Leave it out"
        )
    files = {split: file for split in splits if (file := _split_file(folder, split)) is not None}
    missing = [split for split in splits if split not in files]
    if missing and required:
        raise DataError(
            f"--task-data {directory} has no {(folder / missing[0]).relative_to(directory)}.jsonl "
            f"for task '{entry.name}' (or .json, plain, {' or '.join(PACKED_SUFFIXES)}). Put it "
            "there, or leave --task-data out to take it from the Hub"
        )
    return {} if missing else files


def _splits(config: Mapping[str, Any], shots: int | None) -> list[str]:
    """The splits a task needs: the measured one, and that of its examples where it shows some."""
    measured = config.get("test_split") or config.get("validation_split")
    shown = effective_shots(config.get("num_fewshot"), shots) and _shown_split(config)
    return list(dict.fromkeys(split for split in (measured, shown) if split))


def effective_shots(own: int | None, requested: int | None) -> int:
    """How many examples a task shows: as requested, unless it is meant to show none."""
    return own or 0 if requested is None or own == 0 else requested


def _shown_split(config: Mapping[str, Any]) -> str | None:
    """Where the harness takes a task's examples from; None if they are part of its description."""
    own = config.get("fewshot_config") or {}
    split: str | None = own.get("split") or config.get("fewshot_split")
    if split or own.get("samples"):
        return split
    kinds = ("training_split", "validation_split", "test_split")
    return next((config[kind] for kind in kinds if config.get(kind)), None)


def _split_file(folder: Path, split: str) -> Path | None:
    names = (f"{split}{kind}{pack}" for kind in RECORD_SUFFIXES for pack in ("", *PACKED_SUFFIXES))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _description(
    name: str, stock: Path, config: Mapping[str, Any], files: Mapping[str, Path]
) -> str:
    """YAML for the harness: its own task, with documents from these files."""
    changes: dict[str, Any] = {
        "include": str(stock),
        "task": name,
        "tag": None,  # a tag written here would have no other tasks
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"files": {split: str(file) for split, file in files.items()}},
    }
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(key) not in files:
            changes[key] = None
    lines = [f"{key}: {json.dumps(value)}" for key, value in changes.items()]
    return "\n".join([*lines, f"custom_dataset: !function {__name__}.local_dataset", ""])


def local_dataset(*, files: Mapping[str, str], **_: Any) -> dict[str, Dataset]:
    """The documents of local files by split, as the harness wants them (`custom_dataset`)."""
    from datasets import Dataset

    return {split: Dataset.from_list(load_records(Path(file))) for split, file in files.items()}
