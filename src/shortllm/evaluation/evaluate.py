"""Measure models by one protocol: perplexity, zero-shot tasks and generated samples.

shortllm eval MODEL SHORT --data wikitext2 --tasks paper
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from shortllm.checkpoint.hub import EMBEDDED
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.data.calibration import BOS_EVERY_SAMPLE, check_length, tokens_fingerprint
from shortllm.data.rows import Rows
from shortllm.data.sources import load_rows
from shortllm.errors import DataError, ShortLLMError
from shortllm.evaluation.harness import mean_score, measure_tasks, table_path, write_table
from shortllm.evaluation.options import PROMPT, EvaluatedModel, Evaluation, EvaluationOptions
from shortllm.evaluation.perplexity import EvaluationText, generate_samples, measure_perplexity
from shortllm.evaluation.tasks import TaskSet, load_tasks
from shortllm.evaluation.texts import evaluation_segments_of
from shortllm.files import fingerprint, require_file_target
from shortllm.model import Session
from shortllm.model.walk import NOTHING, walk_flops
from shortllm.options import accepts
from shortllm.runtime import Runtime, progress, versions
from shortllm.surgery.apply import open_checkpoints

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
    names = [models] if isinstance(models, str) else list(models)
    if not names:
        raise ShortLLMError("no model to evaluate. Give one or more")
    checkpoints = open_checkpoints(names)
    first, *_ = checkpoints.values()
    if out is not None:
        require_file_target(Path(out))
    session = Session(runtime)
    tasks = prepare_tasks(list(checkpoints.values()), options, session)
    measured = bool(options.data) or not options.tasks
    options = resolve_evaluation(
        options,
        embedded=names[0] == EMBEDDED,
        every=first.model_type in BOS_EVERY_SAMPLE,
    )
    rows = [load_rows(one) for one in options.data] if measured else []
    texts = _shared_texts(checkpoints, rows, options)
    found = evaluate_models(list(checkpoints.items()), texts, options, session=session, tasks=tasks)
    if out is not None:
        found.save(Path(out))
        if tasks is not None:
            write_table(found, table_path(Path(out)))
    return found


def resolve_evaluation(
    options: EvaluationOptions,
    *,
    embedded: bool,
    every: bool,
    continuations: int = 0,
    calibrated_on: str | None = None,
) -> EvaluationOptions:
    """The options with the defaults that depend on the model filled in; `every` is whether it needs
    BOS before every sample, and the default text is the rest of what it was `calibrated_on`."""
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


def _shared_texts(
    checkpoints: dict[str, Checkpoint], sources: Sequence[Rows], options: EvaluationOptions
) -> list[EvaluationText]:
    """The texts cut into windows, which must be the same with every model's tokenizer."""
    texts: list[EvaluationText] = []
    for name, checkpoint in checkpoints.items():
        if sources:
            check_length(checkpoint, options.length, "--length")
        tokenizer = load_tokenizer(checkpoint)
        segments = [
            evaluation_segments_of(checkpoint, rows, tokenizer, options, option="--length")
            for rows in sources
        ]
        if not texts:
            texts = [
                EvaluationText(rows=rows, held_out=False, segments=one)
                for rows, one in zip(sources, segments, strict=True)
            ]
        pairs = zip(texts, segments, strict=True)
        if not all(text.segments.ids.equal(one.ids) for text, one in pairs):
            raise DataError(
                f"{next(iter(checkpoints))} and {name} tokenize the text differently, so their "
                "perplexities per token cannot be compared. Evaluate them in two commands"
            )
    return texts


def prepare_tasks(
    checkpoints: Sequence[Checkpoint], options: EvaluationOptions, session: Session
) -> TaskSet | None:
    """The requested zero-shot tasks with their documents; None if there are none."""
    if not options.tasks:
        return None
    for checkpoint in checkpoints:
        if session.streams(checkpoint):
            raise ShortLLMError(
                f"{checkpoint.id} is read one block at a time (streamed), which tasks with their "
                "thousands of passes cannot use. Leave --tasks out, or keep the model in memory: "
                "--no-stream, a smaller --dtype, another --device"
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
    decoder = session.decoder(checkpoint)
    work = sum(walk_flops(decoder, [NOTHING], *text.segments.ids.shape) for text in texts)
    windows = sum(len(text.segments.ids) for text in texts)
    with progress(f"perplexity of {name} on {windows:,} windows", work) as advance:
        perplexities = [
            measure_perplexity(decoder, text, memory=session.memory(), advance=advance)
            for text in texts
        ]
    tokenizer = load_tokenizer(checkpoint)
    scores = [] if tasks is None else measure_tasks(decoder.model, tokenizer, tasks, name=name)
    samples = None
    if options.continuations and options.prompt and decoder.streamed:
        log.info("no samples of %s: a streamed model would be read once per token", name)
    elif options.continuations and options.prompt:
        samples = generate_samples(
            decoder.model,
            tokenizer,
            prompt=options.prompt,
            continuations=options.continuations,
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
