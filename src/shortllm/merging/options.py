"""options."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from shortllm.errors import ShortLLMError
from shortllm.records import Cost, ModelInfo, Record, ResultFile


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


MERGE_FILE = "merge.json"


class Merge(Record):
    """One try; block numbers are those of the source."""

    block: int = Field(description="what the others were folded into")
    merged: list[int] = Field(description="the others, which go")
    cosine: float = Field(
        description="mean over tokens of the cosine between the final hidden states of the merged "
        "and the original model"
    )
    kept: bool = Field(description="whether the cosine exceeds the threshold")


class Merging(ResultFile):
    """merge.json: blocks folded into one another."""

    model: ModelInfo = Field(description="the checkpoint before")
    options: dict[str, Any]
    tries: list[Merge] = Field(description="in their order, from the top down")
    kept: list[int]
    removed: list[int]
    sums: dict[int, dict[int, int]] = Field(
        description="for each changed block how often each original block is in it"
    )
    cosine: float = Field(description="of the model that was written")
    calibration: str = Field(description="tokens_fingerprint of the calibration")
    dtype: str = Field(description="computation type of the comparison; sums are float32")
    versions: dict[str, str] = Field(default_factory=dict)
    cost: Cost | None = None
