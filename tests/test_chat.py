"""Conversations: rows of every shape rendered alike, with a loss on all the assistant says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hub import fill_datasets_cache
from test_cli import call
from transformers import AutoTokenizer

from shortllm.checkpoint.source import open_checkpoint
from shortllm.data.calibration import calibrate
from shortllm.data.chat import Chat, agreed, row_texts
from shortllm.data.options import CalibrationOptions
from shortllm.data.sources import load_rows, mixed, mixture, open_records
from shortllm.embedded import MODEL_DIR
from shortllm.errors import DataError
from shortllm.evaluation.options import EvaluationOptions
from shortllm.evaluation.texts import prepare_texts
from shortllm.retraining.corpus import documents, kind_of
from shortllm.retraining.options import RetrainOptions

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    # spaces around turns, BOS and EOS, no header of the assistant
    "brackets": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    # earlier turns are rendered without their reasoning, and the last one with
    "reasoning": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # the prompt ends with something that the conversation does not have
    "opened": CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
    # what comes before depends on how the conversation ends
    "last": (
        "{% for m in messages %}{% if m.role == 'user' %}{% if loop.last %}(be brief) {% endif %}"
        "U:{{ m.content }}\n{% else %}A:{{ m.content }};\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    ),
    "marked": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
LEARNED = {
    "chatml": ["4<|im_end|>\n", "Six, I\nthink.<|im_end|>\n"],
    "brackets": [" 4</s>", " Six, I\nthink.</s>"],
    "reasoning": ["4<|im_end|>\n", "<think>\n\n</think>\n\nSix, I\nthink.<|im_end|>\n"],
    "opened": ["4<|im_end|>\n", "Six, I\nthink.<|im_end|>\n"],
    "last": ["4;\n", "Six, I\nthink.;\n"],
    "marked": ["4<|im_end|>", "Six, I\nthink.<|im_end|>"],
}
"""What has a loss in the conversation below."""

TALK = [
    {"role": "user", "content": "What is 2 + 2? 4?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "Six, I\nthink."},
]
ASKED = ["What is 2 + 2?", "Which colour has the sky?\n\nOne word.", "Who are you? é🐍"]
ANSWERED = ["4", "Blue.\n", "A model: nothing more."]


def shaped(question: str, answer: str) -> dict[str, dict[str, Any]]:
    """The same conversation in every shape."""
    turns = [("user", question), ("assistant", answer)]
    messages = [{"role": role, "content": said} for role, said in turns]
    people = {"user": "human", "assistant": "gpt"}
    return {
        "messages": {"id": 3, "messages": messages},
        "conversations": {
            "conversations": [{"from": people[role], "value": said} for role, said in turns]
        },
        "prompt": {"prompt": question, "completion": answer, "source": "web"},
        "prompt lists": {"prompt": messages[:1], "completion": messages[1:]},
        "question": {"question": question, "answer": answer},
        "instruction": {"instruction": question, "input": "", "output": answer},
        "named": {"asked": question, "said": answer},
    }


def write(file: Path, rows: list[Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def tokenizer_of(template: str | None = CHATML) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.chat_template = template
    return tokenizer


def read(source: str, tokenizer: Any, **changes: Any) -> list[tuple[list[int], list[Any]]]:
    options = RetrainOptions(**changes)
    records = open_records(source)
    kind = kind_of(records, options.form)
    return [(one.ids, one.spans) for one in documents(records, kind, tokenizer, options)]


def learned(tokenizer: Any, found: tuple[list[int], list[Any]]) -> list[str]:
    ids, spans = found
    return [tokenizer.decode(ids[start:stop]) for start, stop in spans]


def same_in_every_shape(tokenizer: Any, directory: Path) -> list[tuple[list[int], list[Any]]]:
    pairs = list(zip(ASKED, ANSWERED, strict=True))
    found, texts = {}, {}
    for shape in shaped("", ""):
        rows = [shaped(question, answer)[shape] for question, answer in pairs]
        source = write(directory / f"{shape}.jsonl".replace(" ", "-"), rows)
        source += "#prompt=asked,completion=said" if shape == "named" else ""
        found[shape] = read(source, tokenizer)
        texts[shape] = row_texts(load_rows(source)[:], tokenizer)
    for shape in found:
        assert found[shape] == found["messages"], shape
        assert texts[shape] == texts["messages"], shape
    return found["messages"]


@pytest.mark.parametrize("template", [*TEMPLATES, None])
def test_rows_of_every_shape_give_the_same_ids_and_the_same_loss(
    template: str | None, tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(TEMPLATES[template] if template else None)
    found = same_in_every_shape(tokenizer, tmp_path)
    for one, answer in zip(found, ANSWERED, strict=True):
        [said] = learned(tokenizer, one)
        assert answer.strip() in said and "?" not in said


@pytest.mark.real
@pytest.mark.shared
def test_rows_of_every_shape_with_a_real_model(smollm: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    found = same_in_every_shape(tokenizer, tmp_path)
    for one, question, answer in zip(found, ASKED, ANSWERED, strict=True):
        assert learned(tokenizer, one) == [f"{answer}<|im_end|>\n"]
        turns = shaped(question, answer)["messages"]["messages"]
        expected = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        assert one[0] == expected
    talk = write(tmp_path / "talk.jsonl", [{"messages": TALK}])
    assert learned(tokenizer, read(talk, tokenizer)[0]) == LEARNED["chatml"]
    options = CalibrationOptions(data=talk, sampler="packed", samples=1, length=16)
    ids = calibrate(open_checkpoint(smollm), options).ids
    assert tokenizer.decode(ids[0]).startswith("<|im_start|>system\nYou are a helpful AI")


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_turn_of_the_assistant_has_a_loss(template: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(TEMPLATES[template])
    source = write(tmp_path / "talk.jsonl", [{"messages": TALK}, {"messages": TALK[:3]}])
    first, second = read(source, tokenizer)
    assert learned(tokenizer, first) == LEARNED[template]
    assert learned(tokenizer, second) == LEARNED[template][:1]
    whole = Chat(tokenizer, "chat").text(TALK)
    assert first[0] == tokenizer(whole, add_special_tokens=False).input_ids
    assert read(source, tokenizer, loss_on="all")[0] == (first[0], [(0, len(first[0]))])


def test_without_a_chat_template_turns_follow_in_the_form_of_alpaca(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(None)
    talk = [{"role": "system", "content": "You count."}, *TALK]
    [(ids, spans)] = read(write(tmp_path / "talk.jsonl", [{"messages": talk}]), tokenizer)
    eos = tokenizer.eos_token
    assert learned(tokenizer, (ids, spans)) == [f"4{eos}", f"Six, I\nthink.{eos}"]
    assert tokenizer.decode(ids[1 : spans[0][0]]) == (
        "You count.\n\n### Instruction:\nWhat is 2 + 2? 4?\n\n### Response:\n"
    )


def test_calibration_renders_conversations_and_joins_them(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(TEMPLATES["brackets"])
    rows = load_rows(write(tmp_path / "talk.jsonl", [{"messages": TALK[:2]}] * 3))
    assert row_texts(rows[:1], tokenizer) == ["[INST] What is 2 + 2? 4? [/INST] 4</s>"]
    assert rows[0] == TALK[:2] and rows.span(1, 3)[1] == TALK[:2]


def test_a_system_column_goes_first_and_odd_roles_are_known(tmp_path: Path) -> None:
    rows = [{"system": "Count.", "prompt": "1?", "completion": "2."}]
    assert load_rows(write(tmp_path / "a.jsonl", rows))[0] == [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "2."},
    ]
    turns = [{"from": "human", "value": "a"}, {"from": "observation", "value": "b"}]
    rows = [{"conversations": [*turns, {"from": "gpt", "value": "c", "weight": 1.0}]}]
    found = load_rows(write(tmp_path / "b.jsonl", rows))[0]
    assert [message["role"] for message in found] == ["user", "tool", "assistant"]  # type: ignore


def test_parquet_keeps_conversations_apart_from_other_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"messages": TALK, "score": 1.5}, {"messages": TALK[:2], "score": 2.5}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "talk.parquet")
    assert list(load_rows(str(tmp_path / "talk.parquet"))) == [TALK, TALK[:2]]


def test_conversations_of_the_hub_stay_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = [{"id": n, "messages": TALK[: 2 + 2 * n]} for n in range(2)]
    fill_datasets_cache(tmp_path, "acme/talks", content, monkeypatch)
    for source in ("acme/talks", "acme/talks#messages"):
        rows = load_rows(source)
        assert list(rows) == [TALK[:2], TALK] and rows.span(1, 2)[0] == TALK
    assert list(open_records("acme/talks::test").rows()) == [TALK[:2], TALK]


def test_a_run_measures_the_conversations_that_it_did_not_calibrate_on(tmp_path: Path) -> None:
    faq = [{"q": f"What is {n}?", "a": f"{n} it is."} for n in range(40)]
    calibration = CalibrationOptions(
        data=write(tmp_path / "faq.jsonl", faq), columns="prompt=q,completion=a",
        sampler="packed", samples=2, length=16,
    )  # fmt: skip
    evaluation = EvaluationOptions(data=[calibration.source or ""], length=16)
    texts = prepare_texts(open_checkpoint("embedded"), calibration, evaluation)
    assert texts.calibration is not None and texts.calibration.info.rows == (0, 20)
    [measured] = texts.evaluation
    assert measured.held_out and (measured.rows.start, measured.rows.stop) == (20, 40)


BOTH = {"messages": TALK, "prompt": "a?", "completion": "b"}


@pytest.mark.parametrize(
    ("rows", "named", "message"),
    [
        ([BOTH], "", r"read in 2 ways: as messages, or as prompt and completion. Say which: "
         r"'.*rows.jsonl#messages', '.*rows.jsonl#prompt=prompt,completion=completion'"),
        ([{"question": "a", "answer": "b", "text": "c"}], "", "as question and answer, or as text"),
        ([{"query": "a?", "response": "b"}], "", "--columns prompt=ASKED,completion=ANSWER"),
        ([{"question": "a?", "number": 3}], "", "no answer under a name that is known"),
        ([{"query": "a?", "number": 3}], "", "no answer under a name that is known"),
        ([{"question": "a?", "answer": 3}], "", "has a int in column 'answer', not a text"),
        ([{"question": "a?", "answer": " "}], "", "has no answer. Every row needs question and"),
        ([{"messages": TALK[:1]}], "", "no turn of the assistant to learn, only of user"),
        ([{"messages": [{"who": "user", "content": "a"}]}], "", "where role and content .* needed"),
        ([{"messages": TALK}, {"messages": None}], "", "row 1 .* has no list of messages"),
        (["text", {"messages": TALK}], "", "row 1 of .* is a dict, and those before it are texts"),
        ([{"q": "a?", "a": "b"}], "#prompt=q", "prompt of '.*' are not a kind of row"),
        ([{"q": "a?", "a": "b"}], "#prompt=q,completion=b", "has no column 'b'"),
        ([{"q": "a?", "a": "b"}], "#promt=q,completion=a", "no field 'promt'. Did you mean"),
        ([{"q": "a?", "a": "b"}], "#prompt=q,completion", "give FIELD=COLUMN"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_read_in_one_way(
    rows: list[Any], named: str, message: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "rows.jsonl", rows) + named
    with pytest.raises(DataError, match=message) as error:
        load_rows(source)
    with pytest.raises(DataError, match=message):
        list(open_records(source).rows())
    assert not re.search("#(q|query|question|prompt)'", str(error.value)), "questions alone"


def test_what_an_ambiguous_file_is_read_as_can_be_said(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{**BOTH, "text": "c"}])
    assert load_rows(f"{source}#messages")[0] == TALK
    assert load_rows(f"{source}#text")[0] == "c"
    assert (
        load_rows(f"{source}#prompt=prompt,completion=completion")[0]
        == (shaped("a?", "b")["messages"]["messages"])
    )
    assert list(open_records(source).rows("text")) == ["c"]
    options = CalibrationOptions(data=source, columns="text=completion")
    assert options.source == f"{source}#text=completion"
    with pytest.raises(DataError, match="names a column itself"):
        CalibrationOptions(data=f"{source}#text", columns="text=completion").source  # noqa: B018


def test_a_template_that_refuses_a_conversation_names_the_row(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    )
    rows = [{"messages": TALK}, {"messages": TALK[1:]}]
    with pytest.raises(DataError, match="row 1 of .* does not take .* assistant, user.*user first"):
        read(write(tmp_path / "rows.jsonl", rows), tokenizer)


def test_a_mixture_gives_each_source_its_share_of_the_tokens(tmp_path: Path) -> None:
    talks = write(tmp_path / "talks.jsonl", [{"messages": TALK}] * 400)
    texts = write(tmp_path / "texts.jsonl", [{"text": "One two three four."}] * 400)
    assert mixture(f"{talks}:3,{texts}:1") == {talks: 3.0, texts: 1.0}
    odd = "a.jsonl#prompt=q,completion=a:.5,org/data:config:train:0.25,c4:2"
    assert mixture(odd) == {
        "a.jsonl#prompt=q,completion=a": 0.5, "org/data:config:train": 0.25, "c4": 2.0,
    }  # fmt: skip
    for one in ("c4", "c4:train", "a,b.jsonl", "org/data:config:2024", "c4:0.5"):
        assert mixture(one) == {one: 1.0}
    for wrong in ("c4:0.5,c4:0.5", "c4:0,alpaca:1", "c4:1,alpaca:x", "c4,alpaca"):
        with pytest.raises(DataError, match="every source once, with a weight above 0"):
            mixture(wrong)
    for several in ("c4:0.5,alpaca:0.5", "c4,alpaca"):
        with pytest.raises(DataError, match="retraining take. Give each text on its own"):
            load_rows(several, role="evaluation")
    tokenizer = tokenizer_of()
    parts = [
        (weight, documents(records, kind_of(records, "auto"), tokenizer, RetrainOptions()))
        for weight, records in ((3.0, open_records(talks)), (1.0, open_records(texts)))
    ]
    found = list(mixed(parts, lambda one: min(len(one.ids), 30)))
    talk, text = (
        sum(min(30, len(one.ids)) for one in found if (one.targets is None) == is_text)
        for is_text in (False, True)
    )
    assert abs(talk - 3 * text) <= 3 * 30
    assert sum(one.targets is None for one in found) == 400, "it ends with the first to end"


def test_the_common_beginning() -> None:
    for one, other in [("", "a"), ("abc", "abc"), ("abd", "abc"), ("b", "c"), ("aab", "aa")]:
        length = agreed(one, other)
        assert one[:length] == other[:length]
        assert one[: length + 1] != other[: length + 1] or length == len(one) == len(other)


def test_columns_are_a_flag_of_training_and_calibration(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = write(tmp_path / "rows.jsonl", [{"q": "a?", "a": "b"}])
    for command in ("score", "retrain"):
        code, _, err = call(
            capfd, command, "embedded", "--out", tmp_path / "out", "--data", source,
            "--columns", "prompt=q,answer=a",
        )  # fmt: skip
        assert code == 2 and "prompt and answer of" in err and "are not a kind of row" in err
