"""Rows of text cut into windows of token ids, to calibrate and to evaluate.

Two samplers calibrate, with `ids [samples, length]`:

    random   windows at seeded random places of seeded random rows: those of the published scores
             (10 samples of 128 tokens, seed 1234, BookCorpus), to the token
    packed   all rows one after another, cut every `length` tokens, the first `samples` of them

To evaluate, rows are joined by a blank line, tokenized without special tokens as one text, and cut
into windows that do not overlap; the remainder is dropped. 128 tokens are the length in Shortened
LLaMA (arXiv:2402.02834), 2,048 the usual one.

    bos="first"   [BOS] t0 t1 | t2 t3 t4 | ...      (the paper's: one BOS before the whole text)
    bos="every"   [BOS] t0 t1 | [BOS] t2 t3 | ...   (Gemma predicts nothing sensible without)
    bos="none"    t0 t1 t2 | t3 t4 t5 | ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from random import Random
from typing import TYPE_CHECKING, Any, Literal

import torch

from shortllm.checkpoint.config import context_length, text_config
from shortllm.checkpoint.hub import EMBEDDED
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.data.calibration import (
    Calibration,
    check_ids,
    load_calibration,
    resolve_calibration,
    tokens_fingerprint,
)
from shortllm.data.options import CalibrationInfo, CalibrationOptions
from shortllm.data.rows import Rows
from shortllm.data.sources import load_rows
from shortllm.errors import DataError
from shortllm.files import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["first", "every", "none"]

ROWS_PER_BATCH = 1000
"""Rows tokenized in one call when many are needed: enough to use all cores, small in memory."""


def calibrate(
    checkpoint: Checkpoint, options: CalibrationOptions, rows: Rows | None = None
) -> Calibration:
    """Calibration ids from `rows`, else from the data or the file of the options, checked against
    the model."""
    embedded = checkpoint.id == EMBEDDED
    options = resolve_calibration(options, checkpoint.model_type, embedded=embedded)
    if options.file is not None:
        calibration = load_calibration(options.file)
    else:
        if rows is None:
            rows = load_rows(options.data or "", role="calibration")
        calibration = build_calibration(rows, load_tokenizer(checkpoint), options)
    check_ids(calibration.ids, vocabulary(checkpoint))
    check_length(checkpoint, calibration.ids.shape[1], "--length")
    return calibration


def vocabulary(checkpoint: Checkpoint) -> int:
    """Number of token ids the model has embeddings for."""
    return int(text_config(checkpoint.config).vocab_size)


def check_length(checkpoint: Checkpoint, length: int, option: str) -> None:
    """Refuse more tokens than the model has positions for."""
    room = context_length(checkpoint.config)
    if room is not None and length > room:
        raise DataError(
            f"{length} tokens exceed the {room} positions of {checkpoint.id}. Give {option} "
            f"{room} or less"
        )


def build_calibration(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions
) -> Calibration:
    """Sample rows, and record how."""
    is_random = options.sampler == "random"
    ids = (sample_random if is_random else sample_packed)(rows, tokenizer, options)
    bos = "tokenizer" if is_random and tokenizer.bos_token_id is not None else "none"
    about: dict[str, Any] = {
        "source": rows.source,
        "rows": (rows.start, rows.stop),
        "sampler": options.sampler,
        "samples": options.samples,
        "length": options.length,
        "seed": options.seed if is_random else None,
        "bos": "every-sample" if options.bos_every_sample else bos,
        "tokens_fingerprint": tokens_fingerprint(ids),
    }
    return Calibration(ids=ids, info=CalibrationInfo(fingerprint=fingerprint(about), **about))


def sample_random(
    rows: Sequence[str], tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions
) -> torch.Tensor:
    """Windows at random places of random rows, int64 [samples, length]; no row is used twice.

    Rows are tokenized with special tokens, so a window has a BOS only when it starts where its row
    starts. With `bos_every_sample` they are tokenized without, and each window becomes [BOS] +
    window[:-1]. Source: Shortened LLaMA, arXiv:2402.02834.
    """
    samples, length = options.samples, options.length
    bos = _bos_of(tokenizer) if options.bos_every_sample else None
    random = Random(options.seed)
    windows: dict[int, list[int]] = {}
    is_long: dict[int, bool] = {}
    draws = 0
    while len(windows) < samples:
        if draws == len(rows):  # none found for long: look whether one is left
            _measure(rows, tokenizer, is_long, length=length, special=bos is None)
            if sum(is_long.values()) == len(windows):
                raise DataError(
                    f"only {len(windows)} of {len(rows)} rows have at least {length} tokens, "
                    f"{samples} samples need {samples} such rows. Use --sampler packed, a shorter "
                    "--length, fewer --samples, or data with longer rows"
                )
        draws += 1
        row = random.randint(0, len(rows) - 1)
        if row in windows or not is_long.get(row, True):
            continue
        tokens = _token_lists(tokenizer, [rows[row]], special=bos is None)[0]
        is_long[row] = len(tokens) >= length
        if is_long[row]:
            start = random.randint(0, len(tokens) - length)
            windows[row] = tokens[start : start + length]
            draws = 0
    ids = torch.tensor(list(windows.values()), dtype=torch.int64)
    return ids if bos is None else _with_bos(ids[:, :-1], bos)


def _measure(
    rows: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    is_long: dict[int, bool],
    *,
    length: int,
    special: bool,
) -> None:
    """Tokenize every row that is not in `is_long`, and note whether it has `length` tokens."""
    unseen = [row for row in range(len(rows)) if row not in is_long]
    for start in range(0, len(unseen), ROWS_PER_BATCH):
        batch = unseen[start : start + ROWS_PER_BATCH]
        lists = _token_lists(tokenizer, [rows[row] for row in batch], special=special)
        for row, tokens in zip(batch, lists, strict=True):
            is_long[row] = len(tokens) >= length


def sample_packed(
    rows: Sequence[str], tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions
) -> torch.Tensor:
    """The rows' tokens one after another, cut every `length`: the first [samples, length], int64.

    Rows are tokenized without special tokens and nothing is put between them. With
    `bos_every_sample` each piece is [BOS] and `length - 1` tokens. Reading stops as soon as there
    are enough.
    """
    samples = options.samples
    bos = _bos_of(tokenizer) if options.bos_every_sample else None
    new_tokens = options.length - (bos is not None)
    tokens: list[int] = []
    for start in range(0, len(rows), ROWS_PER_BATCH):
        texts = rows[start : start + ROWS_PER_BATCH]
        tokens.extend(chain.from_iterable(_token_lists(tokenizer, texts, special=False)))
        if len(tokens) >= samples * new_tokens:
            break
    else:
        raise DataError(
            f"all {len(rows)} rows give {len(tokens)} tokens, "
            f"{samples} samples need {samples * new_tokens}. "
            "Use a shorter --length, fewer --samples, or more data"
        )
    ids = torch.tensor(tokens[: samples * new_tokens], dtype=torch.int64).view(samples, new_tokens)
    return ids if bos is None else _with_bos(ids, bos)


def _with_bos(ids_ST: torch.Tensor, bos: int) -> torch.Tensor:
    """Each window with BOS before it."""
    return torch.cat([ids_ST.new_full((len(ids_ST), 1), bos), ids_ST], dim=1)


def _token_lists(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool
) -> list[list[int]]:
    """Token ids of each text. verbose=False: a row may be longer than the model's context."""
    lists: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=special, verbose=False
    ).input_ids
    return lists


