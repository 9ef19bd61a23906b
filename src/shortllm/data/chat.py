"""Conversations as text and token ids, by the tokenizer's chat template or in the format of Alpaca.

Which tokens of a conversation the assistant wrote is found for any chat template. One that marks
them with `{% generation %}` is taken at its word. Of any other, the conversation is rendered again
with something changed, and what differs says where a turn is:

    start   where the prompt before the turn, rendered with the generation prompt, stops agreeing
    end     the end of what changes with the turn's content, then what follows the content of a
            last turn (the end-of-turn token), as far as it follows here too

`prompt_of` is for generating: a text to continue, or what a user says, to be answered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise, takewhile
from typing import Any, Literal, cast

from jinja2 import TemplateError

from shortllm.data.shapes import Messages, Row, Template, template_for
from shortllm.errors import DataError, first_line_of

Span = tuple[int, int]
"""`[start, stop)`"""

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
)
"""How a prompt of the Alpaca data set begins, which its answers were written for."""

CHANGED = "\ue000"
"""Stands for the content of a turn; a private character, which no text begins or ends with."""

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def template_of(tokenizer: Any, requested: Literal["auto", "alpaca", "chat"] = "auto") -> Template:
    """How conversations are formatted."""
    return template_for(getattr(tokenizer, "chat_template", None) is not None, requested)


@dataclass(frozen=True)
class Chat:
    """Renders conversations with one tokenizer."""

    tokenizer: Any
    template: Template

    def text(self, messages: Messages, *, prompt: bool = False) -> str:
        """A conversation as text; with `prompt` up to where the assistant begins to write."""
        if self.template == "alpaca":
            return _alpaca(messages, prompt, self.tokenizer.eos_token or "")
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
        return text

    def documents(
        self, conversations: Sequence[Messages], places: Iterable[str]
    ) -> Iterator[tuple[list[int], list[Span]]]:
        """Of each conversation the token ids, and the spans of those that the assistant wrote.

        Args:
            places: what to call each one in an error.
        """
        found = []
        for messages, place in zip(conversations, places, strict=False):
            with _naming(messages, f"{place}: "):
                text = self.text(messages)
                found.append((text, [] if self._is_marked else self._turns(messages, text)))
        if self._is_marked:
            yield from map(self._marked, conversations)
            return
        # each text up to every end of a span, and the whole, in one call of the tokenizer
        ends = [sorted({*chain(*spans), len(text)}) for text, spans in found]
        pieces = [text[:end] for (text, _), cuts in zip(found, ends, strict=True) for end in cuts]
        all_ids = iter(self._ids(pieces))
        for (_, spans), cuts in zip(found, ends, strict=True):
            prefixes = {end: next(all_ids) for end in cuts}
            whole = prefixes[cuts[-1]]
            token = {end: agreed(ids, whole) for end, ids in prefixes.items()}
            found_spans = [(token[start], token[stop]) for start, stop in spans]
            yield whole, [(start, stop) for start, stop in found_spans if start < stop]

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The token ids of a conversation up to where the assistant begins to write."""
        with _naming(messages):
            [ids] = self._ids([self.text(messages, prompt=True)])
        return ids

    @cached_property
    def ends(self) -> set[int]:
        """The tokens that end what the assistant writes: EOS, and the template's end of a turn."""
        [after] = self._ids([self._after_turn.lstrip()])
        found = {one for one in after[:1] if one in self.tokenizer.added_tokens_decoder}
        return found | ({self.tokenizer.eos_token_id} - {None})

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids; special tokens are in the text of a chat template already."""
        if not texts:
            return []
        special = self.template == "alpaca"
        lists: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=special, verbose=False
        ).input_ids
        end = self.tokenizer.eos_token_id
        # one end is enough where the tokenizer adds its own
        return [ids[:-1] if end is not None and ids[-2:] == [end, end] else ids for ids in lists]

    @cached_property
    def _is_marked(self) -> bool:
        if self.template == "alpaca" or not self.tokenizer.is_fast:
            return False
        return bool(MARKED.search(self.tokenizer.get_chat_template()))

    def _marked(self, messages: Messages) -> tuple[list[int], list[Span]]:
        found = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = [0, *found["assistant_masks"], 0]
        edges = [n for n, (before, here) in enumerate(pairwise(mask)) if before != here]
        return list(found["input_ids"]), list(zip(edges[::2], edges[1::2], strict=True))

    def _turns(self, messages: Messages, text: str) -> list[Span]:
        """The characters of each turn of the assistant, up to its end-of-turn token."""
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            changed = [*messages]
            changed[number] = {"role": "assistant", "content": CHANGED}
            other = self.text(changed)
            start = agreed(text, other)
            stop = len(text) - agreed(text[start:][::-1], other[start:][::-1])
            stop += agreed(text[stop:], self._after_turn)
            spans.append((self._start(messages[:number], text, start), stop))
        return spans

    def _start(self, before: Messages, text: str, content: int) -> int:
        """Where a turn begins: after the generation prompt, where the template has it so."""
        if not before:
            return content
        try:
            prompt = self.text(before, prompt=True)
            known = agreed(text, prompt)
            if known == len(prompt) or known >= len(self.text(before)):
                return min(known, content)
        except TemplateError:  # it takes no conversation that ends there
            pass
        return content  # what comes before is rendered otherwise without the turn

    @cached_property
    def _after_turn(self) -> str:
        """What follows the content of a last turn."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": CHANGED}]
        return self.text(turns).rpartition(CHANGED)[2]


