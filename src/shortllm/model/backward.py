"""Gradients of the loss, one block at a time, so that those of a whole model never exist.

    forward    keep the stream entering each block, and the one leaving the last
    tail       gradient of the mean next-token NLL for the stream after the last block
    backward   from the last block to the first: run the block again, now with gradients; pass the
               gradient of its input to the block before, hand out those of its weights and free
               them

Takes the memory of one block's gradients, in float32, in addition to the L+1 streams. Works the
same for blocks in memory and blocks that are read when needed.

Shapes: B samples, T tokens per sample, D width, N predictions of one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shortllm.checkpoint.source import is_weight
from shortllm.journal import Journal
from shortllm.model.decoder import Decoder, Entry
from shortllm.model.hidden_states import SampleGroups, StreamMemory, block_flops, head_flops
from shortllm.model.walk import (
    Observer,
    predictions_of,
    slice_tokens,
    targets,
    token_slices,
    walk,
)
from shortllm.progress import Advance
from shortllm.runtime import ALONE, Ranks

Receive = Callable[[int, dict[str, Tensor]], None]

NO_TARGET = -100
"""Stands for a token whose prediction does not count."""


class _Inputs:
    """Keeps the stream entering each of the walked blocks, and the one leaving the last."""

    def __init__(self, blocks: Sequence[int], kept_SBTD: Tensor) -> None:
        self._place = {b: place for place, b in enumerate(blocks)}
        self.kept_SBTD = kept_SBTD
        self.state = {"inputs": kept_SBTD}

    def __call__(self, b: int, before_BTD: Tensor, after_BTD: Tensor, rows: slice) -> None:
        place = self._place[b]
        self.kept_SBTD[place, rows] = before_BTD.to(self.kept_SBTD)
        if place == len(self._place) - 1:
            self.kept_SBTD[-1, rows] = after_BTD.to(self.kept_SBTD)

    def entering(self, b: int) -> Tensor:
        """The stream entering block `b`, `[B, T, D]`."""
        return self.kept_SBTD[self._place[b]]


def walk_back(
    decoder: Decoder,
    ids_BT: Tensor,
    blocks: Sequence[int],
    receive: Receive,
    *,
    ranks: Ranks,
    counted_BT: Tensor | None = None,
    each: Receive | None = None,
    observe: Sequence[Observer] = (),
    advance: Advance = lambda work: None,
    memory: StreamMemory | None = None,
    journal: Journal | None = None,
    results: dict[str, list[float]] | None = None,
) -> None:
    """Product of weight and gradient for every weight of `blocks`; other blocks are left out.

    The loss is the mean next-token NLL over all counted predictions of all ranks.

    Args:
        counted_BT: the tokens whose prediction counts; default: all.
        receive: called as `receive(b, products)` from the last block to the first; `products` has
            for each weight tensor of block `b` its signed product with the gradient, float32.
        each: called before it in the same way, once for each sample with that sample's share of
            the products; samples then go through the blocks one at a time.
        results: what `receive` has gathered; an interrupted pass saves and restores it in place.
    """
    back = journal.part("backward") if journal else Journal(None, "")
    results = {} if results is None else results
    groups = SampleGroups(decoder, ids_BT, memory, size=None if each is None else 1)
    inputs = _Inputs(blocks, groups.allocate(len(blocks) + 1))
    state = {n: tensor for one in (*observe, inputs) for n, tensor in one.state.items()}
    position = back.position()
    if position is None:
        removed = frozenset(range(decoder.block_count)) - set(blocks)
        walk(
            decoder, ids_BT, [removed], observe=[inputs, *observe], advance=advance, memory=memory,
            journal=journal.part("forward") if journal else None,
        )  # fmt: skip
        last_BTD = inputs.kept_SBTD[-1]
        gradient_BTD = _tail_gradient(decoder, ids_BT, last_BTD, ranks, advance, counted_BT)
        done = 0
    else:
        done = int(position["done"])
        for name, tensor in state.items():
            tensor.copy_(back.tensor(name))
        gradient_BTD = back.tensor("gradient").to(decoder.device)
        results.update(position["results"])
        advance(walk_back_flops(decoder, blocks, len(ids_BT), ids_BT.shape[1], done))
    for b in decoder.through(list(reversed(blocks))[done:]):
        before_BTD = inputs.entering(b)
        gradients = _through_back(groups, b, before_BTD, gradient_BTD, each)
        receive(b, _products(decoder, b, gradients, ranks))
        gradients.clear()
        advance(3 * block_flops(decoder, b) * ids_BT.numel())
        done += 1
        # several processes would all have to resume at the same block
        if back.due() and ranks.count == 1:
            first = back.position() is None
            back.commit(
                {"done": done, "results": results},
                {"gradient": gradient_BTD, **(state if first else {})},
                keep=() if first else state,
            )


def _through_back(
    groups: SampleGroups, b: int, before_BTD: Tensor, gradient_BTD: Tensor, each: Receive | None
) -> dict[str, Tensor]:
    """Take the gradient of all samples back through block `b`, in place; returns its weights'."""
    decoder = groups.decoder
    gradients: dict[str, Tensor] = {}
    for rows, entry in groups:
        own = gradients if each is None else {}
        gradient_BTD[rows] = _block_gradient(
            decoder, b, entry, before_BTD[rows].to(decoder.device), gradient_BTD[rows], own
        )
        if each is not None:
            for name, gradient in own.items():
                _add(gradients, name, gradient.clone())
            each(b, _products(decoder, b, own, ALONE))
    return gradients


