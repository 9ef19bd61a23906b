"""The probe of one model: likelihoods of all choices, and greedy answers to open requests.

What greedy decoding would write needs no generation: it writes an answer exactly if each of its
tokens is the likeliest one after those before it. So one pass over the rows below gives both what
is chosen and what is written, also for a streamed model.

    row     prompt + one choice, tokenized as one text, padded on the right
    scored  the tokens of the choice
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from shortllm.checkpoint.config import context_length
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.data.chat import prompt_of
from shortllm.errors import ShortLLMError
from shortllm.evaluation.harness import require_numbers
from shortllm.evaluation.options import EvaluationOptions
from shortllm.evaluation.probe.items import CAPABILITIES, CHOICES, OPEN, VERSION, items
from shortllm.evaluation.probe.items import items_fingerprint as fingerprint_of_items
from shortllm.evaluation.probe.record import Answers, CapabilityScore, Probe, Share
from shortllm.model import Session
from shortllm.model.decoder import Decoder
from shortllm.model.metrics import next_token_nll
from shortllm.model.walk import NOTHING, walk, walk_flops
from shortllm.progress import progress
from shortllm.runtime import ALONE, Ranks, quiet_transformers

log = logging.getLogger(__name__)

SMALLEST = 50_000_000
"""Parameters from which a run probes a model by itself; smaller ones solve hardly anything."""

ROWS = 64
"""Rows of about the same length that are padded to the same length."""

NEW_TOKENS = 96
"""Most tokens of an open answer."""

REPEATED_GRAM, DISTINCT_GRAM = 4, 2
"""Tokens of which repetition and variety are counted."""


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt with one of its choices."""

    number: int
    ids: list[int]
    start: int
    """Where the choice begins."""


def with_probe(options: EvaluationOptions, checkpoint: Checkpoint) -> EvaluationOptions:
    """The options of a run, with the probe where the model is large enough for it."""
    wanted = options.probe
    if wanted is None:
        wanted = checkpoint.info().parameters >= SMALLEST and _room(checkpoint) >= 0
    return options.model_copy(update={"probe": wanted})


def check_probe(checkpoint: Checkpoint, options: EvaluationOptions) -> None:
    """Refuse a model with fewer positions than the longest exercise has tokens."""
    if options.probe and (room := _room(checkpoint)) < 0:
        raise ShortLLMError(
            f"--probe: the longest exercise has {-room:,} tokens more than {checkpoint.id} has "
            "positions. Leave --probe out"
        )


def _room(checkpoint: Checkpoint) -> float:
    """Positions that the longest exercise leaves."""
    positions = context_length(checkpoint.config)
    if positions is None:
        return float("inf")
    return positions - max(len(row.ids) for row in rows_of(load_tokenizer(checkpoint)))


