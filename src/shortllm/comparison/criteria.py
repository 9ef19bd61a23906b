"""Scores by each criterion, a plan per budget, and one walk over all removed sets."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm import pipeline
from shortllm import run_directory as rundir
from shortllm.checkpoint.source import Checkpoint
from shortllm.comparison.options import FLOOR, Comparison, Contender, Question, RemovedSet
from shortllm.criteria.selection import Asked
from shortllm.evaluation.texts import prepare_texts
from shortllm.files import PARTIAL, fingerprint, releasing
from shortllm.model.session import Session
from shortllm.pruning.planning import build_plan, removal_order
from shortllm.pruning.records import BlockScores
from shortllm.recipe import Recipe
from shortllm.records import Cost, ModelInfo
from shortllm.runtime import ALONE, Ranks, join_ranks, peak_memory, progress, versions

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.evaluation.perplexity import EvaluationText
    from shortllm.model.decoder import Decoder


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
    from shortllm.evaluation.perplexity import as_perplexity
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
    from shortllm.data.calibration import tokens_fingerprint

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
    from shortllm.model.metrics import perplexity

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

    from shortllm.model.metrics import next_token_nll
    from shortllm.model.walk import walk

    totals = torch.zeros(len(removals), dtype=torch.float64)

    def consume(m: int, logits_NV: Tensor, first_NV: Tensor, target_N: Tensor) -> None:
        totals[m] += next_token_nll(logits_NV, target_N).double().sum().item()

    walk(decoder, ids_BT, removals, consume=consume, **kwargs)
    ranks.add_up([totals])
    predictions = ranks.total(float(ids_BT.shape[0] * (ids_BT.shape[1] - 1)))
    found: list[float] = (totals / predictions).tolist()
    return found
