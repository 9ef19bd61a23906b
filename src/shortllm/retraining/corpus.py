"""The corpus of a training: documents of token ids, from a data source or a teacher, on disk.

    a conversation         the loss is on what the assistant says in every turn, and its end
    a text                 [BOS] text EOS          the loss is on everything
    lines of a text file   joined into documents of about 16,000 characters
    a teacher              [BOS] what it samples at temperature 1 [EOS]

What is a conversation, and how it is rendered: `data.shapes`, `data.chat`. BOS goes where the
tokenizer puts it. A teacher's own documents are distributed as the teacher believes text to be;
such data recovers generation best (arXiv:2602.01997).

Everything is a stream: a source may be larger than memory. On disk, read in any order as a memory
map, so that an interrupted training resumes on the very same tokens:

    train.ids      held_out.ids       the ids one after another, uint16 (uint32 in a vocabulary
                                      above 65,536)
    train.index    held_out.index     int64: the first position of each document, then the number of
                                      tokens
    train.targets  held_out.targets   int64: first and last + 1 position of each run of ids with a
                                      loss
    corpus.json                       what was cut and dropped, and the sha256 of all of them
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shortllm.data.chat import Chat, Span, template_of
from shortllm.data.generated import WRITTEN_AT_ONCE, sampled
from shortllm.data.rows import Records
from shortllm.data.shapes import Form
from shortllm.errors import DataError
from shortllm.files import partial_directory, write_text

if TYPE_CHECKING:
    from shortllm.checkpoint.source import Checkpoint
    from shortllm.model import Session
    from shortllm.retraining.options import Kind, RetrainOptions

CHARACTERS_PER_DOCUMENT = 16_000
"""Lines of a text file belong together; about this many characters are one document."""

TOKENIZED_AT_ONCE = 256
"""Rows that the tokenizer gets in one call."""

HOLD_OUT_EVERY = 10
"""The first of every ten documents is held out, until there are enough."""


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids of one document, and the spans `[start, stop)` of those with a loss."""

    ids: list[int]
    targets: list[Span] | None = None
    """None where all have one."""

    @property
    def spans(self) -> list[Span]:
        """The targets, also of a document that is learned as a whole."""
        return [(0, len(self.ids))] if self.targets is None else self.targets


def kind_of(records: Records, requested: Form) -> Kind:
    """What the records are, told by the first of them unless the user says it."""
    first = next(records.rows(requested), None)
    if first is None:
        raise DataError(f"'{records.source}' has no rows. Give a file or a split with rows in it")
    return "text" if isinstance(first, str) else "instructions"


def documents(
    records: Records, kind: Kind, tokenizer: Any, options: RetrainOptions
) -> Iterator[Document]:
    """Every record as a document, one after the other."""
    rows: Iterator[Any] = islice(records.rows(options.form), options.rows)
    if kind == "text":
        for batch in _batches(_joined(rows) if records.lines else rows):
            for ids in tokenizer(batch, verbose=False)["input_ids"]:
                yield Document(_ended(ids, tokenizer))
        return
    chat = Chat(tokenizer, template_of(tokenizer, options.template))
    places = (f"row {number} of '{records.source}'" for number in count())
    for batch in _batches(rows):
        for ids, targets in chat.documents(batch, list(islice(places, len(batch)))):
            yield Document(ids, targets if options.loss_on == "answer" else None)


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """Lines joined into texts of about `CHARACTERS_PER_DOCUMENT`."""
    text = ""
    for line in lines:
        text += f"{line}\n"
        if len(text) >= CHARACTERS_PER_DOCUMENT:
            yield text[:-1]
            text = ""
    if text:
        yield text[:-1]


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """With the end-of-text token at the end, where the tokenizer has one."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _batches(rows: Iterable[Any]) -> Iterator[list[Any]]:
    rows = iter(rows)
    for first in rows:
        yield list(chain([first], islice(rows, TOKENIZED_AT_ONCE - 1)))


def written_by(
    session: Session, teacher: Checkpoint, tokenizer: Any, options: RetrainOptions
) -> Iterator[Document]:
    """Documents sampled from the teacher, as many as requested or as the steps take."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise DataError(
            f"{teacher.id} has neither a BOS nor an EOS token to begin a text with. Give text as "
            "--data"
        )
    count = options.generate or (options.max_steps or 0) * options.batch
    model, length = session.decoder(teacher).model, options.length
    assert length is not None
    for first in range(0, count, WRITTEN_AT_ONCE):
        starts = [[start]] * min(WRITTEN_AT_ONCE, count - first)
        ends = {tokenizer.eos_token_id} - {None}
        for ids in sampled(model, starts, length=length, seed=options.seed + first, ends=ends):
            yield Document(ids)


