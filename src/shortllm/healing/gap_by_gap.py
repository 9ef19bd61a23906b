"""Healing of the gaps in their order, each by the least-squares fit of `least_squares.py`.

The hidden states of two models go through the blocks:

    source    0 ─► 1 ─► 2 ─► 3 ─► 4 ─► 5 ─► 6        what the hidden state should be
                             │ wanted     │
    healed    0 ─► 1′───────────► 4 ─► 5′─────►      blocks 2, 3 and 6 removed

The source goes first through the block before a gap and the gap itself. Then the sums compare the
healed hidden state with where the source arrived, the change is solved and folded (1′), and the
healed hidden state goes through the block as it will be stored. So later changes compensate for
what is left of earlier errors too. Blocks that are read one at a time are read twice before a gap.

Blocks further before a gap (`HealOptions.before`) are solved together with the one before it: the
healed hidden state waits in front of the first of them.

Shapes: B samples, T tokens, D width, I columns of X.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shortllm.healing.folding import Added, Fold, find_foldable, folded_into, refit, watching
from shortllm.healing.gain import Scalable, find_scalable
from shortllm.healing.least_squares import (
    GapSums,
    GapTokens,
    choose_ridge,
    effective_rank,
    penalty,
    solve,
)
from shortllm.healing.methods import METHODS, Healed, Task
from shortllm.healing.options import HealedGap
from shortllm.healing.unknowns import Seen, Stage, stages
from shortllm.model.hidden_states import SampleGroups
from shortllm.progress import Advance, progress
from shortllm.pruning.budget import Gap, gaps_of
from shortllm.surgery.derived import stored_name

log = logging.getLogger(__name__)

MOST_COLUMNS = 8192
"""Columns of X that are solved together: above, blocks further before a gap are left out."""

SUMS = 4
"""About how many calls of a block take as long as the sums and solutions of one projection; those
of several together take that many times their square."""


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
    folds: dict[int, Fold] = {}
    gains: dict[int, float] = {}
    records = [HealedGap(block=None, removed=gap.blocks) for gap in gaps if gap.before is None]
    steps = steps_of(gaps)
    order = decoder.through([b for b, _ in steps])
    costs = [1.0 if gap is None else _cost_of_gap(earlier[b], fits[b]) for b, gap in steps]
    with progress("healing", sum(costs)) as advance:
        walk = _Walk(task, gain=scalable is not None, advance=advance)
        for (b, gap), _ in zip(steps, order, strict=True):
            if gap is None:
                walk.through(b, source=True, healed=b not in task.removed and b not in changed)
                advance(1.0)
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


def _together(earlier: Sequence[Added], behind: Stage) -> list[Stage]:
    """The fits of the projections further before a gap: each with all that are changed behind it,
    and changed alone."""
    places = range(len(earlier))
    return [Stage(behind.unknowns, [*earlier[place:], *behind.modules]) for place in places]


def _solved_twice(fits: Sequence[Stage]) -> bool:
    """Whether the last module is solved alone too."""
    return fits[-1].modules[-1].name not in [one.name for one in fits[0].modules]


def _cost_of_gap(earlier: Sequence[Added], fits: Sequence[Stage]) -> float:
    """About how long a gap takes, in calls of a block with all samples."""
    alone = fits[-1:] if _solved_twice(fits) else []
    return sum(
        _cost(len(earlier) + 1, fit) for fit in (*_together(earlier, fits[0]), *fits, *alone)
    )


def _cost(blocks: int, fit: Stage) -> float:
    """About how long a fit behind a path of blocks takes, in calls of a block with all samples."""
    return float(blocks + SUMS * len(fit.modules) ** 2)


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
        if _solved_twice(fits):
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
    samples the relative error before any change, and what would be left without these."""
    folds: dict[int, Fold] = {}
    before, without = math.inf, math.inf
    for place, (added, fit) in enumerate(zip(earlier, _together(earlier, behind), strict=True)):
        with folded_into(task.decoder, folds):
            fitted, held_out, sizes = walk.measure(path, fit)
        if not place:
            before = held_out.relative(held_out.missing)
            own = slice(sum(sizes[: len(earlier)]), None)
            _, without = choose_ridge(fitted.rows(own), held_out.rows(own), task.options.ridge)
        ridge, _ = choose_ridge(fitted, held_out, task.options.ridge)
        held_out.add_to(fitted)
        del held_out
        if ridge is not None:
            change_ID = solve(fitted, ridge, overwrite=True).weights_ID[: sizes[0]]
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
        held_out.add_to(fitted)
        del held_out  # a matrix less in memory
        solved = list(zip(parts, ridges, errors, strict=True))
        for (added, part), (ridge, left), error in reversed(solved):  # all inputs last
            sums = fitted.rows(part)
            columns = sizes[fit.modules.index(added)]
            fold, record = _solved(task, b, fit, added, sums, ridge, columns)
            if added is fits[-1].modules[-1] and fit.unknowns is fits[-1].unknowns:
                weights = fold if part.start else changed | fold
                names = (n.removesuffix(".weight") for n in weights if not n.endswith(".bias"))
                update = {
                    "removed": gap.blocks, "changed": list(names), "error_before": before,
                    "error_after": error,
                }  # fmt: skip
                solutions.append((left, record.model_copy(update=update), weights))
        changed |= fold
        del fitted, sums
    return solutions


