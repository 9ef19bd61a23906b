"""Documents of token ids on disk: written as a stream, read through the page cache.

    ids.bin         every token id, 2 bytes each (4 in a vocabulary above 65,536)
    documents.bin   int64 [documents, 2]: where each begins in ids.bin, and how long its prompt is
    store.json      counts, and the sha256 of both, written last

Memory stays flat whatever the corpus, every window can be read in any order, and training on from
an interrupted run sees the very same tokens.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from shortllm.errors import DataError
from shortllm.files import partial_directory, write_text
from shortllm.retraining.documents import Document

HOLD_OUT_EVERY = 10
"""The first of every so many documents is held out, until there are enough."""

SMALL_VOCABULARY = 2**16


class StoreWriter:
    """Appends documents to the files of one store."""

    def __init__(self, directory: Path, vocabulary: int, source: str) -> None:
        directory.mkdir()
        self._directory = directory
        self._vocabulary = vocabulary
        self._source = source
        self._ids: IO[bytes] = open(directory / "ids.bin", "wb")
        self._documents: IO[bytes] = open(directory / "documents.bin", "wb")
        self._digest = hashlib.sha256()
        self.tokens = 0
        self.count = 0

    def add(self, document: Document) -> None:
        """Append one document.

        Raises:
            DataError: an id that the model has no embedding for.
        """
        if max(document.ids) >= self._vocabulary:
            raise DataError(
                f"{self._source}: token id {max(document.ids)} is outside the model's vocabulary "
                f"of {self._vocabulary}. The tokenizer beside the model is not the model's"
            )
        ids = np.array(document.ids, dtype=_id_type(self._vocabulary)).tobytes()
        place = array("q", [self.tokens, document.prompt]).tobytes()
        self._ids.write(ids)
        self._documents.write(place)
        self._digest.update(place + ids)
        self.tokens += len(document.ids)
        self.count += 1

    def close(self) -> None:
        """Finish the files."""
        self._ids.close()
        self._documents.close()
        content = {
            "vocabulary": self._vocabulary,
            "tokens": self.tokens,
            "documents": self.count,
            "fingerprint": self._digest.hexdigest(),
        }
        write_text(self._directory / "store.json", json.dumps(content) + "\n")


@dataclass(frozen=True)
class Store:
    """Documents that were written, to be read in any order."""

    directory: Path

    @cached_property
    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.directory / "store.json").read_bytes())
        return content

    def is_whole(self) -> bool:
        """Whether the files are as long as what was written."""
        item = np.dtype(_id_type(int(self._content["vocabulary"]))).itemsize
        sizes = {"ids.bin": item * self.tokens, "documents.bin": 16 * self.documents}
        return all((self.directory / name).stat().st_size == n for name, n in sizes.items())

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self._content["tokens"])

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return int(self._content["documents"])

    @property
    def fingerprint(self) -> str:
        """sha256 over all ids and prompt lengths."""
        return str(self._content["fingerprint"])

    @cached_property
    def ids(self) -> NDArray[Any]:
        """All token ids, one document after the other."""
        kind = _id_type(int(self._content["vocabulary"]))
        return np.memmap(self.directory / "ids.bin", dtype=kind, mode="r")

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where each document begins in `ids`, and behind them where the last one ends."""
        return np.append(self._table[:, 0], self.tokens)

    @property
    def prompts(self) -> NDArray[np.int64]:
        """Tokens of each document that are read but not learnt."""
        return self._table[:, 1]

    @cached_property
    def _table(self) -> NDArray[np.int64]:
        flat = np.fromfile(self.directory / "documents.bin", dtype="<i8")
        return flat.reshape(-1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """What is learnt, what is held out, and what could not be used of the source."""

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
    """Write documents as a corpus, whole or not at all.

    Args:
        held_out: documents held out at the most: the first of every ten.
        longest: tokens a document is cut to; None to keep all.
        enough: tokens to learn after which no more is read; None to read all.
    Raises:
        DataError: fewer than two documents, or unusable ids.
    """
    cut = dropped = 0
    with partial_directory(target) as directory:
        train = StoreWriter(directory / "train", vocabulary, source)
        held = StoreWriter(directory / "held_out", vocabulary, source)
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
        train.close()
        held.close()
        write_text(directory / "corpus.json", json.dumps({"cut": cut, "dropped": dropped}) + "\n")


def open_corpus(directory: Path) -> Corpus:
    """A corpus that `write_corpus` made.

    Raises:
        DataError: it was damaged since.
    """
    try:
        counts = json.loads((directory / "corpus.json").read_bytes())
        stores = [Store(directory / name) for name in ("train", "held_out")]
        whole = all(store.is_whole() for store in stores)
        corpus = Corpus(
            train=stores[0], held_out=stores[1], cut=counts["cut"], dropped=counts["dropped"]
        )
    except (OSError, ValueError, LookupError, TypeError):
        whole = False
    if not whole:
        raise DataError(
            f"the tokenized text in {directory} is damaged. Delete {directory.parent} to begin anew"
        )
    return corpus


def _id_type(vocabulary: int) -> str:
    return "<u2" if vocabulary <= SMALL_VOCABULARY else "<u4"
