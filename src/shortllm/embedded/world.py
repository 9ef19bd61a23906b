"""The small world: seeded little stories in English, and questions about them.

A *story* is a few sentences about people, places and things, with questions that its text answers.
A *page* (one row of a data set) is a handful of stories, each followed by its questions in the form
in which the tasks ask them:

    Mara put the lamp in the kitchen. Later Tom carried the lamp from the kitchen to the barn.
    Question: Where is the lamp?
    Answer: the barn.

Every story belongs to exactly one split, by a checksum of its text, so that no story of `test` is
ever seen in `train`. Chance comes from seeded `random.Random` alone: a split is the same on every
machine. To read some pages:

    python -m shortllm.embedded.world
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from random import Random
from typing import Literal, get_args

Split = Literal["train", "calibration", "validation", "test"]
Kind = Literal["where", "carry", "who", "count", "compare", "colour", "cause", "day"]

ROW_COUNT: dict[Split, int] = {"calibration": 512, "validation": 256, "test": 512}
"""Rows in each split of fixed size; `train` has no end."""

_SPLIT_OF_BUCKET: dict[int, Split] = {0: "calibration", 1: "validation", 2: "test", 3: "test"}
"""Of ten buckets of stories; the others are for training."""

# Stories are drawn from these by seed: another word, or another order, is another world.
SHE = tuple("Mara Ana Cleo Eva Gwen Ida Kira Olga".split())
HE = tuple("Tom Ben Dan Finn Hugo Jon Leo Rolf".split())
PEOPLE = SHE + HE
PLACES = tuple(
    "kitchen garden attic cellar hall barn market school harbour mill library park".split()
)
THINGS = tuple(
    "lamp kite book drum key map ball cup hat rope clock flute box broom mirror bell".split()
)
GOODS = tuple("apple pear plum egg stone shell coin button".split())
ANIMALS = tuple("dog cat horse cow goat duck fox owl".split())
COLOURS = tuple("red blue green black white brown grey yellow".split())
SIZES = ("big", "small", "tiny", "huge")
MOODS = ("happy", "sad", "tired", "proud", "calm", "angry")
NUMBERS = tuple("no one two three four five six seven eight nine ten".split())
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
WEATHER = ("cold", "warm", "windy", "rainy", "sunny", "foggy")
FOODS = ("bread", "soup", "cheese", "rice", "cake", "fish", "honey", "porridge")

LINKS = ("", "", "", "Then ", "Later ", "After that ", "Soon ")

PUT = (
    "{name} put the {thing} in the {new}.",
    "{name} left the {thing} in the {new}.",
    "The {thing} stood in the {new}.",
    "There was a {thing} in the {new}.",
)
MOVE = (
    "{name} carried the {thing} from the {old} to the {new}.",
    "{name} took the {thing} to the {new}.",
    "{name} brought the {thing} from the {old} into the {new}.",
    "{name} found the {thing} in the {old} and moved it to the {new}.",
    "the {thing} was moved to the {new} by {name}.",
)
GIVE = (
    "{name} gave the {thing} to {other}.",
    "{name} handed the {thing} to {other}.",
    "{other} got the {thing} from {name}.",
    "{other} borrowed the {thing} from {name}.",
    "{name} lent the {thing} to {other}.",
)
TAKE = ("{name} picked up the {thing}.", "{name} took the {thing}.", "{name} grabbed the {thing}.")
GO = (
    "{name} went to the {new}.",
    "{name} walked to the {new}.",
    "{name} ran into the {new}.",
    "{name} left for the {new}.",
)
ORDERS = (
    ("older", "younger", "oldest", "youngest"),
    ("taller", "shorter", "tallest", "shortest"),
    ("faster", "slower", "fastest", "slowest"),
    ("stronger", "weaker", "strongest", "weakest"),
)
CAUSES = (
    ("it rained all night", "the path was wet", "slipped on the path"),
    ("the wind was strong", "the hat flew away", "ran after the hat"),
    ("the oven was too hot", "the cake was burnt", "baked a new cake"),
    ("the bridge was broken", "the road was closed", "took the boat"),
    ("the window was open", "the room was cold", "put on a coat"),
    ("the lamp had no oil", "the cellar was dark", "lit a candle"),
    ("the goat found the gate open", "the flowers were eaten", "mended the gate"),
    ("the clock was slow", "the train was gone", "walked home"),
    ("the bucket had a hole", "the floor was wet", "looked for a mop"),
    ("the well was dry", "the horse was thirsty", "fetched water from the river"),
    ("the drum was loud", "the baby woke up", "sang a song"),
    ("the snow was deep", "the school was closed", "built a snowman"),
)


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a story; `others` are wrong answers, the most tempting ones first."""

    text: str
    answer: str
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Story:
    """A few sentences (`text`, one line) and the questions that they answer."""

    text: str
    questions: tuple[Question, ...]

    @property
    def split(self) -> Split:
        """The one split that this story belongs to: a function of its text alone."""
        return _SPLIT_OF_BUCKET.get(zlib.crc32(self.text.encode()) % 10, "train")

    def __str__(self) -> str:
        """The story as it appears in a page, every question with its answer."""
        asked = [f"{ask(question.text)} {question.answer}." for question in self.questions]
        return "\n".join([self.text, *asked])


