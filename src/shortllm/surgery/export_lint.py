"""Whether llama.cpp and vLLM will run a finished checkpoint correctly: rules in tables.

Some programs do not read from the config how the blocks of a type differ. Their code fixes it:
every second block attends to all tokens, every fourth has no positions. A shortened model that no
longer follows this pattern is silently wrong there; plans of whole periods (`--period-aligned`)
stay correct. Where no rule applies, the verdict is "unknown".

    shortllm export-lint CHECKPOINT
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import Field

from shortllm.calls import accepts
from shortllm.checkpoint.config import SHAPES, block_count, text_config
from shortllm.checkpoint.hub import ModelSource
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.errors import UnsupportedModelError
from shortllm.records import Record
from shortllm.runtime import Trust

Target = Literal["gguf", "vllm"]
Verdict = Literal["ok", "wrong", "unknown"]

NAMES: dict[Target, str] = {"gguf": "llama.cpp (GGUF)", "vllm": "vLLM"}
"""Target -> its name in messages."""

PERIODS_HELP = "Plan again with --period-aligned, so that only whole periods go"
TRANSFORMERS_HELP = "Run it with transformers instead"

ORDINALS = {2: "second", 4: "fourth", 5: "fifth", 6: "sixth"}

ALIKE = {
    "gemma", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo2", "phi", "phi3",
    "qwen2", "qwen3", "stablelm", "starcoder2",
}  # fmt: skip
"""Types that both programs build from the block count if all blocks have one structure."""


class ExportFinding(Record):
    """How one program will run a checkpoint."""

    target: Target
    verdict: Verdict
    reason: str
    fields: dict[str, Any] = Field(
        default_factory=dict, description="config fields the verdict rests on"
    )
    hint: str | None = Field(default=None, description="what to do if it is wrong")


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a program will run a checkpoint incorrectly."""

    reason: str
    fields: dict[str, Any]
    hint: str


Rule = Callable[[Any], Problem | None]


