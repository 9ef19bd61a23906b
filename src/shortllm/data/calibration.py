"""Calibration: the token ids that blocks are scored on, sampled from text, their record and files.

Conversations are rendered by the model's chat template. Two samplers give `ids [samples, length]`:

    random   windows at seeded random places of seeded random rows: those of the published scores
             (10 samples of 128 tokens, seed 1234, BookCorpus), to the token
    packed   all rows one after another, cut every `length` tokens, the first `samples` of them

Where only the answers of conversations count, and where the model writes the text itself, a sample
begins with a document, and others follow until it is full. A mixture has samples of each source in
proportion to the weights, in turn.

The ids of an earlier run, or a JSON list of lists of token ids, can be given instead. A run
directory gets `calibration.safetensors` (tensor `ids`, int64, and where not all tokens count
`counted`, bool) and then `calibration.json`, which carries their fingerprint, so that a
half-written pair is never taken for a whole one.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from shortllm.checkpoint.config import context_length
from shortllm.checkpoint.hub import EMBEDDED
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tensors import read_json
from shortllm.checkpoint.tokenizer import GENERATION_CONFIG, load_tokenizer
from shortllm.data.chat import Chat, Span, template_of
from shortllm.data.options import (
    CalibrationInfo,
    CalibrationOptions,
    CalibrationPart,
    SampledText,
)
from shortllm.data.rows import Rows
from shortllm.data.samplers import (
    order_of,
    sample_answers,
    sample_packed,
    sample_random,
    sample_written,
)
from shortllm.data.sources import GENERATED, joined, load_rows, mixed, mixture, prompts_of
from shortllm.errors import DataError
from shortllm.files import PARTIAL, fingerprint, require_writable, write_bytes
from shortllm.records import load_current
from shortllm.runtime import join_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from shortllm.model import Session
    from shortllm.model.decoder import Decoder

AnyText = TypeVar("AnyText", bound=SampledText)

IDS_FILE = "calibration.safetensors"

INFO_FILE = "calibration.json"

UNFINISHED = f"calibration{PARTIAL}"
"""Where text that a model wrote is kept until the directory is that of a run."""

COMPARED_ROWS = 10_000
"""Rows that must be the same for text that a model wrote to their prompts to be used again."""

BOS_EVERY_SAMPLE = {"gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "vaultgemma"}
"""Model types whose predictions mean nothing without a BOS at the start of every sample."""

SHARED_TOKENS = 32
"""Equal tokens in a row from which on two samples share text."""


def resolve_calibration(options: AnyText, model_type: str, *, embedded: bool = False) -> AnyText:
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
    counted: torch.Tensor | None = None
    """bool [samples, length]: which tokens count when blocks are scored; None: all. The first token
    of a sample is never predicted."""

    def save(self, run_dir: Path) -> None:
        """Write calibration.safetensors, then calibration.json; each is complete or not there."""
        from safetensors.torch import save

        require_writable(run_dir)
        tensors = {"ids": self.ids, "counted": self.counted}
        write_bytes(
            run_dir / IDS_FILE,
            save({name: one.contiguous() for name, one in tensors.items() if one is not None}),
        )
        self.info.save(run_dir / INFO_FILE)
        shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)

    def tokens_counted(self) -> torch.Tensor:
        """Which tokens count, as a tensor in every case."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.counted is None else self.counted

    def __str__(self) -> str:
        samples, length = self.ids.shape
        return f"{samples} samples of {length} tokens from {self.info.source} ({self.info.sampler})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Rows that samples are drawn from."""

    rows: Rows
    weight: float = 1.0
    """In a mixture."""
    prompts: bool = False
    """Whether the rows are prompts, and the model writes the text."""

    @property
    def is_talk(self) -> bool:
        """Whether the rows are conversations."""
        return not isinstance(self.rows[0], str)

    @property
    def name(self) -> str:
        """The source as given."""
        return f"{GENERATED}:{self.rows.source}" if self.prompts else self.rows.source


def load_sources(options: SampledText) -> list[Source]:
    """The rows of every source of the options."""
    found = []
    for name, weight in mixture(options.source or "").items():
        prompts = prompts_of(name)
        rows = load_rows(prompts or name, role="calibration")
        found.append(Source(rows=rows, weight=weight, prompts=prompts is not None))
    return found


