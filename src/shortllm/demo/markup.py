"""What a panel shows, as HTML: which model it is, what it writes, what that took."""

from __future__ import annotations

from html import escape

from shortllm.demo.generating import Progress
from shortllm.demo.models import DemoModel

HUES = 8
"""Colours of models in page.css; more models begin again."""

WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def title(models: list[DemoModel]) -> str:
    """The head of the page."""
    count = len(models)
    what = "one model" if count == 1 else f"{WORDS.get(count, count)} models side by side"
    return (
        '<header class="title"><p class="kicker">shortllm demo</p>'
        f"<h1>One prompt, {what}</h1></header>"
    )


def hue(place: int) -> str:
    """The colour of the model in this place, as a style."""
    return f"--hue: var(--line-{place % HUES + 1})"


def head(model: DemoModel, place: int, first: DemoModel) -> str:
    """Name, size, and the blocks that are left."""
    info = model.info
    less = ""
    if info.parameters < first.info.parameters:
        share = 100 * (1 - info.parameters / first.info.parameters)
        less = f'<span class="less">−{share:.0f} %</span>'
    sizes = (
        ("parameters", count(info.parameters) + less, f"{info.parameters:,}"),
        ("blocks", str(info.blocks), ""),
        ("size", size(info.bytes), f"{info.bytes:,} bytes"),
    )
    cells = "".join(
        f'<div title="{exact}"><dt>{name}</dt><dd>{shown}</dd></div>'
        for name, shown, exact in sizes
    )
    name = escape(model.name)
    return (
        f'<header class="head" style="{hue(place)}">'
        f'<h2 title="{name}"><i class="dot"></i>{name}</h2>'
        f'<dl class="sizes">{cells}</dl>{strip(model, first)}</header>'
    )


def strip(model: DemoModel, first: DemoModel) -> str:
    """A cell per block of the model it was cut from, filled as far as the block has parameters."""
    most = max(*model.info.parameters_per_block, *first.info.parameters_per_block)
    filled = dict(zip(model.kept, model.info.parameters_per_block, strict=True))
    cells = [
        f'<i class="kept" style="--part: {filled[block] / most:.3f}"></i>'
        if block in filled
        else '<i class="gone"></i>'
        for block in range(model.source_blocks)
    ]
    label = f"{model.info.blocks} of {model.source_blocks} blocks"
    return f'<div class="strip" role="img" aria-label="{label}">{"".join(cells)}</div>'


def idle() -> str:
    """A panel before anything was asked."""
    return _panel("idle", '<p class="quiet">Nothing generated yet</p>', None)


def waiting() -> str:
    """A panel whose turn has not come."""
    return _panel("waiting", '<p class="quiet">Waiting for its turn</p>', None)


def not_begun() -> str:
    """A panel that was stopped before its turn came."""
    return _panel("stopped", '<p class="quiet">Stopped before it began</p>', None)


def failed(message: str) -> str:
    """A panel that cannot do what was asked."""
    sentence = escape(message[0].upper() + message[1:])
    return _panel("failed", f'<p class="error" role="alert">{sentence}.</p>', None)


def written(prompt: str, progress: Progress) -> str:
    """The texts of a panel so far; several are numbered."""
    given = f'<span class="given">{escape(prompt)}</span>'
    if len(progress.texts) == 1:
        text = f'<p class="written">{given}{escape(progress.texts[0])}</p>'
    else:
        items = "".join(f"<li>{escape(one.lstrip())}</li>" for one in progress.texts)
        text = f'<div class="written">{given}<ol>{items}</ol></div>'
    return _panel(progress.state, text, progress)


def _panel(state: str, content: str, progress: Progress | None) -> str:
    """Text above, figures below; `data-state` says how far it is."""
    busy = "true" if state in ("waiting", "running") else "false"
    return (
        f'<section class="output" data-state="{state}" aria-busy="{busy}">'
        f'<div class="text"><div>{content}</div></div>{_figures(progress)}</section>'
    )


def _figures(progress: Progress | None) -> str:
    """Time, throughput and memory; a dash for what is not known."""
    rate = progress.tokens_per_s if progress else None
    first = progress.first_token_s if progress else None
    peak = progress.peak_bytes if progress else None
    began = progress is not None and progress.tokens > 0
    figures = (
        ("time", f"{progress.seconds:.2f} s" if progress and began else "–", ""),
        ("throughput", f"{rate:,.0f} tokens/s" if rate else "–", "of all sequences together"),
        ("first token", f"{1000 * first:,.0f} ms" if first else "–", ""),
        ("memory", size(peak) if peak else "–", "peak, without the other models' weights"),
    )
    cells = "".join(
        f'<div title="{note}"><dt>{name}</dt><dd>{value}</dd></div>'
        for name, value, note in figures
    )
    note = ""
    if progress is not None and progress.state == "stopped":
        note = f'<p class="note">Stopped after {progress.tokens} tokens</p>'
    return f'{note}<dl class="figures">{cells}</dl>'


def count(number: int) -> str:
    """4.67 M and the like, three digits."""
    return _short(number, ("", " K", " M", " B", " T"))


def size(number: int) -> str:
    """9.35 MB and the like, three digits, in powers of 1000."""
    return _short(number, (" B", " KB", " MB", " GB", " TB"))


def _short(number: float, units: tuple[str, ...]) -> str:
    power = 0
    while number >= 999.5 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    digits = 0 if power == 0 else max(0, 3 - len(str(int(number))))
    return f"{number:.{digits}f}{units[power]}"
