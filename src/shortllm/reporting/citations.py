"""The paper behind a method, for the page (text and link) and the model card (BibTeX)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Citation:
    """One paper on arXiv."""

    key: str
    authors: str
    """As BibTeX has them: 'Last, First and Last, First'."""
    title: str
    arxiv: str

    @property
    def url(self) -> str:
        """The paper's page."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def year(self) -> str:
        """Of its arXiv number."""
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


_SHORTENED_LLAMA = Citation(
    key="kim2024shortened",
    authors="Kim, Bo-Kyeong and Kim, Geonmin and Kim, Tae-Ho and Castells, Thibault and "
    "Choi, Shinkook and Shin, Junho and Song, Hyoung-Kyu",
    title="Shortened LLaMA: Depth Pruning for Large Language Models "
    "with Comparison of Retraining Methods",
    arxiv="2402.02834",
)

_EVOPRESS = Citation(
    key="sieberling2024evopress",
    authors="Sieberling, Oliver and Kuznedelev, Denis and Kurtic, Eldar and Alistarh, Dan",
    title="EvoPress: Accurate Dynamic Model Compression via Evolutionary Search",
    arxiv="2410.14649",
)

_SHORTGPT = Citation(
    key="men2024shortgpt",
    authors="Men, Xin and Xu, Mingyu and Zhang, Qingyu and Wang, Bingning and Lin, Hongyu and "
    "Lu, Yaojie and Han, Xianpei and Chen, Weipeng",
    title="ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
    arxiv="2403.03853",
)

_DEEPER_LAYERS = Citation(
    key="gromov2024unreasonable",
    authors="Gromov, Andrey and Tirumala, Kushal and Shapourian, Hassan and Glorioso, Paolo and "
    "Roberts, Daniel A.",
    title="The Unreasonable Ineffectiveness of the Deeper Layers",
    arxiv="2403.17887",
)

_SLEB = Citation(
    key="song2024sleb",
    authors="Song, Jiwon and Oh, Kyungseok and Kim, Taesu and Kim, Hyungjun and Kim, Yulhwa and "
    "Kim, Jae-Joon",
    title="SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer "
    "Blocks",
    arxiv="2402.09025",
)

_LLM_PRUNER = Citation(
    key="ma2023llmpruner",
    authors="Ma, Xinyin and Fang, Gongfan and Wang, Xinchao",
    title="LLM-Pruner: On the Structural Pruning of Large Language Models",
    arxiv="2305.11627",
)

_FLAP = Citation(
    key="an2023fluctuation",
    authors="An, Yongqi and Zhao, Xu and Yu, Tao and Tang, Ming and Wang, Jinqiao",
    title="Fluctuation-based Adaptive Structured Pruning for Large Language Models",
    arxiv="2312.11983",
)

CITATIONS = {
    "ppl": _SHORTENED_LLAMA,
    "taylor": _SHORTENED_LLAMA,
    "magnitude": _SHORTENED_LLAMA,
    "kl": _EVOPRESS,
    "influence": _SHORTGPT,
    "relative": _SHORTGPT,
    "angular": _DEEPER_LAYERS,
    "greedy": _SLEB,
    "evolve": _EVOPRESS,
    "llm-pruner": _LLM_PRUNER,
    "wanda-sp": _FLAP,
    "flap": _FLAP,
}
"""The paper that defines each criterion and width method; others are shown without."""


def cited(criteria: Sequence[str]) -> list[tuple[str, Citation]]:
    """Each paper once, with the criteria it defines: ('ppl, taylor', ...)."""
    papers: dict[str, tuple[list[str], Citation]] = {}
    for name in criteria:
        if name in CITATIONS:
            citation = CITATIONS[name]
            papers.setdefault(citation.key, ([], citation))[0].append(name)
    return [(", ".join(names), citation) for names, citation in papers.values()]
