"""Write tensors into safetensors shards of bounded size, straight from the files that hold them."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

import numpy as np

from shortllm.checkpoint.tensors import (
    SAFETENSORS,
    SAFETENSORS_INDEX,
    Cut,
    TensorEntry,
    pickled_bytes,
    read_all,
    write_json,
)

MAX_SHARD_BYTES = 5 * 10**9
"""Largest shard, as transformers writes it by default."""

CHUNK_BYTES = 64 * 2**20
"""Bytes per copy call, so that progress is shown in between."""

PAGE_BYTES = 4096
"""Unit in which the kernel keeps files in memory."""

BUFFER_BYTES = 2**18
"""Bytes per read if the kernel cannot copy by itself; fits a processor's cache.

Larger writes make ext4 look for larger pieces of free memory, which can take five times longer.
"""

Advance = Callable[[int], None]


def write_tensors(
    directory: Path,
    entries: dict[str, TensorEntry],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Advance = lambda copied: None,
) -> None:
    """Write `new name -> stored tensor`, in this order, as one file or as shards and an index."""
    shards = list(_cut(entries, max_shard_bytes))
    if len(shards) == 1:
        _write_shard(directory / SAFETENSORS, shards[0], advance)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / name, shard, advance)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(entry.bytes for entry in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / SAFETENSORS_INDEX, index)


def _cut(entries: dict[str, TensorEntry], limit: int) -> Iterator[dict[str, TensorEntry]]:
    """Consecutive groups of at most `limit` bytes (more only for a single larger tensor)."""
    shard: dict[str, TensorEntry] = {}
    size = 0
    for name, entry in entries.items():
        if shard and size + entry.bytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = entry
        size += entry.bytes
    yield shard


def _write_shard(path: Path, shard: dict[str, TensorEntry], advance: Advance) -> None:
    """One safetensors file: length of the header, header, data."""
    # wider types first, so that every tensor starts at a multiple of its item size
    ordered = sorted(shard.items(), key=lambda item: -item[1].item_bytes)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, entry in ordered:
        end = position + entry.bytes
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (_data_start([entry for _, entry in ordered], 8 + len(text)) - 8 - len(text))
    with open(path, "wb", buffering=0) as out:
        _write_all(out, memoryview(len(text).to_bytes(8, "little") + text))
        for run in _runs([entry for _, entry in ordered]):
            if run[0].cut is not None:
                _copy_part(run[0], run[0].cut, out, advance)
            else:
                _copy_bytes(run[0], 0, sum(entry.bytes for entry in run), out, advance)


def _data_start(entries: list[TensorEntry], least: int) -> int:
    """Where the data begins in the new file: at `least` or up to a page after it.

    Most bytes then keep their place within a page: the kernel moves whole pages, a third faster.
    """
    votes: dict[int, int] = {}
    position = 0
    for entry in entries:
        if entry.offset is not None:
            shift = (entry.offset - position) % PAGE_BYTES
            votes[shift] = votes.get(shift, 0) + entry.bytes
        position += entry.bytes
    start = least + -least % 8
    best = max(votes, key=lambda shift: votes[shift], default=start)
    return start if best % 8 else start + (best - start) % PAGE_BYTES


def _runs(entries: list[TensorEntry]) -> Iterator[list[TensorEntry]]:
    """Consecutive entries whose data is contiguous in one file: copied as one range."""
    run: list[TensorEntry] = []
    for entry in entries:
        if run and not _adjacent(run[-1], entry):
            yield run
            run = []
        run.append(entry)
    if run:
        yield run


def _adjacent(one: TensorEntry, other: TensorEntry) -> bool:
    if one.offset is None or one.cut or other.cut or one.file != other.file:
        return False
    return one.offset + one.bytes == other.offset


def _copy_part(entry: TensorEntry, cut: Cut, out: FileIO, advance: Advance) -> None:
    """Append the part of one tensor to `out`; many short rows are read at once."""
    part_bytes = sum(stop - first for first, stop in cut.ranges)
    rows = entry.bytes // part_bytes
    together = BUFFER_BYTES // cut.row_bytes
    if together < 2:
        for row in range(rows):
            for first, stop in cut.ranges:
                _copy_bytes(entry, row * cut.row_bytes + first, stop - first, out, advance)
        return
    for row in range(0, rows, together):
        count = min(together, rows - row)
        data = _read(entry, row * cut.row_bytes, count * cut.row_bytes)
        table = np.frombuffer(data, np.uint8).reshape(count, cut.row_bytes)
        kept = np.concatenate([table[:, first:stop] for first, stop in cut.ranges], axis=1)
        _write_all(out, memoryview(kept.tobytes()))
        advance(count * part_bytes)


def _read(entry: TensorEntry, start: int, count: int) -> memoryview:
    """`count` bytes of a tensor's file data from its byte `start` on."""
    if entry.offset is None:
        return pickled_bytes(entry)[start : start + count]
    with open(entry.file, "rb", buffering=0) as source:
        source.seek(entry.offset + start)
        data = memoryview(bytearray(count))
        read_all(source, data)
    return data


def _copy_bytes(entry: TensorEntry, start: int, count: int, out: FileIO, advance: Advance) -> None:
    """Append `count` bytes of the file, from byte `start` of a tensor on, to `out`."""
    if entry.offset is None:
        _write_all(out, _read(entry, start, count))
        advance(count)
        return
    copy_range(entry.file, entry.offset + start, count, out, advance)


def copy_range(path: Path, start: int, count: int, out: FileIO, advance: Advance) -> None:
    """Append `count` bytes of a file from byte `start` on to `out`."""
    with open(path, "rb", buffering=0) as source:
        source.seek(start)
        while count:
            copied = _copy_some(source, out, min(count, CHUNK_BYTES))
            count -= copied
            advance(copied)


def _copy_some(source: FileIO, out: FileIO, count: int) -> int:
    """Move up to `count` bytes between the files' positions, inside the kernel if it is faster."""
    aligned = (source.tell() - out.tell()) % PAGE_BYTES == 0
    if aligned and hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(source.fileno(), out.fileno(), count)
            if copied:
                return copied
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                raise
    buffer = memoryview(bytearray(BUFFER_BYTES))
    remaining = count
    while remaining:
        part = buffer[: min(remaining, BUFFER_BYTES)]
        read_all(source, part)
        _write_all(out, part)
        remaining -= len(part)
    return count


def _write_all(out: FileIO, data: memoryview) -> None:
    """Write all of `data`: one unbuffered write moves at most 2 GiB and may stop earlier."""
    while data:
        data = data[out.write(data) or 0 :]