def _fields(config: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def _every(period: int, field: str, value: Any, meaning: str) -> Rule:
    """The program expects `value` in every `period`-th entry of a field and nowhere else."""

    def rule(config: Any) -> Problem | None:
        entries = getattr(config, field, None) or []
        wanted = [(block + 1) % period == 0 for block in range(len(entries))]
        if [entry == value for entry in entries] == wanted:
            return None
        return Problem(
            f"it assumes that every {ORDINALS[period]} block {meaning}, and no other; here "
            f"{field} differs",
            {field: list(entries)},
            PERIODS_HELP,
        )

    return rule


def _full_every(period: int) -> Rule:
    return _every(period, "layer_types", "full_attention", "attends to all tokens")


def _no_positions_every(period: int) -> Rule:
    return _every(period, "no_rope_layers", 0, "has no rotary positions")


def _scale_by_count(blocks: int) -> Rule:
    """The program chooses the attention scale by block count, with an exception at `blocks`."""

    def rule(config: Any) -> Problem | None:
        count, head_dim = block_count(config), config.head_dim
        used = config.hidden_size // config.num_attention_heads if count == blocks else head_dim
        if used == config.query_pre_attn_scalar:
            return None
        return Problem(
            f"it scales attention by 1/sqrt({used}) in a model of {count} blocks and does not read "
            "query_pre_attn_scalar",
            _fields(config, "num_hidden_layers", "query_pre_attn_scalar", "head_dim"),
            TRANSFORMERS_HELP,
        )

    return rule


def _shared_keys_from(block: int) -> Rule:
    """The program assumes that keys and values are shared from a fixed block on."""

    def rule(config: Any) -> Problem | None:
        first = block_count(config) - config.num_kv_shared_layers
        if first == block:
            return None
        return Problem(
            f"it assumes that blocks from {block} on share keys and values; here those from "
            f"{first} on do",
            _fields(config, "num_hidden_layers", "num_kv_shared_layers"),
            f"Remove only blocks from {block} on, or run it with transformers instead",
        )

    return rule


def _experts_by_step(config: Any) -> Problem | None:
    step = config.interleave_moe_layer_step
    if config.moe_layers == list(range(step - 1, block_count(config), step)):
        return None
    return Problem(
        "it reads interleave_moe_layer_step, but moe_layers says which blocks have experts",
        _fields(config, "interleave_moe_layer_step", "moe_layers"),
        PERIODS_HELP,
    )


def _one_window(config: Any) -> Problem | None:
    whole = config.max_window_layers == block_count(config)
    if whole or not getattr(config, "use_sliding_window", False):
        return None
    return Problem(
        "it refuses a sliding window in some but not all blocks: max_window_layers must be "
        "num_hidden_layers",
        _fields(config, "max_window_layers", "num_hidden_layers", "sliding_window"),
        TRANSFORMERS_HELP,
    )


def _one_shape(config: Any) -> Problem:
    return Problem(
        "it builds all blocks in one shape",
        {"shapes": len({str(shapes) for shapes in getattr(config, SHAPES)})},
        "Make it narrower with --shapes uniform, or load it with shortllm.load",
    )


BY_TYPE: dict[Target, dict[str, list[Rule]]] = {
    "gguf": {
        "cohere2": [_full_every(4)],
        "gemma2": [_full_every(2), _scale_by_count(46)],
        "gemma3_text": [_full_every(6), _scale_by_count(62)],
        "gemma3n_text": [_full_every(5), _shared_keys_from(20)],
        "gpt_oss": [_full_every(2)],
        "llama4_text": [_no_positions_every(4), _experts_by_step],
        "smollm3": [_no_positions_every(4)],
    },
    "vllm": {"gpt_oss": [_full_every(2)]},
}
"""Target -> model type -> everything that the program assumes about this type's blocks."""

BY_FIELD: dict[Target, dict[str, Rule]] = {
    "gguf": {SHAPES: _one_shape},
    "vllm": {SHAPES: _one_shape, "max_window_layers": _one_window},
}
"""Target -> config field -> what the program requires of every type that has the field."""


@accepts(trust=Trust)
def export_lint(
    model: ModelSource, *, trust: Trust, revision: str | None = None
) -> list[ExportFinding]:
    """Check by rule whether llama.cpp (GGUF) and vLLM will run a checkpoint correctly.

    Reads only the config and the headers of the weights.

    Args:
        model: a checkpoint directory, a Hub id, or a loaded model.
        trust: `trust_remote_code`; it can be given as a keyword.
        revision: of a Hub model.
    Returns:
        A verdict for each program, with the reason and, where there is one, a hint.
    Raises:
        CheckpointError: not a checkpoint, or a damaged one.
    """
    return lint_export(open_checkpoint(model, revision=revision))


def lint_export(checkpoint: Checkpoint) -> list[ExportFinding]:
    """The verdict of each program on an open checkpoint."""
    return [_lint(checkpoint, target) for target in get_args(Target)]


def _lint(checkpoint: Checkpoint, target: Target) -> ExportFinding:
    config = text_config(checkpoint.config)
    rules = BY_TYPE[target].get(config.model_type, [])
    by_field = [rule for field, rule in BY_FIELD[target].items() if hasattr(config, field)]
    try:
        problem = next(filter(None, (rule(config) for rule in (*rules, *by_field))), None)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise UnsupportedModelError(
            f"config.json of {checkpoint.id} has a value that does not fit its model type "
            f"'{config.model_type}': {error}. Download it again"
        ) from error
    verdict: Verdict
    fields: dict[str, Any] = {}
    hint = None
    if problem is not None:
        verdict, fields, hint = "wrong", problem.fields, problem.hint
        reason = f"{NAMES[target]} will not run this model correctly: {problem.reason}"
    elif rules:
        verdict = "ok"
        reason = f"the blocks follow the pattern that {NAMES[target]} assumes for this type"
    elif config.model_type in ALIKE and checkpoint.structure.period == 1:
        verdict = "ok"
        reason = "all blocks have one structure, and their number is read from the config"
    else:
        verdict, hint = "unknown", "Compare its output with the output of transformers"
        differ = ", whose blocks differ by position" if checkpoint.structure.period > 1 else ""
        reason = f"no rule says how {NAMES[target]} reads model type '{config.model_type}'{differ}"
    return ExportFinding(target=target, verdict=verdict, reason=reason, fields=fields, hint=hint)
