"""Multiple-choice task sets of the small world, in the form of lm-evaluation-harness.

Each set asks about stories of the `test` split. A document is a dict with `context` (the story),
`question`, `choices` and `answer`: the index of the right choice, every position being right
equally often. The YAML files in `tasks/` hand the same documents to the harness:

    lm_eval --model hf --model_args pretrained=DIR --include_path src/shortllm/embedded/tasks \\
        --tasks shortllm_where,shortllm_who,shortllm_count,shortllm_compare,\\
        shortllm_why

To read a few: `python -m shortllm.embedded.questions`.
"""

from dataclasses import dataclass
from functools import cache
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any, TypedDict

from shortllm.embedded.world import Kind, ask, stories

if TYPE_CHECKING:
    from datasets import Dataset

QUESTION_COUNT = 600
"""Questions in each task set."""


class Document(TypedDict):
    """One multiple-choice question; `answer` is an index into `choices`."""

    context: str
    question: str
    choices: list[str]
    answer: int


@dataclass(frozen=True, slots=True)
class Task:
    """A task set: its name, the sort of story it asks about, the choices of each question."""

    name: str
    kind: Kind
    choice_count: int

    @property
    def chance(self) -> float:
        """The accuracy of guessing, in [0, 1]."""
        return 1.0 / self.choice_count

    def documents(self) -> list[Document]:
        """All `QUESTION_COUNT` questions of the set, one per story, always the same."""
        return list(_documents(self))


TASKS = (
    Task("where", "where", 4),
    Task("who", "who", 4),
    Task("count", "count", 4),
    Task("compare", "compare", 3),
    Task("why", "cause", 4),
)


@cache
def _documents(task: Task) -> tuple[Document, ...]:
    random = Random(f"questions/{task.name}")
    fitting = (
        story
        for story in stories(task.kind, "test")
        if any(len(question.others) >= task.choice_count - 1 for question in story.questions[:1])
    )
    positions = [index % task.choice_count for index in range(QUESTION_COUNT)]
    random.shuffle(positions)
    documents = []
    for story, position in zip(islice(fitting, QUESTION_COUNT), positions, strict=True):
        question = story.questions[0]
        choices = random.sample(question.others[: task.choice_count - 1], task.choice_count - 1)
        choices.insert(position, question.answer)
        documents.append(
            Document(context=story.text, question=question.text, choices=choices, answer=position)
        )
    return tuple(documents)


def prompt(document: Document) -> str:
    """What a model reads before it scores a space and each choice: `doc_to_text` of the YAML."""
    return f"{document['context']}\n{ask(document['question'])}"


def harness_dataset(*, task_set: str, **_: Any) -> "dict[str, Dataset]":
    """The documents of one task set as lm-evaluation-harness wants them (`custom_dataset`)."""
    from datasets import Dataset

    task = next(task for task in TASKS if task.name == task_set)
    return {"test": Dataset.from_list([dict(document) for document in task.documents()])}


if __name__ == "__main__":
    for task in TASKS:
        document = task.documents()[0]
        print(f"{prompt(document)}\n  {document['choices']} -> {document['answer']}\n")
