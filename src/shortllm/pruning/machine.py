"""The rates of a machine on a model's own shapes: what times of scoring are estimated from."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tensors import TensorEntry, read_tensor
from shortllm.errors import UnsupportedModelError
from shortllm.records import Record

if TYPE_CHECKING:
    import torch

BLOCK_SECONDS, HEAD_SECONDS, TOKEN_SECONDS, READ_SECONDS = 0.7, 0.4, 0.2, 0.7
REDUCE_SECONDS, FLOAT64_SECONDS = 0.3, 0.2
"""Time for each measurement; a single call or tensor may take longer."""

OF_PRODUCTS = 0.8
"""Part of the rate of a large product that a pass reaches, where no block can be called alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is scored, on what, and how."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    samples: int
    length: int
    options: Mapping[str, Mapping[str, Any]]
    """Options of criteria, by name; defaults where missing."""


class MachineRates(Record):
    """Rates of a machine, measured in about three seconds."""

    device: str
    dtype: str
    block_flops_per_s: float
    """Sustained rate of calls of the first block on one group of samples."""
    head_flops_per_s: float
    """Sustained rate of logits and losses of one slice of tokens."""
    read_bytes_per_s: float
    """Rate of reading and checking tensors, dropped from the system's cache before if possible."""
    reduced_per_s: float
    """Weights per second whose absolute values are summed."""
    float64_flops_per_s: float
    """Rate of products in float64, on a CPU where the device has none."""
    token_s: float | None
    """Seconds for one token to pass through all blocks and the head; null where no block can be
    called alone."""


def measure_machine(setting: Setting) -> MachineRates:
    """Measure the rates of the device on the model's own shapes, and of reading its files."""
    blocks, head, token = _pass_rates(setting)
    return MachineRates(
        device=str(setting.device),
        dtype=str(setting.dtype).removeprefix("torch."),
        block_flops_per_s=blocks,
        head_flops_per_s=head,
        read_bytes_per_s=_read_rate(setting.checkpoint),
        reduced_per_s=_reducing_rate(setting.checkpoint),
        float64_flops_per_s=_float64_rate(setting),
        token_s=token,
    )


def _pass_rates(setting: Setting) -> tuple[float, float, float | None]:
    """Operations per second of calls of the first block, and of slices of the head; seconds for one
    token to pass through all blocks and the head."""
    import torch

    from shortllm.model.hidden_states import block_flops, group_size, head_flops
    from shortllm.model.metrics import next_token_nll
    from shortllm.model.streamed import open_streamed
    from shortllm.model.walk import slice_tokens, targets, token_slices

    try:
        decoder = open_streamed(setting.checkpoint, device=setting.device, dtype=setting.dtype)
        if decoder.obstacle() is not None:
            raise UnsupportedModelError("no block can be called alone")
    except UnsupportedModelError:
        rate = OF_PRODUCTS * _matrix_rate(setting)
        return rate, rate, None
    size = min(setting.samples, group_size(decoder, setting.length))
    ids_BT = torch.randint(decoder.vocabulary, (size, setting.length), device=setting.device)
    entry = decoder.enter(ids_BT)
    stream_BTD, one = entry.stream_BTD, decoder.enter(ids_BT[:1, :1])
    rows, columns = next(token_slices(ids_BT, slice_tokens(decoder)))
    target_N = targets(ids_BT, rows, columns)

    with torch.no_grad():
        for _ in decoder.through([0]):

            def block() -> None:
                decoder.apply(0, stream_BTD, entry.calls[0])[0, 0, 0].item()  # waits

            def one_token() -> None:
                decoder.apply(0, one.stream_BTD, one.calls[0])[0, 0, 0].item()

            block()
            blocks = _rate(block, block_flops(decoder, 0) * ids_BT.numel(), BLOCK_SECONDS)
            token = decoder.block_count / _rate(one_token, 1, TOKEN_SECONDS)
        with decoder.tail() as logits:

            def head() -> None:
                piece = logits(stream_BTD[rows, columns], ids_BT[rows, columns])
                next_token_nll(piece.flatten(0, 1), target_N).sum().item()

            def one_logits() -> None:
                logits(stream_BTD[:1, :1], ids_BT[:1, :1])[0, 0, 0].item()

            head()
            rate = _rate(head, head_flops(decoder) * len(target_N), HEAD_SECONDS)
            return blocks, rate, token + 1 / _rate(one_logits, 1, TOKEN_SECONDS)


def _matrix_rate(setting: Setting) -> float:
    """Operations per second of a product of the largest matrix of a block."""
    import torch

    from shortllm.model.hidden_states import CPU_GROUP_TOKENS, GPU_GROUP_TOKENS

    # of stacked experts the matrix of one
    entries = setting.checkpoint.block_weights(0)
    shapes = [entry.shape[-2:] for entry in entries if len(entry.shape) > 1]
    rows, columns = max(shapes, key=lambda shape: shape[0] * shape[1])
    tokens = CPU_GROUP_TOKENS if setting.device.type == "cpu" else GPU_GROUP_TOKENS
    weight = torch.randn(rows, columns, device=setting.device).to(setting.dtype)
    stream = torch.randn(tokens, columns, device=setting.device).to(setting.dtype)

    def product() -> None:
        torch.nn.functional.linear(stream, weight)[0, 0].item()  # waits for the device

    product()
    return _rate(product, 2.0 * tokens * rows * columns, BLOCK_SECONDS)


def _float64_rate(setting: Setting) -> float:
    """Operations per second of a product of tokens with themselves, as healing sums them up."""
    import torch

    device = torch.device("cpu") if setting.device.type == "mps" else setting.device
    tokens = torch.randn(512, 1024, dtype=torch.float64, device=device)

    def product() -> None:
        (tokens.T @ tokens)[0, 0].item()

    product()
    return _rate(product, 2.0 * 512 * 1024**2, FLOAT64_SECONDS)


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
