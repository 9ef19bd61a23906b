"""Every choice of a healing without training, and of merging blocks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shortllm.errors import ShortLLMError
from shortllm.results.record import Record

LENGTH = 256
"""Tokens per sample where nothing is said; fewer where the model has fewer positions."""


class HealOptions(Record):
    """How a shortened checkpoint is healed without training.

    A map has the square of the model's width as unknowns, so that it takes more text than scores.
    """

    method: Literal["linear"] = "linear"
    ridge: float | None = Field(
        default=None,
        gt=0,
        description="how strongly maps are held to do nothing, in parts of the mean square of what "
        "they are given; default: for each gap what does best on held-out samples",
    )
    weighting: Literal["norm", "none"] = Field(
        default="norm",
        description="norm: the error of each token in parts of its stream's mean square; none: all "
        "tokens alike, as published",
    )
    samples: int = Field(
        default=64, ge=2, description="calibration samples; a quarter of them is held out"
    )
    length: int | None = Field(
        default=None, ge=2, description="tokens per sample; default: 256, or all positions"
    )

    def sample_length(self, positions: int | None) -> int:
        """Tokens per sample for a model with so many positions; None: it has no limit."""
        return self.length or min(LENGTH, positions or LENGTH)


class MergeOptions(Record):
    """How blocks are folded into one another."""

    blocks: list[int] | None = Field(
        default=None,
        description="fold these blocks into the one before each gap they leave; default: a sweep "
        "from the top finds which, by the fields below",
    )
    threshold: float = Field(
        default=0.65,
        description="least mean cosine between the final hidden states of the merged and the "
        "original model at which a merge is kept",
    )
    interval: int = Field(
        default=2, ge=1, description="blocks to go down after a merge that is kept; else 1"
    )
    most_merged: int = Field(
        default=3, ge=1, description="blocks folded into another one at once, at the most"
    )
    remove: int | None = Field(
        default=None, ge=1, description="end once so many blocks are gone; default: never"
    )
    protect_first: int = Field(default=1, ge=0, description="first blocks that stay as they are")
    protect_last: int = Field(default=0, ge=0, description="last blocks that stay as they are")

    def check(self, blocks: int) -> None:
        """Refuse what cannot be done with so many blocks.

        Raises:
            ShortLLMError: too few blocks are free, or fewer than are to go; a threshold that is
                no cosine; or named blocks that the model lacks, or with none before them.
        """
        if self.blocks is not None:
            return self._check_named(self.blocks, blocks)
        free = blocks - self.protect_first - self.protect_last
        if free < 2:
            raise ShortLLMError(
                f"a merge takes two blocks, and of {blocks} all but {max(free, 0)} are protected. "
                "Give smaller --protect-first and --protect-last"
            )
        if self.remove is not None and self.remove >= free:
            raise ShortLLMError(
                f"--remove {self.remove}: of {free} blocks that are not protected {free - 1} can "
                f"go at the most. Give --remove {free - 1} or less"
            )
        if not -1 <= self.threshold < 1:
            raise ShortLLMError(
                f"--threshold {self.threshold} is no cosine below 1. Give e.g. 0.65"
            )

    def _check_named(self, named: list[int], count: int) -> None:
        if self != MergeOptions(blocks=named):
            raise ShortLLMError(
                "--blocks says what is folded, and nothing is left for a sweep to find. Leave out "
                "--threshold, --interval, --most-merged, --remove and --protect-first or -last"
            )
        if not named or len(set(named)) != len(named):
            raise ShortLLMError(
                f"--blocks {','.join(map(str, named)) or 'without a number'}: name each block to "
                "fold into the one before it once, e.g. 6,7,9"
            )
        for block in named:
            if not 0 <= block < count:
                raise ShortLLMError(
                    f"there is no block {block} among {count}. Give numbers from 1 to {count - 1}"
                )
            if block == 0:
                raise ShortLLMError(
                    "block 0 has no block before it that it could be folded into. Give others"
                )
