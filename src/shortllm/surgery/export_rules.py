"""What another program may assume about blocks: checks that the tables of export_tables.py use."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from shortllm.checkpoint.config import SHAPES, block_count, text_config
from shortllm.checkpoint.heads import speaks_of_heads
from shortllm.errors import UnsupportedModelError
from shortllm.format import counted
from shortllm.records import Record

if TYPE_CHECKING:  # it imports torch, and commands need the names of the programs
    from shortllm.checkpoint.source import Checkpoint

PERIODS_HELP = "Plan again with --period-aligned, so that only whole periods go"
TRANSFORMERS_HELP = "Run it with transformers instead"

NO_HEADS_HELP = "Prune again with --drop-heads, or run it with transformers instead"

NO_HEADS = "--no-mtp"
"""Flag of the converter of llama.cpp: the model has no prediction head, or it is left out."""

ORDINALS = {2: "second", 3: "third", 4: "fourth", 5: "fifth", 6: "sixth"}


class Source(Record):
    """The place in a program's source code that a verdict rests on."""

    project: str
    file: str
    commit: str
    place: str

    def __str__(self) -> str:
        return f"{self.project} {self.file} at {self.commit[:10]}, {self.place}"


@dataclass(frozen=True)
class Exported:
    """A checkpoint as another program sees it."""

    checkpoint: Checkpoint

    @cached_property
    def config(self) -> Any:
        """The config of the text decoder, with every default of transformers filled in."""
        return text_config(self.checkpoint.config)

    @cached_property
    def stated(self) -> dict[str, Any]:
        """The part of config.json that describes the text decoder: no defaults."""
        raw = self.checkpoint.raw_config
        parts = [part for part in raw.values() if isinstance(part, dict)]
        inside = (part for part in parts if part.get("model_type") == self.config.model_type)
        return raw if self.config is self.checkpoint.config else next(inside, raw)

    @property
    def blocks(self) -> int:
        """Blocks of the decoder, without prediction heads."""
        return block_count(self.config)

    @cached_property
    def heads(self) -> list[int]:
        """The numbers of prediction heads that are stored like blocks behind the last one."""
        try:
            names = self.checkpoint.block_names
        except UnsupportedModelError:  # other numbers than the next ones
            ending = "." + self.checkpoint.structure.name
            parts = (re.split(r"\.(\d+)\.", "." + name) for name in self.checkpoint.tensors)
            found = {int(part[1]) for part in parts if part[0].endswith(ending)}
            return sorted(number for number in found if number >= self.blocks)
        return list(range(names.count, names.count + names.heads))

    @cached_property
    def named_head(self) -> bool:
        """Whether a prediction head is stored under a name of its own."""
        return any(map(speaks_of_heads, self.checkpoint.tensors))

    def fields(self, *names: str) -> dict[str, Any]:
        """Values of config fields, for a finding."""
        return {name: getattr(self.config, name, self.stated.get(name)) for name in names}


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a program will run a checkpoint incorrectly, or, if `certain` is false, may do so."""

    reason: str
    fields: dict[str, Any]
    hint: str
    certain: bool = True


Check = Callable[[Exported], Problem | None]
Advice = Callable[[Exported], str | None]


def always_right(model: Exported) -> None:
    """What the program reads says everything."""


def no_advice(model: Exported) -> None:
    """Nothing to do besides."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What one program assumes about the blocks of a type, and where its source code says so."""

    source: Source
    check: Check = always_right
    reads: str = ""
    """The field that says it of every block, where the program reads one."""
    advice: Advice = no_advice


# ---- kinds of blocks by their number


def every(
    period: int, field: str, value: Any, meaning: str, *, stated: str = "", default: bool = True
) -> Check:
    """The program expects `value` in every `period`-th entry of a field and nowhere else.

    Args:
        stated: field in which config.json may state another period.
        default: whether the program has one itself, which is `period`.
    """

    def check(model: Exported) -> Problem | None:
        used = model.stated.get(stated, period)
        entries = list(getattr(model.config, field, None) or [])
        if not _recurs(entries, value, used):
            fits = next((n for n in range(1, len(entries)) if _recurs(entries, value, n)), None)
            said = f'Set "{stated}": {fits} in config.json' if stated and fits else PERIODS_HELP
            return Problem(
                f"it assumes that every {ORDINALS.get(used, f'{used}th')} block {meaning}, and no "
                f"other; here {field} differs",
                {field: entries, **({stated: used} if stated in model.stated else {})},
                said,
            )
        if stated in model.stated or default:
            return None
        return Problem(
            f"it reads {stated} from config.json, which does not have it",
            {},
            f'Add "{stated}": {used} to config.json',
            certain=False,
        )

    return check


def _recurs(entries: Sequence[Any], value: Any, period: int) -> bool:
    """Whether `value` is in every `period`-th entry and nowhere else."""
    return [entry == value for entry in entries] == [
        (block + 1) % period == 0 for block in range(len(entries))
    ]


