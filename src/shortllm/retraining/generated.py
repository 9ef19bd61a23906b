"""Documents that the teacher writes itself, to be learnt from: what it says it can be taught.

Each begins with the token that begins a text and is sampled at temperature 1 from the whole
distribution, so that documents are distributed as the teacher believes text to be.
Source: arXiv:2602.01997, self-generated data recovers generation best.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from shortllm.errors import DataError
from shortllm.retraining.documents import Document

if TYPE_CHECKING:
    from shortllm.checkpoint.source import Checkpoint
    from shortllm.retraining.options import RetrainOptions
    from shortllm.session import Session

WRITTEN_AT_ONCE = 32


def written_by(
    session: Session, teacher: Checkpoint, tokenizer: Any, options: RetrainOptions
) -> Iterator[Document]:
    """As many documents as were asked for, or as the steps take; the same for a seed.

    Raises:
        DataError: the tokenizer has no token that begins a text.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise DataError(
            f"{teacher.id} has neither a BOS nor an EOS token to begin a text with. Give text as "
            "--data"
        )
    assert options.length is not None
    count = options.generate or (options.max_steps or 0) * options.batch
    model = session.decoder(teacher).model
    for first in range(0, count, WRITTEN_AT_ONCE):
        wanted = min(WRITTEN_AT_ONCE, count - first)
        for ids in _sampled(model, start, wanted, options, seed=options.seed + first):
            end = tokenizer.eos_token_id
            stop = ids.index(end, 1) + 1 if end in ids[1:] else len(ids)
            yield Document(ids[:stop])


def _sampled(
    model: Any, start: int, count: int, options: RetrainOptions, *, seed: int
) -> list[list[int]]:
    from shortllm.model.loading import quiet_transformers

    device = next(model.parameters()).device
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        quiet_transformers(),
    ):
        torch.manual_seed(seed)
        ids = torch.full((count, 1), start, device=device)
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_length=options.length,
            pad_token_id=start,
        )
    rows: list[list[int]] = written.tolist()
    return rows