def _bos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.bos_token_id is None:
        raise DataError(
            f"the tokenizer of '{tokenizer.name_or_path}' has no BOS to put before every sample. "
            "Leave out --bos-every-sample"
        )
    return int(tokenizer.bos_token_id)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segments:
    """Windows to measure on, and the BOS rule that was applied (not always the requested one)."""

    ids: torch.Tensor
    """int64 [windows, length]"""
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
    """Cut rows into windows of `length` tokens, a BOS included where the rule puts one.

    A tokenizer without BOS (Qwen2) always gets `none`. With `max_segments` only the rows that it
    takes are read, so the source may be larger than memory.
    """
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
            f"than one segment of {length}. Give a shorter {option} or more text"
        )
    count = min(count, max_segments or count)
    ids = torch.tensor(tokens[: count * new_tokens], dtype=torch.int64).view(count, new_tokens)
    if bos == "every":
        ids = _with_bos(ids, tokenizer.bos_token_id)
    return Segments(ids=ids, bos=bos)


def _tokens(
    rows: Sequence[str], tokenizer: PreTrainedTokenizerBase, enough: int | None
) -> list[int]:
    """The token ids of all rows, or of enough first rows that there are at least `enough` ids.

    The end of a text changes only its last few tokens, so the caller requests one more window.
    """
    read = len(rows) if enough is None else min(64, len(rows))
    while True:
        text = "\n\n".join(rows[:read])
        tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if read == len(rows) or (enough is not None and len(tokens) >= enough):
            return tokens
        read = min(2 * read, len(rows))
