"""What text with a draft is measured on: beginnings of texts, and requests in a chat.

The built-in ones are of many kinds, because a draft is accepted more often in code or lists than in
stories. The embedded model continues pages of its own world.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from shortllm.checkpoint.hub import EMBEDDED
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.data.chat import Chat, Prompt, conversation, template_of
from shortllm.data.generated import prompts
from shortllm.data.rows import Rows
from shortllm.data.shapes import Row, Template
from shortllm.data.sources import load_rows
from shortllm.errors import DataError

BUILT_IN = "built-in"

PROMPTS = 8
"""Prompts of each kind, in turn, unless it is said how many."""

LENGTH = 256
"""A request has at most half as many tokens, and the beginning of a text an eighth."""

TEXTS = (
    "The lighthouse was built on a narrow strip of rock two miles from the harbour. It was opened "
    "in 1857, after three merchant ships were lost in a single winter, and for more than a century "
    "two keepers lived there with their families. In 1984 the lamp was made automatic, and since",
    "Anna closed the shop a little earlier than usual that evening. The street was already dark, "
    "and the first snow of the year had begun to fall on the roofs of the parked cars. She had "
    "almost reached the bridge when she heard somebody call her name, and when she turned round",
    'def read_table(path, separator=\',\'):\n    """Read a table from a text file, one row a '
    'line.\n\n    The first line has the names of the columns.\n    """\n    with open(path) as '
    "file:\n        lines = file.read().splitlines()\n    names = lines[0].split(separator)\n    "
    "rows = []\n    for line in lines[1:]:\n        values =",
    "The city council voted on Tuesday to close the old bus station and to replace it with a new "
    "one next to the railway line. The work will begin in March and is expected to cost 24 million "
    "euros, most of which the region will pay. The mayor said that",
    "To make a simple tomato soup for four people, heat two spoons of oil in a large pot and cook "
    "one chopped onion until it is soft. Add two cloves of garlic, a kilogram of ripe tomatoes and "
    "half a litre of water. Let the soup",
    "In physics, the energy of a closed system is constant. Energy can neither be created nor "
    "destroyed; it can only be changed from one form into another. When a ball is thrown "
    "upwards, for example, its kinetic energy is turned into potential energy until",
    "1. Check that the power cable is connected and that the switch at the back is on.\n2. Press "
    "the button on the front for three seconds until the green light shows.\n3. Wait about one "
    "minute until the start page is on the screen, then choose your language.\n4.",
    "The results of the two groups did not differ before the treatment. After twelve weeks, the "
    "patients who had received the new drug reported less pain than those who had received the "
    "usual one, and they also slept longer. However, the number of patients was small, and",
)
"""Beginnings of texts to continue."""

REQUESTS = (
    "Explain in simple words why the sky is blue.",
    "Write a Python function that returns the second largest number of a list, and explain it.",
    "Write a short email to my landlord. The heating in my flat has not worked for three days.",
    "Give me a plan for a weekend in Rome with two children, as a list with times.",
    "What are the advantages and disadvantages of working from home?",
    "Tell me a short story about a dog that gets lost in a big city and finds its way home.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take? Show the steps.",
    "Summarise what photosynthesis is, for a student of twelve years.",
)
"""What users say first in a chat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts of one kind."""

    kind: Literal["text", "chat"]
    source: str
    template: Template | None
    """How requests are formatted: by the model's chat template, else in the format of Alpaca."""
    prompts: list[Prompt]
    """Token ids, and the tokens that end an answer: none of a text."""


def load_prompts(
    checkpoint: Checkpoint, sources: Sequence[str], count: int = PROMPTS
) -> list[Prompts]:
    """`count` prompts, or all there are, of each data source; without one, those built in.

    A text is continued, a conversation answered from its first request on.
    """
    tokenizer = load_tokenizer(checkpoint)
    if not sources and checkpoint.id == EMBEDDED:
        sources = [EMBEDDED]
    found = [load_rows(source, role="calibration") for source in sources]
    if not found:
        talks: list[Row] = [_answered(said) for said in REQUESTS]
        found = [Rows.of(BUILT_IN, list(TEXTS)), Rows.of(BUILT_IN, talks)]
    return [_of_kind(rows, tokenizer, count) for rows in found]


def _of_kind(rows: Rows, tokenizer: Any, count: int) -> Prompts:
    """The first prompts of some rows."""
    order = iter(range(len(rows)))
    starts = list(islice(prompts(rows, order, tokenizer, LENGTH), count))
    if not starts:
        raise DataError(
            f"'{rows.source}' has no prompt: texts need {LENGTH // 8} tokens or more, and the "
            f"first requests of conversations at most {LENGTH // 2}. Give other --prompts"
        )
    if isinstance(rows[0], str):
        found = [Prompt(ids, []) for ids in starts]
        return Prompts(kind="text", source=rows.source, template=None, prompts=found)
    template = template_of(tokenizer)
    ends = sorted(Chat(tokenizer, template).ends)
    return Prompts(
        kind="chat",
        source=rows.source,
        template=template,
        prompts=[Prompt(ids, ends) for ids in starts],
    )


def _answered(said: str) -> Row:
    """A request with an answer, of which nothing is used."""
    return [*conversation(said), {"role": "assistant", "content": ""}]
