"""Recipes: every choice of a run in one record, from YAML files and from what users type.

A recipe composes the options of the stages; its resolved values are saved to run.json. Flags of
`shortllm run`, the keys of a .yaml recipe and the keywords of `shortllm.run` are its fields.
Unknown keys are refused, and what is left out has its default. The recipes that come with the
package are the files in `recipes/`.

    shortllm recipes list
    shortllm run --recipe llama-1-7b-taylor
    shortllm run --recipe my.yaml --remove 4 --set retraining.max_steps=200
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from shortllm import criteria
from shortllm.benchmark.options import BenchmarkOptions
from shortllm.checkpoint.hub import EMBEDDED, ModelSource
from shortllm.checkpoint.options import SurgeryOptions
from shortllm.data.options import CalibrationOptions
from shortllm.errors import RecipeError, did_you_mean, install_hint
from shortllm.evaluation.options import EvaluationOptions
from shortllm.healing.options import HealOptions
from shortllm.healing.options import MethodName as HealMethod
from shortllm.options import Flag, Nested
from shortllm.pruning.budget import Budget
from shortllm.published import Published
from shortllm.quantizing.options import MethodName as QuantizeMethod
from shortllm.quantizing.options import QuantizeOptions
from shortllm.records import JsonObject, SpecialToken, validation_message
from shortllm.retraining.options import MethodName as RetrainMethod
from shortllm.retraining.options import RetrainOptions
from shortllm.runtime import Runtime

log = logging.getLogger(__name__)

DIRECTORY = Path(__file__).parent / "recipes"

DEFAULT = "embedded"
"""The recipe of `shortllm run` without a model."""

CRITERION_HELP = f"Rule that scores the blocks: {criteria.help_text()}."

CONTINUATIONS = 5
"""Generated samples per model in a run."""

HIDDEN = Flag(hidden=True)
HEAL, RETRAIN, QUANTIZE, BENCH = (
    Flag(name=f"--{name}", hidden=True) for name in ("heal", "retrain", "quantize", "bench")
)
"""Flags that `shortllm run` has of its own; here they are names of keywords."""


class Recipe(Runtime, SurgeryOptions):
    """A whole run."""

    panel: ClassVar[str] = "Scoring"

    about: Annotated[str, HIDDEN] = Field(default="", description="What it does, in one line.")
    model: Annotated[ModelSource, HIDDEN] = Field(
        default="embedded", description="Checkpoint directory, GGUF file, Hub id, or 'embedded'."
    )
    revision: Annotated[str | None, Flag(panel="Recipe")] = Field(
        default=None, description="Branch, tag or commit of a Hub model, as in MODEL@REVISION."
    )
    special_tokens: Annotated[dict[SpecialToken, int], HIDDEN] = Field(
        default_factory=dict,
        description="Token ids where the checkpoint names wrong ones. A BOS is added to each text.",
    )
    criterion: str = Field(default="ppl", description=CRITERION_HELP)
    options: Annotated[JsonObject, HIDDEN] = Field(
        default_factory=dict, description="Options of the criterion, e.g. {'power': 2}."
    )
    budget: Budget = Budget(ratio=0.25)
    use_published_order: bool = Field(
        default=False,
        description="Remove blocks in the order that the recipe has as published; score nothing.",
    )
    drop_heads: bool = Field(
        default=False,
        description="Leave out prediction heads (MTP), and what config.json says of them.",
    )
    calibration: CalibrationOptions = CalibrationOptions()
    healing: Annotated[HealOptions | None, Nested(skip=True), HEAL] = Field(
        default=None,
        description="How to heal the shortened model without training: a method, or its options.",
    )
    heal_aware: Annotated[bool | None, Flag(panel="Healing")] = Field(
        default=None,
        description="Judge the sets that a search or 'greedy' tries by what is left of their loss "
        "after healing. Default: if the run heals.",
    )
    retraining: Annotated[list[RetrainOptions], RETRAIN] = Field(
        default_factory=list,
        description="How to retrain the shortened model: one way or several, each from the same "
        "start.",
    )
    quantization: Annotated[QuantizeOptions | None, Nested(skip=True), QUANTIZE] = Field(
        default=None, description="How to quantize the best model. Default: not at all."
    )
    evaluation: Annotated[
        EvaluationOptions,
        Nested(
            rename={
                "data": "eval_data",
                "length": "eval_length",
                "bos": "eval_bos",
                "seed": "eval_seed",
            }
        ),
    ] = EvaluationOptions()
    benchmark: Annotated[BenchmarkOptions | None, Nested(skip=True), BENCH] = Field(
        default=None, description="How to measure speed and memory. Default: not at all."
    )
    published: Annotated[Published | None, HIDDEN] = Field(
        default=None, description="What was published about this model and criterion."
    )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context with what the recipe allows."""
        with super().applied(), SurgeryOptions.applied(self):
            yield

    @field_validator(
        "healing",
        mode="before",
        json_schema_input_type=HealOptions | HealMethod | Literal["none"] | None,
    )
    @classmethod
    def _healing_by_name(cls, given: Any) -> Any:
        return by_method(given)

    @field_validator(
        "quantization",
        mode="before",
        json_schema_input_type=QuantizeOptions | QuantizeMethod | Literal["none"] | None,
    )
    @classmethod
    def _quantization_by_name(cls, given: Any) -> Any:
        return by_method(given)

    @field_validator(
        "retraining",
        mode="before",
        json_schema_input_type=RetrainOptions
        | RetrainMethod
        | Literal["none"]
        | list[RetrainOptions | RetrainMethod],
    )
    @classmethod
    def _retraining_by_names(cls, given: Any) -> Any:
        return [one for one in map(by_method, given or ()) if one is not None]

    @field_validator(
        "benchmark", mode="before", json_schema_input_type=BenchmarkOptions | bool | None
    )
    @classmethod
    def _benchmark_or_none(cls, given: Any) -> Any:
        if isinstance(given, bool):
            return {} if given else None
        return given

    @property
    def retrained(self) -> dict[str, RetrainOptions]:
        """The retrainings by the names of their models: `retrained`, or of several
        `retrained-lora`, `retrained-full`, ...; the second of a method `retrained-lora-2`."""
        if len(self.retraining) == 1:
            return {"retrained": self.retraining[0]}
        named: dict[str, RetrainOptions] = {}
        for options in self.retraining:
            same = sum(other.method == options.method for other in named.values())
            number = f"-{same + 1}" if same else ""
            named[f"retrained-{options.method}{number}"] = options
        return named

    def require_tasks(self) -> None:
        """Refuse a target for the mean of tasks where there are none."""
        if self.budget.min_task_mean is not None and not self.evaluation.tasks:
            raise RecipeError("--min-task-mean needs tasks to measure. Add e.g. --tasks paper")

    def resolved(self, model_type: str) -> Recipe:
        """The same recipe with every default that depends on the model filled in."""
        from shortllm.data.calibration import resolve_calibration
        from shortllm.evaluation.evaluate import resolve_evaluation

        embedded = self.model == EMBEDDED
        calibration = resolve_calibration(self.calibration, model_type, embedded=embedded)
        evaluation = resolve_evaluation(
            self.evaluation,
            embedded=embedded,
            every=bool(calibration.bos_every_sample),
            continuations=CONTINUATIONS,
            calibrated_on=self.calibration.texts,
        )
        retraining = self.retraining
        if embedded:
            retraining = [
                one.model_copy(update={"data": one.data or EMBEDDED}) for one in retraining
            ]
        found = {"retraining": retraining, "calibration": calibration, "evaluation": evaluation}
        return self.model_copy(update=found)