def on_text(options: CalibrationOptions, text: str) -> CalibrationOptions:
    """The options with another text, of which answers alone count only if there are some."""
    own = options.model_copy(update={"data": text, "file": None, "columns": None})
    talks = any(one.prompts or one.is_talk for one in load_sources(own))
    return own.model_copy(update={"answers_only": options.answers_only and talks})


def calibrate(
    checkpoint: Checkpoint,
    options: SampledText,
    sources: Sequence[Source] | None = None,
    *,
    session: Session | None = None,
    directory: Path | None = None,
) -> Calibration:
    """Calibration ids from `sources`, else from the data or the file of the options, checked
    against the model.

    Args:
        session: runs the model where it writes the text itself.
        directory: where such text of an earlier call may be.
    """
    embedded = checkpoint.id == EMBEDDED
    options = resolve_calibration(options, checkpoint.model_type, embedded=embedded)
    if options.file is not None:
        calibration = load_calibration(options.file)
    else:
        for name in mixture(options.source or ""):
            if prompts_of(name) is not None:
                require_writer(name, checkpoint, session)
        check_length(checkpoint, options.length, "--length")
        sources = load_sources(options) if sources is None else sources
        turns = turns_of(sources, options)
        tokenizer = load_tokenizer(checkpoint)
        shares = [
            options.model_copy(update={"samples": turns.count(n)}) for n in range(len(sources))
        ]
        made = [
            None if one.prompts else build_calibration(one.rows, tokenizer, own)
            for one, own in zip(sources, shares, strict=True)
        ]
        if None in made:
            assert session is not None
            writer = _Writer(
                checkpoint=checkpoint, tokenizer=tokenizer, session=session, directory=directory
            )
            calibration = writer.completed(sources, shares, made, turns, options)
        else:
            whole = [one for one in made if one is not None]
            calibration = blended(sources, whole, turns, options)
    check_ids(calibration.ids, checkpoint.vocabulary)
    check_length(checkpoint, calibration.ids.shape[1], "--length")
    return calibration


