"""Criteria that watch a pass: what they see of the stream at each block, turned into scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from shortllm import criteria
from shortllm.asked import Asked
from shortllm.criteria import Scores
from shortllm.runtime import Ranks

if TYPE_CHECKING:
    from torch import Tensor

WATCHED: tuple[criteria.Needs, ...] = ("streams", "last token")
"""What is seen when the samples go through the blocks once, in whatever pass."""


class Watch(Protocol):
    """An observer of a pass that turns what it saw into scores."""

    asked: Asked
    state: dict[str, Tensor]

    def __call__(self, b: int, before_BTD: Tensor, after_BTD: Tensor, rows: slice) -> None: ...

    def scores(self, kept: Sequence[int], ranks: Ranks) -> Scores:
        """Scores of the blocks `kept`, from what all processes saw."""


class TokenMeans:
    """The mean over tokens of a number per token, for each block."""

    def __init__(self, asked: Asked, blocks: int) -> None:
        import torch

        self.asked = asked
        self._sums = torch.zeros(blocks, 2, dtype=torch.float64)
        """Sum and count of each block."""
        self.state = {asked.name: self._sums}

    def __call__(self, b: int, before_BTD: Tensor, after_BTD: Tensor, rows: slice) -> None:
        values_BT = self.asked.call(before_BTD.flatten(2), after_BTD.flatten(2))
        self._sums[b, 0] += values_BT.double().sum().item()
        self._sums[b, 1] += values_BT.numel()

    def scores(self, kept: Sequence[int], ranks: Ranks) -> Scores:
        """Means over all tokens of all processes."""
        ranks.add_up([self._sums])
        return plain_scores(
            [total / count if count else 0.0 for total, count in self._sums.tolist()]
        )


class LastTokens:
    """The stream of each sample's last token before and after each block."""

    def __init__(self, asked: Asked, blocks: int, samples: int, width: int) -> None:
        import torch

        self.asked = asked
        self._before = torch.zeros(blocks, samples, width)
        self._after = torch.zeros(samples, width)
        self.state = {f"{asked.name}-before": self._before, f"{asked.name}-after": self._after}

    def __call__(self, b: int, before_BTD: Tensor, after_BTD: Tensor, rows: slice) -> None:
        self._before[b, rows] = before_BTD[:, -1].flatten(1).to(self._before)
        self._after[rows] = after_BTD[:, -1].flatten(1).to(self._after)

    def scores(self, kept: Sequence[int], ranks: Ranks) -> Scores:
        """The criterion's scores of all samples of all processes."""
        import torch

        depths = torch.cat([self._before[list(kept)], self._after[None]])
        found: Scores = self.asked.call(torch.cat(ranks.gather(depths), dim=1))
        blocks = len(self._before)
        if len(kept) == blocks:
            return found
        return plain_scores(spread_out(found.importance, kept, blocks))


def plain_scores(values: list[float]) -> Scores:
    """Scores whose importance is the raw number itself."""
    return Scores(importance=values, values=values)


def spread_out(values: Sequence[float], blocks: Sequence[int], count: int) -> list[float]:
    """Numbers of some blocks as a list with one of every block."""
    spread = [0.0] * count
    for b, value in zip(blocks, values, strict=True):
        spread[b] = value
    return spread
