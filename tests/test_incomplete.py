"""Tensors that share memory in a `.bin`, and parts of a model that its files lack."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import shortllm
from shortllm.checkpoint.source import open_checkpoint
from shortllm.checkpoint.tensors import SAFETENSORS, read_json, write_json
from shortllm.errors import CheckpointError
from shortllm.model.decoder import Decoder
from shortllm.surgery.verify import bypass_logits, verify_shortened


def pickled(model: Any, directory: Path) -> Path:
    """A checkpoint in one `.bin`, where tensors share the memory that they share in the model."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    return directory


@pytest.mark.parametrize("gone", [0, 3, 4])
def test_blocks_that_share_memory_are_read_by_their_own_names(gone: int, tmp_path: Path) -> None:
    model: Any = families.build("llama")
    model.model.layers[4] = model.model.layers[3]
    source = pickled(model, tmp_path / "source")
    checkpoint = open_checkpoint(source)
    assert len(set(checkpoint.parameters_per_block)) == 1
    out = shortllm.prune(source, blocks=[gone], out=tmp_path / "out")
    names = load_file(out / SAFETENSORS)
    assert {int(name.split(".")[2]) for name in names if ".layers." in name} == set(range(5))
    loaded = Decoder(families.load(source))  # each block an object of its own
    verify_shortened("out", Decoder(families.load(out)), bypass_logits(loaded, [gone]))


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_share_memory_are_stored_once_if_they_are_tied(
    tied: bool, tmp_path: Path
) -> None:
    model: Any = families.build(families.config_of("llama", tie_word_embeddings=tied))
    model.lm_head.weight = model.model.embed_tokens.weight
    source = pickled(model, tmp_path / "source")
    out = shortllm.prune(source, blocks=[1], out=tmp_path / "out")
    assert ("lm_head.weight" in load_file(out / SAFETENSORS)) != tied
    verify_shortened("out", Decoder(families.load(out)), bypass_logits(Decoder(model), [1]))


@pytest.mark.parametrize("head", ["mtp", "model.layers.6"])
@pytest.mark.parametrize("first", [True, False])
def test_a_prediction_head_keeps_the_embeddings_that_it_shares(
    head: str, first: bool, tmp_path: Path
) -> None:
    model: Any = families.build(families.config_of("llama", tie_word_embeddings=True))
    source, embeddings = pickled(model, tmp_path / "source"), model.model.embed_tokens.weight.data
    shared = {
        f"{head}.embed_tokens.weight": embeddings,
        f"{head}.eh_proj.weight": torch.ones(embeddings.shape[1], 2 * embeddings.shape[1]),
    }
    held = {name: tensor.data for name, tensor in model.state_dict().items()}
    torch.save(shared | held if first else held | shared, source / "pytorch_model.bin")
    out = shortllm.prune(source, blocks=[1], out=tmp_path / "out")
    stored = load_file(out / SAFETENSORS)
    assert stored[f"{head.replace('6', '5')}.embed_tokens.weight"].equal(embeddings)
    without = shortllm.prune(source, blocks=[1], out=tmp_path / "without", drop_heads=True)
    families.load(without)


def test_shards_of_a_bin_may_share_memory(tmp_path: Path) -> None:
    model: Any = families.build("llama")
    model.model.layers[4] = model.model.layers[3]
    source = pickled(model, tmp_path / "source")
    (source / "pytorch_model.bin").rename(source / "pytorch_model-00001-of-00001.bin")
    names = ", ".join(f'"{n}": "pytorch_model-00001-of-00001.bin"' for n in model.state_dict())
    (source / "pytorch_model.bin.index.json").write_text(
        f'{{"metadata": {{}}, "weight_map": {{{names}}}}}'
    )
    families.load(shortllm.prune(source, blocks=[0], out=tmp_path / "out"))


# --- parts that were left out ---------------------------------------------------------------------

TEXT = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip

TOWERS: dict[str, dict[str, Any]] = {
    "llava": {
        "vision_config": dict(
            model_type="clip_vision_model", hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
        ),
        "text_config": {"model_type": "llama", **TEXT},
        "image_token_index": 90,
    },
    "qwen2_5_vl": {
        "text_config": {
            **TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        "vision_config": dict(
            depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32
        ),
    },
    "gemma3": {
        "text_config": {**TEXT, "head_dim": 8},
        "vision_config": dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            image_size=16, patch_size=4,
        ),
        "mm_tokens_per_image": 4,
    },
}  # fmt: skip


