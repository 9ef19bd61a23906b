"""One process at a time in a directory: a lock that ends with its process and says who holds it.

The lock is the system's own on the file `.shortllm.lock`, which stays; a killed process leaves
nothing to clean up. Libraries for locks do not tell who holds one, so the file says it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shortllm.errors import OutputError
from shortllm.files import explained, parsed_json

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
