"""Measurements as files: eval.json and bench.json of a run directory, unless they are up to date.

shortllm bench MODEL SHORT --batch 1,16 --new-tokens 128 --out bench
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from shortllm.benchmark.bench import benchmark_fingerprint, check_speed, measure_speed
from shortllm.benchmark.drafted import DraftRuns, check_drafts, measure_drafts
from shortllm.benchmark.options import Benchmark, BenchmarkOptions, DraftedOptions
from shortllm.calls import accepts
from shortllm.checkpoint.hub import ModelSource
from shortllm.checkpoint.source import Checkpoint
from shortllm.data.calibration import tokens_fingerprint
from shortllm.errors import ResultFileError, ShortLLMError
from shortllm.evaluation.evaluate import (
    evaluate_models,
    evaluation_fingerprint,
    table_path,
    write_table,
)
from shortllm.evaluation.options import Evaluation, EvaluationOptions
from shortllm.evaluation.texts import Texts, measure_perplexity
from shortllm.files import hold, releasing, require_same_choices, require_writable
from shortllm.model import Session
from shortllm.options import OneOrMore
from shortllm.reporting.measurements import write_benchmark
from shortllm.run_directory import delete, finished
from shortllm.runtime import DeviceOptions
from shortllm.surgery.origin import open_checkpoints

if TYPE_CHECKING:
    from shortllm.evaluation.tasks import TaskSet


def evaluate_in(
    directory: Path,
    models: Mapping[str, Checkpoint],
    options: EvaluationOptions,
    texts: Texts,
    tasks: TaskSet | None,
    session: Session,
) -> Evaluation:
    """eval.json, and zeroshot.csv where there are tasks, unless they are up to date."""
    path = directory / "eval.json"
    named = list(models.items())
    expected = evaluation_fingerprint(named, texts.evaluation, options, session, tasks)
    evaluation = finished(Evaluation, path, expected)
    if evaluation is None:
        evaluation = evaluate_models(named, texts.evaluation, options, session=session, tasks=tasks)
        evaluation.save(path)
    if tasks is None:
        delete([table_path(path)])
    else:
        write_table(evaluation, table_path(path))
    return evaluation


def best_of(
    candidates: Mapping[str, Checkpoint], texts: Texts, session: Session, evaluation: Path
) -> str:
    """The name of the model with the lowest perplexity on the first text.

    Args:
        evaluation: an earlier eval.json, whose models are not measured again.
    """
    if len(candidates) == 1:
        return next(iter(candidates))
    text = texts.evaluation[0]
    tokens = tokens_fingerprint(text.segments.ids)
    nll: dict[str, float] = {}
    """By the fingerprint of the model."""
    with suppress(ResultFileError):
        nll = {
            one.model.fingerprint: entry.nll
            for one in Evaluation.load(evaluation).models
            for entry in one.perplexity
            if entry.tokens_fingerprint == tokens
        }
    for checkpoint in candidates.values():
        if checkpoint.fingerprint not in nll:
            decoder = session.decoder(checkpoint)
            found = measure_perplexity(decoder, text, memory=session.memory())
            nll[checkpoint.fingerprint] = found.nll
    return min(candidates, key=lambda name: nll[candidates[name].fingerprint])


@accepts(options=BenchmarkOptions, drafted=DraftedOptions, runtime=DeviceOptions)
def bench(
    models: OneOrMore[ModelSource],
    *,
    options: BenchmarkOptions,
    drafted: DraftedOptions,
    runtime: DeviceOptions,
    draft: OneOrMore[ModelSource] | None = None,
    out: Path | None = None,
) -> Benchmark:
    """Latency, throughput and memory of one or more models, measured in interleaved runs.

    With a draft, the first model also writes text alone and with the draft's help. At temperature 0
    both must be the same, but for near ties.

    Args:
        models: checkpoint directories, Hub ids or loaded models: one or several.
        options: what to measure; its fields can be given as keywords.
        drafted: how a draft is measured; its fields can be given as keywords.
        runtime: where to compute; its fields can be given as keywords.
        draft: shorter models with the same tokens that draft for the first model: one or several.
        out: a directory for bench.json, bench.csv and the plots; a run directory will do. An
            interrupted sweep is resumed there.
    Returns:
        A measurement for each model, batch and length; speed-ups are against the first model. With
        a draft, `drafted` has a measurement for each draft, number of drafted tokens and kind of
        prompts.
    Raises:
        ShortLLMError: something cannot be measured here, before any model is loaded; or the text
            with a draft is not that without it.
    """
    if not models:
        raise ShortLLMError("no model to measure. Give one or more")
    if not draft and drafted.model_fields_set:
        names = ", ".join(f"--{one.replace('_', '-')}" for one in sorted(drafted.model_fields_set))
        raise ShortLLMError(f"{names} has no effect without --draft. Give one, or leave it out")
    session = Session(runtime)
    checkpoints = open_checkpoints(models)
    if out is not None:
        require_writable(out)
    check_speed(checkpoints, options, session)
    drafts = None
    if draft:
        first = next(iter(checkpoints.values()))
        drafts = check_drafts(first, open_checkpoints(draft), options, drafted)
    if out is not None:
        return bench_in(out, checkpoints, options, session, drafts)
    found = measure_speed(checkpoints, options, session=session)
    if drafts is not None:
        found = found.model_copy(update={"drafted": measure_drafts(drafts, session)})
    return found


@releasing()
def bench_in(
    directory: Path,
    checkpoints: Mapping[str, Checkpoint],
    options: BenchmarkOptions,
    session: Session,
    drafts: DraftRuns | None = None,
) -> Benchmark:
    """bench.json with its table and plots, unless they are up to date."""
    path, expected = directory / "bench.json", benchmark_fingerprint(checkpoints, options, session)
    found = finished(Benchmark, path, expected)
    if found is not None and (drafts is None or _is_current(found, drafts, path, session)):
        return found
    hold(directory)
    if found is None:
        found = measure_speed(checkpoints, options, session=session, directory=directory)
    if drafts is not None:
        found = found.model_copy(update={"drafted": measure_drafts(drafts, session)})
    write_benchmark(directory, found)
    return found


def _is_current(found: Benchmark, drafts: DraftRuns, path: Path, session: Session) -> bool:
    """Whether the drafts were measured already; an earlier measurement of others is refused."""
    if found.drafted is None:
        return False
    current = found.drafted.fingerprint == drafts.fingerprint(session)
    if not current:
        require_same_choices(path, {}, {})
    return current
