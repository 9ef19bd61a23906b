"""The least-squares fit of one gap, from sums over tokens alone.

A change `C` of the block before a gap adds `X C` where `R` is missing; `unknowns.py` says what X
and R are. It is the one that leaves the least of

    ‖X C - R‖² + λ‖C‖²        C = (XᵀX + λI)⁻¹ XᵀR

which needs two matrices, whatever the number of tokens. The error that is left on other tokens
follows from the same sums over them. A factor α for the whole hidden state behind the gap
(`gain.py`) is one more unknown, a = α - 1, of ‖X C + a Z - R‖², and needs one more matrix, XᵀZ:

    C = (XᵀX + λI)⁻¹ (XᵀR - a XᵀZ)        a from the one equation that is left

The attention of the block adds to the hidden state too; the
weights of its output projection are solved together with those of the MLP's. What a changed
attention does to the MLP behind it is not linear, so the change of the attention is kept alone, X
is read again, and the MLP's projection is solved against what is left.

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
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shortllm.healing.folding import (
    Added,
    Fold,
    find_foldable,
    folded_into,
    refit,
    watching,
)  # fmt: skip
from shortllm.healing.gain import Scalable, find_scalable
from shortllm.healing.methods import METHODS, Healed, Task
from shortllm.healing.options import HealedGap
from shortllm.healing.unknowns import Seen, Stage, stages
from shortllm.model.hidden_states import SampleGroups
from shortllm.progress import progress
from shortllm.pruning.budget import Gap, gaps_of
from shortllm.runtime import Ranks
from shortllm.surgery.derived import stored_name

log = logging.getLogger(__name__)

COLUMNS = 512
"""About how many columns of R choose the ridge."""

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 100.0)
"""Ridge strengths to choose from, relative to the mean square of `X` summed over tokens."""


MOST_COLUMNS = 8192
"""Columns of X that are solved together: above, blocks further before a gap are left out."""

LEAST_GAIN = 0.25
"""Factors of the hidden state that are smaller, or larger than its inverse, are not believed."""


@dataclass(frozen=True, slots=True)
class Change:
    """A solution: what is added to weights, and what the hidden state is then multiplied by."""

    weights_ID: Tensor
    gain: float = 1.0


class GapSums:
    """Sums over tokens that a change depends on."""

    def __init__(
        self,
        columns: int,
        width: int,
        device: torch.device,
        *,
        weighted: bool,
        gain: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        """No tokens yet.

        Args:
            weighted: each token counts relative to its own mean square in H.
            gain: whether a factor for the whole hidden state is one of the unknowns.
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
        self.stretch_ID = torch.zeros_like(self.cross_ID) if gain else None
        """XᵀZ"""
        self.existing_D = torch.zeros(width, dtype=torch.float64, device=device)
        """‖Z‖² of each column"""
        self.overlap_D = torch.zeros(width, dtype=torch.float64, device=device)
        """<Z, R> of each column"""

    def add(
        self, x_NI: Tensor, after_ND: Tensor, wanted_ND: Tensor, state_ND: Tensor | None = None
    ) -> None:
        """Take in more tokens.

        Args:
            x_NI: X.
            after_ND: what there is, usually the hidden state.
            wanted_ND: what there should be.
            state_ND: the hidden state that tokens count relative to; default: `wanted_ND`.
        """
        state_ND = wanted_ND if state_ND is None else state_ND
        x_NI, after_ND, wanted_ND, state_ND = (
            given.to(self.products_II.device, self.dtype)
            for given in (x_NI, after_ND, wanted_ND, state_ND)
        )
        if self.weighted and len(wanted_ND):
            floor = torch.finfo(torch.float32).tiny
            scale_N1 = state_ND.square().mean(1, keepdim=True).clamp_min(floor).rsqrt()
            x_NI, after_ND, wanted_ND = (given * scale_N1 for given in (x_NI, after_ND, wanted_ND))
        missing_ND = wanted_ND - after_ND
        _add_product(self.products_II, x_NI, x_NI)
        _add_product(self.cross_ID, x_NI, missing_ND)
        self.missing_D += missing_ND.square().sum(0)
        self.wanted += wanted_ND.square().sum().item()
        if self.stretch_ID is not None:
            _add_product(self.stretch_ID, x_NI, after_ND)
            self.existing_D += after_ND.square().sum(0)
            self.overlap_D += (after_ND * missing_ND).sum(0)

    def take(self, other: GapSums) -> None:
        """Add the sums over other tokens; in place, as the matrices may be large."""
        self.products_II += other.products_II
        self.cross_ID += other.cross_ID
        self.missing_D += other.missing_D
        self.wanted += other.wanted
        if self.stretch_ID is not None and other.stretch_ID is not None:
            self.stretch_ID += other.stretch_ID
        self.existing_D += other.existing_D
        self.overlap_D += other.overlap_D

    def add_up(self, ranks: Ranks) -> None:
        """Add the sums of all processes."""
        wanted = torch.tensor(self.wanted, dtype=torch.float64)
        sums = [self.products_II, self.cross_ID, self.missing_D, wanted]
        if self.stretch_ID is not None:
            sums += [self.stretch_ID, self.existing_D, self.overlap_D]
        ranks.add_up(sums)
        self.wanted = wanted.item()

    def rows(self, chosen: slice) -> GapSums:
        """The sums for some columns of X, as views."""
        found = copy.copy(self)
        found.products_II = self.products_II[chosen, chosen]
        found.cross_ID = self.cross_ID[chosen]
        if self.stretch_ID is not None:
            found.stretch_ID = self.stretch_ID[chosen]
        return found

    def columns(self, chosen: slice) -> GapSums:
        """The sums for some columns of R, as views; `wanted` stays that of all."""
        found = copy.copy(self)
        found.cross_ID, found.missing_D = self.cross_ID[:, chosen], self.missing_D[chosen]
        if self.stretch_ID is not None:
            found.stretch_ID = self.stretch_ID[:, chosen]
            found.existing_D, found.overlap_D = self.existing_D[chosen], self.overlap_D[chosen]
        return found

    @property
    def missing(self) -> float:
        """‖R‖²"""
        return self.missing_D.sum().item()

    @property
    def existing(self) -> float:
        """‖Z‖²"""
        return self.existing_D.sum().item()

    @property
    def overlap(self) -> float:
        """<Z, R>"""
        return self.overlap_D.sum().item()

    def error(self, change: Change) -> float:
        """‖α X C + a Z - R‖²"""
        weights_ID, gain, a = change.weights_ID, change.gain, change.gain - 1.0
        linear = gain * _dot(weights_ID, self.cross_ID) + a * self.overlap
        square = gain**2 * _dot(weights_ID, self.products_II @ weights_ID) + a**2 * self.existing
        if self.stretch_ID is not None:
            square += 2 * a * gain * _dot(weights_ID, self.stretch_ID)
        return self.missing - 2 * linear + square

    def relative(self, error: float) -> float:
        """A squared error relative to ‖H‖²."""
        return error / self.wanted if self.wanted else 0.0


