"""The Trainer of transformers, with our losses, and with states on disk that are never partial.

The loop, the optimizer, several processes, resuming, early stopping and reporters are the Trainer's
own. What is added:

- the loss is a sum over targets divided by the targets of the whole batch, so it does not depend on
  how a batch is divided into processes and micro-batches;
- an evaluation is the mean over all targets of a set, not a mean of batches' means;
- a state (`checkpoint-N`) is written under a temporary name and then renamed, and only the last and
  the best are kept;
- a state is checked before it is loaded;
- a training that had ended before it was killed is not trained further.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import get_last_checkpoint

from shortllm.errors import CheckpointError
from shortllm.files import PARTIAL, translate_os_errors
from shortllm.retraining.distillation import Objective, mean_nll, summed_nll

log = logging.getLogger(__name__)

HELD_OUT = "held_out"
"""Name of the evaluation set that decides which state is the best one."""
BEST_METRIC = f"eval_{HELD_OUT}_loss"
WRITING = "writing" + PARTIAL
STATE_FILE = "trainer_state.json"
LOADED = (STATE_FILE, "*.pt", "*.pth", "*model*.bin")
"""Files of a state: also optimizer, scheduler, random generators, and weights that are pickles."""


class ObjectiveTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that minimizes one of our losses."""

    def __init__(
        self,
        *args: Any,
        objective: Objective,
        max_minutes: float | None,
        patience: int | None,
        **kwargs: Any,
    ) -> None:
        callbacks: list[TrainerCallback] = [Clock(max_minutes)]
        if patience is not None:
            callbacks.append(EarlyStoppingCallback(patience))
        super().__init__(*args, compute_metrics=mean_nll, callbacks=callbacks, **kwargs)
        self.objective = objective
        self.remove_callback(PrinterCallback)  # prints to standard output
        # divide by the targets of the whole batch, as `compute_loss` below does
        self.model_accepts_loss_kwargs = True
        self._writing = False
        self._tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)
        """Seen by this process since the last state; those before are in `TrainerState`."""

    @property
    def clock(self) -> Clock:
        """The one in use: resuming replaces the given one by a restored one."""
        return next(one for one in self.callback_handler.callbacks if isinstance(one, Clock))

    @property
    def stopped(self) -> Literal["minutes", "patience"] | None:
        """Why the training ended before its last step; None if it did not."""
        if self.clock.out_of_time:
            return "minutes"
        for one in self.callback_handler.callbacks:
            if isinstance(one, EarlyStoppingCallback):
                if one.early_stopping_patience_counter >= one.early_stopping_patience:
                    return "patience"
        return None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The sum of the objective, divided by the targets of the whole batch."""
        assert num_items_in_batch is not None
        self._tokens += inputs["tokens"].sum()
        # gradients are averaged over the processes, but each has only a part of the sum
        share: Tensor = self.accelerator.num_processes / num_items_in_batch
        return self.objective(model, inputs) * share

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[None, Tensor, Tensor]:
        """Sums over each window, which the Trainer gathers; it also needs labels, any will do."""
        sums_B2 = summed_nll(model, self._prepare_inputs(inputs))
        return None, sums_B2, sums_B2[:, :1]

    def _get_output_dir(self, trial: Any) -> str:
        directory: str = super()._get_output_dir(trial)
        return os.path.join(directory, WRITING) if self._writing else directory

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a state under a temporary name, which an error deletes, then rename it."""
        self.state.num_input_tokens_seen += int(self.accelerator.gather(self._tokens).sum())
        self._tokens.zero_()
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
        """Give the written state its name, and delete all but it and the best one."""
        self.state.best_model_checkpoint = None  # it would name the directory written to
        self.state.save_to_json(str(states / WRITING / name / STATE_FILE))
        shutil.rmtree(states / name, ignore_errors=True)
        os.replace(states / WRITING / name, states / name)
        keep = {name, f"checkpoint-{self.state.best_global_step}"}
        for other in states.glob("checkpoint-*"):
            if other.name not in keep:
                shutil.rmtree(other)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """One epoch, unless the resumed state is that of a training that had ended."""
        if self.state.global_step >= self.state.max_steps or self.stopped is not None:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def load_best(self) -> None:
        """Load the weights of the best state into the model."""
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(best)
        self._load_best_model()


class Clock(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Measures time over all starts of a training, and stops it when its time is over."""

    def __init__(self, max_minutes: float | None = None) -> None:
        self.max_minutes = max_minutes
        self.seconds = 0.0
        self.out_of_time = False
        self._since = time.monotonic()

    def state(self) -> dict[str, Any]:
        """What a saved state keeps."""
        kept = {"seconds": self.elapsed(), "out_of_time": self.out_of_time}
        return {"args": {"max_minutes": self.max_minutes}, "attributes": kept}

    def elapsed(self) -> float:
        """Seconds of training, including those before an interruption."""
        return self.seconds + time.monotonic() - self._since

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start it."""
        self._since = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.seconds, self._since = self.elapsed(), time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the training when its minutes are over, by the clock of the main process."""
        if self.max_minutes is not None:
            from accelerate.utils import broadcast_object_list

            [self.out_of_time] = broadcast_object_list([self.elapsed() >= 60 * self.max_minutes])
            control.should_training_stop |= self.out_of_time
        if control.should_training_stop:
            control.should_log = control.should_evaluate = control.should_save = True


class Progress(TrainerCallback):  # type: ignore[misc]
    """Moves the progress bar, and logs the losses of each state."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        self._advance = advance
        self._done = 0

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Move the bar; also at the start, to the step that is resumed."""
        self._advance(state.global_step - self._done)
        self._done = state.global_step

    on_train_begin = on_step_end

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Log the losses of the state that was saved."""
        entries = [entry for entry in state.log_history if entry["step"] == state.global_step]
        losses = [f"{name} {value:.4f}" for entry in entries for name, value in _losses(entry)]
        log.info("step %d of %d: %s", state.global_step, state.max_steps, ", ".join(losses))


def read_history(state: TrainerState) -> dict[str, list[tuple[int, float]]]:
    """Curves of (step, loss) by name, without NaNs: `train`, and one for each evaluation set."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in state.log_history:
        for name, value in _losses(entry):
            if math.isfinite(value):
                curves.setdefault(name, []).append((entry["step"], value))
    return curves


def _losses(entry: dict[str, float]) -> Iterator[tuple[str, float]]:
    """The names and losses in an entry of the Trainer's log."""
    for key, value in entry.items():
        if key == "loss":
            yield "train", value
        elif key.startswith("eval_") and key.endswith("_loss"):
            yield key.removeprefix("eval_").removesuffix("_loss"), value


def last_state(states: Path) -> Path | None:
    """The newest state in a directory."""
    found = get_last_checkpoint(str(states)) if states.is_dir() else None
    return Path(found) if found else None


def require_loadable(state: Path) -> None:
    """Refuse a state that is damaged or could run code, before the Trainer loads it.

    The Trainer itself uses the same weights-only loader, but does not name the file.
    """
    work = state.parent.parent
    for file in chain.from_iterable(state.glob(kind) for kind in LOADED):
        try:
            if file.name == STATE_FILE:
                TrainerState.load_from_json(str(file))
            else:
                with safe_globals():  # numpy's random generator
                    torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{file} contains more than the state of a training and is refused, since loading "
                f"it could run code. Delete {work} to train again from the start"
            ) from error
        except Exception as error:  # whatever torch's reader raises
            raise CheckpointError(
                f"{file} is damaged. Delete {state} to resume from the state before it, or {work} "
                "to train again from the start"
            ) from error
