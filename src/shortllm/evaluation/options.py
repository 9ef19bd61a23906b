"""eval.json: perplexity, task scores and samples of each model, with their protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from shortllm.records import ModelInfo, Record, ResultFile


class EvaluationOptions(Record):
    """On what, and how, models are measured; the defaults are the paper protocol."""

    data: list[str] = Field(
        default_factory=list,
        description="data sources; default: calibration rows kept apart, or wikitext2 and ptb",
    )
    length: int = Field(default=128, description="tokens per segment; 2048 is the usual protocol")
    bos: Literal["first", "every", "none"] | None = Field(
        default=None, description="default: first; every for Gemma types"
    )
    max_segments: int | None = Field(
        default=None, description="measure only the first so many segments"
    )
    prompt: str | None = Field(default=None, description="prompt of the generation samples")
    continuations: int = Field(default=5, description="generation samples per model; 0 for none")
    new_tokens: int = 128
    seed: int = 0
    tasks: list[str] = Field(
        default_factory=list, description="zero-shot tasks by name, or the sets paper and embedded"
    )
    task_data: Path | None = Field(
        default=None, description="directory of the tasks' documents; default: SHORTLLM_DATA, Hub"
    )
    limit: int | None = Field(default=None, ge=1, description="documents per task; default: all")
    batch_size: int = Field(default=8, ge=1, description="sequences per forward pass of a task")


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


class TaskScore(Record):
    """What a model scores in one task of lm-evaluation-harness."""

    task: str
    metric: str = Field(description="the one reported, e.g. 'acc_norm' or 'exact_match,flexible'")
    score: float = Field(description="as the harness gives it: an accuracy in [0, 1]")
    stderr: float | None = Field(default=None, description="standard error of the score")
    others: dict[str, float] = Field(
        default_factory=dict, description="the task's other metrics, by name"
    )
    documents: int = Field(description="documents asked about")
    documents_fingerprint: str = Field(description="sha256 of these documents")
    shots: int | None = Field(default=None, description="solved examples shown before each")
    version: str | None = Field(default=None, description="the task's version in the harness")


class EvaluatedModel(Record):
    """One model's line in eval.json."""

    name: str = Field(description="e.g. 'original' or 'pruned'")
    model: ModelInfo
    perplexity: list[Perplexity]
    zeroshot: list[TaskScore] = Field(default_factory=list)
    zeroshot_mean: float | None = Field(
        default=None, description="plain mean of the scores, where all are accuracies"
    )
    samples: Samples | None = None


class Evaluation(ResultFile):
    """eval.json: one entry per model measured, all by the same protocol."""

    models: list[EvaluatedModel]
    dtype: str
    versions: dict[str, str] = Field(default_factory=dict)
