"""The report of a run: one self-contained HTML page and a model card, made from the result files.

    run.json  calibration.json  scores.json  plan.json  eval.json  ─►  report.html  README.md

The page is a list of sections. A section is a function that takes the loaded results and returns
what its partial template `templates/sections/NAME.html.j2` shows, or None where the run has nothing
to show; a new stage adds a function, a partial, and a line in `SECTIONS`. Equal files give equal
bytes: what differs between two equal runs (times, cost, dates, directories) is not shown.

    shortllm report runs/my-run
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shortllm.errors import ResultFileError
from shortllm.files import write_text
from shortllm.plots import SensitivityPlot, Status
from shortllm.results import (
    BlockScores,
    CalibrationInfo,
    EvaluatedModel,
    Evaluation,
    ModelInfo,
    Perplexity,
    PrunePlan,
    ResultFile,
)

if TYPE_CHECKING:
    from jinja2 import Environment

Context = dict[str, Any]
AnyResultFile = TypeVar("AnyResultFile", bound=ResultFile)

NONE = "–"
"""Shown for what was not measured."""
THIN = "\N{NARROW NO-BREAK SPACE}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
LONG_TABLE = 16
"""A table of more blocks than this is folded away until asked for."""


# --- Reading ---


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResults:
    """Everything the report is made from: files that belong to one another."""

    run: Mapping[str, Any]
    calibration: CalibrationInfo | None
    scores: BlockScores | None
    plan: PrunePlan
    evaluation: Evaluation | None

    @property
    def evaluated(self) -> dict[str, EvaluatedModel]:
        return {entry.name: entry for entry in self.evaluation.models} if self.evaluation else {}

    @property
    def title(self) -> str:
        return model_name(self.plan.model.id)

    def status(self, block: int) -> Status:
        if block in self.plan.removed:
            return "removed"
        return "protected" if block in self.plan.protected else "kept"


def load_results(run_dir: Path) -> RunResults:
    """Read the result files of a run and check that they speak of the same model and plan.

    Raises:
        ResultFileError: a needed file is missing or damaged, or two files do not belong together.
    """
    plan = _load(PrunePlan, run_dir / "plan.json", remedy="shortllm plan ...")
    scores = _load_optional(BlockScores, run_dir / "scores.json")
    evaluation = _load_optional(Evaluation, run_dir / "eval.json")
    needs_calibration = scores is not None and scores.calibration is not None
    calibration_path = run_dir / "calibration.json"
    calibration = (
        _load(CalibrationInfo, calibration_path, remedy="shortllm run")
        if needs_calibration or calibration_path.exists()
        else None
    )
    results = RunResults(
        run=_load_run(run_dir / "run.json"),
        calibration=calibration,
        scores=scores,
        plan=plan,
        evaluation=evaluation,
    )
    _check_belong_together(results, run_dir)
    return results


def _load(kind: type[AnyResultFile], path: Path, *, remedy: str) -> AnyResultFile:
    if not path.exists():
        raise ResultFileError(f"{path} is missing. Make it with: {remedy}")
    try:
        return kind.load(path)
    except ResultFileError as error:
        raise ResultFileError(f"{error}. Make it again with: {remedy}") from error


def _load_optional(kind: type[AnyResultFile], path: Path) -> AnyResultFile | None:
    return _load(kind, path, remedy="shortllm run") if path.exists() else None


def _load_run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ResultFileError(f"{path} is missing. Make it with: shortllm run") from error
    except (OSError, ValueError) as error:
        raise ResultFileError(
            f"cannot read {path}: {error}. Make it again with: shortllm run"
        ) from error
    if not isinstance(run, dict):
        raise ResultFileError(
            f"{path} is not a table of names and values. Make it again with: shortllm run"
        )
    for key, kind, word in (
        ("recipe", dict, "table"),
        ("versions", dict, "table"),
        ("command", list, "list"),
    ):
        if not isinstance(run.get(key, kind()), kind):
            raise ResultFileError(
                f"'{key}' in {path} is not a {word}. Make it again with: shortllm run"
            )
    return run


def _check_belong_together(results: RunResults, run_dir: Path) -> None:
    """A page that mixes two runs would be worse than none."""
    plan, scores, calibration = results.plan, results.scores, results.calibration
    if sorted(plan.kept + plan.removed) != list(range(plan.model.blocks)):
        raise ResultFileError(
            f"{run_dir / 'plan.json'}: kept and removed blocks are not the {plan.model.blocks} "
            "of the model. Make it again with: shortllm plan ..."
        )
    if scores is not None:
        counts = {
            len(scores.importance),
            len(scores.values),
            len(scores.delta_nll or scores.values),
        }
        if counts != {plan.model.blocks}:
            raise ResultFileError(
                f"{run_dir / 'scores.json'} scores {len(scores.importance)} blocks, "
                f"plan.json speaks of {plan.model.blocks}. Make both again with: shortllm run"
            )
        if not all(math.isfinite(score) for score in scores.importance + scores.values):
            raise ResultFileError(
                f"{run_dir / 'scores.json'} holds a score that is no finite number. "
                "Make it again with: shortllm run"
            )
        if plan.scores is not None and plan.scores != scores.fingerprint:
            raise ResultFileError(
                f"{run_dir / 'plan.json'} was made from other scores than those in scores.json. "
                "Make it again with: shortllm plan ..."
            )
        if calibration and scores.calibration not in (None, calibration.tokens_fingerprint):
            raise ResultFileError(
                f"{run_dir / 'scores.json'} was made from other tokens than those of "
                "calibration.json. Make both again with: shortllm run"
            )
    measured = results.evaluated
    for file, model in (
        ("scores.json", scores.model if scores else None),
        ("eval.json", measured["original"].model if "original" in measured else None),
    ):
        if model is not None and model.fingerprint != plan.model.fingerprint:
            raise ResultFileError(
                f"{run_dir / file} was made from another model than plan.json. "
                "Make both again with: shortllm run"
            )
    for name, blocks in (("original", plan.model.blocks), ("pruned", len(plan.kept))):
        if name in measured and measured[name].model.blocks != blocks:
            raise ResultFileError(
                f"the {name} model in {run_dir / 'eval.json'} has "
                f"{measured[name].model.blocks} blocks, plan.json leads to {blocks}. "
                "Make it again with: shortllm run"
            )


# --- Words and numbers ---


def number(value: float | None, digits: int = 4) -> str:
    """`value` to about `digits` significant digits, thousands set apart: 5.123, 51.23, 5,123."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if not -4 <= exponent < 7:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa} × 10{str(int(power)).translate(_SUPERSCRIPTS)}".replace("-", "−")
    return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def signed(value: float | None, digits: int = 4) -> str:
    text = number(value, digits)
    return f"+{text}" if value is not None and value > 0 else text