def penalty(sums: GapSums, ridge: float) -> float:
    """λ of a ridge: that many times the mean eigenvalue of XᵀX."""
    return ridge * sums.products_II.diagonal().sum().item() / max(len(sums.products_II), 1)


def solve(sums: GapSums, ridge: float, *, diagonal: bool = False) -> Change:
    """The change, float64 `[I, D]`; zero if `X` is zero. With `diagonal`, a diagonal matrix."""
    held = penalty(sums, ridge)
    factor_II = None if not held or diagonal else _cholesky(sums.products_II, held)

    def inverse(cross_ID: Tensor) -> Tensor:
        """(XᵀX + λI)⁻¹ of it."""
        if not held:
            return torch.zeros_like(cross_ID)
        if factor_II is None:
            return torch.diag(cross_ID.diagonal() / (sums.products_II.diagonal() + held))
        half_ID: Tensor = torch.linalg.solve_triangular(factor_II, cross_ID, upper=False)
        solved_ID: Tensor = torch.linalg.solve_triangular(factor_II.mT, half_ID, upper=True)
        return solved_ID

    change_ID = inverse(sums.cross_ID)
    if sums.stretch_ID is None:
        return Change(change_ID)
    of_gain_ID = inverse(sums.stretch_ID)
    unexplained = sums.existing - _dot(sums.stretch_ID, of_gain_ID)
    if not unexplained > 1e-12 * sums.existing:  # X can also do what the gain does
        return Change(change_ID)
    a = (sums.overlap - _dot(sums.stretch_ID, change_ID)) / unexplained
    if not LEAST_GAIN <= 1.0 + a <= 1.0 / LEAST_GAIN:
        return Change(change_ID)
    return Change(change_ID.sub_(of_gain_ID, alpha=a).div_(1.0 + a), 1.0 + a)


