"""A loaded model as lm-evaluation-harness runs it, with the documents shared by processes.

The harness itself counts one process. Each process has all requests, answers those to its own
documents and gets the other answers, so each has the scores of all documents.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from shortllm.errors import CheckpointError, ShortLLMError
from shortllm.files import fingerprint
from shortllm.progress import Advance
from shortllm.runtime import Ranks

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from torch import Tensor

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


def shared_answers(
    answer: Callable[[list[Instance]], list[Answer]], requests: Sequence[Instance], ranks: Ranks
) -> list[Answer]:
    """The answers to all requests in their order; each process gives those to its documents.

    The requests of one document stay together: they often differ in one token, and are then
    computed once.
    """
    require_same_requests(requests, ranks)
    documents: dict[tuple[str, int], int] = {}
    owners = [
        documents.setdefault((one.task_name, one.doc_id), len(documents)) % ranks.count
        for one in requests
    ]
    own = [one for one, owner in zip(requests, owners, strict=True) if owner == ranks.rank]
    shares = [iter(answers) for answers in ranks.gather(answer(own))]
    return [next(shares[owner]) for owner in owners]


def require_same_requests(requests: Sequence[Instance], ranks: Ranks) -> None:
    """Refuse tasks that each process asks in another way: those that draw without a seed."""
    if ranks.count == 1:
        return
    asked: dict[str, list[Any]] = {}
    for one in requests:
        asked.setdefault(one.task_name, []).append(one.args)
    found = ranks.gather({name: fingerprint(arguments) for name, arguments in asked.items()})
    drawn = sorted({name for other in found for name in other if other[name] != found[0].get(name)})
    if drawn:
        raise ShortLLMError(
            f"{', '.join(drawn)}: each process draws other questions or choices, so processes "
            "cannot share the documents. Leave these tasks out, or start one process"
        )


def harness_model(
    model: Any, tokenizer: Any, batch_size: int, *, kinds: int, ranks: Ranks, advance: Advance
) -> Any:
    """The harness's own model class around a loaded model; `advance` gets the share of work, to
    which each of the `kinds` of requests (to score, to generate) contributes the same part."""
    from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):  # type: ignore[misc]
        """Answers its share of the requests, reports progress, and stops at logits that are NaN."""

        part = 0.0
        """One sequence as a share of this process's work."""

        def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
            return shared_answers(super().loglikelihood, requests, ranks)

        def loglikelihood_rolling(
            self, requests: list[Instance], disable_tqdm: bool = False
        ) -> Any:
            return shared_answers(super().loglikelihood_rolling, requests, ranks)

        def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
            return shared_answers(self._generate_own, requests, ranks)

        def _generate_own(self, requests: list[Instance]) -> Any:
            self.part = 1.0 / kinds / max(1, len(requests))
            longer = sum(
                len(self.tok_encode(prompt)) + new_tokens_of(options) > self.max_length
                for prompt, options in (one.args for one in requests)
            )
            _say_what_is_cut(ranks.total(longer), ranks.total(len(requests)), self.max_length)
            return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            if override_bs is None:  # else these are only a part of the work
                read = {(*context, *answer[:-1]) for _, context, answer in requests}
                self.part = 1.0 / kinds / max(1, len(read))  # equal requests are computed once
                room = self.max_length + 1  # the last token is only predicted
                longer = sum(len(context) + len(answer) > room for _, context, answer in requests)
                _say_what_is_cut(ranks.total(longer), ranks.total(len(requests)), room)
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits_BTV = require_numbers(inps, super()._model_call(inps, *args, **kwargs))
            advance(len(inps) * self.part)
            return logits_BTV

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            checked = {"logits_processor": [require_numbers]}
            ids_BT = super()._model_generate(context, *args, **kwargs, **checked)
            advance(len(context) * self.part)
            return ids_BT

    return Watched(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def token_pairs(tokenizer: Any, requests: Sequence[Instance]) -> list[tuple[list[int], list[int]]]:
    """The token ids of the prompt and of the choice of each request, split as the harness does."""
    from lm_eval.api.model import TemplateLM

    pairs: list[tuple[list[int], list[int]]] = []

    class Splitting(TemplateLM):  # type: ignore[misc]
        """Takes requests apart and computes nothing."""

        @property
        def eot_token_id(self) -> Any:
            return tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> Any:
            bos = tokenizer.bos_token_id
            return tokenizer.eos_token_id if bos is None else bos

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            if add_special_tokens is None and tokenizer.bos_token:
                if string.startswith(tokenizer.bos_token):
                    add_special_tokens = False
            special = True if add_special_tokens is None else add_special_tokens
            ids: list[int] = tokenizer(string, add_special_tokens=special, verbose=False).input_ids
            return ids

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
            pairs.extend((prompt, choice) for _, prompt, choice in requests)
            return []

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError

    Splitting().loglikelihood(list(requests), disable_tqdm=True)
    return pairs


def require_numbers(ids: Tensor, logits: Tensor) -> Tensor:
    """The logits, unless they are NaN, which tasks would take for a model at chance."""
    if logits.isnan().any():
        raise CheckpointError("the model's logits are NaN. Try --dtype float32")
    return logits


def new_tokens_of(options: Mapping[str, Any]) -> int:
    """The most tokens that a request lets a model write."""
    from lm_eval.models.utils import normalize_gen_kwargs

    return int(normalize_gen_kwargs(dict(options))["max_gen_toks"])


def _say_what_is_cut(longer: float, prompts: float, room: int) -> None:
    if longer:
        message = "%d of %d prompts with answer exceed %d tokens: their beginning is cut"
        log.info(message, longer, prompts, room)
