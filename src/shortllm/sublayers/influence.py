"""How much each sublayer matters.

    sublayer-ppl        one after the other: of all that are left the one goes without which the
                        perplexity is lowest (BlockPruner, arXiv:2406.10594)
    sublayer-influence  1 - cos(stream before, stream after) of each sublayer, from one pass ("What
                        matters in Transformers", arXiv:2406.15786)

All candidates of a round are measured in one walk, the same that whole blocks are measured in: a
block counts there as three of which each model has at most one: whole, without its attention, and
without its MLP. So models that begin alike share their passes here too.

Shapes: B samples, T tokens, D width, V vocabulary, N predictions of one slice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from shortllm.journal import Journal
from shortllm.model.decoder import BlockCall, Decoder, Entry
from shortllm.model.hidden_states import SampleGroups, StreamMemory, block_flops, group_size
from shortllm.model.metrics import cosine
from shortllm.model.walk import TOGETHER, mean_nlls, walk_flops
from shortllm.runtime import Advance
from shortllm.sublayers.structure import PARTS, Outputs, Part, Sublayer, without_sublayers

VARIANTS: tuple[tuple[Part, ...], ...] = ((), ("attention",), ("mlp",))
"""What each of the three that a block counts as lacks."""


class Variants:
    """A decoder to `walk` over in which each block counts as three; else the decoder itself."""

    def __init__(self, decoder: Decoder, outputs: Outputs) -> None:
        self._decoder = decoder
        self._outputs = outputs
        self.block_count = len(VARIANTS) * decoder.block_count
        self.blocks = [block for block in decoder.blocks for _ in VARIANTS]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def as_decoder(self) -> Decoder:
        """This, for what works on a decoder by these methods alone."""
        return cast(Decoder, self)

    def without(self, removed: Collection[Sublayer]) -> frozenset[int]:
        """A model without some sublayers, as the set of what it lacks of this decoder's blocks."""
        gone = set(removed)
        kept = set()
        for b in range(self._decoder.block_count):
            lacking = tuple(part for part in PARTS if (b, part) in gone)
            if lacking in VARIANTS:
                kept.add(len(VARIANTS) * b + VARIANTS.index(lacking))
        return frozenset(range(self.block_count)) - kept

    def enter(self, ids_BT: Tensor) -> Entry:
        """Enter the model; each block's call is made once per variant."""
        entry = self._decoder.enter(ids_BT)
        calls = [call for call in entry.calls for _ in VARIANTS]
        return Entry(entry.ids_BT, entry.stream_BTD, calls)

    def through(self, order: Sequence[int]) -> Iterator[int]:
        """The variants in order, each while its block's weights are there."""
        of_block: dict[int, list[int]] = {}
        for v in order:
            of_block.setdefault(v // len(VARIANTS), []).append(v)
        for b in self._decoder.through(list(of_block)):
            yield from of_block[b]

    def apply(self, v: int, stream_BTD: Tensor, call: BlockCall) -> Tensor:
        """The stream behind a block that lacks what the variant lacks."""
        b, variant = divmod(v, len(VARIANTS))
        lacking = [(b, part) for part in VARIANTS[variant]]
        with without_sublayers(self._decoder, self._outputs, lacking):
            return self._decoder.apply(b, stream_BTD, call)


def remove_one_by_one(
    variants: Variants,
    ids_BT: Tensor,
    candidates: Sequence[Sublayer],
    number: int,
    *,
    advance: Advance = lambda work: None,
    memory: StreamMemory | None = None,
    journal: Journal | None = None,
) -> tuple[float, list[tuple[Sublayer, float]]]:
    """The intact model's mean NLL, and the sublayers in the order in which they go, each with the
    mean NLL without it and those before it, nats.

    Of equals the one of the later block goes, and of one block the attention. Finished rounds are
    in the journal. A NLL that is no number counts as infinite.
    """
    journal = journal or Journal(None, "")
    rounds: list[list[float]] = (journal.position() or {"rounds": []})["rounds"]
    order: list[tuple[Sublayer, float]] = []
    intact = 0.0
    for place in range(number):
        gone = frozenset(one for one, _ in order)
        left = [one for one in candidates if one not in gone]
        first: list[frozenset[Sublayer]] = [] if order else [frozenset()]
        if place == len(rounds):
            part = journal.part(f"round-{place}")
            sets = [*first, *(gone | {one} for one in left)]
            means = mean_nlls(
                variants.as_decoder(), ids_BT, [variants.without(one) for one in sets],
                together=TOGETHER, advance=advance, memory=memory, journal=part,
            )  # fmt: skip
            rounds.append(means)
            journal.commit({"rounds": rounds}, {})
            part.discard()
        values = [value if value == value else float("inf") for value in rounds[place]]
        if first:
            intact, *values = values
        found = dict(zip(left, values, strict=True))
        least = min(left, key=lambda one: (found[one], -one[0], PARTS.index(one[1])))
        order.append((least, found[least]))
    return intact, order


def rounds_flops(
    variants: Variants, candidates: Sequence[Sublayer], number: int, samples: int, length: int
) -> float:
    """Floating-point operations of `remove_one_by_one`, as if the first candidates went."""
    total = 0.0
    for done in range(number):
        gone = frozenset(candidates[:done])
        sets = [gone | {one} for one in candidates[done:]]
        removals = [variants.without(removed) for removed in ([] if done else [gone]) + sets]
        for start in range(0, len(removals), TOGETHER):
            together = removals[start : start + TOGETHER]
            total += walk_flops(variants.as_decoder(), together, samples, length)
    return total


def influence(
    decoder: Decoder,
    outputs: Outputs,
    ids_BT: Tensor,
    *,
    advance: Advance = lambda work: None,
    memory: StreamMemory | None = None,
) -> dict[Sublayer, float]:
    """1 - cos(stream before, stream after) of each sublayer, mean over tokens; in [0, 2].

    What attention adds is seen by the block without its MLP. Where the MLP reads what the attention
    wrote, its stream before is the one behind the attention; where both read the same (parallel
    blocks), it is the one entering the block, and what it adds is seen without the attention.
    """
    sums = {(b, part): 0.0 for b in sorted(outputs) for part in PARTS}
    size = len(ids_BT) if decoder.streamed else group_size(decoder, ids_BT.shape[1])
    for start in range(0, len(ids_BT), size):
        groups = SampleGroups(decoder, ids_BT[start : start + size], memory)
        stream_BTD = groups.entering()
        for b in decoder.through(range(decoder.block_count)):
            for rows, entry in groups:
                before_BTD = stream_BTD[rows].to(decoder.device)
                with torch.no_grad():
                    after_BTD = decoder.apply(b, before_BTD, entry.calls[b])
                    if b in outputs:
                        found = _similarities(decoder, outputs, b, entry, before_BTD, after_BTD)
                        for part, value in zip(PARTS, found, strict=True):
                            sums[b, part] += value
                stream_BTD[rows] = after_BTD.to(stream_BTD)
            advance(block_flops(decoder, b) * groups.ids_BT.numel())
    return {one: 1.0 - total / ids_BT.numel() for one, total in sums.items()}


def _similarities(
    decoder: Decoder,
    outputs: Outputs,
    b: int,
    entry: Entry,
    before_BTD: Tensor,
    after_BTD: Tensor,
) -> tuple[float, float]:
    """Sums over tokens of cos(before, after), of the attention and of the MLP."""

    def without(part: Part) -> Tensor:
        with without_sublayers(decoder, outputs, [(b, part)]):
            return decoder.apply(b, before_BTD, entry.calls[b])

    def total(one_BTD: Tensor, other_BTD: Tensor) -> float:
        return float(cosine(one_BTD.flatten(2), other_BTD.flatten(2)).double().sum().item())

    without_mlp_BTD = without("mlp")
    attention = total(before_BTD, without_mlp_BTD)
    seen: list[Tensor] = []
    output = decoder.blocks[b].get_submodule(outputs[b]["mlp"])
    handle = output.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        decoder.apply(b, before_BTD, entry.calls[b])
        without_attention_BTD = without("attention")
    finally:
        handle.remove()
    intact, alone = (given.float() for given in seen)
    if bool((intact - alone).abs().max() <= 1e-5 * intact.abs().max()):
        return attention, total(before_BTD, without_attention_BTD)
    return attention, total(without_mlp_BTD, after_BTD)
