"""Which criterion to trust for this model: what each one removes, measured side by side.

    scores by each criterion ─► a plan per budget ─┐
    seeded random draws ───────────────────────────┴─► one walk over all removed sets ─► Comparison

Removed sets that begin alike share their block passes, and equal ones are measured once. The text
measured on is kept apart from the text scored on, as in a run.

    shortllm compare-criteria MODEL --data stories.jsonl --out runs/compare
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm import pipeline, rundir
from shortllm.asked import Asked
from shortllm.budget import Budget, most_blocks
from shortllm.checkpoint.source import Checkpoint
from shortllm.errors import BudgetError, CriterionError, DataError
from shortllm.files import PARTIAL, fingerprint
from shortllm.locking import releasing
from shortllm.planning import build_plan, removal_order
from shortllm.recipe import Recipe
from shortllm.results.comparison import ComparedBudget, Comparison, Contender, LeftOut, RemovedSet
from shortllm.results.record import Cost, ModelInfo
from shortllm.results.scores import BlockScores
from shortllm.runtime import ALONE, Ranks, join_ranks, peak_memory, progress, versions
from shortllm.session import Session
from shortllm.texts import prepare_texts

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.evaluation import EvaluationText
    from shortllm.model.decoder import Decoder
CRITERIA = (
    "ppl", "kl", "taylor", "magnitude", "influence", "relative", "angular", "greedy", "last",
    "even",
)  # fmt: skip
"""What is compared unless told otherwise; random draws always are."""

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
RANDOM_DRAWS = 10
SEGMENTS = 64
"""Segments of the text that are measured on unless told otherwise."""

FLOOR = "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is compared, checked against the model."""

    asked: list[Asked]
    ratios: list[float]
    budgets: list[ComparedBudget]
    left_out: list[LeftOut]
    draws: int
    """Number of random removals at each budget."""
    protect_first: int | None = None
    protect_last: int | None = None

    def budget(self, blocks: int) -> Budget:
        """The budget of a plan that removes so many blocks."""
        return Budget(
            remove=blocks, protect_first=self.protect_first, protect_last=self.protect_last
        )

    def protected(self, count: int) -> list[int]:
        """Blocks of a model of `count` blocks that no removal may touch."""
        return self.budget(1).protected(count)


def prepare_question(
    model: ModelInfo,
    asked: Sequence[Asked],
    ratios: Sequence[float],
    *,
    draws: int = RANDOM_DRAWS,
    protect_first: int | None = None,
    protect_last: int | None = None,
) -> Question:
    """Fit criteria and ratios to a model.

    Ratios that come to the same number of blocks are one budget; those that no removal can meet are
    left out with the reason. A criterion that removes blocks itself gets the largest budget.

    Raises:
        BudgetError: a ratio that is none, none that can be met, or no random draw.
        CriterionError: `random` among the criteria, or an option that follows from the budgets.
    """
    if draws < 1:
        raise BudgetError(f"{draws} random removals are no floor. Give --random 1 or more")
    budgets: dict[int, list[float]] = {}
    left_out: list[LeftOut] = []
    ratios = sorted(set(ratios))
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise BudgetError(f"--ratios {ratio} is not between 0 and 1. Give e.g. 0.1,0.2,0.3")
        budget = Budget(ratio=ratio, protect_first=protect_first, protect_last=protect_last)
        budget.protected(model.blocks)
        try:
            budgets.setdefault(most_blocks(budget, model), []).append(ratio)
        except BudgetError as error:
            left_out.append(LeftOut(ratio=ratio, reason=str(error)))
    if not budgets:
        reason = left_out[0].reason if left_out else "give one or more --ratios, e.g. 0.1,0.2"
        raise BudgetError(f"there is no removal to compare: {reason}")
    largest = Budget(remove=max(budgets), protect_first=protect_first, protect_last=protect_last)
    return Question(
        asked=[_fitted(one, largest, model, budgets=len(budgets)) for one in asked],
        ratios=ratios,
        budgets=[ComparedBudget(blocks=n, ratios=found) for n, found in budgets.items()],
        left_out=left_out,
        draws=draws,
        protect_first=protect_first,
        protect_last=protect_last,
    )


def _fitted(asked: Asked, largest: Budget, model: ModelInfo, *, budgets: int) -> Asked:
    """A criterion that removes blocks itself with the limits of the comparison."""
    if asked.name == FLOOR:
        raise CriterionError(
            f"'{FLOOR}' is part of every comparison. Leave it out of --criterion, and say how many "
            "draws with --random 10"
        )
    if asked.needs == "sets" and budgets > 1:
        raise CriterionError(
            f"'{asked.name}' searches for the best removal of one size, and the --ratios come to "
            f"{budgets}. Give one of them, or leave {asked.name} out"
        )
    limits = asked.amount(largest, model)
    for name in limits:
        if asked.options[name] != asked.criterion.defaults[name]:
            raise CriterionError(
                f"{asked.name}.{name} follows from --ratios, --protect-first and --protect-last "
                "here. Leave the option out"
            )
    return Asked.of(asked.name, asked.options | limits) if limits else asked


