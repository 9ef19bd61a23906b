"""Public families of models in several sizes: what a shortened model should be compared with.

Blocks are `num_hidden_layers` in the config of each; parameters are those of the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass

from shortllm.records import ModelInfo

ALIKE = 0.1
"""Relative difference of two numbers of parameters that counts as none: tied tensors, rounding."""


@dataclass(frozen=True, slots=True)
class Member:
    """One size of a family."""

    id: str
    blocks: int
    parameters: float

    @property
    def name(self) -> str:
        """Its id without the owner."""
        return self.id.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Family:
    """Models of one kind that differ in size."""

    model_types: tuple[str, ...]
    members: tuple[Member, ...]
    """The smallest first."""


def _family(model_types: str, start: str, sizes: str) -> Family:
    """A family from a line for each size: the rest of its id, blocks, billions of parameters."""
    rows = (line.split() for line in sizes.strip().splitlines())
    members = (Member(start + rest, int(blocks), 1e9 * float(size)) for rest, blocks, size in rows)
    return Family(tuple(model_types.split()), tuple(members))


FAMILIES = (
    _family("qwen3", "Qwen/Qwen3-", """
        0.6B 28 0.6
        1.7B 28 1.72
        4B   36 4.02
        8B   36 8.19
        14B  40 14.8
        32B  64 32.8"""),
    _family("qwen2", "Qwen/Qwen2.5-", """
        0.5B 24 0.494
        1.5B 28 1.54
        3B   36 3.09
        7B   28 7.62
        14B  48 14.8
        32B  64 32.8
        72B  80 72.7"""),
    _family("llama", "meta-llama/Llama-3.", """
        2-1B   16  1.24
        2-3B   28  3.21
        1-8B   32  8.03
        1-70B  80  70.6
        1-405B 126 406"""),
    _family("llama", "meta-llama/Llama-2-", """
        7b-hf  32 6.74
        13b-hf 40 13.0
        70b-hf 80 69.0"""),
    _family("llama", "HuggingFaceTB/SmolLM2-", """
        135M 30 0.135
        360M 32 0.362
        1.7B 24 1.71"""),
    _family("gemma3 gemma3_text", "google/gemma-3-", """
        270m   18 0.268
        1b-pt  26 1.0
        4b-pt  34 4.3
        12b-pt 48 12.2
        27b-pt 62 27.4"""),
    _family("gemma2", "google/gemma-2-", """
        2b  26 2.61
        9b  42 9.24
        27b 46 27.2"""),
    _family("gpt_neox", "EleutherAI/pythia-", """
        70m  6  0.0704
        160m 12 0.162
        410m 24 0.405
        1b   16 1.01
        1.4b 24 1.41
        2.8b 32 2.78
        6.9b 32 6.86
        12b  36 11.8"""),
    _family("opt", "facebook/opt-", """
        125m 12 0.125
        350m 24 0.331
        1.3b 24 1.32
        2.7b 32 2.65
        6.7b 32 6.66
        13b  40 12.9
        30b  48 30.0
        66b  64 65.7"""),
    _family("gpt2", "openai-community/", """
        gpt2        12 0.124
        gpt2-medium 24 0.355
        gpt2-large  36 0.774
        gpt2-xl     48 1.56"""),
)  # fmt: skip


def smaller_sibling(model: ModelInfo) -> Member | None:
    """The next smaller model of the family that a model is of; None if none is known.

    A model is known by its type, its number of blocks and its parameters, whatever it is called.
    """
    found: Member | None = None
    nearest = ALIKE
    for family in FAMILIES:
        for place, one in enumerate(family.members):
            distance = abs(model.parameters / one.parameters - 1)
            same = model.model_type in family.model_types and model.blocks == one.blocks
            if same and distance <= nearest:
                nearest, found = distance, family.members[place - 1] if place else None
    return found
