"""Healing blocks with experts: one factor per channel for what all of them add."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from architectures import tiny_config
from safetensors.torch import load_file, save_file
from test_healing import blocks_of, healed, outputs, stream_behind, text
from torch import Tensor, nn

from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.errors import UnsupportedModelError
from shortllm.healing import heal
from shortllm.healing.experts import Factor, find_outputs, find_stored
from shortllm.healing.folding import find_added, find_foldable
from shortllm.healing.methods import Healed
from shortllm.healing.options import HeldOut
from shortllm.model.decoder import Decoder

SUMS = {"mixtral": "mlp", "qwen3_moe": "mlp", "gpt_oss": "mlp.experts", "qwen2_moe": "mlp"}
"""Family -> the module that returns the sum of experts. That of gpt_oss returns more around it."""

CHANGED = {
    "mixtral": ["mlp.experts.down_proj"],
    "qwen3_moe": ["mlp.experts.down_proj"],
    "gpt_oss": ["mlp.experts.down_proj", "mlp.experts.down_proj_bias"],
    "qwen2_moe": ["mlp.experts.down_proj", "mlp.shared_expert.down_proj"],
}
"""Family -> what is multiplied: all that the sum is proportional to."""

STORED = {
    "mixtral": [f"block_sparse_moe.experts.{e}.w2.weight" for e in range(6)],
    "qwen3_moe": [f"mlp.experts.{e}.down_proj.weight" for e in range(4)],
    "gpt_oss": ["mlp.experts.down_proj", "mlp.experts.down_proj_bias"],
    "qwen2_moe": [
        *(f"mlp.experts.{e}.down_proj.weight" for e in range(4)),
        "mlp.shared_expert.down_proj.weight",
    ],
}
"""Family -> the stored tensors of that, by their names within the block."""


@cache
def opened(family: str) -> Checkpoint:
    """The tiny checkpoint of a family."""
    if family in families.VARIANTS:
        return families.opened(family)
    directory = Path(families._DIRECTORY.name) / f"experts-{family}"
    return open_checkpoint(families.save(families.build(tiny_config(family)), directory))


def loaded(family: str) -> nn.Module:
    return families.load(opened(family).directory)


def block_tensors(directory: Path, b: int) -> dict[str, Tensor]:
    """The stored tensors of a block, by their names within it."""
    prefix = f"model.layers.{b}."
    found = load_file(directory / "model.safetensors")
    return {n.removeprefix(prefix): one for n, one in found.items() if n.startswith(prefix)}


def factors(family: str, before: dict[str, Tensor], after: dict[str, Tensor]) -> Tensor:
    """What each channel of every stored tensor was multiplied by, which must be one number."""
    found = []
    for name in STORED[family]:
        channels_last = family == "gpt_oss"
        rows = [one[name].double() if channels_last else one[name].double().mT for one in
                (before, after)]  # fmt: skip
        old_ND, new_ND = (one.reshape(-1, one.shape[-1]) for one in rows)
        factor_D = (old_ND * new_ND).sum(0) / old_ND.square().sum(0)
        torch.testing.assert_close(new_ND, old_ND * factor_D, rtol=1e-5, atol=1e-6)
        found.append(factor_D)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)
    return found[0]


@pytest.mark.parametrize("family", SUMS)
def test_what_the_sum_is_proportional_to_is_found(family: str) -> None:
    [output, experts] = find_foldable(opened(family), Decoder(loaded(family)), [3])[3]
    assert (output.name, experts.name) == ("self_attn.o_proj", SUMS[family])
    assert [one.name.removesuffix(".weight") for one in experts.experts] == CHANGED[family]
    names = [name for one in experts.experts for name in one.stored]
    assert sorted(names) == sorted(STORED[family])
    low = find_added(Decoder(loaded(family).bfloat16()), [1])[1]
    assert [one.name for one in low] == [output.name, experts.name]
    assert [(o.name, o.axis) for o in low[1].experts] == [(o.name, o.axis) for o in experts.experts]


@pytest.mark.parametrize("weighting", ["norm", "none"])
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("family", families.by_tier(SUMS, "qwen3_moe", "gpt_oss"))
def test_factors_equal_plain_least_squares(
    family: str, attention: bool, weighting: str, tmp_path: Path
) -> None:
    ridge, ids_BT = 0.05, text()
    [gap] = healed(
        opened(family), [2, 3], tmp_path, method="regression", ridge=ridge, weighting=weighting,
        attention=attention, gain=False, before=1,
    ).gaps  # fmt: skip
    assert gap.changed == [*(["self_attn.o_proj"] if attention else []), *CHANGED[family]]
    model, after = loaded(family), families.load(tmp_path / "healed")
    block: Any = blocks_of(model)[1]
    old = block.self_attn.o_proj.weight
    new = blocks_of(after)[1].self_attn.o_proj.weight  # type: ignore[union-attr]
    assert torch.equal(old, new) is not attention  # type: ignore[arg-type]
    block.self_attn.o_proj.weight = new  # the experts are fitted behind it
    module = block.get_submodule(SUMS[family])
    added_ND, after_ND = outputs(model, [module, block], ids_BT)
    wanted_ND = stream_behind(loaded(family), 3, ids_BT)
    size_N1 = wanted_ND.square().mean(1, keepdim=True).sqrt() if weighting == "norm" else 1.0
    x_ND, missing_ND = added_ND / size_N1, (wanted_ND - after_ND) / size_N1
    squares_D = x_ND.square().sum(0)
    change_D = (x_ND * missing_ND).sum(0) / (squares_D + ridge * squares_D.mean())
    stored = [block_tensors(tmp_path / name, 1) for name in ("short", "healed")]
    torch.testing.assert_close(factors(family, *stored), 1 + change_D, rtol=1e-4, atol=1e-5)
    # no other tensor is changed
    changed = {name for name in stored[0] if not torch.equal(stored[0][name], stored[1][name])}
    assert changed == {*STORED[family], *(["self_attn.o_proj.weight"] if attention else [])}
    # the checkpoint computes what the fit predicted
    predicted_ND = after_ND + added_ND * change_D
    computed_ND = stream_behind(after, 1, ids_BT)
    assert (computed_ND - predicted_ND).abs().max() <= 1e-5 * after_ND.abs().max()


@pytest.mark.parametrize("method", ["linear", "regression"])
@pytest.mark.parametrize(
    "family",
    families.by_tier([*SUMS, "deepseek_v2", "deepseek_v3", "olmoe", "granitemoe"], "deepseek_v3"),
)
def test_every_family_with_experts_comes_nearer(family: str, method: str, tmp_path: Path) -> None:
    source = opened(family)
    gain: dict[str, Any] = {} if method == "linear" else {"gain": False}
    record = healed(source, [3, 5], tmp_path, method=method, ridge=0.3, **gain)
    short, after = (open_checkpoint(tmp_path / name) for name in ("short", "healed"))
    assert [(n, e.shape, e.dtype) for n, e in short.tensors.items()] == [
        (n, e.shape, e.dtype) for n, e in after.tensors.items()
    ]
    assert all(gap.changed for gap in record.gaps)
    wanted_ND, *states = (
        stream_behind(families.load(one.directory), b, text())
        for one, b in ((source, 5), (short, 3), (after, 3))
    )
    sizes_N1 = wanted_ND.square().mean(1, keepdim=True)
    missing = [((state - wanted_ND).square() / sizes_N1).sum() for state in states]
    assert missing[1] < missing[0]


def test_a_shared_expert_is_refitted_and_the_others_stay(tmp_path: Path) -> None:
    [gap] = healed(
        opened("deepseek_v3"), [4], tmp_path, method="regression", ridge=0.05, gain=False
    ).gaps
    assert gap.block == 3 and gap.changed[-1] == "mlp.shared_experts.down_proj"
    before, after = (block_tensors(tmp_path / name, 3) for name in ("short", "healed"))
    changed = {
        name.removesuffix(".weight")
        for name in before if not torch.equal(before[name], after[name])
    }  # fmt: skip
    assert changed == set(gap.changed)
    decoder = Decoder(loaded("deepseek_v3"))
    found = find_foldable(opened("deepseek_v3"), decoder, [3])[3]
    assert [one.name for one in found] == [
        "self_attn.o_proj", "mlp.experts", "mlp.shared_experts.down_proj",
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_read_one_block_at_a_time_get_the_same_factors(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    better = HeldOut(samples=4, source=1.0, shortened=3.0, healed=2.0)
    monkeypatch.setattr(heal, "_measure", lambda task, healing: better)  # keep the whole change
    files = []
    for stream in (False, True):
        record = healed(
            opened(family), [1, 3], tmp_path / str(stream), method="regression", stream=stream
        )
        assert all(gap.gain != 1.0 for gap in record.gaps)
        files.append(tmp_path / str(stream) / "healed" / "model.safetensors")
    assert files[0].read_bytes() == files[1].read_bytes()


def test_half_of_a_change_is_half_of_its_factors() -> None:
    factor = Factor(torch.tensor([[1.5], [0.8]]), torch.float32)
    healing = Healed(gaps=[], folds={1: {"experts": factor}})
    found = heal._weaker(None, healing, 0.5).folds[1]["experts"]  # type: ignore[arg-type]
    assert isinstance(found, Factor)
    torch.testing.assert_close(found.value, torch.tensor([[1.25], [0.9]]))


def test_experts_in_bfloat16_compute_what_is_written(tmp_path: Path) -> None:
    """A token whose experts are nearly equal goes to others if a weight is rounded another way."""
    model = families.build(tiny_config("qwen3_moe")).bfloat16()
    source = open_checkpoint(families.save(model, tmp_path / "source"))
    record = healed(
        source, [2, 4], tmp_path, method="regression", ridge=0.3, dtype="bfloat16"
    )  # fmt: skip
    assert all(gap.gain != 1.0 for gap in record.gaps)  # the written checkpoint was verified
    assert {e.dtype for e in open_checkpoint(tmp_path / "healed").tensors.values()} == {"BF16"}


def rewritten(family: str, directory: Path, change: Any) -> Checkpoint:
    """The checkpoint of a family with each stored matrix of an expert changed."""
    directory.mkdir()
    source = opened(family).directory
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith((".w2.weight", "experts.0.down_proj.weight")):
            tensors[name] = change(tensor).contiguous()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text((source / "config.json").read_text())
    return open_checkpoint(directory)


def test_stored_tensors_are_found_by_their_values(tmp_path: Path) -> None:
    weight = blocks_of(loaded("mixtral"))[3].mlp.experts.down_proj  # type: ignore[union-attr]
    found, dtype = find_stored(opened("mixtral"), 3, weight, -2) or ({}, None)  # type: ignore[arg-type]
    assert found == dict.fromkeys(STORED["mixtral"], -2) and dtype == torch.float32
    turned = rewritten("mixtral", tmp_path / "turned", lambda tensor: tensor.T)
    found, _ = find_stored(turned, 3, weight, -2) or ({}, None)  # type: ignore[arg-type]
    assert found == dict.fromkeys(STORED["mixtral"], -1)
    whole = blocks_of(loaded("gpt_oss"))[3].mlp.experts.down_proj  # type: ignore[union-attr]
    found, _ = find_stored(opened("gpt_oss"), 3, whole, -1) or ({}, None)  # type: ignore[arg-type]
    assert found == {"mlp.experts.down_proj": -1}


@pytest.mark.parametrize("change", [lambda one: 2 * one, lambda one: one.to(torch.float8_e4m3fn)])
def test_experts_that_are_stored_otherwise_are_refused(change: Any, tmp_path: Path) -> None:
    other = rewritten("mixtral", tmp_path / "other", change)
    with pytest.raises(UnsupportedModelError, match=r"'mlp.experts.down_proj' of block 1 neither"):
        find_foldable(other, Decoder(loaded("mixtral")), [1])
    # next to a shared expert they need not change
    other = rewritten("deepseek_v3", tmp_path / "shared", change)
    found = find_foldable(other, Decoder(loaded("deepseek_v3")), [3])[3]
    assert [one.name for one in found] == ["self_attn.o_proj", "mlp.shared_experts.down_proj"]


class Doubled(nn.Module):
    """Two experts whose sum is not proportional to any of its parameters alone."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, 4, 3))
        self.constant = constant

    def forward(self, x_NI: Tensor) -> Tensor:
        """The sum, and a constant."""
        return torch.einsum("edi,ni->nd", self.down, x_NI) + self.constant


def test_a_sum_with_something_else_in_it_is_not_proportional() -> None:
    given = (torch.randn(5, 3),)
    assert find_outputs(Doubled(0.0), given, {}) == {"down": -2}
    assert find_outputs(Doubled(1.0), given, {}) is None


@pytest.mark.parametrize("family", ["dbrx", pytest.param("inkling_text", marks=pytest.mark.slow)])
def test_experts_that_are_not_stacked_are_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=f"type '{family}' has no linear projection"):
        healed(opened(family), [2], tmp_path)
    assert not (tmp_path / "healed").exists()


def test_looking_for_them_changes_nothing() -> None:
    model = loaded("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_foldable(opened("mixtral"), Decoder(model), [1, 3])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
