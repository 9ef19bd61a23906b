"""The set of blocks without which the hidden states stay nearest, by a dynamic programme.

g(i, n) is a state after the first i units of which n are skipped: the nearer one, to the state of
the intact model there, of

    g(i-1, n-1)       unit i is skipped
    f_i(g(i-1, n))    it is not

Nearness is the cosine, mean over the tokens of all samples. One state is kept for each n, so the
set that leads to g(L, k) need not be the nearest of all. The states of all n go through each block
before the next: about k+1 forward passes, and 2(k+1) hidden states of all samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from shortllm.criteria import PLACE, Scores, SearchMethod, criterion
from shortllm.criteria.search import Found, SearchSpace, Unit, scores_of_one
from shortllm.model.metrics import cosine
from shortllm.papers import CLASP

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.model.hidden_states import SampleGroups
    from shortllm.progress import Advance
    from shortllm.runtime import Ranks


def keep_near(space: SearchSpace, found: Found, options: Mapping[str, Any]) -> None:
    """Take the set that the programme finds, and measure it."""
    count = len(found.removed) // len(space.units[0])
    found.removed = space.choose(partial(skip_nearest, space.units, count))
    [found.value] = space.measure([found.removed])


def skip_nearest(
    units: Sequence[Unit], count: int, groups: SampleGroups, ranks: Ranks, advance: Advance
) -> list[int]:
    """The blocks of the `count` units that the programme skips; of equals the later ones."""
    from shortllm.model.hidden_states import block_flops

    decoder, left = groups.decoder, len(units)
    unit_of = {b: unit for unit in units for b in unit}
    streams_SBTD = groups.allocate(2 * count + 2)
    groups.entering(streams_SBTD[0])
    states = {0: 0}  # n -> the place of g(i, n) among the streams; n = 0 is the intact model
    applied: dict[int, int] = {}
    choices: list[tuple[Unit, set[int]]] = []
    for b in decoder.through(range(decoder.block_count)):
        unit, free = unit_of.get(b, (b,)), b in unit_of
        if b == unit[0]:
            left -= free
            places = iter(set(range(len(streams_SBTD))).difference(states.values()))
            applied = {n: next(places) for n in states if _is_of_use(n, count, left)}
            for n, place in applied.items():
                streams_SBTD[place] = streams_SBTD[states[n]]
        for place in applied.values():
            groups.apply(b, streams_SBTD[place])
            advance(block_flops(decoder, b) * groups.ids_BT.numel())
        if b == unit[-1]:
            skipping = {n + 1: place for n, place in states.items() if free}
            skipping = {n: skipping[n] for n in skipping if _is_of_use(n, count, left)}
            pairs = {n: (skipping[n], applied[n]) for n in sorted(skipping.keys() & applied.keys())}
            nearness = _nearness(groups, streams_SBTD, pairs, applied[0], ranks)
            states = {**applied, **skipping}
            states |= {n: applied[n] for n, (skip, apply) in nearness.items() if apply > skip}
            choices.append((unit, {n for n in skipping if states[n] == skipping[n]}))
    removed: list[int] = []
    n = count
    for unit, skips in reversed(choices):
        if n in skips:
            removed += unit
            n -= 1
    return removed


def _is_of_use(n: int, count: int, left: int) -> bool:
    """Whether `count` can still be reached from `n` units with `left` more; the intact model is
    always of use."""
    return n == 0 or n <= count <= n + left


def _nearness(
    groups: SampleGroups,
    streams_SBTD: Tensor,
    pairs: Mapping[int, tuple[int, int]],
    intact: int,
    ranks: Ranks,
) -> dict[int, list[float]]:
    """Of each pair of streams the sums of their cosines with the intact one, over all tokens that
    count, of all processes."""
    import torch

    if not pairs:
        return {}
    sums_P2 = torch.zeros(len(pairs), 2, dtype=torch.float64)
    device = groups.decoder.device
    for rows in groups.rows:
        intact_BTD = streams_SBTD[intact, rows].to(device).flatten(2)
        for p, pair in enumerate(pairs.values()):
            for side, place in enumerate(pair):
                state_BTD = streams_SBTD[place, rows].to(device).flatten(2)
                cosine_BT = cosine(state_BTD, intact_BTD).double()
                if groups.counted_BT is not None:
                    cosine_BT = cosine_BT.where(groups.counted_BT[rows].to(device), 0.0)
                sums_P2[p, side] += cosine_BT.sum().item()
    ranks.add_up([sums_P2])
    return dict(zip(pairs, sums_P2.nan_to_num(nan=-math.inf).tolist(), strict=True))


@criterion(
    "dp",
    needs="sets",
    label=PLACE,
    paper=CLASP,
    # of each number of blocks a state that goes through the model, then the result
    search=SearchMethod(keep_near, lambda options, removed, kept: removed + 2.0),
)
def keep_hidden_states_near(
    space: SearchSpace,
    *,
    start: str = "influence",
    held_out: float = 0.2,
    remove: int | None = None,
    protect_first: int | None = None,
    protect_last: int | None = None,
    period_aligned: bool = False,
) -> Scores:
    """The set whose skipping keeps hidden states nearest to the intact ones, block after block.

    CLaSp skips blocks for the token being generated; here one set is found for all samples.

    Args:
        start: criterion whose scores order the blocks within the set.
    """
    return scores_of_one(space, "dp", start, keep_near)
