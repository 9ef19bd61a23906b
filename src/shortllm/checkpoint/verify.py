"""Check what was written: reload it, compare it with the original with blocks bypassed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from shortllm.errors import CheckpointError
from shortllm.model.resident import ResidentModel

PROBE_SHAPE = (2, 24)
"""Samples and tokens of the comparison."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
LOW_PRECISION_TOLERANCE = 5e-2
"""Largest difference of two logits relative to the largest logit, by computation type.

Surgery copies weights bit by bit, so that the first comparison is exact on one machine; the bound
is for kernels that choose another order of summation (with a cache above all).
"""

CACHE_NAMES = ("cache", "past_key_values")
"""What forwards call the cache of keys and values, the newer name first."""


def probe_ids(vocabulary: int) -> Tensor:
    """Fixed pseudo-random token ids, `[2, 24]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, PROBE_SHAPE, generator=generator)


@torch.inference_mode()
def bypass_logits(original: nn.Module, removed: Collection[int]) -> Tensor:
    """Logits on the probe of the original with the blocks `removed` bypassed, `[2, 24, V]`."""
    view = ResidentModel(original)
    with view.without(removed):
        return _logits(original, probe_ids(view.vocabulary))


@torch.inference_mode()
def verify_shortened(name: str, shortened: nn.Module, expected: Tensor) -> None:
    """Compare a reloaded model with `expected` (see `bypass_logits`), without and with cache.

    Raises:
        CheckpointError: the logits differ, or cached generation differs from generation without.
    """
    ids = probe_ids(expected.shape[-1])
    plain = _logits(shortened, ids)
    tolerance = TOLERANCE.get(next(shortened.parameters()).dtype, LOW_PRECISION_TOLERANCE)
    _compare(
        plain,
        expected,
        tolerance,
        f"{name} does not compute what the original without the blocks computes",
    )
    try:
        cached = _cached_logits(shortened, ids)
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{name} cannot generate with a cache: {error}") from error
    if cached is not None:
        _compare(cached, plain, tolerance, f"{name} generates other text with a cache than without")


def _logits(model: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), use_cache=False, **kwargs).logits.float().cpu()  # type: ignore[no-any-return]


def _cached_logits(model: nn.Module, ids: Tensor) -> Tensor | None:
    """Logits of a forward over all but the last tokens, continued token by token from its cache.

    None where the type has no cache of keys and values.
    """
    ids = ids.to(next(model.parameters()).device)
    start = ids.shape[1] - 4
    output = model(input_ids=ids[:, :start], use_cache=True)
    name = next((name for name in CACHE_NAMES if name in output), None)
    if name is None:
        return None
    pieces = [output.logits]
    for t in range(start, ids.shape[1]):
        output = model(input_ids=ids[:, t : t + 1], use_cache=True, **{name: output[name]})
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1).float().cpu()


def _compare(found: Tensor, expected: Tensor, tolerance: float, message: str) -> None:
    difference = (found - expected).abs().max().item() / max(expected.abs().max().item(), 1e-30)
    if not difference <= tolerance:
        raise CheckpointError(
            f"{message}: logits differ by {difference:.1e} (relative), {tolerance:.0e} allowed"
        )
