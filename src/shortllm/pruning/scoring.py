"""Scores of one or several criteria in as few passes over a model as there can be.

    nothing, weights       no pass: weights are read from the files, one block at a time
    streams, last token    one forward pass for all such criteria; they ride along with
    logits                 one walk over all removals, or else with
    gradients              one forward and one backward pass
    removals (greedy)      one of the above per round
    sets (local, evolve)   the passes of the criteria it starts with, and walks (searching.py)

`Scorer` knows which passes are needed and runs them; what a pass is stands in model/.


Criteria that watch a pass: what they see of the stream at each block, turned into scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from shortllm import criteria
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tensors import read_tensor
from shortllm.criteria import Scores
from shortllm.criteria.selection import Asked
from shortllm.journal import Journal
from shortllm.model.metrics import perplexity
from shortllm.runtime import ALONE, Ranks

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.model.decoder import Decoder
    from shortllm.model.hidden_states import StreamMemory


Advance = Callable[[float], None]


@dataclass(kw_only=True)
class Scorer:
    """A model, samples, and the means to run passes over them."""

    checkpoint: Checkpoint
    open_decoder: Callable[[], Decoder]
    """Called when a pass needs the model."""
    ids_BT: Tensor | None
    """This process's samples; None if no criterion needs text."""
    ranks: Ranks = ALONE
    memory: StreamMemory | None = None
    journal: Journal = field(default_factory=lambda: Journal(None, ""))
    advance: Advance = lambda work: None

    def score(self, asked: Sequence[Asked]) -> dict[str, Scores]:
        """Scores of all blocks by each criterion.

        Raises:
            CriterionError: a score is not finite.
            UnsupportedModelError: the model's blocks cannot be called one by one.
        """
        blocks = range(self.checkpoint.block_count)
        found = self._score(asked, blocks, blocks, self.journal)
        for name, scores in found.items():
            criteria.require_finite(name, scores.importance)
        return found

    def _score(
        self,
        asked: Sequence[Asked],
        kept: Sequence[int],
        candidates: Sequence[int],
        journal: Journal,
    ) -> dict[str, Scores]:
        """Scores of the blocks `candidates` in the model of the blocks `kept`; 0 for others."""
        found: dict[str, Scores] = {}
        for one in asked:
            if one.needs == "nothing":
                found[one.name] = plain_scores(one.call(self.checkpoint.block_count))
            elif one.needs == "weights":
                found[one.name] = self._weights(one, candidates)
            elif one.needs == "removals":
                found[one.name] = self._removals(one, journal.part(one.name))
            elif one.needs == "sets":
                found[one.name] = self._sets(one, journal.part(one.name))
        watching = [self._watch(one) for one in asked if one.needs in WATCHED]
        logits = [one for one in asked if one.needs == "logits"]
        gradients = [one for one in asked if one.needs == "gradients"]
        if logits:
            found |= self._logits(logits, kept, candidates, watching, journal.part("logits"))
        if gradients:
            watch = [] if logits else watching
            found |= self._gradients(gradients, kept, watch, journal.part("gradients"))
        if watching and not logits and not gradients:
            self._forward(kept, watching, journal.part("forward"))
        found |= {watch.asked.name: watch.scores(kept, self.ranks) for watch in watching}
        return {one.name: found[one.name] for one in asked}

    def _weights(self, one: Asked, candidates: Sequence[int]) -> Scores:
        """One block's weights in memory at a time, straight from the files."""
        values = [0.0] * self.checkpoint.block_count
        for b in candidates:
            entries = self.checkpoint.block_weights(b)
            values[b] = one.call({entry.name: read_tensor(entry) for entry in entries})
            self.advance(2.0 * sum(entry.elements for entry in entries))
        return plain_scores(values)

    def _watch(self, one: Asked) -> Watch:
        blocks = self.checkpoint.block_count
        if one.needs == "streams":
            return TokenMeans(one, blocks)
        return LastTokens(one, blocks, len(self.samples()), self.open_decoder().stream_width)

    def _forward(self, kept: Sequence[int], watching: Sequence[Watch], journal: Journal) -> None:
        from shortllm.model.walk import walk

        decoder = self.open_decoder()
        removed = frozenset(range(decoder.block_count)) - set(kept)
        walk(
            decoder,
            self.samples(),
            [removed],
            observe=watching,
            advance=self.advance,
            memory=self.memory,
            journal=journal,
        )

    def _logits(
        self,
        asked: Sequence[Asked],
        kept: Sequence[int],
        candidates: Sequence[int],
        watching: Sequence[Watch],
        journal: Journal,
    ) -> dict[str, Scores]:
        """The model of `kept` and each model with one more block gone, in one walk."""
        import torch

        from shortllm.model.walk import walk

        decoder, ids_BT = self.open_decoder(), self.samples()
        totals = torch.zeros(len(asked), 1 + len(candidates), dtype=torch.float64)

        def consume(m: int, logits_NV: Tensor, first_NV: Tensor, target_N: Tensor) -> None:
            for i, one in enumerate(asked):
                values_N = one.call(logits_NV, first_NV, target_N)
                totals[i, m] += values_N.double().sum().item()

        walk(
            decoder,
            ids_BT,
            removals_of(decoder.block_count, kept, candidates),
            consume=consume,
            observe=watching,
            advance=self.advance,
            memory=self.memory,
            journal=journal,
        )
        self.ranks.add_up([totals])
        predictions = self.ranks.total(float(ids_BT.shape[0] * (ids_BT.shape[1] - 1)))
        return {
            one.name: _of_means(one, mean, candidates, decoder.block_count)
            for one, mean in zip(asked, (totals / predictions).tolist(), strict=True)
        }

    def _gradients(
        self,
        asked: Sequence[Asked],
        kept: Sequence[int],
        watching: Sequence[Watch],
        journal: Journal,
    ) -> dict[str, Scores]:
        from shortllm.model.backward import walk_back

        decoder = self.open_decoder()
        values = {one.name: [0.0] * decoder.block_count for one in asked}

        def receive(b: int, products: dict[str, Tensor]) -> None:
            for one in asked:
                values[one.name][b] = one.call(products)

        walk_back(
            decoder,
            self.samples(),
            list(kept),
            receive,
            ranks=self.ranks,
            observe=watching,
            advance=self.advance,
            memory=self.memory,
            journal=journal,
            results=lambda: values,
            restore=values.update,
        )
        return {name: plain_scores(found) for name, found in values.items()}

    def _removals(self, one: Asked, journal: Journal) -> Scores:
        """Rounds of an inner criterion; each finished round is in the journal."""
        inner = one.inner()
        assert inner is not None
        blocks = self.checkpoint.block_count
        rounds: list[dict[str, float]] = (journal.position() or {"rounds": []})["rounds"]
        taken = 0

        def rescore(removed: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
            nonlocal taken
            if taken == len(rounds):
                kept = [b for b in range(blocks) if b not in set(removed)]
                part = journal.part(f"round-{taken}")
                found = self._score([inner], kept, candidates, part)[inner.name].importance
                criteria.require_finite(inner.name, [found[b] for b in candidates])
                part.discard()
                rounds.append({str(b): found[b] for b in candidates})
                journal.commit({"rounds": rounds}, {})
            taken += 1
            return {int(b): value for b, value in rounds[taken - 1].items()}

        scores: Scores = one.call(rescore, one.free(self.checkpoint.info()), blocks)
        return scores

    def _sets(self, one: Asked, journal: Journal) -> Scores:
        from shortllm.pruning.search_space import BlockSearch

        scores: Scores = one.call(BlockSearch(self, one, journal))
        return scores

    def work(self, asked: Sequence[Asked]) -> float:
        """Floating-point operations of `score`, the total of what `advance` is told.

        Of a criterion that removes blocks as if those were the first ones, and of a search as if
        it took two rounds.
        """
        blocks = range(self.checkpoint.block_count)
        return self._work(asked, blocks, blocks)

    def _work(
        self, asked: Sequence[Asked], kept: Sequence[int], candidates: Sequence[int]
    ) -> float:
        from shortllm.model.backward import walk_back_flops
        from shortllm.model.walk import walk_flops

        total, needs = 0.0, {one.needs for one in asked}
        for one in asked:
            if one.needs == "weights":
                weights = (e for b in candidates for e in self.checkpoint.block_weights(b))
                total += 2.0 * sum(entry.elements for entry in weights)
            elif one.needs == "removals":
                total += self._work_of_rounds(one)
            elif one.needs == "sets":
                from shortllm.pruning.search_space import search_flops

                total += search_flops(self, one)
        if not needs & {"streams", "last token", "logits", "gradients"}:
            return total
        decoder, (samples, length) = self.open_decoder(), self.samples().shape
        if "logits" in needs:
            removals = removals_of(decoder.block_count, kept, candidates)
            total += walk_flops(decoder, removals, samples, length)
        if "gradients" in needs:
            total += walk_back_flops(decoder, kept, samples, length)
        if not needs & {"logits", "gradients"}:
            removed = [frozenset(range(decoder.block_count)) - set(kept)]
            total += walk_flops(decoder, removed, samples, length, head=False)
        return total

    def _work_of_rounds(self, one: Asked) -> float:
        inner, free = one.inner(), one.free(self.checkpoint.info())
        assert inner is not None
        total = 0.0
        for done in range(one.rounds(self.checkpoint.info())):
            gone = set(free[:done])
            kept = [b for b in range(self.checkpoint.block_count) if b not in gone]
            total += self._work([inner], kept, free[done:])
        return total

    def samples(self) -> Tensor:
        """The calibration ids `[B, T]`."""
        assert self.ids_BT is not None, "text was not asked for"
        return self.ids_BT


def removals_of(
    blocks: int, kept: Sequence[int], candidates: Iterable[int]
) -> list[frozenset[int]]:
    """The model of the blocks `kept`, and each model that lacks one candidate more."""
    gone = frozenset(range(blocks)) - set(kept)
    return [gone, *(gone | {b} for b in candidates)]


def _of_means(one: Asked, means: list[float], candidates: Sequence[int], count: int) -> Scores:
    """Scores from the mean of the intact model and those without each candidate."""
    intact, *without = means
    report = perplexity if one.criterion.in_nats else float
    values = spread_out([report(mean) for mean in without], candidates, count)
    change = spread_out([mean - intact for mean in without], candidates, count)
    return Scores(
        importance=values,
        values=values,
        intact=report(intact),
        delta_nll=change if one.criterion.in_nats else None,
    )


WATCHED: tuple[criteria.Needs, ...] = ("streams", "last token")
"""What is seen when the samples go through the blocks once, in whatever pass."""


class Watch(Protocol):
    """An observer of a pass that turns what it saw into scores."""

    asked: Asked
    state: dict[str, Tensor]

    def __call__(self, b: int, before_BTD: Tensor, after_BTD: Tensor, rows: slice) -> None: ...

    def scores(self, kept: Sequence[int], ranks: Ranks) -> Scores:
        """Scores of the blocks `kept`, from what all processes saw."""


class TokenMeans:
    """The mean over tokens of a number per token, for each block."""

    def __init__(self, asked: Asked, blocks: int) -> None:
        import torch

        self.asked = asked
        self._sums = torch.zeros(blocks, 2, dtype=torch.float64)
        """Sum and count of each block."""
        self.state = {asked.name: self._sums}

    def __call__(self, b: int, before_BTD: Tensor, after_BTD: Tensor, rows: slice) -> None:
        values_BT = self.asked.call(before_BTD.flatten(2), after_BTD.flatten(2))
        self._sums[b, 0] += values_BT.double().sum().item()
        self._sums[b, 1] += values_BT.numel()

    def scores(self, kept: Sequence[int], ranks: Ranks) -> Scores:
        """Means over all tokens of all processes."""
        ranks.add_up([self._sums])
        return plain_scores(
            [total / count if count else 0.0 for total, count in self._sums.tolist()]
        )


class LastTokens:
    """The stream of each sample's last token before and after each block."""

    def __init__(self, asked: Asked, blocks: int, samples: int, width: int) -> None:
        import torch

        self.asked = asked
        self._before = torch.zeros(blocks, samples, width)
        self._after = torch.zeros(samples, width)
        self.state = {f"{asked.name}-before": self._before, f"{asked.name}-after": self._after}

    def __call__(self, b: int, before_BTD: Tensor, after_BTD: Tensor, rows: slice) -> None:
        self._before[b, rows] = before_BTD[:, -1].flatten(1).to(self._before)
        self._after[rows] = after_BTD[:, -1].flatten(1).to(self._after)

    def scores(self, kept: Sequence[int], ranks: Ranks) -> Scores:
        """The criterion's scores of all samples of all processes."""
        import torch

        depths = torch.cat([self._before[list(kept)], self._after[None]])
        found: Scores = self.asked.call(torch.cat(ranks.gather(depths), dim=1))
        blocks = len(self._before)
        if len(kept) == blocks:
            return found
        return plain_scores(spread_out(found.importance, kept, blocks))


def plain_scores(values: list[float]) -> Scores:
    """Scores whose importance is the raw number itself."""
    return Scores(importance=values, values=values)


def spread_out(values: Sequence[float], blocks: Sequence[int], count: int) -> list[float]:
    """Numbers of some blocks as a list with one of every block."""
    spread = [0.0] * count
    for b, value in zip(blocks, values, strict=True):
        spread[b] = value
    return spread