def require_writer(source: str, checkpoint: Checkpoint, session: Session | None) -> None:
    """Refuse to let a model write text where it is not at hand, or not in memory."""
    if session is None:
        raise DataError(
            f"'{source}' is text that the model writes itself, for `score`, `run` and "
            "`compare-criteria` to choose blocks by. Give text that is there"
        )
    if session.streams(checkpoint):
        raise DataError(
            f"'{source}' is text that the model writes itself, and {checkpoint.id} is not in "
            "memory, so every token would take a pass over its files. Give text that is there, or "
            "--no-stream on a machine with enough memory"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Writer:
    """A model that writes a part of a calibration, and where such text of an earlier call may
    be."""

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    session: Session
    directory: Path | None

    def completed(
        self,
        sources: Sequence[Source],
        shares: Sequence[SampledText],
        made: Sequence[Calibration | None],
        turns: Sequence[int],
        options: SampledText,
    ) -> Calibration:
        """The calibration of an earlier call, or a new one, which the main process writes for all;
        `made` are the samples of the sources that the model does not write to."""
        ranks, found = join_ranks(), None
        if ranks.is_main:
            expected = self._fingerprint(sources, shares, made)
            found = self._earlier(expected)
            if found is None:
                writer = self.session.decoder(self.checkpoint)
                whole = [
                    one or build_calibration(source.rows, self.tokenizer, own, writer)
                    for source, own, one in zip(sources, shares, made, strict=True)
                ]
                found = blended(sources, whole, turns, options)
                info = found.info.model_copy(update={"fingerprint": expected})
                found = Calibration(ids=found.ids, counted=found.counted, info=info)
                if self.directory is not None:
                    found.save(self.directory / UNFINISHED)
        [found, *_] = ranks.gather(found)
        assert found is not None
        return found

    def _earlier(self, expected: str) -> Calibration | None:
        """The text of an earlier call with the same inputs."""
        for place in [self.directory, self.directory / UNFINISHED] if self.directory else []:
            path = place / INFO_FILE
            if load_current(CalibrationInfo, path, expected) is not None:
                return load_calibration(path)
        return None

    def _fingerprint(
        self,
        sources: Sequence[Source],
        shares: Sequence[SampledText],
        made: Sequence[Calibration | None],
    ) -> str:
        """Of everything that the text depends on; of very many prompts, the first to be used."""
        from shortllm.data.generated import VERSION, WRITTEN_AT_ONCE, prompts

        inputs: list[Any] = []
        for source, own, samples in zip(sources, shares, made, strict=True):
            if samples is not None:
                inputs.append([source.name, source.weight, samples.info.tokens_fingerprint])
                continue
            rows, order = source.rows, order_of(source.rows, own)
            begun = prompts(rows, order_of(rows, own), self.tokenizer, own.length)
            inputs.append(
                [
                    [source.name, source.weight, rows.start, rows.stop],
                    [rows[number] for number in islice(order, COMPARED_ROWS)],
                    list(islice(begun, WRITTEN_AT_ONCE)),
                ]
            )
        ends = Chat(self.tokenizer, template_of(self.tokenizer)).ends
        own_ends = self.checkpoint.directory / GENERATION_CONFIG
        return fingerprint(
            {
                "version": VERSION,
                "ends": sorted(ends),
                "own ends": read_json(own_ends).get("eos_token_id") if own_ends.is_file() else None,
                "model": self.checkpoint.fingerprint,
                "dtype": self.session.dtype(self.checkpoint),
                "device": self.session.device.type,
                "attention": self.session.attention,
                "options": [one.model_dump(mode="json") for one in shares],
                "sources": inputs,
            }
        )


def check_length(checkpoint: Checkpoint, length: int, option: str, *, before: int = 0) -> None:
    """Refuse more tokens than the model has positions for; `before` is 1 with a BOS before them."""
    room = context_length(checkpoint.config)
    if room is not None and before + length > room:
        bos = " and the BOS before them" * before
        raise DataError(
            f"{length} tokens{bos} exceed the {room} positions of {checkpoint.id}. Give {option} "
            f"{room - before} or less"
        )


def turns_of(sources: Sequence[Source], options: SampledText) -> list[int]:
    """Of each sample the number of its source: each has a part in proportion to its weight."""
    turns = [(one.weight, repeat(n)) for n, one in enumerate(sources)]
    order = list(islice(mixed(turns, lambda n: 1), options.samples))
    for n, one in enumerate(sources):
        if n not in order:
            raise DataError(
                f"with --samples {options.samples} none is left for {one.name}, whose weight is "
                f"{one.weight:g}. Give more --samples, or leave it out"
            )
    if options.only_answers and not any(one.prompts or one.is_talk for one in sources):
        raise DataError(
            f"--answers-only: {sources[0].name} is text, in which nobody answers. Give "
            "conversations, such as alpaca, or leave --answers-only out"
        )
    return order


def blended(
    sources: Sequence[Source],
    made: Sequence[Calibration],
    turns: Sequence[int],
    options: SampledText,
) -> Calibration:
    """The samples of every source, in turn."""
    if len(made) == 1:
        return made[0]
    places = [iter(range(len(one.ids))) for one in made]
    picks = [(n, next(places[n])) for n in turns]
    counted = None
    if any(one.counted is not None for one in made):
        counted = torch.stack([made[n].tokens_counted()[b] for n, b in picks])
    temperatures = [one.info.temperature for one in made if one.info.temperature is not None]
    return _described(
        torch.stack([made[n].ids[b] for n, b in picks]),
        counted,
        source=joined({one.name: one.weight for one in sources}),
        parts=[
            CalibrationPart(source=one.source, rows=one.rows, samples=one.samples).model_dump()
            for one in (calibration.info for calibration in made)
            if one.rows is not None
        ],
        sampler=options.sampler,
        seed=options.seed,
        bos=made[0].info.bos,
        **({"temperature": temperatures[0]} if temperatures else {}),
    )


def build_calibration(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    options: SampledText,
    writer: Decoder | None = None,
) -> Calibration:
    """Sample rows, and record how; a `writer` writes the text, which the rows prompt it to."""
    is_random, counted = options.sampler == "random", None
    source, about = rows.source, dict[str, Any]()
    if writer is not None:
        source, about = f"{GENERATED}:{source}", {"temperature": options.temperature}
        ids, counted = sample_written(rows, tokenizer, options, writer)
    elif options.only_answers and not isinstance(rows[0], str):
        ids, counted = sample_answers(rows, tokenizer, options)
    else:
        ids = (sample_random if is_random else sample_packed)(rows, tokenizer, options)
    bos = "tokenizer" if is_random and tokenizer.bos_token_id is not None else "none"
    return _described(
        ids,
        counted,
        source=source,
        rows=(rows.start, rows.stop),
        sampler=options.sampler,
        seed=options.seed if is_random or writer is not None else None,
        bos="every-sample" if options.bos_every_sample else bos,
        **about,
    )


def _described(ids: torch.Tensor, counted: torch.Tensor | None = None, **about: Any) -> Calibration:
    """Ids with their record; `about` says where they came from."""
    about |= {"samples": ids.shape[0], "length": ids.shape[1]}
    if counted is not None and bool(counted.all()):
        counted = None
    if counted is not None:
        about["counted"] = int(counted[:, 1:].sum())
    about["tokens_fingerprint"] = tokens_fingerprint(ids, counted)
    info = CalibrationInfo(fingerprint=fingerprint(about), **about)
    return Calibration(ids=ids, counted=counted, info=info)


def calibration_of(
    documents: Sequence[tuple[list[int], Span]], *, fingerprint: str, **about: Any
) -> Calibration:
    """Documents of token ids, a sample each, of which a span counts; behind it they are filled up.

    Args:
        fingerprint: of what they were made from.
        about: further fields of the record.
    """
    length = max(len(ids) for ids, _ in documents)
    ids_BT = torch.tensor([ids + ids[-1:] * (length - len(ids)) for ids, _ in documents])
    counted_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for row, (_, (start, stop)) in zip(counted_BT, documents, strict=True):
        row[start:stop] = True
    made = _described(ids_BT, counted_BT, sampler="given", bos="tokenizer", **about)
    return replace(made, info=made.info.model_copy(update={"fingerprint": fingerprint}))


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


# ---- ids and their files


def tokens_fingerprint(ids: torch.Tensor, counted: torch.Tensor | None = None) -> str:
    """sha256 over the shape and then the ids, then where not all tokens count which do, all as
    little-endian int64."""
    parts = [torch.tensor(ids.shape), ids.cpu().to(torch.int64)]
    if counted is not None:
        parts.append(counted.cpu().to(torch.int64))
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
        return _recorded(path, record) if record.is_file() else _given(*_read(path), path)
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
        return _given(_tensor_of_lists(content, path), None, path)
    return _recorded(path.with_suffix(".safetensors"), path)


def _recorded(ids_path: Path, info_path: Path) -> Calibration:
    """Ids together with the record that an earlier run wrote."""
    info = CalibrationInfo.load(info_path)
    ids, counted = _read(ids_path)
    if tokens_fingerprint(ids, counted) != info.tokens_fingerprint:
        raise DataError(
            f"{ids_path} does not contain the ids that {info_path.name} describes. "
            "Calibrate again, or move the .json away to use the ids as they are"
        )
    return Calibration(ids=ids, counted=counted, info=info)


def _given(ids: torch.Tensor, counted: torch.Tensor | None, path: Path) -> Calibration:
    """Ids of unknown origin: no seed, no rows, and no knowledge of a BOS."""
    return _described(ids, counted, source=str(path), sampler="given", bos="none")


def _read(path: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
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
    ids, counted = tensors["ids"], tensors.get("counted")
    check_ids(ids, where=str(path))
    if counted is not None and (counted.dtype != torch.bool or counted.shape != ids.shape):
        raise DataError(
            f"{path}: 'counted' must be bool {list(ids.shape)} as the ids are, this is "
            f"{str(counted.dtype).removeprefix('torch.')} {list(counted.shape)}"
        )
    if counted is not None and not bool(counted[:, 1:].any(dim=1).all()):
        raise DataError(f"{path}: in every sample the prediction of a token must count")
    return ids, counted


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
                    f"{path}: sample {number} contains {reprlib.repr(token)}, which is not a token "
                    "id"
                )
    ids = torch.tensor(content, dtype=torch.int64)
    check_ids(ids, where=str(path))
    return ids
