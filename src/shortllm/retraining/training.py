"""A training: the model, its windows and the Trainer put together, and run."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed

from shortllm.data.chat import template_of
from shortllm.errors import ShortLLMError
from shortllm.model.loading import load_model
from shortllm.progress import progress
from shortllm.retraining.distillation import (
    CachedTeacher,
    Objective,
    TeacherLoss,
    answer_loss,
    cached_loss,
    teacher_blocks,
)
from shortllm.retraining.options import TrainingData
from shortllm.retraining.setup import LOGS, Job, Setup
from shortllm.retraining.trainer import (
    BEST_METRIC,
    HELD_OUT,
    ObjectiveTrainer,
    Progress,
    last_state,
    require_loadable,
)
from shortllm.retraining.windows import Windows, collate, keeps_apart, segmented
from shortllm.runtime import quiet_transformers
from shortllm.surgery.origin import lineage

log = logging.getLogger(__name__)

EVALUATIONS, LOGGED_LOSSES = 10, 100
"""How often a training is evaluated by default, with a state saved each time, and logs its loss."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trained:
    """A trained model, in its best state."""

    trainer: ObjectiveTrainer
    weights: dict[str, Tensor]
    """On the main process all weights by name, on the CPU; empty elsewhere."""
    data: TrainingData


