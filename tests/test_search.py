"""Searches over sets of blocks, and `auto`, against plain models run one by one."""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import loaded, opened, saved, score, streamed, token_ids
from safetensors.torch import load_file, save_file
from test_criteria import Stopped, counting, hidden_streams
from test_scoring import TORCHRUN, call, equal_scores
from torch import Tensor

import shortllm
from shortllm import criteria, journal
from shortllm.comparison.criteria import prepare_question
from shortllm.comparison.options import ComparisonOptions
from shortllm.criteria import Scores, resolve
from shortllm.criteria.dp import skip_nearest
from shortllm.criteria.search import ONE_SHOT, Search
from shortllm.data.options import CalibrationOptions
from shortllm.embedded import MODEL_DIR
from shortllm.errors import BudgetError, CriterionError
from shortllm.evaluation.options import EvaluationOptions
from shortllm.journal import Journal
from shortllm.model import hidden_states
from shortllm.model.decoder import Decoder
from shortllm.model.hidden_states import SampleGroups, block_flops
from shortllm.model.metrics import kl_divergence, next_token_nll, rejected
from shortllm.pruning.budget import Budget
from shortllm.pruning.planning import build_plan
from shortllm.pruning.records import BlockScores
from shortllm.pruning.search_space import BlockSearch
from shortllm.recipe import Recipe
from shortllm.records import ModelInfo
from shortllm.runtime import ALONE

FREE = {"protect_first": 0, "protect_last": 0}
ALL_TEXT = {**FREE, "held_out": 0}
SAMPLES = 8


def search(
    name: str, variant: str = "llama", *, decoder: Decoder | None = None, **options: Any
) -> Scores:
    """A search on the tiny model of a variant."""
    kwargs = {key: options.pop(key) for key in ("journal",) if key in options}
    return score(
        decoder or Decoder(loaded(variant)),
        token_ids(SAMPLES),
        name,
        checkpoint=opened(variant),
        options={name: {"remove": 2, **options}},
        **kwargs,
    )[name]


def record(scores: Scores) -> Search:
    assert scores.search is not None
    return scores.search


