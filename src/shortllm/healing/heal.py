"""Heal a shortened checkpoint without training: weights that exist already get new values.

The result is a plain checkpoint with the same names, shapes and types, and no new parameter.

    shortllm heal CHECKPOINT --data my_text.jsonl --out DIR
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortllm import __version__
from shortllm.calls import accepts
from shortllm.checkpoint.config import context_length
from shortllm.checkpoint.hub import ModelSource
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tensors import read_tensor
from shortllm.data.calibration import Calibration, calibrate
from shortllm.data.options import SampledText
from shortllm.data.sources import joined
from shortllm.errors import CheckpointError, DataError, ShortLLMError, UnsupportedModelError
from shortllm.files import require_free
from shortllm.format import counted
from shortllm.healing.experts import Factor
from shortllm.healing.folding import Fold, folded_into
from shortllm.healing.gain import divisors
from shortllm.healing.methods import METHODS, Healed, Task
from shortllm.healing.options import SAMPLE_LENGTH, HealCalibration, Healing, HealOptions, HeldOut
from shortllm.model import Session
from shortllm.model.decoder import Decoder
from shortllm.model.walk import NOTHING, mean_losses
from shortllm.pruning.budget import gaps_of
from shortllm.registry import cited
from shortllm.runtime import ALONE, Ranks, Runtime, join_ranks
from shortllm.surgery.apply import renumbered_tensors
from shortllm.surgery.derived import (
    Draft,
    copying,
    derive,
    derived_fingerprint,
    is_up_to_date,
    on_probe,
    stored_name,
    verifying,
)
from shortllm.surgery.origin import lineage, open_original
from shortllm.surgery.steps import PROVENANCE

log = logging.getLogger(__name__)

STRENGTHS = (0.5, 0.25, 0.0)
"""Parts of the change that are tried where the whole of it raises the loss on held-out samples."""


@accepts(options=HealOptions, runtime=Runtime)
def heal(
    model: ModelSource,
    out: Path,
    *,
    options: HealOptions,
    runtime: Runtime,
    source: ModelSource | None = None,
) -> Healing:
    """Heal a shortened checkpoint without training, and write it as a plain checkpoint.

    Under `accelerate launch` or `torchrun` all processes share the samples, and the main one
    writes.

    Args:
        model: a checkpoint directory as `shortllm prune` wrote it, or it loaded.
        out: the new checkpoint directory, which also gets heal.json.
        options: how to heal; their fields can be given as keywords.
        runtime: where to compute; its fields can be given as keywords.
        source: the model it was shortened from; default: as its config.json says.
    Returns:
        The content of heal.json: each gap with its error before and after.
    Raises:
        ShortLLMError: no block was removed.
        CheckpointError: the checkpoint does not say what it was shortened from, its weights were
            changed since, or the result does not compute what it should.
        UnsupportedModelError: the model has no weights that the method can change.
        DataError: too few samples.
        OutputError: `out` contains something else or cannot be written.
    """
    ranks = join_ranks()
    require_free(out, Healing.FILE)
    checkpoint = open_checkpoint(model)
    lineage(checkpoint)  # needed with --source too: it says which blocks are left
    original = open_original(checkpoint, source, "--source")
    kept_blocks(checkpoint, original)
    ids = calibrate(original, healing_text(options, original))
    session = Session(runtime)
    return heal_from(
        checkpoint, original, options, out, calibration=ids, session=session, ranks=ranks
    )


def heal_from(
    checkpoint: Checkpoint,
    source: Checkpoint,
    options: HealOptions,
    target: Path,
    *,
    calibration: Calibration,
    session: Session,
    ranks: Ranks = ALONE,
) -> Healing:
    """The same for open checkpoints and calibration ids."""
    kept = kept_blocks(checkpoint, source)
    if len(calibration.ids) < 2:
        raise DataError(
            f"{len(calibration.ids)} sample is too few to heal with: a part of the samples is held "
            "out to choose by. Give two or more"
        )
    expected = derived_fingerprint(
        checkpoint,
        calibration=calibration,
        session=session,
        source=source.fingerprint,
        heal=options.model_dump(mode="json", exclude={"calibration"}),
    )

    task_of = partial(_task, source, kept, calibration, options, session, ranks)

    def draft() -> Draft:
        require_same_weights(checkpoint, source, kept)
        task = task_of()
        healed, strength, held_out = _fitted(task)
        with _as_written(source, kept, healed, task.decoder):
            logits, cached = on_probe(task.decoder, task.removed)
        record = {
            "source": source.info(),
            "method": options.method,
            "options": options.model_dump(mode="json", exclude={"method", "calibration"}),
            "gaps": healed.gaps,
            "strength": strength,
            "held_out": held_out,
            "calibration": calibration.info.tokens_fingerprint,
            "data": calibration.info.source,
            "samples": calibration.ids.shape[0],
            "length": calibration.ids.shape[1],
            "dtype": session.dtype(source),
        }
        how = {
            "version": __version__,
            "method": options.method,
            "paper": cited(METHODS.get(options.method)),
            "data": calibration.info.source,
            "blocks": sorted(_divisors(kept, healed)),
            "fingerprint": expected,
        }
        new = (
            (stored_name(checkpoint, kept.index(b), name), tensor)
            for b, name, tensor in _new_weights(source, kept, healed)
        )
        return Draft(
            record=record,
            config=checkpoint.raw_config,
            provenance={**checkpoint.raw_config[PROVENANCE], "healed": how},
            bytes=checkpoint.bytes,
            write=copying(checkpoint.tensors, new),
            verify=verifying(target, session, logits, cached=cached),
        )

    if ranks.is_main:
        derive(
            Healing,
            target,
            checkpoint,
            draft,
            expected=expected,
            choices=options.model_dump(mode="json"),
            source=source,
        )
    elif not is_up_to_date(target, Healing, expected):
        _fitted(task_of())  # its share of the sums
    ranks.wait()
    return Healing.load(target / Healing.FILE)


def healing_text(
    options: HealOptions, checkpoint: Checkpoint, shared: SampledText | None = None
) -> HealCalibration:
    """The text to heal with, every default filled in; by default more of the text that scores."""
    text = options.calibration
    positions = context_length(checkpoint.config)
    update: dict[str, Any] = {
        "length": text.length or min(SAMPLE_LENGTH, positions or SAMPLE_LENGTH)
    }
    if shared is not None and text.data is None and text.file is None:
        update |= {"data": joined(shared.texts), "file": shared.file}
    if shared is not None and text.bos_every_sample is None:
        update["bos_every_sample"] = shared.bos_every_sample
    return text.model_copy(update=update)


def check_healable(options: HealOptions, checkpoint: Checkpoint, session: Session) -> None:
    """Find out before anything is scored whether the method can heal a model."""
    METHODS.get(options.method).check(checkpoint, session.decoder(checkpoint))


def kept_blocks(checkpoint: Checkpoint, source: Checkpoint) -> list[int]:
    """For each block of the checkpoint its number in the source."""
    origin = lineage(checkpoint)
    if origin.blocks != source.block_count:
        raise CheckpointError(
            f"{checkpoint.id} was shortened from {origin.blocks} blocks, but {source.id} has "
            f"{source.block_count}. Give the model it was shortened from as --source: "
            f"{origin.source}"
        )
    removed = set(range(origin.blocks)) - set(origin.kept)
    if not removed:
        raise ShortLLMError(f"no block of {checkpoint.id} was removed, so there is no gap to heal")
    if all(gap.before is None for gap in gaps_of(removed)):
        raise UnsupportedModelError(
            f"{checkpoint.id} lacks the first {counted(len(removed), 'block')} of {source.id} and "
            "no others, so there is no block before a gap to heal with. Use `shortllm retrain`"
        )
    return origin.kept


def require_same_weights(checkpoint: Checkpoint, source: Checkpoint, kept: Sequence[int]) -> None:
    """Refuse a checkpoint that was changed since it was shortened: compare every tensor."""
    expected = renumbered_tensors(source, kept)
    for name, entry in checkpoint.tensors.items():
        held = expected.get(name)
        alike = held is not None and (held.shape, held.dtype) == (entry.shape, entry.dtype)
        # parts of a tensor (tables with a share for each block) cannot be read alone
        if alike and held is not None and held.cut is None:
            one, other = (
                read_tensor(tensor).contiguous().flatten().view(torch.uint8)
                for tensor in (held, entry)
            )
            alike = torch.equal(one, other)
        if not alike:
            raise CheckpointError(
                f"tensor '{name}' of {checkpoint.id} differs from that of {source.id}: was it "
                "retrained, healed or merged? Heal a checkpoint as `shortllm prune` wrote it, and "
                "retrain the healed one; or give the model it was shortened from as --source"
            )


def _task(
    source: Checkpoint,
    kept: Sequence[int],
    calibration: Calibration,
    options: HealOptions,
    session: Session,
    ranks: Ranks,
) -> Task:
    """What the method gets, with this process's share of the samples."""
    ids_BT = ranks.mine(calibration.ids)
    return Task(
        decoder=session.decoder(source),
        checkpoint=source,
        removed=sorted(set(range(source.block_count)) - set(kept)),
        ids_BT=ids_BT,
        held_out=ranks.share_of_last_quarter(len(ids_BT)),
        ranks=ranks,
        options=options,
        memory=session.memory(),
    )


