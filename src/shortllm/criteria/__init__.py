"""Criteria: how much each block is worth. One file per criterion, found by itself.

A criterion is one decorated function in a file of this folder. What it is given and what it returns
follows from what it `needs`; how the numbers are computed (weights in memory or read block by
block, several processes, an interrupted pass) is not its concern. *Higher = keep*, always.

    needs         called for          with                               returns
    "logits"      each removed block  logits, intact logits, targets     a number per prediction
    "gradients"   each block          weight x gradient of its weights   a number
    "weights"     each block          its weight tensors                 a number
    "streams"     each block          stream before, stream after        a number per token
    "last token"  the model           last token's stream at each depth  Scores
    "removals"    the model           a function that scores the blocks  Scores
                                      left when others are gone
    "nothing"     the model           number of blocks                   a number per block
    "sets"        the model           a space of sets of blocks of one   Scores
                                      size, which can be measured

Streams and logits come in pieces, a group of samples or a slice of tokens at a time. Numbers per
token or prediction are averaged in float64. Options of a criterion are the keyword-only parameters
of its function, its help is the first line of the docstring. Help texts and comparisons list
criteria in the order of this table; those with the same needs by file, then from top to bottom.

Importing this package does not import torch. To add a criterion: docs/add_a_criterion.md.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from shortllm.errors import CriterionError, did_you_mean
from shortllm.papers import Paper
from shortllm.registry import Registry, first_line, import_modules

if TYPE_CHECKING:
    from shortllm.criteria.records import Search
    from shortllm.criteria.search import Found, SearchSpace

Needs = Literal[
    "logits", "gradients", "weights", "streams", "last token", "removals", "nothing", "sets"
]

WITHOUT_TEXT: frozenset[Needs] = frozenset({"nothing", "weights"})
"""Needs that are met without calibration text."""

OBSERVED: frozenset[Needs] = frozenset({"streams", "last token"})
"""Needs that are met by observing the streams of any pass over the blocks."""

PLACE = "place in the removal order (1 = removed first)"
"""Label of criteria whose importance is a place; plots and tables show places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a criterion found, one number per block of the original model."""

    importance: list[float]
    """Higher = keep."""
    values: list[float]
    """The criterion's raw numbers."""
    intact: float | None = None
    """The raw number of the intact model, where there is one."""
    delta_nll: list[float] | None = None
    """Mean NLL without the block minus the intact one, nats per token."""
    spans: list[list[float]] | None = None
    """`spans[n - 1][start]`: importance of the span of `n` blocks from `start`."""
    order: list[int] | None = None
    """Blocks in removal order, where each was chosen with the ones before it gone; of a searched
    set its blocks, least important first."""
    removed: list[int] | None = None
    """The set of blocks that a search found."""
    search: Search | None = None
    """How the search found it."""


@dataclass(frozen=True, slots=True)
class SearchMethod:
    """How a criterion that searches improves a set of blocks; others can start from it."""

    improve: Callable[[SearchSpace, Found, Mapping[str, Any]], None]
    """Improve the set in place; the options are those of the criterion."""
    measurements: Callable[[Mapping[str, Any], int], float]
    """Sets it will measure, by its options and the number of possible swaps: for time estimates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """A registered criterion."""

    name: str
    label: str
    """What the axis of its plot says."""
    help: str
    """One sentence: what a block is worth."""
    source: str
    """Where it was published; 'baseline' for some."""
    paper: Paper | None
    needs: Needs
    function: Callable[..., Any]
    in_nats: bool
    """Whether the mean is reported as its exponential, and its change in nats."""
    compared: bool
    """Whether a comparison of criteria includes it by default."""
    search: SearchMethod | None
    defaults: Mapping[str, Any]
    """Every option with its default."""

    @property
    def needs_text(self) -> bool:
        """Whether it looks at calibration text."""
        return self.needs not in WITHOUT_TEXT

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options with their values; texts from a command line are converted."""
        stated = {name: self.function.__annotations__[name] for name in self.defaults}
        hints = get_type_hints(
            SimpleNamespace(__annotations__=stated), globalns=self.function.__globals__
        )
        chosen = dict(self.defaults)
        for name, value in given.items():
            if name not in chosen:
                known = f".{did_you_mean(name, chosen)}" if chosen else "; it has no options"
                raise CriterionError(f"criterion '{self.name}' has no option '{name}'{known}")
            chosen[name] = _converted(self.name, name, value, hints[name])
        return chosen


Function = TypeVar("Function", bound=Callable[..., Any])

_REGISTRY = Registry[Criterion]("criterion", CriterionError)

get = _REGISTRY.get
find = _REGISTRY.find
names = _REGISTRY.names


def criterion(
    name: str,
    *,
    needs: Needs,
    paper: Paper | str,
    label: str | None = None,
    in_nats: bool = False,
    compared: bool = True,
    search: SearchMethod | None = None,
) -> Callable[[Function], Function]:
    """Register the decorated function as `name`; the first line of its docstring is the help.

    Args:
        needs: what it is called with; see the table of this package.
        paper: the paper that defines it, or in words where it is from, e.g. 'baseline'.
        label: what the axis of its plot says; default: 'importance (NAME)'.
        in_nats: the function returns negative log-likelihoods: report exp of their mean (a
            perplexity), and the change of the mean next to it.
        compared: include it in a comparison of criteria by default; searches never are.
        search: for a search that others can use, how it improves a set.
    """

    def register(function: Function) -> Function:
        parameters = inspect.signature(function).parameters.values()
        entry = Criterion(
            name=name,
            label=label or f"importance ({name})",
            help=first_line(function),
            source=str(paper),
            paper=paper if isinstance(paper, Paper) else None,
            needs=needs,
            function=function,
            in_nats=in_nats,
            compared=compared and needs != "sets",
            search=search,
            defaults={p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY},
        )
        _REGISTRY.add(name, entry)
        return function

    return register


def listed() -> list[Criterion]:
    """All criteria in the order of tables and help texts: by needs, then as registered."""
    order = get_args(Needs)
    return sorted(_REGISTRY, key=lambda one: order.index(one.needs))


def names_by_need(*needs: Needs) -> list[str]:
    """Names of the criteria with one of these needs, as listed."""
    return [one.name for one in listed() if one.needs in needs]


def compared() -> list[str]:
    """Names of the criteria that a comparison includes by default, as listed."""
    return [one.name for one in listed() if one.compared]


def help_text() -> str:
    """All names for the help of a command: criteria of blocks first, then searches."""
    searches = names_by_need("sets")
    others = [one.name for one in listed() if one.name not in searches]
    return f"{', '.join(others)}; searches: {', '.join(searches)}"


def require_finite(name: str, values: list[float]) -> None:
    """Refuse scores that cannot be ranked."""
    for block, value in enumerate(values):
        if not math.isfinite(value):
            raise CriterionError(
                f"criterion '{name}' gives {value} for block {block}, which cannot be ranked. "
                "Try --dtype float32, and look for extreme weights or calibration text"
            )


def _converted(criterion: str, name: str, value: Any, hint: Any) -> Any:
    """The value of an option as the type that the function's annotation states."""
    if get_origin(hint) is Literal:
        choices = {str(choice): choice for choice in get_args(hint)}
        if str(value) in choices:
            return choices[str(value)]
        stated = ", ".join(choices)
        raise CriterionError(f"{criterion}.{name} must be one of {stated}, not '{value}'")
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        kind = hint.__name__ if isinstance(hint, type) else str(hint)
        raise CriterionError(f"{criterion}.{name} '{value}' is not of type {kind}") from error


import_modules(__name__, __path__)
