"""The removal walk: every "model without block b" in one pass over the blocks.

Let `x` be the intact stream at block `b`, and `S` the streams in which one earlier block was left
out. One step applies block `b` to `x` and to each of `S`, then adds "b left out" (the old `x`) to
`S`:

    before   x  = intact, entering block b         S = [without 0, ..., without b-1]
    after    x' = block b (x)                      S = [block b (s) for s in S] + [x]

After L steps `S` holds all L shortened models: L(L+1)/2 block passes instead of the L(L-1) of
running each shortened model on its own, with the same numbers, since each stream meets the same
blocks in the same order. The walk takes one group of samples at a time, so that activations stay in
the cache of a CPU and memory does not grow with the number of samples. At its end the head is
applied to each stream in slices of tokens, so that full logits never exist.

Shapes: B samples, T tokens per sample, D width, V vocabulary, N predictions of one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shortllm.metrics import next_token_nll
from shortllm.model.resident import Entry, ResidentModel

Advance = Callable[[float], None]
Consume = Callable[[int | None, Tensor, Tensor, Tensor], None]

CPU_GROUP_TOKENS = 512
GPU_GROUP_TOKENS = 8192
"""Tokens of one block call: enough to keep the matrix unit busy, few enough to stay in cache."""

CPU_LOSS_BYTES = 64 * 2**20
GPU_LOSS_BYTES = 2**30
"""Bound on the temporaries of one slice of the head: logits and what the loss makes of them."""


def sweep_removals(
    model: ResidentModel, ids_BT: Tensor, consume: Consume, *, advance: Advance = lambda work: None
) -> None:
    """Next-token logits of the intact model and of the model without each single block.

    Args:
        consume: called as `consume(removed, logits_NV, intact_NV, target_N)` for each slice of
            predictions, first with `removed=None` (the intact model), then with each block number.
        advance: called with the floating-point operations done since its last call.
    """
    for group_BT in torch.split(ids_BT, group_size(model, ids_BT.shape[1])):
        entry = model.enter(group_BT)
        intact, without = removal_streams(model, entry, advance=advance)
        for removed, logits_NV, intact_NV, target_N in _slices(
            model, entry.ids_BT, intact, without
        ):
            consume(removed, logits_NV, intact_NV, target_N)
            advance(head_flops(model) * len(target_N))


def removal_streams(
    model: ResidentModel, entry: Entry, *, advance: Advance = lambda work: None
) -> tuple[Tensor, list[Tensor]]:
    """The streams after the last block, before the final norm.

    Returns:
        `intact_BTD`, and a list of L tensors `[B, T, D]`, the b-th without block b.
    """
    intact = entry.stream_BTD
    without: list[Tensor] = []
    for b, call in enumerate(entry.calls):
        for i, stream in enumerate(without):
            without[i] = model.apply(b, stream, call)
        without.append(intact)
        intact = model.apply(b, intact, call)
        advance(block_flops(model, b) * entry.ids_BT.numel() * len(without))
    return intact, without


def _slices(
    model: ResidentModel, ids_BT: Tensor, intact: Tensor, without: list[Tensor]
) -> Iterator[tuple[int | None, Tensor, Tensor, Tensor]]:
    """Logits of all candidates, one slice of tokens at a time."""
    with model.tail() as logits:
        for rows, columns in token_slices(ids_BT, slice_tokens(model)):
            ids = ids_BT[rows, columns]
            target_N = _targets(ids_BT, rows, columns)
            intact_NV = logits(intact[rows, columns], ids).flatten(0, 1)
            yield None, intact_NV, intact_NV, target_N
            for b, stream in enumerate(without):
                yield b, logits(stream[rows, columns], ids).flatten(0, 1), intact_NV, target_N


def stream_nll(model: ResidentModel, stream_BTD: Tensor, ids_BT: Tensor) -> Tensor:
    """NLL of every next token given a stream after the last block, nats, `[B*(T-1)]`."""
    losses = []
    with model.tail() as logits:
        for rows, columns in token_slices(ids_BT, slice_tokens(model)):
            logits_NV = logits(stream_BTD[rows, columns], ids_BT[rows, columns]).flatten(0, 1)
            losses.append(next_token_nll(logits_NV, _targets(ids_BT, rows, columns)))
    return torch.cat(losses)


def _targets(ids_BT: Tensor, rows: slice, columns: slice) -> Tensor:
    """The tokens to be predicted at the positions of a slice, `[N]`."""
    return ids_BT[rows, columns.start + 1 : columns.stop + 1].flatten()


def token_slices(ids_BT: Tensor, limit: int) -> Iterator[tuple[slice, slice]]:
    """Cut the positions that predict something (all but each sample's last) into slices of `limit`
    tokens.

    Whole samples where they fit, else pieces of single samples.
    """
    samples, length = ids_BT.shape
    columns = min(length - 1, limit)
    rows = max(1, limit // (length - 1))
    for row in range(0, samples, rows):
        for column in range(0, length - 1, columns):
            yield slice(row, row + rows), slice(column, min(column + columns, length - 1))


def group_size(model: ResidentModel, length: int) -> int:
    """Samples that go through the blocks together."""
    tokens = CPU_GROUP_TOKENS if model.device.type == "cpu" else GPU_GROUP_TOKENS
    return max(1, tokens // length)


def slice_tokens(model: ResidentModel) -> int:
    """Tokens whose logits are held at once."""
    limit = CPU_LOSS_BYTES if model.device.type == "cpu" else GPU_LOSS_BYTES
    copies = 8 if model.dtype.itemsize == 4 else model.dtype.itemsize + 8
    return max(1, limit // (model.vocabulary * copies))


def sweep_flops(model: ResidentModel, samples: int, length: int) -> float:
    """Floating-point operations of `sweep_removals`: the total its `advance` adds up to."""
    tokens = samples * length
    blocks = sum(block_flops(model, b) * (b + 1) for b in range(model.block_count))
    return blocks * tokens + head_flops(model) * (model.block_count + 1) * samples * (length - 1)


def block_flops(model: ResidentModel, b: int) -> float:
    """Multiplications and additions with the weights of block `b`, per token."""
    return 2.0 * sum(parameter.numel() for parameter in model.blocks[b].parameters())


def head_flops(model: ResidentModel) -> float:
    """Multiplications and additions of the head, per token."""
    return 2.0 * model.head_elements
