"""Estimated operations, times and memory against counts on real models and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_config
from families import LENGTH, build, config_of, loaded, opened, save, saved, token_ids
from test_cli import call

from shortllm import criteria
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.criteria import resolve
from shortllm.errors import CriterionError, ShortLLMError
from shortllm.model import Session
from shortllm.model.decoder import Decoder
from shortllm.pruning import estimate
from shortllm.pruning.estimate import Estimate, info, weightless
from shortllm.pruning.estimate_stages import EVALUATED, StageEstimate, stage_estimates
from shortllm.pruning.machine import MachineRates, Setting, measure_machine
from shortllm.pruning.scoring import Scorer
from shortllm.quantizing.options import QuantizeOptions
from shortllm.quantizing.quantize import check_model

SAMPLES = 3


def setting_of(checkpoint: Checkpoint, **changes: Any) -> Setting:
    """Three samples of twenty tokens in float32 on the CPU."""
    usual: dict[str, Any] = {
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "samples": SAMPLES,
        "length": LENGTH,
        "options": {},
    }
    return Setting(checkpoint=checkpoint, **{**usual, **changes})


def probe_of(*, compute: float, read: float, reduce: float = 1e30) -> MachineRates:
    return MachineRates(
        device="cpu",
        dtype="float32",
        block_flops_per_s=compute,
        head_flops_per_s=compute / 2,
        read_bytes_per_s=read,
        reduced_per_s=reduce,
        float64_flops_per_s=compute / 4,
        token_s=0.5,
    )


def estimates(setting: Setting, probe: MachineRates | None) -> list[Estimate]:
    return estimate.estimates(setting, weightless(setting), probe)


def seconds_of(one: Estimate) -> float:
    """At 1e6 operations per second in blocks, and half of that in the head."""
    decoder = Decoder(loaded("llama"))
    scorer = Scorer(
        checkpoint=opened("llama"), open_decoder=lambda: decoder, ids_BT=token_ids(SAMPLES)
    )
    blocks = scorer.work([resolve(one.criteria[0])], head=False)
    return (2 * one.flops - blocks) / 1e6


def of(found: list[Estimate], name: str, *, streamed: bool) -> Estimate:
    """The estimate of one criterion, one way."""
    [one] = [one for one in found if name in one.criteria and one.streamed == streamed]
    return one


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "mixtral", "gpt2", "falcon-alibi"])
def test_operations_are_those_that_scoring_counts(variant: str) -> None:
    decoder = Decoder(loaded(variant))
    scorer = Scorer(
        checkpoint=opened(variant), open_decoder=lambda: decoder, ids_BT=token_ids(SAMPLES)
    )
    for one in estimates(setting_of(opened(variant)), None):
        assert one.flops == scorer.work([resolve(one.criteria[0])]), one.criteria
        assert one.seconds is None


def test_operations_by_hand() -> None:
    checkpoint = opened("llama")
    found = estimates(setting_of(checkpoint), None)
    blocks, block = checkpoint.block_count, 2.0 * checkpoint.parameters_per_block[0]
    tokens, predictions = SAMPLES * LENGTH, SAMPLES * (LENGTH - 1)
    head = 2.0 * 97 * 32 * predictions
    passes = blocks * (blocks + 1) / 2
    by_hand = {
        "ppl": passes * block * tokens + (blocks + 1) * head,
        "taylor": 4 * blocks * block * tokens + 2 * head,
        "influence": blocks * block * tokens,
    }
    for name, flops in by_hand.items():
        assert of(found, name, streamed=True).flops == pytest.approx(flops, rel=1e-12)


def test_every_criterion_on_a_model_is_estimated_once_each_way() -> None:
    found = estimates(setting_of(opened("llama")), None)
    needs = {name: criteria.get(name).needs for name in criteria.names()}
    expected = {name for name in needs if needs[name] not in ("nothing", "sets", "choices")}
    for streamed in (False, True):
        listed = [name for one in found if one.streamed == streamed for name in one.criteria]
        assert sorted(listed) == sorted(expected)


def test_a_fast_reader_waits_for_the_products_only() -> None:
    probe = probe_of(compute=1e6, read=1e30, reduce=1e3)
    weights = sum(opened("llama").parameters_per_block)
    for one in estimates(setting_of(opened("llama")), probe):
        computing = seconds_of(one)
        expected = weights / 1e3 if one.criteria == ["magnitude"] else computing
        assert one.seconds == pytest.approx(expected)


def test_a_slow_reader_is_waited_for() -> None:
    checkpoint = opened("llama")
    options = {"greedy": {"rounds": 2}}
    setting = setting_of(checkpoint, options=options)
    found = estimates(setting, probe_of(compute=1e30, read=1e3))
    blocks = sum(checkpoint.bytes_per_block)
    outside, whole = checkpoint.bytes - blocks, checkpoint.bytes
    by_hand = {
        ("ppl", False): whole,
        ("ppl", True): outside + blocks,
        ("taylor", True): outside + 2 * blocks,
        ("influence", True): outside + blocks,
        ("greedy", True): outside + blocks * (1 + 5 / 6),
        ("magnitude", True): blocks,
        ("magnitude", False): blocks,
    }
    for (name, streamed), read in by_hand.items():
        assert of(found, name, streamed=streamed).seconds == pytest.approx(read / 1e3, rel=1e-6)


def test_reading_hides_behind_computing() -> None:
    checkpoint = opened("llama")
    balanced = probe_of(compute=1e6, read=1e6)
    one = of(estimates(setting_of(checkpoint), balanced), "ppl", streamed=True)
    outside = checkpoint.bytes - sum(checkpoint.bytes_per_block)
    computing = seconds_of(one)
    assert sum(checkpoint.bytes_per_block) / 1e6 < computing
    assert one.seconds == pytest.approx(outside / 1e6 + computing)


def test_other_stages_by_hand() -> None:
    setting = setting_of(opened("llama"))
    stages = stage_estimates(setting, weightless(setting), probe_of(compute=1e6, read=1e30))
    by_stage: dict[str, list[StageEstimate]] = {}
    for one in stages:
        by_stage.setdefault(one.stage, []).append(one)
    blocks = 2.0 * sum(opened("llama").parameters_per_block)
    token = (blocks + 2 * 2.0 * 97 * 32) / 1e6  # the head computes at half the rate
    [evaluating], [lora, full], [timing], [healing] = (
        by_stage[name] for name in ("eval", "retrain", "bench", "heal")
    )
    assert evaluating.seconds == pytest.approx(EVALUATED * token)
    assert lora.seconds == pytest.approx(2 * 64 * 256 * token)
    assert full.seconds == pytest.approx(3 * 64 * 2048 * token)
    assert timing.seconds == 30 * 128 * 0.5
    tokens, inputs, width = 64 * 256, 48, 32
    passing = 2 * tokens * blocks / 1e6 + 3 * tokens / 4 * token
    products = sum(2.0 * tokens * x * (x + 2 * width) for x in (inputs, inputs + width, inputs))
    assert healing.seconds > passing + products / 2.5e5
    assert healing.seconds == pytest.approx(passing + products / 2.5e5, rel=0.1)


def test_memory_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_resident_bytes", lambda: 0)
    checkpoint = opened("llama")
    found = estimates(setting_of(checkpoint), None)
    stream = SAMPLES * LENGTH * 32 * 4
    block = 4 * checkpoint.parameters_per_block[0]
    outside = checkpoint.bytes - sum(checkpoint.bytes_per_block)
    loss = SAMPLES * LENGTH * 97 * 12
    # matrices of a block: q, k, v, o, gate, up, down
    call = SAMPLES * LENGTH * 4 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    gradients = 2 * call + block + 8 * 32 * 48
    by_hand = {
        ("influence", False): checkpoint.bytes + 2 * stream + call,
        ("influence", True): outside + 4 * block + 2 * stream + call,
        ("lorp", False): checkpoint.bytes + 8 * stream + call,
        ("lorp", True): outside + 4 * block + 8 * stream + call,
        ("ppl", False): checkpoint.bytes + 8 * stream + max(call, loss),
        ("ppl", True): outside + 4 * block + 8 * stream + max(call, loss),
        ("taylor", True): outside + 4 * block + 9 * stream + max(gradients, loss),
        ("magnitude", True): block,
    }
    for (name, streamed), peak in by_hand.items():
        assert of(found, name, streamed=streamed).peak_bytes == peak, (name, streamed)


def test_streams_of_all_samples_are_held_where_blocks_are_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimate, "_resident_bytes", lambda: 0)
    few, many = (
        estimates(setting_of(opened("llama"), samples=samples), None) for samples in (100, 200)
    )
    stream = 100 * LENGTH * 32 * 4
    more = {
        (name, streamed): of(many, name, streamed=streamed).peak_bytes
        - of(few, name, streamed=streamed).peak_bytes
        for name in ("ppl", "taylor")
        for streamed in (False, True)
    }
    # a slice of the head grows with the samples until it reaches its bound
    assert more["ppl", True] - more["ppl", False] == 8 * stream
    assert more["taylor", True] == more["taylor", False] >= 9 * stream


def test_another_type_needs_room_for_the_mapped_file_while_loading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimate, "_resident_bytes", lambda: 0)
    checkpoint = opened("llama")
    found = estimates(setting_of(checkpoint, dtype=torch.bfloat16, samples=1, length=2), None)
    loading = checkpoint.bytes + checkpoint.bytes // 2
    assert of(found, "influence", streamed=False).peak_bytes == loading


def test_the_probe_measures_this_machine() -> None:
    found = measure_machine(setting_of(opened("llama"), dtype=torch.bfloat16))
    assert (found.device, found.dtype) == ("cpu", "bfloat16")
    assert 0 < found.block_flops_per_s < 1e18
    assert 0 < found.head_flops_per_s < 1e18
    assert 0 < found.read_bytes_per_s < 1e15
    assert 0 < found.reduced_per_s < 1e15


def test_options_of_a_criterion_change_the_estimates() -> None:
    few, many = (
        of(info(str(saved("llama")), probe=False, options=options).estimates, "greedy",
           streamed=True)
        for options in ({"greedy": {"rounds": 1}}, {"greedy": {"rounds": "2"}})
    )  # fmt: skip
    assert few.flops < many.flops < 2 * few.flops
    with pytest.raises(CriterionError, match="greedy' has no option 'round'"):
        info(str(saved("llama")), probe=False, options={"greedy": {"round": 1}})


@pytest.mark.parametrize(("free", "streams"), [(10**9, False), (1000, True), (None, False)])
def test_info_and_scoring_choose_by_one_rule(
    free: int | None, streams: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shortllm.model.loading.available_memory", lambda device: free)
    summary = info(str(saved("llama")), device="cpu", probe=False)
    assert summary.streamed == streams
    assert ("an unknown amount" if free is None else f"{free / 2**30:.1f} GiB") in summary.why
    assert Session(device="cpu").decoder(opened("llama")).streamed == streams


@pytest.mark.parametrize(
    ("model_type", "total", "active", "shared"),
    [("mixtral", 6, 2, 0), ("qwen2_moe", 4, 2, 1), ("deepseek_v3", 4, 2, 1), ("dbrx", 4, 2, 0)],
)
def test_info_counts_experts_and_says_what_quantize_refuses(
    model_type: str, total: int, active: int, shared: int, tmp_path: Path
) -> None:
    config = config_of("mixtral") if model_type == "mixtral" else tiny_config(model_type)
    found = info(str(save(build(config), tmp_path / "model")), probe=False)
    assert found.experts is not None and found.quantize_refuses is not None
    experts = (found.experts.total, found.experts.active, found.experts.shared)
    assert experts == (total, active, shared)
    with pytest.raises(ShortLLMError) as refused:
        check_model(QuantizeOptions(group_size=128), open_checkpoint(tmp_path / "model"))
    assert str(refused.value) == found.quantize_refuses


def test_info_of_a_plain_model_speaks_of_no_experts(capfd: pytest.CaptureFixture[str]) -> None:
    assert info("embedded", probe=False).experts is None
    assert info("embedded", probe=False).quantize_refuses is None
    code, printed, _ = call(capfd, "info", saved("mixtral"), "--no-probe")
    assert code == 0
    assert "experts: 6 in every block, 2 of them for each token\n" in printed
    assert "quantize would refuse it: " in printed and "outside linear layers" in printed
