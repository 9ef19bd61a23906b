"""Atomic writes, one writer per directory, and fingerprints of what a file depends on.

Files are written under a temporary name and renamed, so no reader sees half a file. A directory
that a command writes into is locked by the operating system for as long as the process lives: a
killed process leaves nothing to clean up. The lock file `.shortllm.lock` says who has the lock.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from textwrap import shorten
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from shortllm.errors import OutputError
from shortllm.format import in_bytes

PARTIAL = ".partial"
"""Suffix of everything unfinished; files that have it may be deleted."""

LOCK = ".shortllm.lock"
"""Name of the lock file in a directory."""

ANOTHER = "choose another --out"
"""The hint for a place that cannot be written and that the user has named."""

LONGEST_CHOICE = 60
"""Characters of a choice that a message quotes."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a full quota, and a file that may not grow."""

NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON of `value`: equal for equal inputs, in every process."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


# ---- writing


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, `?` for half a character, so that no reader sees half a file."""
    write_bytes(path, text.encode(errors="replace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` so that no reader sees half a file."""
    with partial_file(path, needed_bytes=len(data)) as partial, open(partial, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def partial_file(path: Path, *, needed_bytes: int | None = None) -> Iterator[Path]:
    """A temporary name in the directory of `path`; what the body writes there becomes `path`."""
    with translate_os_errors(path.parent, needed_bytes=needed_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + PARTIAL)
        try:
            yield partial
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def partial_directory(target: Path, *, needed_bytes: int | None = None) -> Iterator[Path]:
    """An empty directory next to `target` that becomes `target` if the body ends without an error.

    A finished `target` is replaced. Leftovers of an interrupted write are removed first, and after
    an error the unfinished directory is removed too, so that its disk space is free again.
    """
    target = target.resolve()  # "." has no name, and a link cannot be swapped for a directory
    if Path.cwd().is_relative_to(target):
        raise OutputError(
            f"{target} cannot be replaced from inside. Choose another --out, or call from outside"
        )
    partial = target.with_name(target.name + PARTIAL)
    old = target.with_name(target.name + ".old" + PARTIAL)
    with (
        translate_os_errors(target.parent, needed_bytes=needed_bytes),
        _locked_new_directory(partial, target),
    ):
        shutil.rmtree(old, ignore_errors=True)
        yield partial
        if not target.exists():
            os.replace(partial, target)
            return
        os.replace(target, old)
        try:
            os.replace(partial, target)
        except BaseException:
            os.replace(old, target)
            raise
        shutil.rmtree(old)


def follow_umask(directory: Path) -> None:
    """Give all files below a directory the mode of new ones; safetensors makes theirs 0600."""
    probe = directory / f"mode{PARTIAL}"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)


