"""Time and memory of scoring, foretold from a checkpoint's headers and two seconds of measuring.

    operations  those of the passes a criterion needs, counted as their progress bars count them:
                ppl, kl      2 x block parameters x tokens x L(L+1)/2 block passes, and the head
                             for L+1 models
                taylor       2 x block parameters x tokens x 4 L, and the head twice
                influence .. 2 x block parameters x tokens x L
                greedy       a sum over rounds
    seconds     opening + computing + max(0, reading - computing)
                opening      bytes read to begin with / read rate: all, or of a streamed pass all
                             but the blocks
                computing    operations / (matrix rate x EFFICIENCY); of weights alone their
                             number / reducing rate
                reading      0, or of a streamed pass the bytes of the blocks x the number of times
                             they are read / read rate: hidden behind computing as far as it goes
    peak        libraries + weights in memory + hidden streams + what one call of a block, of its
                gradients or of the head takes beside them

Weights in memory are all of the model, or of a streamed pass those outside the blocks, one block,
and the next one being read. Experts count as if all of them were used, and blocks as if they could
be called one by one, which few types do not allow. Criteria on weights alone never build the model:
they read one block after the other and reduce it, at a rate of its own.


What a model is made of and what scoring it would take, without loading it.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shortllm import criteria
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tensors import TensorEntry, read_tensor
from shortllm.criteria.selection import Asked
from shortllm.pruning.scoring import WATCHED, Scorer
from shortllm.records import ModelInfo, Record

if TYPE_CHECKING:
    import torch

    from shortllm.model.decoder import Decoder


MATRIX_SECONDS = 1.0

READ_SECONDS = 0.7

REDUCE_SECONDS = 0.3
"""Time for each of the measurements; a single product or tensor may take longer."""

EFFICIENCY = {"cpu": 0.8}
"""Part of the probe's matrix rate that a pass reaches, by kind of device (benchmarks/)."""

OTHER_EFFICIENCY = 0.6

KEPT_TENSOR_BYTES = 32 * 2**20
"""Tensors below this size leave memory behind that the allocator keeps (of glibc; see malloc)."""

Options = Mapping[str, Mapping[str, Any]]

READINGS: dict[criteria.Needs, int] = {
    "weights": 1,
    "streams": 1,
    "last token": 1,
    "logits": 1,
    "gradients": 2,
}
"""How many times a pass goes through the blocks."""


class Probe(Record):
    """What a machine does, measured in about two seconds."""

    device: str
    dtype: str
    matrix_flops_per_s: float
    """Sustained rate of the product of one group of tokens with the largest matrix of a block."""
    read_bytes_per_s: float
    """Rate at which tensors of the checkpoint are read and checked, dropped from the system's cache
    before where the system allows it."""
    reduced_per_s: float
    """Weights per second of which the absolute values are summed up."""


class Estimate(Record):
    """What scoring by one of several criteria that need the same pass takes, one way."""

    criteria: list[str]
    streamed: bool
    flops: float
    peak_bytes: int
    """Resident memory of the process on a CPU; elsewhere memory of the device."""
    seconds: float | None
    """None without a probe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is scored, on what, and how."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    samples: int
    length: int
    options: Options
    """For a criterion its options, where they are not the defaults."""


def estimates(setting: Setting, probe: Probe | None) -> list[Estimate]:
    """Each kind of pass, with the model in memory and streamed.

    Raises:
        UnsupportedModelError: transformers cannot build the model type.
    """
    decoder = _weightless(setting)
    return [
        _estimate(setting, decoder, names, probe, streamed=streamed)
        for names in alike()
        for streamed in (False, True)
    ]


def alike() -> list[list[str]]:
    """Names of the criteria that look at the model, those that need the same pass together.

    Without searches: how long one goes on is not known before.
    """
    groups: dict[criteria.Needs, list[str]] = {}
    for name in criteria.names():
        needs = criteria.get(name).needs
        if needs not in ("nothing", "sets"):
            groups.setdefault(WATCHED[0] if needs in WATCHED else needs, []).append(name)
    return list(groups.values())


def probe_machine(setting: Setting) -> Probe:
    """Measure the matrix rate of the device and the rate of reading the checkpoint's files."""
    return Probe(
        device=str(setting.device),
        dtype=str(setting.dtype).removeprefix("torch."),
        matrix_flops_per_s=_matrix_rate(setting),
        read_bytes_per_s=_read_rate(setting.checkpoint),
        reduced_per_s=_reducing_rate(setting.checkpoint),
    )