def rows_of(tokenizer: Any) -> list[Row]:
    """All choices of all exercises with their prompts, in order."""
    prompts = [item.prompt for item in items()]
    texts = [item.prompt + choice for item in items() for choice in item.choices]
    starts = [len(ids) for ids in tokenizer(prompts).input_ids]
    return [
        Row(number, ids, starts[number // CHOICES])
        for number, ids in enumerate(tokenizer(texts).input_ids)
    ]


def measure_probe(
    decoder: Decoder,
    tokenizer: Any,
    *,
    name: str,
    chat: bool = False,
    system: str | None = None,
    session: Session,
    ranks: Ranks = ALONE,
) -> Probe:
    """Put all exercises and open requests to a model; `name` is shown on the progress bar.

    Args:
        chat: whether open requests are put into the chat template.
        system: the system message before them.
    """
    nlls, greedy = _scored(decoder, rows_of(tokenizer), name, session, ranks)
    scores = []
    for capability in CAPABILITIES:
        chosen, written = [], []
        for number, item in enumerate(items()):
            if item.capability == capability:
                of_item = slice(number * CHOICES, (number + 1) * CHOICES)
                chosen.append(int(nlls[of_item].argmin()) == item.answer)
                written.append(bool(greedy[of_item][item.answer]))
        scores.append(
            CapabilityScore(
                capability=capability,
                items=len(chosen),
                written=Share.of(written),
                chosen=Share.of(chosen),
            )
        )
    answers = None
    if any(ranks.gather(decoder.streamed)):  # by the memory that each process has left
        log.info("no open answers of %s: a streamed model would be read once per token", name)
    else:
        answers = _answers(decoder, tokenizer, chat=chat, system=system, ranks=ranks)
    return Probe(
        version=VERSION,
        items_fingerprint=fingerprint_of_items(),
        capabilities=scores,
        repetition=fmean(answers.repeated) if answers else None,
        answers=answers,
    )


# ---- exercises


def _scored(
    decoder: Decoder, rows: Sequence[Row], name: str, session: Session, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Of each row the NLL of its choice, and whether greedy decoding writes it."""
    own = sorted(rows, key=lambda row: len(row.ids))[ranks.rank :: ranks.count]
    batches = list(_batches(own, len(own) if decoder.streamed else ROWS))
    work = sum(
        walk_flops(decoder, [NOTHING], len(ids_BT), ids_BT.shape[1]) for _, ids_BT in batches
    )
    found: dict[int, tuple[float, bool]] = {}
    with progress(f"probe of {name}", work) as advance:
        for batch, ids_BT in batches:
            scorer = _Scorer(batch, ids_BT)
            walk(
                decoder, ids_BT, [NOTHING], consume=scorer, memory=session.memory(), advance=advance
            )
            found |= scorer.found()
    everything = {number: one for part in ranks.gather(found) for number, one in part.items()}
    nlls, greedy = zip(*(everything[row.number] for row in rows), strict=True)
    return torch.tensor(nlls), torch.tensor(greedy)


def _batches(rows: Sequence[Row], size: int) -> Iterator[tuple[Sequence[Row], Tensor]]:
    for start in range(0, len(rows), max(1, size)):
        batch = rows[start : start + size]
        longest = max(len(row.ids) for row in batch)
        padded = [row.ids + [0] * (longest - len(row.ids)) for row in batch]
        yield batch, torch.tensor(padded)


class _Scorer:
    """Takes the logits of a walk and keeps what the choices need."""

    def __init__(self, batch: Sequence[Row], ids_BT: Tensor) -> None:
        self.batch, self.predictions = batch, ids_BT.shape[1] - 1
        place_T = torch.arange(1, ids_BT.shape[1])
        start_B = torch.tensor([row.start for row in batch])[:, None]
        stop_B = torch.tensor([len(row.ids) for row in batch])[:, None]
        self.is_scored_N = ((place_T >= start_B) & (place_T < stop_B)).flatten()
        self.nll_B = torch.zeros(len(batch), dtype=torch.float64)
        self.wrong_B = torch.zeros(len(batch), dtype=torch.int64)
        self.seen = 0

    def __call__(self, m: int, logits_NV: Tensor, first_NV: Tensor, target_N: Tensor) -> None:
        """Take the next slice of predictions, in the order of the rows."""
        place_N = torch.arange(self.seen, self.seen + len(target_N))
        self.seen += len(target_N)
        kept_N = self.is_scored_N[place_N]
        if not kept_N.any():
            return
        row_N = place_N[kept_N] // self.predictions
        on_device = kept_N.to(logits_NV.device)
        logits_NV, target_N = logits_NV[on_device], target_N[on_device]
        require_numbers(target_N, logits_NV)
        self.nll_B.index_add_(0, row_N, next_token_nll(logits_NV, target_N).cpu().double())
        self.wrong_B.index_add_(0, row_N, (logits_NV.argmax(-1) != target_N).long().cpu())

    def found(self) -> dict[int, tuple[float, bool]]:
        """NLL of the choice, and whether each of its tokens was the likeliest, by row number."""
        values = zip(self.batch, self.nll_B.tolist(), self.wrong_B.tolist(), strict=True)
        return {row.number: (nll, wrong == 0) for row, nll, wrong in values}


# ---- open answers


def _answers(
    decoder: Decoder, tokenizer: Any, *, chat: bool, system: str | None, ranks: Ranks
) -> Answers:
    """Greedy answers to the open requests, which all processes share."""
    model: Any = decoder.model
    every = [prompt_of(text, tokenizer, model, chat=chat, system=system) for text in OPEN]
    longest = max(len(prompt.ids) for prompt in every)
    room = context_length(model.config)
    new_tokens = NEW_TOKENS if room is None else max(1, min(NEW_TOKENS, room - longest))
    prompts = every[ranks.rank :: ranks.count]
    written: list[list[int]] = []
    if prompts:
        blank = [longest - len(prompt.ids) for prompt in prompts]
        ids_BT = torch.tensor(
            [[0] * n + prompt.ids for n, prompt in zip(blank, prompts, strict=True)]
        )
        is_text_BT = torch.arange(longest) >= torch.tensor(blank)[:, None]
        with quiet_transformers(), torch.no_grad():
            output = model.generate(
                input_ids=ids_BT.to(decoder.device),
                attention_mask=is_text_BT.long().to(decoder.device),
                do_sample=False,
                repetition_penalty=1.0,  # some checkpoints ask for one, which hides repetition
                **prompts[0].limits(new_tokens),
            )
        written = [
            prompt.written(ids)
            for prompt, ids in zip(prompts, output[:, longest:].tolist(), strict=True)
        ]
    parts = [iter(part) for part in ranks.gather(written)]
    everything = [next(parts[number % ranks.count]) for number in range(len(OPEN))]
    return Answers(
        texts=tokenizer.batch_decode(everything, skip_special_tokens=True),
        new_tokens=new_tokens,
        repeated=[repeated_share(ids) for ids in everything],
        distinct=distinct_share(everything),
    )


def repeated_share(ids: Sequence[int]) -> float:
    """The share of 4-grams that occurred before in the same answer; 0 without any."""
    grams = _grams(ids, REPEATED_GRAM)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_share(answers: Sequence[Sequence[int]]) -> float:
    """Different 2-grams of all answers, as a share of all their 2-grams; 1 without any."""
    grams = [gram for ids in answers for gram in _grams(ids, DISTINCT_GRAM)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _grams(ids: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(ids[place : place + size]) for place in range(len(ids) - size + 1)]
