"""Whether Python code that comes with a checkpoint may be run: never, unless the user says so.

Some checkpoints bring modules of their own (`auto_map` in config.json) in place of a model type
that transformers knows. To load such a model is to run that code, with all rights of the user. So
it is refused, naming the flag, and types that transformers knows are never loaded by such code.

    shortllm score MODEL --trust-remote-code
    with shortllm.trusting_remote_code(): shortllm.score(MODEL)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from shortllm.errors import CheckpointError, UnsupportedModelError

FLAG = "--trust-remote-code"

CLASSES = ("AutoConfig", "AutoModelForCausalLM")
"""What the code of a checkpoint must bring."""

_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


@contextmanager
def trusting_remote_code() -> Iterator[None]:
    """Within the context the Python code of every checkpoint that is opened may be run.

    Types that transformers knows are not loaded by such code even then.

    Returns:
        A context.
    Raises:
        UnsupportedModelError: outside of it, of a checkpoint that comes with code.
    """
    before = _trusted.set(True)
    try:
        yield
    finally:
        _trusted.reset(before)


def trust_from_now_on() -> None:
    """The same to the end of the process: for the command line, which is told so once."""
    _trusted.set(True)


def is_trusted() -> bool:
    """Whether the user has said that code of checkpoints may be run."""
    return _trusted.get()


def brings_code(raw_config: dict[str, Any]) -> bool:
    """Whether a config.json names code for a model type that transformers does not know."""
    from transformers import CONFIG_MAPPING

    return bool(raw_config.get("auto_map")) and raw_config.get("model_type") not in CONFIG_MAPPING


def is_own_code(config: Any) -> bool:
    """Whether a transformers config is of a class that came with a checkpoint."""
    return type(config).__module__.startswith("transformers_modules.")


def require_trust(source: str, directory: Path, raw_config: dict[str, Any]) -> None:
    """Refuse code that the user has not asked for, and code that is not in the checkpoint.

    Raises:
        UnsupportedModelError: the flag is missing, named; or a class that a model takes.
        CheckpointError: the code is not there, or that of another repository.
    """
    named = raw_config["auto_map"]
    if not isinstance(named, dict) or not all(isinstance(named.get(one), str) for one in CLASSES):
        raise UnsupportedModelError(
            f"{source}: auto_map in config.json must name the classes of its own code for "
            f"{' and '.join(CLASSES)}"
        )
    files = sorted({named[one].rpartition(".")[0] + ".py" for one in CLASSES})
    if not is_trusted():
        raise UnsupportedModelError(
            f"{source} comes with Python code of its own ({', '.join(files)}), as transformers "
            f"does not know its model type '{raw_config.get('model_type')}'. It was not run. Read "
            f"it, and if you trust it give the same command with {FLAG}"
        )
    for file in files:
        if "--" in file or "/" in file or file.startswith("."):
            raise CheckpointError(
                f"{source} names code of another repository ({file.removesuffix('.py')}), which "
                "no revision pins. Put that file beside config.json, and name it in auto_map"
            )
        if not (directory / file).is_file():
            raise CheckpointError(
                f"{source} names the code {file}, which is not there. Finish the download of "
                f"{directory}"
            )
