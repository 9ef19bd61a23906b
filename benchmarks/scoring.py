"""Scoring all blocks by `ppl`: the removal walk against the plain loop, alternated in one sitting.

The plain loop is what one writes without the walk: for each block take it out of the module list,
run the calibration sample by sample, put it back. Both score a randomly initialised Llama on the
same random tokens, each run in a process of its own, so that peak memory is that of one side alone.
The yardstick is the machine's rate for a large matrix product in the same computation type,
measured in each round beside them.

    python benchmarks/scoring.py                       # the default shape, float32 and bfloat16
    python benchmarks/scoring.py --rounds 3 --out results.json

The last line printed is JSON: per type the wall ratio plain / walk (median of the rounds), the
bound that arithmetic alone allows, seconds, peak resident bytes of both, and the share of the
measured rate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 32_000,
}
SAMPLES, LENGTH = 10, 128


def build(dtype: str) -> tuple[Any, Any]:
    """The model and its calibration ids, `[10, 128]`, the same in every process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(getattr(torch, dtype)).eval()
    return model, torch.randint(0, SHAPE["vocab_size"], (SAMPLES, LENGTH))


def walk(model: Any, ids: Any) -> list[float]:
    """Perplexity without each block, by shortllm."""
    from shortllm import criteria
    from shortllm.model.decoder import Decoder

    return criteria.get("ppl").score(Decoder(model), ids, lambda work: None).values


def plain(model: Any, ids: Any) -> list[float]:
    """Perplexity without each block: remove, run sample by sample, put back."""
    import torch
    from torch.nn.functional import cross_entropy

    blocks, perplexities = model.model.layers, []
    for removed in range(len(blocks)):
        kept = [block for number, block in enumerate(blocks) if number != removed]
        model.model.layers = torch.nn.ModuleList(kept)
        model.config.num_hidden_layers = len(kept)
        losses = []
        for sample in ids:
            with torch.inference_mode():
                logits = model(input_ids=sample[None], use_cache=False).logits[0, :-1]
            losses.append(cross_entropy(logits.float(), sample[1:], reduction="none"))
        perplexities.append(torch.cat(losses).double().mean().exp().item())
        model.model.layers = blocks
        model.config.num_hidden_layers = len(blocks)
    return perplexities


def matrix_rate(dtype: str, seconds: float = 3.0) -> float:
    """Floating-point operations per second of a 2048 x 2048 x 2048 product, the best of many."""
    import torch

    a, b = (torch.randn(2048, 2048).to(getattr(torch, dtype)) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def flops(candidates_times_blocks: float, heads: int) -> float:
    """Operations of so many block passes and so many passes of the head over all tokens."""
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    block = 2 * (4 * hidden**2 + 3 * hidden * inner)
    head = 2 * hidden * SHAPE["vocab_size"]
    return SAMPLES * (LENGTH * candidates_times_blocks * block + (LENGTH - 1) * heads * head)


def worker(side: str, dtype: str) -> None:
    """One measurement; prints one line of JSON."""
    import torch

    from shortllm.runtime import peak_memory

    if side == "rate":
        print(json.dumps({"rate": matrix_rate(dtype)}))
        return
    model, ids = build(dtype)
    with torch.inference_mode():
        model(input_ids=ids[:1, :32], use_cache=False)  # first-use costs of the libraries
    before = peak_memory()
    start = time.perf_counter()
    values = (walk if side == "walk" else plain)(model, ids)
    seconds = time.perf_counter() - start
    print(
        json.dumps({"seconds": seconds, "peak": peak_memory(), "before": before, "values": values})
    )


def measure(side: str, dtype: str) -> dict[str, Any]:
    """Run one worker process."""
    command = [sys.executable, __file__, "--worker", side, "--dtypes", dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(dtype: str, rounds: int) -> dict[str, Any]:
    """Alternate both sides and the yardstick, and sum up."""
    runs: dict[str, list[dict[str, Any]]] = {"walk": [], "plain": [], "rate": []}
    for number in range(rounds):
        for side in ("rate", "walk", "plain") if number % 2 == 0 else ("rate", "plain", "walk"):
            runs[side].append(measure(side, dtype))
    blocks = SHAPE["num_hidden_layers"]
    work = flops(blocks * (blocks + 1) / 2, blocks + 1)
    seconds = {side: [run["seconds"] for run in runs[side]] for side in ("walk", "plain")}
    shares = [
        work / run["seconds"] / rate["rate"]
        for run, rate in zip(runs["walk"], runs["rate"], strict=True)
    ]
    ratios = [b / a for a, b in zip(seconds["walk"], seconds["plain"], strict=True)]
    values = [runs[side][0]["values"] for side in ("walk", "plain")]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "arithmetic_bound": round(flops(blocks * (blocks - 1), blocks) / work, 3),
        "walk_seconds": round(statistics.median(seconds["walk"]), 2),
        "plain_seconds": round(statistics.median(seconds["plain"]), 2),
        "walk_peak_bytes": max(run["peak"] for run in runs["walk"]),
        "plain_peak_bytes": max(run["peak"] for run in runs["plain"]),
        "loaded_peak_bytes": min(run["before"] for run in runs["walk"]),
        "matrix_gflops": round(statistics.median(run["rate"] for run in runs["rate"]) / 1e9, 1),
        "share_of_matrix_rate": round(statistics.median(shares), 3),
        "largest_relative_difference": max(abs(a - b) / b for a, b in zip(*values, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--worker", choices=["walk", "plain", "rate"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.dtypes[0])
        return
    result: dict[str, Any] = {
        "shape": {**SHAPE, "samples": SAMPLES, "length": LENGTH},
        "cores": len(os.sched_getaffinity(0)),
    }
    for dtype in arguments.dtypes:
        result[dtype] = found = compare(dtype, arguments.rounds)
        print(
            f"{dtype}: plain loop {found['plain_seconds']} s, walk {found['walk_seconds']} s, "
            "ratio "
            f"{found['ratio']} (arithmetic allows {found['arithmetic_bound']}); peak "
            f"{found['plain_peak_bytes'] / 2**20:.0f} and {found['walk_peak_bytes'] / 2**20:.0f} "
            "MiB; "
            f"{found['share_of_matrix_rate']:.0%} of {found['matrix_gflops']} GFLOP/s"
        )
    line = json.dumps(result)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
