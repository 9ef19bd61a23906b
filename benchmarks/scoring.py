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
alone allows, seconds, peak resident bytes of both, the share of the measured rate, the time and
memory that were estimated, and the share of the rate that a block and the head of the model itself
reach (estimated / measured seconds).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
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
WIDER = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_hidden_layers": 8,
}
"""What another width changes."""
LENGTH = 128
TIMED = 4
"""Blocks of the plain loop that are timed where it is scaled up."""


def walk(model: Path, dtype: str, ids: Any, greedy: int) -> Callable[[], list[float]]:
    """Perplexity without each block, or the order of so many removals, by shortllm."""
    import torch

    from shortllm.checkpoint.source import open_checkpoint
    from shortllm.criteria import resolve
    from shortllm.model.decoder import Decoder
    from shortllm.model.loading import load_model
    from shortllm.pruning.scoring import Scorer

    checkpoint = open_checkpoint(model)
    decoder = Decoder(load_model(checkpoint, device=torch.device("cpu"), dtype=dtype))
    options = {"rounds": greedy, "protect_first": 0, "protect_last": 0}
    asked = resolve("greedy", options) if greedy else resolve("ppl")
    scorer = Scorer(checkpoint=checkpoint, open_decoder=lambda: decoder, ids_BT=ids)

    def run() -> list[float]:
        found = scorer.score([asked])[asked.name]
        return [float(b) for b in found.order or ()] if greedy else found.values

    return run


def plain(model: Path, dtype: str, ids: Any, greedy: int) -> Callable[[], list[float]]:
    """Perplexity without each block, or without a few of them, by the plain loop."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    removed = range(TIMED if greedy else SHAPE["num_hidden_layers"])
    return lambda: plain_perplexities(loaded, ids, removed)


def estimate(model: Path, dtype: str, samples: int, greedy: int) -> dict[str, Any]:
    """What `shortllm info` says of scoring the model in memory."""
    import shortllm

    summary = shortllm.info(
        str(model),
        samples=samples,
        length=LENGTH,
        dtype=dtype,
        options={"greedy": {"rounds": greedy or None, "protect_first": 0, "protect_last": 0}},
    )
    name = "greedy" if greedy else "ppl"
    [found] = [one for one in summary.estimates if name in one.criteria and not one.streamed]
    return {"predicted_seconds": found.seconds, "predicted_peak_bytes": found.peak_bytes}


def flops(candidates_times_blocks: float, heads: int, samples: int) -> float:
    """Operations of so many block passes and so many passes of the head over all tokens."""
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    block = 2 * (4 * hidden**2 + 3 * hidden * inner)
    head = 2 * hidden * SHAPE["vocab_size"]
    return samples * (LENGTH * candidates_times_blocks * block + (LENGTH - 1) * heads * head)


def worker(side: str, model: Path, dtype: str, samples: int, greedy: int) -> dict[str, Any]:
    """One measurement."""
    import torch

    from shortllm.runtime import peak_memory

    if side == "rate":
        return matrix_rate(dtype)
    if side == "estimate":
        return estimate(model, dtype, samples, greedy)
    torch.manual_seed(0)
    ids = torch.randint(0, SHAPE["vocab_size"], (samples, LENGTH))
    (walk if side == "walk" else plain)(model, dtype, ids[:1, :8], 1)()  # first-use costs
    run = (walk if side == "walk" else plain)(model, dtype, ids, greedy)
    before = peak_memory()
    start, used = time.perf_counter(), time.process_time()
    values = run()
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


def compare(model: Path, dtype: str, rounds: int, samples: int, greedy: int) -> dict[str, Any]:
    """Alternate both sides and the yardstick, and sum up."""

    def measure(side: str) -> dict[str, Any]:
        given = ["--worker", side, "--model", model, "--dtypes", dtype, "--greedy", greedy]
        wide = ["--wide"] if SHAPE["hidden_size"] == WIDER["hidden_size"] else []
        return in_own_process(__file__, *given, *wide, "--samples", samples)

    estimated = measure("estimate")
    runs: dict[str, list[dict[str, Any]]] = {"walk": [], "plain": [], "rate": []}
    for number in range(rounds):
        for side in ("rate", "walk", "plain") if number % 2 == 0 else ("rate", "plain", "walk"):
            runs[side].append(measure(side))
    blocks = SHAPE["num_hidden_layers"]
    work = flops(*passes(greedy), samples)

    def shares(time: str, rate: str) -> list[float]:
        pairs = zip(runs["walk"], runs["rate"], strict=True)
        return [work / run[time] / yardstick[rate] for run, yardstick in pairs]

    def ratios(time: str) -> list[float]:
        pairs = zip(runs["walk"], runs["plain"], strict=True)
        return [plain[time] / walk[time] for walk, plain in pairs]

    plain_work = flops((greedy or 1) * blocks * (blocks - 1), (greedy or 1) * blocks, samples)
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
        "share_of_own_rate": round(
            estimated["predicted_seconds"]
            / statistics.median(run["seconds"] for run in runs["walk"]),
            3,
        ),
        **estimated,
    }
    values = [runs[side][0]["values"] for side in ("walk", "plain")]
    if greedy:
        return found | {"removal_order": values[0], "plain_blocks_timed": TIMED}
    differences = [abs(a - b) / b for a, b in zip(*values, strict=True)]
    return found | {"largest_relative_difference": max(differences)}


def line_of(dtype: str, found: dict[str, Any]) -> str:
    """One comparison for a reader."""
    return (
        f"{dtype}: plain loop {found['plain_seconds']} s, walk {found['walk_seconds']} s, ratio "
        f"{found['ratio']}, by processor time {found['cpu_ratio']} (arithmetic allows "
        f"{found['arithmetic_bound']}); peak {found['plain_peak_bytes'] / 2**20:.0f} and "
        f"{found['walk_peak_bytes'] / 2**20:.0f} MiB; {found['share_of_matrix_rate']:.0%} of "
        f"{found['matrix_gflops']} GFLOP/s, by processor time {found['share_by_cpu_time']:.0%}; "
        f"{found['share_of_own_rate']:.0%} of the rate of its own shapes; "
        f"estimated {found['predicted_seconds']:.1f} s and "
        f"{found['predicted_peak_bytes'] / 2**20:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--wide", action="store_true", help="width 2,048 instead of 512")
    parser.add_argument("--samples", type=int, default=10, help=f"of {LENGTH} tokens")
    parser.add_argument("--greedy", type=int, default=0, metavar="N", help="remove N in rounds")
    parser.add_argument(
        "--worker", choices=["walk", "plain", "rate", "estimate"], help=argparse.SUPPRESS
    )
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.wide:
        SHAPE.update(WIDER)
    if arguments.worker:
        given = (arguments.model, arguments.dtypes[0], arguments.samples, arguments.greedy)
        print(json.dumps(worker(arguments.worker, *given)))
        return
    result: dict[str, Any] = {
        "shape": {**SHAPE, "samples": arguments.samples, "length": LENGTH},
        "cores": len(os.sched_getaffinity(0)),
        "greedy": arguments.greedy,
    }
    with tempfile.TemporaryDirectory(prefix="scoring-") as place:
        model = Path(place, "model")
        make_checkpoint(model, SHAPE)
        how = (arguments.rounds, arguments.samples, arguments.greedy)
        for dtype in arguments.dtypes:
            result[dtype] = compare(model, dtype, *how)
            print(line_of(dtype, result[dtype]), flush=True)
    line = json.dumps(result)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
