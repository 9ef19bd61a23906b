"""The page of one run: a function per section, from results to the parts of a page.

A function returns None where the run has nothing to show. A new section is a function and a line
in `sections_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from shortllm import criteria
from shortllm.criteria import PLACE
from shortllm.criteria.search import FITNESS, CandidateSet, Search, held_out_by
from shortllm.format import (
    NONE,
    change,
    counted,
    listed,
    number,
    percent,
    short_bytes,
    short_count,
    signed,
    spans,
)
from shortllm.pruning.records import BlockScores, PrunePlan
from shortllm.quantizing.options import QUANTIZED
from shortllm.reporting import measurements, parts, protocol
from shortllm.reporting.charts import BarPlot
from shortllm.reporting.load import RunResults
from shortllm.reporting.parts import (
    Cell,
    Column,
    Page,
    Paragraph,
    Part,
    Section,
    Status,
    Table,
)
from shortllm.reporting.probe import probe_section, probe_sentence, probe_table, probed
from shortllm.reporting.recovery import quantized_sentence, recovery_section, recovery_sentence
from shortllm.run_directory import PRUNED
from shortllm.surgery.card import Measured

LONG_TABLE = 16
"""Number of blocks from which their table is folded."""


def run_page(results: RunResults) -> Page:
    """The page of a run."""
    plan = results.plan
    return protocol.page_about(
        plan.model,
        title=f"{plan.model.blocks} → {counted(len(plan.kept), 'block')}",
        version=results.run.shortllm,
        verdict=verdict(results),
        sections=sections_of(results),
    )


def sections_of(results: RunResults) -> list[Section]:
    """The sections of the page, in order."""
    scores = results.scores
    found = [
        Section("figures", "Key figures", [key_figures(results), *_errors_note(results)]),
        importance_section(results, scores) if scores else None,
        search_section(results, scores) if scores else None,
        strip_section(results),
        block_section(results, scores) if scores else None,
        recovery_section(results),
        measurements.tasks_section(results),
        probe_section(results),
        measurements.speed_section(results.benchmark) if results.benchmark else None,
        measurements.drafted_section(results.benchmark),
        measurements.published_section(results),
        measurements.samples_section(results),
        protocol.run_protocol(results),
    ]
    return [section for section in found if section is not None]


def _errors_note(results: RunResults) -> list[Part]:
    note = measurements.errors_note(results.protocols().values())
    return [Paragraph(note)] if note else []


# ---- verdict and key figures


def verdict(results: RunResults) -> str:
    """What was removed, what it saves, what it costs, and what was recovered."""
    plan = results.plan
    if not plan.removed:
        return f"No block was removed: all {plan.model.blocks} remain."
    saved = percent(plan.reached.parameter_ratio)
    sentence = (
        f"Removing {len(plan.removed)} of {counted(plan.model.blocks, 'block')} saves "
        f"{saved} of the parameters"
    )
    pruned = results.evaluated.get(PRUNED)
    if pruned:
        saved_bytes = percent(1 - pruned.model.bytes / plan.model.bytes)
        sentence += f" and {'' if saved_bytes == saved else f'{saved_bytes} '}of the bytes on disk"
    return (
        f"{sentence}{_cost_of_removal(results)}.{recovery_sentence(results)}"
        f"{probe_sentence(results)}{quantized_sentence(results)}{measurements.speed_sentence(results.benchmark)}"
    )


def _cost_of_removal(results: RunResults) -> str:
    """Perplexities on the first two texts, where original and pruned model saw the same tokens."""
    after = results.perplexities(PRUNED)
    compared = [
        (protocol.perplexity_source(entry), entry, after[key])
        for key, entry in results.perplexities("original").items()
        if key in after
    ]
    sentence = ""
    for source, before, now in compared[:2]:
        if now.nll == before.nll:
            move = f"stays at {number(before.perplexity)}"
        else:
            move = f"from {number(before.perplexity)} to {number(now.perplexity)}"
        if not sentence and now.nll != before.nll:
            changed = measurements.perplexity_change(before, now)
            move = f"{'rises' if now.nll > before.nll else 'falls'} {move} ({changed})"
        sentence += f"{', and' if sentence else '; perplexity'} {move} on {source}"
    return sentence or "; the perplexity was not measured"


def measured(results: RunResults, name: str) -> Measured:
    """What a run found out about one of its checkpoints."""
    quantized = results.quantization if name == QUANTIZED else None
    own = [one for one in results.evaluated.values() if one.name in ("original", name)]
    tables = [key_figures(results, ["original", name])]
    if len(own) == 2 and own[1].zeroshot:
        tables.append(measurements.task_table(own))
    if len(own) == 2 and len(probed(own)) == 2:
        tables.append(probe_table(own))
    return Measured(
        tables=[[head, *rows] for head, rows in (table.plain() for table in tables)],
        protocol=protocol.protocol_rows(replace(results, quantization=quantized)),
        command=protocol.command_line(results.run.command),
        quality=name in results.evaluated,
    )


def key_figures(results: RunResults, names: Collection[str] = ()) -> Table:
    """A row for blocks, parameters, bytes and each perplexity, with changes from the original.

    Args:
        names: of the models to show. Default: all.
    """
    plan, original = results.plan, results.plan.model
    models = {"original": original} | {n: one.model for n, one in results.evaluated.items()}
    sizes: dict[str, tuple[int, int, int | None]] = {
        name: (one.blocks, one.parameters, one.bytes) for name, one in models.items()
    }
    # plan.json knows the size of the pruned model, except for its bytes
    sizes.setdefault(PRUNED, (len(plan.kept), original.parameters - plan.reached.parameters, None))

    if names:
        sizes = {name: size for name, size in sizes.items() if name in names}

    shown: dict[str, Callable[[Any], str]] = {
        "blocks": str, "parameters": short_count, "bytes on disk": short_bytes
    }  # fmt: skip
    rows = []
    for place, (what, show) in enumerate(shown.items()):
        values = [size[place] for size in sizes.values()]
        cells = [(show(value), change(values[0], value)) for value in values]
        rows.append(measurements.compared_row(Cell(what), cells))
    by_model = [results.perplexities(name) for name in sizes]
    for key, example in results.protocols().items():
        found = [perplexities.get(key) for perplexities in by_model]
        cells = [(str(one or NONE), measurements.perplexity_change(found[0], one)) for one in found]
        text = Cell(
            f"perplexity, {protocol.perplexity_source(example)}", protocol.segments_phrase(example)
        )
        rows.append(measurements.compared_row(text, cells))
    return Table(parts.row("", *sizes), rows)


# ---- blocks: their importance, which were removed, and every number


def _axis(scores: BlockScores) -> tuple[str, bool]:
    """What the criterion's axis says, and whether its numbers are perplexities.

    The criterion may be one that is not registered here.
    """
    criterion = criteria.find(scores.criterion)
    if criterion is None:
        return f"importance ({scores.criterion})", False
    return criterion.label, criterion.in_nats


def importance_section(results: RunResults, scores: BlockScores) -> Section:
    """The plot of the criterion, one bar per block."""
    near = results.plan.near_ties
    plot = importance_plot(scores, results.statuses, span=_span(results), near=near)
    caption = " ".join(_importance_caption(results, scores, plot))
    return Section("importance", "Block importance", [plot.figure(caption)])


def importance_plot(
    scores: BlockScores,
    statuses: Sequence[Status],
    *,
    span: tuple[int, int] | None = None,
    near: Sequence[int] = (),
) -> BarPlot:
    """A bar per block in the units of the criterion; for perplexities their increase.

    Args:
        statuses: what a plan does with each block.
        span: first and last block, where they were removed as one span.
        near: blocks whose place before or behind the cut may be chance.
    """
    heights, (label, _), intact = scores.importance, _axis(scores), scores.intact
    errors = scores.stderr
    if intact is not None and _is_increase(scores):
        label = f"increase in perplexity (intact: {number(intact)})"
        heights = [value - intact for value in scores.values]
        errors = scores.delta_stderr and [
            value * error for value, error in zip(scores.values, scores.delta_stderr, strict=True)
        ]
    elif label == PLACE:
        heights, errors = [float(scores.ranks[block]) for block in range(len(heights))], None
    elif intact is not None:
        label = f"{label}; intact: {number(intact)}"
    return BarPlot(
        heights=heights,
        statuses=statuses,
        y_label=label,
        below_label="no increase" if _is_increase(scores) else "too small for the axis",
        span=span,
        errors=errors or (),
        near=near,
    )


def _is_increase(scores: BlockScores) -> bool:
    """Whether the plot shows by how much the perplexity rises."""
    return scores.intact is not None and _axis(scores)[1]


def _importance_caption(results: RunResults, scores: BlockScores, plot: BarPlot) -> Iterator[str]:
    criterion, order, increase = scores.criterion, _order(results), _is_increase(scores)
    if increase:
        yield (
            "Each bar shows how much the perplexity rises when that block alone is removed, from "
            f"{number(scores.intact)} for the intact model."
        )
    elif order:
        yield (
            "Blocks were removed one after the other, each time the least important by "
            f"{scores.options.get('inner')} in the remaining model: "
            f"{', then '.join(map(str, order))}. The bars show this order; kept blocks follow, "
            "protected ones last."
        )
    elif scores.search:
        yield (
            f"{criterion} chose the removed blocks together, not one by one. The bars order them, "
            f"and then the other blocks, by {scores.search.ordered_by}; protected blocks come last."
        )
    elif plot.y_label == PLACE:
        yield f"The order in which {criterion} removes blocks; higher means keep."
    else:
        yield f"The importance of each block by {criterion}; higher means keep."
    if scores.spans and plot.span and len(results.plan.removed) > 1:
        yield _span_sentence(results.plan, scores.spans[len(results.plan.removed) - 1])
    if results.calibration and scores.calibration is not None:
        yield f"Measured on {protocol.calibration_phrase(results.calibration)}, in {scores.dtype}."
    if plot.errors:
        yield "Lines on the bars are standard errors over the samples."
    if plot.near:
        yield "≈ marks blocks whose place before or behind the cut is within noise."
    if plot.log_floor is not None:
        yield "The axis is logarithmic."
    elif plot.linear_floor:
        yield f"The axis starts at {plot.linear_floor:,g}, not at 0."
    errors = scores.delta_stderr or [0.0] * len(plot.heights)
    helpful = [
        str(block)
        for block, (change, error) in enumerate(zip(scores.delta_nll or (), errors, strict=False))
        if change + 2 * error < 0
    ]
    if helpful and increase:
        blocks = f"block{'s' if len(helpful) > 1 else ''} {', '.join(helpful)}"
        yield f"Removing {blocks} alone lowers the perplexity."


def _order(results: RunResults) -> list[int] | None:
    """The removed blocks in order, where each was chosen after the removal of those before it."""
    scores = results.scores
    by_rounds = scores is not None and scores.order is not None and scores.removed is None
    return results.plan.order if by_rounds and results.plan.criterion else None


def _span(results: RunResults) -> tuple[int, int] | None:
    """First and last removed block, where the criterion scores spans and one span was removed."""
    scores, removed = results.scores, results.plan.removed
    if scores is None or scores.spans is None or not results.plan.criterion or not removed:
        return None
    first, last = removed[0], removed[-1]
    return (first, last) if last - first + 1 == len(removed) else None


def _span_sentence(plan: PrunePlan, distances: Sequence[float]) -> str:
    first, count, protected = plan.removed[0], len(plan.removed), set(plan.protected)
    free = [
        distance
        for start, distance in enumerate(distances)
        if not protected & set(range(start, start + count))
    ]
    least = ""
    if distances[first] <= min(free, default=distances[first]):
        least = f", the smallest of the {len(free)} spans of {count} blocks that may be removed"
    return (
        f"The bars are single blocks, but blocks {first} to {plan.removed[-1]} were removed as one "
        "span. The angular distance between its input and its output is "
        f"{number(distances[first])}{least}."
    )


def strip_section(results: RunResults) -> Section:
    """The model as a row of cells, with the removed blocks crossed out."""
    plan, order, span = results.plan, _order(results), _span(results)
    key: list[tuple[Status, str]] = []
    if plan.removed:
        text = f"removed: {', '.join(map(str, plan.removed))}"
        if order and len(order) > 1:
            text = f"removed in this order: {', '.join(map(str, order))}"
        elif span and span[0] < span[1]:
            text = f"removed as one span: {span[0]} to {span[1]}"
        key.append(("removed", text))
    if plan.protected:
        key.append(("protected", f"protected: {', '.join(map(str, sorted(plan.protected)))}"))
    found: list[Part] = [parts.Strip(results.statuses, key)]
    if results.target:
        missed = "" if results.target.is_met else " This misses the target."
        found.append(Paragraph(f"Requested: {results.target.described}.{missed}"))
    if results.quality:
        found.append(
            Paragraph(
                f"Requested: {results.quality.described}. The number of blocks was chosen by this "
                "measurement."
            )
        )
    return Section("strip", "Removed blocks", found)


def block_section(results: RunResults, scores: BlockScores) -> Section:
    """Every number behind the plot."""
    _, in_nats = _axis(scores)
    note = "Rank 1 is the least important block."
    if in_nats and (scores.removed is not None or scores.values == scores.importance):
        note = f"{note[:-1]}; the importance is the perplexity without the block."
    if results.plan.near_ties:
        note += " ≈: removed or kept by less than the noise of the scores."
    found: list[Part] = [score_table(scores, results.plan), Paragraph(note)]
    if len(results.statuses) > LONG_TABLE:
        found = [parts.Details(f"All {len(results.statuses)} blocks", found)]
    return Section("blocks", "All blocks", found)


def score_table(scores: BlockScores, plan: PrunePlan | None = None) -> Table:
    """A row per block; with a plan also what it does with the block."""
    ranks, importance, values = scores.ranks, scores.importance, scores.values
    label, in_nats = _axis(scores)
    columns: list[Column[int]] = [("block", str)]
    if label != PLACE:
        columns.append(("importance", lambda block: number(importance[block], 5)))
    if label != PLACE and (errors := scores.stderr) is not None:
        columns.append(("± standard error", lambda block: number(errors[block], 2)))
    if scores.removed is None and values != importance:
        unscored = plan.protected if plan and scores.order is not None else []
        inner = scores.options.get("inner")
        name = f"{inner} when last scored" if inner else "raw value"
        columns.append(
            (
                "perplexity without it" if in_nats else name,
                lambda block: NONE if block in unscored else number(values[block], 5),
            )
        )
    if (deltas := scores.delta_nll) is not None:
        columns.append(("Δ NLL [nats/token]", lambda block: signed(deltas[block], 3)))
    if (paired := scores.delta_stderr) is not None:
        columns.append(("± paired by sample", lambda block: number(paired[block], 2)))
    columns.append(("rank", lambda block: str(ranks[block])))
    if plan is None:
        return parts.table_of(range(len(importance)), columns)
    new_index = {old: new for new, old in enumerate(plan.kept)}
    statuses = plan.statuses
    columns += [
        ("new index", lambda block: str(new_index.get(block, NONE))),
        ("status", lambda block: statuses[block] + " ≈" * (block in plan.near_ties)),
    ]
    return parts.table_of(range(len(statuses)), columns, look=lambda block: statuses[block])


# ---- search


def search_section(results: RunResults, scores: BlockScores) -> Section | None:
    """A row per candidate set; None without a search, or where another plan was used."""
    if scores.search is None or results.plan.criterion != scores.criterion:
        return None
    note = " ".join(_search_note(scores.search, scores.criterion))
    return Section("search", "Search", [search_table(scores.search), Paragraph(note)])


def search_table(found: Search) -> Table:
    """A row per candidate set; the set that was found is marked."""
    names = [one.criterion for one in found.candidates]
    on = "items" if found.fitness == "task" else "text"
    candidates = [*found.candidates, *([] if found.found.criterion in names else [found.found])]
    columns: list[Column[CandidateSet]] = [
        ("found by", lambda one: one.criterion),
        ("removes", lambda one: spans(one.removed)),
        (f"{FITNESS[found.fitness]} on the search {on}", lambda one: number(one.value, 5)),
    ]
    if found.held_out_samples:
        measured = FITNESS[held_out_by(found.fitness)]
        columns.append((f"{measured} on held-out text", lambda one: number(one.held_out, 5)))
    return parts.table_of(
        candidates, columns, look=lambda one: "best" * (one.criterion == found.found.criterion)
    )


def _search_note(found: Search, criterion: str) -> Iterator[str]:
    samples = f"{counted(found.search_samples, 'sample')} of the calibration text"
    held_out = counted(found.held_out_samples, "other sample")
    if found.found.criterion != criterion:
        yield f"All sets were found on {samples} and measured on {held_out}."
        yield f"{found.found.criterion} has the lowest perplexity there."
    else:
        if found.start is None:
            yield f"{criterion} found its set on {samples}."
        else:
            yield (
                f"The sets of single criteria were measured on {samples}. {criterion} started with "
                f"the best of them, by {found.start}, and accepted only improvements."
            )
        if found.held_out_samples:
            yield f"The last column was measured on {held_out}, which the search did not use."
    if found.start is not None:
        yield (
            f"The search took {counted(len(found.rounds), 'round')}, equivalent to "
            f"{number(found.evaluations)} measurements of one set. Stop reason: {found.stopped}."
        )
    if found.left_out:
        reasons = [f"{one.criterion} ({one.reason})" for one in found.left_out]
        yield f"Left out: {listed(reasons)}."
