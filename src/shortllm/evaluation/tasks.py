"""Tasks of lm-evaluation-harness: loaded with their documents, and run on a model in memory.

Documents are local ones first, else those of the Hub.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from shortllm.data.rows import PACKED_SUFFIXES, load_records
from shortllm.data.sources import DATA_VARIABLE, data_directory
from shortllm.embedded import TASKS_DIR
from shortllm.errors import DataError, ShortLLMError, first_line_of, install_hint
from shortllm.evaluation.harness import harness_model
from shortllm.evaluation.options import TaskScore
from shortllm.files import fingerprint
from shortllm.runtime import ALONE, Ranks, progress, quiet, quiet_transformers

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
"""Names of several tasks at once."""

HARNESS_FOLDERS = ("super_glue/boolq", "piqa", "hellaswag", "winogrande", "arc", "openbookqa")
"""Where the harness describes the seven; indexing all of its 14,000 names takes seconds."""

DATA_FOLDERS = {"arc_easy": "arc/ARC-Easy", "arc_challenge": "arc/ARC-Challenge"}
"""Where local documents lie if not in a folder named like the task."""

RECORD_SUFFIXES = (".jsonl", ".json")

BOOTSTRAPS = 1000
"""Draws for the standard error of a metric that is not a mean."""

SHOT_SEED = 1234
"""Seed that draws the examples of a task which shows some; the harness's own default."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskSet:
    """Tasks with their documents, ready for one model after the other."""

    loaded: dict[str, dict[str, Any]]
    """What the harness evaluates: its tasks, groups, and the tasks of each group."""
    members: dict[str, list[str]]
    """Each requested name -> its tasks: itself, or those of a group or tag."""
    documents: dict[str, str]
    """Task -> fingerprint of its documents."""
    limit: int | None
    batch_size: int
    version: str
    """Of the harness."""

    @property
    def fingerprint(self) -> str:
        """Of everything the scores depend on, except the model."""
        return fingerprint(
            [self.version, list(self.members.items()), self.documents, self.batch_size]
        )


def task_names(requested: Iterable[str]) -> list[str]:
    """The tasks of the requested names and sets, each once."""
    names = [name.strip() for name in requested]
    return list(dict.fromkeys(n for name in names if name for n in SETS.get(name, (name,))))


def load_tasks(
    requested: Iterable[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> TaskSet:
    """Tasks by name with their first `limit` documents, from `data`, SHORTLLM_DATA or the Hub."""
    version = require_harness()
    names = task_names(requested)
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    members: dict[str, list[str]] = {}
    with quiet_harness(), TemporaryDirectory(prefix="shortllm-tasks-") as written:
        index = _index(names)
        for name in names:
            found = _load(index, name, _local_task(name, index, data, Path(written)))
            for other, tasks in members.items():
                if twice := set(tasks) & set(found["tasks"]):
                    raise ShortLLMError(
                        f"task '{min(twice)}' is requested twice, by '{other}' and by '{name}'. "
                        "Leave one of them out"
                    )
            members[name] = list(found["tasks"])
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
    """Load lm-evaluation-harness; its version."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise ShortLLMError(
            f"zero-shot tasks need lm-evaluation-harness ({error}). Install it with: "
            f"{install_hint('eval')}"
        ) from error
    return str(lm_eval.__version__)


@contextmanager
def quiet_harness() -> Iterator[None]:
    """No notes and bars of the harness: what matters is raised or recorded here."""
    with quiet_transformers(), quiet("lm_eval"):
        yield


def _index(names: Sequence[str]) -> Any:
    """The harness's tasks by name; only the well-known ones where no other is requested."""
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
    """The description of a task with local documents; None if there are none and none must be."""
    directory = data if data is not None else data_directory()
    if directory is None or name in EMBEDDED_TASKS:
        return None
    entry = index.task_index[name]
    splits = _splits(entry.cfg or {})
    if not splits and data is not None:
        raise DataError(
            f"'{name}' is a group of tasks, which --task-data cannot serve. Name them singly"
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
    """The splits a task needs: the measured one, and that of its examples where it shows some."""
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
    """YAML for the harness: its own task, with documents from these files."""
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
    """The documents of local files by split, as the harness wants them (`custom_dataset`)."""
    from datasets import Dataset

    return {split: Dataset.from_list(load_records(Path(file))) for split, file in files.items()}


def _load(index: Any, name: str, local: Path | None) -> dict[str, dict[str, Any]]:
    """What the harness knows by a name, with its documents."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    try:
        found: dict[str, dict[str, Any]] = index.load([str(local or name)])
        return found
    except ShortLLMError:  # a ValueError too
        raise
    except ImportError as error:
        raise ShortLLMError(
            f"task '{name}' needs a package that is not installed: {first_line_of(error)}"
        ) from error
    except (DatasetsError, TemplateError, OSError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"the documents of task '{name}' cannot be used: {first_line_of(error)}. Without the "
            f"Hub, give --task-data DIR (or {DATA_VARIABLE}) with "
            f"DIR/{DATA_FOLDERS.get(name, name)}/SPLIT.jsonl"
        ) from error


def _prepare(name: str, task: Any) -> None:
    """Refuse a task that needs more than text, and settle what it leaves open."""
    if getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
        raise ShortLLMError(
            f"task '{name}' shows more than text or runs code that the model writes. "
            "Give it to the `lm_eval` command instead"
        )
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(seed=SHOT_SEED)


def measure_tasks(
    model: Any, tokenizer: Any, tasks: TaskSet, *, name: str, ranks: Ranks = ALONE
) -> list[TaskScore]:
    """A score of each task, or of each group that has a metric of its own; `name` is shown on the
    progress bar."""
    import torch
    from lm_eval.evaluator import evaluate

    with progress(f"tasks of {name}", 1.0) as advance, quiet_harness():
        lm = harness_model(model, tokenizer, tasks.batch_size, ranks=ranks, advance=advance)
        try:
            found = evaluate(
                lm=lm,
                task_dict=tasks.loaded,
                limit=tasks.limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
            )
        except torch.OutOfMemoryError as error:
            raise ShortLLMError(
                f"{tasks.batch_size} sequences at once do not fit into the memory of "
                f"{model.device}. Give a smaller --batch-size"
            ) from error
    return [
        _task_score(entry, found, tasks)
        for requested, members in tasks.members.items()
        for entry in ([requested] if _metrics(found["results"].get(requested, {})) else members)
    ]


def _metrics(measured: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a task by metric, without its filter where that is the plain one."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in measured.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    }


def _task_score(task: str, found: Mapping[str, Any], tasks: TaskSet) -> TaskScore:
    """One line of the result from what the harness returned."""
    measured = found["results"][task]
    metrics = _metrics(measured)
    if not metrics:
        raise ShortLLMError(f"task '{task}' has no metric. Leave it out")
    metric = METRICS.get(task) or next(iter(metrics))
    name, _, rule = metric.partition(",")
    stderr = measured.get(f"{name}_stderr,{rule or 'none'}")
    members = tasks.members.get(task, [task])
    version = found["versions"].get(task)
    return TaskScore(
        task=task,
        metric=metric,
        score=metrics.pop(metric),
        stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
        others=metrics,
        documents=sum(found["n-samples"][member]["effective"] for member in members),
        documents_fingerprint=fingerprint([tasks.documents[member] for member in members]),
        shots=found["n-shot"].get(task),
        version=None if version is None else str(version),
    )
