"""Shorten a model without leaving Python: what comes back is a model in memory.

    short = shortllm.shorten(model, remove=6, data="my_text.jsonl")
    short.save_pretrained("short")

It is the checkpoint that `prune` and `heal` write, loaded from a temporary directory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from shortllm.calls import accepts
from shortllm.checkpoint.hub import ModelSource
from shortllm.checkpoint.loaded import ELSEWHERE, model_called
from shortllm.checkpoint.options import SurgeryOptions
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.criteria import resolve
from shortllm.data.calibration import Calibration, calibrate
from shortllm.data.options import CalibrationOptions
from shortllm.errors import BudgetError
from shortllm.files import require_writable, translate_os_errors
from shortllm.healing.heal import check_healable, heal_from, healing_text
from shortllm.healing.options import HealOptions
from shortllm.model import Session
from shortllm.model.loading import load
from shortllm.options import OneOrMore, options_from
from shortllm.pipeline import check_any_removal, healing_of, opened_within, session_of
from shortllm.pruning import targets
from shortllm.pruning.budget import Budget, check_budget, removal_options, require_no_quality
from shortllm.pruning.planning import build_plan
from shortllm.pruning.prune import prune_from
from shortllm.pruning.records import PrunePlan, load_plan
from shortllm.pruning.score import score_blocks, text_to_heal_with
from shortllm.recipe import Recipe
from shortllm.run_directory import HEALED, PRUNED
from shortllm.runtime import Runtime, is_trusted, quiet_transformers


@accepts(budget=Budget, calibration=CalibrationOptions, runtime=Runtime, surgery=SurgeryOptions)
def shorten(
    model: ModelSource,
    *,
    plan: PrunePlan | Path | OneOrMore[int] | None = None,
    criterion: str = "ppl",
    options: dict[str, Any] | None = None,
    heal: str | HealOptions | None = None,
    budget: Budget,
    calibration: CalibrationOptions,
    runtime: Runtime,
    surgery: SurgeryOptions,
    revision: str | None = None,
    verify: bool = True,
) -> Any:
    """A shorter model in memory; the given one stays as it is.

    A loaded model is saved to a temporary directory first, and the result is loaded from another
    one, so the disk of TMPDIR needs room for both. In memory, scoring and verifying take the model
    a second time, in the type that is computed in; if it does not fit, its blocks are read one at a
    time. Neither happens with the numbers of the blocks and `verify=False`.

    Args:
        model: a loaded model, a checkpoint directory, or a Hub id.
        plan: a plan, a plan.json, a run directory, or the numbers of the blocks to remove, instead
            of a budget.
        criterion: how to choose the blocks.
        options: of the criterion, e.g. `{"power": 2}` for `taylor`.
        heal: a method to heal with, without training, or its options. Default: not at all.
        budget: how much to remove; its fields can be given as keywords, e.g. `remove=6`.
        calibration: the text to score on, and to heal with; its fields can be given as keywords.
        runtime: where to compute; its fields can be given as keywords.
        surgery: `accept_unknown_references`; it can be given as a keyword.
        revision: of a Hub model.
        verify: load the original and the result and compare what they compute.
    Returns:
        The model, of the class, type and device of the given one; of a directory or Hub id in the
        type it is stored in. `model.config.shortllm` says which blocks are gone.
    Raises:
        ShortLLMError: any kind, before the model is loaded wherever that can be known.
    """
    stages = {"budget": budget, "calibration": calibration, "healing": heal}
    scored = {"model": model, "criterion": criterion, "options": options or {}}
    recipe = options_from(Recipe, {**scored, **stages}, base=runtime)
    if plan is None:
        budget.asked()
        require_no_quality(budget)
    elif budget.model_fields_set:
        raise BudgetError("plan and budget both say which blocks go. Leave one of them out")
    checkpoint, session = open_checkpoint(model, revision=revision), session_of(recipe)
    text = None
    if recipe.healing is not None:
        text = calibrate(checkpoint, healing_text(recipe.healing, checkpoint, calibration))
        check_healable(recipe.healing, checkpoint, session)
    if plan is None:
        chosen = _planned(recipe, checkpoint, session)
    elif isinstance(plan, list):
        chosen = build_plan(Budget(blocks=plan), model=checkpoint.info())
    else:
        chosen = plan if isinstance(plan, PrunePlan) else load_plan(plan)
    return _shortened(checkpoint, chosen, recipe.healing, text, session, verify=verify)


def _planned(recipe: Recipe, checkpoint: Checkpoint, session: Session) -> PrunePlan:
    """The blocks to remove, by their scores unless the budget names them."""
    criterion, budget, model = recipe.criterion, recipe.budget, checkpoint.info()
    healed = healing_of(recipe, resolve(criterion, recipe.options))
    if budget.target() is None:
        check_budget(budget, model)
    check_any_removal(checkpoint, budget)
    budget, _ = targets.resolve(budget, checkpoint, session)
    if budget.blocks is not None:
        return build_plan(budget, model=model)
    amount = removal_options(resolve(criterion, recipe.options), budget, model)
    resolved = resolve(criterion, {**amount, **healed, **recipe.options})
    [scores] = score_blocks(
        checkpoint,
        calibrate(checkpoint, recipe.calibration, session=session) if resolved.needs_text else None,
        [resolved],
        session=session,
        healing=text_to_heal_with(checkpoint, [resolved], recipe.calibration),
    ).values()
    return build_plan(budget, model=model, scores=scores)


def _shortened(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    healing: HealOptions | None,
    text: Calibration | None,
    session: Session,
    *,
    verify: bool,
) -> Any:
    """The model without the blocks of the plan, healed if there are options and text for that."""
    place = Path(tempfile.gettempdir())
    require_writable(place, checkpoint.bytes, hint=ELSEWHERE)
    with (
        translate_os_errors(place, needed_bytes=checkpoint.bytes, hint=ELSEWHERE),
        tempfile.TemporaryDirectory(prefix="shortllm-") as directory,
    ):
        made = Path(directory) / PRUNED
        prune_from(checkpoint, plan, made, session=session if verify else None)
        if healing is not None and text is not None:
            pruned, made = opened_within(made.parent, PRUNED), made.with_name(HEALED)
            heal_from(pruned, checkpoint, healing, made, calibration=text, session=session)
        session.release()
        return _loaded_like(model_called(checkpoint.id), made, checkpoint.id, session)


def _loaded_like(given: Any, directory: Path, name: str, session: Session) -> Any:
    """The model in a directory, in the type and on the device of the given one."""
    how: dict[str, Any] = {"trust_remote_code": is_trusted()}
    if given is not None:
        attention = given.config._attn_implementation
        how |= {"dtype": given.dtype} | ({"attn_implementation": attention} if attention else {})
        if len(set(getattr(given, "hf_device_map", {}).values())) > 1:
            how["device_map"] = "auto"
    with quiet_transformers():
        model = load(directory, **how)
    device = session.device if given is None else given.device
    if model.device != device and "device_map" not in how:
        model.to(device)
    # not the temporary directory: where the tokenizer is
    model.name_or_path = model.config._name_or_path = name if given is None else given.name_or_path
    return model.train(given.training) if given is not None else model
