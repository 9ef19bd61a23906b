"""Send a checkpoint to the Hub: its files, its card, and what a run measured of it.

    shortllm push runs/qwen3 you/qwen3-short --private

    runs/qwen3/healed/  config.json, weights, tokenizer          as they are
                        README.md                                with the name of the repository
    runs/qwen3/         report.html, plan.json, eval.json, ...   to results/, without directories

Nothing that is sent names a place on this machine: `files_to_send` leaves out local.json, logs and
the records of stages, and of each path in a result its last part is sent.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm import __version__
from shortllm.calls import accepts
from shortllm.checkpoint.hub import hub_answers, require_there, why_not_asked
from shortllm.checkpoint.tensors import is_weights, read_json
from shortllm.errors import CheckpointError, OutputError, first_line_of
from shortllm.format import listed
from shortllm.surgery.card import CARD, Measured, card_of
from shortllm.surgery.origin import sendable
from shortllm.surgery.steps import steps_of

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

log = logging.getLogger(__name__)

RESULTS = (
    "report.html", "scores.json", "plan.json", "target.json", "eval.json", "bench.json"
)  # fmt: skip
"""Files of a run that are sent with a checkpoint."""

MADE_BY_THE_HUB = {".gitattributes"}


@accepts()
def push_to_hub(checkpoint: Path, repo: str, *, private: bool | None = None) -> CommitInfo:
    """Send a checkpoint to a repository of the Hub, with its model card and results.

    Paths of this machine are left out or shortened to their last part.

    Args:
        checkpoint: a checkpoint that shortllm wrote, or the directory of a run: then its last
            checkpoint, healed or retrained if it was.
        repo: `OWNER/NAME`, or `NAME` of yours. It is created if need be; files of the same name are
            replaced.
        private: whether a new repository is private. Default: as the owner's settings say.
    Returns:
        The commit, as huggingface_hub describes it.
    Raises:
        CheckpointError: not a checkpoint of shortllm, or the Hub cannot be reached.
        OutputError: not logged in, or the repository cannot be written or is public.
    """
    directory, run = what_to_send(checkpoint)
    token = _token(repo)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token, library_name="shortllm", library_version=__version__)
    with _explained(repo):
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
    files = _contents(directory, run, name)
    with _explained(name):
        stale = _stale_weights(api, name, files, private)
        log.info("%s: sending %s to %s", directory, listed(list(files)), name)
        return api.create_commit(
            name,
            [
                *(CommitOperationDelete(path) for path in stale),
                *(CommitOperationAdd(path, content) for path, content in files.items()),
            ],
            commit_message=f"Upload {directory.resolve().name} with shortllm {__version__}",
        )


def what_to_send(given: Path) -> tuple[Path, Path | None]:
    """The checkpoint that is meant, and the run that it is from."""
    if not given.is_dir():
        raise CheckpointError(
            f"no such directory: {given}. Give a checkpoint or the directory of a run"
        )
    directory, run = given, given.resolve().parent
    if not (given / "config.json").exists():
        names, run = _checkpoints_of(given), given
        if not names:
            raise CheckpointError(
                f"{given} is neither a checkpoint nor a run with one: it has no config.json. Give "
                "what `shortllm prune`, `heal`, `retrain` or `run` wrote"
            )
        directory = run / names[-1]
    require_there(str(directory.absolute()))
    if not steps_of(str(directory), read_json(directory / "config.json")):
        raise CheckpointError(
            f"{directory} was not written by shortllm: its config.json does not say what was done. "
            "Send it with: hf upload"
        )
    return directory, run if directory.resolve().name in _checkpoints_of(run) else None


def _checkpoints_of(run: Path) -> list[str]:
    """The names of the checkpoints of a run, the last one last; none where it is not a run."""
    from shortllm.reporting.load import load_results

    if not all((run / name).is_file() for name in ("run.json", "plan.json")):
        return []
    return load_results(run).checkpoints_in(run)


def _contents(directory: Path, run: Path | None, name: str) -> dict[str, Path | bytes]:
    """What is sent: path in the repository -> file or content."""
    from shortllm.surgery.derived import files_to_send

    found: dict[str, Path | bytes] = {
        file.as_posix(): directory / file for file in files_to_send(directory)
    }
    found[CARD] = card_of(directory, name, _measured(directory, run)).encode(errors="replace")
    for file in (run / one for one in RESULTS) if run else ():
        if file.is_file():
            is_json = file.suffix == ".json"
            found[f"results/{file.name}"] = _json_to_send(file) if is_json else file
    return found


def _measured(directory: Path, run: Path | None) -> Measured | None:
    """What a run measured of its checkpoint."""
    if run is None:
        return None
    from shortllm.reporting.load import load_results
    from shortllm.reporting.run_page import measured

    return measured(load_results(run), directory.resolve().name)


def _json_to_send(file: Path) -> bytes:
    return (json.dumps(sendable(read_json(file)), indent=1) + "\n").encode()


def _stale_weights(
    api: HfApi, repo: str, files: Collection[str], private: bool | None
) -> list[str]:
    """Weights in the repository that would be read instead of, or with, the new ones; says what
    else is there."""
    info = api.model_info(repo)
    if private and not info.private:
        raise OutputError(
            f"{repo} exists and is public. Make it private in its settings on the Hub, or choose "
            "another name"
        )
    present = {one.rfilename for one in info.siblings or ()} - MADE_BY_THE_HUB
    replaced, others = sorted(present & set(files)), sorted(present - set(files))
    stale = [path for path in others if is_weights(path)]
    kept = [path for path in others if path not in stale]
    if present:
        said = [
            f"{what} {listed(names)}"
            for what, names in (("replacing", replaced), ("deleting", stale), ("keeping", kept))
            if names
        ]
        log.warning("%s has files of an earlier commit: %s", repo, ", ".join(said))
    return stale


def _token(repo: str) -> str:
    """The token of the user; refused where nothing can be sent."""
    if not hub_answers():
        raise OutputError(
            f"nothing was sent to {repo}: {why_not_asked()}. Unset HF_HUB_OFFLINE or check the "
            "network, and run the same command again"
        )
    from huggingface_hub import get_token

    token = get_token()
    if token is None:
        raise OutputError(
            "not logged in to the Hub. Type `hf auth login`, or set HF_TOKEN to a token that may "
            "write"
        )
    return token


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Errors of the Hub as errors that say what to do."""
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    answers: dict[Any, str] = {
        401: "the Hub does not know the token. Type `hf auth login`",
        403: "the token may not write there. Choose a name of yours, or a token that may write",
    }
    try:
        yield
    except HFValidationError as error:
        raise OutputError(
            f"'{repo}' is not a possible name of a repository. Give OWNER/NAME"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = answers.get(status, f"the Hub answered {status} ({first_line_of(error)})")
        raise OutputError(f"nothing was sent to {repo}: {said}") from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise OutputError(
            f"nothing was sent to {repo}: the Hub cannot be reached ({first_line_of(error)}). Run "
            "the same command again"
        ) from error
