"""Retrain a shortened checkpoint: the same files, names and config, with trained weights.

check, prepare   setup.py      options, data and teacher, before a model is loaded
train            training.py   the transformers Trainer, resumed where it was interrupted
derive           here          adapters merged, weights written, read back and compared

shortllm retrain pruned --method lora --data alpaca --out retrained
accelerate launch --config_file CONFIG -m shortllm retrain pruned --method full ...
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shortllm import __version__
from shortllm.calls import accepts, described
from shortllm.checkpoint.hub import ModelSource
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tensors import weight_files
from shortllm.errors import CheckpointError
from shortllm.files import releasing, require_free, translate_os_errors
from shortllm.model import Session
from shortllm.model.loading import load_model, stored_dtype
from shortllm.options import OneOrMore
from shortllm.records import Cost
from shortllm.registry import cited
from shortllm.retraining.adapter import describe_adapter
from shortllm.retraining.options import Retraining, RetrainOptions, TrainingRuntime
from shortllm.retraining.setup import LOGS, Job, check, prepare
from shortllm.runtime import ALONE, Ranks, join_ranks, peak_memory, quiet_transformers, versions
from shortllm.surgery.derived import (
    NEW,
    Draft,
    derive,
    is_up_to_date,
    require_apart,
)
from shortllm.surgery.origin import held_provenance, named_source

if TYPE_CHECKING:
    from shortllm.retraining.training import Trained

ADAPTER = "adapter"
"""Directory of LoRA's adapter, next to the merged weights."""

PEFT_PREFIX = "base_model.model."
"""What peft puts before the names of the model's own modules."""

LONGEST_WAIT = timedelta(days=1)
"""How long a process waits for another one, which may be writing a large checkpoint."""


@accepts(options=RetrainOptions, runtime=TrainingRuntime)
def retrain(
    model: ModelSource,
    out: Path,
    *,
    options: RetrainOptions,
    runtime: TrainingRuntime,
    revision: str | None = None,
    callbacks: OneOrMore[Any] | None = None,
) -> Retraining:
    """Retrain a shortened checkpoint, and write the result as a plain checkpoint.

    Under `accelerate launch` or `torchrun` all processes train and the main one writes. The same
    call again resumes an interrupted training.

    Args:
        model: a checkpoint directory, a Hub id, or a loaded model.
        out: the new checkpoint directory, which also gets retrain.json, and the adapter of LoRA.
        options: what is trained, on what, how long; their fields can be given as keywords.
        runtime: where to train; its fields can be given as keywords.
        revision: of a Hub model.
        callbacks: of the transformers Trainer: instances or subclasses of `TrainerCallback`.
    Returns:
        The content of retrain.json, with the loss curves.
    Raises:
        ShortLLMError: options that do not fit each other, a missing package, training that ran
            out of memory or diverged.
        DataError: data that is missing, unreadable or too little.
        UnsupportedModelError: the model is quantized, or has nothing that an adapter fits.
        CheckpointError: no teacher can be opened, or a saved state is damaged.
        OutputError: `out` contains something else or cannot be written.
    """
    from transformers import TrainerCallback

    for one in callbacks or ():
        if not issubclass(one if isinstance(one, type) else type(one), TrainerCallback):
            raise TypeError(
                "retrain(): callbacks are instances or subclasses of transformers.TrainerCallback, "
                f"not {described(one)}"
            )
    checkpoint, session = open_checkpoint(model, revision=revision), Session(runtime)
    options.about.require_packages()
    return retrain_from(
        checkpoint,
        options,
        out,
        session=session,
        ranks=_join(session),
        callbacks=callbacks or (),
    )


@releasing()
def retrain_from(
    checkpoint: Checkpoint,
    options: RetrainOptions,
    target: Path,
    *,
    session: Session,
    ranks: Ranks = ALONE,
    callbacks: Sequence[Any] = (),
) -> Retraining:
    """The same for an open checkpoint; of several processes all train and the main one writes."""
    require_apart(checkpoint.directory, target)
    require_free(target, Retraining.FILE)
    job = prepare(check(checkpoint, options, session=session, ranks=ranks), target)
    if ranks.is_main:
        derive(
            Retraining,
            target,
            checkpoint,
            partial(_trained, job, callbacks),
            expected=job.fingerprint,
            choices=job.setup.options.model_dump(mode="json"),
        )
    elif not is_up_to_date(target, Retraining, job.fingerprint):
        from shortllm.retraining.training import train

        train(job, callbacks)
    ranks.wait()
    if ranks.is_main:
        shutil.rmtree(job.work, ignore_errors=True)
    return Retraining.load(target / Retraining.FILE)


