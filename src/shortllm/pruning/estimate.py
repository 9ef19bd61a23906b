"""Time and memory of scoring, from headers and the measured rates of the machine.

    operations  those of the passes that a criterion needs, counted as their progress bars do:
                ppl, kl      2 x block parameters x tokens x L(L+1)/2 block passes, and the head
                             for L+1 models
                taylor       2 x block parameters x tokens x 4 L, and the head twice
                influence .. 2 x block parameters x tokens x L
                greedy       a sum over rounds
    seconds     opening + computing + max(0, reading - computing)
                opening      bytes read at first / read rate: all, or in a streamed pass all but
                             the blocks
                computing    operations of blocks / rate of a block + those of the head / rate of
                             the head; for criteria of weights alone their number / reducing rate
                reading      0, or in a streamed pass bytes of the blocks x how often they are read
                             / read rate: overlaps with computing
    peak        libraries + weights in memory + hidden streams + the temporaries of one call of a
                block, of its gradients or of the head

Weights in memory are the whole model, or in a streamed pass those outside the blocks, one block,
and the next one being read. Experts count as if all were used, and blocks as if they could be
called one by one. Criteria of weights alone read one block after the other and reduce it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shortllm import criteria
from shortllm.calls import accepts
from shortllm.checkpoint.experts import Experts, experts_of
from shortllm.checkpoint.hub import ModelSource
from shortllm.checkpoint.references import Reference
from shortllm.checkpoint.source import open_checkpoint
from shortllm.criteria import OBSERVED, Criterion, resolve
from shortllm.pruning.advice import before_removal
from shortllm.pruning.estimate_stages import StageEstimate, stage_estimates
from shortllm.pruning.machine import MachineRates, Setting, measure_machine
from shortllm.pruning.scoring import Scorer
from shortllm.records import ModelInfo, PredictionHeads, Record, protected_in
from shortllm.runtime import DeviceOptions
from shortllm.surgery.companions import companions_of

if TYPE_CHECKING:
    import torch

    from shortllm.model.decoder import Decoder


KEPT_TENSOR_BYTES = 32 * 2**20
"""glibc's allocator keeps the memory of freed tensors below this size (see mallopt)."""


class Estimate(Record):
    """Cost of scoring by any of several criteria that need the same pass, in one of two ways."""

    criteria: list[str]
    streamed: bool
    flops: float
    peak_bytes: int
    """Resident memory of the process on a CPU; elsewhere memory of the device."""
    seconds: float | None
    """None without a probe."""


def estimates(setting: Setting, decoder: Decoder, rates: MachineRates | None) -> list[Estimate]:
    """Each kind of pass, with the model in memory and streamed."""
    groups: dict[criteria.Needs, list[str]] = {}
    for name in criteria.names():
        needs = criteria.get(name).needs
        # how long a search takes, and how long the questions of a task are, is not known before
        if needs not in ("nothing", "sets", "choices"):
            groups.setdefault("streams" if needs == "last token" else needs, []).append(name)
    return [
        _estimate(setting, decoder, names, rates, streamed)
        for names in groups.values()
        for streamed in (False, True)
    ]


def _estimate(
    setting: Setting, decoder: Decoder, names: list[str], rates: MachineRates | None, streamed: bool
) -> Estimate:
    import torch

    criterion = resolve(names[0], setting.options.get(names[0]))
    ids_BT = torch.empty(setting.samples, setting.length, dtype=torch.long, device="meta")
    scorer = Scorer(checkpoint=setting.checkpoint, open_decoder=lambda: decoder, ids_BT=ids_BT)
    flops, seconds = scorer.work([criterion]), None
    if rates is not None:
        opening, reading = _read_bytes(setting, criterion, streamed)
        if criterion.needs == "weights":
            computing = sum(setting.checkpoint.parameters_per_block) / rates.reduced_per_s
        else:
            in_blocks = scorer.work([criterion], head=False)
            computing = in_blocks / rates.block_flops_per_s
            computing += (flops - in_blocks) / rates.head_flops_per_s
        waiting = max(0.0, reading / rates.read_bytes_per_s - computing)
        seconds = opening / rates.read_bytes_per_s + computing + waiting
    return Estimate(
        criteria=names,
        streamed=streamed,
        flops=flops,
        peak_bytes=_peak_bytes(setting, decoder, criterion, streamed),
        seconds=seconds,
    )


