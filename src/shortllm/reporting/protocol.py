"""How the numbers were measured, and how models, texts and files are called on a page.

A page never shows the directories of the machine it was written on.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shortllm.data.options import CalibrationInfo
from shortllm.evaluation.options import Perplexity
from shortllm.format import NONE, counted
from shortllm.quantizing.options import Quantization
from shortllm.records import ModelInfo
from shortllm.reporting.load import ComparisonResults, RunFile, RunResults, UnitsResults
from shortllm.reporting.methods import papers_of
from shortllm.reporting.parts import (
    Citation,
    Command,
    Details,
    Heading,
    Paragraph,
    Part,
    Section,
    Terms,
)

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


# ---- the section


def run_protocol(results: RunResults) -> Section:
    """Everything a reader needs to judge the numbers of a run and to reproduce them."""
    rows = protocol_rows(results)
    run = results.run
    # published figures have a section of their own
    chosen = {name: value for name, value in run.recipe.items() if name != "published"}
    return _section(run.model_copy(update={"recipe": chosen}), rows, _credited(results))


def protocol_rows(results: RunResults) -> Rows:
    """The protocol of a run as names with descriptions."""
    plan, scores, calibration = results.plan, results.scores, results.calibration
    evaluation, quantization = results.evaluation, results.quantization
    rows = [
        ("model", _model_phrase(plan.model)),
        ("criterion", _criterion_phrase(results)),
        ("plan", prose_without_directories(plan.reason)),
    ]
    if calibration:
        rows += _calibration_rows(calibration)
    if quantization:
        rows += _quantization_rows(quantization)
    rows += [_perplexity_row(entry) for entry in results.protocols().values()]
    if scores:
        rows.append(("scoring dtype", scores.dtype))
    if evaluation:
        rows.append(("evaluation dtype", evaluation.dtype))
    return rows + _version_rows(
        results.run.versions,
        {
            "quantization": quantization.versions if quantization else {},
            "scoring": scores.versions if scores else {},
            "evaluation": evaluation.versions if evaluation else {},
        },
    )


def criteria_protocol(results: ComparisonResults) -> Section:
    """The same for a comparison of criteria."""
    found = results.comparison
    rows = [("model", _model_phrase(found.model))]
    rows += [
        (f"criterion {one.criterion}", _options_phrase(one.options))
        for one in found.criteria
        if one.options
    ]
    rows.append(("protected blocks", ", ".join(map(str, found.protected)) or "none"))
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
    rows = [("model", _model_phrase(units.model))]
    rows += [_perplexity_row(one) for one in evaluation.models[0].perplexity]
    rows.append(("dtype", evaluation.dtype))
    rows += _version_rows(results.run.versions, {"evaluation": evaluation.versions})
    return _section(results.run, rows, [one.name for one in units.candidates])


def _section(run: RunFile, rows: Rows, methods: Sequence[str]) -> Section:
    """Rows, command, recipe and papers."""
    parts: list[Part] = [Terms(rows)]
    if run.command:
        parts.append(Heading("To reproduce"))
        if any("/" in word for word in run.command[1:]):
            parts.append(
                Paragraph(
                    "Paths are shortened to their last part. The full command is in run.json."
                )
            )
        parts.append(Command(command_line(run.command)))
    if run.recipe:
        parts.append(Details("Every option of the run", [Terms(list(flattened(run.recipe)))]))
    papers = papers_of(methods)
    if papers:
        parts.append(Heading(f"Method{'s' if len(papers) > 1 else ''}"))
        parts += [Citation(names, paper) for names, paper in papers]
    return Section("protocol", "How this was measured", parts)


def _credited(results: RunResults) -> list[str]:
    """The criterion, and the criterion whose set of blocks it chose."""
    scores, criterion = results.scores, _criterion(results) or ""
    if scores is None or scores.search is None or scores.criterion != criterion:
        return [criterion]
    return list(dict.fromkeys([criterion, scores.search.found.criterion]))


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


def _model_phrase(model: ModelInfo) -> str:
    revision = f", revision {model.revision[:12]}" if model.revision else ""
    kind = f"{model.model_type}{revision}"
    return f"{model_name(model.id)} ({kind}), fingerprint {model.fingerprint[:12]}"


def _criterion(results: RunResults) -> str | None:
    return results.plan.criterion or (results.scores.criterion if results.scores else None)


def _criterion_phrase(results: RunResults) -> str:
    criterion = _criterion(results)
    if criterion is None:
        return "none: the blocks were given by hand"
    options = _options_phrase(results.scores.options) if results.scores else ""
    phrase = f"{criterion} ({options})" if options else criterion
    return phrase if results.plan.criterion else f"{phrase} (blocks given by hand)"


def _options_phrase(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in flattened(options))


def _calibration_rows(calibration: CalibrationInfo) -> Rows:
    return [
        ("calibration", calibration_phrase(calibration)),
        ("calibration tokens", _calibration_detail(calibration)),
    ]


def _calibration_detail(calibration: CalibrationInfo) -> str:
    seed = f"seed {calibration.seed}, " if calibration.seed is not None else ""
    return (
        f"{_rows_phrase(calibration.rows)}{calibration.sampler} sampler, {seed}"
        f"BOS {_CALIBRATION_BOS[calibration.bos]}, tokens {calibration.tokens_fingerprint[:12]}"
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
    differing = {
        f"versions ({stage})": found
        for stage, found in of_stages.items()
        if not found.items() <= run.items()
    }
    return [
        (name, ", ".join(f"{library} {version}" for library, version in versions.items()))
        for name, versions in {"versions": run, **differing}.items()
        if versions
    ]


# ---- names


def model_name(model_id: str) -> str:
    """A Hub id unchanged, the last part of a directory, the Hub id of a Hub cache directory."""
    cached = re.search(r"models--([^/\\]+?)--([^/\\]+)", model_id)
    return f"{cached[1]}/{cached[2]}" if cached else without_directories(model_id)


def hub_id(model: ModelInfo) -> str | None:
    """The model's name on the Hub; None where it is, or may be, a directory."""
    name = model_name(model.id)
    from_hub = model.revision is not None or "models--" in model.id
    return name if from_hub and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


def without_directories(text: str) -> str:
    """The last part of a path; any other text unchanged."""
    absolute = re.match(r"(~|\.{1,2}|[A-Za-z]:)?[/\\]", text)
    relative = text.count("/") > 1 and " " not in text and "://" not in text
    if not absolute and not relative:
        return text
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] or text


def prose_without_directories(text: str) -> str:
    """A sentence in which absolute paths are shortened to their last part."""
    return re.sub(
        r"(?<![\w/.:~])(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[^\s/\\'\"]+[/\\])+(?=[^\s/\\])", "", text
    )


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
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            for place, one in enumerate(value, start=1):
                yield from flattened(one, f"{prefix}{key}.{place}.")
        else:
            yield f"{prefix}{key}", _shown(value)


def _shown(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value)
    return model_name(value) if isinstance(value, str) else str(value)
