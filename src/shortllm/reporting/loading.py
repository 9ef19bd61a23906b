"""Read a run's result files and refuse those that do not belong together."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from shortllm.benchmark.options import Benchmark
from shortllm.checkpoint.source import open_checkpoint
from shortllm.comparison.options import UNITS_FILE, Comparison, UnitsComparison
from shortllm.data.options import CalibrationInfo
from shortllm.errors import ResultFileError
from shortllm.evaluation.options import EvaluatedModel, Evaluation, Perplexity
from shortllm.files import parsed_json
from shortllm.healing.options import Healing
from shortllm.pruning.records import TARGET_FILE, BlockScores, PrunePlan, Target
from shortllm.quantizing.options import QUANTIZED, Quantization
from shortllm.records import Record, ResultFile
from shortllm.retraining import RECORD
from shortllm.retraining.options import Retraining
from shortllm.run_directory import HEALED, PRUNED

log = logging.getLogger(__name__)

Status = Literal["kept", "removed", "protected"]
AnyResultFile = TypeVar("AnyResultFile", bound=ResultFile)

_RUN = "shortllm run"
_PLAN = "shortllm plan ..."
_UNITS = "shortllm compare-units"
_COMPARE = "shortllm compare-criteria"


class RunFile(Record):
    """What the report shows of run.json; its other keys are ignored."""

    model_config = ConfigDict(extra="ignore")

    shortllm: str = Field(default="", description="version that made the run")
    recipe: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    command: list[str] = Field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResults:
    """Everything the report is made from: files that belong to one another."""

    run: RunFile
    calibration: CalibrationInfo | None
    scores: BlockScores | None
    plan: PrunePlan
    target: Target | None = None
    healing: Healing | None = None
    """Without training."""
    retraining: dict[str, Retraining] = field(default_factory=dict)
    """By the name of the model each has made."""
    quantization: Quantization | None = None
    evaluation: Evaluation | None
    benchmark: Benchmark | None = None

    @property
    def evaluated(self) -> dict[str, EvaluatedModel]:
        """What was measured, by the model's name; empty if nothing was."""
        return {entry.name: entry for entry in self.evaluation.models} if self.evaluation else {}

    @property
    def healed_by(self) -> dict[str, str]:
        """The method of each healed model, by its name."""
        methods: dict[str, str] = {HEALED: self.healing.method} if self.healing else {}
        return methods | {name: record.method for name, record in self.retraining.items()}

    def perplexities(self, name: str) -> dict[tuple[object, ...], Perplexity]:
        """Those of one model by protocol: equal keys are numbers of the same tokens."""
        entries = self.evaluated[name].perplexity if name in self.evaluated else []
        return {
            (e.source, e.rows, e.split, e.length, e.bos, e.tokens_fingerprint): e for e in entries
        }

    def protocols(self) -> dict[tuple[object, ...], Perplexity]:
        """An example of every protocol that any model was measured by."""
        return {k: e for name in self.evaluated for k, e in self.perplexities(name).items()}

    @property
    def new_index(self) -> dict[int, int]:
        """Original index of each kept block -> its index in the pruned model."""
        return {block: index for index, block in enumerate(self.plan.kept)}

    def status(self, block: int) -> Status:
        """What the plan does with a block."""
        if block in self.plan.removed:
            return "removed"
        return "protected" if block in self.plan.protected else "kept"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonResults:
    """Everything the page of a comparison is made from."""

    run: RunFile
    calibration: CalibrationInfo | None
    comparison: Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitsResults:
    """Everything the page is made from."""

    run: RunFile
    units: UnitsComparison
    evaluation: Evaluation
    benchmark: Benchmark

    @property
    def evaluated(self) -> dict[str, EvaluatedModel]:
        """What was measured, by the model's name."""
        return {entry.name: entry for entry in self.evaluation.models}


def load_units(run_dir: Path) -> UnitsResults:
    """Read the files of a comparison of units.

    Raises:
        ResultFileError: one is missing or damaged.
    """
    return UnitsResults(
        run=load_run_file(run_dir / "run.json", remedy=_UNITS),
        units=load_file(UnitsComparison, run_dir / UNITS_FILE, remedy=_UNITS),
        evaluation=load_file(Evaluation, run_dir / "eval.json", remedy=_UNITS),
        benchmark=load_file(Benchmark, run_dir / "bench.json", remedy=_UNITS),
    )


