"""How a block is called: everything but the stream that the model's forward hands to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class BlockCall:
    """Everything but the stream that the model's forward hands to one block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stream_name: str | None
    """Keyword under which the stream is handed over; None if it is the first argument."""

    def on(self, forward: Forward, stream_BTD: Tensor) -> Any:
        """Call `forward` (a block, or a block's own forward) on another stream."""
        if self.stream_name is None:
            return forward(stream_BTD, *self.args, **self.kwargs)
        return forward(*self.args, **{**self.kwargs, self.stream_name: stream_BTD})

    @staticmethod
    def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
        """Part the arguments of a block into the stream and the rest."""
        if args:
            return args[0], BlockCall(args[1:], kwargs, None)
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return kwargs["hidden_states"], BlockCall((), rest, "hidden_states")


def equal_calls(one: Sequence[BlockCall], other: Sequence[BlockCall]) -> bool:
    """Whether two batches call the blocks with the same arguments."""
    return all(
        equal_arguments((a.args, a.kwargs), (b.args, b.kwargs), opaque=False)
        for a, b in zip(one, other, strict=True)
    )


def equal_arguments(one: Any, other: Any, *, opaque: bool) -> bool:
    """Deep equality of call arguments, tensors and plain values by value.

    Args:
        opaque: what two objects of one type count as that cannot be looked into.
    """
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(
            equal_arguments(a, b, opaque=opaque) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(
            equal_arguments(one[key], other[key], opaque=opaque) for key in one
        )
    if type(one) is type(other):
        return bool(one == other) if isinstance(one, (bool, int, float, str)) else opaque
    return False
