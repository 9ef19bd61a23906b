"""The league: every way to choose blocks, heal and retrain, and published methods, measured.

    python tools/league.py                                   # the embedded model
    python tools/league.py --shared ../shared --minutes 120  # and the real models there
    python tools/league.py --shared ../shared --only gemma3 --model gemma-3-270m.gguf

A tenth to a half of the blocks removed by each criterion and search; as they are, healed without
training, folded into their neighbours, and after 200 steps of LoRA on text and on Alpaca; methods
of width at the same number of parameters. Each shortened model is measured on text that nothing
else saw, some on the seven tasks of Shortened LLaMA. Every number goes into docs/league.json at
once, and what is there is not measured again: `--minutes` ends a sitting. Writes docs/league.md
with its plots, and for SmolLM2 the first table of the README, from the numbers there are.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import shortllm
from shortllm import criteria
from shortllm.checkpoint.source import open_checkpoint
from shortllm.errors import BudgetError, ShortLLMError, UnsupportedModelError
from shortllm.files import write_text
from shortllm.format import spans
from shortllm.reporting.plots import COLOURS, drawn, line_style, mark_heights, standalone

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README_TABLE = ("<!-- smollm2 -->\n", "<!-- end of smollm2 -->\n")
"""What is around the table in the README."""

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
MIDDLE = 0.2
"""The ratio that is measured first, trained, and run on the tasks."""

SINGLE = ("ppl", "kl", "taylor", "magnitude", "influence", "relative", "angular", "lorp")
"""Criteria that score all blocks once, in one walk."""
HEAL_AWARE = "auto, healed"
"""`auto` that judges by what is left after healing."""
SEARCHES = ("auto", HEAL_AWARE, "span", "dp", "greedy", "local", "evolve")
"""Searches: each finds one set, for one number of blocks."""

SEEDS = (1, 2)
"""Other seeds of the samples that blocks are chosen on."""

STEPS, BATCH, ROW, LIMIT = 200, 4, 128, 200


@dataclass(frozen=True)
class Studied:
    """A model, the text it is scored and healed on, and the texts it is measured on."""

    name: str
    title: str
    model: str
    text: str
    held_out: dict[str, str]
    scored: dict[str, Any] = field(default_factory=lambda: {"samples": 160, "length": 128})
    """Samples that blocks are chosen on."""
    measured: dict[str, Any] = field(default_factory=lambda: {"max_segments": 200, "length": 128})
    """Windows that models are measured on."""
    healed: dict[str, Any] = field(default_factory=lambda: {"samples": 64, "length": 256})
    """Samples that models are healed on."""
    dtype: str = "float32"
    data: Path | None = None
    """Local data sets, for tasks and Alpaca."""

    @property
    def settings(self) -> dict[str, Any]:
        """What all numbers of a model have in common."""
        return {
            "scored": self.scored, "measured": self.measured, "healed": self.healed,
            "dtype": self.dtype,
        }  # fmt: skip


def studied_models(shared: Path | None, runs: Path) -> list[Studied]:
    """The embedded model, and those of the shared directory."""
    own = {"its own text": "embedded"}
    models = [Studied("embedded", "the embedded model", "embedded", "embedded", own)]
    if shared is None:
        return models
    data, here = shared / "data", shared / "models"
    books = {"books": str(data / "books" / "valid.jsonl.xz")}
    stories = runs / "stories"
    tell = {"stories": str(stories / "fifth.jsonl")}
    split(data / "stories" / "train.jsonl.gz", stories)
    return [
        real(
            "smollm2",
            "SmolLM2-135M-Instruct",
            here / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf",
            data,
        ),
        *models,
        Studied(
            "books5M", "books5M", str(here / "books5M"), str(data / "books" / "train.jsonl.xz"),
            books,
        ),
        *(
            Studied(name, name, str(here / name), str(stories / "rest.jsonl"), tell)
            for name in ("stories10L", "stories10L-redundant", "stories260K")
        ),
    ]  # fmt: skip


def real(name: str, title: str, model: Path, data: Path) -> Studied:
    """A real model: chosen and healed on C4, measured on other C4 text and on WikiText-2."""
    return Studied(
        name,
        title,
        str(model),
        str(data / "c4" / "train_sample.jsonl.gz"),
        {
            "WikiText-2": str(data / "wikitext2" / "wiki.test.raw"),
            "C4": str(data / "c4" / "heldout_sample.jsonl.gz"),
        },
        scored={"samples": 16, "length": 512},
        measured={"max_segments": 16, "length": 512},
        healed={"samples": 144, "length": 256},
        dtype="bfloat16",
        data=data,
    )


def split(source: Path, target: Path) -> None:
    """Write the rows of a file but every fifth, and every fifth, as files of their own."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        lines = file.readlines()
    parts = {"rest": [line for i, line in enumerate(lines) if i % 5], "fifth": lines[::5]}
    target.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        write_text(target / f"{name}.jsonl", "".join(part))


