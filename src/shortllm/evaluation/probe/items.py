"""The exercises of the probe, from a seeded generator, each with four choices.

A prompt shows two solved examples and asks for one more; `recall` needs none. A choice begins with
a space and ends with a line break, because a model also has to know where an answer ends. One
choice is right, and the others are mistakes of the same kind and length:

    Copy: lamp river stone -> lamp river stone
    Copy: cloud paper fish table -> cloud paper fish table
    Copy: garden hat music ->

To read all of them: `python -m shortllm.evaluation.probe.items`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations
from random import Random
from typing import TYPE_CHECKING, Any

from shortllm.files import fingerprint

if TYPE_CHECKING:
    from datasets import Dataset

VERSION = "1"
"""Changes with the exercises; results of two versions cannot be compared."""

ITEMS = 48
"""Of each capability: a multiple of the number of choices, so that each place is equally right."""

CHOICES = 4
CHANCE = 1 / CHOICES
"""What guessing gets right of four choices; nothing of what has to be written."""

EXAMPLES = 2

WORDS = (
    "apple", "river", "stone", "lamp", "cloud", "paper", "garden", "hat", "music", "door", "fish",
    "table", "green", "bread", "winter", "horse", "city", "letter", "ship", "milk", "tree", "ring",
    "clock", "field",
)  # fmt: skip
NAMES = ("Anna", "Tom", "Maria", "Peter", "Lucy", "David", "Emma", "Jack", "Sarah", "Paul")
PLACES = ("Paris", "London", "Rome", "Berlin", "Tokyo", "Madrid", "Boston", "Chicago", "Vienna")
LETTERS = "abcdefghkmnpqrstuvwxyz"
CLOSED_BY = {"(": ")", "[": "]", "{": "}", "<": ">"}

BETWEEN = (
    "The morning was quiet and a little cold.",
    "A bus stopped at the corner and drove on.",
    "Someone had left a newspaper on the bench.",
    "The shop across the street opened at nine.",
    "Two dogs were playing near the old fountain.",
    "It had rained for most of the night.",
    "A woman sold flowers next to the station.",
    "The leaves on the trees were turning yellow.",
    "Children were walking to school in small groups.",
    "There was a smell of fresh coffee in the air.",
    "A man was painting the frame of a window.",
    "The church bell rang and the birds flew up.",
    "A boy on a bicycle carried a basket of bread.",
    "The last train of the evening was almost empty.",
    "Someone was practising the piano on the first floor.",
)
"""Sentences between a fact and the question about it."""

FORMATS: tuple[Callable[[object, object, object], str], ...] = (
    lambda one, two, three: f'{{"name": "{one}", "city": "{two}", "age": {three}}}',
    lambda one, two, three: f"{one};{two};{three}",
    lambda one, two, three: f"person({one}, {two}, {three})",
    lambda one, two, three: f"<{one}> <{two}> <{three}>",
    lambda one, two, three: f"name={one} city={two} age={three}",
    lambda one, two, three: f"{one} | {two} | {three}",
)

OPEN = (
    "Explain why the sky is blue.",
    "Describe a walk in the forest in autumn.",
    "Write a short story about a lost key.",
    "How do I make a good vegetable soup?",
    "What should I know before I visit a big city for the first time?",
    "Give me some advice for learning a new language.",
    "Explain how a bicycle works.",
    "Write a letter to a friend about your holiday.",
)
"""Requests with no right answer; only the repetition in the answers is measured."""


@dataclass(frozen=True, slots=True)
class Item:
    """One exercise; `answer` is the place of the right choice."""

    capability: str
    prompt: str
    choices: list[str]
    answer: int


@dataclass(frozen=True, slots=True)
class Exercise:
    """A question, its answer, and answers with a mistake."""

    question: str
    right: str
    wrong: list[str]


# ---- one function per capability


def copying(random: Random) -> Exercise:
    """Repeat three to eight words."""
    words = random.sample(WORDS, random.randint(3, 8))
    return Exercise(f"Copy: {' '.join(words)} ->", " ".join(words), _mistakes(words, WORDS, random))


def brackets(random: Random) -> Exercise:
    """Close two to four open brackets, the last one first."""
    opened = [random.choice(list(CLOSED_BY)) for _ in range(random.randint(2, 4))]
    closed = [CLOSED_BY[one] for one in reversed(opened)]
    wrong = _mistakes(closed, list(CLOSED_BY.values()), random)
    return Exercise(f"{' '.join(opened)} |", " ".join(closed), wrong)


def addition(random: Random) -> Exercise:
    """Add two numbers of one to three digits."""
    one, other = _numbers(random)
    return Exercise(f"{one} + {other} =", str(one + other), _near(one + other, random))


def subtraction(random: Random) -> Exercise:
    """Subtract the smaller of two numbers of one to three digits."""
    low, high = sorted(_numbers(random))
    return Exercise(f"{high} - {low} =", str(high - low), _near(high - low, random))


def chains(random: Random) -> Exercise:
    """Follow a value through two to four assignments, past another value."""
    first, other, *rest = random.sample(LETTERS, random.randint(3, 5))
    values = random.sample(range(1, 10), CHOICES)
    lines = [f"{first} = {values[0]}", f"{other} = {values[1]}"]
    random.shuffle(lines)
    names = [first, *rest]
    lines += [f"{to} = {come}" for come, to in zip(names, names[1:], strict=False)]
    question = f"{', '.join(lines)}, so {names[-1]} ="
    return Exercise(question, str(values[0]), [str(one) for one in values[1:]])


def sorting(random: Random) -> Exercise:
    """Sort two to four digits."""
    digits = [str(one) for one in random.sample(range(1, 10), random.randint(2, 4))]
    right = sorted(digits)
    wrong = _mistakes(right, [str(one) for one in range(1, 10)], random)
    return Exercise(f"Sort: {' '.join(digits)} ->", " ".join(right), wrong)


def recall(random: Random) -> Exercise:
    """Find one of three facts, up to 200 tokens later."""
    names, words = random.sample(NAMES, 3), random.sample(WORDS, CHOICES)
    facts = [f"The password of {name} is {word}." for name, word in zip(names, words, strict=False)]
    between = random.sample(BETWEEN, random.randint(0, len(BETWEEN)))
    asked = random.randrange(len(names))
    question = "\n".join([*facts, *between, f"The password of {names[asked]} is"])
    right = words.pop(asked)
    return Exercise(question, f"{right}.", [f"{word}." for word in words])


def formats(random: Random, form: Callable[..., str]) -> Exercise:
    """Write three facts in the format of the examples."""
    name, place, age = random.choice(NAMES), random.choice(PLACES), random.randint(20, 79)
    wrong = [form(place, name, age), form(name, age, place), form(age, place, name)]
    return Exercise(f"{name} is {age} and lives in {place} ->", form(name, place, age), wrong)


def _numbers(random: Random) -> list[int]:
    """Two numbers with the same number of digits."""
    digits = random.randint(1, 3)
    return [random.randrange(10 ** (digits - 1), 10**digits) for _ in range(2)]


def _near(number: int, random: Random) -> list[str]:
    """Numbers of as many digits, with one digit wrong or a carry forgotten."""
    near = [number + by for by in (-20, -10, -9, -2, -1, 1, 2, 9, 10, 11, 20)]
    fitting = [str(one) for one in near if one >= 0 and len(str(one)) == len(str(number))]
    return random.sample(fitting, CHOICES - 1)


def _mistakes(right: Sequence[str], known: Sequence[str], random: Random) -> list[str]:
    """The answer with two parts exchanged, or where it has too few, one replaced."""
    exchanged, replaced = [], []
    for i, j in combinations(range(len(right)), 2):
        parts = list(right)
        parts[i], parts[j] = parts[j], parts[i]
        exchanged.append(parts)
    for i, other in ((i, other) for i in range(len(right)) for other in known):
        replaced.append([*right[:i], other, *right[i + 1 :]])
    random.shuffle(exchanged)
    random.shuffle(replaced)
    found = dict.fromkeys(" ".join(parts) for parts in exchanged + replaced if parts != right)
    return list(found)[: CHOICES - 1]


CAPABILITIES: dict[str, Callable[..., Exercise]] = {
    one.__name__: one
    for one in (copying, brackets, addition, subtraction, chains, sorting, recall, formats)
}
"""By name, in the order in which they are shown."""


# ---- all items


@cache
def items() -> tuple[Item, ...]:
    """All exercises, always the same."""
    return tuple(item for capability in CAPABILITIES for item in _items(capability))


def items_fingerprint() -> str:
    """Of all exercises and requests."""
    return fingerprint([VERSION, [asdict(item) for item in items()], OPEN])


def _items(capability: str) -> Iterator[Item]:
    random = Random(f"probe/{VERSION}/{capability}")
    places = [index % CHOICES for index in range(ITEMS)]
    random.shuffle(places)
    asked: set[str] = set()
    for place in places:
        *examples, last = _exercises(capability, random, asked)
        asked.add(last.question)
        solved = "".join(f"{one.question} {one.right}\n" for one in examples)
        choices = list(last.wrong)
        choices.insert(place, last.right)
        yield Item(
            capability=capability,
            prompt=solved + last.question,
            choices=[f" {one}\n" for one in choices],
            answer=place,
        )


def _exercises(capability: str, random: Random, asked: set[str]) -> list[Exercise]:
    """The examples of an item and the exercise itself, all different; no item asks it twice."""
    more = (random.choice(FORMATS),) if capability == "formats" else ()
    count = 1 if capability == "recall" else EXAMPLES + 1
    while True:
        found = [CAPABILITIES[capability](random, *more) for _ in range(count)]
        questions = {one.question for one in found}
        if len(questions) == count and found[-1].question not in asked:
            return found


def harness_dataset(*, capability: str, **_: Any) -> dict[str, Dataset]:
    """The items of one capability as lm-evaluation-harness wants them (`custom_dataset`)."""
    from datasets import Dataset

    rows = [asdict(item) for item in items() if item.capability == capability]
    return {"test": Dataset.from_list(rows)}


if __name__ == "__main__":
    for item in items():
        print(f"[{item.capability}] {item.prompt}\n    {item.choices} -> {item.answer}")
