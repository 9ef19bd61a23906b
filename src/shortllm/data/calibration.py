"""Calibration: the fixed token ids that blocks are scored on.

Two samplers turn rows of text into `ids [samples, length]`:

    random   windows at seeded random places of seeded random rows: those of the published scores
             (10 samples of 128 tokens, seed 1234, BookCorpus), to the token
    packed   all rows one after another, cut every `length` tokens, the first `samples` of them

Any earlier calibration, or a JSON list of lists of token ids, can be given instead
(`load_calibration`). The run directory gets `calibration.safetensors` (tensor `ids`, int64) and
`calibration.json`, which is written last and carries the ids' fingerprint, so that a half-written
pair is never taken for a whole one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

import torch

from shortllm.data.options import CalibrationInfo, CalibrationOptions
from shortllm.data.rows import Rows
from shortllm.data.sources import load_rows
from shortllm.errors import DataError
from shortllm.files import fingerprint, require_writable, write_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Sampler = Literal["random", "packed"]

IDS_FILE = "calibration.safetensors"

INFO_FILE = "calibration.json"

ROWS_PER_BATCH = 1000
"""Rows tokenized in one call when many are needed: enough to use all cores, small in memory."""


BOS_EVERY_SAMPLE = {"gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "vaultgemma"}
"""Model types whose predictions mean nothing without a BOS at the start of every sample."""


def resolve_calibration(
    options: CalibrationOptions, model_type: str, *, embedded: bool
) -> CalibrationOptions:
    """The same options with the defaults that depend on the model filled in.

    Args:
        embedded: whether the model is the embedded one, which has text of its own.
    """
    if options.file is not None and options.data is not None:
        raise DataError(
            "--calibration gives token ids, so --data has no effect. Leave one of them out, and "
            "give the text to measure on as --eval-data"
        )
    data, every = options.data, options.bos_every_sample
    if data is None and options.file is None:
        data = "embedded" if embedded else "bookcorpus"
    every = model_type in BOS_EVERY_SAMPLE if every is None else every
    return options.model_copy(update={"data": data, "bos_every_sample": every})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """Token ids and where they came from."""

    ids: torch.Tensor
    """int64 [samples, length]"""
    info: CalibrationInfo

    def save(self, run_dir: Path) -> None:
        """Write calibration.safetensors, then calibration.json; each is complete or not there.

        Raises:
            OutputError: the directory cannot be written.
        """
        from safetensors.torch import save

        require_writable(run_dir)
        write_bytes(run_dir / IDS_FILE, save({"ids": self.ids.contiguous()}))
        self.info.save(run_dir / INFO_FILE)

    def __str__(self) -> str:
        samples, length = self.ids.shape
        return f"{samples} samples of {length} tokens from {self.info.source} ({self.info.sampler})"


def build_calibration(
    source: str | Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sampler: Sampler = "random",
    samples: int = 10,
    length: int = 128,
    seed: int = 1234,
    bos_every_sample: bool = False,
) -> Calibration:
    """Sample a calibration set from a data source or from rows (e.g. one half of `split_held_out`).

    Raises:
        DataError: the source cannot be read or is too short, or there is no BOS to put.
    """
    rows = load_rows(source, role="calibration") if isinstance(source, str) else source
    if sampler == "random":
        ids = sample_random(
            rows,
            tokenizer,
            samples=samples,
            length=length,
            seed=seed,
            bos_every_sample=bos_every_sample,
        )
    else:
        ids = sample_packed(
            rows, tokenizer, samples=samples, length=length, bos_every_sample=bos_every_sample
        )
    tokenizer_bos = sampler == "random" and tokenizer.bos_token_id is not None
    about: dict[str, Any] = {
        "source": rows.source,
        "rows": (rows.start, rows.stop),
        "sampler": sampler,
        "samples": samples,
        "length": length,
        "seed": seed if sampler == "random" else None,
        "bos": "every-sample" if bos_every_sample else "tokenizer" if tokenizer_bos else "none",
        "tokens_fingerprint": tokens_fingerprint(ids),
    }
    return Calibration(ids=ids, info=CalibrationInfo(fingerprint=fingerprint(about), **about))


def sample_random(
    rows: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 10,
    length: int = 128,
    seed: int = 1234,
    bos_every_sample: bool = False,
) -> torch.Tensor:
    """Windows at random places of random rows, int64 [samples, length]; no row is used twice.

    Rows are tokenized with the special tokens the tokenizer adds, so a window holds a BOS only when
    it starts where its row starts. With `bos_every_sample` (Gemma needs it) they are tokenized
    without, and each window becomes [BOS] + window[:-1]. The same rows, tokenizer and seed give the
    ids behind the published scores. Source: Shortened LLaMA, arXiv:2402.02834.

    Raises:
        DataError: fewer than `samples` rows have `length` tokens, or there is no BOS to put.
    """
    _check_shape(samples, length)
    bos = _bos_of(tokenizer) if bos_every_sample else None
    random = Random(seed)
    pool = _LongRows(rows, tokenizer, length=length, special=bos is None)
    windows = []
    for taken in range(samples):
        tokens = pool.draw(random)
        if tokens is None:
            raise DataError(pool.too_few(taken, samples))
        start = random.randint(0, len(tokens) - length)
        windows.append(tokens[start : start + length])
    ids = torch.tensor(windows, dtype=torch.int64)
    if bos is not None:
        ids = torch.cat([ids.new_full((samples, 1), bos), ids[:, :-1]], dim=1)
    return ids


class _LongRows:
    """Draws unused rows of at least `length` tokens and remembers how long each row seen was."""

    def __init__(
        self, rows: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, length: int, special: bool
    ) -> None:
        self._rows = rows
        self._tokenizer = tokenizer
        self._length = length
        self._special = special
        self._is_long: dict[int, bool] = {}
        self._used: set[int] = set()

    def draw(self, random: Random) -> list[int] | None:
        """The token ids of the next random row that is long and unused; None if none is left.

        When as many draws as there are rows found nothing, all rows are looked at once: either one
        is left and drawing goes on, with the same random numbers, or the search ends.
        """
        draws = 0
        while draws != len(self._rows) or self._any_left():
            draws += 1
            index = random.randint(0, len(self._rows) - 1)
            if index in self._used or not self._is_long.get(index, True):
                continue
            tokens = _token_lists(self._tokenizer, [self._rows[index]], special=self._special)[0]
            self._is_long[index] = len(tokens) >= self._length
            if self._is_long[index]:
                self._used.add(index)
                return tokens
        return None

    def too_few(self, taken: int, samples: int) -> str:
        """The message for data that ran out after `taken` samples; every row was looked at."""
        return (
            f"only {taken} of {len(self._rows)} rows have at least {self._length} tokens, "
            f"{samples} samples need {samples} such rows. "
            "Use --sampler packed, a shorter --length, fewer --samples, or data with longer rows"
        )

    def _any_left(self) -> bool:
        """Whether a long row is unused; afterwards the length of every row is known."""
        unseen = [i for i in range(len(self._rows)) if i not in self._is_long]
        for start in range(0, len(unseen), ROWS_PER_BATCH):
            batch = unseen[start : start + ROWS_PER_BATCH]
            texts = [self._rows[i] for i in batch]
            lists = _token_lists(self._tokenizer, texts, special=self._special)
            self._is_long.update(
                (i, len(tokens) >= self._length) for i, tokens in zip(batch, lists, strict=True)
            )
        return sum(self._is_long.values()) > len(self._used)


def sample_packed(
    rows: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 10,
    length: int = 128,
    bos_every_sample: bool = False,
) -> torch.Tensor:
    """The rows' tokens one after another, cut every `length`: the first [samples, length], int64.

    Rows are tokenized without special tokens and nothing stands between them. With
    `bos_every_sample` each piece is [BOS] and `length - 1` tokens. Reading stops as soon as there
    are enough.

    Raises:
        DataError: too few tokens in all rows, or there is no BOS to put.
    """
    _check_shape(samples, length)
    bos = _bos_of(tokenizer) if bos_every_sample else None
    new_tokens = length if bos is None else length - 1
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
    return ids if bos is None else torch.cat([ids.new_full((samples, 1), bos), ids], dim=1)


def _token_lists(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool
) -> list[list[int]]:
    """Token ids of each text. verbose=False: a row longer than the model's context is welcome."""
    lists: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=special, verbose=False
    ).input_ids
    return lists


