"""From a target to a number of blocks: the shortened model should be this small, or this fast.

    --target-params 1.0B      at most this many parameters
    --target-memory 8GiB      weights in the computation type, and the keys and values of one
                              sequence of 2,048 tokens: at most this many bytes
    --target-speedup 1.3      at least this many times as fast as the intact model, generating

Sizes are counted for the smallest removable blocks, so that any choice meets the target. Speed is
measured: the intact model and two shorter ones, whose last blocks are bypassed in memory, take
turns; the number of blocks follows from a straight line and is then measured itself.

    shortllm plan runs/qwen3 --target-speedup 1.3
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from shortllm.benchmark.options import BenchmarkOptions, paired_speedup
from shortllm.checkpoint.config import context_length, text_config
from shortllm.checkpoint.source import Checkpoint
from shortllm.errors import BudgetError
from shortllm.files import fingerprint
from shortllm.model import Session
from shortllm.progress import progress
from shortllm.pruning.budget import Budget, free_units, protected_blocks, removable
from shortllm.pruning.records import TARGET_FILE, DepthSpeed, Target
from shortllm.records import ModelInfo, load_current

log = logging.getLogger(__name__)

CACHED_TOKENS = 2048
"""Length of the one sequence whose keys and values count as memory; less if the model has less."""

SPEED_OPTIONS = BenchmarkOptions(new_tokens=[32], warmup=2, runs=5)
"""How depths are measured: the usual prompt, batch 1."""


def resolve(
    budget: Budget, checkpoint: Checkpoint, session: Session, *, directory: Path | None = None
) -> tuple[Budget, Target | None]:
    """The budget with its target replaced by a number of blocks, and the record of that.

    A budget without a target is returned as it is, and targets of quality stay. An earlier
    target.json from the same inputs is reused.
    """
    budget.asked()
    if (target := budget.target()) is None:
        return budget, None
    name, value = target
    found, expected = None, _fingerprint(budget, checkpoint, session)
    if directory is not None:
        found = load_current(Target, directory / TARGET_FILE, expected)
    if found is None:
        find = _by_speed if name == "target_speedup" else _by_size
        found = find(budget, checkpoint, session, expected)
    log.info("%s", found.described)
    if not found.is_met:
        log.warning(
            "the target of %s is missed: %s was measured. Ask for more than --remove %d",
            value,
            round(found.reached, 3),
            found.remove,
        )
    return budget.model_copy(update={name: None, "remove": found.remove}), found


def keep(target: Target | None, directory: Path) -> None:
    """Write target.json; without a target, delete that of an earlier budget."""
    if target is None:
        (directory / TARGET_FILE).unlink(missing_ok=True)
    else:
        target.save(directory / TARGET_FILE)


def _fingerprint(budget: Budget, checkpoint: Checkpoint, session: Session) -> str:
    """Everything the number of blocks depends on, except for other work on the machine."""
    return fingerprint(
        {
            "model": checkpoint.fingerprint,
            "asked": dict([_target_of(budget)]),
            "removable": removable(budget, checkpoint.info()),
            "dtype": session.dtype(checkpoint),
            "device": session.device.type,
            "options": SPEED_OPTIONS.model_dump(mode="json"),
        }
    )


def _target_of(budget: Budget) -> tuple[str, float]:
    """Name and value of the target of size or speed."""
    target = budget.target()
    assert target is not None, "resolve returns early without one"
    return target


def _relief(budget: Budget, model: ModelInfo) -> str:
    """The hint for a target that protected blocks prevent."""
    blocked = protected_blocks(budget, model)
    return ", or pass --protect-first 0 --protect-last 0" if blocked else ""


def _by_size(budget: Budget, checkpoint: Checkpoint, session: Session, fingerprint: str) -> Target:
    """The fewest blocks that bring parameters or memory down to the target, whichever they are."""
    name, value = _target_of(budget)
    model = checkpoint.info()
    in_memory = name == "target_memory"
    if in_memory:
        per_block, total = memory_of(checkpoint, session.dtype(checkpoint))
    else:
        per_block, total = model.parameters_per_block, model.parameters

    def shown(size: float) -> str:
        return f"{size / 2**30:.3f} GiB" if in_memory else f"{size:,.0f} parameters"

    if total <= value:
        raise BudgetError(
            f"{model.id} takes {shown(total)}, so that nothing has to go for "
            f"--{name.replace('_', '-')} {shown(value)}. Ask for less"
        )
    units = free_units(budget, model)
    sizes = sorted(sum(per_block[block] for block in unit) for unit in units)
    left = [total - freed for freed in accumulate(sizes, initial=0)]
    if left[-1] > value:
        raise BudgetError(
            f"{model.id} still takes {shown(left[-1])} without {sum(map(len, units))} of its "
            f"{model.blocks} blocks, which is all that can be removed, and {shown(value)} was "
            f"requested. Ask for {shown(left[-1])} or more{_relief(budget, model)}"
        )
    fewest = next(number for number, size in enumerate(left) if size <= value)
    return Target(
        model=model,
        asked={name: value},
        remove=fewest * len(units[0]),
        expected=left[fewest],
        reached=left[fewest],
        dtype=session.dtype(checkpoint) if in_memory else None,
        fingerprint=fingerprint,
    )


def memory_of(checkpoint: Checkpoint, dtype: str) -> tuple[list[int], int]:
    """Bytes of each block and of the whole model: weights, and a block's share of the cache."""
    import torch

    itemsize = getattr(torch, dtype).itemsize
    tokens = min(CACHED_TOKENS, context_length(checkpoint.config) or CACHED_TOKENS)
    cache = tokens * cache_bytes(checkpoint, dtype)
    per_block = [number * itemsize + cache for number in checkpoint.parameters_per_block]
    return per_block, checkpoint.parameters * itemsize + cache * checkpoint.block_count


