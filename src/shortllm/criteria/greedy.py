"""One block after the other, scored again after each removal in the model that is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shortllm.criteria import PLACE, Scores, criterion
from shortllm.errors import CriterionError
from shortllm.papers import SLEB

Rescore = Callable[[Sequence[int], Sequence[int]], dict[int, float]]
"""`(removed, candidates) -> importance of each candidate` in the model without `removed`."""


@criterion("greedy", needs="removals", label=PLACE, paper=SLEB)
def remove_one_by_one(
    rescore: Rescore,
    free: Sequence[int],
    blocks: int,
    *,
    inner: str = "ppl",
    temperature: float = 1.0,
    tasks: str | None = None,
    items: int = 100,
    rounds: int | None = None,
    healing: str | None = None,
    protect_first: int | None = None,
    protect_last: int | None = None,
) -> Scores:
    """Place in the order of removal, each block being chosen in the already shortened model.

    Blocks that were not removed follow by their importance in the last round; protected blocks
    come last. The values are the inner criterion's, when the block went or was last scored.

    Args:
        free: the blocks that are not protected, ascending.
        inner: criterion by which the remaining blocks are scored in each round.
        temperature: of the inner criterion `acceptance`.
        tasks, items: of the inner criterion `task`.
        rounds: blocks to remove; default: half of the free ones.
        healing: a method of `shortllm heal`; models are scored after it.
    """
    rounds = max(1, len(free) // 2) if rounds is None else rounds
    if not 0 < rounds <= min(len(free), blocks - 1):
        raise CriterionError(
            f"greedy cannot remove {rounds} of {blocks} blocks, of which {len(free)} are free. "
            f"Ask for greedy.rounds between 1 and {min(len(free), blocks - 1)}"
        )
    values: dict[int, float] = {}
    order: list[int] = []
    for _ in range(rounds):
        found = rescore(order, [b for b in free if b not in order])
        values.update(found)
        order.append(min(found, key=lambda b: (found[b], -b)))
    rest = sorted(set(free) - set(order), key=lambda b: (values[b], -b))
    protected = sorted(set(range(blocks)) - set(free), reverse=True)
    place = {b: float(i) for i, b in enumerate([*order, *rest, *protected])}
    importance = [place[b] for b in range(blocks)]
    highest = max(values.values())
    return Scores(
        importance=importance, values=[values.get(b, highest) for b in range(blocks)], order=order
    )
