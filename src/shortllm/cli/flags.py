"""Flags made from option records, and the parameters that several commands share.

A flag gets its name, type, help, bounds, choices, default and panel from the field of a record:

    @flags("data", options=HealOptions, runtime=Runtime)
    def heal(model: Model, out: Out, options: HealOptions, runtime: Runtime, json: Json = False):

gives `heal` a flag for each field of both records. Only what was typed is validated, so that a
record can be laid over another one, as `run` does with a recipe.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, Field

from shortllm.cli import early
from shortllm.cli.output import show_notes
from shortllm.errors import CriterionError, ShortLLMError
from shortllm.files import overwriting
from shortllm.options import Flag, OptionField, Options, fields_of_all, option_fields, options_from
from shortllm.progress import without_bars
from shortllm.recipe import Recipe
from shortllm.records import MAX_BLOCKS
from shortllm.runtime import Runtime, Trust

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Checkpoint directory, GGUF file, Hub id, or 'embedded'."),
]
Out = Annotated[Path, typer.Option(help="Directory of the new checkpoint.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub model, as in MODEL@REVISION.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of text.")]

OVERWRITE = "overwrite"
"""Parameter of every command that writes results to `--out`."""

Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace finished results in --out that were made with other choices.",
    ),
]

Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", rich_help_panel="Output", help="Print results, warnings and errors alone."
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", rich_help_panel="Output", help="Also print every task of a stage, with times."
    ),
]

PLAIN = (bool, int, float, str, Path)
"""Types that typer reads itself; the text of others goes to pydantic."""

COMMON = "Options"
"""Heading of the options that most people need, which come first in `--help`."""


class CriterionOptions(Options):
    """Options of criteria, as text."""

    option: Annotated[
        list[str], Flag(metavar="CRITERION.NAME=VALUE", panel="Scoring", repeated=True)
    ] = Field(
        default_factory=list,
        description="Option of a criterion, e.g. taylor.power=2 or greedy.inner=kl; can be "
        "repeated.",
    )

    def by_criterion(self) -> dict[str, dict[str, Any]]:
        """The options of each criterion."""
        options: dict[str, dict[str, Any]] = {}
        for text in self.option:
            place, equals, value = text.partition("=")
            criterion, dot, name = place.partition(".")
            if not equals or not dot or not name:
                raise CriterionError(
                    f"--option '{text}' must have the form CRITERION.NAME=VALUE, e.g. "
                    "taylor.power=2"
                )
            options.setdefault(criterion, {})[name] = value
        return options


def flags(
    *common: str, **records: type[Options]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of these records; it is called with the records, filled in.

    Args:
        common: fields whose flags come first, under `COMMON`.
        records: parameter of the command -> record.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        fields = _fields(records, common)

        @functools.wraps(function)
        def command(ctx: typer.Context, **values: Any) -> None:
            typed = {
                name: _parsed(one, values[name])
                for name, one in fields.items()
                if (source := ctx.get_parameter_source(name)) and source.name == "COMMANDLINE"
            }
            built = {
                parameter: options_from(
                    kind,
                    {name: typed[name] for name in option_fields(kind) if name in typed},
                    shown=lambda one: one.option,
                )
                for parameter, kind in records.items()
            }
            own = {name: value for name, value in values.items() if name not in fields}
            with overwriting(own.pop(OVERWRITE, False)):
                if Recipe not in records.values():  # checked with the recipe that it is laid over
                    early.check(own, built.values())
                function(**own, **built)

        command.__signature__ = _signature(function, records, fields)  # type: ignore[attr-defined]
        return command

    return decorate


def with_notes(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags that say how much it says."""
    keyword, signature = inspect.Parameter.KEYWORD_ONLY, inspect.signature(command)
    known = hasattr(command, "__signature__")  # else annotations are text
    hints = {} if known else get_type_hints(command, include_extras=True)
    own = [
        one.replace(annotation=hints.get(name, one.annotation))
        for name, one in signature.parameters.items()
    ]
    added = [
        inspect.Parameter(name, keyword, default=False, annotation=kind)
        for name, kind in (("quiet", Quiet), ("verbose", Verbose))
    ]

    @functools.wraps(command)
    def call(*arguments: Any, quiet: bool, verbose: bool, **values: Any) -> None:
        if quiet and verbose:
            raise ShortLLMError("--quiet and --verbose exclude each other. Give one of them")
        show_notes(quiet=quiet, verbose=verbose)
        with without_bars() if quiet else nullcontext():
            command(*arguments, **values)

    call.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    return call


