"""Multiple-choice items of tasks, as rows of token ids that any number of shortened models answer
in the same walks.

A row is a question with one of its choices. The harness makes the prompts, splits a row into
prompt and choice, and says what is right by the log-likelihoods of an item's rows; they come from
the walk, where the harness would run each model on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, zip_longest
from typing import TYPE_CHECKING, Any

from shortllm.checkpoint.config import context_length
from shortllm.checkpoint.hub import EMBEDDED
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.errors import ShortLLMError
from shortllm.evaluation.harness import token_pairs
from shortllm.evaluation.options import EvaluationOptions
from shortllm.evaluation.task_names import DEFAULT_ITEMS, METRICS, task_names
from shortllm.evaluation.tasks import SHOT_SEED, load_tasks, quiet_harness, require_harness
from shortllm.files import fingerprint

if TYPE_CHECKING:
    from torch import Tensor

RULES = ("acc", "acc_norm")
"""Metrics by which an item is right or wrong."""

ROWS_TOGETHER = 16
"""Rows of similar length that walk together where all blocks are in memory."""

CERTAIN = 1e9
"""Stands for minus infinity when the right choices are determined."""


@dataclass(frozen=True, eq=False)
class Item:
    """One question."""

    task: Any
    """Of the harness."""
    metric: str
    doc: Any
    rows: list[list[int]]
    """Token ids of the question with each choice."""
    counts: list[int]
    """How many of the last tokens of each row are the choice."""

    def right(self, logprobs: Sequence[float]) -> float:
        """1 if the choice that these log-likelihoods prefer is right, else 0."""
        results = [(one, False) for one in logprobs]
        return float(self.task.process_results(self.doc, results)[self.metric])

    @cached_property
    def choices(self) -> list[str]:
        """The texts of the choices."""
        return list(self.task.doc_to_choice(self.doc))

    @cached_property
    def gold(self) -> set[int]:
        """The choices that are right."""
        count = len(self.rows)
        alone = [[-CERTAIN * (c != n) for c in range(count)] for n in range(len(self.choices))]
        return {n for n, logprobs in enumerate(alone) if self.right(logprobs)}

    def margin(self, logprobs: Sequence[float]) -> float:
        """Log-likelihood of the best right choice above that of the best wrong one, nats; per
        character where the metric is."""
        lengths = [len(one) if self.metric == "acc_norm" else 1 for one in self.choices]
        values = [one / max(1, n) for one, n in zip(logprobs, lengths, strict=False)]
        wrong = [value for n, value in enumerate(values) if n not in self.gold]
        return max(values[n] for n in self.gold) - max(wrong) if self.gold and wrong else 0.0


@dataclass(frozen=True, eq=False)
class Items:
    """The items of some tasks, the first of each task, then the second of each, and so on."""

    items: list[Item]

    @property
    def fingerprint(self) -> str:
        """Of everything that answers depend on, except the model."""
        version = require_harness()
        asked = [
            [one.metric, one.rows, one.counts, one.choices, sorted(one.gold)] for one in self.items
        ]
        return fingerprint([version, asked])

    def share(self, rank: int, count: int, stop: int | None = None) -> Items:
        """The items of one of several processes, of the first `stop`."""
        return Items(self.items[:stop][rank::count])

    @cached_property
    def order(self) -> list[int]:
        """All rows by their length, numbered item after item."""
        rows = self.rows
        return sorted(range(len(rows)), key=lambda n: len(rows[n]))

    @cached_property
    def rows(self) -> list[list[int]]:
        """The rows of all items."""
        return [row for item in self.items for row in item.rows]

    def batches(self, streamed: bool) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """The numbers of rows of similar length, their ids with zeros after them, and which of the
        tokens are the choice; all rows at once where blocks are `streamed`."""
        import torch

        counts = [count for item in self.items for count in item.counts]
        size = max(1, len(self.rows)) if streamed else ROWS_TOGETHER
        for start in range(0, len(self.rows), size):
            numbers = self.order[start : start + size]
            longest = len(self.rows[numbers[-1]])
            ids_RT = torch.zeros(len(numbers), longest, dtype=torch.int64)
            counted_RT = torch.zeros(len(numbers), longest, dtype=torch.bool)
            for place, number in enumerate(numbers):
                row = self.rows[number]
                ids_RT[place, : len(row)] = torch.tensor(row)
                counted_RT[place, len(row) - counts[number] : len(row)] = True
            yield numbers, ids_RT, counted_RT

    def answered(self, logprob_R: Sequence[float]) -> tuple[Tensor, Tensor]:
        """By the log-likelihood of each row whether each item is right, 1 or 0, and its margin."""
        import torch

        right, margin = [], []
        place = 0
        for item in self.items:
            own = logprob_R[place : place + len(item.rows)]
            place += len(item.rows)
            right.append(item.right(own))
            margin.append(item.margin(own))
        return torch.tensor(right).double(), torch.tensor(margin).double()


def load_items(checkpoint: Checkpoint, tasks: str | None, count: int) -> Items:
    """The last `count` documents of each task as items for a model, the tasks in turn, so that the
    first items are of all of them.

    Raises:
        ShortLLMError: a task that is unknown, or without choices.
    """
    names = tasks or ("embedded" if checkpoint.id == EMBEDDED else DEFAULT_ITEMS)
    tokenizer = load_tokenizer(checkpoint)
    positions = context_length(checkpoint.config)
    by_task: list[list[Item]] = []
    for name, task in _loaded(names).items():
        metric = METRICS.get(name) or next(iter(task.aggregation()), "")
        if task.OUTPUT_TYPE != "multiple_choice" or metric not in RULES:
            raise ShortLLMError(
                f"task '{name}' has no choices of which one is right, so blocks cannot be scored "
                f"by it. Name tasks whose metric is {' or '.join(RULES)}, such as {DEFAULT_ITEMS}"
            )
        documents = len(list(task.eval_docs))
        with quiet_harness():
            task.set_fewshot_seed(seed=SHOT_SEED)
            task.build_all_requests(samples=list(range(max(0, documents - count), documents)))
        by_task.append([])
        for _, group in groupby(task.instances, key=lambda one: one.doc_id):
            requests = list(group)
            pairs = token_pairs(tokenizer, requests)
            # long rows are truncated on the left, to one token less than in the harness, which does
            # not feed the last one
            rows = [[*prompt, *choice][-(positions or 0) :] for prompt, choice in pairs]
            counts = [
                min(len(choice), len(row) - 1) for (_, choice), row in zip(pairs, rows, strict=True)
            ]
            by_task[-1].append(Item(task, metric, requests[0].doc, rows, counts))
    return Items([item for turn in zip_longest(*by_task) for item in turn if item is not None])


@lru_cache(maxsize=4)
def _loaded(names: str) -> dict[str, Any]:
    named = task_names(names.split(","))
    return dict(load_tasks(EvaluationOptions(tasks=named)).loaded["tasks"])
