"""Checkpoints derived from another one: checked, written whole or not at all, verified, recorded.

    a stage ──► Draft: config, weights, record ──► derive ──► target/
                                                     config.json   where it comes from
                                                     heal.json     the record, with a fingerprint

The record's fingerprint covers everything the result depends on. A target that carries the expected
one is up to date and skipped; one that the same stage wrote from other inputs is replaced only if
that is allowed; anything else in the way is an error.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from shortllm.checkpoint.config import text_config
from shortllm.checkpoint.heads import head_fields, without_heads
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tensors import (
    SAFETENSORS,
    TensorEntry,
    read_json,
    read_tensor_table,
    weight_files,
    write_json,
)
from shortllm.checkpoint.tokenizer import write_special_tokens
from shortllm.checkpoint.writer import MAX_SHARD_BYTES, write_tensors
from shortllm.errors import (
    CheckpointError,
    OutputError,
    ResultFileError,
    UnsupportedModelError,
)
from shortllm.files import (
    PARTIAL,
    fingerprint,
    follow_umask,
    partial_directory,
    require_free,
    require_same_choices,
    require_writable,
)
from shortllm.model import Session
from shortllm.progress import progress
from shortllm.records import Cost, DerivedRecord, PredictionHeads
from shortllm.runtime import peak_memory, versions
from shortllm.surgery.card import card_of, write_card
from shortllm.surgery.companions import (
    RECORDS,
    Followed,
    carried_files,
    carried_fingerprint,
    follow_removal,
)
from shortllm.surgery.origin import (
    LOCAL,
    draft_note,
    original_place,
    own_place,
    sendable,
    write_local,
)
from shortllm.surgery.steps import PROVENANCE, steps_of
from shortllm.surgery.verify import (
    ImageProbe,
    bypass_logits,
    kv_cache_matches,
    verify_shortened,
)

if TYPE_CHECKING:
    from shortllm.data.calibration import Calibration
    from shortllm.model.decoder import Decoder

log = logging.getLogger(__name__)

Derived = TypeVar("Derived", bound=DerivedRecord)
Advance = Callable[[int], None]

NEW = "new"
"""Directory of the tensors that the source lacks, while a checkpoint is written."""

NOT_SENT = (f"*{LOCAL}", *sorted(RECORDS), "logs/*", ".*", f"*{PARTIAL}")
"""Patterns, as huggingface_hub takes them, of files that are not sent to others: they name places
on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a stage wants to write; nothing has been written yet."""

    record: Mapping[str, Any]
    """Fields of the stage's record without model and fingerprint; versions and cost only if they
    are not this process's own."""
    config: Mapping[str, Any]
    """config.json, without the entry that says where the checkpoint comes from."""
    provenance: Mapping[str, Any]
    """That entry, without the fingerprint."""
    bytes: int
    """About how much will be written."""
    write: Callable[[Path, Advance], None]
    """Writes the weights into a directory; called with a function to report bytes written to."""
    verify: Callable[[Path], None]
    """Called with the written directory before it gets its name; raises if it is wrong."""
    finish: Callable[[Path], tuple[Mapping[str, Any], Mapping[str, Any]]] | None = None
    """Called with the written weights' directory; returns further fields of the record and of the
    config, if they are known only then."""
    kept: Sequence[int] | None = None
    """The blocks that stay, where some go: other files follow."""
    leave: Collection[str] = field(default_factory=frozenset)
    """First parts of the names of files next to the source's weights that are not copied."""
    adds: Mapping[str, TensorEntry] = field(default_factory=dict)
    """Stored tensors that a model in memory does not have, added to the weights that it wrote."""
    drop_heads: bool = False
    """Whether prediction heads are left out; otherwise the weights have them unchanged."""
    resized: bool = False
    """Whether config.json describes blocks of other shapes than the source's."""


