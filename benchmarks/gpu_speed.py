"""Speed and memory of a deep and two shorter models on one GPU, plain and compiled.

Makes randomly initialised Llamas of 32, 26 and 21 blocks on the device (the shape of LLaMA-7B in
bfloat16 unless told otherwise) and measures them in turn, as `shortllm bench` does: latency,
throughput, time to the first token, memory and utilisation at batch 1, 16 and 64 with 128 and 512
new tokens; then the same with a static cache and torch.compile. Reads nothing but this checkout.

    sh benchmarks/gpu.sh speed                   on a GPU with 80 GB (34 GB are weights)
    sh benchmarks/gpu.sh speed --plain --runs 3  without compiling, fewer runs
    sh benchmarks/gpu.sh speed --tiny            the same steps on a CPU, in a few minutes

On smaller GPUs the models that do not run wait in main memory, and what does not fit is recorded as
such. Results go to OUT/plain and OUT/compiled (bench.json, bench.csv, plots) after every batch size
and length; the same command again goes on where an interrupted one was. The last line printed is
JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import SHAPES

TINY = {
    "shape": "tiny",
    "blocks": "4,3,2",
    "batch": "1,2",
    "new_tokens": "8",
    "device": "cpu",
    "dtype": "float32",
    "runs": 2,
}
"""What --tiny stands for."""


def build(shape: dict[str, int], blocks: int, device: torch.device, dtype: str) -> Any:
    """A model of so many blocks, made on the device and put aside in main memory."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**{**shape, "num_hidden_layers": blocks}, dtype=dtype)
    with device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval().to("cpu")


def described(name: str, model: Any, prompt_tokens: int, dtype: str) -> Any:
    """What the result says of a model that has no files."""
    from shortllm.benchmark.options import BenchmarkedModel
    from shortllm.files import fingerprint
    from shortllm.model.decoder import Decoder
    from shortllm.records import ModelInfo

    decoder = Decoder(model)
    info = ModelInfo(
        id=name,
        model_type=model.config.model_type,
        blocks=decoder.block_count,
        parameters=sum(one.numel() for one in model.parameters()),
        parameters_per_block=[
            sum(one.numel() for one in block.parameters()) for block in decoder.blocks
        ],
        bytes=model.get_memory_footprint(),
        fingerprint=fingerprint([model.config.to_dict(), "random, seed 0"]),
    )
    return BenchmarkedModel(
        name=name,
        model=info,
        head_parameters=decoder.head_elements,
        prompt_tokens=prompt_tokens,
        dtype=dtype,
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plain and compiled, each into a directory of its own."""
    from shortllm.benchmark.bench import STAND_IN_TOKENS, sweep
    from shortllm.benchmark.interleaved import Candidate
    from shortllm.benchmark.options import Benchmark, BenchmarkOptions
    from shortllm.files import fingerprint
    from shortllm.reporting.measurements import benchmark_table, write_benchmark
    from shortllm.run_directory import finished

    device = torch.device(arguments.device)
    ways = [
        BenchmarkOptions(
            batches=numbers(arguments.batch),
            new_tokens=numbers(arguments.new_tokens),
            warmup=arguments.warmup,
            runs=arguments.runs,
            prompt=f"{STAND_IN_TOKENS} arbitrary tokens",
            compile=compiled,
        )
        for compiled in ([False] if arguments.plain else [False, True])
    ]
    prompt_T = torch.arange(1, STAND_IN_TOKENS + 1)
    candidates, models = [], []
    for blocks in numbers(arguments.blocks):
        name = f"{arguments.shape}, {blocks} blocks"
        model = build(SHAPES[arguments.shape], blocks, device, arguments.dtype)
        candidates.append(Candidate(name=name, model=model, prompt_T=prompt_T))
        models.append(described(name, model, len(prompt_T), arguments.dtype))
    found = {}
    for options in ways:
        name = "compiled" if options.compile else "plain"
        directory = arguments.out / name
        directory.mkdir(parents=True, exist_ok=True)
        inputs = [[one.model_dump(mode="json") for one in models], options.model_dump(mode="json")]
        expected = fingerprint([*inputs, str(device)])
        result = finished(Benchmark, directory / "bench.json", expected)
        if result is None:
            result = sweep(
                candidates,
                models,
                options,
                device=device,
                fingerprint=expected,
                directory=directory,
            )
            write_benchmark(directory, result)
        head, rows = benchmark_table(result).plain()
        for row in [(name, *[""] * (len(head) - 1)), head, *rows]:
            print("  ".join(cell.rjust(12) for cell in row), file=sys.stderr)
        found[name] = result.model_dump(mode="json")
    return found


def numbers(text: str) -> list[int]:
    """`1,16,64` as numbers."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--blocks", default="32,26,21", help="the first is what others are against")
    parser.add_argument("--batch", default="1,16,64")
    parser.add_argument("--new-tokens", default="128,512")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--plain", action="store_true", help="do not compile")
    parser.add_argument("--out", type=Path, default=Path("results", "gpu-speed"))
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    if parser.parse_args().tiny:
        parser.set_defaults(**TINY)
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no GPU here. Try --tiny")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    print(json.dumps(measure(arguments)))


if __name__ == "__main__":
    main()