def train(job: Job, callbacks: Sequence[Any] = ()) -> Trained:
    """Train; an earlier start of the same training that was interrupted is resumed.

    Args:
        callbacks: further ones of the Trainer.
    """
    setup, options = job.setup, job.setup.options
    setup.session.release()
    model = _open_model(setup)
    apart = _kept_apart(setup, model)
    windows, held_out = (
        Windows(store, length=setup.length, packing=setup.packing, apart=apart)
        for store in (job.corpus.train, job.corpus.held_out)
    )
    objective = _objective(job, windows)
    set_seed(options.seed)  # adapters start from random values
    model = options.about.function(model, options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # mixed precision casts it where it is used
    steps = options.max_steps
    if steps is None:
        steps = math.ceil((options.epochs or 1.0) * math.ceil(len(windows) / options.batch))
    states = job.work / "states"
    evaluation = {name: segmented(segments.ids) for name, segments in setup.evaluation.items()}
    trainer = ObjectiveTrainer(
        model=model,
        args=_arguments(setup, steps, states),
        train_dataset=windows,
        eval_dataset={HELD_OUT: held_out, **evaluation},
        data_collator=collate,
        objective=objective,
        max_minutes=options.max_minutes,
        patience=options.patience,
    )
    for callback in callbacks:
        trainer.add_callback(callback)
    with _reports_in(job.work / LOGS):
        _run(trainer, states, steps)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return Trained(
        trainer=trainer,
        weights=weights if setup.ranks.is_main else {},
        data=_describe(job, windows, apart),
    )


def _is_sharded() -> bool:
    """Whether the launcher has requested FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _open_model(setup: Setup) -> Any:
    """The model to train; one that will be sharded stays on the CPU.

    Weights that are trained must be in float32, so that small steps count.
    """
    sharded, attention = _is_sharded(), setup.options.attention
    device = torch.device("cpu") if sharded else setup.session.device
    frozen = setup.options.about.freezes and not sharded
    in_4bit = setup.options.load_in_4bit
    if in_4bit and sharded:
        raise ShortLLMError(
            "--load-in-4bit cannot be sharded over processes. Leave it out, or train without FSDP"
        )
    model: Any = load_model(
        setup.checkpoint,
        device=device,
        dtype=setup.dtype if frozen else "float32",
        in_4bit=in_4bit,
    )
    if attention is not None:
        try:
            model.set_attn_implementation(attention)
        except (ValueError, ImportError) as error:
            raise ShortLLMError(
                f"--attention {attention} cannot be used: {str(error).splitlines()[0]}. Leave it "
                "out, or use eager or sdpa"
            ) from error
    return model


def _kept_apart(setup: Setup, model: nn.Module) -> bool:
    """Whether the documents of a window do not see each other; needed of packed instructions."""
    if setup.packing == "alone":
        return False
    if keeps_apart(model, setup.checkpoint.vocabulary):
        return True
    kind = setup.checkpoint.model_type
    if setup.packing == "fit":
        raise ShortLLMError(
            f"--packing: model type '{kind}' cannot keep the instructions of a window apart. Leave "
            "--packing out"
        )
    log.info("model type '%s' cannot keep documents apart: each sees those before it", kind)
    return False


def _objective(job: Job, windows: Windows) -> Objective:
    """The loss: next-token NLL, or the distance from a teacher in memory or cached on disk."""
    setup, options, teacher = job.setup, job.setup.options, job.teacher
    if teacher is None:
        return answer_loss
    model = load_model(teacher, device=setup.session.device, dtype=setup.dtype)
    model.requires_grad_(False)
    if options.top_k is None:
        pairs = []
        if options.hidden_weight:
            pairs = teacher_blocks(lineage(setup.checkpoint).kept, teacher.block_count)
        return TeacherLoss(model, options.temperature, options.hidden_weight, pairs)
    cache = CachedTeacher(job.work / "teacher")
    cache.write(model, windows, k=options.top_k, batch=setup.micro_batch, ranks=setup.ranks)
    windows.predictions = cache.predictions
    return cached_loss


def _arguments(setup: Setup, steps: int, states: Path) -> TrainingArguments:
    """The Trainer's own arguments."""
    from accelerate import DistributedType

    options, device, processes = setup.options, setup.session.device.type, setup.ranks.count
    every = options.eval_every or max(1, steps // EVALUATIONS)
    constant = options.schedule == "constant"
    reporters = ["tensorboard"] if find_spec("tensorboard") else []
    arguments = TrainingArguments(
        output_dir=str(states),
        per_device_train_batch_size=setup.micro_batch,
        per_device_eval_batch_size=setup.micro_batch,
        gradient_accumulation_steps=options.batch // (setup.micro_batch * processes),
        max_steps=options.max_steps or -1,
        num_train_epochs=options.epochs or 1.0,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant_with_warmup" if constant else options.schedule,
        warmup_steps=options.warmup(steps),
        weight_decay=options.weight_decay,
        bf16=setup.dtype == "bfloat16",
        use_cpu=device == "cpu",
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        logging_steps=max(1, steps // LOGGED_LOSSES),
        logging_nan_inf_filter=False,
        metric_for_best_model=BEST_METRIC,
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=device == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=reporters if options.report_to is None else options.report_to,
        disable_tqdm=True,
        seed=options.seed,
    )
    if processes == 1 and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process trains on one GPU; more need a launcher
    state = arguments.distributed_state
    if _is_sharded() and state.distributed_type == DistributedType.MULTI_CPU:
        # accelerate 1.15 skips FSDP between CPU processes, but torch can do it
        state.distributed_type = DistributedType.MULTI_GPU
    return arguments


def _run(trainer: ObjectiveTrainer, states: Path, steps: int) -> None:
    """Train to the end, and load the best state."""
    state = last_state(states)
    if state is not None:
        require_loadable(state)
        log.info("resuming from step %s", state.name.rpartition("-")[2])
    trainer.args.eval_on_start = state is None
    try:
        with quiet_transformers(), progress("retraining", steps) as advance:
            trainer.add_callback(Progress(advance))
            trainer.train(resume_from_checkpoint=None if state is None else str(state))
    except torch.OutOfMemoryError as error:
        raise ShortLLMError(
            "training ran out of GPU memory. Give a smaller --micro-batch or --length, or "
            "--gradient-checkpointing, or more processes with accelerate launch"
        ) from error
    if trainer.state.best_global_step is None:
        raise ShortLLMError(
            "the held-out loss is not finite: training diverged. Give a smaller --learning-rate, "
            "or --dtype float32"
        )
    with quiet_transformers():  # it warns of a tied head that is missing among the weights
        trainer.load_best()


@contextmanager
def _reports_in(directory: Path) -> Iterator[None]:
    """Have tensorboard write into `directory`, which it takes from the environment."""
    name = "TENSORBOARD_LOGGING_DIR"
    before = os.environ.get(name)
    os.environ[name] = str(directory)
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _describe(job: Job, windows: Windows, apart: bool) -> TrainingData:
    """What the model was trained on, for the record."""
    setup, corpus, lengths = job.setup, job.corpus, windows.lengths
    alone, instructions = setup.packing == "alone", setup.kind == "instructions"
    room = len(lengths) * (int(lengths.max()) if alone else setup.length)
    return TrainingData(
        source=setup.source,
        kind=setup.kind,
        template=template_of(setup.tokenizer, setup.options.template) if instructions else None,
        documents=corpus.train.documents,
        held_out=corpus.held_out.documents,
        tokens=corpus.train.tokens,
        cut=corpus.cut,
        dropped=corpus.dropped,
        packing=setup.packing,
        boundaries="alone" if alone else "apart" if apart else "joined",
        windows=len(windows),
        length=setup.length,
        fill=round(float(lengths.sum()) / room, 4),
        tokens_fingerprint=corpus.train.fingerprint,
    )