def _cholesky(matrix_II: Tensor, diagonal: float) -> Tensor:
    """The lower Cholesky factor of a symmetric matrix plus a number on its diagonal.

    It is solved in place, and by column, so that no other matrix of this size is in memory.
    """
    factor_II = matrix_II.clone().mT
    factor_II.diagonal().add_(diagonal)
    torch.linalg.cholesky(factor_II, out=factor_II)
    return factor_II


def _add_product(total: Tensor, one_NI: Tensor, other_NJ: Tensor) -> None:
    """Add XᵀY; with no other matrix of this size in memory where the types are the same."""
    if one_NI.dtype == total.dtype:
        total.addmm_(one_NI.T, other_NJ)
    else:
        total += one_NI.T @ other_NJ


def _dot(one: Tensor, other: Tensor) -> float:
    """The sum of the products of all elements, with no third matrix in memory."""
    return torch.einsum("ij,ij->", one, other).item()


def effective_rank(sums: GapSums, ridge: float, *, diagonal: bool = False) -> float:
    """In how many directions of `X` it is free: sum of e / (e + λ) over eigenvalues of XᵀX."""
    held, products_II = penalty(sums, ridge), sums.products_II
    values_I = products_II.diagonal() if diagonal else torch.linalg.eigvalsh(products_II)
    values_I = values_I.clamp_min(0.0)
    return float((values_I / (values_I + held)).sum().item()) if held else 0.0


