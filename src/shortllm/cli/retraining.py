"""`retrain`: healing."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from shortllm.cli.options import Device, EvalLength, Json, Revision, TrustRemoteCode
from shortllm.cli.output import is_main_process, print_json, print_table

if TYPE_CHECKING:
    from shortllm.retraining.options import Retraining


def retrain(
    model: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="The shortened checkpoint, or any other.")
    ],
    out: Annotated[Path, typer.Option(help="Directory of the new checkpoint.")] = ...,  # type: ignore[assignment]
    method: Annotated[
        Literal["lora", "full", "distill", "last-blocks"],
        typer.Option(
            help="LoRA adapters, all weights, all weights towards what the unpruned model says, or "
            "the head and the last blocks."
        ),
    ] = "lora",
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Instructions or text: a file, a Hub data set, a built-in name, or for distill "
            "'generated' (the teacher writes). Default for lora and last-blocks: alpaca."
        ),
    ] = None,
    form: Annotated[
        Literal["auto", "instructions", "text"],
        typer.Option(help="auto: instructions where rows have instruction and output."),
    ] = "auto",
    template: Annotated[
        Literal["auto", "alpaca", "chat"],
        typer.Option(help="Words of an instruction; auto: the tokenizer's chat template if any."),
    ] = "auto",
    loss_on: Annotated[
        Literal["answer", "all"], typer.Option(help="Learn answers, or instructions as well.")
    ] = "answer",
    packing: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(help="Fill every window. Default: text yes, instructions no."),
    ] = None,
    length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Tokens per window. Default: 256 for lora and last-blocks, else 2048."),
    ] = None,
    rows: Annotated[Optional[int], typer.Option(help="Use only the first so many rows.")] = None,  # noqa: UP045
    held_out: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Rows to measure on, at most a tenth. Default: 2000; 100 of text."),
    ] = None,
    eval_data: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Further text to measure on, e.g. wikitext2; may be repeated."),
    ] = None,
    eval_length: EvalLength = 128,
    eval_segments: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Only the first so many segments of each."),
    ] = None,
    epochs: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Times over the data. Default: 2 for lora and last-blocks, else 1."),
    ] = None,
    max_steps: Annotated[Optional[int], typer.Option(help="Steps, instead of epochs.")] = None,  # noqa: UP045
    max_minutes: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Stop after so many minutes of training."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows per step, over all processes.")] = 64,
    micro_batch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Windows that a process takes at a time. Default: about 4,096 tokens."),
    ] = None,
    learning_rate: Annotated[Optional[float], typer.Option(help="Default: 1e-4.")] = None,  # noqa: UP045
    schedule: Annotated[
        Optional[Literal["linear", "cosine", "constant"]],  # noqa: UP045
        typer.Option(help="Default: linear for lora and last-blocks, else cosine."),
    ] = None,
    warmup_steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Default: 100, at most a tenth of all steps."),
    ] = None,
    weight_decay: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Default: 0 for lora and last-blocks, else 0.1."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of order, adapters and dropout.")] = 1234,
    eval_every: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Steps between evaluations, and saved states. Default: a tenth of all."),
    ] = None,
    patience: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Stop after so many evaluations without a better one."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")
    ] = False,
    attention: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="eager, sdpa, flash_attention_2, ...; default: transformers' choice."),
    ] = None,
    report_to: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="tensorboard, wandb, ...; default: tensorboard where installed."),
    ] = None,
    rank: Annotated[int, typer.Option(help="Of LoRA adapters.")] = 8,
    alpha: Annotated[int, typer.Option(help="Of LoRA adapters.")] = 16,
    dropout: Annotated[float, typer.Option(help="Of LoRA adapters.")] = 0.05,
    blocks: Annotated[int, typer.Option(help="Last blocks that last-blocks trains.")] = 3,
    teacher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Model to distill from. Default: the one that was shortened."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of distillation.")] = 1.0,
    top_k: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Keep the teacher's k likeliest tokens on disk, not it in memory."),
    ] = None,
    hidden_weight: Annotated[
        float, typer.Option(help="Weight of the distance between hidden states; 0: none.")
    ] = 0.0,
    generate: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Documents the teacher writes for --data generated."),
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="Computation type; auto: bfloat16 on CUDA, else float32."),
    ] = "auto",
    json: Json = False,
) -> None:
    """Heal a shortened checkpoint: LoRA, all weights, distillation, or the last blocks.

    Under `accelerate launch -m shortllm retrain ...` all processes share the work. The same command
    again goes on where an interrupted one was.
    """
    import shortllm

    given = {name: value for name, value in locals().items() if name in _retrain_names()}
    given["eval_data"] = eval_data or []
    record = shortllm.retrain(
        model,
        out,
        options=shortllm.RetrainOptions.model_validate(given),
        revision=revision,
        device=device,
        dtype=dtype,
    )
    if not is_main_process():
        return
    if json:
        print_json(record.model_dump(mode="json"))
        return
    _print_retraining(record)
    typer.echo(f"checkpoint: {out}")


def _retrain_names() -> Collection[str]:
    """The options of `retrain` that its record of options has too."""
    import shortllm

    return shortllm.RetrainOptions.model_fields.keys()


def _print_retraining(record: Retraining) -> None:
    rows = []
    for name, curve in record.curves.items():
        best = [loss for step, loss in curve if step <= record.best_step]
        rows.append((name, f"{curve[0][1]:.4f}", f"{best[-1]:.4f}" if best else ""))
    print_table(("loss", "first", f"step {record.best_step}"), rows)
    typer.echo(
        f"{record.method}: {record.steps} steps, {record.tokens_seen:,} tokens, "
        f"{record.trained_parameters:,} parameters trained"
    )
