"""Check what was written: reload it, compare it with the original with blocks bypassed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from shortllm.errors import CheckpointError
from shortllm.model.decoder import Decoder
from shortllm.model.walk import walk

PROBE_SHAPE = (2, 24)
"""Samples and tokens of the comparison."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
LOW_PRECISION_TOLERANCE = 5e-2
"""Largest difference of two logits relative to the largest logit, by computation type.

Surgery copies weights bit by bit, so that the first comparison is exact on one machine; the bound
is for kernels that choose another order of summation (with a cache above all).
"""


def probe_ids(vocabulary: int) -> Tensor:
    """Fixed pseudo-random token ids, `[2, 24]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, PROBE_SHAPE, generator=generator)


@torch.no_grad()
def bypass_logits(decoder: Decoder, removed: Collection[int] = ()) -> Tensor:
    """Logits on the probe with the blocks `removed` bypassed, float32 `[2, 24, V]`.

    Of streamed blocks all but the last token's, which predicts nothing: `[2, 23, V]`.
    """
    ids = probe_ids(decoder.vocabulary)
    if not decoder.streamed:
        with decoder.without(removed):
            return _logits(decoder.model, ids)
    rows: list[Tensor] = []
    walk(
        decoder,
        ids,
        [frozenset(removed)],
        consume=lambda m, logits_NV, first_NV, target_N: rows.append(logits_NV.float().cpu()),
    )
    return torch.cat(rows).view(len(ids), -1, decoder.vocabulary)


@torch.inference_mode()
def verify_shortened(name: str, shortened: Decoder, expected: Tensor) -> None:
    """Compare a reloaded model with `expected` (see `bypass_logits`), without and with cache.

    A model whose blocks are streamed is compared without cache only.

    Raises:
        CheckpointError: the logits differ, or cached generation differs from generation without.
    """
    ids = probe_ids(shortened.vocabulary)
    plain = bypass_logits(shortened)
    tolerance = TOLERANCE.get(shortened.dtype, LOW_PRECISION_TOLERANCE)
    columns = min(plain.shape[1], expected.shape[1])
    _compare(
        plain[:, :columns],
        expected[:, :columns],
        tolerance,
        f"{name} does not compute what the original without the blocks computes",
    )
    if shortened.streamed:
        return
    try:
        cached = _cached_logits(shortened.model, ids)
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
    if getattr(output, "past_key_values", None) is None:
        return None
    pieces = [output.logits]
    for t in range(start, ids.shape[1]):
        output = model(
            input_ids=ids[:, t : t + 1], past_key_values=output.past_key_values, use_cache=True
        )
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1).float().cpu()


def _compare(found: Tensor, expected: Tensor, tolerance: float, message: str) -> None:
    difference = (found - expected).abs().max().item() / max(expected.abs().max().item(), 1e-30)
    if not difference <= tolerance:
        raise CheckpointError(
            f"{message}: logits differ by {difference:.1e} (relative), {tolerance:.0e} allowed"
        )
