"""The losses, summed over targets: next-token NLL, or the distance from a teacher.

Logits: KL(teacher || student) at every target, at temperature 1 by default; of a teacher cached on
disk the top k tokens, and all others as one. Hidden states: the output of a block of the student is
compared with the input, in the teacher, of the next block that was kept:

    teacher   0 ─► 1 ─► 2 ─► 3 ─► 4 ─► 5        blocks 2 and 3 removed
                   │              └──┐ compared
    student   0 ─► 1 ──────────────► 4 ─► 5     so block 4 gets the input it was trained on

A teacher's k likeliest tokens can be cached on disk, so that it need not stay in memory. A file of
`WINDOWS_PER_FILE` windows is complete or absent: an interrupted pass resumes after those it wrote,
and several processes each write their share.

    ids        int32   [N, K]    of all targets, window after window
    log_probs  float16 [N, K]
    first      int64             the first target of each window, and after them their number

B windows, T tokens, N targets, V vocabulary, K top tokens, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shortllm.checkpoint.structure import find_blocks
from shortllm.files import PARTIAL, translate_os_errors
from shortllm.model.metrics import kl_divergence, next_token_nll
from shortllm.progress import progress
from shortllm.retraining.windows import NO_TARGET, Windows, collate, target_rows
from shortllm.runtime import Ranks

WINDOWS_PER_FILE = 64
"""Windows whose cached predictions are in one file."""


def teacher_blocks(kept: list[int], teacher_count: int) -> list[int]:
    """For each block of the student the teacher's block whose output it is compared with."""
    return [following - 1 for following in [*kept[1:], teacher_count]]


def soft_loss(teacher_NV: Tensor, student_NV: Tensor, temperature: float) -> Tensor:
    """Sum over targets of KL(teacher || student) at a temperature, scaled by its square.

    The square keeps gradients at one size whatever the temperature (Hinton et al., 1503.02531).
    """
    divergence_N = kl_divergence(teacher_NV / temperature, student_NV / temperature)
    return divergence_N.sum() * temperature**2


def top_k_loss(ids_NK: Tensor, log_probs_NK: Tensor, student_NV: Tensor) -> Tensor:
    """Sum over targets of KL(teacher || student) over the top k tokens, all others as one."""
    student_log_NV = F.log_softmax(student_NV.float(), dim=-1)
    student_log_NK = student_log_NV.gather(-1, ids_NK.long())
    teacher_log_NK = log_probs_NK.float()
    top = (teacher_log_NK.exp() * (teacher_log_NK - student_log_NK)).sum()
    rest_N = _log_rest(teacher_log_NK)
    return top + (rest_N.exp() * (rest_N - _log_rest(student_log_NK))).sum()


def _log_rest(log_probs_NK: Tensor) -> Tensor:
    """Logarithm of the probability outside the K entries."""
    return (1.0 - log_probs_NK.exp().sum(dim=-1)).clamp_min(1e-7).log()