def short_count(value: int | None) -> str:
    """6.74 B, 125.0 M, 5.1 k."""
    return _scaled(value, ("", "k", "M", "B", "T"))


def short_bytes(value: int | None) -> str:
    """Decimal units, as disks and the Hub count: 13.5 GB."""
    return _scaled(value, ("bytes", "kB", "MB", "GB", "TB"))


def _scaled(value: int | None, units: Sequence[str]) -> str:
    if value is None:
        return NONE
    scaled, step = float(value), 0
    while abs(scaled) >= 999.5 and step < len(units) - 1:
        scaled, step = scaled / 1000, step + 1
    text = f"{value:,}" if step == 0 else number(scaled, 3)
    return f"{text}{THIN}{units[step]}".rstrip(THIN)


def percent(ratio: float) -> str:
    return f"{ratio * 100:.1f}{THIN}%".replace("-", "−")


def change(before: float | None, after: float | None) -> str:
    """Relative change as a reader says it: '−24.1 %', '+53.0 %', '× 12.3', '±0 %'."""
    if before is None or after is None or before <= 0:
        return NONE
    ratio = after / before
    if ratio >= 10:
        return f"×{THIN}{number(ratio, 3)}"
    text = percent(ratio - 1)
    if text.strip("−").startswith("0.0"):
        return f"±0{THIN}%" if ratio == 1 else f"{'+' if ratio > 1 else '−'}<0.1{THIN}%"
    return text if ratio < 1 else f"+{text}"


def counted(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def model_name(model_id: str) -> str:
    """A Hub id as it is; of a directory the last name only, of a Hub cache directory the Hub id."""
    cached = re.search(r"models--([^/\\]+?)--([^/\\]+)", model_id)
    return f"{cached[1]}/{cached[2]}" if cached else without_directories(model_id)


def hub_id(model: ModelInfo) -> str | None:
    """The model's name on the Hub, None where it is (or may be) a directory."""
    name = model_name(model.id)
    from_hub = model.revision is not None or "models--" in model.id
    return name if from_hub and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


def without_directories(text: str) -> str:
    """A path without the directories of the machine it lies on; any other text unchanged."""
    looks_absolute = re.match(r"(~|\.{1,2}|[A-Za-z]:)?[/\\]", text) is not None
    if not looks_absolute and text.count("/") < 2:
        return text
    if not looks_absolute and (" " in text or "://" in text):
        return text
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] or text