def full_every(period: int, *, stated: str = "", default: bool = True) -> Check:
    """The program expects full attention in every `period`-th block; see `every`."""
    meaning = "attends to all tokens"
    field, value = "layer_types", "full_attention"
    return every(period, field, value, meaning, stated=stated, default=default)


def no_positions_every(period: int) -> Check:
    """The program expects no rotary positions in every `period`-th block; see `every`."""
    return every(period, "no_rope_layers", 0, "has no rotary positions")


def no_positions_at_intervals(model: Exported) -> Problem | None:
    """The program knows one interval for all blocks without positions."""
    entries = list(model.config.no_rope_layers)
    if any(_recurs(entries, 0, interval) for interval in range(1, len(entries) + 2)):
        return None
    return Problem(
        "it knows blocks without rotary positions by one interval, no_rope_layer_interval; here "
        "no_rope_layers follows none",
        {"no_rope_layers": entries},
        PERIODS_HELP,
    )


def reaches(period: int, stated: str = "") -> Check:
    """The program looks at the last block of the first period."""

    def check(model: Exported) -> Problem | None:
        used = model.stated.get(stated, period) if stated else period
        if model.blocks >= used:
            return None
        return Problem(
            f"it takes the mask of all blocks that attend to all tokens from block {used - 1}; "
            f"here are only {counted(model.blocks, 'block')}",
            {"num_hidden_layers": model.blocks},
            "Keep at least one whole period, or run it with transformers instead",
        )

    return check


def has(*kinds: str) -> Check:
    """The program looks for the first block of each kind."""

    def check(model: Exported) -> Problem | None:
        listed = list(model.config.layer_types)
        missing = next((kind for kind in kinds if kind not in listed), None)
        if missing is None:
            return None
        return Problem(
            f"it looks for the first block of kind {missing}, and there is none",
            {"layer_types": listed},
            f"Keep a block of kind {missing}, or run it with transformers instead",
        )

    return check


def full_blocks_listed(model: Exported) -> Problem | None:
    """The program prefers the numbers in full_attn_idxs to layer_types."""
    listed = list(model.config.layer_types)
    numbers = [block for block, kind in enumerate(listed) if kind == "full_attention"]
    stated = model.stated.get("full_attn_idxs")
    if not numbers:
        return has("full_attention")(model)
    if stated is None or sorted(stated) == numbers:
        return None
    return Problem(
        "it reads full_attn_idxs, but layer_types says otherwise",
        {"full_attn_idxs": stated, "layer_types": listed},
        "Remove full_attn_idxs from config.json",
    )


def shares_with_last_two(model: Exported) -> Problem | None:
    """The program takes shared keys from the two blocks in front of the first that shares."""
    first = model.blocks - model.config.num_kv_shared_layers
    wanted = ["sliding_attention", "full_attention"]
    if first == model.blocks or list(model.config.layer_types[first - 2 : first]) == wanted:
        return None
    return Problem(
        f"it takes keys and values that blocks share from block {first - 2}, for windows, and "
        f"block {first - 1}; here these are not of the two kinds",
        model.fields("num_kv_shared_layers", "layer_types"),
        f"Keep the two blocks in front of block {first}, or run it with transformers instead",
    )


def shared_keys_from(block: int) -> Check:
    """The program assumes that keys and values are shared from a fixed block on."""

    def check(model: Exported) -> Problem | None:
        first = model.blocks - model.config.num_kv_shared_layers
        if first == block:
            return None
        return Problem(
            f"it assumes that blocks from {block} on share keys and values; here those from "
            f"{first} on do",
            model.fields("num_hidden_layers", "num_kv_shared_layers"),
            f"Remove only blocks from {block} on, or run it with transformers instead",
        )

    return check


def experts_by_step(model: Exported) -> Problem | None:
    """The program expects experts in every n-th block, as interleave_moe_layer_step says."""
    step = model.config.interleave_moe_layer_step
    if model.config.moe_layers == list(range(step - 1, model.blocks, step)):
        return None
    return Problem(
        "it reads interleave_moe_layer_step, but moe_layers says which blocks have experts",
        model.fields("interleave_moe_layer_step", "moe_layers"),
        PERIODS_HELP,
    )


def one_window(model: Exported) -> Problem | None:
    """The program knows windows in all blocks or in none."""
    whole = model.config.max_window_layers == model.blocks
    if whole or not getattr(model.config, "use_sliding_window", False):
        return None
    return Problem(
        "it refuses a sliding window in some but not all blocks: max_window_layers must be "
        "num_hidden_layers",
        model.fields("max_window_layers", "num_hidden_layers", "sliding_window"),
        TRANSFORMERS_HELP,
    )


