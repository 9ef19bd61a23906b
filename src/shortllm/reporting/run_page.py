"""The page of one run: a function per section, from results to the parts of a page.

A function returns None where the run has nothing to show. A new section is a function and a line
in `run_page`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from shortllm.criteria.records import CandidateSet, Search
from shortllm.format import (
    NONE,
    change,
    counted,
    figure,
    listed,
    number,
    percent,
    short_bytes,
    short_count,
    spans,
)
from shortllm.published import PublishedComparison, compared_blocks, published_comparison
from shortllm.reporting import parts
from shortllm.reporting.blocks import block_section, importance_section, strip_section
from shortllm.reporting.healing import healed_sentence, healing_section, quantized_sentence
from shortllm.reporting.load import RunResults
from shortllm.reporting.measurements import (
    compared_row,
    speed_section,
    speed_sentence,
    tasks_section,
)
from shortllm.reporting.parts import Cell, Column, Page, Paragraph, Row, Section, Table, row
from shortllm.reporting.protocol import page_about, perplexity_source, run_protocol, segments_phrase
from shortllm.run_directory import PRUNED

_FITNESS = {
    "ppl": "perplexity on the search text",
    "kl": "KL divergence from the intact model on the search text",
}


def run_page(results: RunResults) -> Page:
    """Every section that the run has something to show for, in order."""
    plan = results.plan
    return page_about(
        plan.model,
        title=f"{plan.model.blocks} → {counted(len(plan.kept), 'block')}",
        version=results.run.shortllm,
        verdict=verdict(results),
        sections=sections_of(results),
    )


def sections_of(results: RunResults) -> list[Section]:
    """The sections of the page."""
    found = [
        Section("figures", "Key figures", [key_figures(results)]),
        importance_section(results),
        _search_section(results),
        strip_section(results),
        block_section(results),
        healing_section(results),
        tasks_section(results),
        speed_section(results.benchmark) if results.benchmark else None,
        _published_section(results),
        _samples_section(results),
        run_protocol(results),
    ]
    return [section for section in found if section is not None]


# ---- verdict and key figures


def verdict(results: RunResults) -> str:
    """What was removed, what it saves, what it costs, and what healing recovered."""
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
        f"{sentence}{_cost_of_removal(results)}.{healed_sentence(results)}"
        f"{quantized_sentence(results)}{speed_sentence(results.benchmark)}"
    )


def _cost_of_removal(results: RunResults) -> str:
    """Perplexities on the first two texts, where original and pruned model saw the same tokens."""
    after = results.perplexities(PRUNED)
    compared = [
        (perplexity_source(entry), entry.perplexity, after[key].perplexity)
        for key, entry in results.perplexities("original").items()
        if key in after
    ]
    sentence = ""
    for source, before, now in compared[:2]:
        if now == before:
            move = f"stays at {number(before)}"
        else:
            move = f"from {number(before)} to {number(now)}"
        if not sentence and now != before:
            move = f"{'rises' if now > before else 'falls'} {move} ({change(before, now)})"
        sentence += f"{', and' if sentence else '; perplexity'} {move} on {source}"
    return sentence or "; the perplexity was not measured"


def key_figures(results: RunResults) -> Table:
    """A row for blocks, parameters, bytes and each perplexity, with changes from the original."""
    plan, original = results.plan, results.plan.model
    sizes: dict[str, tuple[int, int, int | None]] = {
        "original": (original.blocks, original.parameters, original.bytes)
    }
    for name, entry in results.evaluated.items():
        if name != "original":
            sizes[name] = (entry.model.blocks, entry.model.parameters, entry.model.bytes)
    # plan.json knows the size of the pruned model, except for its bytes
    sizes.setdefault(PRUNED, (len(plan.kept), original.parameters - plan.reached.parameters, None))

    def compared(name: Cell, values: Sequence[Any], show: Callable[[Any], str]) -> Row:
        return compared_row(name, [(show(value), change(values[0], value)) for value in values])

    shown: dict[str, Callable[[Any], str]] = {
        "blocks": str, "parameters": short_count, "bytes on disk": short_bytes
    }  # fmt: skip
    rows = [
        compared(Cell(what), [size[place] for size in sizes.values()], show)
        for place, (what, show) in enumerate(shown.items())
    ]
    by_model = [results.perplexities(name) for name in sizes]
    for key, example in results.protocols().items():
        values = [found[key].perplexity if key in found else None for found in by_model]
        text = Cell(f"perplexity, {perplexity_source(example)}", segments_phrase(example))
        rows.append(compared(text, values, number))
    return Table(row("", *sizes), rows)


# ---- search


def _search_section(results: RunResults) -> Section | None:
    """A row per candidate set; None without a search, or where another plan was used."""
    scores = results.scores
    if scores is None or scores.search is None or results.plan.criterion != scores.criterion:
        return None
    note = Paragraph(" ".join(_search_note(scores.search, scores.criterion)))
    return Section("search", "Search", [search_table(scores.search), note])


def search_table(found: Search) -> Table:
    """A row per candidate set; the set that was found is marked."""
    names = [one.criterion for one in found.candidates]
    candidates = [*found.candidates, *([] if found.found.criterion in names else [found.found])]
    columns: list[Column[CandidateSet]] = [
        ("found by", lambda one: one.criterion),
        ("removes", lambda one: spans(one.removed)),
        (_FITNESS[found.fitness], lambda one: number(one.value, 5)),
    ]
    if found.held_out_samples:
        columns.append(("perplexity on held-out text", lambda one: number(one.held_out, 5)))
    return parts.table_of(
        candidates, columns, look=lambda one: "best" * (one.criterion == found.found.criterion)
    )


def _search_note(found: Search, criterion: str) -> Iterator[str]:
    """How the search went, one sentence after the other."""
    samples = f"{counted(found.search_samples, 'sample')} of the calibration text"
    held_out = counted(found.held_out_samples, "other sample")
    if found.found.criterion != criterion:
        yield f"All sets were found on {samples} and measured on {held_out}."
        yield f"{found.found.criterion} has the lowest perplexity there."
    else:
        yield (
            f"The sets of single criteria were measured on {samples}. {criterion} started with the "
            f"best of them, by {found.start}, and accepted only improvements."
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


# ---- published figures and samples


def _published_section(results: RunResults) -> Section | None:
    """A row per number that was published and measured by the same protocol."""
    if not results.run.recipe.get("published"):
        return None
    from shortllm.recipe import Recipe

    recipe = Recipe.model_validate(results.run.recipe)
    source = recipe.published
    assert source is not None
    text = f"Published in {source.source}"
    text += f"; the healed model was released as {source.checkpoint}." if source.checkpoint else "."
    if source.removed:
        text += f" {compared_blocks(source, results.plan.removed)}"
    rows = []
    if results.evaluation is not None:
        rows = published_comparison(source, results.evaluation, recipe.evaluation)
    note = "No published figure was measured here by the same protocol."
    if rows:
        note = (
            "Only figures of the same protocol are compared: 128 tokens per segment, the same BOS, "
            "whole texts and tasks. The published shortened model was healed with LoRA and is "
            "compared with healed models."
        )
    table = [published_table(rows)] if rows else []
    return Section(
        "published", "Against published results", [Paragraph(text, ""), *table, Paragraph(note)]
    )


def published_table(rows: Sequence[PublishedComparison]) -> Table:
    """Our figures next to the published ones."""
    columns: list[Column[PublishedComparison]] = [
        ("quantity", lambda one: Cell(one.quantity, one.model)),
        ("published", lambda one: figure(one.published)),
        ("here", lambda one: Cell(figure(one.ours), look="after")),
        ("change", lambda one: Cell(change(one.published, one.ours), look="change")),
    ]
    return parts.table_of(rows, columns)


def _samples_section(results: RunResults) -> Section | None:
    """Continuations of the same prompt by each model, side by side."""
    columns = [(entry, entry.samples) for entry in results.evaluated.values() if entry.samples]
    count = max((len(written.texts) for _, written in columns), default=0)
    if not count:
        return None
    _, first = columns[0]
    same_prompt = all(written.prompt == first.prompt for _, written in columns)
    rows = [
        [
            parts.Sample(
                label=f"{entry.name}, {counted(entry.model.blocks, 'block')}"
                f"{f', sample {place + 1}' if count > 1 else ''}",
                text=written.texts[place].lstrip(" ") if place < len(written.texts) else NONE,
                prompt="" if same_prompt or place else written.prompt,
            )
            for entry, written in columns
        ]
        for place in range(count)
    ]
    note = (
        f"Sampled with up to {counted(first.new_tokens, 'new token')}, top-k {first.top_k}, "
        f"top-p {first.top_p:g}, temperature {first.temperature:g}, seed {first.seed}. All samples "
        "are shown."
    )
    shown = parts.Samples(first.prompt if same_prompt else "", rows)
    return Section("samples", "Generated text", [shown, Paragraph(note)])
