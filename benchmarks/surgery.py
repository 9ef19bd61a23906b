"""How fast, and in how much memory, surgery writes a shortened checkpoint, compared with `cp`.

Surgery should cost no more than copying the bytes that are kept, and its memory should not grow with the
model. This script makes a random bfloat16 checkpoint of Llama's shape (24 blocks of width 2048, about
3.2 GB, of which 2.4 GB are kept), then runs in turns, each in a process of its own:

    surgery   a fresh Python: import shortllm, open the checkpoint, check its structure, remove a quarter
              of the blocks (every fourth) and write the result
    cp        `cp -r` of files with the same bytes in the same shards

Before the first turn both sources are read once (they stay in the page cache if memory allows); before
each turn the target of the last one is deleted and `sync` has returned. Neither side waits for the disk;
the time until a `sync` after it returns is reported beside it. Reported are medians, for the whole process and for its parts
(start-up, structure, copying), the ratio to `cp`, and the peak of anonymous memory (RssAnon of
/proc/PID/status every 20 ms; mapped and cached file pages are not in it). Linux only.

    python benchmarks/surgery.py --dir /path/on/the/disk/to/measure --out surgery.json

Targets: ratio of copying to `cp` at most 1.3; peak at most 300 MB plus the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SAMPLE_SECONDS = 0.02
TARGET_RATIO = 1.3
TARGET_BYTES = 300 * 10**6
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}

CHILD = """
import json, sys, time
start = time.perf_counter()
from pathlib import Path
from shortllm.checkpoint import open_checkpoint
from shortllm.checkpoint.surgery import check_removal, write_shortened
import torch, transformers
from transformers import AutoModelForCausalLM
imported = time.perf_counter()
source, target, kept = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
checkpoint = open_checkpoint(source)
check_removal(checkpoint, kept)
checked = time.perf_counter()
first = []
write_shortened(
    checkpoint, kept, target, provenance={}, max_shard_bytes=10**9,
    advance=lambda copied: first.append(time.perf_counter()) if not first else None,
)
written = time.perf_counter()
print(json.dumps({"import_s": imported - start, "structure_s": checked - imported,
                  "write_s": written - checked}))
"""
"""What one surgery process runs. `write_s` holds a second structural check besides the copying."""


def tensor_shapes(blocks: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama checkpoint."""
    width, hidden = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    keys = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    yield "model.embed_tokens.weight", (CONFIG["vocab_size"], width)
    for b in range(blocks):
        head = f"model.layers.{b}"
        yield f"{head}.input_layernorm.weight", (width,)
        yield f"{head}.self_attn.q_proj.weight", (width, width)
        yield f"{head}.self_attn.k_proj.weight", (keys, width)
        yield f"{head}.self_attn.v_proj.weight", (keys, width)
        yield f"{head}.self_attn.o_proj.weight", (width, width)
        yield f"{head}.post_attention_layernorm.weight", (width,)
        yield f"{head}.mlp.gate_proj.weight", (hidden, width)
        yield f"{head}.mlp.up_proj.weight", (hidden, width)
        yield f"{head}.mlp.down_proj.weight", (width, hidden)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (CONFIG["vocab_size"], width)


