"""Text with a draft: counts, equality and near ties, `bench --draft`, lines for other programs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PROMPT = torch.arange(1, 8)
NEW = 24


def without(name: str, removed: list[int], dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model, and the same without some blocks."""
    from shortllm.model.bypass import bypassed  # noqa: F401

    raise NotImplementedError


def best(model: Any, ids: list[int]) -> int:
    """The likeliest next token, by a forward of the whole text."""
    with torch.inference_mode():
        return int(model(torch.tensor([ids])).logits[0, -1].argmax())


def plain_loop(
    model: Any, draft: Any, prompt_T: Tensor, new_tokens: int, draft_tokens: int
) -> tuple[list[int], list[int], int]:
    """Speculative decoding without a cache: the new tokens, those of each step, those drafted."""
    ids, start = prompt_T.tolist(), len(prompt_T)
    kept, drafted = [], 0
    while (left := start + new_tokens - len(ids)) > 0:
        proposed: list[int] = []
        while len(proposed) < min(draft_tokens, left - 1):
            proposed.append(best(draft, ids + proposed))
        drafted += len(proposed)
        added: list[int] = []
        while True:
            added.append(best(model, ids + added))
            if proposed[len(added) - 1 : len(added)] != added[-1:]:
                break
        ids += added
        kept.append(len(added))
    return ids[start:], kept, drafted
