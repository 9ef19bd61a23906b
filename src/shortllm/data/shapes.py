"""A row of any shape as a conversation or as plain text: the one place that knows the shapes.

    messages        [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]
    conversations   [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]    (ShareGPT)
    prompt, completion              texts, or lists of messages
    question, answer
    instruction, input, output      `input` may be empty or missing                       (Alpaca)
    text                            a text; also page, sentence, content, or the only text column

The first record of a source decides. `SOURCE#column` takes one column, a text or a list of
messages; `SOURCE#prompt=question,completion=answer` says which column is which field. A `system`
column goes before the first message of a pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shortllm.errors import DataError, did_you_mean

Messages = list[dict[str, Any]]
"""A conversation: `role` and `content` of each message, and what else a chat template may use."""

Row = str | Messages

Form = Literal["auto", "instructions", "text"]

Template = Literal["alpaca", "chat"]

TEXT_COLUMNS = ("text", "page", "sentence", "content")
"""Columns of text: the first of these that exists."""

LISTS = ("messages", "conversations")

PAIRS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))

OPTIONAL = {"prompt": ("system",), "question": ("system",), "instruction": ("input", "system")}
"""By the first field of a pair, the fields that it may have besides."""

FIELDS = (*LISTS, *(field for pair in PAIRS for field in pair), "input", "system", "text")

QUESTIONS = {*(ask for ask, _ in PAIRS), "query", "request", "input"}
"""Columns that are not taken for text by themselves: questions without answers teach nothing."""

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
}
"""Other names of roles, as ShareGPT data has them."""


def template_for(exists: bool, requested: Literal["auto", "alpaca", "chat"] = "auto") -> Template:
    """How conversations are formatted; `exists` is whether the tokenizer has a chat template."""
    if requested == "chat" and not exists:
        raise DataError(
            "--template chat: the tokenizer has no chat template. Use --template alpaca"
        )
    if requested == "auto":
        return "chat" if exists else "alpaca"
    return requested


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read the records of a source: field -> column; no field for plain strings."""

    columns: Mapping[str, str]

    @property
    def is_text(self) -> bool:
        """Whether rows are plain text, not conversations."""
        return not self.columns or "text" in self.columns

    def named(self, source: str) -> str:
        """The source with this reading said after `#`."""
        plain = source.partition("#")[0]
        if len(self.columns) == 1:
            return f"{plain}#{next(iter(self.columns.values()))}"
        return f"{plain}#{','.join(f'{field}={name}' for field, name in self.columns.items())}"

    def read(self, record: Any, source: str, number: int) -> Row:
        """A record as a text or as a conversation."""
        place = f"row {number} of '{source}'"
        if not self.columns:
            if isinstance(record, str):
                return record
            raise DataError(f"{place} is a {type(record).__name__}, and those before it are texts")
        if not isinstance(record, dict):
            wanted = " and ".join(self.columns.values())
            raise DataError(f"{place} is a {type(record).__name__}, not a record with {wanted}")
        found = {field: record.get(column) for field, column in self.columns.items()}
        if "text" in found:
            if isinstance(found["text"], str):
                return found["text"]
            raise DataError(f"{place} has no text in column '{self.columns['text']}'")
        for field in LISTS:
            if field in found:
                return self._answered(_messages(found[field], place, self.columns[field]), place)
        return self._answered(self._pair(found, place), place)

    def _pair(self, found: dict[str, Any], place: str) -> Messages:
        [(ask, reply)] = [pair for pair in PAIRS if pair[0] in found]
        for field in (ask, reply):
            if not found[field] or isinstance(found[field], str) and not found[field].strip():
                raise DataError(
                    f"{place} has no {self.columns[field]}. Every row needs {self.columns[ask]} "
                    f"and {self.columns[reply]}; leave such rows out"
                )
        asked = self._side(found[ask], "user", place, ask)
        extra = found.get("input")
        if isinstance(extra, str) and extra:
            [message] = asked
            asked = [{**message, "content": f"{message['content']}\n\n{extra}", "input": extra}]
        before = found.get("system")
        system = [{"role": "system", "content": before}] if isinstance(before, str) else []
        return [
            *(system if before else []),
            *asked,
            *self._side(found[reply], "assistant", place, reply),
        ]

    def _side(self, value: Any, role: str, place: str, field: str) -> Messages:
        if isinstance(value, str):
            return [{"role": role, "content": value}]
        if field in ("prompt", "completion"):
            return _messages(value, place, self.columns[field])
        raise DataError(
            f"{place} has a {type(value).__name__} in column '{self.columns[field]}', not a text"
        )

    def _answered(self, messages: Messages, place: str) -> Messages:
        if any(message["role"] == "assistant" for message in messages):
            return messages
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages)) or "nobody"
        raise DataError(
            f"{place} has no turn of the assistant to learn, only of {roles}. Leave such rows out"
        )


