"""A small bar chart of the last runs: how fast each model was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from shortllm.demo.generating import Progress, Request
from shortllm.demo.markup import hue
from shortllm.demo.models import DemoModel

ROUNDS = 4
"""How many rounds are shown, the last one first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One finished text."""

    model: str
    place: int
    """Of the model on the page; it has its colour."""
    tokens_per_s: float
    seconds: float

    @classmethod
    def of(cls, model: DemoModel, place: int, progress: Progress) -> Bar | None:
        """None of a text that is not whole."""
        rate = progress.tokens_per_s
        if progress.state != "done" or rate is None:
            return None
        return cls(model=model.name, place=place, tokens_per_s=rate, seconds=progress.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one press of a button has made."""

    number: int
    batch: int
    new_tokens: int
    bars: tuple[Bar, ...]

    @classmethod
    def of(cls, number: int, asked: Request, bars: Sequence[Bar]) -> Round:
        """A round as it was asked for."""
        return cls(number=number, batch=asked.batch, new_tokens=asked.new_tokens, bars=tuple(bars))


def chart(rounds: list[Round]) -> str:
    """The last rounds, all to one scale; nothing before the first one."""
    shown = [one for one in rounds if one.bars][-ROUNDS:][::-1]
    if not shown:
        return ""
    most = max(bar.tokens_per_s for one in shown for bar in one.bars)
    figures = "".join(_round(one, most) for one in shown)
    return (
        '<section class="runs"><h2>Last runs<span>tokens per second</span></h2>'
        f'<div class="rounds">{figures}</div></section>'
    )


def _round(one: Round, most: float) -> str:
    rows = "".join(
        f'<li style="{hue(bar.place)}; --part: {bar.tokens_per_s / most:.4f}" '
        f'title="{bar.seconds:.2f} s"><span>{escape(bar.model)}</span><i></i>'
        f"<b>{bar.tokens_per_s:,.0f}</b></li>"
        for bar in one.bars
    )
    tokens = "token" if one.new_tokens == 1 else "tokens"
    asked = f"{one.new_tokens} {tokens}" + (f" × {one.batch}" if one.batch > 1 else "")
    return (
        f"<figure><figcaption>Run {one.number}<span>{asked}</span></figcaption>"
        f"<ul>{rows}</ul></figure>"
    )
