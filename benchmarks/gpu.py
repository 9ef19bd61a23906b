"""Scoring on one GPU: time, peak memory, share of the matrix rate, and the plain loop beside it.

Makes a randomly initialised Llama on the device (the shape of LLaMA-7B in bfloat16 unless told
otherwise), scores random token ids by `ppl`, `taylor` and `influence`, and times the plain loop for
`ppl` over a few of the blocks, scaled up to all. The yardstick is the rate of a large matrix
product in the same computation type on the same device. Reads nothing but this checkout and writes
one JSON file. `benchmarks/gpu.sh` calls it.

    sh benchmarks/gpu.sh                                  on a GPU with 20 GB or more
    sh benchmarks/gpu.sh --blocks 16                      half as deep, for a smaller one
    sh benchmarks/gpu.sh --shape tiny --device cpu        the same steps without a GPU

Peak memory is what the device gave out at most, model included; on a CPU the peak of the process.
The last line printed is the JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measuring import matrix_rate, plain_perplexities, synchronize
from random_checkpoint import SHAPES

CRITERIA = ["ppl", "taylor", "influence"]
TIMED = 2
"""Blocks of the plain loop that are timed."""


def build(shape: dict[str, int], device: str, dtype: str) -> Any:
    """The model, made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**shape, dtype=dtype)
    with torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def timed(run: Callable[[], Any], device: str) -> tuple[float, int, Any]:
    """Seconds, peak bytes, and what `run` returned."""
    from shortllm.runtime import peak_memory

    on_gpu = device.startswith("cuda")
    synchronize(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    found = run()
    synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() if on_gpu else peak_memory(), found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every figure."""
    from shortllm.checkpoint.structure import block_structure
    from shortllm.criteria import resolve
    from shortllm.model.decoder import Decoder
    from shortllm.pruning.scoring import Scorer
    from shortllm.runtime import versions

    shape = dict(SHAPES[arguments.shape])
    shape["num_hidden_layers"] = arguments.blocks or shape["num_hidden_layers"]
    device, dtype = arguments.device, arguments.dtype
    rate = matrix_rate(dtype, device=device)["per_s"]
    model = build(shape, device, dtype)
    generator = torch.Generator().manual_seed(1)
    size = (arguments.samples, arguments.length)
    ids_BT = torch.randint(0, shape["vocab_size"], size, generator=generator).to(device)
    decoder = Decoder(model)
    blocks: Any = SimpleNamespace(  # nothing is read from files
        block_count=decoder.block_count, structure=block_structure(decoder.model.config)
    )
    scorer = Scorer(checkpoint=blocks, open_decoder=lambda: decoder, ids_BT=ids_BT)
    found: dict[str, Any] = {
        "benchmark": "gpu",
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "platform": platform.platform(),
        "versions": versions(),
        "shape": shape,
        "samples": arguments.samples,
        "length": arguments.length,
        "dtype": dtype,
        "model_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "matrix_flops_per_s": rate,
    }
    for name in CRITERIA:
        asked = [resolve(name)]
        scorer.score(asked)  # first-use costs of the libraries
        runs = [timed(lambda: scorer.score(asked), device) for _ in range(arguments.rounds)]  # noqa: B023
        seconds = min(run[0] for run in runs)
        found[name] = {
            "seconds": [run[0] for run in runs],
            "peak_bytes": max(run[1] for run in runs),
            "flops": scorer.work(asked),
            "share_of_matrix_rate": scorer.work(asked) / seconds / rate,
        }
        print(line_of(name, found[name]), file=sys.stderr)
    found["plain"] = measure_plain(model, ids_BT, device)
    return found


def measure_plain(model: Any, ids_BT: Any, device: str) -> dict[str, Any]:
    """The plain loop for `ppl` over a few blocks, scaled up to all."""
    count = len(model.model.layers)
    removed = [count // 3 + number for number in range(TIMED)]
    plain_perplexities(model, ids_BT, removed[:1])
    seconds, peak, _ = timed(lambda: plain_perplexities(model, ids_BT, removed), device)
    print(
        f"plain loop for ppl: {seconds * count / TIMED:.2f} s, scaled up from {TIMED} of "
        f"{count} blocks",
        file=sys.stderr,
    )
    return {"seconds": seconds * count / TIMED, "timed_blocks": TIMED, "peak_bytes": peak}


def line_of(name: str, run: dict[str, Any]) -> str:
    """One measurement for a reader."""
    return (
        f"{name}: {min(run['seconds']):.2f} s, peak {run['peak_bytes'] / 2**30:.2f} GiB, "
        f"{run['share_of_matrix_rate']:.0%} of the matrix rate"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--blocks", type=int, help="instead of the shape's own number")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="default: results/gpu-<device>.json")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no GPU here. Try --device cpu --shape tiny")
    result = measure(arguments)
    name = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    out = arguments.out or Path("results", f"gpu-{name}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
