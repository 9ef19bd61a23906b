"""Evaluation text as segments of token ids: the perplexity protocol of Shortened LLaMA.

Rows are joined by a blank line, tokenized without special tokens as one text, and cut into segments
that do not overlap; the remainder is dropped. 128 tokens are the paper's length, 2,048 the usual.

    bos="first"   [BOS] t0 t1 | t2 t3 t4 | ...      (the paper's: one BOS before the whole text)
    bos="every"   [BOS] t0 t1 | [BOS] t2 t3 | ...   (Gemma is meaningless without)
    bos="none"    t0 t1 t2 | t3 t4 t5 | ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from shortllm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
