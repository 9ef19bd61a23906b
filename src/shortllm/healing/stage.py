"""The stage: from a shortened checkpoint to one that is healed without training."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm import __version__
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tensors import TensorEntry, read_tensor
from shortllm.errors import CheckpointError, DataError, ShortLLMError, UnsupportedModelError
from shortllm.files import require_writable
from shortllm.healing.options import HEAL_FILE, Healing, HealOptions, HeldOut
from shortllm.model.session import Session
from shortllm.pruning.budget import gaps_of
from shortllm.records import Cost
from shortllm.runtime import peak_memory, progress, versions
from shortllm.surgery.apply import PROVENANCE, renumbered_tensors, require_apart
from shortllm.surgery.made import CARDS, finished, made_fingerprint, require_free, write_changed

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.data.calibration import Calibration
    from shortllm.healing.linear import Healed
    from shortllm.model.decoder import Decoder
    from shortllm.model.hidden_states import StreamMemory
    from shortllm.surgery.apply import Lineage

log = logging.getLogger(__name__)


def heal(
    checkpoint: Checkpoint,
    source: Checkpoint,
    options: HealOptions,
    target: Path,
    *,
    calibration: Calibration,
    session: Session,
) -> Healing:
    """Fold a linear map into the block before each gap, and write the result as `target`.

    A target that is up to date is left alone; another one that this stage made is replaced. What is
    written is loaded again and compared with the source that computes with the new weights and
    without the removed blocks, before it gets its name.

    Args:
        source: what the checkpoint was shortened from, with the same weights.
    Raises:
        CheckpointError: the checkpoint's weights are not those of the source, or the result does
            not compute what was meant.
        UnsupportedModelError: a map has nothing to be folded into.
        DataError: too few samples.
        OutputError: the target cannot be written, or holds something else.
    """
    for held in (checkpoint, source):
        require_apart(held.directory, target)
    require_free(target, HEAL_FILE)
    kept = kept_blocks(checkpoint, source)
    _check_samples(calibration)
    expected = made_fingerprint(
        checkpoint,
        calibration=calibration,
        dtype=session.dtype(source),
        device=session.device.type,
        without=CARDS,
        source=source.fingerprint,
        heal=options.model_dump(mode="json", exclude={"samples", "length"}),
    )
    found = finished(target, expected, Healing, HEAL_FILE, under="healed")
    if found is not None:
        return found
    require_writable(target.absolute().parent, checkpoint.bytes)
    require_same_weights(checkpoint, source, kept)
    _heal(checkpoint, source, kept, options, target, calibration, session, expected)
    return Healing.load(target / HEAL_FILE)


def check_healable(checkpoint: Checkpoint, session: Session) -> None:
    """Find out on the first block whether maps can be folded into a model.

    Raises:
        UnsupportedModelError: they cannot.
    """
    from shortllm.healing.folding import find_added, require_floats

    for b, added in find_added(session.decoder(checkpoint), [0]).items():
        require_floats(checkpoint, b, added.name)


def kept_blocks(checkpoint: Checkpoint, source: Checkpoint) -> list[int]:
    """For each block of the checkpoint its number in the source.

    Raises:
        CheckpointError: the checkpoint does not say, or the source has another number of blocks.
        ShortLLMError: there is nothing to heal.
        UnsupportedModelError: only the first blocks are gone, with none before them.
    """
    origin = origin_of(checkpoint)
    if origin.blocks != source.block_count:
        raise CheckpointError(
            f"{checkpoint.id} was shortened from {origin.blocks} blocks, and {source.id} has "
            f"{source.block_count}. Give as --source what it was shortened from: {origin.source}"
        )
    removed = set(range(origin.blocks)) - set(origin.kept)
    if not removed:
        raise ShortLLMError(
            f"no block of {checkpoint.id} was removed, so that there is no gap to heal"
        )
    if all(gap.before is None for gap in gaps_of(removed)):
        raise UnsupportedModelError(
            f"{checkpoint.id} lacks the first {len(removed)} blocks of {source.id} and no other. "
            "A map is folded into the block before a gap, and there is none. Heal it with "
            "`shortllm retrain`"
        )
    return origin.kept


def origin_of(checkpoint: Checkpoint) -> Lineage:
    """Which blocks of which model a checkpoint holds.

    Raises:
        CheckpointError: its config.json does not say.
    """
    from shortllm.surgery.apply import lineage

    try:
        return lineage(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(
            f"{checkpoint.id} does not say which blocks of which model it lacks. Shorten the model "
            "with `shortllm prune`, and heal what that writes"
        ) from error


def open_source(checkpoint: Checkpoint, given: str | None) -> Checkpoint:
    """What a checkpoint was shortened from: as given, or as its config.json says.

    Raises:
        CheckpointError: neither, or it cannot be opened.
    """
    origin = origin_of(checkpoint)
    if given is not None:
        return open_checkpoint(given)
    try:
        return open_checkpoint(origin.source, revision=origin.revision)
    except CheckpointError as error:
        raise CheckpointError(
            f"{checkpoint.id} was shortened from {origin.source}, which cannot be opened "
            f"({error}). Name it with --source"
        ) from error


def require_same_weights(checkpoint: Checkpoint, source: Checkpoint, kept: Sequence[int]) -> None:
    """Refuse a checkpoint that was changed since it was shortened: every tensor is compared.

    Raises:
        CheckpointError: naming the first tensor that is another one.
    """
    import torch

    expected = renumbered_tensors(source, kept)
    for name, entry in checkpoint.tensors.items():
        held = expected.get(name)
        alike = held is not None and (held.shape, held.dtype) == (entry.shape, entry.dtype)
        # parts of a tensor (tables with a share for each block) are not read by themselves
        if alike and held is not None and held.cut is None:
            alike = torch.equal(_bytes(held), _bytes(entry))
        if not alike:
            raise CheckpointError(
                f"tensor '{name}' of {checkpoint.id} is not that of {source.id}: was it retrained, "
                "healed or merged? Heal a checkpoint as `shortllm prune` wrote it, and retrain the "
                "healed one; or name what it was shortened from with --source"
            )


def _bytes(entry: TensorEntry) -> Tensor:
    import torch

    return read_tensor(entry).contiguous().flatten().view(torch.uint8)


def _check_samples(calibration: Calibration) -> None:
    if len(calibration.ids) < 2:
        raise DataError(
            f"{len(calibration.ids)} sample is too little to heal with: a part of them is held out "
            "to choose by. Give two or more"
        )


def _heal(
    checkpoint: Checkpoint,
    source: Checkpoint,
    kept: Sequence[int],
    options: HealOptions,
    target: Path,
    calibration: Calibration,
    session: Session,
    expected: str,
) -> None:
    """Solve, fold, measure, write, compare."""
    from shortllm.healing.folding import find_added, folded_into, require_floats
    from shortllm.healing.linear import heal_flops, heal_gaps
    from shortllm.surgery.made import stored_name
    from shortllm.surgery.verify import bypass_logits, caches_rightly, verify_shortened

    started = time.monotonic()
    removed = sorted(set(range(source.block_count)) - set(kept))
    ids_BT = calibration.ids
    held_out = max(1, len(ids_BT) // 4)
    decoder = session.decoder(source)
    added = find_added(decoder, [g.before for g in gaps_of(removed) if g.before is not None])
    for b, one in added.items():
        require_floats(source, b, one.name)
    with progress("healing", heal_flops(decoder, removed, ids_BT.numel())) as advance:
        healed = heal_gaps(
            decoder,
            source,
            ids_BT,
            removed,
            added,
            held_out=held_out,
            ridge=options.ridge,
            weighted=options.weighting == "norm",
            memory=session.memory(),
            advance=advance,
        )
    measured = _measure(decoder, ids_BT[-held_out:], removed, healed, session.memory())
    with folded_into(decoder, healed.folds):
        logits = bypass_logits(decoder, removed)
        cached = caches_rightly(decoder)

    def verify(written: Path) -> None:
        verify_shortened(
            str(target), session.decoder(open_checkpoint(written)), logits, cached=cached
        )

    record = Healing(
        model=checkpoint.info(),
        source=source.info(),
        method=options.method,
        options=options.model_dump(mode="json", exclude={"method", "samples", "length"}),
        gaps=healed.gaps,
        held_out=measured,
        calibration=calibration.info.tokens_fingerprint,
        data=calibration.info.source,
        samples=ids_BT.shape[0],
        length=ids_BT.shape[1],
        dtype=session.dtype(source),
        versions=versions(),
        cost=Cost(seconds=round(time.monotonic() - started, 3), peak_bytes=peak_memory()),
        fingerprint=expected,
    )
    new = (
        (stored_name(checkpoint, kept.index(b), name), tensor)
        for b, one in healed.folds.items()
        for name, tensor in one.tensors().items()
    )
    config = {**checkpoint.raw_config, PROVENANCE: _provenance(checkpoint, record)}
    with progress("writing the healed checkpoint", checkpoint.bytes) as advance:
        write_changed(
            checkpoint, dict(checkpoint.tensors), new, config, target, record, HEAL_FILE,
            advance=advance, verify=verify,
        )  # fmt: skip


def _measure(
    decoder: Decoder,
    ids_BT: Tensor,
    removed: Collection[int],
    healed: Healed,
    memory: StreamMemory,
) -> HeldOut:
    """Mean next-token loss of source, shortened and healed model on the held-out samples."""
    from shortllm.healing.folding import folded_into
    from shortllm.model.walk import NOTHING, mean_nlls

    gone = frozenset(removed)
    before, shortened = mean_nlls(decoder, ids_BT, [NOTHING, gone], memory=memory)
    with folded_into(decoder, healed.folds):
        [after] = mean_nlls(decoder, ids_BT, [gone], memory=memory)
    if after > shortened:
        log.warning(
            "on held-out text the healed model is worse than the shortened one: %.4f against %.4f "
            "nats per token. Give more, or other, calibration text",
            after,
            shortened,
        )
    return HeldOut(samples=len(ids_BT), source=before, shortened=shortened, healed=after)


def _provenance(checkpoint: Checkpoint, record: Healing) -> dict[str, Any]:
    """Where the checkpoint comes from, and how it was healed."""
    return {
        **checkpoint.raw_config[PROVENANCE],
        "healed": {
            "version": __version__,
            "method": record.method,
            "data": record.data,
            "blocks": [one.block for one in record.gaps if one.ridge is not None],
            "fingerprint": record.fingerprint,
        },
    }
