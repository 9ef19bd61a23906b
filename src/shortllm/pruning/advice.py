"""What experience says against a removal, before it is made. Pure, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

from shortllm.data.options import CalibrationInfo
from shortllm.format import counted, named_blocks, plain, short_count
from shortllm.pruning.families import Member, smaller_sibling
from shortllm.pruning.records import BlockScores, PrunePlan
from shortllm.records import ModelInfo, protected_ends

MOST_BLOCKS = 0.4
"""Fraction of the blocks above which quality seldom comes back."""

SEARCH_TOKENS = 10_000
"""Calibration tokens below which a search chooses by noise."""

SAME_SIZE = 1.5
"""Ratio of parameters up to which a shortened model competes with a smaller one of its family."""


def before_removal(model: ModelInfo, *, samples: int, length: int) -> list[str]:
    """What to know of a model before blocks are chosen."""
    most = int(MOST_BLOCKS * model.blocks)
    ends = protected_ends(model.blocks)
    found = [
        f"with more than {most} of {counted(model.blocks, 'block')} removed (40 %), quality seldom "
        "comes back, also by retraining"
    ]
    if ends:
        found.append(
            f"{named_blocks(ends)} are protected by default: the ends carry more than other blocks"
        )
    found += _tokens("a search", samples, length)
    if (sibling := smaller_sibling(model)) is not None:
        found.append(f"{_described(sibling)}; shortened to about that size, compare with it")
    return found


def against(
    plan: PrunePlan, scores: BlockScores, calibration: CalibrationInfo | None = None
) -> list[str]:
    """What speaks against a plan."""
    model, removed = plan.model, plan.removed
    found = []
    if len(removed) > MOST_BLOCKS * model.blocks:
        share = len(removed) / model.blocks
        found.append(
            f"{len(removed)} of {counted(model.blocks, 'block')} go ({share:.0%}). With more than "
            "40 %, quality seldom comes back, also by retraining. Remove fewer, or expect to "
            "retrain for long"
        )
    found += _open_ends(model, plan.protected)
    if scores.search is not None and calibration is not None:
        found += _tokens(
            f"the search '{scores.criterion}'", calibration.samples, calibration.length
        )
    left, sibling = model.parameters - plan.reached.parameters, smaller_sibling(model)
    if sibling is not None and left <= SAME_SIZE * sibling.parameters:
        size = plain(short_count(left))
        found.append(f"{_described(sibling)}; {size} are left here, so compare with it")
    return found


def _open_ends(model: ModelInfo, protected: Sequence[int]) -> Iterator[str]:
    """Ends that a plan was free to remove."""
    ends = {"first": 0, "last": model.blocks - 1}
    if unprotected := [name for name, block in ends.items() if block not in protected]:
        flags = " and ".join(f"--protect-{name} 0" for name in unprotected)
        yield (
            f"The {' and the '.join(unprotected)} block can be removed. The ends carry more than "
            f"other blocks: leave out {flags}, or measure what is left with care"
        )


def _tokens(who: str, samples: int, length: int) -> Iterator[str]:
    """Too little text for a search."""
    if samples * length < SEARCH_TOKENS:
        yield (
            f"{who} has {counted(samples * length, 'calibration token')}: with fewer than "
            f"{SEARCH_TOKENS:,} noise may choose. Give --samples {ceil(SEARCH_TOKENS / length)} "
            "or more"
        )


def _described(sibling: Member) -> str:
    return (
        f"{sibling.name} of the same family has {sibling.blocks} blocks and "
        f"{plain(short_count(round(sibling.parameters)))} parameters"
    )
