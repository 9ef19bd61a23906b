"""Make a checkpoint narrower: choose attention heads and MLP neurons, cut them out of the files.

find_groups ──► a method chooses ──► rows and columns that stay ──► a plain checkpoint, or one
(structure.py)  (methods/)                                          with a shape per block

Kept weights are unchanged to the bit, unless the output projections are repaired (repair.py). The
config is plain if the family's own fields can describe the result.

shortllm width MODEL --method flap --ratio 0.2 --out DIR
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortllm.calls import accepts
from shortllm.checkpoint.config import SHAPES, block_shapes, marked
from shortllm.checkpoint.hub import ModelSource
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.structure import build_empty, find_blocks
from shortllm.checkpoint.tensors import TensorEntry, read_tensor
from shortllm.data.calibration import Calibration, calibrate
from shortllm.errors import DataError, UnsupportedModelError
from shortllm.healing.folding import folded_into
from shortllm.model import Session
from shortllm.model.loading import stored_dtype
from shortllm.registry import cited
from shortllm.runtime import Runtime, quiet_transformers
from shortllm.surgery.apply import as_read_from_disk
from shortllm.surgery.derived import (
    Draft,
    copying,
    derive,
    derived_fingerprint,
    on_probe,
    require_stored,
    require_text_model,
    require_unquantized,
    stored_name,
    verifying,
)
from shortllm.surgery.origin import provenance_of
from shortllm.width_pruning.groups import BlockGroups, Removed, removed_counts, without_units
from shortllm.width_pruning.methods import METHODS, Chosen, Task
from shortllm.width_pruning.options import NarrowedBlock, WidthOptions, WidthPruning, WidthSize
from shortllm.width_pruning.repair import repair
from shortllm.width_pruning.structure import find_groups

NEURON_FIELDS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
"""Names of the number of neurons in configs."""

KV_FIELDS = ("num_key_value_heads", "num_kv_heads")

BIAS_FIELDS = ("attention_bias", "mlp_bias")
"""Fields that give all projections of a block biases."""

Groups = Mapping[int, BlockGroups]
Biases = dict[int, dict[str, Tensor]]
TensorShapes = dict[str, tuple[int, ...]]
"""Name within a block -> shape."""

Layout = tuple[dict[str, Any], TensorShapes]
"""config.json of a plain checkpoint, and the biases that it adds to each block."""

log = logging.getLogger(__name__)


@accepts(options=WidthOptions, runtime=Runtime)
def width(
    model: ModelSource,
    out: Path,
    *,
    options: WidthOptions,
    runtime: Runtime,
    revision: str | None = None,
) -> WidthPruning:
    """Write a narrower checkpoint: heads and neurons removed by one of the width baselines.

    Args:
        model: a checkpoint directory, a Hub id, or a loaded model.
        out: the new checkpoint directory, which also gets width.json.
        options: the method and how much to remove; their fields can be given as keywords.
        runtime: where to compute; its fields can be given as keywords.
        revision: of a Hub model.
    Returns:
        The content of width.json: what was removed from each block, and the importances.
    Raises:
        UnsupportedModelError: heads and neurons of this model cannot be removed one by one, or
            its config cannot describe the requested shapes.
        BudgetError: the ratio removes nothing or everything.
        CriterionError: the importances cannot be ranked.
        DataError: too few samples.
        CheckpointError: the result does not compute what it should.
        OutputError: `out` contains something else or cannot be written.
    """
    checkpoint = open_checkpoint(model, revision=revision)
    options = options.resolved(checkpoint.block_count)
    ids = calibrate(checkpoint, options.calibration) if options.needs_text else None
    return width_from(checkpoint, options, out, calibration=ids, session=Session(runtime))


def width_from(
    checkpoint: Checkpoint,
    options: WidthOptions,
    target: Path,
    *,
    calibration: Calibration | None,
    session: Session,
    refit_on: Calibration | None = None,
) -> WidthPruning:
    """The same for an open checkpoint; `calibration` is None where the method needs no text.

    The repair refits on the same text, or on `refit_on`.
    """
    options = options.resolved(checkpoint.block_count)
    require_text_model(checkpoint, "be made narrower. Remove whole blocks with `shortllm prune`")
    require_unquantized(checkpoint, "rows and columns cannot be cut out of it")
    seen = calibration if options.needs_text else None
    refitting = refit_on or seen
    if options.repair and refitting is not None and len(refitting.ids) < 2:
        raise DataError(
            "1 sample is too few for --repair: a part of the samples is held out to choose by. "
            "Give --samples 2 or more, or leave --repair out"
        )
    other = {} if refit_on is None else {"refit_on": refit_on.info.tokens_fingerprint}
    expected = derived_fingerprint(
        checkpoint, calibration=seen, session=session, width=options.choices, **other
    )

    draft = partial(_draft, checkpoint, options, target, seen, refitting, session)
    return derive(
        WidthPruning,
        target,
        checkpoint,
        draft,
        expected=expected,
        choices=options.model_dump(mode="json"),
    )


def _draft(
    checkpoint: Checkpoint,
    options: WidthOptions,
    target: Path,
    calibration: Calibration | None,
    refit_on: Calibration | None,
    session: Session,
) -> Draft:
    """Find heads and neurons, choose, and describe the narrower checkpoint."""
    assert options.start is not None and options.end is not None
    decoder = session.decoder(checkpoint)
    groups = find_groups(decoder, range(options.start, options.end))
    for b, block in groups.items():
        for sublayer in block.sublayers:
            for name in sublayer.projections:
                require_stored(checkpoint, b, name, needed_to="cut rows and columns")
    counts = {}
    if not options.one_list:
        counts = {b: removed_counts(groups[b], options.ratio, options.neuron_ratio) for b in groups}
    uniform = _uniform_layout(checkpoint, options, groups, counts)
    task = Task(
        decoder=decoder,
        ids_BT=calibration.ids if calibration else None,
        groups=groups,
        options=options,
        counts=counts,
        memory=session.memory(),
    )
    chosen: Chosen = METHODS.get(options.method).function(task)
    if options.repair and refit_on is not None:
        chosen = repair(checkpoint, replace(task, ids_BT=refit_on.ids), chosen)
    entries = _narrowed_tensors(checkpoint, groups, chosen.removed)
    new, biases = _new_tensors(checkpoint, chosen, uniform)
    with (
        folded_into(decoder, chosen.folds),
        without_units(decoder, groups, chosen.removed, biases),
    ):
        logits, cached = on_probe(decoder)
    config = uniform[0] if uniform else _per_block_config(checkpoint, groups, chosen)
    total = sum(tensor.numel() for tensor in new.values()) + sum(
        entry.elements for name, entry in entries.items() if name not in new
    )
    shapes = "per-block" if uniform is None else "uniform"
    choices = {**options.choices, "shapes": shapes}
    record = {
        "method": options.method,
        "options": {name: one for name, one in choices.items() if name not in ("method", "shapes")},
        "shapes": shapes,
        "blocks": _narrowed_blocks(groups, chosen),
        "biases": bool(chosen.biases),
        "reached": WidthSize(
            parameters=total,
            removed=checkpoint.parameters - total,
            removed_ratio=1 - total / checkpoint.parameters,
        ),
        "calibration": calibration.info.tokens_fingerprint if calibration else None,
        "dtype": session.dtype(checkpoint),
    }
    return Draft(
        record=record,
        config=config,
        provenance=provenance_of(
            checkpoint, [], paper=cited(METHODS.get(options.method)), width=choices
        ),
        bytes=sum(entry.bytes for entry in entries.values()),
        write=copying(entries, chain(new.items(), _repaired_weights(checkpoint, groups, chosen))),
        verify=verifying(target, session, logits, cached=cached, narrower=True),
        resized=uniform is not None,
    )


def _uniform_layout(
    checkpoint: Checkpoint,
    options: WidthOptions,
    groups: Groups,
    counts: Mapping[int, tuple[int, int]],
) -> Layout | None:
    """Config and added biases of a plain checkpoint; None if blocks get shapes of their own."""
    if options.shapes == "per-block" or not counts:
        return None
    alike = len(set(counts.values())) == 1 and len(counts) == checkpoint.block_count
    if block_shapes(checkpoint.config) is None and alike:
        try:
            return _uniform_config(checkpoint, groups, counts[0], bias=bool(options.bias))
        except UnsupportedModelError as error:
            if options.shapes == "uniform":
                raise
            log.info("%s; the blocks get shapes of their own", error)
    elif options.shapes == "uniform":
        raise UnsupportedModelError(
            f"the blocks of {checkpoint.id} differ in width, so a plain checkpoint cannot describe "
            "them. Give --shapes per-block"
        )
    return None


def _narrowed_tensors(
    checkpoint: Checkpoint, groups: Groups, removed: Mapping[int, Removed]
) -> dict[str, TensorEntry]:
    """Tensor name -> the part of the stored tensor that stays, in the order of the files."""
    result = dict(checkpoint.tensors)

    def cut(b: int, name: str, axis: int, kept: list[int]) -> None:
        stored = stored_name(checkpoint, b, name)
        entry = result.get(stored)
        if entry is not None and len(kept) < entry.shape[axis]:
            result[stored] = entry.part(axis, entry.shape[axis], kept)

    for b, gone in removed.items():
        for sublayer, units in gone.pairs(groups[b]):
            for name in sublayer.projections:
                kept, transposed = sublayer.kept(name, units), name in groups[b].transposed
                if name == sublayer.output:
                    cut(b, f"{name}.weight", int(not transposed), kept)
                else:
                    cut(b, f"{name}.weight", int(transposed), kept)
                    cut(b, f"{name}.bias", 0, kept)
    return result


def _uniform_config(
    checkpoint: Checkpoint, groups: Groups, counts: tuple[int, int], *, bias: bool
) -> Layout:
    """The layout where every block loses the same number of heads and neurons.

    It has other biases that the family only has together with those of the output projections.
    """
    first = groups[0]
    heads, neurons = first.attention.units - counts[0], first.mlp.units - counts[1]
    raw = _with_counts(checkpoint, heads, neurons, first)
    if bias:
        raw |= {name: True for name in BIAS_FIELDS if hasattr(checkpoint.config, name)}
    config = f"the config of model type '{checkpoint.model_type}'"
    cannot = (
        f"{config} cannot describe blocks with {heads * first.query_heads} heads of "
        f"{first.head_dim} and {neurons} neurons"
    )
    hint = "Give --shapes per-block, a checkpoint for shortllm.load"
    try:
        with quiet_transformers():
            built = _built_shapes(as_read_from_disk(checkpoint.config, raw))
    except UnsupportedModelError as error:
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        raise UnsupportedModelError(f"{cannot} ({reason}). {hint}") from error
    added: TensorShapes = {}
    gone = Removed(*(list(range(count)) for count in counts))  # whichever units: shapes are alike
    kept = _narrowed_tensors(checkpoint, groups, dict.fromkeys(groups, gone))
    for b, before in enumerate(_built_shapes(checkpoint.config)):
        stored = {name: kept.get(stored_name(checkpoint, b, name)) for name in before}
        expected = {name: one.shape if one else before[name] for name, one in stored.items()}
        outputs = [f"{sublayer.output}.bias" for sublayer in groups[b].sublayers]
        missing = [name for name in outputs if bias and name not in built[b]]
        if missing:
            raise UnsupportedModelError(
                f"{config} cannot give '{missing[0]}', which is needed for the mean of what is "
                f"removed. {hint}, or --no-bias"
            )
        new = {name: shape for name, shape in built[b].items() if name not in expected}
        wrong = [name for name, shape in expected.items() if built[b].get(name) != shape]
        wrong += [name for name in new if not bias or not name.endswith(".bias")]
        if wrong:
            found, wanted = built[b].get(wrong[0]), expected.get(wrong[0])
            raise UnsupportedModelError(
                f"{cannot}: '{wrong[0]}' would be {found} instead of {wanted}. {hint}"
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


def _per_block_config(checkpoint: Checkpoint, groups: Groups, chosen: Chosen) -> dict[str, Any]:
    """config.json with the shapes of each block, some of whose output projections get a bias."""
    entries = list(block_shapes(checkpoint.config) or [{}] * checkpoint.block_count)
    for b, gone in chosen.removed.items():
        block = groups[b]
        heads = block.attention.units - len(gone.heads)
        projections: dict[str, list[int]] = {}
        for sublayer, units in gone.pairs(block):
            for name in sublayer.projections:
                shape = [len(sublayer.kept(name, units)), block.width]
                projections[name] = shape[::-1] if name == sublayer.output else shape
        entries[b] = {
            "num_attention_heads": heads * block.query_heads,
            "num_key_value_heads": heads,
            "attention_width": heads * block.attention.unit_width,
            "intermediate_size": block.mlp.units - len(gone.neurons),
            "projections": projections,
            "biases": sorted({*entries[b].get("biases", []), *chosen.biases.get(b, {})}),
        }
    # transformers takes some types for others: e.g. mistral with layer_types for ministral
    raw = {**checkpoint.raw_config, "model_type": checkpoint.model_type}
    return {**marked(raw), SHAPES: entries}


def _new_tensors(
    checkpoint: Checkpoint, chosen: Chosen, uniform: Layout | None
) -> tuple[dict[str, Tensor], Biases]:
    """Biases by their stored names, and the part of each that comes from removed units.

    That part is what `chosen` says, rounded to the type the checkpoint is stored in. Where the
    type's config gives all projections biases together, the others are zeros.
    """
    dtype = stored_dtype(checkpoint)
    new: dict[str, Tensor] = {}
    added: Biases = {}
    if uniform is not None:
        for b in range(checkpoint.block_count):
            for name, shape in uniform[1].items():
                new[stored_name(checkpoint, b, name)] = torch.zeros(shape, dtype=dtype)
    for b, biases in chosen.biases.items():
        added[b] = {}
        for output, bias_D in biases.items():
            name = stored_name(checkpoint, b, f"{output}.bias")
            held = checkpoint.tensors.get(name)
            before = read_tensor(held) if held is not None else torch.zeros((), dtype=dtype)
            new[name] = (before.double() + bias_D).to(before.dtype)
            added[b][output] = new[name].double() - before.double()
    return new, added


def _repaired_weights(
    checkpoint: Checkpoint, groups: Groups, chosen: Chosen
) -> Iterator[tuple[str, Tensor]]:
    """New weights of output projections by their stored names, without the removed channels."""
    for b, fold in chosen.folds.items():
        for sublayer, units in chosen.removed[b].pairs(groups[b]):
            name = f"{sublayer.output}.weight"
            weights = fold.get(name)
            if isinstance(weights, Tensor):
                kept = torch.tensor(sublayer.kept(sublayer.output, units))
                axis = int(sublayer.output not in groups[b].transposed)
                yield stored_name(checkpoint, b, name), weights.index_select(axis, kept)


def _narrowed_blocks(groups: Groups, chosen: Chosen) -> list[NarrowedBlock]:
    """What the record says of each block."""
    return [
        NarrowedBlock(
            block=b,
            query_heads=groups[b].attention.units * groups[b].query_heads,
            kv_heads=groups[b].attention.units,
            neurons=groups[b].mlp.units,
            removed_query_heads=[
                kv_head * groups[b].query_heads + i
                for kv_head in gone.heads
                for i in range(groups[b].query_heads)
            ],
            removed_kv_heads=gone.heads,
            removed_neurons=gone.neurons,
            head_importance=chosen.importance[b].heads.tolist(),
            neuron_importance=chosen.importance[b].neurons[gone.neurons].tolist(),
            repaired=chosen.repairs.get(b, []),
        )
        for b, gone in sorted(chosen.removed.items())
    ]
