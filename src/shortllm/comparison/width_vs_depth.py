"""Which unit to remove, blocks or heads and neurons: each method at the same number of parameters.

    depth   whole blocks, by a criterion (ppl, taylor)       sets the number of parameters
    width   heads and neurons, by llm-pruner, wanda-sp, flap  as near to that number as units allow

    runs/<model>-units/  ppl/ taylor/ llm-pruner/ wanda-sp/ flap/  and NAME-healed/ of each
                         units.json  eval.json  bench.json  units.html

All see the same calibration text, are healed by the same retraining, measured on the same text and
tasks, and take turns when their speed is measured.

    shortllm compare-units MODEL --ratio 0.2 --retrain lora
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shortllm import criteria, pipeline
from shortllm import run_directory as rundir
from shortllm.benchmark.options import BenchmarkOptions
from shortllm.checkpoint.source import Checkpoint
from shortllm.comparison.options import UNITS_FILE, Candidate, UnitsComparison
from shortllm.criteria.selection import ResolvedCriterion, resolve
from shortllm.errors import BudgetError, CriterionError, RecipeError, did_you_mean
from shortllm.evaluation.evaluate import prepare_tasks
from shortllm.evaluation.options import Evaluation
from shortllm.evaluation.texts import prepare_texts
from shortllm.files import fingerprint, releasing
from shortllm.measure import bench_in, evaluate_in
from shortllm.model.session import Session
from shortllm.pruning.budget import Budget, check_budget
from shortllm.pruning.planning import build_plan
from shortllm.pruning.prune import prune_from
from shortllm.pruning.score import score_in
from shortllm.recipe import Recipe
from shortllm.runtime import versions
from shortllm.width_pruning.methods import METHODS
from shortllm.width_pruning.options import WidthOptions

if TYPE_CHECKING:
    from shortllm.data.calibration import Calibration


DEPTH = ("ppl", "taylor")
"""Criteria of depth pruning that are compared by default."""

WIDTH = METHODS.names()

HEALED_SUFFIX = "-healed"
"""What the name of a healed candidate ends in."""

TOLERANCE = 0.01
"""Part of the parameters by which a candidate may miss the number of the others."""


def default_directory(model: str) -> Path:
    """`runs/<model>-units`."""
    return Path("runs") / f"{rundir.short_name(model)}-units"


def asked_methods(names: Sequence[str]) -> tuple[list[ResolvedCriterion], list[str]]:
    """The criteria of depth and the methods of width among some names.

    Raises:
        CriterionError: an unknown name, one twice, or no criterion that blocks are removed by.
    """
    if len(set(names)) != len(names):
        raise CriterionError(f"a method was given twice in {', '.join(names)}. Name each once")
    width = [name for name in names if name in WIDTH]
    depth = [name for name in names if name not in WIDTH]
    known = [*criteria.names(), *WIDTH]
    for name in depth:
        if name not in known:
            raise CriterionError(
                f"'{name}' is neither a criterion nor a width method.{did_you_mean(name, known)}"
            )
    asked = [resolve(name, {}) for name in depth]
    if not asked:
        raise CriterionError(
            "no criterion of depth was named, and it sets the number of parameters for all. Add "
            "one, e.g. ppl"
        )
    return asked, width


@releasing()
def compare_units_in(
    directory: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    names: Sequence[str],
    *,
    command: Sequence[str] = (),
) -> UnitsComparison:
    """Make, heal and measure all candidates in a run directory, and write the page.

    What is up to date is not made again.

    Args:
        recipe: filled in; its budget says how many blocks go, its first retraining how all are
            healed.
        names: criteria of depth and methods of width.
    Raises:
        ShortLLMError: any of its kinds, before heavy work wherever that can be known.
    """
    from shortllm.reporting import write_units

    depth, width = asked_methods(names)
    if recipe.quantization is not None:
        raise RecipeError(
            "the recipe quantizes, and width and depth are compared before that. Give "
            "--set quantization=null"
        )
    if recipe.healing is not None:
        raise RecipeError(
            "the recipe heals without training, which width pruning has no gaps for. Give "
            "--set healing=null, and --retrain for a healing of all"
        )
    rundir.claim_directory(directory, checkpoint)
    check_budget(recipe.budget, checkpoint.info())
    pipeline.check_any_removal(checkpoint, recipe.budget)
    session = pipeline.session_of(recipe)
    tasks = prepare_tasks([checkpoint], recipe.evaluation, session)
    pipeline.check_later_stages(recipe, checkpoint, session)
    texts = prepare_texts(checkpoint, recipe.calibration, recipe.evaluation)
    rundir.write_run_file(
        directory, recipe.model_dump(mode="json") | {"methods": list(names)}, checkpoint, command
    )
    made = _shorter(directory, checkpoint, recipe.budget, depth, texts.calibration, session)
    goal = next(iter(made.values())).parameters
    made |= _narrower(directory, checkpoint, width, goal, texts.calibration, session)
    healed = _healed(directory, made, recipe, session)
    models = {"original": checkpoint, **made, **healed}
    evaluation = evaluate_in(directory, models, recipe.evaluation, texts, tasks, session)
    options = recipe.benchmark or BenchmarkOptions()
    session.release()
    measured = {"original": checkpoint, **made}
    bench_in(directory, measured, options, session)
    found = _record(checkpoint, recipe, made, healed, evaluation)
    found.save(directory / UNITS_FILE)
    write_units(directory)
    return found


def _shorter(
    directory: Path,
    checkpoint: Checkpoint,
    budget: Budget,
    asked: Sequence[ResolvedCriterion],
    calibration: Calibration | None,
    session: Session,
) -> dict[str, Checkpoint]:
    """A checkpoint with fewer blocks by each criterion, and its plan beside it."""
    scores = score_in(directory, checkpoint, asked, calibration, session)
    made = {}
    for one in asked:
        plan = build_plan(budget, model=checkpoint.info(), scores=scores[one.name])
        plan.save(directory / f"plan-{one.name}.json")
        prune_from(checkpoint, plan, directory / one.name, session=session)
        made[one.name] = pipeline.opened_within(directory, one.name)
    return made


def _narrower(
    directory: Path,
    checkpoint: Checkpoint,
    methods: Sequence[str],
    goal: int,
    calibration: Calibration | None,
    session: Session,
) -> dict[str, Checkpoint]:
    """A checkpoint with fewer heads and neurons by each method, of `goal` parameters or nearly.

    Raises:
        BudgetError: units so large that a method misses the number by more than `TOLERANCE`.
    """
    from shortllm.width_pruning.groups import options_to_remove
    from shortllm.width_pruning.prune_width import resolve, width_from
    from shortllm.width_pruning.structure import find_groups

    made: dict[str, Checkpoint] = {}
    for method in methods:
        options = resolve(WidthOptions(method=method, ratio=0.5), checkpoint.block_count)
        assert options.start is not None and options.end is not None
        decoder = session.decoder(checkpoint)
        groups = find_groups(decoder, range(options.start, options.end))
        options = options_to_remove(checkpoint.parameters - goal, options, groups)
        target = directory / method
        width_from(checkpoint, options, target, calibration=calibration, session=session)
        made[method] = pipeline.opened_within(directory, method)
        missed = made[method].parameters / goal - 1
        if abs(missed) > TOLERANCE:
            raise BudgetError(
                f"{method} leads to {made[method].parameters:,} parameters, {missed:+.1%} of what "
                f"depth pruning leads to: its units are too large for this model. Choose another "
                "--ratio, or leave the method out with --methods"
            )
    return made


def _healed(
    directory: Path, made: Mapping[str, Checkpoint], recipe: Recipe, session: Session
) -> dict[str, Checkpoint]:
    """Each candidate after the same retraining; none where the recipe has none."""
    from shortllm.retraining.retrain import retrain_from

    healed = {}
    for name, checkpoint in made.items():
        for options in recipe.retraining[:1]:
            target = f"{name}{HEALED_SUFFIX}"
            retrain_from(checkpoint, options, directory / target, session=session)
            healed[target] = pipeline.opened_within(directory, target)
    return healed


def _record(
    checkpoint: Checkpoint,
    recipe: Recipe,
    made: Mapping[str, Checkpoint],
    healed: Mapping[str, Checkpoint],
    evaluation: Evaluation,
) -> UnitsComparison:
    goal = next(iter(made.values())).parameters
    candidates = [
        Candidate(
            name=name,
            unit="width" if name in WIDTH else "depth",
            parameters=one.parameters,
            missed=one.parameters / goal - 1,
            healed=f"{name}{HEALED_SUFFIX}" if f"{name}{HEALED_SUFFIX}" in healed else None,
        )
        for name, one in made.items()
    ]
    return UnitsComparison(
        model=checkpoint.info(),
        asked=recipe.budget.asked(),
        candidates=candidates,
        retraining=(
            recipe.retraining[0].model_dump(mode="json", exclude_unset=True)
            if recipe.retraining
            else None
        ),
        versions=versions(),
        fingerprint=fingerprint(
            {
                "evaluation": evaluation.fingerprint,
                "candidates": [one.model_dump() for one in candidates],
            }
        ),
    )
