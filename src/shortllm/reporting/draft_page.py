"""The page of a draft: gain against blocks removed, what is accepted, and what to type.

shortllm draft embedded
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shortllm.benchmark.draft_lines import draft_lines
from shortllm.drafting.options import PLAIN, Drafting, DraftSize
from shortllm.format import NONE, counted, fixed, model_name, number, percent, spans
from shortllm.reporting import parts, protocol
from shortllm.reporting.charts import DASHED, Line, LinePlot
from shortllm.reporting.load import RunFile
from shortllm.reporting.parts import Cell, Command, Heading, Page, Paragraph, Part, Section, Table
from shortllm.reporting.plots import COLOURS, line_style

MARKED = {"linestyle": "none", "marker": "*", "markersize": 13, "color": COLOURS["removed"]}
"""Look of the best point."""


def draft_page(found: Drafting, run: RunFile) -> Page:
    """What every number of blocks gains, predicted and measured."""
    best = found.best
    return protocol.page_about(
        found.model,
        title=f"a draft of {found.model.blocks - best.remove} of its "
        f"{counted(found.model.blocks, 'block')}",
        version=run.shortllm,
        verdict=f"{found.verdict[:1].upper()}{found.verdict[1:]}.",
        sections=[
            Section("gain", "Speed against removed blocks", _gains(found)),
            Section("acceptance", "What the intact model accepts", _acceptance(found)),
            Section("measured", "What was measured", _measured(found)),
            Section("use", "What to type", _lines(found)),
            protocol.draft_protocol(found, run),
        ],
    )


def gain_plot(found: Drafting) -> LinePlot:
    """Gain against removed blocks: predicted, measured, and the best point."""
    places = [float(one.remove) for one in found.sizes]
    lines = [
        Line(name="predicted", points=_points(found.sizes, lambda one: one.predicted)),
        Line(
            name="by the formula",
            points=_points(found.sizes, lambda one: one.ideal),
            style=DASHED,
        ),
    ]
    for name in dict.fromkeys(one.name for one in found.measured):
        own = [one for one in found.measured if one.name == name]
        points = [(float(one.remove), one.speedup) for one in own]
        called = "measured" if name == PLAIN else f"measured, {name}"
        lines.append(Line(name=called, points=points, style=_dots(len(lines))))
    best = found.best
    lines.append(
        Line(
            name="best", points=[(float(best.remove), best.speedup)], style={**MARKED, "zorder": 5}
        )
    )
    ends = (min(places) - 0.3, max(places) + 0.3)
    style = {"color": COLOURS["muted"], "linewidth": 0.9}
    lines.append(Line(name="without a draft", points=[(end, 1.0) for end in ends], style=style))
    return LinePlot(
        lines=lines,
        x_label=f"blocks removed, of {found.model.blocks}",
        y_label="speed with the draft, times that without",
        listed_by_end=True,
        name="the gain",
    )


def acceptance_plot(found: Drafting) -> LinePlot:
    """Part of the drafted tokens that is accepted, on the texts to choose by and on the others."""
    return LinePlot(
        lines=[
            Line(
                name="texts to choose by",
                points=_points(found.sizes, lambda one: one.chosen_on.acceptance),
            ),
            Line(
                name="texts to measure on",
                points=_points(found.sizes, lambda one: one.held_out.acceptance),
            ),
        ],
        x_label=f"blocks removed, of {found.model.blocks}",
        y_label="probability that a token is accepted",
        name="the acceptance",
    )


def size_table(found: Drafting) -> Table:
    """A row for each number of blocks."""
    best = found.best

    def measured(one: DraftSize) -> str:
        known = found.found(one.remove)
        return fixed(known.speedup) if known else NONE

    def is_best(one: DraftSize) -> str:
        return "best" if best.name == PLAIN and one.remove == best.remove else ""

    return parts.table_of(
        found.sizes,
        [
            ("blocks removed", lambda one: str(one.remove)),
            ("accepted", lambda one: percent(one.chosen_on.acceptance)),
            ("accepted, others", lambda one: percent(one.held_out.acceptance)),
            ("cost", lambda one: fixed(one.cost)),
            ("draft tokens", lambda one: str(one.draft_tokens or NONE)),
            ("ideal", lambda one: fixed(one.ideal)),
            ("predicted", lambda one: fixed(one.predicted)),
            ("measured", measured),
        ],
        look=is_best,
    )


def measured_table(found: Drafting) -> Table:
    """A row for each draft that was measured."""
    best = found.best
    return parts.table_of(
        found.measured,
        [
            ("draft", lambda one: Cell(one.name, counted(one.remove, "block") + " removed")),
            ("draft tokens", lambda one: str(one.draft_tokens)),
            ("drafts kept", lambda one: percent(one.kept)),
            ("tokens per step", lambda one: fixed(one.tokens_per_step)),
            ("tokens/s alone", lambda one: number(one.alone_tokens_per_s, 3)),
            ("tokens/s with it", lambda one: number(one.tokens_per_s, 3)),
            ("predicted", lambda one: fixed(one.predicted)),
            ("for these texts", lambda one: fixed(one.predicted_here)),
            ("measured", lambda one: Cell(fixed(one.speedup), "" if one.speedup > 1 else "slower")),
        ],
        look=lambda one: "best" if one is best else "",
    )


def _gains(found: Drafting) -> list[Part]:
    assert found.costs is not None
    verifying = ", ".join(
        f"{fixed(time)} with {counted(length, 'drafted token')}"
        for length, time in found.costs.verifying.items()
    )
    caption = (
        "How many times as fast text is written with the draft, at the best number of drafted "
        "tokens. The formula (Leviathan et al.) takes one forward of the intact model for a step; "
        f"here it takes {verifying} besides drafting, in tokens of the intact model. Measured on "
        "other texts than predicted on."
    )
    note = (
        "Cost: time of a drafted token, in tokens of the intact model alone, which takes "
        f"{number(1000 * found.costs.token_s, 3)} ms on {found.device_name}. Accepted, others: on "
        "the texts to measure on."
    )
    return [gain_plot(found).figure(caption), size_table(found), Paragraph(note)]


def _acceptance(found: Drafting) -> list[Part]:
    how = (
        "the likeliest tokens of both agree"
        if found.temperature == 0
        else (f"sampled at temperature {found.temperature:g}")
    )
    caption = (
        f"A drafted token is accepted with this probability ({how}): mean over "
        f"{counted(found.tokens, 'token')} that the intact model wrote itself."
    )
    after = [
        parts.row(one.name, percent(one.before.acceptance), percent(one.after.acceptance))
        for one in found.recovered
    ]
    shown: list[Part] = [acceptance_plot(found).figure(caption)]
    if after:
        shown.append(Table(parts.row("draft", "accepted before", "after"), after))
    return shown


def _measured(found: Drafting) -> list[Part]:
    shown: list[Part] = [measured_table(found)]
    removed = [
        (f"{one.name}, {counted(one.remove, 'block')} removed", spans(one.removed))
        for one in found.measured
    ]
    return [*shown, parts.Details("Removed blocks", [parts.Terms(removed)])]


def _lines(found: Drafting) -> list[Part]:
    """What to type, for the best draft that was measured."""
    best, gguf = found.best, found.model.gguf
    lines = draft_lines(
        gguf.file if gguf else model_name(found.model.id),
        f"{PLAIN}.gguf" if gguf and best.name == PLAIN else best.name,
        best.draft_tokens,
        found.temperature,
    )
    shown: list[Part] = [
        Paragraph("In the directory of this page. A model in a directory needs its path.", "")
    ]
    for program, text in lines.items():
        shown += [Heading(program), Command([text])]
    return shown


def _points(
    sizes: Sequence[DraftSize], height: Callable[[DraftSize], float | None]
) -> list[tuple[float, float]]:
    found = ((float(one.remove), height(one)) for one in sizes)
    return [(place, value) for place, value in found if value is not None]


def _dots(place: int) -> dict[str, object]:
    """Markers alone: between measured sizes nothing is known."""
    return {**line_style(place), "linestyle": "none", "markersize": 7, "zorder": 4}
