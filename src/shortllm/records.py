"""What every result file is, and what several of them hold: the model, and what a stage cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from shortllm.errors import ResultFileError, did_you_mean
from shortllm.files import write_text

MAX_BLOCKS = 10_000
"""Most blocks of a model; a config that says more is damaged."""

ResultKind = TypeVar("ResultKind", bound="ResultFile")

SpecialToken = Literal["bos", "eos", "unk", "pad"]


class Record(BaseModel):
    """A frozen piece of a result file; unknown keys are refused, and numbers that are none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ResultFile(Record):
    """A record that is a whole JSON file in the run directory."""

    fingerprint: str = Field(description="sha256 of the inputs that made this file")

    def save(self, path: Path) -> None:
        """Write the file under a temporary name, then rename it into place."""
        write_text(path, json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file back."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ResultFileError(f"cannot read {path}: {error.strerror}") from error
        except ValidationError as error:
            raise ResultFileError(
                f"{path} is not a {cls.__name__} file: {_explain(error, cls)}"
            ) from error


def load_current(kind: type[ResultKind], path: Path, expected: str) -> ResultKind | None:
    """A result file if it is whole and written from the same inputs, by their fingerprint."""
    try:
        found = kind.load(path)
    except ResultFileError:
        return None
    return found if found.fingerprint == expected else None


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first problem of a validation in one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        return f"unknown key '{where}'.{did_you_mean(where, kind.model_fields)}"
    return f"{where}: {first['msg']}" if where else str(first["msg"])


class ModelInfo(Record):
    """Which model a result speaks of, and how large it is."""

    id: str = Field(description="the Hub id or the directory as the user gave it")
    revision: str | None = Field(default=None, description="commit of the Hub snapshot")
    gguf_sha256: str | None = Field(
        default=None, description="of the GGUF file that the weights were dequantized from"
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


class Cost(Record):
    """What a stage cost; the only part of a result that differs between two equal runs."""

    seconds: float
    peak_bytes: int | None = Field(default=None, description="peak resident memory of the process")


class DerivedRecord(ResultFile):
    """A record that lies next to the weights of a checkpoint that was derived from another one."""

    FILE: ClassVar[str]
    """Name of the file in the checkpoint's directory."""

    model: ModelInfo = Field(description="the checkpoint before")
    options: dict[str, Any]
    versions: dict[str, str] = Field(default_factory=dict)
    cost: Cost | None = None
