"""The sections about blocks: their importance, which were removed, and every number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shortllm.format import NONE, number, signed
from shortllm.pruning.planning import removal_order
from shortllm.pruning.records import BlockScores
from shortllm.reporting.load import RunResults
from shortllm.reporting.methods import PLACE, criterion_info
from shortllm.reporting.parts import (
    Column,
    Details,
    Figure,
    Paragraph,
    Part,
    Section,
    Status,
    Strip,
    StripCell,
    table_of,
)
from shortllm.reporting.plots.bars import BarPlot
from shortllm.reporting.protocol import calibration_phrase

LONG_TABLE = 16
"""Number of blocks from which their table is folded."""


def importance_section(results: RunResults) -> Section | None:
    """The plot of the criterion, one bar per block."""
    scores = results.scores
    if scores is None:
        return None
    heights, label = _heights(scores)
    plot = BarPlot(
        heights=heights,
        statuses=[results.status(block) for block in range(len(heights))],
        y_label=label,
        below_label="no increase" if _is_increase(scores) else "too small for the axis",
        span=_span(results),
    )
    drawing = plot.figure()
    caption = " ".join(_importance_caption(results, scores, heights, plot))
    figure = Figure(drawing.svg, drawing.alt, caption)
    return Section("importance", "Block importance", [figure])


def _importance_caption(
    results: RunResults, scores: BlockScores, heights: Sequence[float], plot: BarPlot
) -> Iterator[str]:
    """What the bars are, one sentence after the other."""
    criterion, order = scores.criterion, _order(results)
    if _is_increase(scores):
        yield (
            "Each bar shows how much the perplexity rises when that block alone is removed, from "
            f"{number(scores.intact)} for the intact model."
        )
    elif order:
        yield (
            f"Blocks were removed one after the other, each time the least important by "
            f"{scores.options.get('inner')} in the remaining model: "
            f"{', then '.join(map(str, order))}. The bars show this order; kept blocks follow, "
            "protected ones last."
        )
    elif scores.search:
        yield (
            f"{criterion} chose the removed blocks together, not one by one. The bars order them, "
            f"and then the other blocks, by {scores.search.ordered_by}; protected blocks come last."
        )
    elif criterion_info(criterion).label == PLACE:
        yield f"The order in which {criterion} removes blocks; higher means keep."
    else:
        yield f"The importance of each block by {criterion}; higher means keep."
    if scores.spans and (sentence := _span_sentence(results, scores.spans)):
        yield sentence
    if results.calibration and scores.calibration is not None:
        yield f"Measured on {calibration_phrase(results.calibration)}, in {scores.dtype}."
    if plot.log_floor is not None:
        yield "The axis is logarithmic."
    elif plot.linear_floor:
        yield f"The axis starts at {plot.linear_floor:,g}, not at 0."
    helpful = [block for block, height in enumerate(heights) if height < 0]
    if helpful and _is_increase(scores):
        yield (
            f"Removing block{'s' if len(helpful) > 1 else ''} {', '.join(map(str, helpful))} alone "
            "lowers the perplexity."
        )


def _is_increase(scores: BlockScores) -> bool:
    return criterion_info(scores.criterion).in_nats and scores.intact is not None


def _heights(scores: BlockScores) -> tuple[list[float], str]:
    """Height of each bar, and the label of the axis."""
    if criterion_info(scores.criterion).in_nats and scores.intact is not None:
        label = f"increase in perplexity (intact: {number(scores.intact)})"
        return [value - scores.intact for value in scores.values], label
    label = criterion_info(scores.criterion).label
    if label == PLACE:
        rank = _ranks(scores)
        return [float(rank[block]) for block in range(len(rank))], label
    if scores.intact is not None:
        label += f"; intact: {number(scores.intact)}"
    return scores.importance, label


def _ranks(scores: BlockScores) -> dict[int, int]:
    """The place of each block in the removal order, from 1."""
    order = removal_order(scores.importance, protected=[])
    return {block: place for place, block in enumerate(order, start=1)}


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


def _span_sentence(results: RunResults, spans: Sequence[Sequence[float]]) -> str:
    """How the removed span compares with the others of its length; empty for single blocks."""
    found, count = _span(results), len(results.plan.removed)
    if found is None or count == 1:
        return ""
    protected, distances = set(results.plan.protected), spans[count - 1]
    free = [
        distance
        for start, distance in enumerate(distances)
        if not protected & set(range(start, start + count))
    ]
    distance, least = distances[found[0]], ""
    if distance <= min(free, default=distance):
        least = f", the smallest of the {len(free)} spans of {count} blocks that may be removed"
    return (
        f"The bars are single blocks, but blocks {found[0]} to {found[1]} were removed as one "
        f"span. The angular distance between its input and its output is {number(distance)}{least}."
    )


def strip_section(results: RunResults) -> Section:
    """The model as a row of cells, with the removed blocks crossed out."""
    plan, new_index = results.plan, results.new_index
    cells = [
        StripCell(block, results.status(block), new_index.get(block))
        for block in range(plan.model.blocks)
    ]
    key: list[tuple[Status, str]] = []
    order, span = _order(results), _span(results)
    if plan.removed:
        text = f"removed: {', '.join(map(str, plan.removed))}"
        if order and len(order) > 1:
            text = f"removed in this order: {', '.join(map(str, order))}"
        elif span and len(plan.removed) > 1:
            text = f"removed as one span: {span[0]} to {span[1]}"
        key.append(("removed", text))
    if plan.protected:
        key.append(("protected", f"protected: {', '.join(map(str, sorted(plan.protected)))}"))
    parts: list[Part] = [Strip(cells, key)]
    if results.target:
        text = f"Requested: {results.target.described}."
        text += "" if results.target.is_met else " This misses the target."
        parts.append(Paragraph(text))
    return Section("strip", "Removed blocks", parts)


def block_section(results: RunResults) -> Section | None:
    """Every number behind the plot."""
    scores = results.scores
    if scores is None:
        return None
    count = len(scores.importance)
    rank, new_index = _ranks(scores), results.new_index
    searched = scores.removed is not None
    same = searched or scores.values == scores.importance
    unscored = results.plan.protected if scores.order is not None and not searched else []
    columns: list[Column[int]] = [("block", str)]
    if criterion_info(scores.criterion).label != PLACE:
        columns.append(("importance", lambda block: number(scores.importance[block], 5)))
    if not same:
        name = _value_name(scores)
        columns.append(
            (name, lambda b: NONE if b in unscored else number(scores.values[b], 5))
        )  # fmt: skip
    if scores.delta_nll is not None:
        deltas = scores.delta_nll
        columns.append(("Δ NLL [nats/token]", lambda block: signed(deltas[block], 3)))
    columns += [
        ("rank", lambda block: str(rank[block])),
        ("new index", lambda block: str(new_index.get(block, NONE))),
        ("status", lambda block: results.status(block)),
    ]
    table = table_of(range(count), columns, look=results.status)
    note = "Rank 1 is the least important block."
    if same and criterion_info(scores.criterion).in_nats:
        note = f"{note[:-1]}; the importance is the perplexity without the block."
    parts: list[Part] = [table, Paragraph(note)]
    if count > LONG_TABLE:
        parts = [Details(f"All {count} blocks", parts)]
    return Section("blocks", "All blocks", parts)


def _value_name(scores: BlockScores) -> str:
    """What the raw numbers are."""
    if criterion_info(scores.criterion).in_nats:
        return "perplexity without it"
    inner = scores.options.get("inner")
    return f"{inner} when last scored" if inner else "raw value"
