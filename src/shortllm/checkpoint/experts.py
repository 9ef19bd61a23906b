"""The experts of a model: how many there are, and how many work on each token."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from shortllm.checkpoint.config import text_config
from shortllm.checkpoint.source import Checkpoint
from shortllm.records import Record

TOTAL = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    "num_routed_experts",
)  # fmt: skip
ACTIVE = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k",
    "moe_k", "top_k_experts",
)  # fmt: skip
SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
"""Config fields with each number, by type."""

STORED = re.compile(r"expert|moe")
"""In the names of the tensors of a block that has experts."""


class Experts(Record):
    """The experts of a model; a shared one works on every token."""

    total: int = Field(description="in each block that has some, without shared ones")
    active: int | None = Field(description="of these for each token")
    shared: int
    blocks: int = Field(description="blocks that have experts")


def experts_of(checkpoint: Checkpoint) -> Experts | None:
    """What the config and the tensors say; None where a model has no experts."""
    config, block_of = text_config(checkpoint.config).to_dict(), checkpoint.block_names.block_of
    names = [name for name in checkpoint.tensors if block_of(name) is not None]
    holding = {block_of(name) for name in names if STORED.search(name)}
    total = next(_numbers(config, TOTAL), 0)
    if total < 2 or not holding:
        return None
    shared = any("shared_expert" in name for name in names)
    return Experts(
        total=total,
        active=next(_numbers(config, ACTIVE), None),
        shared=next(_numbers(config, SHARED), int(shared)),
        blocks=len(holding),
    )


def _numbers(config: dict[str, Any], fields: tuple[str, ...]) -> Iterator[int]:
    """Counts under these names, also inside a config; of several kinds their sum."""
    for field in fields:
        value = config.get(field)
        found = sum(value) if isinstance(value, (list, tuple)) else value
        if isinstance(found, int) and found > 0:
            yield found
    for part in config.values():
        if isinstance(part, dict):
            yield from _numbers(part, fields)