def _check_shape(samples: int, length: int) -> None:
    if samples < 1 or length < 2:
        raise DataError(
            f"{samples} samples of {length} tokens hold no prediction. "
            "Ask for --samples 1 or more and --length 2 or more"
        )


def _bos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.bos_token_id is None:
        raise DataError(
            f"the tokenizer of '{tokenizer.name_or_path}' has no BOS to put before every sample. "
            "Leave out --bos-every-sample"
        )
    return int(tokenizer.bos_token_id)


def tokens_fingerprint(ids: torch.Tensor) -> str:
    """sha256 over the shape and then the ids, all as little-endian int64."""
    shape = torch.tensor(ids.shape)
    return hashlib.sha256(_little_endian(shape) + _little_endian(ids)).hexdigest()


def _little_endian(numbers: torch.Tensor) -> bytes:
    data: bytes = numbers.cpu().to(torch.int64).numpy().astype("<i8").tobytes()
    return data


def check_ids(
    ids: torch.Tensor, vocab_size: int | None = None, *, where: str = "calibration"
) -> None:
    """Check that ids can be fed to a model with `vocab_size` embeddings (not asked when None).

    Raises:
        DataError: not int64 [1 or more, 2 or more], a negative id, or one outside the vocabulary.
    """
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
            "Use ids made with this model's tokenizer"
        )