def load_comparison(run_dir: Path) -> ComparisonResults:
    """Read the result files of a comparison and check that they belong together.

    Raises:
        ResultFileError: a file is missing or damaged, or the calibration is another one.
    """
    comparison = load_file(Comparison, run_dir / "comparison.json", remedy=_COMPARE)
    calibration = None
    if comparison.calibration is not None:
        calibration = load_file(CalibrationInfo, run_dir / "calibration.json", remedy=_COMPARE)
        if calibration.tokens_fingerprint != comparison.calibration:
            raise ResultFileError(
                f"{run_dir}: comparison.json was made from other tokens than those of "
                f"calibration.json. Make it again with: {_COMPARE}"
            )
    run = load_run_file(run_dir / "run.json", remedy=_COMPARE)
    return ComparisonResults(run=run, calibration=calibration, comparison=comparison)


def load_results(run_dir: Path) -> RunResults:
    """Read the result files of a run and check that they speak of the same model and plan.

    Raises:
        ResultFileError: a needed file is missing or damaged, or two files do not belong together.
    """
    plan = load_file(PrunePlan, run_dir / "plan.json", remedy=_PLAN)
    scores = _load_optional(BlockScores, run_dir / "scores.json")
    load_calibration = load_file if scores and scores.calibration is not None else _load_optional
    results = RunResults(
        run=load_run_file(run_dir / "run.json"),
        calibration=load_calibration(CalibrationInfo, run_dir / "calibration.json"),
        scores=scores,
        plan=plan,
        target=_load_optional(Target, run_dir / TARGET_FILE),
        evaluation=_load_optional(Evaluation, run_dir / "eval.json"),
    )
    problems = chain(_contradictions(results), _pruned_contradictions(results, run_dir))
    for problem, remedy in problems:  # a page that mixes two runs would mislead
        raise ResultFileError(f"{run_dir}: {problem}. Make it again with: {remedy}")
    fingerprints = _fingerprints(results, run_dir)
    return replace(
        results,
        healing=_load_healing(run_dir, fingerprints),
        retraining=_load_retraining(run_dir, fingerprints),
        quantization=_load_quantization(run_dir, fingerprints),
        benchmark=_load_benchmark(run_dir, fingerprints),
    )


def _fingerprints(results: RunResults, run_dir: Path) -> dict[str, str]:
    """Of the original model, and of the checkpoints of the run, by name."""
    fingerprints = {name: entry.model.fingerprint for name, entry in results.evaluated.items()}
    fingerprints["original"] = results.plan.model.fingerprint
    if PRUNED not in fingerprints and (run_dir / PRUNED / "config.json").exists():
        fingerprints[PRUNED] = open_checkpoint(run_dir / PRUNED).fingerprint
    return fingerprints


def _load_healing(run_dir: Path, fingerprints: dict[str, str]) -> Healing | None:
    """How the shortened model was healed without training; left out where it was another model."""
    path = run_dir / HEALED / Healing.FILE
    record = _load_optional(Healing, path)
    if record is not None and record.model.fingerprint != fingerprints.get(PRUNED):
        log.info("%s: what was healed is not %s, left out", path, run_dir / PRUNED)
        return None
    return record


def _load_retraining(run_dir: Path, fingerprints: dict[str, str]) -> dict[str, Retraining]:
    """How the shortened model was healed, by directory, those evaluated first and in that order;
    retrainings of another model are left out."""
    records: dict[str, Retraining] = {}
    for path in sorted(run_dir.glob(f"*/{RECORD}")):
        record = load_file(Retraining, path)
        if record.model.fingerprint == fingerprints.get(PRUNED):
            records[path.parent.name] = record
        else:
            log.info("%s: what was retrained is not %s, left out", path, run_dir / PRUNED)
    order = list(fingerprints)
    return dict(sorted(records.items(), key=lambda item: [*order, item[0]].index(item[0])))


def _load_quantization(run_dir: Path, fingerprints: dict[str, str]) -> Quantization | None:
    """How a model of the run was quantized; left out where it is none of this run, or was not
    measured."""
    path = run_dir / QUANTIZED / Quantization.FILE
    found = _load_optional(Quantization, path) if QUANTIZED in fingerprints else None
    if found is not None and found.model.fingerprint not in fingerprints.values():
        log.info("%s: what was quantized is no model of this run, left out", path)
        return None
    return found


