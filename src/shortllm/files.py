"""Files that are whole or not there, and fingerprints of what made them.

One process at a time in a directory: a lock that ends with its process and says who holds it.

The lock is the system's own on the file `.shortllm.lock`, which stays; a killed process leaves
nothing to clean up. Libraries for locks do not tell who holds one, so the file says it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import socket
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shortllm.errors import OutputError

PARTIAL = ".partial"
"""Suffix of everything unfinished; whatever carries it may be deleted."""


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON of `value`: equal for equal inputs, in every process."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def checksum(path: Path) -> int:
    """A sum over the bytes of a file, by which damage is noticed, though not malice."""
    total = 0
    with open(path, "rb", buffering=0) as stream:
        while piece := stream.read(2**20):
            total = zlib.crc32(piece, total)
    return total


MAX_DEPTH = 100
"""Lists and objects within one another that a file may hold: far more than any has."""

MAX_NUMBER = 2**63
"""Whole numbers in result files and recipes stay below; readers of other languages count on it."""


def parsed_json(data: bytes | str, *, measured: bool = False) -> Any:
    """What a JSON text holds, in UTF-8.

    Args:
        measured: numbers must be finite and fit into 64 bits, as in every file of our own.
    Raises:
        ValueError: it is no JSON, holds such a number, or is nested so deep that whoever walks
            through it would fail.
    """
    try:
        content = json.loads(data if isinstance(data, str) else data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from error
    require_shallow(content)
    if measured:
        for value in leaves(content):
            require_sound(value)
    return content


def require_shallow(content: Any, *, most: int | None = None) -> None:
    """Refuse lists and dicts that are nested too deep, or hold more than `most` values, those that
    stand in several places counted in each.

    Raises:
        ValueError: saying which.
    """
    level, count = [content], 1
    for _ in range(MAX_DEPTH):
        level = [item for held in level for item in _items(held)]
        count += len(level)
        if most is not None and count > most:
            raise ValueError(f"it holds more than {most:,} values")
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def leaves(content: Any) -> Iterator[Any]:
    """Everything in nested lists and dicts that is neither, in any order."""
    held = [content]
    while held:
        one = held.pop()
        if isinstance(one, (list, dict)):
            held.extend(_items(one))
        else:
            yield one


def require_sound(value: Any) -> None:
    """Refuse a number that is not finite or has more than 64 bits, and text that is half a letter.

    Raises:
        ValueError: saying which.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no finite number")
    if isinstance(value, int) and abs(value) >= MAX_NUMBER:
        raise ValueError("a whole number in it has more than 64 bits")
    if isinstance(value, str):
        value.encode("utf-8")


