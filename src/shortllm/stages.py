"""The stages of a run as functions: each takes what the one before it made, and can be run alone.

    score ─► BlockScores ─► plan ─► PrunePlan ─► prune ─► checkpoint ─► evaluate ─► Evaluation

`shortllm.run` calls them in order on one run directory; each is a command of its own as well.
"""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.surgery import carried_fingerprint, check_removal, require_apart
from shortllm.checkpoint.tensors import read_tensor_table
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.errors import CheckpointError, DataError, ShortLLMError
from shortllm.files import fingerprint, require_writable
from shortllm.journal import Journal
from shortllm.model.blocks import text_config
from shortllm.recipe import CalibrationOptions, EvaluationOptions
from shortllm.results.evaluation import EvaluatedModel, Evaluation
from shortllm.results.plan import PrunePlan
from shortllm.results.record import Cost
from shortllm.results.scores import BlockScores
from shortllm.runtime import (
    ALONE,
    Ranks,
    choose_device,
    choose_dtype,
    peak_memory,
    progress,
    versions,
)
from shortllm.scoring import Asked, Scorer, require_plain_weights

if TYPE_CHECKING:
    import torch

    from shortllm.calibration import Calibration
    from shortllm.data.rows import Rows
    from shortllm.evaluation import EvaluationText
    from shortllm.model.decoder import Decoder
    from shortllm.model.streams import StreamMemory
    from shortllm.segments import Segments
    from shortllm.zeroshot import TaskSet

log = logging.getLogger(__name__)


class Session:
    """Device, computation type, and the one model that is held at a time."""

    def __init__(
        self,
        *,
        device: str = "auto",
        dtype: str = "auto",
        stream: bool | None = None,
        max_memory: int | None = None,
    ) -> None:
        self.device = choose_device(device)
        self._dtype = dtype
        self._stream = stream
        self._max_memory = max_memory
        self._held: tuple[Checkpoint, Decoder, str] | None = None

    @property
    def asked_dtype(self) -> str:
        """The computation type as it was asked for, `auto` included."""
        return self._dtype

    def release(self) -> None:
        """Let the model go that is held."""
        self._held = None
        gc.collect()

    def decoder(self, checkpoint: Checkpoint) -> Decoder:
        """The checkpoint's decoder, opened unless it is the one held; another one is let go first.

        Its blocks are in memory where they fit, else they are read one at a time from the files.
        """
        from shortllm.model.decoder import Decoder
        from shortllm.model.loading import load_model
        from shortllm.model.streamed import open_streamed

        if not self._holds(checkpoint):
            self.release()
            if self.streams(checkpoint):
                dtype = self._torch_dtype(checkpoint)
                decoder = open_streamed(checkpoint, device=self.device, dtype=dtype)
            else:
                model = load_model(checkpoint, device=self.device, dtype=self._dtype)
                decoder = Decoder(model)
            # the fingerprint is read now: the directory may get another name later
            self._held = (checkpoint, decoder, checkpoint.fingerprint)
        assert self._held is not None
        return self._held[1]

    def _holds(self, checkpoint: Checkpoint) -> bool:
        """Whether the model in memory is the one asked for; a streamed one also reads its files."""
        if self._held is None or self._held[2] != checkpoint.fingerprint:
            return False
        return not self._held[1].streamed or self._held[0].directory == checkpoint.directory

    def memory(self, directory: Path | None = None) -> StreamMemory:
        """Where hidden streams are kept; beyond the limit in a file in `directory`."""
        from shortllm.model.streams import StreamMemory

        return StreamMemory(limit=self._max_memory, directory=directory)

    def dtype(self, checkpoint: Checkpoint) -> str:
        """Name of the computation type for a checkpoint, e.g. `float32`."""
        return str(self._torch_dtype(checkpoint)).removeprefix("torch.")

    def _torch_dtype(self, checkpoint: Checkpoint) -> torch.dtype:
        from shortllm.model.loading import stored_dtype

        return choose_dtype(self._dtype, self.device, stored_dtype(checkpoint))

    def streams(self, checkpoint: Checkpoint) -> bool:
        """Whether blocks are to be read one at a time: as asked, or if the model does not fit."""
        from shortllm.model.loading import room_for

        if self._stream is not None:
            return self._stream
        room = room_for(checkpoint, device=self.device, dtype=self._torch_dtype(checkpoint))
        if not room.suffices:
            log.info(
                "%s: %s; its blocks are read one at a time from the files (streamed)",
                checkpoint.id,
                room,
            )
        return not room.suffices


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Texts:
    """The text of a run, tokenized: what blocks are scored on and what models are measured on."""

    calibration: Calibration | None
    """None where the blocks were given by hand, so that nothing is scored."""
    evaluation: list[EvaluationText]
    healing: Calibration | None = None
    """More of the same text, for healing without training."""
    quantization: Calibration | None = None
    """None where nothing is quantized, or without text."""


