"""How samples of equal length are cut from rows of text and from conversations.

Each sampler gives ids `[samples, length]`, int64; those by which not all tokens count also give
which do, bool.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from random import Random
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from shortllm.data.chat import Chat, Span, row_texts, template_of
from shortllm.data.options import SampledText
from shortllm.data.rows import Rows
from shortllm.data.shapes import Row
from shortllm.errors import DataError
from shortllm.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from shortllm.model.decoder import Decoder

ROWS_PER_BATCH = 1000
"""Rows tokenized in one call when many are needed: enough to use all cores, small in memory."""

Documents = Iterable[tuple[list[int], list[Span]]]
"""Of each document the token ids, and the spans of those that count."""


def sample_answers(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, options: SampledText
) -> tuple[torch.Tensor, torch.Tensor]:
    """Conversations of which what the assistant says counts: ids and what counts, `[samples,
    length]`."""
    chat = Chat(tokenizer, template_of(tokenizer))

    def documents() -> Iterator[tuple[list[int], list[Span]]]:
        for number in order_of(rows, options):
            row, place = rows[number], f"row {rows.start + number} of '{rows.source}'"
            if isinstance(row, str):
                raise DataError(f"{place} is a text, and the first row is a conversation")
            yield from chat.documents([row], [place])

    found = pack(documents(), options, _bos_of(tokenizer) if options.bos_every_sample else None)
    if len(found) < options.samples:
        raise DataError(
            f"the {len(rows)} conversations of {rows.source} fill {len(found)} samples that begin "
            f"with one whose answer lies within {options.length} tokens, and {options.samples} "
            "were requested. Use fewer --samples, a longer --length, or more data"
        )
    return _stacked(found)


def sample_written(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    options: SampledText,
    writer: Decoder,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Text that the model writes, the rows being prompts: ids, and where only answers count, which
    tokens the model wrote."""
    from shortllm.data.generated import written_documents

    bos = _bos_of(tokenizer) if options.bos_every_sample else None
    found: list[tuple[list[int], list[bool]]] = []
    with progress("writing text to score on", float(options.samples)) as advance:
        for documents in written_documents(
            writer, tokenizer, rows, order_of(rows, options), length=options.length,
            seed=options.seed, temperature=options.temperature,
        ):  # fmt: skip
            done, found = len(found), pack(documents, options, bos)
            advance(float(max(0, len(found) - done)))
            if len(found) == options.samples:
                break
        else:
            raise DataError(
                f"from the {len(rows)} rows of {rows.source}, the model wrote {len(found)} samples "
                f"of {options.length} tokens, and {options.samples} were requested. Use fewer "
                "--samples, or give more prompts, which must fit into half of --length"
            )
    ids, counted = _stacked(found)
    return ids, counted if options.only_answers else None


def pack(
    documents: Documents, options: SampledText, bos: int | None
) -> list[tuple[list[int], list[bool]]]:
    """Up to `samples` samples of `length` tokens, and which of them count.

    A sample begins with a document of which something counts within the sample, and others follow
    until it is full; the end of the last one is cut off. With `bos` each begins with that token.
    """
    samples: list[tuple[list[int], list[bool]]] = []
    ids: list[int] = []
    counted: list[bool] = []
    for tokens, spans in documents:
        own = [False] * len(tokens)
        for start, stop in spans:
            own[start:stop] = [True] * (stop - start)
        if not ids:
            if bos is not None and tokens[:1] != [bos]:
                tokens, own = [bos, *tokens], [False, *own]
            if not any(own[1 : options.length]):
                continue
        ids, counted = ids + tokens, counted + own
        if len(ids) >= options.length:
            samples.append((ids[: options.length], counted[: options.length]))
            ids, counted = [], []
        if len(samples) == options.samples:
            break
    return samples


def _stacked(samples: list[tuple[list[int], list[bool]]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, counted = zip(*samples, strict=True)
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(counted)


def order_of(rows: Rows, options: SampledText) -> Iterator[int]:
    """Every row once: in a seeded random order, or one after the other."""
    if options.sampler == "packed":
        yield from range(len(rows))
        return
    random, seen = Random(options.seed), set[int]()
    while len(seen) < len(rows):
        number = random.randrange(len(rows))
        if number not in seen:
            seen.add(number)
            yield number


def sample_random(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: SampledText
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
    return ids if bos is None else F.pad(ids[:, :-1], (1, 0), value=bos)


def _measure(
    rows: Sequence[Row],
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
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: SampledText
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
    return ids if bos is None else F.pad(ids, (1, 0), value=bos)


def _token_lists(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, special: bool
) -> list[list[int]]:
    """Token ids of each row. verbose=False: a row may be longer than the model's context."""
    lists: list[list[int]] = tokenizer(
        row_texts(rows, tokenizer), add_special_tokens=special, verbose=False
    ).input_ids
    return lists


def _bos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.bos_token_id is None:
        raise DataError(
            f"the tokenizer of '{tokenizer.name_or_path}' has no BOS to put before every sample. "
            "Leave out --bos-every-sample"
        )
    return int(tokenizer.bos_token_id)
