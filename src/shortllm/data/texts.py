"""The text of a run, tokenized once: what blocks are scored on and what models are measured on.

What is measured serves no other purpose: where one source does, it is shared out.


Evaluation text as segments of token ids: the perplexity protocol of Shortened LLaMA.

Rows are joined by a blank line, tokenized without special tokens as one text, and cut into segments
that do not overlap; the remainder is dropped. 128 tokens are the paper's length, 2,048 the usual.

    bos="first"   [BOS] t0 t1 | t2 t3 t4 | ...      (the paper's: one BOS before the whole text)
    bos="every"   [BOS] t0 t1 | [BOS] t2 t3 | ...   (Gemma is meaningless without)
    bos="none"    t0 t1 t2 | t3 t4 t5 | ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from shortllm.checkpoint.config import text_config
from shortllm.checkpoint.hub import EMBEDDED
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.data.options import CalibrationOptions
from shortllm.errors import DataError
from shortllm.evaluation.options import EvaluationOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from shortllm.data.calibration import Calibration
    from shortllm.data.rows import Rows
    from shortllm.evaluation.perplexity import EvaluationText


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
    from shortllm.data.calibration import (
        build_calibration,
        check_ids,
        load_calibration,
        resolve_calibration,
    )
    from shortllm.data.sources import load_rows

    embedded = checkpoint.id == EMBEDDED
    options = resolve_calibration(options, checkpoint.model_type, embedded=embedded)
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
    from shortllm.evaluation.perplexity import EvaluationText

    check_length(checkpoint, evaluation.length, "--eval-length")
    measured = [load_rows(source, role="evaluation") for source in evaluation.data]
    shared = [False] * len(measured)
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
    from shortllm.data.calibration import check_ids
    from shortllm.data.texts import evaluation_segments

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


Bos = Literal["first", "every", "none"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segments:
    """Token ids to measure on, and the BOS rule that was applied (not always the one asked for)."""

    ids: torch.Tensor
    """int64 [segments, length]"""
    bos: Bos

    def __len__(self) -> int:
        return len(self.ids)


def evaluation_segments(
    rows: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int = 128,
    bos: Bos = "first",
    max_segments: int | None = None,
    option: str = "--length",
) -> Segments:
    """Cut rows into segments of `length` tokens, a BOS included where the rule puts one.

    A tokenizer without BOS (Qwen2) gets `none` whatever was asked; `Segments.bos` says so. With
    `max_segments` only as many rows are read as it takes, so the source may be larger than memory.

    Raises:
        DataError: not one full segment, or a length or count that makes none.
    """
    if length < 2:
        raise DataError(
            f"a segment of {length} tokens predicts nothing. Ask for a length of 2 or more"
        )
    if max_segments is not None and max_segments < 1:
        raise DataError(f"{max_segments} segments cannot be measured. Ask for 1 or more")
    if tokenizer.bos_token_id is None:
        bos = "none"
    new_tokens = length - 1 if bos == "every" else length
    enough = None if max_segments is None else (max_segments + 1) * new_tokens
    tokens = _tokens(rows, tokenizer, enough)
    if bos == "first":
        tokens = [tokenizer.bos_token_id, *tokens]
    count = len(tokens) // new_tokens
    if count == 0:
        raise DataError(
            f"{getattr(rows, 'source', 'the text')} gives {len(tokens)} tokens to measure on, less "
            f"than one segment of {length}. Ask for a shorter {option}, or give more text"
        )
    count = min(count, max_segments or count)
    ids = torch.tensor(tokens[: count * new_tokens], dtype=torch.int64).view(count, new_tokens)
    if bos == "every":
        ids = torch.cat([ids.new_full((count, 1), tokenizer.bos_token_id), ids], dim=1)
    return Segments(ids=ids, bos=bos)


def _tokens(
    rows: Sequence[str], tokenizer: PreTrainedTokenizerBase, enough: int | None
) -> list[int]:
    """The token ids of all rows, or of so many first rows that there are at least `enough` ids.

    Where a text ends changes only its last few tokens, so the caller asks for a segment too many.
    """
    read = len(rows) if enough is None else min(64, len(rows))
    while True:
        text = "\n\n".join(rows[:read])
        tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if read == len(rows) or (enough is not None and len(tokens) >= enough):
            return tokens
        read = min(2 * read, len(rows))