def derive(
    kind: type[Derived],
    target: Path,
    checkpoint: Checkpoint,
    draft: Callable[[], Draft],
    *,
    expected: str,
    choices: Mapping[str, Any],
    source: Checkpoint | None = None,
    needed_bytes: int = 0,
) -> Derived:
    """Write the checkpoint `target`, unless it is up to date, and return its record.

    Args:
        draft: does the work of the stage; only called where something is to be written.
        expected: see `derived_fingerprint`.
        choices: those that a user made, as JSON, to say how an earlier result differs.
        source: another checkpoint that must not be overwritten.
        needed_bytes: about how much will be written, where that is known before the work.
    """
    for one in (checkpoint, source or checkpoint):
        require_apart(one.directory, target)
    require_free(target, kind.FILE)
    if is_up_to_date(target, kind, expected):
        log.info("%s is up to date, skipped", target)
        return kind.load(target / kind.FILE)
    if (target / kind.FILE).is_file():
        _require_replaceable(target, kind, checkpoint, expected, choices)
        log.info("%s was written from other inputs and will be replaced", target)
    require_writable(target.absolute().parent, needed_bytes)
    original = original_place(own_place(checkpoint), steps_of(checkpoint.id, checkpoint.raw_config))
    started = time.monotonic()
    drafted = draft()
    record = {
        "model": checkpoint.info(),
        "versions": versions(),
        "cost": Cost(seconds=round(time.monotonic() - started, 3), peak_bytes=peak_memory()),
        **drafted.record,
        "fingerprint": expected,
    }
    _write(kind, checkpoint, target, drafted, record, original)
    return kind.load(target / kind.FILE)


def _require_replaceable(
    target: Path,
    kind: type[DerivedRecord],
    checkpoint: Checkpoint,
    expected: str,
    choices: Mapping[str, Any],
) -> None:
    """Refuse to replace a finished checkpoint that was made with other choices."""
    try:
        found = kind.load(target / kind.FILE)
    except ResultFileError:  # damaged
        return
    if found.fingerprint != expected:
        before = found.model_dump(mode="json", exclude={"options", "model"})
        model = {"id": found.model.id, "fingerprint": found.model.fingerprint}
        now = {"id": checkpoint.id, "fingerprint": checkpoint.fingerprint}
        if model["fingerprint"] == now["fingerprint"]:
            model = now
        require_same_choices(
            target,
            {**before, **found.options, "model": model},
            {**choices, "model": now},
        )


def derived_fingerprint(
    checkpoint: Checkpoint, *, calibration: Calibration | None, session: Session, **choices: Any
) -> str:
    """The fingerprint of what a derived checkpoint depends on; `choices` are the stage's own."""
    return fingerprint(
        {
            "model": checkpoint.fingerprint,
            "other files": carried_fingerprint(checkpoint.directory),
            "calibration": calibration.info.tokens_fingerprint if calibration else None,
            "dtype": session.dtype(checkpoint),
            "device": session.device.type,
            **choices,
        }
    )


def require_apart(source: Path, target: Path) -> None:
    """Refuse a target that is the source directory or contains it."""
    source, target = source.resolve(), target.resolve()
    if target == source or target in source.parents:
        relation = "is" if target == source else "contains"
        raise OutputError(
            f"{target} {relation} the original model, which is never changed. Choose another --out"
        )


def is_up_to_date(target: Path, kind: type[DerivedRecord], expected: str) -> bool:
    """Whether `target` is a finished checkpoint whose record and config have this fingerprint."""
    try:
        found = kind.load(target / kind.FILE)
        read_tensor_table(target)
        entry = read_json(target / "config.json")[PROVENANCE]["fingerprint"]
    except (OSError, ValueError, LookupError, TypeError):  # CheckpointError is a ValueError
        return False
    return bool(found.fingerprint == entry == expected)


