"""The page of several runs: every model of each, quality against size and against latency.

shortllm compare runs/ppl runs/taylor
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shortllm import __version__
from shortllm.evaluation.options import EvaluatedModel, Perplexity
from shortllm.format import counted, number, short_count
from shortllm.quantizing.options import QUANTIZED
from shortllm.reporting.comparison import (
    BenchmarkCell,
    ComparedModel,
    ModelRow,
    common_cell,
    compared_model,
    main_text,
    models_table,
    points_of,
    trade_plots,
    trade_section,
)
from shortllm.reporting.load import Protocol, RunResults
from shortllm.reporting.parts import (
    Cell,
    Head,
    Heading,
    Paragraph,
    Part,
    Section,
    Strip,
    StripCell,
    Table,
)
from shortllm.reporting.plots.points import front
from shortllm.reporting.protocol import model_name, perplexity_source, segments_phrase
from shortllm.run_directory import PRUNED


def compared_models(runs: Mapping[str, RunResults]) -> list[ComparedModel]:
    """Every model of every run: the originals first, then run by run."""
    labels = protocol_labels(runs)
    cell = common_cell(*(run.benchmark for run in runs.values()))
    originals: dict[str, ComparedModel] = {}
    models = []
    for run, results in runs.items():
        for name, entry in results.evaluated.items():
            one = _model_of_run(results, name, entry, labels, cell)
            if name != "original":
                models.append(one.model_copy(update={"run": run}))
                continue
            known = originals.get(entry.model.fingerprint)
            originals[entry.model.fingerprint] = one if known is None else _merged(known, one)
    return [*originals.values(), *models]


def _merged(known: ComparedModel, other: ComparedModel) -> ComparedModel:
    """An original of two runs, which may have measured it on different texts."""
    latency = known.latency_s if known.latency_s is not None else other.latency_s
    return known.model_copy(
        update={
            "perplexity": other.perplexity | known.perplexity,
            "zeroshot_mean": known.zeroshot_mean or other.zeroshot_mean,
            "latency_s": latency,
            "speedup": 1.0 if latency is not None else None,
        }
    )


def protocol_labels(runs: Mapping[str, RunResults]) -> dict[Protocol, str]:
    """A label for each protocol; equal names of different protocols get more detail."""
    examples: dict[Protocol, Perplexity] = {}
    for results in runs.values():
        examples |= results.protocols()
    names = [perplexity_source(one) for one in examples.values()]
    labels: dict[Protocol, str] = {}
    for key, one in examples.items():
        name = perplexity_source(one)
        if names.count(name) > 1:
            name += f", {segments_phrase(one)}, BOS {one.bos}"
        same = sum(label == name for label in labels.values())
        labels[key] = f"{name} ({same + 1})" if same else name
    return labels


def _model_of_run(
    results: RunResults,
    name: str,
    entry: EvaluatedModel,
    labels: Mapping[Protocol, str],
    cell: BenchmarkCell | None,
) -> ComparedModel:
    benchmark, quantization = results.benchmark, results.quantization
    measured = None
    if benchmark is not None and cell is not None:
        measured = benchmark.find(name, *cell)
        if measured is None and name in results.healed_by:  # same shape as the shortened model
            measured = benchmark.find(PRUNED, *cell)
    is_original, unhealed = name == "original", name in ("original", PRUNED, QUANTIZED)
    return compared_model(
        entry,
        labels,
        benchmark,
        measured,
        run=None,
        original=model_name(results.plan.model.id),
        criterion=None if is_original else results.plan.criterion,
        healed_by=results.healed_by.get(name) or (None if unhealed else name),
        quantized_by=quantization.method if quantization and name == QUANTIZED else None,
        removed=[] if is_original else results.plan.removed,
    )


def runs_table(models: Sequence[ComparedModel]) -> Table:
    """A numbered row for each model of several runs."""
    rows = [
        ModelRow(name=Cell(_full_name(one), lead=f"{place} "), model=one)
        for place, one in enumerate(models, start=1)
    ]
    columns = ("blocks", "parameters", "bytes", "perplexity", "tasks", "latency", "speedup")
    return models_table(rows, columns)


def _full_name(one: ComparedModel) -> str:
    return one.original if one.run is None else f"{one.run}: {one.name}"


def runs_head(runs: Mapping[str, RunResults], models: Sequence[ComparedModel]) -> Head:
    """Title and verdict."""
    originals = list(dict.fromkeys(one.original for one in models))
    return Head(
        name=originals[0] if len(originals) == 1 else counted(len(originals), "model"),
        title=f"{counted(len(models), 'model')} of {counted(len(runs), 'run')}",
        version=__version__,
        verdict=runs_verdict(models),
    )


def runs_verdict(models: Sequence[ComparedModel]) -> str:
    """The models that none beats in both perplexity and size, on the most common text."""
    text = main_text(models)
    if text is None:
        return "No two models were measured on the same text, so their quality is not comparable."
    points = points_of(models, "parameters", text)
    best = [models[point.number - 1] for point in front(points, higher_is_better=False)]
    named = [
        f"{_full_name(one)} ({number(one.perplexity[text])}, {short_count(one.parameters)})"
        for one in best
    ]
    return f"Best trade-offs of perplexity on {text} and number of parameters: {'; '.join(named)}."


def runs_sections(runs: Mapping[str, RunResults], models: Sequence[ComparedModel]) -> list[Section]:
    """Trade-off, table and removed blocks of several runs."""
    note = (
        "A column contains only comparable measurements. Speed-ups are relative to the original in "
        "the same run; latencies of different runs were measured at different times."
    )
    plots = trade_plots(models, common_cell(*(run.benchmark for run in runs.values())))
    removed = [part for name, results in runs.items() for part in _removed_by(name, results)]
    return [
        *trade_section("Quality against cost", plots, "Numbers are those of the table below."),
        Section("models", "All models", [runs_table(models), Paragraph(note)]),
        Section("removals", "Removed blocks", removed),
    ]


def _removed_by(name: str, results: RunResults) -> list[Part]:
    """What a run removed, and how it healed."""
    plan = results.plan
    healed: list[str] = [results.healing.method] if results.healing else []
    healed += [f"{one.method}, {one.steps:,} steps" for one in results.retraining.values()]
    removed = f"removed: {', '.join(map(str, plan.removed))}" if plan.removed else "none removed"
    return [
        Heading(name),
        Strip(
            [StripCell(block, results.status(block)) for block in range(plan.model.blocks)],
            ends=False,
        ),
        Paragraph(
            f"{model_name(plan.model.id)}; {plan.criterion or 'blocks given by hand'}; {removed}; "
            f"{'healed by ' if healed else 'not healed'}{'; '.join(healed)}."
        ),
    ]