def _fitted(task: Task) -> tuple[Healed, float, HeldOut]:
    """What the method changes, as far as it does no harm."""
    return _no_worse(task, METHODS.get(task.options.method).function(task))


def _no_worse(task: Task, healed: Healed) -> tuple[Healed, float, HeldOut]:
    """As much of the change as does not raise the loss on the samples that chose its ridge, and how
    much that is; all of it where the ridge was set by hand.

    Hidden states can come nearer to the source's and the loss still rise: without the block in
    which the first token grows a hundredfold, no change of weights brings that token back.
    """
    whole = found = _measure(task, healed)
    strengths, strength, weaker = iter(STRENGTHS), 1.0, healed
    by_hand = task.options.ridge is not None
    while found.healed > found.shortened and strength and not by_hand:
        strength = next(strengths)
        weaker = _weaker(task, healed, strength)
        found = _measure(task, weaker)
    if whole.healed > whole.shortened:
        log.warning(
            "the whole change raises the loss on held-out text from %.4f to %.4f nats per token; "
            "%.0f %% of it is kept. Give more, or different, calibration text, or remove other "
            "blocks", whole.shortened, whole.healed, 100 * strength,
        )  # fmt: skip
    return weaker, strength, found


def _new_weights(
    source: Checkpoint, kept: Sequence[int], healed: Healed
) -> Iterator[tuple[int, str, Tensor]]:
    """The tensors that change, one at a time: the source's block number, the name, the weights."""
    for b, factor in _divisors(kept, healed).items():
        fold = healed.folds.get(b, {})
        for name, tensor in healed.scalable[b].weights(source, b, factor, fold):
            yield b, name, tensor