# ---- how models are made


def removed(one: Studied, blocks: list[int], out: Path) -> None:
    shortllm.prune(one.model, blocks, out, verify=False)


def healed(one: Studied, blocks: list[int], out: Path, **options: Any) -> None:
    short = out.with_name("none")
    removed(one, blocks, short)
    shortllm.heal(str(short), out, data=one.text, dtype=one.dtype, **one.healed, **options)


def trained(one: Studied, blocks: list[int], out: Path, *, heal: bool, alpaca: bool) -> None:
    """200 steps of LoRA on text or on Alpaca, of the removal or of what is healed."""
    if one.data is None:
        raise ShortLLMError("no data to train on")
    short = out.with_name("regression" if heal else "none")
    (partial(healed, method="regression") if heal else removed)(one, blocks, short)
    text = {"data": str(one.data / "alpaca" / "train.jsonl.gz")} if alpaca else {
        "data": one.text, "rows": 1500,
    }  # fmt: skip
    shortllm.retrain(
        str(short), out, max_steps=STEPS, batch=BATCH, length=ROW, held_out=32, eval_every=50,
        report_to=[], dtype=one.dtype, **text,
    )  # fmt: skip


def folded(one: Studied, blocks: list[int], out: Path) -> None:
    """The blocks before the gaps get the differences of those in the gaps."""
    shortllm.merge(one.model, out, blocks=blocks, data=one.text, dtype=one.dtype)


def swept(one: Studied, count: int, out: Path) -> None:
    """LaCo's sweep with the highest threshold at which it folds enough blocks."""
    for threshold in (0.65, 0.45, 0.25, 0.0, -0.5, -1.0):
        try:
            found = shortllm.merge(
                one.model, out, threshold=threshold, remove=count, data=one.text, dtype=one.dtype
            )
        except ShortLLMError:
            continue
        if len(found.removed) == count:
            return
        shutil.rmtree(out)
    raise BudgetError(f"no threshold folds {count} blocks")


def narrowed(one: Studied, count: int, out: Path, *, method: str, repair: bool = False) -> None:
    """Heads and neurons removed, as many parameters as `count` blocks have, or nearly."""
    from shortllm.comparison.width_vs_depth import narrowing_to
    from shortllm.model import Session
    from shortllm.runtime import Runtime

    checkpoint = open_checkpoint(one.model)
    goal = checkpoint.parameters - count * checkpoint.parameters_per_block[0]
    session = Session(Runtime(dtype=one.dtype))
    options = narrowing_to(checkpoint, [method], goal, session)[method]
    given = {name: getattr(options, name) for name in options.model_fields_set - {"calibration"}}
    shortllm.width(
        one.model, out, **given | {"repair": repair}, data=one.text, dtype=one.dtype
    )  # fmt: skip


OF_SETS: dict[str, Callable[[Studied, list[int], Path], None]] = {
    "none": removed,
    "gain": partial(healed, method="gain"),
    "linear": partial(healed, method="linear"),
    "published linear": partial(healed, method="linear", weighting="none"),
    "regression": partial(healed, method="regression"),
    "regression, one block": partial(healed, method="regression", before=1),
    "merge": folded,
    "LoRA on text": partial(trained, heal=False, alpaca=False),
    "LoRA on Alpaca": partial(trained, heal=False, alpaca=True),
    "regression, LoRA on text": partial(trained, heal=True, alpaca=False),
}
"""How a model is made of a set of blocks to remove."""

OF_COUNTS: dict[str, Callable[[Studied, int, Path], None]] = {
    "LaCo": swept,
    "LLM-Pruner": partial(narrowed, method="llm-pruner"),
    "Wanda-sp": partial(narrowed, method="wanda-sp"),
    "FLAP": partial(narrowed, method="flap"),
    "FLAP, repaired": partial(narrowed, method="flap", repair=True),
}
"""Methods that choose by themselves, given how many blocks' parameters to remove."""

UNTRAINED = ("none", "gain", "linear", "regression", "merge")
"""Ways that every set gets."""

TRAINED = ("LoRA on text", "LoRA on Alpaca", "regression, LoRA on text")
"""Ways that train."""

COLUMNS = (
    "none", "gain", "linear", "regression, one block", "regression", "merge", "LoRA on text",
    "LoRA on Alpaca",
)  # fmt: skip
"""Ways in the table of all sets."""


