"""What holds for every plan, every set of kept blocks, every sharing out, every set of tensors."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import config_of
from healthy import scores_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from shortllm.checkpoint.rules import BLOCK_NUMBERS, LEADING, PER_BLOCK, PERIOD_OF
from shortllm.checkpoint.shorten_config import shorten_config
from shortllm.checkpoint.source import BlockNames, find_block_names
from shortllm.checkpoint.tensors import (
    SAFETENSORS,
    SAFETENSORS_INDEX,
    TensorEntry,
    read_tensor,
    read_tensor_table,
)
from shortllm.checkpoint.writer import write_tensors
from shortllm.errors import BudgetError, UnsupportedModelError
from shortllm.pruning.budget import Budget, most_blocks, protected_blocks, removable
from shortllm.pruning.planning import build_plan
from shortllm.pruning.records import PrunePlan
from shortllm.records import ModelInfo
from shortllm.surgery.apply import as_read_from_disk

often = settings(deadline=None)
seldom = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])


# ---- plans


@st.composite
def models(draw: st.DrawFn) -> ModelInfo:
    """Models of up to 24 blocks of any sizes, with a period and blocks that cannot go."""
    count = draw(st.integers(1, 24))
    sizes = draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count))
    total = sum(sizes) + draw(st.integers(0, 2000))
    fixed = draw(st.sets(st.integers(0, len(sizes) - 1), max_size=3))
    return ModelInfo(
        id="any",
        model_type="llama",
        blocks=len(sizes),
        parameters=total,
        parameters_per_block=sizes,
        bytes=2 * total,
        period=draw(st.integers(1, min(4, len(sizes)))),
        fixed=dict.fromkeys(fixed, "others depend on it"),
        fingerprint="f",
    )


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    amount: dict[str, Any] = draw(
        st.one_of(
            st.fixed_dictionaries({"remove": st.integers(1, 26)}),
            st.fixed_dictionaries({"remove": st.integers(1, 4)}),
            st.fixed_dictionaries({"ratio": st.floats(0.01, 0.99)}),
            st.fixed_dictionaries({"param_ratio": st.floats(0.01, 0.5)}),
        )
    )
    protection = st.none() | st.integers(0, 2) | st.integers(0, 8)
    return Budget(
        **amount,
        protect_first=draw(protection),
        protect_last=draw(protection),
        period_aligned=draw(st.booleans()),
    )


# numbers whose sums are exact, so that ties are ties on every machine
importances = st.integers(-1000, 1000).map(lambda number: number / 16)


@st.composite
def scored_models(draw: st.DrawFn) -> tuple[ModelInfo, list[float]]:
    model = draw(models())
    count = model.blocks
    return model, draw(st.lists(importances, min_size=count, max_size=count))


def planned(budget: Budget, model: ModelInfo, importance: list[float]) -> PrunePlan | None:
    """The plan, or None where there can be none."""
    scores = scores_of(model, importance=importance, values=importance)
    try:
        return build_plan(budget, model=model, scores=scores)
    except BudgetError as error:
        assert len(str(error)) > 20
        return None


def can_be_met(budget: Budget, model: ModelInfo) -> bool:
    """Whether any plan meets a budget, by counting what may go."""
    size = model.period if budget.period_aligned else 1
    starts = range(0, model.blocks - size + 1, size)
    safe = set(budget.protected(model.blocks)) | set(model.fixed)
    units = [range(start, start + size) for start in starts]
    free = [unit for unit in units if not safe.intersection(unit)]
    if budget.param_ratio is not None:
        sizes = sorted(sum(model.parameters_per_block[b] for b in unit) for unit in free)
        if sum(map(len, free)) == model.blocks:
            sizes.pop()  # something stays
        return sum(sizes) >= budget.param_ratio * model.parameters
    number = budget.remove
    if number is None:
        number = round(budget.ratio * model.blocks / size) * size  # type: ignore[operator]
    return 0 < number <= min(len(free) * size, model.blocks - size) and number % size == 0


@often
@given(scored_models(), budgets())
def test_a_plan_is_what_it_says_or_cannot_be(
    scored: tuple[ModelInfo, list[float]], budget: Budget
) -> None:
    model, importance = scored
    plan = planned(budget, model, importance)
    if plan is None:
        # of parameters, which blocks go decides whether something is left
        assert budget.param_ratio is not None or not can_be_met(budget, model)
        return
    assert can_be_met(budget, model)
    assert sorted([*plan.kept, *plan.removed]) == list(range(model.blocks))
    assert plan.kept and plan.removed
    assert plan.protected == protected_blocks(budget, model)
    assert not set(plan.removed) & ({*plan.protected, *model.fixed})
    assert sorted(plan.order) == plan.removed
    freed = sum(model.parameters_per_block[block] for block in plan.removed)
    assert plan.reached.parameters == freed
    assert plan.reached.blocks == len(plan.removed) <= most_blocks(budget, model)
    if budget.remove is not None:
        assert len(plan.removed) == budget.remove
    if budget.param_ratio is not None:
        assert freed >= budget.param_ratio * model.parameters


@often
@given(scored_models(), budgets())
def test_the_least_important_go_first(
    scored: tuple[ModelInfo, list[float]], budget: Budget
) -> None:
    model, importance = scored
    plan = planned(budget, model, importance)
    if plan is None:
        return
    units = removable(budget, model)
    size = len(units[0])
    gone = [plan.order[start : start + size] for start in range(0, len(plan.order), size)]
    assert all(unit in units for unit in gone)

    def rank(unit: list[int]) -> tuple[float, int]:
        return sum(importance[block] for block in unit), -unit[0]

    ranks = [rank(unit) for unit in gone]
    assert ranks == sorted(ranks)
    stay = [rank(unit) for unit in units if unit not in gone]
    assert not stay or max(ranks) < min(stay)
    if budget.param_ratio is not None:  # as few as reach it
        fewer = {block for unit in gone[:-1] for block in unit}
        freed = sum(model.parameters_per_block[block] for block in fewer)
        assert freed < budget.param_ratio * model.parameters


@often
@given(scored_models(), budgets(), st.sampled_from([0.25, 0.5, 2.0, 1024.0]))
def test_the_scale_of_importance_does_not_matter(
    scored: tuple[ModelInfo, list[float]], budget: Budget, scale: float
) -> None:
    model, importance = scored
    plan = planned(budget, model, importance)
    again = planned(budget, model, [scale * value for value in importance])
    assert (plan is None) == (again is None)
    if plan is not None and again is not None:
        assert plan.order == again.order


@often
@given(st.data(), models(), budgets())
def test_a_span_is_the_least_important_that_may_go(
    data: st.DataObject, model: ModelInfo, budget: Budget
) -> None:
    count = model.blocks
    spans = [
        data.draw(st.lists(importances, min_size=count - n + 1, max_size=count - n + 1))
        for n in range(1, count + 1)
    ]
    scores = scores_of(model, importance=spans[0], values=spans[0], spans=spans)
    try:
        plan = build_plan(budget, model=model, scores=scores)
    except BudgetError:
        return
    first, size = plan.removed[0], len(plan.removed)
    assert plan.removed == list(range(first, first + size))
    step = model.period if budget.period_aligned else 1
    safe = set(plan.protected)
    allowed = [
        start
        for start in range(0, count - size + 1, step)
        if not safe.intersection(range(start, start + size))
    ]
    assert spans[size - 1][first] == min(spans[size - 1][start] for start in allowed)
    assert first == max(s for s in allowed if spans[size - 1][s] == spans[size - 1][first])


@often
@given(st.data(), models())
def test_named_blocks_go_as_they_are_named(data: st.DataObject, model: ModelInfo) -> None:
    assume(model.blocks > 1)
    most = model.blocks - 1
    blocks = data.draw(st.lists(st.integers(0, most), min_size=1, max_size=most, unique=True))
    plan = build_plan(Budget(blocks=blocks), model=model)
    assert (plan.order, plan.removed) == (blocks, sorted(blocks))


# ---- rules of config fields

PATTERNED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "smollm3": {},
    "gpt2": {},
    "qwen3_moe": {
        "num_hidden_layers": 6, "mlp_only_layers": [1, 4], "decoder_sparse_step": 2,
        "num_experts": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 97, "intermediate_size": 48, "moe_intermediate_size": 16,
    },
}  # fmt: skip
"""Model type -> arguments where it is no variant of the tiny families."""


@cache
def patterned(model_type: str) -> Any:
    if PATTERNED[model_type]:
        return AutoConfig.for_model(model_type, **PATTERNED[model_type])
    return config_of(model_type)


def shortened(config: Any, raw: dict[str, Any], kept: list[int]) -> tuple[dict[str, Any], Any]:
    """The shortened config.json, and what transformers makes of it."""
    result = shorten_config(raw, config, kept)
    return result, as_read_from_disk(config, result)


kept_sets = st.sets(st.integers(0, 5), min_size=1).map(sorted)


@pytest.mark.parametrize("model_type", PATTERNED)
@seldom
@given(kept=kept_sets)
def test_every_list_follows_the_kept_blocks(model_type: str, kept: list[int]) -> None:
    config = patterned(model_type)
    count = config.num_hidden_layers
    raw = config.to_dict()
    result, read = shortened(config, raw, kept)
    assert read.num_hidden_layers == len(kept)
    for field, value in raw.items():
        if field in PER_BLOCK and isinstance(value, list) and len(value) == count:
            assert result[field] == [value[block] for block in kept]
        elif field in BLOCK_NUMBERS and isinstance(value, list) and model_type != "qwen3_moe":
            base = BLOCK_NUMBERS[field]
            found = {kept[number - base] for number in result[field]}
            assert found == {number - base for number in value} & set(kept)
        elif field in LEADING and isinstance(value, int):
            assert result[field] == sum(block < value for block in kept)
    if model_type == "qwen3_moe":  # which blocks are dense, by a step and a list before, a list now
        dense = {b for b in range(6) if b in (1, 4) or (b + 1) % 2}
        assert {kept[number] for number in result["mlp_only_layers"]} == dense & set(kept)
        assert result["decoder_sparse_step"] == 1


@pytest.mark.parametrize("model_type", PATTERNED)
@seldom
@given(data=st.data(), kept=kept_sets)
def test_two_removals_are_one(model_type: str, data: st.DataObject, kept: list[int]) -> None:
    config = patterned(model_type)
    inner = data.draw(st.sets(st.integers(0, len(kept) - 1), min_size=1).map(sorted))
    half, read = shortened(config, config.to_dict(), kept)
    twice, _ = shortened(read, half, inner)
    once, _ = shortened(config, config.to_dict(), [kept[block] for block in inner])
    # of few blocks a list follows several periods
    assert without_periods(twice) == without_periods(once)


def without_periods(config: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in config.items() if field not in PERIOD_OF}


@pytest.mark.parametrize("model_type", PATTERNED)
def test_removing_nothing_changes_nothing(model_type: str) -> None:
    config = patterned(model_type)
    result, read = shortened(config, config.to_dict(), list(range(config.num_hidden_layers)))
    assert read.num_hidden_layers == config.num_hidden_layers
    changed = {key for key, value in config.to_dict().items() if result.get(key) != value}
    assert changed == (
        {"mlp_only_layers", "decoder_sparse_step"} if model_type == "qwen3_moe" else set()
    )


words = st.text("abcdefgh_", min_size=1, max_size=6)
prefixes = st.lists(words, min_size=1, max_size=3).map(".".join)


@often
@given(prefixes, st.integers(1, 12), words, st.data())
def test_block_names_are_found_and_renumbered(
    prefix: str, count: int, rest: str, data: st.DataObject
) -> None:
    names = [f"{prefix}.{block}.{rest}.weight" for block in range(count)]
    others = data.draw(st.lists(words, max_size=3))
    found = find_block_names([*others, *names], count, prefix)
    assert found == BlockNames(prefix, count)
    for block, name in enumerate(names):
        assert found.block_of(name) == block
        new = data.draw(st.integers(0, count - 1))
        assert found.renumbered(name, new) == names[new]
    assert all(found.block_of(name) is None for name in others)


@often
@given(prefixes, st.integers(2, 12), st.data())
def test_a_missing_block_is_named(prefix: str, count: int, data: st.DataObject) -> None:
    missing = data.draw(st.integers(0, count - 1))
    names = [f"{prefix}.{block}.weight" for block in range(count) if block != missing]
    with pytest.raises(UnsupportedModelError, match=f"no tensor of block {missing} "):
        find_block_names(names, count, prefix)


# ---- tensors on disk

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip

letters = st.characters(exclude_categories=("Cs",), exclude_characters="\x00")
tensor_names = st.text(letters, min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors of any types and shapes under any names: empty ones and single numbers too."""
    table = {}
    for name in draw(st.lists(tensor_names, min_size=1, max_size=8, unique=True)):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(shapes)
        size = math.prod(shape) * dtype.itemsize
        raw = draw(st.binary(min_size=size, max_size=size))
        if dtype == torch.bool:
            raw = bytes(byte % 2 for byte in raw)
        data = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0).byte()
        table[name] = data.view(dtype).view(shape)
    return table


