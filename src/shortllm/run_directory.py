"""A run directory: ownership, contents, and which files are up to date."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from shortllm import __version__
from shortllm.checkpoint.hub import named_revision
from shortllm.checkpoint.source import Checkpoint
from shortllm.errors import OutputError
from shortllm.files import LOCK, PARTIAL, hold, require_writable, write_text
from shortllm.records import ResultFile, load_current
from shortllm.runtime import versions

log = logging.getLogger(__name__)

PRUNED = "pruned"
"""Directory of the shortened checkpoint, and its name in results."""

HEALED = "healed"
"""The same of the checkpoint that was healed without training."""

Kind = TypeVar("Kind", bound=ResultFile)


def short_name(model: str) -> str:
    """The last part of a model's directory or Hub id."""
    return Path(model).resolve().name if Path(model).exists() else model.split("/")[-1]


def claim_directory(directory: Path, checkpoint: Checkpoint) -> None:
    """Check that `directory` is free, or holds an earlier run of the same model, and can be
    written.

    Raises:
        OutputError: it holds something else, cannot be written, or has too little space.
    """
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"--out {directory} is a file. Give a directory")
    held = [
        path
        for path in _listing(directory)
        if not path.name.endswith(PARTIAL) and path.name != LOCK
    ]
    if held:
        earlier = _run_model(directory)
        if earlier is None:
            raise OutputError(
                f"{directory} is not empty and holds no run of shortllm. Choose another --out"
            )
        has_results = any(
            path.name in ("plan.json", PRUNED) or path.match("scores*.json") for path in held
        )
        if has_results and earlier.get("fingerprint") != checkpoint.fingerprint:
            raise OutputError(
                f"{directory} holds a run of another model ({earlier.get('id')}). Choose another "
                "--out, or delete it"
            )
    require_writable(directory, checkpoint.bytes)


def pinned(model: str, revision: str | None, directory: Path | None) -> str | None:
    """The revision of a Hub model to open for a run: as asked, or the one that an earlier start of
    the run in this directory has recorded, so that all of its stages are of one commit."""
    if directory is None or named_revision(model, revision)[1] is not None:
        return revision
    held = _run_model(directory) or {}
    if held.get("id") != model or not isinstance(held.get("revision"), str):
        return revision
    log.info("%s: going on with revision %s, which %s records", model, held["revision"], directory)
    return str(held["revision"])


def _listing(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _run_model(directory: Path) -> dict[str, Any] | None:
    """The `model` entry of a directory's run.json; None if it has no readable one."""
    try:
        content = json.loads((directory / "run.json").read_bytes())
        model = content["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return model if isinstance(model, dict) else None


def write_run_file(
    directory: Path,
    recipe: dict[str, Any],
    checkpoint: Checkpoint,
    command: Sequence[str] = (),
) -> None:
    """run.json: the resolved recipe, the versions and the command line.

    The directory is held from here on, see `shortllm.files`.

    Raises:
        OutputError: another process is writing into it.
    """
    hold(directory)
    content = {
        "shortllm": __version__,
        "command": list(command),
        "model": checkpoint.info().model_dump(mode="json"),
        "recipe": recipe,
        "versions": versions(),
    }
    write_text(directory / "run.json", json.dumps(content, indent=1) + "\n")


def finished(kind: type[Kind], path: Path, expected: str) -> Kind | None:
    """An earlier result if it is whole and made from the same inputs; says that it is reused."""
    found = load_current(kind, path, expected)
    if found is not None:
        log.info("%s is up to date, skipped", path)
    return found


def delete(files: Iterable[Path]) -> None:
    """Delete what an earlier recipe has left."""
    for file in files:
        file.unlink(missing_ok=True)