def _estimate(
    setting: Setting,
    decoder: Decoder,
    names: list[str],
    probe: Probe | None,
    *,
    streamed: bool,
) -> Estimate:
    asked = Asked.of(names[0], dict(setting.options.get(names[0], {})))
    flops = _scorer(setting, decoder).work([asked])
    seconds = None
    if probe is not None:
        opening, reading = _read_bytes(setting, asked, streamed=streamed)
        computing = _computing(setting, asked, flops, probe)
        waiting = max(0.0, reading / probe.read_bytes_per_s - computing)
        seconds = opening / probe.read_bytes_per_s + computing + waiting
    return Estimate(
        criteria=names,
        streamed=streamed,
        flops=flops,
        peak_bytes=_peak_bytes(setting, decoder, asked, streamed=streamed),
        seconds=seconds,
    )


def _computing(setting: Setting, asked: Asked, flops: float, probe: Probe) -> float:
    """Seconds of a pass whose data is at hand."""
    if asked.needs == "weights":
        return sum(setting.checkpoint.parameters_per_block) / probe.reduced_per_s
    return flops / (probe.matrix_flops_per_s * _efficiency(setting.device))


def _weightless(setting: Setting) -> Decoder:
    """The decoder of a checkpoint without memory for its weights: enough to count by."""

    from shortllm.model.decoder import Decoder
    from shortllm.model.structure import build_empty

    class Weightless(Decoder):
        @property
        def device(self) -> torch.device:
            return setting.device

        def obstacle(self) -> str | None:
            return None  # it takes weights to find one

    return Weightless(build_empty(setting.checkpoint.config, dtype=setting.dtype))


def _scorer(setting: Setting, decoder: Decoder) -> Scorer:
    import torch

    ids_BT = torch.empty(setting.samples, setting.length, dtype=torch.long, device="meta")
    return Scorer(checkpoint=setting.checkpoint, open_decoder=lambda: decoder, ids_BT=ids_BT)


def _efficiency(device: torch.device) -> float:
    return EFFICIENCY.get(device.type, OTHER_EFFICIENCY)


def _read_bytes(setting: Setting, asked: Asked, *, streamed: bool) -> tuple[float, float]:
    """Bytes read before a pass, and during it."""
    total, blocks = setting.checkpoint.bytes, sum(setting.checkpoint.bytes_per_block)
    if asked.needs == "weights":
        return float(blocks), 0.0
    if not streamed:
        return float(total), 0.0
    inner = asked.inner() or asked
    count = setting.checkpoint.block_count
    rounds = 1 if inner is asked else asked.rounds(setting.checkpoint.info())
    depths = sum(count - done for done in range(rounds)) / count
    return float(total - blocks), READINGS[inner.needs] * depths * blocks


def _peak_bytes(setting: Setting, decoder: Decoder, asked: Asked, *, streamed: bool) -> int:
    """Memory at the worst moment: while the model is opened, or during a pass."""
    checkpoint, itemsize = setting.checkpoint, setting.dtype.itemsize
    one_block = max(checkpoint.bytes_per_block)
    base = _libraries(setting.device)
    if asked.needs == "weights":
        return base + one_block
    weights = itemsize * sum(p.numel() for p in decoder.model.parameters())
    in_blocks = itemsize * sum(p.numel() for p in decoder.blocks.parameters())
    opened, ahead = weights, 0
    mapped = checkpoint.bytes
    if streamed:
        opened, mapped = weights - in_blocks, checkpoint.bytes - sum(checkpoint.bytes_per_block)
        ahead = one_block + itemsize * max(checkpoint.parameters_per_block)
        ahead *= 2 if _kept_by_allocator(setting) else 1
    if setting.device.type != "cpu" or _same_type(setting):
        mapped = 0  # the copy on the device, or the mapped file itself, is what is held
    working = ahead + _streams(setting, decoder, asked, streamed=streamed)
    working += _working(setting, decoder, asked)
    return base + opened + max(mapped, working)