def _load_benchmark(run_dir: Path, fingerprints: dict[str, str]) -> Benchmark | None:
    """bench.json; left out where it speaks of other models than the run."""
    found = _load_optional(Benchmark, run_dir / "bench.json")
    if found is None:
        return None
    for number, one in enumerate(found.models):
        expected = fingerprints["original"] if number == 0 else fingerprints.get(one.name)
        if expected not in (None, one.model.fingerprint):
            log.info("bench.json: %s is not the model of this run, left out", one.name)
            return None
    return found


def load_file(kind: type[AnyResultFile], path: Path, *, remedy: str = _RUN) -> AnyResultFile:
    """A result file.

    Args:
        remedy: the command that makes it.
    Raises:
        ResultFileError: it is missing or damaged.
    """
    if not path.exists():
        raise ResultFileError(f"{path} is missing. Make it with: {remedy}")
    try:
        return kind.load(path)
    except ResultFileError as error:
        raise ResultFileError(f"{error}. Make it again with: {remedy}") from error


def _load_optional(kind: type[AnyResultFile], path: Path) -> AnyResultFile | None:
    return load_file(kind, path) if path.exists() else None


def load_run_file(path: Path, *, remedy: str = _RUN) -> RunFile:
    """run.json, as far as a page shows it.

    Raises:
        ResultFileError: it is missing or damaged.
    """
    try:
        data = path.read_bytes()
        found = RunFile.model_validate_json(data)
        parsed_json(data)
    except FileNotFoundError as error:
        raise ResultFileError(f"{path} is missing. Make it with: {remedy}") from error
    except OSError as error:
        raise ResultFileError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise ResultFileError(
            f"{path} is damaged: {problem}. Make it again with: {remedy}"
        ) from error
    except ValueError as error:
        raise ResultFileError(
            f"{path} is damaged: {error}. Make it again with: {remedy}"
        ) from error
    return found


def _contradictions(results: RunResults) -> Iterator[tuple[str, str]]:
    """What does not fit together, each with the command that mends it."""
    plan, scores, calibration = results.plan, results.scores, results.calibration
    measured = results.evaluated
    count = plan.model.blocks
    if scores is not None:
        if scores.model.blocks != count:
            scored = scores.model.blocks
            yield f"scores.json scores {scored} blocks, plan.json speaks of {count}", _RUN
        if plan.scores not in (None, scores.fingerprint):
            yield "plan.json was made from other scores than those in scores.json", _PLAN
        if calibration and scores.calibration not in (None, calibration.tokens_fingerprint):
            yield "scores.json was made from other tokens than those of calibration.json", _RUN
        if scores.model.fingerprint != plan.model.fingerprint:
            yield "scores.json was made from another model than plan.json", _RUN
    if "original" in measured and measured["original"].model.fingerprint != plan.model.fingerprint:
        yield "eval.json was made from another model than plan.json", _RUN
    for name, expected in (("original", count), ("pruned", len(plan.kept))):
        if name in measured and measured[name].model.blocks != expected:
            yield (
                f"the {name} model in eval.json has {measured[name].model.blocks} blocks, "
                f"plan.json leads to {expected}",
                _RUN,
            )
    if "pruned" in measured:
        found = measured["pruned"].model.parameters
        expected = plan.model.parameters - plan.reached.parameters
        if found != expected:
            yield (
                f"the pruned model in eval.json has {found:,} parameters, plan.json leads to "
                f"{expected:,}",
                _RUN,
            )


def _pruned_contradictions(results: RunResults, run_dir: Path) -> Iterator[tuple[str, str]]:
    """Whether the checkpoint beside the plan, if there is one, was shortened by it."""
    plan, config = results.plan, run_dir / "pruned" / "config.json"
    if not config.exists():
        return
    words = ("shortllm", "prune", plan.model.id, "--plan", run_dir, "--out", config.parent)
    remedy = f"{_RUN}, or {shlex.join(map(str, words))}"
    try:
        provenance = parsed_json(config.read_bytes())["shortllm"]
        removed, blocks = provenance["removed_blocks"], provenance["source_blocks"]
    except OSError as error:
        raise ResultFileError(f"cannot read {config}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        yield "pruned/config.json does not say which blocks were removed", remedy
        return
    if blocks != plan.model.blocks:
        yield (
            f"pruned/ was made from a model of {blocks} blocks, plan.json speaks of "
            f"{plan.model.blocks}",
            remedy,
        )
    if removed != plan.removed:
        yield f"pruned/ lacks the blocks {removed}, plan.json removes {plan.removed}", remedy
