"""`plan`, `prune`, `export-lint`: which blocks go, and the checkpoint without them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from shortllm.cli.options import (
    Blocks,
    Contiguous,
    Device,
    Dtype,
    Json,
    ModelArgument,
    ParamRatio,
    PeriodAligned,
    ProtectFirst,
    ProtectLast,
    Ratio,
    Remove,
    Revision,
    Stream,
    TargetMemory,
    TargetParams,
    TargetSpeedup,
    TrustRemoteCode,
)
from shortllm.cli.output import plan_line, print_json
from shortllm.cli.values import budget_of, numbers_in, targets_of
from shortllm.errors import BudgetError


def plan(
    scores: Annotated[
        Path, typer.Argument(metavar="SCORES", help="A run directory, or a file of scores.")
    ],
    remove: Remove = None,
    ratio: Ratio = None,
    param_ratio: ParamRatio = None,
    blocks: Blocks = None,
    target_params: TargetParams = None,
    target_memory: TargetMemory = None,
    target_speedup: TargetSpeedup = None,
    contiguous: Contiguous = None,
    protect_first: ProtectFirst = None,
    protect_last: ProtectLast = None,
    period_aligned: PeriodAligned = False,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Where to write the plan. Default: plan.json beside the scores."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Choose the blocks to remove from scores and a budget."""
    import shortllm

    budget = budget_of(
        remove,
        ratio,
        param_ratio,
        blocks,
        contiguous,
        protect_first,
        protect_last,
        period_aligned,
        targets=targets_of(target_params, target_memory, target_speedup),
    )
    made = shortllm.plan(scores, budget, out=out, device=device, dtype=dtype)
    if json:
        print_json(made.model_dump(mode="json"))
        return
    typer.echo(plan_line(made))
    typer.echo(made.reason)


def prune(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Directory of the new checkpoint.")] = ...,  # type: ignore[assignment]
    plan: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A plan.json, or the run directory that holds it."),
    ] = None,
    blocks: Blocks = None,
    verify: Annotated[
        bool,
        typer.Option(
            help="Load original and result and compare what they compute; needs memory for one."
        ),
    ] = True,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    stream: Stream = None,
) -> None:
    """Write the checkpoint without the blocks of a plan, or without the blocks named."""
    import shortllm

    if (plan is None) == (blocks is None):
        raise BudgetError("give either --plan plan.json or --blocks 3,4,8")
    chosen = plan if plan is not None else numbers_in(blocks or "")
    written = shortllm.prune(
        model,
        chosen,
        out,
        revision=revision,
        verify=verify,
        device=device,
        dtype=dtype,
        stream=stream,
    )
    typer.echo(f"checkpoint: {written}")


def export_lint(
    model: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A finished checkpoint, or a Hub id.")
    ],
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Whether llama.cpp (GGUF) and vLLM will run a checkpoint correctly."""
    import shortllm

    findings = shortllm.export_lint(model, revision=revision)
    if json:
        print_json([finding.model_dump(mode="json") for finding in findings])
        return
    for finding in findings:
        hint = f". {finding.hint}" if finding.hint else ""
        typer.echo(f"{finding.target}: {finding.verdict} ({finding.reason}){hint}")
        for name, value in finding.fields.items():
            typer.echo(f"    {name}: {value}")
