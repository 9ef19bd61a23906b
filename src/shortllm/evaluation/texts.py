"""The text of a run, tokenized once: what blocks are scored on and what models are measured on.

No row is used for both. Where one source serves for both, its first half calibrates and its second
half is measured; where calibration ids were given, the rows after theirs are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.data.calibration import Calibration, calibrate, check_ids, check_length
from shortllm.data.options import CalibrationOptions
from shortllm.data.rows import Rows, same_text, split_held_out
from shortllm.data.sources import load_rows
from shortllm.errors import DataError
from shortllm.evaluation.options import EvaluationOptions
from shortllm.evaluation.perplexity import EvaluationText, Segments, evaluation_segments


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Texts:
    """The text of a run, tokenized."""

    calibration: Calibration | None
    """None where the blocks were given by hand, so that nothing is scored."""
    evaluation: list[EvaluationText]
    healing: Calibration | None = None
    """More of the same text, for healing without training."""
    quantization: Calibration | None = None
    """None where nothing is quantized, or the method needs no text."""


def prepare_texts(
    checkpoint: Checkpoint,
    calibration: CalibrationOptions,
    evaluation: EvaluationOptions,
    *,
    scoring: bool = True,
    healing: CalibrationOptions | None = None,
    quantization: CalibrationOptions | None = None,
) -> Texts:
    """Read and tokenize all text of a run, with the measured rows held out from everything else;
    without `scoring`, nothing is sampled to calibrate."""
    check_length(checkpoint, evaluation.length, "--eval-length")
    measured = [load_rows(source) for source in evaluation.data]
    wanted = (calibration if scoring else None, healing, quantization)
    used, shared = _calibration_rows(wanted, measured)
    sampled = [
        None if options is None else calibrate(checkpoint, options, rows)
        for options, rows in zip(wanted, used, strict=True)
    ]
    tokenizer = load_tokenizer(checkpoint)
    texts = []
    for rows, is_shared in zip(measured, shared, strict=True):
        held_out = split_held_out(rows)[1] if is_shared else _rows_after(rows, sampled)
        segments = evaluation_segments_of(checkpoint, held_out, tokenizer, evaluation)
        text = EvaluationText(rows=held_out, held_out=held_out is not rows, segments=segments)
        texts.append(text)
    calibrated, healed, quantized = sampled
    return Texts(calibration=calibrated, evaluation=texts, healing=healed, quantization=quantized)


def _calibration_rows(
    wanted: Sequence[CalibrationOptions | None], measured: Sequence[Rows]
) -> tuple[list[Rows | None], list[bool]]:
    """The rows to sample each calibration from, and which measured sources serve for one too."""
    loaded: dict[str, Rows] = {}
    used: list[Rows | None] = []
    shared = [False] * len(measured)
    for options in wanted:
        if options is None or options.file is not None:
            used.append(None)
            continue
        source = options.data or ""
        if source not in loaded:
            loaded[source] = load_rows(source, role="calibration")
        rows = loaded[source]
        same = [same_text(rows, other) for other in measured]
        shared = [one or other for one, other in zip(shared, same, strict=True)]
        used.append(split_held_out(rows)[0] if any(same) else rows)
    return used, shared


def _rows_after(rows: Rows, calibrations: Sequence[Calibration | None]) -> Rows:
    """The rows after those that given calibration ids were sampled from; else all rows."""
    stops = [
        one.info.rows[1]
        for one in calibrations
        if one is not None and one.info.source == rows.source and one.info.rows
    ]
    if not stops:
        return rows
    if max(stops) >= rows.stop:
        raise DataError(
            f"the calibration was drawn from all rows of {rows.source}, which leaves none to "
            "measure on. Give other text as --eval-data"
        )
    return rows.span(max(stops), len(rows))


def evaluation_segments_of(
    checkpoint: Checkpoint,
    rows: Rows,
    tokenizer: Any,
    options: EvaluationOptions,
    *,
    option: str = "--eval-length",
) -> Segments:
    """Rows cut into windows to measure perplexity on, checked against the model; `option` is the
    flag of `options.length`."""
    segments = evaluation_segments(
        rows,
        tokenizer,
        length=options.length,
        bos=options.bos or "first",
        max_segments=options.max_segments,
        option=option,
    )
    check_ids(segments.ids, checkpoint.vocabulary, where=rows.source)
    return segments
