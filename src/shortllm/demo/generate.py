"""Text while a model generates it, what that took, and what is refused before a model is asked.

    request ─► checks ─► a thread runs the model's own `generate` ─► Progress, ten times a second
                           └─► Tokens notes each step and its time ─┘ decoded here

Streaming does not change what is measured: the thread that generates only stores the tokens of a
step and the time. (transformers' TextIteratorStreamer decodes inside the timed loop and takes one
sequence only.) Answers of a chat end where the model ends them. Of plain text the end is barred as
in `shortllm bench`, so all models do the same work.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from shortllm.benchmark.meters import Sampler, bounded_memory, is_out_of_memory
from shortllm.data.chat import Prompt, prompt_of
from shortllm.demo.models import DemoModel, Models
from shortllm.errors import DataError, ShortLLMError
from shortllm.evaluation.options import TEMPERATURE, TOP_K, TOP_P
from shortllm.runtime import available_memory, quiet_transformers

log = logging.getLogger(__name__)

MAX_PROMPT = 200_000
"""Characters; a longer prompt is not even tokenized."""

UPDATE_S = 0.1
"""Time between two states of a text."""

CONTEXT = 8
"""Tokens of the prompt that are decoded together with what follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most one request may ask for, whatever the model allows."""

    new_tokens: int = 256
    batch: int = 8


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate; top-k 0 keeps all tokens, temperature 0 takes the most likely one."""

    prompt: str
    new_tokens: int = 64
    batch: int = 1
    seed: int = 0
    top_k: int = TOP_K
    top_p: float = TOP_P
    temperature: float = TEMPERATURE
    chat: bool = False
    """Whether the prompt is put into the model's chat template, to be answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The texts so far; the last state also has the memory."""

    state: Literal["running", "done"]
    texts: list[str]
    """What follows the prompt, one text per sequence of the batch."""
    tokens: int
    """Of all sequences, so far."""
    seconds: float
    """From the call of `generate` to the newest token."""
    first_token_s: float | None = None
    peak_bytes: int | None = None
    """Peak memory without the weights of the other models; None while running or if unknown."""

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of all sequences per second."""
        if not self.tokens or not self.seconds:
            return None
        return self.tokens / self.seconds


def check_request(request: Request, limits: Limits) -> None:
    """Refuse numbers out of bounds, naming the field and what is allowed."""
    bounds: tuple[tuple[str, Any, Any, int, int], ...] = (
        ("output tokens", request.new_tokens, (int,), 1, limits.new_tokens),
        ("batch size", request.batch, (int,), 1, limits.batch),
        ("seed", request.seed, (int,), 0, 2**32 - 1),
        ("top-k", request.top_k, (int,), 0, 1_000_000),
        ("top-p", request.top_p, (int, float), 0, 1),
        ("temperature", request.temperature, (int, float), 0, 5),
    )
    for name, value, kinds, low, high in bounds:
        if not (isinstance(value, kinds) and low <= value <= high):
            number = "number" if float in kinds else "whole number"
            given = "empty" if value is None else value
            raise ShortLLMError(f"{name} must be a {number} from {low} to {high:,}, not {given}")


def prompt_for(model: DemoModel, request: Request, limits: Limits) -> Prompt:
    """The prompt as token ids, once it is clear that the model can serve the request."""
    check_request(request, limits)
    if not isinstance(request.prompt, str) or not request.prompt.strip():
        raise DataError("the prompt is empty. Type some text")
    if len(request.prompt) > MAX_PROMPT:
        raise DataError(
            f"the prompt has {len(request.prompt):,} characters. At most {MAX_PROMPT:,} are allowed"
        )
    if request.chat and not model.has_chat_template:
        raise DataError(f"{model.name} has no chat template. Turn chat off")
    with quiet_transformers():  # its warning about long texts: the length is checked here
        prompt = prompt_of(request.prompt, model.tokenizer, model.model, chat=request.chat)
    if not prompt.ids:
        raise DataError("the tokenizer finds no token in the prompt. Type some more text")
    if max(prompt.ids) >= model.vocabulary:
        raise DataError(
            f"the prompt has token id {max(prompt.ids)}, outside the vocabulary of "
            f"{model.vocabulary} of {model.name}: its tokenizer belongs to another model"
        )
    _check_room(model, len(prompt.ids), request)
    return prompt


def _check_room(model: DemoModel, prompt: int, request: Request) -> None:
    """Refuse more tokens than the model has positions for, or than fit into free memory."""
    tokens = prompt + request.new_tokens
    if model.positions is not None and tokens > model.positions:
        room = model.positions - request.new_tokens
        hint = f"Shorten it to {room} tokens, or request fewer" if room > 0 else "Shorten it"
        raise DataError(
            f"the prompt has {prompt:,} tokens. With {request.new_tokens} new ones that is more "
            f"than the {model.positions:,} positions of {model.name}. {hint}"
        )
    free = available_memory(next(model.model.parameters()).device)
    needed = request.batch * tokens * model.cache_bytes
    if free is not None and needed > free:
        raise ShortLLMError(
            f"a batch of {request.batch} with {tokens:,} tokens each needs "
            f"{needed / 2**30:.1f} GiB in addition to the weights of {model.name}, and "
            f"{free / 2**30:.1f} GiB are free. Request a smaller batch"
        )


class _Stopped(Exception):
    """Ends `generate` from within."""


class Tokens(BaseStreamer):  # type: ignore[misc]
    """Receives each step's tokens from `generate`; does nothing with them that takes time."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        """The prompt `[B, T]`, then the new tokens `[B]` of each step."""
        self.seconds: list[float] = []
        """When each step was done, after `started`."""
        self.started = 0.0
        self.stop = False

    def put(self, value: Tensor) -> None:
        """Called by `generate` with tokens in CPU memory."""
        self.steps.append(value)
        self.seconds.append(time.perf_counter() - self.started)
        if self.stop:
            raise _Stopped

    def end(self) -> None:
        """Nothing to do."""

    def progress(self, model: DemoModel, prompt: Prompt, batch: int) -> Progress:
        """The texts so far."""
        seconds = self.seconds[1:]  # the first entry is the prompt
        if not seconds:
            return Progress(state="running", texts=[""] * batch, tokens=0, seconds=0.0)
        steps_BT = torch.stack(self.steps[1 : 1 + len(seconds)], dim=1).tolist()
        texts = [prompt.written(ids) for ids in steps_BT]
        ended = sum(len(text) < len(seconds) for text in texts)  # by a token that was generated too
        return Progress(
            state="running",
            texts=decode(model.tokenizer, prompt.ids, texts),
            tokens=sum(map(len, texts)) + ended,
            seconds=seconds[-1],
            first_token_s=seconds[0],
        )


