"""The commands that derive a checkpoint: merge, width, drop-sublayers, quantize, heal, retrain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from shortllm.checkpoint.options import SurgeryOptions
from shortllm.cli.flags import Json, ModelArgument, Out, Revision, flags
from shortllm.cli.output import answered, print_notes, print_table
from shortllm.format import change, counted, named_blocks, number, plain, spans
from shortllm.healing.options import HealOptions
from shortllm.merging.options import MergeOptions
from shortllm.quantizing.options import QuantizeOptions
from shortllm.records import DerivedRecord
from shortllm.retraining.options import RetrainOptions, TrainingRuntime
from shortllm.runtime import DeviceOptions, Runtime
from shortllm.sublayers.criteria import CRITERIA
from shortllm.sublayers.options import SublayerOptions
from shortllm.width_pruning.options import WidthOptions

if TYPE_CHECKING:
    from shortllm.healing.options import Healing
    from shortllm.merging.options import Merging
    from shortllm.quantizing.options import Quantization
    from shortllm.retraining.options import Retraining
    from shortllm.sublayers.options import SublayerDrop
    from shortllm.width_pruning.options import WidthPruning


Result = TypeVar("Result", bound=DerivedRecord)


def _answer(result: Result, print_text: Callable[[Result], None], out: Path, *, json: bool) -> None:
    """A record as JSON or as text, then where the checkpoint is."""
    if not answered(result, in_json=json):
        print_text(result)
        print_notes(result)
        typer.echo(f"checkpoint: {out}")


@flags(options=HealOptions, runtime=Runtime)
def heal(
    model: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="A checkpoint that `shortllm prune` wrote."),
    ],
    out: Out,
    options: HealOptions,
    runtime: Runtime,
    source: Annotated[
        str | None,
        typer.Option(help="Model it was shortened from. Default: as its config.json says."),
    ] = None,
    json: Json = False,
) -> None:
    """Heal a shortened checkpoint without training: existing weights get new values.

    The result is a plain checkpoint of the same size and speed.

    Example: shortllm heal short --data my_text.jsonl --out healed
    """
    import shortllm

    record = shortllm.heal(model, out, options=options, runtime=runtime, source=source)
    _answer(record, _print_healing, out, json=json)


def _print_healing(record: Healing) -> None:
    rows = [
        (
            ", ".join(map(str, gap.removed)) or "-",
            "-" if gap.block is None else spans([*gap.earlier, gap.block]),
            "no block before it" if gap.block is None else ", ".join(gap.changed) or "nothing",
            f"{gap.gain:.3f}",
            "-" if gap.ridge is None else f"{gap.ridge:g}",
            number(gap.error_before),
            number(gap.error_after),
        )
        for gap in record.gaps
    ]
    print_table(("removed", "in block", "changed", "factor", "ridge", "error", "healed"), rows)
    held_out = record.held_out
    typer.echo(
        f"loss on {held_out.samples} held-out samples of {record.data}: {held_out.source:.4f} "
        f"before the removal, {held_out.shortened:.4f} after, {held_out.healed:.4f} healed"
    )


@flags(options=MergeOptions, runtime=Runtime, surgery=SurgeryOptions)
def merge(
    model: ModelArgument,
    out: Out,
    options: MergeOptions,
    runtime: Runtime,
    surgery: SurgeryOptions,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Shorten a model by folding blocks into one another (LaCo), from the top down.

    A baseline to compare removal with.

    Example: shortllm merge MODEL --data my_text.jsonl --threshold 0.65 --out merged
    """
    import shortllm

    record = shortllm.merge(
        model, out, options=options, runtime=runtime, surgery=surgery, revision=revision
    )
    _answer(record, _print_merging, out, json=json)


def _print_merging(record: Merging) -> None:
    rows = [
        (
            str(one.block),
            ", ".join(map(str, one.merged)),
            f"{one.cosine:.4f}",
            "-" if one.perplexity is None else plain(number(one.perplexity)),
            record.verdict(one),
        )
        for one in record.tries
    ]
    print_table(("block", "merged into it", "cosine", "perplexity", ""), rows)
    typer.echo(
        f"{record.model.id}: {record.model.blocks} -> {counted(len(record.kept), 'block')}, mean "
        f"cosine of the final hidden states {record.cosine:.4f}"
    )
    typer.echo(
        f"perplexity on the calibration text: {plain(number(record.intact_perplexity))} -> "
        f"{plain(number(record.perplexity))} "
        f"({plain(change(record.intact_perplexity, record.perplexity))})"
    )


