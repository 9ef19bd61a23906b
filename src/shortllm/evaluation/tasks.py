"""Tasks of lm-evaluation-harness by name, with their documents: local ones first, else the Hub."""

from __future__ import annotations

import difflib
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from shortllm.data.rows import PACKED_SUFFIXES, load_records
from shortllm.data.sources import DATA_VARIABLE, data_directory
from shortllm.embedded import TASKS_DIR
from shortllm.errors import DataError, ShortLLMError
from shortllm.files import fingerprint

if TYPE_CHECKING:
    from datasets import Dataset


log = logging.getLogger(__name__)

METRICS = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
"""The seven tasks of Shortened LLaMA and the metric it reports; of any other task the first one."""

EMBEDDED_TASKS = tuple(f"shortllm_{name}" for name in ("where", "who", "count", "compare", "why"))
"""The task sets of the embedded world."""

SETS = {"paper": tuple(METRICS), "embedded": EMBEDDED_TASKS}
"""Names that stand for several tasks."""

HARNESS_FOLDERS = ("super_glue/boolq", "piqa", "hellaswag", "winogrande", "arc", "openbookqa")
"""Where the harness describes the seven; going through all of its 14,000 names takes seconds."""

DATA_FOLDERS = {"arc_easy": "arc/ARC-Easy", "arc_challenge": "arc/ARC-Challenge"}
"""Where local documents lie if not in a folder named like the task."""

RECORD_SUFFIXES = (".jsonl", ".json")

SHOT_SEED = 1234
"""Seed that draws the examples of a task which shows some; the harness's own default."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskSet:
    """Tasks with their documents, ready to be put to one model after the other."""

    loaded: dict[str, dict[str, Any]]
    """What the harness evaluates: its tasks, groups, and who belongs to which."""
    members: dict[str, list[str]]
    """Each name asked for -> the tasks behind it: itself, or those of a group or tag."""
    documents: dict[str, str]
    """Task -> fingerprint of the documents it will ask about."""
    limit: int | None
    batch_size: int
    version: str
    """Of the harness."""

    @property
    def fingerprint(self) -> str:
        """Of everything the scores depend on, but for the model."""
        return fingerprint(
            [self.version, list(self.members.items()), self.documents, self.batch_size]
        )


def task_names(asked: Iterable[str]) -> list[str]:
    """The names asked for, sets spelled out, each once."""
    names = [name.strip() for name in asked]
    return list(dict.fromkeys(n for name in names if name for n in SETS.get(name, (name,))))


def load_tasks(
    asked: Iterable[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> TaskSet:
    """Tasks with their documents, by name.

    Args:
        data: directory of the documents; default: that of SHORTLLM_DATA where it has them.
        limit: only so many documents of each task, its first ones.
        batch_size: sequences per forward pass.
    Raises:
        ShortLLMError: lm-evaluation-harness is not installed, an unknown task, one asked for twice,
            or one that is not answered in text alone.
        DataError: documents that are missing or cannot be read.
    """
    version = require_harness()
    names = task_names(asked)
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    members: dict[str, list[str]] = {}
    with quiet_harness(), TemporaryDirectory(prefix="shortllm-tasks-") as written:
        index = _index(names)
        for name in names:
            local = _local_task(name, index, data, Path(written))
            found = _load(index, name, local)
            members[name] = list(found["tasks"])
            _require_new(name, members)
            for kind, entries in found.items():
                loaded[kind] |= entries
        for name, task in loaded["tasks"].items():
            _prepare(name, task)
        documents = {
            name: fingerprint(list(islice(task.eval_docs, limit)))
            for name, task in loaded["tasks"].items()
        }
    return TaskSet(
        loaded=loaded,
        members=members,
        documents=documents,
        limit=limit,
        batch_size=batch_size,
        version=version,
    )


def require_harness() -> str:
    """Load lm-evaluation-harness; its version.

    Raises:
        ShortLLMError: it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise ShortLLMError(
            f"zero-shot tasks need lm-evaluation-harness ({error}). "
            "Install it with: pip install 'shortllm[eval]'"
        ) from error
    return str(lm_eval.__version__)


class _Nowhere(io.TextIOBase):
    """Takes what is written and keeps nothing; never closed, for who holds on to it."""

    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def quiet_harness() -> Iterator[None]:
    """No notes, advice and bars of the harness: what matters is raised or recorded here."""
    from shortllm.runtime import quiet_transformers

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet_transformers(), redirect_stdout(_Nowhere()), redirect_stderr(_Nowhere()):
            yield
    finally:
        logger.setLevel(level)


