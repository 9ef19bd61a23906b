"""Calibration: the token ids that blocks are scored on, their record and their files.

`texts.calibrate` samples the ids. Those of an earlier run, or a JSON list of lists of token ids,
can be given instead (`load_calibration`). A run directory gets `calibration.safetensors` (tensor
`ids`, int64) and then `calibration.json`, which carries the ids' fingerprint, so that a
half-written pair is never taken for a whole one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shortllm.checkpoint.hub import EMBEDDED
from shortllm.data.options import CalibrationInfo, CalibrationOptions
from shortllm.errors import DataError
from shortllm.files import fingerprint, require_writable, write_bytes

IDS_FILE = "calibration.safetensors"

INFO_FILE = "calibration.json"

BOS_EVERY_SAMPLE = {"gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "vaultgemma"}
"""Model types whose predictions mean nothing without a BOS at the start of every sample."""


def resolve_calibration(
    options: CalibrationOptions, model_type: str, *, embedded: bool = False
) -> CalibrationOptions:
    """The options with every default that depends on the model filled in; the `embedded` model has
    text of its own."""
    if options.file is not None and options.data is not None:
        raise DataError(
            "--calibration gives token ids, so --data has no effect. Leave one of them out, and "
            "give the text to measure on as --eval-data"
        )
    filled: dict[str, Any] = {}
    if options.bos_every_sample is None:
        filled["bos_every_sample"] = model_type in BOS_EVERY_SAMPLE
    if options.data is None and options.file is None:
        filled["data"] = EMBEDDED if embedded else "bookcorpus"
    return options.model_copy(update=filled)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """Token ids and where they came from."""

    ids: torch.Tensor
    """int64 [samples, length]"""
    info: CalibrationInfo

    def save(self, run_dir: Path) -> None:
        """Write calibration.safetensors, then calibration.json; each is complete or not there."""
        from safetensors.torch import save

        require_writable(run_dir)
        write_bytes(run_dir / IDS_FILE, save({"ids": self.ids.contiguous()}))
        self.info.save(run_dir / INFO_FILE)

    def __str__(self) -> str:
        samples, length = self.ids.shape
        return f"{samples} samples of {length} tokens from {self.info.source} ({self.info.sampler})"


def tokens_fingerprint(ids: torch.Tensor) -> str:
    """sha256 over the shape and then the ids, all as little-endian int64."""
    parts = (torch.tensor(ids.shape), ids.cpu().to(torch.int64))
    data = [part.numpy().astype("<i8").tobytes() for part in parts]
    return hashlib.sha256(b"".join(data)).hexdigest()


def check_ids(
    ids: torch.Tensor, vocab_size: int | None = None, *, where: str = "calibration"
) -> None:
    """Check that ids can be fed to a model with `vocab_size` embeddings (unchecked when None)."""
    if ids.dtype != torch.int64 or ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        kind = str(ids.dtype).removeprefix("torch.")
        raise DataError(
            f"{where}: token ids must be int64 of at least 1 sample of 2 tokens, "
            f"these are {kind} {list(ids.shape)}"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0:
        raise DataError(f"{where}: token ids cannot be negative, the lowest is {low}")
    if vocab_size is not None and high >= vocab_size:
        raise DataError(
            f"{where}: token id {high} is outside the model's vocabulary of {vocab_size}. "
            "Use ids from this model's tokenizer"
        )


def load_calibration(path: Path | str) -> Calibration:
    """Given token ids: a run directory, one of its two files, or a JSON list of lists.

    An earlier run's record is kept as it is; ids without one are recorded as `given`. The
    vocabulary is not known here: call `check_ids(ids, vocab_size)` when it is.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / INFO_FILE).is_file():
            raise DataError(f"{path} has no finished calibration: {INFO_FILE} is missing")
        path = path / INFO_FILE
    if not path.is_file():
        raise DataError(f"no such calibration file: {path}")
    if path.suffix == ".safetensors":
        record = path.with_suffix(".json")
        return _recorded(path, record) if record.is_file() else _given(_read_tensor(path), path)
    if path.suffix != ".json":
        raise DataError(
            f"cannot tell what kind of calibration {path} is. "
            "Give a run directory, a .safetensors file, or a .json list of lists of token ids"
        )
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path} as JSON: {error}") from error
    if isinstance(content, list):
        return _given(_tensor_of_lists(content, path), path)
    return _recorded(path.with_suffix(".safetensors"), path)


def _recorded(ids_path: Path, info_path: Path) -> Calibration:
    """Ids together with the record that an earlier run wrote."""
    info = CalibrationInfo.load(info_path)
    ids = _read_tensor(ids_path)
    if tokens_fingerprint(ids) != info.tokens_fingerprint:
        raise DataError(
            f"{ids_path} does not contain the ids that {info_path.name} describes. "
            "Calibrate again, or move the .json away to use the ids as they are"
        )
    return Calibration(ids=ids, info=info)


def _given(ids: torch.Tensor, path: Path) -> Calibration:
    """Ids of unknown origin: no seed, no rows, and no knowledge of a BOS."""
    about: dict[str, Any] = {
        "source": str(path),
        "sampler": "given",
        "samples": ids.shape[0],
        "length": ids.shape[1],
        "bos": "none",
        "tokens_fingerprint": tokens_fingerprint(ids),
    }
    return Calibration(ids=ids, info=CalibrationInfo(fingerprint=fingerprint(about), **about))


def _read_tensor(path: Path) -> torch.Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read token ids from {path}: {error}") from error
    if "ids" not in tensors:
        raise DataError(
            f"{path} has no tensor 'ids'; it has {', '.join(sorted(tensors)) or 'nothing'}"
        )
    check_ids(tensors["ids"], where=str(path))
    return tensors["ids"]


def _tensor_of_lists(content: list[Any], path: Path) -> torch.Tensor:
    """A JSON list of equally long lists of token ids as int64 [samples, length]."""
    if not content or not all(isinstance(sample, list) for sample in content):
        raise DataError(f"{path} must be a list of lists of token ids, one list per sample")
    lengths = {len(sample) for sample in content}
    if len(lengths) != 1:
        raise DataError(
            f"{path}: all samples must have the same length, "
            f"these have {min(lengths)} to {max(lengths)} tokens"
        )
    for number, sample in enumerate(content):
        for token in sample:
            # bool is an int in Python; ids beyond 32 bits belong to no vocabulary
            if type(token) is not int or not -(2**31) <= token < 2**31:
                raise DataError(
                    f"{path}: sample {number} contains {token!r}, which is not a token id"
                )
    ids = torch.tensor(content, dtype=torch.int64)
    check_ids(ids, where=str(path))
    return ids
