"""Every choice of a retraining in one record, with the defaults of each method as a table.

The defaults are those of Shortened LLaMA (arXiv:2402.02834): LoRA on instructions, continued
pretraining (`full`) on packed text.


retrain.json: on what a checkpoint was retrained, how, and how it went.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from shortllm.errors import DataError, ShortLLMError, did_you_mean
from shortllm.records import Cost, ModelInfo, Record, ResultFile

Method = Literal["lora", "full", "distill", "last-blocks"]

GENERATED = "generated"
"""The data source that stands for text which the teacher writes itself."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {
        "data": "alpaca",
        "length": 256,
        "learning_rate": 1e-4,
        "schedule": "linear",
        "weight_decay": 0.0,
        "epochs": 2.0,
    },
    "full": {
        "length": 2048,
        "learning_rate": 1e-4,
        "schedule": "cosine",
        "weight_decay": 0.1,
        "epochs": 1.0,
    },
    "distill": {
        "length": 2048,
        "learning_rate": 1e-4,
        "schedule": "cosine",
        "weight_decay": 0.1,
        "epochs": 1.0,
    },
    "last-blocks": {
        "data": "alpaca",
        "length": 256,
        "learning_rate": 1e-4,
        "schedule": "linear",
        "weight_decay": 0.0,
        "epochs": 2.0,
    },
}
"""Method -> what stands in its options where nothing is given."""

ONLY_FOR: dict[str, tuple[str, ...]] = {
    "rank": ("lora",),
    "alpha": ("lora",),
    "dropout": ("lora",),
    "blocks": ("last-blocks",),
    "teacher": ("distill",),
    "temperature": ("distill",),
    "top_k": ("distill",),
    "hidden_weight": ("distill",),
    "generate": ("distill",),
}
"""Option -> the methods it means something to."""

MAX_WARMUP_STEPS = 100

WARMUP_SHARE = 0.1
"""Warm-up takes the paper's 100 steps, but no more than this part of a short training."""

HELD_OUT = {"instructions": 2000, "text": 100}
"""Documents held out at the most, by the kind of data; never more than one in ten."""

MICRO_TOKENS = 4096
"""Tokens that go through the model at a time, where the micro-batch is not given."""