def fill_recipe(recipe: Recipe, model_type: str) -> Recipe:
    """The recipe with its defaults filled in, of which two are a comparison's own: one text, and
    not all of it.

    Raises:
        DataError: several texts; a table and a plot show one perplexity.
    """
    given = recipe.evaluation.data
    if len(given) > 1:
        raise DataError(
            f"criteria are compared on one text, and {len(given)} were given: {', '.join(given)}. "
            "Give one as --eval-data"
        )
    segments = recipe.evaluation.max_segments or SEGMENTS
    evaluation = recipe.evaluation.model_copy(update={"max_segments": segments})
    filled = recipe.model_copy(update={"evaluation": evaluation}).filled(model_type)
    evaluation = filled.evaluation.model_copy(update={"data": filled.evaluation.data[:1]})
    return filled.model_copy(update={"evaluation": evaluation})


def default_directory(model: str) -> Path:
    """`runs/<model>-comparison`."""
    return Path("runs") / f"{rundir.short_name(model)}-comparison"


@releasing()
def compare_in(
    directory: Path,
    checkpoint: Checkpoint,
    question: Question,
    recipe: Recipe,
    *,
    command: list[str] | None = None,
) -> Comparison:
    """Scores, comparison.json and comparison.html in a run directory; what is up to date is not
    made again.

    Of several processes all measure and the main one writes.

    Args:
        recipe: as made by `fill_recipe`.
    """
    from shortllm.reporting import write_comparison

    ranks = join_ranks()
    if ranks.is_main:
        rundir.claim_directory(directory, checkpoint)
    session = pipeline.session_of(recipe)
    scoring = any(one.needs_text for one in question.asked)
    texts = prepare_texts(checkpoint, recipe.calibration, recipe.evaluation, scoring=scoring)
    [text] = texts.evaluation
    if ranks.is_main:
        rundir.write_run_file(directory, _choices(recipe, question), checkpoint, command)
    scores = pipeline.score_in(
        directory, checkpoint, question.asked, texts.calibration, session, ranks
    )
    path, work = directory / "comparison.json", directory / f"comparing{PARTIAL}"
    expected = comparison_fingerprint(checkpoint, question, scores, text, session)
    found = rundir.finished(Comparison, path, expected)
    if found is None:
        found = compare(
            checkpoint, question, scores, text, session=session, directory=work, ranks=ranks
        )
        if ranks.is_main:
            found.save(path)
        ranks.wait()  # nobody deletes what it takes to go on before the result is safe
        shutil.rmtree(work, ignore_errors=True)
    if ranks.is_main:
        write_comparison(directory)
    return found


def _choices(recipe: Recipe, question: Question) -> dict[str, Any]:
    """What was asked for, for run.json."""
    samples = {"prompt", "continuations", "new_tokens", "seed"}
    chosen = recipe.model_dump(mode="json", exclude={"budget": True, "evaluation": samples})
    return chosen | {
        "ratios": question.ratios,
        "random": question.draws,
        "protect_first": question.protect_first,
        "protect_last": question.protect_last,
    }


def compare(
    checkpoint: Checkpoint,
    question: Question,
    scores: dict[str, BlockScores],
    text: EvaluationText,
    *,
    session: Session,
    directory: Path | None = None,
    ranks: Ranks = ALONE,
) -> Comparison:
    """Perplexity without the blocks that each criterion, and each random draw, removes.

    Args:
        scores: by the names of the criteria.
        directory: where the progress of a long walk over streamed blocks is kept.
        ranks: the processes that share the segments.
    Raises:
        BudgetError: scores that hold no removal of that size.
        CheckpointError: the intact model's loss is no number.
        UnsupportedModelError: the model's blocks cannot be called one by one.
    """
    from shortllm.evaluation import as_perplexity
    from shortllm.journal import Journal
    from shortllm.model.walk import NOTHING, walk_flops

    info = checkpoint.info()
    chosen, drawn = _chosen(info, question, scores), _drawn(info, question)
    sets = {frozenset(order) for one in (*chosen, *drawn) for order in one.orders}
    removals = [NOTHING, *sorted(sets, key=sorted)]
    expected = comparison_fingerprint(checkpoint, question, scores, text, session)
    ids_BT = ranks.mine(text.segments.ids)
    decoder, started = session.decoder(checkpoint), time.monotonic()
    own = None if directory is None else directory / f"rank{ranks.rank}of{ranks.count}"
    work = walk_flops(decoder, removals, *ids_BT.shape)
    with progress(f"perplexity of {len(sets)} shortened models", work) as advance:
        nlls = mean_nlls(
            decoder, ids_BT, removals, ranks=ranks, advance=advance,
            memory=session.memory(directory), journal=Journal(own, expected),
        )  # fmt: skip
    measured = dict(zip(removals, nlls, strict=True))
    return Comparison(
        model=info,
        protected=question.protected(info.blocks),
        budgets=question.budgets,
        left_out=question.left_out,
        criteria=[one.measured(measured) for one in chosen],
        random=[one.measured(measured) for one in drawn],
        intact=as_perplexity(text, measured[NOTHING]),
        calibration=next((s.calibration for s in scores.values() if s.calibration), None),
        models=len(sets),
        dtype=session.dtype(checkpoint),
        versions=versions(),
        cost=Cost(seconds=round(time.monotonic() - started, 3), peak_bytes=peak_memory()),
        fingerprint=expected,
    )


