"""A whole run in one directory: each stage writes its file, or skips it when it is up to date.

    run.json  calibration.*  scores.json  plan.json  pruned/  healed/  retrained/  quantized/
    eval.json  bench.json  zeroshot.csv  bench.csv  bench-*.svg  report.html  README.md

Everything a user can get wrong is checked before the first heavy step. A killed run goes on where
it was when the same command is given again; a changed recipe redoes the stages it touches.

    shortllm run MODEL --data stories.jsonl --remove 3 --retrain lora --bench
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shortllm import stages
from shortllm.benchmark.options import Benchmark, BenchmarkOptions
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.criteria.selection import Asked
from shortllm.data.options import CalibrationOptions
from shortllm.data.texts import Texts, prepare_texts
from shortllm.errors import RecipeError, ResultFileError, ShortLLMError
from shortllm.evaluation.harness import table_beside, write_table
from shortllm.evaluation.options import Evaluation
from shortllm.files import hold, releasing
from shortllm.healing.options import Healing
from shortllm.journal import journal_directory
from shortllm.model.session import Session
from shortllm.pruning import targets
from shortllm.pruning.budget import Budget, check_budget, removable
from shortllm.pruning.planning import build_plan, check_published_order
from shortllm.pruning.records import BlockScores, PrunePlan
from shortllm.published import Published
from shortllm.quantizing.options import QUANTIZED, Quantization, QuantizeOptions
from shortllm.recipe import Recipe
from shortllm.retraining import RECORD as RETRAINED
from shortllm.retraining.options import Retraining
from shortllm.run_directory import (
    HEALED,
    PRUNED,
    claim_directory,
    default_directory,
    delete,
    finished,
    pinned,
    write_run_file,
)
from shortllm.runtime import ALONE, Ranks
from shortllm.surgery.apply import check_removal
from shortllm.surgery.derived import require_free

if TYPE_CHECKING:
    from shortllm.data.calibration import Calibration
    from shortllm.evaluation.tasks import TaskSet

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run made."""

    directory: Path
    recipe: Recipe
    """Every default filled in."""
    plan: PrunePlan
    healing: Healing | None
    """Without training."""
    retraining: dict[str, Retraining]
    """By the name of the model each has made."""
    quantization: Quantization | None = None
    evaluation: Evaluation
    benchmark: Benchmark | None
    report: Path

    @property
    def checkpoints(self) -> dict[str, Path]:
        """The shortened checkpoint, those healed from it, and the quantized one, by name."""
        healed = [HEALED] if self.healing else []
        quantized = [QUANTIZED] if self.quantization is not None else []
        names = (PRUNED, *healed, *self.retraining, *quantized)
        return {name: self.directory / name for name in names}