def ask(question: str) -> str:
    """The words that ask `question`, up to where its answer (after a space) begins."""
    return f"Question: {question}\nAnswer:"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _tell(random: Random, templates: tuple[str, ...], **words: str) -> str:
    """One sentence from a random template, sometimes with a linking word before it."""
    return _sentence(random.choice(LINKS) + random.choice(templates).format(**words))


def _amount(number: int, goods: str) -> str:
    return f"{NUMBERS[number]} {goods if number == 1 else goods + 's'}"


def _where(random: Random) -> Story:
    """One or two things are moved about, each sentence naming a thing and its new place."""
    things = random.sample(THINGS, random.choice((1, 2, 2)))
    people = random.sample(PEOPLE, 3)
    places = random.sample(PLACES, len(things) + random.randint(0, 3))
    at = dict(zip(things, places, strict=False))
    sentences = [
        random.choice(PUT).format(name=random.choice(people), thing=thing, new=place)
        for thing, place in at.items()
    ]
    for new in places[len(things) :]:
        thing, name = random.choice(things), random.choice(people)
        sentences.append(_tell(random, MOVE, name=name, thing=thing, old=at[thing], new=new))
        at[thing] = new
    return Story(" ".join(sentences), _where_questions(random, at, places))


def _where_questions(random: Random, at: dict[str, str], places: list[str]) -> tuple[Question, ...]:
    """Where each thing is, in random order; the wrong answers are the story's other places."""
    return tuple(
        Question(
            f"Where is the {thing}?",
            f"the {at[thing]}",
            tuple(f"the {place}" for place in places if place != at[thing]),
        )
        for thing in random.sample(sorted(at), len(at))
    )


def _carry(random: Random) -> Story:
    """People pick things up, then walk: a thing is where the one who carries it went last."""
    carried = dict(
        zip(random.sample(PEOPLE, random.choice((1, 2, 2))), random.sample(THINGS, 2), strict=False)
    )
    walks = list(carried) * random.choice((1, 2))
    random.shuffle(walks)
    places = random.sample(PLACES, len(walks))
    sentences = [
        random.choice(TAKE).format(name=name, thing=thing) for name, thing in carried.items()
    ]
    at = {}
    for name, new in zip(walks, places, strict=True):
        sentences.append(_tell(random, GO, name=name, new=new))
        at[carried[name]] = new
    return Story(" ".join(sentences), _where_questions(random, at, places))


def _who(random: Random) -> Story:
    """One or two things pass from hand to hand."""
    things = random.sample(THINGS, random.choice((1, 2, 2)))
    people = random.sample(PEOPLE, 4)
    holder = dict(zip(things, people, strict=False))
    seen = list(holder.values())
    sentences = [f"{name} had a {thing}." for thing, name in holder.items()]
    for _ in range(random.randint(0, 3)):
        thing = random.choice(things)
        name = holder[thing]
        other = random.choice([person for person in people if person != name])
        sentences.append(_tell(random, GIVE, name=name, thing=thing, other=other))
        holder[thing] = other
        seen.append(other)
    questions = tuple(
        Question(
            f"Who has the {thing}?",
            holder[thing],
            tuple(person for person in people if person in seen and person != holder[thing]),
        )
        for thing in random.sample(things, len(things))
    )
    return Story(" ".join(sentences), questions)


