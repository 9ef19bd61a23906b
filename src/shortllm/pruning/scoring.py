"""Scores by one or several criteria in as few passes over a model as possible.

    nothing, weights      no pass: weights are read from the files, one block at a time
    logits                one walk over all removals
    gradients             one forward and one backward pass
    choices               all removals in the same walks, on questions with their choices
    streams, last token,
    similarities          observers of either of these, else of one forward pass
    removals              one of the above per round

`Scorer` knows which passes are needed and runs them; the passes themselves are in model/. Searches
build on it (search_space.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from shortllm import criteria
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tensors import is_packed, read_tensor
from shortllm.criteria import OBSERVED, Criterion, Scores
from shortllm.errors import UnsupportedModelError
from shortllm.healing.options import HealOptions
from shortllm.journal import Journal
from shortllm.model.metrics import perplexity
from shortllm.progress import Advance
from shortllm.runtime import ALONE, Ranks

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.evaluation.choices import Items
    from shortllm.model.decoder import Decoder
    from shortllm.model.hidden_states import StreamMemory
    from shortllm.model.walk import Healed


SAMPLE_DECIMALS, TOKEN_DECIMALS = 6, 9
"""Of what is stored for each sample: of numbers in nats, and of those by the hidden states."""

MOST_TO_CHOOSE = 128
"""Samples that candidates are healed on, of those of all processes."""


@dataclass(kw_only=True)
class Scorer:
    """A model, samples, and the passes over them."""

    checkpoint: Checkpoint
    open_decoder: Callable[[], Decoder]
    """Called when a pass needs the model."""
    ids_BT: Tensor | None
    """This process's samples; None if no criterion needs text."""
    counted_BT: Tensor | None = None
    """Which of their tokens count; None: all."""
    healing_BT: Tensor | None = None
    """Its samples to heal with; None if no criterion measures healed models."""
    ranks: Ranks = ALONE
    memory: StreamMemory | None = None
    journal: Journal = field(default_factory=lambda: Journal(None, ""))
    advance: Advance = lambda work: None
    _healed: dict[Any, Healed] = field(default_factory=dict)
    _items: dict[Any, Items] = field(default_factory=dict)

    def score(self, resolved: Sequence[Criterion]) -> dict[str, Scores]:
        """Scores of all blocks by each criterion."""
        blocks = range(self.checkpoint.block_count)
        found = self._score(resolved, blocks, blocks, self.journal)
        for name, scores in found.items():
            criteria.require_finite(name, scores.importance)
        return found

    def _score(
        self,
        resolved: Sequence[Criterion],
        kept: Sequence[int],
        candidates: Sequence[int],
        journal: Journal,
        healed: Healed | None = None,
    ) -> dict[str, Scores]:
        """Scores of the blocks `candidates` in the model of the blocks `kept`; 0 for others."""
        found: dict[str, Scores] = {}
        for one in resolved:
            if one.needs == "nothing":
                found[one.name] = plain_scores(one.call(self.checkpoint.block_count))
            elif one.needs == "weights":
                found[one.name] = self._weights(one, candidates)
            elif one.needs == "choices":
                part = journal.part(one.name)
                found[one.name] = self._choices(one, kept, candidates, part, healed)
            elif one.needs == "removals":
                found[one.name] = self._removals(one, journal.part(one.name))
        observers = [self._observer(one, kept) for one in resolved if one.needs in OBSERVED]
        logits = [one for one in resolved if one.needs == "logits"]
        gradients = [one for one in resolved if one.needs == "gradients"]
        if logits:
            part = journal.part("logits")
            found |= self._logits(logits, kept, candidates, observers, part, healed)
        if gradients:
            seen = [] if logits else observers
            found |= self._gradients(gradients, kept, seen, journal.part("gradients"))
        if observers and not logits and not gradients:
            self._forward(kept, observers, journal.part("forward"))
        found |= {one.criterion.name: one.scores(kept, self.ranks) for one in observers}
        return {one.name: found[one.name] for one in resolved}

    def _weights(self, one: Criterion, candidates: Sequence[int]) -> Scores:
        """One block's weights in memory at a time, straight from the files."""
        values = [0.0] * self.checkpoint.block_count
        for b in candidates:
            entries = self.checkpoint.block_weights(b)
            weights = {entry.name: read_tensor(entry) for entry in entries}
            values[b] = one.call(self._with_a_row_per_output(weights))
            self.advance(2.0 * sum(entry.elements for entry in entries))
        return plain_scores(values)

    def _with_a_row_per_output(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a block, by names within it or in the files."""
        transposed = tuple(self.checkpoint.structure.transposed)
        return {
            name: weight.T if name.endswith(transposed) else weight
            for name, weight in weights.items()
        }

    def _observer(self, one: Criterion, kept: Sequence[int]) -> ScoringObserver:
        blocks = self.checkpoint.block_count
        text = Text(self.samples(), self.counted_BT)
        if one.needs == "streams":
            return TokenMeans(one, blocks, text)
        if one.needs == "similarities":
            return Similarities(one, self.open_decoder(), text, kept, self.memory)
        return LastTokens(one, blocks, text, self.open_decoder().stream_width)

    def _forward(
        self, kept: Sequence[int], observers: Sequence[ScoringObserver], journal: Journal
    ) -> None:
        from shortllm.model.walk import walk

        decoder = self.open_decoder()
        walk(
            decoder,
            self.samples(),
            removals_of(decoder.block_count, kept),
            observe=observers,
            advance=self.advance,
            memory=self.memory,
            journal=journal,
        )

    def _logits(
        self,
        resolved: Sequence[Criterion],
        kept: Sequence[int],
        candidates: Sequence[int],
        observers: Sequence[ScoringObserver],
        journal: Journal,
        healed: Healed | None,
    ) -> dict[str, Scores]:
        """The model of `kept` and each model with one more block removed, in one walk."""
        from shortllm.model.walk import UNHEALED, predictions_of, sample_means

        decoder = self.open_decoder()
        removals = removals_of(decoder.block_count, kept, candidates)
        own_VMB = sample_means(
            decoder,
            self.samples(),
            [*compared_with(resolved, removals), *removals],
            [one.call for one in resolved],
            counted_BT=self.counted_BT,
            observe=observers,
            healed=healed or UNHEALED,
            advance=self.advance,
            memory=self.memory,
            journal=journal,
        )
        all_VMB = self.ranks.in_order(own_VMB.permute(2, 0, 1)).permute(1, 2, 0)
        weight_B = self.ranks.in_order(predictions_of(self.samples(), self.counted_BT))
        found = {}
        for one, values_MB in zip(resolved, all_VMB, strict=True):
            values_MB = weighted(values_MB, weight_B)
            values_MB = values_MB[len(values_MB) - len(removals) :]
            intact, *without = (values_MB.sum(dim=1) / values_MB.shape[1]).tolist()
            in_nats, count = one.in_nats, decoder.block_count
            report = perplexity if in_nats else float
            values = spread_out([report(mean) for mean in without], candidates, count)
            change = spread_out([mean - intact for mean in without], candidates, count)
            of_all = len(candidates) == count
            errors = standard_errors(values_MB[1:]) if of_all else None
            if errors is not None and in_nats:
                errors = [value * error for value, error in zip(values, errors, strict=True)]
            found[one.name] = Scores(
                importance=values,
                values=values,
                intact=report(intact),
                delta_nll=change if in_nats else None,
                samples=rounded(values_MB[1:], SAMPLE_DECIMALS) if of_all else None,
                stderr=errors,
                delta_stderr=(
                    standard_errors(values_MB[1:] - values_MB[0]) if of_all and in_nats else None
                ),
            )
        return found

    def items(self, one: Criterion) -> Items:
        """The multiple-choice items that a criterion asks."""
        from shortllm.evaluation.choices import load_items

        assert one.items is not None, "it asks nothing"
        if one.items not in self._items:
            self._items[one.items] = load_items(self.checkpoint, *one.items)
        return self._items[one.items]

    def answers(
        self,
        asked: Items,
        removals: Sequence[Collection[int]],
        journal: Journal,
        healed: Healed | None = None,
        *,
        stop: int | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each shortened model whether it answers each item correctly, and the margins; of the
        first `stop` items."""
        import torch

        from shortllm.model.walk import UNHEALED, predictions_of, sample_means, target_nll

        decoder, ranks = self.open_decoder(), self.ranks
        own = asked.share(ranks.rank, ranks.count, stop)
        logprobs_MR = torch.zeros(len(removals), len(own.rows), dtype=torch.float64)
        for n, (rows, ids_RT, counted_RT) in enumerate(own.batches(decoder.streamed)):
            [nll_MR] = sample_means(
                decoder, ids_RT, removals, [target_nll], counted_BT=counted_RT,
                healed=healed or UNHEALED, advance=self.advance, memory=self.memory,
                journal=journal.part(f"rows-{n}"),
            )  # fmt: skip
            count_R = predictions_of(ids_RT, counted_RT)
            logprobs_MR[:, rows] = (-nll_MR * count_R).where(count_R > 0, 0.0)
        found = []
        for logprob_R in logprobs_MR.tolist():
            right_I, margin_I = own.answered(logprob_R)
            found.append((ranks.in_order(right_I), ranks.in_order(margin_I)))
        return found

    def _choices(
        self,
        one: Criterion,
        kept: Sequence[int],
        candidates: Sequence[int],
        journal: Journal,
        healed: Healed | None,
    ) -> Scores:
        """The items answered by the model of `kept` and each model with one more block removed."""
        import torch

        count = self.checkpoint.block_count
        removals = removals_of(count, kept, candidates)
        (intact_I, _), *without = self.answers(self.items(one), removals, journal, healed)
        values_MI = torch.stack([one.call(*answers, intact_I) for answers in without])
        right = [right_I.mean().item() for right_I, _ in without]
        of_all = len(candidates) == count
        return Scores(
            importance=spread_out(values_MI.mean(dim=1).tolist(), candidates, count),
            values=spread_out(right, candidates, count),
            intact=intact_I.mean().item(),
            samples=rounded(values_MI, SAMPLE_DECIMALS) if of_all else None,
            stderr=standard_errors(values_MI) if of_all else None,
        )

    def _gradients(
        self,
        resolved: Sequence[Criterion],
        kept: Sequence[int],
        observers: Sequence[ScoringObserver],
        journal: Journal,
    ) -> dict[str, Scores]:
        from shortllm.model.backward import walk_back

        decoder = self.open_decoder()
        values = {one.name: [0.0] * decoder.block_count for one in resolved}

        def receive(b: int, products: dict[str, Tensor]) -> None:
            products = self._with_a_row_per_output(products)
            for one in resolved:
                values[one.name][b] = one.call(products)

        walk_back(
            decoder,
            self.samples(),
            list(kept),
            receive,
            ranks=self.ranks,
            counted_BT=self.counted_BT,
            observe=observers,
            advance=self.advance,
            memory=self.memory,
            journal=journal,
            results=values,
        )
        return {name: plain_scores(found) for name, found in values.items()}

    def _removals(self, one: Criterion, journal: Journal) -> Scores:
        """Rounds of an inner criterion; each finished round is in the journal."""
        inner = one.scored_by()
        blocks, model = self.checkpoint.block_count, self.checkpoint.info()
        healed = self.healed(one.healing, one.free(model), one.rounds(model))
        rounds: list[dict[str, float]] = (journal.position() or {"rounds": []})["rounds"]
        taken = 0

        def rescore(removed: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
            nonlocal taken
            if taken == len(rounds):
                kept = [b for b in range(blocks) if b not in set(removed)]
                part = journal.part(f"round-{taken}")
                found = self._score([inner], kept, candidates, part, healed)[inner.name].importance
                criteria.require_finite(inner.name, [found[b] for b in candidates])
                part.discard()
                rounds.append({str(b): found[b] for b in candidates})
                journal.commit({"rounds": rounds}, {})
            taken += 1
            return {int(b): value for b, value in rounds[taken - 1].items()}

        scores: Scores = one.call(rescore, one.free(model), blocks)
        return scores

    def healed(self, method: str | None, free: Collection[int], longest: int) -> Healed | None:
        """Weights for the gaps that removals of up to `longest` of the blocks `free` make."""
        if method is None:
            return None
        from shortllm.healing.every_gap import folds_of_every_gap

        key = (method, frozenset(free), longest)
        if key not in self._healed:
            assert self.healing_BT is not None, "no text to heal with"
            self._healed[key] = folds_of_every_gap(
                self.open_decoder(), self.checkpoint, self.healing_BT, HealOptions(method=method),
                key[1], longest, ranks=self.ranks, memory=self.memory, advance=self.advance,
            )  # fmt: skip
        return self._healed[key]

    def healing_work(self, method: str | None, free: Collection[int], longest: int) -> float:
        """Floating-point operations of `healed`, about."""
        if method is None or self.healing_BT is None:
            return 0.0
        from shortllm.healing.every_gap import work_of_every_gap

        return work_of_every_gap(self.open_decoder(), self.healing_BT.shape, free, longest)

    def healing_held_out(self) -> Tensor:
        """This process's samples of the text to heal with that choose the ridge, and are not
        fitted."""
        assert self.healing_BT is not None, "no text to heal with"
        held_out = self.ranks.share_of_last_quarter(len(self.healing_BT))
        return self.healing_BT[len(self.healing_BT) - held_out :]

    def over_texts(self, texts: Sequence[Text], means: Sequence[Sequence[float]]) -> list[float]:
        """The means of some models over all predictions of some texts, from those of each text."""
        from shortllm.model.walk import predictions_of

        predictions = [self.ranks.total(predictions_of(*one).sum().item()) for one in texts]
        shares = [count / sum(predictions) for count in predictions]
        return [
            sum(share * mean for share, mean in zip(shares, of_model, strict=True))
            for of_model in zip(*means, strict=True)
        ]

    def healed_nll(self, method: str, removed: Collection[int], texts: Sequence[Text]) -> float:
        """Mean NLL of a model that is healed gap after gap, as `heal` does it, nats per token; but
        only the block before each gap is changed, which is faster."""
        from shortllm.healing.methods import METHODS, Task
        from shortllm.model.hidden_states import StreamMemory
        from shortllm.model.walk import mean_losses

        assert self.healing_BT is not None, "no text to heal with"
        decoder, memory = self.open_decoder(), self.memory or StreamMemory()
        one_block = {"before": 1} if "before" in METHODS.get(method).options else {}
        healed = METHODS.get(method).function(
            Task(
                decoder=decoder,
                checkpoint=self.checkpoint,
                removed=sorted(removed),
                ids_BT=self.healing_BT,
                held_out=len(self.healing_held_out()),
                ranks=self.ranks,
                options=HealOptions(method=method, **one_block),
                memory=memory,
            )
        )
        with healed.applied(decoder):
            means = [
                mean_losses(
                    decoder, one.ids_BT, [frozenset(removed)], counted_BT=one.counted_BT,
                    ranks=self.ranks, memory=memory,
                )
                for one in texts
            ]  # fmt: skip
        [found] = self.over_texts(texts, means)
        return found

    def work(self, resolved: Sequence[Criterion], *, head: bool = True) -> float:
        """Floating-point operations of `score`, the total of what `advance` is told.

        A criterion that removes blocks is counted as if the first ones went. Without `head`: those
        of the blocks alone.
        """
        blocks = range(self.checkpoint.block_count)
        return self._work(resolved, blocks, blocks, head)

    def _work(
        self,
        resolved: Sequence[Criterion],
        kept: Sequence[int],
        candidates: Sequence[int],
        head: bool,
    ) -> float:
        from shortllm.model.backward import walk_back_flops
        from shortllm.model.walk import walk_flops

        total, needs = 0.0, {one.needs for one in resolved}
        for one in resolved:
            if one.needs == "choices":
                decoder = self.open_decoder()
                removals = removals_of(decoder.block_count, kept, candidates)
                own = self.items(one).share(self.ranks.rank, self.ranks.count)
                total += sum(
                    walk_flops(decoder, removals, *ids_RT.shape, head=head)
                    for _, ids_RT, _ in own.batches(decoder.streamed)
                )
            elif one.needs == "weights":
                weights = (e for b in candidates for e in self.checkpoint.block_weights(b))
                total += 2.0 * sum(entry.elements for entry in weights)
            elif one.needs == "removals":
                free, rounds = one.free(self.checkpoint.info()), one.rounds(self.checkpoint.info())
                total += self.healing_work(one.healing, free, rounds)
                for done in range(rounds):
                    left = [b for b in kept if b not in free[:done]]
                    total += self._work([one.scored_by()], left, free[done:], head)
        if not needs & {*OBSERVED, "logits", "gradients"}:
            return total
        decoder, (samples, length) = self.open_decoder(), self.samples().shape
        if "logits" in needs:
            removals = removals_of(decoder.block_count, kept, candidates)
            removals = [*compared_with(resolved, removals), *removals]
            total += walk_flops(decoder, removals, samples, length, head=head)
        if "gradients" in needs:
            total += walk_back_flops(decoder, kept, samples, length, head=head)
        if not needs & {"logits", "gradients"}:
            removals = removals_of(decoder.block_count, kept)
            total += walk_flops(decoder, removals, samples, length, head=False)
        return total

    def samples(self) -> Tensor:
        """The calibration ids `[B, T]`."""
        assert self.ids_BT is not None, "no criterion needs text"
        return self.ids_BT


def removals_of(
    blocks: int, kept: Sequence[int], candidates: Iterable[int] = ()
) -> list[frozenset[int]]:
    """The model of the blocks `kept`, and each model without one more of the candidates."""
    gone = frozenset(range(blocks)) - set(kept)
    return [gone, *(gone | {b} for b in candidates)]


def compared_with(
    resolved: Sequence[Criterion], removals: Sequence[frozenset[int]]
) -> list[frozenset[int]]:
    """The intact model, if a criterion compares predictions with its and it is not the first."""
    compares = any(one.compares for one in resolved)
    return [frozenset()] if removals[0] and compares else []


class Text(NamedTuple):
    """Samples of one process, and which of their tokens count; None: all."""

    ids_BT: Tensor
    counted_BT: Tensor | None

    def tokens(self) -> Tensor:
        """How many tokens of each sample count, `[B]`, float64."""
        if self.counted_BT is not None:
            return self.counted_BT.sum(dim=1).double().cpu()
        return self.ids_BT.new_full((len(self.ids_BT),), self.ids_BT.shape[1]).double().cpu()

    def counting(self, values_BT: Tensor, rows: slice) -> Tensor:
        """Numbers of the tokens of some samples, 0 for those that do not count."""
        if self.counted_BT is None:
            return values_BT
        return values_BT.where(self.counted_BT[rows].to(values_BT.device), 0.0)


class TokenMeans:
    """The mean over tokens of a number per token, for each block."""

    def __init__(self, criterion: Criterion, blocks: int, text: Text) -> None:
        import torch

        self.criterion = criterion
        self._text = text
        self._sums = torch.zeros(blocks, 2, dtype=torch.float64)
        """Sum and count of each block."""
        self._of_samples = torch.zeros(len(text.ids_BT), blocks, dtype=torch.float64)
        """Sum of each sample and block."""
        self.state = {criterion.name: self._sums, f"{criterion.name}-samples": self._of_samples}

    def __call__(self, b: int, before_BTD: Tensor, after_BTD: Tensor, rows: slice) -> None:
        values_BT = self.criterion.call(before_BTD.flatten(2), after_BTD.flatten(2))
        values_BT = self._text.counting(values_BT.double(), rows)
        self._sums[b, 0] += values_BT.sum().item()
        self._sums[b, 1] += self._text.tokens()[rows].sum().item()
        self._of_samples[rows, b] = values_BT.sum(dim=1).cpu()

    def scores(self, kept: Sequence[int], ranks: Ranks) -> Scores:
        """Means over all tokens of all processes."""
        ranks.add_up([self._sums])
        found = plain_scores(
            [total / count if count else 0.0 for total, count in self._sums.tolist()]
        )
        weight_B, sums_BL = ranks.in_order(self._text.tokens()), ranks.in_order(self._of_samples)
        if len(kept) < len(self._sums):
            return found
        values_LB = weighted((sums_BL / weight_B[:, None]).T, weight_B)
        return replace(
            found, samples=rounded(values_LB, TOKEN_DECIMALS), stderr=standard_errors(values_LB)
        )


class LastTokens:
    """The stream of each sample's last token that counts, before and after each block."""

    def __init__(self, criterion: Criterion, blocks: int, text: Text, width: int) -> None:
        import torch

        samples, length = text.ids_BT.shape
        self.criterion = criterion
        self._last_B = torch.full((samples,), length - 1)
        if text.counted_BT is not None:
            places_BT = torch.arange(length).where(text.counted_BT.cpu(), 0)
            self._last_B = places_BT.max(dim=1).values
        self._before = torch.zeros(blocks, samples, width)
        self._after = torch.zeros(samples, width)
        self.state = {
            f"{criterion.name}-before": self._before,
            f"{criterion.name}-after": self._after,
        }

    def __call__(self, b: int, before_BTD: Tensor, after_BTD: Tensor, rows: slice) -> None:
        last = range(len(before_BTD)), self._last_B[rows]
        self._before[b, rows] = before_BTD[last].flatten(1).to(self._before)
        self._after[rows] = after_BTD[last].flatten(1).to(self._after)

    def scores(self, kept: Sequence[int], ranks: Ranks) -> Scores:
        """The criterion's scores of all samples of all processes."""
        import torch

        depths = torch.cat([self._before[list(kept)], self._after[None]])
        found: Scores = self.criterion.call(ranks.in_order(depths.transpose(0, 1)).transpose(0, 1))
        if found.samples is not None:
            found = replace(found, stderr=standard_errors(torch.tensor(found.samples).double()))
        return _of_all(found, kept, len(self._before))


class Similarities:
    """The mean cosine of the streams entering each pair of blocks."""

    def __init__(
        self,
        criterion: Criterion,
        decoder: Decoder,
        text: Text,
        kept: Sequence[int],
        memory: StreamMemory | None,
    ) -> None:
        import torch

        from shortllm.model.hidden_states import StreamMemory, group_size

        ids_BT = text.ids_BT
        self.criterion = criterion
        self._text = text
        self._blocks, self._kept = decoder.block_count, kept
        self._tokens = text.tokens().sum().item()
        self._device = decoder.device
        # blocks that are read from files take all samples before the next one
        self._together = len(ids_BT) if decoder.streamed else group_size(decoder, ids_BT.shape[1])
        shape = (len(kept), min(self._together, len(ids_BT)), ids_BT.shape[1], decoder.stream_width)
        memory = memory or StreamMemory()
        self._inputs = memory.allocate(shape, decoder.stream_dtype, decoder.device)
        self._sums = torch.zeros(len(kept), len(kept), dtype=torch.float64)
        self.state = {
            f"{criterion.name}-inputs": self._inputs,
            f"{criterion.name}-sums": self._sums,
        }

    def __call__(self, b: int, before_BTD: Tensor, after_BTD: Tensor, rows: slice) -> None:
        from shortllm.model.metrics import cosine

        i, start = self._kept.index(b), rows.start % self._together
        place, before_BTD = slice(start, start + len(before_BTD)), before_BTD.flatten(2)
        self._inputs[i, place] = before_BTD.to(self._inputs)
        for j in range(i + 1):
            other_BTD = self._inputs[j, place].to(self._device)
            alike_BT = self._text.counting(cosine(other_BTD, before_BTD).double(), rows)
            self._sums[j, i] += alike_BT.sum().item()

    def scores(self, kept: Sequence[int], ranks: Ranks) -> Scores:
        """The criterion's scores by the means over all tokens of all processes."""
        ranks.add_up([self._sums])
        upper = self._sums / ranks.total(self._tokens)
        found: Scores = self.criterion.call(upper + upper.triu(1).T)
        return _of_all(found, kept, self._blocks)


ScoringObserver = TokenMeans | LastTokens | Similarities
"""Observes the streams of a pass, and turns what it saw into scores."""


def weighted(values_MB: Tensor, weight_B: Tensor) -> Tensor:
    """Means of samples, changed so that their plain mean and its standard error are those of the
    mean in which the samples weigh `weight_B`; unchanged where all weigh the same.

    The residuals are scaled: those of the ratio estimator, sum(w x) / sum(w).
    """
    if bool((weight_B == weight_B[0]).all()):
        return values_MB
    mean_M1 = (values_MB * weight_B).sum(dim=1, keepdim=True) / weight_B.sum()
    return mean_M1 + (values_MB - mean_M1) * (weight_B / weight_B.mean())


def standard_errors(values_MB: Tensor) -> list[float] | None:
    """Of the mean over samples, for each row; None for a single sample."""
    samples = values_MB.shape[1]
    if samples < 2:
        return None
    found: list[float] = (values_MB.std(dim=1) / math.sqrt(samples)).tolist()
    return found if all(map(math.isfinite, found)) else None


def rounded(values_MB: Tensor, decimals: int) -> list[list[float]]:
    """What is stored of the numbers of samples."""
    return [[round(one, decimals) for one in values] for values in values_MB.tolist()]


def plain_scores(values: list[float]) -> Scores:
    """Scores whose importance is the raw number itself."""
    return Scores(importance=values, values=values)


def _of_all(found: Scores, kept: Sequence[int], count: int) -> Scores:
    """Scores of the blocks `kept` as those of all."""
    if len(kept) == count:
        return found
    return plain_scores(spread_out(found.importance, kept, count))


def spread_out(values: Sequence[float], blocks: Sequence[int], count: int) -> list[float]:
    """Numbers of some blocks as a list with one of every block."""
    spread = [0.0] * count
    for b, value in zip(blocks, values, strict=True):
        spread[b] = value
    return spread


def require_plain_weights(checkpoint: Checkpoint, resolved: Sequence[Criterion]) -> None:
    """Refuse to score packed integers as weights, or by gradients of quantized ones."""
    if not is_packed(checkpoint.raw_config):
        return
    for one in resolved:
        if one.scored_by().needs in ("weights", "gradients"):
            others = ", ".join(criteria.names_by_need("logits", *OBSERVED))
            raise UnsupportedModelError(
                f"{one.name} looks at weights, and {checkpoint.id} is quantized. Score the "
                f"unquantized model, or use one of {others}"
            )
