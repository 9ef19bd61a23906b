"""The page: a prompt and its settings, a panel per model, charts of the last runs; and its server.

Gradio's queue runs one event at a time for all visitors, so that the figures of one model do not
suffer from another. Stop cancels the visitor's events: gradio closes their generators, and the
model stops at its next token. What is wrong with a request is said in the panel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, astuple, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from shortllm.checkpoint.hub import EMBEDDED
from shortllm.demo.generate import Limits, Progress, Request, generate
from shortllm.demo.models import DemoModel, Models
from shortllm.errors import ShortLLMError
from shortllm.evaluation.evaluate import EMBEDDED_PROMPT
from shortllm.evaluation.options import CHAT_TEMPERATURE, PROMPT, TEMPERATURE, TOP_K, TOP_P
from shortllm.format import NONE, change, counted, number, short_bytes, short_count

if TYPE_CHECKING:
    import gradio as gr
    from starlette.middleware.base import RequestResponseEndpoint
    from starlette.requests import Request as HTTPRequest
    from starlette.responses import Response

History = list[tuple[str, dict[str, float]]]
"""Per run its title, and tokens per second by model."""

log = logging.getLogger(__name__)

LOCALHOST = "127.0.0.1"
QUEUE_SIZE = 32
"""Requests that may wait; the next one is refused."""
RUNS = 4
"""Runs that have a chart."""
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1}
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
COLORS = ("#0072b2", "#d55e00", "#008a62", "#b3589a", "#3c9dd0", "#c98500", "#93633a", "#a8416f")
"""Of the models; a ninth one has the first color again."""
OWN_CONTENT = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
"""The browser loads nothing from other servers, whatever gradio's page requests."""
CSS = """
.html-container { padding: .6rem 0 0 !important; }
.head h3 { margin: 0 0 .5rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.head h3 { border-left: .6rem solid var(--color); padding-left: .5rem; }
.numbers { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; margin: 0; }
.numbers dt { font-size: .8rem; opacity: .7; }
.numbers dd { margin: 0; white-space: nowrap; font-variant-numeric: tabular-nums; }
.blocks { display: flex; gap: 3px; height: 1.1rem; margin-top: .7rem; }
.blocks i { flex: 1 1 0; min-width: 1px; border-radius: 2px; }
.blocks .kept { background: linear-gradient(to top, var(--color) calc(100% * var(--part)),
  color-mix(in srgb, var(--color) 18%, transparent) 0); }
.blocks .gone { border: 1px dashed var(--color); opacity: .7; }
.figures p { color: var(--error-text-color); overflow-wrap: anywhere; }
.prose.text { min-height: 12rem; max-height: 40rem; overflow-y: auto; overflow-wrap: anywhere;
  white-space: pre-wrap; padding: .6rem .7rem; line-height: 1.5;
  border: 1px solid var(--border-color-primary); border-radius: 4px; }
.prose.text:empty::before { content: "Nothing generated yet"; opacity: .6; }
"""
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
CHAT_EXAMPLES = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a short poem about the sea.",
    "Write a Python function that returns the sum of a list.",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Panel:
    """A model and its components on the page."""

    model: DemoModel
    button: gr.Button
    figures: gr.HTML
    text: gr.HTML


