"""What a search runs on: samples parted into those it sees and those kept apart, and walks.

Every list of sets that a search wants measured goes through the model in one walk, in which sets
that begin alike share their block passes. Each finished list is in the journal, so that an
interrupted search, which decides by these numbers alone, goes on where it was. Of several processes
each has its share of every part of the samples, and all see the same sums.

Shapes: B samples, T tokens each, V vocabulary, N predictions of one slice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shortllm.criteria.records import CandidateSet, NotTried, Search
from shortllm.criteria.search import Blocks, Proposal, names_in
from shortllm.criteria.selection import Asked
from shortllm.errors import BudgetError, CriterionError
from shortllm.journal import Journal
from shortllm.model.metrics import kl_divergence, next_token_nll, perplexity
from shortllm.pruning.budget import Budget, most_blocks, removable
from shortllm.pruning.planning import build_plan
from shortllm.pruning.records import BlockScores
from shortllm.pruning.scoring import Scorer

if TYPE_CHECKING:
    from torch import Tensor


TOGETHER = 128
"""Sets measured in one walk at the most: each has a stream of its own at the end."""

QUARTER = 0.25
"""Part of the blocks that goes where no number is asked for."""


class BlockSearch:
    """The space of sets of a criterion that searches; see `criteria.search.SearchSpace`."""

    def __init__(self, scorer: Scorer, asked: Asked, journal: Journal) -> None:
        self._scorer = scorer
        self._asked = asked
        self._journal = journal
        self._model = scorer.checkpoint.info()
        self._budget = budget_of(asked, scorer)
        self.blocks = self._model.blocks
        self.units = [tuple(unit) for unit in removable(self._budget, self._model)]
        self._total = int(scorer.ranks.total(float(len(scorer.samples()))))
        self._searched = self._total - self._kept_apart()
        self._evaluations = 0.0
        self._at_start = 0.0
        """Evaluations that the starts took, which the budget does not count."""
        self._known: dict[tuple[Blocks, int], float] = {}
        self._left_out: list[NotTried] = []
        self._began = time.monotonic()
        self._entries = self._finished()
        self._taken = 0
        self._seconds = 0.0

    def _kept_apart(self) -> int:
        """How many samples the search does not see: the last ones.

        Raises:
            CriterionError: too few are left for every process to search on one.
        """
        asked, count = self._asked, self._scorer.ranks.count
        kept: int = round(asked.options["held_out"] * self._total)
        if "candidates" in asked.options:
            kept = max(1, kept)
        if self._total - kept < count:
            raise CriterionError(
                f"'{asked.name}' keeps {kept} of {self._total} calibration samples apart, which "
                f"leaves {self._total - kept} to search on in {count} "
                f"process{'' if count == 1 else 'es'}. Ask for more --samples, or a smaller "
                f"{asked.name}.held_out"
            )
        return kept

    def _finished(self) -> list[dict[str, Any]]:
        """What an interrupted search has measured, as far as all processes have it."""
        import torch

        entries: list[dict[str, Any]] = (self._journal.position() or {"entries": []})["entries"]
        ranks = self._scorer.ranks
        counts = [int(found.item()) for found in ranks.gather(torch.tensor(len(entries)))]
        return entries[: min(counts)]

    def _part(self, start: int, stop: int) -> Tensor:
        """This process's share of the samples numbered from `start` to before `stop`."""
        ranks = self._scorer.ranks
        first, behind = (len(range(ranks.rank, n, ranks.count)) for n in (start, stop))
        return self._scorer.samples()[first:behind]

    def _count(self, part: float) -> int:
        """Samples in a part of those searched on."""
        return max(1, math.ceil(part * self._searched))

    def share(self, part: float) -> float:
        """The samples of a part, as a share of those the search sees."""
        return self._count(part) / self._searched

    def propose(self, names: Sequence[str]) -> list[Proposal]:
        """What each criterion would remove.

        Raises:
            CriterionError: none of them can meet the budget.
        """
        entry = self._entry("propose", lambda journal: self._scored(names, journal))
        self._left_out = [NotTried(**one) for one in entry["left_out"]]
        if not entry["proposals"]:
            reason = self._left_out[0]
            raise CriterionError(
                f"'{self._asked.name}' has no plan to start from: {reason.criterion}: "
                f"{reason.reason}"
            )
        return [
            Proposal(
                criterion=one["criterion"],
                removed=frozenset(one["removed"]),
                importance=one["importance"],
            )
            for one in entry["proposals"]
        ]

    def _scored(self, names: Sequence[str], journal: Journal) -> dict[str, Any]:
        asked = []
        for name in names:
            plain = Asked.of(name)
            asked.append(Asked.of(name, plain.amount(self._budget, self._model)))
        scorer = replace(
            self._scorer, ids_BT=self._part(0, self._searched), journal=journal.part("scores")
        )
        proposals, left_out = [], []
        for name, found in scorer.score(asked).items():
            scores = BlockScores(
                model=self._model,
                criterion=name,
                importance=found.importance,
                values=found.values,
                spans=found.spans,
                order=found.order,
                dtype="",
                fingerprint="",
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
        """Mean fitness of each set, nats; those measured before are remembered."""
        count = self._count(part)
        new = sorted({s for s in sets if (s, count) not in self._known}, key=sorted)
        if new:
            ids_BT = self._part(0, count)
            kl = self._asked.options["fitness"] == "kl"
            entry = self._entry(
                "measure",
                lambda journal: {"values": self._means(new, ids_BT, count, kl, journal)},
            )
            for removed, value in zip(new, entry["values"], strict=True):
                self._known[removed, count] = value if math.isfinite(value) else math.inf
            self._evaluations += len(new) * count / self._searched
            if not self._at_start:
                self._at_start = self._evaluations
        return [self._known[removed, count] for removed in sets]

    def left(self) -> float:
        """Evaluations that may still be spent."""
        minutes = self._asked.options["minutes"]
        if minutes is not None and self._seconds >= 60 * minutes:
            return 0.0
        allowed = self._asked.options["evaluations"]
        if allowed is None:
            return math.inf
        return max(0.0, float(allowed) + self._at_start - self._evaluations)

    def spent(self) -> str:
        """What ran out, for the record."""
        minutes = self._asked.options["minutes"]
        if minutes is not None and self._seconds >= 60 * minutes:
            return f"{minutes:g} minutes"
        return f"{self._asked.options['evaluations']} evaluations"

    def candidates(
        self, sets: Sequence[tuple[str, Blocks]], values: Sequence[float]
    ) -> list[CandidateSet]:
        """Sets with their values, measured on the held-out samples too."""
        held_out: dict[Blocks, float | None] = {}
        count = self._total - self._searched
        if count:
            distinct = sorted({removed for _, removed in sets}, key=sorted)
            ids_BT = self._part(self._searched, self._total)
            entry = self._entry(
                "held-out",
                lambda journal: {"values": self._means(distinct, ids_BT, count, False, journal)},
            )
            held_out = {
                removed: _finite(perplexity(value))
                for removed, value in zip(distinct, entry["values"], strict=True)
            }
        return [
            CandidateSet(
                criterion=name,
                removed=sorted(removed),
                value=self._shown(value),
                held_out=held_out.get(removed),
            )
            for (name, removed), value in zip(sets, values, strict=True)
        ]

    def record(self, **found: Any) -> Search:
        """What was found, with what the search knows of itself."""
        return Search(
            fitness=self._asked.options["fitness"],
            evaluations=round(self._evaluations, 3),
            search_samples=self._searched,
            held_out_samples=self._total - self._searched,
            left_out=self._left_out,
            **found,
        )

    def _shown(self, value: float) -> float | None:
        """A mean fitness as it is reported."""
        return _finite(perplexity(value) if self._asked.options["fitness"] == "ppl" else value)

    def _entry(self, name: str, work: Any) -> dict[str, Any]:
        """The next piece of work: from the journal, or done now and written there."""
        if self._taken == len(self._entries):
            part = self._journal.part(f"{name}-{self._taken}")
            done = work(part)
            spent = time.monotonic() - self._began
            # the slowest process's time, so that all stop at the same place
            seconds = max(
                float(found.item()) for found in self._scorer.ranks.gather(_number(spent))
            )
            self._entries.append({**done, "seconds": self._before() + seconds})
            self._began = time.monotonic()
            self._journal.commit({"entries": self._entries}, {})
            part.discard()
        entry = self._entries[self._taken]
        self._taken += 1
        self._seconds = entry["seconds"]
        return entry

    def _before(self) -> float:
        return float(self._entries[-1]["seconds"]) if self._entries else 0.0

    def _means(
        self, sets: Sequence[Blocks], ids_BT: Tensor, count: int, kl: bool, journal: Journal
    ) -> list[float]:
        """Mean NLL without each set, or mean divergence from the intact model, nats.

        Args:
            ids_BT: this process's share of the samples.
            count: samples of all processes.
        """
        import torch

        from shortllm.model.walk import NOTHING, walk

        scorer, decoder = self._scorer, self._scorer.open_decoder()
        totals = torch.zeros(len(sets), dtype=torch.float64)
        intact = [NOTHING] if kl else []
        for start in range(0, len(sets) if len(ids_BT) else 0, TOGETHER):
            together = sets[start : start + TOGETHER]

            def consume(
                m: int, logits_NV: Tensor, first_NV: Tensor, target_N: Tensor, start: int = start
            ) -> None:
                if not kl:
                    values_N = next_token_nll(logits_NV, target_N)
                elif m > 0:
                    values_N = kl_divergence(first_NV, logits_NV)
                else:
                    return  # the intact model itself
                totals[start + m - len(intact)] += values_N.double().sum().item()

            walk(
                decoder,
                ids_BT,
                [*intact, *together],
                consume=consume,
                advance=scorer.advance,
                memory=scorer.memory,
                journal=journal.part(f"sets-{start}"),
            )
        scorer.ranks.add_up([totals])
        predictions = count * (scorer.samples().shape[1] - 1)
        found: list[float] = (totals / predictions).tolist()
        return found


def _number(value: float) -> Tensor:
    import torch

    return torch.tensor(value, dtype=torch.float64)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def budget_of(asked: Asked, scorer: Scorer) -> Budget:
    """How many blocks a search removes, and which it may not.

    Raises:
        BudgetError: it cannot be met.
    """
    options, model = asked.options, scorer.checkpoint.info()
    amount: dict[str, Any] = {"remove": options["remove"]}
    if options["remove"] is None:
        amount = {"ratio": QUARTER}
    budget = Budget(
        **amount,
        protect_first=options["protect_first"],
        protect_last=options["protect_last"],
        period_aligned=options["period_aligned"],
    )
    number = most_blocks(budget, model)
    return budget.model_copy(update={"ratio": None, "remove": number})


def search_flops(scorer: Scorer, asked: Asked) -> float:
    """Floating-point operations of a search of two rounds, or of all generations of evolve."""
    from shortllm.model.walk import walk_flops

    options, model = asked.options, scorer.checkpoint.info()
    budget = budget_of(asked, scorer)
    names = names_in(options.get("candidates") or options["start"])
    named = [Asked.of(name) for name in names]
    shots = [Asked.of(o.name, o.amount(budget, model)) for o in named if o.needs != "sets"]
    units = removable(budget, model)
    gone = [block for unit in units for block in unit][: budget.remove]
    swaps = len(gone) * (sum(map(len, units)) - len(gone))
    rounds = {"local": 2.0 * swaps, "evolve": options.get("generations", 0) * 8.0}
    searches = [asked.name] if asked.name in rounds else [n for n in names if n in rounds]
    measured: float = sum(rounds[name] for name in searches)
    if options["evaluations"] is not None:
        measured = min(measured, float(options["evaluations"]))
    decoder, (samples, length) = scorer.open_decoder(), scorer.samples().shape
    each = walk_flops(decoder, [frozenset(gone)], samples, length)
    return scorer.work(shots) + (measured + len(shots)) * each
