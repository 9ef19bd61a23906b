"""Documents of token ids, from the records of a data source or from a teacher.

    {"instruction", "input", "output"}   prompt | answer EOS     the loss is on the answer alone
    {"text"}                             [BOS] text EOS          the loss is on everything
    lines of a text file                 joined into documents of about 16,000 characters
    a teacher                            [BOS] what it samples at temperature 1 [EOS]

Instructions are formatted by the tokenizer's chat template, or in the prompt format of Alpaca. BOS
goes where the tokenizer puts it. A teacher's own documents are distributed as the teacher believes
text to be; such data recovers generation best (arXiv:2602.01997).

Everything is a stream: a source may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

import torch

from shortllm.data.rows import Records
from shortllm.errors import DataError

if TYPE_CHECKING:
    from shortllm.checkpoint.source import Checkpoint
    from shortllm.model.session import Session
    from shortllm.retraining.options import RetrainOptions

Kind = Literal["instructions", "text"]

Template = Literal["alpaca", "chat"]

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

TOKENIZED_AT_ONCE = 256
"""Rows that the tokenizer gets in one call."""

WRITTEN_AT_ONCE = 32
"""Documents that a teacher writes in one batch."""


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
    has_one = getattr(tokenizer, "chat_template", None) is not None
    if requested == "chat" and not has_one:
        raise DataError(
            "--template chat: the tokenizer has no chat template. Use --template alpaca"
        )
    if requested == "auto":
        return "chat" if has_one else "alpaca"
    return requested


def documents(
    records: Records, kind: Kind, tokenizer: Any, options: RetrainOptions
) -> Iterator[Document]:
    """Every record as a document, one after the other."""
    if kind == "text":
        yield from _texts(records, tokenizer, options.rows)
        return
    template = template_of(tokenizer, options.template)
    rows = islice(records.read(), options.rows)
    numbered = (_instruction(records.source, n, row) for n, row in enumerate(rows))
    for batch in _batches(numbered):
        for prompt, whole in _tokenized(batch, template, tokenizer):
            prompt_length = _common(prompt, whole) if options.loss_on == "answer" else 0
            yield Document(whole, prompt_length)


def _texts(records: Records, tokenizer: Any, rows: int | None) -> Iterator[Document]:
    texts = islice(records.texts(), rows)
    for batch in _batches(_joined(texts) if records.lines else texts):
        for ids in tokenizer(batch, verbose=False)["input_ids"]:
            yield Document(_ended(ids, tokenizer))


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """Lines joined into texts of about `CHARACTERS_PER_DOCUMENT`."""
    held: list[str] = []
    size = 0
    for line in lines:
        held.append(line)
        size += len(line) + 1
        if size >= CHARACTERS_PER_DOCUMENT:
            yield "\n".join(held)
            held, size = [], 0
    if held:
        yield "\n".join(held)


def _instruction(source: str, number: int, row: Any) -> dict[str, str]:
    """A record's instruction, input and output."""
    if not isinstance(row, dict):
        raise DataError(
            f"row {number} of '{source}' is a {type(row).__name__}, and an instruction is a record "
            "with instruction and output. Give such rows, or --form text"
        )
    found = {name: row.get(name) for name in ("instruction", "input", "output")}
    for name in ("instruction", "output"):
        value = found[name]
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"row {number} of '{source}' has no {name}. Every row needs instruction and output "
                "(and may have input); leave such rows out, or use --form text"
            )
    return {name: value if isinstance(value, str) else "" for name, value in found.items()}


def _tokenized(
    rows: list[dict[str, str]], template: Template, tokenizer: Any
) -> Iterator[tuple[list[int], list[int]]]:
    """Of each row the ids of the prompt alone, and those of the prompt with its answer."""
    if template == "chat":
        for row in rows:
            yield _chat(row, tokenizer)
        return
    prompts = [(ALPACA_WITH_INPUT if row["input"] else ALPACA).format(**row) for row in rows]
    wholes = [prompt + row["output"] for prompt, row in zip(prompts, rows, strict=True)]
    tokenized = (tokenizer(texts, verbose=False)["input_ids"] for texts in (prompts, wholes))
    for prompt, whole in zip(*tokenized, strict=True):
        yield prompt, _ended(whole, tokenizer)


def _chat(row: dict[str, str], tokenizer: Any) -> tuple[list[int], list[int]]:
    request = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
    user = {"role": "user", "content": request}
    answer = {"role": "assistant", "content": row["output"]}
    prompt = tokenizer.apply_chat_template(
        [user], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    whole = tokenizer.apply_chat_template([user, answer], tokenize=True, return_dict=False)
    return list(prompt), list(whole)


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """With the end-of-text token at the end, where the tokenizer has one."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common beginning: the last token of a prompt may differ before an answer."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


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
    assert options.length is not None
    count = options.generate or (options.max_steps or 0) * options.batch
    model = session.decoder(teacher).model
    for first in range(0, count, WRITTEN_AT_ONCE):
        wanted = min(WRITTEN_AT_ONCE, count - first)
        for ids in _sampled(model, start, wanted, options, seed=options.seed + first):
            end = tokenizer.eos_token_id
            stop = ids.index(end, 1) + 1 if end in ids[1:] else len(ids)
            yield Document(ids[:stop])


def _sampled(
    model: Any, start: int, count: int, options: RetrainOptions, *, seed: int
) -> list[list[int]]:
    from shortllm.runtime import quiet_transformers

    device = next(model.parameters()).device
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        quiet_transformers(),
    ):
        torch.manual_seed(seed)
        ids = torch.full((count, 1), start, device=device)
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_length=options.length,
            pad_token_id=start,
        )
    rows: list[list[int]] = written.tolist()
    return rows