@dataclass(frozen=True)
class Contender:
    """A row of the league: how blocks are chosen, and what is done then."""

    name: str
    chosen: str
    """A criterion or search; empty where the way chooses."""
    way: str


OURS = Contender("`run --criterion auto --heal regression`", HEAL_AWARE, "regression")
LEAGUE = (
    OURS,
    Contender("Shortened LLaMA, PPL", "ppl", "none"),
    Contender("Shortened LLaMA, Taylor+", "taylor", "none"),
    Contender("Shortened LLaMA, Mag+", "magnitude", "none"),
    Contender("SLEB", "greedy", "none"),
    Contender("ShortGPT", "influence", "none"),
    Contender("PruneMe, LLM-Streamline's span", "angular", "none"),
    Contender("EvoPress", "evolve", "none"),
    Contender("LoRP", "lorp", "none"),
    Contender("CLaSp's set", "dp", "none"),
    Contender("Prune&Comp of ShortGPT's blocks", "influence", "gain"),
    Contender("ReplaceMe", "angular", "published linear"),
    *(Contender(name, "", name) for name in OF_COUNTS),
)


# ---- what was measured

Key = tuple[int, list[int] | None, str]
"""How many blocks are gone, which (None where the way chooses), and the way."""
INTACT: Key = (0, [], "none")

Row = dict[str, Any]
"""What was measured of a model."""


