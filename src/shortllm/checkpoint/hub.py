"""Find a checkpoint: a local directory, a snapshot of a Hub repository, a GGUF file of either, or a
loaded model.

A Hub id is resolved to a commit once, when the model is opened. All files are those of that commit,
and every record and the new checkpoint's config name it. `MODEL@REVISION` requests a branch, tag or
commit. Without a network only the local cache is searched.

    models--acme--tiny/refs/main            0123abcd
    models--acme--tiny/snapshots/0123abcd/  config.json, model.safetensors, ...
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from threading import Thread
from typing import Annotated, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from pydantic import BeforeValidator, ValidationInfo

from shortllm.checkpoint import loaded
from shortllm.checkpoint.config import checked_config, read_raw_config
from shortllm.checkpoint.dequantize import dequantized
from shortllm.checkpoint.gguf import SUFFIX, cached_directory
from shortllm.checkpoint.tensors import require_weights
from shortllm.errors import CheckpointError
from shortllm.runtime import is_trusted

SECOND_COPIES = ["consolidated*", "*/*"]
"""Files of a repository that repeat the weights, or belong to something else."""

HUB_WAIT_S = 2.0
"""How long an answer of the Hub is waited for before it counts as out of reach."""

EMBEDDED = "embedded"
"""The name of the model that comes with the package."""

EMBEDDED_MODEL = Path(__file__).parents[1] / "embedded" / "model"


def _named(given: Any, info: ValidationInfo) -> str:
    """The name by which a model is opened that a caller gave in any way."""
    if isinstance(given, Path):
        return f"./{given}" if str(given) == EMBEDDED else str(given)
    if isinstance(given, str):
        require_named(given)
        return given
    if not loaded.is_loaded_model(given):
        raise loaded.refuse(given)
    context = info.context or {}
    context["loaded"] = True
    return loaded.name_of(given, context.get("tokenizer"))


ModelSource = Annotated[str, BeforeValidator(_named)]
"""A model: a directory, Hub id, GGUF file or loaded model, each by the name it is opened by."""


def require_named(source: str) -> None:
    """Refuse a name that is empty, as that of a variable of the shell that is not set."""
    if not source.strip():
        raise CheckpointError(
            f"the model's name is empty. Give a checkpoint directory, a Hub id or '{EMBEDDED}'"
        )


def named_revision(source: str, revision: str | None) -> tuple[str, str | None]:
    """A Hub id `MODEL@REVISION` as model and revision; anything else as it is."""
    name, sign, named = source.rpartition("@")
    if not sign or _exists(source) or not _may_be_hub_id(name):
        return source, revision
    if not named:
        raise CheckpointError(f"'{source}' is not of the form MODEL@REVISION")
    if _exists(name):
        raise CheckpointError(f"'{name}' is a local directory and has no revisions. Omit the @")
    if revision is not None and revision != named:
        raise CheckpointError(
            f"'{source}' names revision {named}, and --revision names {revision}. Give one of them"
        )
    return name, named


def locate(source: str, revision: str | None) -> tuple[Path, str | None]:
    """Directory and, for a Hub id, the commit of the snapshot."""
    if source == EMBEDDED:
        return EMBEDDED_MODEL, None
    saved = loaded.directory_of(source)
    if saved is not None:
        return saved, None
    if is_gguf(source):
        file, commit = locate_gguf(source, revision)
        return dequantized(file), commit
    directory = local_directory(source)
    return _download(source, revision) if directory is None else (directory, None)


def local_directory(source: str) -> Path | None:
    """The directory of a model's checkpoint; None if it is on the Hub."""
    path = Path(source).expanduser()
    if _exists(source):
        if path.is_dir():
            return path
        raise CheckpointError(
            f"{source} is a file. Give the checkpoint's directory: {path.parent or Path('.')}"
        )
    if loaded.is_name(source):
        raise CheckpointError(
            f"{source} was a model in memory, and is no longer there. Give it again, or the "
            "directory or Hub id that it was loaded from"
        )
    if not _may_be_hub_id(source):
        raise CheckpointError(
            f"no such directory: {source}. Give a checkpoint directory, a Hub id (it needs its "
            f"owner, e.g. openai-community/gpt2), or '{EMBEDDED}'"
        )
    return None


def directory_here(source: str) -> Path | None:
    """Where a model's files are, if nothing must be fetched or dequantized first."""
    if source == EMBEDDED:
        return EMBEDDED_MODEL
    if is_gguf(source):
        file = Path(source).expanduser()
        copy = cached_directory(file) if file.exists() else None
        return copy if copy is not None and (copy / "config.json").is_file() else None
    return local_directory(source)


def require_there(source: str, revision: str | None = None) -> None:
    """Refuse a model whose files are not here and cannot be fetched; opens none, loads no torch."""
    require_named(source)
    source, revision = named_revision(source, revision)
    if source == EMBEDDED:
        return
    if not is_gguf(source):
        directory = local_directory(source)
        if directory is not None:
            read_raw_config(source, directory)
            require_weights(directory)
            return
    elif _exists(source):
        return
    repository = source.partition(":")[0]
    if not _may_be_hub_id(repository):
        locate_gguf(source)  # says that there is no such file
    if not cached(repository, "models") and not hub_answers():
        raise CheckpointError(
            f"'{repository}' is not a local directory, not in the local Hub cache, and "
            f"{why_not_asked()}. Check the name and the network, or give a local directory"
        )


