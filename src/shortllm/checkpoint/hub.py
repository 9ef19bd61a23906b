"""Find a checkpoint: a local directory, a snapshot of a Hub repository, or a GGUF file of either.

A Hub id is resolved to a commit once, when the model is opened. All files are those of that commit,
and every record and the new checkpoint's config name it. `MODEL@REVISION` requests a branch, tag or
commit. Without a network only the local cache is searched.

    models--acme--tiny/refs/main            0123abcd
    models--acme--tiny/snapshots/0123abcd/  config.json, model.safetensors, ...
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path

from shortllm.checkpoint.config import checked_config
from shortllm.checkpoint.dequantize import dequantized
from shortllm.checkpoint.gguf import SUFFIX
from shortllm.errors import CheckpointError
from shortllm.runtime import is_trusted

SECOND_COPIES = ["consolidated*", "*/*"]
"""Files of a repository that repeat the weights, or belong to something else."""

EMBEDDED = "embedded"
"""The name of the model that comes with the package."""

EMBEDDED_MODEL = Path(__file__).parents[1] / "embedded" / "model"


def named_revision(source: str | Path, revision: str | None) -> tuple[str | Path, str | None]:
    """A Hub id `MODEL@REVISION` as model and revision; anything else as it is."""
    name, sign, named = str(source).rpartition("@")
    if not sign or not isinstance(source, str) or _exists(source) or not _may_be_hub_id(name):
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


def locate(source: str | Path, revision: str | None) -> tuple[Path, str | None]:
    """Directory and, for a Hub id, the commit of the snapshot."""
    if source == EMBEDDED:
        return EMBEDDED_MODEL, None
    path = Path(source).expanduser()
    if is_gguf(source):
        file, commit = locate_gguf(source, revision)
        return dequantized(file), commit
    if _exists(source):
        if path.is_dir():
            return path, None
        raise CheckpointError(
            f"{source} is a file. Give the checkpoint's directory: {path.parent or Path('.')}"
        )
    if not _may_be_hub_id(str(source)):
        raise CheckpointError(
            f"no such directory: {source}. Give a checkpoint directory, a Hub id (it needs its "
            f"owner, e.g. openai-community/gpt2), or '{EMBEDDED}'"
        )
    return _download(str(source), revision)


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
            answer = (
                f"is not a local directory, not in the local Hub cache{at}, and could not be "
                f"downloaded ({type(error).__name__}). Check the name and the network, or give a "
                "local directory"
            )
        raise CheckpointError(f"'{hub_id}' {answer}") from error
