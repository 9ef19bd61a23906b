"""A criterion as it was asked for: its options filled in, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shortllm import criteria
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tensors import is_packed
from shortllm.criteria import Criterion
from shortllm.criteria.search import check_options
from shortllm.errors import CriterionError, UnsupportedModelError
from shortllm.pruning.budget import Budget, most_blocks, removable
from shortllm.records import ModelInfo


@dataclass(frozen=True, slots=True)
class Asked:
    """A criterion with every option filled in."""

    criterion: Criterion
    options: dict[str, Any]

    @staticmethod
    def of(name: str, options: dict[str, Any] | None = None) -> Asked:
        """Look a criterion up and check its options.

        Raises:
            CriterionError: unknown criterion or option, or an impossible value.
        """
        criterion = criteria.get(name)
        asked = Asked(criterion, criterion.options(options or {}))
        asked.inner()
        if asked.needs == "sets":
            check_options(name, asked.options)
        return asked

    @property
    def name(self) -> str:
        """The criterion's name."""
        return self.criterion.name

    @property
    def needs(self) -> criteria.Needs:
        """What the criterion looks at."""
        return self.criterion.needs

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is looked at."""
        inner = self.inner()
        return self.criterion.needs_text if inner is None else inner.needs_text

    def inner(self) -> Asked | None:
        """The criterion that this one scores with in each round, if it does.

        Raises:
            CriterionError: there is no such criterion, or it works in rounds itself.
        """
        if self.needs != "removals":
            return None
        inner = Asked.of(self.options["inner"])
        if inner.needs in ("removals", "sets"):
            raise CriterionError(
                f"{self.name}.inner cannot be '{inner.name}', which removes blocks itself"
            )
        return inner

    def amount(self, budget: Budget, model: ModelInfo) -> dict[str, Any]:
        """The options of a criterion that removes blocks itself by which it meets a budget.

        Raises:
            BudgetError: see `most_blocks`.
        """
        if self.needs not in ("removals", "sets"):
            return {}
        name = "rounds" if self.needs == "removals" else "remove"
        periods = {"period_aligned": budget.period_aligned} if self.needs == "sets" else {}
        return {
            name: most_blocks(budget, model),
            "protect_first": budget.protect_first,
            "protect_last": budget.protect_last,
            **periods,
        }

    def free(self, model: ModelInfo) -> list[int]:
        """The blocks that a criterion that removes blocks may remove."""
        first, last = self.options["protect_first"], self.options["protect_last"]
        budget = Budget(ratio=0.5, protect_first=first, protect_last=last)
        return [block for [block] in removable(budget, model)]

    def rounds(self, model: ModelInfo) -> int:
        """How many blocks a criterion that removes blocks removes."""
        free = len(self.free(model))
        return min(self.options["rounds"] or max(1, free // 2), free)

    def call(self, *arguments: Any) -> Any:
        """What the criterion's function returns, with the options as asked."""
        return self.criterion.function(*arguments, **self.options)


def asked_criteria(names: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> list[Asked]:
    """Criteria by name with their options.

    Raises:
        CriterionError: an unknown name or option, none or the same twice, or options of another.
    """
    if not names or len(set(names)) != len(names):
        raise CriterionError(
            f"{', '.join(names) or 'nothing'} was asked for. Name each criterion once"
        )
    asked = [Asked.of(name, dict(options.get(name, {}))) for name in names]
    for name in options:
        if name not in names:
            raise CriterionError(
                f"an option of criterion '{name}' was given, but what is asked for is "
                f"{', '.join(names)}"
            )
    return asked


def require_plain_weights(checkpoint: Checkpoint, asked: Sequence[Asked]) -> None:
    """Refuse to take packed integers for weights, or to look for gradients of rounded ones.

    Raises:
        UnsupportedModelError: naming the criterion.
    """
    if not is_packed(checkpoint.raw_config):
        return
    for one in asked:
        if (one.inner() or one).needs in ("weights", "gradients"):
            raise UnsupportedModelError(
                f"{one.name} looks at weights, and {checkpoint.id} is quantized. Score the "
                "unquantized model, or by ppl, kl or influence"
            )
