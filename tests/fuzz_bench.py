"""Where the fuzzer lays damaged inputs, and what must be true of what is made of them."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
from healthy import (
    pickle_weights,
    share_out,
    write_checkpoint,
)
from safetensors import safe_open

from shortllm.checkpoint.shorten_config import sliced_axis
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tensors import SAFETENSORS, SAFETENSORS_INDEX, read_tensor
from shortllm.model import Session
from shortllm.pruning import estimate
from shortllm.pruning.budget import Budget
from shortllm.pruning.planning import build_plan
from shortllm.pruning.prune import prune_from
from shortllm.pruning.records import PrunePlan
from shortllm.records import ModelInfo
from shortllm.surgery.export_lint import lint_export

Act = Callable[[], None]


class Bench:
    """Where inputs are laid and results are written, and the healthy files they are made from."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = root / "source"
        """The damaged input; what is done with it must not change it."""
        self.out = root / "out"
        """Where results go; empty again after a refusal."""
        self.secret = root / "secret.safetensors"
        """A whole file of weights outside every checkpoint."""

    def clear(self) -> None:
        """Make both directories anew."""
        for directory in (self.source, self.out):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)

    def lay(self, base: Path) -> None:
        """Copy a healthy directory to where it may be damaged."""
        shutil.copytree(base, self.source, dirs_exist_ok=True)

    def kept(self, name: str, make: Callable[[Path], Any]) -> Path:
        """A healthy directory, made at its first use."""
        directory = self.root / "healthy" / name
        if not directory.exists():
            directory.parent.mkdir(parents=True, exist_ok=True)
            make(directory)
        return directory

    def checkpoint(self, model_type: str = "llama", form: str = "plain") -> Path:
        """A healthy checkpoint, its weights in one file, in shards, or pickled."""

        def make(directory: Path) -> None:
            write_checkpoint(model_type, directory)
            if form == "shards":
                share_out(directory)
            elif form != "plain":
                pickle_weights(directory, zipped=form == "zip")

        return self.kept(f"{model_type}-{form}", make)

    @cached_property
    def opened(self) -> Checkpoint:
        return open_checkpoint(self.checkpoint())

    @cached_property
    def model(self) -> ModelInfo:
        return self.opened.info()


def examine(bench: Bench, random: Random) -> None:
    """Everything that reads a checkpoint, and surgery on it.

    Right is what the library of the format reads as well, and a shortened checkpoint that holds
    exactly the tensors of the kept blocks.
    """
    checkpoint = open_checkpoint(bench.source)
    stored = stored_tensors(bench.source)
    found = {name: (entry.dtype, entry.shape) for name, entry in checkpoint.tensors.items()}
    assert found == {name: held[:2] for name, held in stored.items()}, "another table than stored"
    for name, entry in checkpoint.tensors.items():
        tensor = read_tensor(entry)
        assert tensor.nbytes == entry.bytes
        assert tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == stored[name][2]
    if (bench.source / "config.json").read_bytes() == (
        bench.checkpoint() / "config.json"
    ).read_bytes():
        checkpoint.__dict__["structure"] = bench.opened.structure  # the same config builds the same
    info = checkpoint.info()
    assert sum(info.parameters_per_block) <= info.parameters
    assert len(info.parameters_per_block) == info.blocks
    if random.random() < 0.3:
        assert estimate.info(str(checkpoint.directory), probe=False).parameters_outside >= 0
    lint_export(checkpoint)
    shorten(bench, checkpoint, random)


def shorten(bench: Bench, checkpoint: Checkpoint, random: Random) -> None:
    """Remove one or two blocks, a quarter of the times with all checks of the result."""
    count = checkpoint.block_count
    removed = sorted(random.sample(range(count), random.choice((1, 1, 2)) if count > 2 else 1))
    plan = build_plan(Budget(blocks=removed), model=checkpoint.info())
    target = bench.out / "short"
    session = Session(device="cpu", stream=False) if random.random() < 0.25 else None
    prune_from(checkpoint, plan, target, session=session)
    check_shortened(checkpoint, plan, target)


def check_shortened(checkpoint: Checkpoint, plan: PrunePlan, target: Path) -> None:
    """A shortened checkpoint opens, and holds exactly what the plan keeps."""
    short = open_checkpoint(target)
    assert short.block_count == len(plan.kept)
    names = short.block_names.prefix
    expected = Counter[Any]()
    for name, entry in checkpoint.tensors.items():
        block = checkpoint.block_names.block_of(name)
        if block is None and not checkpoint.block_names.is_head(name):
            shape, axis = list(entry.shape), sliced_axis(name)
            if axis is not None:  # it holds a share of every block
                shape[axis] = shape[axis] * len(plan.kept) // checkpoint.block_count
            expected[name, entry.dtype, tuple(shape)] += 1
        elif block in plan.kept:
            rest = name[len(names) :].split(".", 2)[2]
            expected[f"{names}.{plan.kept.index(block)}.{rest}", entry.dtype, entry.shape] += 1
    held = stored_tensors(target)
    assert expected == Counter((name, *one[:2]) for name, one in held.items())
    for name, entry in checkpoint.tensors.items():
        block = checkpoint.block_names.block_of(name)
        outside = block is None and not checkpoint.block_names.is_head(name)
        if outside and sliced_axis(name) is None:
            assert read_tensor(entry).view(-1).view(torch.uint8).numpy().tobytes() == held[name][2]


def stored_tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and data of every stored tensor, as the library of the format reads them."""
    if (directory / SAFETENSORS).exists():
        files = [directory / SAFETENSORS]
        weight_map = None
    else:
        weight_map = json.loads((directory / SAFETENSORS_INDEX).read_text())["weight_map"]
        files = [directory / name for name in dict.fromkeys(weight_map.values())]
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():
                if weight_map is None or (directory / weight_map.get(name, file)) == file:
                    part = stream.get_slice(name)
                    data = stream.get_tensor(name).contiguous().view(-1).view(torch.uint8)
                    shape = tuple(part.get_shape())
                    found[name] = (part.get_dtype(), shape, data.numpy().tobytes())
    return found


def check_plan(plan: PrunePlan, budget: Budget, model: ModelInfo) -> None:
    """What is true of every plan."""
    assert sorted([*plan.kept, *plan.removed]) == list(range(model.blocks))
    assert plan.kept and plan.removed
    assert sorted(plan.order) == plan.removed
    assert not set(plan.removed) & set(plan.protected)
    if budget.remove is not None:
        assert len(plan.removed) == budget.remove
    if budget.param_ratio is not None:
        assert plan.reached.parameter_ratio >= budget.param_ratio
    assert math.isclose(plan.reached.block_ratio, len(plan.removed) / model.blocks)
