"""Options of a retraining, whose defaults depend on the method (`methods.py`), and retrain.json."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from shortllm.checkpoint.hub import ModelSource
from shortllm.data.options import Columns
from shortllm.data.shapes import Form, Template
from shortllm.errors import ShortLLMError
from shortllm.options import Flag, Options
from shortllm.records import DerivedRecord, ModelInfo, Record
from shortllm.registry import described
from shortllm.retraining.methods import METHODS, TrainingMethod, default_of, defaults_text
from shortllm.runtime import DeviceOptions

Kind = Literal["instructions", "text", "generated"]
Packing = Literal["stream", "fit", "alone"]

GENERATED: Literal["generated"] = "generated"
"""Data source: text that the teacher writes."""

MAX_WARMUP_STEPS, WARMUP_SHARE = 100, 0.1
"""Warm-up takes the paper's 100 steps, but at most a tenth of a short training."""

HELD_OUT = {"instructions": 2000, "text": 100, GENERATED: 100}
"""Documents held out by the kind of data; never more than one in ten."""

MICRO_TOKENS = 4096
"""Tokens that go through the model at a time if the micro-batch is not given."""

DATA = "Training data"
OWN = "Options of one method"

MethodName = Annotated[
    str,
    AfterValidator(lambda name: METHODS.get(name).name),
    Field(json_schema_extra={"enum": METHODS.names()}),
    Flag(metavar="|".join(METHODS.names())),
]


