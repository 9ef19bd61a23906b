"""The stage: from a shortened checkpoint to a retrained one."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from shortllm.checkpoint.source import Checkpoint
from shortllm.files import releasing
from shortllm.model.session import Session
from shortllm.records import Cost
from shortllm.retraining import RECORD
from shortllm.retraining.options import Retraining, RetrainOptions
from shortllm.retraining.preparing import Prepared, compute_dtype, prepare
from shortllm.retraining.writing import LOGS, write_retrained
from shortllm.runtime import ALONE, Ranks, peak_memory, versions
from shortllm.surgery.made import finished

if TYPE_CHECKING:
    from shortllm.retraining.training import Trained

log = logging.getLogger(__name__)


@releasing()
def retrain(
    checkpoint: Checkpoint,
    options: RetrainOptions,
    target: Path,
    *,
    session: Session,
    ranks: Ranks = ALONE,
) -> Retraining:
    """Heal a checkpoint, and write the result as a plain checkpoint `target`, with retrain.json.

    A target that is up to date is left alone; another one is replaced. An interrupted training goes
    on from its last state. Of several processes all train and the main one writes.

    Raises:
        ShortLLMError: any of its kinds, before the model is loaded wherever that can be known.
    """
    prepared = prepare(checkpoint, options, target, session=session, ranks=ranks)
    found = finished(target, prepared.fingerprint, Retraining, RECORD, under="retrained")
    if found is None:
        if (target / RECORD).is_file():
            log.info("%s was retrained by another recipe, and will be replaced", target)
        _train_and_write(prepared, target, session, ranks)
    ranks.wait()
    if ranks.is_main:
        shutil.rmtree(prepared.work, ignore_errors=True)
    return Retraining.load(target / RECORD)


def _train_and_write(prepared: Prepared, target: Path, session: Session, ranks: Ranks) -> None:
    from shortllm.retraining.training import reports_in, train

    logs = prepared.work / LOGS
    with reports_in(logs):
        trained = train(prepared, session=session, ranks=ranks)
    if ranks.is_main:
        trainer = trained.trainer
        record = _record(prepared, trained, session, ranks)
        model = trainer.accelerator.unwrap_model(trainer.model)
        write_retrained(prepared.checkpoint, model, trained.weights, target, record, logs=logs)


def _record(prepared: Prepared, trained: Trained, session: Session, ranks: Ranks) -> Retraining:
    from shortllm.retraining.trainable import adapted_modules, trainable_parameters
    from shortllm.retraining.trainer import read_history

    trainer = trained.trainer
    meter, state = trainer.meter, trainer.state
    assert state.best_global_step is not None
    return Retraining(
        model=prepared.checkpoint.info(),
        teacher=prepared.teacher.info() if prepared.teacher else None,
        method=prepared.options.method,
        options=prepared.options.model_dump(mode="json", exclude={"method"}),
        data=trained.data,
        adapted=adapted_modules(trained.weights),
        trained_parameters=trainable_parameters(trainer.model),
        curves=read_history(state),
        steps=state.global_step,
        best_step=state.best_global_step,
        stopped=meter.stopped or "steps",
        tokens_seen=meter.tokens,
        processes=ranks.count,
        sharded=trainer.is_fsdp_enabled,
        dtype=compute_dtype(session),
        versions={**versions(), **extra_versions(prepared.options)},
        cost=Cost(seconds=round(meter.seconds, 3), peak_bytes=peak_memory()),
        fingerprint=prepared.fingerprint,
    )


def extra_versions(options: RetrainOptions) -> dict[str, str]:
    """Versions of the packages that only training takes."""
    from importlib.metadata import version

    names = ["accelerate", "peft"] if options.method == "lora" else ["accelerate"]
    return {name: version(name) for name in names}
