"""Criteria that look at predictions with one block removed, all removals in one walk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shortllm.criteria import criterion
from shortllm.model.metrics import kl_divergence, next_token_nll, rejected
from shortllm.papers import EVOPRESS, SHORTENED_LLAMA, SPECULATIVE_DECODING

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


@criterion(
    "acceptance",
    needs="logits",
    label="drafted tokens that are rejected (1 - acceptance)",
    paper=SPECULATIVE_DECODING,
    compared=False,
)
def rejected_without_block(
    logits_NV: Tensor, intact_NV: Tensor, target_N: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Probability that the intact model rejects a token which the model without the block drafts.

    In speculative sampling it is 1 - sum over v of min(p_v, q_v), mean over all predictions.

    Args:
        temperature: of the sampling; at 0 the share of predictions whose likeliest token changes.
    """
    return rejected(intact_NV, logits_NV, temperature)
