"""Names of tasks: the well-known ones, sets of them, and all that lm-evaluation-harness describes.

Nothing here loads the harness, which takes seconds: a name that is wrong shows without it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from shortllm.embedded import TASKS_DIR as EMBEDDED_TASKS_DIR
from shortllm.errors import ShortLLMError, install_hint
from shortllm.evaluation.probe import TASKS_DIR as PROBE_TASKS_DIR
from shortllm.evaluation.probe.items import CAPABILITIES

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

DEFAULT_ITEMS = "arc_easy,piqa"
"""Tasks whose items blocks are scored by where no others are named."""

CHAT_TASKS = ("mmlu", "gsm8k", "ifeval")
"""What chat models are measured by."""

PROBE_TASKS = tuple(f"shortllm_probe_{name}" for name in CAPABILITIES)
"""The exercises of the probe."""

OWN_DIRS = (EMBEDDED_TASKS_DIR, PROBE_TASKS_DIR)
"""Where the descriptions of our own tasks are."""

WELL_KNOWN = frozenset((*METRICS, *CHAT_TASKS, *EMBEDDED_TASKS, *PROBE_TASKS))

SETS = {
    "paper": tuple(METRICS),
    "chat": CHAT_TASKS,
    "embedded": EMBEDDED_TASKS,
    "probe": PROBE_TASKS,
}
"""Names of several tasks at once."""

_NAMED = re.compile(r"^[ \t-]*(?:task|group|tag):[ \t]*[\"']?([\w.-]+)", re.MULTILINE)
_WORD = re.compile(r"[\w.-]+")


def task_names(requested: Iterable[str]) -> list[str]:
    """The tasks of the requested names and sets, each once."""
    names = [name.strip() for name in requested]
    return list(dict.fromkeys(n for name in names if name for n in SETS.get(name, (name,))))


def check_tasks(requested: Iterable[str]) -> None:
    """Refuse names that occur nowhere in the harness's descriptions of tasks.

    Raises:
        ShortLLMError: a name is unknown, or the harness is not installed.
    """
    names = task_names(requested)
    if not names:
        return
    harness = find_spec("lm_eval")
    if harness is None or harness.origin is None:
        raise no_harness("No module named 'lm_eval'")
    others = [name for name in names if name not in WELL_KNOWN]
    if not others:
        return
    described: set[str] = set()
    written: set[str] = set()
    folders = (Path(harness.origin).parent / "tasks", *OWN_DIRS)
    for text in chain.from_iterable(map(_descriptions, folders)):
        described.update(_NAMED.findall(text))
        written.update(name for name in others if name in text and name in _WORD.findall(text))
    for name in others:
        if name not in written:
            raise unknown_task(name, described)


def _descriptions(folder: Path) -> Iterator[str]:
    """The texts below a folder: 14,000 files in the harness, so that `Path.rglob` is too slow."""
    for place, _, files in os.walk(folder):
        for name in files:
            if name.endswith(".yaml") or "." not in name:
                yield (Path(place) / name).read_bytes().decode(errors="replace")


def no_harness(reason: object) -> ShortLLMError:
    """The harness cannot be loaded."""
    return ShortLLMError(
        f"tasks need lm-evaluation-harness ({reason}). Install it with: {install_hint('eval')}"
    )


def unknown_task(name: str, known: Iterable[str]) -> ShortLLMError:
    """A name that the harness does not know; the nearest one that it knows is suggested."""
    near = difflib.get_close_matches(name, [*SETS, *WELL_KNOWN, *known], n=1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return ShortLLMError(
        f"unknown task '{name}'. {hint}Available: {', '.join(SETS)}, "
        f"{', '.join((*METRICS, *CHAT_TASKS))}, and what `lm_eval ls tasks` prints"
    )