@torch.no_grad()
def plainly(variant: str, removed: Sequence[int], fitness: str, ids_BT: Tensor) -> float:
    """Mean NLL of a whole model without blocks, its divergence from the intact one, or the fraction
    of its tokens that the intact one rejects."""
    decoder = Decoder(loaded(variant))
    intact = decoder.model(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
    with decoder.without(removed):
        without = decoder.model(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
    if fitness == "kl":
        return float(kl_divergence(intact, without).double().mean())
    if fitness == "acceptance":
        p, q = intact.double().softmax(-1), without.double().softmax(-1)
        return 1.0 - float(torch.minimum(p, q).sum(-1).mean())
    return float(next_token_nll(without, ids_BT[:, 1:].flatten()).double().mean())


# ------------------------------------------------------------------ what is found


@pytest.mark.parametrize("fitness", ["ppl", "kl"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_best_span_of_all_is_found(size: int, fitness: str) -> None:
    found = search("span", fitness=fitness, **{**ALL_TEXT, "remove": size})
    values = {
        start: plainly("llama", range(start, start + size), fitness, token_ids(SAMPLES))
        for start in range(7 - size)
    }
    best = min(values, key=lambda start: values[start])
    assert found.removed == list(range(best, best + size))
    shown = math.exp(values[best]) if fitness == "ppl" else values[best]
    assert record(found).found.value == pytest.approx(shown, rel=1e-5)
    assert sorted(found.order or []) == found.removed


def test_a_span_is_of_whole_periods_and_of_blocks_that_may_go() -> None:
    whole = search("span", "gemma2", remove=2, period_aligned=True, held_out=0, **FREE)
    assert whole.removed in ([0, 1], [2, 3], [4, 5])
    inner = search("span", remove=3, held_out=0, protect_first=1, protect_last=2)
    assert inner.removed == [1, 2, 3]
    chosen = search("auto", candidates="influence,span", remove=3, **FREE)
    assert [one.criterion for one in record(chosen).candidates] == ["influence", "span"]


@torch.no_grad()
def by_recursion(variant: str, units: list[list[int]], count: int, ids_BT: Tensor) -> list[int]:
    """The set of the dynamic programme: g(i, n) by its definition, from whole hidden states."""
    model = loaded(variant)
    decoder, intact_LBTD = Decoder(model), hidden_streams(model, ids_BT)
    calls = decoder.enter(ids_BT).calls
    unit_of = {unit[0]: unit for unit in units}
    steps, b = [], 0
    while b < decoder.block_count:
        steps.append(unit_of.get(b, [b]))
        b += len(steps[-1])

    @functools.cache
    def g(i: int, n: int) -> tuple[Tensor, list[int]] | None:
        """The state and the blocks skipped on the way to it."""
        if i == 0:
            return (intact_LBTD[0], []) if n == 0 else None
        step, found = steps[i - 1], []
        skipping = g(i - 1, n - 1) if n and step in units else None
        if skipping is not None:
            found.append((skipping[0], [*skipping[1], *step]))
        applying = g(i - 1, n)
        if applying is not None:
            state = applying[0]
            for b in step:
                state = decoder.apply(b, state, calls[b])
            found.append((state, applying[1]))
        target = intact_LBTD[step[-1] + 1].double()

        def near(one: tuple[Tensor, list[int]]) -> float:
            return float(torch.cosine_similarity(one[0].double(), target, dim=-1).mean())

        return max(found, key=near) if found else None

    end = g(len(steps), count)
    assert end is not None
    return end[1]


@pytest.mark.parametrize(
    ("variant", "remove", "free", "period"),
    [
        *(("llama", remove, range(6), 1) for remove in (1, 2, 3, 5)),
        ("llama", 3, range(1, 5), 1),
        ("llama", 4, range(1, 5), 1),
        ("opt-projected", 2, range(6), 1),
        ("gemma3_text", 3, range(7), 1),
        ("mixtral", 2, range(1, 6), 1),
        *(("gemma2", remove, range(6), 2) for remove in (2, 4)),
        ("gemma2", 2, range(2, 6), 2),
    ],
)
def test_the_set_of_the_dynamic_programme(
    variant: str, remove: int, free: range, period: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_states, "CPU_GROUP_TOKENS", 40)  # three groups
    blocks = Decoder(loaded(variant)).block_count
    ends = {"protect_first": free.start, "protect_last": blocks - free.stop}
    found = search("dp", variant, remove=remove, period_aligned=period > 1, held_out=0.25, **ends)
    units = [list(free[i : i + period]) for i in range(0, len(free), period)]
    expected = by_recursion(variant, units, remove // period, token_ids(SAMPLES)[:6])
    assert found.removed == expected
    value = plainly(variant, expected, "ppl", token_ids(SAMPLES)[:6])
    assert record(found).found.value == pytest.approx(math.exp(value), rel=1e-5)
    assert (record(found).search_samples, record(found).held_out_samples) == (6, 2)
    streams = search(
        "dp", variant, decoder=streamed(variant), remove=remove, period_aligned=period > 1,
        held_out=0.25, **ends,
    )  # fmt: skip
    assert streams.removed == expected


def test_the_programme_passes_few_states_through_each_block() -> None:
    """Those from which the set's size can still be reached, and the intact one."""
    decoder, passed = Decoder(loaded("llama")), [0] * 6
    apply = decoder.apply

    def counted(b: int, *args: Any) -> Tensor:
        passed[b] += 1
        return apply(b, *args)

    groups = SampleGroups(decoder, token_ids(SAMPLES))
    [_] = groups.rows
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(decoder, "apply", counted)
        units, done = [(b,) for b in range(1, 5)], []
        removed = skip_nearest(units, 2, groups, ALONE, done.append)
    assert len(removed) == 2 and set(removed) <= {1, 2, 3, 4}
    # of one skipped before block 4, only the way that skips it too leads to two
    assert passed == [1, 1, 2, 3, 2, 2]
    each = block_flops(decoder, 0) * token_ids(SAMPLES).numel()
    assert sum(done) == pytest.approx(sum(passed) * each)


def test_two_planted_blocks_are_found_by_the_programme(planted: Path) -> None:
    found = shortllm.score(
        str(planted), criterion="dp", options={"dp": {"remove": 2, **FREE}}, data="embedded",
        samples=4, length=32, max_memory=0,
    )  # fmt: skip
    assert found.removed == [3, 7]
    plan = build_plan(Budget(remove=2, **FREE), model=found.model, scores=found)
    assert "were found by the search 'dp': without them the perplexity" in plan.reason


@pytest.mark.parametrize("fitness", ["ppl", "kl", "acceptance"])
@pytest.mark.parametrize("variant", ["llama", "qwen3", "gemma2", "gpt_neox"])
def test_local_search_finds_the_best_pair_of_all(variant: str, fitness: str) -> None:
    found = search("local", variant, fitness=fitness, **ALL_TEXT)
    values = {
        pair: plainly(variant, pair, fitness, token_ids(SAMPLES))
        for pair in itertools.combinations(range(6), 2)
    }
    best = min(values, key=lambda pair: values[pair])
    assert tuple(found.removed or ()) == best
    shown = math.exp(values[best]) if fitness == "ppl" else values[best]
    assert record(found).found.value == pytest.approx(shown, rel=1e-5)
    assert record(found).stopped == "no swap helps"


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_auto_takes_what_is_accepted_most_on_held_out_text(temperature: float) -> None:
    how = {"fitness": "acceptance", "temperature": temperature, "candidates": "ppl,last,local"}
    found = search("auto", **how, **FREE)
    candidates = record(found).candidates
    decoder = Decoder(loaded("llama"))
    held_out = token_ids(SAMPLES)[SAMPLES - record(found).held_out_samples :]
    with torch.no_grad():
        intact = decoder.model(input_ids=held_out, use_cache=False).logits[:, :-1].flatten(0, 1)
        for one in candidates:
            with decoder.without(one.removed):
                logits = decoder.model(input_ids=held_out, use_cache=False).logits
            without = logits[:, :-1].flatten(0, 1)
            lost = rejected(intact, without, temperature).double().mean().item()
            assert one.held_out == pytest.approx(lost, abs=1e-6)
    best = min(candidates, key=lambda one: one.held_out or 0.0)
    assert found.removed == best.removed


@pytest.mark.parametrize("finalists", [16, 3])
def test_a_start_that_is_no_optimum_is_left_by_the_best_swap(
    finalists: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From `last`, which knows nothing: of the finalists on a quarter of the samples."""
    monkeypatch.setattr("shortllm.criteria.search.FINALISTS", finalists)
    found = search("local", start="last", **ALL_TEXT)
    ids = token_ids(SAMPLES)

    def lowest(sets: list[frozenset[int]], samples: int, count: int) -> list[frozenset[int]]:
        key = lambda one: plainly("llama", sorted(one), "ppl", ids[:samples])  # noqa: E731
        return sorted(sets, key=key)[:count]

    current, rounds = frozenset({4, 5}), []
    while True:
        swaps = [
            current - {back} | {taken} for back in current for taken in set(range(6)) - current
        ]
        [best] = lowest(lowest(swaps, len(ids) // 4, finalists), len(ids), 1)
        before, after = (plainly("llama", sorted(one), "ppl", ids) for one in (current, best))
        rounds.append(min(before, after))
        if after >= before:
            break
        current = best
    assert len(rounds) > 1 and record(found).rounds == pytest.approx(rounds, rel=1e-5)
    assert found.removed == sorted(current)


@pytest.mark.parametrize(
    ("name", "seed"), [("local", 0), *(("evolve", seed) for seed in (0, 1, 2))]
)
@pytest.mark.parametrize("fitness", ["ppl", "kl"])
def test_a_search_is_never_worse_than_its_start(name: str, fitness: str, seed: int) -> None:
    options = {"generations": 4, "seed": seed} if name == "evolve" else {}
    found = search(name, fitness=fitness, remove=3, **FREE, **options)
    searched = record(found)
    assert [one.criterion for one in searched.candidates] == ONE_SHOT.split(",")
    values = {one.criterion: one.value or math.inf for one in searched.candidates}
    assert searched.start is not None and values[searched.start] == min(values.values())
    assert (searched.found.value or math.inf) <= values[searched.start]
    assert searched.rounds == sorted(searched.rounds, reverse=True)
    assert (searched.search_samples, searched.held_out_samples) == (6, 2)
    for one in (*searched.candidates, searched.found):
        value = plainly("llama", one.removed, fitness, token_ids(SAMPLES)[:6])
        shown = math.exp(value) if fitness == "ppl" else value
        assert one.value == pytest.approx(shown, rel=1e-5)
        held_out = plainly("llama", one.removed, "ppl", token_ids(SAMPLES)[6:])
        assert one.held_out == pytest.approx(math.exp(held_out), rel=1e-5)
    assert found.order is not None and sorted(found.order) == found.removed
    assert [found.importance[b] for b in found.order] == [0.0, 1.0, 2.0]


def test_evolution_leaves_a_bad_start_and_is_repeatable() -> None:
    options = {"start": "last", "generations": 6, "fitness": "ppl", **ALL_TEXT}
    found = search("evolve", **options)
    assert found == search("evolve", **options)
    other = search("evolve", **{**options, "seed": 5})
    start = plainly("llama", [4, 5], "ppl", token_ids(SAMPLES))
    for one in (found, other):
        assert record(one).rounds[-1] < start
        assert len(record(one).rounds) == 6 and record(one).stopped == "6 generations"


@pytest.mark.parametrize("name", ["local", "evolve", "auto"])
def test_protected_blocks_are_never_tried(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[frozenset[int]] = []
    means = BlockSearch._means

    def spy(self: Any, sets: Any, *args: Any) -> list[float]:
        tried.extend(sets)
        return means(self, sets, *args)

    monkeypatch.setattr(BlockSearch, "_means", spy)
    found = search(name, protect_first=1, protect_last=2)
    assert {len(removed) for removed in tried} == {2}
    assert frozenset.union(*tried) == {1, 2, 3}
    assert max(found.importance[b] for b in (1, 2, 3)) < min(found.importance[b] for b in (0, 4, 5))


# ------------------------------------------------------------------ budgets


def test_evaluations_and_minutes_end_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = record(search("local", start="last", **ALL_TEXT))
    assert whole.evaluations > 6
    few = record(search("local", start="last", evaluations=3, **ALL_TEXT))
    assert 2 < few.evaluations <= 4  # the start besides
    assert few.stopped == "3 evaluations"
    assert record(search("local", minutes=1e-9, **ALL_TEXT)).stopped == "1e-09 minutes"
    evolved = record(search("evolve", evaluations=12, **ALL_TEXT))
    starts = len({tuple(one.removed) for one in evolved.candidates})
    assert 0 < evolved.evaluations - starts <= 12 and evolved.stopped == "12 evaluations"


def test_a_set_answers_its_own_budget_alone() -> None:
    info = opened("llama").info()
    found = scores_file(search("local", **FREE), info)
    plan = build_plan(Budget(remove=2, **FREE), model=info, scores=found)
    assert plan.removed == found.removed and plan.order == found.order
    assert "were chosen by the search 'local' from the plan by" in plan.reason
    with pytest.raises(BudgetError, match=r"and of no other number; 3 were .*local\.remove=3"):
        build_plan(Budget(remove=3, **FREE), model=info, scores=found)
    [first, _] = plan.removed
    with pytest.raises(BudgetError, match=f"remove block {first}, which is protected"):
        build_plan(
            Budget(remove=2, protect_first=first + 1, protect_last=0), model=info, scores=found
        )
    share = plan.reached.parameter_ratio
    by_share = Budget(param_ratio=share, **FREE)
    assert build_plan(by_share, model=info, scores=found).removed == plan.removed
    with pytest.raises(BudgetError, match=r"Score again with --option local\.remove=3"):
        build_plan(Budget(param_ratio=share * 1.3, **FREE), model=info, scores=found)


def scores_file(found: Scores, info: ModelInfo, criterion: str = "local") -> BlockScores:
    return BlockScores(
        model=info, criterion=criterion, importance=found.importance, values=found.values,
        order=found.order, removed=found.removed, search=found.search, dtype="float32",
        fingerprint="test",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["local", "evolve", "auto"])
def test_whole_periods_go_together(name: str) -> None:
    info = opened("gemma2").info()
    assert info.period == 2
    tried = {"candidates": "ppl,greedy,local"} if name == "auto" else {}
    found = search(name, "gemma2", period_aligned=True, **tried, **FREE)
    assert found.removed is not None and found.removed[0] % 2 == 0
    assert found.removed[1] == found.removed[0] + 1
    aligned = Budget(remove=2, period_aligned=True, **FREE)
    made = build_plan(aligned, model=info, scores=scores_file(found, info, name))
    assert made.removed == found.removed
    single = found.removed[0]
    torn = scores_file(found, info, name).model_copy(
        update={"removed": [single, (single + 3) % 6], "order": [single, (single + 3) % 6]}
    )
    with pytest.raises(BudgetError, match=rf"rest of its period. .*{name}\.period_aligned=true"):
        build_plan(aligned, model=info, scores=torn)
    if name == "auto":
        assert [one.criterion for one in record(found).left_out] == ["greedy"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("local", {"start": "pppl"}, "unknown criterion 'pppl'"),
        ("local", {"start": "evolve"}, "local.start cannot contain 'evolve', which searches"),
        ("local", {"start": "ppl,ppl"}, "must name criteria, each once"),
        ("local", {"start": ""}, "must name criteria"),
        ("auto", {"candidates": "ppl,auto"}, "auto.candidates cannot contain 'auto'"),
        ("auto", {"held_out": 0}, "auto.held_out 0.0 must be between 0 and 1"),
        ("local", {"held_out": 1}, "local.held_out 1.0 must be between"),
        ("local", {"minutes": 0}, "local.minutes 0.0 must be positive"),
        ("local", {"evaluations": 0}, "local.evaluations 0 must be 1 or more"),
        ("evolve", {"offspring": 0}, "evolve.offspring 0 must be 1 or more"),
        (
            "evolve",
            {"fitness": "acc"},
            "evolve.fitness must be one of ppl, kl, acceptance, not 'acc'",
        ),
        ("evolve", {"temperature": 0.5}, "temperature has no effect without evolve.fitness=accept"),
        ("greedy", {"temperature": 0}, "temperature has no effect without greedy.inner=acceptance"),
        ("local", {"items": 5}, "local.items has no effect without local.fitness=task"),
        ("greedy", {"inner": "acceptance", "temperature": -1}, "greedy.temperature -1.0 must be"),
        ("acceptance", {"temperature": -1}, "acceptance.temperature -1.0 must be 0 or more"),
        ("greedy", {"inner": "local"}, "greedy.inner cannot be 'local'"),
        ("local", {"period_aligned": "perhaps"}, "'perhaps' is not of type bool"),
    ],
)
def test_impossible_options_are_refused_before_work(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CriterionError, match=message):
        resolve(name, options)


def test_options_of_a_new_criterion_change_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = dict(criteria._REGISTRY._entries)
    monkeypatch.setattr(criteria._REGISTRY, "_entries", entries)

    @criteria.criterion("mine", needs="logits", paper="a test")
    def mine(
        logits_NV: Tensor, intact_NV: Tensor, target_N: Tensor, *, seed: int = 0,
        temperature: float | None = None,
    ) -> Tensor:  # fmt: skip
        """A new one."""
        return target_N

    assert resolve("mine").options == {"seed": 0, "temperature": None}
    assert resolve("evolve", {"seed": 3}).options["seed"] == 3
    accepted = resolve("greedy", {"inner": "acceptance", "temperature": 0.5})
    assert accepted.scored_by().options == {"temperature": 0.5}


def test_what_the_model_or_the_text_cannot_give_is_refused() -> None:
    with pytest.raises(BudgetError, match="cannot remove 5 of 6 blocks: 2 are protected"):
        search("local", remove=5, protect_first=1, protect_last=1)
    with pytest.raises(CriterionError, match="keeps 8 of 8 calibration samples"):
        search("local", held_out=0.99)
    with pytest.raises(CriterionError, match="'local' has no plan to start from: greedy: "):
        search("local", "gemma2", start="greedy", period_aligned=True, **FREE)


def test_a_comparison_takes_a_search_at_one_budget_only() -> None:
    info = opened("llama").info()
    asked = [resolve("local")]
    [fitted] = prepare_question(info, ComparisonOptions(ratios=[0.5]), asked).criteria
    assert fitted.options["remove"] == 3
    with pytest.raises(CriterionError, match="searches for the best removal of one size"):
        prepare_question(info, ComparisonOptions(ratios=[0.2, 0.5]), asked)


# ------------------------------------------------------------------ auto


@pytest.mark.parametrize("seed", [7, 8, 9])
def test_auto_takes_the_candidate_with_the_lowest_held_out_perplexity(seed: int) -> None:
    ids_BT = token_ids(SAMPLES, seed=seed)
    found = score(
        Decoder(loaded("qwen3")), ids_BT, "auto", checkpoint=opened("qwen3"),
        options={"auto": {"remove": 2, "candidates": f"{ONE_SHOT},greedy,local,evolve", **FREE}},
    )["auto"]  # fmt: skip
    searched = record(found)
    assert (searched.search_samples, searched.held_out_samples) == (3, 5)
    names = [one.criterion for one in searched.candidates]
    assert names == [*ONE_SHOT.split(","), "greedy", "local", "evolve"]
    held_out = {
        one.criterion: math.exp(plainly("qwen3", one.removed, "ppl", ids_BT[3:]))
        for one in searched.candidates
    }
    for one in searched.candidates:
        assert one.held_out == pytest.approx(held_out[one.criterion], rel=1e-5)
    least = min(held_out.values())
    assert held_out[searched.found.criterion] == pytest.approx(least, rel=1e-6)
    assert found.removed == searched.found.removed


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with its blocks 3 and 7 made exact identities."""
    directory = tmp_path_factory.mktemp("planted") / "model"
    shutil.copytree(MODEL_DIR, directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for b in (3, 7):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{b}.{name}.weight"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def planted_run(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run by `auto` on it, with few candidates."""
    directory = tmp_path_factory.mktemp("run") / "run"
    shortllm.run(
        recipe=Recipe(
            model=str(planted),
            criterion="auto",
            options={"candidates": "last,even,influence,magnitude,local"},
            budget=Budget(remove=2),
            calibration=CalibrationOptions(data="embedded", samples=6, length=48),
            evaluation=EvaluationOptions(data=["embedded"], max_segments=4, continuations=0),
        ),
        out=directory,
    )
    return directory


def test_auto_finds_planted_blocks_and_says_why(planted_run: Path) -> None:
    plan = json.loads((planted_run / "plan.json").read_text())
    assert plan["removed"] == [3, 7] and plan["criterion"] == "auto"
    assert "are those of the criterion 'influence', which 'auto' chose" in plan["reason"]
    scores = BlockScores.load(planted_run / "scores.json")
    assert scores.search is not None and scores.search.found.criterion == "influence"
    by_name = {one.criterion: one.held_out or math.inf for one in scores.search.candidates}
    assert by_name["influence"] == min(by_name.values())
    assert by_name["influence"] < min(by_name["last"], by_name["even"])
    evaluation = json.loads((planted_run / "eval.json").read_text())["models"]
    before, after = (one["perplexity"][0]["nll"] for one in evaluation)
    assert after == pytest.approx(before, rel=1e-6)


def test_the_report_shows_who_won(planted_run: Path) -> None:
    page = (planted_run / "report.html").read_text()
    assert '<section id="search">' in page
    assert "influence has the lowest perplexity there" in page
    assert "auto chose the removed blocks together" in page
    assert "Men et al. 2024" in page  # whose criterion won
    assert "removed: 3, 7" in page and "removed in this order" not in page


def test_a_search_is_reported_with_its_start(
    planted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shortllm.run(
        recipe=Recipe(
            model=str(planted),
            criterion="local",
            options={"start": "last", "evaluations": 12},
            budget=Budget(remove=2),
            calibration=CalibrationOptions(data="embedded", samples=5, length=32),
            evaluation=EvaluationOptions(data=["embedded"], max_segments=2, continuations=0),
        ),
        out=tmp_path / "run",
    )
    page = (tmp_path / "run" / "report.html").read_text()
    assert "local started with the best of them, by last" in page
    assert "reason: 12 evaluations" in page or "reason: no swap helps" in page
    assert "perplexity on held-out text" in page


# ------------------------------------------------------------------ streamed, interrupted, shared


@pytest.mark.parametrize("name", ["local", "evolve", "auto"])
def test_streamed_equals_resident(name: str) -> None:
    options = {"start": "last,magnitude", "generations": 3} if name == "evolve" else {}
    resident = search(name, "gemma3_text", **FREE, **options)
    found = search(name, decoder=streamed("gemma3_text"), variant="gemma3_text", **FREE, **options)
    assert found.removed == resident.removed and found.order == resident.order
    one, other = record(found), record(resident)
    assert one.rounds == pytest.approx(other.rounds, rel=1e-5)
    assert (one.start, one.stopped, one.evaluations) == (
        other.start, other.stopped, other.evaluations
    )  # fmt: skip
    for left, right in zip(one.candidates, other.candidates, strict=True):
        assert left.removed == right.removed
        assert left.held_out == pytest.approx(right.held_out, rel=1e-5)


@pytest.mark.parametrize("fitness", ["ppl", "kl"])
def test_many_sets_go_through_in_several_walks(
    fitness: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = search("local", fitness=fitness, **FREE)
    monkeypatch.setattr("shortllm.model.walk.TOGETHER", 3)
    assert search("local", fitness=fitness, **FREE) == expected


@pytest.mark.parametrize(
    ("name", "after"),
    [("local", 3), ("local", 20), ("local", 33), ("evolve", 26), ("auto", 38), ("dp", 18)],
)
def test_an_interrupted_search_goes_on_where_it_was(
    name: str, after: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(journal, "MIN_INTERVAL_S", 0.0)
    monkeypatch.setattr(journal, "WORK_PER_COMMIT", 0)
    options = {"generations": 2} if name == "evolve" else {}
    expected = search(name, "qwen3", decoder=streamed("qwen3"), **FREE, **options)
    decoder = streamed("qwen3")
    read: list[int] = []

    def attempt(stop_after: int | None = None) -> Scores:
        through = type(decoder).through.__get__(decoder)
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "through", counting(through, read, stop_after=stop_after))
            work = Journal(tmp_path / "scoring", "same work")
            return search(name, "qwen3", decoder=decoder, journal=work, **FREE, **options)

    with pytest.raises(Stopped):
        attempt(after)
    first = len(read)
    read.clear()
    assert attempt() == expected
    again = len(read)
    read.clear()
    shutil.rmtree(tmp_path / "scoring")
    attempt()
    assert again <= len(read) - first + 2  # what was done was not done again


def test_processes_that_were_stopped_at_different_places_agree_on_the_earlier() -> None:
    class Two:
        """Ranks of which the other one has finished one piece of work."""

        rank, count = 0, 1

        def gather(self, tensor: Tensor) -> list[Tensor]:
            return [tensor, torch.tensor(1)]

    class Held:
        def position(self) -> dict[str, Any]:
            return {"entries": [{"seconds": 1.0}, {"seconds": 2.0}, {"seconds": 3.0}]}

    unbuilt: Any = object.__new__(BlockSearch)
    unbuilt._journal = Held()
    unbuilt._scorer = type("Scorer", (), {"ranks": Two()})()
    assert unbuilt._finished() == [{"seconds": 1.0}]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(token_ids(7).tolist()))
    names = ["local", "evolve", "auto", "dp", "greedy"]
    options: dict[str, Any] = {
        "evolve": {"generations": 3}, "greedy": {"rounds": 2, "healing": "regression"}
    }  # fmt: skip
    shortllm.score(
        str(saved("qwen3")), criterion=names, options=options, out=tmp_path / "one",
        calibration=CalibrationOptions(file=ids),
    )  # fmt: skip
    done = call(
        "score", saved("qwen3"), "--criterion", ",".join(names), "--option",
        "evolve.generations=3", "--option", "greedy.rounds=2", "--option",
        "greedy.healing=regression", "--calibration", ids, "--out", tmp_path / "two",
        launcher=TORCHRUN,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "local*" in done.stdout and "evolve*" in done.stdout
    equal_scores(tmp_path / "two", tmp_path / "one")
    for name in names[:4]:
        one, two = (
            BlockScores.load(tmp_path / out / f"scores-{name}.json") for out in ("one", "two")
        )
        assert one.removed == two.removed and one.search is not None and two.search is not None
        assert two.search.rounds == pytest.approx(one.search.rounds, rel=1e-5)
        assert two.search.stopped == one.search.stopped
