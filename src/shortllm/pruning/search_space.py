"""Scores by all kinds of criteria, and what searches run on: sets, measured on part of the samples.

Every list of sets that a search measures goes through the model in one walk, in which sets that
begin alike share their block passes. Each finished list is in the journal, from which an
interrupted search resumes: it decides by these numbers alone. Each of several processes has its
share of every part of the samples, and all see the same sums.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from shortllm.criteria import Criterion, Scores, names_in, resolve
from shortllm.criteria.search import (
    AnyFitness,
    Blocks,
    CandidateSet,
    Choice,
    NotTried,
    Proposal,
    Search,
    held_out_by,
)
from shortllm.errors import BudgetError, CriterionError
from shortllm.journal import Journal
from shortllm.model.metrics import perplexity
from shortllm.pruning.budget import Budget, most_blocks, removable, removal_options
from shortllm.pruning.planning import build_plan
from shortllm.pruning.records import BlockScores
from shortllm.pruning.scoring import Scorer, Text
from shortllm.records import ModelInfo

if TYPE_CHECKING:
    from shortllm.model.walk import Healed


def score_all(scorer: Scorer, resolved: Sequence[Criterion]) -> dict[str, Scores]:
    """Scores of all blocks by each criterion, searches included."""
    found = {
        one.name: one.call(BlockSearch(scorer, one, scorer.journal.part(one.name)))
        for one in resolved
        if one.needs == "sets"
    }
    found |= scorer.score([one for one in resolved if one.needs != "sets"])
    return {one.name: found[one.name] for one in resolved}


def work_of_all(scorer: Scorer, resolved: Sequence[Criterion]) -> float:
    """Floating-point operations of `score_all`; those of a search as its method estimates them."""
    searches = sum(_search_work(scorer, one) for one in resolved if one.needs == "sets")
    return searches + scorer.work([one for one in resolved if one.needs != "sets"])


def _search_work(scorer: Scorer, searching: Criterion) -> float:
    from shortllm.model.walk import walk_flops

    options, model = searching.options, scorer.checkpoint.info()
    budget = budget_of(searching, model)
    named = [resolve(name) for name in names_in(options.get("candidates") or options["start"])]
    shots = [_fitted(one, budget, model) for one in named if one.needs != "sets"]
    units = removable(budget, model)
    gone = [block for unit in units for block in unit][: budget.remove]
    kept = sum(map(len, units)) - len(gone)
    methods = [one.search for one in (searching, *named)]
    measured = sum(one.measurements(options, len(gone), kept) for one in methods if one is not None)
    if options.get("evaluations") is not None:
        measured = min(measured, float(options["evaluations"]))
    decoder, (samples, length) = scorer.open_decoder(), scorer.samples().shape
    each = walk_flops(decoder, [frozenset(gone)], samples, length)
    free = [block for unit in units for block in unit]
    healing = scorer.healing_work(searching.healing, free, budget.remove or len(free))
    searched: float = scorer.work(shots) + (measured + len(shots)) * each
    return healing + (1.0 - float(options["held_out"])) * searched


FULLY_HEALED = 3
"""Best sets of a heal-aware search that are also healed as `heal` does it."""


class BlockSearch:
    """The space of sets of a criterion that searches; see `criteria.search.SearchSpace`."""

    def __init__(self, scorer: Scorer, searching: Criterion, journal: Journal) -> None:
        self._scorer = scorer
        self._searching = searching
        self._options = searching.options
        self._fitness: AnyFitness = searching.options.get("fitness", "ppl")
        self._journal = journal
        self._model = scorer.checkpoint.info()
        self._budget = budget_of(searching, self._model)
        self.blocks = self._model.blocks
        self.units = [tuple(unit) for unit in removable(self._budget, self._model)]
        self._total = int(scorer.ranks.total(float(len(scorer.samples()))))
        self._searched = self._total - self._held_out()
        self._evaluations = 0.0
        self._at_start = 0.0
        """Evaluations of the starts, which the limit does not count."""
        self._known: dict[tuple[Blocks, int], float] = {}
        self._left_out: list[NotTried] = []
        self._decided_on = 0
        """Samples that decide between candidates, of all processes."""
        self._began = time.monotonic()
        self._entries = self._finished()
        self._taken = 0
        self._seconds = 0.0

    def _held_out(self) -> int:
        """How many samples the search does not see: the last ones."""
        name, options, count = self._searching.name, self._options, self._scorer.ranks.count
        held_out: int = round(options["held_out"] * self._total)
        if "candidates" in options:
            held_out = max(1, held_out)
        if self._total - held_out < count:
            raise CriterionError(
                f"'{name}' keeps {held_out} of {self._total} calibration samples for the choice, "
                f"and {self._total - held_out} to search on in {count} "
                f"process{'' if count == 1 else 'es'}. Give more --samples, or a smaller "
                f"{name}.held_out"
            )
        return held_out

    def _finished(self) -> list[dict[str, Any]]:
        """The measurements of an interrupted search that all processes have."""
        entries: list[dict[str, Any]] = (self._journal.position() or {"entries": []})["entries"]
        return entries[: int(min(self._of_all(len(entries))))]

    def _of_all(self, value: float) -> list[float]:
        """A number of each process."""
        return self._scorer.ranks.gather(value)

    def _part(self, start: int, stop: int) -> Text:
        """This process's share of the samples numbered from `start` to before `stop`."""
        ranks, counted_BT = self._scorer.ranks, self._scorer.counted_BT
        part = slice(*(len(range(ranks.rank, n, ranks.count)) for n in (start, stop)))
        ids_BT = self._scorer.samples()[part]
        return Text(ids_BT, None if counted_BT is None else counted_BT[part])

    def _count(self, part: float) -> int:
        """Samples in a part of those searched on, or items."""
        return max(1, math.ceil(part * self._size))

    @property
    def _size(self) -> int:
        """All samples that are searched on, or items."""
        if self._fitness == "task":
            return len(self._scorer.items(self._searching).items)
        return self._searched

    def share(self, part: float) -> float:
        """The samples of a part, as a share of those the search sees."""
        return self._count(part) / self._size

    def propose(self, names: Sequence[str]) -> list[Proposal]:
        """What each criterion removes."""
        entry = self._entry("propose", partial(self._scored, names))
        self._left_out = [NotTried(**one) for one in entry["left_out"]]
        if not entry["proposals"]:
            reason = self._left_out[0]
            raise CriterionError(
                f"'{self._searching.name}' has no plan to start from: {reason.criterion}: "
                f"{reason.reason}"
            )
        return [
            Proposal(**{**one, "removed": frozenset(one["removed"])}) for one in entry["proposals"]
        ]

    def _scored(self, names: Sequence[str], journal: Journal) -> dict[str, Any]:
        named = [resolve(name) for name in names]
        resolved = [
            _fitted(one, self._budget, self._model, self._searching.healing) for one in named
        ]
        text = self._part(0, self._searched)
        scorer = replace(self._scorer, **text._asdict(), journal=journal.part("scores"))
        proposals, left_out = [], []
        for name, found in scorer.score(resolved).items():
            scores = BlockScores(
                model=self._model, criterion=name, **asdict(found), dtype="", fingerprint=""
            )
            try:
                removed = build_plan(self._budget, model=self._model, scores=scores).removed
            except BudgetError as error:
                left_out.append({"criterion": name, "reason": str(error)})
                continue
            proposals.append(
                {"criterion": name, "removed": removed, "importance": found.importance}
            )
        return {"proposals": proposals, "left_out": left_out}

    def measure(self, sets: Sequence[Blocks], part: float = 1.0) -> list[float]:
        """Mean fitness of each set, nats; each is measured once."""
        count = self._count(part)
        new = sorted({s for s in sets if (s, count) not in self._known}, key=sorted)
        if new:
            if self._fitness == "task":
                work = partial(self._mistakes, new, count)
            else:
                work = partial(self._means, new, [self._part(0, count)], self._fitness)
            entry = self._entry("measure", work)
            for removed, value in zip(new, entry["values"], strict=True):
                self._known[removed, count] = value if math.isfinite(value) else math.inf
            self._evaluations += len(new) * count / self._size
            if not self._at_start:
                self._at_start = self._evaluations
        return [self._known[removed, count] for removed in sets]

    def choose(self, choice: Choice) -> Blocks:
        """The set that is chosen by the hidden states of the search text."""
        return frozenset(self._entry("choose", partial(self._chosen, choice))["removed"])

    def _chosen(self, choice: Choice, journal: Journal) -> dict[str, Any]:
        import torch

        from shortllm.model.hidden_states import SampleGroups

        scorer, text = self._scorer, self._part(0, self._searched)
        with torch.no_grad():
            groups = SampleGroups(
                scorer.open_decoder(), text.ids_BT, scorer.memory, counted_BT=text.counted_BT
            )
            return {"removed": sorted(choice(groups, scorer.ranks, scorer.advance))}

    def left(self) -> float:
        """Evaluations that are still allowed."""
        if self._is_late():
            return 0.0
        allowed = self._options.get("evaluations")
        if allowed is None:
            return math.inf
        return max(0.0, float(allowed) + self._at_start - self._evaluations)

    def _is_late(self) -> bool:
        return self._seconds >= 60 * (self._options.get("minutes") or math.inf)

    def spent(self) -> str:
        """The limit that was reached, for the record."""
        if self._is_late():
            return f"{self._options['minutes']:g} minutes"
        return f"{self._options['evaluations']} evaluations"

    def candidates(
        self, sets: Sequence[tuple[str, Blocks]], values: Sequence[float]
    ) -> list[CandidateSet]:
        """Sets with their values, measured on the held-out samples too."""
        held_out: dict[Blocks, float | None] = {}
        decided_by = held_out_by(self._fitness)
        if self._total > self._searched:
            distinct = sorted({removed for _, removed in sets}, key=sorted)
            texts = self._held_out_texts()
            entry = self._entry("held-out", partial(self._means, distinct, texts, decided_by))
            found = dict(zip(distinct, entry["values"], strict=True))
            if self._searching.healing is not None and decided_by == "ppl":
                best = sorted(distinct, key=lambda one: (found[one], sorted(one)))[:FULLY_HEALED]
                entry = self._entry("healed", partial(self._healed, best, texts))
                found |= dict(zip(best, entry["values"], strict=True))
            held_out = {one: _reported(decided_by, value) for one, value in found.items()}
        return [
            CandidateSet(
                criterion=name,
                removed=sorted(removed),
                value=_reported(self._fitness, value),
                held_out=held_out.get(removed),
            )
            for (name, removed), value in zip(sets, values, strict=True)
        ]

    def record(self, **found: Any) -> Search:
        """The result, with the search's own settings and counts."""
        return Search(
            fitness=self._fitness,
            evaluations=round(self._evaluations, 3),
            search_samples=self._searched,
            held_out_samples=self._decided_on,
            left_out=self._left_out,
            **found,
        )

    def _entry(self, name: str, work: Callable[[Journal], dict[str, Any]]) -> dict[str, Any]:
        """The next piece of work: from the journal, or done now and written there."""
        if self._taken == len(self._entries):
            part = self._journal.part(f"{name}-{self._taken}")
            done = work(part)
            # the slowest process's time, so that all stop at the same place
            seconds = max(self._of_all(time.monotonic() - self._began))
            before = self._entries[-1]["seconds"] if self._entries else 0.0
            self._entries.append({**done, "seconds": before + seconds})
            self._began = time.monotonic()
            self._journal.commit({"entries": self._entries}, {})
            part.discard()
        entry = self._entries[self._taken]
        self._taken += 1
        self._seconds = entry["seconds"]
        return entry

    def _held_out_texts(self) -> list[Text]:
        """This process's share of the samples that decide between candidates; of healed ones also
        the quarter of the text to heal with that is not fitted."""
        texts = [self._part(self._searched, self._total)]
        if self._searching.healing is not None:
            texts.append(Text(self._scorer.healing_held_out(), None))
        samples = sum(len(one.ids_BT) for one in texts)
        self._decided_on = int(self._scorer.ranks.total(float(samples)))
        return texts

    def _means(
        self,
        sets: Sequence[Blocks],
        texts: Sequence[Text],
        fitness: AnyFitness,
        journal: Journal,
    ) -> dict[str, Any]:
        """Means of a fitness without each set, over the samples of all processes."""
        from shortllm.model.walk import NOTHING, TOGETHER, UNHEALED, mean_losses

        scorer = self._scorer
        loss = self._searching.fitness() if fitness == self._fitness else resolve(fitness)
        healed = self._gap_weights()
        values = [
            mean_losses(
                scorer.open_decoder(), one.ids_BT, sets, value=loss.call,
                intact=None if fitness == "ppl" else NOTHING, counted_BT=one.counted_BT,
                together=TOGETHER, ranks=scorer.ranks, healed=healed or UNHEALED,
                advance=scorer.advance, memory=scorer.memory, journal=journal.part(f"text-{i}"),
            )
            for i, one in enumerate(texts)
        ]  # fmt: skip
        return {"values": scorer.over_texts(texts, values)}

    def _mistakes(self, sets: Sequence[Blocks], count: int, journal: Journal) -> dict[str, Any]:
        """Part of the first `count` items that models without each set answer wrongly."""
        from shortllm.criteria.task import mistakes

        asked = self._scorer.items(self._searching)
        found = self._scorer.answers(asked, sets, journal, self._gap_weights(), stop=count)
        return {"values": [mistakes(*one).mean().item() for one in found]}

    def _gap_weights(self) -> Healed | None:
        """What healing makes of the blocks before gaps, if models are measured after it."""
        free = [block for unit in self.units for block in unit]
        longest = self._budget.remove or len(free)
        return self._scorer.healed(self._searching.healing, free, longest)

    def _healed(
        self, sets: Sequence[Blocks], texts: Sequence[Text], journal: Journal
    ) -> dict[str, Any]:
        """Mean NLL without each set after its gaps were healed one after the other."""
        method = self._searching.healing
        assert method is not None
        return {"values": [self._scorer.healed_nll(method, one, texts) for one in sets]}


def _reported(fitness: AnyFitness, mean: float) -> float | None:
    """A mean as the number that is stored; None where it is not finite."""
    value = perplexity(mean) if fitness == "ppl" else mean
    return value if math.isfinite(value) else None


def budget_of(searching: Criterion, model: ModelInfo) -> Budget:
    """How many blocks a search removes, and which it may not remove."""
    names = ("remove", "protect_first", "protect_last", "period_aligned")
    given = {name: searching.options[name] for name in names}
    budget = Budget(ratio=0.25 if given["remove"] is None else None, **given)
    return budget.model_copy(update={"ratio": None, "remove": most_blocks(budget, model)})


def _fitted(
    one: Criterion, budget: Budget, model: ModelInfo, healing: str | None = None
) -> Criterion:
    """The criterion; one that removes blocks itself with the options by which it meets a budget."""
    healed = {"healing": healing} if "healing" in one.options else {}
    return resolve(one.name, {**removal_options(one, budget, model), **healed})
