"""Healed weights for every gap that a search may make, from one pass over the intact model.

Gaps are fitted one after the other when a model is healed (`gap_by_gap.py`), so each set of
removed blocks would need a pass of its own. Here the hidden state in front of every gap is taken to
be the intact one. Then the sums for all gaps behind a block come from the same pass,

    block b     X, Z        what its projection reads or returns, and the hidden state behind it
    block b+1   R = H - Z   what is missing if b+1 is removed
    block b+2   R = H - Z   ... if b+1 and b+2 are removed, and so on

and a search measures thousands of healed models in its usual walks, in which a block in front of a
gap computes with the weights for a gap of that length. What is left out is small: of two gaps, the
second is not told what the first left over, and only the last module is changed.

Shapes: N tokens of all samples, I columns of X, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from shortllm.checkpoint.source import Checkpoint
from shortllm.healing.folding import Fold, find_foldable, folded_into, watching
from shortllm.healing.least_squares import GapSums, choose_ridge, solve
from shortllm.healing.options import HealOptions
from shortllm.healing.unknowns import Stage, stages
from shortllm.model.decoder import Decoder
from shortllm.model.hidden_states import SampleGroups, StreamMemory, block_flops
from shortllm.progress import Advance
from shortllm.runtime import ALONE, Ranks

TOKENS = 4096
"""Tokens whose numbers exist in float32 at once."""

SUMS = 4
"""About how many calls of a block take as long as the sums and solutions of the gaps behind it."""


@dataclass(frozen=True, slots=True)
class GapFolds:
    """Weights of each block for gaps of each length behind it; see `walk.Healed`."""

    decoder: Decoder
    folds: dict[tuple[int, int], Fold]
    """By block and length of the gap behind it."""

    def version(self, b: int, removed: Collection[int]) -> int:
        """The length of the gap behind block `b`."""
        length = 0
        while b + length + 1 in removed:
            length += 1
        return length if (b, length) in self.folds else 0

    def applied(self, b: int, version: int) -> AbstractContextManager[None]:
        """Within the context, block `b` has the weights for a gap of this length."""
        if not version:
            return nullcontext()
        return folded_into(self.decoder, {b: self.folds[b, version]})


@torch.no_grad()
def folds_of_every_gap(
    decoder: Decoder,
    checkpoint: Checkpoint,
    ids_BT: Tensor,
    options: HealOptions,
    removable: Collection[int],
    longest: int,
    *,
    ranks: Ranks = ALONE,
    memory: StreamMemory | None = None,
    advance: Advance = lambda work: None,
) -> GapFolds:
    """Solve the weights of each block for gaps of up to `longest` blocks behind it.

    Args:
        ids_BT: this process's samples; the last quarter of those of all processes chooses the
            ridge, by the gaps of one block.
        removable: the blocks that may be removed; other gaps are left out.
        advance: called with the part of `work_of_every_gap` done since its last call.
    """
    lengths = {b: _possible(b, removable, longest) for b in range(decoder.block_count)}
    before = [b for b, length in lengths.items() if length]
    if not before:
        return GapFolds(decoder, {})
    found = find_foldable(checkpoint, decoder, before)
    fits = {b: stages(modules, options)[-1] for b, modules in found.items()}
    groups = SampleGroups(decoder, ids_BT, memory)
    stream_BTD = groups.entering()
    waiting: dict[int, Tensor] = {}
    behind: dict[int, Tensor] = {}
    folds: dict[tuple[int, int], Fold] = {}
    last = max(b + lengths[b] for b in before)
    for b in decoder.through(range(last + 1)):
        x_NI = _through(groups, b, stream_BTD, fits.get(b))
        if x_NI is not None:
            waiting[b] = x_NI
        behind[b] = stream_BTD.flatten(0, 1).clone()
        for a in [a for a in waiting if a + lengths[a] == b]:
            states = [behind[a + n] for n in range(lengths[a] + 1)]
            fitted, held_out = _sums(waiting.pop(a), states, ids_BT.shape, options, ranks)
            unknowns, [added] = fits[a].unknowns, fits[a].modules
            for n, change_ID in _solved(fitted, held_out, options, lengths[a], unknowns.diagonal):
                folds[a, n] = unknowns.fold(checkpoint, a, added, change_ID)
            advance(SUMS * _passing(decoder, a, ids_BT.shape))
        advance(_passing(decoder, b, ids_BT.shape))
        oldest = min(waiting, default=b + 1)
        behind = {depth: state for depth, state in behind.items() if depth >= oldest}
    return GapFolds(decoder, folds)


def work_of_every_gap(
    decoder: Decoder, shape: torch.Size, removable: Collection[int], longest: int
) -> float:
    """Floating-point operations, about, for samples of a shape `[B, T]`."""
    lengths = [_possible(b, removable, longest) for b in range(decoder.block_count)]
    last = max((b + length for b, length in enumerate(lengths) if length), default=-1)
    passes = sum(_passing(decoder, b, shape) for b in range(last + 1))
    return passes + SUMS * sum(_passing(decoder, b, shape) for b, n in enumerate(lengths) if n)


def _passing(decoder: Decoder, b: int, shape: torch.Size) -> float:
    """Floating-point operations of one block for all tokens."""
    return block_flops(decoder, b) * shape.numel()


def _possible(b: int, removable: Collection[int], longest: int) -> int:
    """How long a gap behind block `b` can be."""
    length = 0
    while length < longest and b + length + 1 in removable:
        length += 1
    return length


def _through(groups: SampleGroups, b: int, stream_BTD: Tensor, fit: Stage | None) -> Tensor | None:
    """Take all samples through block `b`, in place; X of the fit, if there is one."""
    if fit is None:
        groups.apply(b, stream_BTD)
        return None
    parts = []
    for group, rows in enumerate(groups.rows):
        with watching(groups.decoder.blocks[b], fit.watched(b)) as seen:
            after_BTD = groups.after(b, stream_BTD, group)
        stream_BTD[rows] = after_BTD.to(stream_BTD)
        x_NI = fit.unknowns.columns(fit.modules[0], seen).view(after_BTD.shape[:2].numel(), -1)
        parts.append(x_NI.to(stream_BTD.device))
    return torch.cat(parts)


def _sums(
    x_NI: Tensor, states: Sequence[Tensor], shape: torch.Size, options: HealOptions, ranks: Ranks
) -> tuple[GapSums, GapSums]:
    """Sums over the samples to solve with and over the held-out ones, of all lengths side by side.

    A token counts relative to the largest of the hidden states that it has within the longest gap.
    """
    samples, length = shape
    border = (samples - ranks.share_of_last_quarter(samples)) * length
    width = states[0].shape[-1] * (len(states) - 1)
    found = []
    for part in (slice(border), slice(border, None)):
        sums = GapSums(x_NI.shape[1], width, x_NI.device, weighted=False, dtype=torch.float32)
        first, stop, _ = part.indices(len(x_NI))
        for start in range(first, stop, TOKENS):
            rows = slice(start, min(start + TOKENS, stop))
            pieces = [state[rows].float() for state in states]
            scale_N1 = torch.ones(1)
            if options.weighting == "norm":
                squares = [piece.square().mean(1, keepdim=True) for piece in pieces]
                floor = torch.finfo(torch.float32).tiny
                scale_N1 = torch.stack(squares).amax(0).clamp_min(floor).rsqrt()
            before, *wanted = (piece * scale_N1 for piece in pieces)
            sums.add(
                x_NI[rows].float() * scale_N1,
                before.repeat(1, len(wanted)),
                torch.cat(wanted, dim=1),
            )
        sums.add_up(ranks)
        found.append(sums)
    return found[0], found[1]


def _solved(
    fitted: GapSums, held_out: GapSums, options: HealOptions, lengths: int, diagonal: bool
) -> Iterator[tuple[int, Tensor]]:
    """Lengths of gaps and the change for each; none where no change is better."""
    width = fitted.cross_ID.shape[1] // lengths
    one = slice(width)
    ridge, _ = choose_ridge(
        fitted.columns(one), held_out.columns(one), options.ridge, diagonal=diagonal
    )
    if ridge is None:
        return
    held_out.add_to(fitted)
    for n in range(1, lengths + 1):
        columns = fitted.columns(slice((n - 1) * width, n * width))
        yield n, solve(columns, ridge, diagonal=diagonal).weights_ID
