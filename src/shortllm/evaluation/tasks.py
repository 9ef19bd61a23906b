"""Tasks of lm-evaluation-harness: loaded with their documents, and run on a model in memory.

Documents are local ones first, else those of the Hub.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from shortllm.checkpoint.config import context_length
from shortllm.checkpoint.source import Checkpoint
from shortllm.data.sources import DATA_VARIABLE
from shortllm.errors import DataError, ShortLLMError, first_line_of
from shortllm.evaluation.harness import harness_model, new_tokens_of
from shortllm.evaluation.options import EvaluationOptions, TaskPrompts, TaskScore
from shortllm.evaluation.task_files import (
    effective_shots,
    entries_of,
    folder_of,
    is_task,
    with_local_files,
)
from shortllm.evaluation.task_names import (
    CHAT_TASKS,
    METRICS,
    OWN_DIRS,
    WELL_KNOWN,
    no_harness,
    task_names,
    unknown_task,
)
from shortllm.files import fingerprint
from shortllm.progress import progress
from shortllm.runtime import ALONE, Ranks, quiet, quiet_transformers

log = logging.getLogger(__name__)

CHAT_SHOTS = 5
"""Examples in the published protocols of MMLU and GSM8K; IFEval shows none."""

HARNESS_FOLDERS = (
    "super_glue/boolq", "piqa", "hellaswag", "winogrande", "arc", "openbookqa", "mmlu/default",
    "gsm8k", "ifeval",
)  # fmt: skip
"""Where the harness describes these; indexing all of its 14,000 names takes seconds."""

BOOTSTRAPS = 1000
"""Draws for the standard error of a metric that is not a mean."""

PUNKT_HINT = "Get it with: python -m nltk.downloader punkt_tab"

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
    examples: dict[str, str]
    """Task that shows some -> fingerprint of their number and what they are drawn from."""
    prompts: TaskPrompts
    limit: int | None
    batch_size: int
    version: str
    """Of the harness."""

    @property
    def fingerprint(self) -> str:
        """Of everything the scores depend on, except the model."""
        inputs = [self.version, list(self.members.items()), self.documents, self.batch_size]
        if self.examples or self.prompts != TaskPrompts():
            inputs += [self.examples, self.prompts.model_dump()]
        return fingerprint(inputs)

    @property
    def kinds(self) -> int:
        """How many kinds of requests the tasks make."""
        kinds = {str(task.OUTPUT_TYPE) for task in self.loaded["tasks"].values()}
        return len({kind.replace("multiple_choice", "loglikelihood") for kind in kinds})

    def require_room(self, checkpoint: Checkpoint) -> None:
        """Refuse a model with fewer positions than a task lets it write tokens."""
        positions = context_length(checkpoint.config)
        for name, task in self.loaded["tasks"].items():
            if positions is None or task.OUTPUT_TYPE != "generate_until":
                continue
            new_tokens = new_tokens_of(task.get_config("generation_kwargs") or {})
            if new_tokens >= positions:
                raise ShortLLMError(
                    f"task '{name}' lets a model write {new_tokens:,} tokens, and {checkpoint.id} "
                    f"has {positions:,} positions for prompt and answer. Leave the task out"
                )


def load_tasks(options: EvaluationOptions) -> TaskSet:
    """The requested tasks with their documents: local ones, or those of the Hub."""
    version = require_harness()
    shots = {name: _shots(name, options) for name in task_names(options.tasks)}
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    members: dict[str, list[str]] = {}
    with quiet_harness(), TemporaryDirectory(prefix="shortllm-tasks-") as written:
        index = with_local_files(_index(list(shots)), shots, options.task_data, Path(written))
        for name, number in shots.items():
            found = _load(index, name)
            for other, tasks in members.items():
                if twice := set(tasks) & set(found["tasks"]):
                    raise ShortLLMError(
                        f"task '{min(twice)}' is requested twice, by '{other}' and by '{name}'. "
                        "Leave one of them out"
                    )
            members[name] = list(found["tasks"])
            for task_name, task in found["tasks"].items():
                _prepare(task_name, task, number)
            for kind, entries in found.items():
                loaded[kind] |= entries
        documents = {
            name: fingerprint(list(islice(task.eval_docs, options.limit)))
            for name, task in loaded["tasks"].items()
        }
        examples = {
            name: fingerprint([number, list(task.fewshot_docs())])
            for name, task in loaded["tasks"].items()
            if (number := task.get_config("num_fewshot"))
        }
    return TaskSet(
        loaded=loaded,
        members=members,
        documents=documents,
        examples=examples,
        prompts=options.task_prompts,
        limit=options.limit,
        batch_size=options.batch_size,
        version=version,
    )


def _shots(name: str, options: EvaluationOptions) -> int | None:
    """The requested number of examples of a task; None for its own."""
    if options.num_fewshot is None and name in CHAT_TASKS and "chat" in options.tasks:
        return CHAT_SHOTS
    return options.num_fewshot


def require_harness() -> str:
    """Load lm-evaluation-harness; its version."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise no_harness(error) from error
    return str(lm_eval.__version__)


