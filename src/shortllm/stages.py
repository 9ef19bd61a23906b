"""The stages of a run as functions: each takes what the one before it made, and can be run alone.

    score ─► BlockScores ─► plan ─► PrunePlan ─► prune ─► checkpoint ─► evaluate ─► Evaluation

`shortllm.run` calls them in order on one run directory; each is a command of its own as well.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tensors import read_json, read_tensor_table
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.criteria.selection import Asked, require_plain_weights
from shortllm.errors import CheckpointError, ShortLLMError
from shortllm.evaluation.options import EvaluatedModel, Evaluation, EvaluationOptions
from shortllm.files import fingerprint, require_writable
from shortllm.journal import Journal
from shortllm.model.session import Session
from shortllm.pruning.records import BlockScores, PrunePlan
from shortllm.pruning.scoring import Scorer
from shortllm.records import Cost
from shortllm.runtime import ALONE, Ranks, peak_memory, progress, versions
from shortllm.surgery.apply import PROVENANCE, carried_fingerprint, check_removal, require_apart

if TYPE_CHECKING:
    from shortllm.data.calibration import Calibration
    from shortllm.evaluation.perplexity import EvaluationText
    from shortllm.evaluation.tasks import TaskSet

log = logging.getLogger(__name__)


def scores_fingerprint(
    checkpoint: Checkpoint, asked: Asked, calibration: Calibration | None, session: Session
) -> str:
    """Of everything the scores of one criterion depend on."""
    inputs: dict[str, Any] = {
        "model": checkpoint.fingerprint,
        "criterion": asked.name,
        "options": asked.options,
    }
    if asked.needs_text and calibration is not None:
        inputs |= {
            "calibration": calibration.info.tokens_fingerprint,
            "dtype": session.dtype(checkpoint),
            "device": session.device.type,
        }
    return fingerprint(inputs)


def score(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    asked: Sequence[Asked],
    *,
    session: Session,
    directory: Path | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, BlockScores]:
    """One importance per block by each criterion, in as few passes as there can be.

    Args:
        calibration: None if no criterion needs text.
        directory: where the progress of long passes is kept, so that an interrupted one goes on;
            to be deleted once the scores are safe.
        ranks: the processes that share the samples.
    Raises:
        CriterionError: a score that cannot be ranked.
        CheckpointError: weights that are missing or not finite, or packed ones that a criterion
            looks at.
    """
    require_plain_weights(checkpoint, asked)
    expected = {
        one.name: scores_fingerprint(checkpoint, one, calibration, session) for one in asked
    }
    own = None if directory is None else directory / f"rank{ranks.rank}of{ranks.count}"
    text = calibration is not None and any(one.needs_text for one in asked)
    scorer = Scorer(
        checkpoint=checkpoint,
        open_decoder=lambda: session.decoder(checkpoint),
        ids_BT=ranks.mine(calibration.ids) if calibration is not None and text else None,
        ranks=ranks,
        memory=session.memory(directory),
        journal=Journal(own, fingerprint(expected)),
    )
    started = time.monotonic()
    named = ", ".join(one.name for one in asked)
    with progress(f"scoring by {named}", scorer.work(asked)) as scorer.advance:
        found = scorer.score(asked)
    cost = Cost(seconds=round(time.monotonic() - started, 3), peak_bytes=peak_memory())
    return {
        one.name: BlockScores(
            model=checkpoint.info(),
            criterion=one.name,
            options=one.options,
            **asdict(found[one.name]),
            calibration=(
                calibration.info.tokens_fingerprint
                if calibration is not None and one.needs_text
                else None
            ),
            dtype=session.dtype(checkpoint),
            versions=versions(),
            cost=cost,
            fingerprint=expected[one.name],
        )
        for one in asked
    }


def prune(
    checkpoint: Checkpoint, plan: PrunePlan, target: Path, *, session: Session | None = None
) -> None:
    """Apply a plan to a checkpoint on disk.

    Args:
        session: with one, the result is reloaded and compared with the original whose blocks are
            bypassed, before it gets its final name; without, only names and structure are checked.
    Raises:
        UnsupportedModelError: removing these blocks would give a wrong model.
        CheckpointError: the plan is another model's, or the result is not what was meant.
        OutputError: the target cannot be written.
    """
    from shortllm.checkpoint.source import open_checkpoint
    from shortllm.surgery.apply import renumbered_tensors, write_shortened
    from shortllm.surgery.verify import bypass_logits, kv_cache_matches, verify_shortened

    require_same_model(plan, checkpoint)
    require_apart(checkpoint.directory, target)
    check_removal(checkpoint, plan.kept)
    total = sum(entry.bytes for entry in renumbered_tensors(checkpoint, plan.kept).values())
    require_writable(target.absolute().parent, total)
    expected, cached = None, False
    if session is not None:
        original = session.decoder(checkpoint)
        expected = bypass_logits(original, plan.removed)
        cached = kv_cache_matches(original)

    def verify(written: Path) -> None:
        if session is not None and expected is not None:
            shortened = open_checkpoint(written)
            verify_shortened(str(target), session.decoder(shortened), expected, cached=cached)

    with progress("writing the shortened checkpoint", total) as advance:
        write_shortened(
            checkpoint,
            plan.kept,
            target,
            provenance={
                "criterion": plan.criterion,
                "fingerprint": pruned_fingerprint(checkpoint, plan),
            },
            advance=advance,
            verify=verify,
        )


def require_same_model(plan: PrunePlan, checkpoint: Checkpoint) -> None:
    """Refuse to apply a plan to another model than it was made for.

    Raises:
        CheckpointError: the fingerprints differ.
    """
    if plan.model.fingerprint != checkpoint.fingerprint:
        raise CheckpointError(
            f"the plan was made for {plan.model.id} ({plan.model.blocks} blocks), and "
            f"{checkpoint.id} is "
            "another checkpoint or was changed since. Make a plan for it with `shortllm plan`"
        )


def pruned_fingerprint(checkpoint: Checkpoint, plan: PrunePlan) -> str:
    """Of everything the shortened checkpoint depends on."""
    return fingerprint(
        {
            "model": checkpoint.fingerprint,
            "other files": carried_fingerprint(checkpoint.directory),
            "kept": plan.kept,
            "criterion": plan.criterion,
            **({"special tokens": checkpoint.special_tokens} if checkpoint.special_tokens else {}),
        }
    )


def is_pruned_by(target: Path, expected: str) -> bool:
    """Whether `target` is a finished shortened checkpoint with this fingerprint."""
    try:
        held = read_json(target / "config.json")[PROVENANCE]["fingerprint"]
        read_tensor_table(target)
    except (OSError, ValueError, LookupError, TypeError):  # a CheckpointError is a ValueError
        return False
    return bool(held == expected)


def prepare_tasks(
    checkpoints: Sequence[Checkpoint], options: EvaluationOptions, session: Session
) -> TaskSet | None:
    """The zero-shot tasks asked for, with their documents; None if there are none.

    Raises:
        ShortLLMError: an unknown task, or a model whose blocks are to be streamed.
        DataError: documents that are missing or cannot be read.
    """
    from shortllm.evaluation.tasks import load_tasks

    if not options.tasks:
        return None
    for checkpoint in checkpoints:
        if session.streams(checkpoint):
            raise ShortLLMError(
                f"{checkpoint.id} is to be read one block at a time (streamed), and tasks take "
                "thousands of passes, each of which would read all its files. Leave --tasks out, "
                "or have the model in memory: --no-stream, a smaller --dtype, another --device"
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
    """Of everything the evaluation depends on."""
    from shortllm.data.calibration import tokens_fingerprint

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


def evaluate(
    models: Sequence[tuple[str, Checkpoint]],
    texts: Sequence[EvaluationText],
    options: EvaluationOptions,
    *,
    session: Session,
    tasks: TaskSet | None = None,
) -> Evaluation:
    """Perplexity, task scores and generation samples of each named model, by one protocol, one
    model at a time.

    The texts must have been tokenized by a tokenizer that all models share.
    """
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
    segments = sum(len(text.segments.ids) for text in texts)
    with progress(f"perplexity of {name} on {segments:,} segments", work) as advance:
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