def by_method(given: Any) -> Any:
    """The name of a method as its options; `none` as None."""
    if isinstance(given, str):
        return None if given == "none" else {"method": given}
    return given


# ---- files and settings


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by its name, or from a user's file."""
    path = _file_of(name)
    text = recipe_text(path)
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"{path} is not a recipe in YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path} contains no fields. For an example see: shortllm recipes show {DEFAULT}"
        )
    if "trust_remote_code" in content:
        raise RecipeError(
            f"{path}: a recipe cannot allow remote code. Give --trust-remote-code on the command "
            "line instead"
        )
    return parse_recipe(content, str(path))


def recipe_text(name: str | Path) -> str:
    """The YAML of a recipe by its name, or of a user's file, unchanged."""
    path = _file_of(name)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"there is no recipe {path}. See: shortllm recipes list") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error


class _Loader(yaml.SafeLoader):
    """Plain values only, and each field once: a repeated one would silently replace the first."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"line {line} has a reference (*name). Write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"'{key.value}' is given twice, first in line {line}")
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The content of a YAML text that JSON can express, else a ValueError."""
    try:
        content = yaml.load(text, Loader=_Loader)
        return json.loads(json.dumps(content, allow_nan=False, default=_refuse))
    except Exception as error:  # PyYAML raises errors of many kinds where a tag does not fit
        raise ValueError(" ".join(str(error).split())) from error


