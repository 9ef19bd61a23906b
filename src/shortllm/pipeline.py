"""A whole run in one directory: each stage writes its file, or skips it when it is up to date.

    run.json  calibration.*  scores.json  plan.json  pruned/  healed/  retrained/  quantized/
    eval.json  bench.json  zeroshot.csv  bench.csv  bench-*.svg  report.html  README.md

Everything a user can get wrong is checked before the first heavy step. The same command resumes an
interrupted run; a changed recipe repeats the stages that depend on the change.

    shortllm run MODEL --data stories.jsonl --remove 3 --retrain lora --bench
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shortllm.benchmark.bench import check_speed
from shortllm.benchmark.options import Benchmark
from shortllm.calls import accepts
from shortllm.checkpoint.hub import ModelSource
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.criteria import Criterion, resolve
from shortllm.errors import RecipeError, ShortLLMError
from shortllm.evaluation.evaluate import prepare_tasks
from shortllm.evaluation.options import Evaluation
from shortllm.evaluation.probe.measure import with_probe
from shortllm.evaluation.texts import Texts, prepare_texts
from shortllm.files import overwriting, releasing, require_free
from shortllm.format import counted
from shortllm.healing.heal import check_healable, heal_from, healing_text
from shortllm.healing.options import Healing
from shortllm.measure import bench_in, best_of, evaluate_in
from shortllm.model import Session
from shortllm.options import overlaid
from shortllm.progress import expect_stages, numbered_stages, stage
from shortllm.pruning import targets
from shortllm.pruning.budget import Budget, check_budget, removable, removal_options
from shortllm.pruning.planning import build_plan, check_published_order
from shortllm.pruning.prune import prune_from
from shortllm.pruning.records import BlockScores, PrunePlan, Target
from shortllm.pruning.score import score_in, text_to_heal_with
from shortllm.published import Published
from shortllm.quantizing import quantize
from shortllm.quantizing.options import QUANTIZED, Quantization, QuantizeOptions
from shortllm.recipe import Recipe
from shortllm.retraining import setup
from shortllm.retraining.options import Retraining
from shortllm.retraining.retrain import retrain_from
from shortllm.run_directory import (
    HEALED,
    PRUNED,
    claim_directory,
    delete,
    pinned,
    short_name,
    write_run_file,
)
from shortllm.runtime import Runtime
from shortllm.shown import Shown
from shortllm.surgery.apply import check_removal

if TYPE_CHECKING:
    from shortllm.evaluation.tasks import TaskSet

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RunResult(Shown):
    """What a run wrote."""

    directory: Path
    recipe: Recipe
    """With every default resolved."""
    plan: PrunePlan
    healing: Healing | None
    """Healing without training."""
    retraining: dict[str, Retraining]
    """By the name of the retrained model."""
    quantization: Quantization | None
    evaluation: Evaluation
    benchmark: Benchmark | None
    report: Path
    checkpoints: dict[str, Path]
    """The shortened checkpoint and those derived from it, by name."""

    def __str__(self) -> str:
        """'runs/first: 12 -> 9 blocks, original 1.798, pruned 1.892 (perplexity on embedded)'."""
        plan = self.plan
        return (
            f"{self.directory}: {plan.model.blocks} -> {counted(len(plan.kept), 'block')}, "
            f"{self.evaluation}"
        )


@releasing()
@accepts(recipe=Recipe)
def run(
    model: ModelSource | None = None,
    *,
    recipe: Recipe,
    out: Path | None = None,
    command: Sequence[str] = (),
) -> RunResult:
    """From a model's name to a shortened, recovered checkpoint and a report, in one directory.

    Stages whose files are up to date are skipped; an interrupted run is resumed.

    Args:
        model: a checkpoint directory, a Hub id, or a loaded model. Default: the recipe's, the
            embedded model.
        recipe: every choice; its fields can be given as keywords, e.g. `remove=6, data="c4"`.
        out: run directory. Default: `runs/<model>-<criterion>-<budget>`.
        command: the command line, for run.json and the report.
    Returns:
        The directory, the plan, the checkpoints by name, the evaluation, the benchmark and the
        page.
    Raises:
        ShortLLMError: any kind, before heavy work wherever that can be known.
    """
    if model is not None:
        recipe = overlaid(recipe, Recipe(model=model))
    with numbered_stages():
        with stage("prepare", delayed=True):
            prepared = _prepare(recipe, out, command)
        with overwriting():  # the recipe of the whole run has been compared
            return _stages(prepared)


def _stages(prepared: _Prepared) -> RunResult:
    """All stages in order."""
    from shortllm.reporting import write_report

    directory, session, recipe = prepared.directory, prepared.session, prepared.recipe
    with stage("score") if prepared.scored else nullcontext():
        plan = _plan(prepared)
    with stage("prune"):
        pruning = prune_from(
            prepared.checkpoint,
            plan,
            directory / PRUNED,
            session=session,
            drop_heads=recipe.drop_heads,
        )
    for note in pruning.notes:
        log.info(note)
    shortened = opened_within(directory, PRUNED)
    models = {"original": prepared.checkpoint, PRUNED: shortened}
    healing = None
    if recipe.healing is not None and prepared.texts.healing is not None:
        with stage("heal"):
            healing = heal_from(
                shortened,
                prepared.checkpoint,
                recipe.healing,
                directory / HEALED,
                calibration=prepared.texts.healing,
                session=session,
            )
        models[HEALED] = opened_within(directory, HEALED)
    retraining: dict[str, Retraining] = {}
    for name, options in recipe.retrained.items():
        with stage(f"retrain by {options.method}"):
            retraining[name] = retrain_from(shortened, options, directory / name, session=session)
        models[name] = opened_within(directory, name)
    quantization = None
    if prepared.quantizing is not None:
        with stage("quantize"):
            recovered = {name: models[name] for name in models if name not in ("original", PRUNED)}
            quantization = _quantize(
                prepared, prepared.quantizing, recovered or {PRUNED: shortened}
            )
        models[QUANTIZED] = opened_within(directory, QUANTIZED)
    with stage("eval"):
        evaluation = evaluate_in(
            directory, models, recipe.evaluation, prepared.texts, prepared.tasks, session
        )
    benchmark = None
    if recipe.benchmark is not None:
        session.release()
        measured = {name: models[name] for name in ("original", PRUNED)}
        with stage("bench"):
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
        checkpoints={name: directory / name for name in models if name != "original"},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A run whose inputs have been read and checked; nothing heavy has been done."""

    directory: Path
    recipe: Recipe
    checkpoint: Checkpoint
    session: Session
    texts: Texts
    tasks: TaskSet | None
    published: Published | None
    """What the order of blocks is taken from, instead of scores."""
    quantizing: QuantizeOptions | None
    budget: Budget
    """With a target turned into a number of blocks."""
    target: Target | None
    criterion: Criterion
    scored: bool
    """Whether blocks are scored."""


