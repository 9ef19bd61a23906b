"""The text of a run, tokenized once: what blocks are scored on and what models are measured on.

No row is used for both. Where one source serves for both, its first half calibrates and its second
half is measured; where calibration ids were given, the rows after theirs are measured.

To measure, rows are joined by a blank line, tokenized without special tokens as one text, and cut
into segments that do not overlap; the remainder is dropped. 128 tokens are the length in Shortened
LLaMA (arXiv:2402.02834), 2,048 the usual one. Here with a length of 3:

    bos="first"   [BOS] t0 t1 | t2 t3 t4 | ...      (the paper's: one BOS before the whole text)
    bos="every"   [BOS] t0 t1 t2 | [BOS] t3 ...     (Gemma predicts nothing sensible without)
    bos="none"    t0 t1 t2 | t3 t4 t5 | ...

With `every`, BOS comes before `length` tokens of text, which are all predicted; otherwise a
segment is `length` tokens, of which the first is not. Perplexity is exp of the mean next-token NLL
over all predictions inside segments. The text takes the walk that also scores blocks, here with
nothing removed, so a model larger than memory can be measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.data.calibration import (
    Calibration,
    Source,
    calibrate,
    check_ids,
    check_length,
    load_sources,
    tokens_fingerprint,
)
from shortllm.data.chat import row_texts
from shortllm.data.options import CalibrationInfo, SampledText
from shortllm.data.rows import Rows, same_text, split_held_out
from shortllm.data.shapes import Row
from shortllm.data.sources import load_rows
from shortllm.errors import DataError, NotFiniteError
from shortllm.evaluation.options import EvaluationOptions, Perplexity
from shortllm.evaluation.statistics import standard_error
from shortllm.model.decoder import Decoder
from shortllm.model.hidden_states import StreamMemory
from shortllm.model.metrics import perplexity
from shortllm.model.walk import NOTHING, sample_nlls
from shortllm.progress import Advance
from shortllm.runtime import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from shortllm.model import Session

Bos = Literal["first", "every", "none"]

NLL_DECIMALS = 6
"""Of what is stored for each segment."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segments:
    """Windows to measure on, and the BOS rule that was applied (not always the requested one)."""

    ids: torch.Tensor
    """int64 [windows, length], with a BOS before them [windows, 1 + length]"""
    bos: Bos

    @property
    def length(self) -> int:
        """Tokens of a window, without a BOS before it."""
        return self.ids.shape[1] - (self.bos == "every")

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationText:
    """One text cut into segments, with where it came from."""

    rows: Rows
    held_out: bool
    """Whether these rows were kept apart from calibration rows of the same source."""
    segments: Segments

    def perplexity(self, nlls: Sequence[float]) -> Perplexity:
        """The perplexity by the mean NLL of each segment of this text, with its protocol."""
        ids_ST, nll = self.segments.ids, fmean(nlls)
        found, error = perplexity(nll), standard_error(nlls)
        if not math.isfinite(found):
            raise NotFiniteError(
                f"the model's loss on {self.rows.source} is {nll}, so its perplexity is not "
                "finite. Try --dtype float32"
            )
        return Perplexity(
            source=self.rows.source,
            rows=(self.rows.start, self.rows.stop),
            split="held-out" if self.held_out else None,
            length=self.segments.length,
            bos=self.segments.bos,
            segments=len(ids_ST),
            predictions=ids_ST.shape[0] * (ids_ST.shape[1] - 1),
            tokens_fingerprint=tokens_fingerprint(ids_ST),
            nll=nll,
            perplexity=found,
            stderr=None if error is None else found * error,
            segment_nlls=[round(one, NLL_DECIMALS) for one in nlls],
        )


def measure_perplexity(
    decoder: Decoder,
    text: EvaluationText,
    *,
    ranks: Ranks = ALONE,
    memory: StreamMemory | None = None,
    advance: Advance = lambda work: None,
) -> Perplexity:
    """Perplexity of a model on one text, whose segments all processes share; `advance` gets
    floating-point operations."""
    ids_ST = ranks.share(text.segments.ids)
    [nlls_S] = sample_nlls(decoder, ids_ST, [NOTHING], ranks=ranks, memory=memory, advance=advance)
    return text.perplexity(nlls_S.tolist())


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
    others: Sequence[Calibration] = ()
    """Those of further texts to score on."""