def _add(gradients: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    gradients[name] = gradients[name].add_(gradient) if name in gradients else gradient


def block_weights(block: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a block by name: all matrices, and vectors called `weight` (of norms)."""
    return {
        name: parameter
        for name, parameter in block.named_parameters()
        if parameter.is_floating_point() and is_weight(name, parameter.ndim)
    }


def _tail_gradient(
    decoder: Decoder,
    ids_BT: Tensor,
    stream_BTD: Tensor,
    ranks: Ranks,
    advance: Advance,
    counted_BT: Tensor | None = None,
) -> Tensor:
    """Gradient of the loss for the stream after the last block, `[B, T, D]`."""
    ids_BT = ids_BT.to(decoder.device)
    target_BT = ids_BT
    if counted_BT is not None:
        target_BT = ids_BT.masked_fill(~counted_BT.to(ids_BT.device), NO_TARGET)
    predictions = ranks.total(predictions_of(ids_BT, counted_BT).sum().item())
    gradient_BTD = torch.zeros_like(stream_BTD, device=decoder.device)
    for parameter in decoder.model.parameters():
        parameter.requires_grad_(False)
    with decoder.tail() as logits, torch.enable_grad():
        for rows, columns in token_slices(ids_BT, slice_tokens(decoder) // 2 or 1):
            piece = stream_BTD[rows, columns].to(decoder.device).requires_grad_()
            logits_NV = logits(piece, ids_BT[rows, columns]).flatten(0, 1)
            target_N = targets(target_BT, rows, columns)
            loss = F.cross_entropy(
                logits_NV.float(), target_N, reduction="sum", ignore_index=NO_TARGET
            )
            loss = loss / predictions
            (gradient_BTD[rows, columns],) = torch.autograd.grad(loss, piece)
            advance(2 * head_flops(decoder) * len(target_N))
    return gradient_BTD


def _block_gradient(
    decoder: Decoder,
    b: int,
    entry: Entry,
    before_BTD: Tensor,
    gradient_BTD: Tensor,
    gradients: dict[str, Tensor],
) -> Tensor:
    """The gradient of block `b`'s input; those of its weights are added to `gradients`, float32."""
    before_BTD = before_BTD.detach().clone().requires_grad_()

    def add(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        parameter.grad = None
        _add(gradients, name, gradient)

    weights = block_weights(decoder.blocks[b])
    hooks = [
        parameter.requires_grad_(True).register_post_accumulate_grad_hook(partial(add, name))  # type: ignore[no-untyped-call]
        for name, parameter in weights.items()
    ]
    try:
        with torch.enable_grad():
            after_BTD = decoder.apply(b, before_BTD, entry.calls[b])
            torch.autograd.backward(after_BTD, gradient_BTD.to(after_BTD.dtype))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in weights.values():
            parameter.requires_grad_(False)
    assert before_BTD.grad is not None
    return before_BTD.grad


def _products(
    decoder: Decoder, b: int, gradients: dict[str, Tensor], ranks: Ranks
) -> dict[str, Tensor]:
    """Weight times gradient of all ranks; zero for an expert that no token was sent to."""
    weights = block_weights(decoder.blocks[b])
    for name, weight in weights.items():
        if name not in gradients:
            gradients[name] = torch.zeros_like(weight, dtype=torch.float32)
    ranks.add_up(gradients[name] for name in weights)
    return {name: gradients[name].mul_(weight.detach()) for name, weight in weights.items()}


def walk_back_flops(
    decoder: Decoder,
    blocks: Sequence[int],
    samples: int,
    length: int,
    done: int | None = None,
    *,
    head: bool = True,
) -> float:
    """Floating-point operations of `walk_back`, or until `done` blocks of the way back are done.

    Four passes of each block: forward, forward again, and the gradients of its input and weights.
    """
    forward = sum(block_flops(decoder, b) for b in blocks)
    back = sum(block_flops(decoder, b) for b in list(reversed(blocks))[:done])
    heads = 2 * head_flops(decoder) * samples * (length - 1) if head else 0.0
    return (forward + 3 * back) * samples * length + heads