def calibrate(
    checkpoint: Checkpoint, options: CalibrationOptions, rows: Rows | None = None
) -> Calibration:
    """Calibration ids from data or from a file, checked against the model.

    Args:
        rows: the rows to sample from, where not all of `options.data` may be used.
    Raises:
        DataError: too little text, or ids the model cannot take.
    """
    from shortllm.calibration import build_calibration, check_ids, load_calibration
    from shortllm.data.sources import load_rows

    if options.file is not None:
        calibration = load_calibration(options.file)
    else:
        source = rows if rows is not None else load_rows(options.data or "", role="calibration")
        calibration = build_calibration(
            source,
            load_tokenizer(checkpoint),
            sampler=options.sampler,
            samples=options.samples,
            length=options.length,
            seed=options.seed,
            bos_every_sample=bool(options.bos_every_sample),
        )
    check_ids(calibration.ids, vocabulary(checkpoint))
    check_length(checkpoint, calibration.ids.shape[1], "--length")
    return calibration


def vocabulary(checkpoint: Checkpoint) -> int:
    """Number of token ids the model has embeddings for."""
    return int(text_config(checkpoint.config).vocab_size)


def check_length(checkpoint: Checkpoint, length: int, option: str) -> None:
    """Refuse more tokens than the model has positions for.

    Raises:
        DataError: naming the option to change.
    """
    room = getattr(text_config(checkpoint.config), "max_position_embeddings", None)
    if isinstance(room, int) and length > room:
        raise DataError(
            f"{length} tokens exceed the {room} positions of {checkpoint.id}. Give {option} "
            f"{room} or less"
        )


def prepare_texts(
    checkpoint: Checkpoint,
    calibration: CalibrationOptions,
    evaluation: EvaluationOptions,
    *,
    scoring: bool = True,
    healing: CalibrationOptions | None = None,
    quantization: CalibrationOptions | None = None,
) -> Texts:
    """Read and tokenize all text of a run; what is measured serves no other purpose.

    Where one source does, its first half calibrates and its second half is measured; of a source
    that given calibration ids came from, the rows behind theirs are measured.

    Args:
        scoring: without, no calibration for it is made.
        healing: where text to heal with is asked for, how it is cut: from the rows that calibrate.
        quantization: the text that a quantization looks at, if it does.
    Raises:
        DataError: unreadable or too little text.
    """
    from shortllm.data.rows import same_text, split_held_out
    from shortllm.data.sources import load_rows
    from shortllm.evaluation import EvaluationText

    check_length(checkpoint, evaluation.length, "--eval-length")
    measured = [load_rows(source, role="evaluation") for source in evaluation.data]
    shared = [False] * len(measured)
    if healing is not None and calibration.file is None:
        healing = healing.model_copy(update={"data": calibration.data})
    loaded: dict[str, Rows] = {}
    made: list[Calibration | None] = []
    for options in (calibration if scoring else None, healing, quantization):
        rows = None
        if options is not None and options.file is None:
            source = options.data or ""
            if source not in loaded:
                loaded[source] = load_rows(source, role="calibration")
            rows = loaded[source]
            same = [same_text(rows, other) for other in measured]
            shared = [one or other for one, other in zip(shared, same, strict=True)]
            if any(same):
                rows, _ = split_held_out(rows)
        made.append(None if options is None else calibrate(checkpoint, options, rows))
    tokenizer = load_tokenizer(checkpoint)
    texts = []
    for other, is_shared in zip(measured, shared, strict=True):
        kept_apart = split_held_out(other)[1] if is_shared else _behind(other, made)
        segments = evaluation_segments_of(checkpoint, kept_apart, tokenizer, evaluation)
        held_out = kept_apart is not other
        texts.append(EvaluationText(rows=kept_apart, held_out=held_out, segments=segments))
    return Texts(calibration=made[0], evaluation=texts, healing=made[1], quantization=made[2])