class Page:
    """The components of the page, and what its buttons do."""

    def __init__(self, models: Models, limits: Limits) -> None:
        import gradio as gr

        self._models, self._limits = models, limits
        self._first, count = models.models[0], len(models.models)
        self._defaults = defaults(models, limits)
        colors = [COLORS[place % len(COLORS)] for place in range(count)]
        self._colors = dict(zip((one.name for one in models.models), colors, strict=True))
        with gr.Blocks(title="shortllm demo", analytics_enabled=False, fill_width=True) as blocks:
            what = "one model" if count == 1 else f"{count} models side by side"
            gr.Markdown(f"# One prompt, {what}")
            self._inputs = self._build_inputs()
            with gr.Row():
                label = "Generate" if count == 1 else "Generate all"
                every = gr.Button(
                    label, variant="primary", scale=0, min_width=130, size="md", elem_id="all"
                )
                stop = gr.Button("Stop", scale=0, min_width=80, size="md", elem_id="stop")
                reset = gr.Button("Reset", scale=0, min_width=80, size="md", elem_id="reset")
            with gr.Row(elem_id="panels"):
                self._panels = [self._build_panel(model) for model in models.models]
            with gr.Row(elem_id="runs"):
                self._charts = [self._build_chart() for _ in range(RUNS)]
            self._history = gr.State([])
            self._connect(every, stop, reset)
        self.blocks = blocks.queue(max_size=QUEUE_SIZE)

    def _build_inputs(self) -> list[Any]:
        """The prompt and the settings, in the order of `Request`."""
        import gradio as gr

        default = self._defaults
        prompt = gr.Textbox(default.prompt, label="Prompt", lines=3, max_lines=10, elem_id="prompt")
        examples = examples_for(self._first, chat=default.chat)
        gr.Examples([[one] for one in examples], prompt, elem_id="examples")
        labels = ("Output tokens", "Batch size", "Seed", "Top-k", "Top-p", "Temperature")
        inputs = [prompt]
        with gr.Row():
            for label, value in zip(labels, astuple(default)[1:-1], strict=True):
                digits = 0 if isinstance(value, int) else None
                name = label.lower().replace(" ", "-")
                inputs += [
                    gr.Number(value, label=label, precision=digits, min_width=100, elem_id=name)
                ]
        chat = gr.Checkbox(
            default.chat,
            label="Chat: the prompt is put into the model's chat template, and the answer ends by "
            "itself",
            container=False,
            visible=any(one.has_chat_template for one in self._models.models),
            elem_id="chat",
        )
        chat.input(temperature_of, chat, inputs[-1], queue=False, **PRIVATE)
        return [*inputs, chat]

    def _build_panel(self, model: DemoModel) -> Panel:
        import gradio as gr

        several = len(self._models.models) > 1
        with gr.Column(min_width=280):
            gr.HTML(head(model, self._first, self._colors[model.name]))
            button = gr.Button("Generate", size="sm", visible=several)
            shown, text = gr.HTML(figures(None)), gr.HTML("", elem_classes="text")
            return Panel(model=model, button=button, figures=shown, text=text)

    def _build_chart(self) -> gr.BarPlot:
        import gradio as gr

        return gr.BarPlot(
            x="model",
            y="tokens/s",
            color="model",
            color_map=self._colors,
            colors_in_legend=[],
            sort=list(self._colors),
            label="Run",
            height=180,
            min_width=240,
            visible=False,
        )

    def _connect(self, every: gr.Button, stop: gr.Button, reset: gr.Button) -> None:
        import gradio as gr

        outputs = [part for panel in self._panels for part in (panel.text, panel.figures)]
        outputs += [*self._charts, self._history]
        runs = [
            button.click(
                self._runner(panels),
                inputs=[self._history, *self._inputs],
                outputs=outputs,
                show_progress="minimal",
                show_progress_on=[panel.text for panel in panels],
                **ONE_AT_A_TIME,
                **PRIVATE,
            )
            for button, panels in [
                (every, self._panels),
                *((panel.button, [panel]) for panel in self._panels),
            ]
        ]
        stop.click(None, cancels=runs, **PRIVATE)
        everything = [*self._inputs, *outputs]
        reset.click(self._start_over, outputs=everything, cancels=runs, queue=False, **PRIVATE)
        gr.api(self._api, api_name="generate", **ONE_AT_A_TIME)

    def _runner(self, panels: list[Panel]) -> Callable[..., Iterator[dict[Any, Any]]]:
        """What a button does: generate in these panels, one after another."""

        def run(history: History, *inputs: Any) -> Iterator[dict[Any, Any]]:
            request = Request(*inputs)
            rates: dict[str, float] = {}
            yield cleared(panels)
            for panel in panels:
                states = generate(self._models, panel.model, request, limits=self._limits)
                try:
                    with closing(states):
                        for now in states:
                            text = escape(written(request, now.texts))
                            yield {panel.text: text, panel.figures: figures(now)}
                except ShortLLMError as error:
                    yield {panel.figures: failure(error)}
                    continue
                rates[panel.model.name] = now.tokens_per_s or 0.0
            if rates:  # once per run: a plot that is updated while it is drawn may stay as it was
                batch = f" × {request.batch}" if request.batch > 1 else ""
                length = f"{'up to ' if request.chat else ''}{counted(request.new_tokens, 'token')}"
                title = f"Run {len(history) + 1}: {length}{batch}"
                yield self._drawn([*history, (title, rates)])

        return run

    def _drawn(self, history: History) -> dict[Any, Any]:
        """The charts of the last runs, the newest first, all to one scale."""
        import gradio as gr
        import pandas as pd

        shown = history[-RUNS:][::-1]
        highest = max((rate for _, rates in shown for rate in rates.values()), default=0)
        updates: dict[Any, Any] = dict.fromkeys(self._charts, gr.update(visible=False))
        for chart, (title, rates) in zip(self._charts, shown, strict=False):
            # every chart has all models: the plot keeps the colors of those it had first
            rows = [(name, rates.get(name)) for name in self._colors]
            frame = pd.DataFrame(rows, columns=["model", "tokens/s"])
            updates[chart] = gr.update(value=frame, y_lim=[0, highest], label=title, visible=True)
        return updates | {self._history: history}

    def _start_over(self) -> dict[Any, Any]:
        """Everything as it was when the page was opened."""
        inputs = dict(zip(self._inputs, astuple(self._defaults), strict=True))
        return inputs | cleared(self._panels) | self._drawn([])

    def _api(
        self,
        model: str,
        prompt: str,
        output_tokens: int = 64,
        batch_size: int = 1,
        seed: int = 0,
        top_k: int = TOP_K,
        top_p: float = TOP_P,
        temperature: float | None = None,
        chat: bool | None = None,
    ) -> dict[str, Any]:
        """Text of one model, by name; by default an answer if the model has a chat template."""
        import gradio as gr

        try:
            chosen = self._models.named(model)
            chat = chosen.has_chat_template if chat is None else chat
            temperature = temperature_of(chat) if temperature is None else temperature
            request = Request(
                prompt, output_tokens, batch_size, seed, top_k, top_p, temperature, chat
            )
            *_, last = generate(self._models, chosen, request, limits=self._limits)
        except ShortLLMError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return asdict(last) | {"tokens_per_s": last.tokens_per_s}


