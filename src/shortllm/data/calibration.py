"""Calibration: the token ids that blocks are scored on, sampled from text, their record and files.

Conversations are rendered by the model's chat template. Two samplers give `ids [samples, length]`:

    random   windows at seeded random places of seeded random rows: those of the published scores
             (10 samples of 128 tokens, seed 1234, BookCorpus), to the token
    packed   all rows one after another, cut every `length` tokens, the first `samples` of them

The ids of an earlier run, or a JSON list of lists of token ids, can be given instead. A run
directory gets `calibration.safetensors` (tensor `ids`, int64) and then `calibration.json`, which
carries the ids' fingerprint, so that a half-written pair is never taken for a whole one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from shortllm.checkpoint.config import context_length
from shortllm.checkpoint.hub import EMBEDDED
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.data.chat import row_texts
from shortllm.data.options import CalibrationInfo, CalibrationOptions
from shortllm.data.rows import Rows
from shortllm.data.shapes import Row
from shortllm.data.sources import load_rows
from shortllm.errors import DataError
from shortllm.files import fingerprint, require_writable, write_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IDS_FILE = "calibration.safetensors"

INFO_FILE = "calibration.json"

BOS_EVERY_SAMPLE = {"gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "vaultgemma"}
"""Model types whose predictions mean nothing without a BOS at the start of every sample."""

SHARED_TOKENS = 32
"""Equal tokens in a row from which on two samples share text."""

ROWS_PER_BATCH = 1000
"""Rows tokenized in one call when many are needed: enough to use all cores, small in memory."""


def resolve_calibration(
    options: CalibrationOptions, model_type: str, *, embedded: bool = False
) -> CalibrationOptions:
    """The options with every default that depends on the model filled in; the `embedded` model has
    text of its own."""
    options.require_one_source()
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


def calibrate(
    checkpoint: Checkpoint, options: CalibrationOptions, rows: Rows | None = None
) -> Calibration:
    """Calibration ids from `rows`, else from the data or the file of the options, checked against
    the model."""
    embedded = checkpoint.id == EMBEDDED
    options = resolve_calibration(options, checkpoint.model_type, embedded=embedded)
    if options.file is not None:
        calibration = load_calibration(options.file)
    else:
        if rows is None:
            rows = load_rows(options.source or "", role="calibration")
        calibration = build_calibration(rows, load_tokenizer(checkpoint), options)
    check_ids(calibration.ids, checkpoint.vocabulary)
    check_length(checkpoint, calibration.ids.shape[1], "--length")
    return calibration


def check_length(checkpoint: Checkpoint, length: int, option: str, *, before: int = 0) -> None:
    """Refuse more tokens than the model has positions for; `before` is 1 with a BOS before them."""
    room = context_length(checkpoint.config)
    if room is not None and before + length > room:
        bos = " and the BOS before them" * before
        raise DataError(
            f"{length} tokens{bos} exceed the {room} positions of {checkpoint.id}. Give {option} "
            f"{room - before} or less"
        )


def build_calibration(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions
) -> Calibration:
    """Sample rows, and record how."""
    is_random = options.sampler == "random"
    ids = (sample_random if is_random else sample_packed)(rows, tokenizer, options)
    bos = "tokenizer" if is_random and tokenizer.bos_token_id is not None else "none"
    return _described(
        ids,
        source=rows.source,
        rows=(rows.start, rows.stop),
        sampler=options.sampler,
        seed=options.seed if is_random else None,
        bos="every-sample" if options.bos_every_sample else bos,
    )


def _described(ids: torch.Tensor, **about: Any) -> Calibration:
    """Ids with their record; `about` says where they came from."""
    about |= {"samples": ids.shape[0], "length": ids.shape[1]}
    about["tokens_fingerprint"] = tokens_fingerprint(ids)
    return Calibration(ids=ids, info=CalibrationInfo(fingerprint=fingerprint(about), **about))


def sample_random(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions
) -> torch.Tensor:
    """Windows at random places of random rows, int64 [samples, length]; no row is used twice.

    Rows are tokenized with special tokens, so a window has a BOS only when it starts where its row
    starts. With `bos_every_sample` they are tokenized without, and each window becomes [BOS] +
    window[:-1]. Source: Shortened LLaMA, arXiv:2402.02834.
    """
    samples, length = options.samples, options.length
    bos = _bos_of(tokenizer) if options.bos_every_sample else None
    random = Random(options.seed)
    windows: dict[int, list[int]] = {}
    is_long: dict[int, bool] = {}
    draws = 0
    while len(windows) < samples:
        if draws == len(rows):  # none found for long: look whether one is left
            _measure(rows, tokenizer, is_long, length=length, special=bos is None)
            if sum(is_long.values()) == len(windows):
                raise DataError(
                    f"only {len(windows)} of {len(rows)} rows have at least {length} tokens, "
                    f"{samples} samples need {samples} such rows. Use --sampler packed, a shorter "
                    "--length, fewer --samples, or data with longer rows"
                )
        draws += 1
        row = random.randint(0, len(rows) - 1)
        if row in windows or not is_long.get(row, True):
            continue
        tokens = _token_lists(tokenizer, [rows[row]], special=bos is None)[0]
        is_long[row] = len(tokens) >= length
        if is_long[row]:
            start = random.randint(0, len(tokens) - length)
            windows[row] = tokens[start : start + length]
            draws = 0
    ids = torch.tensor(list(windows.values()), dtype=torch.int64)
    return ids if bos is None else F.pad(ids[:, :-1], (1, 0), value=bos)


def _measure(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    is_long: dict[int, bool],
    *,
    length: int,
    special: bool,
) -> None:
    """Tokenize every row that is not in `is_long`, and note whether it has `length` tokens."""
    unseen = [row for row in range(len(rows)) if row not in is_long]
    for start in range(0, len(unseen), ROWS_PER_BATCH):
        batch = unseen[start : start + ROWS_PER_BATCH]
        lists = _token_lists(tokenizer, [rows[row] for row in batch], special=special)
        for row, tokens in zip(batch, lists, strict=True):
            is_long[row] = len(tokens) >= length


def sample_packed(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions
) -> torch.Tensor:
    """The rows' tokens one after another, cut every `length`: the first [samples, length], int64.

    Rows are tokenized without special tokens and nothing is put between them. With
    `bos_every_sample` each piece is [BOS] and `length - 1` tokens. Reading stops as soon as there
    are enough.
    """
    samples = options.samples
    bos = _bos_of(tokenizer) if options.bos_every_sample else None
    new_tokens = options.length - (bos is not None)
    tokens: list[int] = []
    for start in range(0, len(rows), ROWS_PER_BATCH):
        texts = rows[start : start + ROWS_PER_BATCH]
        tokens.extend(chain.from_iterable(_token_lists(tokenizer, texts, special=False)))
        if len(tokens) >= samples * new_tokens:
            break
    else:
        raise DataError(
            f"all {len(rows)} rows give {len(tokens)} tokens, "
            f"{samples} samples need {samples * new_tokens}. "
            "Use a shorter --length, fewer --samples, or more data"
        )
    ids = torch.tensor(tokens[: samples * new_tokens], dtype=torch.int64).view(samples, new_tokens)
    return ids if bos is None else F.pad(ids, (1, 0), value=bos)


def without_text_of(ids: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The samples that share no text with others: no `SHARED_TOKENS` in a row.

    All samples, if most of them do: so little text cannot be kept apart.
    """
    run = min(SHARED_TOKENS, ids.shape[1], others.shape[1])

    def runs(sample: list[int]) -> Iterator[tuple[int, ...]]:
        return (tuple(sample[start : start + run]) for start in range(len(sample) - run + 1))

    seen = {one for sample in others.tolist() for one in runs(sample)}
    apart = [b for b, sample in enumerate(ids.tolist()) if seen.isdisjoint(runs(sample))]
    return ids[apart] if 2 * len(apart) >= len(ids) else ids


def _token_lists(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, special: bool
) -> list[list[int]]:
    """Token ids of each row. verbose=False: a row may be longer than the model's context."""
    lists: list[list[int]] = tokenizer(
        row_texts(rows, tokenizer), add_special_tokens=special, verbose=False
    ).input_ids
    return lists


def _bos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.bos_token_id is None:
        raise DataError(
            f"the tokenizer of '{tokenizer.name_or_path}' has no BOS to put before every sample. "
            "Leave out --bos-every-sample"
        )
    return int(tokenizer.bos_token_id)


# ---- ids and their files


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
    return _described(ids, source=str(path), sampler="given", bos="none")


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