def _join(session: Session) -> Ranks:
    """The processes this one was launched with, joined in the way the Trainer will use them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    from accelerate import PartialState

    PartialState(cpu=session.device.type == "cpu", timeout=LONGEST_WAIT)
    return join_ranks()


def _trained(job: Job, callbacks: Sequence[Any]) -> Draft:
    """Train, and draft the checkpoint of the best state."""
    from shortllm.retraining.training import train

    checkpoint, trained = job.setup.checkpoint, train(job, callbacks)
    plain = _plain_model(job, trained)

    def write(directory: Path, advance: Any) -> None:
        _save(plain, directory)
        for name in (ADAPTER, LOGS):
            if (job.work / name).is_dir():
                shutil.copytree(job.work / name, directory / name)
        advance(checkpoint.bytes)

    def verify(directory: Path) -> None:
        found = _load(open_checkpoint(directory), next(plain.parameters()).dtype).state_dict()
        for name, tensor in plain.state_dict().items():
            if not found[name].equal(tensor):
                raise CheckpointError(f"{directory}: tensor '{name}' differs from what was written")

    held, state = held_provenance(checkpoint), trained.trainer.state
    retrained = {
        "version": __version__,
        "method": job.setup.options.method,
        "paper": cited(job.setup.options.about),
        "data": trained.data.source,
        "steps": state.best_global_step,
        "tokens": state.num_input_tokens_seen,
        "fingerprint": job.fingerprint,
        "before": held.get("retrained"),  # the same of an earlier retraining
    }
    return Draft(
        record=_record(job, trained),
        config=checkpoint.raw_config,
        provenance={**held, "retrained": retrained},
        bytes=checkpoint.bytes,
        write=write,
        verify=verify,
        leave={ADAPTER, LOGS},
        adds=checkpoint.unbuilt,
    )


def _record(job: Job, trained: Trained) -> dict[str, Any]:
    """The fields of retrain.json."""
    from shortllm.retraining.trainer import read_history

    setup, trainer = job.setup, trained.trainer
    adapted = (name.partition(".lora_") for name in trained.weights if ".lora_" in name)
    return {
        "teacher": job.teacher.info() if job.teacher else None,
        "method": setup.options.method,
        "options": setup.options.model_dump(mode="json", exclude={"method"}),
        "data": trained.data,
        "adapted": list(dict.fromkeys(place.removeprefix(PEFT_PREFIX) for place, *_ in adapted)),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "curves": read_history(trainer.state),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "stopped": trainer.stopped or "steps",
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "processes": setup.ranks.count,
        "sharded": trainer.is_fsdp_enabled,
        "dtype": setup.dtype,
        "versions": {**versions(), **setup.options.about.versions()},
        "cost": Cost(seconds=round(trainer.clock.seconds, 3), peak_bytes=peak_memory()),
    }


def _plain_model(job: Job, trained: Trained) -> nn.Module:
    """The trained weights in the type the checkpoint stores; adapters are merged in float32."""
    checkpoint, trainer = job.setup.checkpoint, trained.trainer
    model = trainer.accelerator.unwrap_model(trainer.model)
    stored = stored_dtype(checkpoint)
    if not hasattr(model, "peft_config"):
        plain = _load(checkpoint, stored)
        plain.load_state_dict(trained.weights)
        return plain
    from peft import PeftModel

    for config in model.peft_config.values():
        config.base_model_name_or_path = named_source(checkpoint)["source"]
    with translate_os_errors(job.work):
        model.save_pretrained(
            job.work / ADAPTER, state_dict=trained.weights, save_embedding_layers=False
        )
    base = _load(checkpoint, torch.float32)
    describe_adapter(job.work / ADAPTER, checkpoint, base)  # instead of peft's empty form
    merged: nn.Module = PeftModel.from_pretrained(base, str(job.work / ADAPTER)).merge_and_unload()
    return merged.to(stored)


def _load(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    name = str(dtype).removeprefix("torch.")
    return load_model(checkpoint, device=torch.device("cpu"), dtype=name)


def _save(plain: Any, directory: Path) -> None:
    """Save the weights by transformers, which knows their names on disk, and nothing else."""
    new = directory / NEW
    with quiet_transformers():
        plain.save_pretrained(new)
    for name in weight_files(new):
        (new / name).rename(directory / name)
    shutil.rmtree(new)