def defaults(models: Models, limits: Limits) -> Request:
    """What the page asks when it is opened: a question if all models have a chat template."""
    chat = all(one.has_chat_template for one in models.models)
    return Request(
        examples_for(models.models[0], chat=chat)[0],
        new_tokens=min(128 if chat else 64, limits.new_tokens),
        temperature=temperature_of(chat),
        chat=chat,
    )


def examples_for(model: DemoModel, *, chat: bool) -> tuple[str, ...]:
    """Prompts that suit a model."""
    if model.info.id == EMBEDDED:
        return EMBEDDED_EXAMPLES
    return CHAT_EXAMPLES if chat else EXAMPLES


def temperature_of(chat: bool) -> float:
    """The usual temperature of answers and of plain text."""
    return CHAT_TEMPERATURE if chat else TEMPERATURE


def cleared(panels: list[Panel]) -> dict[Any, Any]:
    """The panels without text and figures."""
    texts: dict[Any, Any] = {panel.text: "" for panel in panels}
    return texts | {panel.figures: figures(None) for panel in panels}


def written(request: Request, texts: list[str]) -> str:
    """Prompt and text, or the answer alone; the texts of a batch are numbered."""
    prompt = "" if request.chat else request.prompt
    if len(texts) == 1:
        return prompt + texts[0]
    numbered = [f"{number}. {text.lstrip()}" for number, text in enumerate(texts, 1)]
    return "\n\n".join([prompt, *numbered] if prompt else numbered)


