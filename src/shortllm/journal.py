"""Progress of a long pass, on disk, so that an interrupted one resumes where it was.

A journal is a directory: tensors, one file each, and `position.json`, which is written last and
says how far they go. It carries the fingerprint of the work, so that a journal of other work is
never taken for this one. Writing costs at most about a tenth of the time of the work.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm.files import PARTIAL, translate_os_errors, write_text

if TYPE_CHECKING:
    from torch import Tensor

MIN_INTERVAL_S = 5.0
"""Seconds of work between two commits, at least."""

WORK_PER_COMMIT = 10
"""Seconds of work for each second that the last commit took."""


class Journal:
    """Progress of one piece of work; without a directory nothing is kept."""

    def __init__(self, directory: Path | None, fingerprint: str) -> None:
        self._directory = directory
        self._fingerprint = fingerprint
        self._cost_s = 0.0
        self._last = time.monotonic()
        self._held = self._read() if directory is not None else None

    def part(self, name: str) -> Journal:
        """The journal of a part of this work."""
        directory = None if self._directory is None else self._directory / name
        return Journal(directory, self._fingerprint)

    def position(self) -> dict[str, Any] | None:
        """The last committed position; None if there is none."""
        return None if self._held is None else self._held["position"]

    def tensor(self, name: str) -> Tensor:
        """A tensor of the last commit."""
        from safetensors.torch import load_file

        assert self._directory is not None and self._held is not None
        tensor: Tensor = load_file(self._directory / self._held["files"][name])["tensor"]
        return tensor

    def due(self) -> bool:
        """Whether enough was done since the last commit for another to be worth its time."""
        if self._directory is None:
            return False
        interval = max(MIN_INTERVAL_S, WORK_PER_COMMIT * self._cost_s)
        return time.monotonic() - self._last >= interval

    def commit(
        self,
        position: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        keep: Collection[str] = (),
    ) -> None:
        """Write how far the work is, completely or not at all.

        Args:
            tensors: what is needed to resume from there.
            keep: names of tensors of the last commit that are still needed; the others are deleted.
        """
        from safetensors.torch import save_file

        if self._directory is None:
            return
        started = time.monotonic()
        with translate_os_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            number = 0 if self._held is None else self._held["number"] + 1
            before = {} if self._held is None else self._held["files"]
            files = {name: before[name] for name in keep}
            for name, tensor in tensors.items():
                files[name] = f"{name}-{number}.safetensors"
                save_file({"tensor": tensor.cpu().contiguous()}, self._directory / files[name])
            self._held = {
                "fingerprint": self._fingerprint,
                "number": number,
                "position": dict(position),
                "files": files,
            }
            write_text(self._directory / "position.json", json.dumps(self._held))
            for name in set(before.values()) - set(files.values()):
                (self._directory / name).unlink(missing_ok=True)
        self._cost_s = time.monotonic() - started
        self._last = time.monotonic()

    def discard(self) -> None:
        """Delete it: the work is done."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._held = None

    def _read(self) -> dict[str, Any] | None:
        """The last whole commit of this work; other work and damaged commits are deleted."""
        from safetensors import safe_open

        assert self._directory is not None
        file = self._directory / "position.json"
        if not file.exists():
            return None
        with suppress(Exception):  # a damaged journal is ignored
            held: dict[str, Any] = json.loads(file.read_bytes())
            for name in held["files"].values():
                with safe_open(self._directory / name, framework="pt"):
                    pass  # reads the header and compares it with the length of the file
            if held["fingerprint"] == self._fingerprint:
                return held
        shutil.rmtree(self._directory, ignore_errors=True)
        return None


def journal_directory(out: Path) -> Path:
    """Where a run directory keeps the journals of its scores."""
    return out / f"scoring{PARTIAL}"
