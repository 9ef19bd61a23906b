"""The corpus of a training: documents of token ids, from a data source or a teacher, on disk.

    {"instruction", "input", "output"}   prompt | answer EOS     the loss is on the answer alone
    {"text"}                             [BOS] text EOS          the loss is on everything
    lines of a text file                 joined into documents of about 16,000 characters
    a teacher                            [BOS] what it samples at temperature 1 [EOS]

Instructions are formatted by the tokenizer's chat template, or in the prompt format of Alpaca. BOS
goes where the tokenizer puts it. A teacher's own documents are distributed as the teacher believes
text to be; such data recovers generation best (arXiv:2602.01997).

Everything is a stream: a source may be larger than memory. On disk, read in any order as a memory
map, so that an interrupted training resumes on the very same tokens:

    train.ids    held_out.ids     the ids one after another, uint16 (uint32 in a vocabulary above
                                  65,536)
    train.index  held_out.index   int64: the first position of each document and the tokens of its
                                  prompt; in the last row the number of tokens
    corpus.json                   what was cut and dropped, and the sha256 of ids and index
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from shortllm.data.rows import Records
from shortllm.errors import DataError
from shortllm.files import partial_directory, write_text
from shortllm.runtime import quiet_transformers

if TYPE_CHECKING:
    from shortllm.checkpoint.source import Checkpoint
    from shortllm.model import Session
    from shortllm.retraining.options import Kind, RetrainOptions, Template

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The prompt format of the Alpaca data set, which its answers were written for."""

CHARACTERS_PER_DOCUMENT = 16_000
"""Lines of a text file belong together; about this many characters are one document."""

TOKENIZED_AT_ONCE, WRITTEN_AT_ONCE = 256, 32
"""Rows that the tokenizer gets in one call, and documents that a teacher writes in one batch."""

HOLD_OUT_EVERY = 10
"""The first of every ten documents is held out, until there are enough."""


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids of one document; the first `prompt` of them are context without a loss."""

    ids: list[int]
    prompt: int = 0


def kind_of(records: Records, requested: Literal["auto", "instructions", "text"]) -> Kind:
    """What the records are, told by the first of them unless the user says it."""
    first = next(records.read(), None)
    if first is None:
        raise DataError(f"'{records.source}' has no rows. Give a file or a split with rows in it")
    if requested != "auto":
        return requested
    answers = isinstance(first, dict) and {"instruction", "output"} <= first.keys()
    return "instructions" if answers and records.column is None else "text"


def template_of(tokenizer: Any, requested: Literal["auto", "alpaca", "chat"]) -> Template:
    """How instructions are formatted."""
    found: Template = "alpaca" if getattr(tokenizer, "chat_template", None) is None else "chat"
    if requested == "chat" != found:
        raise DataError(
            "--template chat: the tokenizer has no chat template. Use --template alpaca"
        )
    return found if requested == "auto" else requested


def documents(
    records: Records, kind: Kind, tokenizer: Any, options: RetrainOptions
) -> Iterator[Document]:
    """Every record as a document, one after the other."""
    if kind == "text":
        texts = islice(records.texts(), options.rows)
        for batch in _batches(_joined(texts) if records.lines else texts):
            for ids in tokenizer(batch, verbose=False)["input_ids"]:
                yield Document(_ended(ids, tokenizer))
        return
    tokenized = _chat if template_of(tokenizer, options.template) == "chat" else _alpaca
    rows = islice(records.read(), options.rows)
    for batch in _batches(_instruction(records.source, n, row) for n, row in enumerate(rows)):
        for prompt, whole in tokenized(batch, tokenizer):
            same = commonprefix([prompt, whole])  # its last token may differ before an answer
            yield Document(whole, len(same) if options.loss_on == "answer" else 0)


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


def _instruction(source: str, number: int, row: Any) -> dict[str, str]:
    """A record's instruction, input and output."""
    if not isinstance(row, dict):
        raise DataError(
            f"row {number} of '{source}' is a {type(row).__name__}, and an instruction is a record "
            "with instruction and output. Give such rows, or --form text"
        )
    found = {name: row.get(name) for name in ("instruction", "input", "output")}
    for name, value in found.items():
        if name != "input" and not (isinstance(value, str) and value.strip()):
            raise DataError(
                f"row {number} of '{source}' has no {name}. Every row needs instruction and output "
                "(and may have input); leave such rows out, or use --form text"
            )
    return {name: value if isinstance(value, str) else "" for name, value in found.items()}


