"""A small world that comes with the package, so that everything works offline and in minutes.

`world` writes little stories, `questions` asks about them in multiple-choice form, and `model/` has
a Llama model trained on them by `tools/embedded/train.py`. Importing this package loads neither
torch nor transformers.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shortllm.embedded.questions import Task
    from shortllm.embedded.world import Split

__all__ = ["MODEL_DIR", "TASKS_DIR", "rows", "tasks"]

MODEL_DIR = Path(__file__).parent / "model"
"""The embedded model: a directory for `from_pretrained`, with `training.json` in it."""

TASKS_DIR = Path(__file__).parent / "tasks"
"""The task sets as YAML files: an include path for lm-evaluation-harness."""


def rows(split: "Split", count: int | None = None) -> list[str]:
    """The first `count` pages of `split`, all by default; `train` has no end and needs a count."""
    from shortllm.embedded import world

    return world.rows(split, count)


def tasks() -> "tuple[Task, ...]":
    """The multiple-choice task sets, each with its name, its chance level and its documents."""
    from shortllm.embedded import questions

    return questions.TASKS
