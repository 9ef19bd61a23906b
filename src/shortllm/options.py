"""Options declared once: a record's fields give recipe keys, flags, Python arguments and docs.

    class HealOptions(Options):
        \"\"\"How a shortened checkpoint is healed without training.\"\"\"

        panel = "Healing"
        ridge: float | None = Field(default=None, gt=0, description="Ridge strength ...")

`option_fields` lists the fields of a record, those of nested records included, under the flat names
that a command line and a Python call use. `accepts` lets a function take them as keywords, and
`shortllm.cli.flags` makes a flag of each. How a flag differs from its field is said by `Flag`, how
the fields of a nested record are named by `Nested`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from shortllm.errors import ShortLLMError, did_you_mean
from shortllm.files import overwriting
from shortllm.records import Record, record_in, shown_value, validation_message

Kind = TypeVar("Kind", bound="Options")
Result = TypeVar("Result")


class Options(Record):
    """Choices that a user makes: a section of a recipe, flags of a command, Python arguments."""

    panel: ClassVar[str] = "Options"
    """Heading of these options in `--help`."""

    def applied(self) -> AbstractContextManager[Any]:
        """A context in which a function that accepts these options runs; most need none."""
        return ExitStack()


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """How the command line shows a field, where its own name and type do not say it."""

    name: str | None = None
    """The flag, e.g. `--calibration` for a field `file`, or `--contiguous/--scattered`."""
    panel: str | None = None
    """Heading in `--help`, where it is not that of the record."""
    metavar: str | None = None
    """What stands for the value in `--help`, e.g. `3,4,8`."""
    parse: Callable[[str], Any] | None = None
    """Turns the text of the command line into a value; default: pydantic does."""
    repeated: bool = False
    """Whether a list is given by several flags instead of one with commas."""
    hidden: bool = False
    """Whether the field has no flag; recipes and Python still have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nested:
    """How the fields of a record within a record are named on its level."""

    rename: Mapping[str, str] = field(default_factory=dict)
    """Field -> flat name, for fields that mean something else on this level."""
    skip: bool = False
    """Whether none of its fields is shown on this level."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionField:
    """A field of a record, or of a record within it, under the name that users type."""

    name: str
    """Flat name, e.g. `eval_length`."""
    path: tuple[str, ...]
    """Where it lies in the record, e.g. `("evaluation", "length")`."""
    info: FieldInfo
    flag: Flag
    panel: str

    @property
    def option(self) -> str:
        """The flag, e.g. `--eval-length`."""
        return (self.flag.name or "--" + self.name.replace("_", "-")).partition("/")[0]


def _nested_record(info: FieldInfo) -> type[Options] | None:
    """The record in a field, or allowed there; None for other fields, lists of records too."""
    kind = None if get_origin(info.annotation) is list else record_in(info.annotation)
    return kind if kind is not None and issubclass(kind, Options) else None


def option_fields(kind: type[Options]) -> dict[str, OptionField]:
    """Every option of a record by its flat name, in order.

    A field of the record itself hides one of the same name in a record within it.
    """
    found: dict[str, OptionField] = {}
    within: dict[str, OptionField] = {}
    for name, info in kind.model_fields.items():
        nested = _metadata(info, Nested)
        inner = _nested_record(info)
        if inner is None:
            flag = _metadata(info, Flag) or Flag()
            found[name] = OptionField(
                name=name,
                path=(name,),
                info=info,
                flag=flag,
                panel=flag.panel or _declaring(kind, name).panel,
            )
        elif nested is None or not nested.skip:
            rename = nested.rename if nested is not None else {}
            for one in option_fields(inner).values():
                flat = rename.get(one.name, one.name)
                within[flat] = OptionField(
                    name=flat, path=(name, *one.path), info=one.info, flag=one.flag, panel=one.panel
                )
    return {**found, **{name: one for name, one in within.items() if name not in found}}


def fields_of_all(kinds: Iterable[type[Options]]) -> dict[str, OptionField]:
    """The options of several records; of those with one name, the first."""
    found: dict[str, OptionField] = {}
    for kind in kinds:
        found = found | {n: one for n, one in option_fields(kind).items() if n not in found}
    return found


def options_from(
    kind: type[Kind],
    given: Mapping[str, Any],
    *,
    base: Options | None = None,
    shown: Callable[[OptionField], str] = lambda one: one.name,
) -> Kind:
    """A record with the given options, by their flat names; others as in `base`, or the defaults.

    A record within it can also be given whole, by its own name; flat names win.

    Args:
        shown: how a field is called in an error, e.g. by its flag.
    Raises:
        ShortLLMError: a value that an option cannot have.
    """
    fields = option_fields(kind)
    content: dict[str, Any] = base.model_dump(exclude_unset=True) if base is not None else {}
    for name, value in given.items():
        if name not in fields:
            content[name] = value.model_dump(exclude_unset=True)
    for name in (name for name in fields if name in given):
        *parents, last = fields[name].path
        place = content
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[last] = given[name]
    names = {one.path: shown(one) for one in fields.values()}
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ShortLLMError(validation_message(error, kind, names)) from error


def overlaid(base: Kind, over: Kind) -> Kind:
    """`base` with every option that was given in `over`; options within options one by one."""
    return type(base).model_validate(
        _merged(base.model_dump(exclude_unset=True), over.model_dump(exclude_unset=True))
    )


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        name: _merged(base[name], value)
        for name, value in over.items()
        if isinstance(value, dict) and isinstance(base.get(name), dict)
    }
    return {**base, **over, **both}


def accepts(**records: type[Options]) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Let a function that takes records take their fields as keywords as well.

    `@accepts(options=HealOptions, runtime=Runtime)` on `heal(model, out, *, options, runtime)` lets
    people call `heal(model, out, options=HealOptions(ridge=0.1))`, `heal(model, out, ridge=0.1)`,
    or both: keywords win. A record that is not given has its defaults. A function that writes to
    `out` also takes `overwrite=True`, which lets it replace a finished result of other choices.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        parameters = inspect.signature(function).parameters

        @functools.wraps(function)
        def call(*arguments: Any, **given: Any) -> Result:
            built: dict[str, Options] = {}
            rest = dict(given)
            for parameter, kind in records.items():
                base = rest.pop(parameter, None)
                kind = kind if base is None else type(base)  # a subclass has more options
                fields = option_fields(kind)
                chosen = {
                    name: rest.pop(name)
                    for name in list(rest)
                    if name in fields
                    or (name in kind.model_fields and isinstance(rest[name], Options))
                }
                built[parameter] = options_from(kind, chosen, base=base)
            overwrite = bool(rest.pop("overwrite", False)) if "out" in parameters else False
            for name in (name for name in rest if name not in parameters):
                known = [*(parameters.keys() - records.keys()), *fields_of_all(records.values())]
                raise TypeError(
                    f"{function.__name__}() has no argument '{name}'.{did_you_mean(name, known)}"
                )
            with ExitStack() as contexts:
                contexts.enter_context(overwriting(overwrite))
                for record in built.values():
                    contexts.enter_context(record.applied())
                return function(*arguments, **rest, **built)

        call.__signature__ = _signature(function, records)  # type: ignore[attr-defined]
        return call

    return decorate


def _signature(
    function: Callable[..., Any], records: Mapping[str, type[Options]]
) -> inspect.Signature:
    """What `help()` shows: the function's own arguments, the records, and their fields."""
    signature = inspect.signature(function)
    own = [one for one in signature.parameters.values() if one.name not in records]
    keyword = inspect.Parameter.KEYWORD_ONLY
    named = [
        inspect.Parameter(name, keyword, default=None, annotation=kind)
        for name, kind in records.items()
    ]
    held = {one.name for one in (*own, *named)}
    flat = [
        inspect.Parameter(name, keyword, default=one.info.get_default(call_default_factory=True))
        for name, one in fields_of_all(records.values()).items()
        if name not in held
    ]
    return signature.replace(parameters=[*own, *named, *flat])


def _declaring(kind: type[Options], name: str) -> type[Options]:
    """The class that declares a field, which may be a base of `kind`."""
    bases = (one for one in reversed(kind.__mro__) if issubclass(one, Options))
    return next(one for one in bases if name in one.model_fields)


def _metadata(info: FieldInfo, kind: type[Result]) -> Result | None:
    return next((one for one in info.metadata if isinstance(one, kind)), None)


def table_rows(kind: type[Options]) -> Iterator[tuple[str, str, str, str]]:
    """Flag, recipe key, default and description of each option: a row of the tables in docs."""
    for one in option_fields(kind).values():
        default = one.info.get_default(call_default_factory=True)
        shown = "" if default is None else shown_value(default)
        if one.info.is_required():
            shown = "required"
        flag = "" if one.flag.hidden else one.option
        yield flag, ".".join(one.path), shown, one.info.description or ""
