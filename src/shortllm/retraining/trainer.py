"""transformers' Trainer with our losses, and with states on disk that are whole or not there.

The loop, the optimizer, several processes, resuming and reporters are Trainer's own. What is added:

- the loss is a sum over targets divided by the targets of the whole batch, over all processes and
  micro-batches, so that no sharing out changes it;
- an evaluation is the mean over all targets of a set, not a mean of batches' means;
- a state (`checkpoint-N`) is written under another name and then renamed, and only the last and the
  best are kept;
- a training that had ended before it was killed is not trained on.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from shortllm.files import PARTIAL, translate_os_errors
from shortllm.retraining.distillation import Objective, mean_nll, summed_nll
from shortllm.retraining.states import STATE_FILE

log = logging.getLogger(__name__)

HELD_OUT = "held_out"
"""Name of the evaluation set that decides which state is the best."""

BEST_METRIC = f"eval_{HELD_OUT}_loss"
WRITING = "writing" + PARTIAL


class HealingTrainer(Trainer):  # type: ignore[misc]
    """Trainer for one of our losses."""

    def __init__(
        self, *args: Any, objective: Objective, meter: Meter, callbacks: Any, **kwargs: Any
    ) -> None:
        super().__init__(*args, compute_metrics=mean_nll, callbacks=[meter, *callbacks], **kwargs)
        self.objective = objective
        self.remove_callback(PrinterCallback)  # prints to standard output
        # divide by the targets of the whole batch, as `compute_loss` below does
        self.model_accepts_loss_kwargs = True
        self._writing = False

    @property
    def meter(self) -> Meter:
        """The one in use: resuming puts a restored one in place of what was given."""
        found = [one for one in self.callback_handler.callbacks if isinstance(one, Meter)]
        return found[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The objective's sum, divided by the targets of the whole batch."""
        assert num_items_in_batch is not None
        self.meter.tokens_here += int(inputs["tokens"].sum())
        # gradients are averaged over processes, each of which has a part of the sum
        share: Tensor = self.accelerator.num_processes / num_items_in_batch
        return self.objective(model, inputs) * share

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[None, Tensor, Tensor]:
        """Sums over each window, which Trainer gathers; it wants labels too, and gets any."""
        sums_B2 = summed_nll(model, self._prepare_inputs(inputs))
        return None, sums_B2, sums_B2[:, :1]

    def _get_output_dir(self, trial: Any) -> str:
        directory: str = super()._get_output_dir(trial)
        return os.path.join(directory, WRITING) if self._writing else directory

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a state beside the others, then give it its name and delete those of no use."""
        self.meter.add_up(self.accelerator)
        states = Path(self.args.output_dir)
        with translate_os_errors(states):
            if self.args.should_save:
                shutil.rmtree(states / WRITING, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._writing = True
            try:
                super()._save_checkpoint(model, trial)
            except BaseException:
                shutil.rmtree(states / WRITING, ignore_errors=True)
                raise
            finally:
                self._writing = False
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._publish(states, f"checkpoint-{self.state.global_step}")
            self.accelerator.wait_for_everyone()

    def _publish(self, states: Path, name: str) -> None:
        self.state.best_model_checkpoint = None  # it would name the directory written to
        self.state.save_to_json(str(states / WRITING / name / STATE_FILE))
        shutil.rmtree(states / name, ignore_errors=True)
        os.replace(states / WRITING / name, states / name)
        keep = {name, f"checkpoint-{self.state.best_global_step}"}
        for other in states.glob("checkpoint-*"):
            if other.name not in keep:
                shutil.rmtree(other)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """One epoch, unless the state that is resumed is the last of a training that had ended."""
        if self.has_ended:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    @property
    def has_ended(self) -> bool:
        """Whether the training has come to its last step, or was stopped before it."""
        return self.state.global_step >= self.state.max_steps or self.meter.stopped is not None

    def load_best(self) -> None:
        """Put the weights of the best state into the model."""
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(best)
        self._load_best_model()


class Meter(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Counts tokens and time over all starts of a training, shows progress, and ends it in time.

    An early stop is decided here too, so that one place knows why a training ended.
    """

    def __init__(self, max_minutes: float | None = None, patience: int | None = None) -> None:
        self.max_minutes = max_minutes
        self.patience = patience
        self.seconds = 0.0
        self.tokens = 0
        self.without_better = 0
        self.stopped: str | None = None
        self.tokens_here = 0
        self._since = time.monotonic()

    def state(self) -> dict[str, Any]:
        """What a saved state keeps of this."""
        names = ("tokens", "without_better", "stopped")
        attributes = {"seconds": self.elapsed(), **{name: getattr(self, name) for name in names}}
        arguments = {"max_minutes": self.max_minutes, "patience": self.patience}
        return {"args": arguments, "attributes": attributes}

    def elapsed(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self.seconds + time.monotonic() - self._since

    def add_up(self, accelerator: Any) -> None:
        """Add the tokens that all processes have seen since the last call."""
        here = torch.tensor(self.tokens_here, device=accelerator.device)
        self.tokens += int(accelerator.gather(here).sum())
        self.tokens_here = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds, self._since = self.elapsed(), time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the training where its minutes are over."""
        if self.max_minutes is not None and self._agree(self.elapsed() >= 60 * self.max_minutes):
            self.stopped = "minutes"
            control.should_training_stop = True
        if control.should_training_stop:
            control.should_log = control.should_evaluate = control.should_save = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Keep the losses, and stop where patience is over."""
        if self.patience is None or BEST_METRIC not in metrics:
            return
        better = state.best_metric is None or metrics[BEST_METRIC] < state.best_metric
        self.without_better = 0 if better else self.without_better + 1
        if self.without_better >= self.patience and self.stopped is None:
            self.stopped = "patience"
            control.should_training_stop = True

    @staticmethod
    def _agree(mine: bool) -> bool:
        """What the main process says: clocks differ, and all must stop at one step."""
        if not torch.distributed.is_initialized():
            return mine
        said = [mine]
        torch.distributed.broadcast_object_list(said)
        return said[0]


class Progress(TrainerCallback):  # type: ignore[misc]
    """Moves the progress bar, and says how each evaluation went."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        self._advance = advance
        self._done = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Draw the bar where training goes on."""
        self._move(state)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self._move(state)

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Say the losses of the state that was saved."""
        losses = [
            f"{key.removeprefix('eval_').removesuffix('_loss')} {value:.4f}"
            for entry in state.log_history
            if entry["step"] == state.global_step
            for key, value in entry.items()
            if key.startswith("eval_") and key.endswith("_loss")
        ]
        log.info("step %d of %d: %s", state.global_step, state.max_steps, ", ".join(losses))

    def _move(self, state: TrainerState) -> None:
        self._advance(state.global_step - self._done)
        self._done = state.global_step


def read_history(state: TrainerState) -> dict[str, list[tuple[int, float]]]:
    """Curves of (step, loss) by name: `train`, and one for each evaluation set.

    A loss that is no number has no place in them.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in state.log_history:
        for key, value in entry.items():
            if not math.isfinite(value):
                continue
            if key == "loss":
                curves.setdefault("train", []).append((entry["step"], value))
            elif key.startswith("eval_") and key.endswith("_loss"):
                name = key.removeprefix("eval_").removesuffix("_loss")
                curves.setdefault(name, []).append((entry["step"], value))
    return curves
