"""Which unit to remove, blocks or heads and neurons: each method at the same number of parameters.

    depth   whole blocks, by a criterion (ppl, taylor)       sets the number of parameters
    width   heads and neurons, by llm-pruner, wanda-sp, flap  as near to that number as units allow

    runs/<model>-units/  ppl/ taylor/ llm-pruner/ wanda-sp/ flap/
                         NAME-healed/ and NAME-retrained/ of each
                         units.json  eval.json  bench.json  units.html

All see the same calibration text, are healed on the same text, retrained alike, measured on the
same text and tasks, and take turns when their speed is measured.

    shortllm compare-units MODEL --ratio 0.2 --heal regression --retrain lora
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shortllm import criteria, pipeline
from shortllm import run_directory as rundir
from shortllm.benchmark.options import BenchmarkOptions
from shortllm.calls import accepts
from shortllm.checkpoint.hub import ModelSource
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.comparison.options import DEPTH, UNITS_FILE, WIDTH, Candidate, UnitsComparison
from shortllm.criteria import Criterion, resolve
from shortllm.errors import BudgetError, CriterionError, RecipeError, did_you_mean
from shortllm.evaluation.evaluate import prepare_tasks
from shortllm.evaluation.options import Evaluation
from shortllm.evaluation.texts import Texts, prepare_texts
from shortllm.files import fingerprint, overwriting, releasing
from shortllm.healing.heal import heal_from, healing_text
from shortllm.measure import bench_in, evaluate_in
from shortllm.model import Session
from shortllm.options import OneOrMore, overlaid
from shortllm.progress import numbered_stages, stage
from shortllm.pruning.budget import Budget, check_budget
from shortllm.pruning.planning import build_plan
from shortllm.pruning.prune import prune_from
from shortllm.pruning.score import score_in
from shortllm.recipe import Recipe
from shortllm.runtime import versions
from shortllm.width_pruning.options import WidthOptions

if TYPE_CHECKING:
    from shortllm.data.calibration import Calibration
    from shortllm.evaluation.tasks import TaskSet


HEALED, RETRAINED = "-healed", "-retrained"
"""What the names of models end in that were made of a candidate."""

TOLERANCE = 0.01
"""Part of the parameters by which a candidate may miss the number of the others."""


def default_directory(model: str) -> Path:
    """`runs/<model>-units`."""
    return Path("runs") / f"{rundir.short_name(model)}-units"


def asked_methods(names: Sequence[str]) -> tuple[list[Criterion], list[str]]:
    """The criteria of depth and the methods of width among some names."""
    if len(set(names)) != len(names):
        raise CriterionError(f"a method was given twice in {', '.join(names)}. Name each once")
    width = [name for name in names if name in WIDTH]
    known = [*criteria.names(), *WIDTH]
    for name in names:
        if name not in known:
            raise CriterionError(
                f"'{name}' is neither a criterion nor a width method.{did_you_mean(name, known)}"
            )
    depth = [resolve(name, {}) for name in names if name not in width]
    if not depth:
        raise CriterionError(
            "no criterion of depth was named, and it sets the number of parameters for all. Add "
            "one, e.g. ppl"
        )
    return depth, width


@releasing()
@accepts(recipe=Recipe)
def compare_units(
    model: ModelSource | None = None,
    *,
    recipe: Recipe,
    methods: OneOrMore[str] | None = None,
    out: Path | None = None,
    command: Sequence[str] = (),
) -> UnitsComparison:
    """Width against depth pruning at the same number of parameters: quality, speed, memory.

    Writes the checkpoints, their evaluation and benchmark, units.json and units.html; what is up to
    date is skipped.

    Args:
        model: a checkpoint directory, a Hub id, or a loaded model. Default: the recipe's.
        recipe: budget of depth, calibration, evaluation, benchmark, and what all candidates get, if
            anything: healing without training, which for width is the repair of what is left, and
            retraining; its fields can be given as keywords.
        methods: depth criteria, of which the first sets the number of parameters, and width
            methods. Default: ppl, taylor and all width methods.
        out: run directory. Default: `runs/<model>-units`.
        command: the command line, for run.json.
    Returns:
        The candidates; what they can do and how fast they are is in eval.json and bench.json.
    Raises:
        ShortLLMError: any kind, before the model is loaded wherever that can be known.
    """
    if model is not None:
        recipe = overlaid(recipe, Recipe(model=model))
    methods = [*DEPTH, *WIDTH] if methods is None else methods
    depth, width = asked_methods(methods)
    directory = out or default_directory(recipe.model)
    checkpoint = open_checkpoint(
        recipe.model,
        revision=rundir.pinned(recipe.model, recipe.revision, directory),
        special_tokens=recipe.special_tokens,
    )
    recipe = recipe.resolved(checkpoint.model_type)
    if recipe.quantization is not None:
        raise RecipeError(
            "the recipe quantizes, and width and depth are compared before that. Give --set "
            "quantization=null"
        )
    if recipe.drop_heads:
        raise RecipeError(
            "width keeps prediction heads, so the numbers of parameters would differ. Leave out "
            "--drop-heads"
        )
    check_budget(recipe.budget, checkpoint.info())
    chosen = recipe.model_dump(mode="json") | {"methods": methods}
    rundir.claim_directory(directory, checkpoint, chosen)
    pipeline.check_any_removal(checkpoint, recipe.budget)
    session = pipeline.session_of(recipe)
    tasks = prepare_tasks([checkpoint], recipe.evaluation, session)
    pipeline.check_later_stages(recipe, checkpoint, session)
    healing = None
    if recipe.healing is not None:
        healing = healing_text(recipe.healing, checkpoint, recipe.calibration)
    texts = prepare_texts(checkpoint, recipe.calibration, recipe.evaluation, healing=healing)
    rundir.write_run_file(directory, chosen, checkpoint, command)
    # score; each candidate, healed and retrained; eval and bench
    ways = 1 + (recipe.healing is not None) + bool(recipe.retraining)
    with numbered_stages(3 + ways * len(methods)), overwriting():  # the recipe has been compared
        return _compared(directory, checkpoint, recipe, depth, width, texts, tasks, session)


def _compared(
    directory: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    depth: Sequence[Criterion],
    width: Sequence[str],
    texts: Texts,
    tasks: TaskSet | None,
    session: Session,
) -> UnitsComparison:
    """Make all candidates, measure them, and write what was found."""
    from shortllm.reporting import write_units

    made = _shorter(directory, checkpoint, recipe.budget, depth, texts.calibration, session)
    goal = next(iter(made.values())).parameters
    narrowing = narrowing_to(checkpoint, width, goal, session)
    made |= _narrower(directory, checkpoint, narrowing, texts.calibration, session)
    _require_alike(made, goal)
    healed = {}
    if recipe.healing is not None and texts.healing is not None:
        for one in depth:
            target = directory / f"{one.name}{HEALED}"
            with stage(target.name):
                heal_from(
                    made[one.name], checkpoint, recipe.healing, target,
                    calibration=texts.healing, session=session,
                )  # fmt: skip
            healed[one.name] = pipeline.opened_within(directory, target.name)
        repairing = {
            name: options.model_copy(update={"repair": True}) for name, options in narrowing.items()
        }
        healed |= _narrower(
            directory, checkpoint, repairing, texts.calibration, session, refit_on=texts.healing
        )
    retrained = _retrained(directory, made, recipe, session)
    models = {
        "original": checkpoint,
        **made,
        **{f"{name}{HEALED}": one for name, one in healed.items()},
        **{f"{name}{RETRAINED}": one for name, one in retrained.items()},
    }
    with stage("eval"):
        evaluation = evaluate_in(directory, models, recipe.evaluation, texts, tasks, session)
    session.release()
    timed = {"original": checkpoint, **made}
    with stage("bench"):
        bench_in(directory, timed, recipe.benchmark or BenchmarkOptions(), session)
    found = _record(checkpoint, recipe, made, healed, retrained, evaluation)
    found.save(directory / UNITS_FILE)
    write_units(directory)
    return found


def _shorter(
    directory: Path,
    checkpoint: Checkpoint,
    budget: Budget,
    asked: Sequence[Criterion],
    calibration: Calibration | None,
    session: Session,
) -> dict[str, Checkpoint]:
    """A checkpoint with fewer blocks by each criterion, and its plan next to it."""
    with stage("score"):
        scores = score_in(directory, checkpoint, asked, calibration, session)
    made = {}
    for one in asked:
        plan = build_plan(budget, model=checkpoint.info(), scores=scores[one.name])
        plan.save(directory / f"plan-{one.name}.json")
        with stage(one.name):
            prune_from(checkpoint, plan, directory / one.name, session=session)
        made[one.name] = pipeline.opened_within(directory, one.name)
    return made


def narrowing_to(
    checkpoint: Checkpoint, methods: Sequence[str], goal: int, session: Session
) -> dict[str, WidthOptions]:
    """How each method of width leads to `goal` parameters, or nearly."""
    from shortllm.width_pruning.groups import options_to_remove
    from shortllm.width_pruning.structure import find_groups

    found: dict[str, WidthOptions] = {}
    for method in methods:
        options = WidthOptions(method=method, ratio=0.5).resolved(checkpoint.block_count)
        assert options.start is not None and options.end is not None
        groups = find_groups(session.decoder(checkpoint), range(options.start, options.end))
        found[method] = options_to_remove(checkpoint.parameters - goal, options, groups)
    return found


def _narrower(
    directory: Path,
    checkpoint: Checkpoint,
    narrowing: Mapping[str, WidthOptions],
    calibration: Calibration | None,
    session: Session,
    *,
    refit_on: Calibration | None = None,
) -> dict[str, Checkpoint]:
    """A checkpoint with fewer heads and neurons by each method; healed if there is text for it."""
    from shortllm.width_pruning.prune_width import width_from

    made = {}
    for method, options in narrowing.items():
        target = directory / f"{method}{HEALED if refit_on else ''}"
        with stage(target.name):
            width_from(
                checkpoint, options, target, calibration=calibration, session=session,
                refit_on=refit_on,
            )  # fmt: skip
        made[method] = pipeline.opened_within(directory, target.name)
    return made


def _require_alike(made: Mapping[str, Checkpoint], goal: int) -> None:
    """Refuse candidates whose units are too large to come near the number of parameters."""
    for name, one in made.items():
        missed = one.parameters / goal - 1
        if name in WIDTH and abs(missed) > TOLERANCE:
            raise BudgetError(
                f"{name} leads to {one.parameters:,} parameters, {missed:+.1%} of what depth "
                "pruning leads to: its units are too large for this model. Choose another "
                "--ratio, or leave the method out with --methods"
            )


def _retrained(
    directory: Path, made: Mapping[str, Checkpoint], recipe: Recipe, session: Session
) -> dict[str, Checkpoint]:
    """Each candidate after the same retraining; none where the recipe has none."""
    from shortllm.retraining.retrain import retrain_from

    retrained = {}
    for options in recipe.retraining[:1]:
        for name, checkpoint in made.items():
            target = f"{name}{RETRAINED}"
            with stage(target):
                retrain_from(checkpoint, options, directory / target, session=session)
            retrained[name] = pipeline.opened_within(directory, target)
    return retrained


def _record(
    checkpoint: Checkpoint,
    recipe: Recipe,
    made: Mapping[str, Checkpoint],
    healed: Mapping[str, Checkpoint],
    retrained: Mapping[str, Checkpoint],
    evaluation: Evaluation,
) -> UnitsComparison:
    goal = next(iter(made.values())).parameters
    candidates = [
        Candidate(
            name=name,
            unit="width" if name in WIDTH else "depth",
            parameters=one.parameters,
            missed=one.parameters / goal - 1,
            healed=f"{name}{HEALED}" if name in healed else None,
            retrained=f"{name}{RETRAINED}" if name in retrained else None,
        )
        for name, one in made.items()
    ]
    healing, retraining = (
        [one.model_dump(mode="json", exclude_unset=True) for one in asked if one is not None]
        for asked in ([recipe.healing], recipe.retraining[:1])
    )
    inputs = {
        "evaluation": evaluation.fingerprint,
        "candidates": [one.model_dump() for one in candidates],
    }
    return UnitsComparison(
        model=checkpoint.info(),
        asked=recipe.budget.asked(),
        candidates=candidates,
        healing=next(iter(healing), None),
        retraining=next(iter(retraining), None),
        versions=versions(),
        fingerprint=fingerprint(inputs),
    )
