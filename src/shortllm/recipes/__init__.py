"""Recipes: whole runs in a file each, those that come with the package and a user's own.

A recipe is a YAML file with the fields of `shortllm.Recipe`; unknown fields are refused. What it
leaves out has its default.

    shortllm recipes list
    shortllm run --recipe llama-1-7b-taylor
    shortllm run --recipe my.yaml --remove 4 --set retraining.max_steps=200
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from shortllm.errors import RecipeError, did_you_mean
from shortllm.options import validation_message
from shortllm.recipe import Recipe
from shortllm.records import Record

log = logging.getLogger(__name__)

DIRECTORY = Path(__file__).parent
DEFAULT = "embedded"
"""The recipe of `shortllm run` without a model."""


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by its name, or from a user's file."""
    path = _file_of(name)
    text = recipe_text(name)
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
        log.info("retraining is left out. It needs: pip install 'shortllm[train]'")
    if recipe.evaluation.tasks and find_spec("lm_eval") is None:
        left_out["evaluation.tasks"] = []
        log.info("tasks are left out. They need: pip install 'shortllm[eval]'")
    return changed(recipe, left_out)


def parse_recipe(content: Mapping[str, Any], where: str) -> Recipe:
    """Fields as a recipe; an error calls them `where`."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = [part for part in first["loc"] if isinstance(part, str)]
        if first["type"] == "extra_forbidden":
            fields = _fields(place[:-1])
            raise RecipeError(
                f"{where}: unknown field '{'.'.join(place)}'.{did_you_mean(place[-1], fields)}"
            ) from error
        raise RecipeError(f"{where}: {validation_message(error)}") from error


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


def _fields(place: list[str]) -> list[str]:
    """Names of the fields that a place in a recipe can have."""
    kind: Any = Recipe
    for part in place:
        kind = _record_in(kind.model_fields[part].annotation)
    return list(kind.model_fields)


def _record_in(annotation: Any) -> Any:
    """The record type of a field, alone, in a list or a dict, or optional."""
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return annotation
    return next(filter(None, map(_record_in, get_args(annotation))), None)


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