def decode(tokenizer: Any, prompt: list[int], continuations: list[list[int]]) -> list[str]:
    """What follows the prompt, decoded with its end: alone, its first space could be lost."""
    end = prompt[-CONTEXT:]  # the whole prompt would cost the reader time at each update
    before = tokenizer.decode(end, skip_special_tokens=True)
    texts = []
    for ids in continuations:
        whole = tokenizer.decode(end + ids, skip_special_tokens=True)
        if whole.startswith(before):
            texts.append(whole[len(before) :])
        else:
            texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    return texts


def generate(
    models: Models, model: DemoModel, request: Request, *, limits: Limits
) -> Generator[Progress, None, None]:
    """States of the text while it is generated; the last one is `done`.

    The same request gives the same text. Only one text of `models` is generated at a time. When
    the iterator is closed, the model stops at its next token.
    """
    prompt = prompt_for(model, request, limits)
    tokens = Tokens()
    outcome: Future[int | None] = Future()
    thread = threading.Thread(
        target=_run, args=(models, model, request, prompt, tokens, outcome), daemon=True
    )
    with models.lock:
        thread.start()
        try:
            while not outcome.done():
                now = tokens.progress(model, prompt, request.batch)
                # the last token may be half a character
                yield replace(now, texts=[text.rstrip("\ufffd") for text in now.texts])
                wait([outcome], UPDATE_S)
        finally:
            tokens.stop = True
            thread.join()
    peak_bytes = _result(outcome, model, request)
    last = tokens.progress(model, prompt, request.batch)
    yield replace(last, state="done", peak_bytes=peak_bytes)


def _result(outcome: Future[int | None], model: DemoModel, request: Request) -> int | None:
    """The peak memory of a text, or what went wrong in words for a visitor."""
    try:
        return outcome.result()
    except BaseException as error:
        if is_out_of_memory(error):
            raise ShortLLMError(
                f"not enough memory for a batch of {request.batch}. Request a smaller batch or "
                "fewer tokens"
            ) from error
        log.error("%s: generation failed", model.name, exc_info=error)
        raise ShortLLMError(
            f"generation failed ({type(error).__name__}). The terminal shows the details"
        ) from error


def _run(
    models: Models,
    model: DemoModel,
    request: Request,
    prompt: Prompt,
    tokens: Tokens,
    outcome: Future[int | None],
) -> None:
    """The thread that generates: the result is the peak memory without the other models."""
    device, meter = models.device, models.meter
    try:
        ids_BT = torch.tensor([prompt.ids] * request.batch, device=device)
        sampling: dict[str, Any] = {"do_sample": False}
        if request.temperature > 0:
            sampling = {"do_sample": True, "temperature": request.temperature}
            sampling |= {"top_k": request.top_k, "top_p": request.top_p}
        meter.reset()
        with (
            Sampler(meter) as sampler,
            bounded_memory(device),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            quiet_transformers(),
        ):
            torch.manual_seed(request.seed)
            tokens.started = time.perf_counter()
            model.model.generate(
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                num_beams=1,
                streamer=tokens,
                **prompt.limits(request.new_tokens),
                **sampling,
            )
            meter.synchronize()
            kept = meter.peaks()
        name = "process_bytes" if device.type == "cpu" else "allocated_bytes"
        peak = sampler.peak(name, kept)
        outcome.set_result(None if peak is None else peak - models.other_weight_bytes(model))
    except BaseException as error:  # raised again where the states are read
        outcome.set_exception(error)
