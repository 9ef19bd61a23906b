"""Pure maths on tensors: token losses and what is made of them. No files, no devices, no printing.

Shapes: N predictions, V vocabulary.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def next_token_nll(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """Negative log-likelihood of each target, nats, float32, shape `[N]`."""
    return F.cross_entropy(logits_NV.float(), target_N, reduction="none")


def perplexity(mean_nll: float) -> float:
    """exp of a mean NLL in nats; infinity where that exceeds a float."""
    return math.exp(mean_nll) if mean_nll < 709.0 else math.inf