@contextmanager
def recording(model: nn.Module, numbers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Record the output of some blocks, by their numbers, while the context lasts.

    Hooks on the blocks, because a model's own last hidden state is already normed.
    """
    outputs: dict[int, Tensor] = {}

    def keep(number: int, block: nn.Module, arguments: Any, output: Any) -> None:
        outputs[number] = output[0] if isinstance(output, tuple) else output

    blocks = find_blocks(model, model.config)[1] if numbers else nn.ModuleList()
    with ExitStack() as hooks:
        for number in numbers:
            hooks.enter_context(blocks[number].register_forward_hook(partial(keep, number)))
        yield outputs


def hidden_loss(
    student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], pairs: list[int], rows_N: Tensor
) -> Tensor:
    """Squared distance relative to the teacher's norm: mean over blocks, sum over targets.

    `pairs` gives for each block of the student the teacher's, see `teacher_blocks`; `rows_N` the
    targets' places among all positions of the batch.
    """
    losses = []
    for block, other in enumerate(pairs):
        student_ND = student[block].flatten(0, 1)[rows_N].float()
        teacher_ND = teacher[other].flatten(0, 1)[rows_N].float()
        distance_N = (student_ND - teacher_ND).square().sum(dim=-1)
        losses.append((distance_N / teacher_ND.square().sum(dim=-1).clamp_min(1e-12)).sum())
    return torch.stack(losses).mean()


Objective = Callable[[nn.Module, dict[str, Tensor]], Tensor]
"""From a model and a batch to the sum of the loss over the batch's targets."""


def target_logits(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[N, V]`, ids `[N]`, and places in the flattened batch of all targets."""
    rows_N = target_rows(batch["labels"])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    logits_BTV = model(**inputs, use_cache=False).logits
    return logits_BTV.flatten(0, 1)[rows_N], batch["labels"].flatten()[rows_N + 1], rows_N


def answer_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Next-token NLL."""
    logits_NV, target_N, _ = target_logits(model, batch)
    return next_token_nll(logits_NV, target_N).sum()


def cached_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Distance from a teacher whose top tokens are cached on disk."""
    logits_NV, _, _ = target_logits(model, batch)
    return top_k_loss(batch["teacher_ids"], batch["teacher_log_probs"], logits_NV)


@dataclass
class TeacherLoss:
    """Distance from a teacher that reads the same batch."""

    teacher: nn.Module
    temperature: float
    hidden_weight: float
    pairs: list[int]
    """See `teacher_blocks`; empty without a hidden weight."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        inner = getattr(model, "module", model)  # wrapped for several processes
        own = range(len(self.pairs))
        with recording(inner, own) as student, recording(self.teacher, self.pairs) as teacher:
            logits_NV, _, rows_N = target_logits(model, batch)
            with torch.no_grad():
                teacher_NV, _, _ = target_logits(self.teacher, batch)
        loss = soft_loss(teacher_NV, logits_NV, self.temperature)
        if self.pairs:
            loss = loss + self.hidden_weight * hidden_loss(student, teacher, self.pairs, rows_N)
        return loss


@torch.no_grad()
def summed_nll(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sum of next-token NLL and number of targets of each window, `[B, 2]`."""
    logits_NV, target_N, rows_N = target_logits(model, batch)
    window_N = rows_N // batch["labels"].shape[1]
    nll_N = next_token_nll(logits_NV, target_N)
    pairs_N2 = torch.stack([nll_N, torch.ones_like(nll_N)], dim=-1)
    sums_B2 = pairs_N2.new_zeros(len(batch["labels"]), 2)
    return sums_B2.index_add(0, window_N, pairs_N2)


def mean_nll(prediction: Any) -> dict[str, float]:
    """Mean over targets from the sums of all windows, in the form of the Trainer's metrics."""
    nll, targets = prediction.predictions.astype("float64").sum(axis=0)
    return {"loss": float(nll / targets)}


class CachedTeacher:
    """Writes a teacher's predictions, and reads them window by window."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open = lru_cache(maxsize=16)(lambda path: safe_open(path, "pt"))

    def predictions(self, window: int) -> dict[str, Tensor]:
        """`teacher_ids` and `teacher_log_probs`, `[N, K]`, in the order of the targets."""
        number, place = divmod(window, WINDOWS_PER_FILE)
        file: Any = self._open(self._file(number))
        start, stop = file.get_slice("first")[place : place + 2].tolist()
        return {
            f"teacher_{name}": file.get_slice(name)[start:stop] for name in ("ids", "log_probs")
        }

    @torch.no_grad()
    def write(
        self, teacher: nn.Module, windows: Windows, *, k: int, batch: int, ranks: Ranks
    ) -> None:
        """Run the teacher over all windows, `batch` at a time; files that exist are kept."""
        self._directory.mkdir(parents=True, exist_ok=True)
        spans = list(_runs(range(len(windows)), WINDOWS_PER_FILE))
        with progress("caching the teacher's predictions", len(windows)) as advance:
            for number in range(ranks.rank, len(spans), ranks.count):
                path = self._file(number)
                if not path.exists():
                    parts = [
                        _likeliest(teacher, [windows[window] for window in part], k)
                        for part in _runs(spans[number], batch)
                    ]
                    ids_NK, log_probs_NK, counts = map(torch.cat, zip(*parts, strict=True))
                    first = F.pad(counts.cumsum(0), (1, 0))
                    tensors = {"ids": ids_NK, "log_probs": log_probs_NK, "first": first}
                    partial = path.with_name(path.name + PARTIAL)
                    with translate_os_errors(self._directory):
                        save_file(tensors, partial)
                        os.replace(partial, path)
                advance(len(spans[number]) * ranks.count)
        ranks.wait()

    def _file(self, number: int) -> Path:
        return self._directory / f"{number:06d}.safetensors"


def _runs(numbers: range, size: int) -> Iterator[range]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _likeliest(
    teacher: nn.Module, items: list[dict[str, Tensor]], k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and log-probabilities `[N, K]` of the targets, and how many each window has, `[B]`."""
    device = next(teacher.parameters()).device
    batch = {name: values.to(device) for name, values in collate(items).items()}
    logits_NV, _, _ = target_logits(teacher, batch)
    log_NV = F.log_softmax(logits_NV.float(), dim=-1)
    top = log_NV.topk(min(k, log_NV.shape[-1]), dim=-1)
    counts_B = (batch["labels"][:, 1:] != NO_TARGET).sum(dim=-1)
    return top.indices.int().cpu(), top.values.half().cpu(), counts_B.cpu()
