"""retrain.json: on what a checkpoint was retrained, how, and how it went."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from shortllm.results.record import Cost, ModelInfo, Record, ResultFile


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