def weightless(setting: Setting) -> Decoder:
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
    all_depths = needs in ("logits", "similarities")
    return one * (decoder.block_count + 2 if all_depths else 2) * walked


def _working(setting: Setting, decoder: Decoder, needs: criteria.Needs) -> int:
    """Bytes of one call at a time: of a block, or the gradients of one, or a slice of the head."""
    from shortllm.model.hidden_states import GPU_GROUP_TOKENS, group_size
    from shortllm.model.walk import CPU_LOSS_BYTES, FEWEST_TOKENS, GPU_LOSS_BYTES

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
    per_token = decoder.vocabulary * (itemsize + 8)
    loss = max(CPU_LOSS_BYTES if on_cpu else GPU_LOSS_BYTES, FEWEST_TOKENS * per_token)
    loss = min(loss, setting.samples * setting.length * per_token)
    if needs == "logits":
        return max(call, loss)
    largest = max(p.numel() for p in decoder.blocks.parameters())
    gradients = 4 * max(sum(p.numel() for p in block.parameters()) for block in decoder.blocks)
    return max(2 * call + gradients + largest * (itemsize + 4), loss)


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


class ModelSummary(Record):
    """`shortllm info` as data."""

    model: ModelInfo
    parameters_outside: int
    """Elements outside the blocks: embeddings, final norm, head."""
    bytes_per_block: list[int]
    prediction_heads: PredictionHeads | None
    """What is stored to draft further tokens; not part of the model."""
    protected: list[int]
    """Blocks that are protected by default."""
    companions: list[Reference]
    """Files and fields that refer to blocks."""
    experts: Experts | None
    """None where a model has none."""
    quantize_refuses: str | None
    """Why `quantize` refuses it with its default options; None where it does not."""
    samples: int
    length: int
    device: str
    dtype: str
    """Computation type."""
    probe: MachineRates | None
    estimates: list[Estimate]
    """For each kind of pass, with the model in memory and streamed."""
    stages: list[StageEstimate]
    """The other stages of a run; none without a probe."""
    streamed: bool
    """Whether scoring would read blocks one at a time now, by default."""
    why: str
    """Memory needed and free, on which that depends."""
    advice: list[str]
    """What to know before blocks are chosen."""

    def saved_by(self, blocks: int) -> tuple[float, float]:
        """Parts of the parameters and of the bytes of `blocks` average blocks."""
        share = blocks / self.model.blocks
        parameters = sum(self.model.parameters_per_block) * share / self.model.parameters
        return parameters, sum(self.bytes_per_block) * share / self.model.bytes


@accepts(runtime=DeviceOptions)
def info(
    model: ModelSource,
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
        model: a checkpoint directory, a Hub id, or a loaded model.
        runtime: where to compute; its fields can be given as keywords.
        revision: of a Hub model.
        samples: calibration samples that the estimate is for.
        length: tokens of each of them.
        options: for a criterion its options, e.g. `{"greedy": {"rounds": 8}}`.
        probe: measure the machine for three seconds with the first block and the head, and read a
            few of the model's tensors. Otherwise only headers are read and no times are estimated.
    Returns:
        Blocks, parameters, bytes, and an estimate for each kind of pass.
    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        CriterionError: an unknown criterion or option.
        ShortLLMError: a device that is missing.
    """
    from shortllm.model.loading import room_for, stored_dtype
    from shortllm.quantizing.quantize import refusal
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
    measured = measure_machine(setting) if probe else None
    decoder = weightless(setting)
    return ModelSummary(
        model=about,
        parameters_outside=about.parameters - sum(about.parameters_per_block),
        bytes_per_block=checkpoint.bytes_per_block,
        prediction_heads=checkpoint.prediction_heads,
        protected=protected_in(about),
        companions=companions_of(checkpoint),
        experts=experts_of(checkpoint),
        quantize_refuses=refusal(checkpoint),
        samples=samples,
        length=length,
        device=str(device),
        dtype=str(setting.dtype).removeprefix("torch."),
        probe=measured,
        estimates=estimates(setting, decoder, measured),
        stages=[] if measured is None else stage_estimates(setting, decoder, measured),
        streamed=not room.suffices,
        why=str(room),
        advice=before_removal(about, samples=samples, length=length),
    )
