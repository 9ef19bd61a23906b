"""Runs in processes of their own that tests kill, forked from one that has imported all it takes.

killed_when(moment, function, *arguments)   the exit status of a process that was killed then
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "shortllm.cli",
        "shortllm.pipeline",
        "shortllm.retraining.retrain",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.trainer",
    ]
)


def killed_when(moment: Callable[[], object], function: Callable[..., Any], *given: Any) -> int:
    """Call a function of a module in a process, kill it at a moment or at its end.

    Returns:
        The exit status: -9 if it was killed before it ended.
    """
    child = _CONTEXT.Process(target=function, args=given)
    child.start()
    deadline = time.monotonic() + 300
    while not moment() and child.is_alive() and time.monotonic() < deadline:
        time.sleep(0.0005)
    child.kill()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def run(recipe: str, out: Path, command: list[str] | None = None) -> None:
    """`pipeline.run` of a recipe as JSON."""
    from shortllm import pipeline
    from shortllm.recipe import Recipe

    pipeline.run(recipe=Recipe.model_validate_json(recipe), out=out, command=command or ())


def command(words: list[str]) -> None:
    """A command line of ours."""
    from shortllm.cli import main

    main(words)
