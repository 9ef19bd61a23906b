"""Measure models by one protocol: perplexity, tasks, exercises and generated samples.

shortllm eval MODEL SHORT --data wikitext2 --tasks paper
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
from collections.abc import Iterable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from shortllm.calls import accepts
from shortllm.checkpoint.config import context_length
from shortllm.checkpoint.hub import EMBEDDED, ModelSource
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tokenizer import chat_template_of, load_tokenizer
from shortllm.data.calibration import BOS_EVERY_SAMPLE, check_length, tokens_fingerprint
from shortllm.data.chat import Chat, conversation, prompt_of
from shortllm.data.rows import Rows
from shortllm.data.sources import load_rows
from shortllm.errors import DataError, ShortLLMError
from shortllm.evaluation.options import (
    CHAT_TEMPERATURE,
    PROMPT,
    SAMPLING,
    EvaluatedModel,
    Evaluation,
    EvaluationOptions,
    Samples,
    TaskScore,
)
from shortllm.evaluation.probe.items import items_fingerprint
from shortllm.evaluation.probe.measure import NEW_TOKENS, check_probe, measure_probe
from shortllm.evaluation.tasks import TaskSet, load_tasks, measure_tasks
from shortllm.evaluation.texts import EvaluationText, evaluation_segments_of, measure_perplexity
from shortllm.files import fingerprint, require_file_target, write_text
from shortllm.model import Session
from shortllm.model.decoder import Decoder
from shortllm.model.walk import NOTHING, walk_flops
from shortllm.options import OneOrMore
from shortllm.progress import progress
from shortllm.run_directory import require_replaceable
from shortllm.runtime import (
    ALONE,
    Ranks,
    Runtime,
    join_ranks,
    quiet_transformers,
    versions,
)
from shortllm.surgery.origin import open_checkpoints

log = logging.getLogger(__name__)

EMBEDDED_PROMPT = "There was a drum in the school."
EMBEDDED_SEGMENTS = 256
"""The embedded model has a prompt from its own world, and a text that takes seconds."""


@accepts(options=EvaluationOptions, runtime=Runtime)
def evaluate(
    models: OneOrMore[ModelSource],
    *,
    options: EvaluationOptions,
    runtime: Runtime,
    out: Path | None = None,
) -> Evaluation:
    """Perplexity, task scores and generated samples of one or more models.

    Under `accelerate launch` or `torchrun` all processes share the windows and the documents of
    tasks, each of them gets the result, and the main one writes it.

    Args:
        models: checkpoint directories, Hub ids or loaded models: one or several, with the same
            tokenizer.
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
    if not models:
        raise ShortLLMError("no model to evaluate. Give one or more")
    checkpoints = open_checkpoints(models)
    first, *_ = checkpoints.values()
    if out is not None:
        require_file_target(out)
    ranks = join_ranks()
    session = Session(runtime)
    tasks = prepare_tasks(list(checkpoints.values()), options, session)
    for given, needed in options.without_effect():
        log.warning("%s has no effect without %s", given, needed)
    measured = bool(options.data) or not options.tasks
    options = resolve_evaluation(
        options,
        embedded=models[0] == EMBEDDED,
        every=first.model_type in BOS_EVERY_SAMPLE,
    )
    rows = [load_rows(one) for one in options.data] if measured else []
    texts = _shared_texts(checkpoints, rows, options)
    if out is not None:
        named = list(checkpoints.items())
        expected = evaluation_fingerprint(named, texts, options, session, tasks)
        require_replaceable(Evaluation, out, expected)
    found = evaluate_models(
        list(checkpoints.items()), texts, options, session=session, tasks=tasks, ranks=ranks
    )
    if out is not None and ranks.is_main:
        found.save(out)
        if tasks is not None:
            write_table(found, table_path(out))
    ranks.wait()
    return found


def resolve_evaluation(
    options: EvaluationOptions,
    *,
    embedded: bool,
    every: bool,
    continuations: int = 0,
    calibrated_on: Iterable[str] = (),
) -> EvaluationOptions:
    """The options with the defaults that depend on the model filled in; `every` is whether it needs
    BOS before every sample, and the default text is the rest of what it was `calibrated_on`."""
    default = list(calibrated_on)
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
            check_length(checkpoint, options.length, "--length", before=options.before_window)
        tokenizer = load_tokenizer(checkpoint)
        found = [
            EvaluationText(
                rows=rows,
                held_out=False,
                segments=evaluation_segments_of(
                    checkpoint, rows, tokenizer, options, option="--length"
                ),
            )
            for rows in sources
        ]
        texts = texts or found
        pairs = zip(texts, found, strict=True)
        if not all(text.segments.ids.equal(one.segments.ids) for text, one in pairs):
            raise DataError(
                f"{next(iter(checkpoints))} and {name} tokenize the text differently, so their "
                "perplexities per token cannot be compared. Evaluate them in two commands"
            )
    return texts


