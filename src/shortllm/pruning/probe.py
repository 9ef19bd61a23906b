"""What a machine can do: a probe of about two seconds, from which scoring times are estimated."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tensors import TensorEntry, read_tensor
from shortllm.records import Record

if TYPE_CHECKING:
    import torch

MATRIX_SECONDS = 1.0
READ_SECONDS = 0.7
REDUCE_SECONDS = 0.3
"""Time for each of the measurements; a single product or tensor may take longer."""


class Probe(Record):
    """Rates of a machine, measured in about two seconds."""

    device: str
    dtype: str
    matrix_flops_per_s: float
    """Sustained rate of the product of one group of tokens with the largest matrix of a block."""
    read_bytes_per_s: float
    """Rate of reading and checking tensors, dropped from the system's cache before if possible."""
    reduced_per_s: float
    """Weights per second whose absolute values are summed."""


def probe_machine(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Probe:
    """Measure the matrix rate of the device and the rate of reading the checkpoint's files."""
    return Probe(
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        matrix_flops_per_s=_matrix_rate(checkpoint, device, dtype),
        read_bytes_per_s=_read_rate(checkpoint),
        reduced_per_s=_reducing_rate(checkpoint),
    )


def _matrix_rate(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the product that a block spends most of its time in."""
    import torch

    from shortllm.model.hidden_states import CPU_GROUP_TOKENS, GPU_GROUP_TOKENS

    # of stacked experts the matrix of one
    shapes = [entry.shape[-2:] for entry in checkpoint.block_weights(0) if len(entry.shape) > 1]
    rows, columns = max(shapes, key=lambda shape: shape[0] * shape[1])
    tokens = CPU_GROUP_TOKENS if device.type == "cpu" else GPU_GROUP_TOKENS
    weight = torch.randn(rows, columns, device=device).to(dtype)
    stream = torch.randn(tokens, columns, device=device).to(dtype)

    def product() -> None:
        torch.nn.functional.linear(stream, weight)[0, 0].item()  # waits for the device

    product()
    return _rate(product, 2.0 * tokens * rows * columns, MATRIX_SECONDS)


def _rate(call: Callable[[], object], work: float, seconds: float) -> float:
    """Work per second of repeated calls, each of which does `work`, over `seconds`."""
    count, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        call()
        count += 1
    return count * work / (time.perf_counter() - start)


def _read_rate(checkpoint: Checkpoint) -> float:
    """Bytes per second of tensors from all over the files, read as a streamed pass reads them."""
    from shortllm.model.loading import require_finite_tensor

    entries = list(checkpoint.tensors.values())
    seconds, count = 0.0, 0
    for entry in random.Random(0).sample(entries, len(entries)):
        _drop_from_cache(entry)
        start = time.perf_counter()
        require_finite_tensor(checkpoint.id, entry.name, read_tensor(entry))
        seconds += time.perf_counter() - start
        count += entry.bytes
        if seconds > READ_SECONDS:
            break
    return count / seconds


def _reducing_rate(checkpoint: Checkpoint) -> float:
    """Weights per second that a criterion of weights alone reduces."""
    from shortllm.model.metrics import reduce_powers

    largest = max(checkpoint.block_weights(0), key=lambda entry: entry.bytes)
    tensor = read_tensor(largest)
    reduce = partial(reduce_powers, [tensor], power=1, over_weights="sum", over_block="sum")
    return _rate(reduce, largest.elements, REDUCE_SECONDS)


def _drop_from_cache(entry: TensorEntry) -> None:
    """Drop a tensor's data from the system's cache, if the system allows it."""
    if entry.offset is None or not hasattr(os, "posix_fadvise"):
        return
    with open(entry.file, "rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), entry.offset, entry.bytes, os.POSIX_FADV_DONTNEED)
