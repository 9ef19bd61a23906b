"""Learning from the unpruned model: its next-token distributions, and its hidden states.

Logits: KL(teacher || student) at every target, at temperature 1 by default; of a teacher kept on
disk the k likeliest tokens and the rest as one. Hidden states: the stream that leaves a block of
the student is compared with the stream that enters, in the teacher, the next block that was kept:

    teacher   0 ─► 1 ─► 2 ─► 3 ─► 4 ─► 5        blocks 2 and 3 removed
                   │              └──┐ compared
    student   0 ─► 1 ──────────────► 4 ─► 5     the block after it then gets what it was made for

N targets, V vocabulary, K kept tokens, D width.


The loss of each method, summed over targets: next-token NLL, or distance from a teacher.

B windows, T tokens, N targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shortllm.checkpoint.config import text_config
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.errors import CheckpointError, ShortLLMError
from shortllm.model.blocks import find_blocks
from shortllm.model.metrics import kl_divergence, next_token_nll
from shortllm.records import MAX_BLOCKS
from shortllm.retraining.cache import target_rows
from shortllm.surgery.apply import PROVENANCE, held_provenance

if TYPE_CHECKING:
    from shortllm.retraining.options import RetrainOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """Where a shortened checkpoint comes from."""

    source: str
    revision: str | None
    blocks: int
    """Those of the source."""
    kept: list[int]
    """For each block its number in the source."""


def lineage(checkpoint: Checkpoint) -> Lineage:
    """The unpruned source of a checkpoint, through all times it was shortened.

    Raises:
        CheckpointError: its config.json does not say, or says another number of blocks.
    """
    entry = checkpoint.raw_config.get(PROVENANCE)
    if not isinstance(entry, dict) or "removed_blocks" not in entry:
        raise CheckpointError(
            f"{checkpoint.id} does not say from which model it was shortened. Name the model to "
            "learn from with --teacher"
        )
    removals: list[tuple[int, set[int]]] = []
    while True:
        count, removed = entry.get("source_blocks"), entry["removed_blocks"]
        if not isinstance(count, int) or count > MAX_BLOCKS or not isinstance(removed, list):
            raise CheckpointError(
                f"{checkpoint.id}: what its config.json says of the removed blocks is damaged. "
                "Name the model to learn from with --teacher"
            )
        removals.append((count, {block for block in removed if isinstance(block, int)}))
        parent = entry.get("parent")
        if not isinstance(parent, dict) or "removed_blocks" not in parent:
            break
        entry = parent
    kept = list(range(removals[-1][0]))
    for _, removed in reversed(removals):
        kept = [block for place, block in enumerate(kept) if place not in removed]
    if len(kept) != checkpoint.block_count:
        raise CheckpointError(
            f"{checkpoint.id} has {checkpoint.block_count} blocks, and its config.json tells of "
            f"{len(kept)}. Name the model to learn from with --teacher"
        )
    return Lineage(
        source=str(entry.get("source")),
        revision=entry.get("revision"),
        blocks=removals[-1][0],
        kept=kept,
    )


def open_teacher(checkpoint: Checkpoint, options: RetrainOptions) -> Checkpoint:
    """The model to learn from: the one that is named, or the one the checkpoint came from.

    Raises:
        CheckpointError: it cannot be opened.
        ShortLLMError: it speaks another vocabulary, or has nothing to do with the block map.
    """
    if options.teacher is not None:
        teacher = open_checkpoint(options.teacher)
    else:
        origin = lineage(checkpoint)
        try:
            teacher = open_checkpoint(origin.source, revision=origin.revision)
        except CheckpointError as error:
            raise CheckpointError(
                f"{checkpoint.id} was shortened from {origin.source}, which cannot be opened "
                f"({error}). Name it with --teacher"
            ) from error
    sizes = [text_config(one.config).vocab_size for one in (checkpoint, teacher)]
    if sizes[0] != sizes[1]:
        raise ShortLLMError(
            f"{teacher.id} has a vocabulary of {sizes[1]} and {checkpoint.id} one of {sizes[0]}, "
            "so that it cannot teach it. Name a --teacher with the same tokenizer"
        )
    if options.hidden_weight:
        _check_block_map(checkpoint, teacher)
    return teacher


def _check_block_map(checkpoint: Checkpoint, teacher: Checkpoint) -> None:
    width = [text_config(one.config).hidden_size for one in (checkpoint, teacher)]
    blocks = _source_blocks(checkpoint)
    if width[0] != width[1] or blocks != teacher.block_count:
        raise ShortLLMError(
            f"--hidden-weight compares the blocks of {checkpoint.id} (width {width[0]}, shortened "
            f"from {blocks} blocks) with those of {teacher.id} (width {width[1]}, "
            f"{teacher.block_count} blocks). Name its unpruned model as --teacher, or leave "
            "--hidden-weight out"
        )


def _source_blocks(checkpoint: Checkpoint) -> int:
    entry = held_provenance(checkpoint)
    while isinstance(entry.get("parent"), dict) and "source_blocks" in entry["parent"]:
        entry = entry["parent"]
    return int(entry.get("source_blocks", checkpoint.block_count))


def teacher_blocks(kept: list[int], teacher_count: int) -> list[int]:
    """For each block of the student the teacher's block whose output it is compared with."""
    return [following - 1 for following in [*kept[1:], teacher_count]]


