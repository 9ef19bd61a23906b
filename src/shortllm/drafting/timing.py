"""How long the intact model takes for some texts, alone and with drafts, all in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from shortllm.benchmark.assisted import AssistedText, generate_assisted, generate_plain
from shortllm.benchmark.interleaved import in_turn
from shortllm.drafting.options import DraftCosts, DraftOptions
from shortllm.drafting.written import Text
from shortllm.progress import Advance

TIMED_TEXTS, TIMED_TOKENS = 3, 48
"""Texts, and tokens of each, that times are measured on."""

WARM_UP_TOKENS = 8

Writer = Callable[[Text], AssistedText]


@dataclass(slots=True)
class Total:
    """One run over all texts."""

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    texts: list[list[int]] = field(default_factory=list)

    def add(self, text: AssistedText) -> None:
        """Another text."""
        self.seconds += text.seconds
        self.tokens += len(text.ids)
        self.steps += text.steps
        self.drafted += text.drafted
        self.texts.append(text.ids)


def alone(model: Any, options: DraftOptions) -> Writer:
    """The model without a draft writes as much as it wrote before."""
    return lambda text: generate_plain(
        model, text.prompt_T, len(text.ids), temperature=options.temperature, seed=options.seed
    )


def helped(model: Any, draft: Any, length: int, options: DraftOptions) -> Writer:
    """The same with a draft of some tokens at a time."""
    return lambda text: generate_assisted(
        model, draft, text.prompt_T, len(text.ids), draft_tokens=length,
        temperature=options.temperature, seed=options.seed,
    )  # fmt: skip


def timed_in_turn(
    writers: Sequence[Writer], texts: Sequence[Text], runs: int, advance: Advance
) -> list[list[Total]]:
    """The runs of each writer; they take turns text by text, after some tokens to warm up."""
    first = texts[0]
    for write in writers:
        write(Text(prompt_T=first.prompt_T, ids=first.ids[:WARM_UP_TOKENS]))
    found: list[list[Total]] = [[Total() for _ in range(runs)] for _ in writers]
    for run in range(runs):
        for number, text in enumerate(texts):
            for place in in_turn(len(writers), run + number):
                found[place][run].add(writers[place](text))
                advance(1)
    return found


def measure_costs(
    model: Any,
    drafts: dict[int, Any],
    texts: Sequence[Text],
    lengths: Sequence[int],
    options: DraftOptions,
    advance: Advance,
) -> DraftCosts:
    """What a token costs of drafts without some numbers of blocks, and what a step costs besides.

    A step of a draft is timed as a whole; what is left of it without the drafted tokens is that of
    verifying them, and of all that the library does around both.
    """
    texts = [Text(prompt_T=one.prompt_T, ids=one.ids[:TIMED_TOKENS]) for one in texts[:TIMED_TEXTS]]
    steps = [(removed, length) for removed in drafts for length in lengths]
    writers = [
        alone(model, options),
        *(alone(one, options) for one in drafts.values()),
        *(helped(model, drafts[removed], length, options) for removed, length in steps),
    ]
    intact, *others = timed_in_turn(writers, texts, options.runs, advance)
    plain_s = [one.seconds / one.tokens for one in intact]

    def relative(runs: Sequence[Total], parts: Callable[[Total], float]) -> float:
        pairs = zip(runs, plain_s, strict=True)
        return median(one.seconds / parts(one) / token_s for one, token_s in pairs)

    drafting = {
        removed: relative(runs, lambda one: one.tokens)
        for removed, runs in zip(drafts, others, strict=False)
    }
    verifying: dict[int, list[float]] = {length: [] for length in lengths}
    for (removed, length), runs in zip(steps, others[len(drafts) :], strict=True):
        drafted = fmean(one.drafted / one.steps for one in runs)
        step = relative(runs, lambda one: one.steps)
        verifying[length].append(step - drafted * drafting[removed])
    return DraftCosts(
        token_s=median(plain_s),
        drafting=drafting,
        verifying={length: fmean(found) for length, found in verifying.items()},
    )


def writers_of_costs(drafts: int, lengths: int) -> int:
    """Writers that `measure_costs` times, for the progress."""
    return 1 + drafts + drafts * lengths