def _refuse(value: Any) -> None:
    raise ValueError(f"{value} is a {type(value).__name__}. Put it in quotes")


def _file_of(name: str | Path) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    path = DIRECTORY / f"{name}.yaml"
    if not path.is_file():
        raise RecipeError(
            f"no recipe is called '{name}'.{did_you_mean(str(name), recipe_names())}. A file of "
            "your own ends in .yaml"
        )
    return path


def default_recipe() -> Recipe:
    """The recipe of the embedded model, without what needs an extra that is not installed."""
    recipe = load_recipe(DEFAULT)
    left_out: dict[str, Any] = {}
    needed = {name for one in recipe.retraining for name in one.about.packages}
    if not all(map(find_spec, needed)):
        left_out["retraining"] = []
        log.info("retraining is left out. It needs: %s", install_hint("train"))
    if recipe.evaluation.tasks and find_spec("lm_eval") is None:
        left_out["evaluation.tasks"] = []
        log.info("tasks are left out. They need: %s", install_hint("eval"))
    return changed(recipe, left_out)


def parse_recipe(content: Mapping[str, Any], where: str) -> Recipe:
    """Fields as a recipe; an error calls them `where`."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{where}: {validation_message(error, Recipe)}") from error
    except TypeError as error:  # something else in place of a model
        raise RecipeError(f"{where}: model: {error}") from error


def settings_in(given: Sequence[str]) -> dict[str, Any]:
    """`retraining.max_steps=200` and the like as values by their place in a recipe."""
    settings: dict[str, Any] = {}
    for text in given:
        place, equals, value = text.partition("=")
        if not equals or not place.strip():
            raise RecipeError(
                f"--set '{text}' must have the form FIELD=VALUE, e.g. retraining.max_steps=200"
            )
        try:
            settings[place.strip()] = parse_yaml(value)
        except ValueError as error:
            raise RecipeError(f"--set '{text}': the value is not YAML ({error})") from error
    return settings


def changed(recipe: Recipe, changes: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """The recipe with other values at dotted places, e.g. `{"calibration.samples": 20}`.

    A place in `retraining` is set in every way of retraining; one in `benchmark` or `healing` turns
    that stage on.
    """
    content = recipe.model_dump(mode="json", exclude_unset=True)
    for place, value in changes.items():
        *parents, last = place.split(".")
        tables: list[Any] = [content]
        for part in parents:
            found = [_entered(table, part) for table in tables]
            tables = [one for each in found for one in (each if isinstance(each, list) else [each])]
        for table in tables:
            if not isinstance(table, dict):
                raise RecipeError(f"{where}: there is nothing in {'.'.join(parents)} to set")
            table[last] = value
    return parse_recipe(content, where)


def _entered(table: Any, part: str) -> Any:
    """The content of a field; an empty one becomes a table."""
    if not isinstance(table, dict):
        return None
    if table.get(part) is None:
        table[part] = {}
    return table[part]
