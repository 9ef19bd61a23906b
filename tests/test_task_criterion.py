"""The criterion `task`: accuracies equal those of lm-evaluation-harness, alone and in searches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import shortllm
from shortllm.checkpoint.source import open_checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.cli import main
from shortllm.criteria import resolve
from shortllm.criteria.task import accuracy_lost, mistakes
from shortllm.errors import ShortLLMError
from shortllm.evaluation.choices import load_items
from shortllm.evaluation.harness import harness_model
from shortllm.evaluation.options import EvaluationOptions
from shortllm.evaluation.task_names import METRICS
from shortllm.evaluation.tasks import load_tasks, quiet_harness
from shortllm.model import Session
from shortllm.pruning.score import scores_fingerprint
from shortllm.runtime import ALONE, Runtime, ScoringRuntime

pytest.importorskip("lm_eval")


def by_the_harness(
    model: str, tasks: list[str], items: int, removals: list[list[int]], dtype: str = "float32"
) -> list[float]:
    """Mean accuracy on the last items of tasks of the model without some blocks."""
    from lm_eval.evaluator import evaluate

    session, checkpoint = Session(Runtime(dtype=dtype)), open_checkpoint(model)
    decoder, loaded = session.decoder(checkpoint), load_tasks(EvaluationOptions(tasks=tasks)).loaded
    counts = {name: len(list(task.eval_docs)) for name, task in loaded["tasks"].items()}
    samples = {name: list(range(count - items, count)) for name, count in counts.items()}
    found = []
    for removed in removals:
        lm = harness_model(
            decoder.model, load_tokenizer(checkpoint), 16, kinds=1, ranks=ALONE,
            advance=lambda work: None,
        )  # fmt: skip
        with decoder.without(removed), quiet_harness():
            results = evaluate(lm=lm, task_dict=loaded, samples=samples, log_samples=False)
        metrics = {name: f"{METRICS.get(name, 'acc')},none" for name in counts}
        scores = [results["results"][name][metric] for name, metric in metrics.items()]
        found.append(sum(scores) / len(scores))
    return found


def test_accuracies_are_those_of_the_harness() -> None:
    names, items = ["shortllm_where", "shortllm_why"], 12
    scores = shortllm.score(
        "embedded", criterion="task", options={"task": {"tasks": ",".join(names), "items": items}}
    )
    blocks = [0, 3, 7, 11]
    found = by_the_harness("embedded", names, items, [[], *([b] for b in blocks)])
    assert [scores.intact, *(scores.values[b] for b in blocks)] == pytest.approx(found, abs=1e-9)
    assert len(set(scores.values)) > 2
    for b in range(12):
        assert scores.intact is not None and scores.stderr is not None
        tie = scores.importance[b] - (scores.intact - scores.values[b])
        assert 0 < tie < 1 / (2 * items)
        assert scores.samples is not None and len(scores.samples[b]) == 2 * items


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.shared
def test_accuracies_are_those_of_the_harness_on_a_real_model(
    shared: Path, smollm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHORTLLM_DATA", str(shared / "data"))
    names, items = ["arc_easy", "piqa", "winogrande", "hellaswag"], 8
    scores = shortllm.score(
        str(smollm), criterion="task", dtype="float32",
        options={"task": {"tasks": ",".join(names), "items": items}},
    )  # fmt: skip
    blocks = [5, 20]
    found = by_the_harness(str(smollm), names, items, [[], *([b] for b in blocks)])
    assert [scores.intact, *(scores.values[b] for b in blocks)] == pytest.approx(found, abs=1e-9)


def test_ties_weigh_less_than_an_item() -> None:
    right = torch.tensor([1.0, 0.0, 1.0]).double()
    sure, unsure = torch.tensor([9.0, -1.0, 5.0]).double(), torch.tensor([0.1, -9.0, 0.1]).double()
    assert mistakes(right, sure).mean() < mistakes(right, unsure).mean()
    fewer = torch.tensor([1.0, 1.0, 1.0]).double()
    assert (
        mistakes(fewer, -1e6 * torch.ones(3)).mean() < mistakes(right, 1e6 * torch.ones(3)).mean()
    )
    # models with the same answers differ in each item, so that their difference has an error
    assert (mistakes(right, sure) - mistakes(right, unsure)).unique().numel() > 1
    lost = accuracy_lost(right, sure, fewer).mean().item()
    assert 1 / 3 < lost < 2 / 3


def test_rows_are_padded_and_mistaken_tasks_are_named() -> None:
    checkpoint = open_checkpoint("embedded")
    asked = load_items(checkpoint, "shortllm_where", 3)
    rows = {
        number: (ids[: len(asked.rows[number])].tolist(), int(counted.sum()))
        for streamed in (True,)
        for numbers, ids_RT, counted_RT in asked.batches(streamed)
        for number, ids, counted in zip(numbers, ids_RT, counted_RT, strict=True)
    }
    counts = [count for item in asked.items for count in item.counts]
    assert [rows[n] for n in range(len(rows))] == list(zip(asked.rows, counts, strict=True))
    assert asked.items[0].right([0.0, -1.0, -1.0, -1.0]) == float(0 in asked.items[0].gold)
    with pytest.raises(ShortLLMError, match="unknown task 'arc_esy'. Did you mean 'arc_easy'"):
        load_items(checkpoint, "arc_esy", 3)


def test_tasks_come_in_turn_and_right_answers_are_in_the_fingerprint() -> None:
    asked = load_items(open_checkpoint("embedded"), "shortllm_where,shortllm_why", 3)
    assert len({one.task.config.task for one in asked.items[::2]}) == 1
    assert len({one.task.config.task for one in asked.items[:2]}) == 2
    before = asked.fingerprint
    vars(asked.items[0])["gold"] = {max(asked.items[0].gold) + 1}
    assert asked.fingerprint != before


def test_greedy_and_local_search_by_items() -> None:
    asked: dict[str, Any] = {"tasks": "shortllm_where", "items": 12}
    once = shortllm.score("embedded", criterion="task", options={"task": asked})
    options = {"inner": "task", "rounds": 2, **asked}
    greedy = shortllm.score("embedded", criterion="greedy", options={"greedy": options})
    free = range(3, 10)
    assert greedy.order is not None
    assert greedy.order[0] == min(free, key=lambda b: (once.importance[b], -b))
    local = shortllm.score(
        "embedded", criterion="local", samples=4, length=32,
        options={"local": {"fitness": "task", "remove": 2, "start": "ppl", **asked}},
    )  # fmt: skip
    assert local.search is not None and local.search.fitness == "task"
    [without] = by_the_harness("embedded", ["shortllm_where"], 12, [local.search.found.removed])
    assert local.search.found.value is not None
    assert 0 < local.search.found.value - (1 - without) < 1 / 12


def test_scores_by_items_depend_on_the_attention() -> None:
    checkpoint = open_checkpoint("embedded")
    asked = resolve("task", {"tasks": "shortllm_why", "items": 1})
    eager, other = (
        scores_fingerprint(checkpoint, asked, None, Session(ScoringRuntime(attention=kernel)))
        for kernel in ("eager", "sdpa")
    )
    assert eager != other


def test_a_streamed_model_answers_alike() -> None:
    asked = {"task": {"tasks": "shortllm_why", "items": 4}}
    plain, streamed = (
        shortllm.score("embedded", criterion="task", options=asked, stream=stream)
        for stream in (False, True)
    )
    assert streamed.values == plain.values
    assert streamed.importance == pytest.approx(plain.importance, abs=1e-6)


def test_the_command_names_unknown_tasks_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--criterion", "task", "--option", "task.tasks=arc_esy"]
    with pytest.raises(SystemExit) as ended:
        main(["score", *asked, "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "Did you mean 'arc_easy'" in capsys.readouterr().err
