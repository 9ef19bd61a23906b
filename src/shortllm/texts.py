"""The text of a run, tokenized once: what blocks are scored on and what models are measured on.

What is measured serves no other purpose: where one source does, it is shared out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.errors import DataError
from shortllm.model.blocks import text_config
from shortllm.recipe import CalibrationOptions, EvaluationOptions

if TYPE_CHECKING:
    from shortllm.calibration import Calibration
    from shortllm.data.rows import Rows
    from shortllm.evaluation import EvaluationText
    from shortllm.segments import Segments


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
