"""What a page says about a criterion or a width method: its axis, its paper, a line of help.

`criterion_info` is the only way in. The table behind it is to move into the registry of criteria.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Paper:
    """One paper on arXiv; authors as BibTeX has them: 'Last, First and Last, First'."""

    key: str
    arxiv: str
    title: str
    authors: str

    def __str__(self) -> str:
        return f"{self.short}, {self.title}, arXiv:{self.arxiv}"

    @property
    def url(self) -> str:
        """The paper's page."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def year(self) -> str:
        """Year of its arXiv number."""
        return f"20{self.arxiv[:2]}"

    @property
    def short(self) -> str:
        """First author and year."""
        return f"{self.authors.split(',')[0]} et al. {self.year}"

    @property
    def bibtex(self) -> str:
        """The entry for a bibliography."""
        return (
            f"@article{{{self.key},\n"
            f"  title   = {{{self.title}}},\n"
            f"  author  = {{{self.authors}}},\n"
            f"  journal = {{arXiv preprint arXiv:{self.arxiv}}},\n"
            f"  year    = {{{self.year}}},\n"
            "}"
        )


@dataclass(frozen=True, slots=True)
class CriterionInfo:
    """What a reader should know about a criterion or a width method."""

    label: str
    """What the axis of a plot says."""
    paper: Paper | None = None
    help: str = ""
    """One line; comes with the registry."""


SHORTENED_LLAMA = Paper(
    "kim2024shortened", "2402.02834",
    "Shortened LLaMA: Depth Pruning for Large Language Models with Comparison of Retraining "
    "Methods",
    "Kim, Bo-Kyeong and Kim, Geonmin and Kim, Tae-Ho and Castells, Thibault and Choi, Shinkook and "
    "Shin, Junho and Song, Hyoung-Kyu",
)  # fmt: skip
EVOPRESS = Paper(
    "sieberling2024evopress", "2410.14649",
    "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search",
    "Sieberling, Oliver and Kuznedelev, Denis and Kurtic, Eldar and Alistarh, Dan",
)  # fmt: skip
SHORTGPT = Paper(
    "men2024shortgpt", "2403.03853",
    "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
    "Men, Xin and Xu, Mingyu and Zhang, Qingyu and Wang, Bingning and Lin, Hongyu and Lu, Yaojie "
    "and Han, Xianpei and Chen, Weipeng",
)  # fmt: skip
DEEPER_LAYERS = Paper(
    "gromov2024unreasonable", "2403.17887",
    "The Unreasonable Ineffectiveness of the Deeper Layers",
    "Gromov, Andrey and Tirumala, Kushal and Shapourian, Hassan and Glorioso, Paolo and Roberts, "
    "Daniel A.",
)  # fmt: skip
SLEB = Paper(
    "song2024sleb", "2402.09025",
    "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks",
    "Song, Jiwon and Oh, Kyungseok and Kim, Taesu and Kim, Hyungjun and Kim, Yulhwa and "
    "Kim, Jae-Joon",
)  # fmt: skip
LLM_PRUNER = Paper(
    "ma2023llmpruner", "2305.11627",
    "LLM-Pruner: On the Structural Pruning of Large Language Models",
    "Ma, Xinyin and Fang, Gongfan and Wang, Xinchao",
)  # fmt: skip
FLAP = Paper(
    "an2023fluctuation", "2312.11983",
    "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
    "An, Yongqi and Zhao, Xu and Yu, Tao and Tang, Ming and Wang, Jinqiao",
)  # fmt: skip

PLACE = "place in the removal order (1 = removed first)"
"""Label of criteria whose importance is a place; their plot shows places."""

METHODS: dict[str, tuple[str, Paper | None]] = {
    "ppl": ("perplexity without the block", SHORTENED_LLAMA),
    "kl": ("KL divergence from the intact model [nats per token]", EVOPRESS),
    "taylor": ("estimated change of the loss, |weight × gradient|", SHORTENED_LLAMA),
    "magnitude": ("size of the weights, |weight|", SHORTENED_LLAMA),
    "influence": ("block influence, 1 − cos [no unit]", SHORTGPT),
    "relative": ("relative size of the block's update [no unit]", SHORTGPT),
    "angular": ("angular distance [fraction of π]", DEEPER_LAYERS),
    "greedy": (PLACE, SLEB),
    "local": (PLACE, None),
    "evolve": (PLACE, EVOPRESS),
    "auto": (PLACE, None),
    "last": (PLACE, None),
    "random": (PLACE, None),
    "even": (PLACE, None),
    "llm-pruner": ("", LLM_PRUNER),
    "wanda-sp": ("", FLAP),
    "flap": ("", FLAP),
}
"""Label and paper of each criterion and width method."""


def criterion_info(name: str) -> CriterionInfo:
    """What is known about a criterion or width method; an unknown one is 'importance (NAME)'."""
    label, paper = METHODS.get(name) or (f"importance ({name})", None)
    return CriterionInfo(label, paper)


def papers_of(names: Sequence[str]) -> list[tuple[list[str], Paper]]:
    """Each paper once, with the methods it defines."""
    found: dict[str, tuple[list[str], Paper]] = {}
    for name in names:
        paper = criterion_info(name).paper
        if paper is not None:
            found.setdefault(paper.key, ([], paper))[0].append(name)
    return list(found.values())
