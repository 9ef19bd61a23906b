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
    "similarities"
                  the model           mean cosine of the streams that    Scores
                                      enter each pair of blocks
    "choices"     each removed block  whether each item is answered      a number per item
                                      correctly, margins, and the first
                                      of the intact model
    "removals"    the model           a function that scores the blocks  Scores
                                      left when others are gone
    "nothing"     the model           number of blocks                   a number per block
    "sets"        the model           a space of sets of blocks of one   Scores
                                      size, which can be measured

Streams and logits come in pieces, a group of samples or a slice of tokens at a time. Numbers per
token or prediction are averaged in float64, over those that count. Options of a criterion are the
keyword-only parameters of its function, its help is the first line of the docstring. Help texts and
comparisons list criteria in the order of this table; those with the same needs by file, then from
top to bottom.

Importing this package does not import torch. To add a criterion: docs/add_a_criterion.md.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from shortllm.errors import CriterionError, did_you_mean
from shortllm.healing.methods import METHODS as HEALING_METHODS
from shortllm.papers import Paper
from shortllm.records import ModelInfo, protected_in
from shortllm.registry import Registry, first_line, import_modules

if TYPE_CHECKING:
    from shortllm.criteria.search import Found, Search, SearchSpace

Needs = Literal[
    "logits",
    "gradients",
    "weights",
    "streams",
    "last token",
    "similarities",
    "choices",
    "removals",
    "nothing",
    "sets",
]

WITHOUT_TEXT: frozenset[Needs] = frozenset({"nothing", "weights", "choices"})
"""Needs that are met without calibration text."""

OBSERVED: frozenset[Needs] = frozenset({"streams", "last token", "similarities"})
"""Needs that are met by observing the streams of any pass over the blocks."""

OF_MEASURES = {"temperature": "acceptance", "tasks": "task", "items": "task"}
"""Options that criteria which remove blocks have for the one that they measure models by."""

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
    samples: list[list[float]] | None = None
    """For each block the number of each sample, whose mean is the criterion's, where it has one."""
    stderr: list[float] | None = None
    """For each block the standard error of the importance, over samples."""
    delta_stderr: list[float] | None = None
    """That of `delta_nll`, paired by sample."""
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
    measurements: Callable[[Mapping[str, Any], int, int], float]
    """Sets it will measure, by its options and the numbers of blocks that it removes and that it
    may remove besides: for time estimates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """A registered criterion, with the options that it was resolved with."""

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
    options: dict[str, Any]
    """Every option with its value: what `resolve` was given, or the default."""

    @property
    def removes_blocks(self) -> bool:
        """Whether it removes blocks itself: one after the other, or by searching for a set."""
        return self.needs in ("removals", "sets")

    @property
    def needs_text(self) -> bool:
        """Whether it looks at calibration text."""
        return self.scored_by().needs not in WITHOUT_TEXT

    @property
    def compares(self) -> bool:
        """Whether it compares predictions with those of the intact model; likelihoods do not."""
        return self.needs == "logits" and not self.in_nats

    @property
    def healing(self) -> str | None:
        """The method by which models are healed before they are measured."""
        return self.options.get("healing")

    @property
    def items(self) -> tuple[str | None, int] | None:
        """Tasks and items per task, if it asks multiple-choice questions."""
        if self.scored_by().needs == "choices" or self.options.get("fitness") == "task":
            return self.options["tasks"], self.options["items"]
        return None

    def scored_by(self) -> Criterion:
        """The criterion that it scores with in each round, if it removes blocks one by one."""
        if self.needs != "removals":
            return self
        inner = get(self.options["inner"])
        if inner.removes_blocks:
            raise CriterionError(
                f"{self.name}.inner cannot be '{inner.name}', which removes blocks itself"
            )
        return self._with_same_options(inner)

    def fitness(self) -> Criterion:
        """The criterion by which a search measures sets."""
        return self._with_same_options(get(self.options.get("fitness", "ppl")))

    def _with_same_options(self, other: Criterion) -> Criterion:
        same = {name: self.options[name] for name in other.defaults if name in self.options}
        return resolve(other.name, same)

    def free(self, model: ModelInfo) -> list[int]:
        """The blocks that a criterion may remove one after the other."""
        first, last = self.options["protect_first"], self.options["protect_last"]
        protected = protected_in(model, first, last)
        return [block for block in range(model.blocks) if block not in protected]

    def rounds(self, model: ModelInfo) -> int:
        """How many blocks a criterion removes one after the other."""
        free = len(self.free(model))
        return min(self.options["rounds"] or max(1, free // 2), free)

    def call(self, *arguments: Any) -> Any:
        """Call the criterion's function with its options."""
        return self.function(*arguments, **self.options)


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
        defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
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
            defaults=defaults,
            options=defaults,
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


