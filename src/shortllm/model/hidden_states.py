"""Where hidden streams are kept during a walk: in memory, or in a file above a limit."""

from __future__ import annotations

import errno
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shortllm.files import require_writable, translate_os_errors
from shortllm.runtime import available_memory

log = logging.getLogger(__name__)

SHARE_OF_FREE = 0.5
"""Part of the free memory that streams may take where no limit is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamMemory:
    """How much memory streams may take, and where they go beyond it."""

    limit: int | None = None
    """Bytes; None: half of what is free when they are made."""
    directory: Path | None = None
    """Where the file lies; None: the system's temporary directory."""

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for streams of `shape`, not initialised.

        On `device` if it fits within the limit there, else in main memory, else memory-mapped from
        a file that nobody else sees and that is gone with the tensor.

        Raises:
            OutputError: there is no space for the file.
        """
        size = math.prod(shape) * dtype.itemsize
        if self._fits(size, device):
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        if device.type != "cpu" and self._fits(size, torch.device("cpu")):
            return torch.empty(tuple(shape), dtype=dtype)
        return self._on_disk(shape, dtype, size)

    def _fits(self, size: int, device: torch.device) -> bool:
        if self.limit is not None:
            return size <= self.limit
        free = available_memory(device)
        return free is None or size <= SHARE_OF_FREE * free

    def _on_disk(self, shape: Sequence[int], dtype: torch.dtype, size: int) -> Tensor:
        directory = self.directory or Path(tempfile.gettempdir())
        with translate_os_errors(directory, needed_bytes=size, hint="raise --max-memory"):
            directory.mkdir(parents=True, exist_ok=True)
            require_writable(directory, size)
            log.info("streams of %.1f GiB are kept in a file in %s", size / 2**30, directory)
            handle, name = tempfile.mkstemp(prefix="streams-", suffix=".partial", dir=directory)
            try:
                _reserve(handle, size)
                flat = torch.from_file(name, shared=True, size=math.prod(shape), dtype=dtype)
            finally:
                os.close(handle)
                os.unlink(name)  # the mapping keeps the data; after a kill nothing is left behind
        return flat.view(tuple(shape))


def _reserve(handle: int, size: int) -> None:
    """Take the space of a file now: of a mapped one that runs out of it the process is killed."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
