"""The probe: right exercises, scores against a plain loop, repetition, tasks, report."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import load
from test_cli import call
from test_evaluation_processes import together
from transformers import AutoTokenizer

import shortllm
from shortllm.checkpoint.source import open_checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.embedded import MODEL_DIR
from shortllm.errors import ShortLLMError
from shortllm.evaluation.evaluate import evaluation_fingerprint
from shortllm.evaluation.options import EvaluatedModel, Evaluation, EvaluationOptions
from shortllm.evaluation.probe import measure
from shortllm.evaluation.probe.items import (
    CAPABILITIES,
    CHOICES,
    FORMATS,
    ITEMS,
    OPEN,
    Item,
    items,
)
from shortllm.evaluation.probe.measure import (
    distinct_share,
    measure_probe,
    repeated_share,
    rows_of,
    with_probe,
)
from shortllm.evaluation.probe.record import Change, Probe, Share, changes
from shortllm.model import Session
from shortllm.reporting.probe import probe_plot, probe_sentence, probe_table
from shortllm.runtime import ALONE, Ranks, Runtime

FACTS = re.compile(r"(\w+) is (\d+) and lives in (\w+) ->")
FEW = 3
"""Exercises of each capability where a small model is measured."""


def last_line(item: Item) -> str:
    return item.prompt.rpartition("\n")[2]


def answer_to(item: Item) -> str:
    """The right answer, found by other means than the generator's."""
    line = last_line(item)
    if item.capability == "copying":
        return line.removeprefix("Copy: ").removesuffix(" ->")
    if item.capability == "brackets":
        text, closed = line.removesuffix(" |").replace(" ", ""), ""
        while text:  # whatever closes the last open bracket makes a pair that can go
            closed += {"(": ")", "[": "]", "{": "}", "<": ">"}[text[-1]]
            text = text[:-1]
        return " ".join(closed)
    if item.capability in ("addition", "subtraction"):
        return str(eval(line.removesuffix("=")))
    if item.capability == "chains":
        statements, _, asked = line.removesuffix(" =").partition(", so ")
        values: dict[str, Any] = {}
        exec(statements.replace(", ", "\n"), {}, values)
        return str(values[asked])
    if item.capability == "sorting":
        digits = line.removeprefix("Sort: ").removesuffix(" ->").split()
        return " ".join(sorted(digits, key=int))
    if item.capability == "recall":
        return next(one for one in item.prompt.splitlines() if one.startswith(line))[
            len(line) + 1 :
        ]
    name, age, place = FACTS.findall(item.prompt)[-1]
    (form,) = [
        form
        for form in FORMATS
        if all(
            f"{person} is {years} and lives in {town} -> {form(person, town, years)}\n"
            in item.prompt
            for person, years, town in FACTS.findall(item.prompt)[:-1]
        )
    ]
    return form(name, place, age)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_exercises_are_right_different_and_balanced(capability: str) -> None:
    found = [item for item in items() if item.capability == capability]
    assert len(found) == ITEMS
    for item in found:
        assert item.choices[item.answer] == f" {answer_to(item)}\n"
        assert len(set(item.choices)) == CHOICES
        assert len({len(choice.split(" ")) for choice in item.choices}) == 1
    assert len({item.prompt for item in found}) == ITEMS
    assert set(Counter(item.answer for item in found).values()) == {ITEMS // CHOICES}
    # the shortest choice is not the right one more often than by chance allows
    shortest = [len(item.choices[item.answer]) == min(map(len, item.choices)) for item in found]
    longest = [len(item.choices[item.answer]) == max(map(len, item.choices)) for item in found]
    assert sum(shortest) > 0 and sum(longest) > 0


def test_the_exercises_cover_what_they_claim() -> None:
    by_name = {name: [i for i in items() if i.capability == name] for name in CAPABILITIES}
    digits = {len(answer_to(item)) for item in by_name["addition"]}
    assert digits == {1, 2, 3, 4}
    carried = [
        item
        for item in by_name["addition"]
        if sum(int(number[-1]) for number in re.findall(r"\d+", last_line(item))) > 9
    ]
    assert len(carried) > ITEMS / 4
    assert {last_line(item).count(" = ") for item in by_name["chains"]} == {3, 4, 5}
    distances = [item.prompt.count("\n") for item in by_name["recall"]]
    assert min(distances) <= 4 and max(distances) >= 15


def test_the_exercises_are_the_same_everywhere() -> None:
    # change VERSION with this, so that results of other exercises are not compared
    assert shortllm.evaluation.probe.items.items_fingerprint().startswith("eb50538db1c85fec")


# ---- measuring


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[Item]:
    """The first exercises of each capability, in the place of all."""
    chosen = [
        item
        for name in CAPABILITIES
        for item in [one for one in items() if one.capability == name][:FEW]
    ]
    monkeypatch.setattr(measure, "items", lambda: tuple(chosen))
    monkeypatch.setattr(measure, "NEW_TOKENS", 12)
    return chosen


def prober(model: str | Path = MODEL_DIR, **runtime: Any) -> Callable[[Ranks], Probe]:
    """Measures a model that is loaded once: threads must not load models at the same time."""
    session = Session(Runtime(device="cpu", **runtime))
    checkpoint = open_checkpoint(model)
    decoder, tokenizer = session.decoder(checkpoint), load_tokenizer(checkpoint)
    return lambda ranks: measure_probe(decoder, tokenizer, name="it", session=session, ranks=ranks)


def probe(model: str | Path = MODEL_DIR, **runtime: Any) -> Probe:
    return prober(model, **runtime)(ALONE)


def outcomes(found: Probe) -> list[tuple[str, str]]:
    return [(one.written.outcomes, one.chosen.outcomes) for one in found.capabilities]


@torch.no_grad()
def test_scores_equal_a_plain_loop(few: list[Item]) -> None:
    model, tokenizer = load(MODEL_DIR), AutoTokenizer.from_pretrained(MODEL_DIR)
    expected = []
    for item in few:
        prompt = tokenizer(item.prompt, return_tensors="pt").input_ids
        losses = []
        for choice in item.choices:
            ids = tokenizer(item.prompt + choice, return_tensors="pt").input_ids
            logits = model(input_ids=ids).logits[0].log_softmax(-1)
            places = range(prompt.shape[1], ids.shape[1])
            losses.append(-sum(logits[place - 1, ids[0, place]].item() for place in places))
        right = tokenizer(item.prompt + item.choices[item.answer]).input_ids[prompt.shape[1] :]
        written = model.generate(
            prompt, do_sample=False, max_new_tokens=len(right), min_new_tokens=len(right)
        )
        same = written[0, prompt.shape[1] :].tolist() == right
        expected.append((same, losses.index(min(losses)) == item.answer))
    found = outcomes(probe())
    pairs = [pair for written, chosen in found for pair in zip(written, chosen, strict=True)]
    assert pairs == [(str(int(same)), str(int(chosen))) for same, chosen in expected]
    assert {"0", "1"} == {chosen for _, chosen in pairs}


def test_streamed_and_shared_by_processes_give_the_same(few: list[Item]) -> None:
    whole = probe()
    streamed = probe(stream=True)
    assert outcomes(streamed) == outcomes(whole)
    assert streamed.answers is None and streamed.repetition is None
    probers = [prober() for _ in range(3)]  # a decoder cannot serve two threads at once
    shared = together(3, lambda ranks: probers[ranks.rank](ranks))
    for one in shared:
        assert outcomes(one) == outcomes(whole)
        assert one.answers is not None and whole.answers is not None
        assert one.answers.texts == whole.answers.texts


def test_likeliest_answers_of_a_model_that_repeats_one_token(
    few: list[Item], tmp_path: Path
) -> None:
    model = load(MODEL_DIR)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens are equally likely, so the first one is written
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path)
    found = probe(tmp_path)
    assert found.repetition is not None and found.answers is not None
    assert found.repetition > 0.85  # of 9 4-grams all but the first
    assert found.answers.distinct < 0.05
    assert all(one.written.share == 0 for one in found.capabilities)


