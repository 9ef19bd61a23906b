"""All candidates of a round measured in one walk, the same that measures whole blocks.

There a block counts as three, of which each model has at most one: whole, without its attention,
and without its MLP. So models that begin alike share their passes here too.

Shapes: B samples, T tokens, D width, V vocabulary, N predictions of one slice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast

from torch import Tensor

from shortllm.model.decoder import BlockCall, Decoder, Entry
from shortllm.model.metrics import perplexity
from shortllm.model.walk import TOGETHER, mean_nlls, walk_flops
from shortllm.runtime import progress
from shortllm.sublayers.criteria import Ranking, Task
from shortllm.sublayers.structure import PARTS, Outputs, Part, Sublayer, without_sublayers

VARIANTS: tuple[tuple[Part, ...], ...] = ((), ("attention",), ("mlp",))
"""What each of the three variants of a block lacks."""


class Variants:
    """A decoder to `walk` over in which each block counts as three."""

    def __init__(self, decoder: Decoder, outputs: Outputs) -> None:
        self._decoder = decoder
        self._outputs = outputs
        self.block_count = len(VARIANTS) * decoder.block_count
        self.blocks = [block for block in decoder.blocks for _ in VARIANTS]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def as_decoder(self) -> Decoder:
        """The same object, typed as a decoder for functions that use these methods only."""
        return cast(Decoder, self)

    def without(self, removed: Collection[Sublayer]) -> frozenset[int]:
        """A model without some sublayers, as the set of variants that it lacks."""
        gone = set(removed)
        kept = set()
        for b in range(self._decoder.block_count):
            lacking = tuple(part for part in PARTS if (b, part) in gone)
            if lacking in VARIANTS:
                kept.add(len(VARIANTS) * b + VARIANTS.index(lacking))
        return frozenset(range(self.block_count)) - kept

    def round(self, gone: frozenset[Sublayer], left: Sequence[Sublayer]) -> list[frozenset[int]]:
        """The models without `gone` and one of `left`; in the first round the intact one too."""
        sets = [gone | {one} for one in left]
        return [self.without(one) for one in (sets if gone else [gone, *sets])]

    def enter(self, ids_BT: Tensor) -> Entry:
        """Enter the model; each block's call is made once per variant."""
        entry = self._decoder.enter(ids_BT)
        calls = [call for call in entry.calls for _ in VARIANTS]
        return Entry(entry.ids_BT, entry.stream_BTD, calls)

    def through(self, order: Sequence[int]) -> Iterator[int]:
        """The variants in order, each while its block's weights are in memory."""
        of_block: dict[int, list[int]] = {}
        for v in order:
            of_block.setdefault(v // len(VARIANTS), []).append(v)
        for b in self._decoder.through(list(of_block)):
            yield from of_block[b]

    def apply(self, v: int, stream_BTD: Tensor, call: BlockCall) -> Tensor:
        """The hidden state after a block that lacks what the variant lacks."""
        b, variant = divmod(v, len(VARIANTS))
        lacking = [(b, part) for part in VARIANTS[variant]]
        with without_sublayers(self._decoder, self._outputs, lacking):
            return self._decoder.apply(b, stream_BTD, call)


def remove_one_by_one(task: Task) -> Ranking:
    """The sublayers in the order of removal, each with the perplexity without it and those before.

    Of equal ones the one of the later block goes first, and of one block the attention. Finished
    rounds are in the journal. A NLL that is not a number counts as infinite.
    """
    variants, journal = Variants(task.decoder, task.outputs), task.journal
    rounds: list[list[float]] = (journal.position() or {"rounds": []})["rounds"]
    order: list[tuple[Sublayer, float]] = []
    intact = 0.0
    with progress("scoring sublayers by perplexity", _flops(variants, task)) as advance:
        for place in range(task.remove):
            gone = frozenset(one for one, _ in order)
            left = [one for one in task.candidates if one not in gone]
            if place == len(rounds):
                part = journal.part(f"round-{place}")
                means = mean_nlls(
                    variants.as_decoder(), task.ids_BT, variants.round(gone, left),
                    together=TOGETHER, advance=advance, memory=task.memory, journal=part,
                )  # fmt: skip
                rounds.append(means)
                journal.commit({"rounds": rounds}, {})
                part.discard()
            values = [value if value == value else float("inf") for value in rounds[place]]
            if not gone:
                intact, *values = values
            found = dict(zip(left, values, strict=True))
            least = min(left, key=lambda one: (found[one], -one[0], PARTS.index(one[1])))
            order.append((least, perplexity(found[least])))
    return Ranking(order=order, intact=perplexity(intact))


def _flops(variants: Variants, task: Task) -> float:
    """Floating-point operations of all rounds, as if the first candidates were removed."""
    total = 0.0
    for done in range(task.remove):
        removals = variants.round(frozenset(task.candidates[:done]), task.candidates[done:])
        for start in range(0, len(removals), TOGETHER):
            together = removals[start : start + TOGETHER]
            total += walk_flops(variants.as_decoder(), together, *task.ids_BT.shape)
    return total