def _messages(value: Any, place: str, column: str) -> Messages:
    """A list of messages of either naming, as role and content."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise DataError(f"{place} has no list of messages in column '{column}'")
    found: Messages = []
    for one in value:
        role, said = one.get("role", one.get("from")), one.get("content", one.get("value"))
        calls = one.get("tool_calls")
        if not isinstance(role, str) or not (isinstance(said, str) or calls):
            raise DataError(
                f"{place}: a message in '{column}' has {', '.join(one) or 'nothing'}, where role "
                "and content (or from and value) are needed, both texts"
            )
        rest = {
            name: item
            for name, item in one.items()
            if name not in ("role", "from", "content", "value") and item is not None
        }
        found.append({"role": ROLES.get(role, role), "content": said or "", **rest})
    return found


def read_rows(
    source: str, records: Iterable[Any], named: str | None, form: Form = "auto"
) -> Iterator[Row]:
    """Each record as a text or a conversation; the first one decides how they are read.

    Args:
        named: what stood after `#`: a column, or `field=column,field=column`.
    """
    reading: Reading | None = None
    for number, record in enumerate(records):
        if reading is None:
            reading = reading_of(source, record, named, form)
        yield reading.read(record, source, number)


def reading_of(source: str, record: Any, named: str | None, form: Form = "auto") -> Reading:
    """How the records of a source are read, told by the first of them."""
    if isinstance(record, str) and named is None:
        found = Reading({})
    elif not isinstance(record, dict):
        raise DataError(
            f"row 0 of {source} is a {type(record).__name__}, not a record"
            + (f" with a column '{named}'" if named and "=" not in named else "")
        )
    elif named is None:
        found = _guessed(source, record, form)
    elif "=" in named:
        found = _mapped(source, record, named)
    else:
        _require_column(source, record, named)
        is_list = isinstance(record[named], list)
        found = Reading({"messages" if is_list else "text": named})
    if form != "auto" and found.is_text != (form == "text"):
        what = "text" if found.is_text else "conversations"
        raise DataError(f"--form {form}: '{source}' is read as {what}. {SHAPES}")
    return found


SHAPES = (
    "Give rows with messages, prompt and completion, question and answer, instruction and output, "
    "or text"
)


def _readings(record: Mapping[str, Any]) -> list[Reading]:
    """Every way in which a record can be read by the names of its columns."""
    found = [{name: name} for name in LISTS if isinstance(record.get(name), list)]
    for ask, reply in PAIRS:
        if ask in record and reply in record:
            names = (ask, *(one for one in OPTIONAL[ask] if one in record), reply)
            found.append({name: name for name in names})
    texts = [name for name in TEXT_COLUMNS if isinstance(record.get(name), str)]
    return [Reading(one) for one in [*found, *({"text": name} for name in texts[:1])]]


def _guessed(source: str, record: dict[str, Any], form: Form) -> Reading:
    found = [one for one in _readings(record) if form in ("auto", _form_of(one))]
    if len(found) == 1:
        return found[0]
    names = ", ".join(map(str, record))
    if found:
        ways = ", or as ".join(" and ".join(one.columns.values()) for one in found)
        typed = ", ".join(f"'{one.named(source)}'" for one in found)
        raise DataError(
            f"{source} can be read in {len(found)} ways: as {ways}. Say which: {typed}. "
            f"Columns: {names}"
        )
    texts = [name for name, value in record.items() if isinstance(value, str)]
    if form == "instructions" or texts and QUESTIONS.issuperset(texts):
        raise DataError(
            f"{source} has no {'conversation' if form == 'instructions' else 'answer'} under a "
            "name that is known. Say which column is asked and which is the answer: --columns "
            f"prompt=ASKED,completion=ANSWER. Columns: {names}"
        )
    if len(texts) == 1:
        return Reading({"text": texts[0]})
    if not texts:
        raise DataError(f"{source} has no column of text. Columns: {names}")
    raise DataError(
        f"{source} has {len(texts)} columns of text, none of them named {', '.join(TEXT_COLUMNS)}. "
        "Say which is which: --columns prompt=ASKED,completion=ANSWER for questions with their "
        f"answers, or --columns text=COLUMN for plain text. Columns: {names}"
    )


def _form_of(reading: Reading) -> Form:
    return "text" if reading.is_text else "instructions"


def _mapped(source: str, record: dict[str, Any], named: str) -> Reading:
    columns = parse_columns(named)
    for column in columns.values():
        _require_column(source, record, column)
    renamed = {field: record[column] for field, column in columns.items()}
    for one in _readings(renamed):
        if one.columns.keys() == columns.keys():
            return Reading({field: columns[field] for field in one.columns})
    raise DataError(
        f"--columns {named}: {' and '.join(columns)} of '{source}' are not a kind of row. {SHAPES}"
    )


def parse_columns(text: str) -> dict[str, str]:
    """`prompt=question,completion=answer` as {field: column}."""
    columns: dict[str, str] = {}
    for part in text.split(","):
        field, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column:
            raise DataError(
                f"--columns {text}: give FIELD=COLUMN, as in prompt=question,completion=answer"
            )
        if field not in FIELDS:
            raise DataError(f"--columns {text}: no field '{field}'.{did_you_mean(field, FIELDS)}")
        columns[field] = column
    return columns


def with_columns(source: str, columns: str | None) -> str:
    """A source with the columns that `--columns` names."""
    if columns is None:
        return source
    parse_columns(columns)
    if "#" in source and not Path(source).expanduser().is_file():
        raise DataError(
            f"--data {source} names a column itself, so --columns {columns} has no effect. Leave "
            "one of them out"
        )
    return f"{source}#{columns}"


def _require_column(source: str, record: dict[str, Any], column: str) -> None:
    if column not in record:
        raise DataError(f"{source} has no column '{column}'.{did_you_mean(column, list(record))}")