def one_shape(model: Exported) -> Problem:
    """The program knows one shape of all blocks; for types that have several."""
    return Problem(
        "it builds all blocks in one shape",
        {"shapes": len({str(shapes) for shapes in getattr(model.config, SHAPES)})},
        "Make it narrower with --shapes uniform, or load it with shortllm.load",
    )


# ---- kinds of models by the block count


def scale_by_count(blocks: int) -> Check:
    """The program chooses the attention scale by block count, with an exception at `blocks`."""

    def check(model: Exported) -> Problem | None:
        config = model.config
        exception = config.hidden_size // config.num_attention_heads
        used = exception if model.blocks == blocks else config.head_dim
        if used == config.query_pre_attn_scalar:
            return None
        return Problem(
            f"it scales attention by 1/sqrt({used}) in a model of {model.blocks} blocks and does "
            "not read query_pre_attn_scalar",
            model.fields("num_hidden_layers", "query_pre_attn_scalar", "head_dim"),
            TRANSFORMERS_HELP,
        )

    return check


def plain_queries_at(counts: Sequence[int]) -> Check:
    """The program takes models of these block counts, and no others, to have plain queries."""

    def check(model: Exported) -> Problem | None:
        plain = getattr(model.config, "q_lora_rank", None) is None
        if plain == (model.blocks in counts):
            return None
        has, listed = "no" if plain else "a", " or ".join(map(str, counts))
        return Problem(
            f"it takes a model of {listed} blocks, and no other, to have no q_lora_rank; here are "
            f"{counted(model.blocks, 'block')}, and {has} q_lora_rank",
            model.fields("num_hidden_layers", "q_lora_rank"),
            TRANSFORMERS_HELP,
        )

    return check


# ---- prediction heads


def heads_behind(model: Exported) -> Problem | None:
    """The program leaves out as many blocks behind the last as the config counts heads."""
    said = getattr(model.config, "num_nextn_predict_layers", None) or 0
    expected, found = range(model.blocks, model.blocks + said), model.heads
    if set(found) <= set(expected):
        return None
    fits = found == list(range(model.blocks, model.blocks + len(found)))
    return Problem(
        f"it expects {counted(said, 'prediction head')} behind the last block, as "
        f"num_nextn_predict_layers says: {_numbers(expected)}; stored: {_numbers(found)}",
        {"num_nextn_predict_layers": said, "num_hidden_layers": model.blocks},
        _count_them(len(found)) if fits else NO_HEADS_HELP,
    )


def heads_counted(model: Exported) -> Problem | None:
    """The program leaves out whatever is behind the last block, if the config counts a head."""
    if not model.heads or getattr(model.config, "num_nextn_predict_layers", None):
        return None
    return Problem(
        "it leaves out prediction heads only if num_nextn_predict_layers counts them; stored: "
        + _numbers(model.heads),
        {"num_nextn_predict_layers": 0, "num_hidden_layers": model.blocks},
        _count_them(len(model.heads)),
    )


def head_at(number: int | None = None) -> Check:
    """The program leaves out what is stored under one number, and nothing else.

    Args:
        number: None for the one behind the last block.
    """

    def check(model: Exported) -> Problem | None:
        left_out = model.blocks if number is None else number
        if model.blocks <= left_out and model.heads in ([], [left_out]):
            return None
        stored = f"prediction heads are stored as {_numbers(model.heads)}"
        return Problem(
            f"it leaves out block {left_out} as a prediction head, and no other; here "
            + (stored if model.heads else "it is a block of the model"),
            {"num_hidden_layers": model.blocks, "prediction_heads": model.heads},
            NO_HEADS_HELP if model.heads else TRANSFORMERS_HELP,
        )

    return check


def _count_them(heads: int) -> str:
    return f"Set num_nextn_predict_layers to {heads} in config.json"


def _numbers(numbers: Iterable[int]) -> str:
    return ", ".join(f"block {number}" for number in numbers) or "none"


def without_heads(model: Exported) -> str | None:
    """The converter of llama.cpp must be told that there is no head, whatever the config says."""
    if model.named_head:
        return None
    return f"Convert it with `shortllm export`, or give the converter {NO_HEADS}"


# ---- names and files of their own


def named(*prefixes: str) -> Check:
    """The program knows blocks by these names."""

    def check(model: Exported) -> Problem | None:
        prefix = model.checkpoint.block_names.prefix
        if prefix in prefixes:
            return None
        return Problem(
            f"it knows blocks by the name {prefixes[0]}.N; here they are {prefix}.N",
            {"prefix": prefix},
            TRANSFORMERS_HELP,
        )

    return check


def params_file(*fields: str) -> Advice:
    """What the program reads from a file of its own, and not from config.json."""

    def advice(model: Exported) -> str:
        said = "".join(f", and {field} of config.json" for field in fields)
        return f"State n_layers = {model.blocks}{said} in the params file: config.json is not read"

    return advice