class TrainingRuntime(DeviceOptions):
    """Where a training runs; the whole model must be in memory."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Computation type. auto: bfloat16 on CUDA, else float32."
    )


class RetrainOptions(Options):
    """How a shortened checkpoint is retrained."""

    panel: ClassVar[str] = "Training"

    method: MethodName = Field(default="lora", description="What is trained. " + described(METHODS))
    data: Annotated[str | None, Flag(panel=DATA)] = Field(
        default=None,
        description="Conversations or text: a file, a Hub data set or a built-in name, or a "
        "mixture with weights, as in c4:0.5,alpaca:0.5; for distill also "
        f"'{GENERATED}' (the teacher writes it). Default: {defaults_text('data')}.",
    )
    columns: Annotated[Columns, Flag(panel=DATA, metavar="FIELD=COLUMN")] = None
    form: Annotated[Form, Flag(panel=DATA)] = Field(
        default="auto",
        description="Kind of data: conversations (instructions with their answers) or text. auto: "
        "by the names of the columns.",
    )
    template: Annotated[Literal["auto", "alpaca", "chat"], Flag(panel=DATA)] = Field(
        default="auto",
        description="Format of conversations. auto: the tokenizer's chat template if it has one, "
        "else that of Alpaca.",
    )
    loss_on: Annotated[Literal["answer", "all"], Flag(panel=DATA)] = Field(
        default="answer",
        description="Which tokens of a conversation are learned: every turn of the assistant, or "
        "all.",
    )
    packing: Annotated[bool | None, Flag(panel=DATA)] = Field(
        default=None,
        description="Fill every window with several documents. Default: for text, not for "
        "instructions.",
    )
    length: Annotated[int | None, Flag(panel=DATA)] = Field(
        default=None, gt=0, description=f"Tokens per window. Default: {defaults_text('length')}."
    )
    rows: Annotated[int | None, Flag(panel=DATA)] = Field(
        default=None, gt=0, description="Use only this many rows, from the first. Default: all."
    )
    held_out: Annotated[int | None, Flag(panel=DATA)] = Field(
        default=None,
        gt=0,
        description="Rows to measure on instead of training, at most a tenth. Default: "
        f"{HELD_OUT['instructions']} instructions, {HELD_OUT['text']} documents of text.",
    )
    eval_data: Annotated[list[str], Flag(panel=DATA, repeated=True)] = Field(
        default_factory=list,
        description="Further text to measure on, e.g. wikitext2; may be repeated.",
    )
    eval_length: Annotated[int, Flag(panel=DATA)] = Field(
        default=128, gt=0, description="Tokens per segment of that text."
    )
    eval_segments: Annotated[int | None, Flag(panel=DATA)] = Field(
        default=None,
        gt=0,
        description="Measure only this many segments of each such text. Default: all.",
    )

    epochs: float | None = Field(
        default=None, gt=0, description=f"Passes over the data. Default: {defaults_text('epochs')}."
    )
    max_steps: int | None = Field(default=None, gt=0, description="Steps, instead of epochs.")
    max_minutes: float | None = Field(
        default=None, gt=0, description="Stop after this many minutes of training."
    )
    batch: int = Field(default=64, gt=0, description="Windows per step, over all processes.")
    micro_batch: int | None = Field(
        default=None,
        gt=0,
        description="Windows that a process takes at a time. Default: about "
        f"{MICRO_TOKENS:,} tokens.",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description=f"Peak learning rate of AdamW. Default: {defaults_text('learning_rate')}.",
    )
    schedule: Literal["linear", "cosine", "constant"] | None = Field(
        default=None,
        description="How the learning rate falls after warm-up. Default: "
        f"{defaults_text('schedule')}.",
    )
    warmup_steps: int | None = Field(
        default=None,
        ge=0,
        description=f"Steps of warm-up. Default: {MAX_WARMUP_STEPS}, at most a tenth of all steps.",
    )
    weight_decay: float | None = Field(
        default=None,
        ge=0,
        description=f"Weight decay of AdamW. Default: {defaults_text('weight_decay')}.",
    )
    seed: int = Field(default=1234, description="Seed of order, adapters and dropout.")
    eval_every: int | None = Field(
        default=None,
        gt=0,
        description="Steps between evaluations; a state is saved at each. Default: a tenth of all.",
    )
    patience: int | None = Field(
        default=None,
        gt=0,
        description="Stop after this many evaluations without a better one. Default: never.",
    )
    gradient_checkpointing: Annotated[bool, Flag(name="--gradient-checkpointing")] = Field(
        default=False, description="Recompute activations: less memory, more time."
    )
    attention: str | None = Field(
        default=None,
        description="Attention implementation of transformers: eager, sdpa, flash_attention_2 ... "
        "Default: transformers chooses.",
    )
    report_to: Annotated[list[str] | None, Flag(repeated=True)] = Field(
        default=None,
        description="Where the Trainer reports, by transformers' names: none, all, tensorboard, "
        "wandb ...; may be repeated. Default: tensorboard if installed.",
    )

    rank: Annotated[int, Flag(panel=OWN)] = Field(
        default=default_of("rank"), gt=0, description="lora: rank of the adapters."
    )
    alpha: Annotated[int, Flag(panel=OWN)] = Field(
        default=default_of("alpha"),
        gt=0,
        description="lora: scale of the adapters, divided by the rank.",
    )
    dropout: Annotated[float, Flag(panel=OWN)] = Field(
        default=default_of("dropout"), ge=0, lt=1, description="lora: dropout before the adapters."
    )
    use_rslora: Annotated[bool, Flag(panel=OWN)] = Field(
        default=default_of("use_rslora"),
        description="lora: divide alpha by the root of the rank (rank-stabilised LoRA).",
    )
    use_dora: Annotated[bool, Flag(panel=OWN)] = Field(
        default=default_of("use_dora"),
        description="lora: learn the length of each weight vector separately (DoRA).",
    )
    load_in_4bit: Annotated[bool, Flag(panel=OWN)] = Field(
        default=default_of("load_in_4bit"),
        description="lora: keep the frozen weights in 4 bits while training (QLoRA); needs a CUDA "
        "GPU and bitsandbytes.",
    )
    blocks: Annotated[int, Flag(panel=OWN)] = Field(
        default=default_of("blocks"),
        gt=0,
        description="last-blocks: number of blocks to train, next to the head.",
    )
    teacher: Annotated[ModelSource | None, Flag(panel=OWN)] = Field(
        default=default_of("teacher"),
        description="distill: model to learn from. Default: the model that was shortened.",
    )
    temperature: Annotated[float, Flag(panel=OWN)] = Field(
        default=default_of("temperature"),
        gt=0,
        description="distill: temperature of both distributions.",
    )
    top_k: Annotated[int | None, Flag(panel=OWN)] = Field(
        default=default_of("top_k"),
        gt=0,
        description="distill: cache the teacher's top-k logits on disk instead of keeping the "
        "teacher in memory.",
    )
    hidden_weight: Annotated[float, Flag(panel=OWN)] = Field(
        default=default_of("hidden_weight"),
        ge=0,
        description="distill: weight of the distance between hidden states; 0 for none.",
    )
    generate: Annotated[int | None, Flag(panel=OWN)] = Field(
        default=default_of("generate"),
        gt=0,
        description=f"distill: documents the teacher writes for --data {GENERATED}.",
    )

    @property
    def about(self) -> TrainingMethod:
        """The method's entry in the registry."""
        return METHODS.get(self.method)

    @model_validator(mode="after")
    def _fit_each_other(self) -> Self:
        METHODS.require_own_options(self.method, self)
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("--max-steps and --epochs both set the duration. Give one of them")
        if self.hidden_weight and self.top_k is not None:
            raise ValueError(
                "--hidden-weight needs the teacher's hidden states, and --top-k caches only its "
                "logits. Leave one of them out"
            )
        if self.data != GENERATED and self.generate is not None:
            raise ValueError(f"--generate belongs to --data {GENERATED}. Leave one of them out")
        if self.data == GENERATED and not self.about.has_teacher:
            teaching = " or ".join(one.name for one in METHODS if one.has_teacher)
            raise ValueError(
                f"--data {GENERATED} is text that a teacher writes, and --method {self.method} "
                f"has no teacher. Use --method {teaching}, or give other --data"
            )
        if self.data == GENERATED and self.generate is None and self.max_steps is None:
            raise ValueError(
                f"--data {GENERATED} has no end. Set the number of documents with --generate, or "
                "of steps with --max-steps"
            )
        return self

    def warmup(self, total_steps: int) -> int:
        """Steps over which the learning rate rises."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(MAX_WARMUP_STEPS, int(total_steps * WARMUP_SHARE))

    def micro_batch_of(self, processes: int) -> int:
        """Windows that one process takes at a time: a divisor of its share of the batch."""
        share, rest = divmod(self.batch, processes)
        if rest or not share:
            raise ShortLLMError(
                f"a batch of {self.batch} cannot be divided among {processes} processes. Give a "
                f"multiple of {processes} as --batch"
            )
        if self.micro_batch is not None and share % self.micro_batch:
            raise ShortLLMError(
                f"--micro-batch {self.micro_batch} does not divide the {share} windows of a step "
                "and process. Give a divisor"
            )
        most = max(1, MICRO_TOKENS // (self.length or MICRO_TOKENS))
        fitting = (size for size in range(1, min(share, most) + 1) if share % size == 0)
        return self.micro_batch or max(fitting)


class TrainingData(Record):
    """What a model was retrained on."""

    source: str
    kind: Kind
    template: Template | None = Field(default=None, description="prompt format of instructions")
    documents: int
    held_out: int = Field(description="documents that were only measured on")
    tokens: int = Field(description="tokens of the documents trained on, each once")
    cut: int = Field(description="documents longer than a window, whose rest was dropped")
    dropped: int = Field(description="documents with nothing to learn in a window")
    packing: Packing = Field(
        description="documents end to end; as many whole ones as fit; or one in a window"
    )
    boundaries: Literal["apart", "joined", "alone"] = Field(
        description="whether the documents of a window see each other: apart (positions restart "
        "at each, block-diagonal attention), joined (they do), alone (there is one)"
    )
    windows: int
    length: int = Field(description="tokens of a window")
    fill: float = Field(description="part of the windows that is not padding")
    tokens_fingerprint: str


class Retraining(DerivedRecord):
    """retrain.json: how a checkpoint was retrained."""

    FILE: ClassVar[str] = "retrain.json"

    teacher: ModelInfo | None = None
    method: MethodName
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
    sharded: bool = Field(description="whether the weights were sharded over them (FSDP)")
    dtype: str


def without_gpu(reason: str) -> ShortLLMError:
    """4-bit weights cannot be used here."""
    return ShortLLMError(
        f"--load-in-4bit needs a CUDA GPU, and {reason}. Leave it out: LoRA without it trains the "
        "same adapters"
    )
