"""Make a checkpoint narrower: choose attention heads and MLP neurons, cut them out of the files.

find_groups ──► a method chooses ──► rows and columns that stay ──► a plain checkpoint, or one
(structure.py)  (methods/)           (reshape.py)                   with a shape per block

shortllm width MODEL --method flap --ratio 0.2 --out DIR
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortllm.checkpoint.config import block_shapes
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tensors import read_tensor
from shortllm.data.calibration import Calibration, calibrate
from shortllm.errors import ShortLLMError, UnsupportedModelError
from shortllm.model import Session
from shortllm.model.loading import stored_dtype
from shortllm.options import accepts
from shortllm.records import PROTECT_FIRST, PROTECT_LAST
from shortllm.runtime import Runtime
from shortllm.surgery.apply import provenance_of
from shortllm.surgery.derived import (
    Draft,
    copying,
    derive,
    derived_fingerprint,
    on_probe,
    require_text_model,
    require_unquantized,
    stored_name,
    verifying,
)
from shortllm.width_pruning.groups import BlockGroups, removed_counts, without_units
from shortllm.width_pruning.methods import METHODS, Chosen, Task
from shortllm.width_pruning.options import (
    SAMPLE_LENGTH,
    NarrowedBlock,
    WidthOptions,
    WidthPruning,
    WidthSize,
)
from shortllm.width_pruning.reshape import (
    TensorShapes,
    narrowed_tensors,
    per_block_config,
    require_plain_names,
    uniform_config,
)
from shortllm.width_pruning.structure import find_groups

Groups = Mapping[int, BlockGroups]
Biases = dict[int, dict[str, Tensor]]
Layout = tuple[dict[str, Any], TensorShapes]

log = logging.getLogger(__name__)


@accepts(options=WidthOptions, runtime=Runtime)
def width(
    model: str,
    out: Path | str,
    *,
    options: WidthOptions,
    runtime: Runtime,
    revision: str | None = None,
) -> WidthPruning:
    """Write a narrower checkpoint: heads and neurons removed by one of the width baselines.

    Args:
        model: a checkpoint directory or Hub id.
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
        CheckpointError: the result does not compute what it should.
        OutputError: `out` contains something else or cannot be written.
    """
    checkpoint = open_checkpoint(model, revision=revision)
    options = resolve(options, checkpoint.block_count)
    ids = calibrate(checkpoint, options.calibration) if options.needs_text else None
    return width_from(checkpoint, options, Path(out), calibration=ids, session=Session(runtime))


def width_from(
    checkpoint: Checkpoint,
    options: WidthOptions,
    target: Path,
    *,
    calibration: Calibration | None,
    session: Session,
) -> WidthPruning:
    """The same for an open checkpoint; `calibration` is None where the method needs no text."""
    options = resolve(options, checkpoint.block_count)
    require_text_model(checkpoint, "be made narrower. Remove whole blocks with `shortllm prune`")
    require_unquantized(checkpoint, "rows and columns cannot be cut out of it")
    seen = calibration if options.needs_text else None
    expected = derived_fingerprint(
        checkpoint, calibration=seen, session=session, width=_choices(options)
    )

    def draft() -> Draft:
        return _draft(checkpoint, options, target, seen, session)

    return derive(WidthPruning, target, checkpoint, draft, expected=expected)


def resolve(options: WidthOptions, blocks: int) -> WidthOptions:
    """The same options with every default filled in, for a model of this many blocks."""
    method = METHODS.get(options.method)
    start, end = options.start, options.end
    if start is None:
        start = min(PROTECT_FIRST, blocks // 4) if method.protects_ends else 0
    if end is None:
        end = blocks - (min(PROTECT_LAST, blocks // 4) if method.protects_ends else 0)
    if not 0 <= start < end <= blocks:
        raise ShortLLMError(
            f"blocks {start} to {end} (not included) were requested, but the model has {blocks}. "
            f"Give --start below --end, and --end {blocks} or less"
        )
    if options.shapes == "uniform" and (start, end) != (0, blocks):
        raise ShortLLMError(
            f"--shapes uniform makes all blocks alike, but only blocks {start} to {end - 1} of "
            f"{blocks} become narrower. Give --start 0 --end {blocks}, or --shapes per-block"
        )
    given = {name: getattr(options, name) for name in method.options}
    own = {name: default for name, default in method.options.items() if given[name] is None}
    length = options.calibration.length or method.sample_length or SAMPLE_LENGTH
    text = options.calibration.model_copy(update={"length": length})
    update = {"start": start, "end": end, "calibration": text, **own}
    return options.model_copy(update=update)


def _choices(options: WidthOptions) -> dict[str, Any]:
    """What the result depends on besides the text; random importance depends on the seed."""
    chosen = options.model_dump(mode="json", exclude={"calibration"})
    return chosen if options.needs_text else {**chosen, "seed": options.calibration.seed}


def _draft(
    checkpoint: Checkpoint,
    options: WidthOptions,
    target: Path,
    calibration: Calibration | None,
    session: Session,
) -> Draft:
    """Find heads and neurons, choose, and describe the narrower checkpoint."""
    assert options.start is not None and options.end is not None
    decoder = session.decoder(checkpoint)
    groups = find_groups(decoder, range(options.start, options.end))
    require_plain_names(checkpoint, groups)
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
    entries = narrowed_tensors(checkpoint, groups, chosen.removed)
    new, biases = _new_tensors(checkpoint, chosen, uniform)
    with without_units(decoder, groups, chosen.removed, biases):
        logits, cached = on_probe(decoder)
    biased = {b: list(outputs) for b, outputs in chosen.biases.items()}
    config = uniform[0] if uniform else per_block_config(checkpoint, groups, chosen.removed, biased)
    total = sum(tensor.numel() for tensor in new.values()) + sum(
        entry.elements for name, entry in entries.items() if name not in new
    )
    shapes = "per-block" if uniform is None else "uniform"
    choices = {**_choices(options), "shapes": shapes}
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
        provenance=provenance_of(checkpoint, [], width=choices),
        bytes=sum(entry.bytes for entry in entries.values()),
        write=copying(entries, list(new.items())),
        verify=verifying(target, session, logits, cached=cached),
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
            return uniform_config(checkpoint, groups, counts[0], bias=bool(options.bias))
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
        )
        for b, gone in sorted(chosen.removed.items())
    ]