def choose_ridge(
    fitted: GapSums, held_out: GapSums, given: float | None = None, *, diagonal: bool = False
) -> tuple[float | None, float]:
    """The ridge whose change, solved on some tokens, leaves the least squared error on others; and
    that error. Where none is given, no change at all is also a choice.

    Wide models choose by a part of the columns of R, evenly spread, as one ridge is for all of
    them; the error is then that of this part relative to what is missing there.
    """
    few = slice(None, None, 1 if diagonal else max(fitted.cross_ID.shape[1] // COLUMNS, 1))
    some, others = fitted.columns(few), held_out.columns(few)
    ridges = (given,) if given else RIDGES
    left, best = min(
        (others.error(solve(some, ridge, diagonal=diagonal)), ridge) for ridge in ridges
    )
    if others.missing:
        left *= held_out.missing / others.missing
    if given or left < held_out.missing:
        return best, left
    return None, held_out.missing


def fitted_gaps(task: Task) -> list[Gap]:
    """The gaps, and one of no blocks behind each of the blocks that are refitted too."""
    gaps = gaps_of(task.removed)
    behind = {
        b
        for gap in gaps
        if gap.before is not None
        for b in range(gap.stop, min(gap.stop + task.options.behind, task.decoder.block_count))
    }
    behind -= {*task.removed, *(gap.before for gap in gaps), *further_before(task)}
    return sorted([*gaps, *(Gap(b + 1, b + 1) for b in behind)], key=lambda gap: gap.stop)


def further_before(task: Task) -> list[int]:
    """The blocks further before the gaps that may be refitted too, back to the gap before."""
    found: list[int] = []
    stop = 0
    several = "before" in METHODS.get(task.options.method).options
    for gap in gaps_of(task.removed) if several else ():
        found += range(max(stop, gap.start - task.options.before), gap.start - 1)
        stop = gap.stop
    return found


def refitted_with(
    task: Task, b: int, found: Mapping[int, Sequence[Added]], fit: Stage
) -> list[Added]:
    """The projections further before a gap that are solved together with those of `fit`, of block
    `b` before it."""
    modules: list[Added] = []
    columns = sum(_inputs(task, one) for one in fit.modules) if fit.refits else math.inf
    allowed = further_before(task)
    while b - 1 in allowed:
        b -= 1
        added = found[b][-1]
        if added.norm or added.experts or columns + _inputs(task, added) > MOST_COLUMNS:
            break
        columns += _inputs(task, added)
        modules.insert(0, added)
    return modules


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
    decoder, gaps = task.decoder, fitted_gaps(task)
    before = [gap.before for gap in gaps if gap.before is not None]
    found = find_foldable(task.checkpoint, decoder, sorted({*before, *further_before(task)}))
    fits = {b: stages(found[b], task.options) for b in before}
    earlier = {b: refitted_with(task, b, found, fits[b][0]) for b in before}
    changed = {*before, *(one.block for modules in earlier.values() for one in modules)}
    scalable = scalable_behind(task, before)
    walk = _Walk(task, gain=scalable is not None)
    folds: dict[int, Fold] = {}
    gains: dict[int, float] = {}
    records = [HealedGap(block=None, removed=gap.blocks) for gap in gaps if gap.before is None]
    steps = steps_of(gaps)
    order = decoder.through([b for b, _ in steps])
    with progress("healing", len(steps)) as advance:
        for (b, gap), _ in zip(steps, order, strict=True):
            if gap is None:
                walk.through(b, source=True, healed=b not in task.removed and b not in changed)
            else:
                path = [*(one.block for one in earlier[b]), b]
                with decoder.holding(path[:-1]):
                    record, new = _heal_gap(task, walk, gap, path, earlier[b], fits[b])
                    with folded_into(decoder, new, {b: record.gain}):
                        for one in path:
                            walk.through(one, source=False, healed=True)
                records.append(record)
                folds |= new
                if record.gain != 1.0:
                    gains[b] = record.gain
            advance(1)
    written = {b: Scalable(found[b]) for b in folds} | (scalable or {})
    return Healed(gaps=records, folds=folds, gains=gains, scalable=written)


def scalable_behind(task: Task, before: Sequence[int]) -> dict[int, Scalable] | None:
    """How to scale the blocks behind the first gap that is healed; None if that is not wanted, or
    not possible."""
    if task.options.method == "linear" or not task.options.gain:
        return None
    kept = set(range(task.decoder.block_count)) - set(task.removed)
    behind = [b for b in kept if b > min(before, default=b)]
    scalable = find_scalable(task.checkpoint, task.decoder, behind)
    if scalable is None:
        log.info("the hidden state behind gaps gets no factor: it would change what blocks compute")
    return scalable


def _heal_gap(
    task: Task,
    walk: _Walk,
    gap: Gap,
    path: Sequence[int],
    earlier: Sequence[Added],
    fits: Sequence[Stage],
) -> tuple[HealedGap, dict[int, Fold]]:
    """New weights for the block before a gap, stage by stage, and for projections further before
    it; and what the record says of them.

    A module that is changed before the last one can also do harm, as those behind it then get
    another input. So the last one is solved alone too, and the better of both is taken; and where
    changes further before the gap end with a larger error than there is without, they are left out.

    Args:
        path: the blocks from where the healed hidden state is to the one before the gap.
        earlier: projections further before it.
    """
    *_, b = path
    folds, before, without = _earlier(task, walk, path, earlier, fits[0])
    with folded_into(task.decoder, folds):
        solutions = _solutions(task, walk, gap, path, fits)
        if fits[-1].modules[-1].name not in [one.name for one in fits[0].modules]:
            solutions = _solutions(task, walk, gap, path, fits[-1:]) + solutions
    # of equals the one that changes more modules
    left, record, weights = min(reversed(solutions), key=lambda one: one[0])
    if folds and left > without:
        log.info("blocks %s are left as they are: their changes do harm", sorted(folds))
        return _heal_gap(task, walk, gap, path, [], fits)
    if folds:
        record = record.model_copy(update={"earlier": sorted(folds), "error_before": before})
    return record, folds | ({b: weights} if weights else {})


def _earlier(
    task: Task, walk: _Walk, path: Sequence[int], earlier: Sequence[Added], behind: Stage
) -> tuple[dict[int, Fold], float, float]:
    """New weights for projections further before a gap, one after the other; and on held-out
    samples the relative error before any change, and what would be left without these.

    Each is solved together with all that are changed behind it, and then changed alone.
    """
    folds: dict[int, Fold] = {}
    before, without = math.inf, math.inf
    for place, added in enumerate(earlier):
        fit = Stage(behind.unknowns, [*earlier[place:], *behind.modules])
        with folded_into(task.decoder, folds):
            fitted, held_out, sizes = walk.measure(path, fit)
        if not place:
            before = held_out.relative(held_out.missing)
            own = slice(sum(sizes[: len(earlier)]), None)
            _, without = choose_ridge(fitted.rows(own), held_out.rows(own), task.options.ridge)
        ridge, _ = choose_ridge(fitted, held_out, task.options.ridge)
        fitted.take(held_out)
        del held_out
        if ridge is not None:
            change_ID = solve(fitted, ridge).weights_ID[: sizes[0]]
            folds[added.block] = refit(task.checkpoint, added.block, added, change_ID)
    return folds, before, without


def _inputs(task: Task, added: Added) -> int:
    """How many inputs a projection has."""
    name = stored_name(task.checkpoint, added.block, f"{added.name}.weight")
    return task.checkpoint.tensors[name].shape[0 if added.transposed else -1]


def _solutions(
    task: Task, walk: _Walk, gap: Gap, path: Sequence[int], fits: Sequence[Stage]
) -> list[tuple[float, HealedGap, Fold]]:
    """What the stages end with, and where the first of them solves the last module too, what that
    does alone: the error that is left on held-out samples, the record, and the new weights."""
    *_, b = path
    changed = Fold()
    before: float | None = None
    solutions: list[tuple[float, HealedGap, Fold]] = []
    for fit in fits:
        with folded_into(task.decoder, {b: changed}):
            fitted, held_out, sizes = walk.measure(path, fit)
        parts = [(fit.modules[0], slice(None))]
        if len(fit.modules) > 1:
            parts.append((fit.modules[-1], slice(sum(sizes[:-1]), None)))
        ridges = [
            choose_ridge(
                fitted.rows(part), held_out.rows(part), task.options.ridge,
                diagonal=fit.unknowns.diagonal,
            )
            for _, part in parts
        ]  # fmt: skip
        if before is None and not fit.unknowns.behind_norm:
            before = held_out.relative(held_out.missing)
        errors = [held_out.relative(left) for _, left in ridges]
        fitted.take(held_out)
        del held_out  # a matrix less in memory
        folds = []
        for (added, part), (ridge, left), error in zip(parts, ridges, errors, strict=True):
            sums = fitted.rows(part)
            columns = sizes[fit.modules.index(added)]
            fold, record = _solved(task, b, fit, added, sums, ridge, columns)
            folds.append(fold)
            if added is fits[-1].modules[-1] and fit.unknowns is fits[-1].unknowns:
                weights = fold if part.start else changed | fold
                names = (n.removesuffix(".weight") for n in weights if not n.endswith(".bias"))
                update = {
                    "removed": gap.blocks, "changed": list(names), "error_before": before,
                    "error_after": error,
                }  # fmt: skip
                solutions.append((left, record.model_copy(update=update), weights))
        changed |= folds[0]
    return solutions


def _solved(
    task: Task, b: int, fit: Stage, added: Added, sums: GapSums, ridge: float | None, columns: int
) -> tuple[Fold, HealedGap]:
    """The new weights of one module, whose columns are the first of X, and how they were solved."""
    fold, record = Fold(), HealedGap(block=b, removed=[], scale=added.scale)
    if ridge is None:
        return fold, record
    diagonal = fit.unknowns.diagonal
    change = solve(sums, ridge, diagonal=diagonal)
    fold = fit.unknowns.fold(task.checkpoint, b, added, change.weights_ID[:columns])
    solved: dict[str, Any] = {"gain": change.gain}
    if len(sums.products_II):  # else only the gain is unknown
        solved |= {
            "ridge": ridge,
            "penalty": penalty(sums, ridge),
            "effective_rank": effective_rank(sums, ridge, diagonal=diagonal),
        }
    return fold, record.model_copy(update=solved)


class _Walk:
    """Both hidden states `[B, T, D]` on their way through the blocks of the source."""

    def __init__(self, task: Task, *, gain: bool) -> None:
        self._decoder = task.decoder
        self._gain = gain
        self._ranks = task.ranks
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

    def measure(self, path: Sequence[int], fit: Stage) -> tuple[GapSums, GapSums, list[int]]:
        """The sums of a fit behind the blocks of `path`, over the samples to solve with and the
        held-out ones, and how many columns of X each module has. Both hidden states stay where they
        are."""
        decoder = self._decoder
        assert self._healed is not None
        sums: list[GapSums] = []
        sizes: list[int] = []
        for group, rows in enumerate(self._groups.rows):
            after_BTD = self._healed[rows].to(decoder.device)
            seen: dict[int, Seen] = {}
            for b in path:
                with watching(decoder.blocks[b], fit.watched(b)) as seen[b]:
                    call = self._groups.entries[group].calls[b]
                    after_BTD = decoder.apply(b, after_BTD, call)
            wanted_BTD = self._source[rows].to(decoder.device)
            sizes = [fit.unknowns.columns(one, seen[one.block]).shape[-1] for one in fit.modules]
            equations = fit.unknowns.equations(fit.modules, seen, after_BTD, wanted_BTD)
            if not sums:
                shape = (equations[0].shape[-1], after_BTD.shape[-1])
                gain = self._gain and not fit.unknowns.behind_norm
                sums = [
                    GapSums(*shape, decoder.device, weighted=self._weighted, gain=gain)
                    for _ in range(2)
                ]
            border = min(max(self._fitted - rows.start, 0), len(after_BTD))
            for part, one in zip((slice(border), slice(border, None)), sums, strict=True):
                one.add(*(given[part].flatten(0, 1) for given in (*equations, wanted_BTD)))
        for one in sums:
            one.add_up(self._ranks)
        return sums[0], sums[1], sizes