def _solved(
    task: Task, b: int, fit: Stage, added: Added, sums: GapSums, ridge: float | None, columns: int
) -> tuple[Fold, HealedGap]:
    """The new weights of one module, whose columns are the first of X, and how they were solved.

    Sums over the inputs of all modules are overwritten.
    """
    fold, record = Fold(), HealedGap(block=b, removed=[], scale=added.scale)
    if ridge is None:
        return fold, record
    diagonal, solved = fit.unknowns.diagonal, dict[str, Any]()
    if len(sums.products_II):  # else only the gain is unknown
        solved = {
            "ridge": ridge,
            "penalty": penalty(sums, ridge),
            "effective_rank": effective_rank(sums, ridge, diagonal=diagonal),
        }
    change = solve(sums, ridge, diagonal=diagonal, overwrite=added is fit.modules[0])
    fold = fit.unknowns.fold(task.checkpoint, b, added, change.weights_ID[:columns])
    return fold, record.model_copy(update={**solved, "gain": change.gain})


class _Walk:
    """Both hidden states `[B, T, D]` on their way through the blocks of the source."""

    def __init__(self, task: Task, *, gain: bool, advance: Advance) -> None:
        self._decoder = task.decoder
        self._gain = gain
        self._advance = advance
        # numbers of a few bits lose nothing by products in float32
        exact = torch.finfo(task.decoder.dtype).bits >= 32
        self._dtype = torch.float64 if exact else torch.float32
        self._ranks = task.ranks
        self._weighted = task.options.weighting == "norm"
        self._fitted = len(task.ids_BT) - task.held_out
        self._held_out = task.held_out * task.ids_BT.shape[1]
        """Tokens of the samples that choose the ridge."""
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
                few = self._ranks.count == 1 and self._held_out < shape[0]
                sums = [
                    kind(
                        *shape, decoder.device, weighted=self._weighted, gain=gain,
                        dtype=self._dtype,
                    )
                    for kind in (GapSums, GapTokens if few else GapSums)
                ]  # fmt: skip
            border = min(max(self._fitted - rows.start, 0), len(after_BTD))
            for part, one in zip((slice(border), slice(border, None)), sums, strict=True):
                one.add(*(given[part].flatten(0, 1) for given in (*equations, wanted_BTD)))
            self._advance(_cost(len(path), fit) / len(self._groups.rows))
        for one in sums:
            one.add_up(self._ranks)
        return sums[0], sums[1], sizes
