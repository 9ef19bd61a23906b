"""Perplexity by a stated protocol, and samples of what a model writes.

Perplexity is exp of the mean next-token NLL over all predictions inside segments that do not
overlap (data/texts.py cuts them). The text takes the walk that also scores blocks, here with
nothing removed, so a model larger than memory can be measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from shortllm.checkpoint.config import context_length
from shortllm.data.calibration import tokens_fingerprint
from shortllm.data.rows import Rows
from shortllm.data.texts import Segments
from shortllm.errors import CheckpointError
from shortllm.evaluation.options import TEMPERATURE, TOP_K, TOP_P, Perplexity, Samples
from shortllm.model.decoder import Decoder
from shortllm.model.hidden_states import StreamMemory
from shortllm.model.metrics import perplexity
from shortllm.model.walk import NOTHING, mean_nlls
from shortllm.runtime import Advance, quiet_transformers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationText:
    """One text cut into segments, with where it came from."""

    rows: Rows
    held_out: bool
    """Whether these rows were kept apart from calibration rows of the same source."""
    segments: Segments


def measure_perplexity(
    decoder: Decoder,
    text: EvaluationText,
    *,
    memory: StreamMemory | None = None,
    advance: Advance = lambda work: None,
) -> Perplexity:
    """Perplexity of a model on one text; `advance` gets floating-point operations."""
    ids = text.segments.ids
    [nll] = mean_nlls(decoder, ids, [NOTHING], memory=memory, advance=advance)
    return as_perplexity(text, nll)


def as_perplexity(text: EvaluationText, nll: float) -> Perplexity:
    """A mean NLL measured on a text, with its protocol."""
    ids_ST = text.segments.ids
    if not math.isfinite(perplexity(nll)):
        raise CheckpointError(
            f"the model's loss on {text.rows.source} is {nll}, so its perplexity is not "
            "finite. Try --dtype float32"
        )
    return Perplexity(
        source=text.rows.source,
        rows=(text.rows.start, text.rows.stop),
        split="held-out" if text.held_out else None,
        length=ids_ST.shape[1],
        bos=text.segments.bos,
        segments=len(ids_ST),
        predictions=ids_ST.shape[0] * (ids_ST.shape[1] - 1),
        tokens_fingerprint=tokens_fingerprint(ids_ST),
        nll=nll,
        perplexity=perplexity(nll),
    )


def generate_samples(
    model: Any,
    tokenizer: Any,
    *,
    prompt: str,
    continuations: int,
    new_tokens: int,
    seed: int,
) -> Samples:
    """Sampled continuations of a prompt, the same for a seed.

    The end-of-text token is not produced, so that every continuation has `new_tokens` tokens.
    """
    device = next(model.parameters()).device
    encoded = tokenizer(prompt, return_tensors="pt").to(device)
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    room = context_length(model.config)
    if room is not None:
        new_tokens = max(1, min(new_tokens, room - ids.shape[1]))
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        quiet_transformers(),
    ):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=TOP_K,
            top_p=TOP_P,
            temperature=TEMPERATURE,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            num_return_sequences=continuations,
            pad_token_id=0,  # never used: all sequences have the same length
        )
    texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return Samples(
        prompt=prompt,
        texts=texts,
        new_tokens=new_tokens,
        top_k=TOP_K,
        top_p=TOP_P,
        temperature=TEMPERATURE,
        seed=seed,
    )
