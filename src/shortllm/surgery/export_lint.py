"""Whether other programs will run a finished checkpoint correctly: rules in tables.

Some programs do not read from the config how the blocks of a type differ. Their code fixes it:
every second block attends to all tokens, every fourth has no positions. A shortened model that no
longer follows this pattern is wrong there, or does not load; plans of whole periods
(`--period-aligned`) stay correct. Where no rule applies, the verdict is "unknown".

    shortllm export-lint CHECKPOINT

export_tables.py has the rules, export_rules.py the checks they use.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field

from shortllm.calls import accepts
from shortllm.checkpoint.hub import ModelSource
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.errors import UnsupportedModelError
from shortllm.options import OneOrMore
from shortllm.records import Record
from shortllm.runtime import Trust
from shortllm.surgery.export_rules import Exported, Rule, Source
from shortllm.surgery.export_tables import ALIKE, BY_FIELD, BY_TYPE, NAMES, Target

Verdict = Literal["ok", "wrong", "unknown"]

WRONG = 3
"""Exit code of `export-lint` if a verdict is "wrong"."""


class ExportFinding(Record):
    """How one program will run a checkpoint."""

    target: Target
    verdict: Verdict
    reason: str
    fields: dict[str, Any] = Field(
        default_factory=dict, description="config fields the verdict rests on"
    )
    hint: str | None = Field(default=None, description="what to do")
    sources: list[Source] = Field(
        default_factory=list, description="lines of the program's code the verdict rests on"
    )


@accepts(trust=Trust)
def export_lint(
    model: ModelSource,
    *,
    trust: Trust,
    revision: str | None = None,
    target: OneOrMore[Target] | None = None,
) -> list[ExportFinding]:
    """Check by rule whether llama.cpp (GGUF) and other programs will run a checkpoint correctly.

    Reads only the config and the headers of the weights.

    Args:
        model: a checkpoint directory, a Hub id, or a loaded model.
        trust: `trust_remote_code`; it can be given as a keyword.
        revision: of a Hub model.
        target: one or several of gguf, vllm, mlx, sglang and executorch; all if None.
    Returns:
        A verdict for each program, with the reason, the lines of the program's source code that it
        rests on and, where there is one, a hint.
    Raises:
        CheckpointError: not a checkpoint, or a damaged one.
    """
    return lint_export(open_checkpoint(model, revision=revision), target)


def lint_export(checkpoint: Checkpoint, targets: list[Target] | None = None) -> list[ExportFinding]:
    """The verdict of each program on an open checkpoint."""
    model = Exported(checkpoint)
    return [_lint(model, target) for target in targets or get_args(Target)]


def _lint(model: Exported, target: Target) -> ExportFinding:
    config, name = model.config, NAMES[target]
    rules = BY_TYPE[target].get(config.model_type, [])
    by_field = BY_FIELD[target].items()
    wanted = [*rules, *(rule for field, rule in by_field if hasattr(config, field))]
    try:
        found = ((rule, rule.check(model)) for rule in wanted)
        against = next(((rule, problem) for rule, problem in found if problem), None)
        hints = [hint for rule in rules if (hint := rule.advice(model))]
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise UnsupportedModelError(
            f"config.json of {model.checkpoint.id} has a value that does not fit its model type "
            f"'{config.model_type}': {error}. Download it again"
        ) from error
    if against is not None:
        rule, problem = against
        certain = f"{name} will not run this model correctly"
        said = certain if problem.certain else f"whether {name} will run this model is not certain"
        return ExportFinding(
            target=target,
            verdict="wrong" if problem.certain else "unknown",
            reason=f"{said}: {problem.reason}",
            fields=problem.fields,
            hint=problem.hint,
            sources=[rule.source],
        )
    if rules:
        return ExportFinding(
            target=target,
            verdict="ok",
            reason=_why_right(rules, name),
            hint=". ".join(hints) or None,
            sources=list(dict.fromkeys(rule.source for rule in rules)),
        )
    if config.model_type in ALIKE[target] and model.checkpoint.structure.period == 1:
        return ExportFinding(
            target=target,
            verdict="ok",
            reason="all blocks have one structure, and their number is read from the config",
            sources=[ALIKE[target][config.model_type]],
        )
    differ = ", whose blocks differ by position" if model.checkpoint.structure.period > 1 else ""
    return ExportFinding(
        target=target,
        verdict="unknown",
        reason=f"no rule says how {name} reads model type '{config.model_type}'{differ}",
        hint="Compare its output with the output of transformers",
    )


def _why_right(rules: list[Rule], name: str) -> str:
    read = [rule.reads for rule in rules if rule.reads]
    if read:
        return f"{name} reads {' and '.join(read)}, which says of every block what it is"
    return f"the blocks follow what {name} assumes for this type"