def comparison_fingerprint(
    checkpoint: Checkpoint,
    question: Question,
    scores: dict[str, BlockScores],
    text: EvaluationText,
    session: Session,
) -> str:
    """Of everything the comparison depends on."""
    from shortllm.calibration import tokens_fingerprint

    return fingerprint(
        {
            "model": checkpoint.fingerprint,
            "scores": [(name, found.fingerprint) for name, found in scores.items()],
            "budgets": [budget.model_dump() for budget in question.budgets],
            "left out": [left.model_dump() for left in question.left_out],
            "protected": question.protected(checkpoint.block_count),
            "draws": question.draws,
            "text": [text.rows.source, tokens_fingerprint(text.segments.ids)],
            "dtype": session.dtype(checkpoint),
            "device": session.device.type,
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Removals:
    """What one criterion removes at each budget, in order."""

    criterion: str
    options: dict[str, Any]
    source: str
    scores: str | None
    orders: list[list[int]]

    def measured(self, nlls: dict[frozenset[int], float]) -> Contender:
        return Contender(
            criterion=self.criterion,
            options=self.options,
            source=self.source,
            scores=self.scores,
            sets=[_removed_set(order, nlls[frozenset(order)]) for order in self.orders],
        )


def _removed_set(order: list[int], nll: float) -> RemovedSet:
    from shortllm.metrics import perplexity

    ppl = perplexity(nll)
    return RemovedSet(
        order=order,
        nll=nll if math.isfinite(nll) else None,
        perplexity=ppl if math.isfinite(ppl) else None,
    )


def _chosen(
    model: ModelInfo, question: Question, scores: dict[str, BlockScores]
) -> list[_Removals]:
    """The plans of each criterion."""
    return [
        _Removals(
            criterion=one.name,
            options=one.options,
            source=one.criterion.source,
            scores=scores[one.name].fingerprint,
            orders=[
                build_plan(question.budget(n.blocks), model=model, scores=scores[one.name]).order
                for n in question.budgets
            ],
        )
        for one in question.asked
    ]


def _drawn(model: ModelInfo, question: Question) -> list[_Removals]:
    """What plans by `random` with the seeds 0, 1, ... remove."""
    found = []
    for seed in range(question.draws):
        one = Asked.of(FLOOR, {"seed": seed})
        order = removal_order(one.call(model.blocks), question.protected(model.blocks))
        found.append(
            _Removals(
                criterion=one.name,
                options=one.options,
                source=one.criterion.source,
                scores=None,
                orders=[order[: budget.blocks] for budget in question.budgets],
            )
        )
    return found


def mean_nlls(
    decoder: Decoder,
    ids_BT: Tensor,
    removals: Sequence[frozenset[int]],
    *,
    ranks: Ranks = ALONE,
    **kwargs: Any,
) -> list[float]:
    """Mean next-token NLL of each shortened model, nats, over the predictions of all processes.

    Args:
        kwargs: `advance`, `memory` and `journal` of the walk.
    """
    import torch

    from shortllm.metrics import next_token_nll
    from shortllm.model.walk import walk

    totals = torch.zeros(len(removals), dtype=torch.float64)

    def consume(m: int, logits_NV: Tensor, first_NV: Tensor, target_N: Tensor) -> None:
        totals[m] += next_token_nll(logits_NV, target_N).double().sum().item()

    walk(decoder, ids_BT, removals, consume=consume, **kwargs)
    ranks.add_up([totals])
    predictions = ranks.total(float(ids_BT.shape[0] * (ids_BT.shape[1] - 1)))
    found: list[float] = (totals / predictions).tolist()
    return found