def resolve(name: str, options: Mapping[str, Any] | None = None) -> Criterion:
    """Look a criterion up and check its options; texts from a command line are converted."""
    found = get(name)
    stated = {option: found.function.__annotations__[option] for option in found.defaults}
    hints = get_type_hints(
        SimpleNamespace(__annotations__=stated), globalns=found.function.__globals__
    )
    chosen = dict(found.defaults)
    for option, value in (options or {}).items():
        if option not in chosen:
            known = f".{did_you_mean(option, chosen)}" if chosen else "; it has no options"
            raise CriterionError(f"criterion '{name}' has no option '{option}'{known}")
        chosen[option] = _converted(name, option, value, hints[option])
    if found.removes_blocks:
        _leave_out_unused(found, chosen, options or {})
    resolved = replace(found, options=chosen)
    if (temperature := chosen.get("temperature")) is not None and temperature < 0:
        raise CriterionError(f"{name}.temperature {temperature} must be 0 or more")
    if resolved.items is not None and resolved.items[1] < 1:
        raise CriterionError(f"{name}.items {resolved.items[1]} must be 1 or more")
    inner = resolved.scored_by()
    if resolved.healing is not None:
        HEALING_METHODS.get(resolved.healing)
        if resolved.needs == "removals" and inner.needs != "logits":
            raise CriterionError(
                f"{name}.inner '{inner.name}' does not measure a model, so it cannot measure a "
                f"healed one. Use one of {', '.join(names_by_need('logits'))}, or leave out "
                f"{name}.healing"
            )
    if resolved.needs == "sets":
        _check_search(name, resolved.options)
    return resolved


def resolve_all(names: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> list[Criterion]:
    """Criteria by name with their options."""
    if len(set(names)) != len(names) or not names:
        given = ", ".join(names) or "nothing"
        raise CriterionError(f"--criterion {given} must name criteria, each once")
    resolved = [resolve(name, options.get(name)) for name in names]
    for name in options:
        if name not in names:
            raise CriterionError(
                f"an option of criterion '{name}' was given, but the criteria requested are "
                f"{', '.join(names)}"
            )
    return resolved


def names_in(text: str) -> list[str]:
    """The names of a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _leave_out_unused(found: Criterion, chosen: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Delete the options of criteria by which one that removes blocks does not measure models."""
    by = "inner" if found.needs == "removals" else "fitness"
    for option, owner in OF_MEASURES.items():
        if option not in chosen or chosen.get(by) in (None, owner):
            continue
        if option in given:
            raise CriterionError(
                f"{found.name}.{option} has no effect without {found.name}.{by}={owner}"
            )
        del chosen[option]


def _check_search(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options of a search that no model could meet."""
    lists = "candidates" if "candidates" in options else "start"
    chosen = names_in(options[lists])
    if not chosen or len(set(chosen)) != len(chosen):
        raise CriterionError(
            f"{name}.{lists} '{options[lists]}' must name criteria, each once, e.g. ppl,influence"
        )
    for one in map(get, chosen):
        if one.needs == "sets" and (lists == "start" or one.search is None):
            raise CriterionError(
                f"{name}.{lists} cannot contain '{one.name}', which searches itself"
            )
    for option in ("evaluations", "generations", "offspring", "remove"):
        if options.get(option) is not None and options[option] < 1:
            raise CriterionError(f"{name}.{option} {options[option]} must be 1 or more")
    if options.get("minutes") is not None and not options["minutes"] > 0:
        raise CriterionError(f"{name}.minutes {options['minutes']} must be positive, e.g. 5")
    if not 0 <= options["held_out"] < 1 or (lists == "candidates" and options["held_out"] == 0):
        raise CriterionError(
            f"{name}.held_out {options['held_out']} must be between 0 and 1, e.g. 0.2"
        )


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
