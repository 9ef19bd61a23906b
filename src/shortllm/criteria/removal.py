"""Criteria that look at predictions with one block removed, all removals in one walk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shortllm.criteria import criterion
from shortllm.model.metrics import kl_divergence, next_token_nll
from shortllm.papers import EVOPRESS, SHORTENED_LLAMA

if TYPE_CHECKING:
    from torch import Tensor


@criterion(
    "ppl", needs="logits", label="perplexity without the block", paper=SHORTENED_LLAMA, in_nats=True
)
def perplexity_without_block(logits_NV: Tensor, intact_NV: Tensor, target_N: Tensor) -> Tensor:
    """Perplexity of the calibration text when the block is removed.

    exp of the mean next-token NLL over all B*(T-1) predictions, every prediction weighing the same.
    """
    return next_token_nll(logits_NV, target_N)


@criterion(
    "kl",
    needs="logits",
    label="KL divergence from the intact model [nats per token]",
    paper=EVOPRESS,
)
def divergence_without_block(logits_NV: Tensor, intact_NV: Tensor, target_N: Tensor) -> Tensor:
    """Divergence KL(intact || without the block) of the next-token distributions, mean in nats."""
    return kl_divergence(intact_NV, logits_NV)