class RetrainOptions(Record):
    """How a shortened checkpoint is healed; what is not given depends on the method."""

    method: Method = "lora"
    data: str | None = Field(
        default=None, description="data source; lora and last-blocks: alpaca; distill: or generated"
    )
    form: Literal["auto", "instructions", "text"] = Field(
        default="auto", description="auto: instructions where rows have instruction and output"
    )
    template: Literal["auto", "alpaca", "chat"] = Field(
        default="auto", description="auto: the tokenizer's chat template where it has one"
    )
    loss_on: Literal["answer", "all"] = "answer"
    packing: bool | None = Field(
        default=None, description="fill every window; default: for text, not for instructions"
    )
    length: int | None = Field(default=None, description="tokens per window; lora 256, full 2048")
    rows: int | None = Field(default=None, description="use only the first so many rows")
    held_out: int | None = Field(
        default=None, description="documents held out; 2000 instructions, 100 of text, at most 10 %"
    )
    eval_data: list[str] = Field(default_factory=list, description="further evaluation sets")
    eval_length: int = 128
    eval_segments: int | None = Field(default=None, description="only the first so many segments")

    epochs: float | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    batch: int = Field(default=64, description="windows per step, over all processes")
    micro_batch: int | None = Field(default=None, description="windows per process at a time")
    learning_rate: float | None = None
    schedule: Literal["linear", "cosine", "constant"] | None = None
    warmup_steps: int | None = Field(default=None, description="100, at most a tenth of all")
    weight_decay: float | None = None
    seed: int = 1234
    eval_every: int | None = Field(
        default=None, description="steps between evaluations, and saved states; a tenth of all"
    )
    patience: int | None = Field(
        default=None, description="stop after so many evaluations without a better one"
    )
    gradient_checkpointing: bool = False
    attention: str | None = Field(default=None, description="transformers' attn_implementation")
    report_to: list[str] | None = Field(
        default=None, description="Trainer's reporters; default: tensorboard where installed"
    )

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    blocks: int = Field(default=3, description="last blocks that are trained, beside the head")
    teacher: str | None = Field(default=None, description="default: the source in the provenance")
    temperature: float = 1.0
    top_k: int | None = Field(
        default=None, description="keep the teacher's k likeliest tokens on disk instead of it"
    )
    hidden_weight: float = Field(default=0.0, description="weight of the loss on hidden states")
    generate: int | None = Field(default=None, description="documents the teacher writes")

    def filled(self, room: int | None) -> RetrainOptions:
        """The same options with what depends on the method filled in.

        Args:
            room: positions the model has; None where it does not say.
        Raises:
            ShortLLMError: options that do not fit the method or each other.
        """
        self._check()
        defaults = dict(DEFAULTS[self.method])
        if room is not None:
            defaults["length"] = min(defaults["length"], room)
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        if self.max_steps is not None:
            missing.pop("epochs", None)
        filled = self.model_copy(update=missing)
        if filled.data is None:
            raise DataError(
                f"--method {self.method} needs text to train on. Give --data, e.g. --data c4"
            )
        return filled

    def _check(self) -> None:
        if self.method not in DEFAULTS:
            raise ShortLLMError(
                f"unknown --method '{self.method}'.{did_you_mean(self.method, DEFAULTS)}"
            )
        for name, methods in ONLY_FOR.items():
            if name in self.model_fields_set and self.method not in methods:
                if getattr(self, name) == type(self).model_fields[name].default:
                    continue
                raise ShortLLMError(
                    f"{_flag(name)} belongs to --method {' or '.join(methods)}, not to "
                    f"{self.method}. Leave it out, or choose that method"
                )
        self._check_numbers()
        self._check_generated()
        if self.max_steps is not None and self.epochs is not None:
            raise ShortLLMError("--max-steps and --epochs both say how long. Give one of them")
        if self.hidden_weight and self.top_k is not None:
            raise ShortLLMError(
                "--hidden-weight needs the teacher's hidden states, and --top-k keeps only its "
                "likeliest tokens. Leave one of them out"
            )

    def _check_numbers(self) -> None:
        for name in (
            "length", "rows", "held_out", "eval_length", "eval_segments", "max_steps",
            "max_minutes", "batch", "micro_batch", "epochs", "learning_rate", "eval_every",
            "patience", "rank", "alpha", "blocks", "top_k", "temperature", "generate",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ShortLLMError(f"{_flag(name)} {value} means nothing. Give more than 0")
        if not 0 <= self.dropout < 1:
            raise ShortLLMError(f"--dropout {self.dropout} is no share. Give 0 or more, below 1")
        if self.hidden_weight < 0:
            raise ShortLLMError(
                f"--hidden-weight {self.hidden_weight} means nothing. Give 0 or more"
            )

    def _check_generated(self) -> None:
        if self.data == GENERATED and self.method != "distill":
            raise ShortLLMError(
                f"--data {GENERATED} is text that a teacher writes, and --method {self.method} "
                "has none. Use --method distill, or give other --data"
            )
        if self.data == GENERATED and self.generate is None and self.max_steps is None:
            raise ShortLLMError(
                f"--data {GENERATED} has no end. Say how many documents with --generate, or how "
                "many steps with --max-steps"
            )
        if self.generate is not None and self.data != GENERATED:
            raise ShortLLMError(f"--generate belongs to --data {GENERATED}. Leave one of them out")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def warmup(options: RetrainOptions, total_steps: int) -> int:
    """Steps over which the learning rate rises."""
    if options.warmup_steps is not None:
        return options.warmup_steps
    return min(MAX_WARMUP_STEPS, int(total_steps * WARMUP_SHARE))


def micro_batch(options: RetrainOptions, processes: int) -> int:
    """Windows that one process takes at a time: a divisor of its share of the batch.

    Raises:
        ShortLLMError: the batch cannot be shared like this.
    """
    share, rest = divmod(options.batch, processes)
    if rest or not share:
        raise ShortLLMError(
            f"a batch of {options.batch} cannot be shared by {processes} processes. Give a "
            f"multiple of {processes} as --batch"
        )
    if options.micro_batch is not None:
        if share % options.micro_batch:
            raise ShortLLMError(
                f"--micro-batch {options.micro_batch} does not divide the {share} windows of a "
                "step and process. Give a divisor"
            )
        return options.micro_batch
    assert options.length is not None
    most = max(1, MICRO_TOKENS // options.length)
    return max(size for size in range(1, min(share, most) + 1) if share % size == 0)


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
