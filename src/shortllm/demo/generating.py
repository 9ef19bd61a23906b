"""Text as it is generated, what it took, and what is refused before a model is asked.

    request ─► checked ─► a thread runs the model's own `generate` ─► Progress, several a second
                           │ looks at every step whether it is to stop

The end-of-text token is barred as in `shortllm bench`, so that all models do the same work.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from shortllm.benchmark.meters import Sampler, bounded_memory, is_out_of_memory
from shortllm.data.calibration import check_ids
from shortllm.demo.models import DemoModel, Models
from shortllm.errors import DataError, ShortLLMError
from shortllm.evaluation.perplexity import TEMPERATURE, TOP_K, TOP_P
from shortllm.model.loading import quiet_transformers
from shortllm.runtime import available_memory

log = logging.getLogger(__name__)

LONGEST_PROMPT = 200_000
"""Characters; a longer prompt is not even tokenized."""

UPDATE_S = 0.1
"""Least time between two states of a text on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may ask for at most, whatever the model admits."""

    new_tokens: int = 256
    batch: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to generate; top-k 0 looks at all tokens, temperature 0 takes the likeliest."""

    prompt: str
    new_tokens: int = 64
    batch: int = 1
    seed: int = 0
    top_k: int = TOP_K
    top_p: float = TOP_P
    temperature: float = TEMPERATURE


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A state of the texts on their way, the last one with what all of it took."""

    state: Literal["running", "done", "stopped"]
    texts: list[str]
    """What follows the prompt, one text per sequence of the batch."""
    tokens: int
    """Of each sequence, so far."""
    seconds: float
    first_token_s: float | None = None
    peak_bytes: int | None = None
    """Peak memory without the weights of the other models; None while running, or not told."""

    @property
    def tokens_per_s(self) -> float | None:
        """Of all sequences together."""
        if not self.tokens or not self.seconds:
            return None
        return len(self.texts) * self.tokens / self.seconds


def check_request(request: Request, limits: Limits) -> None:
    """Refuse numbers out of bounds.

    Raises:
        ShortLLMError: naming the field, what was given, and what can be.
    """
    whole: list[tuple[str, Any, int, int]] = [
        ("output tokens", request.new_tokens, 1, limits.new_tokens),
        ("batch", request.batch, 1, limits.batch),
        ("seed", request.seed, 0, 2**32 - 1),
        ("top-k", request.top_k, 0, 1_000_000),
    ]
    for name, value, least, most in whole:
        if not _is_number(value) or value != int(value) or not least <= value <= most:
            raise ShortLLMError(
                f"{name}: {_shown(value)} is no whole number from {least} to {most:,}"
            )
    if not _is_number(request.top_p) or not 0 < request.top_p <= 1:
        raise ShortLLMError(f"top-p: {_shown(request.top_p)} is not above 0 and at most 1")
    if not _is_number(request.temperature) or not 0 <= request.temperature <= 5:
        raise ShortLLMError(f"temperature: {_shown(request.temperature)} is not between 0 and 5")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value}"


def prompt_ids(model: DemoModel, request: Request, limits: Limits) -> Tensor:
    """The prompt as token ids `[T]`, once it is clear that the model can take the request.

    Raises:
        ShortLLMError: numbers out of bounds, or more memory than is free.
        DataError: a prompt that is empty, too long, or not in the model's vocabulary.
    """
    check_request(request, limits)
    if not isinstance(request.prompt, str) or not request.prompt.strip():
        raise DataError("the prompt is empty. Type some text")
    if len(request.prompt) > LONGEST_PROMPT:
        raise DataError(
            f"the prompt has {len(request.prompt):,} characters. At most {LONGEST_PROMPT:,} are "
            "looked at"
        )
    with quiet_transformers():  # its warning of long texts: the length is checked here
        ids = model.tokenizer(request.prompt)["input_ids"]
    if not ids:
        raise DataError("no token comes of the prompt. Type some more text")
    _check_room(model, len(ids), request)
    ids_T = torch.tensor(ids)
    check_ids(ids_T[None], model.vocabulary, where="the prompt")
    return ids_T


def _check_room(model: DemoModel, prompt: int, request: Request) -> None:
    """Refuse more tokens than the model has positions for, or than memory has room for."""
    tokens = prompt + request.new_tokens
    if model.positions is not None and tokens > model.positions:
        room = model.positions - request.new_tokens
        way_out = f"Shorten it to {room} tokens, or ask for fewer" if room > 0 else "Shorten it"
        raise DataError(
            f"the prompt has {prompt:,} tokens. With {request.new_tokens} new ones that is more "
            f"than the {model.positions:,} positions of {model.name}. {way_out}"
        )
    free = available_memory(next(model.model.parameters()).device)
    needed = request.batch * tokens * model.cache_bytes
    if free is not None and needed > free:
        raise ShortLLMError(
            f"a batch of {request.batch} with {tokens:,} tokens each takes "
            f"{needed / 2**30:.1f} GiB beside the weights of {model.name}, and "
            f"{free / 2**30:.1f} GiB are free. Ask for a smaller batch"
        )


def generate(
    models: Models,
    model: DemoModel,
    request: Request,
    *,
    limits: Limits,
    stop: threading.Event | None = None,
) -> Iterator[Progress]:
    """States of the text on its way; the last one is `done` or `stopped`.

    The same request gives the same text. Only one text of `models` is made at a time: others wait
    here for their turn. When the iterator is closed the model stops at its next token.

    Args:
        stop: once it is set, the model stops at its next token.
    Raises:
        ShortLLMError: of any kind, before the model is asked; or memory did not suffice.
    """
    work = _Work(models, model, request, prompt_ids(model, request, limits), stop)
    thread = threading.Thread(target=work.run, daemon=True)
    yield Progress(state="running", texts=[""] * request.batch, tokens=0, seconds=0.0)
    thread.start()
    try:
        yield from work.states()
    finally:
        work.abandoned.set()
        thread.join()


@dataclass(frozen=True, slots=True)
class _Step:
    """The new tokens `[B, T]` after one step, and when it was done."""

    ids_BT: Tensor
    seconds: float


@dataclass(frozen=True, slots=True)
class _End:
    """How it ended: peak memory, or an error."""

    peak_bytes: int | None = None
    error: BaseException | None = None


class _Work:
    """One text in the making: a thread that generates, and what it has sent so far."""

    def __init__(
        self,
        models: Models,
        model: DemoModel,
        request: Request,
        prompt_T: Tensor,
        stop: threading.Event | None,
    ) -> None:
        self._models = models
        self._model = model
        self._request = request
        self._prompt_T = prompt_T
        self._stop = stop or threading.Event()
        self.abandoned = threading.Event()
        self._sent: queue.SimpleQueue[_Step | _End] = queue.SimpleQueue()
        self._started = 0.0

    # In the thread that generates.

    def run(self) -> None:
        """Generate, sending every step and how it ended."""
        try:
            with self._models.lock:
                self._sent.put(_End(peak_bytes=self._measured()))
        except BaseException as error:  # raised again where the states are read
            self._sent.put(_End(error=error))

    def _measured(self) -> int | None:
        """Generate, and return peak memory without the weights of the other models."""
        meter, device = self._models.meter, self._models.device
        if self._stopping():
            return None
        meter.reset()
        with Sampler(meter) as sampler, bounded_memory(device):
            self._generate()
            meter.synchronize()
            kept = meter.peaks()
        name = "process_bytes" if device.type == "cpu" else "allocated_bytes"
        peak = sampler.peak(name, kept)
        return None if peak is None else peak - self._models.weights_beside(self._model)

    def _generate(self) -> None:
        request, device = self._request, self._models.device
        ids_BT = self._prompt_T.repeat(request.batch, 1).to(device)
        sampling: dict[str, Any] = {"do_sample": False}
        if request.temperature > 0:
            sampling = {
                "do_sample": True,
                "top_k": int(request.top_k),
                "top_p": request.top_p,
                "temperature": request.temperature,
            }
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            quiet_transformers(),
        ):
            torch.manual_seed(int(request.seed))
            self._started = time.perf_counter()
            self._model.model.generate(
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                num_beams=1,
                min_new_tokens=request.new_tokens,
                max_new_tokens=request.new_tokens,
                pad_token_id=0,  # never used: all sequences have one length
                stopping_criteria=[self._step],
                **sampling,
            )

    def _step(self, ids_BT: Tensor, scores: Any, **_: Any) -> Tensor:
        """Called by `generate` after each token: send what is new, say whether to stop."""
        new_BT = ids_BT[:, len(self._prompt_T) :].cpu()
        self._sent.put(_Step(new_BT, time.perf_counter() - self._started))
        return torch.full((len(ids_BT),), self._stopping(), device=ids_BT.device)

    def _stopping(self) -> bool:
        return self._stop.is_set() or self.abandoned.is_set()

    # In the thread that reads.

    def states(self) -> Iterator[Progress]:
        """What has been sent, several times a second, to the end."""
        first_token_s, step = None, None
        last = Progress(state="running", texts=[""] * self._request.batch, tokens=0, seconds=0.0)
        while True:
            started = time.perf_counter()
            newest = [self._sent.get(), *self._waiting()]
            steps = [one for one in newest if isinstance(one, _Step)]
            if steps:
                step = steps[-1]
                first_token_s = first_token_s or steps[0].seconds
                last = Progress(
                    state="running",
                    texts=self._texts(step.ids_BT),
                    tokens=step.ids_BT.shape[1],
                    seconds=step.seconds,
                    first_token_s=first_token_s,
                )
            if isinstance(end := newest[-1], _End):
                yield self._ended(last, end)
                return
            yield replace(last, texts=[text.rstrip("\ufffd") for text in last.texts])
            time.sleep(max(0.0, UPDATE_S - (time.perf_counter() - started)))

    def _waiting(self) -> Iterator[_Step | _End]:
        while not self._sent.empty():
            yield self._sent.get()

    def _texts(self, ids_BT: Tensor) -> list[str]:
        """What follows the prompt, decoded with it: by itself its first space could be lost."""
        prompt = self._prompt_T.tolist()
        decode = self._model.tokenizer.decode
        before = decode(prompt, skip_special_tokens=True)
        texts = []
        for ids in ids_BT.tolist():
            whole = decode(prompt + ids, skip_special_tokens=True)
            alone = not whole.startswith(before)
            texts.append(decode(ids, skip_special_tokens=True) if alone else whole[len(before) :])
        return texts

    def _ended(self, last: Progress, end: _End) -> Progress:
        """The last state.

        Raises:
            ShortLLMError: it did not end well.
        """
        if end.error is None:
            whole = last.tokens == self._request.new_tokens
            return replace(last, state="done" if whole else "stopped", peak_bytes=end.peak_bytes)
        if is_out_of_memory(end.error):
            raise ShortLLMError(
                f"memory did not suffice for a batch of {self._request.batch}. Ask for a smaller "
                "batch or fewer tokens"
            ) from end.error
        log.error("%s: generation failed", self._model.name, exc_info=end.error)
        raise ShortLLMError(
            f"generation failed ({type(end.error).__name__}). The terminal says more"
        ) from end.error
