"""Verify a written checkpoint: reload it and compare it with the original, blocks bypassed."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shortllm.checkpoint.config import text_config
from shortllm.errors import CheckpointError
from shortllm.model.decoder import Decoder
from shortllm.model.walk import walk
from shortllm.surgery.image_probe import image_inputs, takes_images, unchanged

log = logging.getLogger(__name__)

PROBE_SHAPE = (2, 24)
"""Samples and tokens of the comparison."""

CACHED_TOKENS = 4
"""How many of the tokens are read one by one to check the cache."""

CACHES = ("cache", "past_key_values", "cache_params", "state")
"""Names of the cache in a model's output and arguments, the newest first."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
LOW_PRECISION_TOLERANCE = 5e-2
"""Largest difference of two logits relative to the largest logit, by computation type.

Surgery copies weights bit by bit, so the comparison is exact on one machine; the bound allows for
kernels that choose another order of summation (with a cache above all).
"""

NARROWER_TOLERANCE = 0.1
"""In low precision, of matrices that have become narrower: the root of the mean squared difference
relative to that of the logits. They sum fewer terms, and rounding moves the logits of single tokens
far: SmolLM2-135M without a fifth of its blocks' parameters differs by 0.03 in bfloat16, where one
token has 0.2 and most have 0.015; in float32 no logit differs by 1e-4.
"""

CACHE_ERRORS = (ValueError, TypeError, AttributeError, IndexError, RuntimeError)
"""Errors of models that do not work with a cache."""


def probe_ids(config: Any) -> Tensor:
    """Fixed pseudo-random token ids, `[2, 24]`, none of them padding (some models skip it)."""
    text = text_config(config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, text.vocab_size, PROBE_SHAPE, generator=generator)
    padding = getattr(text, "pad_token_id", None)
    return ids if padding is None else torch.where(ids == padding, (ids + 1) % text.vocab_size, ids)


@torch.no_grad()
def bypass_logits(decoder: Decoder, removed: Collection[int] = ()) -> Tensor:
    """Logits on the probe without the blocks `removed`, float32 `[2, 24, V]`; streamed 23."""
    ids = probe_ids(decoder.model.config)
    if not decoder.streamed:
        with decoder.without(removed):
            return _logits(decoder.model, ids)
    rows: list[Tensor] = []

    def consume(m: int, logits_NV: Tensor, first_NV: Tensor, target_N: Tensor) -> None:
        rows.append(logits_NV.float().cpu())

    walk(decoder, ids, [frozenset(removed)], consume=consume)
    return torch.cat(rows).view(len(ids), -1, decoder.vocabulary)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageProbe:
    """What a model computes on text with an image."""

    inputs: dict[str, Tensor]
    logits: Tensor


@torch.inference_mode()
def on_image(decoder: Decoder, removed: Collection[int] = ()) -> ImageProbe | None:
    """The same as `bypass_logits` on text with an image; None where the model takes none, its
    blocks are streamed, or its config does not tell what an image looks like."""
    if not takes_images(decoder.model):
        return None
    inputs = None if decoder.streamed else image_inputs(decoder.model)
    if inputs is None:
        log.warning(
            "verified on text alone: no image could be put to %s", type(decoder.model).__name__
        )
        return None
    with decoder.without(removed):
        return ImageProbe(inputs=inputs, logits=_image_logits(decoder.model, inputs))


@torch.inference_mode()
def kv_cache_matches(original: Decoder) -> bool:
    """Whether the original computes the same with a cache as without; not for streamed blocks."""
    if original.streamed:
        return False
    ids = probe_ids(original.model.config)
    try:
        cached = _cached_logits(original.model, ids)
    except CACHE_ERRORS:
        return False
    if cached is None:
        return True
    plain = _logits(original.model, ids)
    return cached.shape == plain.shape and _difference(cached, plain) <= _tolerance(original)


@torch.inference_mode()
def verify_shortened(
    name: str,
    shortened: Decoder,
    expected: Tensor,
    *,
    cached: bool = True,
    image: ImageProbe | None = None,
    narrower: bool = False,
) -> None:
    """Compare a reloaded model with `expected` (see `bypass_logits`), with a cache if `cached`, and
    with what the original computes on text with an image; `narrower` if its matrices are."""
    ids = probe_ids(shortened.model.config)
    plain = bypass_logits(shortened)
    tolerance = _tolerance(shortened)
    columns = min(plain.shape[1], expected.shape[1])
    found, wanted = plain[:, :columns], expected[:, :columns]
    wrong = f"{name} does not compute what the original without the blocks computes"
    if narrower and shortened.dtype not in TOLERANCE:
        _require(_mean_difference(found, wanted), NARROWER_TOLERANCE, wrong)
    else:
        _compare(found, wanted, tolerance, wrong)
    if image is not None and not shortened.streamed:
        found = _image_logits(shortened.model, image.inputs)
        _compare(found, image.logits, tolerance, f"{wrong} from an image")
    if not cached or shortened.streamed:
        return
    try:
        generated = _cached_logits(shortened.model, ids)
    except CACHE_ERRORS as error:
        raise CheckpointError(f"{name} cannot generate with a cache: {error}") from error
    if generated is not None:
        _compare(
            generated, plain, tolerance, f"{name} generates other text with a cache than without"
        )


def _logits(model: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), use_cache=False, **kwargs).logits.float().cpu()  # type: ignore[no-any-return]


def _image_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with unchanged(model):
        return model(**inputs, use_cache=False).logits.float().cpu()  # type: ignore[no-any-return]


def _cached_logits(model: nn.Module, ids: Tensor) -> Tensor | None:
    """Logits of a forward continued token by token from its cache; None where there is none."""
    ids = ids.to(next(model.parameters()).device)
    start = ids.shape[1] - CACHED_TOKENS
    output = model(input_ids=ids[:, :start], use_cache=True)
    kind = next((name for name in CACHES if getattr(output, name, None) is not None), None)
    if kind is None:
        return None
    pieces = [output.logits]
    for t in range(start, ids.shape[1]):
        cache = {kind: getattr(output, kind)}
        output = model(input_ids=ids[:, t : t + 1], use_cache=True, **cache)
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1).float().cpu()


def _tolerance(decoder: Decoder) -> float:
    return TOLERANCE.get(decoder.dtype, LOW_PRECISION_TOLERANCE)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of two logits relative to the largest expected one."""
    return (found - expected).abs().max().item() / max(expected.abs().max().item(), 1e-30)


def _mean_difference(found: Tensor, expected: Tensor) -> float:
    """Root of the mean squared difference of two logits relative to that of the expected ones."""
    size = max(expected.square().mean().item(), 1e-30)
    return math.sqrt((found - expected).square().mean().item() / size)


def _compare(found: Tensor, expected: Tensor, tolerance: float, message: str) -> None:
    _require(_difference(found, expected), tolerance, message)


def _require(difference: float, tolerance: float, message: str) -> None:
    if not difference <= tolerance:
        raise CheckpointError(
            f"{message}: logits differ by {difference:.1e} (relative), {tolerance:.0e} allowed"
        )
