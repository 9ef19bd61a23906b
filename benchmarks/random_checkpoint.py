"""A randomly initialised Llama checkpoint of any size, written shard by shard in little memory.

    python benchmarks/random_checkpoint.py 1.1b DIR       (or 7b, tiny; --blocks 8 for fewer;
                                                           --tokenizer: that of the embedded model)

All matrices are cut from one stock of bfloat16 noise of the spread that models start with, norms
are one; so making 13.5 GB takes 0.3 GB of memory and the time of writing them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "vocab_size": 512,
    },
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_hidden_layers": 22,
        "vocab_size": 32_000,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 32_000,
    },
}

SHARD_BYTES = 10**9
STOCK = 2**24
STD = 0.02
ONE = 0x3F80
"""1.0 in bfloat16."""


def config_of(shape: dict[str, int]) -> dict[str, Any]:
    """What config.json holds of a shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "head_dim": shape["hidden_size"] // shape["num_attention_heads"],
        **shape,
    }


def tensor_shapes(shape: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama checkpoint."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    yield "model.embed_tokens.weight", (shape["vocab_size"], width)
    for b in range(shape["num_hidden_layers"]):
        head = f"model.layers.{b}"
        yield f"{head}.input_layernorm.weight", (width,)
        yield f"{head}.self_attn.q_proj.weight", (width, width)
        yield f"{head}.self_attn.k_proj.weight", (keys, width)
        yield f"{head}.self_attn.v_proj.weight", (keys, width)
        yield f"{head}.self_attn.o_proj.weight", (width, width)
        yield f"{head}.post_attention_layernorm.weight", (width,)
        yield f"{head}.mlp.gate_proj.weight", (inner, width)
        yield f"{head}.mlp.up_proj.weight", (inner, width)
        yield f"{head}.mlp.down_proj.weight", (width, inner)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (shape["vocab_size"], width)


def make_checkpoint(directory: Path, shape: dict[str, int]) -> int:
    """Write config, bfloat16 shards and their index; returns the bytes of the largest tensor."""
    directory.mkdir(parents=True)
    noise = STD * np.random.default_rng(0).standard_normal(STOCK, dtype=np.float32)
    stock = (noise.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16 is the upper half of float32
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = total = largest = 0
    for name, lengths in tensor_shapes(shape):
        count = 2 * int(np.prod(lengths))
        largest = max(largest, count)
        if size + count > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append((name, lengths))
        size += count
        total += count
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys((name for name, _ in group), file)
        write_shard(directory / file, group, stock)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config_of(shape)))
    return largest


def write_shard(file: Path, group: list[tuple[str, tuple[int, ...]]], stock: np.ndarray) -> None:
    """One safetensors file: matrices cut from a stock of random numbers, vectors of ones."""
    header, position = {}, 0
    for name, lengths in group:
        end = position + 2 * int(np.prod(lengths))
        header[name] = {"dtype": "BF16", "shape": lengths, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for i, (_, lengths) in enumerate(group):
            if len(lengths) == 1:
                stream.write(np.full(lengths, ONE, dtype=np.uint16).tobytes())
                continue
            remaining = int(np.prod(lengths))
            start = 7919 * i % len(stock)
            while remaining:
                piece = stock[start : start + remaining]
                stream.write(piece.tobytes())
                remaining -= len(piece)
                start = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--blocks", type=int, help="instead of the shape's own number")
    parser.add_argument("--tokenizer", action="store_true", help="with the embedded model's")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.blocks:
        shape = {**shape, "num_hidden_layers": arguments.blocks}
    make_checkpoint(arguments.directory, shape)
    if arguments.tokenizer:
        from shortllm.embedded import MODEL_DIR

        for file in MODEL_DIR.glob("tokenizer*"):
            shutil.copy(file, arguments.directory)


if __name__ == "__main__":
    main()
