"""What a draft gains: the steps in which it writes a text, and the time of a step. Pure, no torch.

A draft writes `length` tokens, and the intact model reads them all at once. It accepts them up to
the first that is not its own, and adds one token:

    time    | draft, draft, ..., draft | verify |     length x cost + verifying
    tokens    accepted ... accepted  + one            tokens per step

All times are in units of the time that the intact model takes for one token. With `verifying` 1 and
every token accepted with the same probability, the gain is that of Leviathan et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from shortllm.drafting.options import Accepted, DraftCosts, DraftSize


def expected_steps(accepted: Sequence[float], length: int) -> float:
    """Steps in which a text is written, by the probability that the draft of each of its tokens is
    accepted; with probabilities of 0 and 1, as greedy drafts have them, it is their number."""
    count = len(accepted)
    left = [0.0] * (count + 1)  # steps from each place on
    for place in reversed(range(count)):
        drafted = min(length, count - place - 1)  # the last token is the intact model's
        steps, reached = 1.0, 1.0
        for token in range(place, place + drafted):
            steps += reached * (1 - accepted[token]) * left[token + 1]
            reached *= accepted[token]
        left[place] = steps + reached * left[place + drafted + 1]
    return left[0]


def tokens_per_step(texts: Sequence[Sequence[float]], length: int) -> float:
    """Tokens that a step adds to texts on average, by what is accepted of each."""
    return sum(map(len, texts)) / sum(expected_steps(text, length) for text in texts)


def ideal_tokens(acceptance: float, length: int) -> float:
    """The same if every token is accepted with one probability, `(1 - a^(g+1)) / (1 - a)`.

    Source: Leviathan et al. 2023, arXiv:2211.17192, equation 1.
    """
    return sum(acceptance**place for place in range(length + 1))


def speedup(tokens: float, length: int, cost: float, verifying: float = 1.0) -> float:
    """How many times as fast text is written, by the tokens of a step and the cost of its parts."""
    return tokens / (length * cost + verifying)


def through(points: Mapping[int, Sequence[float]]) -> Callable[[float], float]:
    """The line from mean to mean of what was found at some places, straight on outside of them."""
    means = sorted((place, fmean(found)) for place, found in points.items())

    def height(at: float) -> float:
        if len(means) == 1:
            return means[0][1]
        after = next((n for n, (place, _) in enumerate(means) if place >= at), len(means) - 1)
        (left, low), (right, high) = means[max(after, 1) - 1], means[max(after, 1)]
        return low + (high - low) * (at - left) / (right - left)

    return height


def predicted(size: DraftSize, costs: DraftCosts) -> DraftSize:
    """The size with the length that gains most, by the times and by what is accepted."""
    cost = through({n: [c] for n, c in costs.drafting.items()})(size.remove)
    length, gain = best_length(size.chosen_on, cost, costs)
    a = size.chosen_on.acceptance
    lengths = range(1, len(size.chosen_on.tokens_per_step) + 1)
    return size.model_copy(
        update={
            "cost": cost,
            "draft_tokens": length,
            "predicted": gain,
            "ideal": max(speedup(ideal_tokens(a, one), one, cost) for one in lengths),
        }
    )


def best_length(accepted: Accepted, cost: float, costs: DraftCosts) -> tuple[int, float]:
    """The number of tokens to draft at a time that gains most, and the gain."""
    lengths = range(1, len(accepted.tokens_per_step) + 1)
    gains = {length: gain_of(accepted, length, cost, costs) for length in lengths}
    return max(gains.items(), key=lambda item: item[1])


def gain_of(accepted: Accepted, length: int, cost: float, costs: DraftCosts) -> float:
    """What a draft gains that costs so much, with a number of tokens at a time."""
    verifying = through({n: [time] for n, time in costs.verifying.items()})
    return speedup(accepted.tokens_per_step[length - 1], length, cost, verifying(length))
