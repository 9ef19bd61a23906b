"""Text with a draft: counts, equality and near ties, `bench --draft`, lines for other programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build
from torch import Tensor

from shortllm.benchmark.assisted import (
    Difference,
    first_difference,
    generate_assisted,
    generate_plain,
)
from shortllm.errors import ShortLLMError

PROMPT = torch.arange(1, 8)
NEW = 24


def pair(name: str, noise: float = 0.1) -> tuple[Any, Any]:
    """A model and a draft that often agrees with it: the same with noise on its weights."""
    model, draft = build(name), build(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in draft.parameters():
            if weight.ndim > 1:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    return model.eval(), draft.eval()


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


@pytest.mark.parametrize("draft_tokens", [1, 3, 6])
@pytest.mark.parametrize("name", ["llama", "granite", "gpt2", "gemma", "falcon-new"])
def test_counts_are_those_of_a_plain_loop(name: str, draft_tokens: int) -> None:
    model, draft = pair(name)
    ids, kept, drafted = plain_loop(model, draft, PROMPT, NEW, draft_tokens)
    found = generate_assisted(model, draft, PROMPT, NEW, draft_tokens=draft_tokens)
    assert (found.ids, found.kept, found.drafted) == (ids, kept, drafted)
    assert found.steps == len(kept) and found.accepted == NEW - len(kept)
    assert 0 < found.accepted <= drafted
    alone = generate_plain(model, PROMPT, NEW)
    assert alone.ids == ids and (alone.steps, alone.accepted, alone.drafted) == (NEW, 0, 0)
    assert first_difference(model, PROMPT, alone.ids, found.ids) is None


def test_a_draft_that_is_the_model_itself_is_accepted_as_a_whole() -> None:
    model, draft = pair("llama", noise=0)
    found = generate_assisted(model, draft, PROMPT, NEW, draft_tokens=5)
    assert found.kept == [6, 6, 6, 6] and found.drafted == 20


def test_rules_of_generation_config_have_no_effect_and_stay() -> None:
    model, draft = pair("llama")
    expected = generate_assisted(model, draft, PROMPT, NEW, draft_tokens=4)
    for one, penalty in ((model, 3.0), (draft, 5.0)):
        one.generation_config.repetition_penalty = penalty
        one.generation_config.eos_token_id = expected.ids[0]
    draft.generation_config.assistant_confidence_threshold = 0.999
    found = generate_assisted(model, draft, PROMPT, NEW, draft_tokens=4)
    assert (found.ids, found.kept) == (expected.ids, expected.kept)
    assert draft.generation_config.repetition_penalty == 5.0
    assert not model._forward_hooks


def test_text_may_end_before() -> None:
    model, draft = pair("llama")
    whole = generate_plain(model, PROMPT, NEW).ids
    end = next(n for n in range(5, NEW) if whole[n] not in whole[:n])
    alone = generate_plain(model, PROMPT, NEW, ends=[whole[end]])
    found = generate_assisted(model, draft, PROMPT, NEW, draft_tokens=4, ends=[whole[end]])
    assert alone.ids == found.ids == whole[: end + 1]
    assert sum(found.kept) == len(found.ids) and found.steps < alone.steps


def test_sampled_text_has_the_acceptance_of_the_two_distributions() -> None:
    """The chance that a drafted token is accepted is the overlap of the two distributions."""
    model, draft = pair("llama", noise=0.3)
    start = PROMPT.tolist()
    with torch.inference_mode():
        p_V, q_V = (
            (one(torch.tensor([start])).logits[0, -1] / 2.0).softmax(-1) for one in (model, draft)
        )
    overlap = float(torch.minimum(p_V, q_V).sum())
    texts = [
        generate_assisted(model, draft, PROMPT, 2, draft_tokens=1, temperature=2.0, seed=seed)
        for seed in range(300)
    ]
    rate = sum(one.kept[0] == 2 for one in texts) / len(texts)
    assert abs(rate - overlap) < 4 * (overlap * (1 - overlap) / len(texts)) ** 0.5
    again = generate_assisted(model, draft, PROMPT, 2, draft_tokens=1, temperature=2.0, seed=7)
    assert again.ids == texts[7].ids
    assert (
        generate_plain(model, PROMPT, 9, temperature=2.0, seed=1).ids
        != generate_plain(model, PROMPT, 9, temperature=2.0, seed=2).ids
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_is_a_near_tie_only_within_rounding(dtype: torch.dtype) -> None:
    model: Any = build("llama").to(dtype)
    ids = generate_plain(model, PROMPT, 6).ids
    with torch.inference_mode():
        logits_V = model(torch.tensor([[*PROMPT.tolist(), *ids[:3]]])).logits[0, -1].float()
    second, worst = logits_V.topk(2).indices[1].item(), logits_V.argmin().item()
    found = first_difference(model, PROMPT, ids, [*ids[:3], worst, *ids[4:]])
    assert isinstance(found, Difference) and not found.is_near_tie
    assert (found.place, found.plain, found.assisted) == (3, ids[3], worst)
    assert found.gap == pytest.approx(float(logits_V.max() - logits_V.min()))
    with torch.no_grad():  # the two likeliest tokens get the same logit
        model.lm_head.weight[second] = model.lm_head.weight[ids[3]]
    tied = first_difference(model, PROMPT, ids, [*ids[:3], int(second), *ids[4:]])
    assert tied is not None and tied.gap == 0 and tied.is_near_tie
    scale = float(logits_V.abs().max()) * torch.finfo(dtype).eps
    assert tied.rounding == pytest.approx(scale * (32 if dtype == torch.float32 else 4), rel=0.05)


def test_what_the_library_cannot_do_is_refused() -> None:
    windowed, draft = pair("gemma2", noise=0)
    with pytest.raises(ShortLLMError, match="sliding window of 5 tokens of the draft"):
        generate_assisted(windowed, draft, PROMPT, 4, draft_tokens=2)
    assert generate_assisted(windowed, draft, PROMPT[:2], 3, draft_tokens=2).kept == [3]
    model: Any = build("llama")
    model._is_stateful = True
    with pytest.raises(ShortLLMError, match="its cache is a state"):
        generate_assisted(model, model, PROMPT, 4, draft_tokens=2)
