"""Image features that enter blocks by number enter the same blocks of a shortened model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import model_classes, tiny_config
from families import build, load, save, shortened, token_ids
from test_healing import calibration
from transformers import CLIPVisionConfig, Gemma4VisionConfig, Granite4VisionConfig

from shortllm.checkpoint import shorten_config
from shortllm.checkpoint.shorten_config import structurally_protected
from shortllm.checkpoint.source import open_checkpoint
from shortllm.errors import CheckpointError, UnsupportedModelError
from shortllm.merging.merge import merge_from
from shortllm.merging.options import MergeOptions, Merging
from shortllm.model import Session
from shortllm.model.decoder import Decoder
from shortllm.pruning.prune import write_pruned
from shortllm.surgery.image_probe import image_inputs
from shortllm.surgery.verify import bypass_logits, kv_cache_matches, on_image, verify_shortened

BY_NUMBER = ("qwen3_vl", "qwen3_vl_moe", "cohere_compass", "cosmos3_omni", "qwen3_omni_moe_thinker")
"""Types whose image features enter behind the first text blocks."""


def granite() -> Any:
    """A tiny model whose features enter in front of blocks 0 and 2, and 1, 3, 3 and 4."""
    text = tiny_config("granite").to_dict() | {"model_type": "granite4_vision_text"}
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    return Granite4VisionConfig(
        architectures=["Granite4VisionForConditionalGeneration"],
        text_config=text,
        vision_config=vision.to_dict(),
        image_token_index=3,
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0], [-2, 2]],
        spatial_target_layers=[0, 2, 4, 4],
        image_grid_pinpoints=[[16, 16]],
    )


def config_of_type(model_type: str) -> Any:
    """A tiny model with the features of two blocks of its vision tower in the first two blocks."""
    if model_type == "granite4_vision":
        return granite()
    config = tiny_config(model_type)
    config.architectures = sorted(model_classes(model_type)[1])[:1]
    if model_type == "gemma4":
        config.vision_config = Gemma4VisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=8,
            global_head_dim=8,
            patch_size=4,
            position_embedding_size=16,
        )
    if model_type == "vipllava":
        config.vision_feature_layers = [0, 1, 2, -1, -2]
    if model_type in BY_NUMBER:
        config.vision_config.deepstack_visual_indexes = [0, 1]
    if model_type == "qwen3_omni_moe_thinker":
        config.vision_start_token_id, config.audio_start_token_id = 90, 91
    return config


def source(model_type: str, tmp_path: Path) -> Path:
    """The checkpoint of a tiny model whose image features weigh as much as the text."""
    model = build(config_of_type(model_type))
    return save(model, tmp_path / "source")


@pytest.mark.parametrize("model_type", [*BY_NUMBER, "granite4_vision"])
def test_features_by_number_enter_the_same_blocks_or_the_removal_is_refused(
    model_type: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(source(model_type, tmp_path))
    decoder = Decoder(load(checkpoint.directory))
    cached = kv_cache_matches(decoder)
    entered = [0, 2, 4] if model_type == "granite4_vision" else [0, 1]
    assert entered == [b for b in structurally_protected(checkpoint.config) if b < 6]
    for block in entered:
        with pytest.raises(UnsupportedModelError, match=f"block {block} .* image features enter"):
            write_pruned(checkpoint, [b for b in range(6) if b != block], tmp_path / "no")
    inputs = image_inputs(decoder.model)
    assert inputs is not None, "the probe has no image of this type"
    other = inputs | {"pixel_values": inputs["pixel_values"] * -2}
    with torch.no_grad():
        seen, unseen = decoder.model(**inputs).logits, decoder.model(**other).logits
    assert not torch.allclose(seen, unseen, rtol=1e-2), "the image changes nothing"
    free = [b for b in range(6) if b not in entered]
    for removed in (free[:1], free[-1:], free[:2]):
        short = Decoder(load(shortened(checkpoint, removed, tmp_path / "short")))
        image = on_image(decoder, removed)
        assert image is not None
        verify_shortened(
            model_type, short, bypass_logits(decoder, removed), cached=cached, image=image
        )


def test_merges_leave_the_blocks_that_features_enter(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source("qwen3_vl", tmp_path))

    def merged(**options: Any) -> Merging:
        return merge_from(
            checkpoint,
            MergeOptions(**options),
            tmp_path / "out",
            calibration=calibration(token_ids() % checkpoint.vocabulary),
            session=Session(),
        )

    for options in ({"blocks": [1]}, {"protect_first": 0, "protect_last": 4}):
        with pytest.raises(UnsupportedModelError, match="image features enter"):
            merged(**options)
    assert merged(threshold=-1).removed == [3, 4, 5]


def test_verification_looks_at_an_image_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(source("qwen3_vl", tmp_path))
    monkeypatch.setattr(shorten_config, "BEHIND_FIRST", ())
    with pytest.raises(CheckpointError, match="from an image: logits differ"):
        write_pruned(checkpoint, [0, 2, 3, 4, 5], tmp_path / "short", session=Session())
    assert not (tmp_path / "short").exists()


@pytest.mark.parametrize(
    "model_type", ["qwen2_vl", "internvl", "idefics3", "llava", "mistral3", "vipllava"]
)
def test_images_that_enter_with_the_text_leave_all_blocks_free(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = open_checkpoint(source(model_type, tmp_path))
    assert structurally_protected(checkpoint.config) == {}
    write_pruned(checkpoint, [1, 2, 4, 5], tmp_path / "short", session=Session())
    assert "verified on text alone" not in caplog.text


def gemma4_image(config: Any) -> dict[str, torch.Tensor]:
    """Text with an image of 3 x 3 patches, which is one token."""
    places = torch.tensor([[[x, y] for y in range(3) for x in range(3)]])
    ids = torch.tensor([[10, 11, config.image_token_id, 12, 13]])
    return {
        "input_ids": ids,
        "pixel_values": torch.rand(1, 9, 3 * config.vision_config.patch_size**2),
        "image_position_ids": places,
        "mm_token_type_ids": (ids == config.image_token_id).long(),
    }


def mllama_image(config: Any) -> dict[str, torch.Tensor]:
    """Text with what the vision tower made of an image, which blocks 1 and 4 read."""
    seen = torch.randn(1, 7, config.text_config.hidden_size)
    return {"input_ids": torch.tensor([[10, 11, 12, 13, 14]]), "cross_attention_states": seen}


@pytest.mark.parametrize(
    ("model_type", "image", "removals"),
    [("gemma4", gemma4_image, [[2], [0, 2]]), ("mllama", mllama_image, [[1], [2], [3, 4]])],
)
def test_features_per_block_follow_their_blocks(
    model_type: str, image: Any, removals: list[list[int]], tmp_path: Path
) -> None:
    """Shares of per-layer inputs, and cross-attention that a list of numbers places."""
    model = build(config_of_type(model_type))
    checkpoint = open_checkpoint(save(model, tmp_path / "source"))
    inputs = image(model.config)
    with torch.no_grad():
        intact = model(**inputs, use_cache=False).logits
    for removed in removals:
        short = load(shortened(checkpoint, removed, tmp_path / "short"))
        hooks = [
            model.get_decoder()
            .layers[b]
            .register_forward_hook(
                lambda block, args, kwargs, output: args[0] if args else kwargs["hidden_states"],
                with_kwargs=True,
            )
            for b in removed
        ]
        with torch.no_grad():
            expected = model(**inputs, use_cache=False).logits
            found = short(**inputs, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        assert not torch.allclose(intact, expected, rtol=1e-2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
