"""Evaluation shared by processes: the numbers of one process, however the shares come out."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, opened, token_ids
from test_scoring import TORCHRUN, call

import shortllm
from shortllm.data.rows import Rows
from shortllm.errors import ShortLLMError
from shortllm.evaluation.harness import shared_answers
from shortllm.evaluation.options import Evaluation, EvaluationOptions
from shortllm.evaluation.texts import EvaluationText, Segments, measure_perplexity
from shortllm.model import Session
from shortllm.runtime import Ranks

TASKS = ["shortllm_where", "shortllm_count"]


@dataclass(frozen=True)
class Threads(Ranks):
    """Processes that are threads of this one: what is sent must come from every one of them."""

    place: list[Any] = field(default_factory=list)
    meeting: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def gather(self, own: Any) -> list[Any]:
        self.place[self.rank] = own
        self.meeting.wait(timeout=60)
        found = list(self.place)
        self.meeting.wait(timeout=60)
        return found

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.copy_(torch.stack(self.gather(tensor.clone())).sum(0))


def together(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returns, or raises, in each of `count` processes."""
    found: list[Any] = [None] * count
    shared = Threads(0, count, [None] * count, threading.Barrier(count))

    def run(rank: int) -> None:
        try:
            found[rank] = work(replace(shared, rank=rank))
        except ShortLLMError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


# ------------------------------------------------------------------ shares


@pytest.mark.parametrize("samples", [0, 1, 5, 6])
def test_every_sample_is_of_one_process(samples: int) -> None:
    shares = [Ranks(rank, 3).share(torch.arange(samples)) for rank in range(3)]
    assert torch.cat(shares).sort().values.tolist() == list(range(samples))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("segments, processes", [(5, 2), (2, 3), (1, 2)])
def test_perplexity_of_shares_is_that_of_the_whole(segments: int, processes: int) -> None:
    ids_ST = token_ids(segments)
    text = EvaluationText(
        rows=Rows.of("text", ["a"]),
        held_out=False,
        segments=Segments(ids=ids_ST, bos="none"),
    )
    decoders = [Session(device="cpu").decoder(opened("qwen3")) for _ in range(processes)]
    logits_STV = build("qwen3")(input_ids=ids_ST).logits
    expected = torch.nn.functional.cross_entropy(
        logits_STV[:, :-1].flatten(0, 1), ids_ST[:, 1:].flatten()
    ).item()
    found = together(
        processes, lambda ranks: measure_perplexity(decoders[ranks.rank], text, ranks=ranks)
    )
    for one in found:
        assert one.nll == pytest.approx(expected, rel=1e-6)
        assert (one.segments, one.predictions) == (segments, segments * (ids_ST.shape[1] - 1))


@dataclass
class Request:
    """One of the harness, as far as it matters here."""

    task_name: str
    doc_id: int
    text: str

    @property
    def args(self) -> tuple[str]:
        return (self.text,)


def requests(documents: int) -> list[Request]:
    """Three choices of each document of one task, a single one of another task's."""
    choices = [Request("a", i, f"a{i}{letter}") for i in range(documents) for letter in "xyz"]
    return choices + [Request("b", i, f"b{i}") for i in range(documents)]


@pytest.mark.parametrize("documents, processes", [(5, 2), (1, 3), (4, 1)])
def test_answers_come_in_the_order_of_the_requests(documents: int, processes: int) -> None:
    pytest.importorskip("lm_eval")
    asked: list[set[tuple[str, int]]] = [set() for _ in range(processes)]
    counted = [0] * processes

    def work(ranks: Ranks) -> list[str]:
        def answer(own: list[Any]) -> list[str]:
            asked[ranks.rank] = {(one.task_name, one.doc_id) for one in own}
            counted[ranks.rank] = len(own)
            return [one.text.upper() for one in own]

        every: list[Any] = list(requests(documents))
        return shared_answers(answer, every, ranks)

    expected = [one.text.upper() for one in requests(documents)]
    assert together(processes, work) == [expected] * processes
    assert sum(counted) == len(expected)
    # a document is of one process, and each has as many as the others
    assert sum(map(len, asked)) == 2 * documents
    assert max(map(len, asked)) - min(map(len, asked)) <= 1


def test_questions_that_each_process_draws_are_refused() -> None:
    def work(ranks: Ranks) -> list[str]:
        drawn: list[Any] = [*requests(3), Request("c", 0, f"c{ranks.rank}")]
        return shared_answers(lambda own: [one.text for one in own], drawn, ranks)

    for error in together(2, work):
        assert isinstance(error, ShortLLMError)
        assert str(error).startswith("c: each process draws other questions or choices")
    assert len(together(1, work)[0]) == 13


# ------------------------------------------------------------------ processes


def arguments(out: Path, segments: int, documents: int) -> list[object]:
    return [
        "eval", "embedded", "--data", "embedded", "--max-segments", segments, "--continuations", 2,
        "--new-tokens", 8, "--tasks", ",".join(TASKS), "--limit", documents, "--device", "cpu",
        "--out", out / "eval.json",
    ]  # fmt: skip


def without_loss(evaluation: Evaluation) -> dict[str, Any]:
    """All of it but what rounding may change."""
    return evaluation.model_dump(
        exclude={"models": {0: {"perplexity": {0: {"nll", "perplexity"}}}}}
    )


@pytest.mark.slow
@pytest.mark.parametrize("segments, documents", [(5, 7), (1, 1)])
def test_two_processes_evaluate_as_one(segments: int, documents: int, tmp_path: Path) -> None:
    """Shares of different size, and a process that has none."""
    pytest.importorskip("lm_eval")
    one = shortllm.evaluate(
        "embedded",
        options=EvaluationOptions(
            data=["embedded"], max_segments=segments, continuations=2, new_tokens=8, tasks=TASKS,
            limit=documents,
        ),
        device="cpu",
        out=tmp_path / "one" / "eval.json",
    )  # fmt: skip
    done = call(*arguments(tmp_path / "two", segments, documents), launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shortllm_where") == 1  # one process speaks
    two = Evaluation.load(tmp_path / "two" / "eval.json")
    assert without_loss(two) == without_loss(one)
    nlls = [found.models[0].perplexity[0].nll for found in (two, one)]
    assert nlls[0] == pytest.approx(nlls[1], rel=1e-6)
    tables = [(tmp_path / name / "zeroshot.csv").read_bytes() for name in ("two", "one")]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(tmp_path: Path) -> None:
    """The others wait for its share, until the launcher ends them."""
    script = tmp_path / "one_fails.py"
    script.write_text(
        "import os\n"
        "from shortllm.cli import main\n"
        "from shortllm.errors import CheckpointError\n"
        "from shortllm.evaluation import evaluate\n"
        "def fail(*arguments, **options):\n"
        "    raise CheckpointError('this share cannot be measured')\n"
        "if os.environ['RANK'] == '1':\n"
        "    evaluate.measure_perplexity = fail\n"
        "main()\n"
    )
    command = [sys.executable, *TORCHRUN, script, *map(str, arguments(tmp_path, 2, 2))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "error: this share cannot be measured" in done.stderr
    assert not (tmp_path / "eval.json").exists()