def stripped(model: nn.Module, directory: Path, words: tuple[str, ...]) -> Path:
    """A model without the tensors that have one of the words in their names."""
    families.save(model, directory)
    stored = load_file(directory / SAFETENSORS)
    kept = {name: t for name, t in stored.items() if not any(word in name for word in words)}
    assert len(kept) < len(stored)
    save_file(kept, directory / SAFETENSORS, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("family", TOWERS)
def test_without_its_tower_the_text_model_can_be_taken_out(family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, **TOWERS[family])
    model = AutoModelForImageTextToText.from_config(config)
    source = stripped(model, tmp_path / "source", ("vision", "visual", "projector"))
    for verify in (True, False):
        with pytest.raises(CheckpointError, match="whole, but without .*vis") as raised:
            shortllm.prune(source, blocks=[2], out=tmp_path / "out", verify=verify)
    assert "ownload" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    if family == "qwen2_5_vl":
        assert "no class for the text model 'qwen2_5_vl_text' alone" in str(raised.value)
        return
    lines = re.findall(r"^    (.*)$", str(raised.value), re.MULTILINE)
    code = "\n".join(lines).replace("TEXT-MODEL", str(tmp_path / "text"))
    exec(code, {})  # what the message says to type
    families.load(shortllm.prune(tmp_path / "text", blocks=[2], out=tmp_path / "short"))


def test_a_tower_of_which_some_is_stored_is_not_said_to_be_gone(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gemma3", **TOWERS["gemma3"])
    model = AutoModelForImageTextToText.from_config(config)
    source = stripped(model, tmp_path / "source", ("vision_tower.encoder.layers.1",))
    with pytest.raises(CheckpointError, match="without parts of vision_tower"):
        shortllm.prune(source, blocks=[2], out=tmp_path / "out")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "word", ["model.norm.weight", "lm_head", "embed_tokens", "layers.1.mlp.up"]
)
def test_what_no_file_holds_is_named_before_anything_is_written(
    word: str, verify: bool, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_config(families.config_of("llama", tie_word_embeddings=False))
    source = stripped(model, tmp_path / "source", (word,))
    with pytest.raises(
        CheckpointError, match=rf"{word}.* is missing.*Save the whole model"
    ) as raised:
        shortllm.prune(source, blocks=[3], out=tmp_path / "out", verify=verify)
    assert "ownload" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["model.norm", "lm_head", "layers.1.mlp.up_proj"])
@pytest.mark.parametrize("names", [("weight", "weight_scale_inv"), ("qweight", "scales")])
def test_a_quantized_model_lacks_a_module_of_which_nothing_is_stored(
    names: tuple[str, str], word: str, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_config(families.config_of("llama", tie_word_embeddings=False))
    families.save(model, tmp_path)
    stored = load_file(tmp_path / SAFETENSORS)
    for name in [one for one in stored if one.endswith("proj.weight")]:
        weight = stored.pop(name).to(torch.float8_e4m3fn)
        module = name.removesuffix("weight")
        stored |= {module + names[0]: weight, module + names[1]: torch.ones(1, 1)}
    config = read_json(tmp_path / "config.json")
    quantized = {"quant_method": "fp8" if names[0] == "weight" else "gptq", "bits": 4}
    write_json(tmp_path / "config.json", config | {"quantization_config": quantized})
    save_file(stored, tmp_path / SAFETENSORS)
    shortllm.prune(tmp_path, blocks=[3], out=tmp_path / "whole", verify=False)
    held = {name: tensor for name, tensor in stored.items() if word not in name}
    save_file(held, tmp_path / SAFETENSORS)
    with pytest.raises(CheckpointError, match=rf"{word}.* is missing"):
        shortllm.prune(tmp_path, blocks=[3], out=tmp_path / "out", verify=False)


def test_quantized_weights_in_modules_of_other_names_are_not_missing(tmp_path: Path) -> None:
    config = AutoConfig.for_model("granitemoe", **TEXT, num_local_experts=2, num_experts_per_tok=1)
    families.save(AutoModelForCausalLM.from_config(config), tmp_path)
    stored = load_file(tmp_path / SAFETENSORS)
    for name in [one for one in stored if one.endswith("linear.weight")]:
        stored[name.replace("weight", "qweight")] = stored.pop(name)
    config = read_json(tmp_path / "config.json")
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    write_json(tmp_path / "config.json", config)
    save_file(stored, tmp_path / SAFETENSORS)
    shortllm.prune(tmp_path, blocks=[2], out=tmp_path / "out", verify=False)