@contextmanager
def _locked_new_directory(partial: Path, target: Path) -> Iterator[None]:
    """An empty directory `partial`, locked; the body may rename it to `target`."""
    if partial.is_dir():  # left by an interrupted write, unless its writer is still running
        leftover = _acquire(partial, target)
        shutil.rmtree(partial, ignore_errors=True)
        leftover.release()
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        raise _busy(target, partial / LOCK) from error
    lock = None
    try:
        lock = _acquire(partial, target)
        yield
        (target / LOCK).unlink(missing_ok=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            lock.release()


# ---- earlier results

_overwriting: ContextVar[bool] = ContextVar("overwriting", default=False)


@contextmanager
def overwriting(allowed: bool = True) -> Iterator[None]:
    """Allow finished results to be replaced by those of other choices within the context."""
    before = _overwriting.set(allowed or _overwriting.get())
    try:
        yield
    finally:
        _overwriting.reset(before)


def require_same_choices(path: Path, before: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse to replace a finished result by one of other choices, unless that is allowed.

    Args:
        before: the choices that the result at `path` was made with, as JSON.
        asked: those of now; only what both name is compared.
    """
    if _overwriting.get():
        return
    said = [
        f"{name}: {_quoted(old)}, now {_quoted(new)}"
        for name, old, new in _differences(before, asked)
        if new not in (None, "auto") and not isinstance(new, Mapping)  # defaults, not resolved yet
    ]
    raise OutputError(
        f"{path} is finished and was made with other choices ({'; '.join(said) or 'other inputs'})."
        " Choose another --out, or give --overwrite to replace it"
    )


def differs(before: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether two records of choices differ in what both name."""
    return any(_differences(before, asked))


def _differences(
    before: Mapping[str, Any], asked: Mapping[str, Any], at: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of every choice that both name and that differs."""
    for name in (name for name in before if name in asked):
        old, new = before[name], asked[name]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{at}{name}.")
        elif old != new:
            yield f"{at}{name}", old, new


def _quoted(value: Any) -> str:
    return shorten(json.dumps(value), LONGEST_CHOICE, placeholder="...")


# ---- errors of the operating system


@contextmanager
def translate_os_errors(
    directory: Path, *, needed_bytes: int | None = None, hint: str = ANOTHER
) -> Iterator[None]:
    """Turn errors of writing below `directory` into an OutputError that says what to do.

    `needed_bytes` is about how much was to be written; `hint` what to do other than make space.
    """
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        if _is_full(error):
            free = shutil.disk_usage(existing_parent(directory)).free
            needed = f", about {in_bytes(needed_bytes)} are needed" if needed_bytes else ""
            raise OutputError(
                f"no space left on the disk of {directory}: {in_bytes(free)} are free{needed}. "
                f"Nothing half-written was kept. Make space and run the same command again, or "
                f"{hint}"
            ) from error
        if isinstance(error, OSError) and error.errno in NO_PERMISSION:
            raise OutputError(
                f"no permission to write in {directory} ({error.strerror}). "
                f"{hint[:1].upper()}{hint[1:]}"
            ) from error
        raise


def _is_full(error: Exception) -> bool:
    """Whether something could not be written for lack of space.

    Libraries raise errors of their own: safetensors 0.8 quotes the system's words, torch 2.13
    complains that a file is shorter than what was written.
    """
    if isinstance(error, OSError):
        return error.errno in NO_SPACE
    text = str(error)
    from_torch = "PytorchStreamWriter failed" in text or "unexpected pos" in text
    return from_torch or any(os.strerror(number) in text for number in NO_SPACE)


def require_writable(directory: Path, needed_bytes: int = 0, *, hint: str = ANOTHER) -> None:
    """Check before heavy work that `directory` can be created and has `needed_bytes` free.

    `hint` says what to do other than make space.
    """
    parent, instead = existing_parent(directory), f"{hint[:1].upper()}{hint[1:]}"
    if not parent.is_dir():
        raise OutputError(f"cannot write to {directory}: {parent} is a file. {instead}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"no permission to write in {parent}. {instead}")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OutputError(
            f"not enough space on the disk of {directory}: {in_bytes(needed_bytes)} are needed, "
            f"{in_bytes(free)} are free. Make space and run the same command again, or {hint}"
        )


def require_file_target(path: Path) -> None:
    """Check before heavy work that the file `path` can be written."""
    if path.is_dir():
        raise OutputError(f"{path} is a directory; give a file such as {path / 'eval.json'}")
    require_writable(path.parent)


def require_no_file(directory: Path) -> None:
    """Refuse a file where a directory will be written."""
    if directory.is_file():
        raise OutputError(f"--out {directory} is a file. Give a directory")


def require_free(target: Path, record: str) -> None:
    """Refuse a target that contains anything but an earlier result, which contains `record`."""
    require_no_file(target)
    if target.is_dir() and any(target.iterdir()) and not (target / record).is_file():
        raise OutputError(f"{target} contains something else. Choose another --out, or delete it")


def existing_parent(path: Path) -> Path:
    """`path` or its nearest ancestor that exists."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if one.exists())


# ---- one writer per directory

_held: dict[Path, ExitStack] = {}
"""The directories this process has locked, and what is to be done when they are released."""

_interrupted: set[Path] = set()
"""Those of work that Ctrl-C ended."""


def hold(directory: Path) -> ExitStack:
    """Lock a directory, created if need be, until the nearest `releasing` around this call ends.

    Returns:
        What is closed then.
    """
    directory = directory.resolve()
    if directory not in _held:
        with translate_os_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            lock = _acquire(directory, directory)
        _held[directory] = ExitStack()
        _held[directory].callback(lock.release)
    return _held[directory]


@contextmanager
def releasing() -> Iterator[None]:
    """Unlock, at the end, every directory that was locked inside; also works as a decorator."""
    before = set(_held)
    try:
        yield
    except KeyboardInterrupt:
        _interrupted.update(set(_held) - before)
        raise
    finally:
        for directory in set(_held) - before:
            _held.pop(directory).close()


def can_resume() -> bool:
    """Whether Ctrl-C ended work in a directory, where the same command resumes it."""
    return bool(_interrupted)


def _acquire(directory: Path, shown: Path) -> BaseFileLock:
    """The lock of an existing directory, which messages call `shown`."""
    lock = FileLock(directory / LOCK, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise _busy(shown, directory / LOCK) from error
    if isinstance(lock, FileLock):  # on a disk without locks it became one with data of its own
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        who = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
        with suppress(OSError):  # on a full disk the file stays empty
            (directory / LOCK).write_text(json.dumps(who), encoding="utf-8")
    return lock


def _busy(target: Path, lock: Path) -> OutputError:
    """Says which process has the lock of `target`."""
    holder = "another process"
    with suppress(OSError, ValueError, LookupError, TypeError):  # it has only just started
        who = json.loads(lock.read_bytes())
        holder = f"process {who['process']} on {who['host']}, since {who['since']}"
    return OutputError(
        f"{target} is being written by {holder}. Wait for it, or choose another --out"
    )
