"""How the numbers were measured, and how models, texts and files are called on a page.

A page never shows the directories of the machine it was written on.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shortllm import criteria
from shortllm.data.options import CalibrationInfo
from shortllm.drafting.options import Drafting
from shortllm.evaluation.options import Perplexity
from shortllm.format import NONE, counted, model_name, without_directories, without_paths
from shortllm.papers import Paper
from shortllm.quantizing.options import Quantization
from shortllm.records import ModelInfo
from shortllm.reporting import parts
from shortllm.reporting.load import ComparisonResults, RunFile, RunResults, UnitsResults
from shortllm.reporting.parts import Page, Part, Section
from shortllm.width_pruning.methods import METHODS

Rows = list[tuple[str, str]]

_CALIBRATION_BOS = {
    "tokenizer": "where the tokenizer adds it",
    "every-sample": "before every sample",
    "none": "none",
}
_PERPLEXITY_BOS = {
    "first": "BOS before the first segment",
    "every": "BOS before every segment",
    "none": "no BOS",
}


def page_about(
    model: ModelInfo, *, title: str, verdict: str, version: str, sections: Sequence[Section]
) -> Page:
    """A page about one model."""
    return Page(
        name=model_name(model.id), revision=(model.revision or "")[:12], title=title,
        verdict=verdict, version=version, sections=sections,
    )  # fmt: skip


# ---- the section


def run_protocol(results: RunResults) -> Section:
    """Everything a reader needs to judge the numbers of a run and to reproduce them."""
    run, scores, names = results.run, results.scores, [_criterion(results) or ""]
    # published figures have a section of their own
    chosen = {name: value for name, value in run.recipe.items() if name != "published"}
    if scores is not None and scores.search is not None and scores.criterion in names:
        names.append(scores.search.found.criterion)
    return _section(run.model_copy(update={"recipe": chosen}), protocol_rows(results), names)


def protocol_rows(results: RunResults) -> Rows:
    """The protocol of a run as names with descriptions."""
    plan, scores, evaluation = results.plan, results.scores, results.evaluation
    rows = [
        _model_row(plan.model),
        ("criterion", _criterion_phrase(results)),
        ("plan", without_paths(plan.reason)),
        _protected_row(plan.protected),
    ]
    versions = {}
    if results.calibration:
        rows += _calibration_rows(results.calibration)
    if results.quantization:
        rows += _quantization_rows(results.quantization)
        versions["quantization"] = results.quantization.versions
    rows += [_perplexity_row(entry) for entry in results.protocols().values()]
    if scores:
        rows.append(("scoring dtype", scores.dtype))
        versions["scoring"] = scores.versions
    if evaluation:
        rows.append(("evaluation dtype", evaluation.dtype))
        versions["evaluation"] = evaluation.versions
    return rows + _version_rows(results.run.versions, versions)


def criteria_protocol(results: ComparisonResults) -> Section:
    """The same for a comparison of criteria."""
    found = results.comparison
    rows = [_model_row(found.model)]
    rows += [
        (f"criterion {one.criterion}", _options_phrase(one.options))
        for one in found.criteria
        if one.options
    ]
    rows.append(_protected_row(found.protected))
    if results.calibration:
        rows += _calibration_rows(results.calibration)
    rows += [
        _perplexity_row(found.intact),
        ("shortened models", f"{found.models:,} different ones, measured in one pass"),
        ("random removals", f"{counted(len(found.random), 'draw')}, seeds from 0"),
        ("dtype", found.dtype),
    ]
    rows += _version_rows(results.run.versions, {"measurement": found.versions})
    return _section(results.run, rows, [one.criterion for one in found.criteria])


def units_protocol(results: UnitsResults) -> Section:
    """The same for width against depth."""
    units, evaluation = results.units, results.evaluation
    rows = [_model_row(units.model)]
    rows += [_perplexity_row(one) for one in evaluation.models[0].perplexity]
    rows.append(("dtype", evaluation.dtype))
    rows += _version_rows(results.run.versions, {"evaluation": evaluation.versions})
    return _section(results.run, rows, [one.name for one in units.candidates])


def draft_protocol(found: Drafting, run: RunFile) -> Section:
    """The same for a draft."""
    rows = [
        _model_row(found.model),
        ("criterion", found.criterion),
        ("prompts", without_directories("; ".join(found.prompts))),
        ("texts", f"{found.texts}, at most {found.new_tokens} tokens of each; every other one is "
         "to measure on"),
        ("temperature", f"{found.temperature:g}"),
        ("dtype", found.dtype),
        ("device", f"{found.device_name}, {counted(found.threads, 'thread')}"),
    ]  # fmt: skip
    rows += _version_rows(run.versions, {"measurement": found.versions})
    return _section(run, rows, [found.criterion])


def _section(run: RunFile, rows: Rows, methods: Sequence[str]) -> Section:
    found: list[Part] = [parts.Terms(rows)]
    if run.command:
        found.append(parts.Heading("To reproduce"))
        if any("/" in word for word in run.command[1:]):
            note = "Paths are shortened to their last part. The full command is in run.json."
            found.append(parts.Paragraph(note))
        found.append(parts.Command(command_line(run.command)))
    if run.recipe:
        options = parts.Terms(list(flattened(run.recipe)))
        found.append(parts.Details("Every option of the run", [options]))
    papers: dict[Paper, list[str]] = {}
    for name in dict.fromkeys(methods):
        method = criteria.find(name) or METHODS.find(name)
        if method and method.paper:
            papers.setdefault(method.paper, []).append(name)
    if papers:
        found.append(parts.Heading(f"Method{'s' if len(papers) > 1 else ''}"))
        found += [parts.Citation(names, paper) for paper, names in papers.items()]
    return Section("protocol", "How this was measured", found)


# ---- rows and phrases


def calibration_phrase(calibration: CalibrationInfo) -> str:
    """'10 samples of 128 tokens from bookcorpus'."""
    return (
        f"{counted(calibration.samples, 'sample')} of {counted(calibration.length, 'token')} "
        f"from {without_directories(calibration.source)}"
    )


def perplexity_source(entry: Perplexity) -> str:
    """'wikitext2', 'stories.jsonl (held-out)'."""
    source = without_directories(entry.source)
    return f"{source} ({entry.split})" if entry.split else source


def segments_phrase(entry: Perplexity) -> str:
    """'166 segments of 2,048 tokens'."""
    return f"{counted(entry.segments, 'segment')} of {counted(entry.length, 'token')}"


def _model_row(model: ModelInfo) -> tuple[str, str]:
    revision = f", revision {model.revision[:12]}" if model.revision else ""
    kind = f"{model.model_type}{revision}"
    origin = f", dequantized from {model.gguf}" if model.gguf else ""
    name = f"{model_name(model.id)} ({kind}{origin})"
    return "model", f"{name}, fingerprint {model.fingerprint[:12]}"


def _protected_row(protected: Sequence[int]) -> tuple[str, str]:
    return "protected blocks", ", ".join(map(str, sorted(protected))) or "none"


def _criterion(results: RunResults) -> str | None:
    return results.plan.criterion or (results.scores.criterion if results.scores else None)


def _criterion_phrase(results: RunResults) -> str:
    phrase = _criterion(results)
    if phrase is None:
        return "none: the blocks were given by hand"
    if results.scores and results.scores.options:
        phrase += f" ({_options_phrase(results.scores.options)})"
    return phrase if results.plan.criterion else f"{phrase} (blocks given by hand)"


def _options_phrase(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in flattened(options))


def _calibration_rows(found: CalibrationInfo) -> Rows:
    rows = [("calibration", calibration_phrase(found))]
    return [*rows, ("calibration tokens", _calibration_detail(found))]


def _calibration_detail(found: CalibrationInfo) -> str:
    seed = f"seed {found.seed}, " if found.seed is not None else ""
    return (
        f"{_rows_phrase(found.rows)}{found.sampler} sampler, {seed}"
        f"BOS {_CALIBRATION_BOS[found.bos]}, tokens {found.tokens_fingerprint[:12]}"
    )


def _perplexity_row(entry: Perplexity) -> tuple[str, str]:
    return (
        f"perplexity, {perplexity_source(entry)}",
        f"{_rows_phrase(entry.rows)}{segments_phrase(entry)} without overlap, "
        f"{_PERPLEXITY_BOS[entry.bos]}, {counted(entry.predictions, 'prediction')}, "
        f"tokens {entry.tokens_fingerprint[:12]}",
    )


def _quantization_rows(found: Quantization) -> Rows:
    layers = f"{counted(found.layers, 'linear layer')} of {model_name(found.model.id)}"
    rows = [("quantization", f"{found.described}; {layers}")]
    if found.calibration is not None:
        detail = _calibration_detail(found.calibration)
        rows.append(("quantized on", f"{calibration_phrase(found.calibration)}, {detail}"))
    return rows


def _rows_phrase(rows: tuple[int, int] | None) -> str:
    if rows is None:
        return ""
    first, last = rows[0], rows[1] - 1
    return f"row {first:,}, " if first == last else f"rows {first:,} to {last:,}, "


def _version_rows(run: dict[str, str], of_stages: Mapping[str, dict[str, str]]) -> Rows:
    """The versions of the run, and those of a stage only where they differ."""
    shown = {"versions": run}
    for stage, found in of_stages.items():
        if not found.items() <= run.items():
            shown[f"versions ({stage})"] = found
    return [
        (name, ", ".join(f"{library} {version}" for library, version in versions.items()))
        for name, versions in shown.items()
        if versions
    ]


# ---- names


def hub_id(model: ModelInfo) -> str | None:
    """The model's name on the Hub; None where it is, or may be, a directory."""
    name = model_name(model.id).partition(":")[0]
    from_hub = model.revision is not None or "models--" in model.id
    return name if from_hub and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


def command_line(arguments: Sequence[str]) -> list[str]:
    """The words of the command, quoted for a shell, with paths shortened to their last part."""
    words = list(arguments)
    if words and re.split(r"[/\\]", words[0])[-1] == "__main__.py":
        words[:1] = ["python", "-m", "shortllm"]
    shown = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        shown.append(shlex.quote(option + equals + model_name(value)))
    return shown


def flattened(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested options as rows: ('plan.remove', '3')."""
    for key, value in table.items():
        if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            value = {str(place): one for place, one in enumerate(value, start=1)}
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _shown(value)


def _shown(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return model_name(value) if isinstance(value, str) else str(value)