def _prepare(recipe: Recipe, out: Path | None, command: Sequence[str]) -> _Prepared:
    """Read, check and resolve everything before the first heavy step, and write run.json."""
    criterion = resolve(recipe.criterion, recipe.options)
    healed = healing_of(recipe, criterion)
    recipe.budget.asked()
    if recipe.use_published_order and recipe.published is None:
        raise RecipeError(
            "--use-published-order needs a recipe of a published model. See: shortllm recipes list"
        )
    published = recipe.published if recipe.use_published_order else None
    directory = out if out is not None else default_directory(recipe)
    checkpoint = open_checkpoint(
        recipe.model,
        revision=pinned(recipe.model, recipe.revision, directory),
        special_tokens=recipe.special_tokens,
    )
    recipe = recipe.resolved(checkpoint.model_type)
    probed = with_probe(recipe.evaluation, checkpoint)
    recipe = recipe.model_copy(update={"evaluation": probed})
    if published is not None:
        check_published_order(recipe.budget, published, checkpoint.info())
    if recipe.budget.target() is None:
        check_budget(recipe.budget, checkpoint.info())
    check_any_removal(checkpoint, recipe.budget)
    claim_directory(directory, checkpoint, recipe.model_dump(mode="json"))
    session = session_of(recipe)
    scored = recipe.budget.blocks is None and published is None
    tasks = prepare_tasks([checkpoint], recipe.evaluation, session)
    quantizing = check_later_stages(recipe, checkpoint, session)
    texts = _texts(
        recipe, checkpoint, scoring=scored and criterion.needs_text, quantizing=quantizing
    )
    if recipe.healing is not None:
        require_free(directory / HEALED, Healing.FILE)
        check_healable(recipe.healing, checkpoint, session)
    expect_stages(_stage_count(recipe, scored=scored))
    budget, target = targets.resolve(recipe.budget, checkpoint, session, directory=directory)
    if budget.blocks is None:  # a criterion that removes blocks itself gets the amount
        amount = removal_options(criterion, budget, checkpoint.info())
        criterion = resolve(recipe.criterion, {**amount, **healed, **recipe.options})
    write_run_file(directory, recipe.model_dump(mode="json"), checkpoint, command)
    return _Prepared(
        directory=directory,
        recipe=recipe,
        checkpoint=checkpoint,
        session=session,
        texts=texts,
        tasks=tasks,
        published=published,
        quantizing=quantizing,
        budget=budget,
        target=target,
        criterion=criterion,
        scored=scored,
    )


def _stage_count(recipe: Recipe, *, scored: bool) -> int:
    """How many stages a run has: prepare, prune and eval, and those that are wanted."""
    wanted = (scored, recipe.healing, recipe.quantization, recipe.benchmark)
    return 3 + len(recipe.retrained) + sum(bool(one) for one in wanted)


