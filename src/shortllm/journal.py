"""What a long pass has done so far, on disk, so that an interrupted one goes on where it was.

A journal is a directory: tensors, one file each, and `position.json`, which is written last and
says how far they go. It carries the fingerprint of the work, so that what another work left behind
is not taken for this one's, and a sum over every file, so that what was damaged since is begun
again. Writing costs at most about a tenth of the time of the work.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm.files import PARTIAL, checksum, explained, fingerprint, parsed_json, write_text

if TYPE_CHECKING:
    from torch import Tensor

MIN_INTERVAL_S = 5.0
"""Work between two writings, at the least."""

WORK_PER_WRITING = 10
"""Seconds of work for each second that the last writing took."""


class Journal:
    """Progress of one piece of work; without a directory it remembers nothing."""

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
        """What was last committed; None if there is nothing."""
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
        interval = max(MIN_INTERVAL_S, WORK_PER_WRITING * self._cost_s)
        return time.monotonic() - self._last >= interval

    def commit(
        self,
        position: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        keep: Collection[str] = (),
    ) -> None:
        """Write how far the work is.

        Args:
            tensors: what it takes to go on from there.
            keep: names of tensors of the last commit that are still needed; others are deleted.
        Raises:
            OutputError: it cannot be written.
        """
        from safetensors.torch import save_file

        if self._directory is None:
            return
        started = time.monotonic()
        with explained(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            number = 0 if self._held is None else self._held["number"] + 1
            before = {} if self._held is None else self._held["files"]
            files = {name: before[name] for name in keep}
            sums = {} if self._held is None else self._held["sums"]
            for name, tensor in tensors.items():
                files[name] = f"{name}-{number}.safetensors"
                save_file({"tensor": tensor.cpu().contiguous()}, self._directory / files[name])
                sums[files[name]] = checksum(self._directory / files[name])
            self._held = {
                "fingerprint": self._fingerprint,
                "number": number,
                "position": dict(position),
                "files": files,
                "sums": {name: sums[name] for name in files.values()},
            }
            sealed = {"held": self._held, "seal": _seal(self._held)}
            write_text(self._directory / "position.json", json.dumps(sealed))
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
        """The last whole commit of this work; that of another is deleted."""
        assert self._directory is not None
        file = self._directory / "position.json"
        if not file.exists():
            return None
        try:
            content = parsed_json(file.read_bytes())
            held = content["held"]
            whole = content["seal"] == _seal(held) and held["fingerprint"] == self._fingerprint
            if whole and all(
                checksum(self._directory / name) == expected
                for name, expected in held["sums"].items()
            ):
                return held  # type: ignore[no-any-return]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        shutil.rmtree(self._directory, ignore_errors=True)
        return None


def _seal(held: dict[str, Any]) -> str:
    """A sum over what position.json says, as it will be read back."""
    return fingerprint(json.loads(json.dumps(held)))


def journal_directory(out: Path) -> Path:
    """Where the journals of the scores of a run directory lie."""
    return out / f"scoring{PARTIAL}"
