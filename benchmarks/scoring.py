"""Scoring all blocks by `ppl`: the removal walk against the plain loop, alternated in one sitting.

The plain loop is what one writes without the walk: for each block take it out of the module list,
run the calibration sample by sample, put it back. Both score a randomly initialised Llama on the
same random tokens, each run in a process of its own, so that peak memory is that of one side alone.
The yardstick is the machine's rate for a large matrix product in the same computation type,
measured in each round beside them. What `shortllm info` says of the same model is reported too.

    python benchmarks/scoring.py                       # the default shape, float32 and bfloat16
    python benchmarks/scoring.py --rounds 3 --out results.json
    python benchmarks/scoring.py --greedy 8            # remove eight blocks one after the other

With `--greedy N` the sides are `greedy` by `ppl`, nothing protected, that removes N blocks in as
many rounds, and N one-shot scorings by the plain loop, of which a few blocks are timed and scaled
up.

The last line printed is JSON: per type the ratio plain / walk (median of the rounds) by wall time
and by processor time, which tells more on a machine with other work, the bound that arithmetic
alone allows, seconds, peak resident bytes of both, the share of the measured rate, and the time and
memory that were foretold.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from measuring import in_own_process, matrix_rate, plain_perplexities
from random_checkpoint import make_checkpoint

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 32_000,
}
SAMPLES, LENGTH = 10, 128
TIMED = 4
"""Blocks of the plain loop that are timed where it is scaled up."""


def build(dtype: str) -> tuple[Any, Any]:
    """The model and its calibration ids, `[10, 128]`, the same in every process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(getattr(torch, dtype)).eval()
    return model, torch.randint(0, SHAPE["vocab_size"], (SAMPLES, LENGTH))


def walk(model: Any, ids: Any, greedy: int) -> list[float]:
    """Perplexity without each block, or the order of so many removals, by shortllm."""
    from shortllm.model.decoder import Decoder
    from shortllm.scoring import Asked, Scorer

    decoder = Decoder(model)
    blocks: Any = SimpleNamespace(block_count=decoder.block_count)  # nothing is read from files
    options = {"rounds": greedy, "protect_first": 0, "protect_last": 0}
    asked = Asked.of("greedy", options) if greedy else Asked.of("ppl")
    scorer = Scorer(checkpoint=blocks, open_decoder=lambda: decoder, ids_BT=ids)
    found = scorer.score([asked])[asked.name]
    return [float(b) for b in found.order or ()] if greedy else found.values


def plain(model: Any, ids: Any, greedy: int) -> list[float]:
    """Perplexity without each block, or without a few of them, by the plain loop."""
    blocks = SHAPE["num_hidden_layers"]
    return plain_perplexities(model, ids, range(TIMED if greedy else blocks))


def foretell(dtype: str, greedy: int) -> dict[str, Any]:
    """What `shortllm info` says of scoring such a model in memory."""
    import shortllm

    with tempfile.TemporaryDirectory() as place:
        make_checkpoint(Path(place, "model"), SHAPE)
        summary = shortllm.info(
            f"{place}/model",
            samples=SAMPLES,
            length=LENGTH,
            dtype=dtype,
            options={"greedy": {"rounds": greedy or None, "protect_first": 0, "protect_last": 0}},
        )
    name = "greedy" if greedy else "ppl"
    [found] = [one for one in summary.estimates if name in one.criteria and not one.streamed]
    return {"predicted_seconds": found.seconds, "predicted_peak_bytes": found.peak_bytes}


def flops(candidates_times_blocks: float, heads: int) -> float:
    """Operations of so many block passes and so many passes of the head over all tokens."""
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    block = 2 * (4 * hidden**2 + 3 * hidden * inner)
    head = 2 * hidden * SHAPE["vocab_size"]
    return SAMPLES * (LENGTH * candidates_times_blocks * block + (LENGTH - 1) * heads * head)


def worker(side: str, dtype: str, greedy: int) -> dict[str, Any]:
    """One measurement."""
    import torch

    from shortllm.runtime import peak_memory

    if side == "rate":
        return matrix_rate(dtype)
    if side == "foretell":
        return foretell(dtype, greedy)
    model, ids = build(dtype)
    with torch.inference_mode():
        model(input_ids=ids[:1, :32], use_cache=False)  # first-use costs of the libraries
    before = peak_memory()
    start, used = time.perf_counter(), time.process_time()
    values = (walk if side == "walk" else plain)(model, ids, greedy)
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    scale = greedy * SHAPE["num_hidden_layers"] / TIMED if side == "plain" and greedy else 1
    return {
        "seconds": scale * seconds,
        "cpu_seconds": scale * cpu,
        "peak": peak_memory(),
        "before": before,
        "values": values,
    }


