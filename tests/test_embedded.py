"""The small world that comes with the package: texts, tasks, and the model made from them."""

import json
import subprocess
import sys
from collections import Counter
from itertools import islice
from typing import Any, get_args

import pytest
import yaml

from shortllm import embedded
from shortllm.embedded import world
from shortllm.embedded.questions import TASKS, Task, harness_dataset, prompt
from shortllm.embedded.world import Kind, Split

SPLITS: tuple[Split, ...] = get_args(Split)
KINDS: tuple[Kind, ...] = get_args(Kind)

ODD_TEXTS = [
    "",
    "  two  spaces\n\n\tand a tab ",
    "Mara's lamp costs 12.50, doesn't it?",
    "naïve Ω 漢字 \U0001f98a \u200b ﬁ",
    "\x00\x7f <s> is not a mark here </",
]


def task_id(task: Task) -> str:
    return task.name


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(embedded.MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> Any:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        embedded.MODEL_DIR, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    return model.eval()


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((embedded.MODEL_DIR / "training.json").read_text())


def test_importing_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from shortllm import embedded; embedded.rows('test', 2); embedded.tasks();"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_always_the_same(split: Split) -> None:
    again = list(islice(world.pages(split), 20))
    assert embedded.rows(split, 20) == again
    assert len(set(again)) == 20


def test_rows_are_the_same_on_every_machine() -> None:
    assert embedded.rows("calibration", 1)[0].startswith("Rolf had a drum. Ida had a book.")
    assert embedded.rows("test", 1)[0].startswith(
        "Finn had one pear. Ben had four pears. Then Ben got one pear"
    )


def test_fixed_splits_have_their_size_and_train_asks_for_a_count() -> None:
    for split, count in world.ROW_COUNT.items():
        assert len(embedded.rows(split)) == count
    with pytest.raises(ValueError, match="say how many rows"):
        embedded.rows("train")
    with pytest.raises(ValueError, match="unknown split 'dev'. Available: calibration, test"):
        embedded.rows("dev")  # type: ignore[arg-type]


def test_no_story_stands_in_two_splits() -> None:
    texts = {
        split: {
            part.split("\nQuestion")[0]
            for row in embedded.rows(split, 400)
            for part in row.split("\n\n")
        }
        for split in ("train", "calibration", "validation", "test")
    }
    assert all(len(stories) > 800 for stories in texts.values())
    assert len(set.union(*texts.values())) == sum(len(stories) for stories in texts.values())


@pytest.mark.parametrize("kind", KINDS)
def test_stories_are_different_and_answerable(kind: Kind) -> None:
    stories = list(islice(world.stories(kind, "test"), 200))
    assert len({story.text for story in stories}) == 200
    for story in stories:
        assert story.split == "test"
        assert "\n" not in story.text
        for question in story.questions:
            assert question.answer not in question.others


@pytest.mark.parametrize("split", ["calibration", "validation", "test"])
def test_rows_are_long_enough_for_windows_of_128_tokens(split: Split, tokenizer: Any) -> None:
    lengths = [len(ids) for ids in tokenizer(embedded.rows(split))["input_ids"]]
    assert min(lengths) >= 150
    assert max(lengths) <= 420


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_tokenizer_loses_nothing(text: str, tokenizer: Any) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.bos_token + text


@pytest.mark.parametrize("task", TASKS, ids=task_id)
def test_tasks_are_well_formed_and_balanced(task: Task) -> None:
    documents = task.documents()
    assert len(documents) >= 500
    assert len({document["context"] for document in documents}) == len(documents)
    for document in documents:
        assert len(set(document["choices"])) == task.choice_count
        assert prompt(document).endswith(f"\nQuestion: {document['question']}\nAnswer:")
    positions = Counter(document["answer"] for document in documents)
    assert set(positions.values()) == {len(documents) // task.choice_count}


@pytest.mark.parametrize("task", TASKS, ids=task_id)
def test_answers_follow_from_the_stories(task: Task) -> None:
    wanted = {document["context"] for document in task.documents()}
    asked = (story for story in world.stories(task.kind, "test") if story.text in wanted)
    by_text = {story.text: story for story in islice(asked, len(wanted))}
    for document in task.documents():
        questions = by_text[document["context"]].questions
        answers = {question.text: question.answer for question in questions}
        assert document["choices"][document["answer"]] == answers[document["question"]]


@pytest.mark.parametrize("task", TASKS, ids=task_id)
def test_task_files_hand_the_documents_to_the_harness(task: Task) -> None:
    pytest.importorskip("datasets")

    class Loader(yaml.SafeLoader):
        """Reads `!function` as the plain name of the function."""

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    shared = yaml.load((embedded.TASKS_DIR / "shared_yaml").read_text(), Loader)
    own = yaml.load((embedded.TASKS_DIR / f"shortllm_{task.name}.yaml").read_text(), Loader)
    assert own["task"] == f"shortllm_{task.name}"
    assert own["include"] == "shared_yaml"
    assert shared["output_type"] == "multiple_choice"
    assert shared["custom_dataset"] == f"{harness_dataset.__module__}.{harness_dataset.__name__}"

    documents = harness_dataset(**own["metadata"])[shared["test_split"]]
    assert documents.to_list() == task.documents()
    template = shared["doc_to_text"].replace("{{", "{").replace("}}", "}")
    assert template.format(**documents[0]) == prompt(task.documents()[0])


def test_model_is_small_enough_to_ship() -> None:
    weights = list(embedded.MODEL_DIR.glob("*.safetensors"))
    assert len(weights) == 1
    assert weights[0].stat().st_size <= 10.5e6
    assert sum(path.stat().st_size for path in embedded.MODEL_DIR.iterdir()) <= 12e6


def test_model_reaches_the_recorded_perplexity(
    model: Any, tokenizer: Any, record: dict[str, Any]
) -> None:
    from measure import perplexity, token_rows, without_blocks

    sequences = token_rows(tokenizer, "calibration", count=10, length=128)
    assert {len(ids) for ids in sequences} == {128}
    recorded = record["calibration"]
    assert perplexity(model, sequences) == pytest.approx(recorded["perplexity"], rel=1e-3)
    with without_blocks(model, [5]):
        without = perplexity(model, sequences)
    assert without == pytest.approx(recorded["perplexity_without_block"][5], rel=1e-3)
    assert perplexity(model, sequences) == pytest.approx(recorded["perplexity"], rel=1e-3)


def test_every_block_counts_and_some_count_far_more(record: dict[str, Any]) -> None:
    for measured in (record["calibration"], record["test"]):
        increases = measured["relative_increase_without_block"]
        assert len(increases) >= 12
        assert min(increases) > 0.002
        assert max(increases) / min(increases) >= 20


def test_a_quarter_by_the_scores_beats_random_and_worst(record: dict[str, Any]) -> None:
    intact = record["test"]["perplexity"]
    measured = record["quarter_removed"]
    best = measured["perplexity_without_least_important"] - intact
    assert best < 0.7 * (measured["mean_perplexity_without_random"] - intact)
    assert best < 0.5 * (measured["perplexity_without_most_important"] - intact)


def test_one_task_set_at_least_is_mastered_and_all_are_above_chance(record: dict[str, Any]) -> None:
    for task in TASKS:
        measured = record["tasks"][task.name]
        assert measured["questions"] >= 500
        standard_error = (task.chance * (1 - task.chance) / measured["questions"]) ** 0.5
        assert measured["acc"] > task.chance + 3 * standard_error
    assert max(record["tasks"][task.name]["acc"] for task in TASKS) >= 0.85


@pytest.mark.parametrize(
    "task",
    [TASKS[0], *(pytest.param(task, marks=pytest.mark.slow) for task in TASKS[1:])],
    ids=task_id,
)
def test_model_answers_as_recorded(
    task: Task, model: Any, tokenizer: Any, record: dict[str, Any]
) -> None:
    from measure import task_accuracy

    acc, acc_norm = task_accuracy(model, tokenizer, task.documents()[:100])
    # A sample of 100 has a standard error of at most 0.05.
    assert acc == pytest.approx(record["tasks"][task.name]["acc"], abs=0.15)
    assert acc_norm == pytest.approx(record["tasks"][task.name]["acc_norm"], abs=0.15)