def _index(names: Sequence[str]) -> Any:
    """The harness's tasks by name; only those known here where no other is asked for.

    Raises:
        ShortLLMError: an unknown name.
    """
    from lm_eval import tasks as harness

    if {*METRICS, *EMBEDDED_TASKS}.issuperset(names):
        root = Path(harness.__file__).parent
        folders = [*(root / folder for folder in HARNESS_FOLDERS), TASKS_DIR]
        return harness.TaskManager(include_defaults=False, include_path=folders)
    index = _whole_index()
    for name in names:
        if name not in index.task_index:
            near = difflib.get_close_matches(name, [*SETS, *index.all_tasks], n=1)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise ShortLLMError(
                f"unknown task '{name}'. {hint}Available: {', '.join(SETS)}, "
                f"{', '.join(METRICS)}, and what `lm_eval ls tasks` prints"
            )
    return index


@cache
def _whole_index() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[TASKS_DIR])


def _local_task(name: str, index: Any, data: Path | None, written: Path) -> Path | None:
    """The description of a task whose documents lie in a local directory; None if they do not.

    Raises:
        DataError: `data` was given and does not have them.
    """
    directory = data if data is not None else data_directory()
    if directory is None or name in EMBEDDED_TASKS:
        return None
    entry = index.task_index[name]
    splits = _splits(entry.cfg or {})
    if not splits and data is not None:
        raise DataError(
            f"'{name}' stands for several tasks, whose documents --task-data cannot give. "
            "Name them singly"
        )
    folder = directory / DATA_FOLDERS.get(name, name)
    files = {split: file for split in splits if (file := _split_file(folder, split)) is not None}
    missing = [split for split in splits if split not in files]
    if missing and data is not None:
        raise DataError(
            f"--task-data {data} has no {(folder / missing[0]).relative_to(data)}.jsonl for task "
            f"'{name}' (or .json, plain, {' or '.join(PACKED_SUFFIXES)}). Put it there, or leave "
            "--task-data out to take it from the Hub"
        )
    if missing or not splits:
        return None
    log.info("task %s is read from %s", name, ", ".join(map(str, files.values())))
    description = written / f"{name}.yaml"
    description.write_text(_description(name, entry.yaml_path, entry.cfg, files))
    return description


def _splits(config: Mapping[str, Any]) -> list[str]:
    """The splits a task needs: the one that is measured, and where it shows examples, theirs."""
    measured = config.get("test_split") or config.get("validation_split")
    shown = config.get("fewshot_split") or config.get("training_split")
    wanted = [measured, shown if config.get("num_fewshot") else None]
    return list(dict.fromkeys(split for split in wanted if split))


def _split_file(folder: Path, split: str) -> Path | None:
    names = (f"{split}{kind}{pack}" for kind in RECORD_SUFFIXES for pack in ("", *PACKED_SUFFIXES))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _description(
    name: str, stock: Path, config: Mapping[str, Any], files: Mapping[str, Path]
) -> str:
    """YAML for the harness: its own task in all but where the documents come from."""
    changes: dict[str, Any] = {
        "include": str(stock),
        "task": name,
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
    """The documents of local files by split, as the harness wants them (`custom_dataset`).

    Raises:
        DataError: a file that cannot be read or holds no record.
    """
    from datasets import Dataset

    return {split: Dataset.from_list(load_records(Path(file))) for split, file in files.items()}


def _load(index: Any, name: str, local: Path | None) -> dict[str, dict[str, Any]]:
    """What the harness knows by a name, with its documents.

    Raises:
        ShortLLMError: the task needs a package that is not installed.
        DataError: documents that are missing or unlike what the task expects.
    """
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    try:
        found: dict[str, dict[str, Any]] = index.load([str(local or name)])
        return found
    except ShortLLMError:
        raise
    except ImportError as error:
        raise ShortLLMError(
            f"task '{name}' needs a package that is not installed: {_said(error)}"
        ) from error
    except (DatasetsError, TemplateError, OSError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"the documents of task '{name}' cannot be used: {_said(error)}. Without the Hub, "
            f"give --task-data DIR (or {DATA_VARIABLE}) with "
            f"DIR/{DATA_FOLDERS.get(name, name)}/SPLIT.jsonl"
        ) from error


def _said(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _require_new(name: str, members: Mapping[str, Sequence[str]]) -> None:
    """Refuse a task that another name has brought along already.

    Raises:
        ShortLLMError: naming both.
    """
    for other, tasks in members.items():
        twice = set(tasks) & set(members[name])
        if other != name and twice:
            raise ShortLLMError(
                f"task '{min(twice)}' is asked for twice, by '{other}' and by '{name}'. "
                "Leave one of them out"
            )


def _prepare(name: str, task: Any) -> None:
    """Settle what a task leaves open.

    Raises:
        ShortLLMError: it shows images or sounds, or runs code that the model writes.
    """
    if getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
        raise ShortLLMError(
            f"task '{name}' shows more than text or runs code that the model writes. "
            "Give it to the `lm_eval` command instead"
        )
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(seed=SHOT_SEED)
