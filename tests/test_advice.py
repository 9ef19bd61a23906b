"""What speaks against a removal, and the families that a shortened model competes with."""

from __future__ import annotations

from typing import Any

import pytest
from test_cli import call

import shortllm
from shortllm.data.options import CalibrationInfo
from shortllm.pruning.advice import against, before_removal
from shortllm.pruning.budget import Budget
from shortllm.pruning.families import FAMILIES, smaller_sibling
from shortllm.pruning.planning import build_plan
from shortllm.records import ModelInfo


def known(model_type: str, blocks: int, parameters: float) -> ModelInfo:
    """A model of equal blocks, which take nine tenths of its parameters."""
    total = int(parameters)
    return ModelInfo(
        id="some-directory", model_type=model_type, blocks=blocks, parameters=total,
        parameters_per_block=[int(0.9 * total / blocks)] * blocks, bytes=2 * total, fingerprint="",
    )  # fmt: skip


def advice(model: ModelInfo, *, searched: bool = False, tokens: int = 10_000, **budget: Any) -> str:
    scores = shortllm.BlockScores(
        model=model, criterion="auto" if searched else "magnitude", dtype="float32",
        importance=[float(b) for b in range(model.blocks)], values=[0.0] * model.blocks,
        calibration="ids", fingerprint="",
    )  # fmt: skip
    plan = build_plan(Budget(**budget), model=model, scores=scores)
    if searched:  # the record of the search itself does not matter
        scores = scores.model_copy(update={"search": object()})
    calibration = CalibrationInfo(
        source="c4", sampler="random", samples=tokens // 100, length=100, bos="none",
        tokens_fingerprint="ids", fingerprint="",
    )  # fmt: skip
    return "\n".join(against(plan, scores, calibration))


def test_more_than_two_fifths_of_the_blocks() -> None:
    model = known("llama", 20, 1e7)
    assert advice(model, remove=8) == ""
    assert "9 of 20 blocks go (45%). With more than 40 %" in advice(model, remove=9)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"protect_first": 0}, "The first block can be removed"),
        ({"protect_last": 0}, "The last block can be removed"),
        ({"protect_first": 0, "protect_last": 0}, "The first and the last block can be removed"),
        ({"protect_first": 1, "protect_last": 1}, ""),
    ],
)
def test_open_ends(budget: dict[str, int], said: str) -> None:
    found = advice(known("llama", 20, 1e7), remove=2, **budget)
    assert found.partition(". ")[0] == said
    for name in ("first", "last"):
        assert (f"--protect-{name} 0" in found) == (budget.get(f"protect_{name}") == 0)


def test_a_search_on_little_text() -> None:
    model = known("llama", 20, 1e7)
    assert advice(model, remove=2, searched=True) == ""
    found = advice(model, remove=2, searched=True, tokens=9_900)
    assert "'auto' has 9,900 calibration tokens" in found and "--samples 100 or more" in found
    assert advice(model, remove=2, tokens=9_900) == ""


def test_a_model_of_the_family_that_is_as_small() -> None:
    model = known("qwen3", 28, 1.72e9)
    assert advice(model, remove=11) == ""  # 1.1 billion are left; the next one has 0.6
    larger = known("qwen3", 36, 8.19e9)
    assert advice(larger, remove=9) == ""
    found = advice(larger, remove=14)
    assert found == "Qwen3-4B of the same family has 36 blocks and 4.02 B parameters; " + (
        "5.32 B are left here, so compare with it"
    )
    lines = before_removal(model, samples=100, length=128)
    assert "Qwen3-0.6B of the same family has 28 blocks" in lines[-1]


def test_families_are_told_apart_by_size() -> None:
    found = smaller_sibling(known("llama", 32, 8.03e9))
    assert found is not None and found.id == "meta-llama/Llama-3.2-3B"
    assert smaller_sibling(known("llama", 32, 6.74e9)) is None  # the smallest Llama 2
    assert smaller_sibling(known("llama", 31, 8.03e9)) is None
    assert smaller_sibling(known("mistral", 32, 8.03e9)) is None
    for family in FAMILIES:
        sizes = [one.parameters for one in family.members]
        assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)
        for place, one in enumerate(family.members):
            for kind in family.model_types:
                found = smaller_sibling(known(kind, one.blocks, one.parameters))
                assert found == (family.members[place - 1] if place else None)


def test_info_and_plan_say_so(capfd: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    code, out, _ = call(capfd, "info", "embedded", "--no-probe")
    assert code == 0 and "note: with more than 4 of 12 blocks removed (40 %)" in out
    scored = ("score", "embedded", "--criterion", "magnitude", "--out", tmp_path)
    assert call(capfd, *scored)[0] == 0
    code, _, err = call(capfd, "plan", tmp_path, "--remove", "5", "--protect-last", "0")
    assert code == 0 and "5 of 12 blocks go (42%)" in err and "The last block can be removed" in err
    code, _, err = call(capfd, "plan", tmp_path, "--remove", "2")
    assert code == 0 and "go" not in err.replace("ago", "")