def prepare_texts(
    checkpoint: Checkpoint,
    calibration: SampledText,
    evaluation: EvaluationOptions,
    *,
    scoring: bool = True,
    healing: SampledText | None = None,
    quantization: SampledText | None = None,
    others: Sequence[SampledText] = (),
    session: Session | None = None,
    directory: Path | None = None,
) -> Texts:
    """Read and tokenize all text of a run, with the measured rows held out from everything else;
    without `scoring`, nothing is sampled to calibrate. `session` and `directory` are for text to
    score on that the model writes, see `calibrate`."""
    check_length(checkpoint, evaluation.length, "--eval-length", before=evaluation.before_window)
    measured = [load_rows(source) for source in evaluation.data]
    wanted = (calibration if scoring else None, healing, quantization, *others)
    used, shared = _calibration_rows(wanted, measured)
    parts = [directory and text_directory(directory, n) for n in range(len(others))]
    # text to heal and to quantize with is never written by the model
    writing = [(session, directory), (None, None), (None, None), *((session, one) for one in parts)]
    sampled = [
        None
        if options is None
        else calibrate(checkpoint, options, sources, session=writer, directory=place)
        for options, sources, (writer, place) in zip(wanted, used, writing, strict=True)
    ]
    tokenizer = load_tokenizer(checkpoint)
    texts = []
    for rows, is_shared in zip(measured, shared, strict=True):
        held_out = (
            split_held_out(rows)[1]
            if is_shared
            else rows_after(rows, [one.info for one in sampled if one is not None])
        )
        segments = evaluation_segments_of(checkpoint, held_out, tokenizer, evaluation)
        text = EvaluationText(rows=held_out, held_out=held_out is not rows, segments=segments)
        texts.append(text)
    calibrated, healed, quantized, *more = sampled
    return Texts(
        calibration=calibrated,
        evaluation=texts,
        healing=healed,
        quantization=quantized,
        others=[one for one in more if one is not None],
    )


def text_directory(directory: Path, number: int) -> Path:
    """Where a comparison of texts keeps the calibration and the scores by one of them."""
    return directory / f"text-{number}"


def _calibration_rows(
    wanted: Sequence[SampledText | None], measured: Sequence[Rows]
) -> tuple[list[list[Source] | None], list[bool]]:
    """The sources to sample each calibration from, and which measured ones serve for one too."""
    loaded: dict[str, list[Source]] = {}
    used: list[list[Source] | None] = []
    shared = [False] * len(measured)
    for options in wanted:
        if options is None or options.file is not None:
            used.append(None)
            continue
        source = options.source or ""
        if source not in loaded:
            loaded[source] = load_sources(options)
        apart = []
        for one in loaded[source]:
            same = [same_text(one.rows, other) for other in measured]
            shared = [before or now for before, now in zip(shared, same, strict=True)]
            apart.append(replace(one, rows=split_held_out(one.rows)[0]) if any(same) else one)
        used.append(apart)
    return used, shared


def rows_after(rows: Rows, calibrations: Sequence[CalibrationInfo]) -> Rows:
    """The rows after those that given calibration ids were sampled from; else all rows."""
    stops = [
        stop for one in calibrations for source, stop in one.drawn_from() if source == rows.source
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


def evaluation_segments(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int = 128,
    bos: Bos = "first",
    max_segments: int | None = None,
    option: str = "--length",
) -> Segments:
    """Cut rows into windows of `length` tokens; `every` puts a BOS before each of them, `first` one
    before all of the text.

    A tokenizer without BOS (Qwen2) always gets `none`. With `max_segments` only the rows that it
    takes are read, so the source may be larger than memory.
    """
    if tokenizer.bos_token_id is None:
        bos = "none"
    enough = None if max_segments is None else (max_segments + 1) * length
    tokens = _tokens(rows, tokenizer, enough)
    if bos == "first" and tokens[:1] != [tokenizer.bos_token_id]:  # a chat template may have it
        tokens = [tokenizer.bos_token_id, *tokens]
    count = len(tokens) // length
    if count == 0:
        raise DataError(
            f"{getattr(rows, 'source', 'the text')} gives {len(tokens)} tokens to measure on, less "
            f"than one segment of {length}. Give a shorter {option} or more text"
        )
    count = min(count, max_segments or count)
    ids = torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length)
    if bos == "every":
        ids = F.pad(ids, (1, 0), value=tokenizer.bos_token_id)
    return Segments(ids=ids, bos=bos)


def _tokens(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, enough: int | None
) -> list[int]:
    """The token ids of all rows, or of enough first rows that there are at least `enough` ids.

    Conversations follow each other as the chat template ends them, texts after an empty line. The
    end of a text changes only its last few tokens, so the caller requests one more window.
    """
    read = len(rows) if enough is None else min(64, len(rows))
    while True:
        between = "\n\n" if isinstance(rows[0], str) else ""
        text = between.join(row_texts(rows[:read], tokenizer))
        tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if read == len(rows) or (enough is not None and len(tokens) >= enough):
            return tokens
        read = min(2 * read, len(rows))