def _write(
    kind: type[DerivedRecord],
    checkpoint: Checkpoint,
    target: Path,
    draft: Draft,
    record: Mapping[str, Any],
    original: str | None,
) -> None:
    """Copy the other files, write weights and config, verify, save the record, rename.

    Args:
        original: where the model that was shortened first lies on this machine.
    """
    followed = Followed()
    if draft.kept is not None:
        followed = follow_removal(checkpoint, draft.kept, drop_heads=draft.drop_heads)
    source, left = checkpoint.directory, {*RECORDS, *draft.leave}
    carried = [file for file in carried_files(source, target) if file.parts[0] not in left]
    needed = draft.bytes + sum((source / file).stat().st_size for file in carried)
    require_writable(target.absolute().parent, needed)
    provenance = sendable({**draft.provenance, "fingerprint": record["fingerprint"]})
    heads = checkpoint.prediction_heads
    if heads is not None:
        provenance["prediction_heads"] = "dropped" if draft.drop_heads else "kept"
    if "parent" in provenance:
        provenance["parent"] = provenance.pop("parent")  # last: fingerprints are of the bytes
    with (
        partial_directory(target, needed_bytes=needed) as directory,
        progress(f"writing {target.name}", draft.bytes) as advance,
    ):
        for name in carried:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            if name in followed.files:
                write_json(directory / name, followed.files[name])
            else:
                shutil.copyfile(source / name, directory / name)
        write_special_tokens(checkpoint, directory)
        draft.write(directory, advance)
        _add(draft.adds, directory)
        if draft.drop_heads:
            _drop_generation_fields(directory)
        more, entries = draft.finish(directory) if draft.finish is not None else ({}, {})
        config = {**draft.config, **entries, PROVENANCE: provenance}
        write_json(directory / "config.json", config)
        write_local(directory, original)
        draft.verify(directory)
        write_card(directory, card_of(directory, target.resolve().name))
        notes = followed.notes
        if heads is not None:
            notes.append(_note_on_heads(heads, open_checkpoint(directory), resized=draft.resized))
        if draft.kept is not None:
            notes += draft_note(draft.provenance)
        kind.model_validate({**record, **more, "notes": notes}).save(directory / kind.FILE)
        follow_umask(directory)


def _add(adds: Mapping[str, TensorEntry], directory: Path) -> None:
    """Add stored tensors to the weights in a directory, as far as these lack them."""
    held = read_tensor_table(directory)
    if not adds.keys() - held.keys():
        return
    room = directory / NEW
    room.mkdir()
    write_tensors(room, {**adds, **held})
    for name in weight_files(directory):
        (directory / name).unlink()
    for path in room.iterdir():
        path.rename(directory / path.name)
    room.rmdir()


def _drop_generation_fields(directory: Path) -> None:
    """Leave out what a generation config says of prediction heads."""
    path = directory / "generation_config.json"
    if path.is_file() and head_fields(held := read_json(path)):
        write_json(path, without_heads(held))


def _note_on_heads(before: PredictionHeads, written: Checkpoint, *, resized: bool) -> str:
    """What a user should know of the prediction heads of a result."""
    heads = written.prediction_heads
    if heads is None:
        return f"prediction head ({before}) left out, with what config.json said of it"
    note = (
        f"prediction head ({heads}) kept unchanged: it still belongs to the unpruned model, so "
        "fewer of its drafts will be accepted"
    )
    if resized:
        note += ". It keeps its shapes, so programs that build it by config.json cannot load it"
    if heads.unexpected:
        note += (
            ". Plain transformers loads the model, but reports these tensors as unexpected: it "
            "ignores heads of this type only under the block numbers of the published model"
        )
    return f"{note}. `shortllm prune --drop-heads` leaves it out"


