"""What shortllm can do, as data, and what came and went since version 0.1.

    python tools/capabilities.py                  a Markdown table: what changed since 0.1
    python tools/capabilities.py --check          the same; fails if something is gone, not renamed
    python tools/capabilities.py --json           the inventory of this version
    python tools/capabilities.py --against FILE   against another inventory

The inventory of 0.1 is tests/golden/inventory_0.1.json. It has every command with its flags (type,
default, help), every public Python name with its arguments or members, every field of recipes and
result files, the recipes, and the environment variables. What was renamed or removed on purpose is
listed in tools/renamed.json, as {"commands": {"shortllm old": "shortllm new"}}.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
BASELINE = REPOSITORY / "tests" / "golden" / "inventory_0.1.json"
RENAMED = Path(__file__).with_name("renamed.json")
SOURCE = REPOSITORY / "src" / "shortllm"

Inventory = dict[str, dict[str, Any]]
"""Part (commands, python, files, ...) -> name -> what is known about it."""


def inventory() -> Inventory:
    """Everything this version offers."""
    return {
        "commands": commands(),
        "python": python_names(),
        "files": file_fields(),
        "recipes": {path.stem: {} for path in sorted((SOURCE / "recipes").glob("*.yaml"))},
        "environment": {name: {} for name in sorted(environment())},
    }


def commands() -> dict[str, Any]:
    """Command, and command with flag or argument -> help, type and default."""
    from typer.main import get_command

    from shortllm.cli import app

    found: dict[str, Any] = {}

    def add(command: Any, name: str) -> None:
        found[name] = {"help": one_line(command.help or "")}
        for parameter in command.params:
            if parameter.name != "help":
                found[f"{name} {flag_name(parameter)}"] = described(parameter)
        for own, child in getattr(command, "commands", {}).items():
            add(child, f"{name} {own}")

    add(get_command(app), "shortllm")
    return found


def flag_name(parameter: Any) -> str:
    """`--stream/--no-stream` for a flag, `MODEL` for an argument."""
    if parameter.param_type_name == "argument":
        return str(parameter.name).upper()
    return "/".join([*parameter.opts, *parameter.secondary_opts])


def described(parameter: Any) -> dict[str, Any]:
    """Type, default, help and whether it must be given."""
    kind = getattr(parameter, "type_descriptor", None)
    annotation = getattr(kind, "annotation", None) or getattr(parameter, "type", None)
    default = parameter.default
    return {
        "type": type_name(annotation),
        "default": default if isinstance(default, (int, float, str)) else default and str(default),
        "required": bool(parameter.required),
        "help": one_line(parameter.help or ""),
    }


def type_name(annotation: Any) -> str:
    """A type in the words of its annotation, without modules."""
    choices = getattr(annotation, "__args__", None)
    if choices and all(isinstance(one, str) for one in choices):
        return "|".join(choices)
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    if getattr(annotation, "__args__", None):
        text = str(annotation)
    return re.sub(r"\b[a-z_]+\.(?=\w)", "", text)


def one_line(text: str) -> str:
    """A text without line breaks."""
    return " ".join(text.split())


def python_names() -> dict[str, Any]:
    """Public name -> its kind and signature; the fields of a class follow as `Name.field`."""
    import shortllm

    found: dict[str, Any] = {}
    for name in shortllm.__all__:
        thing = getattr(shortllm, name)
        if not callable(thing):
            found[name] = {"kind": "value"}
            continue
        found[name] = {"kind": "class" if inspect.isclass(thing) else "function"}
        if inspect.isclass(thing):
            members = {*getattr(thing, "model_fields", {}), *getattr(thing, "__annotations__", {})}
            own = [one for one in vars(thing) if not one.startswith("_")]
            for member in sorted({one for one in members if not one.startswith("_")} | set(own)):
                if not member.startswith("model_"):
                    found[f"{name}.{member}"] = {"kind": "member"}
        else:
            for parameter in inspect.signature(thing).parameters.values():
                default = parameter.default
                found[f"{name}({parameter.name})"] = {
                    "kind": "argument",
                    "default": "required" if default is parameter.empty else str(default),
                }
    return found


def file_fields() -> dict[str, Any]:
    """File of docs/schemas, and `file: path.to.field` -> its type, default and description."""
    found: dict[str, Any] = {}
    for path in sorted((REPOSITORY / "docs" / "schemas").glob("*.schema.json")):
        schema = json.loads(path.read_text(encoding="utf-8"))
        name = path.name.removesuffix(".schema.json")
        found[name] = {}
        for place, field in fields(schema, schema.get("$defs", {}), ""):
            found[f"{name}: {place}"] = {
                key: field[key]
                for key in ("type", "enum", "default", "description")
                if key in field
            }
    return found


def fields(
    schema: dict[str, Any], definitions: dict[str, Any], place: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every property below a schema, by its path; `[]` is an entry of a list or a map."""
    for branch in branches(schema, definitions):
        for name, field in branch.get("properties", {}).items():
            yield f"{place}{name}", field
            yield from fields(field, definitions, f"{place}{name}.")
        for inner in (branch.get("items"), branch.get("additionalProperties")):
            if isinstance(inner, dict):
                yield from fields(inner, definitions, f"{place.removesuffix('.')}[].")


