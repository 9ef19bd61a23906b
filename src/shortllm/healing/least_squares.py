"""The least-squares fit of one gap, from sums over tokens alone.

The projection before a gap adds `M` to the hidden state, which then is `Z` but should be `H`. What
is missing is `R = H - Z`. Two kinds of change can make up for it:

    map       M (I + C)         leaves R - M C    min  ‖M C - R‖² + λ‖C‖²
    weights   A (W + C)         leaves R - A C    min  ‖A C - R‖² + λ‖C‖²      where M = A W

The attention of the block adds to the hidden state too. Where all weights are unknowns, so are
those of its output projection: `A` is first both inputs side by side. What the changed attention
does to the MLP behind it is not linear, so the change of the attention is kept alone, `A` is read
again, and the MLP's projection is solved against what is left.

With `X` for `M` or `A` the solution `C = (XᵀX + λI)⁻¹ XᵀR` needs two matrices, whatever the number
of tokens. The error that is left on other tokens follows from the same sums over them. Every map is
also a change of the weights, which have more columns: they can fit better, and need more text.

Where we differ from the paper of the map: by default the error of each token is relative to the
token's own mean square in `H`, by which the norm at the start of the next block will divide it. A
few tokens have hidden states a hundred times the size of all others; if every token counts alike
(`weighting="none"`, the formula above) these alone decide, and the others may get worse.

Source of the map: Shopkhoev et al. 2025, ReplaceMe, arXiv:2505.02819. Sums are float64 throughout.

The walk that heals takes the hidden states of two models through the blocks:

    source    0 ─► 1 ─► 2 ─► 3 ─► 4 ─► 5 ─► 6        what the hidden state should be
                             │ wanted     │
    healed    0 ─► 1′───────────► 4 ─► 5′─────►      blocks 2, 3 and 6 removed

The source goes first through the block before a gap and the gap itself. Then the sums compare the
healed hidden state with where the source arrived, the change is solved and folded (1′), and the
healed hidden state goes through the block as it will be stored. So later changes compensate for
what is left of earlier errors too. Blocks that are read one at a time are read twice before a gap.

Shapes: B samples, T tokens, D width, I columns of X, N tokens of one group.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shortllm.checkpoint.source import Checkpoint
from shortllm.healing.folding import (
    Added,
    Fold,
    find_foldable,
    fold,
    folded_into,
    inputs_of,
    outputs_of,
    refit,
)
from shortllm.healing.methods import Healed, Task
from shortllm.healing.options import HealedGap, HealOptions
from shortllm.model.hidden_states import SampleGroups
from shortllm.pruning.budget import Gap, gaps_of
from shortllm.runtime import Ranks, progress

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 100.0)
"""Ridge strengths to choose from, relative to the mean square of `X` summed over tokens."""


@dataclass(frozen=True, slots=True)
class Unknowns:
    """What is solved for."""

    seen: Callable[[Mapping[str, nn.Module]], AbstractContextManager[dict[str, list[Tensor]]]]
    """Collects `X` while a block runs, before the block multiplies it with its factor."""
    fold: Callable[[Checkpoint, int, Added, Tensor], Fold]
    """The new weights of a projection, from the change."""
    earlier: bool
    """Whether projections before the last one of a block are changed too."""

    def of(self, found: Sequence[Added], options: HealOptions) -> list[Added]:
        """The projections of a block that get new weights."""
        return list(found) if self.earlier and options.attention else list(found[-1:])


UNKNOWNS = {
    "linear": Unknowns(outputs_of, fold, earlier=False),
    "regression": Unknowns(inputs_of, refit, earlier=True),
}
"""By healing method: a map, or all weights."""


class GapSums:
    """Sums over tokens that a change depends on."""

    def __init__(
        self,
        columns: int,
        width: int,
        device: torch.device,
        *,
        weighted: bool,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        """No tokens yet.

        Args:
            weighted: each token counts relative to its own mean square in H.
            dtype: of the products of the tokens of one `add`; those of all are added in float64.
        """
        if device.type == "mps":  # which has no float64
            device = torch.device("cpu")
        self.weighted, self.dtype = weighted, dtype
        self.products_II = torch.zeros((columns, columns), dtype=torch.float64, device=device)
        """XᵀX"""
        self.cross_ID = torch.zeros((columns, width), dtype=torch.float64, device=device)
        """XᵀR"""
        self.missing_D = torch.zeros(width, dtype=torch.float64, device=device)
        """‖R‖² of each column"""
        self.wanted = 0.0
        """‖H‖²"""

    def add(self, x_NI: Tensor, after_ND: Tensor, wanted_ND: Tensor) -> None:
        """Take in more tokens: X, the hidden state as it is, and as it should be."""
        x_NI, after_ND, wanted_ND = (
            given.to(self.products_II.device, self.dtype) for given in (x_NI, after_ND, wanted_ND)
        )
        if self.weighted and len(wanted_ND):
            floor = torch.finfo(torch.float32).tiny
            scale_N1 = wanted_ND.square().mean(1, keepdim=True).clamp_min(floor).rsqrt()
            x_NI, after_ND, wanted_ND = (given * scale_N1 for given in (x_NI, after_ND, wanted_ND))
        missing_ND = wanted_ND - after_ND
        self.products_II += x_NI.T @ x_NI
        self.cross_ID += x_NI.T @ missing_ND
        self.missing_D += missing_ND.square().sum(0)
        self.wanted += wanted_ND.square().sum().item()

    def take(self, other: GapSums) -> None:
        """Add the sums over other tokens; in place, as the matrices may be large."""
        self.products_II += other.products_II
        self.cross_ID += other.cross_ID
        self.missing_D += other.missing_D
        self.wanted += other.wanted

    def add_up(self, ranks: Ranks) -> None:
        """Add the sums of all processes."""
        wanted = torch.tensor(self.wanted, dtype=torch.float64)
        ranks.add_up([self.products_II, self.cross_ID, self.missing_D, wanted])
        self.wanted = wanted.item()

    def columns(self, chosen: slice) -> GapSums:
        """The sums for some columns of R, as views; `wanted` stays that of all."""
        found = copy.copy(self)
        found.cross_ID, found.missing_D = self.cross_ID[:, chosen], self.missing_D[chosen]
        return found

    @property
    def missing(self) -> float:
        """‖R‖²"""
        return self.missing_D.sum().item()

    def error(self, change_ID: Tensor) -> float:
        """‖X C - R‖²"""
        linear = (change_ID * self.cross_ID).sum()
        square = (change_ID * (self.products_II @ change_ID)).sum()
        return self.missing - 2 * linear.item() + square.item()

    def relative(self, error: float) -> float:
        """A squared error relative to ‖H‖²."""
        return error / self.wanted if self.wanted else 0.0


def penalty(sums: GapSums, ridge: float) -> float:
    """λ of a ridge: that many times the mean eigenvalue of XᵀX."""
    return ridge * sums.products_II.diagonal().mean().item()


def solve(sums: GapSums, ridge: float) -> Tensor:
    """The change, float64 `[I, D]`; zero if `X` is zero."""
    held = penalty(sums, ridge)
    if not held:
        return torch.zeros_like(sums.cross_ID)
    matrix_II = sums.products_II.clone()
    matrix_II.diagonal().add_(held)
    return torch.cholesky_solve(sums.cross_ID, torch.linalg.cholesky(matrix_II))


def effective_rank(sums: GapSums, ridge: float) -> float:
    """In how many directions of `X` it is free: sum of e / (e + λ) over eigenvalues of XᵀX."""
    held = penalty(sums, ridge)
    values_I = torch.linalg.eigvalsh(sums.products_II).clamp_min(0.0)
    return float((values_I / (values_I + held)).sum().item()) if held else 0.0


def choose_ridge(
    fitted: GapSums, held_out: GapSums, given: float | None = None
) -> tuple[float | None, float]:
    """The ridge whose change, solved on some tokens, leaves the least squared error on others; and
    that error. Where none is given, no change at all is also a choice."""
    best, least = None, float("inf") if given else held_out.missing
    for ridge in (given,) if given else RIDGES:
        left = held_out.error(solve(fitted, ridge))
        if left < least:
            best, least = ridge, left
    return best, least


def steps_of(gaps: Collection[Gap]) -> list[tuple[int, Gap | None]]:
    """Each block up to the last gap, and after each gap the block before it, with the gap."""
    steps: list[tuple[int, Gap | None]] = []
    for b in range(max((gap.stop for gap in gaps), default=0)):
        steps.append((b, None))
        steps += [(gap.before, gap) for gap in gaps if gap.stop == b + 1 and gap.before is not None]
    return steps


@torch.no_grad()
def heal_gaps(task: Task) -> Healed:
    """Solve a change for every gap that has a block before it, and fold it.

    The held-out samples choose the ridge of each, unless it is given; the folded change is then
    solved on all samples.
    """
    decoder, gaps = task.decoder, gaps_of(task.removed)
    before = [gap.before for gap in gaps if gap.before is not None]
    found = find_foldable(task.checkpoint, decoder, before)
    unknowns = UNKNOWNS[task.options.method]
    walk = _Walk(task, unknowns)
    folds: dict[int, Fold] = {}
    records = [HealedGap(block=None, removed=gap.blocks) for gap in gaps if gap.before is None]
    steps = steps_of(gaps)
    order = decoder.through([b for b, _ in steps])
    with progress("healing", len(steps)) as advance:
        for (b, gap), _ in zip(steps, order, strict=True):
            if gap is None:
                walk.through(b, source=True, healed=b not in task.removed and b not in before)
            else:
                record, changed = _heal_gap(task, walk, gap, b, unknowns.of(found[b], task.options))
                records.append(record)
                if changed:
                    folds[b] = changed
                with folded_into(decoder, {b: changed}):
                    walk.through(b, source=False, healed=True)
            advance(1)
    return Healed(gaps=records, folds=folds)


def _heal_gap(
    task: Task, walk: _Walk, gap: Gap, b: int, projections: Sequence[Added]
) -> tuple[HealedGap, Fold]:
    """New weights of the projections of block `b`, and what the record says of them.

    One after the other, each solved together with those behind it.
    """
    changed: Fold = {}
    errors: list[float] = []
    record = HealedGap(block=b, removed=gap.blocks)
    for place, added in enumerate(projections):
        with folded_into(task.decoder, {b: changed}):
            fitted, held_out, columns = walk.measure(b, projections[place:])
        ridge, left = choose_ridge(fitted, held_out, task.options.ridge)
        errors += [held_out.relative(held_out.missing), held_out.relative(left)]
        fitted.take(held_out)
        if ridge is not None:
            change_ID = solve(fitted, ridge)[:columns]
            changed |= walk.unknowns.fold(task.checkpoint, b, added, change_ID)
        record = HealedGap(
            block=b,
            removed=gap.blocks,
            projections=[one.name for one in projections],
            scale=added.scale,
            ridge=ridge,
            penalty=None if ridge is None else penalty(fitted, ridge),
            effective_rank=None if ridge is None else effective_rank(fitted, ridge),
            error_before=errors[0],
            error_after=errors[-1],
        )
    return record, changed


class _Walk:
    """Both hidden states `[B, T, D]` on their way through the blocks of the source."""

    def __init__(self, task: Task, unknowns: Unknowns) -> None:
        self._decoder = task.decoder
        self.unknowns = unknowns
        self._weighted = task.options.weighting == "norm"
        self._fitted = len(task.ids_BT) - task.held_out
        self._groups = SampleGroups(task.decoder, task.ids_BT, task.memory)
        self._source = self._groups.entering()
        self._healed: Tensor | None = None  # one stream until they differ

    def through(self, b: int, *, source: bool, healed: bool) -> None:
        """Take one or both hidden states through block `b`."""
        if source != healed and self._healed is None:
            self._healed = self._groups.allocate().copy_(self._source)
        if source:
            self._groups.apply(b, self._source)
        if healed and self._healed is not None:
            self._groups.apply(b, self._healed)

    def measure(self, b: int, projections: Sequence[Added]) -> tuple[GapSums, GapSums, int]:
        """What block `b` can add to the healed hidden state compared with where the source is, for
        the samples to solve with and the held-out ones; both hidden states stay where they are.
        And how many columns of X are those of the first projection."""
        decoder = self._decoder
        assert self._healed is not None
        modules = {one.name: decoder.blocks[b].get_submodule(one.name) for one in projections}
        sums: list[GapSums] = []
        columns = 0
        for group, rows in enumerate(self._groups.rows):
            with self.unknowns.seen(modules) as seen:
                after_BTD = self._groups.after(b, self._healed, group)
            size = after_BTD.shape[:2]
            parts = [seen[one.name][0].view(*size, -1).double() * one.scale for one in projections]
            columns = parts[0].shape[-1]
            x_BTI = torch.cat(parts, dim=-1)
            if not sums:
                shape = (x_BTI.shape[-1], after_BTD.shape[-1])
                sums = [GapSums(*shape, decoder.device, weighted=self._weighted) for _ in range(2)]
            wanted_BTD = self._source[rows].to(decoder.device)
            border = min(max(self._fitted - rows.start, 0), len(after_BTD))
            for part, one in zip((slice(border), slice(border, None)), sums, strict=True):
                one.add(*(given[part].flatten(0, 1) for given in (x_BTI, after_BTD, wanted_BTD)))
        return sums[0], sums[1], columns