class Measured:
    """The numbers there are of one model, and how to measure the others before time is over."""

    def __init__(
        self, one: Studied, found: dict[str, Any], runs: Path, save: Callable[[], None]
    ) -> None:
        self.one, self.found, self.runs, self.save = one, found, runs, save
        if found.get("settings") != one.settings:  # nothing of it can be compared
            found.clear()
            found |= {"settings": one.settings, "sets": {}, "rows": [], "seconds": {}}
            found["blocks"] = open_checkpoint(one.model).block_count

    @property
    def counts(self) -> list[int]:
        """Blocks removed at each ratio."""
        return sorted({int(ratio * self.found["blocks"] + 1e-9) for ratio in RATIOS} - {0})

    @property
    def middle(self) -> int:
        """Blocks removed at the ratio that is measured first."""
        goal = MIDDLE * self.found["blocks"]
        return min(self.counts, key=lambda count: (abs(count - goal), count))

    def set_of(self, name: str, count: int) -> list[int] | None:
        """What a criterion removes; None where it was not asked yet, or has no such removal."""
        return self.found["sets"].get(name, {}).get(str(count))  # type: ignore[no-any-return]

    def row(self, key: Key) -> Row:
        """What was measured of one model so far."""
        for row in self.found["rows"]:
            if (row["count"], row["removed"], row["way"]) == key:
                return row  # type: ignore[no-any-return]
        return dict(zip(("count", "removed", "way"), key, strict=True))

    def key(self, contender: Contender, count: int) -> Key | None:
        """The model of a contender; None where its blocks are not known."""
        if not contender.chosen:
            return count, None, contender.way
        blocks = self.set_of(contender.chosen, count)
        return None if blocks is None else (count, blocks, contender.way)

    def of(self, contender: Contender, count: int) -> Row:
        """What was measured of a contender."""
        key = self.key(contender, count)
        return {} if key is None else self.row(key)

    @property
    def intact(self) -> Row:
        return self.row(INTACT)

    # ---- measuring

    def choose(self, names: tuple[str, ...], counts: list[int]) -> None:
        """What these criteria remove at these budgets, by one scoring."""
        sets = self.found["sets"]
        names = tuple(
            name for name in names if any(str(count) not in sets.get(name, {}) for count in counts)
        )
        if not names:
            return
        start = time.monotonic()
        for name, own in self.chosen(names, counts).items():
            sets.setdefault(name, {}).update(own)
        seconds = round(time.monotonic() - start)
        self.found["seconds"][f"{', '.join(names)}: {', '.join(map(str, counts))}"] = seconds
        self.save()

    def chosen(
        self, names: Iterable[str], counts: list[int], **sampling: Any
    ) -> dict[str, dict[str, list[int] | None]]:
        """What each criterion removes at each budget; None where it has no removal of that size."""
        criteria = {name: name.partition(",")[0] for name in names}
        scores = shortllm.score(
            self.one.model,
            criterion=list(criteria.values()),
            options={criteria[name]: options_of(name, max(counts)) for name in criteria},
            data=self.one.text,
            dtype=self.one.dtype,
            **self.one.scored,
            **sampling,
        )

        def blocks_of(criterion: str, count: int) -> list[int] | None:
            try:
                return sorted(shortllm.plan(scores[criterion], remove=count).removed)
            except BudgetError:
                return None

        return {
            name: {str(count): blocks_of(criterion, count) for count in counts}
            for name, criterion in criteria.items()
        }

    def measure(self, key: Key, *, tasks: bool = False) -> None:
        """Perplexity of a model, or its tasks, unless it is there."""
        row = self.row(key)
        if row not in self.found["rows"]:
            self.found["rows"].append(row)
        if ("tasks" if tasks else "perplexity") in row or "reason" in row:
            return
        start = time.monotonic()
        try:
            path = self.made(row)
        except (BudgetError, UnsupportedModelError) as error:
            row["reason"] = str(error)
            self.save()
            return
        made = time.monotonic()
        row |= self.tasks(path) if tasks else self.perplexity(path)
        seconds = row.setdefault("seconds", {})
        seconds.setdefault("made", round(made - start, 1))
        seconds["tasks" if tasks else "perplexity"] = round(time.monotonic() - made, 1)
        self.save()
        print(self.one.name, json.dumps(row), flush=True)

    def made(self, row: Row) -> str:
        """The checkpoint of a row."""
        if not row["count"]:
            return self.one.model
        blocks, way = row["removed"], row["way"]
        place = f"{way}-{row['count']}" if blocks is None else "-".join(map(str, blocks))
        out = self.runs / self.one.name / place / way.replace(" ", "-")
        if blocks is None:
            OF_COUNTS[way](self.one, row["count"], out)
        else:
            OF_SETS[way](self.one, blocks, out)
        return str(out)

    def evaluated(self, paths: list[str]) -> list[dict[str, Any]]:
        """For each model its perplexity on each text."""
        found = shortllm.evaluate(
            paths, data=list(self.one.held_out.values()), continuations=0, dtype=self.one.dtype,
            **self.one.measured,
        )  # fmt: skip
        return [dict(zip(self.one.held_out, one.perplexity, strict=True)) for one in found.models]

    def perplexity(self, path: str) -> dict[str, Any]:
        [texts] = self.evaluated([path])
        return {"perplexity": {text: one.perplexity for text, one in texts.items()}}

    def compare(self, count: int) -> None:
        """Ours against the best other contender, paired by window."""
        own, other = self.of(OURS, count), self.best_other(count)
        pairs = self.found.setdefault("paired", {})
        if max(loss(own), loss(self.of(other, count))) == math.inf:
            return
        if pairs.get(str(count), {}).get("other") == other.name:
            return
        _, ours = self.evaluated([self.made(self.of(other, count)), self.made(own)])
        found = [one.difference for one in ours.values()]
        pairs[str(count)] = {
            "other": other.name,
            "nll": sum(one.nll for one in found) / len(found),
            "stderr": math.hypot(*(one.stderr or 0.0 for one in found)) / len(found),
        }
        self.save()

    def best_other(self, count: int) -> Contender:
        """The contender next to ours with the lowest perplexity."""
        return min(
            (one for one in LEAGUE if one is not OURS), key=lambda one: loss(self.of(one, count))
        )

    def reseed(self, seed: int) -> None:
        """Ours at the middle budget, with blocks chosen on other samples of the same text."""
        known = self.found.setdefault("seeds", {})
        if str(seed) in known:
            return
        blocks = self.chosen([OURS.chosen], [self.middle], seed=seed)[OURS.chosen][str(self.middle)]
        assert blocks is not None  # searches remove as many as they are asked to
        out = self.runs / self.one.name / f"seed-{seed}" / "regression"
        healed(self.one, blocks, out, method="regression")
        known[str(seed)] = {"removed": blocks} | self.perplexity(str(out))
        self.save()

    def tasks(self, path: str) -> dict[str, Any]:
        """The seven tasks of Shortened LLaMA, their mean, and its standard error."""
        found = shortllm.evaluate(
            [path], data=[next(iter(self.one.held_out.values()))], max_segments=1,
            tasks=["paper"], task_data=self.one.data, limit=LIMIT, continuations=0, batch_size=16,
            dtype=self.one.dtype,
        )  # fmt: skip
        [model] = found.models
        errors = [one.stderr or 0.0 for one in model.zeroshot]
        return {
            "tasks": {one.task: one.score for one in model.zeroshot},
            "tasks_mean": model.zeroshot_mean,
            "tasks_stderr": math.hypot(*errors) / len(errors),
        }

    def speed(self) -> None:
        """Speed of the intact model and of one model of each size, in turn."""
        if "speed" in self.found:
            return
        rows = [self.of(Contender("", "ppl", "none"), count) for count in self.counts]
        found = shortllm.bench(
            [self.one.model, *map(self.made, rows)],
            warmup=2, runs=10, new_tokens=[64], dtype=self.one.dtype,
        )  # fmt: skip
        self.found["speed"] = [
            {
                "removed": count,
                "tokens_per_s": one.tokens_per_s,
                "speedup": found.speedup(one),
                "first_token_s": one.first_token_s,
            }
            for count, one in zip((0, *self.counts), found.measurements, strict=True)
        ]
        self.save()