Tokenized = Iterator[tuple[list[int], list[int]]]
"""Of each row the ids of the prompt alone, and those of the prompt with its answer."""


def _alpaca(rows: list[dict[str, str]], tokenizer: Any) -> Tokenized:
    prompts = [(ALPACA_WITH_INPUT if row["input"] else ALPACA).format(**row) for row in rows]
    wholes = [prompt + row["output"] for prompt, row in zip(prompts, rows, strict=True)]
    tokenized = (tokenizer(texts, verbose=False)["input_ids"] for texts in (prompts, wholes))
    for prompt, whole in zip(*tokenized, strict=True):
        yield prompt, _ended(whole, tokenizer)


def _chat(rows: list[dict[str, str]], tokenizer: Any) -> Tokenized:
    for row in rows:
        request = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
        user = {"role": "user", "content": request}
        answer = {"role": "assistant", "content": row["output"]}
        prompt = tokenizer.apply_chat_template(
            [user], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template([user, answer], tokenize=True, return_dict=False)
        yield list(prompt), list(whole)


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
    model: Any = session.decoder(teacher).model
    cuda = [session.device] if session.device.type == "cuda" else []
    for first in range(0, count, WRITTEN_AT_ONCE):
        wanted = min(WRITTEN_AT_ONCE, count - first)
        starts = torch.full((wanted, 1), start, device=session.device)
        with torch.random.fork_rng(devices=cuda), quiet_transformers():
            torch.manual_seed(options.seed + first)
            written = model.generate(
                input_ids=starts,
                attention_mask=torch.ones_like(starts),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_length=options.length,
                pad_token_id=start,
            )
        for ids in written.tolist():
            end = tokenizer.eos_token_id
            stop = ids.index(end, 1) + 1 if end in ids[1:] else len(ids)
            yield Document(ids[:stop])


# ---- on disk


class _Writer:
    """Appends documents to the two files of a store."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._ids = open(path.with_suffix(".ids"), "wb")
        self._index = open(path.with_suffix(".index"), "wb")
        self._dtype = dtype
        self._digest = hashlib.sha256()
        self.tokens = self.count = 0

    def add(self, document: Document) -> None:
        """Append one document."""
        row = np.array([self.tokens, document.prompt], "<i8").tobytes()
        ids = np.array(document.ids, self._dtype).tobytes()
        for stream, data in ((self._index, row), (self._ids, ids)):
            stream.write(data)
            self._digest.update(data)
        self.tokens += len(document.ids)
        self.count += 1

    def close(self) -> str:
        """Finish the files; returns the sha256 over all ids and prompt lengths."""
        self._index.write(np.array([self.tokens, 0], "<i8").tobytes())
        self._index.close()
        self._ids.close()
        return self._digest.hexdigest()


class Store:
    """Documents on disk, memory-mapped and read in any order."""

    def __init__(self, path: Path, dtype: str, fingerprint: str) -> None:
        self.ids: NDArray[Any] = np.memmap(path.with_suffix(".ids"), dtype, mode="r")
        """The token ids of all documents, one after another."""
        index = np.fromfile(path.with_suffix(".index"), "<i8").reshape(-1, 2)
        self.starts: NDArray[np.int64] = index[:, 0]
        """The position of each document's first token, and after them the number of tokens."""
        self.prompts: NDArray[np.int64] = index[:-1, 1]
        """Tokens of each document that are context without a loss."""
        self.fingerprint = fingerprint
        """sha256 over all ids and prompt lengths."""
        self.documents = len(self.prompts)
        self.tokens = len(self.ids)
        if self.starts[-1] != self.tokens:
            raise ValueError("the index is of other ids")


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
                document = Document(document.ids[:longest], document.prompt)
            if len(document.ids) < 2 or document.prompt >= len(document.ids):
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
                f"'{source}' gives {held.count} documents to train on, {dropped} had nothing to "
                "learn in a window. At least 2 are needed, one of them to measure on: give more "
                "data, or a longer --length"
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
