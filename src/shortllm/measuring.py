"""Several models measured in one call: `shortllm.evaluate(...)` and `shortllm.bench(...)`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shortllm import pipeline, stages
from shortllm.benchmark.options import Benchmark, BenchmarkOptions
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.data.texts import check_length
from shortllm.errors import DataError, OutputError, ShortLLMError
from shortllm.evaluation.harness import table_beside, write_table
from shortllm.evaluation.options import Evaluation, EvaluationOptions
from shortllm.evaluation.texts import evaluation_segments_of
from shortllm.files import require_file_target, require_writable
from shortllm.model.session import Session
from shortllm.recipe import Recipe
from shortllm.surgery.apply import PROVENANCE


def evaluate(
    models: Sequence[str],
    *,
    options: EvaluationOptions | None = None,
    tasks: Sequence[str] = (),
    out: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    stream: bool | None = None,
    max_memory: int | None = None,
) -> Evaluation:
    """Perplexity, task scores and generation samples of one or more models.

    Args:
        options: without data in them, perplexity is measured on wikitext2 and ptb, or not at all
            where tasks are asked for.
        tasks: zero-shot tasks, besides those in the options; see `shortllm.zeroshot`.
        out: a file for the evaluation, e.g. eval.json; task scores go to zeroshot.csv beside it.
    Returns:
        One entry per model, in the order given.
    Raises:
        DataError: unreadable text, or models whose tokenizers make different tokens of it.
        ShortLLMError: any other of its kinds, before a model is loaded wherever that can be known.
    """
    from shortllm.data.sources import load_rows
    from shortllm.evaluation.perplexity import EvaluationText

    if not models:
        raise ShortLLMError("no model to evaluate. Give one or more")
    checkpoints = _named(models)
    first = next(iter(checkpoints.values()))
    options = options or EvaluationOptions()
    options = options.model_copy(update={"tasks": [*options.tasks, *tasks]})
    recipe = Recipe(model=models[0], evaluation=options).filled(first.model_type)
    if out is not None:
        require_file_target(out)
    session = Session(device=device, dtype=dtype, stream=stream, max_memory=max_memory)
    task_set = stages.prepare_tasks(list(checkpoints.values()), options, session)
    sources = recipe.evaluation.data if options.data or not options.tasks else []
    rows = [load_rows(source, role="evaluation") for source in sources]
    texts = {}
    for name, checkpoint in checkpoints.items():
        if rows:
            check_length(checkpoint, recipe.evaluation.length, "--length")
        tokenizer = load_tokenizer(checkpoint)
        texts[name] = [
            evaluation_segments_of(
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
    text = [
        EvaluationText(rows=source, held_out=False, segments=segments)
        for source, segments in zip(rows, texts[next(iter(texts))], strict=True)
    ]
    measured = stages.evaluate(
        list(checkpoints.items()), text, recipe.evaluation, session=session, tasks=task_set
    )
    if out is not None:
        measured.save(out)
        if task_set is not None:
            write_table(measured, table_beside(out))
    return measured


def bench(
    models: Sequence[str],
    *,
    options: BenchmarkOptions | None = None,
    out: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Benchmark:
    """Latency, throughput and memory of one or more models, measured in turn.

    Args:
        out: a directory for bench.json, bench.csv and the plots; a run directory will do. An
            interrupted sweep goes on where it was.
    Returns:
        A measurement for each model, batch and length; speed-ups are against the first model.
    Raises:
        ShortLLMError: what cannot be measured here, before any model is loaded.
    """
    from shortllm.benchmark.bench import check_speed, measure_speed

    if not models:
        raise ShortLLMError("no model to measure. Give one or more")
    options = options or BenchmarkOptions()
    session = Session(device=device, dtype=dtype)
    checkpoints = _named(models)
    if out is not None and out.is_file():
        raise OutputError(f"--out {out} is a file. Give a directory")
    check_speed(checkpoints, options, session)
    if out is None:
        return measure_speed(checkpoints, options, session=session)
    require_writable(out)
    return pipeline.bench_in(out, checkpoints, options, session)


def _named(models: Sequence[str]) -> dict[str, Checkpoint]:
    """Each model under the last part of its path, or all of it where that is taken.

    A Hub model that others were made from is opened at the revision which these record, unless one
    is asked for: the Hub's newest may be another.
    """
    opened = {model: open_checkpoint(model) for model in models if Path(model).is_dir()}
    entries = [one.raw_config.get(PROVENANCE) for one in opened.values()]
    held = [entry for entry in entries if isinstance(entry, dict)]
    origins = {str(entry.get("source")): entry.get("revision") for entry in held}
    checkpoints: dict[str, Checkpoint] = {}
    for model in models:
        short = Path(model).name or model
        one = opened.get(model) or open_checkpoint(model, revision=origins.get(model))
        checkpoints[model if short in checkpoints else short] = one
    return checkpoints
