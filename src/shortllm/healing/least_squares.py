"""The least-squares map of one gap, from sums over tokens alone.

A projection adds `M` to the hidden state, which then is `Z` but should be `H`. Replacing `M` by
`M T` with `T = I + D` leaves the error `R - M D`, where `R = H - Z` is what is missing, so

    min_T  ‖(M T + Y) - H‖² + λ‖T - I‖²    is    min_D  ‖M D - R‖² + λ‖D‖²    (Y = Z - M)

and the solution `D = (MᵀM + λI)⁻¹ MᵀR` needs two matrices, whatever the number of tokens. The error
that is left on other tokens follows from the same sums over them.

Where we differ from the paper: by default the error of each token is relative to the token's own
mean square in `H`, by which the norm at the start of the next block will divide it. A few tokens
have hidden states a hundred times the size of all others; if every token counts alike
(`weighting="none"`, the formula above) these alone decide, and the others may get worse.

Source: Shopkhoev et al. 2025, ReplaceMe, arXiv:2505.02819; the sums are float64 throughout.

The walk that heals takes the hidden states of two models through the blocks:

    source    0 ─► 1 ─► 2 ─► 3 ─► 4 ─► 5 ─► 6        what the hidden state should be
                             │ wanted     │
    healed    0 ─► 1′───────────► 4 ─► 5′─────►      blocks 2, 3 and 6 removed

The source goes first through the block before a gap and the gap itself. Then sums compare what that
block's projection adds to the healed hidden state with where the source arrived, the map is solved
and folded (1′), and the healed hidden state goes through the block as it will be stored. So later
maps compensate for what is left of earlier errors too. Blocks that are read one at a time are read
twice before a gap.

Shapes: B samples, T tokens, D width, N tokens of one group.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from shortllm.healing.folding import Added, Fold, find_foldable, fold, folded_into, outputs_of
from shortllm.healing.methods import Healed, Task
from shortllm.healing.options import HealedGap
from shortllm.model.hidden_states import SampleGroups
from shortllm.pruning.budget import Gap, gaps_of
from shortllm.runtime import progress

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 100.0)
"""Ridge strengths to choose from, relative to the mean square of `M` summed over tokens."""


class GapSums:
    """Sums over tokens that a map depends on."""

    def __init__(self, width: int, device: torch.device, *, weighted: bool) -> None:
        """No tokens yet; `weighted`: each counts relative to its own mean square in H."""
        if device.type == "mps":  # which has no float64
            device = torch.device("cpu")
        zeros = torch.zeros((width, width), dtype=torch.float64, device=device)
        self.weighted = weighted
        self.products_DD = zeros
        """MᵀM"""
        self.cross_DD = zeros.clone()
        """MᵀR"""
        self.missing = 0.0
        """‖R‖²"""
        self.wanted = 0.0
        """‖H‖²"""

    def add(self, added_ND: Tensor, after_ND: Tensor, wanted_ND: Tensor) -> None:
        """Take in more tokens: what is added to the hidden state, the sum, and the wanted one."""
        added_ND, after_ND, wanted_ND = (
            given.to(self.products_DD.device).double() for given in (added_ND, after_ND, wanted_ND)
        )
        if self.weighted and len(wanted_ND):
            floor = torch.finfo(torch.float32).tiny
            scale_N1 = wanted_ND.square().mean(1, keepdim=True).clamp_min(floor).rsqrt()
            added_ND, after_ND, wanted_ND = (
                given * scale_N1 for given in (added_ND, after_ND, wanted_ND)
            )
        missing_ND = wanted_ND - after_ND
        self.products_DD += added_ND.T @ added_ND
        self.cross_DD += added_ND.T @ missing_ND
        self.missing += missing_ND.square().sum().item()
        self.wanted += wanted_ND.square().sum().item()

    def plus(self, other: GapSums) -> GapSums:
        """The sums over both sets of tokens."""
        both = GapSums(len(self.products_DD), self.products_DD.device, weighted=self.weighted)
        both.products_DD = self.products_DD + other.products_DD
        both.cross_DD = self.cross_DD + other.cross_DD
        both.missing = self.missing + other.missing
        both.wanted = self.wanted + other.wanted
        return both

    def error(self, change_DD: Tensor) -> float:
        """‖M D - R‖²"""
        linear = (change_DD * self.cross_DD).sum()
        square = (change_DD * (self.products_DD @ change_DD)).sum()
        return self.missing - 2 * linear.item() + square.item()

    def relative(self, error: float) -> float:
        """A squared error relative to ‖H‖²."""
        return error / self.wanted if self.wanted else 0.0


def penalty(moments: GapSums, ridge: float) -> float:
    """λ of a ridge: that many times the mean eigenvalue of MᵀM."""
    return ridge * moments.products_DD.diagonal().mean().item()


def solve(moments: GapSums, ridge: float) -> Tensor:
    """`D` of the map `T = I + D`, float64 `[D, D]`; zero if `M` is zero."""
    held = penalty(moments, ridge)
    if not held:
        return torch.zeros_like(moments.cross_DD)
    matrix_DD = moments.products_DD.clone()
    matrix_DD.diagonal().add_(held)
    return torch.cholesky_solve(moments.cross_DD, torch.linalg.cholesky(matrix_DD))


def effective_rank(moments: GapSums, ridge: float) -> float:
    """In how many directions of `M` the map is free: sum of e / (e + λ) over eigenvalues of MᵀM."""
    held = penalty(moments, ridge)
    values_D = torch.linalg.eigvalsh(moments.products_DD).clamp_min(0.0)
    return float((values_D / (values_D + held)).sum().item()) if held else 0.0


def choose_ridge(
    fitted: GapSums, held_out: GapSums, given: float | None = None
) -> tuple[float | None, float]:
    """The ridge whose map, solved on some tokens, leaves the least squared error on others; and
    that error. Where none is given, no map at all is also a choice."""
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
    """Solve a map for every gap that has a block before it, and fold it.

    The held-out samples choose the ridge of each map, unless it is given; the folded map is then
    solved on all samples.
    """
    decoder, gaps = task.decoder, gaps_of(task.removed)
    before = [gap.before for gap in gaps if gap.before is not None]
    added = find_foldable(task.checkpoint, decoder, before)
    walk = _Walk(task)
    folds: dict[int, Fold] = {}
    records = [HealedGap(block=None, removed=gap.blocks) for gap in gaps if gap.before is None]
    steps = steps_of(gaps)
    order = decoder.through([b for b, _ in steps])
    with progress("healing", len(steps)) as advance:
        for (b, gap), _ in zip(steps, order, strict=True):
            if gap is None:
                walk.through(b, source=True, healed=b not in task.removed and b not in before)
            else:
                sums = walk.measure(b, added[b])
                one, change_DD = _solve(gap, added[b], *sums, task.options.ridge)
                records.append(one)
                if change_DD is not None:
                    folds[b] = fold(task.checkpoint, b, added[b], change_DD)
                with folded_into(decoder, {b: folds[b]} if b in folds else {}):
                    walk.through(b, source=False, healed=True)
            advance(1)
    return Healed(gaps=records, folds=folds)


def _solve(
    gap: Gap, added: Added, fitted: GapSums, held_out: GapSums, given: float | None
) -> tuple[HealedGap, Tensor | None]:
    """What the record says of one gap, and its map minus the identity."""
    ridge, left = choose_ridge(fitted, held_out, given)
    both = fitted.plus(held_out)
    found = HealedGap(
        block=gap.before,
        removed=gap.blocks,
        projection=added.name,
        scale=added.scale,
        ridge=ridge,
        penalty=None if ridge is None else penalty(both, ridge),
        effective_rank=None if ridge is None else effective_rank(both, ridge),
        error_before=held_out.relative(held_out.missing),
        error_after=held_out.relative(left),
    )
    return found, None if ridge is None else solve(both, ridge)


class _Walk:
    """Both hidden states `[B, T, D]` on their way through the blocks of the source."""

    def __init__(self, task: Task) -> None:
        self._decoder = task.decoder
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

    def measure(self, b: int, added: Added) -> tuple[GapSums, GapSums]:
        """What block `b` adds to the healed hidden state compared with where the source is, for
        the samples to solve with and the held-out ones; both hidden states stay where they are."""
        decoder = self._decoder
        assert self._healed is not None
        width = self._healed.shape[-1]
        fitted, others = (GapSums(width, decoder.device, weighted=self._weighted) for _ in range(2))
        module = decoder.blocks[b].get_submodule(added.name)
        for group, rows in enumerate(self._groups.rows):
            with outputs_of({added.name: module}) as seen:
                after_BTD = self._groups.after(b, self._healed, group)
            added_BTD = added.scale * seen[added.name][0].double().view(after_BTD.shape)
            wanted_BTD = self._source[rows].to(decoder.device)
            border = min(max(self._fitted - rows.start, 0), len(after_BTD))
            for part, sums in ((slice(border), fitted), (slice(border, None), others)):
                sums.add(*(one[part].flatten(0, 1) for one in (added_BTD, after_BTD, wanted_BTD)))
        return fitted, others