def options_of(name: str, count: int) -> dict[str, Any]:
    """The options of a criterion that removes `count` blocks by itself."""
    if name in SINGLE:
        return {}
    if name == "greedy":
        return {"rounds": count}
    return {"remove": count} | ({"healing": "regression"} if name == HEAL_AWARE else {})


def work(found: Measured) -> Iterator[Callable[[], None]]:
    """All that can be measured of a model, what says most first."""
    counts = sorted(found.counts, key=lambda count: (abs(count - found.middle), count))
    near, middle = counts[:3], counts[:1]
    trains = found.one.data is not None
    yield partial(found.measure, INTACT)
    yield partial(found.choose, SINGLE, found.counts)
    yield from rows_of(found, SINGLE, ("none",), near)
    for search in ("auto", HEAL_AWARE):
        yield partial(found.choose, (search,), middle)
        yield from rows_of(found, (search,), ("none", "regression"), middle)
    if trains:
        yield from rows_of(found, (HEAL_AWARE, "ppl"), ("regression", *TRAINED), middle)
    yield from rows_of(found, SINGLE, ("regression", "linear"), middle)
    yield from league_rows(found, middle)
    for count in near[1:]:
        for search in ("auto", HEAL_AWARE):
            yield partial(found.choose, (search,), [count])
            yield from rows_of(found, (search,), ("none", "regression"), [count])
    if trains:
        yield from task_rows(found)
    yield from rows_of(found, SINGLE, ("regression", "linear"), near)
    yield found.speed
    if trains:
        yield from rows_of(found, (HEAL_AWARE, "ppl"), TRAINED, near)
    yield from (partial(found.compare, count) for count in near)
    yield from (partial(found.reseed, seed) for seed in SEEDS)
    yield from rows_of(found, SINGLE, UNTRAINED, counts)
    for search in SEARCHES:
        for chosen in [counts] if search == "greedy" else [[count] for count in counts]:
            yield partial(found.choose, (search,), chosen)
            yield from rows_of(found, (search,), UNTRAINED, chosen)
    yield from league_rows(found, counts)
    yield from (partial(found.compare, count) for count in counts)


def rows_of(
    found: Measured, names: Iterable[str], ways: Iterable[str], counts: Iterable[int]
) -> Iterator[Callable[[], None]]:
    """The rows of these criteria; those whose blocks are not known when it is their turn are not
    measured."""
    for count in counts:
        for name in names:
            for way in ways:
                blocks = found.set_of(name, count)
                if blocks is not None:
                    yield partial(found.measure, (count, blocks, way))


def league_rows(found: Measured, counts: Iterable[int]) -> Iterator[Callable[[], None]]:
    """The rows of all contenders."""
    for count in counts:
        for contender in LEAGUE:
            key = found.key(contender, count)
            if key is not None:
                yield partial(found.measure, key)


def task_rows(found: Measured) -> Iterator[Callable[[], None]]:
    """What is run on the tasks: at the middle budget what is healed and trained, and the league."""
    chosen = [
        Contender("", name, way)
        for way in ("none", "regression", *TRAINED)
        for name in ("ppl", HEAL_AWARE)
    ]
    yield partial(found.measure, INTACT, tasks=True)
    for contender in (*chosen, *LEAGUE):
        key = found.key(contender, found.middle)
        if key is not None:
            yield partial(found.measure, key, tasks=True)


# ---- the page

INTRO = """# The league

Every criterion, search and way to heal or retrain that shortllm has, next to the published methods
they come from, on the same models and texts. All of it is computed by this package, from the
papers' definitions: a row named after a paper is its method as we implement it, not the authors'
program.

- All blocks but the first four and last two may be removed. *LaCo* and the methods of width choose
  by themselves; they remove as many parameters as that many blocks have, or nearly.
- `linear` and `regression` are methods of [`shortllm heal`](heal.md), which do not train. *LoRA*:
  {steps} steps of {batch} rows of {row} tokens, of C4 or of Alpaca.
- *regression, one block* changes only the block before each gap (`heal --before 1`).
- *auto, healed* is `auto` that judges by what is left after `regression`, as `run --criterion auto
  --heal regression` does.
- FlattenGPT is [left out](heal.md#left-out-flattening). *Prune&Comp* gets its factor after all
  blocks are chosen, where the paper chooses again after each.
- Tasks: mean of the seven of Shortened LLaMA, first {limit} documents of each, with its standard
  error.
- After ±: the standard error of the difference, over the windows of all texts, paired.
- A cell that is empty was not measured yet.

`python tools/league.py --shared ../shared` writes this page and [league.json](league.json), and
resumes where it stopped.

"""

