"""What the probe found: a table, a plot, a section of the page and a sentence of its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shortllm.evaluation.options import EvaluatedModel
from shortllm.evaluation.probe.items import CHANCE
from shortllm.evaluation.probe.record import (
    Change,
    Probe,
    Share,
    change_of_repetition,
    changes,
)
from shortllm.format import NONE, SPACE, counted, fixed, listed, percent, signed
from shortllm.reporting import parts
from shortllm.reporting.load import RunResults
from shortllm.reporting.measurements import compared_row
from shortllm.reporting.parts import Cell, Details, Paragraph, Part, Section, Table
from shortllm.reporting.plots import COLOURS, MARKERS, Plot, legend_above
from shortllm.run_directory import PRUNED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED = 3
"""Falls that the verdict names; further ones are counted."""

NOTE = (
    "Shares of exercises in percent, ± one standard error over exercises; changes are paired. "
    "Greedy decoding has to write exactly the right answer. The standard error of a fall from high "
    "to low is about seven points. Of twenty capabilities that did not change, about one appears "
    "to change by two standard errors. Repetition: 4-grams of tokens that an open answer already "
    "had. Distinct: different 2-grams of "
    "all. The exercises are not a benchmark: they show changes of one model."
)


def probed(models: Sequence[EvaluatedModel]) -> dict[str, Probe]:
    """The probes by model that can be compared with that of the first one."""
    found = {one.name: one.probe for one in models if one.probe is not None}
    if not found:
        return {}
    first = next(iter(found.values())).items_fingerprint
    return {name: one for name, one in found.items() if one.items_fingerprint == first}


def probe_table(models: Sequence[EvaluatedModel]) -> Table:
    """A row per capability with what each model writes, and the repetition of open answers."""
    found = probed(models)
    first, *_ = found.values()
    by_model = [changes(first, probe) for probe in found.values()]
    rows = []
    for place, one in enumerate(first.capabilities):
        shares = [probe.capabilities[place].written for probe in found.values()]
        moved = [_points(each[place]) for each in by_model]
        cells = [(_shown(share), by) for share, by in zip(shares, moved, strict=True)]
        rows.append(compared_row(Cell(one.capability, counted(one.items, "exercise")), cells))
    if all(probe.answers for probe in found.values()):
        repeated = [change_of_repetition(first, probe) for probe in found.values()]
        cells = [(fixed(100 * one.after, 1), _points(one)) for one in repeated if one]
        rows.append(compared_row(Cell("repetition", "open answers"), cells))
        distinct = [probe.answers.distinct for probe in found.values() if probe.answers]
        rows.append(
            compared_row(Cell("distinct"), [(fixed(100 * one, 1), NONE) for one in distinct])
        )
    return Table(parts.row("exercises solved [%]", *found), rows)


def chosen_table(models: Sequence[EvaluatedModel]) -> Table:
    """A row per capability: how often the right one of four choices is the likeliest."""
    found = probed(models)
    first, *_ = found.values()
    rows = [
        parts.row(
            one.capability,
            *(_shown(probe.capabilities[place].chosen) for probe in found.values()),
        )
        for place, one in enumerate(first.capabilities)
    ]
    return Table(parts.row("right choice likeliest [%]", *found), rows)


def _shown(share: Share) -> str:
    error = "" if share.stderr is None else f" ± {fixed(100 * share.stderr, 1)}"
    return f"{fixed(100 * share.share, 1)}{error}"


def _points(one: Change) -> str:
    """'−44.0 ± 7.2 points'."""
    difference = 100 * (one.after - one.before)
    error = "" if one.stderr is None else f" ± {fixed(100 * one.stderr, 1)}"
    return f"{signed(difference, 3) if difference else '±0'}{error}{SPACE}points"


def probe_section(results: RunResults) -> Section | None:
    """Plot and table of what each model can do; None where no probe was put to one."""
    models = list(results.evaluated.values())
    if not probed(models):
        return None
    plot = probe_plot(models)
    chosen = Details(
        f"By likelihood, of four choices (chance: {percent(CHANCE, 0)})", [chosen_table(models)]
    )
    found: list[Part] = [plot.figure(), probe_table(models), Paragraph(NOTE), chosen]
    return Section("probe", "Exercises", found)


def probe_sentence(results: RunResults) -> str:
    """What fell by more than two standard errors; empty where no probe was put to the models."""
    found = probed(list(results.evaluated.values()))
    if "original" not in found or PRUNED not in found:
        return ""
    sentence = _fell(found["original"], found[PRUNED], "")
    recovered = [name for name in found if name in results.recovered_by]
    if recovered:
        sentence += _fell(found["original"], found[recovered[-1]], f"In the model {recovered[-1]}")
    return sentence


def _fell(before: Probe, after: Probe, where: str) -> str:
    """' Addition fell from 38 % to 0 %.': clear changes, the largest first."""
    clear = [one for one in changes(before, after) if one.is_clear]
    falls = sorted(
        (one for one in clear if one.after < one.before), key=lambda one: one.after - one.before
    )
    said = [
        f"{one.name} fell from {percent(one.before, 0)} to {percent(one.after, 0)}" for one in falls
    ]
    if len(said) > NAMED:
        others = len(said) - (NAMED - 1)
        said = [*said[: NAMED - 1], f"{others} other capabilities fell"]
    repeated = change_of_repetition(before, after)
    if repeated and repeated.is_clear and repeated.after > repeated.before:
        said.append(
            f"repetition rose from {percent(repeated.before, 0)} to {percent(repeated.after, 0)}"
        )
    text = listed(said) or "no capability in the probe fell clearly"
    text = f"{where}, {text}" if where else text[0].upper() + text[1:]
    return f" {text}."


def probe_plot(models: Sequence[EvaluatedModel]) -> CapabilityPlot:
    """What each model solves, by capability."""
    found = probed(models)
    first, *_ = found.values()
    return CapabilityPlot(
        capabilities=[one.capability for one in first.capabilities],
        shares={name: [one.written for one in probe.capabilities] for name, probe in found.items()},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CapabilityPlot(Plot):
    """A row per capability, and in it a mark with its standard error for each model."""

    capabilities: Sequence[str]
    shares: dict[str, Sequence[Share]]

    @property
    def _height(self) -> float:
        return 0.7 + 0.3 * len(self.capabilities)

    def _alt(self) -> str:
        said = (
            f"{name} {', '.join(percent(one.share, 0) for one in shares)}"
            for name, shares in self.shares.items()
        )
        return f"Exercises solved, by {', '.join(self.capabilities)}: {'; '.join(said)}."

    def _draw(self, axes: Axes) -> None:
        step = 0.7 / len(self.shares)
        for number, (name, shares) in enumerate(self.shares.items()):
            shift = (number - (len(self.shares) - 1) / 2) * step
            colour = ("protected", "removed", "kept")[min(number, 2)]
            axes.errorbar(
                [100 * one.share for one in shares],
                [place + shift for place in range(len(shares))],
                xerr=[100 * (one.stderr or 0.0) for one in shares],
                linestyle="none", marker=MARKERS[number % len(MARKERS)], markersize=5,
                color=COLOURS[colour], elinewidth=1.0, label=name, zorder=2,
            )  # fmt: skip
        axes.set_xlim(-3, 103)
        axes.set_yticks(range(len(self.capabilities)), self.capabilities)
        axes.set_ylim(len(self.capabilities) - 0.5, -0.5)
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("exercises solved [%]")
        legend_above(axes)
