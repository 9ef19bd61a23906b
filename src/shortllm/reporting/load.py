"""Reads the result files of a run and refuses those that do not belong together.

Files belong together if their fingerprints say so: plan.json names its scores, scores.json its
tokens, and every record the fingerprint of its model.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, Field

from shortllm.benchmark.options import Benchmark
from shortllm.checkpoint.source import open_checkpoint
from shortllm.comparison.options import UNITS_FILE, Comparison, UnitsComparison
from shortllm.data.options import CalibrationInfo
from shortllm.drafting.options import Drafting
from shortllm.errors import ResultFileError
from shortllm.evaluation.options import EvaluatedModel, Evaluation, Perplexity
from shortllm.healing.options import Healing
from shortllm.pruning.quality_target import QualityTarget
from shortllm.pruning.records import TARGET_FILE, BlockScores, PrunePlan, Target
from shortllm.quantizing.options import QUANTIZED, Quantization
from shortllm.records import ModelInfo, ResultFile
from shortllm.reporting.parts import Status
from shortllm.retraining.options import Retraining
from shortllm.run_directory import HEALED, PRUNED

log = logging.getLogger(__name__)

AnyResultFile = TypeVar("AnyResultFile", bound=ResultFile)
AnyRecord = TypeVar("AnyRecord", Healing, Retraining, Quantization)
Protocol = tuple[object, ...]
"""What a perplexity was measured on; equal protocols are the same tokens."""

_RUN = "shortllm run"
_PLAN = "shortllm plan ..."
_UNITS = "shortllm compare-units"
_CRITERIA = "shortllm compare-criteria"
_DRAFT = "shortllm draft"


class RunFile(ResultFile):
    """What a page shows of run.json; its other keys are ignored."""

    model_config = ConfigDict(extra="ignore")

    fingerprint: str = ""
    shortllm: str = Field(default="", description="version that wrote the run")
    recipe: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    command: list[str] = Field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResults:
    """The results of one run."""

    run: RunFile
    calibration: CalibrationInfo | None
    scores: BlockScores | None
    plan: PrunePlan
    target: Target | None
    quality: QualityTarget | None = None
    healing: Healing | None = None
    """Healing without training."""
    retraining: dict[str, Retraining] = field(default_factory=dict)
    """By the name of the retrained model."""
    quantization: Quantization | None = None
    evaluation: Evaluation | None
    benchmark: Benchmark | None = None

    @property
    def evaluated(self) -> dict[str, EvaluatedModel]:
        """The evaluated models by name; empty if nothing was evaluated."""
        return {entry.name: entry for entry in self.evaluation.models} if self.evaluation else {}

    @property
    def recovered_by(self) -> dict[str, str]:
        """The method of each healed or retrained model, by its name."""
        methods: dict[str, str] = {HEALED: self.healing.method} if self.healing else {}
        return methods | {name: record.method for name, record in self.retraining.items()}

    def perplexities(self, name: str) -> dict[Protocol, Perplexity]:
        """The perplexities of one model."""
        entries = self.evaluated[name].perplexity if name in self.evaluated else []
        return {protocol_of(entry): entry for entry in entries}

    def protocols(self) -> dict[Protocol, Perplexity]:
        """Every protocol that was used, with an example."""
        return {k: e for name in self.evaluated for k, e in self.perplexities(name).items()}

    def checkpoints_in(self, run_dir: Path) -> list[str]:
        """The names of the checkpoints that are there; the last one is what the run came to."""
        names = (QUANTIZED, PRUNED, *self.recovered_by)
        return [name for name in names if (run_dir / name / "config.json").is_file()]

    @property
    def statuses(self) -> list[Status]:
        """What the plan does with each block."""
        return self.plan.statuses


def same_text(one: Protocol, other: Protocol) -> bool:
    """Whether two perplexities are of one text that was cut alike; segments may be others."""
    return (one[0], *one[2:5]) == (other[0], *other[2:5])


def protocol_of(entry: Perplexity) -> Protocol:
    """What a perplexity was measured on."""
    return (
        entry.source, entry.rows, entry.split, entry.length, entry.bos, entry.tokens_fingerprint
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonResults:
    """The results of a comparison of criteria."""

    run: RunFile
    calibration: CalibrationInfo | None
    comparison: Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitsResults:
    """The results of a comparison of width and depth."""

    run: RunFile
    units: UnitsComparison
    evaluation: Evaluation
    benchmark: Benchmark

    @property
    def evaluated(self) -> dict[str, EvaluatedModel]:
        """The evaluated models by name."""
        return {entry.name: entry for entry in self.evaluation.models}


# ---- one file


def _load(kind: type[AnyResultFile], path: Path, command: str = _RUN) -> AnyResultFile:
    """A result file, which `command` writes."""
    if not path.exists():
        raise ResultFileError(f"{path} is missing. Create it with: {command}")
    try:
        return kind.load(path)
    except ResultFileError as error:
        raise ResultFileError(f"{error}. Create it again with: {command}") from error


def _load_optional(kind: type[AnyResultFile], path: Path) -> AnyResultFile | None:
    return _load(kind, path) if path.exists() else None


def _mismatch(run_dir: Path, problem: str, command: str) -> ResultFileError:
    return ResultFileError(f"{run_dir}: {problem}. Create it again with: {command}")


# ---- the files of one directory


def load_units(run_dir: Path) -> UnitsResults:
    """The files of a comparison of width and depth, which must be about the same models."""
    results = UnitsResults(
        run=_load(RunFile, run_dir / "run.json", _UNITS),
        units=_load(UnitsComparison, run_dir / UNITS_FILE, _UNITS),
        evaluation=_load(Evaluation, run_dir / "eval.json", _UNITS),
        benchmark=_load(Benchmark, run_dir / "bench.json", _UNITS),
    )
    names = {"original", *(one.name for one in results.units.candidates)}
    if len(names) == 1 or not results.evaluated.keys() >= names:
        raise _mismatch(run_dir, "units.json and eval.json have different models", _UNITS)
    return results


def load_draft(run_dir: Path) -> tuple[Drafting, RunFile]:
    """The files of a draft."""
    found = _load(Drafting, run_dir / Drafting.FILE, _DRAFT)
    return found, _load(RunFile, run_dir / "run.json", _DRAFT)


def load_comparison(run_dir: Path) -> ComparisonResults:
    """The files of a comparison of criteria, which must have the same calibration tokens."""
    comparison = _load(Comparison, run_dir / "comparison.json", _CRITERIA)
    calibration = None
    if comparison.calibration is not None:
        calibration = _load(CalibrationInfo, run_dir / "calibration.json", _CRITERIA)
        if calibration.tokens_fingerprint != comparison.calibration:
            problem = "comparison.json and calibration.json have different tokens"
            raise _mismatch(run_dir, problem, _CRITERIA)
    run = _load(RunFile, run_dir / "run.json", _CRITERIA)
    return ComparisonResults(run=run, calibration=calibration, comparison=comparison)


def load_results(run_dir: Path) -> RunResults:
    """The files of a run, which must belong to one model and one plan."""
    plan = _load(PrunePlan, run_dir / "plan.json", _PLAN)
    scores = _load_optional(BlockScores, run_dir / "scores.json")
    load_calibration = _load if scores and scores.calibration is not None else _load_optional
    results = RunResults(
        run=_load(RunFile, run_dir / "run.json"),
        calibration=load_calibration(CalibrationInfo, run_dir / "calibration.json"),
        scores=scores,
        plan=plan,
        target=_load_optional(Target, run_dir / TARGET_FILE),
        quality=_load_quality(run_dir, plan),
        evaluation=_load_optional(Evaluation, run_dir / "eval.json"),
    )
    for problem, command in _mismatches(results, run_dir):
        raise _mismatch(run_dir, problem, command)
    models, quantized = _fingerprints(results, run_dir), run_dir / QUANTIZED / Quantization.FILE
    return replace(
        results,
        healing=_load_about(Healing, run_dir / HEALED / Healing.FILE, [models.get(PRUNED)]),
        retraining=_load_retraining(run_dir, models),
        quantization=_load_about(Quantization, quantized, models.values())
        if QUANTIZED in models  # it was evaluated
        else None,
        benchmark=_load_benchmark(run_dir, models),
    )


def _load_quality(run_dir: Path, plan: PrunePlan) -> QualityTarget | None:
    """The search for the number of blocks that the plan has."""
    files = (QualityTarget.PLANNED, QualityTarget.FILE)
    found = (_load_optional(QualityTarget, run_dir / name) for name in files)
    return next((one for one in found if one and one.remove == len(plan.removed)), None)


def _mismatches(results: RunResults, run_dir: Path) -> Iterator[tuple[str, str]]:
    """Files that do not belong together, each with the command that creates the right ones."""
    plan, scores, calibration = results.plan, results.scores, results.calibration
    if scores is not None:
        if plan.scores not in (None, scores.fingerprint):
            yield "plan.json was computed from other scores than those in scores.json", _PLAN
        if calibration and scores.calibration not in (None, calibration.tokens_fingerprint):
            yield "scores.json and calibration.json have different tokens", _RUN
        if not _same(scores.model, plan.model):
            yield "scores.json and plan.json are about different models", _RUN
    original, pruned = (results.evaluated.get(name) for name in ("original", PRUNED))
    if original and not _same(original.model, plan.model):
        yield "eval.json and plan.json are about different models", _RUN
    expected = (len(plan.kept), plan.model.parameters - plan.reached.parameters)
    found = pruned and (pruned.model.blocks, pruned.model.parameters)
    if found and results.run.recipe.get("drop_heads"):  # a plan is of blocks
        expected = (expected[0], min(expected[1], found[1]))
    if found and found != expected:
        have, need = (f"{n} blocks and {p:,} parameters" for n, p in (found, expected))
        yield f"the pruned model in eval.json has {have}, plan.json leads to {need}", _RUN
    yield from _checkpoint_mismatch(plan, run_dir / PRUNED)


def _same(one: ModelInfo, other: ModelInfo) -> bool:
    return (one.fingerprint, one.blocks) == (other.fingerprint, other.blocks)


def _checkpoint_mismatch(plan: PrunePlan, pruned: Path) -> Iterator[tuple[str, str]]:
    """Whether the shortened checkpoint, if there is one, was shortened by this plan."""
    path = pruned / "config.json"
    if not path.exists():
        return
    words = ("shortllm", "prune", plan.model.id, "--plan", pruned.parent, "--out", pruned)
    command = f"{_RUN}, or {shlex.join(map(str, words))}"
    try:
        entry = json.loads(path.read_bytes())["shortllm"]
        removed, blocks = entry["removed_blocks"], entry["source_blocks"]
    except OSError as error:
        raise ResultFileError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        yield "pruned/config.json does not say which blocks were removed", command
        return
    if (blocks, removed) != (plan.model.blocks, plan.removed):
        problem = (
            f"pruned/ is a model of {blocks} blocks without {removed}, plan.json removes "
            f"{plan.removed} of {plan.model.blocks}"
        )
        yield problem, command


# ---- records about models of the run; those about other models are left out


def _fingerprints(results: RunResults, run_dir: Path) -> dict[str, str]:
    """Of the original model, and of the checkpoints of the run, by name."""
    found = {name: entry.model.fingerprint for name, entry in results.evaluated.items()}
    found["original"] = results.plan.model.fingerprint
    if PRUNED not in found and (run_dir / PRUNED / "config.json").exists():
        found[PRUNED] = open_checkpoint(run_dir / PRUNED).fingerprint
    return found


def _load_about(
    kind: type[AnyRecord], path: Path, models: Collection[str | None]
) -> AnyRecord | None:
    """A record about one of these models by fingerprint; the log says if it is left out."""
    record = _load_optional(kind, path)
    if record is not None and record.model.fingerprint not in models:
        log.info("%s is about another model and is left out", path)
        return None
    return record


def _load_retraining(run_dir: Path, models: Mapping[str, str]) -> dict[str, Retraining]:
    """By directory; those evaluated first and in the order of eval.json."""
    found = {}
    for path in sorted(run_dir.glob(f"*/{Retraining.FILE}")):
        if record := _load_about(Retraining, path, [models.get(PRUNED)]):
            found[path.parent.name] = record
    return {name: found[name] for name in dict.fromkeys([*models, *found]) if name in found}


def _load_benchmark(run_dir: Path, models: Mapping[str, str]) -> Benchmark | None:
    path = run_dir / "bench.json"
    record = _load_optional(Benchmark, path)
    if record is not None and not record.is_about(models):
        log.info("%s is about another model and is left out", path)
        return None
    return record


# ---- several runs


def load_runs(directories: Sequence[Path]) -> dict[str, RunResults]:
    """The results of each run, by the shortest end of its path that no other run has."""
    places = [Path(one).resolve() for one in directories]
    if len(set(places)) != len(places):
        raise ResultFileError("a run was given twice. Name each run directory once")
    if not places:
        raise ResultFileError("no run to compare. Give run directories, e.g. runs/a runs/b")
    runs = {}
    for place in places:
        results = load_results(place)
        if results.evaluation is None:
            raise ResultFileError(
                f"{place} has no eval.json, so there is nothing to compare. Finish the run with "
                "the command in its run.json"
            )
        runs[_name_among(place, places)] = results
    return runs


def _name_among(place: Path, places: Sequence[Path]) -> str:
    """The shortest end of a path that no other path has."""
    for depth in range(1, len(place.parts)):
        end = place.parts[-depth:]
        if [other.parts[-depth:] for other in places].count(end) == 1:
            return "/".join(end)
    return str(place)
