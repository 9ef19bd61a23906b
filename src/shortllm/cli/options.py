"""Flags that several commands share."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from shortllm import criteria

# `Optional` because typer reads these at run time on Python
# 3.10.
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Checkpoint directory, Hub id, or 'embedded'.")
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub model, as in MODEL@REVISION.")
]  # noqa: UP045


_until_exit = ExitStack()
"""Contexts that last as long as the process."""


def _trust(given: bool) -> bool:
    """Note at once that the flag was given: every model that is opened afterwards may need it."""
    if given:
        from shortllm.runtime import trusting_remote_code

        _until_exit.enter_context(trusting_remote_code())
    return given


TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        callback=_trust,
        help="Run Python code that comes with a checkpoint. Default: refuse it.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Computation type; auto: float32 on a CPU, else the checkpoint's own."),
]
Out = Annotated[Path, typer.Option(help="Directory of the new checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of text.")]

Data = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Calibration text: a .txt, .jsonl, .json or .parquet file, a Hub data set "
        "name[:config[:split]], or a built-in name. Default: bookcorpus; for the embedded "
        "model its own."
    ),
]
CalibrationFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--calibration", help="Token ids given directly: an earlier run or a JSON list of lists."
    ),
]
Sampler = Annotated[
    Literal["random", "packed"], typer.Option(help="How windows are cut from the text.")
]
SampleCount = Annotated[int, typer.Option("--samples", min=1, help="Calibration samples.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens per calibration sample.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampler.")]
BosEverySample = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option(help="Begin every sample with BOS. Default: for Gemma models only."),
]
CriterionName = Annotated[
    str,
    typer.Option(
        "--criterion",
        help=f"Rule that scores the blocks: {criteria.help_text()}.",
    ),
]
CriterionNames = Annotated[
    str,
    typer.Option(
        "--criterion",
        help="Rules that score the blocks, e.g. ppl or taylor,influence: several share as few "
        f"passes as possible. {criteria.help_text()}.",
    ),
]
ComparedCriteria = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--criterion",
        help="Rules to compare, e.g. ppl,taylor,influence. Default: "
        f"{', '.join(criteria.compared())}.",
    ),
]
CriterionOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--option",
        metavar="CRITERION.NAME=VALUE",
        rich_help_panel="Scoring",
        help="Option of a criterion, e.g. taylor.power=2 or greedy.inner=kl; can be repeated.",
    ),
]
Stream = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option(
        "--stream/--no-stream",
        help="Read the blocks one at a time from the files. Default: where the model does not fit.",
    ),
]
MaxMemory = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Hidden streams beyond this size go to a file, e.g. 4GiB. Default: half of what is "
        "free."
    ),
]
Contiguous = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option(
        "--contiguous/--scattered",
        help="Remove one span of blocks, or single ones. Default: a span where the criterion "
        f"scores spans ({', '.join(criteria.names_by_need('last token'))}).",
    ),
]

Remove = Annotated[Optional[int], typer.Option(help="Blocks to remove.")]  # noqa: UP045
Ratio = Annotated[Optional[float], typer.Option(help="Part of the blocks to remove, e.g. 0.25.")]  # noqa: UP045
ParamRatio = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="Part of all parameters to remove, with as few blocks as reach it."),
]
Blocks = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Exactly these blocks, counted from 0, e.g. 3,4,8."),
]
TargetParams = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="At most so many parameters left, e.g. 1.0B or 350M."),
]
TargetMemory = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="At most so much memory left for weights and cache, e.g. 8GiB."),
]
TargetSpeedup = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="At least so many times as fast, measured here, e.g. 1.3."),
]
ProtectFirst = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="First blocks that stay. Default: 4, at most a quarter of the blocks."),
]
ProtectLast = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Last blocks that stay. Default: 2, at most a quarter of the blocks."),
]
PeriodAligned = Annotated[
    bool,
    typer.Option(
        "--period-aligned",
        help="Remove only whole periods where the kinds of blocks repeat, as other programs need.",
    ),
]

EvalLength = Annotated[
    int, typer.Option(min=2, help="Tokens per segment; 2048 is the usual protocol.")
]
EvalBos = Annotated[
    Optional[Literal["first", "every", "none"]],  # noqa: UP045
    typer.Option(
        help="Where BOS stands. Default: before the first segment; before every one for Gemma."
    ),
]
MaxSegments = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Measure only the first so many segments."),
]
Prompt = Annotated[Optional[str], typer.Option(help="Prompt of the generation samples.")]  # noqa: UP045
Continuations = Annotated[
    int, typer.Option(min=0, help="Generation samples per model; 0 for none.")
]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens of each generation sample.")]
Tasks = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Zero-shot tasks of lm-evaluation-harness, e.g. boolq,piqa; 'paper' is the seven of "
        "Shortened LLaMA, 'embedded' those of the embedded model. Default: none."
    ),
]
TaskData = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        help="Directory of the tasks' documents, DIR/TASK/SPLIT.jsonl. Default: SHORTLLM_DATA, Hub."
    ),
]
Limit = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Ask only the first so many documents of each task."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences per forward pass of a task.")]

RecipeName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="A recipe by name (`shortllm recipes list`), or a .yaml file; flags go before it."
    ),
]
EvalData = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        help="Text to measure on; may be repeated. Default: rows of --data kept apart from "
        "calibration, or wikitext2 and ptb."
    ),
]
RetrainMethods = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="METHOD",
        help="Heal by lora, full, distill or last-blocks; several, e.g. lora,full, each from "
        "the same start; none. Default: as the recipe has it.",
    ),
]
Places = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Any field of a recipe, e.g. retraining.max_steps=200 or benchmark.batches=[1,8]; "
        "may be repeated.",
    ),
]

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        rich_help_panel="Recipe",
        help="Set any field of a recipe, e.g. retraining.max_steps=200 or benchmark.batches=[1,8]; "
        "can be repeated.",
    ),
]