def load_calibration(path: Path | str) -> Calibration:
    """Token ids made earlier: a run directory, one of its two files, or a JSON list of lists.

    An earlier run's record is kept as it is; ids without one are recorded as `given`. The
    vocabulary is not known here: call `check_ids(ids, vocab_size)` when it is.

    Raises:
        DataError: missing, unreadable, not rectangular, too small, negative, or ids that are not
            those the record beside them speaks of.
        ResultFileError: a damaged calibration.json.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / INFO_FILE).is_file():
            raise DataError(f"{path} holds no finished calibration: {INFO_FILE} is missing")
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
    content = _read_json(path)
    if isinstance(content, list):
        return _given(_tensor_of_lists(content, path), path)
    return _recorded(path.with_suffix(".safetensors"), path)


def _recorded(ids_path: Path, info_path: Path) -> Calibration:
    """Ids together with the record an earlier run wrote beside them."""
    info = CalibrationInfo.load(info_path)
    ids = _read_tensor(ids_path)
    if tokens_fingerprint(ids) != info.tokens_fingerprint:
        raise DataError(
            f"{ids_path} does not hold the ids {info_path.name} speaks of. "
            "Make the calibration again, or move the .json away to use the ids as they are"
        )
    return Calibration(ids=ids, info=info)


def _given(ids: torch.Tensor, path: Path) -> Calibration:
    """Ids of unknown origin: no seed, no rows, and whether they hold a BOS is not ours to say."""
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
            f"{path} has no tensor 'ids'; it holds {', '.join(sorted(tensors)) or 'nothing'}"
        )
    check_ids(tensors["ids"], where=str(path))
    return tensors["ids"]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} as JSON: {error}") from error


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
                raise DataError(f"{path}: sample {number} holds {token!r}, which is no token id")
    ids = torch.tensor(content, dtype=torch.int64)
    check_ids(ids, where=str(path))
    return ids