def cache_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of one token's keys and values in one block; 0 where the config names no heads."""
    import torch

    config: Any = text_config(checkpoint.config)
    queries = getattr(config, "num_attention_heads", None)
    if not queries:
        return 0
    heads = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    return int(2 * heads * width * getattr(torch, dtype).itemsize)


def _by_speed(budget: Budget, checkpoint: Checkpoint, session: Session, fingerprint: str) -> Target:
    """The fewest blocks that make the model fast enough, by measuring a few depths."""
    name, value = _target_of(budget)
    model = checkpoint.info()
    units, count = free_units(budget, model), model.blocks
    step, most = len(units[0]), sum(map(len, units))
    guess = min(most, max(step, round(count * (1 - 1 / value))))
    shorter = dict.fromkeys((count - guess, count - most))
    depths = measure_depths(checkpoint, session, [count, *shorter])
    expected = speedup_line(depths)
    fast = [removed for removed in range(step, most + 1, step) if expected(removed) >= value]
    if not fast:
        raise BudgetError(
            f"{checkpoint.id} is {expected(most):.2f} times as fast without {most} of its {count} "
            f"blocks, which is all that can be removed, and {value:g} was requested. Ask for less"
            f"{_relief(budget, model)}"
        )
    _, again = measure_depths(checkpoint, session, [count, count - fast[0]])
    return Target(
        model=model,
        asked={name: value},
        remove=fast[0],
        expected=expected(fast[0]),
        reached=again.speedup,
        depths=depths,
        fingerprint=fingerprint,
    )


def speedup_line(depths: Sequence[DepthSpeed]) -> Callable[[int], float]:
    """Speed-up by number of removed blocks, if time falls with them along a straight line.

    The line goes through the intact model, the first of the depths, and fits the others by least
    squares of relative time. Infinite where it reaches zero.
    """
    removed = [depths[0].blocks - one.blocks for one in depths]
    saved = sum(k * (1 - 1 / one.speedup) for k, one in zip(removed, depths, strict=True))
    per_block = saved / sum(k * k for k in removed)

    def speedup(number: int) -> float:
        left = 1 - per_block * number
        return 1 / left if left > 0 else math.inf

    return speedup


def measure_depths(
    checkpoint: Checkpoint, session: Session, depths: Sequence[int]
) -> list[DepthSpeed]:
    """Speed of the model with its first blocks alone, measured in turn; the first depth is intact.

    The last blocks are bypassed, since the first ones count the cache's positions; which blocks are
    removed makes no difference to the speed if all have one size.
    """
    from shortllm.benchmark.bench import prompt_ids
    from shortllm.benchmark.interleaved import Candidate, InterleavedRuns

    decoder = session.decoder(checkpoint)
    if decoder.streamed:
        raise BudgetError(
            f"{checkpoint.id} does not fit into memory, where --target-speedup measures it. Give "
            "--remove or --target-params"
        )
    prompt_T = prompt_ids(checkpoint, SPEED_OPTIONS.prompt)
    candidates = [
        Candidate(
            name=str(depth),
            model=decoder.model,
            prompt_T=prompt_T,
            within=partial(decoder.without, range(depth, decoder.block_count)),
        )
        for depth in depths
    ]
    interleaved = InterleavedRuns(candidates, SPEED_OPTIONS, session.device)
    [batch], [new_tokens] = SPEED_OPTIONS.batches, SPEED_OPTIONS.new_tokens
    runs = len(candidates) * (SPEED_OPTIONS.warmup + SPEED_OPTIONS.runs)
    with progress("measuring the speed of a few depths", runs) as advance:
        measured = interleaved.measure(batch, new_tokens, advance)
    first = measured[0]
    found = []
    for depth, one in zip(depths, measured, strict=True):
        latency, speedup = one.latency_median_s, paired_speedup(first, one)
        if latency is None or speedup is None:
            raise BudgetError(
                f"memory does not suffice to generate with {checkpoint.id}. Give --remove or "
                "--target-params instead of --target-speedup"
            )
        found.append(DepthSpeed(blocks=depth, latency_s=latency, speedup=speedup))
    return found
