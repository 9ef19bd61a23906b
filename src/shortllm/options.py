"""Options declared once: a record's fields give recipe keys, flags, Python arguments and docs.

    class HealOptions(Options):
        \"\"\"How a shortened checkpoint is healed without training.\"\"\"

        panel = "Healing"
        ridge: float | None = Field(default=None, gt=0, description="Ridge strength ...")

`option_fields` lists the fields of a record, those of nested records included, under the flat names
that a command line and a Python call use. `accepts` lets a function take them as keywords, and
`shortllm.cli.flags` makes a flag of each. How a flag differs from its field is said by `Flag`, how
the fields of a nested record are named by `Nested`.

What a Python caller gives is checked by the annotations: those of fields by pydantic, those of a
function's own arguments by `accepts`. `OneOrMore[str]` takes one item where a list is meant, and a
field that is a list does so by itself.
"""

from __future__ import annotations

import functools
import inspect
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePath
from types import SimpleNamespace
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BaseModel, BeforeValidator, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo

from shortllm.errors import ShortLLMError, did_you_mean
from shortllm.files import overwriting
from shortllm.records import Record, record_in, shown_value, validation_message

Kind = TypeVar("Kind", bound="Options")
if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

Result = TypeVar("Result")
Item = TypeVar("Item")

TAKES_A_MODEL = {"model", "models", "source"}
"""Names of arguments that can be a loaded model."""


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


# ---- calls


def accepts(**records: type[Options]) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Check what a public function is called with, and let it take the fields of records as
    keywords.

    `@accepts(options=HealOptions, runtime=Runtime)` on `heal(model, out, *, options, runtime)` lets
    people call `heal(model, out, options=HealOptions(ridge=0.1))`, `heal(model, out, ridge=0.1)`,
    or both: keywords win. A record that is not given has its defaults. A field is also known by the
    name of its flag. The function's own arguments are checked and converted by their annotations,
    as pydantic does.

    A function that writes to `out` also takes `overwrite=True`, which lets it replace a finished
    result of other choices. One that takes a model takes `tokenizer=`, that of a loaded model.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        called = _Called(function, records)

        @functools.wraps(function)
        def call(*arguments: Any, **given: Any) -> Result:
            built = {name: called.record(name, given) for name in records}
            overwrite = given.pop("overwrite", False) if "overwrite" in called.added else False
            tokenizer = given.pop("tokenizer", None) if "tokenizer" in called.added else None
            with ExitStack() as contexts:
                contexts.enter_context(overwriting(bool(overwrite)))
                for record in built.values():
                    contexts.enter_context(record.applied())
                bound = called.bound(arguments, {**given, **built}, tokenizer)
                return function(*bound.args, **bound.kwargs)

        call.__signature__ = called.signature()  # type: ignore[attr-defined]
        return call

    return decorate