def _fields(records: Mapping[str, type[Options]], common: Sequence[str]) -> dict[str, OptionField]:
    """The fields by flat name: common ones first, device, memory and safety last.

    A name that two records share is one flag, which sets both.
    """
    found = {n: one for n, one in fields_of_all(records.values()).items() if not one.flag.hidden}
    first = {name: replace(found[name], panel=COMMON) for name in common}
    last = {
        name: one
        for panel in (Runtime.panel, Trust.panel)
        for name, one in found.items()
        if one.panel == panel
    }
    return {**first, **{n: one for n, one in found.items() if n not in {*first, *last}}, **last}


def _signature(
    function: Callable[..., None],
    records: Mapping[str, type[Options]],
    fields: Mapping[str, OptionField],
) -> inspect.Signature:
    """What typer reads: the command's own parameters, then one for each flag."""
    hints = get_type_hints(function, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    context = inspect.Parameter("ctx", keyword, annotation=typer.Context)
    own = [
        one.replace(kind=keyword, annotation=hints[one.name])
        for one in inspect.signature(function).parameters.values()
        if one.name not in records
    ]
    made = {one.name: _parameter(one) for one in fields.values()}
    names = {*made, *(one.name for one in own)}
    if "out" in names and "scores" not in names:  # a plan is made again in no time
        own.append(inspect.Parameter(OVERWRITE, keyword, default=False, annotation=Overwrite))
    first = [made.pop(name) for name, one in fields.items() if one.panel == COMMON]
    return inspect.Signature([context, *first, *own, *made.values()])


def _parameter(one: OptionField) -> inspect.Parameter:
    kind, optional = _typer_type(one)
    default = one.info.get_default(call_default_factory=True)
    if kind not in PLAIN and get_origin(kind) is not Literal and get_origin(kind) is not list:
        kind, default = str, None if default is None else str(default)
    declared = [one.flag.name] if one.flag.name else []
    if kind is bool and default is False and not declared:
        declared = [one.option]  # without a --no- form: off is the default
    option = typer.Option(
        *declared,
        help=f"{one.info.description or ''}{_bounds(one)}",
        rich_help_panel=one.panel,
        metavar=one.flag.metavar,
        show_default=default is not None and default is not False and default != [],
    )
    required = one.info.is_required()
    if optional or default is None and not required:
        kind = kind | None
    return inspect.Parameter(
        one.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else default,
        annotation=Annotated[kind, option],
    )


def _typer_type(one: OptionField) -> tuple[Any, bool]:
    """The type that typer reads, and whether None is allowed."""
    annotation = one.info.annotation
    optional = False
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        optional = len(kinds) < len(get_args(annotation))
        annotation = kinds[0] if len(kinds) == 1 else str
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if any(isinstance(found, BeforeValidator) for found in one.info.metadata):
        return str, True
    if get_origin(annotation) is list:
        return (list[str], True) if one.flag.repeated else (str, True)
    return annotation, optional


def _bounds(one: OptionField) -> str:
    """The bounds of a number in words, which pydantic checks, e.g. ` At least 1.`"""
    found = []
    for bound in one.info.metadata:
        for kind, words in ((Ge, "at least"), (Gt, "above"), (Le, "at most"), (Lt, "below")):
            value = getattr(bound, kind.__name__.lower(), None)
            if isinstance(bound, kind) and (kind is not Ge or value != 0):
                found.append(f"{words} {value}")
    text = " and ".join(found)
    return f" {text[:1].upper()}{text[1:]}." if text else ""


def _parsed(one: OptionField, value: Any) -> Any:
    """A typed value as the record takes it: lists are split at commas."""
    annotations = (one.info.annotation, *get_args(one.info.annotation))
    if isinstance(value, str) and any(get_origin(kind) is list for kind in annotations):
        return list_of(value)
    return value


def list_of(text: str) -> list[str]:
    """The parts of a list with commas; `4-6` stands for 4, 5 and 6."""
    found: list[str] = []
    for part in (one.strip() for one in text.split(",")):
        first, dash, last = part.partition("-")
        ends = dash and first.isdecimal() and last.isdecimal()
        if ends and 0 <= int(last) - int(first) < MAX_BLOCKS:
            found += map(str, range(int(first), int(last) + 1))
        elif part:
            found.append(part)
    return found