def soft_loss(teacher_NV: Tensor, student_NV: Tensor, temperature: float) -> Tensor:
    """Sum over targets of KL(teacher || student) at a temperature, scaled by its square.

    The square keeps gradients at one size whatever the temperature (Hinton et al., 1503.02531).
    """
    divergence_N = kl_divergence(teacher_NV / temperature, student_NV / temperature)
    return divergence_N.sum() * temperature**2


def kept_loss(ids_NK: Tensor, log_probs_NK: Tensor, student_NV: Tensor) -> Tensor:
    """Sum over targets of the KL divergence from k kept tokens, all others taken as one."""
    student_log_NV = F.log_softmax(student_NV.float(), dim=-1)
    student_log_NK = student_log_NV.gather(-1, ids_NK.long())
    kept_NK = log_probs_NK.float()
    inside = (kept_NK.exp() * (kept_NK - student_log_NK)).sum()
    rest_N = _log_rest(kept_NK)
    outside = (rest_N.exp() * (rest_N - _log_rest(student_log_NK))).sum()
    return inside + outside


def _log_rest(log_probs_NK: Tensor) -> Tensor:
    """Logarithm of the probability that is not in the K entries."""
    inside_N = log_probs_NK.exp().sum(dim=-1)
    return (1.0 - inside_N).clamp_min(1e-7).log()


@dataclass
class Streams:
    """What leaves each block during a forward, by block number; filled by hooks."""

    of: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def recorded(model: nn.Module) -> Iterator[Streams]:
    """Record the stream that leaves each block of a model while the context lasts.

    Taken from the blocks themselves: what a model calls its last hidden state is already normed.
    """
    streams = Streams()
    _, blocks = find_blocks(model, model.config)

    def keep(number: int) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            streams.of[number] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [block.register_forward_hook(keep(n)) for n, block in enumerate(blocks)]
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


def hidden_loss(student: Streams, teacher: Streams, pairs: list[int], rows_N: Tensor) -> Tensor:
    """Mean over blocks, summed over targets, of the squared distance relative to the teacher's.

    Args:
        pairs: for each block of the student the teacher's block it is compared with.
        rows_N: the targets' places among all positions of the batch.
    """
    losses = []
    for block, other in enumerate(pairs):
        found_ND = student.of[block].flatten(0, 1)[rows_N].float()
        wanted_ND = teacher.of[other].flatten(0, 1)[rows_N].float()
        distance_N = (found_ND - wanted_ND).square().sum(dim=-1)
        losses.append((distance_N / wanted_ND.square().sum(dim=-1).clamp_min(1e-12)).sum())
    return torch.stack(losses).mean()


Objective = Callable[[nn.Module, dict[str, Tensor]], Tensor]
"""From a model and a batch to the sum of the loss over the batch's targets."""


def target_logits(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of every target the logits `[N, V]`, its id `[N]`, and its place in the flattened batch."""
    rows_N = target_rows(batch["labels"])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    logits_BTV = model(**inputs, use_cache=False).logits
    return logits_BTV.flatten(0, 1)[rows_N], batch["labels"].flatten()[rows_N + 1], rows_N


def answer_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Next-token NLL."""
    logits_NV, target_N, _ = target_logits(model, batch)
    return next_token_nll(logits_NV, target_N).sum()


def cached_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Distance from what a teacher said about the same targets, as it was kept on disk."""
    logits_NV, _, _ = target_logits(model, batch)
    return kept_loss(batch["teacher_ids"], batch["teacher_log_probs"], logits_NV)


@dataclass
class TeacherLoss:
    """Distance from a teacher that reads the same batch."""

    teacher: nn.Module
    temperature: float = 1.0
    hidden_weight: float = 0.0
    pairs: list[int] | None = None
    """For each block of the student the teacher's block whose output it is compared with."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with ExitStack() as stack:
            record = self.hidden_weight > 0
            inner = getattr(model, "module", model)  # what wraps a model for several processes
            student = stack.enter_context(recorded(inner)) if record else Streams()
            streams = stack.enter_context(recorded(self.teacher)) if record else Streams()
            logits_NV, _, rows_N = target_logits(model, batch)
            with torch.no_grad():
                wanted_NV, _, _ = target_logits(self.teacher, batch)
            loss = soft_loss(wanted_NV, logits_NV, self.temperature)
            if record:
                assert self.pairs is not None
                loss = loss + self.hidden_weight * hidden_loss(student, streams, self.pairs, rows_N)
        return loss


@torch.no_grad()
def summed_nll(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of each window the sum of next-token NLL and the number of targets, `[B, 2]`."""
    logits_NV, target_N, rows_N = target_logits(model, batch)
    window_N = rows_N // batch["labels"].shape[1]
    nll_N = next_token_nll(logits_NV, target_N)
    pairs_N2 = torch.stack([nll_N, torch.ones_like(nll_N)], dim=-1)
    sums_B2 = pairs_N2.new_zeros(len(batch["labels"]), 2)
    return sums_B2.index_add(0, window_N, pairs_N2)


def mean_nll(prediction: Any) -> dict[str, float]:
    """From the sums of all windows to the mean over targets, as Trainer's metrics want it."""
    nll, targets = prediction.predictions.astype("float64").sum(axis=0)
    return {"loss": float(nll / targets)}
