"""How the numbers were made: the section of that name, and the phrases that describe a protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shortllm.data.options import CalibrationInfo
from shortllm.evaluation.options import Perplexity
from shortllm.quantizing.options import Quantization
from shortllm.records import ModelInfo
from shortllm.reporting.citations import cited
from shortllm.reporting.loading import ComparisonResults, RunFile, RunResults, UnitsResults
from shortllm.reporting.names import (
    command_line,
    flattened,
    model_name,
    prose_without_directories,
    without_directories,
)
from shortllm.reporting.wording import counted

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


def describe_protocol(results: RunResults) -> dict[str, Any]:
    """All a reader needs to judge the numbers and to make them again."""
    plan, scores, calibration = results.plan, results.scores, results.calibration
    criterion = plan.criterion or (scores.criterion if scores else None)
    rows = [
        ("model", _model_phrase(plan.model)),
        ("criterion", _criterion_phrase(results, criterion)),
        ("plan", prose_without_directories(plan.reason)),
    ]
    if calibration:
        rows.append(("calibration", calibration_phrase(calibration)))
        rows.append(("calibration tokens", _calibration_detail(calibration)))
    if results.quantization:
        rows += _quantization_rows(results.quantization)
    for entry in results.protocols().values():
        rows.append((f"perplexity, {perplexity_source(entry)}", _perplexity_protocol(entry)))
    if scores:
        rows.append(("scoring dtype", scores.dtype))
    if results.evaluation:
        rows.append(("evaluation dtype", results.evaluation.dtype))
    quantization = results.quantization
    of_stages = {
        "versions (quantization)": quantization.versions if quantization else {},
        "versions (scoring)": scores.versions if scores else {},
        "versions (evaluation)": results.evaluation.versions if results.evaluation else {},
    }
    # what was published has a section of its own
    chosen = {name: value for name, value in results.run.recipe.items() if name != "published"}
    run = results.run.model_copy(update={"recipe": chosen})
    return _protocol(run, rows, of_stages, _credited(results, criterion or ""))


def _protocol(
    run: RunFile,
    rows: list[tuple[str, str]],
    of_stages: dict[str, dict[str, str]],
    criteria: Sequence[str],
) -> dict[str, Any]:
    """Rows, command, recipe and papers."""
    return {
        "rows": rows + _version_rows(run.versions, of_stages),
        "command": command_line(run.command),
        "cut": any("/" in word for word in run.command[1:]),
        "recipe": list(flattened(run.recipe)),
        "citations": cited(criteria),
    }


def _credited(results: RunResults, criterion: str) -> list[str]:
    """The criterion, and the one whose set of blocks it chose."""
    scores = results.scores
    if scores is None or scores.search is None or scores.criterion != criterion:
        return [criterion]
    return list(dict.fromkeys([criterion, scores.search.found.criterion]))


def describe_comparison(results: ComparisonResults) -> dict[str, Any]:
    """The same for a comparison of criteria."""
    found, calibration = results.comparison, results.calibration
    rows = [("model", _model_phrase(found.model))]
    for one in found.criteria:
        if one.options:
            rows.append((f"criterion {one.criterion}", _options_phrase(one.options)))
    rows.append(("protected blocks", ", ".join(map(str, found.protected)) or "none"))
    if calibration:
        rows.append(("calibration", calibration_phrase(calibration)))
        rows.append(("calibration tokens", _calibration_detail(calibration)))
    rows += [
        (f"perplexity, {perplexity_source(found.intact)}", _perplexity_protocol(found.intact)),
        ("shortened models", f"{found.models:,} different ones, measured in one pass"),
        ("random removals", f"{counted(len(found.random), 'draw')}, seeds from 0 on"),
        ("dtype", found.dtype),
    ]
    of_stages = {"versions (measurement)": found.versions}
    return _protocol(results.run, rows, of_stages, [one.criterion for one in found.criteria])


def describe_units(results: UnitsResults) -> dict[str, Any]:
    """The same for width against depth."""
    units, evaluation = results.units, results.evaluation
    rows = [("model", _model_phrase(units.model))]
    for one in evaluation.models[0].perplexity:
        rows.append((f"perplexity, {perplexity_source(one)}", _perplexity_protocol(one)))
    rows.append(("dtype", evaluation.dtype))
    of_stages = {"versions (evaluation)": evaluation.versions}
    return _protocol(results.run, rows, of_stages, [one.name for one in units.candidates])


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


def _model_phrase(model: ModelInfo) -> str:
    revision = f", revision {model.revision[:12]}" if model.revision else ""
    kind = f"{model.model_type}{revision}"
    return f"{model_name(model.id)} ({kind}), fingerprint {model.fingerprint[:12]}"


def _criterion_phrase(results: RunResults, criterion: str | None) -> str:
    if criterion is None:
        return "none: the blocks were given by hand"
    options = _options_phrase(results.scores.options) if results.scores else ""
    phrase = f"{criterion} ({options})" if options else criterion
    return phrase if results.plan.criterion else f"{phrase} (blocks given by hand)"


def _options_phrase(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in flattened(options))


def _calibration_detail(calibration: CalibrationInfo) -> str:
    seed = f"seed {calibration.seed}, " if calibration.seed is not None else ""
    return (
        f"{_rows_phrase(calibration.rows)}{calibration.sampler} sampler, {seed}"
        f"BOS {_CALIBRATION_BOS[calibration.bos]}, tokens {calibration.tokens_fingerprint[:12]}"
    )


def _perplexity_protocol(entry: Perplexity) -> str:
    return (
        f"{_rows_phrase(entry.rows)}{segments_phrase(entry)} without overlap, "
        f"{_PERPLEXITY_BOS[entry.bos]}, {counted(entry.predictions, 'prediction')}, "
        f"tokens {entry.tokens_fingerprint[:12]}"
    )


def _quantization_rows(found: Quantization) -> list[tuple[str, str]]:
    """What was quantized and how, and on which text."""
    rows = [
        (
            "quantization",
            f"{found.described}; {counted(found.layers, 'linear layer')} of "
            f"{model_name(found.model.id)}",
        )
    ]
    if found.calibration is not None:
        detail = _calibration_detail(found.calibration)
        rows.append(("quantized on", f"{calibration_phrase(found.calibration)}, {detail}"))
    return rows


def _rows_phrase(rows: tuple[int, int] | None) -> str:
    if rows is None:
        return ""
    first, last = rows[0], rows[1] - 1
    return f"row {first:,}, " if first == last else f"rows {first:,} to {last:,}, "


def _version_rows(
    run: dict[str, str], of_stages: Mapping[str, dict[str, str]]
) -> list[tuple[str, str]]:
    """The versions of the run; those of another stage only where they differ."""
    differing = {n: found for n, found in of_stages.items() if not found.items() <= run.items()}
    return [
        (name, ", ".join(f"{library} {version}" for library, version in versions.items()))
        for name, versions in {"versions": run, **differing}.items()
        if versions
    ]
