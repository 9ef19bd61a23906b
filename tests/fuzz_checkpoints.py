"""Damaged checkpoints: headers, indexes, pickles, configs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from fuzz_bench import Act, Bench, examine, shorten
from healthy import (
    BLOCKS,
    CONFIGS,
)
from mutations import TOO_DEEP, damaged, damaged_bytes, text_of

from shortllm.checkpoint.source import open_checkpoint
from shortllm.checkpoint.tensors import PICKLED, SAFETENSORS, SAFETENSORS_INDEX, read_tensor


def headers(random: Random, bench: Bench) -> Act:
    """A damaged header of a safetensors file."""
    bench.lay(bench.checkpoint())
    file = bench.source / SAFETENSORS
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    way = random.random()
    if way < 0.15:
        file.write_bytes(damaged_bytes(random, raw))
    elif way < 0.3:
        lengths = [0, 1, 7, length - 1, length + 1, length + 8, len(raw) - 8, len(raw), 10**8]
        lengths += [2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, random.randrange(length)]
        file.write_bytes(random.choice(lengths).to_bytes(8, "little") + raw[8:])
    elif way < 0.4:
        file.write_bytes(raw[: random.randrange(len(raw))])
    else:
        if way < 0.6:
            _displace(random, header)
            text = text_of(header, random)
        else:
            text = damaged(random, header, values=_header_values(header))
        encoded = text.encode()
        file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return lambda: examine(bench, random)


DTYPES = [
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL",
    "C64",
    "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "f32", "XX", "F8_E4M3FNUZ",
]  # fmt: skip


def _header_values(header: dict[str, Any]) -> list[Any]:
    """Items and parts of items that nearly fit."""
    items = [item for name, item in header.items() if name != "__metadata__"]
    sizes: list[Any] = [size for item in items for size in (item["shape"], item["data_offsets"])]
    return [
        *TOO_DEEP,
        *DTYPES,
        *items[:5],
        *sizes[:10],
        [0, 0],
        [128, 0],
        [-8, 0],
        [2**62, 2],
        [0.0, 128.0],
    ]


def _displace(random: Random, header: dict[str, Any]) -> None:
    """Move, grow, shrink, exchange or rename tensors."""
    names = [name for name in header if name != "__metadata__"]
    one, other = random.sample(names, 2)
    start, stop = header[one]["data_offsets"]
    step = random.choice((1, 2, 4, 8, 64, 10**6, 2**40, 2**63))
    random.choice(
        [
            lambda: header[one].update(data_offsets=[start + step, stop + step]),
            lambda: header[one].update(data_offsets=[start - step, stop - step]),
            lambda: header[one].update(data_offsets=[start, stop + step]),
            lambda: header[one].update(data_offsets=[stop, start]),
            lambda: header[one].update(data_offsets=header[other]["data_offsets"]),
            lambda: header[one].update(dtype=random.choice(DTYPES)),
            lambda: header[one].update(shape=header[one]["shape"][::-1]),
            lambda: header[one].update(shape=[*header[one]["shape"], 1]),
            lambda: header[one].update(shape=[*header[one]["shape"], 0]),
            lambda: header[one].update(shape=[-size for size in header[one]["shape"]]),
            lambda: header.update({one: header[other], other: header[one]}),
            lambda: header.update({one.replace(".1.", ".2."): header.pop(one)}),
            lambda: header.update({random.choice(["x", "", f"{one}.x", "é"]): header.pop(one)}),
            lambda: header.update(empty={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
            lambda: header.pop(one),
        ]
    )()


def indexes(random: Random, bench: Bench) -> Act:
    """A damaged index, or shards that are not where it says."""
    bench.lay(bench.checkpoint(form="shards"))
    if not bench.secret.exists():
        shutil.copy(bench.checkpoint() / SAFETENSORS, bench.secret)
    file = bench.source / SAFETENSORS_INDEX
    index = json.loads(file.read_text())
    shards = sorted(set(index["weight_map"].values()))
    way = random.random()
    if way < 0.2:
        file.write_bytes(damaged_bytes(random, file.read_bytes()))
    elif way < 0.4:
        _move_shard(random, bench, random.choice(shards))
    else:
        outside = [str(bench.secret), f"../{bench.secret.name}", f"x/../../{bench.secret.name}"]
        odd = [".", "..", "", "config.json", file.name, "a\x00b", "a" * 300, "\ud800", "x/y", "~"]
        places = [*shards, *outside, *odd, "./" + shards[0], shards[0].upper(), f"{shards[0]}/"]
        if way < 0.55:
            index["weight_map"] = {
                name: random.choice(places) if random.random() < 0.1 else place
                for name, place in index["weight_map"].items()
            }
            file.write_text(text_of(index, random))
        else:
            file.write_text(damaged(random, index, values=[*places, *TOO_DEEP]))
    return lambda: examine(bench, random)


def _move_shard(random: Random, bench: Bench, name: str) -> None:
    """Something else where a shard was."""
    shard = bench.source / name
    data = shard.read_bytes()
    shard.unlink()
    inside = bench.source / "blob"
    what = random.choice(["nothing", "directory", "outside", "inside", "loop", "cut", "damaged"])
    if what == "directory":
        shard.mkdir()
    elif what == "outside":
        shard.symlink_to(
            random.choice([bench.secret, Path("..") / bench.secret.name, "/etc/passwd"])
        )
    elif what == "inside":
        inside.write_bytes(data)
        shard.symlink_to("blob")
    elif what == "loop":
        shard.symlink_to(name)
    elif what == "cut":
        shard.write_bytes(data[: random.randrange(len(data))])
    elif what == "damaged":
        shard.write_bytes(damaged_bytes(random, data))


def pickles(random: Random, bench: Bench) -> Act:
    """A damaged `.bin`."""
    bench.lay(bench.checkpoint(form=random.choice(["zip", "legacy"])))
    file = bench.source / PICKLED
    raw = file.read_bytes()
    if random.random() < 0.2:  # in the data of a tensor: other numbers, and nothing else
        name = random.choice(sorted(bench.opened.tensors))
        data = bytes(_raw(read_tensor(bench.opened.tensors[name])))
        place = raw.index(data) + random.randrange(len(data))
        file.write_bytes(raw[:place] + random.randbytes(1) + raw[place + 1 :])
    else:
        file.write_bytes(damaged_bytes(random, raw))

    def act() -> None:
        checkpoint = open_checkpoint(bench.source)
        try:  # mapped as shortllm reads it, so that sums over the data are not looked at
            expected = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # of torch < 1.6
            expected = torch.load(file, map_location="cpu", weights_only=True)
        for name, tensor in expected.items():
            if name in checkpoint.tensors:
                found = read_tensor(checkpoint.tensors[name])
                assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
                assert _raw(found) == _raw(tensor)
            else:  # stored once where it shares memory with another
                stored = (expected[other] for other in checkpoint.tensors)
                assert any(tensor.data_ptr() == other.data_ptr() for other in stored)
        shorten(bench, checkpoint, random)

    return act


def _raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, which NaNs are compared by too."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def configs(random: Random, bench: Bench) -> Act:
    """A damaged config.json."""
    model_type = random.choice([*CONFIGS, *SMALL_CONFIGS, *SMALL_CONFIGS])
    bench.lay(bench.checkpoint(model_type))
    file = bench.source / "config.json"
    raw = json.loads(file.read_text())
    if random.random() < 0.1:
        file.write_bytes(damaged_bytes(random, file.read_bytes()))
    elif random.random() < 0.3:
        _misconfigure(random, raw)
        file.write_text(text_of(raw, random))
    else:
        file.write_text(damaged(random, raw, values=[*CONFIG_VALUES, *TOO_DEEP, *raw.values()]))
    return lambda: examine(bench, random)


SMALL_CONFIGS = ("llama", "qwen2", "gpt2")
"""Those of which a model is built in no time."""

CONFIG_VALUES: list[Any] = [
    *CONFIGS, "t5", "bert", "vit", "lama", "LlamaForCausalLM", "GPT2LMHeadModel",
    ["LlamaForCausalLM"], ["full_attention"] * 3, ["sliding_attention"] * 5, ["nothing"] * BLOCKS,
    [0, 1, 2, 3], [-1], [7], {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "yarn"},
    "bfloat16", "silu", "relu", "none", 5, 7, 16, 10**6, 10**9, 4.0, 4.5, -4,
]  # fmt: skip

COUNTS = ("num_hidden_layers", "n_layer", "num_attention_heads", "num_key_value_heads", "head_dim")
COUNTS += ("hidden_size", "vocab_size", "intermediate_size", "num_experts", "sliding_window")
COUNTS += ("max_position_embeddings", "max_window_layers", "decoder_sparse_step", "n_head")


def _misconfigure(random: Random, raw: dict[str, Any]) -> None:
    """Fields that speak of the blocks get values that are nearly possible, or far too large."""
    part = raw.get("text_config") if random.random() < 0.7 else None
    part = part if isinstance(part, dict) else raw
    counts = [field for field in COUNTS if field in part] or ["num_hidden_layers"]
    lists = [field for field, value in part.items() if isinstance(value, list)] or ["layer_types"]
    random.choice(
        [
            lambda: part.update({random.choice(counts): random.choice([0, -1, 1, 3, 5, 10**9])}),
            lambda: part.update(
                {random.choice(counts): random.choice([2**63, 1e9, "4", None, []])}
            ),
            lambda: part.update({random.choice(lists): random.choice([[], [0], ["x"], None, "x"])}),
            lambda: part.update(layer_types=["full_attention"] * random.choice([0, 1, 3, 5, 100])),
            lambda: part.update(architectures=random.choice([None, [], ["X"], [1], "X", {}])),
            lambda: part.update(model_type=random.choice(["", 1, None, [], {}, "x" * 999, "t5"])),
            lambda: part.update(
                quantization_config={"quant_method": random.choice(["gptq", 1, {}])}
            ),
            lambda: part.update(quantization_config={"quant_method": "compressed-tensors"}),
            lambda: part.update(per_block_shapes=random.choice([[], {}, [{}] * BLOCKS, 7, [None]])),
            lambda: part.update(auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "o.O"}),
            lambda: part.update(shortllm=random.choice([1, [], "x", {"removed_blocks": "x"}])),
            lambda: part.update(dtype=random.choice(["float99", 1, [], "float16", "int8"])),
            lambda: part.update(pad_token_id=random.choice([-1, 10**9, "x", [1], 1.5])),
            lambda: part.update(rope_parameters=random.choice([{}, [], {"rope_type": 1}, 5, "x"])),
            lambda: raw.update(text_config=random.choice([{}, [], 1, {"model_type": "llama"}])),
        ]
    )()
