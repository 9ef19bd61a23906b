"""The loss of each method, summed over targets: next-token NLL, or distance from a teacher.

B windows, T tokens, N targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shortllm.metrics import next_token_nll
from shortllm.retraining.cache import target_rows
from shortllm.retraining.distill import Streams, hidden_loss, kept_loss, recorded, soft_loss

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