def _kept_by_allocator(setting: Setting) -> bool:
    """Whether the memory of a block that was let go is not given back."""
    largest = max(entry.bytes for entry in setting.checkpoint.block_weights(0))
    return setting.device.type == "cpu" and largest < KEPT_TENSOR_BYTES


def _same_type(setting: Setting) -> bool:
    from shortllm.model.loading import stored_dtype

    return stored_dtype(setting.checkpoint) == setting.dtype


def _streams(setting: Setting, decoder: Decoder, asked: Asked, *, streamed: bool) -> int:
    """Bytes of hidden streams, and of the copies that each batch enters the blocks with."""
    from shortllm.checkpoint.config import text_config
    from shortllm.model.walk import group_size

    needs = (asked.inner() or asked).needs
    width = int(text_config(setting.checkpoint.config).hidden_size)
    one = setting.length * width * setting.dtype.itemsize
    group = min(setting.samples, group_size(decoder, setting.length))
    walked = setting.samples if streamed else group
    depth = decoder.block_count + 1
    if needs == "logits":
        return one * (depth + 1) * walked
    if needs == "gradients":
        return one * (depth + 2) * setting.samples
    return one * 2 * walked


def _working(setting: Setting, decoder: Decoder, asked: Asked) -> int:
    """Bytes of one call at a time: of a block, or the gradients of one, or a slice of the head."""
    from shortllm.model.walk import CPU_LOSS_BYTES, GPU_GROUP_TOKENS, GPU_LOSS_BYTES, group_size

    needs, itemsize = (asked.inner() or asked).needs, setting.dtype.itemsize
    on_cpu = setting.device.type == "cpu"
    tokens = setting.length * min(setting.samples, group_size(decoder, setting.length))
    if needs == "logits" and not on_cpu:
        tokens = max(tokens, min(tokens * decoder.block_count, GPU_GROUP_TOKENS))
    outputs = max(
        sum(p.numel() // max(1, p.shape[-1]) for p in block.parameters() if p.ndim > 1)
        for block in decoder.blocks
    )
    call = tokens * outputs * itemsize
    if needs in WATCHED:
        return call
    loss = CPU_LOSS_BYTES if on_cpu else GPU_LOSS_BYTES
    loss = min(loss, setting.samples * setting.length * decoder.vocabulary * (itemsize + 8))
    if needs == "logits":
        return max(call, loss)
    largest = max(p.numel() for p in decoder.blocks.parameters())
    gradients = 4 * max(sum(p.numel() for p in block.parameters()) for block in decoder.blocks)
    return max(2 * call + gradients + largest * (itemsize + 4), loss)


def _libraries(device: torch.device) -> int:
    """What this process takes with everything imported and no model; nothing of a device."""
    import psutil

    return int(psutil.Process().memory_info().rss) if device.type == "cpu" else 0


def _matrix_rate(setting: Setting) -> float:
    """Operations per second of the product that a block spends most of its time in."""
    import torch

    from shortllm.model.walk import CPU_GROUP_TOKENS, GPU_GROUP_TOKENS

    device = setting.device
    rows, columns = _largest_matrix(setting.checkpoint)
    tokens = CPU_GROUP_TOKENS if device.type == "cpu" else GPU_GROUP_TOKENS
    weight = torch.randn(rows, columns, device=device).to(setting.dtype)
    stream = torch.randn(tokens, columns, device=device).to(setting.dtype)

    def product() -> None:
        torch.nn.functional.linear(stream, weight)[0, 0].item()  # waits for the device

    product()
    count, start = 0, time.perf_counter()
    while time.perf_counter() < start + MATRIX_SECONDS:
        product()
        count += 1
    return count * 2.0 * tokens * rows * columns / (time.perf_counter() - start)


def _largest_matrix(checkpoint: Checkpoint) -> tuple[int, int]:
    """Rows and columns of the largest matrix of block 0; of stacked experts those of one."""
    shapes = [entry.shape[-2:] for entry in checkpoint.block_weights(0) if len(entry.shape) > 1]
    rows, columns = max(shapes, key=lambda shape: shape[0] * shape[1])
    return rows, columns


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
    """Weights per second that a criterion on weights alone gets through."""
    from shortllm.model.metrics import reduce_powers

    largest = max(checkpoint.block_weights(0), key=lambda entry: entry.bytes)
    tensor = read_tensor(largest)
    count, start = 0, time.perf_counter()
    while time.perf_counter() < start + REDUCE_SECONDS:
        reduce_powers([tensor], power=1, over_weights="sum", over_block="sum")
        count += largest.elements
    return count / (time.perf_counter() - start)


def _drop_from_cache(entry: TensorEntry) -> None:
    """Have the system forget what it holds of a tensor's data, where it can be asked to."""
    if entry.offset is None or not hasattr(os, "posix_fadvise"):
        return
    with open(entry.file, "rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), entry.offset, entry.bytes, os.POSIX_FADV_DONTNEED)


class ModelSummary(Record):
    """`shortllm info` as data."""

    model: ModelInfo
    parameters_outside: int
    """Elements outside the blocks: embeddings, final norm, head."""
    bytes_per_block: list[int]
    protected: list[int]
    """Blocks that are protected by default."""
    samples: int
    length: int
    device: str
    dtype: str
    """Computation type."""
    probe: Probe | None
    estimates: list[Estimate]
    """Of each kind of pass, with the model in memory and streamed."""
    streamed: bool
    """Whether blocks would be read one at a time now, where nothing else is asked for."""
    why: str
    """Memory needed and free, which decides it."""

    def saved_by(self, blocks: int) -> tuple[float, float]:
        """Parts of the parameters and of the bytes that go with `blocks` average blocks."""
        share = blocks / self.model.blocks
        parameters = sum(self.model.parameters_per_block) * share / self.model.parameters
        return parameters, sum(self.bytes_per_block) * share / self.model.bytes


def summarize(
    checkpoint: Checkpoint,
    *,
    samples: int = 10,
    length: int = 128,
    device: str = "auto",
    dtype: str = "auto",
    options: Options | None = None,
    probe: bool = True,
) -> ModelSummary:
    """Sizes of a checkpoint's parts, and what it takes to score `samples` of `length` tokens.

    Args:
        options: for a criterion its options.
        probe: measure the machine for two seconds; without, no times are foretold.
    """
    from shortllm.model.loading import room_for, stored_dtype
    from shortllm.pruning.budget import Budget, protected_blocks
    from shortllm.runtime import choose_device, choose_dtype

    info = checkpoint.info()
    chosen = choose_device(device)
    setting = Setting(
        checkpoint=checkpoint,
        device=chosen,
        dtype=choose_dtype(dtype, chosen, stored_dtype(checkpoint)),
        samples=samples,
        length=length,
        options=options or {},
    )
    room = room_for(checkpoint, device=chosen, dtype=setting.dtype)
    measured = probe_machine(setting) if probe else None
    return ModelSummary(
        model=info,
        parameters_outside=info.parameters - sum(info.parameters_per_block),
        bytes_per_block=checkpoint.bytes_per_block,
        protected=protected_blocks(Budget(ratio=0.5), info),
        samples=samples,
        length=length,
        device=str(chosen),
        dtype=str(setting.dtype).removeprefix("torch."),
        probe=measured,
        estimates=estimates(setting, measured),
        streamed=not room.suffices,
        why=str(room),
    )