@flags(options=WidthOptions, runtime=Runtime)
def width(
    model: ModelArgument,
    out: Out,
    options: WidthOptions,
    runtime: Runtime,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Make a checkpoint narrower by removing attention heads and MLP neurons.

    All blocks stay. These are the baselines that depth pruning is compared with.

    Example: shortllm width MODEL --method flap --ratio 0.2 --data my_text.jsonl --out narrow
    """
    import shortllm

    record = shortllm.width(model, out, options=options, runtime=runtime, revision=revision)
    _answer(record, _print_width, out, json=json)


def _print_width(record: WidthPruning) -> None:
    rows = [
        (
            str(one.block),
            _left(one.query_heads, len(one.removed_query_heads)),
            _left(one.kv_heads, len(one.removed_kv_heads)),
            _left(one.neurons, len(one.removed_neurons)),
        )
        for one in record.blocks
    ]
    print_table(("block", "heads", "kv heads", "neurons"), rows)
    typer.echo(
        f"{record.model.id} by {record.method}: {record.model.parameters:,} -> "
        f"{record.reached.parameters:,} parameters (-{record.reached.removed_ratio:.1%}), shapes "
        f"{record.shapes}"
    )


def _left(before: int, removed: int) -> str:
    return f"{before} -> {before - removed}" if removed else str(before)


@flags(options=SublayerOptions, runtime=Runtime, surgery=SurgeryOptions)
def drop_sublayers(
    model: ModelArgument,
    out: Out,
    options: SublayerOptions,
    runtime: Runtime,
    surgery: SurgeryOptions,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Remove attentions and MLPs of single blocks; the checkpoint keeps its size and speed.

    The output projections of removed sublayers become zeros, so only quality changes. Blocks that
    lose both sublayers are removed, which saves time and memory.

    Example: shortllm drop-sublayers MODEL --criterion sublayer-ppl --remove 4 --out without
    """
    import shortllm

    record = shortllm.drop_sublayers(
        model, out, options=options, runtime=runtime, surgery=surgery, revision=revision
    )
    _answer(record, _print_drop, out, json=json)


def _print_drop(record: SublayerDrop) -> None:
    value = CRITERIA.get(record.criterion).value if record.criterion else ""
    rows = [
        (f"{one.part} of {one.block}", "" if one.value is None else f"{one.value:.6g}")
        for one in record.dropped
    ]
    print_table(("removed", value), rows)
    if record.intact is not None:
        typer.echo(f"intact: {record.intact:.6g}")
    removed = record.removed_blocks
    zeroed = len(record.dropped) - 2 * len(removed)
    if zeroed:
        typer.echo(
            f"{zeroed} of {len(record.dropped)} sublayers are zeros now "
            f"({record.zeroed_parameters:,} parameters). They still take memory and time"
        )
    if removed:
        saved = record.model.parameters - record.parameters
        were = "was" if len(removed) == 1 else "were"
        typer.echo(
            f"{named_blocks(removed)} lost both sublayers and {were} removed: "
            f"{record.model.parameters:,} -> {record.parameters:,} parameters "
            f"(-{saved / record.model.parameters:.1%})"
        )


@flags(options=QuantizeOptions, runtime=DeviceOptions)
def quantize(
    model: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="The shortened checkpoint, or any other.")
    ],
    out: Out,
    options: QuantizeOptions,
    runtime: DeviceOptions,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Quantize the linear layers of a checkpoint.

    Plain transformers loads the result.

    Example: shortllm quantize short --method gptq --data c4 --out short-4bit
    """
    import shortllm

    record = shortllm.quantize(model, out, options=options, runtime=runtime, revision=revision)
    _answer(record, _print_quantization, out, json=json)


def _print_quantization(record: Quantization) -> None:
    before, after = record.bytes_before, record.bytes_after
    print_table(
        ("", "before", "after", "part"),
        [("bytes", f"{before:,}", f"{after:,}", f"{after / before:.1%}")],
    )
    text = record.calibration
    on = f", on {text.samples} samples of {text.length} tokens from {text.source}" if text else ""
    typer.echo(f"{record.described}: {record.layers} layers of {record.model.id}{on}")


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
    _answer(record, _print_retraining, out, json=json)


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