def bits(tensor: Tensor) -> bytes:
    """A tensor's bytes, NaNs included."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@contextmanager
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def assert_holds(found: dict[str, TensorEntry], expected: dict[str, Tensor]) -> None:
    """The table speaks of these tensors, and reading gives them."""
    assert found.keys() == expected.keys()
    for name, entry in found.items():
        tensor = read_tensor(entry)
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert entry.shape == tuple(tensor.shape) and entry.bytes == tensor.nbytes
        assert bits(tensor) == bits(expected[name])


@often
@given(tables(), st.data())
def test_any_sharing_out_gives_the_same_tensors(
    table: dict[str, Tensor], data: st.DataObject
) -> None:
    """Whatever the shards are called, in whatever order, and whatever else they hold."""
    names = st.from_regex(r"(x/)?[a-z]{1,5}-[0-9]{1,3}\.safetensors", fullmatch=True)
    shards = data.draw(st.lists(names, min_size=1, max_size=4, unique=True))
    weight_map = {name: data.draw(st.sampled_from(shards)) for name in table}
    doubled = data.draw(st.sampled_from([*table, None]))
    listed = dict(data.draw(st.permutations(list(weight_map.items()))))
    with directory() as place:
        for shard in set(weight_map.values()):
            part = {name: table[name] for name, held in weight_map.items() if held == shard}
            if doubled is not None:  # a second copy, which the index does not name
                part.setdefault(doubled, torch.zeros(2))
            (place / shard).parent.mkdir(exist_ok=True)
            save_file(part, place / shard)
        (place / SAFETENSORS_INDEX).write_text(json.dumps({"weight_map": listed}))
        assert_holds(read_tensor_table(place), table)


@often
@given(tables(), st.integers(1, 400))
def test_what_is_written_is_what_was_there(table: dict[str, Tensor], limit: int) -> None:
    with directory() as source, directory() as target:
        save_file(table, source / SAFETENSORS)
        entries = read_tensor_table(source)
        copied: list[int] = []
        write_tensors(target, entries, max_shard_bytes=limit, advance=copied.append)
        assert_holds(read_tensor_table(target), table)
        assert sum(copied) == sum(tensor.nbytes for tensor in table.values())
        files = sorted(target.glob("*.safetensors"))
        by_library = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert {name: bits(tensor) for name, tensor in by_library.items()} == {
            name: bits(tensor) for name, tensor in table.items()
        }
        for file in files:
            with safe_open(file, framework="pt") as stream:
                held = [table[name].nbytes for name in stream.keys()]
            assert sum(held) <= limit or sum(size > 0 for size in held) == 1
        if len(files) == 1:
            assert files == [target / SAFETENSORS]
            assert not (target / SAFETENSORS_INDEX).exists()
            return
        index = json.loads((target / SAFETENSORS_INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in table.values())
        assert index["weight_map"].keys() == table.keys()


@often
@given(
    st.sampled_from(DTYPES[:9]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 1),
    st.data(),
)
def test_shares_of_a_tensor_are_cut_out_as_by_numpy(
    dtype: torch.dtype, rows: int, count: int, share: int, axis: int, data: st.DataObject
) -> None:
    """Of `count` equal shares along an axis those that are kept, as bytes in a new file."""
    kept = data.draw(st.sets(st.integers(0, count - 1), min_size=1).map(sorted))
    shape = (count * share, rows) if axis == 0 else (rows, count * share)
    size = math.prod(shape) * dtype.itemsize
    raw = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
    tensor = torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(shape)
    places = [one * share + i for one in kept for i in range(share)]
    whole = np.frombuffer(bytes(raw), np.uint8).reshape(*shape, dtype.itemsize)
    expected = np.take(whole, places, axis=axis).tobytes()
    with directory() as source, directory() as target:
        save_file({"t": tensor}, source / SAFETENSORS)
        part = read_tensor_table(source)["t"].part(axis, count, kept)
        write_tensors(target, {"t": part})
        written = read_tensor_table(target)["t"]
        assert written.shape == part.shape and written.bytes == part.bytes
        assert bits(read_tensor(written)) == expected