def cached(repository: str, kind: str) -> bool:
    """Whether the local Hub cache has something of a repository; `kind` is models or datasets."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    sets = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    if "huggingface_hub.constants" in sys.modules:  # it read the environment when it was loaded
        cache = Path(sys.modules["huggingface_hub.constants"].HF_HUB_CACHE)
    if "datasets.config" in sys.modules:
        sets = Path(sys.modules["datasets.config"].HF_DATASETS_CACHE)
    owner_name = repository.split("/")
    return (cache / "--".join([kind, *owner_name])).exists() or (
        kind == "datasets" and (sets / "___".join(owner_name).lower()).exists()
    )


def is_offline() -> bool:
    """Whether the user has switched the Hub off."""
    return any(
        os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def why_not_asked() -> str:
    """Why nothing is downloaded from the Hub."""
    if is_offline():
        return "HF_HUB_OFFLINE is set, so the Hub is not asked"
    return f"the Hub cannot be reached (no answer from {_hub_place()[0]})"


def _hub_place() -> tuple[str, int]:
    """Host and port through which the Hub is reached: its own, or those of a proxy."""
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    host = hub.hostname or ""
    proxy = None if proxy_bypass(host) else getproxies().get(hub.scheme)
    place = hub if not proxy else urlsplit(proxy)
    return place.hostname or host, place.port or (80 if place.scheme == "http" else 443)


@cache
def hub_answers() -> bool:
    """Whether the Hub can be reached; asked once, for two seconds at most."""
    answered: list[bool] = []

    def ask() -> None:  # looking up a name has no time limit of its own
        with suppress(OSError), socket.create_connection(_hub_place(), timeout=HUB_WAIT_S):
            answered.append(True)

    if is_offline():
        return False
    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_WAIT_S)
    return bool(answered)


def is_gguf(source: str | Path) -> bool:
    """Whether a model is given as a GGUF file."""
    return Path(source).suffix.lower() == SUFFIX and not Path(source).expanduser().is_dir()


def locate_gguf(source: str | Path, revision: str | None = None) -> tuple[Path, str | None]:
    """A GGUF file, and its commit where it is `OWNER/MODEL:FILE.gguf` on the Hub."""
    if _exists(source):
        return Path(source).expanduser(), None
    repository, sign, name = str(source).partition(":")
    if not sign or not _may_be_hub_id(repository):
        raise CheckpointError(
            f"no such file: {source}. Give a GGUF file, or one on the Hub as OWNER/MODEL:FILE.gguf"
        )
    folder = _snapshot(repository, revision, [name], ignored=[])
    if not (folder / name).is_file():
        raise CheckpointError(f"'{repository}' on the Hub has no file '{name}'")
    return folder / name, folder.name


def _exists(source: str | Path) -> bool:
    """Whether a file or directory has this name."""
    try:
        return Path(source).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # not a possible name
        return False


def _may_be_hub_id(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and name.count("/") == 1


def _download(hub_id: str, revision: str | None) -> tuple[Path, str | None]:
    """Snapshot of a Hub repository, safetensors preferred; its config is checked before weights."""
    code = ["*.py"] if is_trusted() else []
    folder = _snapshot(hub_id, revision, ["config.json", *code])
    checked_config(hub_id, folder)
    commit = folder.name
    text_files = ["*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "*.tiktoken"]
    folder = _snapshot(hub_id, commit, [*text_files, *code, "*.safetensors"])
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(hub_id, commit, ["*.bin"])
    return folder, commit


def _snapshot(
    hub_id: str, revision: str | None, patterns: list[str], ignored: list[str] = SECOND_COPIES
) -> Path:
    """A snapshot with the matching top-level files, from the Hub or else from the cache."""
    from huggingface_hub import errors, snapshot_download

    download = partial(
        snapshot_download,
        hub_id,
        revision=revision,
        allow_patterns=patterns,
        ignore_patterns=ignored,
    )
    try:
        return Path(download())
    except Exception as error:  # network stacks raise errors of many kinds
        answers = {  # a gated repository is also one that is not found
            errors.GatedRepoError: "is gated: accept its terms on the Hub, then `hf auth login`",
            errors.RevisionNotFoundError: f"has no revision '{revision}'",
            errors.RepositoryNotFoundError: "is neither a directory nor a public Hub repository. "
            "Check the name, or `hf auth login` if it is private",
            errors.HFValidationError: "is neither a directory nor a possible Hub id",
        }
        answer = next((said for kind, said in answers.items() if isinstance(error, kind)), None)
        if answer is None:
            # for a commit huggingface_hub 1.33 requests a list from the Hub, even if all is cached
            with suppress(Exception):
                return Path(download(local_files_only=True))
            at = "" if revision is None else f" at revision {revision}"
            said = f"could not be downloaded ({type(error).__name__})"
            why = said if hub_answers() else why_not_asked()
            answer = (
                f"is not a local directory, not in the local Hub cache{at}, and {why}. Check the "
                "name and the network, or give a local directory"
            )
        raise CheckpointError(f"'{hub_id}' {answer}") from error
