"""Block criteria and their registry. A criterion is one decorated function in one file of this
folder.

What the function is given and what it returns follows from what it `needs`; how the numbers come
about (weights in memory or read block by block, several processes, an interrupted pass) is not its
concern. Importance: *higher = keep*, for every criterion.

    needs         called for          with                               returns
    "nothing"     the model           number of blocks                   a number per block
    "weights"     each block          its weight tensors                 a number
    "streams"     each block          stream before, stream after        a number per token
    "last token"  the model           last token's stream at each depth  Scores
    "logits"      each removed block  logits, intact logits, targets     a number per prediction
    "gradients"   each block          weight x gradient of its weights   a number
    "removals"    the model           a function that scores the blocks  Scores
                                      left when others are gone
    "sets"        the model           a space of sets of blocks of one   Scores
                                      size, which can be measured

Streams and logits come in pieces, a group of samples or a slice of tokens at a time.

Numbers per token or prediction are averaged in float64. Options of a criterion are the keyword-only
parameters of its function. Adding one: docs/add_a_criterion.md.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from shortllm.errors import CriterionError, did_you_mean

if TYPE_CHECKING:
    from shortllm.criteria.records import Search

Needs = Literal[
    "nothing", "weights", "streams", "last token", "logits", "gradients", "removals", "sets"
]

WITHOUT_TEXT: frozenset[Needs] = frozenset({"nothing", "weights"})
"""What can be had without calibration text."""


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
    """Blocks in the order in which they go, where each was chosen with the ones before it gone; of
    a searched set its blocks, least important first."""
    removed: list[int] | None = None
    """The set of blocks that was searched for."""
    search: Search | None = None
    """How that set came about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """A registered criterion."""

    name: str
    summary: str
    source: str
    """Where it was published."""
    needs: Needs
    function: Callable[..., Any]
    in_nats: bool
    """Whether the mean is reported as its exponential, and its change in nats."""
    defaults: Mapping[str, Any]
    """Every option with its default."""

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is looked at."""
        return self.needs not in WITHOUT_TEXT

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options with their values; texts from a command line are converted.

        Raises:
            CriterionError: an unknown option or an impossible value.
        """
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


TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
"""What yes and no may be called on a command line."""

Function = TypeVar("Function", bound=Callable[..., Any])

_REGISTRY: dict[str, Criterion] = {}


def criterion(
    name: str, *, needs: Needs, source: str, in_nats: bool = False
) -> Callable[[Function], Function]:
    """Register the decorated function as `name`; its docstring's first line is the summary.

    Args:
        in_nats: the function returns negative log-likelihoods: report exp of their mean (a
            perplexity), and the change of the mean beside it.
    Raises:
        ValueError: the name is taken, and by whom.
    """

    def register(function: Function) -> Function:
        if name in _REGISTRY:
            owner = _REGISTRY[name].function.__module__
            raise ValueError(f"criterion '{name}' is already registered by {owner}")
        parameters = inspect.signature(function).parameters.values()
        _REGISTRY[name] = Criterion(
            name=name,
            summary=(function.__doc__ or "").strip().splitlines()[0],
            source=source,
            needs=needs,
            function=function,
            in_nats=in_nats,
            defaults={p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY},
        )
        return function

    return register


def get(name: str) -> Criterion:
    """The criterion registered as `name`.

    Raises:
        CriterionError: there is none; the message lists those that exist.
    """
    if name not in _REGISTRY:
        raise CriterionError(f"unknown criterion '{name}'.{did_you_mean(name, _REGISTRY)}")
    return _REGISTRY[name]


def names() -> list[str]:
    """Names of all criteria, sorted."""
    return sorted(_REGISTRY)


def require_finite(name: str, values: list[float]) -> None:
    """Refuse scores that cannot be ranked.

    Raises:
        CriterionError: naming the first block whose score is NaN or infinite.
    """
    for block, value in enumerate(values):
        if not math.isfinite(value):
            raise CriterionError(
                f"criterion '{name}' gives {value} for block {block}, which cannot be ranked. "
                "Try --dtype float32, and look for extreme weights or calibration text"
            )


def _converted(criterion: str, name: str, value: Any, hint: Any) -> Any:
    """The value of an option as the type its function asks for.

    Raises:
        CriterionError: it is none.
    """
    choices = get_args(hint) if get_origin(hint) is Literal else None
    if choices is not None:
        for choice in choices:
            if str(choice) == str(value):
                return choice
        listed = ", ".join(map(str, choices))
        raise CriterionError(f"{criterion}.{name} '{value}' is none of {listed}")
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
    if value is None and len(kinds) < len(get_args(hint)):
        return None
    kind = kinds[0]
    try:
        if kind is bool and isinstance(value, str):
            return TRUTH[value.lower()]
        return value if isinstance(value, kind) else kind(value)
    except (TypeError, ValueError, KeyError) as error:
        raise CriterionError(
            f"{criterion}.{name} '{value}' is not of type {kind.__name__}"
        ) from error


from shortllm.criteria import auto as auto  # noqa: E402  (each registers its criteria)
from shortllm.criteria import greedy as greedy  # noqa: E402
from shortllm.criteria import magnitude as magnitude  # noqa: E402
from shortllm.criteria import removal as removal  # noqa: E402
from shortllm.criteria import search as search  # noqa: E402
from shortllm.criteria import similarity as similarity  # noqa: E402
from shortllm.criteria import taylor as taylor  # noqa: E402
from shortllm.criteria import trivial as trivial  # noqa: E402
