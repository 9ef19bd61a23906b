"""The commands as functions, under the same names: `shortllm.score(...)`, `shortllm.prune(...)`,
...

Each opens what it is given by name, checks it, calls one stage and saves what it made. The command
line (cli.py) is these functions with flags.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shortllm import criteria, pipeline, stages
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.errors import DataError, OutputError, ShortLLMError
from shortllm.files import require_file_target, require_writable
from shortllm.pipeline import RunResult
from shortllm.planning import Budget, build_plan
from shortllm.recipe import CalibrationOptions, EvaluationOptions, Recipe
from shortllm.results import BlockScores, Evaluation, PrunePlan
from shortllm.summary import ModelSummary, summarize

if TYPE_CHECKING:
    from shortllm.checkpoint.export_lint import ExportFinding


def info(
    model: str, *, revision: str | None = None, samples: int = 10, length: int = 128
) -> ModelSummary:
    """What a model is made of, what can go, and what scoring it takes. Reads headers only."""
    return summarize(open_checkpoint(model, revision=revision), samples=samples, length=length)


def score(
    model: str = "embedded",
    *,
    criterion: str = "ppl",
    calibration: CalibrationOptions | None = None,
    out: Path | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    command: list[str] | None = None,
) -> BlockScores:
    """Importance of every block of a model; with `out`, a run directory gets calibration and
    scores.json.

    Raises:
        ShortLLMError: any of its kinds, before the model is loaded wherever that can be known.
    """
    criteria.get(criterion)
    checkpoint = open_checkpoint(model, revision=revision)
    recipe = Recipe.model_validate(
        {
            "model": model,
            "revision": revision,
            "criterion": criterion,
            "calibration": calibration or CalibrationOptions(),
            "device": device,
            "dtype": dtype,
        }
    ).filled(checkpoint.model_type)
    if out is not None:
        pipeline.claim_directory(out, checkpoint)
    session = stages.Session(device=device, dtype=dtype)
    ids = stages.calibrate(checkpoint, recipe.calibration)
    expected = stages.scores_fingerprint(checkpoint, criterion, ids, session)
    if out is None:
        return stages.score(checkpoint, ids, criterion=criterion, session=session)
    chosen = recipe.model_dump(mode="json", exclude={"budget", "evaluation"})
    pipeline.write_run_file(out, chosen, checkpoint, command)
    ids.save(out)
    scores = pipeline.finished(BlockScores, out / "scores.json", expected)
    if scores is None:
        scores = stages.score(checkpoint, ids, criterion=criterion, session=session)
        scores.save(out / "scores.json")
    return scores


def plan(scores: BlockScores | Path | str, budget: Budget, *, out: Path | None = None) -> PrunePlan:
    """Choose blocks by scores.

    Args:
        scores: scores, a scores.json, or a run directory, which then gets plan.json too.
        out: where to save the plan; default plan.json beside the scores, if those are a file.
    """
    if not isinstance(scores, BlockScores):
        scores = Path(scores)
        path = scores / "scores.json" if scores.is_dir() else scores
        out = out or path.with_name("plan.json")
        scores = BlockScores.load(path)
    if out is not None:
        require_file_target(out)
    made = build_plan(budget, model=scores.model, scores=scores)
    if out is not None:
        made.save(out)
    return made


def prune(
    model: str,
    plan: PrunePlan | Path | str | Sequence[int],
    out: Path | str,
    *,
    revision: str | None = None,
    verify: bool = True,
    device: str = "auto",
    dtype: str = "auto",
) -> Path:
    """Write the shortened checkpoint.

    Args:
        plan: a plan, a plan.json, a run directory, or the numbers of the blocks to remove.
        out: the new checkpoint directory; must not exist, unless it is the same shortened
            checkpoint.
        verify: load original and result and compare what they compute; without, structure only.
    Raises:
        UnsupportedModelError: removing these blocks would give a wrong model.
        OutputError: `out` holds something else or cannot be written.
    """
    checkpoint = open_checkpoint(model, revision=revision)
    out = Path(out)
    if isinstance(plan, (str, Path)):
        plan = Path(plan)
        plan = PrunePlan.load(plan / "plan.json" if plan.is_dir() else plan)
    elif not isinstance(plan, PrunePlan):
        plan = build_plan(Budget(blocks=list(plan)), model=checkpoint.info())
    stages.require_same_model(plan, checkpoint)
    if stages.is_pruned_by(out, stages.pruned_fingerprint(checkpoint, plan)):
        pipeline.log.info("%s is up to date, skipped", out)
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is not empty. Choose another --out, or delete it")
    require_writable(out.parent)
    session = stages.Session(device=device, dtype=dtype) if verify else None
    stages.prune(checkpoint, plan, out, session=session)
    return out


def evaluate(
    models: Sequence[str],
    *,
    options: EvaluationOptions | None = None,
    out: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Evaluation:
    """Perplexity and generation samples of one or more models that share a tokenizer.

    Args:
        out: a file for the evaluation, e.g. eval.json.
    Raises:
        DataError: unreadable text, or models whose tokenizers make different tokens of it.
    """
    from shortllm.data import load_rows
    from shortllm.evaluation import EvaluationText

    if not models:
        raise ShortLLMError("no model to evaluate. Give one or more")
    checkpoints = _named(models)
    first = next(iter(checkpoints.values()))
    recipe = Recipe(model=models[0], evaluation=options or EvaluationOptions()).filled(
        first.model_type
    )
    if out is not None:
        require_file_target(out)
    rows = [load_rows(source, role="evaluation") for source in recipe.evaluation.data]
    texts = {}
    for name, checkpoint in checkpoints.items():
        stages.check_length(checkpoint, recipe.evaluation.length, "--length")
        tokenizer = stages.load_tokenizer(checkpoint)
        texts[name] = [
            stages.evaluation_segments_of(
                checkpoint, source, tokenizer, recipe.evaluation, option="--length"
            )
            for source in rows
        ]
    for name, made in texts.items():
        if not all(
            one.ids.equal(other.ids)
            for one, other in zip(texts[next(iter(texts))], made, strict=True)
        ):
            raise DataError(
                f"{models[0]} and {name} tokenize the text differently, so that their "
                "perplexities per token "
                "cannot be compared. Evaluate them in two commands"
            )
    session = stages.Session(device=device, dtype=dtype)
    text = [
        EvaluationText(rows=source, held_out=False, segments=segments)
        for source, segments in zip(rows, texts[next(iter(texts))], strict=True)
    ]
    measured = stages.evaluate(list(checkpoints.items()), text, recipe.evaluation, session=session)
    if out is not None:
        measured.save(out)
    return measured


def _named(models: Sequence[str]) -> dict[str, Checkpoint]:
    """Each model under the last part of its path, or all of it where that is taken."""
    checkpoints: dict[str, Checkpoint] = {}
    for model in models:
        short = Path(model).name or model
        checkpoints[model if short in checkpoints else short] = open_checkpoint(model)
    return checkpoints


def export_lint(model: str, *, revision: str | None = None) -> list[ExportFinding]:
    """Whether llama.cpp (GGUF) and vLLM will represent a checkpoint rightly, by rule.

    Reads the config and headers only.
    """
    from shortllm.checkpoint.export_lint import lint_export

    return lint_export(open_checkpoint(model, revision=revision))


def report(run_dir: Path) -> Path:
    """Write report.html and the model card from the files of a run directory."""
    from shortllm.reporting import write_report

    return write_report(run_dir)


def run(
    recipe: Recipe | None = None, *, out: Path | None = None, command: list[str] | None = None
) -> RunResult:
    """All stages in one directory; see `shortllm.pipeline.run`."""
    return pipeline.run(recipe, out=out, command=command)