def _behind(rows: Rows, calibrations: Sequence[Calibration | None]) -> Rows:
    """The rows behind those that given calibration ids were sampled from; all of another source.

    Raises:
        DataError: there are none.
    """
    start = max(
        (
            one.info.rows[1]
            for one in calibrations
            if one is not None and one.info.source == rows.source and one.info.rows
        ),
        default=None,
    )
    if start is None:
        return rows
    if start >= rows.stop:
        raise DataError(
            f"the calibration was drawn from all rows of {rows.source}, which leaves none to "
            "measure on. Give other text as --eval-data"
        )
    return rows.span(start, len(rows))


def evaluation_segments_of(
    checkpoint: Checkpoint,
    rows: Rows,
    tokenizer: Any,
    options: EvaluationOptions,
    *,
    option: str = "--eval-length",
) -> Segments:
    """Rows cut into the segments that perplexity is measured on, checked against the model.

    Args:
        option: what the command line calls `options.length`.
    Raises:
        DataError: not one full segment, or ids the model has no embeddings for.
    """
    from shortllm.calibration import check_ids
    from shortllm.segments import evaluation_segments

    segments = evaluation_segments(
        rows,
        tokenizer,
        length=options.length,
        bos=options.bos or "first",
        max_segments=options.max_segments,
        option=option,
    )
    check_ids(segments.ids, vocabulary(checkpoint), where=rows.source)
    return segments


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
    from shortllm.checkpoint.surgery import renumbered_tensors, write_shortened
    from shortllm.checkpoint.verify import bypass_logits, caches_rightly, verify_shortened

    require_same_model(plan, checkpoint)
    require_apart(checkpoint.directory, target)
    check_removal(checkpoint, plan.kept)
    total = sum(entry.bytes for entry in renumbered_tensors(checkpoint, plan.kept).values())
    require_writable(target.absolute().parent, total)
    expected, cached = None, False
    if session is not None:
        original = session.decoder(checkpoint)
        expected = bypass_logits(original, plan.removed)
        cached = caches_rightly(original)

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
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        read_tensor_table(target)
    except (OSError, ValueError):  # a CheckpointError is a ValueError
        return False
    return (
        isinstance(config, dict) and (config.get("shortllm") or {}).get("fingerprint") == expected
    )


def prepare_tasks(
    checkpoints: Sequence[Checkpoint], options: EvaluationOptions, session: Session
) -> TaskSet | None:
    """The zero-shot tasks asked for, with their documents; None if there are none.

    Raises:
        ShortLLMError: an unknown task, or a model whose blocks are to be streamed.
        DataError: documents that are missing or cannot be read.
    """
    from shortllm.zeroshot import load_tasks

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
    from shortllm.calibration import tokens_fingerprint

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
    from shortllm.evaluation import generate_samples, measure_perplexity
    from shortllm.model.walk import NOTHING, walk_flops
    from shortllm.zeroshot import mean_score, measure_tasks

    decoder = session.decoder(checkpoint)
    work = sum(walk_flops(decoder, [NOTHING], *text.segments.ids.shape) for text in texts)
    with progress(f"perplexity of {name}", work) as advance:
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
