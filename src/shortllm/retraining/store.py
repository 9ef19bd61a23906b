"""The corpus of a training: documents of token ids on disk, written as a stream.

    train.arrow  held_out.arrow   one row per document: ids, uint16 (uint32 in a vocabulary above
                                  65,536), and how many of them are its prompt
    corpus.json                   what was cut and dropped, and the sha256 of both files' content

The Arrow files are memory-mapped: memory stays flat whatever the corpus, windows can be read in any
order, and an interrupted training resumes on the very same tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortllm.errors import DataError
from shortllm.files import partial_directory, write_text
from shortllm.retraining.documents import Document

HOLD_OUT_EVERY = 10
"""The first of every ten documents is held out, until there are enough."""

TOKENS_AT_ONCE = 2**20
"""About this many tokens are written in one batch of an Arrow file."""

SMALL_VOCABULARY = 2**16


class _StoreWriter:
    """Appends documents to one Arrow file."""

    def __init__(self, path: Path, vocabulary: int, source: str) -> None:
        import pyarrow as pa

        self._vocabulary = vocabulary
        self._source = source
        self._dtype = np.dtype("<u2" if vocabulary <= SMALL_VOCABULARY else "<u4")
        ids = pa.list_(pa.from_numpy_dtype(self._dtype))
        self._schema = pa.schema({"ids": ids, "prompt": pa.int64()})
        self._stream = open(path, "wb")
        self._file = pa.ipc.new_file(self._stream, self._schema)
        self._ids: list[NDArray[Any]] = []
        self._prompts: list[int] = []
        self._digest = hashlib.sha256()
        self.tokens = self._written = 0
        self.count = 0

    def add(self, document: Document) -> None:
        """Append one document."""
        if max(document.ids) >= self._vocabulary:
            raise DataError(
                f"{self._source}: token id {max(document.ids)} is outside the model's vocabulary "
                f"of {self._vocabulary}. The tokenizer next to the model is not the model's"
            )
        ids = np.array(document.ids, dtype=self._dtype)
        self._digest.update(np.array([self.tokens, document.prompt], dtype="<i8").tobytes())
        self._digest.update(ids.tobytes())
        self.tokens += len(ids)
        self.count += 1
        self._ids.append(ids)
        self._prompts.append(document.prompt)
        if self.tokens - self._written >= TOKENS_AT_ONCE:
            self._write()

    def close(self) -> str:
        """Finish the file; returns the sha256 over all ids and prompt lengths."""
        self._write()
        self._file.close()
        self._stream.close()
        return self._digest.hexdigest()

    def _write(self) -> None:
        import pyarrow as pa

        columns = {"ids": self._ids, "prompt": self._prompts}
        self._file.write_batch(pa.RecordBatch.from_pydict(columns, schema=self._schema))
        self._ids, self._prompts, self._written = [], [], self.tokens


class Store:
    """Documents in an Arrow file, memory-mapped and read in any order."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        import pyarrow as pa

        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self._ids = table.column("ids")
        self.fingerprint = fingerprint
        """sha256 over all ids and prompt lengths."""
        self.prompts: NDArray[np.int64] = table.column("prompt").to_numpy()
        """Tokens of each document that are context without a loss."""
        lengths = [chunk.value_lengths().to_numpy() for chunk in self._ids.chunks]
        self.starts: NDArray[np.int64] = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
        """The position of each document's first token, and after them the number of tokens."""

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.starts[-1])

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.prompts)

    def ids(self, start: int, stop: int) -> NDArray[np.int64]:
        """The token ids at positions `[start, stop)`, across documents."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, stop, side="left"))
        parts = []
        for number in range(first, last):
            begin = int(self.starts[number])
            ids = self._ids[number].values.to_numpy()
            parts.append(ids[max(start - begin, 0) : stop - begin])
        return np.concatenate(parts).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """What is trained on, what is held out, and what could not be used of the source."""

    train: Store
    held_out: Store
    cut: int
    """Documents longer than a window, of which the rest was dropped."""
    dropped: int
    """Documents whose prompt alone fills a window, so that nothing of the answer was left."""


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

    Args:
        held_out: documents to hold out at most, the first of every ten.
        longest: tokens a document is cut to; None to keep all.
        enough: tokens to train on after which no more is read; None to read all.
    """
    cut = dropped = 0
    with partial_directory(target) as directory:
        train = _StoreWriter(directory / "train.arrow", vocabulary, source)
        held = _StoreWriter(directory / "held_out.arrow", vocabulary, source)
        for document in documents:
            if longest is not None and len(document.ids) > longest:
                cut += 1
                document = Document(document.ids[:longest], document.prompt)
            if len(document.ids) < 2 or document.prompt >= len(document.ids):
                dropped += 1
                continue
            hold = (train.count + held.count) % HOLD_OUT_EVERY == 0 and held.count < held_out
            (held if hold else train).add(document)
            if enough is not None and train.tokens >= enough:
                break
        if not train.count:
            raise DataError(
                f"'{source}' gives {held.count} documents to train on, {dropped} had nothing to "
                "learn in a window. At least 2 are needed, one of them to measure on: give more "
                "data, or a longer --length"
            )
        content = {
            "cut": cut, "dropped": dropped, "train": train.close(), "held_out": held.close(),
        }  # fmt: skip
        write_text(directory / "corpus.json", json.dumps(content) + "\n")


def open_corpus(directory: Path) -> Corpus:
    """A corpus that `write_corpus` wrote."""
    try:
        content = json.loads((directory / "corpus.json").read_bytes())
        train, held_out = (
            Store(directory / f"{name}.arrow", str(content[name])) for name in ("train", "held_out")
        )
        return Corpus(
            train=train, held_out=held_out, cut=content["cut"], dropped=content["dropped"]
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"the tokenized text in {directory} is damaged. Delete {directory.parent} to start "
            "again"
        ) from error
