"""A text with one image for a model with a vision tower, built from its config alone.

Image towers take one of two forms: whole images `[1, channels, side, side]` or tiles of them, or
flattened patches with a grid that says how they lie. How many tokens an image stands for is read
off the features that the model itself makes of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shortllm.checkpoint.config import text_config

BEFORE, AFTER = 3, 4
"""Tokens of text around the image."""

IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_soft_token_id")
"""Config fields with the token that stands for a piece of an image."""

OTHER_TOKENS = (
    "video_token_id", "video_token_index", "audio_token_id", "vision_start_token_id",
    "vision_end_token_id", "image_start_token_id", "image_end_token_id", "boi_token_id",
    "eoi_token_id",
)  # fmt: skip
"""Config fields with tokens that mean something else than text."""

IMAGE_KINDS = ("mm_token_type_ids", "token_type_ids")
"""Arguments that are 1 where a token stands for a piece of an image."""


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Within the context a model may keep what it finds in an image (positions) in attributes, and
    install hooks: both are gone afterwards."""
    tables = [one for module in model.modules() for one in (vars(module), *_dicts(vars(module)))]
    before = [(table, table.copy()) for table in tables]
    try:
        yield
    finally:
        for table, entries in before:
            table.clear()
            table.update(entries)


def _dicts(attributes: dict[str, Any]) -> list[dict[Any, Any]]:
    return [one for one in attributes.values() if isinstance(one, dict)]


def takes_images(model: Any) -> bool:
    """Whether a model has a text decoder behind a vision tower."""
    within = text_config(model.config) is not model.config
    return within and "pixel_values" in inspect.signature(model.forward).parameters


@torch.inference_mode()
def image_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """Arguments of a forward on text with an image; None where the model takes none that way."""
    if not takes_images(model):
        return None
    taken = inspect.signature(model.forward).parameters
    for image in _images(model.config, taken):
        try:
            with unchanged(model):
                inputs = _with_text(model, image, taken)
                model(**inputs, use_cache=False)
        except Exception:  # model classes raise whatever they do with an image of another form
            continue
        return inputs
    return None


def _images(config: Any, taken: Any) -> Iterator[dict[str, Tensor]]:
    """One image in every form that the model may take."""
    vision = getattr(config, "vision_config", None)
    patch = _whole(vision, "patch_size", 14)
    channels = _whole(vision, "in_channels", _whole(vision, "num_channels", 3))
    if "image_grid_thw" in taken:
        frames = _whole(vision, "temporal_patch_size", 1)
        side = 2 * _whole(vision, "spatial_merge_size", _whole(vision, "merge_size", 2))
        grid = torch.tensor([[1, side, side]])
        pixels = _noise(side * side, channels * frames * patch * patch)
        yield {"pixel_values": pixels, "image_grid_thw": grid}
        yield {"pixel_values": pixels.view(-1, channels, patch, patch), "image_grid_thw": grid}
    for side in (_whole(vision, "image_size", 4 * patch), 4 * patch):
        sizes = torch.tensor([[side, side]])
        # several: the image made small, and its tiles, of which some are empty
        for tiles in ((1,), (1, 1), (1, 2), (1, 3)):
            image = {"pixel_values": _noise(*tiles, channels, side, side)}
            if "image_sizes" in taken:
                yield image | {"image_sizes": sizes}
            yield image


def _with_text(model: Any, image: dict[str, Tensor], taken: Any) -> dict[str, Tensor]:
    """The image between words, with a token for each of its features."""
    device, dtype = model.device, model.dtype
    image = {
        name: one.to(device, dtype if one.is_floating_point() else None)
        for name, one in image.items()
    }
    rows = _rows(_features(model.get_image_features(**image, **_choices(model))))
    named = (getattr(model.config, name, None) for name in IMAGE_TOKENS)
    token = next(number for number in named if number is not None)
    words = _words(model.config, BEFORE + AFTER)
    ids = torch.tensor([[*words[:BEFORE], *[token] * rows, *words[BEFORE:]]], device=device)
    kinds = (ids == token).long()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **{name: kinds for name in IMAGE_KINDS if name in taken},
        **image,
    }


def _choices(model: Any) -> dict[str, Any]:
    """What a model must be told to make features of an image: its config says it."""
    asked = inspect.signature(model.get_image_features).parameters.values()
    vision = getattr(model.config, "vision_config", None)
    return {
        one.name: getattr(vision, one.name)
        for one in asked
        if one.default is one.empty and hasattr(vision, one.name)
    }


def _features(output: Any) -> Any:
    """What stands for the image in the stream: of several sets by block number, the first."""
    found = getattr(output, "pooler_output", output)
    if found is not None:
        return found
    sets = getattr(output, "deepstack_features", None)
    return output.last_hidden_state if sets is None else sets[0][1]


def _rows(features: Any) -> int:
    """How many tokens the features of an image are for."""
    if isinstance(features, Tensor):
        return features.shape[:-1].numel()
    return sum(map(_rows, features))


def _words(config: Any, count: int) -> list[int]:
    """Different ordinary tokens."""
    text = text_config(config)
    names = (*IMAGE_TOKENS, *OTHER_TOKENS, "pad_token_id", "bos_token_id")
    special = {getattr(part, name, None) for part in (config, text) for name in names}
    free = (n for n in range(5, text.vocab_size) if n not in special)
    return [next(free) for _ in range(count)]


def _whole(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, default)
    return int(max(value) if isinstance(value, (list, tuple)) else value or default)


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