def _items(held: Any) -> Iterable[Any]:
    """What stands in a list or a dict."""
    if isinstance(held, dict):
        return held.values()
    return held if isinstance(held, list) else ()


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8 so that no reader sees half a file."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to a sibling name, then rename it, so that no reader sees half a file."""
    with explained(path.parent, needed_bytes=len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + PARTIAL)
        try:
            with open(partial, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def partial_directory(target: Path, *, needed_bytes: int | None = None) -> Iterator[Path]:
    """A fresh directory beside `target` which becomes `target` when the body ends without an error.

    A finished `target` is replaced; leftovers of an earlier interrupted try are removed first.
    After an error the unfinished directory is removed as well, so the disk space comes back.

    Args:
        needed_bytes: about how much will be written, for the message where it does not fit.
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
    with explained(target.parent, needed_bytes=needed_bytes), _alone_in(partial, target):
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


@contextmanager
def _alone_in(partial: Path, target: Path) -> Iterator[None]:
    """An empty directory `partial` that no other process writes into meanwhile.

    Raises:
        OutputError: another process is writing the same target.
    """
    from shortllm.files import LOCK, lock

    if partial.is_dir():  # of an interrupted try, or of one that goes on
        stale = lock(partial, target)
        shutil.rmtree(partial, ignore_errors=True)
        if stale is not None:
            os.close(stale)
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        raise OutputError(
            f"{target} is being written by another process. Wait for it, or choose another --out"
        ) from error
    held = None
    try:
        held = lock(partial, target)
        yield
        (target / LOCK).unlink(missing_ok=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if held is not None:
            os.close(held)


ANOTHER = "choose another --out"
"""The way out of a place that cannot be written, where the user has named it."""


@contextmanager
def explained(
    directory: Path, *, needed_bytes: int | None = None, way_out: str = ANOTHER
) -> Iterator[None]:
    """Turn the system's write errors below `directory` into an OutputError to act on.

    Args:
        needed_bytes: about how much was to be written, if that is known.
        way_out: what to do beside making room.

    Raises:
        OutputError: no space, or no permission.
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
                f"Nothing half-written was kept. Make room and give the same command again, or "
                f"{way_out}"
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(
                f"no permission to write in {directory} ({error.strerror}). "
                f"{way_out[:1].upper()}{way_out[1:]}"
            ) from error
        raise


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a full quota, and a file that may not grow."""


def _is_full(error: Exception) -> bool:
    """Whether something could not be written for lack of space.

    Libraries have errors of their own for it: safetensors 0.8 gives the system's words, torch 2.13
    says of a file that it is shorter than what was written.
    """
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    text = str(error)
    said_by_torch = "PytorchStreamWriter failed" in text or "unexpected pos" in text
    return said_by_torch or any(os.strerror(number) in text for number in NO_ROOM)


def in_bytes(count: int) -> str:
    """A number of bytes for a message: '817 bytes', '35 KiB', '3,104 MiB'."""
    if count < 10 * 2**10:
        return f"{count} bytes"
    return f"{count / 2**10:.0f} KiB" if count < 10 * 2**20 else f"{count / 2**20:,.0f} MiB"


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
            f"not enough space on the disk of {directory}: {in_bytes(needed_bytes)} are needed, "
            f"{in_bytes(free)} are free. Make room and give the same command again, or {ANOTHER}"
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


try:
    import fcntl
except ImportError:  # without the call (Windows) directories are not locked
    fcntl = None  # type: ignore[assignment]

LOCK = ".shortllm.lock"

_held: dict[Path, int] = {}
"""Directories this process holds, and the descriptors of their locks."""


def hold(directory: Path) -> None:
    """Hold a directory, made if need be, until the nearest `releasing` around this call ends.

    Raises:
        OutputError: another process holds it, saying which and since when; or it cannot be written.
    """
    directory = directory.resolve()
    if fcntl is None or directory in _held:
        return
    with explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
    descriptor = lock(directory, directory)
    if descriptor is not None:
        _held[directory] = descriptor


def lock(directory: Path, asked: Path) -> int | None:
    """Lock a directory that is there, for as long as the descriptor that is returned stays open.

    Args:
        asked: what the message calls it.
    Returns:
        None where the system has no locks.
    Raises:
        OutputError: another process holds it, saying which and since when; or it cannot be written.
    """
    if fcntl is None:
        return None
    with explained(directory):
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 4096).decode(errors="replace")
        os.close(descriptor)
        raise OutputError(
            f"{asked} is being written by {_named(holder)}. Wait for it, or choose another --out"
        ) from error
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    who = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with suppress(OSError):  # on a full disk it does not say who
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(who).encode())
    return descriptor


def _named(holder: str) -> str:
    """Process, machine and time of a lock's file."""
    try:
        who = parsed_json(holder)
        return f"process {who['process']} on {who['host']}, since {who['since']}"
    except (ValueError, KeyError, TypeError):  # it has just begun
        return "another process"


@contextmanager
def releasing() -> Iterator[None]:
    """Let go, at the end, of every directory that was taken hold of within; also a decorator."""
    before = set(_held)
    try:
        yield
    finally:
        for directory in set(_held) - before:
            os.close(_held.pop(directory))