@releasing()
def run(
    recipe: Recipe | None = None, *, out: Path | str | None = None, command: list[str] | None = None
) -> RunResult:
    """From a model's name to a shortened, and healed, checkpoint and a report.

    Args:
        recipe: every choice; the default shortens the embedded model by a quarter.
        out: run directory; default `runs/<model>-<criterion>-<budget>`.
        command: the command line, for run.json and the report.
    Raises:
        ShortLLMError: any of its kinds, before heavy work wherever that can be known.
    """
    from shortllm.reporting import write_report

    recipe = recipe or Recipe()
    needs_text = Asked.of(recipe.criterion, recipe.options).needs_text
    recipe.budget.asked()
    published = _order_to_follow(recipe)
    directory = Path(out) if out is not None else default_directory(recipe)
    revision = pinned(recipe.model, recipe.revision, directory)
    checkpoint = open_checkpoint(
        recipe.model, revision=revision, special_tokens=recipe.special_tokens
    )
    recipe = recipe.filled(checkpoint.model_type)
    if published is not None:
        check_published_order(recipe.budget, published, checkpoint.info())
    if recipe.budget.target() is None:
        check_budget(recipe.budget, checkpoint.info())
    check_any_removal(checkpoint, recipe.budget)
    claim_directory(directory, checkpoint)
    session = session_of(recipe)
    scored = recipe.budget.blocks is None and published is None
    scoring = scored and needs_text
    tasks = stages.prepare_tasks([checkpoint], recipe.evaluation, session)
    check_later_stages(recipe, checkpoint, session)
    quantizing = _quantization(recipe, checkpoint, session)
    texts = prepare_texts(
        checkpoint,
        recipe.calibration,
        recipe.evaluation,
        scoring=scoring,
        healing=_healing_text(recipe, checkpoint),
        quantization=quantizing.calibration if quantizing and quantizing.needs_text else None,
    )
    _check_healing(directory, checkpoint, recipe, session)
    budget, target = targets.resolve(recipe.budget, checkpoint, session, directory=directory)
    asked = asked_for(recipe.model_copy(update={"budget": budget}), checkpoint)

    write_run_file(directory, recipe.model_dump(mode="json"), checkpoint, command)
    targets.keep(target, directory)
    scores = None
    if scored:
        [scores] = score_in(directory, checkpoint, [asked], texts.calibration, session).values()
    else:
        delete_scores(directory)
    plan = build_plan(budget, model=checkpoint.info(), scores=scores, published=published)
    plan.save(directory / "plan.json")
    shortened = prune_in(directory, checkpoint, plan, session)
    models = {"original": checkpoint, PRUNED: shortened}
    healing = _heal(directory, shortened, checkpoint, recipe, texts, session)
    if healing is not None:
        models[HEALED] = made_in(directory, HEALED)
    retraining = _retrain(directory, shortened, recipe, session)
    models |= {name: made_in(directory, name) for name in retraining}
    candidates = {name: models[name] for name in retraining or (PRUNED,)}
    quantization = _quantize(directory, candidates, quantizing, texts, session)
    if quantization is not None:
        models[QUANTIZED] = made_in(directory, QUANTIZED)
    evaluation = evaluate_in(directory, models, recipe, texts, tasks, session)
    benchmark = None
    if recipe.benchmark is not None:
        session.release()
        measured = {name: models[name] for name in ("original", PRUNED)}
        benchmark = bench_in(directory, measured, recipe.benchmark, session)
    return RunResult(
        directory=directory,
        recipe=recipe,
        plan=plan,
        healing=healing,
        retraining=retraining,
        quantization=quantization,
        evaluation=evaluation,
        benchmark=benchmark,
        report=write_report(directory),
    )


def _order_to_follow(recipe: Recipe) -> Published | None:
    """What was published, where a plan is to be made of it.

    Raises:
        RecipeError: the recipe holds nothing published.
    """
    if not recipe.use_published_order:
        return None
    if recipe.published is None:
        raise RecipeError(
            "--use-published-order needs a recipe of a published model. See: shortllm recipes list"
        )
    return recipe.published


def check_later_stages(recipe: Recipe, checkpoint: Checkpoint, session: Session) -> None:
    """Find out before anything is scored whether healing and benchmark can begin at all.

    Raises:
        ShortLLMError: any of its kinds.
    """
    whole = " and ".join(
        name for name, asked in (("retraining", recipe.retraining), ("bench", recipe.benchmark))
        if asked
    )  # fmt: skip
    if whole and session.streams(checkpoint):
        raise ShortLLMError(
            f"{checkpoint.id} does not fit into memory, where {whole} must have all of it. Leave "
            "that out, or use a smaller --dtype or another --device"
        )
    for options in recipe.retraining:
        from shortllm.retraining.preparing import check

        check(checkpoint, options, session=session, ranks=ALONE)
    if recipe.benchmark is not None:
        from shortllm.benchmark.bench import check_speed

        check_speed({recipe.model: checkpoint}, recipe.benchmark, session)


def check_any_removal(checkpoint: Checkpoint, budget: Budget) -> None:
    """Run rules and guard on the removal asked for, or on a sample one, before anything is scored.

    Raises:
        UnsupportedModelError: blocks of this model type cannot be removed rightly.
    """
    count = checkpoint.block_count
    removed = budget.blocks
    if removed is None:
        removed = removable(budget, checkpoint.info())[0]
    check_removal(checkpoint, [block for block in range(count) if block not in set(removed)])


def asked_for(recipe: Recipe, checkpoint: Checkpoint) -> Asked:
    """The criterion of a recipe; one that removes blocks itself gets the budget's amount.

    Raises:
        CriterionError: unknown criterion or option.
    """
    asked = Asked.of(recipe.criterion, recipe.options)
    if recipe.budget.blocks is not None:
        return asked
    amount = asked.amount(recipe.budget, checkpoint.info())
    return Asked.of(recipe.criterion, {**amount, **recipe.options})


