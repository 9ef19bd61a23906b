"""A prepared retraining carried out: the model, its windows and Trainer put together, and run."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed

from shortllm.checkpoint.source import Checkpoint
from shortllm.data.texts import vocabulary
from shortllm.errors import ShortLLMError
from shortllm.model.loading import load_model, quiet_transformers
from shortllm.model.session import Session
from shortllm.retraining.cache import CachedTeacher, write_cache
from shortllm.retraining.distillation import (
    Objective,
    TeacherLoss,
    answer_loss,
    cached_loss,
    lineage,
    teacher_blocks,
)
from shortllm.retraining.options import RetrainOptions, TrainingData, micro_batch, warmup
from shortllm.retraining.preparing import Prepared, compute_dtype
from shortllm.retraining.processes import is_sharded, shard_on_cpu_too
from shortllm.retraining.states import last_state, require_sound
from shortllm.retraining.trainable import make_trainable
from shortllm.retraining.trainer import BEST_METRIC, HELD_OUT, HealingTrainer, Meter, Progress
from shortllm.retraining.windows import Segmented, Windows, collate, keeps_apart
from shortllm.runtime import Ranks, progress

log = logging.getLogger(__name__)

EVALUATIONS = 10
"""Evaluations of a training, unless told otherwise; a state is saved at each."""

LOGGED_LOSSES = 100
"""Points of the training curve."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trained:
    """A model that has been trained, its best state put back."""

    trainer: HealingTrainer
    weights: dict[str, Tensor]
    """On the main process all weights by name, on the CPU; elsewhere nothing."""
    data: TrainingData


def train(prepared: Prepared, *, session: Session, ranks: Ranks) -> Trained:
    """Train, going on where an earlier start of the same training was interrupted.

    Raises:
        ShortLLMError: out of memory, or a loss that is no number.
    """
    session.release()
    options = prepared.options
    model = open_model(prepared.checkpoint, options, session)
    apart = prepared.packing != "alone" and keeps_apart(model, vocabulary(prepared.checkpoint))
    windows, held_out = (
        Windows(store, length=length_of(options), packing=prepared.packing, apart=apart)
        for store in (prepared.corpus.train, prepared.corpus.held_out)
    )
    _say_boundaries(prepared, apart)
    objective = _objective(prepared, windows, session, ranks)
    set_seed(options.seed)  # the adapters begin at random
    model = make_trainable(model, options)
    _train_in_float32(model)
    states = prepared.work / "states"
    trainer = HealingTrainer(
        model=model,
        args=_arguments(prepared, len(windows), states, session, ranks),
        train_dataset=windows,
        eval_dataset={HELD_OUT: held_out, **_segmented(prepared)},
        data_collator=collate,
        objective=objective,
        meter=Meter(options.max_minutes, options.patience),
        callbacks=[],
    )
    _run(trainer, states, options)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return Trained(
        trainer=trainer,
        weights=weights if ranks.is_main else {},
        data=_describe(prepared, windows, apart),
    )


def length_of(options: RetrainOptions) -> int:
    """Tokens of a window, which filled-in options always have."""
    assert options.length is not None
    return options.length


def open_model(checkpoint: Checkpoint, options: RetrainOptions, session: Session) -> nn.Module:
    """The model to train: float32 where its weights are trained, so that small steps count.

    Frozen weights are kept in the computation type. A model that will be sharded stays on the CPU.
    """
    sharded = is_sharded()
    frozen = options.method in ("lora", "last-blocks") and not sharded
    dtype = compute_dtype(session) if frozen else "float32"
    device = torch.device("cpu") if sharded else session.device
    model = load_model(checkpoint, device=device, dtype=dtype)
    if options.attention is not None:
        _set_attention(model, options.attention)
    return model


