"""Files that an index names: they must lie in the checkpoint's own directory.

An index comes with a download and is not trusted: a name such as `../other` or `/etc/passwd`, or a
link to such a place, would have a foreign file read and copied into a new checkpoint. The cache of
the Hub is the one layout whose links lead out of a directory, and rightly so:

    models--acme--tiny/snapshots/0123abcd/model-00001-of-00002.safetensors -> ../../blobs/5c5c...
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shortllm.errors import CheckpointError


def named_file(index: Path, name: Any, suffix: str) -> Path:
    """The file `name` beside an index.

    Args:
        suffix: what it must end with.
    Raises:
        CheckpointError: it is not there, lies or leads elsewhere, or is of another kind.
    """
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(
            f"{index} names a shard outside its own directory: {name!r}. It is not read; download "
            "the checkpoint again, from a source you trust"
        )
    if not name.endswith(suffix):
        raise CheckpointError(
            f"{index} names the shard {name!r}, which is no {suffix} file. Download it again"
        )
    path = index.parent / name
    real = _place(path)
    if real is None:
        raise CheckpointError(
            f"{index} names the shard {name}, which is not there. Finish the download of "
            f"{index.parent}"
        )
    if not any(real.is_relative_to(root) for root in _roots(index.parent)):
        raise CheckpointError(
            f"{index} names a shard outside its own directory: {name} is a link to {real}. It is "
            "not read; put the file itself in the place of the link if it belongs there"
        )
    return path


def _place(path: Path) -> Path | None:
    """Where a file really lies; None if there is none."""
    try:
        return path.resolve(strict=True) if path.is_file() else None
    except (OSError, RuntimeError, ValueError):  # too long a name, links in a circle, half letters
        return None


def _roots(directory: Path) -> list[Path]:
    """Where files of a checkpoint may lie: its directory, or the blobs of its Hub cache."""
    directory = directory.resolve()
    if directory.parent.name == "snapshots":
        return [directory, directory.parent.parent / "blobs"]
    return [directory]
