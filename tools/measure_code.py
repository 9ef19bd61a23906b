"""The size and the shape of the code, as one table.

    python tools/measure_code.py              src/shortllm as it is
    python tools/measure_code.py --base v0.1  before and after, side by side
    python tools/measure_code.py --check      exit code 1 if packages import in a circle
    python tools/measure_code.py --long 60    names the functions of more lines than that
    python tools/measure_code.py --edges      which package imports which, and how often

Lines of a function count from `def` to its last line, docstring included. A cycle is a strongly
connected component of the import graph: of modules at module level, then with imports under
TYPE_CHECKING, then with those inside functions; and the same of packages, where `--check` counts
all but those inside functions.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "shortllm"
LIMIT = 80
"""Lines that no function should exceed."""

KINDS = ("module level", "with TYPE_CHECKING", "with lazy imports")
"""Kinds of imports; each includes those before it."""

Graph = dict[str, set[str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Module:
    """What is counted in one file."""

    name: str
    lines: int = 0
    docstring_lines: int = 0
    comment_lines: int = 0
    blank_lines: int = 0
    import_lines: int = 0
    import_statements: int = 0
    classes: int = 0
    functions: dict[str, int] = field(default_factory=dict)
    typed: int = 0
    imports: list[tuple[str, int]] = field(default_factory=list)
    """Imported modules of the package, each with its kind: see `KINDS`."""

    @property
    def code_lines(self) -> int:
        """Lines that are neither blank nor comment nor docstring."""
        return self.lines - self.docstring_lines - self.comment_lines - self.blank_lines


def read_package(root: Path) -> dict[str, Module]:
    """Every module below src/, by its dotted name."""
    paths = {module_name(path, root): path for path in sorted((root / PACKAGE).rglob("*.py"))}
    found = {}
    for name, path in paths.items():
        is_package = path.name == "__init__.py"
        found[name] = read_module(name, path.read_text(encoding="utf-8"), paths, is_package)
    return found


def module_name(path: Path, root: Path) -> str:
    """`shortllm.model.walk` for src/shortllm/model/walk.py."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_module(name: str, text: str, known: Mapping[str, object], is_package: bool) -> Module:
    """Count what one file has in it."""
    tree, module = ast.parse(text), Module(name)
    lines = text.splitlines()
    module.lines = len(lines)
    inside = docstring_places(tree)
    module.docstring_lines = len(inside)
    module.blank_lines = sum(
        not line.strip() for place, line in enumerate(lines, 1) if place not in inside
    )
    module.comment_lines = comment_lines(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module.import_statements += 1
            module.import_lines += (node.end_lineno or node.lineno) - node.lineno + 1
        elif isinstance(node, ast.ClassDef):
            module.classes += 1
        elif isinstance(node, Function):
            module.functions[f"{name}:{node.lineno} {node.name}"] = (
                (node.end_lineno or node.lineno) - node.lineno + 1
            )
            module.typed += is_typed(node)
    base = name if is_package else name.rpartition(".")[0]
    for imported, kind in imports(tree, 0):
        module.imports += [(one, kind) for one in resolved(imported, base, known) if one != name]
    return module


def docstring_places(tree: ast.AST) -> set[int]:
    """Line numbers of strings that stand alone: docstrings, also those of attributes."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                found |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def comment_lines(text: str) -> int:
    """Lines that are a comment and nothing else."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(one.type == tokenize.COMMENT and one.line.lstrip().startswith("#") for one in tokens)


def is_typed(node: Function) -> bool:
    """Whether every argument but self and cls, and the result, have a type."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arguments += [one for one in (node.args.vararg, node.args.kwarg) if one is not None]
    bare = [one for one in arguments if one.annotation is None and one.arg not in ("self", "cls")]
    return not bare and node.returns is not None


def imports(node: ast.AST, kind: int) -> Iterator[tuple[ast.Import | ast.ImportFrom, int]]:
    """Import statements with their kind."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, kind
        elif isinstance(child, Function | ast.Lambda):
            yield from imports(child, 2)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from imports(child, max(kind, 1))
        else:
            yield from imports(child, kind)


def resolved(
    node: ast.Import | ast.ImportFrom, base: str, known: Mapping[str, object]
) -> Iterator[str]:
    """Modules of the package that a statement imports; `from a import b` is a.b if that is one."""
    if isinstance(node, ast.Import):
        yield from (one.name for one in node.names if one.name in known)
        return
    source = node.module or ""
    if node.level:
        above = base.split(".")[: len(base.split(".")) - node.level + 1]
        source = ".".join([*above, source] if source else above)
    for one in node.names:
        if f"{source}.{one.name}" in known:
            yield f"{source}.{one.name}"
        elif source in known:
            yield source


def graph_of(modules: Mapping[str, Module], kind: int, *, packages: bool = False) -> Graph:
    """Who imports whom, by imports up to a kind; without the public names, which load lazily."""
    graph: Graph = {}
    for module in modules.values():
        here = package_of(module.name) if packages else module.name
        graph.setdefault(here, set())
        for name, own in module.imports:
            there = package_of(name) if packages else name
            if own <= kind and there != here and PACKAGE not in (here, there):
                graph[here].add(there)
    return graph


def package_of(name: str) -> str:
    """`model` for shortllm.model.walk, `recipe` for shortllm.recipe; the package for itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else PACKAGE


def cycles(graph: Graph) -> list[list[str]]:
    """Strongly connected components of more than one node, largest first (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found, key=len, reverse=True)


def rows(modules: Mapping[str, Module]) -> dict[str, str]:
    """What the table shows, by its name."""
    every = list(modules.values())
    sizes = sorted(one.lines for one in every)
    lengths = sorted(length for one in every for length in one.functions.values())

    def total(name: str) -> int:
        return sum(getattr(one, name) for one in every)

    def spread(numbers: list[int]) -> str:
        return (
            f"{statistics.median(numbers):.0f} / {numbers[len(numbers) * 9 // 10]} / {numbers[-1]}"
        )

    table = {
        "modules": f"{len(every)}",
        "lines": f"{total('lines'):,}",
        "code lines": f"{total('code_lines'):,}",
        "docstring lines": f"{total('docstring_lines'):,}",
        "comment lines": f"{total('comment_lines'):,}",
        "blank lines": f"{total('blank_lines'):,}",
        "import statements (lines)": f"{total('import_statements'):,} ({total('import_lines'):,})",
        "module lines: median / p90 / max": spread(sizes),
        "functions": f"{len(lengths):,}",
        "function lines: median / p90 / max": spread(lengths),
        f"functions over {LIMIT} lines": f"{sum(one > LIMIT for one in lengths)}",
        "fully typed": f"{100 * total('typed') / len(lengths):.1f} %",
        "classes": f"{total('classes')}",
    }
    for packages in (False, True):
        unit = "packages" if packages else "modules"
        for kind, said in enumerate(KINDS):
            components = cycles(graph_of(modules, kind, packages=packages))
            table[f"{unit} in cycles, {said}"] = (
                " + ".join(map(str, map(len, components))) or "none"
            )
    table["edges between packages"] = (
        f"{len(edges(modules))}, {sum(edges(modules).values())} imports"
    )
    return table


def edges(modules: Mapping[str, Module]) -> Counter[tuple[str, str]]:
    """(package, package it imports) -> import statements, lazy ones included."""
    found: Counter[tuple[str, str]] = Counter()
    for module in modules.values():
        for name, _ in module.imports:
            here, there = package_of(module.name), package_of(name)
            if PACKAGE not in (here, there) and here != there:
                found[here, there] += 1
    return found


def cycles_across(modules: Mapping[str, Module]) -> list[list[str]]:
    """Cycles of modules, type imports included, that span several packages.

    Within one package, methods and the registry that their options read may import each other.
    """
    found = cycles(graph_of(modules, 1))
    return [one for one in found if len(set(map(package_of, one))) > 1]


def modules_at(revision: str) -> dict[str, Module]:
    """The modules of a commit, unpacked into a directory that is deleted again."""
    command = ["git", "archive", "--format=tar", revision, f"src/{PACKAGE}"]
    packed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            members = [one for one in archive.getmembers() if one.name.endswith(".py")]
            archive.extractall(scratch, members=members)
        return read_package(Path(scratch) / "src")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", metavar="REV", help="a commit to compare with")
    parser.add_argument("--check", action="store_true", help="fail on cycles of modules")
    parser.add_argument("--edges", action="store_true", help="packages and what they import")
    parser.add_argument("--long", type=int, metavar="LINES", help="name longer functions")
    arguments = parser.parse_args()
    modules = read_package(REPOSITORY / "src")
    if arguments.check:
        found = cycles_across(modules)
        for component in found:
            print("modules import each other in a circle:", ", ".join(component))
        sys.exit(bool(found))
    columns = {"now": rows(modules)}
    if arguments.base:
        columns = {arguments.base: rows(modules_at(arguments.base)), **columns}
    print("| |", " | ".join(columns), "|\n|---|" + "---:|" * len(columns))
    for name in columns["now"]:
        print(f"| {name} |", " | ".join(one[name] for one in columns.values()), "|")
    if arguments.edges:
        print("\n| package | imports | times |\n|---|---|---:|")
        for (here, there), count in sorted(edges(modules).items()):
            print(f"| {here} | {there} | {count} |")
    if arguments.long is not None:
        lengths = {name: n for one in modules.values() for name, n in one.functions.items()}
        print()
        for name, length in sorted(lengths.items(), key=lambda one: -one[1]):
            if length > arguments.long:
                print(f"{length:4} {name}")


if __name__ == "__main__":
    main()