def _as_written(
    source: Checkpoint, kept: Sequence[int], healed: Healed, decoder: Decoder
) -> AbstractContextManager[None]:
    """Within the context, the source computes with the tensors that change as they are written,
    rounded: which experts a token goes to can depend on it."""
    folds = {
        b: healed.scalable[b].divided(source, b, factor, healed.folds.get(b, {}))
        for b, factor in _divisors(kept, healed).items()
    }
    return folded_into(decoder, folds)


def _divisors(kept: Sequence[int], healed: Healed) -> dict[int, float]:
    """What blocks that change are divided by."""
    factors = divisors(healed.gains, kept)
    return {b: factors.get(b, 1.0) for b in kept if b in factors or healed.folds.get(b)}


def _weaker(task: Task, healed: Healed, strength: float) -> Healed:
    """The same with only a part of the change of each weight and factor."""
    folds: dict[int, Fold] = {}
    for b, tensors in healed.folds.items() if strength else ():
        folds[b] = {}
        for name, after in tensors.items():
            if isinstance(after, Factor):
                folds[b][name] = replace(after, value=1 + strength * (after.value - 1))
                continue
            stored = task.checkpoint.tensors[stored_name(task.checkpoint, b, name)]
            before = read_tensor(stored).double()
            folds[b][name] = torch.lerp(before, after.double(), strength).to(after.dtype)
    gains = {b: 1.0 + strength * (gain - 1.0) for b, gain in healed.gains.items() if strength}
    return replace(healed, folds=folds, gains=gains)


def _measure(task: Task, healed: Healed) -> HeldOut:
    """Mean next-token loss of source, shortened and healed model on the held-out samples."""
    ids_BT = task.ids_BT[len(task.ids_BT) - task.held_out :]
    gone, mean = frozenset(task.removed), partial(mean_losses, task.decoder, ids_BT)
    before, shortened = mean([NOTHING, gone], memory=task.memory, ranks=task.ranks)
    with healed.applied(task.decoder):
        [after] = mean([gone], memory=task.memory, ranks=task.ranks)
    samples = int(task.ranks.total(float(len(ids_BT))))
    return HeldOut(samples=samples, source=before, shortened=shortened, healed=after)
