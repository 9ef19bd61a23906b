"""How long the intact model takes for some texts, alone and with drafts, all in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any

from shortllm.benchmark.assisted import AssistedText, generate_assisted, generate_plain
from shortllm.benchmark.interleaved import in_turn
from shortllm.drafting.options import DraftCosts, DraftOptions
from shortllm.drafting.written import Text
from shortllm.progress import Advance

TIMED_TEXTS, TIMED_TOKENS = 4, 48
"""Texts, and tokens of each, that times are measured on."""

WARM_UP_TOKENS = 8

Writer = Callable[[Text], AssistedText]


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
) -> list[list[AssistedText]]:
    """What each writer wrote, text by text; they take turns at each, after a short one."""
    first = texts[0]
    for write in writers:
        write(Text(prompt_T=first.prompt_T, ids=first.ids[:WARM_UP_TOKENS]))
    found: list[list[AssistedText]] = [[] for _ in writers]
    for number, text in enumerate([*texts] * runs):
        for place in in_turn(len(writers), number):
            found[place].append(writers[place](text))
            advance(1)
    return found


def step_time(written: Sequence[AssistedText], plain: Sequence[AssistedText]) -> float:
    """Time of a step, in units of what the model alone took for a token in the same turn; median.

    A text that is written without a draft has a step for each token. Each text is compared with its
    neighbour, and the median is taken, so that other work on the machine matters little.
    """
    pairs = zip(written, plain, strict=True)
    return median(
        one.seconds / one.steps / (before.seconds / before.steps) for one, before in pairs
    )


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
    drafting = {
        removed: step_time(found, intact) for removed, found in zip(drafts, others, strict=False)
    }
    verifying: dict[int, list[float]] = {length: [] for length in lengths}
    for (removed, length), found in zip(steps, others[len(drafts) :], strict=True):
        drafted = sum(one.drafted for one in found) / sum(one.steps for one in found)
        verifying[length].append(step_time(found, intact) - drafted * drafting[removed])
    return DraftCosts(
        token_s=median(one.seconds / one.steps for one in intact),
        drafting=drafting,
        verifying={length: fmean(times) for length, times in verifying.items()},
    )


def writers_of_costs(drafts: int, lengths: int) -> int:
    """Writers that `measure_costs` times, for the progress."""
    return 1 + drafts + drafts * lengths
