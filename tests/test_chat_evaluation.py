"""Chat models: samples and tasks in their template, with examples and a system message."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chatting import ANSWER, QUESTION, STORY, TEMPLATE, chat_model
from hypothesis import given
from hypothesis import strategies as st
from test_cli import call
from test_zeroshot import evaluate, loaded, write
from transformers import AutoModelForCausalLM, AutoTokenizer

import shortllm
from shortllm.checkpoint.chat_template import has_chat_template
from shortllm.checkpoint.source import open_checkpoint
from shortllm.data.chat import Chat, Prompt
from shortllm.embedded import MODEL_DIR
from shortllm.errors import CheckpointError, DataError, ShortLLMError
from shortllm.evaluation.evaluate import evaluation_fingerprint, prepare_tasks
from shortllm.evaluation.options import Evaluation, EvaluationOptions, TaskPrompts
from shortllm.model import Session
from shortllm.recipe import Recipe
from shortllm.reporting.load import load_results
from shortllm.reporting.runs_page import compared_models

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return chat_model(tmp_path_factory.mktemp("chat") / "model")


def apples(number: int) -> dict[str, str]:
    bought = number % 3 + 1
    return {
        "question": f"Tom has {number} apples and buys {bought} more. How many has he?",
        "answer": f"Tom has {number} + {bought} = {number + bought}.\n#### {number + bought}",
    }


def choice(number: int) -> dict[str, Any]:
    return {
        "question": f" What is {number} + 1?",
        "subject": "none",
        "choices": [str(number + one) for one in range(4)],
        "answer": 1,
    }


def subjects() -> list[str]:
    """The tasks that MMLU consists of."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    return [path.stem for path in folder.glob("mmlu_*.yaml")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a few documents of GSM8K, IFEval and each subject of MMLU."""
    directory = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        write(directory / "gsm8k" / f"{split}.jsonl", [apples(number) for number in range(1, 9)])
    for name in subjects():
        write(directory / name / "test.jsonl", [choice(number) for number in range(2)])
        write(directory / name / "dev.jsonl", [choice(number) for number in range(2, 8)])
    followed = {"key": 1, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    write(directory / "ifeval" / "train.jsonl", [{**followed, "prompt": "No commas."}])
    return directory


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that the harness has a model answer."""
    from lm_eval.models.huggingface import HFLM

    found: list[str] = []

    def noted(self: Any, requests: list[Any], **given: Any) -> list[str]:
        found.extend(one.args[0] for one in requests)
        return ["#### 3"] * len(requests)

    monkeypatch.setattr(HFLM, "generate_until", noted)
    return found


# Samples.


def test_a_chat_model_answers_up_to_the_end_of_its_turn(model: str) -> None:
    options = EvaluationOptions(
        continuations=3, prompt=QUESTION, system_instruction=STORY, new_tokens=40, max_segments=1
    )
    [found] = shortllm.evaluate([model], data=["embedded"], options=options).models
    assert found.samples is not None
    assert (found.samples.apply_chat_template, found.samples.system_instruction) == (True, STORY)
    assert {text.strip() for text in found.samples.texts} == {ANSWER}
    assert found.samples.temperature == 0.2 and found.samples.shown()[0] == (
        f"{QUESTION}\n {ANSWER}"
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    talk = [{"role": "system", "content": STORY}, {"role": "user", "content": QUESTION}]
    encoded = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)
    torch.manual_seed(0)
    expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).generate(
        **encoded, do_sample=True, temperature=0.2, top_k=50, top_p=0.95, max_new_tokens=40,
        num_return_sequences=3,
    )  # fmt: skip
    decoded = tokenizer.batch_decode(
        expected[:, encoded.input_ids.shape[1] :], skip_special_tokens=True
    )
    assert [text.partition("\n")[0] for text in decoded] == found.samples.texts


def test_samples_are_plain_text_without_a_template_or_on_request(model: str) -> None:
    asked: dict[str, Any] = {"continuations": 2, "prompt": STORY, "new_tokens": 12}
    wanted: dict[str, Any] = {"data": ["embedded"], "max_segments": 1, **asked}
    plain = shortllm.evaluate([model], apply_chat_template=False, **wanted).models[0]
    assert plain.samples is not None and plain.chat_template is None
    assert not plain.samples.apply_chat_template and plain.samples.temperature == 1.0
    for one in shortllm.evaluate([model, "embedded"], **wanted).models:
        assert one.samples and not one.samples.apply_chat_template, "one has no template"


@given(st.lists(st.integers(0, 5)))
def test_a_text_is_cut_at_its_first_end(ids: list[int]) -> None:
    found = Prompt([], [2, 4]).written(ids)
    assert not {2, 4}.intersection(found) and ids[: len(found)] == found
    assert found == ids or ids[len(found)] in (2, 4)
    assert Prompt([], []).written(ids) == ids


def test_the_token_that_the_template_puts_after_a_turn_ends_an_answer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn_end|>"]})
    turn_end = tokenizer.convert_tokens_to_ids("<|turn_end|>")
    for after, expected in (("<|turn_end|>\n", {1, turn_end}), (" </s>", {1}), (";\n", {1})):
        tokenizer.chat_template = (
            "{% for one in messages %}{{ one.role }}: {{ one.content }}" + after + "{% endfor %}"
        )
        assert Chat(tokenizer, "chat").ends == expected


# Tasks.


def test_examples_and_system_message_are_turns_of_the_conversation(
    model: str, data: Path, prompts: list[str]
) -> None:
    asked: dict[str, Any] = {"tasks": ["gsm8k"], "task_data": data, "limit": 1}
    chat = {**asked, "apply_chat_template": True, "system_instruction": "Count."}
    first = apples(1)["question"]
    [one] = evaluate(model, **chat, num_fewshot=1).models
    assert one.zeroshot[0].shots == 1 and one.chat_template
    shown, question = prompts[0].split("Question: Question: ")[1:]
    assert prompts[0].startswith("<s>Count.\nQuestion: Question: ")
    assert question == f"{first}\nAnswer:\nAnswer:"
    example = next(one for one in map(apples, range(1, 9)) if one["question"] in shown)
    assert shown == f"{example['question']}\nAnswer:\nAnswer: {example['answer']}\n"

    evaluate(model, **chat, num_fewshot=1, fewshot_as_multiturn=False)
    assert prompts[1].count("\nAnswer:\n") == 1 and prompts[1].count("Question: Question: ") == 1
    found = evaluate(model, **chat, num_fewshot=0)
    assert prompts[2] == f"<s>Count.\nQuestion: Question: {first}\nAnswer:\nAnswer:"
    assert found.task_prompts == TaskPrompts(
        apply_chat_template=True, fewshot_as_multiturn=True, system_instruction="Count."
    )
    found = evaluate(model, **asked, num_fewshot=0, system_instruction="Count.")
    assert prompts[3] == f"Count.Question: {first}\nAnswer:", "as the harness has it"
    assert found.task_prompts == TaskPrompts(system_instruction="Count.")


def test_every_model_sees_the_same_examples(model: str, data: Path, prompts: list[str]) -> None:
    """They are drawn at random, from one seed for each model."""
    asked: dict[str, Any] = {"tasks": ["gsm8k"], "task_data": data, "limit": 3, "num_fewshot": 2}
    evaluate(model, "embedded", **asked)
    assert len(prompts) == 6 and prompts[:3] == prompts[3:]


@pytest.mark.slow
def test_scores_of_a_chat_model_equal_those_of_the_harness_alone(
    model: str, data: Path, tmp_path: Path
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    chat: dict[str, Any] = {
        "apply_chat_template": True,
        "num_fewshot": 2,
        "system_instruction": STORY,
    }
    stock = TaskManager().task_index
    names = ["gsm8k", "mmlu_anatomy"]
    for name, splits in zip(names, (("train", "test"), ("dev", "test")), strict=True):
        files = {split: str(data / name / f"{split}.jsonl") for split in splits}
        (tmp_path / f"{name}.yaml").write_text(
            f"include: {stock[name].yaml_path}\ntask: {name}_own\ndataset_path: json\n"
            f"dataset_name: null\ndataset_kwargs: {json.dumps({'data_files': files})}\n"
        )
    own = [f"{name}_own" for name in names]
    theirs = simple_evaluate(
        "hf", model_args=f"pretrained={model},dtype=float32", batch_size=4, device="cpu",
        tasks=own, task_manager=TaskManager(include_path=tmp_path, include_defaults=False),
        fewshot_as_multiturn=True, bootstrap_iters=0, **chat,
    )  # fmt: skip
    [ours] = evaluate(model, tasks=names, task_data=data, batch_size=4, **chat).models
    asked = {one["arguments"][0][0] for one in theirs["samples"]["gsm8k_own"]}
    assert all(text.startswith(f"<s>{STORY}\nQuestion: ") for text in asked)
    for name, score in zip(own, ours.zeroshot, strict=True):
        alone = theirs["results"][name]
        key = score.metric if "," in score.metric else f"{score.metric},none"
        assert score.score == pytest.approx(alone[key], abs=1e-12)
        assert score.shots == theirs["n-shot"][name] == 2


def test_the_subjects_of_mmlu_are_one_task_read_from_local_files(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="shortllm")
    found = loaded(["mmlu", "gsm8k"], task_data=data, num_fewshot=3)
    assert sorted(found.members["mmlu"]) == sorted(subjects())
    assert {task.get_config("num_fewshot") for task in found.loaded["tasks"].values()} == {3}
    assert found.kinds == 2
    assert f"task mmlu is read from 114 files in {data}" in caplog.text
    [score] = evaluate("embedded", tasks=["mmlu"], task_data=data, limit=1).models[0].zeroshot
    assert (score.task, score.metric, score.documents, score.shots) == ("mmlu", "acc", 57, 0)


def test_what_lacks_a_file_comes_from_the_hub_unless_a_directory_was_given(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "gsm8k" / "test.jsonl", [apples(1)])
    assert len(loaded(["gsm8k"], task_data=tmp_path, num_fewshot=0).documents) == 1
    with pytest.raises(DataError, match="has no gsm8k/train.jsonl for task 'gsm8k'"):
        loaded(["gsm8k"], task_data=tmp_path)
    with pytest.raises(DataError, match="has no mmlu_abstract_algebra/test.jsonl for task 'mmlu_"):
        loaded(["mmlu"], task_data=tmp_path)
    monkeypatch.setenv("SHORTLLM_DATA", str(tmp_path))
    for name, file in (("gsm8k", "gsm8k"), ("mmlu", "mmlu_abstract_algebra")):
        with pytest.raises(DataError, match=f"'{name}' cannot be used: .*DIR/{file}/SPLIT.jsonl"):
            loaded([name])


def test_the_set_for_chat_models(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    for package in ("langdetect", "immutabledict"):
        pytest.importorskip(package)
    caplog.set_level("INFO", logger="shortllm")

    def shots(**options: Any) -> set[tuple[str, int]]:
        tasks = loaded(["chat"], task_data=data, **options).loaded["tasks"]
        return {(name.partition("_")[0], one.config.num_fewshot) for name, one in tasks.items()}

    assert shots() == {("mmlu", 5), ("gsm8k", 5), ("ifeval", 0)}
    assert shots(num_fewshot=1) == {("mmlu", 1), ("gsm8k", 1), ("ifeval", 0)}
    assert "task ifeval shows no examples: it is defined without any" in caplog.text
    chat = loaded(["ifeval"], task_data=data)
    with pytest.raises(ShortLLMError, match="lets a model write 1,280 tokens, and .* 512 positio"):
        chat.require_room(open_checkpoint("embedded"))


def test_what_is_asked_otherwise_has_another_fingerprint(model: str, data: Path) -> None:
    session, checkpoints = Session(device="cpu"), [("model", open_checkpoint(model))]

    def of(**options: Any) -> str:
        asked = EvaluationOptions(tasks=["gsm8k"], task_data=data, **options)
        tasks = prepare_tasks([checkpoints[0][1]], asked, session)
        return evaluation_fingerprint(checkpoints, [], asked, session, tasks)

    chat = {"apply_chat_template": True}
    found = [
        of(), of(num_fewshot=0), of(num_fewshot=3), of(**chat), of(**chat, num_fewshot=3),
        of(**chat, fewshot_as_multiturn=False), of(**chat, system_instruction="Count."),
        of(system_instruction="Count."), of(continuations=1, prompt="a"),
        of(continuations=1, prompt="a", apply_chat_template=False),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert of(apply_chat_template=False) == found[0] and of(fewshot_as_multiturn=False) == found[0]
    path = Path(model) / "chat_template.jinja"
    path.write_text(TEMPLATE.replace("Answer", "Reply"))
    try:
        assert of(**chat) != found[3] and of() == found[0]
    finally:
        path.write_text(TEMPLATE)


REFUSING = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (None, {"apply_chat_template": True}, "--apply-chat-template: .* has no chat template"),
        (None, {"system_instruction": "a", "continuations": 1}, "--system: .* no chat template"),
        (TEMPLATE, {"fewshot_as_multiturn": True}, "Add --apply-chat-template"),
        (REFUSING, {"system_instruction": "a"}, "does not take .* of system, user: user first"),
        (TEMPLATE, {"tasks": ["gsm8k"], "num_fewshot": 9}, "has 8 documents to show as examples"),
        (TEMPLATE, {"num_fewshot": -1}, "num_fewshot -1: must be greater"),
    ],
)
def test_conversations_that_cannot_be_are_refused(
    template: str | None, options: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    name = chat_model(tmp_path / "model", template) if template else "embedded"
    with pytest.raises(ShortLLMError, match=message):
        shortllm.evaluate([name], data=["embedded"], task_data=data, **options)


def test_options_of_what_is_not_measured_are_named(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    shortllm.evaluate(
        model, data="embedded", max_segments=1, apply_chat_template=True, limit=2, prompt="a"
    )
    assert [one.getMessage() for one in caplog.records if one.levelname == "WARNING"] == [
        "--limit has no effect without --tasks",
        "--prompt has no effect without --continuations",
        "--apply-chat-template has no effect without --tasks or --continuations or --probe",
    ]
    assert not list(EvaluationOptions(continuations=1, prompt="a").without_effect())


def test_files_say_whether_a_model_has_a_template(model: str, tmp_path: Path) -> None:
    assert has_chat_template("embedded") is False
    assert has_chat_template(model) is True
    assert has_chat_template("owner/on-the-hub") is None
    config = tmp_path / "tokenizer_config.json"
    for written, expected in (
        ({"chat_template": "{{ messages }}"}, True),
        ({"chat_template": None}, False),
        ({"auto_map": {}}, None),
    ):
        config.write_text(json.dumps(written))
        assert has_chat_template(str(tmp_path)) is expected
    config.unlink()
    assert has_chat_template(str(tmp_path)) is None


@pytest.mark.shared
@pytest.mark.real
def test_a_gguf_file_says_whether_it_has_a_template(
    smollm_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHORTLLM_CACHE", str(tmp_path))  # where it is not dequantized
    assert has_chat_template(str(smollm_gguf)) is True
    assert not any(tmp_path.iterdir())


def test_a_model_that_writes_nan_is_no_model_that_knows_nothing(model: str, data: Path) -> None:
    from shortllm.checkpoint.tokenizer import load_tokenizer
    from shortllm.evaluation.tasks import measure_tasks

    checkpoint = open_checkpoint(model)
    broken: Any = Session(device="cpu").decoder(checkpoint).model
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    tasks = loaded(["gsm8k"], task_data=data, limit=1, num_fewshot=0)
    with pytest.raises(CheckpointError, match="logits are NaN"):
        measure_tasks(broken, load_tokenizer(checkpoint), tasks, name="broken")


# Runs and the command line.


def test_a_run_of_a_chat_model_evaluates_chat_models(
    model: str, data: Path, tmp_path: Path, prompts: list[str]
) -> None:
    recipe = Recipe(
        budget=shortllm.Budget(blocks=[5, 6]),
        evaluation=EvaluationOptions(
            data=["embedded"], max_segments=2, continuations=1, prompt=QUESTION, new_tokens=10,
            tasks=["gsm8k"], task_data=data, limit=2, num_fewshot=1, apply_chat_template=True,
            system_instruction=STORY,
        ),
    )  # fmt: skip
    shortllm.run(model, recipe=recipe, out=tmp_path / "run")
    found = Evaluation.load(tmp_path / "run" / "eval.json")
    assert [one.name for one in found.models] == ["original", "pruned"]
    assert all(one.samples and one.samples.apply_chat_template for one in found.models)
    assert found.models[0].chat_template == found.models[1].chat_template
    assert len(prompts) == 4 and prompts[:2] == prompts[2:]
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["evaluation"]
    assert recorded["apply_chat_template"] and recorded["num_fewshot"] == 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "in the chat template, with examples as earlier turns, after the system message" in page
    assert f"Answers in the chat template after the system message “{STORY}”." in page
    assert "exact_match,strict-match [%], 2 documents after 1 example" in page

    chat = load_results(tmp_path / "run")
    plain = replace(chat, evaluation=found.model_copy(update={"task_prompts": TaskPrompts()}))
    for runs, compared in (([chat, chat], {True}), ([chat, plain], {True, False})):
        named = dict(zip("ab", runs, strict=True))
        means = [one.zeroshot_mean is not None for one in compared_models(named) if one.run]
        assert set(means) == compared, "means of tasks that were asked otherwise are left out"


def test_the_command_asks_a_chat_model(
    model: str, data: Path, capfd: pytest.CaptureFixture[str], prompts: list[str]
) -> None:
    command = ["eval", model, "--tasks", "gsm8k", "--task-data", str(data), "--limit", "2"]
    command += ["--apply-chat-template", "--num-fewshot", "1", "--system", STORY]
    code, out, err = call(capfd, *command, "--prompt", QUESTION, "--continuations", "1")
    assert code == 0, err
    assert "2 documents after 1 example" in out
    assert "asked in the chat template, with examples as earlier turns, after the system" in out
    assert f"[model] {QUESTION}\n {ANSWER}\n" in out
    code, _, err = call(capfd, "eval", "embedded", "--fewshot-as-multiturn", "--tasks", "embedded")
    assert code == 2 and "Add --apply-chat-template" in err


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.shared
def test_a_real_chat_model_answers(smollm: Path, data: Path) -> None:
    found = evaluate(
        str(smollm), tasks=["gsm8k"], task_data=data, limit=4, num_fewshot=2,
        apply_chat_template=True,
    )  # fmt: skip
    assert found.models[0].zeroshot[0].score >= 0.75
    options = EvaluationOptions(
        continuations=4, prompt="What is the capital of France?", new_tokens=24, max_segments=1
    )
    [one] = shortllm.evaluate([str(smollm)], data=["embedded"], options=options).models
    assert one.samples is not None
    assert sum(text == "The capital of France is Paris." for text in one.samples.texts) >= 2