README_ROWS = (
    ("blocks removed by `ppl`", "ppl", "none"),
    ("`ppl`, healed without training", "ppl", "regression"),
    ("blocks removed by `auto`", "auto", "none"),
    ("`auto`, healed without training", "auto", "regression"),
    ("`auto`, LoRA on text, 200 steps", "auto", "LoRA on text"),
    ("`auto`, LoRA on Alpaca, 200 steps", "auto", "LoRA on Alpaca"),
)
DRAWN = (
    OURS.name, "Shortened LLaMA, PPL", "SLEB", "ShortGPT", "EvoPress", "ReplaceMe", "LaCo", "FLAP",
)  # fmt: skip
"""Contenders that have a line in the plot."""
HIGHEST = 50
"""Times the perplexity of the intact model above which the plot leaves a value out."""


def page(models: list[Measured]) -> str:
    """docs/league.md: a section for each model that something was measured of."""
    text = INTRO.format(steps=STEPS, batch=BATCH, row=ROW, limit=LIMIT)
    return text + "\n".join(line for one in models for line in section(one))


def section(found: Measured) -> list[str]:
    one, settings = found.one, found.one.settings
    scored = f"{settings['scored']['samples']} samples of {settings['scored']['length']} tokens"
    healed = f"{settings['healed']['samples']} of {settings['healed']['length']}"
    measured = (
        f"{settings['measured']['max_segments']} windows of {settings['measured']['length']} tokens"
    )
    texts = " and ".join(one.held_out)
    dequantized = ", dequantized from 4 bits" if one.model.endswith(".gguf") else ""
    return [
        f"## {one.title}",
        "",
        f"{found.found['blocks']} blocks{dequantized}. Chosen on {scored}, healed on "
        f"{healed}; perplexity on {measured} of {texts} that "
        f"nothing else saw, computed in {one.dtype}. Intact: {cell(found, found.intact)}.",
        "",
        f"![Perplexity of {one.title} against the part of the blocks removed]"
        f"(images/league-{one.name}.svg)",
        "",
        f"The plot leaves out what is above {HIGHEST} times the intact perplexity.",
        "",
        *league_table(found),
        "",
        *findings(found),
        "",
        *sets_table(found),
        "",
        *speeds(found),
    ]


def loss(row: Row) -> float:
    """Mean log perplexity over the texts; infinite where it was not measured."""
    values = row.get("perplexity", {}).values()
    return sum(map(math.log, values)) / len(values) if values else math.inf


def cell(found: Measured, row: Row, best: float = -math.inf) -> str:
    """Perplexities on the texts; bold where the row is the best."""
    if "perplexity" not in row:
        return ""
    text = " / ".join(digits(row["perplexity"][name]) for name in found.one.held_out)
    return f"**{text}**" if loss(row) <= best else text


