"""Text of one model with the help of another one, which drafts it: tokens, forwards and seconds.

    draft        proposes the next tokens, one after the other, up to `draft_tokens`
    intact model reads all of them in one forward (a step), keeps those that it would have written
                 itself, and adds one token of its own

The generation is the library's own, `generate(assistant_model=...)`. Greedy text is the same with
and without a draft, but for near ties: a forward of several tokens rounds otherwise than one of a
single token, so where the two likeliest tokens are equal up to rounding, either may be chosen.

Source: Leviathan et al. 2023, Fast Inference from Transformers via Speculative Decoding,
arXiv:2211.17192.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper

from shortllm.checkpoint.structure import auto_class
from shortllm.data.generated import plain_rules
from shortllm.errors import ShortLLMError
from shortllm.runtime import quiet_transformers

ROUNDINGS = {torch.float32: 32}
"""By how many roundings of the largest logit two logits of one place may differ in a near tie. In
float32 sums of products round as well; narrower types are summed in float32."""

FEW_ROUNDINGS = 4
"""The same for the narrower types."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AssistedText:
    """What a model wrote, alone or with a draft."""

    ids: list[int]
    """The new tokens."""
    kept: list[int]
    """New tokens of each step: those accepted, and one of the intact model; alone, one each."""
    drafted: int
    """Tokens that the draft proposed."""
    seconds: float

    @property
    def steps(self) -> int:
        """Forwards of the intact model; the first one also reads the prompt."""
        return len(self.kept)

    @property
    def accepted(self) -> int:
        """Drafted tokens that were kept."""
        return len(self.ids) - self.steps


def generate_plain(
    model: Any,
    prompt_T: Tensor,
    new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    ends: Collection[int] = (),
) -> AssistedText:
    """What the model writes alone: exactly `new_tokens` tokens, or fewer up to one of `ends`.

    Args:
        temperature: sampling from the whole distribution; 0 takes the likeliest token.
    """
    ids, seconds = _generated(model, prompt_T, new_tokens, temperature, seed, ends)
    return AssistedText(ids=ids, kept=[1] * len(ids), drafted=0, seconds=seconds)


def generate_assisted(
    model: Any,
    draft: Any,
    prompt_T: Tensor,
    new_tokens: int,
    *,
    draft_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    ends: Collection[int] = (),
) -> AssistedText:
    """What the model writes when `draft` proposes up to `draft_tokens` tokens in each step.

    Args:
        temperature: sampling from the whole distribution; 0 takes the likeliest token.
    """
    check_assisted(model.config, draft.config, len(prompt_T) + new_tokens)
    counts, read = _Counts(), list[int]()
    rules = {
        "num_assistant_tokens": draft_tokens,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,  # else the draft stops where it is not sure
    }
    with ExitStack() as stack:
        stack.enter_context(plain_rules(draft, **rules))
        stack.callback(
            model.register_forward_hook(
                lambda module, unnamed, named, output: read.append(named["input_ids"].shape[1]),
                with_kwargs=True,
            ).remove
        )
        ids, seconds = _generated(
            model, prompt_T, new_tokens, temperature, seed, ends,
            assistant_model=draft, streamer=counts,
        )  # fmt: skip
    # each forward reads the drafted tokens after the last token kept, the first the whole prompt
    drafted = sum(read) - len(prompt_T) - (len(read) - 1)
    return AssistedText(ids=ids, kept=counts.kept, drafted=drafted, seconds=seconds)


def check_assisted(config: Any, draft_config: Any, tokens: int) -> None:
    """Refuse what the library cannot do with a draft, for text of this length with its prompt."""
    from transformers import DynamicCache

    kind = auto_class(config)
    if hasattr(kind, "_model_mapping"):
        kind = kind._model_mapping.get(type(config), None)
    if getattr(kind, "_is_stateful", False):
        raise ShortLLMError(
            f"a draft cannot help {kind.__name__}: its cache is a state, from which tokens "
            "that were not accepted cannot be taken back. Measure it without a draft"
        )
    layers = DynamicCache(config=draft_config.get_text_config(decoder=True)).layers
    windows = [layer.sliding_window for layer in layers if layer.is_sliding]
    if windows and tokens > min(windows):
        raise ShortLLMError(  # of transformers 5.17: with a draft, their masks get a wrong size
            f"{tokens} tokens, prompt and new ones, exceed the sliding window of {min(windows)} "
            f"tokens of the draft, beyond which transformers cannot use one. Give a smaller "
            "--new-tokens, or shorter prompts"
        )