def prepare_tasks(
    checkpoints: Sequence[Checkpoint], options: EvaluationOptions, session: Session
) -> TaskSet | None:
    """The requested tasks with their documents; None if there are none. Refuses conversations that
    a model cannot have."""
    options.require_template_for_turns()
    if options.apply_chat_template or options.system_instruction:
        for checkpoint in checkpoints:
            _check_conversation(checkpoint, options)
    for checkpoint in checkpoints:
        check_probe(checkpoint, options)
    if not options.tasks:
        return None
    for checkpoint in checkpoints:
        if session.streams(checkpoint):
            raise ShortLLMError(
                f"{checkpoint.id} is read one block at a time (streamed), which tasks with their "
                "thousands of passes cannot use. Leave --tasks out, or keep the model in memory: "
                "--no-stream, a smaller --dtype, another --device"
            )
    tasks = load_tasks(options)
    for checkpoint in checkpoints:
        tasks.require_room(checkpoint)
    return tasks


def _check_conversation(checkpoint: Checkpoint, options: EvaluationOptions) -> None:
    """Refuse a chat template that is not there, and one that does not take the system message."""
    tokenizer = load_tokenizer(checkpoint)
    options.require_template(checkpoint.id, bool(tokenizer.chat_template))
    if tokenizer.chat_template and options.apply_chat_template is not False:
        Chat(tokenizer, "chat").prompt_ids(conversation("a", options.system_instruction))


def chat_templates(
    checkpoints: Iterable[Checkpoint], options: EvaluationOptions
) -> list[str] | None:
    """The chat template of each model, which generated text is put into; None where none is.

    Unless something else is requested, samples and open answers are conversations if all models
    have a template.
    """
    asked_in_it = bool(options.apply_chat_template and options.tasks)
    generated = options.continuations or options.probe
    if options.apply_chat_template is False or not (generated or asked_in_it):
        return None
    found = [chat_template_of(one) for one in checkpoints]
    return [one for one in found if one is not None] if None not in found else None


def evaluation_fingerprint(
    models: Sequence[tuple[str, Checkpoint]],
    texts: Sequence[EvaluationText],
    options: EvaluationOptions,
    session: Session,
    tasks: TaskSet | None = None,
) -> str:
    """The fingerprint of everything the evaluation depends on."""
    inputs: dict[str, Any] = {
        "models": [(name, checkpoint.fingerprint) for name, checkpoint in models],
        "texts": [tokens_fingerprint(text.segments.ids) for text in texts],
        "samples": [options.prompt, options.continuations, options.new_tokens, options.seed],
        "dtype": [session.dtype(checkpoint) for _, checkpoint in models],
        "device": session.device.type,
    }
    templates = chat_templates([checkpoint for _, checkpoint in models], options)
    if templates is not None:
        inputs["chat"] = [templates, options.system_instruction]
    if tasks is not None:
        inputs["tasks"] = tasks.fingerprint
    if options.probe:
        inputs["probe"] = [items_fingerprint(), NEW_TOKENS]
    return fingerprint(inputs)