def passes(greedy: int) -> tuple[float, int]:
    """Block passes and heads that the walk takes."""
    blocks = SHAPE["num_hidden_layers"]
    left = [blocks - gone for gone in range(greedy or 1)]
    return sum(n * (n + 1) / 2 for n in left), sum(n + 1 for n in left)


def compare(dtype: str, rounds: int, greedy: int) -> dict[str, Any]:
    """Alternate both sides and the yardstick, and sum up."""

    def measure(side: str) -> dict[str, Any]:
        return in_own_process(
            __file__, "--worker", side, "--dtypes", dtype, "--greedy", str(greedy)
        )

    foretold = measure("foretell")
    runs: dict[str, list[dict[str, Any]]] = {"walk": [], "plain": [], "rate": []}
    for number in range(rounds):
        for side in ("rate", "walk", "plain") if number % 2 == 0 else ("rate", "plain", "walk"):
            runs[side].append(measure(side))
    blocks = SHAPE["num_hidden_layers"]
    work = flops(*passes(greedy))

    def shares(time: str, rate: str) -> list[float]:
        pairs = zip(runs["walk"], runs["rate"], strict=True)
        return [work / run[time] / yardstick[rate] for run, yardstick in pairs]

    def ratios(time: str) -> list[float]:
        pairs = zip(runs["walk"], runs["plain"], strict=True)
        return [plain[time] / walk[time] for walk, plain in pairs]

    plain_work = flops((greedy or 1) * blocks * (blocks - 1), (greedy or 1) * blocks)
    found = {
        "ratio": round(statistics.median(ratios("seconds")), 3),
        "ratios": [round(ratio, 3) for ratio in ratios("seconds")],
        "cpu_ratio": round(statistics.median(ratios("cpu_seconds")), 3),
        "arithmetic_bound": round(plain_work / work, 3),
        "walk_seconds": round(statistics.median(run["seconds"] for run in runs["walk"]), 2),
        "plain_seconds": round(statistics.median(run["seconds"] for run in runs["plain"]), 2),
        "walk_peak_bytes": max(run["peak"] for run in runs["walk"]),
        "plain_peak_bytes": max(run["peak"] for run in runs["plain"]),
        "loaded_peak_bytes": min(run["before"] for run in runs["walk"]),
        "matrix_gflops": round(statistics.median(run["per_s"] for run in runs["rate"]) / 1e9, 1),
        "share_of_matrix_rate": round(statistics.median(shares("seconds", "per_s")), 3),
        "share_by_cpu_time": round(statistics.median(shares("cpu_seconds", "per_cpu_s")), 3),
        **foretold,
    }
    values = [runs[side][0]["values"] for side in ("walk", "plain")]
    if greedy:
        return found | {"removal_order": values[0], "plain_blocks_timed": TIMED}
    differences = [abs(a - b) / b for a, b in zip(*values, strict=True)]
    return found | {"largest_relative_difference": max(differences)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--greedy", type=int, default=0, metavar="N", help="remove N in rounds")
    parser.add_argument(
        "--worker", choices=["walk", "plain", "rate", "foretell"], help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(arguments.worker, arguments.dtypes[0], arguments.greedy)))
        return
    result: dict[str, Any] = {
        "shape": {**SHAPE, "samples": SAMPLES, "length": LENGTH},
        "cores": len(os.sched_getaffinity(0)),
        "greedy": arguments.greedy,
    }
    for dtype in arguments.dtypes:
        result[dtype] = found = compare(dtype, arguments.rounds, arguments.greedy)
        print(
            f"{dtype}: plain loop {found['plain_seconds']} s, walk {found['walk_seconds']} s, "
            "ratio "
            f"{found['ratio']}, by processor time {found['cpu_ratio']} (arithmetic allows "
            f"{found['arithmetic_bound']}); peak "
            f"{found['plain_peak_bytes'] / 2**20:.0f} and {found['walk_peak_bytes'] / 2**20:.0f} "
            "MiB; "
            f"{found['share_of_matrix_rate']:.0%} of {found['matrix_gflops']} GFLOP/s, by "
            f"processor time {found['share_by_cpu_time']:.0%}; foretold "
            f"{found['predicted_seconds']:.1f} s and {found['predicted_peak_bytes'] / 2**20:.0f} "
            "MiB"
        )
    line = json.dumps(result)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