# ---- on disk


FILES = (".index", ".targets", ".ids")


class _Writer:
    """Appends documents to the files of a store."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._streams = [open(path.with_suffix(suffix), "wb") for suffix in FILES]
        self._dtype = dtype
        self._digest = hashlib.sha256()
        self.tokens = self.count = 0

    def add(self, document: Document) -> None:
        """Append one document."""
        start = np.array(self.tokens, "<i8")
        targets = np.array(document.spans, "<i8") + self.tokens
        ids = np.array(document.ids, self._dtype)
        for stream, values in zip(self._streams, (start, targets, ids), strict=True):
            stream.write(data := values.tobytes())
            self._digest.update(data)
        self.tokens += len(document.ids)
        self.count += 1

    def close(self) -> str:
        """Finish the files; returns the sha256 of their content."""
        self._streams[0].write(np.array(self.tokens, "<i8").tobytes())
        for stream in self._streams:
            stream.close()
        return self._digest.hexdigest()


class Store:
    """Documents on disk, memory-mapped and read in any order."""

    def __init__(self, path: Path, dtype: str, fingerprint: str) -> None:
        self.ids: NDArray[Any] = np.memmap(path.with_suffix(".ids"), dtype, mode="r")
        """The token ids of all documents, one after another."""
        self.starts: NDArray[np.int64] = np.fromfile(path.with_suffix(".index"), "<i8")
        """The position of each document's first token, and after them the number of tokens."""
        self.targets: NDArray[np.int64] = np.fromfile(path.with_suffix(".targets"), "<i8")
        """Where runs of ids with a loss begin and end, in turns."""
        self.fingerprint = fingerprint
        """sha256 of all three."""
        self.documents = len(self.starts) - 1
        self.tokens = len(self.ids)
        runs = self.targets.reshape(-1, 2)
        if self.starts[-1] != self.tokens or len(runs) < self.documents:
            raise ValueError("the index is of other ids")

    def has_loss(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the ids at these positions have a loss."""
        edges: NDArray[np.int64] = np.searchsorted(self.targets, places, side="right")
        odd: NDArray[np.bool_] = edges % 2 == 1
        return odd


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """What is trained on, what is held out, and what could not be used of the source."""

    train: Store
    held_out: Store
    cut: int
    """Documents longer than a window, of which the rest was dropped."""
    dropped: int
    """Documents whose prompt alone fills a window, so that nothing with a loss was left."""


def write_corpus(
    documents: Iterable[Document],
    target: Path,
    *,
    source: str,
    vocabulary: int,
    held_out: int,
    longest: int | None,
    enough: int | None,
) -> None:
    """Write documents as a corpus, complete or not at all.

    At most `held_out` documents are held out; each is cut to `longest` tokens, if given; reading
    ends after `enough` tokens to train on, if given.
    """
    cut = dropped = 0
    dtype = "<u2" if vocabulary <= 2**16 else "<u4"
    with partial_directory(target) as directory:
        train, held = (_Writer(directory / name, dtype) for name in ("train", "held_out"))
        for document in documents:
            if longest is not None and len(document.ids) > longest:
                cut += 1
                left = [(a, min(b, longest)) for a, b in document.spans if a < longest]
                document = Document(document.ids[:longest], left)
            if len(document.ids) < 2 or not document.spans:
                dropped += 1
                continue
            if max(document.ids) >= vocabulary:
                raise DataError(
                    f"{source}: token id {max(document.ids)} is outside the model's vocabulary of "
                    f"{vocabulary}. The tokenizer next to the model is not the model's"
                )
            hold = (train.count + held.count) % HOLD_OUT_EVERY == 0 and held.count < held_out
            (held if hold else train).add(document)
            if enough is not None and train.tokens >= enough:
                break
        if not train.count:
            raise DataError(
                f"documents to train on in '{source}': {held.count}; left out because their window "
                f"has nothing to learn: {dropped}. At least 2 are needed, one of them to measure "
                "on: give more data, or a longer --length"
            )
        content = {
            "dtype": dtype, "cut": cut, "dropped": dropped,
            "train": train.close(), "held_out": held.close(),
        }  # fmt: skip
        write_text(directory / "corpus.json", json.dumps(content) + "\n")


def open_corpus(directory: Path) -> Corpus:
    """A corpus that `write_corpus` wrote."""
    try:
        content = json.loads((directory / "corpus.json").read_bytes())
        train, held_out = (
            Store(directory / name, content["dtype"], content[name])
            for name in ("train", "held_out")
        )
        return Corpus(
            train=train, held_out=held_out, cut=content["cut"], dropped=content["dropped"]
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"the tokenized text in {directory} is damaged. Delete {directory.parent} to start "
            "again"
        ) from error