def evaluate_models(
    models: Sequence[tuple[str, Checkpoint]],
    texts: Sequence[EvaluationText],
    options: EvaluationOptions,
    *,
    session: Session,
    tasks: TaskSet | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Measure each named model, one at a time, on texts from a tokenizer that all of them share."""
    templates = chat_templates([checkpoint for _, checkpoint in models], options)
    named = list(zip(models, templates or repeat(None), strict=False))
    measured = {
        # the last one first: a run has just verified it, so that it is still in memory
        name: _evaluate_one(name, checkpoint, template, texts, options, session, tasks, ranks)
        for (name, checkpoint), template in reversed(named)
    }
    first = measured[models[0][0]]
    return Evaluation(
        models=[first, *(_compared(measured[name], first) for name, _ in models[1:])],
        task_prompts=tasks.prompts if tasks is not None else None,
        dtype=session.dtype(models[0][1]),
        versions=versions() | ({"lm_eval": tasks.version} if tasks is not None else {}),
        fingerprint=evaluation_fingerprint(models, texts, options, session, tasks),
    )


def _compared(model: EvaluatedModel, first: EvaluatedModel) -> EvaluatedModel:
    """The model with its paired differences from the first one."""
    pairs = zip(model.perplexity, first.perplexity, strict=True)
    found = [
        one.model_copy(update={"difference": one.difference_from(other)}) for one, other in pairs
    ]
    return model.model_copy(update={"perplexity": found})


def _evaluate_one(
    name: str,
    checkpoint: Checkpoint,
    chat_template: str | None,
    texts: Sequence[EvaluationText],
    options: EvaluationOptions,
    session: Session,
    tasks: TaskSet | None,
    ranks: Ranks,
) -> EvaluatedModel:
    decoder = session.decoder(checkpoint)
    shares = [ranks.share(text.segments.ids) for text in texts]
    work = sum(walk_flops(decoder, [NOTHING], *ids_ST.shape) for ids_ST in shares)
    windows = sum(len(text.segments.ids) for text in texts)
    with progress(f"perplexity of {name} on {windows:,} windows", work) as advance:
        perplexities = [
            measure_perplexity(decoder, text, ranks=ranks, memory=session.memory(), advance=advance)
            for text in texts
        ]
    tokenizer = load_tokenizer(checkpoint)
    scores = (
        []
        if tasks is None
        else measure_tasks(decoder.model, tokenizer, tasks, name=name, ranks=ranks)
    )
    probe = None
    if options.probe:
        probe = measure_probe(
            decoder,
            tokenizer,
            name=name,
            chat=bool(chat_template),
            system=options.system_instruction if chat_template else None,
            session=session,
            ranks=ranks,
        )
    samples = None
    if options.continuations and options.prompt and decoder.streamed:
        log.info("no samples of %s: a streamed model would be read once per token", name)
    elif options.continuations and options.prompt:
        samples = _samples(decoder, tokenizer, options.prompt, options, chat=bool(chat_template))
    return EvaluatedModel(
        name=name,
        model=checkpoint.info(),
        perplexity=perplexities,
        zeroshot=scores,
        zeroshot_mean=mean_score(scores),
        probe=probe,
        samples=samples,
        chat_template=chat_template and hashlib.sha256(chat_template.encode()).hexdigest(),
    )


def _samples(
    decoder: Decoder, tokenizer: Any, prompt: str, options: EvaluationOptions, *, chat: bool
) -> Samples:
    """Sampled continuations of a prompt, or answers to it in a `chat`; the same for a seed.

    Answers end where the model ends them. Continuations all have the same length: the end-of-text
    token is not produced.
    """
    model: Any = decoder.model
    device, room, new_tokens = decoder.device, context_length(model.config), options.new_tokens
    system = options.system_instruction if chat else None
    start = prompt_of(prompt, tokenizer, model, chat=chat, system=system)
    sampling = SAMPLING | {"temperature": CHAT_TEMPERATURE} if chat else SAMPLING
    ids_BT = torch.tensor([start.ids], device=device)
    length = ids_BT.shape[1]
    if room is not None:
        new_tokens = max(1, min(new_tokens, room - length))
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        quiet_transformers(),
    ):
        torch.manual_seed(options.seed)
        output = model.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=True,
            num_return_sequences=options.continuations,
            **start.limits(new_tokens),
            **sampling,
        )
    written = [start.written(ids) for ids in output[:, length:].tolist()]
    return Samples(
        prompt=prompt,
        apply_chat_template=chat,
        system_instruction=system,
        texts=tokenizer.batch_decode(written, skip_special_tokens=True),
        new_tokens=new_tokens,
        seed=options.seed,
        **sampling,
    )


def mean_score(scores: Sequence[TaskScore]) -> float | None:
    """The plain mean over tasks, in [0, 1]; None where a score is not a share."""
    if not scores or not all(score.is_share for score in scores):
        return None
    return sum(score.score for score in scores) / len(scores)


def write_table(evaluation: Evaluation, path: Path) -> None:
    """zeroshot.csv as Shortened LLaMA publishes it: rows of tasks, metrics, and scores in percent.

    The last column is the mean. Several models get a row each, and a first column with their names.
    """
    models = evaluation.models
    first = models[0].zeroshot
    rows = [
        [*(score.task for score in first), "AVE"],
        [*(score.metric for score in first), "n/a"],
        *map(_cells, models),
    ]
    if len(models) > 1:
        heads = ["model", "metric", *(model.name for model in models)]
        rows = [[head, *row] for head, row in zip(heads, rows, strict=True)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def _cells(model: EvaluatedModel) -> list[str]:
    scores = [repr(100 * one.score if one.is_share else one.score) for one in model.zeroshot]
    mean = model.zeroshot_mean
    return [*scores, "n/a" if mean is None else repr(100 * mean)]


def table_path(evaluation_file: Path) -> Path:
    """zeroshot.csv next to eval.json, NAME-zeroshot.csv next to NAME.json."""
    stem = evaluation_file.stem
    return evaluation_file.with_name("zeroshot.csv" if stem == "eval" else f"{stem}-zeroshot.csv")
