"""eval.json: perplexity, task scores and samples of each model, with their protocol."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, sqrt
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from shortllm.format import change_of_perplexity, with_error
from shortllm.options import Flag, Options
from shortllm.records import ModelInfo, Record, ResultFile

PROMPT = "The Leaning Tower of Pisa is known for"
TOP_K, TOP_P, TEMPERATURE = 50, 0.95, 1.0
"""How Shortened LLaMA generates text, to read it and to time it."""

SAMPLING: dict[str, Any] = {"top_k": TOP_K, "top_p": TOP_P, "temperature": TEMPERATURE}

FEW_SEGMENTS = 100
"""With fewer segments a perplexity is a rough estimate, and so is its standard error."""

SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics that are shares of right answers: shown in percent, and a mean of them makes sense."""

WindowLength = Annotated[
    int, Field(ge=2, description="Tokens per window; 2048 is the usual protocol.")
]
WindowBos = Annotated[
    Literal["first", "every", "none"] | None,
    Field(
        description="Add BOS before the first window or before every one. Default: first; every "
        "for Gemma models."
    ),
]
"""Types of the options that say how a text is cut into windows."""


class EvaluationOptions(Options):
    """On what, and how, models are measured; the defaults are the protocol of Shortened LLaMA."""

    panel: ClassVar[str] = "Evaluation"

    data: Annotated[list[str], Flag(repeated=True, metavar="TEXT")] = Field(
        default_factory=list,
        description="Text to measure perplexity on; can be repeated. Default: rows of --data that "
        "calibration did not use, or wikitext2 and ptb.",
    )
    length: WindowLength = 128
    bos: WindowBos = None
    max_segments: int | None = Field(
        default=None, ge=1, description="Measure only this many windows."
    )
    prompt: str | None = Field(default=None, description="Prompt of the generated samples.")
    continuations: int | None = Field(
        default=None,
        ge=0,
        description="Generated samples per model; 0 for none. Default: 5 in a run, none in eval.",
    )
    new_tokens: int = Field(default=128, ge=1, description="Tokens of each generated sample.")
    seed: Annotated[int, Flag(hidden=True)] = Field(
        default=0, description="Seed of the generated samples."
    )
    tasks: Annotated[list[str], Flag(metavar="TASK,TASK")] = Field(
        default_factory=list,
        description="Zero-shot tasks of lm-evaluation-harness, e.g. boolq,piqa. paper: the seven "
        "of Shortened LLaMA; embedded: those of the embedded model.",
    )
    task_data: Path | None = Field(
        default=None,
        description="Directory of the tasks' documents, DIR/TASK/SPLIT.jsonl. Default: "
        "SHORTLLM_DATA, then the Hub.",
    )
    limit: int | None = Field(
        default=None, ge=1, description="Ask only this many documents of each task."
    )
    batch_size: int = Field(default=8, ge=1, description="Sequences per forward pass of a task.")


class Difference(Record):
    """How much more a model loses than another one, on the same segments."""

    nll: float = Field(description="mean difference in nats per predicted token; more is worse")
    stderr: float | None = Field(description="its standard error, over segments")

    @property
    def is_clear(self) -> bool:
        """Whether it is more than two standard errors."""
        return self.stderr is not None and abs(self.nll) > 2 * self.stderr

    def __str__(self) -> str:
        """The relative change of the perplexity: '+53.0 ± 0.8 %'."""
        return change_of_perplexity(self.nll, self.stderr)


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
    stderr: float | None = Field(
        default=None, description="standard error of the perplexity, over segments"
    )
    difference: Difference | None = Field(
        default=None, description="from the first model of the evaluation, paired by segment"
    )
    segment_nlls: list[float] = Field(
        default_factory=list, description="mean NLL of each segment, in nats, in order"
    )

    def difference_from(self, other: Perplexity) -> Difference | None:
        """How much more this model loses than another; None where segments differ."""
        if self.tokens_fingerprint != other.tokens_fingerprint:
            return None
        return paired_difference(other.segment_nlls, self.segment_nlls)

    def __str__(self) -> str:
        """'36.02 ± 0.41'."""
        return with_error(self.perplexity, self.stderr)


def paired_difference(before: Sequence[float], after: Sequence[float]) -> Difference | None:
    """The mean difference of two models over the same segments; None without any."""
    if not before or len(before) != len(after):
        return None
    differences = [now - then for then, now in zip(before, after, strict=True)]
    return Difference(nll=fmean(differences), stderr=standard_error(differences))


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values; None for a single one."""
    if len(values) < 2:
        return None
    mean, count = fmean(values), len(values)
    return sqrt(fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


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

    @property
    def is_share(self) -> bool:
        """Whether the score is a share of right answers, in [0, 1]."""
        return self.metric.partition(",")[0] in SHARES

    def __str__(self) -> str:
        """'75.98 ± 0.43': the score and its standard error, in percent where it is a share."""
        scale = 100 if self.is_share else 1
        error = "" if self.stderr is None else f" ± {scale * self.stderr:.2f}"
        return f"{scale * self.score:.2f}{error}"


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
