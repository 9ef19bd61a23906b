"""Healing a model whose blocks are read one at a time: time and peak memory.

Makes a randomly initialised Llama checkpoint in bfloat16 (see random_checkpoint.py), removes blocks
from its middle, and heals it with random token ids, in a process of its own.

    python benchmarks/healing.py 1.1b --dir /path/with/room --out results.json
    python benchmarks/healing.py 7b --blocks 4 --no-attention

Peak memory is that of the whole process, libraries included. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import in_own_process
from random_checkpoint import SHAPES, make_checkpoint


def heal(arguments: argparse.Namespace) -> dict[str, Any]:
    """Heal in this process."""
    import shortllm
    from shortllm.runtime import peak_memory

    started, used = time.perf_counter(), time.process_time()
    record = shortllm.heal(
        str(arguments.dir / "short"),
        arguments.dir / "healed",
        method=arguments.method,
        attention=arguments.attention,
        file=arguments.dir / "ids.json",
        dtype=arguments.dtype,
        stream=True,
    )
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "peak_bytes": peak_memory(),
        "gaps": [gap.model_dump(mode="json") for gap in record.gaps],
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the shortened checkpoint, and heal it in another process."""
    import shortllm

    shape = {**SHAPES[arguments.shape]}
    shape["num_hidden_layers"] = arguments.blocks or shape["num_hidden_layers"]
    source, middle = arguments.dir / "source", shape["num_hidden_layers"] // 2
    make_checkpoint(source, shape)
    ids = np.random.default_rng(1).integers(
        0, shape["vocab_size"], (arguments.samples, arguments.length)
    )
    (arguments.dir / "ids.json").write_text(json.dumps(ids.tolist()))
    removed = list(range(middle, middle + arguments.remove))
    shortllm.prune(str(source), removed, arguments.dir / "short", verify=False)
    given = ["--worker", "--dir", arguments.dir, "--method", arguments.method]
    given += ["--dtype", arguments.dtype]
    given += [] if arguments.attention else ["--no-attention"]
    return {
        "benchmark": "healing",
        "shape": shape,
        "removed": removed,
        "method": arguments.method,
        "attention": arguments.attention,
        "dtype": arguments.dtype,
        "samples": arguments.samples,
        "length": arguments.length,
        "checkpoint_bytes": sum(file.stat().st_size for file in source.iterdir()),
        "cores": len(os.sched_getaffinity(0)),
        **in_own_process(__file__, arguments.shape, *given),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=SHAPES, nargs="?", default="1.1b")
    parser.add_argument("--blocks", type=int, help="of the checkpoint, instead of the shape's")
    parser.add_argument("--remove", type=int, default=1, help="blocks of the one gap")
    parser.add_argument("--method", default="regression")
    parser.add_argument("--no-attention", dest="attention", action="store_false")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dir", type=Path, help="where to write; default: the temporary directory")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(heal(arguments)))
        return
    with tempfile.TemporaryDirectory(prefix="healing-", dir=arguments.dir) as place:
        arguments.dir = Path(place)
        result = measure(arguments)
    line = json.dumps(result)
    if arguments.out:
        arguments.out.write_text(line + "\n")
    print(f"{result['seconds']:.0f} s, peak {result['peak_bytes'] / 1e9:.2f} GB")
    print(line)


if __name__ == "__main__":
    main()