def session_of(recipe: Recipe) -> Session:
    """Where and how a recipe's models are run."""
    return Session(
        device=recipe.device,
        dtype=recipe.dtype,
        stream=recipe.stream,
        max_memory=recipe.max_memory,
    )


def scores_file(directory: Path, asked: Sequence[Asked], one: Asked) -> Path:
    """scores.json for a single criterion; of several, one file each, named after it."""
    return directory / ("scores.json" if len(asked) == 1 else f"scores-{one.name}.json")


def score_in(
    directory: Path,
    checkpoint: Checkpoint,
    asked: Sequence[Asked],
    calibration: Calibration | None,
    session: Session,
    ranks: Ranks = ALONE,
) -> dict[str, BlockScores]:
    """calibration.* and the file of each criterion's scores; those up to date are not made again.

    Of several processes all score and the main one writes.
    """
    if ranks.is_main:
        if calibration is None:
            delete(directory.glob("calibration.*"))
        else:
            calibration.save(directory)
    found: dict[str, BlockScores] = {}
    for one in asked:
        expected = stages.scores_fingerprint(checkpoint, one, calibration, session)
        scores = finished(BlockScores, scores_file(directory, asked, one), expected)
        if scores is not None:
            found[one.name] = scores
    ranks.wait()  # until all have looked, nobody writes
    missing = [one for one in asked if one.name not in found]
    if missing:
        journal = journal_directory(directory)
        found |= stages.score(
            checkpoint, calibration, missing, session=session, directory=journal, ranks=ranks
        )
        if ranks.is_main:
            for one in missing:
                found[one.name].save(scores_file(directory, asked, one))
        ranks.wait()  # nobody deletes what it takes to go on before the scores are safe
        shutil.rmtree(journal, ignore_errors=True)
    return {one.name: found[one.name] for one in asked}


def delete_scores(directory: Path) -> None:
    """Delete the scores of an earlier recipe, where blocks are now chosen without."""
    delete([directory / "scores.json", *directory.glob("calibration.*")])


def prune_in(
    directory: Path,
    checkpoint: Checkpoint,
    plan: PrunePlan,
    session: Session,
    name: str = PRUNED,
) -> Checkpoint:
    """The shortened checkpoint `name`, unless it is up to date."""
    target = directory / name
    if stages.is_pruned_by(target, stages.pruned_fingerprint(checkpoint, plan)):
        log.info("%s is up to date, skipped", target)
    else:
        stages.prune(checkpoint, plan, target, session=session)
    return made_in(directory, name)


def made_in(directory: Path, name: str) -> Checkpoint:
    """A checkpoint of the run, named within it, so that a run's files do not depend on where it
    lies."""
    return replace(open_checkpoint(directory / name), id=name)


def _healing_text(recipe: Recipe, checkpoint: Checkpoint) -> CalibrationOptions | None:
    """The text to heal with, if the recipe heals without training."""
    from shortllm.healing.heal import healing_text

    if recipe.healing is None:
        return None
    return healing_text(recipe.healing, checkpoint, recipe.calibration)


def _check_healing(
    directory: Path, checkpoint: Checkpoint, recipe: Recipe, session: Session
) -> None:
    """Find out before anything is scored whether the model can be healed."""
    from shortllm.healing.heal import check_healable

    if recipe.healing is not None:
        require_free(directory / HEALED, Healing.FILE)
        check_healable(recipe.healing, checkpoint, session)


def _heal(
    directory: Path,
    shortened: Checkpoint,
    checkpoint: Checkpoint,
    recipe: Recipe,
    texts: Texts,
    session: Session,
) -> Healing | None:
    """healed/ with heal.json, if the recipe heals without training."""
    from shortllm.healing.heal import heal_from

    if recipe.healing is None or texts.healing is None:
        return None
    return heal_from(
        shortened,
        checkpoint,
        recipe.healing,
        directory / HEALED,
        calibration=texts.healing,
        session=session,
    )


