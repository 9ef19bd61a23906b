"""What is changed in the block before a gap, and the equations that its new weights should meet.

The block adds `M` to the hidden state, which then is `Z` but should be `H`: `R = H - Z` is missing.
`M` is the output of a projection `M = A W`, of a norm behind one, `M = g ⊙ norm(A W)`, or the sum
of experts.

    map         M (I + C)             projection: any map of what it returns, folded into it
    weights     A (W + C)             projection: all its weights
    gains       M ⊙ (1 + c)           norm: one factor per channel, folded into its gains
    scales      M ⊙ (1 + c)           experts: one factor per channel, folded into all of them
    direction   g ⊙ norm(A (W + C))   norm: the weights of the projection in front of it
    nothing     M                     only the factor of the hidden state behind the gap

The first four are linear in the change. The norm behind `direction` gives every token the same
size, so the projection is fitted to what the norm should return, `(M + R) / g`, at the size that
the token has now; gains are solved after it.

Each is one stage of `stages`; `gap_by_gap.py` solves them one after the other.

Shapes: B samples, T tokens, I inputs of a projection, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shortllm.checkpoint.source import Checkpoint
from shortllm.healing.folding import Added, Fold, fold, refit, regain, rescale
from shortllm.healing.options import HealOptions

Seen = Mapping[str, tuple[Tensor, Tensor]]
"""What each watched module of a block was called with, and what it returned, `[..., columns]`."""

Equations = tuple[Tensor, Tensor, Tensor]
"""X, what is there and what should be there, `[B, T, columns]`: X C should be their difference."""


@dataclass(frozen=True, slots=True)
class Unknowns:
    """One kind of change."""

    columns: Callable[[Added, Seen], Tensor]
    """X of one module."""
    fold: Callable[[Checkpoint, int, Added, Tensor], Fold]
    """The new weights, from the change."""
    diagonal: bool = False
    """Whether the change is one number per channel."""
    behind_norm: bool = False
    """Whether X C is what goes into a norm, not what is added to the hidden state."""

    def equations(
        self,
        modules: Sequence[Added],
        seen: Mapping[int, Seen],
        after_BTD: Tensor,
        wanted_BTD: Tensor,
    ) -> Equations:
        """The equations of the modules together; `seen` by block."""
        size = after_BTD.shape[:2]
        parts = [self.columns(one, seen[one.block]).view(*size, -1) for one in modules]
        x_BTI = torch.cat(parts, dim=-1)
        if not self.behind_norm:
            return x_BTI, after_BTD, wanted_BTD
        added = modules[0]
        return _before_the_norm(added, seen[added.block], x_BTI, after_BTD, wanted_BTD)


MAP = Unknowns(lambda added, seen: added.scale * seen[added.name][1], fold)
WEIGHTS = Unknowns(lambda added, seen: added.scale * seen[added.name][0], refit)
GAINS = Unknowns(lambda added, seen: added.scale * seen[added.name][1], regain, diagonal=True)
SCALES = Unknowns(lambda added, seen: added.scale * seen[added.name][1], rescale, diagonal=True)
NOTHING = Unknowns(lambda added, seen: seen[added.name][1][..., :0], lambda *of: Fold())
DIRECTION = Unknowns(
    lambda added, seen: seen[added.projection.name][0],
    lambda checkpoint, b, added, change: refit(checkpoint, b, added.projection, change),
    behind_norm=True,
)


@dataclass(frozen=True, slots=True)
class Stage:
    """One fit. The modules are solved together, and the first of them gets its new weights."""

    unknowns: Unknowns
    modules: list[Added]

    def watched(self, b: int) -> list[str]:
        """The names of the modules that it reads, within block `b`."""
        modules = [one for one in self.modules if one.block == b]
        names = [one.name for one in modules]
        return names + [one.source.name for one in modules if one.source is not None]

    @property
    def refits(self) -> bool:
        """Whether all weights of projections are unknowns."""
        return self.unknowns is WEIGHTS


def stages(found: Sequence[Added], options: HealOptions) -> list[Stage]:
    """The fits of one block, in order, from the modules whose output is added to the hidden state.

    The last one changes the last module, and needs no other one. Experts get factors only where
    no projection is added next to them.
    """
    last = found[-1]
    if options.method == "gain":
        return [Stage(NOTHING, [last])]
    if last.norm:
        first = [Stage(DIRECTION, [last])] if last.source and options.method != "linear" else []
        return [*first, Stage(GAINS, [last])]
    if options.method == "linear":
        return [Stage(SCALES if last.experts else MAP, [last])]
    projections = [one for one in found if not one.experts]
    places = range(len(projections)) if options.attention else range(len(projections))[-1:]
    weights = [Stage(WEIGHTS, projections[place:]) for place in places]
    if last.experts:
        return [*(weights if options.attention else []), Stage(SCALES, [last])]
    return weights


def _before_the_norm(
    added: Added, seen: Seen, x_BTI: Tensor, after_BTD: Tensor, wanted_BTD: Tensor
) -> Equations:
    """The equations of the projection in front of a norm.

    Where a gain is zero, the channel stays as it is. A token counts by the size of what the norm
    should return, relative to what it returns now.
    """
    before_BTD = seen[added.projection.name][1].double().view(after_BTD.shape)
    returned_BTD = seen[added.name][1].double().view(after_BTD.shape)
    gains_D = added.gains().to(before_BTD.device)
    size_BT1 = _size(before_BTD)
    goal_BTD = before_BTD / size_BT1
    missing_BTD = (wanted_BTD.double() - after_BTD.double()) / added.scale
    free_D = gains_D.abs() > 1e-6 * gains_D.abs().max()
    goal_BTD[..., free_D] = (returned_BTD + missing_BTD)[..., free_D] / gains_D[free_D]
    wanted_size_BT1 = _size(goal_BTD)
    counts_BT1 = wanted_size_BT1 / size_BT1
    there, should_be = before_BTD * counts_BT1, goal_BTD * size_BT1 / wanted_size_BT1 * counts_BT1
    return x_BTI * counts_BT1, there, should_be


def _size(states_BTD: Tensor) -> Tensor:
    """Root mean square of each token."""
    floor = torch.finfo(torch.float32).tiny
    return states_BTD.square().mean(-1, keepdim=True).clamp_min(floor).sqrt()
