"""A recipe, and what was typed laid over it: flags go before what the recipe says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import typer

from shortllm.cli.values import (
    bytes_in,
    names_in,
    numbers_in,
    options_in,
    parameters_in,
    places_in,
    single,
)
from shortllm.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from shortllm.recipe import Recipe

PLACES = {
    "model": "model",
    "revision": "revision",
    "criterion": "criterion",
    "data": "calibration.data",
    "calibration": "calibration.file",
    "sampler": "calibration.sampler",
    "samples": "calibration.samples",
    "length": "calibration.length",
    "seed": "calibration.seed",
    "bos_every_sample": "calibration.bos_every_sample",
    "eval_data": "evaluation.data",
    "eval_length": "evaluation.length",
    "eval_bos": "evaluation.bos",
    "max_segments": "evaluation.max_segments",
    "prompt": "evaluation.prompt",
    "continuations": "evaluation.continuations",
    "new_tokens": "evaluation.new_tokens",
    "task_data": "evaluation.task_data",
    "limit": "evaluation.limit",
    "batch_size": "evaluation.batch_size",
    "remove": "budget.remove",
    "ratio": "budget.ratio",
    "param_ratio": "budget.param_ratio",
    "target_speedup": "budget.target_speedup",
    "contiguous": "budget.contiguous",
    "protect_first": "budget.protect_first",
    "protect_last": "budget.protect_last",
    "period_aligned": "budget.period_aligned",
    "use_published_order": "use_published_order",
    "device": "device",
    "dtype": "dtype",
    "stream": "stream",
}
"""Flag -> the field of a recipe that it sets."""

READ: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "blocks": ("budget.blocks", numbers_in),
    "target_params": ("budget.target_params", parameters_in),
    "target_memory": ("budget.target_memory", bytes_in),
    "tasks": ("evaluation.tasks", names_in),
    "max_memory": ("max_memory", bytes_in),
}
"""The same for flags whose text is read first."""

AMOUNTS = {
    name: f"budget.{name}"
    for name in (
        "remove", "ratio", "param_ratio", "blocks", "target_params", "target_memory",
        "target_speedup",
    )
}  # fmt: skip
"""Flags that say how much goes: one of them takes the place of what the recipe says."""


def recipe_of(
    ctx: typer.Context,
    model: str | None,
    recipe: str | None,
    retrain: str | None,
    places: Sequence[str],
) -> Recipe:
    """What a command is asked to do.

    Args:
        recipe: name or file; default: that of the embedded model, or none for another model.
        retrain: ways of healing, or `none`.
        places: `FIELD=VALUE` for fields without a flag.
    Raises:
        ShortLLMError: what was typed, or the recipe, cannot be read.
    """
    import shortllm
    from shortllm.recipes import DEFAULT, changed, default_recipe, load_recipe

    changes = changes_of(ctx, places)
    if recipe is not None:
        base = load_recipe(recipe)
    else:
        base = default_recipe() if (model or DEFAULT) == DEFAULT else shortllm.Recipe()
    return changed(_healed(base, retrain), changes, "command line")


def changes_of(ctx: typer.Context, places: Sequence[str]) -> dict[str, Any]:
    """What was typed, by its place in a recipe; what was not leaves the recipe as it is.

    Raises:
        ShortLLMError: a value of another form.
    """
    typed = {
        name: value
        for name, value in ctx.params.items()
        if (source := ctx.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }
    changes = {place: typed[name] for name, place in PLACES.items() if name in typed}
    for name, (place, read) in READ.items():
        if name in typed:
            changes[place] = read(typed[name])
    if any(name in typed for name in AMOUNTS):
        changes = {place: changes.get(place) for place in AMOUNTS.values()} | changes
    if "option" in typed:
        criterion = typed.get("criterion")
        options = options_in(typed["option"], [criterion or "ppl"])
        changes["options"] = single(options, criterion or next(iter(options)))
        changes.setdefault("criterion", next(iter(options)))
    for flag, field in (("heal", "healing"), ("quantize", "quantization")):
        if typed.get(flag) == "none":
            changes[field] = None
        elif flag in typed:
            changes[f"{field}.method"] = typed[flag]
    if "bench" in typed:
        changes["benchmark"] = {} if typed["bench"] else None
    return changes | places_in(places)


def _healed(base: Recipe, methods: str | None) -> Recipe:
    """The recipe with the ways of healing asked for, each as it has it or else with defaults."""
    if methods is None:
        return base
    import shortllm
    from shortllm.retraining.methods import METHODS

    names = [] if methods == "none" else names_in(methods)
    for name in names:
        if name not in METHODS.names():
            hint = did_you_mean(name, METHODS.names())
            raise RecipeError(f"--retrain {name}: no such method.{hint}")
    held: dict[str, shortllm.RetrainOptions] = {one.method: one for one in base.retraining}
    chosen = [
        held.get(name) or shortllm.RetrainOptions.model_validate({"method": name}) for name in names
    ]
    return base.model_copy(update={"retraining": chosen})
