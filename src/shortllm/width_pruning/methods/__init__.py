"""The methods of width pruning and their registry: one decorated function in one file each.

A method gets a `Task` and returns `Chosen`: which heads and neurons to remove from each block. To
find them, cut them out of the files and check the result is not its concern. Importance: *higher =
keep*, for every method. Adding one: docs/add_a_baseline.md.

Method files load torch only when their function runs: the help of a command lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from shortllm.errors import ShortLLMError
from shortllm.papers import Paper
from shortllm.registry import RegisteredMethod, Registry, first_line, import_modules

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.model.decoder import Decoder
    from shortllm.model.hidden_states import StreamMemory
    from shortllm.width_pruning.groups import BlockGroups, Removed
    from shortllm.width_pruning.options import WidthOptions


@dataclass(slots=True, kw_only=True)
class Task:
    """What a method gets: the model, the text, and how much to remove."""

    decoder: Decoder
    ids_BT: Tensor | None
    """Calibration ids; None where the method looks at no text."""
    groups: Mapping[int, BlockGroups]
    """Heads and neurons of the blocks to make narrower."""
    options: WidthOptions
    """Every default filled in."""
    counts: Mapping[int, tuple[int, int]]
    """Block -> how many units of attention and how many neurons to remove; empty for a method that
    ranks all blocks in one list."""
    memory: StreamMemory

    def ids(self) -> Tensor:
        """Calibration ids of a method that needs text."""
        assert self.ids_BT is not None
        return self.ids_BT


@dataclass(slots=True, eq=False)
class BlockImportance:
    """One number for each unit of both sublayers, float64 `[U]`."""

    heads: Tensor
    neurons: Tensor


@dataclass(slots=True, kw_only=True)
class Chosen:
    """What to remove from each block, and why."""

    removed: dict[int, Removed]
    importance: dict[int, BlockImportance]
    biases: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """For each block what to add to the outputs of its output projections, float64 `[D]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthMethod(RegisteredMethod):
    """A registered method."""

    options: Mapping[str, Any]
    """Options that only this method has, with their defaults."""
    needs_text: Callable[[WidthOptions], bool]
    """Whether it looks at calibration text, by its filled-in options."""
    sample_length: int | None
    """Tokens per calibration sample, where it is not the usual number."""
    protects_ends: bool
    """Whether it keeps the first and last blocks whole by default."""
    one_list: bool
    """Whether it ranks the units of all blocks in one list, so that blocks get different shapes."""


METHODS = Registry[WidthMethod]("width method", ShortLLMError)

Function = TypeVar("Function", bound=Callable[[Task], Chosen])


def width_method(
    name: str,
    *,
    label: str,
    paper: Paper | None = None,
    options: Mapping[str, Any] | None = None,
    needs_text: Callable[[WidthOptions], bool] = lambda options: True,
    sample_length: int | None = None,
    protects_ends: bool = False,
    one_list: bool = False,
) -> Callable[[Function], Function]:
    """Register the decorated function as `name`; the first line of its docstring is the help.

    Args:
        label: what pages and tables call it.
        paper: the paper that defines it.
        options: names of `WidthOptions` that only this method has, with their defaults.
        needs_text: whether it looks at calibration text, by its filled-in options.
        sample_length: tokens per calibration sample, where it is not the usual number.
        protects_ends: keep the first and last blocks whole by default.
        one_list: rank the units of all blocks in one list, unless all blocks must stay alike.
    """

    def register(function: Function) -> Function:
        METHODS.add(
            name,
            WidthMethod(
                name=name,
                label=label,
                paper=paper,
                help=first_line(function),
                function=function,
                options=options or {},
                needs_text=needs_text,
                sample_length=sample_length,
                protects_ends=protects_ends,
                one_list=one_list,
            ),
        )
        return function

    return register


import_modules(__name__, __path__)
