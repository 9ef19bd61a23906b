"""Disks for tests: one that is soon full, and a directory that nobody can write in.

Both are real where the system lets a test mount something. Elsewhere files may not grow beyond a
limit, which fails like a full disk; and the directory is watched instead.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WAYS = ("small disk", "limit of a file")
"""How room is made scarce."""


def can_mount() -> bool:
    """Whether this process may mount file systems."""
    return os.name == "posix" and os.geteuid() == 0 and shutil.which("mount") is not None


def _mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


class SmallDisk:
    """A file system of its own, of a size that can be changed."""

    def __init__(self, place: Path, size: int) -> None:
        self.place = place
        place.mkdir()
        self.mounted = _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))

    def resize(self, size: int) -> None:
        """Make room, or take it."""
        assert _mount("-o", f"remount,size={size}", str(self.place))

    def free(self) -> int:
        return shutil.disk_usage(self.place).free

    def fill(self) -> Path:
        """Take all the room that is left; returns the file that holds it."""
        filler = self.place / "filler"
        with filler.open("wb", buffering=0) as stream:
            try:
                while True:
                    stream.write(b"\x00" * 4096)
            except OSError:
                return filler

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.place)], check=True)


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[SmallDisk | None]:
    """A disk of `size` bytes, mounted at `place`; None where nothing can be mounted."""
    if not can_mount():
        yield None
        return
    disk = SmallDisk(place, size)
    try:
        yield disk if disk.mounted else None
    finally:
        disk.close()


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Within the context no file of this process grows beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Within the context `directory` is mounted so that nothing in it can be written."""
    place = str(directory)
    mounted = can_mount() and _mount("--bind", place, place)
    if mounted and not _mount("-o", "remount,bind,ro", place):
        raise RuntimeError("a mount that cannot be made read-only")
    modes = {path: path.stat().st_mode for path in [directory, *directory.rglob("*")]}
    if not mounted:
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", place], check=True)
        else:
            for path, mode in modes.items():
                path.chmod(mode)


def listing(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below a directory: its mode, when it was changed, and what it holds."""
    return {
        str(path.relative_to(directory)): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(directory.rglob("*"))
    }
