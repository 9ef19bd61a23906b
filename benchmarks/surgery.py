"""How fast, and in how much memory, surgery writes a shortened checkpoint, compared with `cp`.

Surgery should cost no more than copying the bytes that are kept, and its memory should not grow
with the model. This script makes a random bfloat16 checkpoint of Llama's shape (24 blocks of width
2048, 3.2 GB, of which 2.5 GB are kept), then runs in turns, each in a process of its own:

    surgery   a fresh Python: import shortllm, open the checkpoint, check its structure, remove a
              quarter of the blocks (every fourth) and write the result
    cp        `cp -r` of files with the same bytes in the same shards

Before the first turn both sources are read once (they stay in the page cache if memory allows);
before each turn the target of the last one is deleted and `sync` has returned. Neither side waits
for the disk; the time until a `sync` after it returns is reported beside it. `cp` starts after a
rest as long as the imports of the surgery: a virtual machine gives freed memory back to its host
meanwhile, and getting it again would be counted on one side only. A first turn, which pays most of
that, is not counted. Reported are medians, for the whole process and its parts (imports, structural
check, copying), the ratio to `cp`, and the peak of anonymous memory (RssAnon of /proc/PID/status
every 20 ms; mapped and cached file pages are not in it). On a machine with other work the processor
time and the fastest turns tell more than the medians of wall time. Linux only.

    python benchmarks/surgery.py --dir /path/on/the/disk/to/measure --out surgery.json
    python benchmarks/surgery.py --gguf model.gguf        # the same for a GGUF file

Targets: ratio of copying to `cp` at most 1.3; peak at most 300 MB plus the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from random_checkpoint import make_checkpoint

SAMPLE_SECONDS = 0.02
TARGET_RATIO = 1.3
TARGET_BYTES = 300 * 10**6
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}

CHILD = """
import time
start = time.perf_counter()
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from shortllm.checkpoint.source import open_checkpoint
from shortllm.pruning.prune import write_pruned
from shortllm.surgery import derived
imported = time.perf_counter()
seconds = {}
write_tensors = derived.write_tensors
def timed(*args, **kwargs):
    begin, cpu = time.perf_counter(), time.process_time()
    write_tensors(*args, **kwargs)
    seconds["copy_s"] = time.perf_counter() - begin
    seconds["copy_cpu_s"] = time.process_time() - cpu
derived.write_tensors = timed
source, target, kept = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
write_pruned(open_checkpoint(source), kept, target, max_shard_bytes=10**9)
seconds["import_s"] = imported - start
seconds["structure_s"] = time.perf_counter() - imported - seconds["copy_s"]
print(json.dumps(seconds))
"""
"""What one surgery process runs; everything but imports and copying is counted as structure."""

GGUF_CHILD = """
import time
start = time.perf_counter()
import json, sys
from pathlib import Path
from shortllm.checkpoint.gguf import read_gguf
from shortllm.surgery import gguf
imported = time.perf_counter()
seconds = {}
copy_tensors = gguf.copy_tensors
def timed(*args):
    begin, cpu = time.perf_counter(), time.process_time()
    copy_tensors(*args)
    seconds["copy_s"] = time.perf_counter() - begin
    seconds["copy_cpu_s"] = time.process_time() - cpu
gguf.copy_tensors = timed
source, target, removed = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
gguf.shorten_gguf(read_gguf(source), removed, target)
seconds["import_s"] = imported - start
seconds["structure_s"] = time.perf_counter() - imported - seconds["copy_s"]
print(json.dumps(seconds))
"""
"""The same for a GGUF file; reading and writing its header is counted as structure."""


def run(command: list[str], *, rest: float = 0.0) -> tuple[float, float, int, str]:
    """Seconds of a process, seconds until a `sync` after it, peak anonymous bytes, its output."""
    os.sync()
    time.sleep(rest)
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


def children_cpu() -> float:
    """Processor seconds of all finished child processes, the kernel's work for them included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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


def files_of(path: Path) -> list[Path]:
    """A file, or the files of a directory."""
    return [path] if path.is_file() else list(path.iterdir())


def read_all(place: Path) -> None:
    """Bring files into the page cache."""
    for path in files_of(place):
        with open(path, "rb", buffering=0) as stream:
            while stream.read(2**24):
                pass


def stored_bytes(place: Path) -> int:
    return sum(path.stat().st_size for path in files_of(place))


def remove(place: Path) -> None:
    """Delete a file or a directory."""
    if place.is_file():
        place.unlink()
    else:
        shutil.rmtree(place)