def _set_attention(model: Any, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise ShortLLMError(
            f"--attention {name} cannot be used: {str(error).splitlines()[0]}. Leave it out, or "
            "use eager or sdpa"
        ) from error


def _train_in_float32(model: nn.Module) -> None:
    """What is trained of a model in low precision is kept in float32; mixed precision reads it."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _say_boundaries(prepared: Prepared, apart: bool) -> None:
    if prepared.packing == "alone" or apart:
        return
    if prepared.packing == "fit":
        raise ShortLLMError(
            f"--packing: model type '{prepared.checkpoint.model_type}' cannot keep the "
            "instructions of a window apart. Leave --packing out"
        )
    log.info(
        "model type '%s' cannot keep the documents of a window apart: each sees those before it",
        prepared.checkpoint.model_type,
    )


def _segmented(prepared: Prepared) -> dict[str, Segmented]:
    return {name: Segmented(segments.ids) for name, segments in prepared.evaluation.items()}


def _objective(prepared: Prepared, windows: Windows, session: Session, ranks: Ranks) -> Objective:
    """The method's loss; for distillation with the teacher at hand, in memory or on disk."""
    options, teacher = prepared.options, prepared.teacher
    if teacher is None:
        return answer_loss
    model = load_model(teacher, device=session.device, dtype=compute_dtype(session))
    model.requires_grad_(False)
    if options.top_k is None:
        pairs = None
        if options.hidden_weight:
            pairs = teacher_blocks(lineage(prepared.checkpoint).kept, teacher.block_count)
        return TeacherLoss(model, options.temperature, options.hidden_weight, pairs)
    place = prepared.work / "teacher"
    with progress("asking the teacher", len(windows)) as advance:
        write_cache(
            model,
            windows,
            place,
            k=options.top_k,
            batch=micro_batch(options, ranks.count),
            ranks=ranks,
            advance=advance,
        )
    windows.teacher = CachedTeacher(place)
    return cached_loss


def _arguments(
    prepared: Prepared, windows: int, states: Path, session: Session, ranks: Ranks
) -> TrainingArguments:
    """Trainer's own arguments."""
    options = prepared.options
    micro = micro_batch(options, ranks.count)
    total = total_steps(options, windows)
    every = options.eval_every or max(1, total // EVALUATIONS)
    arguments = TrainingArguments(
        output_dir=str(states),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=options.batch // (micro * ranks.count),
        max_steps=options.max_steps or -1,
        num_train_epochs=options.epochs or 1.0,
        learning_rate=options.learning_rate,
        lr_scheduler_type=_SCHEDULES[options.schedule or "linear"],
        warmup_steps=warmup(options, total),
        weight_decay=options.weight_decay,
        bf16=compute_dtype(session) == "bfloat16",
        use_cpu=session.device.type == "cpu",
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        logging_steps=max(1, total // LOGGED_LOSSES),
        logging_nan_inf_filter=False,
        metric_for_best_model=BEST_METRIC,
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=session.device.type == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=_reporters(options),
        disable_tqdm=True,
        seed=options.seed,
    )
    if ranks.count == 1 and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process trains on one GPU; more need a launcher
    if ranks.count > 1:
        shard_on_cpu_too(arguments)
    return arguments


_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def total_steps(options: RetrainOptions, windows: int) -> int:
    """Steps of the whole training."""
    if options.max_steps is not None:
        return options.max_steps
    return math.ceil((options.epochs or 1.0) * math.ceil(windows / options.batch))


def _reporters(options: RetrainOptions) -> list[str]:
    if options.report_to is not None:
        return options.report_to
    return ["tensorboard"] if find_spec("tensorboard") else []


def _run(trainer: HealingTrainer, states: Path, options: RetrainOptions) -> None:
    """Train to the end, and put the best state back.

    Raises:
        ShortLLMError: out of memory, or a loss that is no number.
    """
    state = last_state(states)
    if state is not None:
        require_sound(state)
        log.info("going on from step %s", state.name.rpartition("-")[2])
    trainer.args.eval_on_start = state is None
    total = total_steps(options, len(trainer.train_dataset))
    try:
        with quiet_transformers(), progress("retraining", total) as advance:
            trainer.add_callback(Progress(advance))
            trainer.train(resume_from_checkpoint=None if state is None else str(state))
    except torch.OutOfMemoryError as error:
        raise ShortLLMError(
            "training ran out of GPU memory. Give a smaller --micro-batch or --length, or "
            "--gradient-checkpointing, or more processes with accelerate launch"
        ) from error
    if trainer.state.best_global_step is None:
        raise ShortLLMError(
            "the held-out loss is not a number: training has gone astray. Give a smaller "
            "--learning-rate, or --dtype float32"
        )
    with quiet_transformers():  # which misses a tied head among the weights
        trainer.load_best()


@contextmanager
def reports_in(directory: Path) -> Iterator[None]:
    """Have tensorboard write into `directory`; it asks the environment for the place."""
    name = "TENSORBOARD_LOGGING_DIR"
    before = os.environ.get(name)
    os.environ[name] = str(directory)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _describe(prepared: Prepared, windows: Windows, apart: bool) -> TrainingData:
    corpus, options = prepared.corpus, prepared.options
    lengths = windows.lengths
    room = len(lengths) * (
        int(lengths.max()) if prepared.packing == "alone" else length_of(options)
    )
    alone = prepared.packing == "alone"
    return TrainingData(
        source=prepared.source,
        kind=prepared.kind,
        template=prepared.template,
        documents=corpus.train.documents,
        held_out=corpus.held_out.documents,
        tokens=corpus.train.tokens,
        cut=corpus.cut,
        dropped=corpus.dropped,
        packing=prepared.packing,
        boundaries="alone" if alone else "apart" if apart else "joined",
        windows=len(windows),
        length=length_of(options),
        fill=round(float(lengths.sum()) / room, 4),
        tokens_fingerprint=corpus.train.fingerprint,
    )
