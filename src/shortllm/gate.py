"""A gate: what is asked of a shortened model, next to what was measured. Result files alone.

eval.json    perplexity, tasks, repetition     bench.json   speed
the checkpoint's files: whether the results are still those of this model

shortllm check runs/qwen3 --max-ppl-increase 5% --min-speedup 1.2
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import Field

from shortllm.benchmark.options import Benchmark
from shortllm.calls import accepts
from shortllm.checkpoint.fingerprint import content_fingerprint
from shortllm.checkpoint.tensors import read_tensor_table
from shortllm.errors import ResultFileError, ShortLLMError, did_you_mean
from shortllm.evaluation.options import EvaluatedModel, Evaluation
from shortllm.evaluation.quality import GateOptions, Requirement, judged, option_of, share_in
from shortllm.format import fixed, percent, plain
from shortllm.pruning.quality_target import QualityTarget
from shortllm.quantizing.options import QUANTIZED
from shortllm.records import ModelInfo, Record
from shortllm.run_directory import PRUNED, require_results
from shortllm.shown import Shown, data_frame

if TYPE_CHECKING:
    from pandas import DataFrame


Kind = TypeVar("Kind", Evaluation, Benchmark)


class Verdict(Shown, Record):
    """Whether a model of a run is all that was asked of it."""

    directory: Path
    model: str = Field(description="name of the model that was judged, e.g. 'healed'")
    compared: bool = Field(
        description="whether the checkpoint was there, and is the one that was measured"
    )
    requirements: list[Requirement]

    @property
    def passed(self) -> bool:
        """Whether all of it is met."""
        return all(one.passed for one in self.requirements)

    def __str__(self) -> str:
        """'runs/qwen3, healed: passed'."""
        return f"{self.directory}, {self.model}: {'passed' if self.passed else 'failed'}"

    def to_dataframe(self) -> DataFrame:
        """A row for each requirement.

        Columns: `model`; `name` of the requirement; `of`, what was measured; `asked` and
        `measured` in words; `value` and `limit`, as numbers; `passed`.

        Returns:
            A pandas data frame.
        Raises:
            ShortLLMError: pandas is not installed.
        """
        return data_frame(
            {"model": self.model, **one.model_dump(mode="json")} for one in self.requirements
        )


@accepts(options=GateOptions)
def check(run: Path, *, options: GateOptions, name: str | None = None) -> Verdict:
    """Whether a shortened model that was measured is what you ask for.

    Reads result files alone, and the checkpoint's files to see that they are those that were
    measured. Nothing is loaded or computed.

    Args:
        run: a run directory, or a checkpoint in one.
        options: what is asked; its fields can be given as keywords, e.g. `min_speedup=1.2`.
        name: of the model in the run. Default: the last one: quantized, else retrained, else
            healed, else pruned.
    Returns:
        Each requirement with what was measured; `passed` says whether all are met.
    Raises:
        ShortLLMError: nothing was asked, or there is no such model.
        ResultFileError: something was not measured, or the checkpoint was changed since.
    """
    if not options.asked():
        raise ShortLLMError(
            "nothing to check. Give one or more of "
            f"{', '.join(map(option_of, GateOptions.model_fields))}"
        )
    if (run / "config.json").is_file() and not (run / "eval.json").is_file():
        name = name or run.resolve().name
        run = run.parent if run.name else run.resolve().parent
    require_results(run)
    evaluation = _results(Evaluation, run / "eval.json")
    intact, *shortened = evaluation.models
    chosen = _chosen(shortened, name, run)
    benchmark = None
    if options.min_speedup is not None:
        benchmark = _results(Benchmark, run / "bench.json")
        measured = {one.name: one.model.fingerprint for one in shortened}
        if not benchmark.is_about({**measured, "original": intact.model.fingerprint}):
            raise ResultFileError(
                "bench.json and eval.json have different models. Measure both again with "
                "`shortllm run --bench`"
            )
    return Verdict(
        directory=run,
        model=chosen.name,
        compared=require_same_weights(run / chosen.name, chosen.model, "eval.json"),
        requirements=requirements_of(options, chosen, intact, benchmark),
    )


def requirements_of(
    options: GateOptions,
    model: EvaluatedModel,
    intact: EvaluatedModel,
    benchmark: Benchmark | None = None,
) -> list[Requirement]:
    """All that was asked of a model, next to what was measured."""
    return [
        *judged(options, model, intact),
        *_of_speed(options, model, benchmark),
        *_of_repetition(options, model),
    ]


def _of_speed(
    options: GateOptions, model: EvaluatedModel, found: Benchmark | None
) -> Iterator[Requirement]:
    if options.min_speedup is None or found is None:
        return
    names = [one.name for one in found.models[1:]]
    # healing and retraining change values, not shapes: their speed is that of the pruned model
    alike = PRUNED if model.name != QUANTIZED else QUANTIZED
    name = model.name if model.name in names else alike
    measured = [one for one in found.measurements if one.model == name]
    speeds = [(found.speedup(one), one) for one in measured]
    if not speeds or any(speedup is None for speedup, _ in speeds):
        raise ResultFileError(
            f"--min-speedup: bench.json has no speed of '{model.name}'. Measure it: shortllm bench "
            f"ORIGINAL RUN/{PRUNED} RUN/{model.name} --out RUN"
        )
    slowest, cell = min(
        ((speedup, one) for speedup, one in speeds if speedup is not None), key=lambda one: one[0]
    )
    of = f"speed-up of {name}, batch {cell.batch}, {cell.new_tokens} new tokens"
    yield Requirement(
        name="min_speedup",
        of=of,
        asked=f"at least {options.min_speedup:g}",
        measured=fixed(slowest, 3),
        value=slowest,
        limit=options.min_speedup,
        passed=slowest >= options.min_speedup,
    )


def _of_repetition(options: GateOptions, model: EvaluatedModel) -> Iterator[Requirement]:
    asked = options.max_repetition
    if asked is None:
        return
    found = model.probe.repetition if model.probe else None
    if found is None:
        raise ResultFileError(
            f"--max-repetition: '{model.name}' has no open answers of a probe. Give the same "
            "`shortllm run` again with --probe"
        )
    limit = share_in(asked)
    yield Requirement(
        name="max_repetition",
        of="repetition in generated text",
        asked=f"at most {asked}",
        measured=plain(percent(found, 1)),
        value=found,
        limit=limit,
        passed=found <= limit,
    )


def require_same_weights(checkpoint: Path, measured: ModelInfo, file: str) -> bool:
    """Refuse a checkpoint whose weights or config were changed since; whether it is there."""
    if not (checkpoint / "config.json").is_file():
        return False
    tensors = read_tensor_table(checkpoint)
    if content_fingerprint(checkpoint, tensors.values()) != measured.fingerprint:
        raise ResultFileError(
            f"{checkpoint} is not the model in {file} any more: its weights or its config were "
            "changed since. Measure it again with `shortllm run` or `shortllm eval`"
        )
    return True


def _chosen(models: list[EvaluatedModel], name: str | None, run: Path) -> EvaluatedModel:
    """The model of that name, or the last one."""
    if not models:
        raise ResultFileError(
            f"{run / 'eval.json'} has one model. A gate compares a shortened model with the intact "
            "one: shortllm eval MODEL SHORT --out"
        )
    if name is None:
        return models[-1]
    by_name = {one.name: one for one in models}
    if name not in by_name:
        raise ShortLLMError(f"no model in {run} is called '{name}'.{did_you_mean(name, by_name)}")
    return by_name[name]


def _results(kind: type[Kind], path: Path) -> Kind:
    """A result file of the run, or what is missing and why."""
    if path.exists():
        return kind.load(path)
    searched = path.with_name(QualityTarget.FILE)
    if searched.exists() and (target := QualityTarget.load(searched)).remove is None:
        raise ResultFileError(
            f"{path.parent} has no model to check: {target.described}. Ask `shortllm run` for less"
        )
    flag = " with --bench" if kind is Benchmark else ""
    raise ResultFileError(f"{path} is missing. Give the same `shortllm run` again{flag}")
