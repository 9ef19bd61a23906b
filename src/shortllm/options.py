"""Options declared once: a record's fields give recipe keys, flags, Python arguments and docs.

    class HealOptions(Options):
        \"\"\"How a shortened checkpoint is healed without training.\"\"\"

        panel = "Healing"
        ridge: float | None = Field(default=None, gt=0, description="Ridge strength ...")

`option_fields` lists the fields of a record, those of nested records included, under the flat names
that a command line and a Python call use. `shortllm.calls` lets a function take them as keywords,
and `shortllm.cli.flags` makes a flag of each. How a flag differs from its field is said by `Flag`,
how the fields of a nested record are named by `Nested`.

Where a list is meant, people give one item: a field that is a list takes it, and so does an
argument of a function that is annotated `OneOrMore[str]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    TypeVar,
    get_args,
    get_origin,
)

from pydantic import BaseModel, BeforeValidator, ValidationError, model_validator
from pydantic.fields import FieldInfo

from shortllm.errors import ShortLLMError
from shortllm.records import Record, record_in, shown_value, validation_message

Kind = TypeVar("Kind", bound="Options")
if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

Result = TypeVar("Result")
Item = TypeVar("Item")


def as_list(given: Any) -> Any:
    """One item as a list of it; what has items, and None, as it is."""
    single = isinstance(given, (str, Mapping, BaseModel)) or not isinstance(given, Iterable)
    return [given] if single and given is not None else given


OneOrMore = Annotated[list[Item], BeforeValidator(as_list)]
"""A list, or one item of it."""


class _Constructor(ModelMetaclass):
    """What does not fit a record that a user makes is said in one line."""

    def __call__(cls: type[BaseModel], *unnamed: Any, **fields: Any) -> Any:  # type: ignore[misc]
        if unnamed:
            names = ", ".join(f"{name}=..." for name in cls.model_fields)
            raise TypeError(f"{cls.__name__} takes its fields by name: {cls.__name__}({names})")
        try:
            return type.__call__(cls, **fields)
        except ValidationError as error:
            raise ShortLLMError(f"{cls.__name__}: {validation_message(error, cls)}") from None


class Options(Record, metaclass=_Constructor):
    """Choices that a user makes: a section of a recipe, flags of a command, Python arguments."""

    panel: ClassVar[str] = "Options"
    """Heading of these options in `--help`."""

    @model_validator(mode="before")
    @classmethod
    def _as_people_give_it(cls, given: Any) -> Any:
        """One item where a list is meant, and a `Path` where a text is."""
        if not isinstance(given, dict):
            return given
        lists = {name for name, info in cls.model_fields.items() if _takes_list(info.annotation)}
        listed = {name: as_list(value) if name in lists else value for name, value in given.items()}
        return {name: _paths_as_text(value) for name, value in listed.items()}

    def applied(self) -> AbstractContextManager[Any]:
        """A context in which a function that accepts these options runs; most need none."""
        return ExitStack()


def _paths_as_text(given: Any) -> Any:
    if isinstance(given, list):
        return [_paths_as_text(one) for one in given]
    return str(given) if isinstance(given, PurePath) else given


def _takes_list(annotation: Any) -> bool:
    """Whether a type is a list, or allows one."""
    return get_origin(annotation) is list or any(map(_takes_list, get_args(annotation)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """How the command line shows a field, where its own name and type do not say it."""

    name: str | None = None
    """The flag, e.g. `--calibration` for a field `file`, or `--contiguous/--scattered`."""
    panel: str | None = None
    """Heading in `--help`, where it is not that of the record."""
    metavar: str | None = None
    """What stands for the value in `--help`, e.g. `3,4,8`."""
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


def keywords_of(kind: type[Options]) -> dict[str, str]:
    """Every keyword that sets an option of a record, or a record within it, and its name."""
    fields = option_fields(kind)
    within = {name: _metadata(info, Flag) or Flag() for name, info in kind.model_fields.items()}
    flags = within | {name: one.flag for name, one in fields.items()}
    of_flags = {
        flag.name.partition("/")[0].lstrip("-").replace("-", "_"): name
        for name, flag in flags.items()
        if flag.name
    }
    return {**of_flags, **{name: name for name in (*kind.model_fields, *fields)}}


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
            whole = isinstance(value, Options)
            content[name] = value.model_dump(exclude_unset=True) if whole else value
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
