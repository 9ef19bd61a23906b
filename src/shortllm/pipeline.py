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
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from shortllm.benchmark.bench import check_speed
from shortllm.benchmark.options import Benchmark
from shortllm.calls import accepts
from shortllm.checkpoint.hub import ModelSource
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.criteria import Criterion, resolve
from shortllm.errors import RecipeError, ShortLLMError, TargetMissedError
from shortllm.evaluation.evaluate import evaluation_fingerprint, prepare_tasks
from shortllm.evaluation.options import Evaluation
from shortllm.evaluation.probe.measure import with_probe
from shortllm.evaluation.quality import judged
from shortllm.evaluation.texts import Texts, prepare_texts
from shortllm.files import fingerprint, overwriting, releasing, require_free
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
from shortllm.pruning.quality_target import QualityTarget, sizes_of
from shortllm.pruning.records import BlockScores, PrunePlan, Pruning, Target
from shortllm.pruning.score import score_in, text_to_heal_with
from shortllm.pruning.size_search import SizeSearch, discard_rooms, plans_of, room_of
from shortllm.pruning.ties import undecided
from shortllm.published import Published
from shortllm.quantizing import quantize
from shortllm.quantizing.options import QUANTIZED, Quantization, QuantizeOptions
from shortllm.recipe import Recipe
from shortllm.retraining import setup
from shortllm.retraining.options import Retraining
from shortllm.retraining.retrain import retrain_from
from shortllm.run_directory import (
    HEALED,
    NOT_COMPARED,
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

    if prepared.sizes:
        with stage("find the number of blocks"):
            prepared = _sized(prepared)
    directory, session, recipe = prepared.directory, prepared.session, prepared.recipe
    with stage("score") if prepared.scored else nullcontext():
        plan = _plan(prepared)
    made = _derived(prepared, directory, plan)
    for note in made.pruning.notes:
        log.info(note)
    models = {"original": prepared.checkpoint, **made.models}
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
    result = RunResult(
        directory=directory,
        recipe=recipe,
        plan=plan,
        healing=made.healing,
        retraining=made.retraining,
        quantization=made.quantization,
        evaluation=evaluation,
        benchmark=benchmark,
        report=write_report(directory),
        checkpoints={name: directory / name for name in made.models},
    )
    _require_quality(result)
    return result


def _require_quality(result: RunResult) -> None:
    """Compare what the evaluation of the whole run measured with the targets of quality."""
    intact, *_, last = result.evaluation.models
    for one in judged(result.recipe.budget, last, intact):
        if not one.passed:
            raise TargetMissedError(
                f"{result.directory}: {last.name} misses a target: {one.of} is {one.measured}, and "
                f"{one.asked} was requested. It met the target when it was tried, so results vary "
                "between runs on this machine. Allow a little more"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Derived:
    """The checkpoints of a run, the last one being what it came to, and their records."""

    models: dict[str, Checkpoint]
    pruning: Pruning
    healing: Healing | None
    retraining: dict[str, Retraining]
    quantization: Quantization | None


def _derived(run: _Prepared, directory: Path, plan: PrunePlan) -> _Derived:
    """The checkpoint of a plan and those that are made from it."""
    session, recipe = run.session, run.recipe
    with stage("prune"):
        pruning = prune_from(
            run.checkpoint,
            plan,
            directory / PRUNED,
            session=session,
            drop_heads=recipe.drop_heads,
        )
    shortened = opened_within(directory, PRUNED)
    models = {PRUNED: shortened}
    healing = None
    if recipe.healing is not None and run.texts.healing is not None:
        with stage("heal"):
            healing = heal_from(
                shortened,
                run.checkpoint,
                recipe.healing,
                directory / HEALED,
                calibration=run.texts.healing,
                session=session,
            )
        models[HEALED] = opened_within(directory, HEALED)
    retraining: dict[str, Retraining] = {}
    for name, options in recipe.retrained.items():
        with stage(f"retrain by {options.method}"):
            retraining[name] = retrain_from(shortened, options, directory / name, session=session)
        models[name] = opened_within(directory, name)
    quantization = None
    if run.quantizing is not None:
        with stage("quantize"):
            recovered = {name: models[name] for name in models if name != PRUNED}
            quantization = _quantize(
                run, directory, run.quantizing, recovered or {PRUNED: shortened}
            )
        models[QUANTIZED] = opened_within(directory, QUANTIZED)
    return _Derived(
        models=models,
        pruning=pruning,
        healing=healing,
        retraining=retraining,
        quantization=quantization,
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
    """With a target of size or speed turned into a number of blocks."""
    target: Target | None
    sizes: list[int]
    """The numbers of blocks that targets of quality choose from; empty without such targets."""
    criterion: Criterion
    scored: bool
    """Whether blocks are scored."""
    healed: dict[str, str]
    """The option by which the criterion measures models after healing."""

    @property
    def searched(self) -> bool:
        """Whether the plan of each number of blocks takes a search of its own."""
        return self.scored and self.criterion.needs == "sets"

    def criterion_for(self, budget: Budget) -> Criterion:
        """The criterion; one that removes blocks itself gets the amount, or for targets of quality
        the most, since an order of removals has all numbers."""
        recipe = self.recipe
        if self.sizes and not self.searched:
            budget = budget.sized(self.sizes[-1])
        amount = removal_options(self.criterion, budget, self.checkpoint.info())
        return resolve(recipe.criterion, {**amount, **self.healed, **recipe.options})


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
    if recipe.budget.target() is None and not recipe.budget.quality():
        check_budget(recipe.budget, checkpoint.info())
    recipe.require_tasks()
    check_any_removal(checkpoint, recipe.budget)
    claim_directory(directory, checkpoint, recipe.model_dump(mode="json"))
    session = session_of(recipe)
    scored = recipe.budget.blocks is None and published is None
    tasks = prepare_tasks([checkpoint], recipe.evaluation, session)
    quantizing = check_later_stages(recipe, checkpoint, session)
    texts = _texts(
        recipe,
        checkpoint,
        scoring=scored and criterion.needs_text,
        quantizing=quantizing,
        session=session,
        directory=directory,
    )
    if recipe.healing is not None:
        require_free(directory / HEALED, Healing.FILE)
        check_healable(recipe.healing, checkpoint, session)
    expect_stages(_stage_count(recipe, scored=scored))
    budget, target = targets.resolve(recipe.budget, checkpoint, session, directory=directory)
    sizes = sizes_of(budget, checkpoint.info()) if budget.quality() else []
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
        sizes=sizes,
        criterion=criterion,
        scored=scored,
        healed=healed,
    )


def _stage_count(recipe: Recipe, *, scored: bool) -> int:
    """How many stages a run has: prepare, prune and eval, and those that are wanted."""
    quality = recipe.budget.quality()
    wanted = (scored, quality, recipe.healing, recipe.quantization, recipe.benchmark)
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
    asked = recipe.budget.asked()
    periods = "-periods" if recipe.budget.period_aligned else ""
    published = "-published-order" if recipe.use_published_order else ""
    if "blocks" in asked:
        return Path("runs") / f"{name}-blocks{'-'.join(map(str, asked['blocks']))}"
    amounts = "-".join(
        f"{amount}{value}".replace("%", "percent") for amount, value in asked.items()
    )
    return Path("runs") / f"{name}-{recipe.criterion}-{amounts}{periods}{published}"


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
    recipe: Recipe,
    checkpoint: Checkpoint,
    *,
    scoring: bool,
    quantizing: QuantizeOptions | None,
    session: Session,
    directory: Path,
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
        session=session,
        directory=directory,
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
    if not run.sizes:
        delete([run.directory / QualityTarget.FILE])
        discard_rooms(run.directory)
    delete([run.directory / QualityTarget.PLANNED])
    if not run.scored:
        delete([run.directory / "scores.json", *run.directory.glob("calibration.*")])
    scores = _scores(run, run.directory, run.budget) if run.scored else None
    plan = build_plan(
        run.budget, model=run.checkpoint.info(), scores=scores, published=run.published
    )
    plan.save(run.directory / "plan.json")
    by_samples = scores is not None and scores.samples is not None
    if line := undecided(plan.removed, plan.near_ties, by_samples):
        log.info(line)
    return plan


def _scores(run: _Prepared, directory: Path, budget: Budget) -> BlockScores:
    """The scores for a budget, in a directory."""
    criterion = run.criterion_for(budget)
    [scores] = score_in(
        directory,
        run.checkpoint,
        [criterion],
        run.texts.calibration,
        run.session,
        healing=run.texts.healing
        or text_to_heal_with(run.checkpoint, [criterion], run.recipe.calibration),
    ).values()
    return scores


def _sized(run: _Prepared) -> _Prepared:
    """The run with the number of blocks that its targets of quality allow."""
    model, most = run.checkpoint.info(), run.budget.sized(run.sizes[-1])
    scores = _scores(run, run.directory, most) if run.scored and not run.searched else None

    @cache
    def plan_of(number: int) -> PrunePlan:
        budget, found = run.budget.sized(number), scores
        if run.searched:
            found = _scores(run, room_of(run.directory, number), budget)
        return build_plan(budget, model=model, scores=found, published=run.published)

    sizes = run.sizes if run.searched else list(plans_of(run.sizes, plan_of))

    def write(directory: Path, plan: PrunePlan) -> tuple[str, Checkpoint]:
        return list(_derived(run, directory, plan).models.items())[-1]

    recipe = run.recipe
    search = SizeSearch(
        directory=run.directory,
        checkpoint=run.checkpoint,
        session=run.session,
        budget=run.budget,
        sizes=sizes,
        plan_of=plan_of,
        searched=run.searched,
        write=write,
        recovers=bool(recipe.healing or recipe.retraining or recipe.quantization),
        text=run.texts.evaluation[0],
        evaluation=recipe.evaluation,
        tasks=run.tasks,
        fingerprint=_quality_fingerprint(run),
        hints=_hints(recipe),
    )
    number = search.run()
    search.take(number)
    return replace(run, budget=run.budget.sized(number))


def _quality_fingerprint(run: _Prepared) -> str:
    """Everything that the number of blocks depends on."""
    recipe, texts = run.recipe, run.texts
    calibrations = (texts.calibration, texts.healing, texts.quantization)
    unused = {"prompt": None, "continuations": 0, "new_tokens": 1, "seed": 0, "probe": False}
    return fingerprint(
        {
            "recipe": recipe.model_dump(
                mode="json", exclude={*NOT_COMPARED, "benchmark", "evaluation"}
            ),
            "calibrations": [text and text.info.tokens_fingerprint for text in calibrations],
            "training data": [setup.data_state(options) for options in recipe.retraining],
            "evaluation": evaluation_fingerprint(
                [("original", run.checkpoint)],
                texts.evaluation[:1],
                recipe.evaluation.model_copy(update=unused),
                run.session,
                run.tasks if run.budget.min_task_mean is not None else None,
            ),
            "at least": run.budget.remove,
        }
    )


def _hints(recipe: Recipe) -> list[str]:
    """What a run does not do yet that may meet its targets of quality."""
    return [
        *([] if recipe.healing else ["--heal regression"]),
        *([] if recipe.retraining else ["--retrain distill"]),
        *([] if recipe.criterion == "auto" or recipe.use_published_order else ["--criterion auto"]),
    ]


def opened_within(directory: Path, name: str) -> Checkpoint:
    """A checkpoint of the run under its name there, so that results do not depend on the path."""
    return replace(open_checkpoint(directory / name), id=name)


def _quantize(
    run: _Prepared, directory: Path, options: QuantizeOptions, candidates: Mapping[str, Checkpoint]
) -> Quantization:
    """quantized/ from the best of the candidates."""
    target = directory / QUANTIZED
    require_free(target, Quantization.FILE)
    name = best_of(candidates, run.texts, run.session, directory / "eval.json")
    if len(candidates) > 1:
        log.info("%s has the lowest perplexity and is quantized", name)
    return quantize.quantize_from(
        candidates[name], options, target, calibration=run.texts.quantization, session=run.session
    )