def _count(random: Random) -> Story:
    """Two people find, lose and give goods; one that keeps the count aloud asks no questions."""
    goods = random.choice(GOODS)
    people = random.sample(PEOPLE, 2)
    has = {name: random.randint(1, 4) for name in people}
    aloud = random.random() < 0.4
    sentences = [f"{name} had {_amount(has[name], goods)}." for name in people]
    for _ in range(random.choice((0, 1, 1, 2))):
        sentences.append(_trade(random, has, goods))
        if aloud:
            now = " and ".join(f"{name} had {_amount(has[name], goods)}" for name in people)
            sentences.append(f"Now {now}.")
    questions = (
        () if aloud else tuple(_count_question(random, name, has[name], goods) for name in people)
    )
    return Story(" ".join(sentences), questions)


def _trade(random: Random, has: dict[str, int], goods: str) -> str:
    """Let someone find, lose or give one to three goods; changes `has`, returns the sentence."""
    name, other = random.sample(list(has), 2)
    change = random.randint(1, 3)
    what = _amount(change, goods)
    if has[name] < change or random.random() < 0.3:
        has[name] += change
        return _tell(
            random, ("{name} found {what}.", "{name} bought {what}."), name=name, what=what
        )
    has[name] -= change
    if random.random() < 0.4:
        return _tell(random, ("{name} lost {what}.", "{name} sold {what}."), name=name, what=what)
    has[other] += change
    gift = ("{name} gave {other} {what}.", "{other} got {what} from {name}.")
    return _tell(random, gift, name=name, other=other, what=what)


def _count_question(random: Random, name: str, number: int, goods: str) -> Question:
    """How many goods `name` has; the wrong answers are the numbers around the right one."""
    near = sorted(
        (n for n in range(11) if n != number), key=lambda n: (abs(n - number), random.random())
    )
    answer, *others = [NUMBERS[n] if n else "none" for n in (number, *near)]
    return Question(f"How many {goods}s does {name} have?", answer, tuple(others))


def _compare(random: Random) -> Story:
    """Two or three people are ordered by comparing neighbours, or by saying how old each is."""
    ranked = random.sample(PEOPLE, random.choice((2, 3, 3)))
    more, less, most, least = random.choice(ORDERS)
    if more == "older" and random.random() < 0.5:
        ages = sorted(random.sample(range(2, 11), len(ranked)), reverse=True)
        sentences = [
            f"{name} is {NUMBERS[age]} years old." for name, age in zip(ranked, ages, strict=True)
        ]
    else:
        sentences = [
            random.choice(
                (f"{first} is {more} than {second}.", f"{second} is {less} than {first}.")
            )
            for first, second in zip(ranked, ranked[1:], strict=False)
        ]
    random.shuffle(sentences)
    top, bottom = (more, less) if len(ranked) == 2 else (f"the {most}", f"the {least}")
    questions = [
        Question(f"Who is {top}?", ranked[0], tuple(ranked[1:])),
        Question(f"Who is {bottom}?", ranked[-1], tuple(ranked[:-1])),
    ]
    random.shuffle(questions)
    return Story(" ".join(sentences), tuple(questions))


def _colour(random: Random) -> Story:
    """Three animals, each with a size, a colour and a place."""
    animals = random.sample(ANIMALS, 3)
    colours = random.sample(COLOURS, 4)
    sentences = [
        _tell(
            random,
            (
                "there was a {size} {colour} {animal} in the {place}.",
                "the {animal} in the {place} was {size} and {colour}.",
                "{name} saw a {size} {colour} {animal} near the {place}.",
            ),
            name=random.choice(PEOPLE),
            size=random.choice(SIZES),
            colour=colour,
            animal=animal,
            place=random.choice(PLACES),
        )
        for animal, colour in zip(animals, colours, strict=False)
    ]
    index = random.randrange(3)
    others = tuple(colour for colour in colours if colour != colours[index])
    question = Question(f"What colour is the {animals[index]}?", colours[index], others)
    return Story(" ".join(sentences), (question,))


