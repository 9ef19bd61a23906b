"""Pure maths on tensors: losses, distances and reductions. No files, no devices, no printing.

torch is imported when a function is called, so that criteria can be listed without it.

Shapes: N predictions, V vocabulary, D width, R rows of a matrix, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Reduction = Literal["sum", "mean", "max", "prod"]

REDUCED_AT_ONCE = 2**22
"""Entries of which a float32 copy is made at a time."""


def next_token_nll(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """Negative log-likelihood of each target, nats, float32, shape `[N]`."""
    import torch.nn.functional as F

    return F.cross_entropy(logits_NV.float(), target_N, reduction="none")


def kl_divergence(p_logits_NV: Tensor, q_logits_NV: Tensor) -> Tensor:
    """KL(p || q) of two next-token distributions, nats, float32, `[N]`; 0 for equal logits."""
    import torch.nn.functional as F

    p_log_NV = F.log_softmax(p_logits_NV.float(), dim=-1)
    q_log_NV = F.log_softmax(q_logits_NV.float(), dim=-1)
    return (p_log_NV.exp() * (p_log_NV - q_log_NV)).sum(dim=-1)


def rejected(p_logits_NV: Tensor, q_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Probability that a token drafted from q is rejected by p, float32, `[N]`; 0 for equal logits.

    It is the total variation distance of the two next-token distributions at a temperature, which
    is 1 - sum over v of min(p_v, q_v); at temperature 0 whether the likeliest tokens differ.
    """
    import torch.nn.functional as F

    if temperature == 0:
        return (p_logits_NV.argmax(dim=-1) != q_logits_NV.argmax(dim=-1)).float()
    p_NV = F.softmax(p_logits_NV.float() / temperature, dim=-1)
    q_NV = F.softmax(q_logits_NV.float() / temperature, dim=-1)
    return (p_NV - q_NV).abs().sum(dim=-1) / 2


def perplexity(mean_nll: float) -> float:
    """exp of a mean NLL in nats; infinity where that exceeds a float."""
    return math.exp(mean_nll) if mean_nll < 709.0 else math.inf


def cosine(one_D: Tensor, other_D: Tensor) -> Tensor:
    """Cosine along the last dimension, float32; exactly 1 for equal vectors."""
    one_D, other_D = one_D.float(), other_D.float()
    dot = (one_D * other_D).sum(dim=-1)
    squares = (one_D * one_D).sum(dim=-1) * (other_D * other_D).sum(dim=-1)
    return dot / squares.sqrt().clamp_min(1e-30)


def angular_distance(one_D: Tensor, other_D: Tensor) -> Tensor:
    """Angle between vectors along the last dimension, divided by pi: in [0, 1], float32."""
    return cosine(one_D, other_D).clamp(-1.0, 1.0).arccos() / math.pi


def reduce_powers(
    tensors: Iterable[Tensor], *, power: int, over_weights: Reduction, over_block: Reduction
) -> float:
    """`abs(x) ** power` of all entries, reduced over each tensor, then over the tensors.

    A matrix (a row for each output) is first summed over its inputs, and its rows are reduced. If
    either reduction is a product the result is its natural logarithm, which ranks the same and does
    not leave the range of floats.
    """
    reduced = [_reduced(x, power, over_weights) for x in tensors]
    if "prod" not in (over_weights, over_block):
        totals = {"sum": sum(reduced), "max": max(reduced), "mean": sum(reduced) / len(reduced)}
        return totals[over_block]
    if over_weights != "prod":
        return sum(math.log(value) if value else -math.inf for value in reduced)
    if over_block == "prod":
        return sum(reduced)
    highest = max(reduced)
    if over_block == "max" or math.isinf(highest):
        return highest
    total = highest + math.log(sum(math.exp(value - highest) for value in reduced))
    return total - math.log(len(reduced)) if over_block == "mean" else total


def _reduced(x: Tensor, power: int, reduction: Reduction) -> float:
    """`abs(x) ** power` reduced, piece by piece for small float32 copies; of a product the log."""
    import torch

    if reduction == "sum":
        pieces = torch.split(x.flatten(), REDUCED_AT_ONCE)
        powers = (piece.abs().float().pow(power) for piece in pieces)
        return math.fsum(piece.sum(dtype=torch.float64).item() for piece in powers)
    x_RI = x.flatten(0, -2) if x.ndim > 1 else x.reshape(-1, 1)
    pieces = torch.split(x_RI, max(1, REDUCED_AT_ONCE // x_RI.shape[1]))
    powers = (piece.abs().float().pow(power) for piece in pieces)
    sum_R = torch.cat([piece.sum(dim=1, dtype=torch.float64) for piece in powers])
    if reduction == "prod":
        return sum_R.log().sum().item()
    return (sum_R.max() if reduction == "max" else sum_R.mean()).item()