def healing_of(recipe: Recipe, criterion: Criterion) -> dict[str, str]:
    """The option by which a criterion measures models after the healing of the run."""
    if recipe.heal_aware is False or (recipe.heal_aware is None and recipe.healing is None):
        return {}
    if recipe.healing is None:
        raise RecipeError("--heal-aware needs a method to heal with. Add e.g. --heal regression")
    measures = criterion.needs == "sets" or criterion.scored_by().needs == "logits"
    if "healing" in criterion.options and measures:
        return {"healing": recipe.healing.method}
    if recipe.heal_aware:
        raise RecipeError(
            f"criterion '{criterion.name}' does not measure shortened models, so it cannot measure "
            "healed ones. Use --criterion auto, local, evolve or greedy, or leave out --heal-aware"
        )
    return {}


def default_directory(recipe: Recipe) -> Path:
    """`runs/<model>-<criterion>-<budget>`, e.g. `runs/stories10L-ppl-remove2`."""
    name = short_name(recipe.model)
    [(amount, value)] = recipe.budget.asked().items()
    periods = "-periods" if recipe.budget.period_aligned else ""
    published = "-published-order" if recipe.use_published_order else ""
    if amount == "blocks":
        return Path("runs") / f"{name}-blocks{'-'.join(map(str, value))}"
    return Path("runs") / f"{name}-{recipe.criterion}-{amount}{value}{periods}{published}"


def check_later_stages(
    recipe: Recipe, checkpoint: Checkpoint, session: Session
) -> QuantizeOptions | None:
    """Check that retraining, quantizing and benchmark can start; resolved quantizing options."""
    whole = " and ".join(
        name
        for name, wanted in (("retraining", recipe.retraining), ("bench", recipe.benchmark))
        if wanted
    )
    if whole and session.streams(checkpoint):
        raise ShortLLMError(
            f"{checkpoint.id} does not fit into memory, but {whole} must load all of it. Leave "
            "that out, or use a smaller --dtype or another --device"
        )
    for options in recipe.retraining:
        setup.check(checkpoint, options, session=session)
    if recipe.benchmark is not None:
        check_speed({recipe.model: checkpoint}, recipe.benchmark, session)
    if recipe.quantization is None:
        return None
    quantizing = quantize.resolve(recipe.quantization, checkpoint, recipe.calibration)
    quantize.check(quantizing, checkpoint, session)
    return quantizing


def _texts(
    recipe: Recipe, checkpoint: Checkpoint, *, scoring: bool, quantizing: QuantizeOptions | None
) -> Texts:
    """All text of the run, read and tokenized once."""
    healing = None
    if recipe.healing is not None:
        healing = healing_text(recipe.healing, checkpoint, recipe.calibration)
    return prepare_texts(
        checkpoint,
        recipe.calibration,
        recipe.evaluation,
        scoring=scoring,
        healing=healing,
        quantization=quantizing.calibration if quantizing and quantizing.needs_text else None,
    )


def check_any_removal(checkpoint: Checkpoint, budget: Budget) -> None:
    """Run rules and guard on the requested removal, or on a sample one, before scoring."""
    removed = budget.blocks
    if removed is None:
        removed = removable(budget, checkpoint.info())[0]
    check_removal(checkpoint, sorted(set(range(checkpoint.block_count)).difference(removed)))


def session_of(recipe: Recipe) -> Session:
    """Where and how a recipe's models run."""
    return Session(Runtime(**{name: getattr(recipe, name) for name in Runtime.model_fields}))


def _plan(run: _Prepared) -> PrunePlan:
    """scores.json where blocks are scored, and plan.json."""
    targets.keep(run.target, run.directory)
    scores: BlockScores | None = None
    if run.scored:
        [scores] = score_in(
            run.directory,
            run.checkpoint,
            [run.criterion],
            run.texts.calibration,
            run.session,
            healing=run.texts.healing
            or text_to_heal_with(run.checkpoint, [run.criterion], run.recipe.calibration),
        ).values()
    else:
        delete([run.directory / "scores.json", *run.directory.glob("calibration.*")])
    plan = build_plan(
        run.budget, model=run.checkpoint.info(), scores=scores, published=run.published
    )
    plan.save(run.directory / "plan.json")
    return plan


def opened_within(directory: Path, name: str) -> Checkpoint:
    """A checkpoint of the run under its name there, so that results do not depend on the path."""
    return replace(open_checkpoint(directory / name), id=name)


def _quantize(
    run: _Prepared, options: QuantizeOptions, candidates: Mapping[str, Checkpoint]
) -> Quantization:
    """quantized/ from the best of the candidates."""
    target = run.directory / QUANTIZED
    require_free(target, Quantization.FILE)
    name = best_of(candidates, run.texts, run.session, run.directory / "eval.json")
    if len(candidates) > 1:
        log.info("%s has the lowest perplexity and is quantized", name)
    return quantize.quantize_from(
        candidates[name], options, target, calibration=run.texts.quantization, session=run.session
    )
