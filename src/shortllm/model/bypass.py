"""A live model whose forward hands the stream past some of its blocks, whatever its family.

What a block returns besides the stream is learnt from one plain forward: a stand-in returns the
same form. Where a block hands something on to the next one (a state, picked tokens), the stand-in
hands on what it got itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shortllm.checkpoint.structure import find_blocks

STREAM = "hidden_states"
"""Keyword of the stream where a block does not get it as its first argument."""

Place = int | str
"""That of an argument, or its keyword."""

Call = tuple[dict[Place, Any], Any]
"""The arguments of one call of a block, and what it returned."""


@contextmanager
def bypassed(model: nn.Module, removed: Collection[int], ids_BT: Tensor) -> Iterator[None]:
    """Within the context, `model` computes what it computes without the blocks `removed`.

    For forwards without a cache, which counts positions by block 0. `ids_BT` are any token ids.
    """
    _, blocks = find_blocks(model, model.config)
    calls = _record(model, blocks, ids_BT)
    handed_on = _handed_on(list(calls.values()))
    replaced = [block for block in removed if block in calls]
    try:
        for block in replaced:
            blocks[block].forward = _stand_in(calls[block][1], handed_on)
        yield
    finally:
        for block in replaced:
            blocks[block].__dict__.pop("forward", None)


@torch.inference_mode()
def _record(model: nn.Module, blocks: nn.ModuleList, ids_BT: Tensor) -> dict[int, Call]:
    """How a plain forward calls each block, in its order; absent are blocks for images alone."""
    calls: dict[int, Call] = {}

    def hook(b: int, block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        calls[b] = _arguments(args, kwargs), output

    handles = [
        block.register_forward_hook(partial(hook, b), with_kwargs=True)
        for b, block in enumerate(blocks)
    ]
    try:
        model(input_ids=ids_BT.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _handed_on(calls: list[Call]) -> dict[int, Place]:
    """Which output of a block is which argument of the next block."""
    return {
        number: place
        for (_, outputs), (following, _) in zip(calls, calls[1:], strict=False)
        for number, output in enumerate(_parts(outputs))
        for place, argument in following.items()
        if output is not None and argument is output
    }


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Place, Any]:
    return {**dict(enumerate(args)), **kwargs}  # type: ignore[dict-item]


def _parts(output: Any) -> tuple[Any, ...]:
    """A block's outputs, also where it returns the stream alone."""
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)


def _stand_in(output: Any, handed_on: dict[int, Place]) -> Callable[..., Any]:
    """A forward that hands its arguments through in the form of `output`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = _arguments(args, kwargs)
        stream: Place = 0 if args else STREAM
        parts = [arguments[handed_on.get(0, stream)]]
        parts += [arguments.get(handed_on.get(n, "")) for n in range(1, len(_parts(output)))]
        if not isinstance(output, (tuple, list)):
            return parts[0]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)

    return forward
