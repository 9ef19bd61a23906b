"""The sections about blocks: their importance, which were removed, and every number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shortllm import criteria
from shortllm.criteria import PLACE
from shortllm.format import NONE, number, signed
from shortllm.pruning.planning import removal_order
from shortllm.pruning.records import BlockScores
from shortllm.reporting import parts
from shortllm.reporting.load import RunResults
from shortllm.reporting.parts import Column, Figure, Paragraph, Part, Section, Status
from shortllm.reporting.plots.bars import BarPlot
from shortllm.reporting.protocol import calibration_phrase

LONG_TABLE = 16
"""Number of blocks from which their table is folded."""


def _label(scores: BlockScores) -> str:
    """What the criterion's axis says; it may be one that is not registered here."""
    criterion = criteria.find(scores.criterion)
    return criterion.label if criterion else f"importance ({scores.criterion})"


def _is_perplexity(scores: BlockScores) -> bool:
    criterion = criteria.find(scores.criterion)
    return criterion is not None and criterion.in_nats


# ---- the plot


def importance_section(results: RunResults) -> Section | None:
    """The plot of the criterion, one bar per block."""
    scores = results.scores
    if scores is None:
        return None
    increase = scores.intact is not None and _is_perplexity(scores)
    heights, label = _heights(scores)
    plot = BarPlot(
        heights=heights,
        statuses=results.statuses,
        y_label=label,
        below_label="no increase" if increase else "too small for the axis",
        span=_span(results),
    )
    drawing = plot.figure()
    caption = " ".join(_importance_caption(results, scores, plot, increase=increase))
    figure = Figure(drawing.svg, drawing.alt, caption)
    return Section("importance", "Block importance", [figure])


def _importance_caption(
    results: RunResults, scores: BlockScores, plot: BarPlot, *, increase: bool
) -> Iterator[str]:
    """What the bars are, one sentence after the other."""
    criterion, order = scores.criterion, _order(results)
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
    elif _label(scores) == PLACE:
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
    helpful = [block for block, height in enumerate(plot.heights) if height < 0]
    if helpful and increase:
        blocks = f"block{'s' if len(helpful) > 1 else ''} {', '.join(map(str, helpful))}"
        yield f"Removing {blocks} alone lowers the perplexity."


def _heights(scores: BlockScores) -> tuple[list[float], str]:
    """Height of each bar, and the label of the axis."""
    label, intact = _label(scores), scores.intact
    if intact is not None and _is_perplexity(scores):
        label = f"increase in perplexity (intact: {number(intact)})"
        return [value - intact for value in scores.values], label
    if label == PLACE:
        rank = _ranks(scores)
        return [float(rank[block]) for block in range(len(rank))], label
    return scores.importance, label if intact is None else f"{label}; intact: {number(intact)}"


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


# ---- strip and table


def strip_section(results: RunResults) -> Section:
    """The model as a row of cells, with the removed blocks crossed out."""
    plan, order, span = results.plan, _order(results), _span(results)
    key: list[tuple[Status, str]] = []
    if plan.removed:
        text = f"removed: {', '.join(map(str, plan.removed))}"
        if order and len(order) > 1:
            text = f"removed in this order: {', '.join(map(str, order))}"
        elif span and len(plan.removed) > 1:
            text = f"removed as one span: {span[0]} to {span[1]}"
        key.append(("removed", text))
    if plan.protected:
        key.append(("protected", f"protected: {', '.join(map(str, sorted(plan.protected)))}"))
    found: list[Part] = [parts.Strip(results.statuses, key)]
    if results.target:
        missed = "" if results.target.is_met else " This misses the target."
        found.append(Paragraph(f"Requested: {results.target.described}.{missed}"))
    return Section("strip", "Removed blocks", found)


def score_table(scores: BlockScores, statuses: Sequence[Status], unscored: Sequence[int]) -> Part:
    """Every number of each block, and its place in the removal order."""
    rank, importance, values = _ranks(scores), scores.importance, scores.values
    strip = parts.Strip(statuses)
    new_index = {block: new for block, _, new in strip.cells() if new is not None}
    columns: list[Column[int]] = [("block", str)]
    if _label(scores) != PLACE:
        columns.append(("importance", lambda block: number(importance[block], 5)))
    if scores.removed is None and values != importance:
        inner = scores.options.get("inner")
        name = f"{inner} when last scored" if inner else "raw value"
        columns.append(
            (
                "perplexity without it" if _is_perplexity(scores) else name,
                lambda block: NONE if block in unscored else number(values[block], 5),
            )
        )
    if scores.delta_nll is not None:
        deltas = scores.delta_nll
        columns.append(("Δ NLL [nats/token]", lambda block: signed(deltas[block], 3)))
    columns += [
        ("rank", lambda block: str(rank[block])),
        ("new index", lambda block: str(new_index.get(block, NONE))),
        ("status", lambda block: statuses[block]),
    ]
    return parts.table_of(range(len(importance)), columns, look=lambda block: statuses[block])


def block_section(results: RunResults) -> Section | None:
    """Every number behind the plot."""
    scores = results.scores
    if scores is None:
        return None
    searched, count = scores.removed is not None, len(scores.importance)
    unscored = results.plan.protected if scores.order is not None and not searched else []
    note = "Rank 1 is the least important block."
    if _is_perplexity(scores) and (searched or scores.values == scores.importance):
        note = f"{note[:-1]}; the importance is the perplexity without the block."
    found: list[Part] = [score_table(scores, results.statuses, unscored), Paragraph(note)]
    if count > LONG_TABLE:
        found = [parts.Details(f"All {count} blocks", found)]
    return Section("blocks", "All blocks", found)