def test_repetition_counts_what_was_there_before() -> None:
    assert repeated_share([1, 2, 3, 4, 5, 6]) == 0
    assert repeated_share([1, 2, 3, 4] * 2) == pytest.approx(1 / 5)
    assert repeated_share([7] * 103) == pytest.approx(0.99)
    assert repeated_share([1, 2]) == 0
    assert distinct_share([[1, 2, 1, 2], [1, 2]]) == pytest.approx(2 / 4)


def test_a_context_that_is_too_short_is_refused_or_left_out() -> None:
    checkpoint = open_checkpoint(MODEL_DIR)
    longest = max(len(row.ids) for row in rows_of(load_tokenizer(checkpoint)))
    config = deepcopy(checkpoint.config)
    config.max_position_embeddings = longest - 5
    short = replace(checkpoint, config=config)
    with pytest.raises(ShortLLMError, match="has 5 tokens more than"):
        measure.check_probe(short, EvaluationOptions(probe=True))
    measure.check_probe(checkpoint, EvaluationOptions(probe=True))


def test_a_run_probes_large_models_only(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(MODEL_DIR)
    assert with_probe(EvaluationOptions(), checkpoint).probe is False
    assert with_probe(EvaluationOptions(probe=True), checkpoint).probe is True
    monkeypatch.setattr(measure, "SMALLEST", 1_000_000)
    assert with_probe(EvaluationOptions(), checkpoint).probe is True
    assert with_probe(EvaluationOptions(probe=False), checkpoint).probe is False


# ---- the harness, results, reports


def test_the_harness_finds_the_same_scores(few: list[Item]) -> None:
    pytest.importorskip("lm_eval")
    both = shortllm.evaluate(
        "embedded", tasks=["probe"], limit=FEW, probe=True, device="cpu"
    ).models[0]
    assert both.probe is not None and len(both.zeroshot) == len(CAPABILITIES)
    for task, score in zip(both.zeroshot, both.probe.capabilities, strict=True):
        assert task.task == f"shortllm_probe_{score.capability}"
        assert task.metric == "acc"
        assert task.score == pytest.approx(score.chosen.share)
        assert task.others["exact_match"] == pytest.approx(score.written.share)


def test_eval_writes_and_shows_the_probe(
    few: list[Item], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "eval.json"
    command = ("eval", "embedded", "--max-segments", 2, "--device", "cpu", "--out", out)
    code, shown, _ = call(capfd, *command, "--probe")
    assert code == 0 and "exercises solved" in shown
    found = Evaluation.load(out)
    assert found.models[0].probe is not None
    frame = found.to_dataframe()
    assert len(frame[frame.kind == "probe"]) == 2 * len(CAPABILITIES)
    with_it, without = (
        evaluation_fingerprint(
            [], [], EvaluationOptions(probe=wanted), Session(Runtime(device="cpu"))
        )
        for wanted in (True, False)
    )
    assert with_it != without


def share(solved: int, of: int = 48) -> Share:
    return Share.of([place < solved for place in range(of)])


def model_with(name: str, solved: dict[str, int], repeated: float, base: Probe) -> EvaluatedModel:
    scores = [
        one.model_copy(update={"written": share(solved[one.capability])})
        for one in base.capabilities
    ]
    assert base.answers is not None
    answers = base.answers.model_copy(
        update={"repeated": [repeated + place / 100 for place in range(len(OPEN))]}
    )
    changed = base.model_copy(update={"capabilities": scores, "answers": answers})
    info = open_checkpoint(MODEL_DIR).info()
    return EvaluatedModel(name=name, model=info, perplexity=[], probe=changed)


def test_the_verdict_names_what_fell_clearly(few: list[Item]) -> None:
    base = probe()
    high = dict.fromkeys(CAPABILITIES, 40)
    original = model_with("original", high, 0.05, base)
    fallen = {**high, "addition": 3, "copying": 20, "recall": 39}
    pruned = model_with("pruned", fallen, 0.45, base)
    results: Any = SimpleNamespace(
        evaluated={"original": original, "pruned": pruned}, recovered_by={}
    )
    sentence = probe_sentence(results).replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert sentence == (
        " Addition fell from 83 % to 6 %, copying fell from 83 % to 42 % and repetition rose from "
        "8 % to 48 %."
    )
    results.evaluated["healed"] = model_with("healed", {**high, "addition": 30}, 0.05, base)
    results.recovered_by = {"healed": "regression"}
    assert "In the model healed, addition fell from 83" in probe_sentence(results)
    same: Any = SimpleNamespace(
        evaluated={"original": original, "pruned": model_with("pruned", high, 0.05, base)},
        recovered_by={},
    )
    assert "No capability in the probe fell clearly" in probe_sentence(same)
    models = [original, pruned]
    table = probe_table(models)
    assert len(table.rows) == len(CAPABILITIES) + 2
    assert "copying" in probe_plot(models).figure().svg


def test_the_error_of_a_fall_is_that_of_the_paired_differences() -> None:
    before, after = [1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]
    change = Change.between("it", before, after)
    assert (change.before, change.after) == (0.75, 0.5)
    assert change.stderr == pytest.approx(0.25)  # differences 0, -1, 0, 0
    assert not change.is_clear
    assert Change.between("it", [1.0] * 4, [0.0] * 4).is_clear


def test_probes_of_other_exercises_are_not_compared(few: list[Item]) -> None:
    found = probe()
    other = found.model_copy(update={"items_fingerprint": "other"})
    assert changes(found, other) == []
    assert len(changes(found, found)) == len(CAPABILITIES)


# ---- a model that people use


@pytest.mark.shared
@pytest.mark.real
@pytest.mark.slow
def test_a_real_model_is_above_chance(smollm: Path) -> None:
    found = probe(smollm, dtype="bfloat16")
    written = {one.capability: one.written.share for one in found.capabilities}
    for capability in ("copying", "brackets", "addition", "chains", "recall", "formats"):
        assert written[capability] > 0.2, written  # guessing writes nothing right
    assert found.repetition is not None and found.repetition < 0.7
