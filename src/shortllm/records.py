"""What every result file is, and what several of them hold: the model, and what a stage cost."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from typing_extensions import Self

from shortllm.errors import BudgetError, ResultFileError, did_you_mean
from shortllm.files import write_text
from shortllm.format import counted
from shortllm.shown import Shown

MAX_BLOCKS = 10_000
"""Most blocks of a model; a config that says more is damaged."""

PROTECT_FIRST = 4
PROTECT_LAST = 2
"""Blocks at either end that are protected by default; at most a quarter of all."""

LONGEST_VALUE = 80
"""Characters of a value that a message quotes."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel = _SHORT.maxdict = 3
_SHORT.maxstring = _SHORT.maxother = 60

ResultKind = TypeVar("ResultKind", bound="ResultFile")

SpecialToken = Literal["bos", "eos", "unk", "pad"]


def _storable(value: dict[str, Any]) -> dict[str, Any]:
    """Values that JSON can hold in UTF-8: finite numbers, and whole characters."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False, default=str).encode()
    except ValueError as error:
        raise ValueError(f"must hold what JSON in UTF-8 can hold: {error}") from error
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_storable)]
"""Values by name that no record describes, such as the options of a method."""


class Record(BaseModel):
    """A frozen piece of a result file; unknown keys are refused, and numbers that are none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    def __repr_str__(self, join_str: str) -> str:
        """The fields that are not at their defaults, long values cut short."""
        fields = type(self).model_fields
        return join_str.join(
            f"{name}={_SHORT.repr(value)}"
            for name, value in self.__repr_args__()
            if name in fields
            and name != "fingerprint"
            and value != fields[name].get_default(call_default_factory=True)
        )


class ResultFile(Record):
    """A record that is a whole JSON file in the run directory."""

    fingerprint: str = Field(description="sha256 of the inputs that made this file")

    def save(self, path: Path | str) -> None:
        """Write the file under a temporary name, then rename it into place."""
        write_text(
            Path(path), json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
        )

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read the file back."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise ResultFileError(f"cannot read {path}: {error.strerror}") from error
        except ValidationError as error:
            raise ResultFileError(
                f"{path} is not a valid {cls.kind()}: {validation_message(error, cls)}"
            ) from error

    @classmethod
    def kind(cls) -> str:
        """What to call such a file: 'plan.json', as its docstring begins."""
        name, _, _ = (cls.__doc__ or "").partition(": ")
        return name if name.endswith(".json") else cls.__name__


def load_current(kind: type[ResultKind], path: Path, expected: str) -> ResultKind | None:
    """A result file if it is whole and written from the same inputs, by their fingerprint."""
    try:
        found = kind.load(path)
    except ResultFileError:
        return None
    return found if found.fingerprint == expected else None


def validation_message(
    error: ValidationError,
    kind: type[BaseModel],
    names: Mapping[tuple[str, ...], str] | None = None,
) -> str:
    """The first problem of a record in one line: what was given, and what it must be.

    Args:
        names: what to call a field, by its place in the record; default: the place.
    """
    first = error.errors(include_url=False)[0]
    place = tuple(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *parents, last = (part for part in first["loc"] if isinstance(part, str))
        for part in parents:
            if part in kind.model_fields:  # others are keys of dictionaries
                kind = record_in(kind.model_fields[part].annotation) or kind
        hint = did_you_mean(last, kind.model_fields)
        return f"unknown field '{'.'.join([*parents, last])}'.{hint}"
    known = [end for end in range(len(place), 0, -1) if names and place[:end] in names]
    name = names[place[: known[0]]] if names and known else ".".join(place)
    if first["type"] == "missing":
        return f"{name} is missing. Give a value"
    said = str(first["msg"]).removeprefix("Value error, ").partition(", unable to parse")[0]
    if said.startswith("Input should be "):
        said = "must be " + said.removeprefix("Input should be ")
    if not name:
        return said
    value = shorten(shown_value(first.get("input")), LONGEST_VALUE, placeholder="...")
    return f"{name} {value}: {said}" if value else f"{name}: {said}"


def record_in(annotation: Any) -> type[Record] | None:
    """The record in a type: itself, in a list or a dict, or optional."""
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return annotation
    return next(filter(None, map(record_in, get_args(annotation))), None)


def shown_value(value: Any) -> str:
    """A value as a user typed it; nothing of a record."""
    if isinstance(value, Mapping):
        return ""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value))
    return str(value)


