"""Text that a model writes itself, sampled from its own distribution.

As calibration text it is near what the model will write when it is used, in any language or form
that its users prompt it with. It answers conversations of a source, or continues the beginnings of
texts; the tenth with the highest perplexity by the model itself is left out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from shortllm.data.chat import Chat, Span, ends_of_turn, template_of
from shortllm.data.rows import Rows
from shortllm.data.shapes import Row
from shortllm.runtime import quiet_transformers

if TYPE_CHECKING:
    from shortllm.model.decoder import Decoder

VERSION = 1
"""Of how text is written: with another one, text of an earlier call is written again."""

WRITTEN_AT_ONCE = 32
"""Documents that a model writes in one batch."""

LEFT_OUT = 0.1
"""Fraction of the written documents with the highest perplexity, which is left out."""

BEGINNING = 8
"""The beginning of a text that is continued has a sample's length divided by this."""


def sampled(
    model: Any,
    starts: Sequence[list[int]],
    *,
    length: int,
    seed: int,
    ends: Collection[int],
    temperature: float = 1.0,
) -> list[list[int]]:
    """Each beginning with what the model writes after it, sampled from the whole distribution: up
    to `length` tokens or an end, which is kept; without ends, all of `length` tokens."""
    found = continued(
        model, starts, new_tokens=length - min(map(len, starts)), seed=seed, ends=ends,
        temperature=temperature,
    )  # fmt: skip
    return [ids[:length] for ids in found]


def continued(
    model: Any,
    starts: Sequence[list[int]],
    *,
    new_tokens: int,
    seed: int,
    ends: Collection[int],
    temperature: float = 1.0,
) -> list[list[int]]:
    """The same with up to `new_tokens` tokens after each beginning, or all without ends."""
    longest = max(map(len, starts))
    pad = starts[0][0]
    rows = [[pad] * (longest - len(start)) + start for start in starts]
    masks = [[0] * (longest - len(start)) + [1] * len(start) for start in starts]
    device = model.device
    cuda = [device] if device.type == "cuda" else []
    stops = sorted(ends) or model.generation_config.eos_token_id  # without ends, none is sampled
    with torch.random.fork_rng(devices=cuda), quiet_transformers(), plain_rules(model):
        torch.manual_seed(seed)
        written = model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(masks, device=device),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=temperature,
            max_new_tokens=new_tokens,
            pad_token_id=pad,
            eos_token_id=stops,
            min_new_tokens=None if ends else new_tokens,
        )
    found = []
    for start, ids in zip(starts, written.tolist(), strict=True):
        text = ids[longest:]
        stop = next((n + 1 for n, one in enumerate(text) if one in ends), len(text))
        found.append([*start, *text[:stop]])
    return found


@contextmanager
def plain_rules(model: Any, **rules: Any) -> Iterator[None]:
    """Generate by these rules, and not by those of generation_config.json, such as a repetition
    penalty."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(**rules)
    try:
        yield
    finally:
        model.generation_config = own


def prompts(rows: Rows, order: Iterator[int], tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Beginnings of documents, from rows in an order.

    A conversation up to the first answer; of a text the first tokens. Rows that leave no room for
    half a sample are passed over.
    """
    chat = Chat(tokenizer, template_of(tokenizer))
    for number in order:
        row: Row = rows[number]
        if isinstance(row, str):
            ids = tokenizer(row, verbose=False).input_ids[: max(1, length // BEGINNING)]
            if len(ids) == max(1, length // BEGINNING):
                yield ids
        else:
            roles = [message["role"] for message in row]
            asked = row[: roles.index("assistant")]
            ids = chat.prompt_ids(asked) if asked else []
            if 0 < len(ids) <= length // 2:
                yield ids


def written_documents(
    decoder: Decoder,
    tokenizer: Any,
    rows: Rows,
    order: Iterator[int],
    *,
    length: int,
    seed: int,
    temperature: float,
) -> Iterator[list[tuple[list[int], list[Span]]]]:
    """All documents written so far, without the worst ones, after each batch.

    Of each document the ids, and the span of those that the model wrote.
    """
    found: list[tuple[float, list[int], list[Span]]] = []
    begun = prompts(rows, order, tokenizer, length)
    ends = set[int]()  # the continuation of a text has none
    if not isinstance(rows[0], str):
        ends = ends_of_turn(Chat(tokenizer, template_of(tokenizer)), decoder.model)
    while starts := list(islice(begun, WRITTEN_AT_ONCE)):
        texts = sampled(
            decoder.model, starts, length=length, seed=seed + len(found), ends=ends,
            temperature=temperature,
        )  # fmt: skip
        for start, ids in zip(starts, texts, strict=True):
            span = (len(start), len(ids))
            found.append((_own_nll(decoder, ids, span), ids, [span]))
        kept = len(found) - math.ceil(LEFT_OUT * len(found))
        worst = sorted(nll for nll, _, _ in found)[kept - 1]
        yield [(ids, spans) for nll, ids, spans in found if nll <= worst]


def _own_nll(decoder: Decoder, ids: list[int], span: Span) -> float:
    """Mean NLL of what a model wrote, by the model itself."""
    from shortllm.model.walk import NOTHING, mean_losses

    counted_BT = torch.zeros(1, len(ids), dtype=torch.bool)
    counted_BT[0, span[0] : span[1]] = True
    [nll] = mean_losses(decoder, torch.tensor([ids]), [NOTHING], counted_BT=counted_BT)
    return nll
