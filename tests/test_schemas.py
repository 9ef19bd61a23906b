"""JSON schemas: all records have one, the copies in docs are current, recipes are valid by it."""

from __future__ import annotations

import ast
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

import shortllm
from shortllm.recipe import DIRECTORY, recipe_names
from shortllm.schemas import _HOME, NAMES, schema

DOCS = Path(__file__).parents[1] / "docs"


class Loader(yaml.SafeLoader):
    """YAML 1.2 as editors read it, where `1e-4` is a number."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"-?\d+(\.\d+)?[eE][-+]?\d+$"), list("-0123456789")
)


def validate(name: str, content: Any) -> None:
    Draft202012Validator(schema(name)).validate(content)


def test_every_result_file_has_a_schema() -> None:
    bases, kinds = {"ResultFile", "DerivedRecord"}, set()
    for path in Path(shortllm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and bases & set(map(ast.unparse, node.bases)):
                kinds.add(node.name)
    kinds -= {*bases, "RunFile"}  # of run.json, pages read only a few keys
    assert len(kinds) == 18
    assert kinds | {"Recipe"} == {place.rpartition(".")[2] for place in _HOME.values()}


@pytest.mark.parametrize("name", NAMES)
def test_the_copy_in_docs_is_current(name: str) -> None:
    made = schema(name)
    Draft202012Validator.check_schema(made)
    path = DOCS / "schemas" / f"{name}.schema.json"
    assert json.loads(path.read_text()) == made, "run: python tools/make_schemas.py"


def test_the_script_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["make_schemas.py", str(tmp_path / "schemas")])
    runpy.run_path(str(DOCS.parent / "tools" / "make_schemas.py"), run_name="__main__")
    for path in (tmp_path / "schemas").iterdir():
        assert path.read_text() == (DOCS / "schemas" / path.name).read_text()


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_valid(name: str) -> None:
    validate("recipe", yaml.load((DIRECTORY / f"{name}.yaml").read_text(), Loader))


@pytest.mark.parametrize(
    "content",
    [
        {"modle": "x"},
        {"calibration": {"samples": "many"}},
        {"healing": "lora"},
        {"retraining": {"rnak": 4}},
        {"dtype": "int3"},
    ],
)
def test_mistakes_are_not(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        validate("recipe", content)


def test_short_forms_are_valid() -> None:
    validate("recipe", {"healing": "linear", "retraining": {"method": "full", "data": "c4"}})
