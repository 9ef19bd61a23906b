"""Registries of methods: each method is registered, by name, in the file that defines it.

REGISTRY = Registry[Criterion]("criterion", CriterionError)
REGISTRY.add("ppl", criterion)          in the decorator of each method
import_modules(__name__, __path__)      at the end of the package, so that new files are found
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel

from shortllm.errors import ShortLLMError, did_you_mean
from shortllm.papers import Paper


class Method(Protocol):
    """What a registry asks of its entries."""

    @property
    def function(self) -> Any:
        """The registered function; an error names the module it is from."""

    @property
    def label(self) -> str:
        """What it is called in full; an unknown name may be part of that."""

    @property
    def paper(self) -> Paper | None:
        """The paper that defines it."""


Entry = TypeVar("Entry", bound=Method)
Own = TypeVar("Own", bound="RegisteredMethod")
Function = TypeVar("Function", bound=Callable[..., Any])


class Registry(Generic[Entry]):
    """Methods of one kind by name, in the order of their registration."""

    def __init__(self, kind: str, error: type[ShortLLMError]) -> None:
        """Messages call an entry a `kind`; an unknown name raises `error`."""
        self._kind = kind
        self._error = error
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Register an entry."""
        if name in self._entries:
            owner = self._entries[name].function.__module__
            raise ValueError(f"{self._kind} '{name}' is already registered by {owner}")
        self._entries[name] = entry

    def get(self, name: str) -> Entry:
        """The entry of that name; an unknown name raises the registry's error."""
        if name not in self._entries:
            meant = [own for own, one in self._entries.items() if name.lower() in one.label.lower()]
            near = meant[0] if len(name) > 3 and meant else name
            hint = did_you_mean(near, self._entries)
            raise self._error(f"unknown {self._kind} '{name}'.{hint}")
        return self._entries[name]

    def find(self, name: str | None) -> Entry | None:
        """The entry of that name; None where there is none, or no name."""
        return self._entries.get(name or "")

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())


def import_modules(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that each registers its methods; sorted by name."""
    for name in sorted(module.name for module in pkgutil.iter_modules(path)):
        importlib.import_module(f"{package}.{name}")


def cited(method: Method | None) -> str | None:
    """The paper of a method, as config.json and model cards name it."""
    return str(method.paper) if method and method.paper else None


def first_line(function: Any) -> str:
    """The first line of a function's docstring: the help of the method it defines."""
    return (function.__doc__ or "").strip().partition("\n")[0]


@dataclass(frozen=True, kw_only=True)
class RegisteredMethod:
    """What every method says of itself; each kind of method adds what it needs.

    @METHODS.register(WidthMethod(name="flap", label="FLAP", paper=FLAP, one_list=True))
    def flap(task: Task) -> Chosen:
        ...
    """

    name: str
    label: str
    """What pages and tables call it."""
    paper: Paper | None = None
    """The paper that defines it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Names of options that only this method has, with their defaults."""
    function: Callable[..., Any] = field(init=False)
    help: str = field(init=False)
    """The first line of the function's docstring: what the method does."""


class MethodRegistry(Registry[Own]):
    """Methods registered by a decorator."""

    def register(self, method: Own) -> Callable[[Function], Function]:
        """Register a method whose function is the decorated one."""

        def decorate(function: Function) -> Function:
            object.__setattr__(method, "function", function)
            object.__setattr__(method, "help", first_line(function))
            self.add(method.name, method)
            return function

        return decorate

    def require_own_options(self, name: str, options: BaseModel) -> None:
        """Refuse options that only another method has."""
        own = self.get(name).options
        for method in self:
            for one in method.options:
                default = type(options).model_fields[one].default
                if one not in own and getattr(options, one) != default:
                    raise ValueError(
                        f"--{one.replace('_', '-')} is an option of --method {method.name}, and "
                        f"the method is {name}. Leave it out"
                    )


def described(methods: Iterable[RegisteredMethod]) -> str:
    """The help of an option that names one of the methods: 'NAME: what it does. NAME: ...'."""
    return " ".join(f"{one.name}: {one.help[:1].lower()}{one.help[1:]}" for one in methods)
