"""Measure models by one protocol: perplexity, zero-shot tasks and generated samples.

shortllm eval MODEL SHORT --data wikitext2 --tasks paper
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm.checkpoint.hub import EMBEDDED
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.data.calibration import resolve_calibration, tokens_fingerprint
from shortllm.data.options import CalibrationOptions
from shortllm.data.texts import check_length
from shortllm.errors import DataError, ShortLLMError
from shortllm.evaluation.options import PROMPT, EvaluatedModel, Evaluation, EvaluationOptions
from shortllm.evaluation.texts import evaluation_segments_of
from shortllm.files import fingerprint, require_file_target
from shortllm.model.session import Session
from shortllm.options import accepts
from shortllm.runtime import Runtime, progress, versions
from shortllm.surgery.apply import open_checkpoints

if TYPE_CHECKING:
    from shortllm.evaluation.perplexity import EvaluationText
    from shortllm.evaluation.tasks import TaskSet

log = logging.getLogger(__name__)

EMBEDDED_PROMPT = "There was a drum in the school."
EMBEDDED_SEGMENTS = 256
"""The embedded model has a prompt from its own world, and a text that takes seconds."""


@accepts(options=EvaluationOptions, runtime=Runtime)
def evaluate(
    models: str | Sequence[str],
    *,
    options: EvaluationOptions,
    runtime: Runtime,
    out: Path | str | None = None,
) -> Evaluation:
    """Perplexity, task scores and generated samples of one or more models.

    Args:
        models: checkpoint directories or Hub ids, with the same tokenizer.
        options: what to measure; their fields can be given as keywords. Without `data`, perplexity
            is measured on wikitext2 and ptb, or not at all where tasks are given.
        runtime: where to compute; its fields can be given as keywords.
        out: a file for the evaluation, e.g. eval.json; task scores go to zeroshot.csv next to it.
    Returns:
        One entry per model, in the order given.
    Raises:
        DataError: unreadable text, or models whose tokenizers split it differently.
        ShortLLMError: any other kind, before a model is loaded wherever that can be known.
    """
    from shortllm.data.sources import load_rows
    from shortllm.evaluation.harness import table_beside, write_table
    from shortllm.evaluation.perplexity import EvaluationText

    names = [models] if isinstance(models, str) else list(models)
    if not names:
        raise ShortLLMError("no model to evaluate. Give one or more")
    checkpoints = open_checkpoints(names)
    first = next(iter(checkpoints.values()))
    if out is not None:
        require_file_target(Path(out))
    session = Session(runtime)
    tasks = prepare_tasks(list(checkpoints.values()), options, session)
    embedded = names[0] == EMBEDDED
    bos = resolve_calibration(CalibrationOptions(), first.model_type, embedded=embedded)
    measured = options if options.data or not options.tasks else None
    options = resolve_evaluation(options, embedded=embedded, every=bool(bos.bos_every_sample))
    rows = [load_rows(one, role="evaluation") for one in (options.data if measured else [])]
    texts = [
        EvaluationText(rows=source, held_out=False, segments=segments)
        for source, segments in zip(rows, _shared_segments(checkpoints, rows, options), strict=True)
    ]
    found = evaluate_models(list(checkpoints.items()), texts, options, session=session, tasks=tasks)
    if out is not None:
        found.save(Path(out))
        if tasks is not None:
            write_table(found, table_beside(Path(out)))
    return found


def resolve_evaluation(
    options: EvaluationOptions,
    *,
    embedded: bool,
    every: bool,
    continuations: int = 0,
    calibrated_on: str | None = None,
) -> EvaluationOptions:
    """The same options with the defaults that depend on the model filled in.

    Args:
        embedded: whether the model is the embedded one.
        every: whether the model needs BOS before every sample.
        continuations: generated samples where the options say nothing.
        calibrated_on: the calibration text that was given; its held-out rows are the default.
    """
    default = [calibrated_on] if calibrated_on else None
    return options.model_copy(
        update={
            "data": options.data or default or ([EMBEDDED] if embedded else ["wikitext2", "ptb"]),
            "max_segments": options.max_segments or (EMBEDDED_SEGMENTS if embedded else None),
            "bos": options.bos or ("every" if every else "first"),
            "continuations": (
                continuations if options.continuations is None else options.continuations
            ),
            "prompt": options.prompt or (EMBEDDED_PROMPT if embedded else PROMPT),
        }
    )


def _shared_segments(
    checkpoints: dict[str, Checkpoint], rows: Sequence[Any], options: EvaluationOptions
) -> list[Any]:
    """The windows of each text, which must be the same for every model's tokenizer."""
    found: dict[str, list[Any]] = {}
    for name, checkpoint in checkpoints.items():
        if rows:
            check_length(checkpoint, options.length, "--length")
        tokenizer = load_tokenizer(checkpoint)
        found[name] = [
            evaluation_segments_of(checkpoint, source, tokenizer, options, option="--length")
            for source in rows
        ]
    first, *others = found
    for name in others:
        pairs = zip(found[first], found[name], strict=True)
        if not all(one.ids.equal(other.ids) for one, other in pairs):
            raise DataError(
                f"{first} and {name} tokenize the text differently, so their perplexities per "
                "token cannot be compared. Evaluate them in two commands"
            )
    return found[first]


