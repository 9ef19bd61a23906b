"""Everything public says what it is, and functions which errors they raise."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import shortllm
from shortllm import errors

SOURCE = Path(shortllm.__file__).parent
MODULES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))
KINDS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
"""Our errors, by name."""

Definition = ast.FunctionDef | ast.ClassDef


def public(node: ast.AST) -> Iterator[Definition]:
    """Functions, classes and methods without a leading underscore; not those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public(child)


def is_overload(node: Definition) -> bool:
    return any("overload" in ast.unparse(one) for one in node.decorator_list)


def raised(function: ast.FunctionDef) -> set[str]:
    """Names of our errors that are raised in the function itself."""
    calls = [one.exc for one in ast.walk(function) if isinstance(one, ast.Raise) and one.exc]
    names = {ast.unparse(one.func if isinstance(one, ast.Call) else one) for one in calls}
    return names & KINDS.keys()


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_says_what_it_is(name: str) -> None:
    text = (SOURCE / name).read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text
    for node in public(tree):
        assert ast.get_docstring(node) or is_overload(node), f"{name}: {node.name}"


@pytest.mark.parametrize("name", [one for one in MODULES if not one.startswith("cli/")])
def test_functions_say_which_errors_they_raise(name: str) -> None:
    for node in public(ast.parse((SOURCE / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            said = ast.get_docstring(node) or ""
            for error in raised(node):
                family = [kind.__name__ for kind in KINDS[error].__mro__]
                assert any(f"{one}:" in said for one in family), f"{name}: {node.name}: {error}"


@pytest.mark.parametrize("name", [one for one in shortllm.__all__ if one != "__version__"])
def test_public_names_are_described_and_have_a_place_on_the_page(name: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    assert f"::: shortllm.{name}\n" in page
    named = getattr(shortllm, name)
    said = inspect.cleandoc(named.__doc__)
    if inspect.isfunction(named):
        assert "\nReturns:\n" in said and "\nRaises:\n" in said
    else:
        assert said != inspect.getdoc(named.__base__)
