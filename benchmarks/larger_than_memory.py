"""Scoring a model whose blocks are read one at a time: time, peak memory, and the estimates.

Makes a randomly initialised Llama checkpoint in bfloat16 (1.1b: 2.2 GB, 7b: 13.5 GB; see
random_checkpoint.py), scores random token ids by every criterion with its blocks streamed, each in
a process of its own, and deletes the checkpoint. Before each the rate of a large matrix product in
the same computation type is measured, the yardstick for the share that is reported: by wall time,
and by processor time, which tells more on a machine with other work. Beside them

    predicted   what `shortllm info` says of the same checkpoint, before anything is measured
    plain       time of the plain loop for `ppl` with the model in memory, from the time of a pass
                over the first few blocks and over half of them, scaled up
    taylor      peak memory of the first few blocks as a model in memory in float32: by shortllm,
                and by one backward pass with the gradients of all weights at once

    python benchmarks/larger_than_memory.py 1.1b --dir /path/with/room --out results.json
    python benchmarks/larger_than_memory.py 7b --criteria ppl taylor influence --resident-blocks 0

Peak memory is that of the whole process, libraries included. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import in_own_process, matrix_rate, plain_perplexities, plain_products
from random_checkpoint import SHAPES, make_checkpoint

GROUPS = ["ppl,kl", "taylor", "influence,relative,angular", "magnitude", "greedy"]


def score(arguments: argparse.Namespace) -> dict[str, Any]:
    """Scores by the criteria asked for, streamed."""
    import transformers  # noqa: F401  (its import is not what is measured)

    import shortllm
    from shortllm.data.options import CalibrationOptions
    from shortllm.runtime import peak_memory

    names = arguments.criteria[0].split(",")
    started, used = time.perf_counter(), time.process_time()
    shortllm.score(
        str(arguments.model),
        criterion=names,
        options={"greedy": {"rounds": arguments.greedy_rounds}} if "greedy" in names else {},
        calibration=CalibrationOptions(file=ids_file(arguments)),
        dtype=arguments.dtypes[0],
        stream=True,
    )
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "peak_bytes": peak_memory(),
    }


def predict(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `shortllm info` says."""
    import shortllm

    summary = shortllm.info(
        str(arguments.model),
        samples=arguments.samples,
        length=arguments.length,
        dtype=arguments.dtypes[0],
        options={"greedy": {"rounds": arguments.greedy_rounds}},
    )
    return summary.model_dump(mode="json", include={"probe", "estimates"})


def rate(arguments: argparse.Namespace) -> dict[str, Any]:
    """The yardstick."""
    return matrix_rate(arguments.dtypes[0])