class _Counts:
    """Takes the tokens of each step, as `generate` streams them: first of all the prompt."""

    def __init__(self) -> None:
        self.kept: list[int] = []
        self._began = False

    def put(self, ids: Tensor) -> None:
        """The tokens that a step added."""
        if self._began:
            self.kept.append(ids.numel())
        self._began = True

    def end(self) -> None:
        """Nothing is shown."""


def _generated(
    model: Any,
    prompt_T: Tensor,
    new_tokens: int,
    temperature: float,
    seed: int,
    ends: Collection[int],
    **assistance: Any,
) -> tuple[list[int], float]:
    """The new tokens, and the seconds from an idle device to tokens in main memory."""
    ids_BT = prompt_T[None].to(model.device)
    cuda = [model.device] if model.device.type == "cuda" else []
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        # not as an option: transformers 5.17 applies that twice to the logits of a draft
        warper = TemperatureLogitsWarper(temperature)
        sampling = {"do_sample": True, "logits_processor": [warper], "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(devices=cuda), quiet_transformers(), plain_rules(model):
        torch.manual_seed(seed)
        start = time.perf_counter()
        output = model.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=0,  # never used: there is one sequence
            use_cache=True,
            **sampling,
            **assistance,
        )
        ids: list[int] = output[0, len(prompt_T) :].tolist()
        seconds = time.perf_counter() - start
    return ids, seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first place where text with a draft is not that of the model alone."""

    place: int
    """Among the new tokens, from 0."""
    plain: int
    assisted: int
    gap: float
    """The largest logit there minus the smaller one of the two tokens."""
    rounding: float
    """Up to which gap it is a near tie."""

    @property
    def is_near_tie(self) -> bool:
        """Whether rounding alone may have chosen between the two tokens."""
        return self.gap <= self.rounding


def first_difference(
    model: Any, prompt_T: Tensor, plain: Sequence[int], assisted: Sequence[int]
) -> Difference | None:
    """Where greedy text with a draft first differs from that of the model alone; None: nowhere."""
    places = range(max(len(plain), len(assisted)))
    place = next((n for n in places if plain[n : n + 1] != assisted[n : n + 1]), None)
    if place is None:
        return None
    assert place < min(len(plain), len(assisted)), "equal text ends at the same place"
    prefix_T = torch.cat([prompt_T, torch.tensor(plain[:place], dtype=prompt_T.dtype)])
    with torch.inference_mode():
        logits_V = model(prefix_T[None].to(model.device)).logits[0, -1]
    found_V = logits_V.double()
    best, worst = found_V.max(), found_V[[plain[place], assisted[place]]].min()
    roundings = ROUNDINGS.get(logits_V.dtype, FEW_ROUNDINGS)
    return Difference(
        place=place,
        plain=plain[place],
        assisted=assisted[place],
        gap=float(best - worst),
        rounding=roundings * torch.finfo(logits_V.dtype).eps * float(found_V.abs().max()),
    )


def differs_by_a_tie(
    model: Any, prompt_T: Tensor, plain: Sequence[int], assisted: Sequence[int], *, text: str
) -> bool:
    """Whether greedy text with a draft differs, from a near tie on; any other difference is an
    error, which calls it `text`."""
    found = first_difference(model, prompt_T, plain, assisted)
    if found is None or found.is_near_tie:
        return found is not None
    raise ShortLLMError(
        f"with the draft, {text} is continued otherwise than without it: new token {found.place} "
        f"is {found.assisted} instead of {found.plain}. Their logits differ by {found.gap:.3g}; "
        f"rounding explains {found.rounding:.3g}. A draft must not change the text: look whether "
        "it is the same with --dtype float32, or with another version of transformers"
    )
