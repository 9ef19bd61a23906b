"""Choosing blocks by the healed model: weights for every gap, walks with them, and searches."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import test_experts
import torch
from test_healing import healed
from torch import Tensor

import shortllm
from shortllm import pipeline
from shortllm.criteria import Scores, resolve
from shortllm.data.options import CalibrationOptions
from shortllm.errors import CriterionError, RecipeError, ShortLLMError, UnsupportedModelError
from shortllm.evaluation.options import EvaluationOptions
from shortllm.healing.every_gap import GapFolds, folds_of_every_gap, work_of_every_gap
from shortllm.healing.folding import folded_into
from shortllm.healing.gap_by_gap import heal_gaps
from shortllm.healing.methods import Task
from shortllm.healing.options import HealCalibration, HealOptions
from shortllm.model.decoder import Decoder
from shortllm.model.hidden_states import StreamMemory
from shortllm.model.walk import mean_losses
from shortllm.pipeline import healing_of
from shortllm.pruning.budget import Budget, gaps_of
from shortllm.pruning.records import BlockScores
from shortllm.recipe import Recipe

ALL_TEXT = {"protect_first": 1, "protect_last": 0, "held_out": 0, "remove": 2}


def text() -> Tensor:
    """Samples to heal with."""
    return families.token_ids(16, seed=5)


def gap_folds(variant: str = "llama", decoder: Decoder | None = None, **options: Any) -> GapFolds:
    chosen = HealOptions(**{"method": "regression", **options})
    decoder = decoder or Decoder(families.loaded(variant))
    source = families.opened(variant)
    return folds_of_every_gap(decoder, source, text(), chosen, set(range(6)), 3)


def healed_nll(found: GapFolds, removed: tuple[int, ...], ids_BT: Tensor) -> float:
    """Mean loss of one shortened model with the weights of its gaps folded in."""
    gaps = [(gap.before, gap.stop - gap.start) for gap in gaps_of(removed)]
    folds = {b: found.folds[b, n] for b, n in gaps if b is not None and (b, n) in found.folds}
    with folded_into(found.decoder, folds):
        return mean_losses(found.decoder, ids_BT, [frozenset(removed)])[0]


@pytest.mark.parametrize("method", ["linear", "regression"])
@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "gemma2", "mixtral"])
def test_a_walk_with_folds_measures_each_healed_model(variant: str, method: str) -> None:
    found = gap_folds(variant, method=method)
    ids_BT = families.token_ids(5)
    sets = [s for n in (0, 1, 2, 3) for s in itertools.combinations(range(6), n)]
    values = mean_losses(found.decoder, ids_BT, [frozenset(s) for s in sets], healed=found)
    expected = [healed_nll(found, s, ids_BT) for s in sets]
    assert values == pytest.approx(expected, rel=1e-6)
    plain = mean_losses(found.decoder, ids_BT, [frozenset(s) for s in sets])
    assert sum(a != b for a, b in zip(values, plain, strict=True)) > 30


@pytest.mark.parametrize("method", ["linear", "regression"])
@pytest.mark.parametrize("removed", [[3], [2, 3], [2, 3, 4]])
def test_weights_for_one_gap_are_those_that_heal_it(
    removed: list[int], method: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"method": method, "ridge": 0.05, "weighting": "none"}
    alone = {"attention": False, "gain": False} if method == "regression" else {}
    healed("llama", removed, tmp_path, **options, **alone)
    fold = gap_folds(**options).folds[removed[0] - 1, len(removed)]
    weights = dict(families.load(tmp_path / "healed").model.layers.named_parameters())
    for name, tensor in fold.items():
        torch.testing.assert_close(
            tensor, weights[f"{removed[0] - 1}.{name}"], rtol=1e-4, atol=1e-5
        )


def test_blocks_read_one_at_a_time_give_the_same_weights() -> None:
    in_memory, streamed = gap_folds(), gap_folds(decoder=families.streamed("llama"))
    assert in_memory.folds.keys() == streamed.folds.keys()
    for key, fold in in_memory.folds.items():
        for name, tensor in fold.items():
            torch.testing.assert_close(streamed.folds[key][name], tensor)


def test_gaps_that_no_removal_makes_are_left_out() -> None:
    decoder = Decoder(families.loaded("llama"))
    found = folds_of_every_gap(
        decoder, families.opened("llama"), text(), HealOptions(), {1, 2, 4}, 2
    )
    assert set(found.folds) <= {(0, 1), (0, 2), (1, 1), (3, 1)}
    assert found.version(0, {1, 2}) in (0, 2) and found.version(0, {1, 2, 3}) == 0
    first = folds_of_every_gap(decoder, families.opened("llama"), text(), HealOptions(), {0}, 1)
    assert not first.folds  # no block is before it


@pytest.mark.parametrize("removable", [{1, 2, 4}, {0}, set(range(6))])
def test_all_of_the_work_is_reported(removable: set[int]) -> None:
    decoder, done = Decoder(families.loaded("llama")), list[float]()
    folds_of_every_gap(
        decoder, families.opened("llama"), text(), HealOptions(), removable, 2, advance=done.append
    )
    assert sum(done) == pytest.approx(work_of_every_gap(decoder, text().shape, removable, 2))


def search(name: str, **options: Any) -> Scores:
    decoder = Decoder(families.loaded("llama"))
    return families.score(
        decoder, families.token_ids(8), name,
        checkpoint=families.opened("llama"), options={name: options}, healing_BT=text(),
    )[name]  # fmt: skip


def test_local_search_finds_the_pair_that_is_best_healed() -> None:
    found = search("local", healing="regression", **ALL_TEXT)
    decoder, source = Decoder(families.loaded("llama")), families.opened("llama")
    solved = folds_of_every_gap(
        decoder, source, text(), HealOptions(method="regression"), set(range(1, 6)), 2
    )
    ids_BT = families.token_ids(8)
    values = {s: healed_nll(solved, s, ids_BT) for s in itertools.combinations(range(1, 6), 2)}
    best = min(values, key=lambda pair: values[pair])
    assert tuple(found.removed or ()) == best
    assert found.search is not None
    assert found.search.found.value == pytest.approx(math.exp(values[best]), rel=1e-5)
    blind = mean_losses(decoder, ids_BT, [frozenset(best)])[0]
    assert found.search.found.value != pytest.approx(math.exp(blind), rel=1e-4)


def test_greedy_takes_the_block_that_is_best_healed_in_each_round() -> None:
    free = {"protect_first": 0, "protect_last": 0, "rounds": 2}
    found = search("greedy", healing="regression", **free)
    solved = folds_of_every_gap(
        Decoder(families.loaded("llama")), families.opened("llama"), text(),
        HealOptions(method="regression"), set(range(6)), 2,
    )  # fmt: skip
    ids_BT, order = families.token_ids(8), []
    for _ in range(2):
        values = {
            b: healed_nll(solved, tuple(sorted([*order, b])), ids_BT)
            for b in range(6) if b not in order
        }  # fmt: skip
        order.append(min(values, key=lambda b: values[b]))
    assert found.order == order


def test_auto_passes_it_on_to_its_candidates() -> None:
    options = {**ALL_TEXT, "held_out": 0.5, "candidates": "ppl,greedy,local"}
    found = search("auto", healing="regression", **options).search
    assert found is not None
    greedy = next(one for one in found.candidates if one.criterion == "greedy")
    alone = families.score(
        Decoder(families.loaded("llama")), families.token_ids(8)[:4], "greedy",
        checkpoint=families.opened("llama"), healing_BT=text(),
        options={
            "greedy": {
                "healing": "regression", "rounds": 2, "protect_first": 1, "protect_last": 0
            }
        },
    )["greedy"]  # fmt: skip
    assert greedy.removed == sorted(alone.order or [])


def test_the_best_sets_are_judged_with_their_gaps_healed_one_after_the_other() -> None:
    options = {**ALL_TEXT, "held_out": 0.5, "candidates": "ppl,influence,last"}
    found = search("auto", healing="regression", **options).search
    assert found is not None and found.held_out_samples == 4 + 4
    texts = [families.token_ids(8)[4:], text()[-4:]]
    predictions = [ids_BT[:, 1:].numel() for ids_BT in texts]
    for one in found.candidates:
        decoder = Decoder(families.loaded("llama"))
        task = Task(
            decoder=decoder, checkpoint=families.opened("llama"), removed=one.removed,
            ids_BT=text(), held_out=4, options=HealOptions(method="regression", before=1),
            memory=StreamMemory(),
        )  # fmt: skip
        with heal_gaps(task).applied(decoder):
            means = [mean_losses(decoder, ids_BT, [frozenset(one.removed)])[0] for ids_BT in texts]
        nll = float(np.average(means, weights=predictions))
        assert one.held_out == pytest.approx(math.exp(nll), rel=1e-4)


# ---- options


def test_a_run_that_heals_judges_searches_by_it() -> None:
    recipe = Recipe(criterion="local", healing=HealOptions(method="regression"))
    local, ppl = resolve("local"), resolve("ppl")
    assert healing_of(recipe, local) == {"healing": "regression"}
    assert healing_of(recipe, ppl) == {}
    assert healing_of(recipe, resolve("greedy", {"inner": "taylor"})) == {}
    blind = recipe.model_copy(update={"heal_aware": False})
    assert healing_of(blind, local) == {}
    unhealed = recipe.model_copy(update={"healing": None})
    assert healing_of(unhealed, local) == {}
    with pytest.raises(RecipeError, match="needs a method to heal with"):
        healing_of(unhealed.model_copy(update={"heal_aware": True}), local)
    with pytest.raises(RecipeError, match="criterion 'ppl' does not measure shortened models"):
        healing_of(recipe.model_copy(update={"heal_aware": True}), ppl)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ShortLLMError, match="unknown healing method 'regresion'"):
        resolve("local", {"healing": "regresion"})
    with pytest.raises(CriterionError, match="greedy.inner 'taylor' does not measure a model"):
        resolve("greedy", {"healing": "linear", "inner": "taylor"})
    with pytest.raises(UnsupportedModelError, match="no linear projection"):
        families.score(
            Decoder(test_experts.loaded("dbrx")), families.token_ids(8), "local",
            checkpoint=test_experts.opened("dbrx"), options={"local": {"healing": "linear"}},
            healing_BT=text(),
        )  # fmt: skip


@pytest.mark.slow
def test_runs_on_the_embedded_model(tmp_path: Path) -> None:
    """`run` chooses by the healed model where it heals; other text to heal with scores again."""

    def scored(out: Path, samples: int = 64, **more: Any) -> BlockScores:
        text = HealCalibration(samples=samples)
        recipe = Recipe(
            criterion="local",
            options={"start": "ppl"},
            budget=Budget(remove=2),
            calibration=CalibrationOptions(samples=8),
            healing=HealOptions(method="regression", calibration=text),
            evaluation=EvaluationOptions(max_segments=4, continuations=0),
            **more,
        )
        pipeline.run(recipe=recipe, out=out, overwrite=True)
        return BlockScores.load(out / "scores.json")

    aware, blind = scored(tmp_path / "aware"), scored(tmp_path / "blind", heal_aware=False)
    assert (aware.options["healing"], blind.options["healing"]) == ("regression", None)
    assert aware.search is not None and aware.search.found.value is not None
    assert blind.search is not None and blind.search.found.value is not None
    assert aware.search.found.value < blind.search.found.value
    again = scored(tmp_path / "aware")
    assert again.cost == aware.cost  # not scored again
    assert scored(tmp_path / "aware", samples=32).fingerprint != aware.fingerprint


def test_the_option_works_wherever_criteria_are_scored(tmp_path: Path) -> None:
    """The text to heal with is there for a comparison, and for a run that does not heal."""
    text = {"samples": 2, "length": 32, "max_segments": 1, "out": tmp_path / "compared"}
    options = {"greedy": {"healing": "linear"}}
    shortllm.compare_criteria(criteria=["greedy"], ratios=[0.1], random=1, options=options, **text)
    scores = BlockScores.load(tmp_path / "compared" / "scores.json")
    assert scores.options["healing"] == "linear"
    recipe = Recipe(
        criterion="greedy",
        options={"healing": "linear"},
        budget=Budget(remove=1),
        calibration=CalibrationOptions(samples=2, length=32),
        evaluation=EvaluationOptions(max_segments=1, continuations=0),
    )
    pipeline.run(recipe=recipe, out=tmp_path / "run")
    assert BlockScores.load(tmp_path / "run" / "scores.json").options["healing"] == "linear"
