"""The narrower checkpoint: the parts of its tensors that stay, and its config.

The config is plain if the family's own fields can describe it; otherwise it has a shape per block.
Kept weights are unchanged to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shortllm.checkpoint.config import SHAPES, block_shapes, marked
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.structure import build_empty, find_blocks
from shortllm.checkpoint.tensors import TensorEntry
from shortllm.errors import UnsupportedModelError
from shortllm.runtime import quiet_transformers
from shortllm.surgery.apply import as_read_from_disk
from shortllm.surgery.derived import require_stored, stored_name
from shortllm.width_pruning.groups import BlockGroups, Removed

NEURON_FIELDS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
"""Names of the number of neurons in configs."""

KV_FIELDS = ("num_key_value_heads", "num_kv_heads")

BIAS_FIELDS = ("attention_bias", "mlp_bias")
"""Fields that give all projections of a block biases."""

TensorShapes = dict[str, tuple[int, ...]]
"""Name within a block -> shape."""


def require_plain_names(checkpoint: Checkpoint, groups: Mapping[int, BlockGroups]) -> None:
    """Refuse checkpoints whose tensors have other names than the model's parameters."""
    for b, of_block in groups.items():
        for sublayer in of_block.sublayers:
            for name in (*sublayer.unit_of_row_R, sublayer.output):
                require_stored(checkpoint, b, name, needed_to="cut rows and columns")


def narrowed_tensors(
    checkpoint: Checkpoint, groups: Mapping[int, BlockGroups], removed: Mapping[int, Removed]
) -> dict[str, TensorEntry]:
    """Tensor name -> the part of the stored tensor that stays, in the order of the files."""
    result = dict(checkpoint.tensors)
    for b, gone in removed.items():
        of_block = groups[b]

        def cut(name: str, axis: int, kept: list[int], b: int = b) -> None:
            stored = stored_name(checkpoint, b, name)
            entry = checkpoint.tensors.get(stored)
            if entry is not None and len(kept) < entry.shape[axis]:
                result[stored] = entry.part(axis, entry.shape[axis], kept)

        for sublayer, units in gone.pairs(of_block):
            for name in sublayer.unit_of_row_R:
                rows = sublayer.kept(name, units)
                cut(f"{name}.weight", int(name in of_block.transposed), rows)
                cut(f"{name}.bias", 0, rows)
            name = sublayer.output
            channels = sublayer.kept(name, units)
            cut(f"{name}.weight", int(name not in of_block.transposed), channels)
    return result


def uniform_config(
    checkpoint: Checkpoint,
    groups: Mapping[int, BlockGroups],
    counts: tuple[int, int],
    *,
    bias: bool,
) -> tuple[dict[str, Any], TensorShapes]:
    """config.json where every block loses the same number of heads and neurons.

    Also other biases that the family only has together with those of the output projections.
    """
    first = groups[0]
    heads, neurons = first.attention.units - counts[0], first.mlp.units - counts[1]
    raw = _with_counts(checkpoint, heads, neurons, first)
    if bias:
        raw |= {name: True for name in BIAS_FIELDS if hasattr(checkpoint.config, name)}
    model_type = checkpoint.model_type
    hint = "Give --shapes per-block, a checkpoint for shortllm.load"
    said = f"{heads * first.query_heads} heads of {first.head_dim} and {neurons} neurons"
    try:
        with quiet_transformers():
            built = _built_shapes(as_read_from_disk(checkpoint.config, raw))
    except UnsupportedModelError as error:
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        raise UnsupportedModelError(
            f"the config of model type '{model_type}' cannot describe blocks with {said} "
            f"({reason}). {hint}"
        ) from error
    added: TensorShapes = {}
    gone = Removed(*(list(range(count)) for count in counts))  # whichever units: shapes are alike
    kept = narrowed_tensors(checkpoint, groups, dict.fromkeys(groups, gone))
    for b, before in enumerate(_built_shapes(checkpoint.config)):
        stored = {name: kept.get(stored_name(checkpoint, b, name)) for name in before}
        expected = {name: one.shape if one else before[name] for name, one in stored.items()}
        outputs = [f"{sublayer.output}.bias" for sublayer in groups[b].sublayers]
        missing = [name for name in outputs if bias and name not in built[b]]
        if missing:
            raise UnsupportedModelError(
                f"the config of model type '{model_type}' cannot give '{missing[0]}', which is "
                f"needed for the mean of what is removed. {hint}, or --no-bias"
            )
        new = {name: shape for name, shape in built[b].items() if name not in expected}
        wrong = [name for name, shape in expected.items() if built[b].get(name) != shape]
        wrong += [name for name in new if not bias or not name.endswith(".bias")]
        if wrong:
            found, wanted = built[b].get(wrong[0]), expected.get(wrong[0])
            raise UnsupportedModelError(
                f"the config of model type '{model_type}' cannot describe blocks with {said}: "
                f"'{wrong[0]}' would be {found} instead of {wanted}. {hint}"
            )
        added = {name: shape for name, shape in new.items() if name not in outputs}
    return raw, added


def _with_counts(
    checkpoint: Checkpoint, heads: int, neurons: int, groups: BlockGroups
) -> dict[str, Any]:
    """config.json with other counts, under every name that the type's config has for them."""
    config, renamed = checkpoint.config, type(checkpoint.config).attribute_map
    fields = {"num_attention_heads": heads * groups.query_heads, "head_dim": groups.head_dim}
    fields |= {name: heads for name in KV_FIELDS if hasattr(config, name)}
    fields |= {name: neurons for name in NEURON_FIELDS if hasattr(config, name)}
    return {**checkpoint.raw_config, **{renamed.get(name, name): n for name, n in fields.items()}}


def _built_shapes(config: Any) -> list[TensorShapes]:
    """Shapes of the parameters of each block that a config builds."""
    model = build_empty(config)
    _, blocks = find_blocks(model, config)
    return [{name: tuple(p.shape) for name, p in block.named_parameters()} for block in blocks]


def per_block_config(
    checkpoint: Checkpoint,
    groups: Mapping[int, BlockGroups],
    removed: Mapping[int, Removed],
    biased: Mapping[int, list[str]],
) -> dict[str, Any]:
    """config.json with the shapes of each block, some of whose output projections get a bias."""
    before = block_shapes(checkpoint.config) or [{}] * checkpoint.block_count
    entries = [
        _entry(before[b], groups[b], removed[b], biased.get(b, [])) if b in removed else before[b]
        for b in range(checkpoint.block_count)
    ]
    # transformers takes some types for others: e.g. mistral with layer_types for ministral
    raw = {**checkpoint.raw_config, "model_type": checkpoint.model_type}
    return {**marked(raw), SHAPES: entries}


def _entry(
    before: dict[str, Any], groups: BlockGroups, removed: Removed, biased: list[str]
) -> dict[str, Any]:
    """The shapes of one block."""
    heads, neurons = groups.attention.units - len(removed.heads), groups.mlp.units
    projections: dict[str, list[int]] = {}
    for sublayer, units in removed.pairs(groups):
        for name in sublayer.unit_of_row_R:
            projections[name] = [len(sublayer.kept(name, units)), groups.width]
        kept = len(sublayer.kept(sublayer.output, units))
        projections[sublayer.output] = [groups.width, kept]
    return {
        "num_attention_heads": heads * groups.query_heads,
        "num_key_value_heads": heads,
        "attention_width": heads * groups.attention.unit_width,
        "intermediate_size": neurons - len(removed.neurons),
        "projections": projections,
        "biases": sorted({*before.get("biases", []), *biased}),
    }
