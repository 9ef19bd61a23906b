"""What the intact model accepts of a draft, for every token of a text: of many drafts in one walk,
or of one that has weights of its own.

Shapes: M drafts, B texts, T tokens each, N predictions of one slice, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from shortllm.data.calibration import Calibration
from shortllm.drafting.gain import tokens_per_step
from shortllm.drafting.options import Accepted
from shortllm.model.decoder import Decoder
from shortllm.model.hidden_states import StreamMemory
from shortllm.model.metrics import rejected
from shortllm.model.walk import NOTHING, walk
from shortllm.progress import Advance

Texts = list[list[float]]
"""Of each text the probability that each of its tokens is accepted."""


def accepted_without(
    decoder: Decoder,
    text: Calibration,
    removals: Sequence[Collection[int]],
    temperature: float,
    *,
    memory: StreamMemory | None = None,
    advance: Advance = lambda work: None,
) -> list[Texts]:
    """What is accepted of each draft that lacks some blocks of the intact model."""
    pieces: list[list[Tensor]] = [[] for _ in removals]

    def consume(m: int, logits_NV: Tensor, first_NV: Tensor, target_N: Tensor) -> None:
        if m:
            pieces[m - 1].append(1 - rejected(first_NV, logits_NV, temperature).cpu())

    with_intact = [NOTHING, *removals]
    walk(decoder, text.ids, with_intact, consume=consume, memory=memory, advance=advance)
    samples = len(text.ids)
    return [_by_text(torch.cat(found).reshape(samples, -1), text) for found in pieces]


@torch.inference_mode()
def accepted_from(model: Any, draft: Any, text: Calibration, temperature: float) -> Texts:
    """What a model accepts of another one's drafts, text by text."""
    rows = []
    for ids_T in text.ids:
        ids_BT = ids_T[None].to(model.device)
        p_NV, q_NV = (
            one(input_ids=ids_BT, use_cache=False).logits[0, :-1] for one in (model, draft)
        )
        rows.append(1 - rejected(p_NV, q_NV, temperature).cpu())
    return _by_text(torch.stack(rows), text)


def _by_text(accepted_BT: Tensor, text: Calibration) -> Texts:
    """Of all predictions those that count."""
    counted_BT = text.tokens_counted()[:, 1:]
    pairs = zip(accepted_BT, counted_BT, strict=True)
    return [accepted_T[counted_T].tolist() for accepted_T, counted_T in pairs]


def summed_up(texts: Texts, most: int) -> Accepted:
    """The mean, and the tokens of a step for every number of drafted tokens up to the most."""
    values = [one for text in texts for one in text]
    return Accepted(
        acceptance=sum(values) / len(values),
        tokens_per_step=[tokens_per_step(texts, length) for length in range(1, most + 1)],
    )
