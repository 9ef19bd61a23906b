"""What the stages hand to each other: one frozen, validated record per result file.

    calibration.json  CalibrationInfo      scores.json  BlockScores
    plan.json         PrunePlan            eval.json    Evaluation
    comparison.json   Comparison           bench.json   Benchmark
    target.json       Target

Every record knows how to `save` itself (complete or not at all) and `load` itself (an unknown key
is refused with a suggestion). `fingerprint` is the sha256 of everything that made the record, so
that a stage can tell its own finished work from that of other inputs. Block numbers count from 0 in
the *original* model, in every file. A number that could not be measured is `null`, never 0.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from shortllm.errors import ResultFileError, did_you_mean
from shortllm.files import PARTIAL, write_text

SpecialToken = Literal["bos", "eos", "unk", "pad"]


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
    parameters: int = Field(
        description="elements of all stored tensors, tied ones once, packed ones each by itself"
    )
    parameters_per_block: list[int] = Field(default_factory=list)
    bytes: int = Field(description="bytes of all stored tensors")
    period: int = Field(default=1, description="after how many blocks the kinds of blocks repeat")
    fixed: dict[int, str] = Field(
        default_factory=dict,
        description="blocks that cannot go while all others stay, and why",
    )
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


class CandidateSet(Record):
    """One removal that a search began with, chose from, or found."""

    criterion: str
    removed: list[int] = Field(description="ascending")
    value: float | None = Field(
        description="on the search samples: perplexity, or KL(intact || without) in nats per token"
    )
    held_out: float | None = Field(
        default=None, description="perplexity on the samples that were kept apart"
    )


class NotTried(Record):
    """A criterion that has no removal of the kind asked for."""

    criterion: str
    reason: str


class Search(Record):
    """How a searched set of blocks came about."""

    fitness: Literal["ppl", "kl"]
    candidates: list[CandidateSet] = Field(description="in the order in which they were asked for")
    found: CandidateSet = Field(description="what is removed")
    start: str | None = Field(description="the candidate that swaps or children began with")
    ordered_by: str = Field(description="the criterion whose scores order the blocks")
    rounds: list[float] = Field(
        description="mean fitness of the best set after each round, in nats per token"
    )
    stopped: str | None = Field(description="why there were no more rounds")
    evaluations: float = Field(
        description="sets measured; one measured on a part of the samples counts as that part"
    )
    search_samples: int
    held_out_samples: int
    left_out: list[NotTried] = Field(default_factory=list)


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
        description="removal order, where each block was chosen with the ones before it gone; of a "
        "searched set its blocks, least important first",
    )
    removed: list[int] | None = Field(
        default=None, description="the set of blocks that was searched for; answers its size alone"
    )
    search: Search | None = Field(default=None, description="how that set came about")
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


class ComparedBudget(Record):
    """One column of a comparison: how many blocks go."""

    blocks: int
    ratios: list[float] = Field(description="the parts of the blocks asked for that come to it")


class LeftOut(Record):
    """A ratio that no removal can meet."""

    ratio: float
    reason: str


class RemovedSet(Record):
    """One removal, and what the model can do without these blocks."""

    order: list[int] = Field(description="the removed blocks, the first to go first")
    nll: float | None = Field(description="mean NLL in nats per predicted token")
    perplexity: float | None


class Contender(Record):
    """One row of a comparison: what one criterion removes at each budget."""

    criterion: str
    options: dict[str, Any] = Field(default_factory=dict)
    source: str = Field(description="where the criterion was published; 'baseline' for some")
    scores: str | None = Field(default=None, description="fingerprint of the scores used")
    sets: list[RemovedSet] = Field(description="one for each budget")


class Comparison(ResultFile):
    """comparison.json: removals by several criteria, all measured on the same text."""

    model: ModelInfo
    protected: list[int] = Field(description="blocks that no removal was allowed to touch")
    budgets: list[ComparedBudget] = Field(description="ascending")
    left_out: list[LeftOut] = Field(default_factory=list)
    criteria: list[Contender]
    random: list[Contender] = Field(description="seeded draws, what any criterion must beat")
    intact: Perplexity = Field(description="of the intact model; the protocol of all")
    calibration: str | None = Field(
        default=None, description="tokens_fingerprint of the calibration"
    )
    models: int = Field(description="different shortened models that were measured")
    dtype: str
    versions: dict[str, str] = Field(default_factory=dict)
    cost: Cost | None = Field(default=None, description="of the measurement, without the scoring")

    @model_validator(mode="after")
    def _is_a_table(self) -> Self:
        """Every contender has a set of the right size for each budget."""
        sizes = [budget.blocks for budget in self.budgets]
        for one in (*self.criteria, *self.random):
            if [len(removed.order) for removed in one.sets] != sizes:
                raise ValueError(f"{one.criterion} must hold a removal for each of {sizes} blocks")
        if not (self.budgets and self.criteria and self.random):
            raise ValueError("budgets, criteria and random must not be empty")
        return self


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


class Measurement(Record):
    """One model generating with one batch size and length; no figures if memory did not suffice."""

    model: str = Field(description="name of one of the models")
    batch: int
    new_tokens: int = Field(description="tokens that every sequence was made to have")
    status: Literal["ok", "out of memory"] = "ok"
    latencies_s: list[float] = Field(
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
    head_parameters: int = Field(description="elements of the output projection")
    prompt_tokens: int
    dtype: str

    @property
    def work_per_token(self) -> int:
        """Parameters that take part in each token: blocks and head, dense blocks assumed."""
        return sum(self.model.parameters_per_block) + self.head_parameters


class Benchmark(ResultFile):
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
    attention: str | None = Field(default=None, description="as asked for; null: the model's own")
    device: str = Field(description="cpu, cuda or mps")
    device_name: str
    threads: int = Field(description="threads torch uses for one operation on the CPU")
    load_average: float | None = Field(
        default=None, description="of the machine over the minute before the measuring began"
    )
    versions: dict[str, str] = Field(default_factory=dict)

    def find(self, model: str, batch: int, new_tokens: int) -> Measurement | None:
        """The measurement of a model in one cell of the sweep."""
        for one in self.measurements:
            if (one.model, one.batch, one.new_tokens) == (model, batch, new_tokens):
                return one
        return None

    def speedup(self, one: Measurement) -> float | None:
        """How many times as fast as the first model; None where one of the two has no latency."""
        first = self.find(self.models[0].name, one.batch, one.new_tokens)
        return None if first is None else paired_speedup(first, one)

    def ideal_speedup(self, model: str) -> float:
        """What removing blocks would give if time were that of blocks plus head alone."""
        work = {one.name: one.work_per_token for one in self.models}
        return work[self.models[0].name] / work[model]


class DepthSpeed(Record):
    """How fast a model is with its last blocks passed by."""

    blocks: int = Field(description="blocks that ran")
    latency_s: float = Field(description="median")
    speedup: float = Field(description="over the intact model")


TARGET_FILE = "target.json"


class Target(ResultFile):
    """target.json: the number of blocks that a target came to."""

    model: ModelInfo
    asked: dict[str, float] = Field(description="e.g. {'target_speedup': 1.3}")
    remove: int = Field(description="blocks to remove")
    expected: float = Field(
        description="speed-up by a straight line; parameters or bytes of what is left, at the most"
    )
    reached: float = Field(description="the same, verified: measured again, or as expected")
    dtype: str | None = Field(default=None, description="type that bytes were counted in")
    depths: list[DepthSpeed] = Field(default_factory=list, description="what was measured")

    @property
    def described(self) -> str:
        """One line for a reader."""
        [(name, value)] = self.asked.items()
        removed = f"{self.remove} of {self.model.blocks} blocks removed"
        if name == "target_speedup":
            return f"speed-up {value:g}: {removed}, {self.reached:.3g} measured"
        if name == "target_params":
            return f"{value:,.0f} parameters: {removed}, {self.reached:,.0f} left at the most"
        return f"{value / 2**30:.3g} GiB: {removed}, {self.reached / 2**30:.3g} GiB at the most"

    @property
    def is_met(self) -> bool:
        """Whether what was verified is what was asked for."""
        [(name, value)] = self.asked.items()
        return self.reached >= value if name == "target_speedup" else self.reached <= value


class Candidate(Record):
    """One way of removing the same number of parameters."""

    name: str = Field(description="criterion of depth or method of width; its checkpoint's name")
    unit: Literal["depth", "width"]
    parameters: int
    missed: float = Field(description="part by which it misses the number of the first one")
    healed: str | None = Field(default=None, description="name of the model after retraining")


UNITS_FILE = "units.json"


class UnitsComparison(ResultFile):
    """units.json: depth and width pruning at the same number of parameters.

    What the models can do and how fast they are stands in eval.json and bench.json beside it.
    """

    model: ModelInfo
    asked: dict[str, Any] = Field(description="the budget of depth, which sets the number")
    candidates: list[Candidate]
    retraining: dict[str, Any] | None = Field(
        default=None, description="what all were healed by, as asked"
    )
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