def make_checkpoint(directory: Path, blocks: int, shard_bytes: int = 10**9) -> int:
    """Write random bfloat16 shards and their index; returns the bytes of the largest tensor."""
    directory.mkdir(parents=True)
    generator = np.random.default_rng(0)
    noise = generator.standard_normal(2**24, dtype=np.float32)
    stock = (noise.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16 is the upper half of float32
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = largest = 0
    for name, shape in tensor_shapes(blocks):
        count = 2 * int(np.prod(shape))
        largest = max(largest, count)
        if size + count > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append((name, shape))
        size += count
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys((name for name, _ in group), file)
        write_shard(directory / file, group, stock)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {**CONFIG, "num_hidden_layers": blocks}
    (directory / "config.json").write_text(json.dumps(config))
    return largest


def write_shard(file: Path, group: list[tuple[str, tuple[int, ...]]], stock: np.ndarray) -> None:
    """One safetensors file whose tensors are cut from a stock of random numbers."""
    header, position = {}, 0
    for name, shape in group:
        end = position + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for i, (_, shape) in enumerate(group):
            remaining = int(np.prod(shape))
            start = 7919 * i % len(stock)
            while remaining:
                piece = stock[start : start + remaining]
                stream.write(piece.tobytes())
                remaining -= len(piece)
                start = 0


def run(command: list[str]) -> tuple[float, float, int, str]:
    """Seconds of a process, seconds until a `sync` after it, its peak anonymous bytes, its output."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        # a process that ends is noticed at once: polling must not add to its time
        try:
            process.wait(SAMPLE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    seconds = time.perf_counter() - start
    os.sync()
    flushed = time.perf_counter() - start
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with exit code {process.returncode}")
    return seconds, flushed, peak, output


def anonymous_bytes(pid: int) -> int:
    """Resident memory of a process that is not backed by a file."""
    try:
        with open(f"/proc/{pid}/status") as stream:
            for line in stream:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # it has just ended
    return 0


def read_all(directory: Path) -> None:
    """Bring the files of a directory into the page cache."""
    for path in directory.iterdir():
        with open(path, "rb", buffering=0) as stream:
            while stream.read(2**24):
                pass


def directory_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def measure(place: Path, *, blocks: int, repeats: int) -> dict[str, Any]:
    """Make the checkpoint, take turns, and return every figure."""
    source, target, copy_source = place / "source", place / "target", place / "kept"
    largest = make_checkpoint(source, blocks)
    kept = [b for b in range(blocks) if b % 4 != 2]
    surgery = [sys.executable, "-c", CHILD, str(source), str(target), json.dumps(kept)]
    run(surgery)  # warm-up: compiles bytecode, and its result is what `cp` copies
    target.rename(copy_source)
    read_all(source)
    read_all(copy_source)
    turns: list[dict[str, float]] = []
    for turn in range(repeats):
        row: dict[str, float] = {}
        for kind in ("surgery", "cp") if turn % 2 else ("cp", "surgery"):
            command = surgery if kind == "surgery" else ["cp", "-r", str(copy_source), str(target)]
            seconds, flushed, peak, output = run(command)
            row |= {f"{kind}_s": seconds, f"{kind}_flushed_s": flushed, f"{kind}_anonymous_bytes": peak}
            if kind == "surgery":
                row |= json.loads(output.splitlines()[-1])
            shutil.rmtree(target)
        # the structural check runs twice in the child: once alone to be timed, once inside write_s
        row["copy_s"] = row["write_s"]
        turns.append(row)
        print(f"turn {turn + 1} of {repeats}: {row}", file=sys.stderr)
    medians = {key: statistics.median(row[key] for row in turns) for key in turns[0]}
    peak = int(max(row["surgery_anonymous_bytes"] for row in turns))
    return {
        "benchmark": "surgery",
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "filesystem": filesystem(place),
        "python": platform.python_version(),
        "repeats": repeats,
        "source_bytes": directory_bytes(source),
        "kept_bytes": directory_bytes(copy_source),
        "blocks": blocks,
        "kept_blocks": len(kept),
        "largest_tensor_bytes": largest,
        "peak_anonymous_bytes": peak,
        "medians": medians,
        "ratio_copy": medians["copy_s"] / medians["cp_s"],
        "ratio_process": medians["surgery_s"] / medians["cp_s"],
        "ratio_process_flushed": medians["surgery_flushed_s"] / medians["cp_flushed_s"],
        "target_ratio": TARGET_RATIO,
        "target_anonymous_bytes": TARGET_BYTES + largest,
        "turns": turns,
    }
