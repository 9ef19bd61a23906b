"""What the scoring benchmarks share: the yardstick, the plain ways, and processes to measure in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

MATRIX_LENGTH = {"cpu": 2048, "cuda": 8192}
"""Side of the square matrices whose product is the yardstick."""


def synchronize(device: str) -> None:
    """Wait for what an accelerator was given to do."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matrix_rate(dtype: str, *, device: str = "cpu", seconds: float = 3.0) -> dict[str, float]:
    """Floating-point operations of a large square matrix product: per second, the best of many; and
    per second of processor time, the mean of all, which other work on the machine changes less."""
    import torch

    n = MATRIX_LENGTH[device.partition(":")[0]]
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    torch.nn.functional.linear(a, b)
    synchronize(device)
    best, count = float("inf"), 0
    used, end = time.process_time(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
        count += 1
    work = 2.0 * n**3
    return {"per_s": work / best, "per_cpu_s": count * work / (time.process_time() - used)}


def plain_perplexities(model: Any, ids_BT: Any, removed: Iterable[int]) -> list[float]:
    """Perplexity without each block: take it out of the module list, run sample by sample, put it
    back."""
    import torch
    from torch.nn.functional import cross_entropy

    blocks, perplexities = model.model.layers, []
    for out in removed:
        kept = [block for number, block in enumerate(blocks) if number != out]
        model.model.layers = torch.nn.ModuleList(kept)
        model.config.num_hidden_layers = len(kept)
        losses = []
        for sample in ids_BT:
            with torch.inference_mode():
                logits = model(input_ids=sample[None], use_cache=False).logits[0, :-1]
            losses.append(cross_entropy(logits.float(), sample[1:], reduction="none"))
        perplexities.append(torch.cat(losses).double().mean().exp().item())
        model.model.layers = blocks
        model.config.num_hidden_layers = len(blocks)
    return perplexities


def plain_products(model: Any, ids_BT: Any) -> list[float]:
    """Taylor scores with the gradients of the whole model at once, sample by sample."""
    model.requires_grad_(True)
    for sample in ids_BT:
        loss = model(input_ids=sample[None], labels=sample[None], use_cache=False).loss
        (loss / len(ids_BT)).backward()
    return [
        sum((p * p.grad).abs().sum().item() for p in block.parameters() if p.grad is not None)
        for block in model.model.layers
    ]


def in_own_process(script: str, *arguments: Any) -> dict[str, Any]:
    """Run a script's worker in a fresh process; returns the JSON of its last line."""
    command = [sys.executable, script, *map(str, arguments)]
    quiet = {**os.environ, "TQDM_DISABLE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=quiet)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