@contextmanager
def quiet_harness() -> Iterator[None]:
    """No notes and bars of the harness: what matters is raised or recorded here."""
    with quiet_transformers(), quiet("lm_eval"):
        yield


def _index(names: Sequence[str]) -> Any:
    """The harness's tasks by name; only the well-known ones where no other is requested."""
    from lm_eval import tasks as harness

    if WELL_KNOWN.issuperset(names):
        root = Path(harness.__file__).parent
        folders = [*(root / folder for folder in HARNESS_FOLDERS), *OWN_DIRS]
        return harness.TaskManager(include_defaults=False, include_path=folders)
    index = _whole_index()
    for name in names:
        if name not in index.task_index:
            raise unknown_task(name, index.all_tasks)
    return index


@cache
def _whole_index() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[*OWN_DIRS])


def _load(index: Any, name: str) -> dict[str, dict[str, Any]]:
    """What the harness knows by a name, with its documents."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    try:
        found: dict[str, dict[str, Any]] = index.load([name])
        return found
    except ShortLLMError:  # a ValueError too
        raise
    except ImportError as error:
        hint = f". Install it with: pip install {error.name}" if error.name else ""
        raise ShortLLMError(
            f"task '{name}' needs a package that is not installed: {first_line_of(error)}{hint}"
        ) from error
    except (DatasetsError, TemplateError, OSError, LookupError, TypeError, ValueError) as error:
        first = next((one.name for one in entries_of(index, name) if is_task(one)), name)
        raise DataError(
            f"the documents of task '{name}' cannot be used: {first_line_of(error)}. Without the "
            f"Hub, give --task-data DIR (or {DATA_VARIABLE}) with "
            f"DIR/{folder_of(first)}/SPLIT.jsonl"
        ) from error


def _prepare(name: str, task: Any, shots: int | None) -> None:
    """Refuse a task that needs more than text or shows more examples than there are, and settle
    what it leaves open."""
    if getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
        raise ShortLLMError(
            f"task '{name}' shows more than text or runs code that the model writes. "
            "Give it to the `lm_eval` command instead"
        )
    if name == "ifeval":
        _warn_without_sentences()
    own = task.get_config("num_fewshot")
    number = effective_shots(own, shots)
    if shots and own == 0:
        log.info("task %s shows no examples: it is defined without any", name)
    task.set_config("num_fewshot", number)
    available = len(list(task.fewshot_docs())) if number else 0
    if number > available:
        raise ShortLLMError(
            f"task '{name}' has {available:,} documents to show as examples, fewer than "
            f"{number}. Give a smaller --num-fewshot"
        )


def _warn_without_sentences() -> None:
    """Say that some instructions of IFEval cannot be checked, as long as there is time to stop."""
    import nltk  # type: ignore[import-untyped]

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        log.warning("task ifeval needs punkt_tab of nltk for some instructions. %s", PUNKT_HINT)


def measure_tasks(
    model: Any, tokenizer: Any, tasks: TaskSet, *, name: str, ranks: Ranks = ALONE
) -> list[TaskScore]:
    """A score of each task, or of each group that has a metric of its own; `name` is shown on the
    progress bar."""
    import torch
    from lm_eval.evaluator import evaluate

    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(seed=SHOT_SEED)  # every model sees the same examples
    with progress(f"tasks of {name}", 1.0) as advance, quiet_harness():
        lm = harness_model(
            model, tokenizer, tasks.batch_size, kinds=tasks.kinds, ranks=ranks, advance=advance
        )
        try:
            found = evaluate(
                lm=lm,
                task_dict=tasks.loaded,
                limit=tasks.limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
                **tasks.prompts.model_dump(),
            )
        except LookupError as error:
            if "punkt" not in str(error):
                raise
            raise ShortLLMError(f"some answers to ifeval cannot be scored. {PUNKT_HINT}") from error
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
    shots = {found["n-shot"].get(member) for member in members}
    return TaskScore(
        task=task,
        metric=metric,
        score=metrics.pop(metric),
        stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
        others=metrics,
        documents=sum(found["n-samples"][member]["effective"] for member in members),
        documents_fingerprint=fingerprint([tasks.documents[member] for member in members]),
        shots=shots.pop() if len(shots) == 1 else None,
        version=None if version is None else str(version),
    )