def plain(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the plain loop over all blocks, from passes over `--plain-blocks` and half of
    them."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # the blocks that are left out are no surprise
    shape = SHAPES[arguments.shape]
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        dtype=getattr(torch, arguments.dtypes[0]),
        num_hidden_layers=min(arguments.plain_blocks, shape["num_hidden_layers"]),
    ).eval()
    ids_BT = token_ids(arguments)
    blocks = model.model.layers
    plain_perplexities(model, ids_BT[:1], [0])  # first-use costs of the libraries
    times = []
    for count in (len(blocks), len(blocks) // 2):
        model.model.layers = blocks[:count]
        start, used = time.perf_counter(), time.process_time()
        plain_perplexities(model, ids_BT, [0])
        times.append((time.perf_counter() - start, time.process_time() - used))
    found: dict[str, Any] = {"measured_blocks": len(blocks)}
    whole = shape["num_hidden_layers"]
    for name, many, few in zip(("seconds", "cpu_seconds"), *times, strict=True):
        per_block = (many - few) / (len(blocks) - len(blocks) // 2)
        rest = many - per_block * (len(blocks) - 1)
        found |= {name: whole * ((whole - 1) * per_block + rest), f"{name}_per_block": per_block}
    return found


def resident_taylor(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of Taylor scores with the model in memory."""
    import torch

    from shortllm.checkpoint.source import open_checkpoint
    from shortllm.criteria import resolve
    from shortllm.model.decoder import Decoder
    from shortllm.model.loading import load_model
    from shortllm.pruning.scoring import Scorer

    checkpoint = open_checkpoint(arguments.model)

    def run(model: Any) -> list[float]:
        decoder = Decoder(model)
        scorer = Scorer(
            checkpoint=checkpoint, open_decoder=lambda: decoder, ids_BT=token_ids(arguments)
        )
        return scorer.score([resolve("taylor")])["taylor"].values

    return memory_of(run, lambda: load_model(checkpoint, device=torch.device("cpu")))


def plain_taylor(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of one backward pass through all blocks of the same model."""
    import torch
    from transformers import AutoModelForCausalLM

    return memory_of(
        lambda model: plain_products(model, token_ids(arguments)),
        lambda: AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
    )


def memory_of(run: Callable[[Any], list[float]], load: Callable[[], Any]) -> dict[str, Any]:
    """Peak of a run over a loaded model, which is taken apart from that of loading it."""
    import transformers  # noqa: F401

    before = memory("VmRSS")
    model = load()
    loading = memory("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    values = run(model)
    return {
        "libraries_bytes": before,
        "model_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "loading_peak_bytes": loading,
        "scoring_peak_bytes": memory("VmHWM"),
        "values": values,
    }


def memory(field: str) -> int:
    """Resident memory of this process, now (`VmRSS`) or at most (`VmHWM`), bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024


WORKERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "score": score,
    "predict": predict,
    "rate": rate,
    "plain": plain,
    "resident-taylor": resident_taylor,
    "plain-taylor": plain_taylor,
}


def ids_file(arguments: argparse.Namespace) -> Path:
    return arguments.model.parent / "ids.json"


def token_ids(arguments: argparse.Namespace) -> Any:
    import torch

    return torch.tensor(json.loads(ids_file(arguments).read_text()))


def make_ids(arguments: argparse.Namespace) -> None:
    """Random token ids, the same every time."""
    import numpy as np

    vocabulary = SHAPES[arguments.shape]["vocab_size"]
    shape = (arguments.samples, arguments.length)
    ids = np.random.default_rng(1).integers(0, vocabulary, shape)
    ids_file(arguments).write_text(json.dumps(ids.tolist()))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the checkpoint and measure all that was asked for."""
    shape = SHAPES[arguments.shape]
    if not arguments.model.exists():
        make_checkpoint(arguments.model, shape)
    make_ids(arguments)
    result: dict[str, Any] = {
        "benchmark": "larger_than_memory",
        "shape": shape,
        "samples": arguments.samples,
        "length": arguments.length,
        "greedy_rounds": arguments.greedy_rounds,
        "checkpoint_bytes": sum(file.stat().st_size for file in arguments.model.iterdir()),
        "cores": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    for dtype in arguments.dtypes:
        result[dtype] = measure_dtype(arguments, dtype)
    if arguments.resident_blocks:
        result["taylor_in_memory"] = measure_taylor(arguments)
    return result


def measure_dtype(arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Every group of criteria in one computation type."""
    predicted = work(arguments, "predict", arguments.model, "--dtypes", dtype)
    found: dict[str, Any] = {"probe": predicted["probe"]}
    for group in arguments.criteria:
        load = os.getloadavg()[0]
        yardstick = work(arguments, "rate", arguments.model, "--dtypes", dtype)
        run = work(arguments, "score", arguments.model, "--dtypes", dtype, "--criteria", group)
        [estimated] = [
            one
            for one in predicted["estimates"]
            if one["streamed"] and group.split(",")[0] in one["criteria"]
        ]
        found[group] = run | {
            "flops": estimated["flops"],
            "share_of_matrix_rate": estimated["flops"] / run["seconds"] / yardstick["per_s"],
            "share_by_cpu_time": estimated["flops"] / run["cpu_seconds"] / yardstick["per_cpu_s"],
            "matrix_rate": yardstick,
            "predicted_seconds": estimated["seconds"],
            "predicted_peak_bytes": estimated["peak_bytes"],
            "load_before": load,
        }
        print(line_of(f"{dtype} {group}", found[group]), flush=True)
    if arguments.plain_blocks:
        found["plain"] = work(arguments, "plain", arguments.model, "--dtypes", dtype)
        print(
            f"{dtype} plain loop for ppl, scaled up: {found['plain']['seconds']:.0f} s, "
            f"{found['plain']['cpu_seconds']:.0f} s of processor time"
        )
    return found


def measure_taylor(arguments: argparse.Namespace) -> dict[str, Any]:
    """Memory of Taylor scores over the memory of the model, by shortllm and the plain way."""
    model = arguments.model.with_name("few-blocks")
    shape = {**SHAPES[arguments.shape], "num_hidden_layers": arguments.resident_blocks}
    if not model.exists():
        make_checkpoint(model, shape)
    found: dict[str, Any] = {}
    for side in ("resident-taylor", "plain-taylor"):
        found[side] = run = work(arguments, side, model)
        size = run["model_bytes"]
        run["scoring_over_model"] = run["scoring_peak_bytes"] / size
        run["loading_over_model"] = run["loading_peak_bytes"] / size
        print(
            f"{side}, {arguments.resident_blocks} blocks in float32, {size / 1e9:.2f} GB: "
            f"peak of scoring {run['scoring_over_model']:.2f} times that, "
            f"of loading {run['loading_over_model']:.2f} (libraries: "
            f"{run['libraries_bytes'] / size:.2f})"
        )
    one, other = (found[side].pop("values") for side in ("resident-taylor", "plain-taylor"))
    found["largest_relative_difference"] = max(
        abs(a - b) / b for a, b in zip(one, other, strict=True)
    )
    return found


def work(arguments: argparse.Namespace, kind: str, model: Path, *more: str) -> dict[str, Any]:
    """Run one worker in a process of its own."""
    given = ["--worker", kind, "--model", model, "--greedy-rounds", arguments.greedy_rounds]
    given += ["--samples", arguments.samples, "--length", arguments.length]
    given += ["--plain-blocks", arguments.plain_blocks]
    return in_own_process(__file__, arguments.shape, *given, *more)


def line_of(name: str, run: dict[str, Any]) -> str:
    """One measurement for a reader."""
    return (
        f"{name}: {run['seconds']:.0f} s (estimated {run['predicted_seconds']:.0f}), peak "
        f"{run['peak_bytes'] / 1e9:.2f} GB (estimated {run['predicted_peak_bytes'] / 1e9:.2f}); "
        f"{run['share_of_matrix_rate']:.0%} of the matrix rate of "
        f"{run['matrix_rate']['per_s'] / 1e9:.0f} GFLOP/s, {run['share_by_cpu_time']:.0%} by "
        f"processor time; load before {run['load_before']:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=SHAPES, nargs="?", default="1.1b")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--criteria", nargs="*", default=GROUPS, help="each scored in one go")
    parser.add_argument("--greedy-rounds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--plain-blocks", type=int, default=8, help="0: no plain loop")
    parser.add_argument("--resident-blocks", type=int, default=8, help="0: no Taylor in memory")
    parser.add_argument("--dir", type=Path, help="where to write; default: the temporary directory")
    parser.add_argument("--keep", action="store_true", help="keep what is written, and use it")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker](arguments)))
        return
    if arguments.keep and arguments.dir is None:
        parser.error("--keep needs --dir")
    if arguments.dir is not None:
        arguments.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="scoring-", dir=arguments.dir) as place:
        directory = arguments.dir if arguments.keep else Path(place)
        arguments.model = directory / arguments.shape
        result = measure(arguments)
    line = json.dumps(result)
    if arguments.out:
        arguments.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