def prose_without_directories(text: str) -> str:
    """A sentence in which absolute paths are cut to their last name."""
    return re.sub(
        r"(?<![\w/.:~])(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[^\s/\\'\"]+[/\\])+(?=[^\s/\\])", "", text
    )


def command_line(arguments: Sequence[Any]) -> list[str]:
    """The words of the command, quoted for a shell, files and directories by their last name."""
    words = [str(argument) for argument in arguments]
    if words and re.split(r"[/\\]", words[0])[-1] == "__main__.py":
        words[:1] = ["python", "-m", "shortllm"]
    shown: list[str] = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        shown.append(shlex.quote(option + equals + model_name(value)))
    return shown


def flattened(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested choices as rows: ('plan.remove', '3')."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _shown(value)


def _shown(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(_shown(item) for item in value)
    return model_name(value) if isinstance(value, str) else str(value)


# --- Methods and their papers ---


@dataclass(frozen=True, slots=True)
class Citation:
    """One paper, for the page (text and link) and the model card (BibTeX)."""

    key: str
    authors: str
    title: str
    arxiv: str

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def year(self) -> str:
        return f"20{self.arxiv[:2]}"

    @property
    def short(self) -> str:
        return f"{self.authors.split(' and ')[0].split(',')[0]} et al. {self.year}"

    @property
    def bibtex(self) -> str:
        return (
            f"@article{{{self.key},\n"
            f"  title   = {{{self.title}}},\n"
            f"  author  = {{{self.authors}}},\n"
            f"  journal = {{arXiv preprint arXiv:{self.arxiv}}},\n"
            f"  year    = {{{self.year}}},\n"
            "}"
        )


_SHORTENED_LLAMA = Citation(
    "kim2024shortened",
    "Kim, Bo-Kyeong and Kim, Geonmin and Kim, Tae-Ho and Castells, Thibault and Choi, Shinkook "
    "and Shin, Junho and Song, Hyoung-Kyu",
    "Shortened LLaMA: Depth Pruning for Large Language Models "
    "with Comparison of Retraining Methods",
    "2402.02834",
)
CITATIONS: dict[str, Citation] = {
    "ppl": _SHORTENED_LLAMA,
    "taylor": _SHORTENED_LLAMA,
    "magnitude": _SHORTENED_LLAMA,
}
"""The paper that defines each criterion; one that is not listed is shown without."""

IMPORTANCE_LABELS = {
    "kl": "KL divergence from the intact model [nats per token]",
    "influence": "block influence, 1 − cos [no unit]",
    "angular": "angular distance [fraction of π]",
    "relative": "relative size of the block's update [no unit]",
}
"""What the axis of a criterion says; any other: 'importance (NAME)'."""


# --- Sections of the page ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One quantity: that of the original, then value and change for each further model."""

    name: str
    detail: str = ""
    original: str
    cells: Sequence[tuple[str, str]]


def head(results: RunResults) -> Context:
    """Title and the one-sentence verdict."""
    plan = results.plan
    return {
        "name": results.title,
        "revision": (plan.model.revision or "")[:12],
        "before": plan.model.blocks,
        "after": len(plan.kept),
        "version": str(results.run.get("shortllm", "")),
        "verdict": verdict(results),
    }


def verdict(results: RunResults) -> str:
    """What was removed, what it saves, what it costs, in one sentence."""
    plan, measured = results.plan, results.evaluated
    if not plan.removed:
        return f"No block was removed: all {plan.model.blocks} remain."
    sentence = (
        f"Removing {len(plan.removed)} of {counted(plan.model.blocks, 'block')} saves "
        f"{percent(plan.reached.parameter_ratio)} of the parameters"
    )
    if "pruned" in measured:
        saved = percent(1 - measured["pruned"].model.bytes / plan.model.bytes)
        same = saved == percent(plan.reached.parameter_ratio)
        sentence += f" and {'' if same else f'{saved} '}of the bytes on disk"
    compared = [
        (source, before.perplexity, after.perplexity)
        for source, (before, after) in _shared_perplexities(measured).items()
    ]
    if not compared:
        return f"{sentence}; the perplexity was not measured."
    source, before, after = compared[0]
    verb = "rises" if after > before else "falls" if after < before else "stays"
    sentence += f"; perplexity {verb} from {number(before)} to {number(after)}"
    if after != before:
        sentence += f" ({change(before, after)})"
    sentence += f" on {source}"
    if len(compared) > 1:
        source, before, after = compared[1]
        sentence += f", and from {number(before)} to {number(after)} on {source}"
    return f"{sentence}."


def key_figures(results: RunResults) -> Context:
    """Blocks, parameters, bytes and perplexities: original, pruned, change."""
    measured = results.evaluated
    original = results.plan.model
    others = {name: entry for name, entry in measured.items() if name != "original"}
    blocks: dict[str, int | None] = {name: entry.model.blocks for name, entry in others.items()}
    parameters: dict[str, int | None] = {
        name: entry.model.parameters for name, entry in others.items()
    }
    sizes: dict[str, int | None] = {name: entry.model.bytes for name, entry in others.items()}
    if "pruned" not in others:  # the plan alone tells all but the bytes
        blocks["pruned"] = len(results.plan.kept)
        parameters["pruned"] = original.parameters - results.plan.reached.parameters
        sizes["pruned"] = None
    rows = [
        Row(
            name=name,
            original=show(before),
            cells=[(show(after), change(before, after)) for after in values.values()],
        )
        for name, before, values, show in (
            ("blocks", original.blocks, blocks, str),
            ("parameters", original.parameters, parameters, short_count),
            ("bytes on disk", original.bytes, sizes, short_bytes),
        )
    ]
    return {"models": list(blocks), "rows": rows + _perplexity_rows(measured, list(blocks))}


def _perplexity_rows(measured: Mapping[str, EvaluatedModel], names: Sequence[str]) -> list[Row]:
    """One row per protocol, so that only perplexities of the same tokens stand side by side."""
    by_model = {
        name: {_protocol_key(entry): entry for entry in model.perplexity}
        for name, model in measured.items()
    }
    rows = []
    for key, example in {
        key: entry for row in by_model.values() for key, entry in row.items()
    }.items():
        values = {
            name: by_model[name][key].perplexity if key in by_model.get(name, {}) else None
            for name in ("original", *names)
        }
        rows.append(
            Row(
                name=f"perplexity, {perplexity_source(example)}",
                detail=_segments(example),
                original=number(values["original"]),
                cells=[
                    (number(values[name]), change(values["original"], values[name]))
                    for name in names
                ],
            )
        )
    return rows


def sensitivity(results: RunResults) -> Context | None:
    """The plot of the criterion, one bar per block."""
    scores = results.scores
    if scores is None:
        return None
    increase = scores.criterion == "ppl" and scores.intact is not None
    if increase and scores.intact is not None:
        heights = [value - scores.intact for value in scores.values]
        label = f"increase in perplexity (intact: {number(scores.intact)})"
    else:
        heights = scores.importance
        label = IMPORTANCE_LABELS.get(scores.criterion, f"importance ({scores.criterion})")
        if scores.intact is not None:
            label += f"; intact: {number(scores.intact)}"
    used = results.calibration if scores.calibration is not None else None
    plot = SensitivityPlot(
        heights=heights,
        statuses=[results.status(block) for block in range(len(heights))],
        y_label=label,
        below_label="no increase" if increase else "too small for the axis",
    )
    return {
        "wide": plot.svg("wide"),
        "narrow": plot.svg("narrow"),
        "increase": increase,
        "criterion": scores.criterion,
        "intact": number(scores.intact),
        "log": plot.log_floor is not None,
        "foot": f"{plot.linear_floor:,g}" if plot.log_floor is None and plot.linear_floor else None,
        "calibration": calibration_phrase(used) if used else None,
        "dtype": scores.dtype,
        "helpful": [block for block, height in enumerate(heights) if increase and height < 0],
    }


def strip(results: RunResults) -> Context:
    """The model as a row of cells, the removed ones struck out."""
    new_index = {block: index for index, block in enumerate(results.plan.kept)}
    return {
        "cells": [
            {"block": block, "status": results.status(block), "new": new_index.get(block)}
            for block in range(results.plan.model.blocks)
        ],
        "removed": results.plan.removed,
        "protected": sorted(results.plan.protected),
    }


def block_table(results: RunResults) -> Context | None:
    """Every number behind the plot."""
    scores = results.scores
    if scores is None:
        return None
    by_importance = sorted(
        range(len(scores.importance)), key=lambda block: (scores.importance[block], block)
    )
    rank = {block: place for place, block in enumerate(by_importance, start=1)}
    new_index = {block: index for index, block in enumerate(results.plan.kept)}
    return {
        "rows": [
            {
                "block": block,
                "importance": number(scores.importance[block], 5),
                "value": number(scores.values[block], 5),
                "delta_nll": signed(scores.delta_nll[block], 3) if scores.delta_nll else None,
                "rank": rank[block],
                "status": results.status(block),
                "new": new_index.get(block),
            }
            for block in range(len(scores.importance))
        ],
        "perplexity": scores.criterion == "ppl",
        "same": scores.values == scores.importance,
        "delta_nll": scores.delta_nll is not None,
        "folded": len(scores.importance) > LONG_TABLE,
    }


def samples(results: RunResults) -> Context | None:
    """Continuations of the same prompt by each model, side by side."""
    columns = [
        (entry, entry.samples) for entry in results.evaluated.values() if entry.samples is not None
    ]
    if not columns:
        return None
    first = columns[0][1]
    same_prompt = all(written.prompt == first.prompt for _, written in columns)
    return {
        "columns": [
            {
                "name": entry.name,
                "blocks": entry.model.blocks,
                "prompt": written.prompt,
                "texts": written.texts,
            }
            for entry, written in columns
        ],
        "count": max(len(written.texts) for _, written in columns),
        "prompt": first.prompt if same_prompt else None,
        "settings": f"up to {counted(first.new_tokens, 'new token')}, top-k {first.top_k}, "
        f"top-p {first.top_p:g}, temperature {first.temperature:g}, seed {first.seed}",
    }


def protocol(results: RunResults) -> Context:
    """All a reader needs to judge the numbers and to make them again."""
    plan, scores, evaluation = results.plan, results.scores, results.evaluation
    rows: list[tuple[str, str]] = [("model", _model_phrase(plan.model))]
    criterion = plan.criterion or (scores.criterion if scores else None)
    if criterion is None:
        rows.append(("criterion", "none: the blocks were given by hand"))
    else:
        options = (
            ", ".join(f"{key} = {value}" for key, value in flattened(scores.options))
            if scores
            else ""
        )
        by_hand = " (blocks given by hand)" if plan.criterion is None else ""
        rows.append(("criterion", f"{criterion}{f' ({options})' if options else ''}{by_hand}"))
    rows.append(("plan", prose_without_directories(plan.reason)))
    if results.calibration:
        rows.append(("calibration", calibration_phrase(results.calibration)))
        rows.append(("calibration tokens", calibration_detail(results.calibration)))
    measured = {
        _protocol_key(one): one for entry in results.evaluated.values() for one in entry.perplexity
    }
    rows += [
        (f"perplexity, {perplexity_source(one)}", perplexity_protocol(one))
        for one in measured.values()
    ]
    if scores:
        rows.append(("scoring dtype", scores.dtype))
    if evaluation:
        rows.append(("evaluation dtype", evaluation.dtype))
    rows += _version_rows(results)
    return {
        "rows": rows,
        "command": command_line(results.run.get("command", [])),
        "recipe": list(flattened(results.run.get("recipe", {}))),
        "citation": CITATIONS.get(criterion or ""),
        "criterion": criterion,
    }


SECTIONS: tuple[tuple[str, str, Callable[[RunResults], Context | None]], ...] = (
    ("figures", "Key figures", key_figures),
    ("sensitivity", "What each block is worth", sensitivity),
    ("strip", "What remains", strip),
    ("blocks", "Every block", block_table),
    ("samples", "What it writes", samples),
    ("protocol", "How this was measured", protocol),
)
"""Name of the partial (also the anchor in the page), heading, and what the partial shows."""


def _protocol_key(entry: Perplexity) -> tuple[object, ...]:
    return (
        entry.source,
        entry.rows,
        entry.split,
        entry.length,
        entry.bos,
        entry.tokens_fingerprint,
    )


def _shared_perplexities(
    measured: Mapping[str, EvaluatedModel],
) -> dict[str, tuple[Perplexity, Perplexity]]:
    """Before and after per text, where original and pruned model saw the same tokens."""
    if not {"original", "pruned"} <= measured.keys():
        return {}
    after = {_protocol_key(entry): entry for entry in measured["pruned"].perplexity}
    return {
        perplexity_source(entry): (entry, after[_protocol_key(entry)])
        for entry in measured["original"].perplexity
        if _protocol_key(entry) in after
    }


def perplexity_source(entry: Perplexity) -> str:
    source = without_directories(entry.source)
    return f"{source} ({entry.split})" if entry.split else source


def perplexity_protocol(entry: Perplexity) -> str:
    bos = {
        "first": "BOS before the first segment",
        "every": "BOS before every segment",
        "none": "no BOS",
    }
    rows = f"rows {entry.rows[0]:,} to {entry.rows[1] - 1:,}, " if entry.rows else ""
    return (
        f"{rows}{_segments(entry)} without overlap, {bos[entry.bos]}, "
        f"{counted(entry.predictions, 'prediction')}, tokens {entry.tokens_fingerprint[:12]}"
    )


def _segments(entry: Perplexity) -> str:
    return f"{counted(entry.segments, 'segment')} of {counted(entry.length, 'token')}"


def calibration_phrase(calibration: CalibrationInfo) -> str:
    """'10 samples of 128 tokens from bookcorpus'."""
    return (
        f"{counted(calibration.samples, 'sample')} of {counted(calibration.length, 'token')} "
        f"from {without_directories(calibration.source)}"
    )


def calibration_detail(calibration: CalibrationInfo) -> str:
    bos = {
        "tokenizer": "where the tokenizer adds it",
        "every-sample": "before every sample",
        "none": "none",
    }
    rows = (
        f"rows {calibration.rows[0]:,} to {calibration.rows[1] - 1:,}, " if calibration.rows else ""
    )
    seed = f"seed {calibration.seed}, " if calibration.seed is not None else ""
    return (
        f"{rows}{calibration.sampler} sampler, {seed}BOS {bos[calibration.bos]}, "
        f"tokens {calibration.tokens_fingerprint[:12]}"
    )


def _model_phrase(model: ModelInfo) -> str:
    revision = f", revision {model.revision[:12]}" if model.revision else ""
    name = f"{model_name(model.id)} ({model.model_type}{revision})"
    return f"{name}, fingerprint {model.fingerprint[:12]}"


def _version_rows(results: RunResults) -> list[tuple[str, str]]:
    """The versions of the run; those of another stage only where they differ."""
    run_versions = {str(key): str(value) for key, value in results.run.get("versions", {}).items()}
    stages = {
        "versions": run_versions,
        "versions (scoring)": results.scores.versions if results.scores else {},
        "versions (evaluation)": results.evaluation.versions if results.evaluation else {},
    }
    return [
        (name, ", ".join(f"{library} {version}" for library, version in versions.items()))
        for name, versions in stages.items()
        if versions
        and (
            versions is run_versions
            or any(item not in run_versions.items() for item in versions.items())
        )
    ]


# --- Writing ---


def write_report(run_dir: Path) -> Path:
    """Write `report.html` and the model card `README.md` of a run; returns the page's path.

    The card is also laid into `pruned/` where that exists, so that it travels with the model.

    Raises:
        ResultFileError: a needed result file is missing or damaged, or two do not belong together.
        OutputError: the run directory cannot be written.
    """
    results = load_results(run_dir)
    page, card = render_page(results), render_model_card(results)
    write_text(run_dir / "README.md", card)
    if (run_dir / "pruned").is_dir():
        write_text(run_dir / "pruned" / "README.md", card)
    write_text(run_dir / "report.html", page)
    return run_dir / "report.html"


def render_page(results: RunResults) -> str:
    """The HTML page; everything that comes from data is escaped by the templates."""
    sections = []
    for name, heading, make in SECTIONS:
        context = make(results)
        if context is not None:
            sections.append({"name": name, "heading": heading, "context": context})
    return (
        _templates().get_template("report.html.j2").render(head=head(results), sections=sections)
        + "\n"
    )


def render_model_card(results: RunResults) -> str:
    """The model card: Markdown with the Hub's YAML front matter."""
    criterion = results.plan.criterion
    return (
        _templates()
        .get_template("model_card.md.j2")
        .render(
            head=head(results),
            base_model=hub_id(results.plan.model),
            plan=results.plan,
            protected=sorted(results.plan.protected),
            figures=key_figures(results),
            protocol=protocol(results),
            criterion=criterion,
            citation=CITATIONS.get(criterion or ""),
            retrained="retrained" in results.evaluated,
        )
        + "\n"
    )


def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("shortllm"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = _escape_markdown
    environment.filters["json"] = lambda text: json.dumps(text, ensure_ascii=False)
    return environment


def _escape_markdown(text: str) -> str:
    """Data as plain words inside Markdown: no markup, no table border, no line break."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))
