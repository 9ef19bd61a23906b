"""What a Python caller may give a public function, and what is said to calls that do not fit.

    @accepts(options=HealOptions, runtime=Runtime)
    def heal(model: ModelSource, out: Path, *, options: HealOptions, runtime: Runtime): ...

    shortllm.heal(model, "healed", ridge=0.01, dtype=torch.bfloat16)

The fields of the records are keywords, and the function's own arguments are checked and converted
by their annotations, before anything is done.
"""

from __future__ import annotations

import functools
import inspect
import re
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from shortllm.errors import ShortLLMError, did_you_mean
from shortllm.files import overwriting
from shortllm.options import Options, fields_of_all, keywords_of, options_from
from shortllm.progress import call_of

Result = TypeVar("Result")

TAKES_A_MODEL = {"model", "models", "source"}
"""Names of arguments that can be a loaded model."""


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
                contexts.enter_context(call_of(function.__name__))
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
        fields = keywords_of(kind)
        keywords = [one for one in given if one in fields and one not in self.parameters]
        chosen = {fields[one]: given.pop(one) for one in keywords}
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
        for name, value in bound.arguments.items():
            if name in self.types:
                bound.arguments[name] = self.checked(name, value, context)
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
        known = {*self.parameters, *self.added}.union(*map(keywords_of, self.records.values()))
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


def described(value: Any) -> str:
    """A value that does not fit: as Python writes it where that is short, else its type."""
    if value is None or type(value) in (bool, int, float, str, list, tuple, dict):
        return reprlib.repr(value)
    return f"an object of type {type(value).__name__}"
