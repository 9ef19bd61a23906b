"""What a page says about a criterion or a width method: its axis and its paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shortllm import criteria
from shortllm.criteria import PLACE as PLACE
from shortllm.papers import FLAP, LLM_PRUNER, Paper

WIDTH_PAPERS = {"llm-pruner": LLM_PRUNER, "wanda-sp": FLAP, "flap": FLAP}


@dataclass(frozen=True, slots=True, kw_only=True)
class CriterionInfo:
    """What a reader should know about a criterion or a width method."""

    label: str
    """What the axis of a plot says."""
    paper: Paper | None = None
    in_nats: bool = False
    """Whether its values are perplexities, whose increase is shown."""


def criterion_info(name: str) -> CriterionInfo:
    """What is known about a criterion or width method; an unknown one is 'importance (NAME)'."""
    if name in criteria.names():
        one = criteria.get(name)
        return CriterionInfo(label=one.label, paper=one.paper, in_nats=one.in_nats)
    return CriterionInfo(label=f"importance ({name})", paper=WIDTH_PAPERS.get(name))


def papers_of(names: Sequence[str]) -> list[tuple[list[str], Paper]]:
    """Each paper once, with the methods it defines."""
    found: dict[str, tuple[list[str], Paper]] = {}
    for name in names:
        paper = criterion_info(name).paper
        if paper is not None:
            found.setdefault(paper.key, ([], paper))[0].append(name)
    return list(found.values())
