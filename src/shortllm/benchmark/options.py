"""bench.json: latency, throughput and memory of models that were measured in turn."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from shortllm.evaluation.options import PROMPT
from shortllm.files import PARTIAL
from shortllm.format import number
from shortllm.options import Flag, Options
from shortllm.records import ModelInfo, Record, ResultFile
from shortllm.runtime import Attention
from shortllm.shown import Shown, data_frame

if TYPE_CHECKING:
    from pandas import DataFrame

BENCHMARK_PRESETS: dict[str, dict[str, list[int]]] = {
    "paper": {"batches": [2**power for power in range(9)], "new_tokens": [128, 512]}
}
"""Named sweeps; `paper` is that of Shortened LLaMA."""

Count = Annotated[int, Field(ge=1)]


class BenchmarkOptions(Options):
    """How speed and memory are measured; the defaults are those of Shortened LLaMA."""

    panel: ClassVar[str] = "Benchmark"

    batches: Annotated[list[Count], Flag(name="--batch", metavar="1,4,16")] = Field(
        default=[1], min_length=1, description="Batch sizes: sequences generated at once."
    )
    new_tokens: Annotated[list[Count], Flag(metavar="128,512")] = Field(
        default=[128], min_length=1, description="Numbers of tokens to generate."
    )
    warmup: int = Field(default=10, ge=1, description="Runs of each model before measuring.")
    runs: int = Field(default=20, ge=1, description="Measured runs of each model.")
    prompt: str = Field(default=PROMPT, description="Prompt to continue.")
    compile: bool = Field(default=False, description="Use a static cache and torch.compile.")
    attention: Attention = None
    seed: Annotated[int, Flag(hidden=True)] = Field(default=0, description="Seed of the sampling.")

    @model_validator(mode="after")
    def _warms_up_after_compiling(self) -> Self:
        if self.compile and self.warmup < 2:
            raise ValueError(
                f"--warmup {self.warmup} is too few with --compile, of which the first compiles. "
                "Give 2 or more"
            )
        return self


class DraftedOptions(Options):
    """How text with a draft is measured."""

    panel: ClassVar[str] = "With a draft"

    draft_tokens: Annotated[list[Count], Flag(metavar="4,8")] = Field(
        default=[4], min_length=1, description="Tokens that the draft proposes in each step."
    )
    prompts: Annotated[list[str], Flag(repeated=True, metavar="DATA")] = Field(
        default_factory=list,
        description="Data whose texts are continued and conversations answered with a draft; can "
        "be repeated. Default: built-in ones. --prompt is that of the other measurements.",
    )
    temperature: float = Field(
        default=0.0,
        ge=0,
        description="Sampling with a draft; at 0 each token is the likeliest one, and the text "
        "must be the same as without the draft.",
    )


UNFINISHED_BENCHMARK = f"bench{PARTIAL}"
"""File in which the finished cells of a sweep are kept until bench.json is written."""


class PeakMemory(Record):
    """Peak memory of one run; what a device does not tell is null.

    The weights of other models that are measured in turn with this one are not counted.
    """

    allocated_bytes: int | None = Field(default=None, description="by torch's allocator")
    reserved_bytes: int | None = Field(
        default=None, description="held by torch's allocator, in use or not"
    )
    device_bytes: int | None = Field(
        default=None, description="in use on the whole device, by NVML; other processes count"
    )
    process_bytes: int | None = Field(
        default=None, description="resident memory of the process, on a CPU"
    )


COLUMNS = (
    "model", "blocks", "parameters", "bytes", "dtype", "batch", "new_tokens", "status",
    "latency_mean_s", "latency_std_s", "latency_median_s", "tokens_per_s", "speedup",
    "ideal_speedup", "first_token_s", "per_token_s", *PeakMemory.model_fields, "utilisation_mean",
    "utilisation_max",
)  # fmt: skip
"""Of bench.csv and of the data frame."""


class Measurement(Record):
    """One model generating with one batch size and length; no figures if memory did not suffice."""

    model: str = Field(description="name of one of the models")
    batch: int
    new_tokens: int = Field(description="tokens that every sequence was made to have")
    status: Literal["ok", "out of memory"] = "ok"
    latencies_s: list[Annotated[float, Field(gt=0)]] = Field(
        default_factory=list, description="seconds of each measured run, in order"
    )
    latency_mean_s: float | None = None
    latency_std_s: float | None = Field(default=None, description="of the sample; null for one run")
    latency_median_s: float | None = None
    tokens_per_s: float | None = Field(
        default=None, description="throughput: batch x new tokens / mean latency"
    )
    first_token_s: float | None = Field(
        default=None, description="median time to the first token, in runs of their own"
    )
    per_token_s: float | None = Field(
        default=None, description="(median latency - first token) / (new tokens - 1)"
    )
    memory: PeakMemory | None = None
    utilisation_mean: float | None = Field(
        default=None,
        description="0 to 1: of the device by NVML, or of the processors open to a CPU process",
    )
    utilisation_max: float | None = None
    swapped: bool = Field(
        default=False, description="the other models were moved off the device meanwhile"
    )


def paired_speedup(first: Measurement, other: Measurement) -> float | None:
    """Latency of the first over the other's: the median over the runs that were measured in turn.

    Pairing each run with its neighbour takes out what drifts between runs.
    """
    if not first.latencies_s or not other.latencies_s:
        return None
    pairs = zip(first.latencies_s, other.latencies_s, strict=True)
    return statistics.median(before / after for before, after in pairs)


class BenchmarkedModel(Record):
    """Which model a name in bench.json stands for."""

    name: str
    model: ModelInfo
    head_parameters: int = Field(ge=1, description="elements of the output projection")
    prompt_tokens: int
    dtype: str

    @property
    def work_per_token(self) -> int:
        """Parameters that take part in each token: blocks and head, dense blocks assumed."""
        return sum(self.model.parameters_per_block) + self.head_parameters


class DraftedMeasurement(Record):
    """One draft on prompts of one kind; each run writes one text alone and with the draft."""

    draft: str = Field(description="name of one of the drafts")
    prompts: Literal["text", "chat"] = Field(description="texts to continue, or requests to answer")
    source: str = Field(description="of the prompts")
    template: Literal["alpaca", "chat"] | None = Field(
        default=None, description="how requests are formatted; chat: by the model's own template"
    )
    draft_tokens: int = Field(description="tokens that the draft proposes in each step")
    new_tokens: int = Field(description="tokens of each text; an answer may end before")
    texts: int = Field(description="different prompts, which take turns")
    alone_s: list[Annotated[float, Field(gt=0)]] = Field(
        description="seconds per token of each run without the draft, in order"
    )
    drafted_s: list[Annotated[float, Field(gt=0)]] = Field(
        description="seconds per token of the same runs with it"
    )
    alone_tokens_per_s: float
    drafted_tokens_per_s: float
    speedup: float = Field(description="alone_s over drafted_s: the median over the runs")
    steps: int = Field(description="forwards of the intact model in all runs")
    drafted: int = Field(description="tokens that the draft proposed in all runs")
    accepted: int = Field(description="those of them that were kept")
    tokens_per_step: float = Field(
        description="accepted ones, and one of the intact model: the mean over the texts"
    )
    tokens_per_step_stderr: float | None = Field(
        default=None, description="standard error of that mean; null for one text"
    )
    near_ties: int = Field(
        default=0,
        description="texts that differ with the draft, from a place where the likeliest tokens are "
        "equal up to rounding",
    )

    @property
    def acceptance(self) -> float:
        """Part of the drafted tokens that was kept."""
        return self.accepted / max(self.drafted, 1)


DRAFTED_COLUMNS = (
    "draft", "blocks", "parameters", "prompts", "source", "draft_tokens", "new_tokens", "texts",
    "alone_tokens_per_s", "drafted_tokens_per_s", "speedup", "tokens_per_step",
    "tokens_per_step_stderr", "acceptance", "near_ties",
)  # fmt: skip
"""Of bench-drafts.csv."""


class DraftModel(Record):
    """Which model the name of a draft stands for."""

    name: str
    model: ModelInfo


class Drafted(Record):
    """Text of the first model alone and with the help of drafts, in turn."""

    drafts: list[DraftModel]
    measurements: list[DraftedMeasurement] = Field(
        min_length=1, description="by prompts, new tokens, draft and drafted tokens"
    )
    temperature: float = Field(description="0: each token is the likeliest one")
    fingerprint: str = Field(description="sha256 of the inputs that made this part")

    @model_validator(mode="after")
    def _is_of_its_drafts(self) -> Self:
        names = {one.name for one in self.drafts}
        for one in self.measurements:
            if one.draft not in names:
                raise ValueError(f"a measurement is of '{one.draft}', which is none of the drafts")
        return self

    @property
    def best(self) -> DraftedMeasurement:
        """The one with the highest speed-up."""
        return max(self.measurements, key=lambda one: one.speedup)

    def __str__(self) -> str:
        """'with draft short, 4 tokens at a time, 0.8 times as fast: slower'."""
        one = self.best
        slower = "" if one.speedup > 1 else ": slower"
        return (
            f"with draft {one.draft}, {one.draft_tokens} tokens at a time, "
            f"{number(one.speedup, 3)} times as fast{slower}"
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each measurement with the columns of bench-drafts.csv."""
        models = {one.name: one.model for one in self.drafts}
        for one in self.measurements:
            values = {
                **models[one.draft].model_dump(include={"blocks", "parameters"}),
                **one.model_dump(),
                "acceptance": one.acceptance,
            }
            yield {name: values[name] for name in DRAFTED_COLUMNS}


