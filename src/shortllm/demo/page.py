"""The page: a prompt and its settings, a panel per model, the last runs.

Each press of a button has two parts:

    begin    at once: panels say that they wait, buttons are out of use but for Stop
    run      in the queue, one at a time for all visitors: panels show the text as it comes, and
             buttons come back

A ticket joins the two: a run whose ticket is no longer the visitor's does nothing. Whatever is
wrong with a request is said in the panel.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from shortllm.benchmark.options import PROMPT
from shortllm.checkpoint.hub import EMBEDDED
from shortllm.demo import charts, markup
from shortllm.demo.generating import Limits, Request, generate
from shortllm.demo.models import DemoModel, Models
from shortllm.errors import ShortLLMError
from shortllm.evaluation.evaluate import EMBEDDED_PROMPT

if TYPE_CHECKING:
    import gradio as gr

LONGEST_QUEUE = 64
"""Requests that may wait; another one is refused."""

MOST_VISITORS = 32
"""Those of them that come from the page, which then says so."""

ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "models"}

UNQUEUED: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}

EMBEDDED_EXAMPLES = (
    EMBEDDED_PROMPT,
    "Mara put the lamp in the kitchen. Later Tom carried the lamp from the kitchen to the barn.\n"
    "Question: Where is the lamp?\nAnswer:",
    "Gwen had two coins. Finn had one coin. Gwen found one coin.\n"
    "Question: How many coins does Gwen have?\nAnswer:",
    "On Monday it was rainy.",
)
EXAMPLES = (
    PROMPT,
    "Once upon a time there was a small robot who",
    "The three most important things to know about the sea are",
    "def fibonacci(n):",
)


@dataclass(slots=True)
class _Turn:
    """What a visitor has asked for and not yet got."""

    places: list[int]
    ticket: str = field(default_factory=lambda: secrets.token_hex(8))
    stop: threading.Event = field(default_factory=threading.Event)
    begun: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Parts:
    """Components of the page."""

    prompt: Any
    settings: list[Any]
    panels: list[Any]
    buttons: list[Any]
    """One per panel."""
    every: Any
    stop: Any
    reset: Any
    chart: Any
    rounds: Any
    ticket: Any
    """Not to be seen; sent along with a run."""


class Page:
    """What the buttons of the page do; each visitor has one turn at a time."""

    def __init__(self, models: Models, limits: Limits) -> None:
        self._models = models
        self._limits = limits
        self._turns: dict[str, _Turn] = {}
        first = models.models[0]
        self._examples = EMBEDDED_EXAMPLES if first.info.id == EMBEDDED else EXAMPLES
        self._defaults = Request(prompt=self._examples[0], new_tokens=min(64, limits.new_tokens))

    @property
    def _all(self) -> list[DemoModel]:
        return self._models.models

    # What is on it.

    def blocks(self) -> gr.Blocks:
        """The whole page, its buttons connected."""
        import gradio as gr

        with gr.Blocks(title="shortllm demo", analytics_enabled=False, fill_width=True) as page:
            gr.HTML(markup.title(self._all))
            with gr.Column():
                prompt = self._prompt()
                settings = self._settings()
                with gr.Row(elem_classes="actions"):
                    alone = len(self._all) == 1
                    every = gr.Button(
                        "Generate" if alone else "Generate all", variant="primary", elem_id="all"
                    )
                    stop = gr.Button("Stop", interactive=False, elem_id="stop")
                    reset = gr.Button("Reset", elem_id="reset")
            panels, buttons = [], []
            with gr.Row(elem_classes="panels"):
                for place, model in enumerate(self._all):
                    with gr.Column():
                        gr.HTML(markup.head(model, place, self._all[0]))
                        buttons.append(gr.Button("Generate", size="sm", visible=not alone))
                        panels.append(gr.HTML(markup.idle()))
            parts = _Parts(
                prompt=prompt,
                settings=settings,
                panels=panels,
                buttons=buttons,
                every=every,
                stop=stop,
                reset=reset,
                chart=gr.HTML(""),
                rounds=gr.State([]),
                ticket=gr.Textbox(visible=False),
            )
            self._connect(parts, page)
        page.queue(max_size=LONGEST_QUEUE, default_concurrency_limit=1)
        return page

    def _prompt(self) -> Any:
        import gradio as gr

        prompt = gr.Textbox(
            self._defaults.prompt, label="Prompt", lines=3, max_lines=10, elem_id="prompt"
        )
        with gr.Row(elem_classes="examples"):
            for example in self._examples:
                button = gr.Button(example.splitlines()[0], size="sm")
                button.click(None, outputs=prompt, js=f"() => {json.dumps(example)}", **UNQUEUED)
        return prompt

    def _settings(self) -> list[Any]:
        """Plain numbers: what is out of bounds is said in the panel."""
        import gradio as gr

        asked = self._defaults
        with gr.Row(elem_classes="settings"):
            return [
                gr.Number(value, label=label, precision=digits, elem_id=label.replace(" ", "-"))
                for label, value, digits in (
                    ("output tokens", asked.new_tokens, 0),
                    ("batch size", asked.batch, 0),
                    ("seed", asked.seed, 0),
                    ("top-k", asked.top_k, 0),
                    ("top-p", asked.top_p, None),
                    ("temperature", asked.temperature, None),
                )
            ]

    # What it does.

    def _connect(self, parts: _Parts, page: gr.Blocks) -> None:
        import gradio as gr

        places = list(range(len(self._all)))
        if len(places) > 1:
            for place in places:
                self._connect_button(parts, parts.buttons[place], [place])
        self._connect_button(parts, parts.every, places)
        shown = [*parts.panels, *_controls(parts, busy=False)]
        parts.stop.click(self._stopper(parts), outputs=shown, **UNQUEUED)
        fields = [parts.prompt, *parts.settings, *parts.panels, parts.chart, parts.rounds]
        parts.reset.click(self._defaults_again, outputs=fields, **UNQUEUED)
        page.unload(_told_who(self._leave))
        gr.api(self._api, api_name="generate", **ONE_AT_A_TIME)

    def _connect_button(self, parts: _Parts, button: Any, places: list[int]) -> None:
        shown = [*parts.panels, *_controls(parts, busy=False)]
        button.click(
            self._beginner(parts, places), outputs=[*shown, parts.ticket], **UNQUEUED
        ).success(
            self._runner(parts),
            inputs=[parts.ticket, parts.rounds, parts.prompt, *parts.settings],
            outputs=[*shown, parts.chart, parts.rounds],
            api_visibility="private",
            show_progress="hidden",
            **ONE_AT_A_TIME,
        )

    def _beginner(self, parts: _Parts, places: list[int]) -> Callable[..., Any]:
        def begin(request: Any) -> dict[Any, Any]:
            panels = [parts.panels[place] for place in places]
            if len(self._turns) >= MOST_VISITORS:
                busy = markup.failed("too many requests are waiting. Try again in a moment")
                return dict.fromkeys(panels, busy) | {parts.ticket: ""}
            turn = self._turns[str(request.session_hash)] = _Turn(places)
            waiting = dict.fromkeys(panels, markup.waiting())
            return waiting | _controls(parts, busy=True) | {parts.ticket: turn.ticket}

        return _told_who(begin)

    def _runner(self, parts: _Parts) -> Callable[..., Any]:
        import gradio as gr

        def run(
            ticket: str,
            rounds: list[charts.Round],
            prompt: str,
            new_tokens: int,
            batch: int,
            seed: int,
            top_k: int,
            top_p: float,
            temperature: float,
            request: Any,
        ) -> Iterator[Any]:
            visitor = str(request.session_hash)
            turn = self._turns.get(visitor)
            if turn is None or turn.ticket != ticket:
                yield gr.skip()
                return
            turn.begun = True
            asked = Request(
                prompt=prompt,
                new_tokens=new_tokens,
                batch=batch,
                seed=seed,
                top_k=top_k,
                top_p=top_p,
                temperature=temperature,
            )
            bars: list[charts.Bar] = []
            try:
                for place in turn.places:
                    for shown, bar in self._written(place, asked, turn.stop):
                        yield {parts.panels[place]: shown}
                        bars += [bar] if bar else []
                    if bars:
                        number = rounds[-1].number + 1 if rounds else 1
                        now = [*rounds, charts.Round.of(number, asked, bars)][-charts.ROUNDS :]
                        yield {parts.chart: charts.chart(now), parts.rounds: now}
            finally:
                self._turns.pop(visitor, None)
            yield _controls(parts, busy=False)

        return _told_who(run)

    def _written(
        self, place: int, asked: Request, stop: threading.Event
    ) -> Iterator[tuple[str, charts.Bar | None]]:
        """The states of one panel, the last of a whole text with its bar."""
        if stop.is_set():
            yield markup.not_begun(), None
            return
        model = self._all[place]
        try:
            for progress in generate(self._models, model, asked, limits=self._limits, stop=stop):
                bar = charts.Bar.of(model, place, progress)
                yield markup.written(asked.prompt, progress), bar
        except ShortLLMError as error:
            yield markup.failed(str(error)), None

    def _stopper(self, parts: _Parts) -> Callable[..., Any]:
        import gradio as gr

        def stop(request: Any) -> Any:
            visitor = str(request.session_hash)
            turn = self._turns.get(visitor)
            if turn is None:
                return gr.skip()
            turn.stop.set()
            if turn.begun:  # its run says so itself
                return gr.skip()
            del self._turns[visitor]
            panels = [parts.panels[place] for place in turn.places]
            return dict.fromkeys(panels, markup.not_begun()) | _controls(parts, busy=False)

        return _told_who(stop)

    def _defaults_again(self) -> list[Any]:
        asked = self._defaults
        settings = (
            asked.new_tokens,
            asked.batch,
            asked.seed,
            asked.top_k,
            asked.top_p,
            asked.temperature,
        )
        return [asked.prompt, *settings, *[markup.idle() for _ in self._all], "", []]

    def _leave(self, request: Any) -> None:
        """Nobody is there to read on."""
        turn = self._turns.pop(str(request.session_hash), None)
        if turn is not None:
            turn.stop.set()

    def _api(
        self,
        model: str,
        prompt: str,
        output_tokens: int = 64,
        batch_size: int = 1,
        seed: int = 0,
        top_k: int = 50,
        top_p: float = 0.95,
        temperature: float = 1.0,
    ) -> dict[str, Any]:
        """Text of one model, by name."""
        import gradio as gr

        asked = Request(
            prompt=prompt,
            new_tokens=output_tokens,
            batch=batch_size,
            seed=seed,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
        )
        try:
            chosen = self._models.named(model)
            *_, last = generate(self._models, chosen, asked, limits=self._limits)
        except ShortLLMError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return asdict(last) | {"tokens_per_s": last.tokens_per_s}


def _told_who(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose `request` gradio fills in with the visitor's: it goes by the type."""
    import gradio as gr

    handler.__annotations__["request"] = gr.Request
    return handler


def _controls(parts: _Parts, *, busy: bool) -> dict[Any, Any]:
    """Buttons in and out of use."""
    import gradio as gr

    buttons = [*parts.buttons, parts.every, parts.reset]
    return {button: gr.update(interactive=not busy) for button in buttons} | {
        parts.stop: gr.update(interactive=busy)
    }
