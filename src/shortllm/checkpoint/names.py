"""The block number inside a tensor name.

Block tensors are called `<prefix>.<number>.<rest>`, with one prefix for all blocks of the decoder
(`model.layers`, `transformer.h`, `gpt_neox.layers`, ...). The prefix is found by its numbers: they
are exactly 0 to L-1. Names in a checkpoint may differ from module names, so only the names in the
checkpoint are used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from shortllm.errors import UnsupportedModelError

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class BlockNames:
    """Which tensor names of a checkpoint belong to which block of the decoder."""

    prefix: str
    count: int
    heads: int = 0
    """Prediction heads that are numbered like blocks after the last one."""

    def block_of(self, name: str) -> int | None:
        """Number of the block that tensor `name` belongs to; None outside the blocks."""
        number = self._number(name)
        return number if number is not None and number < self.count else None

    def is_head(self, name: str) -> bool:
        """Whether tensor `name` belongs to a prediction head after the last block."""
        number = self._number(name)
        return number is not None and number >= self.count

    def _number(self, name: str) -> int | None:
        head = self.prefix + "."
        if not name.startswith(head):
            return None
        number = name[len(head) :].split(".", 1)[0]
        return int(number) if number.isdigit() else None

    def renumbered(self, name: str, new: int) -> str:
        """`name` with its block number replaced by `new`."""
        head = self.prefix + "."
        rest = name[len(head) :].split(".", 1)[1]
        return f"{head}{new}.{rest}"


def find_block_names(
    names: Iterable[str],
    count: int,
    module_name: str,
    *,
    heads: int = 0,
    fits: Callable[[str], bool] = lambda prefix: False,
) -> BlockNames:
    """The prefix whose numbers are exactly 0 to `count - 1`, or continue with prediction heads.

    Args:
        module_name: dotted name of the block list in the built model; if several prefixes fit (a
            vision tower as deep as the decoder), the one with the longest common ending is taken.
        heads: how many prediction heads the config allows after the last block.
        fits: whether the tensors under a prefix are as large as the model's blocks; used if
            transformers renames the blocks while loading, so that no ending is common.
    Raises:
        UnsupportedModelError: no prefix fits, naming what was found instead.
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        for match in NUMBER.finditer(name):
            numbers.setdefault(name[: match.start() - 1], set()).add(int(match.group()))
    allowed = [set(range(count + extra)) for extra in range(heads + 1)]
    fitting = [prefix for prefix, found in numbers.items() if found in allowed]
    # experts inside a block are numbered too: a prefix inside another one is not the block list
    outer = [p for p in fitting if not any(p.startswith(other + ".") for other in fitting)]
    if not outer:
        raise UnsupportedModelError(_explain_numbers(numbers, count, module_name))
    best = max(outer, key=lambda prefix: _common_ending(prefix, module_name))
    if not _common_ending(best, module_name) and not (len(outer) == 1 and fits(best)):
        raise UnsupportedModelError(
            f"tensors numbered 0 to {count - 1} are called '{best}', but the model's blocks are "
            f"called '{module_name}': which tensors belong to which block is not certain"
        )
    return BlockNames(best, count, len(numbers[best]) - count)


def is_weight(name: str, dimensions: int) -> bool:
    """Whether a tensor of a block counts as a weight: matrices, and vectors called `weight`."""
    return name.endswith("weight") or (dimensions > 1 and not name.endswith("bias"))


def _common_ending(one: str, other: str) -> int:
    """How many trailing parts two dotted names share."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    shared = 0
    for left, right in pairs:
        if left != right:
            break
        shared += 1
    return shared


def _explain_numbers(numbers: dict[str, set[int]], count: int, module_name: str) -> str:
    """Why no prefix fits: the nearest one and how its numbers differ."""
    near = [prefix for prefix in numbers if _common_ending(prefix, module_name)]
    if not near:
        return f"no tensor is named like a block of '{module_name}' (config says {count} blocks)"
    prefix = max(near, key=lambda p: _common_ending(p, module_name))
    found = numbers[prefix]
    missing, extra = set(range(count)) - found, found - set(range(count))
    if missing:
        return (
            f"the config says {count} blocks, but no tensor of block {min(missing)} "
            f"('{prefix}.{min(missing)}') is stored"
        )
    return (
        f"'{prefix}.{min(extra)}' lies behind the last of {count} blocks, and the config names no "
        "prediction head there; is the block count in config.json correct?"
    )
