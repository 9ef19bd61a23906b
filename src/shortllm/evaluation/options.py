"""eval.json: perplexity, task scores and samples of each model, with their protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from shortllm.errors import CheckpointError, ShortLLMError
from shortllm.evaluation.probe.record import Probe
from shortllm.evaluation.statistics import standard_error
from shortllm.format import change_of_perplexity, counted, percent, with_error
from shortllm.options import Flag, Options, option_fields
from shortllm.records import ModelInfo, Record, ResultFile
from shortllm.shown import Shown, data_frame

if TYPE_CHECKING:
    from pandas import DataFrame

PROMPT = "The Leaning Tower of Pisa is known for"
TOP_K, TOP_P, TEMPERATURE = 50, 0.95, 1.0
"""How Shortened LLaMA generates text, to read it and to time it."""

SAMPLING: dict[str, Any] = {"top_k": TOP_K, "top_p": TOP_P, "temperature": TEMPERATURE}

CHAT_TEMPERATURE = 0.2
"""Of answers in a chat: near the likeliest one, by which a shortened model is judged."""

FEW_SEGMENTS = 100
"""With fewer segments a perplexity is a rough estimate, and so is its standard error."""

SHARES = ("acc", "acc_norm", "exact_match", "prompt_level_strict_acc")
"""Metrics that are shares of right answers: shown in percent, and a mean of them makes sense."""

ONLY_WITH = {
    ("tasks",): ("num_fewshot", "fewshot_as_multiturn", "task_data", "limit"),
    ("continuations",): ("prompt", "new_tokens"),
    ("tasks", "continuations", "probe"): ("apply_chat_template", "system_instruction"),
}
"""Of which options one has to be given for others to have an effect."""

WindowLength = Annotated[
    int, Field(ge=2, description="Tokens per window; 2048 is the usual protocol.")
]
WindowBos = Annotated[
    Literal["first", "every", "none"] | None,
    Field(
        description="Add BOS before the text, as the first token of the first window, or before "
        "every window of this many tokens. Default: first; every for Gemma models."
    ),
]
"""Types of the options that say how a text is cut into windows."""


class TaskPrompts(Record):
    """How the documents of tasks were put to the models, in the terms of lm-evaluation-harness."""

    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = Field(
        default=False, description="whether examples were earlier turns of the conversation"
    )
    system_instruction: str | None = None


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
        description="Tasks of lm-evaluation-harness, e.g. boolq,piqa. paper: the seven of "
        "Shortened LLaMA; chat: mmlu, gsm8k and ifeval; embedded: those of the embedded model; "
        "probe: the exercises of --probe.",
    )
    apply_chat_template: Annotated[bool | None, Flag(name="--apply-chat-template/--no-chat")] = (
        Field(
            default=None,
            description="Put the prompts of tasks and of generated samples into the model's chat "
            "template. Default: samples where the models have one, tasks not.",
        )
    )
    num_fewshot: int | None = Field(
        default=None,
        ge=0,
        description="Solved examples before each document of a task. Default: the task's own "
        "number, and 5 for mmlu in the set chat.",
    )
    fewshot_as_multiturn: Annotated[bool | None, Flag(name="--fewshot-as-multiturn/--one-turn")] = (
        Field(
            default=None,
            description="Show the examples as earlier turns of the conversation, as is the default "
            "with --apply-chat-template, or in one turn.",
        )
    )
    system_instruction: Annotated[str | None, Flag(name="--system", metavar="TEXT")] = Field(
        default=None, description="System message of tasks, and of samples in a chat template."
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
    probe: bool | None = Field(
        default=None,
        description="Put 384 short exercises and 8 open requests to the models. Default: in a run "
        "on a model of 50 M parameters or more; not in eval.",
    )

    @property
    def before_window(self) -> int:
        """Tokens before the `length` of every window: its BOS."""
        return int(self.bos == "every")

    @property
    def task_prompts(self) -> TaskPrompts:
        """How the documents of tasks are put to the models."""
        in_template = bool(self.apply_chat_template)
        return TaskPrompts(
            apply_chat_template=in_template,
            fewshot_as_multiturn=in_template and self.fewshot_as_multiturn is not False,
            system_instruction=self.system_instruction,
        )

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """The flags that were given for what is not measured, each with the flags that it needs."""
        for needed, names in ONLY_WITH.items():
            if not any(getattr(self, flag) for flag in needed):
                flags = " or ".join(f"--{flag}" for flag in needed)
                for name in (name for name in names if name in self.model_fields_set):
                    yield option_fields(type(self))[name].option, flags

    @property
    def needs_template(self) -> bool:
        """Whether a model without a chat template cannot be asked so."""
        return bool(self.apply_chat_template or (self.system_instruction and not self.tasks))

    def require_template(self, model: str, exists: bool) -> None:
        """Refuse a model without a chat template where that is needed."""
        if self.needs_template and not exists:
            raise CheckpointError(
                f"{'--apply-chat-template' if self.apply_chat_template else '--system'}: {model} "
                "has no chat template. Leave the option out, or put the template into its "
                "directory as chat_template.jinja"
            )

    def require_template_for_turns(self) -> None:
        """Refuse examples as turns of a conversation where there is no conversation."""
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ShortLLMError(
                "--fewshot-as-multiturn shows examples as turns of a conversation. Add "
                "--apply-chat-template"
            )


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
    length: int = Field(
        description="tokens per segment, without the BOS before every one; no token is in two"
    )
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


class Samples(Record):
    """Continuations of one prompt, or answers to it."""

    prompt: str
    apply_chat_template: bool = Field(
        default=False, description="whether the prompt was put into the model's chat template"
    )
    system_instruction: str | None = Field(
        default=None, description="the system message before the prompt"
    )
    texts: list[str] = Field(description="the continuations, without the prompt")
    new_tokens: int
    top_k: int
    top_p: float
    temperature: float
    seed: int

    def shown(self) -> list[str]:
        """Each text after its prompt: on the same line, or as an answer below it."""
        between = "\n" if self.apply_chat_template else ""
        return [f"{self.prompt}{between}{text}" for text in self.texts]


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
    probe: Probe | None = Field(default=None, description="null where it was not put to the model")
    samples: Samples | None = None
    chat_template: str | None = Field(
        default=None, description="sha256 of the chat template that prompts were put into"
    )


class Evaluation(Shown, ResultFile):
    """eval.json: one entry per model measured, all by the same protocol."""

    models: list[EvaluatedModel]
    task_prompts: TaskPrompts | None = Field(
        default=None, description="how tasks were asked; null where none was"
    )
    dtype: str
    versions: dict[str, str] = Field(default_factory=dict)

    def __str__(self) -> str:
        """'original 1.798 ± 0.02, pruned 1.892 ± 0.02 (perplexity on embedded)'."""
        texts = [one.source for one in self.models[0].perplexity] if self.models else []
        tasks = [one.task for one in self.models[0].zeroshot] if self.models else []
        if texts:
            shown = [f"{one.name} {one.perplexity[0]}" for one in self.models]
            return f"{', '.join(shown)} (perplexity on {texts[0]})"
        means = [f"{one.name} {percent(one.zeroshot_mean)}" for one in self.models]
        return f"{', '.join(means)} (mean of {counted(len(tasks), 'task')})"

    def to_dataframe(self) -> DataFrame:
        """A row for each model and each text or task.

        Columns: `model`; its `blocks`, `parameters` and `bytes`; `kind`, perplexity, task or probe;
        `name` of the text, task or capability; `metric`, of a probe written or chosen; `value`, a
        perplexity, or the score as the task gives it (shares in [0, 1]); `stderr`, its standard
        error; `delta_nll`, by how much the loss on a text is above that of the first model, in nats
        per token, and `delta_nll_stderr`; `count` of segments, documents or exercises. What was not
        measured is none.

        Returns:
            A pandas data frame.
        Raises:
            ShortLLMError: pandas is not installed.
        """
        return data_frame(
            {
                "model": one.name,
                **one.model.model_dump(include={"blocks", "parameters", "bytes"}),
                **measured,
            }
            for one in self.models
            for measured in (
                *map(_text_row, one.perplexity),
                *map(_task_row, one.zeroshot),
                *(_probe_rows(one.probe) if one.probe else ()),
            )
        )


def _text_row(one: Perplexity) -> dict[str, Any]:
    return {
        "kind": "perplexity",
        "name": one.source,
        "metric": "perplexity",
        "value": one.perplexity,
        "stderr": one.stderr,
        "delta_nll": one.difference.nll if one.difference else None,
        "delta_nll_stderr": one.difference.stderr if one.difference else None,
        "count": one.segments,
    }


def _task_row(one: TaskScore) -> dict[str, Any]:
    return {
        "kind": "task",
        "name": one.task,
        "metric": one.metric,
        "value": one.score,
        "stderr": one.stderr,
        "delta_nll": None,
        "delta_nll_stderr": None,
        "count": one.documents,
    }


def _probe_rows(one: Probe) -> Iterator[dict[str, Any]]:
    for score in one.capabilities:
        for metric, found in (("written", score.written), ("chosen", score.chosen)):
            yield {
                "kind": "probe",
                "name": score.capability,
                "metric": metric,
                "value": found.share,
                "stderr": found.stderr,
                "delta_nll": None,
                "delta_nll_stderr": None,
                "count": score.items,
            }