class Benchmark(Shown, ResultFile):
    """bench.json: speed and memory of models that were measured in turn."""

    models: list[BenchmarkedModel] = Field(description="speed-ups are against the first")
    measurements: list[Measurement] = Field(description="by new tokens, batch and model")
    prompt: str
    top_k: int
    top_p: float
    temperature: float
    seed: int
    warmup: int = Field(description="runs before the measured ones, per model and cell")
    runs: int
    compiled: bool = Field(description="static cache and torch.compile")
    attention: str | None = Field(default=None, description="as requested; null: the model's own")
    device: str = Field(description="cpu, cuda or mps")
    device_name: str
    threads: int = Field(description="threads torch uses for one operation on the CPU")
    load_average: float | None = Field(
        default=None, description="of the machine over the minute before the measuring began"
    )
    versions: dict[str, str] = Field(default_factory=dict)
    drafted: Drafted | None = Field(
        default=None, description="text of the first model with drafts; null: not measured"
    )

    @model_validator(mode="after")
    def _is_of_its_models(self) -> Self:
        """Every measurement is one of a model, and in each cell all were run equally often."""
        names = [one.name for one in self.models]
        if not names or len(set(names)) != len(names):
            raise ValueError("models must hold at least one, each under a name of its own")
        runs: dict[tuple[int, int], int] = {}
        for one in self.measurements:
            if one.model not in names:
                raise ValueError(f"a measurement is of '{one.model}', which is none of the models")
            count = len(one.latencies_s)
            if count and runs.setdefault((one.batch, one.new_tokens), count) != count:
                raise ValueError("the models of one cell must have been run equally often")
        return self

    def is_about(self, models: Mapping[str, str]) -> bool:
        """Whether it measured these models, by the fingerprint under each name; the first one is
        'original', and other names are left out."""
        named = [("original", self.models[0].model)]
        named += [(one.name, one.model) for one in self.models[1:]]
        named += [(one.name, one.model) for one in (self.drafted.drafts if self.drafted else [])]
        return all(models.get(name) in (None, one.fingerprint) for name, one in named)

    def find(self, model: str, batch: int, new_tokens: int) -> Measurement | None:
        """The measurement of a model in one cell of the sweep."""
        cells = {(one.model, one.batch, one.new_tokens): one for one in self.measurements}
        return cells.get((model, batch, new_tokens))

    def speedup(self, one: Measurement) -> float | None:
        """How many times as fast as the first model; None where one of the two has no latency."""
        first = self.find(self.models[0].name, one.batch, one.new_tokens)
        return None if first is None else paired_speedup(first, one)

    def ideal_speedup(self, model: str) -> float:
        """What removing blocks would give if time were that of blocks plus head alone."""
        work = {one.name: one.work_per_token for one in self.models}
        return work[self.models[0].name] / work[model]

    def __str__(self) -> str:
        """'original, pruned on NVIDIA H200: pruned 1.24 times as fast (batch 1, 8 new tokens)'."""
        names = ", ".join(one.name for one in self.models)
        first, *_ = self.measurements
        found = [self.find(one.name, first.batch, first.new_tokens) for one in self.models[1:]]
        gains = [
            f"{one.model} {number(gain, 3)} times as fast"
            for one in found
            if one is not None and (gain := self.speedup(one)) is not None
        ] or [f"{number(first.tokens_per_s, 3)} tokens/s"]
        cell = f"batch {first.batch}, {first.new_tokens} new tokens"
        drafted = f"; {self.drafted}" if self.drafted else ""
        return f"{names} on {self.device_name}: {', '.join(gains)} ({cell}){drafted}"

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each measurement with the columns of bench.csv; what was not measured is None."""
        models = {one.name: one for one in self.models}
        for one in self.measurements:
            values = {
                **models[one.model].model.model_dump(include={"blocks", "parameters", "bytes"}),
                **one.model_dump(),
                **(one.memory or PeakMemory()).model_dump(),
                "dtype": models[one.model].dtype,
                "speedup": self.speedup(one),
                "ideal_speedup": self.ideal_speedup(one.model),
            }
            yield {name: values[name] for name in COLUMNS}

    def to_dataframe(self) -> DataFrame:
        """A row for each model, batch size and length, with the columns of bench.csv.

        Columns: `model`; its `blocks`, `parameters`, `bytes` and `dtype`; `batch` and `new_tokens`;
        `status`: ok, or out of memory; `latency_mean_s`, `latency_std_s` and `latency_median_s` in
        seconds; `tokens_per_s`; `speedup` over the first model, and `ideal_speedup`, if only
        blocks and head took time; `first_token_s` and `per_token_s` in seconds; `allocated_bytes`,
        `reserved_bytes`, `device_bytes` and `process_bytes`, the peak memory; `utilisation_mean`
        and `utilisation_max` in [0, 1]. What was not measured is none.

        Returns:
            A pandas data frame.
        Raises:
            ShortLLMError: pandas is not installed.
        """
        return data_frame(self.rows(), whole=PeakMemory.model_fields)