def digits(value: float) -> str:
    """As many digits as tell models apart."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def tasks_cell(row: Row) -> str:
    if "tasks_mean" not in row:
        return ""
    return f"{100 * row['tasks_mean']:.1f} ± {100 * row['tasks_stderr']:.1f}"


def league_table(found: Measured) -> list[str]:
    """A line per contender, the best at the middle budget first."""
    rows = {one: {count: found.of(one, count) for count in found.counts} for one in LEAGUE}
    counts = [n for n in found.counts if any(loss(rows[one][n]) < math.inf for one in LEAGUE)]
    shown = [one for one in LEAGUE if any(loss(row) < math.inf for row in rows[one].values())]
    best = {count: min(loss(rows[one][count]) for one in LEAGUE) for count in counts}
    shown.sort(key=lambda one: loss(rows[one][found.middle]))
    with_tasks = "tasks_mean" in found.intact
    lines = [
        "| | " + " | ".join(f"{count} of {found.found['blocks']}" for count in counts)
        + (f" | tasks, {found.middle} |" if with_tasks else " |"),
        "|---|" + "---:|" * (len(counts) + with_tasks),
        f"| *intact* |{f' {cell(found, found.intact)} |' * len(counts)}"
        + f" {tasks_cell(found.intact)} |" * with_tasks,
    ]  # fmt: skip
    for one in shown:
        cells = [cell(found, rows[one][count], best[count]) for count in counts]
        cells += [tasks_cell(rows[one][found.middle])] * with_tasks
        lines.append(f"| {one.name} | {' | '.join(cells)} |")
    return lines


def sets_table(found: Measured) -> list[str]:
    """A line per removed set, those found by several criteria once, by way to heal or retrain."""
    known = [row for row in found.found["rows"] if row["count"] and "perplexity" in row]
    columns = [way for way in COLUMNS if any(row["way"] == way for row in known)]
    lines = [
        f"| gone | by | blocks | {' | '.join(columns)} |",
        "|---:|---|---|" + "---:|" * len(columns),
    ]
    for count in found.counts:
        here = [row for row in known if row["count"] == count and row["removed"]]
        best = {
            way: min((loss(row) for row in here if row["way"] == way), default=0) for way in columns
        }
        for blocks in sorted({tuple(row["removed"]) for row in here}):
            ways = {row["way"]: row for row in here if tuple(row["removed"]) == blocks}
            by = ", ".join(
                f"`{name}`" if name in criteria.names() else f"*{name}*"
                for name in found.found["sets"] if found.set_of(name, count) == list(blocks)
            )  # fmt: skip
            if by:
                cells = [cell(found, ways.get(way, {}), best[way]) for way in columns]
                lines.append(f"| {count} | {by} | {spans(list(blocks))} | {' | '.join(cells)} |")
    return lines


def findings(found: Measured) -> list[str]:
    """What the numbers say, counted."""

    def losses(names: Iterable[str], count: int, way: str) -> list[float]:
        return [loss(found.of(Contender("", name, way), count)) for name in names]

    known = [row for row in found.found["rows"] if row["count"] and row["removed"]]
    lines = [own_place(found), *seeds(found)]
    for way, other, words in (
        ("regression", "linear", "`linear`"),
        ("regression", "none", "the same sets unhealed"),
        ("linear", "none", "the same sets unhealed"),
        ("regression", "regression, one block", "the same with `--before 1`"),
    ):
        pairs = [
            (row, found.row((row["count"], row["removed"], other)))
            for row in known
            if row["way"] == way
        ]
        ratios = [
            one["perplexity"][text] / two["perplexity"][text]
            for one, two in pairs if "perplexity" in one and "perplexity" in two
            for text in found.one.held_out
        ]  # fmt: skip
        lines += counted(f"`{way}` against {words}", ratios)
    against = [
        ("`auto` against the best single criterion, unhealed", "none", ("auto",), SINGLE),
        (f"Healed, the choice of *{HEAL_AWARE}* against that of `auto`", "regression",
         (HEAL_AWARE,), ("auto",)),
    ]  # fmt: skip
    for words, way, one, others in against:
        both = [
            (losses(one, count, way)[0], min(losses(others, count, way))) for count in found.counts
        ]
        lines += counted(words, [math.exp(a - b) for a, b in both if max(a, b) < math.inf])
    return lines


def own_place(found: Measured) -> str:
    """Where `run --criterion auto --heal regression` ended at each budget."""
    places = []
    for count in found.counts:
        own = loss(found.of(OURS, count))
        others = [loss(found.of(one, count)) for one in LEAGUE if one is not OURS]
        if own < math.inf and min(others) < math.inf:
            place = 1 + sum(one < own for one in others)
            behind = math.expm1(own - min(others))
            other = found.best_other(count).name
            paired = found.found.get("paired", {}).get(str(count), {})
            error = f" ± {100 * paired['stderr']:.1f}" if paired.get("other") == other else ""
            places.append(
                f"place {place} at {count} of {found.found['blocks']} "
                f"({100 * behind:+.1f}{error} % against {other})"
            )
    return f"- {OURS.name}: {', '.join(places)}." if places else ""


def seeds(found: Measured) -> list[str]:
    """Where it ended with other samples."""
    rows = list(found.found.get("seeds", {}).values())
    if not rows:
        return []
    ends = " and ".join(f"{spans(row['removed'])}: {cell(found, row)}" for row in rows)
    own = found.of(OURS, found.middle)
    return [
        f"- Chosen on samples of {len(rows)} other seeds, without {ends}; in the "
        f"table without {spans(own['removed'])}: {cell(found, own)}."
    ]


def counted(what: str, ratios: list[float]) -> list[str]:
    """A line about perplexities relative to others."""
    if not ratios:
        return []
    lower, worse = sum(one < 1 for one in ratios), sum(one > 1.01 for one in ratios)
    return [
        f"- {what}: lower in {lower} of {len(ratios)}, more than 1 % higher in {worse}; between "
        f"{min(ratios) - 1:+.1%} and {max(ratios) - 1:+.1%}."
    ]


def speeds(found: Measured) -> list[str]:
    if "speed" not in found.found:
        return []
    lines = [
        "| 64 tokens generated | tokens/s | times as fast | first token |",
        "|---|---:|---:|---:|",
    ]
    return [*lines, *(
        f"| {one['removed'] or 'none'} removed | {one['tokens_per_s']:.1f} | "
        f"{one['speedup']:.2f} | {1000 * one['first_token_s']:.0f} ms |"
        for one in found.found["speed"]
    ), ""]  # fmt: skip


def plot(found: Measured) -> str:
    """A plot per text, a line per contender."""
    texts = list(found.one.held_out)
    drawn_ones = [one for one in LEAGUE if one.name in DRAWN]

    def draw(grid: Any) -> None:
        for j, text in enumerate(texts):
            axes = grid[0][j]
            for place, one in enumerate(drawn_ones):
                rows = [(0, found.intact)] + [(n, found.of(one, n)) for n in found.counts]
                highest = HIGHEST * found.intact["perplexity"][text]
                points = [
                    (100 * count / found.found["blocks"], row["perplexity"][text])
                    for count, row in rows
                    if "perplexity" in row and row["perplexity"][text] <= highest
                ]  # fmt: skip
                if len(points) > 1:
                    name = one.name.strip("`")
                    axes.plot(*zip(*points, strict=True), label=name, **line_style(place))
            axes.set_yscale("log")
            mark_heights(axes, 1.0)
            axes.set_title(text, color=COLOURS["ink"], fontsize=9)
            axes.set_xlabel("% of the blocks removed", color=COLOURS["muted"])
        grid[0][0].set_ylabel("perplexity", color=COLOURS["ink"])
        grid[0][0].figure.legend(
            *grid[0][0].get_legend_handles_labels(), loc="outside upper center",
            frameon=False, ncols=4, labelcolor=COLOURS["ink"],
        )  # fmt: skip

    alt = f"Perplexity of {found.one.title} against the part of the blocks removed, by method."
    return standalone(drawn(draw, size=(10.5, 4.0), alt=alt, grid=(1, len(texts))))


def write_readme(found: Measured) -> None:
    """The first table of the README: what is left at the budgets that are measured that far."""
    rows = [
        (words, {n: found.of(Contender("", name, way), n) for n in found.counts})
        for words, name, way in README_ROWS
    ]
    of_auto = [own for words, own in rows if words.startswith("`auto`, healed")]
    counts = [n for n in found.counts if all(loss(own[n]) < math.inf for own in of_auto)]
    heading = " | ".join(
        f"{count} removed ({count / found.found['blocks']:.0%})" for count in counts
    )
    lines = [f"| | {heading} |", "|---|" + "---:|" * len(counts)]
    for words, own in rows:
        cells = [cell(found, own[count]) for count in counts]
        if any(cells):
            lines.append(f"| {words} | {' | '.join(cells)} |")
    path, (start, end) = ROOT / "README.md", README_TABLE
    before, _, rest = path.read_text().partition(start)
    _, _, after = rest.partition(end)
    write_text(path, before + start + "\n".join(lines) + "\n" + end + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, help="directory with models/ and data/")
    parser.add_argument("--runs", type=Path, default=Path("runs/league"))
    parser.add_argument("--only", help="measure this model alone")
    parser.add_argument("--model", type=Path, help="file or directory of a model that --only names")
    parser.add_argument("--minutes", type=float, default=1e6, help="start nothing after so long")
    given = parser.parse_args()
    logging.getLogger("shortllm").setLevel(logging.ERROR)
    end = time.monotonic() + 60 * given.minutes
    path = DOCS / "league.json"
    numbers: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def save() -> None:
        write_text(path, json.dumps(numbers, indent=1) + "\n")

    models = studied_models(given.shared, given.runs)
    if given.model is not None:
        if given.only is None or given.shared is None:
            parser.error("--model needs --only NAME and --shared")
        models.append(real(given.only, given.only, given.model, given.shared / "data"))
    measured = [
        Measured(one, numbers.setdefault(one.name, {}), given.runs, save) for one in models
    ]  # fmt: skip
    for found in measured:
        if given.only in (None, found.one.name):
            for measure in work(found):
                if time.monotonic() > end:
                    break
                measure()
    shown = [found for found in measured if "perplexity" in found.intact]
    for found in shown:
        write_text(DOCS / "images" / f"league-{found.one.name}.svg", plot(found))
        if found.one.name == "smollm2":
            write_readme(found)
    write_text(DOCS / "league.md", page(shown).rstrip() + "\n")


if __name__ == "__main__":
    main()
