"""Files that are whole or not there, and fingerprints of what made them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shortllm.errors import OutputError

PARTIAL = ".partial"
"""Suffix of everything unfinished; whatever carries it may be deleted."""


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON of `value`: equal for equal inputs, in every process."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8 so that no reader sees half a file."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to a sibling name, then rename it, so that no reader sees half a file."""
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + PARTIAL)
        with open(partial, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)


@contextmanager
def partial_directory(target: Path) -> Iterator[Path]:
    """A fresh directory beside `target` which becomes `target` when the body ends without an error.

    A finished `target` is replaced; leftovers of an earlier interrupted try are removed first.
    After an error the unfinished directory is removed as well, so the disk space comes back.

    Raises:
        OutputError: it cannot be written, or is or holds the present working directory.
    """
    target = target.resolve()  # "." has no name, and a link cannot be swapped for a directory
    if Path.cwd().is_relative_to(target):  # whoever stands in it would be left in a deleted one
        raise OutputError(
            f"{target} cannot be replaced from inside. Choose another --out, or call from outside"
        )
    partial = target.with_name(target.name + PARTIAL)
    old = target.with_name(target.name + ".old" + PARTIAL)
    with explained(target.parent):
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            if target.exists():
                os.replace(target, old)
                os.replace(partial, target)
                shutil.rmtree(old)
            else:
                os.replace(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def explained(directory: Path) -> Iterator[None]:
    """Turn the system's write errors below `directory` into one to act on.

    Raises:
        OutputError: no space, or no permission.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(existing_parent(directory)).free
            raise OutputError(
                f"no space left in {directory}: {free / 2**20:.0f} MiB are free. "
                "Free some space or choose another --out"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(
                f"no permission to write in {directory} ({error.strerror}). Choose another --out"
            ) from error
        raise


def require_writable(directory: Path, needed_bytes: int = 0) -> None:
    """Check before heavy work that `directory` can be made, written, and has `needed_bytes` free.

    Raises:
        OutputError: a file in the way, no permission, or too little space.
    """
    parent = existing_parent(directory)
    if not parent.is_dir():
        raise OutputError(f"cannot write to {directory}: {parent} is a file. Choose another --out")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"no permission to write in {parent}. Choose another --out")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OutputError(
            f"{directory} needs {needed_bytes / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free "
            "there. "
            "Free some space or choose another --out"
        )


def require_file_target(path: Path) -> None:
    """Check before heavy work that the file `path` can be written.

    Raises:
        OutputError: it is a directory, or see `require_writable`.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a directory; give a file such as {path / 'eval.json'}")
    require_writable(path.parent)


def existing_parent(path: Path) -> Path:
    """`path` or its nearest ancestor that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
