"""The paper behind a criterion, for the page (text and link) and the model card (BibTeX)."""

from __future__ import annotations

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
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def year(self) -> str:
        return f"20{self.arxiv[:2]}"

    @property
    def short(self) -> str:
        return f"{self.authors.split(',')[0]} et al. {self.year}"

    @property
    def bibtex(self) -> str:
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

CITATIONS = {
    "ppl": _SHORTENED_LLAMA,
    "taylor": _SHORTENED_LLAMA,
    "magnitude": _SHORTENED_LLAMA,
}
"""The paper that defines each criterion; one that is not listed is shown without."""
