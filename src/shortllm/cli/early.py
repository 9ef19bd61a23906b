"""What can be known to be wrong without torch and without a model, before either is loaded.

Loading torch and transformers takes seconds, and a device, a name or a path that is wrong shows
without them. Every check here calls the function by which the library refuses the same thing later.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shortllm import criteria
from shortllm.checkpoint.chat_template import has_chat_template
from shortllm.checkpoint.config import read_raw_config
from shortllm.checkpoint.hub import EMBEDDED, directory_here, hub_answers, is_gguf, require_there
from shortllm.comparison.options import ComparisonOptions
from shortllm.criteria import Criterion
from shortllm.data.at_hand import require_at_hand
from shortllm.data.options import SampledText
from shortllm.data.shapes import template_for, with_columns
from shortllm.data.sources import Role
from shortllm.errors import CheckpointError, DataError
from shortllm.evaluation.options import EvaluationOptions
from shortllm.evaluation.task_names import DEFAULT_ITEMS, check_tasks
from shortllm.files import require_free, require_no_file, require_writable
from shortllm.healing.options import Healing, HealOptions
from shortllm.merging.options import MergeOptions, Merging
from shortllm.options import Options
from shortllm.pruning.budget import require_plan_or_blocks
from shortllm.pruning.records import Pruning, load_plan, scores_path
from shortllm.quantizing.options import Quantization, QuantizeOptions
from shortllm.recipe import Recipe
from shortllm.records import DerivedRecord
from shortllm.retraining.options import GENERATED, Retraining, RetrainOptions, without_gpu
from shortllm.retraining.reporters import check_reporters
from shortllm.run_directory import require_run_directory
from shortllm.runtime import DeviceOptions, check_device, torch_is_for_cpus
from shortllm.sublayers.options import SublayerDrop, SublayerOptions
from shortllm.surgery.steps import advised, derived_steps
from shortllm.width_pruning.options import WidthOptions, WidthPruning

DERIVED: dict[type[Options], type[DerivedRecord]] = {
    HealOptions: Healing,
    MergeOptions: Merging,
    QuantizeOptions: Quantization,
    RetrainOptions: Retraining,
    SublayerOptions: SublayerDrop,
    WidthOptions: WidthPruning,
}
"""Options of a stage that writes a checkpoint -> the record by which that is recognised."""


def check(own: Mapping[str, Any], records: Iterable[Options]) -> None:
    """Check what a command was given: its own arguments by name, and its records of options."""
    records = list(records)
    for record in records:
        if isinstance(record, DeviceOptions):
            check_device(record.device)
    models = list(_models(own))
    for model in models:
        require_there(model, own.get("revision"))
    for record in records:
        _check_texts(record, models)
        out = own.get("out")
        if out is not None and type(record) in DERIVED:
            check_new_checkpoint(out, DERIVED[type(record)])
        _check_shortened(record, own)
    _go_offline()


def check_recipe(recipe: Recipe, out: Path | None) -> None:
    """Check a whole run."""
    check_device(recipe.device)
    criterion = criteria.resolve(recipe.criterion, recipe.options)
    recipe.budget.asked()
    recipe.require_tasks()
    require_there(recipe.model, recipe.revision)
    check_items([criterion])
    embedded = recipe.model == EMBEDDED
    scored = recipe.budget.blocks is None and not recipe.use_published_order
    wanted = scored and criterion.needs_text or recipe.healing is not None
    _check_calibration(recipe.calibration, embedded=embedded or not wanted)
    _check_texts(recipe.evaluation, [recipe.model])
    for options in recipe.retraining:
        data = options.data or (EMBEDDED if embedded else None)
        _check_texts(options.model_copy(update={"data": data}), [recipe.model])
    if out is not None:
        require_run_directory(out)
    _go_offline()


def check_scoring(
    model: str, criteria: Iterable[Criterion], calibration: SampledText, out: Path
) -> None:
    """Check the text, the tasks and the directory of scores."""
    check_items(criteria)
    needed = any(one.needs_text for one in criteria)
    _check_calibration(calibration, embedded=model == EMBEDDED or not needed)
    require_run_directory(out)


def check_items(criteria: Iterable[Criterion]) -> None:
    """Refuse unknown tasks of criteria that ask their items."""
    for one in criteria:
        if one.items is not None:
            check_tasks((one.items[0] or DEFAULT_ITEMS).split(","))


def check_scores(scores: Path) -> None:
    """Refuse scores that are not there."""
    scores_path(scores)


def check_pruning(plan: Path | None, blocks: list[int] | None, out: Path) -> None:
    """Check the plan and the target of a removal."""
    require_plan_or_blocks(plan, blocks)
    if plan is not None:
        load_plan(plan)
    if not is_gguf(out):
        check_new_checkpoint(out, Pruning)


def check_new_checkpoint(out: Path, kind: type[DerivedRecord]) -> None:
    """Refuse a directory that is not free for a new checkpoint."""
    require_free(out, kind.FILE)
    require_writable(out.absolute().parent)


def check_directory(out: Path) -> None:
    """Refuse a directory that cannot be written."""
    require_no_file(out)
    require_writable(out)


def _models(own: Mapping[str, Any]) -> Iterator[str]:
    """The models that a command was given, whatever it calls them."""
    for name in ("model", "models", "source", "original", "width", "depth"):
        value = own.get(name)
        if name == "model" and isinstance(value, list):  # NAME=MODEL
            yield from (
                place for _, equals, place in (one.partition("=") for one in value) if place
            )
        elif value is not None:
            yield from [value] if isinstance(value, str) else value


def _check_shortened(record: Options, own: Mapping[str, Any]) -> None:
    """Refuse a model that is as it was before any removal, where the original is needed."""
    if isinstance(record, RetrainOptions):
        needed = record.about.has_teacher and record.teacher is None
    else:
        needed = isinstance(record, HealOptions)
    directory = directory_here(own["model"]) if needed else None
    if directory is None:
        return
    try:
        derived_steps(own["model"], read_raw_config(own["model"], directory))
    except CheckpointError as error:
        if isinstance(record, RetrainOptions):
            raise advised(error, "--teacher") from error
        raise


def _check_texts(record: Options, models: list[str]) -> None:
    """Check every source of text that a record names, or that stands for none."""
    embedded = models == [EMBEDDED]
    if isinstance(record, EvaluationOptions):
        record.require_template_for_turns()
        check_tasks(record.tasks)
        if record.needs_template:
            for model in models:
                record.require_template(model, has_chat_template(model) is not False)
        _check_all(record.data, "evaluation", "--eval-data" if not models else "--data")
    elif isinstance(record, RetrainOptions):
        record.about.require_packages()
        check_reporters(record.report_to or [])
        if record.load_in_4bit and torch_is_for_cpus():
            raise without_gpu("torch is built without CUDA")
        if record.template == "chat":
            for model in models:
                template_for(has_chat_template(model) is not False, record.template)
        data = record.data or record.about.defaults.get("data")
        if data is not None and data != GENERATED:
            require_at_hand(
                with_columns(data, record.columns), role="training", form=record.form,
                what="" if record.data else "the default training data",
            )  # fmt: skip
        _check_all(record.eval_data, "evaluation", "--eval-data")
        if record.teacher is not None:
            require_there(record.teacher)
    elif isinstance(record, SampledText):
        _check_calibration(record, embedded=True)
    elif isinstance(record, ComparisonOptions) and record.texts:
        _check_all(record.texts, "calibration", "--text")
    elif isinstance(record, ComparisonOptions | HealOptions | MergeOptions):
        _check_calibration(record.calibration, embedded=embedded)
    elif isinstance(record, QuantizeOptions | WidthOptions):
        _check_calibration(record.calibration, embedded=embedded or not record.needs_text)
    elif isinstance(record, SublayerOptions):
        _check_calibration(record.calibration, embedded=embedded or record.criterion is None)


def _check_calibration(options: SampledText, *, embedded: bool) -> None:
    """Check the text of a calibration; the default one only where it is `embedded`'s or needed."""
    options.require_one_source()
    if options.source is not None:
        require_at_hand(options.source, role="calibration")
    elif options.file is not None and not options.file.exists():
        raise DataError(f"no such calibration file: {options.file}")
    elif options.file is None and not embedded:
        require_at_hand("bookcorpus", role="calibration", what="the default text")


def _check_all(sources: Iterable[str], role: Role, option: str) -> None:
    for source in sources:
        require_at_hand(source, role=role, option=option)


def _go_offline() -> None:
    """Have libraries that are still to be loaded leave a Hub alone that was found out of reach."""
    if hub_answers.cache_info().currsize and not hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"
