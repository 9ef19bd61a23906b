"""The fingerprint of a checkpoint: changes with its config, its tensor table, and its weights.

Reading all of a large model takes minutes, so the weights count by samples. Training and healing
change every sample of the tensors that they change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path

from shortllm.checkpoint.tensors import TensorEntry

SAMPLE_BYTES = 4096
"""Bytes that go into a checkpoint's fingerprint at each sampled place."""

SAMPLE_STEP = 2**20
"""Distance of the sampled places in a file, besides both ends of each tensor."""


def content_fingerprint(directory: Path, tensors: Collection[TensorEntry]) -> str:
    """sha256 over the config, the tensor table, and samples of the data.

    The samples are both ends of every tensor and 4 KiB of every MiB of each file.
    """
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for entry in tensors:
        digest.update(f"{entry.name} {entry.dtype} {entry.shape}\n".encode())
    for file, places in _sampled_places(tensors).items():
        with open(file, "rb", buffering=0) as stream:
            for start, count in sorted(places):
                stream.seek(start)
                digest.update(stream.read(count))
    return digest.hexdigest()


def _sampled_places(entries: Iterable[TensorEntry]) -> dict[Path, set[tuple[int, int]]]:
    """Start and length of the samples for the fingerprint, by file of weights."""
    places: dict[Path, set[tuple[int, int]]] = {}
    spans: dict[Path, tuple[int, int]] = {}
    for entry in entries:
        found = places.setdefault(entry.file, set())
        if entry.offset is None:  # the place of the data in a pickled file is not known
            size = entry.file.stat().st_size
            spans[entry.file] = (0, size)
            # such a file ends with a checksum of each tensor
            found.add((max(0, size - SAMPLE_STEP), SAMPLE_STEP))
            continue
        start, stop = entry.offset, entry.offset + entry.bytes
        count = min(SAMPLE_BYTES, entry.bytes)
        found |= {(start, count), (stop - count, count)}
        first, last = spans.get(entry.file, (start, stop))
        spans[entry.file] = (min(first, start), max(last, stop))
    for file, (start, stop) in spans.items():
        places[file] |= {
            (place, min(SAMPLE_BYTES, stop - place)) for place in range(start, stop, SAMPLE_STEP)
        }
    return places
