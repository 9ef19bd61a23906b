"""Hidden states of calibration samples on their way through the blocks.

    groups = SampleGroups(decoder, ids_BT, memory)
    stream_BTD = groups.entering()                  what enters block 0, of all samples
    for b in decoder.through(range(decoder.block_count)):
        groups.apply(b, stream_BTD)                 in place, one group of samples at a time

Samples go through a block in groups: of enough tokens to keep the matrix unit busy, of few enough
to stay in a CPU's cache. `StreamMemory` decides where the hidden states of all samples are kept: on
the device, in main memory, or above a limit in a file.

Shapes: B samples, T tokens each, D width.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortllm.files import require_writable, translate_os_errors
from shortllm.model.decoder import Decoder, Entry, equal_arguments
from shortllm.runtime import available_memory

log = logging.getLogger(__name__)

SHARE_OF_FREE = 0.5
"""Part of the free memory that streams may take where no limit is given."""

CPU_GROUP_TOKENS = 512
GPU_GROUP_TOKENS = 8192
"""Tokens of one group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamMemory:
    """How much memory streams may take, and where larger ones are kept."""

    limit: int | None = None
    """Bytes; None: half of what is free at allocation."""
    directory: Path | None = None
    """Directory of the file; None: the system's temporary directory."""

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for streams of `shape`, not initialised.

        On `device` if it fits within the limit there, else in main memory, else in an unnamed file.
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
    """Reserve the space of a file: a process that writes to a mapped one without it is killed."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise


class SampleGroups:
    """Samples that go through the blocks of a model group by group."""

    def __init__(
        self,
        decoder: Decoder,
        ids_BT: Tensor,
        memory: StreamMemory | None = None,
        *,
        counted_BT: Tensor | None = None,
        size: int | None = None,
    ) -> None:
        """`counted_BT` are the tokens that count, for the caller; default: all. `size` is the
        number of samples of a group; default: as many as are fastest."""
        self.decoder = decoder
        self.ids_BT = ids_BT
        self.counted_BT = counted_BT
        self._memory = memory or StreamMemory()
        size = size or group_size(decoder, ids_BT.shape[1])
        self.rows = [slice(row, row + size) for row in range(0, len(ids_BT), size)]
        self.entries: list[Entry] = []
        for rows in self.rows:
            entry = decoder.enter(ids_BT[rows])
            for first in self.entries[:1]:  # groups with equal calls share them in memory
                if equal_arguments(_arguments(first), _arguments(entry), opaque=False):
                    entry = Entry(entry.ids_BT, entry.stream_BTD, first.calls)
            self.entries.append(entry)

    def __iter__(self) -> Iterator[tuple[slice, Entry]]:
        """Each group's samples, and how the blocks are called on it."""
        return zip(self.rows, self.entries, strict=True)

    def allocate(self, *leading: int) -> Tensor:
        """Memory for the streams of all samples, `[*leading, B, T, D]`, not initialised."""
        shape = (*leading, len(self.ids_BT), *self.entries[0].stream_BTD.shape[1:])
        return self._memory.allocate(shape, self.decoder.stream_dtype, self.decoder.device)

    def entering(self, stream_BTD: Tensor | None = None) -> Tensor:
        """The stream entering block 0, `[B, T, D]`; written into `stream_BTD` where it is given."""
        stream_BTD = self.allocate() if stream_BTD is None else stream_BTD
        for rows, entry in self:
            stream_BTD[rows] = entry.stream_BTD
        return stream_BTD

    def after(self, b: int, stream_BTD: Tensor, group: int) -> Tensor:
        """The stream of one group after block `b`; `stream_BTD` is that of all samples before."""
        before_BTD = stream_BTD[self.rows[group]].to(self.decoder.device)
        return self.decoder.apply(b, before_BTD, self.entries[group].calls[b])

    def apply(self, b: int, stream_BTD: Tensor, *, keep: bool = True) -> None:
        """Take the stream of all samples through block `b`, in place; or only run it."""
        for group, rows in enumerate(self.rows):
            after_BTD = self.after(b, stream_BTD, group)
            if keep:
                stream_BTD[rows] = after_BTD.to(stream_BTD)


def group_size(decoder: Decoder, length: int) -> int:
    """Samples of a group."""
    tokens = CPU_GROUP_TOKENS if decoder.device.type == "cpu" else GPU_GROUP_TOKENS
    return max(1, tokens // length)


def _arguments(entry: Entry) -> list[Any]:
    """What the blocks are called with besides the stream."""
    return [(call.args, call.kwargs) for call in entry.calls]


def block_flops(decoder: Decoder, b: int) -> float:
    """Multiplications and additions with the weights of block `b`, per token."""
    return 2.0 * sum(parameter.numel() for parameter in decoder.blocks[b].parameters())


def head_flops(decoder: Decoder) -> float:
    """Multiplications and additions of the head, per token."""
    return 2.0 * decoder.head_elements
