"""A run directory: ownership, contents, and which files are up to date."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shortllm import __version__
from shortllm.checkpoint.hub import named_revision
from shortllm.checkpoint.loaded import is_name
from shortllm.errors import OutputError, ResultFileError
from shortllm.files import (
    LOCK,
    PARTIAL,
    differs,
    hold,
    require_no_file,
    require_same_choices,
    require_writable,
    translate_os_errors,
    write_text,
)
from shortllm.records import ResultFile, load_current
from shortllm.runtime import versions

if TYPE_CHECKING:
    from shortllm.checkpoint.source import Checkpoint

log = logging.getLogger(__name__)

PRUNED = "pruned"
"""Directory of the shortened checkpoint, and its name in results."""

LOG = "run.log"
"""Everything that was said while the directory was written, with times."""

HEALED = "healed"
"""The same of the checkpoint that was healed without training."""

NOT_COMPARED = {
    "about",
    "accept_unknown_references",
    "device",
    "stream",
    "max_memory",
    "trust_remote_code",
}
"""Fields of a recipe that say where and how it runs, not what comes of it."""

ADDED = {"benchmark", "quantization", "retraining"}
"""Stages that can be added to a finished run: they leave its other results as they are."""

RESULTS = ("plan.json", "comparison.json", "draft.json", PRUNED, "scores", "scores*.json", "text-*")
"""Names in a directory, as patterns, of what took long."""

Kind = TypeVar("Kind", bound=ResultFile)


def short_name(model: str) -> str:
    """The last part of a model's directory or Hub id, or the words of a loaded model's name."""
    if is_name(model):
        return "-".join(re.findall(r"[\w.-]+", model))
    return Path(model).resolve().name if Path(model).exists() else model.split("/")[-1]


def claim_directory(
    directory: Path, checkpoint: Checkpoint, recipe: Mapping[str, Any] | None = None
) -> None:
    """Check that `directory` is free or an earlier run of the same model, and can be written; one
    with results also of the same `recipe`, unless those may be replaced."""
    present = require_run_directory(directory)
    earlier = _run_model(directory) or {}
    has_results = any(any(map(path.match, RESULTS)) for path in present)
    if has_results and earlier.get("fingerprint") != checkpoint.fingerprint:
        raise OutputError(
            f"{directory} is a run of another model ({earlier.get('id')}). Choose another "
            "--out, or delete it"
        )
    if has_results and recipe is not None:
        before = {
            name: value
            for name, value in run_file(directory).get("recipe", {}).items()
            if name not in NOT_COMPARED and (value or name not in ADDED)
        }
        if differs(before, recipe):
            require_same_choices(directory, before, recipe)
    require_writable(directory, checkpoint.bytes)


def require_results(directory: Path) -> None:
    """Refuse what is not a directory of a finished run."""
    if not directory.is_dir():
        raise ResultFileError(f"no such directory: {directory}. Give the directory of a run")
    if (directory / "config.json").exists():
        raise ResultFileError(
            f"{directory} is a model, not a run. Give the --out of `shortllm run`"
        )
    if not any(directory.glob("*.json")):
        raise ResultFileError(
            f"{directory} is not a run: it has no results. Give the --out of `shortllm run`"
        )


def require_run_directory(directory: Path) -> list[Path]:
    """Refuse a file, and a directory that contains something else than a run; what it contains."""
    require_no_file(directory)
    require_writable(directory)
    listing = directory.iterdir() if directory.is_dir() else []
    present = [path for path in listing if not path.name.endswith(PARTIAL) and path.name != LOCK]
    if present and _run_model(directory) is None:
        raise OutputError(
            f"{directory} is not empty and not a run of shortllm. Choose another --out"
        )
    return present


def pinned(model: str, revision: str | None, directory: Path | None) -> str | None:
    """The revision of a Hub model for a run: the given one, else that recorded in its directory, so
    that all stages use one commit."""
    if directory is None or named_revision(model, revision)[1] is not None:
        return revision
    earlier = _run_model(directory) or {}
    if earlier.get("id") != model or not isinstance(earlier.get("revision"), str):
        return revision
    log.info("%s: continuing with revision %s of %s", model, earlier["revision"], directory)
    return str(earlier["revision"])


def run_file(directory: Path) -> dict[str, Any]:
    """The content of a directory's run.json; empty if it has no readable one."""
    try:
        content = json.loads((directory / "run.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _run_model(directory: Path) -> dict[str, Any] | None:
    """The `model` entry of a directory's run.json; None if it has no readable one."""
    model = run_file(directory).get("model")
    return model if isinstance(model, dict) else None


def write_run_file(
    directory: Path,
    recipe: dict[str, Any],
    checkpoint: Checkpoint,
    command: Sequence[str] = (),
) -> None:
    """Lock the directory, begin its log, and write run.json: the resolved recipe, versions and
    command line."""
    hold(directory).callback(_begin_log(directory, command))
    content = {
        "shortllm": __version__,
        "command": list(command),
        "model": checkpoint.info().model_dump(mode="json"),
        "recipe": recipe,
        "versions": versions(),
    }
    write_text(directory / "run.json", json.dumps(content, indent=1) + "\n")


def _begin_log(directory: Path, command: Sequence[str]) -> Callable[[], None]:
    """Write all that the package logs into the directory too; returns what ends that."""
    package = logging.getLogger("shortllm")
    with translate_os_errors(directory):
        handler = _LogFile(directory / LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = package.level
    if not package.hasHandlers():  # nothing else shows what is less than a warning
        package.setLevel(logging.DEBUG)
    package.addHandler(handler)
    log.debug("shortllm %s: %s", __version__, shlex.join(command) or "called from Python")

    def end() -> None:
        if sys.exc_info()[0] is not None:
            log.debug("stopped", exc_info=True)
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()

    return end


class _LogFile(logging.FileHandler):
    """The log of a run; a full disk is reported where results are written."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Leave the line out."""


def finished(kind: type[Kind], path: Path, expected: str) -> Kind | None:
    """An earlier result if it is complete and from the same inputs; one from others is refused."""
    found = load_current(kind, path, expected)
    if found is not None:
        log.info("%s is up to date, skipped", path)
    else:
        require_replaceable(kind, path, expected)
    return found


def require_replaceable(kind: type[ResultFile], path: Path, expected: str) -> None:
    """Refuse to replace a result that was made from other inputs, unless that is allowed."""
    with suppress(ResultFileError):  # missing or damaged
        if kind.load(path).fingerprint != expected:
            require_same_choices(path, {}, {})


def delete_texts(directory: Path, *, from_number: int) -> None:
    """Delete what an earlier comparison of texts has more than this one."""
    for place in directory.glob("text-*"):
        number = place.name.removeprefix("text-")
        if number.isdecimal() and int(number) >= from_number:
            shutil.rmtree(place)


def delete(files: Iterable[Path]) -> None:
    """Delete files that an earlier recipe wrote."""
    for file in files:
        file.unlink(missing_ok=True)
