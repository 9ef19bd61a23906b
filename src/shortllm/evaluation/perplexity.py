"""Perplexity by a stated protocol, and samples of what a model writes.

Rows are joined by a blank line, tokenized without special tokens as one text, and cut into segments
that do not overlap; the remainder is dropped. 128 tokens are the length in Shortened LLaMA
(arXiv:2402.02834), 2,048 the usual one.

    bos="first"   [BOS] t0 t1 | t2 t3 t4 | ...      (the paper's: one BOS before the whole text)
    bos="every"   [BOS] t0 t1 | [BOS] t2 t3 | ...   (Gemma predicts nothing sensible without)
    bos="none"    t0 t1 t2 | t3 t4 t5 | ...

Perplexity is exp of the mean next-token NLL over all predictions inside segments. The text takes
the walk that also scores blocks, here with nothing removed, so a model larger than memory can be
measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

from shortllm.checkpoint.config import context_length
from shortllm.data.calibration import tokens_fingerprint
from shortllm.data.rows import Rows
from shortllm.errors import CheckpointError, DataError
from shortllm.evaluation.options import TEMPERATURE, TOP_K, TOP_P, Perplexity, Samples
from shortllm.model.decoder import Decoder
from shortllm.model.hidden_states import StreamMemory
from shortllm.model.metrics import perplexity
from shortllm.model.walk import NOTHING, mean_nlls
from shortllm.runtime import Advance, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["first", "every", "none"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segments:
    """Windows to measure on, and the BOS rule that was applied (not always the requested one)."""

    ids: torch.Tensor
    """int64 [windows, length]"""
    bos: Bos

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationText:
    """One text cut into segments, with where it came from."""

    rows: Rows
    held_out: bool
    """Whether these rows were kept apart from calibration rows of the same source."""
    segments: Segments


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
        ids = F.pad(ids, (1, 0), value=tokenizer.bos_token_id)
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
