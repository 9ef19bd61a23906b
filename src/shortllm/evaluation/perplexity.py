"""What a model can still do: perplexity by a stated protocol, and samples of what it writes.

Perplexity is exp of the mean next-token NLL over all predictions inside segments that do not
overlap (`shortllm.segments` makes them). The text is carried by the walk that also scores blocks,
here with nothing removed, so that a model is measured that does not fit into memory.
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
from shortllm.runtime import Advance


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
    """Perplexity of a model on one text.

    Args:
        advance: called with the floating-point operations done since its last call.
    Raises:
        CheckpointError: the loss is NaN or beyond all measure, so that there is no perplexity.
    """
    ids_BT = text.segments.ids
    [nll] = mean_nlls(decoder, ids_BT, [NOTHING], memory=memory, advance=advance)
    return as_perplexity(text, nll)


def as_perplexity(text: EvaluationText, nll: float) -> Perplexity:
    """A mean NLL measured on a text, with the protocol.

    Raises:
        CheckpointError: the loss is NaN or beyond all measure, so that there is no perplexity.
    """
    ids_ST = text.segments.ids
    if not math.isfinite(perplexity(nll)):
        raise CheckpointError(
            f"the model's loss on {text.rows.source} is {nll}, which is no perplexity. "
            "Try --dtype float32"
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
    continuations: int = 5,
    new_tokens: int = 128,
    seed: int = 0,
) -> Samples:
    """Sampled continuations of a prompt: top-k 50, top-p 0.95, temperature 1; the same for a seed.

    The end-of-text token is not produced, so that every continuation has `new_tokens` tokens.
    """
    from shortllm.runtime import quiet_transformers

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
            pad_token_id=_pad_token(tokenizer),
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


def _pad_token(tokenizer: Any) -> int:
    """Any id will do: all sequences have one length, nothing is padded."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    return 0
