"""Criteria by name with their options filled in, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shortllm import criteria
from shortllm.criteria import Criterion, Needs
from shortllm.criteria.search import check_options
from shortllm.errors import CriterionError
from shortllm.records import ModelInfo, protected_in


@dataclass(frozen=True, slots=True)
class ResolvedCriterion:
    """A criterion with every option filled in."""

    criterion: Criterion
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The criterion's name."""
        return self.criterion.name

    @property
    def needs(self) -> Needs:
        """What the criterion looks at."""
        return self.criterion.needs

    @property
    def removes_blocks(self) -> bool:
        """Whether it removes blocks itself: one after the other, or by searching for a set."""
        return self.needs in ("removals", "sets")

    @property
    def needs_text(self) -> bool:
        """Whether it looks at calibration text."""
        inner = self.inner()
        return self.criterion.needs_text if inner is None else inner.needs_text

    def inner(self) -> ResolvedCriterion | None:
        """The criterion that this one scores with in each round, if it does."""
        if self.needs != "removals":
            return None
        inner = resolve(self.options["inner"])
        if inner.removes_blocks:
            raise CriterionError(
                f"{self.name}.inner cannot be '{inner.name}', which removes blocks itself"
            )
        return inner

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
        return self.criterion.function(*arguments, **self.options)


def resolve(name: str, options: Mapping[str, Any] | None = None) -> ResolvedCriterion:
    """Look a criterion up and check its options."""
    criterion = criteria.get(name)
    resolved = ResolvedCriterion(criterion, criterion.options(options or {}))
    resolved.inner()
    if resolved.needs == "sets":
        check_options(name, resolved.options)
    return resolved


def resolve_all(
    names: Sequence[str], options: Mapping[str, Mapping[str, Any]]
) -> list[ResolvedCriterion]:
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
