"""What the stages hand to each other: one frozen, validated record per result file.

    calibration.json  CalibrationInfo      scores.json  BlockScores
    plan.json         PrunePlan            eval.json    Evaluation

Every record knows how to `save` itself (complete or not at all) and `load` itself (an unknown key
is refused with a suggestion). `fingerprint` is the sha256 of everything that made the record, so
that a stage can tell its own finished work from that of other inputs. Block numbers count from 0 in
the *original* model, in every file. A number that could not be measured is `null`, never 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from shortllm.errors import ResultFileError, did_you_mean
from shortllm.files import write_text


class Record(BaseModel):
    """A frozen piece of a result file; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ResultFile(Record):
    """A record that is a whole JSON file in the run directory."""

    fingerprint: str = Field(description="sha256 of the inputs that made this file")

    def save(self, path: Path) -> None:
        """Write the file under a temporary name, then rename it into place."""
        write_text(path, json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file back.

        Raises:
            ResultFileError: missing, not JSON, or with keys or values this kind of file cannot
                hold.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ResultFileError(f"cannot read {path}: {error.strerror}") from error
        except ValidationError as error:
            raise ResultFileError(
                f"{path} is not a {cls.__name__} file: {_explain(error, cls)}"
            ) from error


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
    model_type: str
    blocks: int
    parameters: int = Field(description="elements of all stored tensors, tied ones once")
    parameters_per_block: list[int] = Field(default_factory=list)
    bytes: int = Field(description="bytes of all stored tensors")
    fingerprint: str = Field(
        description="sha256 over config, tensor table and samples of each tensor"
    )


class CalibrationInfo(ResultFile):
    """Where the calibration ids came from; they lie beside it in calibration.safetensors."""

    source: str = Field(description="data source as given, or the file the ids were taken from")
    rows: tuple[int, int] | None = Field(
        default=None, description="the span [start, stop) of rows the samples were drawn from"
    )
    sampler: Literal["random", "packed", "given"]
    samples: int
    length: int = Field(description="tokens per sample")
    seed: int | None = None
    bos: Literal["tokenizer", "every-sample", "none"]
    tokens_fingerprint: str = Field(
        description="sha256 of the ids as little-endian int64, with their shape"
    )


class Cost(Record):
    """What a stage cost; the only part of a result that differs between two equal runs."""

    seconds: float
    peak_bytes: int | None = Field(default=None, description="peak resident memory of the process")


class BlockScores(ResultFile):
    """scores.json: one importance per block of the original model; higher = keep."""

    model: ModelInfo
    criterion: str
    options: dict[str, Any] = Field(default_factory=dict)
    importance: list[float]
    values: list[float] = Field(
        description="the criterion's raw numbers, e.g. perplexity without the block"
    )
    intact: float | None = Field(default=None, description="the raw number of the intact model")
    delta_nll: list[float] | None = Field(
        default=None,
        description="mean NLL without the block minus that of the intact model, in nats per token",
    )
    spans: list[list[float]] | None = Field(
        default=None,
        description="spans[n-1][start] is the importance of the n blocks from start on",
    )
    order: list[int] | None = Field(
        default=None,
        description="removal order, where each block was chosen with the ones before it gone",
    )
    calibration: str | None = Field(
        default=None, description="tokens_fingerprint of the calibration"
    )
    dtype: str = Field(description="computation type of the scoring pass")
    versions: dict[str, str] = Field(default_factory=dict)
    cost: Cost | None = None


class Size(Record):
    """How much, in blocks and in parameters."""

    blocks: int
    block_ratio: float
    parameters: int
    parameter_ratio: float


class PrunePlan(ResultFile):
    """plan.json: which blocks go, in which order, and why."""

    model: ModelInfo
    criterion: str | None = Field(description="null where the blocks were given by hand")
    kept: list[int]
    removed: list[int] = Field(description="ascending")
    protected: list[int] = Field(description="blocks the plan was not allowed to remove")
    order: list[int] = Field(description="removal order, least important first")
    asked: dict[str, Any] = Field(
        description="the budget as asked, e.g. {'remove': 3} or {'ratio': 0.25}"
    )
    reached: Size = Field(description="what the removal takes away")
    reason: str = Field(description="one sentence for a reader")
    scores: str | None = Field(default=None, description="fingerprint of the scores used")

    @model_validator(mode="after")
    def _is_a_partition(self) -> Self:
        """Every block is either kept or removed, once, and something is kept."""
        for name, blocks in (("kept", self.kept), ("removed", self.removed)):
            if blocks != sorted(set(blocks)):
                raise ValueError(f"{name} must list block numbers once each, ascending")
        if sorted(self.kept + self.removed) != list(range(self.model.blocks)) or not self.kept:
            raise ValueError(f"kept and removed must share out the {self.model.blocks} blocks")
        if sorted(self.order) != self.removed:
            raise ValueError("order must hold the removed blocks")
        return self


class Perplexity(Record):
    """One perplexity with its protocol."""

    source: str
    rows: tuple[int, int] | None = None
    split: str | None = Field(
        default=None, description="'held-out' where rows were kept apart from calibration"
    )
    length: int = Field(description="tokens per segment; segments do not overlap")
    bos: Literal["first", "every", "none"]
    segments: int
    predictions: int
    tokens_fingerprint: str
    nll: float = Field(description="mean negative log-likelihood in nats per predicted token")
    perplexity: float


class Samples(Record):
    """Continuations of one prompt."""

    prompt: str
    texts: list[str] = Field(description="the continuations, without the prompt")
    new_tokens: int
    top_k: int
    top_p: float
    temperature: float
    seed: int


class EvaluatedModel(Record):
    """One model's line in eval.json."""

    name: str = Field(description="e.g. 'original' or 'pruned'")
    model: ModelInfo
    perplexity: list[Perplexity]
    samples: Samples | None = None


class Evaluation(ResultFile):
    """eval.json: one entry per model measured, all by the same protocol."""

    models: list[EvaluatedModel]
    dtype: str
    versions: dict[str, str] = Field(default_factory=dict)


class TrainingData(Record):
    """What a model was retrained on."""

    source: str
    kind: Literal["instructions", "text", "generated"]
    template: Literal["alpaca", "chat"] | None = Field(
        default=None, description="how instructions were put in words"
    )
    documents: int
    held_out: int = Field(description="documents that were only measured on")
    tokens: int = Field(description="tokens of the documents trained on, each once")
    cut: int = Field(description="documents longer than a window, whose rest was dropped")
    dropped: int = Field(description="documents with nothing to learn in a window")
    packing: Literal["stream", "fit", "alone"] = Field(
        description="documents end to end; as many whole ones as fit; or one in a window"
    )
    boundaries: Literal["apart", "joined", "alone"] = Field(
        description="whether the documents of a window see each other: apart (positions begin "
        "anew, block-diagonal attention), joined (they do), alone (there is one)"
    )
    windows: int
    length: int = Field(description="tokens of a window")
    fill: float = Field(description="part of the windows that is not padding")
    tokens_fingerprint: str


class Retraining(ResultFile):
    """retrain.json: how a checkpoint was healed, and how it went."""

    model: ModelInfo = Field(description="the checkpoint before")
    teacher: ModelInfo | None = None
    method: Literal["lora", "full", "distill", "last-blocks"]
    options: dict[str, Any]
    data: TrainingData
    adapted: list[str] = Field(
        default_factory=list, description="where LoRA adapters were, by dotted name"
    )
    trained_parameters: int
    curves: dict[str, list[tuple[int, float]]] = Field(
        description="(step, loss in nats per target): train, held_out, and each evaluation set; "
        "evaluations are next-token losses for every method"
    )
    steps: int
    best_step: int = Field(description="the state that was kept: lowest held-out loss")
    stopped: Literal["steps", "patience", "minutes"]
    tokens_seen: int
    processes: int
    sharded: bool = Field(description="whether the weights were shared out over them (FSDP)")
    dtype: str
    versions: dict[str, str] = Field(default_factory=dict)
    cost: Cost | None = None