@contextmanager
def _naming(messages: Messages, place: str = "") -> Iterator[None]:
    """Say which conversation a chat template does not take."""
    try:
        yield
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(
            f"{place}the chat template does not take this conversation of "
            f"{', '.join(message['role'] for message in messages)}: {first_line_of(error)}"
        ) from error


@dataclass(frozen=True)
class Prompt:
    """What a model is to continue or to answer."""

    ids: list[int]
    ends: list[int]
    """The tokens that end the text; none where it has the requested length."""

    def limits(self, new_tokens: int) -> dict[str, Any]:
        """Arguments of `generate` for a text of this length, or of at most this length."""
        if self.ends:
            ends = {"eos_token_id": self.ends, "pad_token_id": self.ends[0]}
            return {"max_new_tokens": new_tokens, **ends}
        # no end is produced, so that all texts have the same length and nothing is padded
        return {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}

    def written(self, ids: Sequence[int]) -> list[int]:
        """A text without its end and what pads it."""
        return list(takewhile(lambda one: one not in self.ends, ids))


def conversation(said: str, system: str | None = None) -> Messages:
    """What a user says first, after a system message if there is one."""
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": said}]


def prompt_of(
    text: str, tokenizer: Any, model: Any, *, chat: bool, system: str | None = None
) -> Prompt:
    """A text to continue, or in a `chat` what a user says, to be answered up to the end of a turn.

    Args:
        model: whose own end tokens count as well.
        system: the system message of a chat.
    """
    if not chat:
        return Prompt(tokenizer(text).input_ids, [])
    talk = Chat(tokenizer, "chat")
    ids = talk.prompt_ids(conversation(text, system))
    return Prompt(ids, sorted(ends_of_turn(talk, model)))


def ends_of_turn(chat: Chat, model: Any) -> set[int]:
    """The tokens that end what the assistant writes, by the tokenizer and by the model."""
    own = model.generation_config.eos_token_id
    return chat.ends | {*(own if isinstance(own, list) else [own])} - {None}


def agreed(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How long the common beginning of two sequences is."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def row_texts(rows: Sequence[Row], tokenizer: Any) -> list[str]:
    """Each row as text: conversations rendered, without a BOS that tokenizing puts there."""
    if all(isinstance(row, str) for row in rows):
        return cast(list[str], list(rows))
    chat = Chat(tokenizer, template_of(tokenizer))
    adds_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    bos = tokenizer.bos_token if adds_bos else ""
    return [row if isinstance(row, str) else chat.text(row).removeprefix(bos) for row in rows]


def _alpaca(messages: Messages, prompt: bool, end: str) -> str:
    """The format of the Alpaca data set; further turns follow in the same form."""
    text = ""
    for message in messages:
        said, extra = message["content"], message.get("input")
        if message["role"] == "system":
            text += f"{said}\n\n"
        elif message["role"] == "assistant":
            text += f"{said}{end}\n\n"
        else:
            text += "" if text else ALPACA_WITH_INPUT if extra else ALPACA
            if extra:
                said = f"{said.removesuffix(extra)[:-2]}\n\n### Input:\n{extra}"
            text += f"### Instruction:\n{said}\n\n### Response:\n"
    return text if prompt else text.removesuffix("\n\n")
