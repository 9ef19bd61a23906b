"""The methods of healing without training and their registry: one decorated function in one file.

A method gets a `Task` and returns `Healed`: new weights for projections of the source, which then
computes without the removed blocks. To write them to a checkpoint, measure the result and check it
is not its concern. Method files load torch only when their function runs: the help of a command
lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from shortllm.errors import ShortLLMError
from shortllm.papers import Paper
from shortllm.registry import RegisteredMethod, Registry, first_line, import_modules

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.checkpoint.source import Checkpoint
    from shortllm.healing.folding import Fold
    from shortllm.healing.options import HealedGap, HealOptions
    from shortllm.model.decoder import Decoder
    from shortllm.model.hidden_states import StreamMemory

    Check = Callable[[Checkpoint, Decoder], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a method gets."""

    decoder: Decoder
    """The source, with all its blocks."""
    checkpoint: Checkpoint
    """Its files."""
    removed: Collection[int]
    """Blocks of the source that the shortened model lacks."""
    ids_BT: Tensor
    """Calibration ids."""
    held_out: int
    """How many samples, the last ones, are for choices between solutions, not for solving."""
    options: HealOptions
    memory: StreamMemory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Healed:
    """What a method returns."""

    gaps: list[HealedGap]
    folds: dict[int, Fold]
    """New weights by the source's block number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealingMethod(RegisteredMethod):
    """A registered method."""

    options: Sequence[str]
    """Names of the options that only this method has."""
    check: Check
    """Refuses a model that the method cannot heal, before anything heavy."""


METHODS = Registry[HealingMethod]("healing method", ShortLLMError)

Function = TypeVar("Function", bound=Callable[[Task], Healed])


def healing_method(
    name: str,
    *,
    label: str,
    check: Check,
    paper: Paper | None = None,
    options: Sequence[str] = (),
) -> Callable[[Function], Function]:
    """Register the decorated function as `name`; the first line of its docstring is the help.

    Args:
        label: what pages and tables call it.
        check: refuses a model that the method cannot heal, before anything heavy.
        paper: the paper that defines it.
        options: names of the fields of `HealOptions` that only this method has.
    """

    def register(function: Function) -> Function:
        METHODS.add(
            name,
            HealingMethod(
                name=name,
                label=label,
                paper=paper,
                help=first_line(function),
                function=function,
                options=options,
                check=check,
            ),
        )
        return function

    return register


import_modules(__name__, __path__)
