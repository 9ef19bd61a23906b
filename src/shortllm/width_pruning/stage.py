"""The stage: from a checkpoint to a narrower one."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm.checkpoint.config import text_config
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.errors import DataError, UnsupportedModelError
from shortllm.files import require_writable
from shortllm.model.session import Session
from shortllm.records import Cost
from shortllm.runtime import peak_memory, progress, versions
from shortllm.surgery.apply import require_apart
from shortllm.surgery.made import finished, made_fingerprint, require_free
from shortllm.width_pruning.options import (
    RECORD,
    NarrowedBlock,
    WidthOptions,
    WidthPruning,
    WidthSize,
)

if TYPE_CHECKING:
    import torch

    from shortllm.data.calibration import Calibration
    from shortllm.width_pruning.groups import BlockGroups
    from shortllm.width_pruning.methods import Chosen

    Layout = tuple[dict[str, Any], dict[str, tuple[int, ...]]]

log = logging.getLogger(__name__)


def width(
    checkpoint: Checkpoint,
    options: WidthOptions,
    target: Path,
    *,
    calibration: Calibration | None,
    session: Session,
) -> WidthPruning:
    """Remove heads and neurons, and write the result as checkpoint `target`, with width.json.

    A target that is up to date is left alone; another one that this stage made is replaced. What is
    written is loaded again and compared with the source whose heads and neurons are silenced,
    before it gets its name.

    Args:
        calibration: None where the importance looks at no text.
    Raises:
        UnsupportedModelError: heads and neurons of this model cannot go one by one, or not to the
            shapes asked for.
        BudgetError: the ratio removes nothing or everything.
        CheckpointError: the result does not compute what was meant.
        OutputError: the target cannot be written, or holds something else.
        DataError: an importance that looks at text, and no text.
    """
    options = options.filled(checkpoint.block_count)
    if options.needs_text and calibration is None:
        raise DataError(f"--method {options.method} looks at text. Give calibration ids")
    require_apart(checkpoint.directory, target)
    require_free(target, RECORD)
    expected = made_fingerprint(
        checkpoint,
        calibration=calibration if options.needs_text else None,
        dtype=session.dtype(checkpoint),
        device=session.device.type,
        width=options.model_dump(mode="json"),
    )
    found = finished(target, expected, WidthPruning, RECORD)
    if found is not None:
        return found
    _refuse_parts(checkpoint)
    require_writable(target.absolute().parent)
    _prune(checkpoint, options, target, calibration, session, expected)
    return WidthPruning.load(target / RECORD)


def _refuse_parts(checkpoint: Checkpoint) -> None:
    """Refuse models with towers for images, and quantized ones.

    Raises:
        UnsupportedModelError: it is one.
    """
    config = checkpoint.config
    if text_config(config) is not config:
        raise UnsupportedModelError(
            f"model type '{config.model_type}' has other towers around its text decoder, and only "
            "plain text models can be made narrower. Remove whole blocks with `shortllm prune`"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{checkpoint.id} is quantized, and rows and columns cannot be cut out of it. Give the "
            "unquantized model"
        )


def _prune(
    checkpoint: Checkpoint,
    options: WidthOptions,
    target: Path,
    calibration: Calibration | None,
    session: Session,
    expected: str,
) -> None:
    """Find, choose, write, compare."""
    from shortllm.surgery.verify import bypass_logits, caches_rightly, verify_shortened
    from shortllm.width_pruning.choosing import removed_counts
    from shortllm.width_pruning.groups import without_units
    from shortllm.width_pruning.methods import choose
    from shortllm.width_pruning.structure import find_groups
    from shortllm.width_pruning.writing import narrowed_tensors, require_plain_names, write_narrowed

    assert options.start is not None and options.end is not None
    started = time.monotonic()
    decoder = session.decoder(checkpoint)
    groups = find_groups(decoder, range(options.start, options.end))
    require_plain_names(checkpoint, groups)
    counts = {}
    if not options.by_list:
        counts = {b: removed_counts(groups[b], options.ratio, options.neuron_ratio) for b in groups}
    uniform = _uniform_layout(checkpoint, options, groups, counts)
    text = options.needs_text and calibration is not None
    chosen = choose(
        decoder,
        calibration.ids if calibration is not None and text else None,
        groups,
        options,
        counts,
        memory=session.memory(),
    )
    entries = narrowed_tensors(checkpoint, groups, chosen.removed)
    new, biases = _new_tensors(checkpoint, chosen, uniform)
    with without_units(decoder, groups, chosen.removed, biases):
        logits = bypass_logits(decoder)
    cached = caches_rightly(decoder)

    def verify(written: Path) -> None:
        narrower = session.decoder(open_checkpoint(written))
        verify_shortened(str(target), narrower, logits, cached=cached)

    total = sum(tensor.numel() for name, tensor in new.items()) + sum(
        entry.elements for name, entry in entries.items() if name not in new
    )
    record = WidthPruning(
        model=checkpoint.info(),
        method=options.method,
        options=options.model_dump(mode="json", exclude={"method", "shapes"}),
        shapes="per-block" if uniform is None else "uniform",
        blocks=_record_blocks(groups, chosen),
        biases=bool(chosen.biases),
        reached=WidthSize(
            parameters=total,
            removed=checkpoint.parameters - total,
            removed_ratio=1 - total / checkpoint.parameters,
        ),
        calibration=calibration.info.tokens_fingerprint if calibration and text else None,
        dtype=session.dtype(checkpoint),
        versions=versions(),
        cost=Cost(seconds=round(time.monotonic() - started, 3), peak_bytes=peak_memory()),
        fingerprint=expected,
    )
    config = _config(checkpoint, groups, chosen, uniform)
    size = sum(entry.bytes for entry in entries.values())
    with progress("writing the narrower checkpoint", size) as advance:
        write_narrowed(
            checkpoint, entries, new, config, target, record, advance=advance, verify=verify
        )


def _uniform_layout(
    checkpoint: Checkpoint,
    options: WidthOptions,
    groups: Mapping[int, BlockGroups],
    counts: Mapping[int, tuple[int, int]],
) -> Layout | None:
    """Config and added biases of a plain checkpoint; None where blocks get shapes of their own.

    Raises:
        UnsupportedModelError: a plain one was asked for, and the type's config cannot say it.
    """
    from shortllm.checkpoint.config import block_shapes
    from shortllm.width_pruning.reshape import uniform_config

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
            f"the blocks of {checkpoint.id} differ in width, so that no plain checkpoint can hold "
            "them. Give --shapes per-block"
        )
    return None


def _new_tensors(
    checkpoint: Checkpoint, chosen: Chosen, uniform: Layout | None
) -> tuple[dict[str, torch.Tensor], dict[int, dict[str, torch.Tensor]]]:
    """Biases by their stored names, and the part of each that is left of removed units.

    That part is what `chosen` says, rounded to the type the checkpoint is stored in. Zeros come
    with it where the type's config gives all projections their biases together.
    """
    import torch

    from shortllm.checkpoint.tensors import read_tensor
    from shortllm.model.loading import stored_dtype
    from shortllm.surgery.made import stored_name

    dtype = stored_dtype(checkpoint)
    new: dict[str, torch.Tensor] = {}
    added: dict[int, dict[str, torch.Tensor]] = {}
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


def _config(
    checkpoint: Checkpoint,
    groups: Mapping[int, BlockGroups],
    chosen: Chosen,
    uniform: Layout | None,
) -> dict[str, Any]:
    """config.json of the narrower checkpoint."""
    from shortllm.width_pruning.reshape import per_block_config

    if uniform is not None:
        return uniform[0]
    biased = {b: list(biases) for b, biases in chosen.biases.items()}
    return per_block_config(checkpoint, groups, chosen.removed, biased=biased)


def _record_blocks(groups: Mapping[int, BlockGroups], chosen: Chosen) -> list[NarrowedBlock]:
    return [
        NarrowedBlock(
            block=b,
            query_heads=groups[b].attention.units * groups[b].query_heads,
            kv_heads=groups[b].attention.units,
            neurons=groups[b].mlp.units,
            removed_query_heads=groups[b].query_heads_of(gone.heads),
            removed_kv_heads=gone.heads,
            removed_neurons=gone.neurons,
            head_importance=chosen.importance[b].heads.tolist(),
            neuron_importance=chosen.importance[b].neurons[gone.neurons].tolist(),
        )
        for b, gone in sorted(chosen.removed.items())
    ]