def _cause(random: Random) -> Story:
    """One thing leads to another, and someone acts on it."""
    cause, state, act = random.choice(CAUSES)
    index = CAUSES.index((cause, state, act))
    elsewhere = CAUSES[index + 1 :] + CAUSES[:index]
    name, friend = random.sample(PEOPLE, 2)
    mood, place = random.choice(MOODS), random.choice(PLACES)
    day = f"One {random.choice(WEATHER)} {random.choice(DAYS)}"
    start = f"{day} {name} and {friend} were in the {place}."
    middle = random.choice(
        (f"{_sentence(cause)}, so {state}.", f"{_sentence(state)} because {cause}.")
    )
    end = f"That is why {name} {act}. {friend} was {mood}."
    questions = random.sample(
        (
            Question(f"{_sentence(state)}. Why?", cause, tuple(other[0] for other in elsewhere)),
            Question(f"{name} {act}. Why?", state, tuple(other[1] for other in elsewhere)),
            Question(f"Who was {mood}?", friend, (name,)),
        ),
        2,
    )
    return Story(f"{start} {middle} {end}", tuple(questions))


def _day(random: Random) -> Story:
    """A diary of two or three days that follow each other: weather, meal, mood."""
    name = random.choice(PEOPLE)
    pronoun = "She" if name in SHE else "He"
    first = random.randrange(7)
    days = [DAYS[(first + offset) % 7] for offset in range(random.choice((2, 3)))]
    meals = random.sample(FOODS, len(days))
    sentences = []
    for day, meal in zip(days, meals, strict=True):
        start = f"On {day}" if day == days[0] else f"The next day was {day} and"
        who = name if day == days[0] else random.choice((name, pronoun))
        sentences.append(f"{start} it was {random.choice(WEATHER)}.")
        sentences.append(f"{who} ate {meal} and was {random.choice(MOODS)}.")
    index = random.randrange(len(days))
    others = tuple(meal for meal in meals if meal != meals[index])
    question = Question(f"What did {name} eat on {days[index]}?", meals[index], others)
    return Story(" ".join(sentences), (question,))


_TELLERS: dict[Kind, Callable[[Random], Story]] = {
    "where": _where,
    "carry": _carry,
    "who": _who,
    "count": _count,
    "compare": _compare,
    "colour": _colour,
    "cause": _cause,
    "day": _day,
}
_SHARES: dict[Kind, int] = {
    "where": 3, "carry": 2, "who": 3, "count": 4, "compare": 4, "colour": 1, "cause": 1, "day": 1
}  # fmt: skip


def _draw(random: Random, kind: Kind, split: Split) -> Story:
    """The next story of this kind that belongs to `split`."""
    while True:
        story = _TELLERS[kind](random)
        if story.split == split:
            return story


def stories(kind: Kind, split: Split) -> Iterator[Story]:
    """All different stories of one kind in one split, for as long as new ones come up."""
    random = Random(f"stories/{split}/{kind}")
    seen: set[str] = set()
    while True:
        story = _draw(random, kind, split)
        if story.text not in seen:
            seen.add(story.text)
            yield story


def pages(split: Split) -> Iterator[str]:
    """Pages of one split without end: stories and their questions, about 150 to 350 tokens each."""
    random = Random(f"pages/{split}")
    kinds = [kind for kind, share in _SHARES.items() for _ in range(share)]
    while True:
        page: list[str] = []
        words = random.randint(125, 225)
        while sum(len(story.split()) for story in page) < words:
            page.append(str(_draw(random, random.choice(kinds), split)))
        yield "\n\n".join(page)


@lru_cache(maxsize=16)
def _first_pages(split: Split, count: int) -> tuple[str, ...]:
    return tuple(islice(pages(split), count))


def rows(split: Split, count: int | None = None) -> list[str]:
    """The first `count` pages of a split, by default all (`ROW_COUNT`); `train` needs a count."""
    if split not in (names := sorted(get_args(Split))):
        raise ValueError(f"unknown split {split!r}. Available: {', '.join(names)}")
    if count is None:
        if split == "train":
            raise ValueError("train has no end: say how many rows, as in rows('train', 1000)")
        count = ROW_COUNT[split]
    return list(_first_pages(split, count))


if __name__ == "__main__":
    print("\n\n----\n\n".join(rows("train", 3)))
