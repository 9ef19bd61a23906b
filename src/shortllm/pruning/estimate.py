"""Time and memory of scoring, estimated from a checkpoint's headers and a probe of the machine.

    operations  those of the passes that a criterion needs, counted as their progress bars do:
                ppl, kl      2 x block parameters x tokens x L(L+1)/2 block passes, and the head
                             for L+1 models
                taylor       2 x block parameters x tokens x 4 L, and the head twice
                influence .. 2 x block parameters x tokens x L
                greedy       a sum over rounds
    seconds     opening + computing + max(0, reading - computing)
                opening      bytes read at first / read rate: all, or in a streamed pass all but
                             the blocks
                computing    operations / (matrix rate x EFFICIENCY); for criteria of weights alone
                             their number / reducing rate
                reading      0, or in a streamed pass bytes of the blocks x how often they are read
                             / read rate: overlaps with computing
    peak        libraries + weights in memory + hidden streams + the temporaries of one call of a
                block, of its gradients or of the head

Weights in memory are the whole model, or in a streamed pass those outside the blocks, one block,
and the next one being read. Experts count as if all were used, and blocks as if they could be
called one by one. Criteria of weights alone read one block after the other and reduce it.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from shortllm import criteria
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tensors import TensorEntry, read_tensor
from shortllm.criteria import OBSERVED, Criterion, resolve
from shortllm.options import accepts
from shortllm.pruning.scoring import Scorer
from shortllm.records import ModelInfo, Record, protected_in
from shortllm.runtime import DeviceOptions

if TYPE_CHECKING:
    import torch

    from shortllm.model.decoder import Decoder


EFFICIENCY = {"cpu": 0.8}
"""Part of the probe's matrix rate that a pass reaches, by kind of device (benchmarks/)."""

OTHER_EFFICIENCY = 0.6

KEPT_TENSOR_BYTES = 32 * 2**20
"""glibc's allocator keeps the memory of freed tensors below this size (see mallopt)."""

MATRIX_SECONDS, READ_SECONDS, REDUCE_SECONDS = 1.0, 0.7, 0.3
"""Time for each measurement of the probe; a single product or tensor may take longer."""


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


class Estimate(Record):
    """Cost of scoring by any of several criteria that need the same pass, in one of two ways."""

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
    options: Mapping[str, Mapping[str, Any]]
    """Options of criteria, by name; defaults where missing."""


def estimates(setting: Setting, probe: Probe | None) -> list[Estimate]:
    """Each kind of pass, with the model in memory and streamed."""
    decoder = _weightless(setting)
    groups: dict[criteria.Needs, list[str]] = {}
    for name in criteria.names():
        needs = criteria.get(name).needs
        if needs not in ("nothing", "sets"):  # how long a search takes is not known before
            groups.setdefault("streams" if needs in OBSERVED else needs, []).append(name)
    return [
        _estimate(setting, decoder, names, probe, streamed)
        for names in groups.values()
        for streamed in (False, True)
    ]


def _estimate(
    setting: Setting, decoder: Decoder, names: list[str], probe: Probe | None, streamed: bool
) -> Estimate:
    import torch

    criterion = resolve(names[0], setting.options.get(names[0]))
    ids_BT = torch.empty(setting.samples, setting.length, dtype=torch.long, device="meta")
    scorer = Scorer(checkpoint=setting.checkpoint, open_decoder=lambda: decoder, ids_BT=ids_BT)
    flops, seconds = scorer.work([criterion]), None
    if probe is not None:
        opening, reading = _read_bytes(setting, criterion, streamed)
        if criterion.needs == "weights":
            computing = sum(setting.checkpoint.parameters_per_block) / probe.reduced_per_s
        else:
            efficiency = EFFICIENCY.get(setting.device.type, OTHER_EFFICIENCY)
            computing = flops / (probe.matrix_flops_per_s * efficiency)
        waiting = max(0.0, reading / probe.read_bytes_per_s - computing)
        seconds = opening / probe.read_bytes_per_s + computing + waiting
    return Estimate(
        criteria=names,
        streamed=streamed,
        flops=flops,
        peak_bytes=_peak_bytes(setting, decoder, criterion, streamed),
        seconds=seconds,
    )


def _weightless(setting: Setting) -> Decoder:
    """The decoder of a checkpoint without memory for its weights: enough for counting."""
    from shortllm.checkpoint.structure import build_empty
    from shortllm.model.decoder import Decoder

    class Weightless(Decoder):
        @property
        def device(self) -> torch.device:
            return setting.device

        def obstacle(self) -> str | None:
            return None  # finding one takes weights

    return Weightless(build_empty(setting.checkpoint.config, dtype=setting.dtype))


def _read_bytes(setting: Setting, criterion: Criterion, streamed: bool) -> tuple[float, float]:
    """Bytes read before a pass, and during it."""
    checkpoint = setting.checkpoint
    total, blocks, count = checkpoint.bytes, sum(checkpoint.bytes_per_block), checkpoint.block_count
    if criterion.needs == "weights":
        return float(blocks), 0.0
    if not streamed:
        return float(total), 0.0
    rounds = criterion.rounds(checkpoint.info()) if criterion.removes_blocks else 1
    depths = sum(count - done for done in range(rounds)) / count
    readings = 2 if criterion.scored_by().needs == "gradients" else 1  # there and back
    return float(total - blocks), readings * depths * blocks