def branches(schema: dict[str, Any], definitions: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema and its alternatives, references resolved."""
    if "$ref" in schema:
        yield from branches(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    yield schema
    for key in ("anyOf", "oneOf", "allOf"):
        for one in schema.get(key, []):
            yield from branches(one, definitions)


def environment() -> set[str]:
    """Environment variables that the package reads."""
    texts = (path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    return {name for text in texts for name in re.findall(r"\bSHORTLLM_[A-Z_]+\b", text)}


def renamed(part: str, name: str, names: dict[str, dict[str, str]]) -> str:
    """What a name of the baseline is called now; commands carry their flags along.

    Args:
        names: part -> old -> new; an empty new name says that it is gone on purpose.
    """
    table = names.get(part, {})
    if name in table:
        return table[name]
    if part == "commands":
        for old, new in table.items():
            if name.startswith(f"{old} ") and not old.rpartition(" ")[2].startswith("-"):
                moved = name.replace(old, new, 1)
                return table.get(moved, moved)
    return name


def compared(
    before: Inventory, now: Inventory, names: dict[str, dict[str, str]]
) -> tuple[list[tuple[str, str, str, str]], int]:
    """Rows (part, what happened, before, now), and how many are gone without a reason."""
    rows, lost = [], 0
    for part, known in before.items():
        reached = set()
        for name, about in known.items():
            new = renamed(part, name, names)
            if new in now[part]:
                reached.add(new)
                if new != name:
                    rows.append((part, "renamed", name, new))
                for key, value in about.items():
                    if key in ("help", "description"):
                        continue
                    if not is_same(now[part][new].get(key), value):
                        text = f"{new} ({key}: {now[part][new].get(key)})"
                        rows.append((part, "changed", f"{name} ({key}: {value})", text))
            else:
                removed = not new or part_of_removed(part, name, names)
                lost += not removed
                rows.append((part, "removed" if removed else "GONE", name, ""))
        rows += [(part, "new", "", name) for name in now[part] if name not in reached]
    return rows, lost


def is_same(one: Any, other: Any) -> bool:
    """Whether two defaults or types are; not given and nothing are, and lists as text are."""

    def plain(value: Any) -> str:
        return re.sub(r"[\[\]' ]", "", str(value)) if value not in (None, "None", "[]") else ""

    return plain(one) == plain(other)


def part_of_removed(part: str, name: str, names: dict[str, dict[str, str]]) -> bool:
    """Whether the command or the class that a name belongs to was removed on purpose."""
    gone = [old for old, new in names.get(part, {}).items() if not new]
    return any(re.match(re.escape(old) + r"[ .(:]", name) for old in gone)


def main() -> None:
    """Print the comparison, or the inventory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the inventory")
    parser.add_argument("--check", action="store_true", help="exit code 1 if something is gone")
    parser.add_argument("--against", type=Path, default=BASELINE, metavar="FILE")
    arguments = parser.parse_args()
    now = inventory()
    if arguments.json:
        print(json.dumps(now, indent=1, ensure_ascii=False))
        return
    before = json.loads(arguments.against.read_text(encoding="utf-8"))
    names = json.loads(RENAMED.read_text(encoding="utf-8"))
    rows, lost = compared(before, now, names)
    print("| part | | before | now |\n|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    kept = {part: len(known) for part, known in before.items()}
    print(f"\n{kept} before, {lost} gone without a reason in {RENAMED.name}")
    if arguments.check and lost:
        sys.exit(1)


if __name__ == "__main__":
    main()
