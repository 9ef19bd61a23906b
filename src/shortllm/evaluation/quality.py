"""What a shortened model must still be able to do, as people ask for it, and whether it is. Pure.

--max-ppl-increase 5%       perplexity on the first text, at most 5 % above the intact model's
--max-ppl-increase 0.1nats  the same as a difference of the loss per token
--min-task-mean 95%         mean score of all tasks, at least 95 % of the intact model's
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from shortllm.errors import ResultFileError
from shortllm.evaluation.options import EvaluatedModel
from shortllm.format import change, fixed, model_name, percent, plain, signed
from shortllm.options import Flag, Options, option_fields
from shortllm.records import Record


def amount_with_unit(given: Any, *units: str) -> tuple[float, str]:
    """The number and the unit of a text such as `5%`."""
    found = re.fullmatch(rf"\s*(\d+\.?\d*|\.\d+)\s*({'|'.join(units)})\s*", str(given))
    if found is None:
        raise ValueError(f"must be 0 or more with its unit, e.g. 5{' or 0.1'.join(units)}")
    return float(found[1]), found[2]


def _increase(given: Any) -> Any:
    if given is None:
        return None
    value, unit = amount_with_unit(given, "%", "nats")
    return f"{value:g}{unit}"


def _percentage(given: Any) -> Any:
    if given is None:
        return None
    value, unit = amount_with_unit(given, "%")
    return f"{value:g}{unit}"


Increase = Annotated[
    str | None,
    BeforeValidator(_increase, json_schema_input_type=str | None),
    Flag(metavar="5%|0.1nats"),
]
"""How much worse a loss may be: a fraction of the perplexity, or nats per token."""

Percentage = Annotated[
    str | None, BeforeValidator(_percentage, json_schema_input_type=str | None), Flag(metavar="95%")
]


def nats_in(increase: str) -> float:
    """The increase of the loss that a text such as `5%` or `0.1nats` allows."""
    value, unit = amount_with_unit(increase, "%", "nats")
    return math.log1p(value / 100) if unit == "%" else value


def share_in(percentage: str) -> float:
    """`95%` as 0.95."""
    return amount_with_unit(percentage, "%")[0] / 100


class QualityTargets(Options):
    """What is asked of the quality of a shortened model."""

    panel: ClassVar[str] = "Quality"

    max_ppl_increase: Increase = Field(
        default=None,
        description="Perplexity on the first evaluation text may rise by at most this much.",
    )
    min_task_mean: Percentage = Field(
        default=None,
        description="The mean score of all --tasks must be at least this fraction of the intact "
        "model's.",
    )

    def quality(self) -> dict[str, str]:
        """The targets of quality that were given, e.g. `{"max_ppl_increase": "5%"}`."""
        return _given(self, QualityTargets)


class GateOptions(QualityTargets):
    """What is asked of a shortened model that was measured."""

    min_speedup: float | None = Field(
        default=None,
        gt=0,
        description="At least this many times as fast as the intact model, at every batch size and "
        "length in bench.json.",
    )
    max_repetition: Percentage = Field(
        default=None,
        description="At most this fraction of generated text may repeat itself, as `eval --probe` "
        "measures it.",
    )

    def asked(self) -> dict[str, Any]:
        """All that was asked, by field."""
        return _given(self, GateOptions)


def _given(options: QualityTargets, kind: type[QualityTargets]) -> dict[str, Any]:
    """The fields of one kind of options that were given."""
    found = ((name, getattr(options, name)) for name in kind.model_fields)
    return {name: value for name, value in found if value is not None}


class Requirement(Record):
    """One thing that was asked of a model, and what was measured."""

    name: str = Field(description="the option, e.g. 'max_ppl_increase'")
    of: str = Field(description="what was measured, in words")
    asked: str = Field(description="as asked, e.g. 'at most +5%'")
    measured: str = Field(description="for a reader, e.g. '+4.3 %'")
    value: float = Field(description="what was measured: nats per token, or a share or ratio")
    limit: float = Field(description="in the same unit")
    passed: bool


def judged(
    targets: QualityTargets, model: EvaluatedModel, intact: EvaluatedModel
) -> list[Requirement]:
    """What was asked of the quality of a model, next to what an evaluation measured."""
    return [*_of_perplexity(targets, model, intact), *_of_tasks(targets, model, intact)]


def _of_perplexity(
    targets: QualityTargets, model: EvaluatedModel, intact: EvaluatedModel
) -> Iterator[Requirement]:
    asked = targets.max_ppl_increase
    if asked is None:
        return
    if not model.perplexity or not intact.perplexity:
        raise _not_measured("max_ppl_increase", "no perplexity", "--data TEXT")
    text, before = model.perplexity[0], intact.perplexity[0]
    if text.tokens_fingerprint != before.tokens_fingerprint:
        raise _not_measured("max_ppl_increase", "different texts for the two models", "--data TEXT")
    rise, limit = text.nll - before.nll, nats_in(asked)
    yield Requirement(
        name="max_ppl_increase",
        of=f"perplexity on {model_name(text.source)}",
        asked=f"at most +{asked}",
        measured=increase_shown(rise, asked),
        value=rise,
        limit=limit,
        passed=rise <= limit,
    )


def increase_shown(nats: float, asked: str) -> str:
    """A difference of losses in the unit of a target, with more digits than that has."""
    value, unit = amount_with_unit(asked, "%", "nats")
    decimals = len(f"{value:g}".partition(".")[2]) + 1
    if unit == "nats":
        return f"{plain(signed(nats, max(decimals, 3)))} nats"
    if nats > 1:
        return plain(change(1.0, math.exp(min(nats, 700.0))))
    rise = 100 * math.expm1(nats)
    return plain(f"{'+' * (rise > 0)}{fixed(rise, decimals)} %")


def _of_tasks(
    targets: QualityTargets, model: EvaluatedModel, intact: EvaluatedModel
) -> Iterator[Requirement]:
    asked = targets.min_task_mean
    if asked is None:
        return
    if not model.zeroshot or not intact.zeroshot:
        raise _not_measured("min_task_mean", "no tasks", "--tasks TASK,TASK")
    mean, before = model.zeroshot_mean, intact.zeroshot_mean
    if mean is None or not before:
        names = ", ".join(one.task for one in model.zeroshot)
        raise ResultFileError(
            f"--min-task-mean: the tasks {names} have no mean, since not all of their scores are "
            "shares of right answers. Ask for tasks whose scores are accuracies"
        )
    found, limit = mean / before, share_in(asked)
    yield Requirement(
        name="min_task_mean",
        of=f"mean of {', '.join(one.task for one in model.zeroshot)}",
        asked=f"at least {asked} of {plain(percent(before, 2))}",
        measured=f"{plain(percent(mean, 2))}, {fixed(100 * found, 1)} % of it",
        value=found,
        limit=limit,
        passed=found >= limit,
    )


def option_of(name: str) -> str:
    """The flag of a target."""
    return option_fields(GateOptions)[name].option


def _not_measured(name: str, what: str, needed: str) -> ResultFileError:
    return ResultFileError(
        f"{option_of(name)}: the evaluation has {what}. Measure with {needed}, in `shortllm eval` "
        "or `shortllm run`"
    )