@dataclass(frozen=True, eq=False)
class _Called:
    """A public function, and the records whose fields are its keywords."""

    function: Callable[..., Any]
    records: Mapping[str, type[Options]]

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Its own, the records among them."""
        return inspect.signature(self.function).parameters

    @cached_property
    def added(self) -> dict[str, Any]:
        """Keywords that it takes besides, and their defaults."""
        found = {"overwrite": False} if "out" in self.parameters else {}
        return found | ({"tokenizer": None} if TAKES_A_MODEL & self.parameters.keys() else {})

    @cached_property
    def types(self) -> dict[str, TypeAdapter[Any]]:
        """What checks each of its own arguments."""
        own = {
            name: one.annotation
            for name, one in self.parameters.items()
            if name not in self.records and one.kind is not inspect.Parameter.VAR_KEYWORD
        }
        names = vars(sys.modules[self.function.__module__])
        hints = get_type_hints(SimpleNamespace(__annotations__=own), names, include_extras=True)
        return {name: TypeAdapter(hint) for name, hint in hints.items()}

    def record(self, name: str, given: dict[str, Any]) -> Options:
        """A record with the fields that were given as keywords, which are taken out."""
        base, kind = given.pop(name, None), self.records[name]
        if base is not None and not isinstance(base, Options):
            raise self.wrong(name, base)
        kind = type(base) if isinstance(base, kind) else kind  # a subclass has more options
        keywords = _keywords(kind)
        chosen = {
            keywords[name]: given.pop(name)
            for name in list(given)
            if name in keywords and name not in self.parameters
        }
        with self.named():
            return options_from(kind, chosen, base=base)

    def bound(
        self, arguments: Sequence[Any], given: Mapping[str, Any], tokenizer: Any
    ) -> inspect.BoundArguments:
        """Its arguments, checked and converted; `tokenizer` is that of a loaded model."""
        self.require_known(given)
        with self.named():
            bound = inspect.signature(self.function).bind(*arguments, **given)
        context = {"tokenizer": tokenizer}
        for name in bound.arguments.keys() & self.types.keys():
            bound.arguments[name] = self.checked(name, bound.arguments[name], context)
        if tokenizer is not None and "loaded" not in context:
            raise ShortLLMError(
                "tokenizer= is that of a loaded model; a directory or Hub id has its own. Leave it "
                "out"
            )
        return bound

    def require_known(self, given: Mapping[str, Any]) -> None:
        """Refuse keywords that it does not have."""
        if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in self.parameters.values()):
            return
        known = {*self.parameters, *self.added}.union(*map(_keywords, self.records.values()))
        for name in (name for name in given if name not in self.parameters):
            hint = did_you_mean(name, known - self.records.keys())
            raise TypeError(f"{self.function.__name__}() has no argument '{name}'.{hint}")

    def checked(self, name: str, value: Any, context: dict[str, Any]) -> Any:
        """The value of one of its own arguments, converted."""
        try:
            with self.named():
                return self.types[name].validate_python(value, context=context)
        except ValidationError as error:
            cause = error.errors()[0].get("ctx", {}).get("error")
            if isinstance(cause, ShortLLMError):
                raise cause from None
            raise self.wrong(name, value) from None

    def wrong(self, name: str, value: Any) -> TypeError:
        """The error for an argument of a wrong type, with what the docstring says of it."""
        found = re.search(rf"^ +{name}: (.+(?:\n {{12}}.+)*)", self.function.__doc__ or "", re.M)
        about = f" {name}: {' '.join(found[1].split())}" if found else ""
        return TypeError(
            f"{self.function.__name__}(): {name}={described(value)} does not fit.{about} "
            f"{self.usage}"
        )

    @contextmanager
    def named(self) -> Iterator[None]:
        """A TypeError within the context says what was called, and how to call it."""
        try:
            yield
        except TypeError as error:
            raise TypeError(f"{self.function.__name__}(): {error}. {self.usage}") from None

    @property
    def usage(self) -> str:
        """The call with the function's own arguments."""
        own = [
            one.replace(annotation=inspect.Parameter.empty)
            for one in self.parameters.values()
            if one.name not in (*self.records, "command")
        ]
        more = ", ...)" if self.records else ")"
        return f"Call shortllm.{self.function.__name__}{str(inspect.Signature(own))[:-1]}{more}"

    def signature(self) -> inspect.Signature:
        """What `help()` shows: the function's own arguments, the records, and their fields."""
        signature = inspect.signature(self.function)
        own = [one for one in self.parameters.values() if one.name not in self.records]
        kinds = self.records.values()
        kept = {
            name: info.get_default(call_default_factory=True)
            for kind in kinds
            for name, info in kind.model_fields.items()
        }
        flat = {
            name: one.info.get_default(call_default_factory=True)
            for name, one in fields_of_all(kinds).items()
        }
        whole = {name: value for name, value in kept.items() if not isinstance(value, Options)}
        defaults = {**self.added, **dict.fromkeys(self.records), **whole, **flat}
        keywords = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=self.records.get(name, inspect.Parameter.empty),
            )
            for name, default in defaults.items()
            if name not in {one.name for one in own}
        ]
        rest = [one for one in own if one.kind is inspect.Parameter.VAR_KEYWORD]
        named = [one for one in own if one not in rest]
        return signature.replace(parameters=[*named, *keywords, *rest])


def _keywords(kind: type[Options]) -> dict[str, str]:
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


def described(value: Any) -> str:
    """A value that does not fit: as Python writes it where that is short, else its type."""
    if value is None or type(value) in (bool, int, float, str, list, tuple, dict):
        return reprlib.repr(value)
    return f"an object of type {type(value).__name__}"


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