def prepare_tasks(
    checkpoints: Sequence[Checkpoint], options: EvaluationOptions, session: Session
) -> TaskSet | None:
    """The requested zero-shot tasks with their documents; None if there are none."""
    from shortllm.evaluation.tasks import load_tasks

    if not options.tasks:
        return None
    for checkpoint in checkpoints:
        if session.streams(checkpoint):
            raise ShortLLMError(
                f"{checkpoint.id} is read one block at a time (streamed), and each of the "
                "thousands of passes of a task would read all its files. Leave --tasks out, or "
                "keep the model in memory: --no-stream, a smaller --dtype, another --device"
            )
    return load_tasks(
        options.tasks, data=options.task_data, limit=options.limit, batch_size=options.batch_size
    )


def evaluation_fingerprint(
    models: Sequence[tuple[str, Checkpoint]],
    texts: Sequence[EvaluationText],
    options: EvaluationOptions,
    session: Session,
    tasks: TaskSet | None = None,
) -> str:
    """The fingerprint of everything the evaluation depends on."""
    inputs = {
        "models": [(name, checkpoint.fingerprint) for name, checkpoint in models],
        "texts": [tokens_fingerprint(text.segments.ids) for text in texts],
        "samples": [options.prompt, options.continuations, options.new_tokens, options.seed],
        "dtype": [session.dtype(checkpoint) for _, checkpoint in models],
        "device": session.device.type,
    }
    if tasks is not None:
        inputs["tasks"] = tasks.fingerprint
    return fingerprint(inputs)


def evaluate_models(
    models: Sequence[tuple[str, Checkpoint]],
    texts: Sequence[EvaluationText],
    options: EvaluationOptions,
    *,
    session: Session,
    tasks: TaskSet | None = None,
) -> Evaluation:
    """Measure each named model, one at a time, on texts from a tokenizer that all of them share."""
    measured = {
        # the last one first: a run has just verified it, so that it is still in memory
        name: _evaluate_one(name, checkpoint, texts, options, session, tasks)
        for name, checkpoint in reversed(models)
    }
    return Evaluation(
        models=[measured[name] for name, _ in models],
        dtype=session.dtype(models[0][1]),
        versions=versions() | ({"lm_eval": tasks.version} if tasks is not None else {}),
        fingerprint=evaluation_fingerprint(models, texts, options, session, tasks),
    )


def _evaluate_one(
    name: str,
    checkpoint: Checkpoint,
    texts: Sequence[EvaluationText],
    options: EvaluationOptions,
    session: Session,
    tasks: TaskSet | None,
) -> EvaluatedModel:
    from shortllm.evaluation.harness import mean_score, measure_tasks
    from shortllm.evaluation.perplexity import generate_samples, measure_perplexity
    from shortllm.model.walk import NOTHING, walk_flops

    decoder = session.decoder(checkpoint)
    work = sum(walk_flops(decoder, [NOTHING], *text.segments.ids.shape) for text in texts)
    windows = sum(len(text.segments.ids) for text in texts)
    with progress(f"perplexity of {name} on {windows:,} windows", work) as advance:
        perplexities = [
            measure_perplexity(decoder, text, memory=session.memory(), advance=advance)
            for text in texts
        ]
    scores = []
    if tasks is not None:
        scores = measure_tasks(decoder.model, load_tokenizer(checkpoint), tasks, name=name)
    samples = None
    if options.continuations and options.prompt and decoder.streamed:
        log.info("no samples of %s: a streamed model would be read once per token", name)
    elif options.continuations and options.prompt:
        samples = generate_samples(
            decoder.model,
            load_tokenizer(checkpoint),
            prompt=options.prompt,
            continuations=options.continuations or 0,
            new_tokens=options.new_tokens,
            seed=options.seed,
        )
    return EvaluatedModel(
        name=name,
        model=checkpoint.info(),
        perplexity=perplexities,
        zeroshot=scores,
        zeroshot_mean=mean_score(scores),
        samples=samples,
    )
