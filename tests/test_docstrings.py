"""Everything public says what it is in a sentence; what users call says all there is to know."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import shortllm

SOURCE = Path(shortllm.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "api.md"
MANY = 3
"""Arguments that need no section of their own."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(node: ast.AST) -> Iterator[Definition]:
    """Functions, classes and methods without a leading underscore; not those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public(child)


def is_overload(node: Definition) -> bool:
    return any("overload" in ast.unparse(one) for one in node.decorator_list)


def test_every_module_and_public_definition_has_a_docstring() -> None:
    bare = []
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree, name = ast.parse(text), path.relative_to(SOURCE).as_posix()
        if text and not ast.get_docstring(tree):
            bare.append(name)
        for node in public(tree):
            if not (ast.get_docstring(node) or is_overload(node)):
                bare.append(f"{name}:{node.lineno} {node.name}")
    assert not bare, "write a sentence for each:\n" + "\n".join(bare)


def test_functions_that_users_call_document_arguments_results_and_errors() -> None:
    missing = []
    for name, function in public_names().items():
        if inspect.isfunction(function):
            text, signature = inspect.getdoc(function) or "", inspect.signature(function)
            many = len(signature.parameters) > MANY
            wanted = {"Args", "Raises"} if many else {"Raises"} & raising(function)
            if signature.return_annotation not in (None, "None", signature.empty):
                wanted.add("Returns")
            found = {one for one in wanted if f"\n{one}:\n" in text}
            missing += [f"shortllm.{name}: {one}" for one in sorted(wanted - found)]
    assert not missing, "sections to write:\n" + "\n".join(missing)


def test_public_names_are_described_and_have_a_place_on_the_page() -> None:
    page, problems = PAGE.read_text(encoding="utf-8"), []
    for name, named in public_names().items():
        if f"::: shortllm.{name}\n" not in page:
            problems.append(f"docs/api.md lacks ::: shortllm.{name}")
        if inspect.isclass(named) and inspect.getdoc(named) == inspect.getdoc(named.__base__):
            problems.append(f"shortllm.{name} has no docstring of its own")
    assert not problems, "\n".join(problems)


def raising(function: Callable[..., object]) -> set[str]:
    """`Raises` where the function itself has a raise statement."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    return {"Raises" for node in ast.walk(tree) if isinstance(node, ast.Raise)}


def public_names() -> dict[str, object]:
    """Public name -> what it is."""
    return {name: getattr(shortllm, name) for name in shortllm.__all__ if name != "__version__"}
