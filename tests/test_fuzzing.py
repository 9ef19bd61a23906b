"""Damaged files: a small share of what `python tests/fuzzing.py` tries, and the fuzzer itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from fuzz_bench import Act, Bench
from fuzz_kinds import KINDS
from fuzzing import LIMIT_BYTES, fuzz, judge, peak_bytes, shares, summary
from healthy import kinds_of, records

from shortllm import schemas
from shortllm.errors import ShortLLMError
from shortllm.records import ResultFile

SEED = 2026

MANY = 10
"""Inputs of a kind of which some are right, and some refused."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("fuzz").resolve())


@pytest.mark.parametrize("inputs", [200, pytest.param(1200, marks=pytest.mark.slow)])
def test_damaged_files_give_a_right_result_or_a_clear_error(inputs: int, bench: Bench) -> None:
    counts = shares(inputs)
    names = [f"{kind}:{number}" for kind, count in counts.items() for number in range(count)]
    outcomes = fuzz(names, bench, seed=SEED)
    page = summary(outcomes, seed=SEED, seconds=0.0)
    assert not [one for one in outcomes if one.verdict == "failed"], page
    verdicts = {(one.name.partition(":")[0], one.verdict) for one in outcomes}
    many = {kind for kind, count in counts.items() if count >= MANY}
    assert {(kind, "right") for kind in many} <= verdicts, page
    assert {(kind, "refused") for kind in many - {"journals"}} <= verdicts, page
    assert ("journals", "refused") not in verdicts


def test_every_class_of_result_file_is_damaged() -> None:
    assert set(records()) == set(kinds_of(ResultFile))
    assert len(records()) == len(schemas.NAMES) - 1  # a recipe is not a result


# ---- the fuzzer notices


def doing(what: Callable[[Bench], None]) -> Callable[[Random, Bench], Act]:
    """A kind of input with which always the same is done."""

    def kind(random: Random, bench: Bench) -> Act:
        (bench.source / "input.json").write_text("{}")
        return lambda: what(bench)

    return kind


def stray(bench: Bench) -> None:
    (bench.out / "half.partial").mkdir()
    raise ShortLLMError("a good message, and something left behind")


def change(bench: Bench) -> None:
    (bench.source / "input.json").write_text("[]")


def refuse(message: str) -> Callable[[Bench], None]:
    def act(bench: Bench) -> None:
        raise ShortLLMError(message)

    return act


def hoard(bench: Bench) -> None:
    """Go past the highest use of memory so far, which another test may have left far above."""
    torch.ones(peak_bytes() + LIMIT_BYTES, dtype=torch.uint8)


def linger(bench: Bench) -> None:
    time.sleep(30)


def wrong(bench: Bench) -> None:
    raise AssertionError("another table")


def panic(bench: Bench) -> None:
    raise BaseException("of another language")


@pytest.mark.parametrize(
    "what, said",
    [
        (wrong, "AssertionError at test_fuzzing.py"),
        (panic, "BaseException at test_fuzzing.py"),
        (linger, "TookTooLong"),
        (lambda bench: {}["missing"], "KeyError"),
        (stray, "left behind: half.partial"),
        (change, "the input was changed"),
        (refuse("no"), "the message says nothing"),
        (hoard, "MiB of memory were taken"),
    ],
)
def test_what_is_a_failure(what: Callable[[Bench], None], said: str, tmp_path: Path) -> None:
    limit_s = 0.5 if what is linger else 60.0
    outcome = judge("x:0", doing(what), Bench(tmp_path), seed=0, limit_s=limit_s)
    assert outcome.verdict == "failed" and said in outcome.said
    page = summary([outcome], seed=3, seconds=1.0)
    assert "FAILED 1 x" in page and "--seed 3 --only 'x:0'" in page


def test_what_is_none(tmp_path: Path) -> None:
    def right(bench: Bench) -> None:
        (bench.out / "result.json").write_text("{}")

    bench = Bench(tmp_path)
    assert judge("x:0", doing(right), bench, seed=0).verdict == "right"
    refused = judge("x:0", doing(refuse("this is refused, as it is wrong")), bench, seed=0)
    assert (refused.verdict, refused.said) == ("refused", "this is refused, as it is wrong")


def test_an_input_follows_from_its_name(tmp_path: Path) -> None:
    def damaged(name: str, seed: int) -> bytes:
        bench = Bench(tmp_path)
        judge(name, KINDS["result files"][0], bench, seed=seed)
        return (bench.source / "record.json").read_bytes()

    assert damaged("result files:3", 1) == damaged("result files:3", 1)
    others = {damaged("result files:3", 1), damaged("result files:4", 1)}
    assert len({*others, damaged("result files:3", 2)}) == 3


# ---- messages


def test_messages_are_fit_for_a_terminal() -> None:
    message = str(ShortLLMError("tensor '\x1b[31m\ud800\x00é' of\nshape [2]"))
    assert message == "tensor '\\x1b[31m\\ud800\\x00é' of\nshape [2]"
    message.encode()