class GgufOrigin(Record):
    """The GGUF file that a model's weights were dequantized from."""

    file: str
    sha256: str
    types: dict[str, int] = Field(description="how many matrices are stored in each type")

    def __str__(self) -> str:
        return f"{self.file} ({', '.join(self.types)})"


class PredictionHeads(Record):
    """Prediction heads (multi-token prediction) that are stored with a model."""

    places: list[str] = Field(description="first parts of the names of their tensors")
    tensors: int
    parameters: int
    fields: list[str] = Field(description="fields of config.json that count or describe them")
    unexpected: bool = Field(
        description="whether plain transformers reports their tensors as unexpected"
    )

    def __str__(self) -> str:
        return f"{', '.join(self.places)}: {counted(self.tensors, 'tensor')}"


class ModelInfo(Record):
    """Which model a result speaks of, and how large it is."""

    id: str = Field(
        description="the Hub id or the directory as the user gave it, or the name of a loaded model"
    )
    revision: str | None = Field(default=None, description="commit of the Hub snapshot")
    gguf: GgufOrigin | None = Field(
        default=None, description="the GGUF file that the weights were dequantized from"
    )
    model_type: str
    blocks: int = Field(ge=1, le=MAX_BLOCKS)
    parameters: int = Field(
        ge=1,
        description="elements of all stored tensors, tied ones once, packed ones each by itself",
    )
    parameters_per_block: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    bytes: int = Field(ge=1, description="bytes of all stored tensors")
    period: int = Field(
        default=1, ge=1, description="after how many blocks the kinds of blocks repeat"
    )
    fixed: dict[int, str] = Field(
        default_factory=dict,
        description="blocks that cannot go while all others stay, and why",
    )
    fingerprint: str = Field(
        description="sha256 over config, tensor table and samples of each tensor"
    )

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        """What is said of blocks is said of each, and of no others."""
        if self.parameters_per_block and len(self.parameters_per_block) != self.blocks:
            raise ValueError(f"parameters_per_block must have one entry for each of {self.blocks}")
        if sum(self.parameters_per_block) > self.parameters:
            raise ValueError("the blocks cannot hold more parameters than the model")
        if self.period > self.blocks or not set(self.fixed) <= set(range(self.blocks)):
            raise ValueError(f"period and fixed must speak of the {self.blocks} blocks")
        return self


def protected_ends(count: int, first: int | None = None, last: int | None = None) -> list[int]:
    """Protected blocks of a model of `count` blocks, ascending."""
    if (first or 0) < 0 or (last or 0) < 0:
        raise BudgetError("--protect-first and --protect-last cannot be negative")
    first = min(PROTECT_FIRST, count // 4) if first is None else first
    last = min(PROTECT_LAST, count // 4) if last is None else last
    return [block for block in range(count) if block < first or block >= count - last]


def protected_in(model: ModelInfo, first: int | None = None, last: int | None = None) -> list[int]:
    """Protected blocks of a model, ascending: its ends, and those that other blocks depend on."""
    return sorted({*protected_ends(model.blocks, first, last), *model.fixed})


class Cost(Record):
    """What a stage cost; the only part of a result that differs between two equal runs."""

    seconds: float
    peak_bytes: int | None = Field(default=None, description="peak resident memory of the process")


class DerivedRecord(Shown, ResultFile):
    """A record that lies next to the weights of a checkpoint that was derived from another one."""

    FILE: ClassVar[str]
    """Name of the file in the checkpoint's directory."""

    model: ModelInfo = Field(description="the checkpoint before")
    options: JsonObject
    versions: dict[str, str] = Field(default_factory=dict)
    cost: Cost | None = None
    notes: list[str] = Field(
        default_factory=list, description="what to know of the checkpoint, in words"
    )

    def __str__(self) -> str:
        """'of short, 9 blocks, by regression'."""
        way = getattr(self, "method", None) or getattr(self, "criterion", None)
        by = f", by {way}" if way else ""
        return f"of {self.model.id}, {counted(self.model.blocks, 'block')}{by}"