def _peak_bytes(setting: Setting, decoder: Decoder, criterion: Criterion, streamed: bool) -> int:
    """Memory at the worst moment: while the model is opened, or during a pass."""
    from shortllm.model.loading import stored_dtype

    checkpoint, itemsize = setting.checkpoint, setting.dtype.itemsize
    on_cpu, one_block = setting.device.type == "cpu", max(checkpoint.bytes_per_block)
    base = _resident_bytes() if on_cpu else 0
    if criterion.needs == "weights":
        return base + one_block
    opened = itemsize * sum(p.numel() for p in decoder.model.parameters())
    mapped, ahead = checkpoint.bytes, 0
    if streamed:
        opened -= itemsize * sum(p.numel() for p in decoder.blocks.parameters())
        mapped -= sum(checkpoint.bytes_per_block)
        ahead = one_block + itemsize * max(checkpoint.parameters_per_block)
        largest = max(entry.bytes for entry in checkpoint.block_weights(0))
        if on_cpu and largest < KEPT_TENSOR_BYTES:
            ahead *= 2  # the allocator does not return the memory of a freed block
    if not on_cpu or stored_dtype(checkpoint) == setting.dtype:
        mapped = 0  # only the copy on the device, or the mapped file itself, takes memory
    needs = criterion.scored_by().needs
    working = _streams(setting, decoder, needs, streamed) + _working(setting, decoder, needs)
    return base + opened + max(mapped, ahead + working)


def _streams(setting: Setting, decoder: Decoder, needs: criteria.Needs, streamed: bool) -> int:
    """Bytes of hidden streams, and of the copies that enter the first block."""
    from shortllm.checkpoint.config import text_config
    from shortllm.model.hidden_states import group_size

    width = int(text_config(setting.checkpoint.config).hidden_size)
    one = setting.length * width * setting.dtype.itemsize
    if needs == "gradients":
        return one * (decoder.block_count + 3) * setting.samples
    group = min(setting.samples, group_size(decoder, setting.length))
    walked = setting.samples if streamed else group
    return one * (decoder.block_count + 2 if needs == "logits" else 2) * walked


def _working(setting: Setting, decoder: Decoder, needs: criteria.Needs) -> int:
    """Bytes of one call at a time: of a block, or the gradients of one, or a slice of the head."""
    from shortllm.model.hidden_states import GPU_GROUP_TOKENS, group_size
    from shortllm.model.walk import CPU_LOSS_BYTES, GPU_LOSS_BYTES

    itemsize, on_cpu = setting.dtype.itemsize, setting.device.type == "cpu"
    tokens = setting.length * min(setting.samples, group_size(decoder, setting.length))
    if needs == "logits" and not on_cpu:
        tokens = max(tokens, min(tokens * decoder.block_count, GPU_GROUP_TOKENS))
    outputs = max(
        sum(p.numel() // max(1, p.shape[-1]) for p in block.parameters() if p.ndim > 1)
        for block in decoder.blocks
    )
    call = tokens * outputs * itemsize
    if needs in OBSERVED:
        return call
    loss = CPU_LOSS_BYTES if on_cpu else GPU_LOSS_BYTES
    loss = min(loss, setting.samples * setting.length * decoder.vocabulary * (itemsize + 8))
    if needs == "logits":
        return max(call, loss)
    largest = max(p.numel() for p in decoder.blocks.parameters())
    gradients = 4 * max(sum(p.numel() for p in block.parameters()) for block in decoder.blocks)
    return max(2 * call + gradients + largest * (itemsize + 4), loss)


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


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
    """For each kind of pass, with the model in memory and streamed."""
    streamed: bool
    """Whether scoring would read blocks one at a time now, by default."""
    why: str
    """Memory needed and free, on which that depends."""

    def saved_by(self, blocks: int) -> tuple[float, float]:
        """Parts of the parameters and of the bytes of `blocks` average blocks."""
        share = blocks / self.model.blocks
        parameters = sum(self.model.parameters_per_block) * share / self.model.parameters
        return parameters, sum(self.bytes_per_block) * share / self.model.bytes


@accepts(runtime=DeviceOptions)
def info(
    model: str,
    *,
    runtime: DeviceOptions,
    revision: str | None = None,
    samples: int = 10,
    length: int = 128,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    probe: bool = True,
) -> ModelSummary:
    """What a model consists of, which blocks can be removed, and what scoring it takes.

    Args:
        model: a checkpoint directory or Hub id.
        runtime: where to compute; its fields can be given as keywords.
        revision: of a Hub model.
        samples: calibration samples that the estimate is for.
        length: tokens of each of them.
        options: for a criterion its options, e.g. `{"greedy": {"rounds": 8}}`.
        probe: measure the machine for two seconds and read a few of the model's tensors. Otherwise
            only headers are read and no times are estimated.
    Returns:
        Blocks, parameters, bytes, and an estimate for each kind of pass.
    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        CriterionError: an unknown criterion or option.
        ShortLLMError: a device that is missing.
    """
    from shortllm.model.loading import room_for, stored_dtype
    from shortllm.runtime import choose_device, choose_dtype

    checkpoint = open_checkpoint(model, revision=revision)
    about = checkpoint.info()
    device = choose_device(runtime.device)
    setting = Setting(
        checkpoint=checkpoint,
        device=device,
        dtype=choose_dtype(runtime.dtype, device, stored_dtype(checkpoint)),
        samples=samples,
        length=length,
        options=options or {},
    )
    room = room_for(checkpoint, device=device, dtype=setting.dtype)
    measured = probe_machine(checkpoint, device, setting.dtype) if probe else None
    return ModelSummary(
        model=about,
        parameters_outside=about.parameters - sum(about.parameters_per_block),
        bytes_per_block=checkpoint.bytes_per_block,
        protected=protected_in(about),
        samples=samples,
        length=length,
        device=str(device),
        dtype=str(setting.dtype).removeprefix("torch."),
        probe=measured,
        estimates=estimates(setting, measured),
        streamed=not room.suffices,
        why=str(room),
    )