def measure(place: Path, *, blocks: int, repeats: int, gguf: Path | None) -> dict[str, Any]:
    """Make the checkpoint, or take a GGUF file; take turns, and return every figure."""
    target, copy_source = place / "target", place / "kept"
    if gguf is None:
        source, child = place / "source", CHILD
        largest = make_checkpoint(source, {**SHAPE, "num_hidden_layers": blocks})
        kept = [b for b in range(blocks) if b % 4 != 2]
        given = kept
    else:
        from shortllm.checkpoint.gguf import read_gguf

        source, child, file = gguf, GGUF_CHILD, read_gguf(gguf)
        blocks, largest = file.blocks, max(int(t.n_bytes) for t in file.reader.tensors)
        given = [b for b in range(blocks) if b % 4 == 2]
        kept = [b for b in range(blocks) if b % 4 != 2]
    surgery = [sys.executable, "-c", child, str(source), str(target), json.dumps(given)]
    run(surgery)  # warm-up: compiles bytecode, and its result is what `cp` copies
    target.rename(copy_source)
    read_all(source)
    read_all(copy_source)
    turns: list[dict[str, float]] = []
    rest = 0.0
    for turn in range(repeats + 1):
        row: dict[str, float] = {}
        for kind in ("cp", "surgery") if turn % 2 else ("surgery", "cp"):
            command = surgery if kind == "surgery" else ["cp", "-r", str(copy_source), str(target)]
            used = children_cpu()
            seconds, flushed, peak, output = run(command, rest=0.0 if kind == "surgery" else rest)
            row |= {
                f"{kind}_s": seconds,
                f"{kind}_flushed_s": flushed,
                f"{kind}_anonymous_bytes": peak,
            }
            if kind == "surgery":
                row |= json.loads(output.splitlines()[-1])
                rest = row["import_s"] + row["structure_s"]
            else:
                row["cp_cpu_s"] = children_cpu() - used
            remove(target)
        row["start_and_exit_s"] = row["surgery_s"] - sum(
            row[part] for part in ("import_s", "structure_s", "copy_s")
        )
        turns.append(row)
        print(f"turn {turn} of {repeats}: {row}", file=sys.stderr)
    del turns[0]  # the memory for the first copies comes from the host
    medians = {key: statistics.median(row[key] for row in turns) for key in turns[0]}
    fastest = {key: min(row[key] for row in turns) for key in ("copy_s", "cp_s")}
    peak = int(max(row["surgery_anonymous_bytes"] for row in turns))
    return {
        "benchmark": "surgery",
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "filesystem": filesystem(place),
        "python": platform.python_version(),
        "repeats": repeats,
        "source_bytes": stored_bytes(source),
        "kept_bytes": stored_bytes(copy_source),
        "blocks": blocks,
        "kept_blocks": len(kept),
        "largest_tensor_bytes": largest,
        "peak_anonymous_bytes": peak,
        "medians": medians,
        "ratio_copy": medians["copy_s"] / medians["cp_s"],
        "ratio_copy_fastest": fastest["copy_s"] / fastest["cp_s"],
        "ratio_copy_cpu": medians["copy_cpu_s"] / medians["cp_cpu_s"],
        "ratio_process": medians["surgery_s"] / medians["cp_s"],
        "ratio_process_flushed": medians["surgery_flushed_s"] / medians["cp_flushed_s"],
        "target_ratio": TARGET_RATIO,
        "target_anonymous_bytes": TARGET_BYTES + largest,
        "turns": turns,
    }


def filesystem(place: Path) -> str:
    """Type of the file system below `place`, as `df` names it."""
    output = subprocess.run(
        ["df", "--output=fstype", str(place)], capture_output=True, text=True, check=True
    )
    return output.stdout.split()[-1]


def summary(result: dict[str, Any]) -> str:
    """The figures in a few lines for a reader."""
    m = result["medians"]
    gigabytes = result["kept_bytes"] / 1e9
    within = result["peak_anonymous_bytes"] <= result["target_anonymous_bytes"]
    return (
        f"{result['kept_blocks']} of {result['blocks']} blocks kept, {gigabytes:.2f} GB on "
        f"{result['filesystem']}, medians of {result['repeats']}:\n"
        f"  cp       {m['cp_s']:.2f} s ({gigabytes / m['cp_s']:.2f} GB/s)\n"
        f"  surgery  {m['copy_s']:.2f} s copying ({gigabytes / m['copy_s']:.2f} GB/s), "
        f"{m['structure_s']:.2f} s structure, {m['import_s']:.2f} s imports, "
        f"{m['start_and_exit_s']:.2f} s start and exit\n"
        f"  ratio    {result['ratio_copy']:.2f} copying "
        f"({result['ratio_copy_fastest']:.2f} in the fastest turns), "
        f"{result['ratio_process']:.2f} whole process, "
        f"{result['ratio_process_flushed']:.2f} until on disk "
        f"({m['surgery_flushed_s']:.2f} s and {m['cp_flushed_s']:.2f} s), "
        f"{result['ratio_copy_cpu']:.2f} processor time of copying "
        f"({m['copy_cpu_s']:.2f} s and {m['cp_cpu_s']:.2f} s); "
        f"target {result['target_ratio']} for copying\n"
        f"  memory   {result['peak_anonymous_bytes'] / 1e6:.0f} MB anonymous at most, "
        f"largest tensor {result['largest_tensor_bytes'] / 1e6:.0f} MB, "
        f"{'within' if within else 'over'} the target of "
        f"{result['target_anonymous_bytes'] / 1e6:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--dir", type=Path, help="where to write (9 GB); default: the temporary directory"
    )
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--gguf", type=Path, help="take this file instead of a random checkpoint")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="surgery-", dir=arguments.dir) as place:
        how = {"repeats": arguments.repeats, "gguf": arguments.gguf}
        result = measure(Path(place), blocks=arguments.blocks, **how)
    print(summary(result))
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