def files_to_send(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint that others may have, relative to it: none names a directory of
    this machine."""
    said = read_json(checkpoint / "config.json").get(PROVENANCE)
    if sendable(said) != said:
        raise CheckpointError(
            f"config.json of {checkpoint} names directories of this machine, as earlier versions "
            "wrote it. Write the checkpoint again with --overwrite"
        )
    files = sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())
    return [file for file in files if not any(fnmatch(file.as_posix(), one) for one in NOT_SENT)]


def copying(
    entries: Mapping[str, TensorEntry],
    new: Iterable[tuple[str, Tensor]] | Callable[[Path], Mapping[str, TensorEntry]] = (),
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Callable[[Path, Advance], None]:
    """A `Draft.write` that copies stored tensors byte by byte, and adds or replaces some.

    Args:
        entries: new tensor name -> stored tensor, in the order of the files.
        new: tensors by name, one in memory at a time; one that replaces an entry must have its
            shape and type. Or a function that writes files into a directory, which is deleted
            afterwards, and returns the tensors in them.
    """

    def write(directory: Path, advance: Advance) -> None:
        room = directory / NEW
        added = new(room) if callable(new) else _saved(entries, new, room)
        write_tensors(
            directory, {**entries, **added}, max_shard_bytes=max_shard_bytes, advance=advance
        )
        shutil.rmtree(room, ignore_errors=True)

    return write


def on_probe(decoder: Decoder, removed: Collection[int] = ()) -> tuple[Tensor, bool]:
    """The logits that a result must have on the probe, and whether with a cache too."""
    return bypass_logits(decoder, removed), kv_cache_matches(decoder)


def require_unquantized(checkpoint: Checkpoint, so: str) -> None:
    """Refuse a quantized checkpoint; `so` says what follows, e.g. `its rows cannot be cut`."""
    if getattr(checkpoint.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{checkpoint.id} is quantized, so {so}. Give the unquantized model"
        )


def require_text_model(checkpoint: Checkpoint, aim: str) -> None:
    """Refuse a model with towers for images; `aim` says for what, e.g. `be quantized`."""
    config = checkpoint.config
    if text_config(config) is not config:
        raise UnsupportedModelError(
            f"model type '{config.model_type}' has other towers around its text decoder, and only "
            f"plain text models can {aim}"
        )


def verifying(
    target: Path,
    session: Session,
    logits: Tensor,
    *,
    cached: bool,
    image: ImageProbe | None = None,
    narrower: bool = False,
) -> Callable[[Path], None]:
    """A `Draft.verify` that loads the written checkpoint and compares its logits on the probes."""

    def verify(written: Path) -> None:
        decoder = session.decoder(open_checkpoint(written))
        verify_shortened(
            str(target), decoder, logits, cached=cached, image=image, narrower=narrower
        )

    return verify


def _saved(
    entries: Mapping[str, TensorEntry], new: Iterable[tuple[str, Tensor]], directory: Path
) -> dict[str, TensorEntry]:
    """Save each new tensor in a file of its own."""
    from safetensors.torch import save_file

    written: dict[str, TensorEntry] = {}
    for number, (name, tensor) in enumerate(new):
        own = directory / str(number)
        own.mkdir(parents=True)
        save_file({name: tensor.contiguous()}, own / SAFETENSORS)
        written |= read_tensor_table(own)
        held = entries.get(name, written[name])
        if (held.shape, held.dtype) != (written[name].shape, written[name].dtype):
            raise CheckpointError(
                f"the new tensor '{name}' is {written[name].dtype} {list(written[name].shape)}, "
                f"but the stored one is {held.dtype} {list(held.shape)}"
            )
    return written


def stored_name(checkpoint: Checkpoint, b: int, name: str) -> str:
    """The name in the files of a tensor of block `b`."""
    return f"{checkpoint.block_names.prefix}.{b}.{name}"


def require_stored(checkpoint: Checkpoint, b: int, name: str, *, needed_to: str) -> TensorEntry:
    """The stored weights of the projection `name` of block `b`, needed e.g. to `cut them`."""
    stored = stored_name(checkpoint, b, f"{name}.weight")
    entry = checkpoint.tensors.get(stored)
    if entry is None:
        raise UnsupportedModelError(
            f"cannot {needed_to}: {checkpoint.id} stores the weights of '{name}' of block {b} "
            f"under another name than '{stored}'. Save it again with transformers' save_pretrained"
        )
    return entry
