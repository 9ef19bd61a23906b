"""`retrain`: recover quality by training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from shortllm.cli.flags import flags
from shortllm.cli.options import Json, ModelArgument, Out, Revision
from shortllm.cli.output import is_main_process, print_json, print_table
from shortllm.retraining.options import RetrainOptions, TrainingRuntime

if TYPE_CHECKING:
    from shortllm.retraining.options import Retraining


@flags(options=RetrainOptions, runtime=TrainingRuntime)
def retrain(
    model: ModelArgument,
    out: Out,
    options: RetrainOptions,
    runtime: TrainingRuntime,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Retrain a shortened checkpoint, or any other, and write a plain checkpoint.

    Under `accelerate launch -m shortllm retrain ...` all processes share the work. The same command
    again resumes an interrupted training.

    Example: shortllm retrain pruned --method lora --data alpaca --out retrained
    """
    import shortllm

    record = shortllm.retrain(model, out, options=options, runtime=runtime, revision=revision)
    if not is_main_process():
        return
    if json:
        print_json(record.model_dump(mode="json"))
        return
    _print_retraining(record)
    typer.echo(f"checkpoint: {out}")


def _print_retraining(record: Retraining) -> None:
    """The losses before and after, and what was trained."""
    rows = []
    for name, curve in record.curves.items():
        best = [loss for step, loss in curve if step <= record.best_step]
        rows.append((name, f"{curve[0][1]:.4f}", f"{best[-1]:.4f}" if best else ""))
    print_table(("loss", "first", f"step {record.best_step}"), rows)
    typer.echo(
        f"{record.method}: {record.steps} steps, {record.tokens_seen:,} tokens, "
        f"{record.trained_parameters:,} parameters trained"
    )