def _retrain(
    directory: Path, shortened: Checkpoint, recipe: Recipe, session: Session
) -> dict[str, Retraining]:
    """A checkpoint with retrain.json for each way of healing, by name."""
    from shortllm.retraining.stage import retrain

    records = {}
    for name, options in recipe.healed.items():
        require_free(directory / name, RETRAINED)
        records[name] = retrain(shortened, options, directory / name, session=session)
    return records


def _quantization(
    recipe: Recipe, checkpoint: Checkpoint, session: Session
) -> QuantizeOptions | None:
    """How to quantize, if the recipe does; checked on the model before blocks are removed."""
    from shortllm.quantizing.quantize import check, resolve

    if recipe.quantization is None:
        return None
    options = resolve(recipe.quantization, checkpoint, recipe.calibration)
    check(options, checkpoint, session)
    return options


def _quantize(
    directory: Path,
    candidates: Mapping[str, Checkpoint],
    options: QuantizeOptions | None,
    texts: Texts,
    session: Session,
) -> Quantization | None:
    """quantized/ from the best of the candidates, if the recipe quantizes."""
    from shortllm.quantizing.quantize import quantize_from

    if options is None:
        return None
    target = directory / QUANTIZED
    require_free(target, Quantization.FILE)
    name = best_of(candidates, texts, session, directory / "eval.json")
    if len(candidates) > 1:
        log.info("%s has the lowest perplexity and is quantized", name)
    return quantize_from(
        candidates[name], options, target, calibration=texts.quantization, session=session
    )


def best_of(
    candidates: Mapping[str, Checkpoint], texts: Texts, session: Session, evaluation: Path
) -> str:
    """The name of the model with the lowest perplexity on the first text.

    Args:
        evaluation: an earlier eval.json, whose models are not measured again.
    """
    if len(candidates) == 1:
        return next(iter(candidates))
    from shortllm.data.calibration import tokens_fingerprint
    from shortllm.evaluation.perplexity import measure_perplexity

    text = texts.evaluation[0]
    known = _measured(evaluation, tokens_fingerprint(text.segments.ids))
    found = {}
    for name, checkpoint in candidates.items():
        if checkpoint.fingerprint in known:
            found[name] = known[checkpoint.fingerprint]
        else:
            decoder = session.decoder(checkpoint)
            found[name] = measure_perplexity(decoder, text, memory=session.memory()).nll
    return min(found, key=lambda name: found[name])


def _measured(evaluation: Path, tokens: str) -> dict[str, float]:
    """Fingerprint of a model -> its mean NLL on the tokens, as far as eval.json has it."""
    try:
        models = Evaluation.load(evaluation).models
    except ResultFileError:
        return {}
    return {
        one.model.fingerprint: entry.nll
        for one in models
        for entry in one.perplexity
        if entry.tokens_fingerprint == tokens
    }


def evaluate_in(
    directory: Path,
    models: Mapping[str, Checkpoint],
    recipe: Recipe,
    texts: Texts,
    tasks: TaskSet | None,
    session: Session,
) -> Evaluation:
    """eval.json, and zeroshot.csv where there are tasks, unless they are up to date."""
    path = directory / "eval.json"
    named, options = list(models.items()), recipe.evaluation
    expected = stages.evaluation_fingerprint(named, texts.evaluation, options, session, tasks)
    evaluation = finished(Evaluation, path, expected)
    if evaluation is None:
        evaluation = stages.evaluate(named, texts.evaluation, options, session=session, tasks=tasks)
        evaluation.save(path)
    if tasks is None:
        delete([table_beside(path)])
    else:
        write_table(evaluation, table_beside(path))
    return evaluation


@releasing()
def bench_in(
    directory: Path,
    checkpoints: Mapping[str, Checkpoint],
    options: BenchmarkOptions,
    session: Session,
) -> Benchmark:
    """bench.json with its table and plots, unless they are up to date."""
    from shortllm.benchmark.bench import benchmark_fingerprint, measure_speed
    from shortllm.benchmark.meters import meter_of
    from shortllm.reporting.speed import write_benchmark

    expected = benchmark_fingerprint(checkpoints, options, session, meter_of(session.device))
    found = finished(Benchmark, directory / "bench.json", expected)
    if found is None:
        hold(directory)
        found = measure_speed(checkpoints, options, session=session, directory=directory)
        write_benchmark(directory, found)
    return found