def head(model: DemoModel, first: DemoModel, color: str) -> str:
    """Name and size of a model, and a cell per block of the model it was shortened from.

    A cell is filled as far as its block has parameters; a removed block is dashed.
    """
    info = model.info
    largest = max(*info.parameters_per_block, *first.info.parameters_per_block)
    part = dict(zip(model.kept, info.parameters_per_block, strict=True))
    cells = "".join(
        f'<i class="kept" style="--part: {part[block] / largest:.3f}"></i>'
        if block in part
        else '<i class="gone"></i>'
        for block in range(model.source_blocks)
    )
    same = info.parameters == first.info.parameters
    less = "" if same else change(first.info.parameters, info.parameters)
    sizes = {
        "parameters": f"{short_count(info.parameters)} {less}",
        "blocks": str(info.blocks),
        "size": short_bytes(info.bytes),
    }
    label = f"{info.blocks} of {model.source_blocks} blocks"
    return (
        f'<div class="head" style="--color: {color}"><h3>{escape(model.name)}</h3>'
        f'{numbers(sizes)}<div class="blocks" role="img" aria-label="{label}">{cells}</div></div>'
    )


def figures(progress: Progress | None) -> str:
    """Time, tokens, throughput and memory of a text; a dash for what is not known."""
    state = "idle" if progress is None else progress.state
    shown = dict.fromkeys(("time", "tokens", "throughput", "first token", "memory"), NONE)
    if progress and progress.tokens_per_s and progress.first_token_s:
        shown = {
            "time": f"{progress.seconds:.2f} s",
            "tokens": f"{progress.tokens:,}",
            "throughput": f"{number(progress.tokens_per_s, 3)} tokens/s",
            "first token": f"{1000 * progress.first_token_s:,.0f} ms",
            "memory": short_bytes(progress.peak_bytes),
        }
    return f'<div class="figures" data-state="{state}">{numbers(shown)}</div>'


def failure(error: ShortLLMError) -> str:
    """Why a request was refused, in place of the figures."""
    message = str(error)
    sentence = escape(message[0].upper() + message[1:])
    return f'<div class="figures" data-state="failed"><p role="alert">{sentence}.</p></div>'


def numbers(values: Mapping[str, str]) -> str:
    """Names above their values."""
    pairs = (f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in values.items())
    return f'<dl class="numbers">{"".join(pairs)}</dl>'


def serve(
    models: Models,
    *,
    limits: Limits,
    host: str = LOCALHOST,
    port: int | None = None,
    share: bool = False,
) -> tuple[gr.Blocks, str]:
    """Serve the page from background threads; returns the page and its address.

    The default port is the first free one from 7860 on. `share` adds a public address that gradio
    gives out for a week.
    """
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware

    if share or host not in (LOCALHOST, "localhost", "::1"):
        log.warning("anyone who can reach the page can use the models: there are no accounts")
    page = Page(models, limits).blocks
    sans, mono = (  # of the system: others would be loaded from elsewhere
        [gr.themes.Font(name) for name in names]
        for names in (("system-ui", "sans-serif"), ("ui-monospace", "monospace"))
    )
    try:
        _, local, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            allowed_paths=[],
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            theme=gr.themes.Default(primary_hue="blue", font=sans, font_mono=mono),
            css=CSS,
            app_kwargs={"middleware": [Middleware(BaseHTTPMiddleware, dispatch=guard)]},
        )
    except OSError as error:
        where = host if port is None else f"port {port} of {host}"
        raise ShortLLMError(
            f"{where} is in use or not an address of this machine. Give another --port or --host"
        ) from error
    return page, public or local


async def guard(request: HTTPRequest, pass_on: RequestResponseEndpoint) -> Response:
    """Refuse uploads, for which the page has no use, and content from other servers."""
    from starlette.responses import PlainTextResponse

    if "/upload" in request.url.path:
        return PlainTextResponse("uploads are not allowed", 403)
    response = await pass_on(request)
    response.headers["content-security-policy"] = OWN_CONTENT
    return response
