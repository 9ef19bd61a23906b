"""How what was typed is read: budgets, lists, amounts of memory, options, fields of recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shortllm.errors import BudgetError, CriterionError, RecipeError, ShortLLMError

if TYPE_CHECKING:
    from shortllm.data.options import CalibrationOptions
    from shortllm.pruning.budget import Budget


def budget_of(
    remove: int | None,
    ratio: float | None,
    param_ratio: float | None,
    blocks: str | None,
    contiguous: bool | None,
    protect_first: int | None,
    protect_last: int | None,
    period_aligned: bool,
    *,
    targets: dict[str, Any],
) -> Budget:
    """The flags of a budget as one.

    Raises:
        BudgetError: none or several amounts, or text of another form.
    """
    import shortllm

    budget = shortllm.Budget(
        remove=remove,
        ratio=ratio,
        param_ratio=param_ratio,
        blocks=None if blocks is None else numbers_in(blocks),
        contiguous=contiguous,
        protect_first=protect_first,
        protect_last=protect_last,
        period_aligned=period_aligned,
        **targets,
    )
    budget.asked()
    return budget


def targets_of(params: str | None, memory: str | None, speedup: float | None) -> dict[str, Any]:
    """The fields of a budget that say what should be left."""
    return {
        "target_params": parameters_in(params),
        "target_memory": bytes_in(memory),
        "target_speedup": speedup,
    }


def calibration_of(
    data: str | None,
    file: Path | None,
    sampler: Literal["random", "packed"],
    samples: int,
    length: int,
    seed: int,
    bos_every_sample: bool | None,
) -> CalibrationOptions:
    """The flags of calibration as options."""
    import shortllm

    return shortllm.CalibrationOptions(
        data=data,
        file=file,
        sampler=sampler,
        samples=samples,
        length=length,
        seed=seed,
        bos_every_sample=bos_every_sample,
    )


def names_in(text: str) -> list[str]:
    """`ppl,taylor` as names."""
    return [name.strip() for name in text.split(",") if name.strip()]


def ratios_in(text: str) -> list[float]:
    """`0.1,0.25` as numbers.

    Raises:
        BudgetError: another form.
    """
    try:
        return [float(part) for part in names_in(text)]
    except ValueError as error:
        raise BudgetError(
            f"--ratios '{text}' is not a list of parts of the blocks such as 0.1,0.25,0.5"
        ) from error


def numbers_in(text: str) -> list[int]:
    """`3,4,8` as block numbers.

    Raises:
        BudgetError: another form.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BudgetError(
            f"--blocks '{text}' is not a list of block numbers such as 3,4,8"
        ) from error


def counts_in(text: str | None, flag: str) -> list[int]:
    """`1,4,16` as numbers; none where nothing was given.

    Raises:
        ShortLLMError: another form.
    """
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise ShortLLMError(f"{flag} '{text}' is not a list of numbers such as 1,4,16") from error


def options_in(given: list[str] | None, criteria: list[str]) -> dict[str, dict[str, Any]]:
    """`taylor.power=2` and the like as options by criterion.

    Raises:
        CriterionError: another form.
    """
    options: dict[str, dict[str, Any]] = {}
    for text in given or ():
        place, equals, value = text.partition("=")
        criterion, dot, name = place.partition(".")
        if not equals or not dot or not name:
            raise CriterionError(
                f"--option '{text}' is not of the form CRITERION.NAME=VALUE, e.g. "
                f"{criteria[0]}.name={value or 1}"
            )
        options.setdefault(criterion, {})[name] = value
    return options


def single(options: dict[str, dict[str, Any]], criterion: str) -> dict[str, Any]:
    """The options of the one criterion there is.

    Raises:
        CriterionError: some are another's.
    """
    for other in options:
        if other != criterion:
            raise CriterionError(
                f"an option of criterion '{other}' was given, but --criterion is {criterion}"
            )
    return options.get(criterion, {})


def bytes_in(text: str | None) -> int | None:
    """`4GiB`, `500MB` or a plain number as bytes.

    Raises:
        ShortLLMError: another form.
    """
    if text is None:
        return None
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", start=1):
        units |= {f"{letter}B": 1000**power, f"{letter}IB": 1024**power, letter: 1024**power}
    number = text.strip().rstrip("BbIiKkMmGgTt ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError) as error:
        raise ShortLLMError(f"'{text}' is no amount of memory such as 4GiB or 500MB") from error


def parameters_in(text: str | None) -> int | None:
    """`1.0B`, `350M` or a plain number as a count.

    Raises:
        ShortLLMError: another form.
    """
    if text is None:
        return None
    powers = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}
    number = text.strip().rstrip("KkMmBbTt ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        return int(round(float(number) * 10.0 ** powers[unit]))
    except (ValueError, KeyError, OverflowError) as error:
        raise ShortLLMError(f"'{text}' is no number of parameters such as 1.0B or 350M") from error


def places_in(given: Sequence[str]) -> dict[str, Any]:
    """`retraining.max_steps=200` and the like as values by their place in a recipe.

    Raises:
        RecipeError: another form.
    """
    from shortllm.recipes import parse_yaml

    places: dict[str, Any] = {}
    for text in given:
        place, equals, value = text.partition("=")
        try:
            places[place.strip()] = parse_yaml(value)
        except ValueError as error:
            raise RecipeError(f"--set '{text}': the value is not YAML ({error})") from error
        if not equals or not place.strip():
            raise RecipeError(
                f"--set '{text}' is not of the form FIELD=VALUE, e.g. retraining.max_steps=200"
            )
    return places
