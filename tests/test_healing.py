"""Healing without training: fits equal plain least squares, merges equal their formula."""

from __future__ import annotations

import copy
import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import families
import pytest
import retraining
import test_scoring
import torch
from torch import Tensor, nn

import shortllm
from shortllm import pipeline
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.structure import find_blocks
from shortllm.cli import main
from shortllm.data.calibration import Calibration, tokens_fingerprint
from shortllm.data.options import CalibrationInfo, CalibrationOptions
from shortllm.errors import (
    CheckpointError,
    DataError,
    OutputError,
    ShortLLMError,
    UnsupportedModelError,
)
from shortllm.evaluation.options import Evaluation, EvaluationOptions
from shortllm.files import overwriting
from shortllm.format import number
from shortllm.healing import least_squares
from shortllm.healing.folding import find_added
from shortllm.healing.gap_by_gap import heal_gaps, steps_of
from shortllm.healing.heal import heal_from, healing_text
from shortllm.healing.least_squares import (
    RIDGES,
    Change,
    GapSums,
    GapTokens,
    choose_ridge,
    solve,
)
from shortllm.healing.methods import Task
from shortllm.healing.options import HealCalibration, Healing, HealOptions
from shortllm.merging.merge import (
    check_blocks,
    folded,
    merge_from,
    merged_tensors,
    original_blocks,
)
from shortllm.merging.options import MergeOptions, Merging
from shortllm.model import Session
from shortllm.model.decoder import Decoder
from shortllm.options import options_from
from shortllm.pruning.budget import Gap, gaps_of
from shortllm.recipe import Recipe, changed, parse_recipe
from shortllm.surgery.origin import lineage

DOWN = {
    "llama": "mlp.down_proj",
    "mistral": "mlp.down_proj",
    "qwen2": "mlp.down_proj",
    "qwen3": "mlp.down_proj",
    "phi3": "mlp.down_proj",
    "granite": "mlp.down_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "gpt_neox-serial": "mlp.dense_4h_to_h",
    "falcon": "mlp.dense_4h_to_h",
    "phi": "mlp.fc2",
    "bloom": "mlp.dense_4h_to_h",
    "opt": "fc2",
    "gpt2": "mlp.c_proj",
    "gptj": "mlp.fc_out",
}
"""Family -> what it calls its down projection."""

OUTPUT = {
    "llama": "self_attn.o_proj",
    "granite": "self_attn.o_proj",
    "gpt2": "attn.c_proj",
    "gpt_neox": "attention.dense",
}
"""Family -> what it calls the output projection of its attention."""

NORMS = {
    "gemma2": "post_feedforward_layernorm",
    "gemma3_text": "post_feedforward_layernorm",
    "olmo2": "post_feedforward_layernorm",
    "opt-projected": "final_layer_norm",
}
"""Family -> what it calls the norm behind its MLP; the last one is behind the addition too."""

CPU = torch.device("cpu")
REMOVED = {"contiguous": [2, 3], "scattered": [1, 3, 4]}


def calibration(ids_BT: Tensor) -> Calibration:
    info = CalibrationInfo(
        source="test", sampler="given", samples=len(ids_BT), length=ids_BT.shape[1], bos="none",
        tokens_fingerprint=tokens_fingerprint(ids_BT), fingerprint="test",
    )  # fmt: skip
    return Calibration(ids=ids_BT, info=info)


def text() -> Tensor:
    return families.token_ids(16, seed=5)


def healed(
    variant: str | Checkpoint,
    removed: list[int],
    directory: Path,
    *,
    stream: bool | None = None,
    dtype: str = "auto",
    **options: Any,
) -> Healing:
    """A family's tiny model shortened to `directory/short` and healed to `directory/healed`."""
    source = families.opened(variant) if isinstance(variant, str) else variant
    short = open_checkpoint(families.shortened(source, removed, directory / "short"))
    return heal_from(
        short,
        source,
        HealOptions(**{"method": "linear", **options}),
        directory / "healed",
        calibration=calibration(text()),
        session=Session(device="cpu", stream=stream, dtype=dtype),
    )


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return find_blocks(model, model.config)[1]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=families.token_ids(2, seed=3), use_cache=False).logits


def stream_behind(model: nn.Module, block: int, ids_BT: Tensor) -> Tensor:
    """The stream that leaves a block in a whole forward, float64 `[tokens, width]`."""
    return outputs(model, [blocks_of(model)[block]], ids_BT)[0]


@torch.no_grad()
def outputs(model: nn.Module, modules: list[nn.Module], ids_BT: Tensor) -> list[Tensor]:
    """What each module returns in a whole forward, float64 `[tokens, width]`."""
    seen: dict[int, Tensor] = {}

    def keep(place: int) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            seen[place] = first.double().reshape(ids_BT.numel(), -1)

        return hook

    handles = [module.register_forward_hook(keep(n)) for n, module in enumerate(modules)]
    model(input_ids=ids_BT, use_cache=False)
    for handle in handles:
        handle.remove()
    return [seen[place] for place in range(len(modules))]


def plain_least_squares(
    variant: str, removed: list[int], down: str, scale: float, ridge: float, weighted: bool
) -> nn.Module:
    """The source with maps folded in gap after gap and the blocks bypassed, by whole forwards and
    `lstsq` on all tokens at once."""
    ids_BT = text()
    intact = families.loaded(variant)
    model = families.load(families.saved(variant))
    blocks = blocks_of(model)
    with Decoder(model).without(removed):
        for gap in gaps_of(removed):
            assert gap.before is not None
            wanted_ND = stream_behind(intact, gap.stop - 1, ids_BT)
            module = blocks[gap.before].get_submodule(down)
            added_ND, after_ND = outputs(model, [module, blocks[gap.before]], ids_BT)
            added_ND = scale * added_ND
            width = added_ND.shape[1]
            if weighted:
                size_N1 = wanted_ND.square().mean(1, keepdim=True).sqrt()
                added_ND, after_ND, wanted_ND = (
                    one / size_N1 for one in (added_ND, after_ND, wanted_ND)
                )
            penalty = ridge * added_ND.square().sum() / width
            rows = torch.cat([added_ND, penalty.sqrt() * torch.eye(width, dtype=torch.float64)])
            rest_ND = after_ND - added_ND
            goal = torch.cat(
                [wanted_ND - rest_ND, penalty.sqrt() * torch.eye(width, dtype=torch.float64)]
            )
            map_DD = torch.linalg.lstsq(rows, goal).solution
            with torch.no_grad():
                weight = module.weight.double()
                linear = isinstance(module, nn.Linear)
                module.weight.copy_(map_DD.T @ weight if linear else weight @ map_DD)
                if module.bias is not None:
                    module.bias.copy_(map_DD.T @ module.bias.double())
    return model


@pytest.mark.parametrize("weighting", ["norm", "none"])
@pytest.mark.parametrize("shape", REMOVED)
@pytest.mark.parametrize(
    "variant", families.by_tier(["llama", "gpt2", "granite", "gpt_neox", "opt"], "granite")
)
def test_maps_equal_plain_least_squares(
    variant: str, shape: str, weighting: str, tmp_path: Path
) -> None:
    removed, ridge = REMOVED[shape], 0.05
    record = healed(variant, removed, tmp_path, ridge=ridge, weighting=weighting)
    assert [gap.changed for gap in record.gaps] == [[DOWN[variant]]] * len(record.gaps)
    scale = 0.4 if variant == "granite" else 1.0
    assert [gap.scale for gap in record.gaps] == pytest.approx([scale] * len(record.gaps), rel=1e-4)
    model = plain_least_squares(variant, removed, DOWN[variant], scale, ridge, weighting == "norm")
    with Decoder(model).without(removed):
        expected = logits(model)
    found = logits(families.load(tmp_path / "healed"))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    before = logits(families.load(tmp_path / "short"))
    assert (found - before).abs().max() > 1e-2 * before.abs().max()


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("variant", ["llama", "gpt2", "granite"])
def test_regression_equals_plain_least_squares(
    variant: str, attention: bool, tmp_path: Path
) -> None:
    ridge, ids_BT, down = 0.05, text(), DOWN[variant]
    [gap] = healed(
        variant, [2, 3], tmp_path, method="regression", ridge=ridge, weighting="none",
        attention=attention, gain=False, before=1,
    ).gaps  # fmt: skip
    model, scale = families.load(families.saved(variant)), 0.4 if variant == "granite" else 1.0
    block = blocks_of(model)[1]
    healed_block = blocks_of(families.load(tmp_path / "healed"))[1]
    if attention:  # the MLP's projection is fitted behind the new one of the attention
        before, output = block.get_submodule(OUTPUT[variant]), OUTPUT[variant]
        new = healed_block.get_submodule(output).weight
        assert not torch.equal(before.weight, new)
        before.weight = new
    module: Any = block.get_submodule(down)
    inputs: list[Tensor] = []
    with module.register_forward_pre_hook(lambda _, given: inputs.append(given[0])):
        after_ND = stream_behind(model, 1, ids_BT)
    x_NI = scale * inputs[0].double().flatten(0, -2)
    wanted_ND = stream_behind(families.loaded(variant), 3, ids_BT)
    columns = x_NI.shape[1]
    penalty = ridge * x_NI.square().sum() / columns
    rows = torch.cat([x_NI, penalty.sqrt() * torch.eye(columns, dtype=torch.float64)])
    missing = torch.cat([wanted_ND - after_ND, torch.zeros(columns, wanted_ND.shape[1])])
    change_ID = torch.linalg.lstsq(rows, missing).solution
    found: Any = healed_block.get_submodule(down)
    weight, before = found.weight.double(), module.weight.double()
    change = change_ID.T if isinstance(module, nn.Linear) else change_ID
    torch.testing.assert_close(weight - before, change, rtol=1e-3, atol=1e-5)
    # the checkpoint computes what the fit predicted
    left = ((after_ND + x_NI @ change_ID - wanted_ND) ** 2).sum()
    computed = stream_behind(families.load(tmp_path / "healed"), 1, ids_BT)
    assert ((computed - wanted_ND) ** 2).sum().item() == pytest.approx(left.item(), rel=1e-5)
    assert gap.effective_rank is not None and 0 < gap.effective_rank < columns


@pytest.mark.parametrize("removed", [[1], [3], [2, 3], [4, 5]])
def test_the_attention_is_changed_only_where_that_helps(removed: list[int], tmp_path: Path) -> None:
    [both], [alone] = (
        healed(
            "llama", removed, tmp_path / str(attention), method="regression", attention=attention
        ).gaps
        for attention in (True, False)
    )
    assert alone.changed in ([DOWN["llama"]], [])
    if both.changed == alone.changed:
        assert both.error_after == alone.error_after
    else:
        assert both.changed == [OUTPUT["llama"], DOWN["llama"]]
        assert both.error_after < alone.error_after  # type: ignore[operator]


def inputs_of(
    model: nn.Module, modules: list[nn.Module], b: int, ids_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """What some modules are called with, side by side, and the stream behind block `b`."""
    inputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, given: Any) -> None:
        inputs[module] = given[0].double().flatten(0, -2)

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(keep))
        after_ND = stream_behind(model, b, ids_BT)
    return torch.cat([inputs[module] for module in modules], dim=1), after_ND


def test_blocks_further_before_a_gap_are_solved_together(tmp_path: Path) -> None:
    ridge, ids_BT, down = 0.05, text(), DOWN["llama"]
    [gap] = healed(
        "llama", [3, 4], tmp_path, method="regression", ridge=ridge, weighting="none",
        attention=False, gain=False, before=2,
    ).gaps  # fmt: skip
    assert (gap.block, gap.earlier) == (2, [1])
    blocks = blocks_of(families.load(tmp_path / "healed"))
    model = families.load(families.saved("llama"))
    wanted_ND = stream_behind(families.loaded("llama"), 4, ids_BT)
    for solved in ([1, 2], [2]):  # each together with those behind it
        modules: list[Any] = [blocks_of(model)[b].get_submodule(down) for b in solved]
        x_NI, after_ND = inputs_of(model, modules, 2, ids_BT)
        penalty = ridge * x_NI.square().sum() / x_NI.shape[1]
        eye = torch.eye(x_NI.shape[1], dtype=torch.float64)
        change_ID = torch.linalg.solve(
            x_NI.T @ x_NI + penalty * eye, x_NI.T @ (wanted_ND - after_ND)
        )
        first, found = modules[0], blocks[solved[0]].get_submodule(down)
        change = change_ID[: first.in_features].T
        torch.testing.assert_close(
            found.weight.double() - first.weight.double(), change, rtol=1e-3, atol=1e-5
        )
        first.weight = found.weight  # only that is changed; then the rest is read again
    left = stream_behind(families.load(tmp_path / "healed"), 2, ids_BT) - wanted_ND
    assert left.square().sum() < (after_ND - wanted_ND).square().sum()
    [alone] = healed(
        "llama", [3, 4], tmp_path / "alone", method="regression", weighting="none",
        attention=False, gain=False, before=1, ridge=ridge,
    ).gaps  # fmt: skip
    assert gap.error_before == pytest.approx(alone.error_before)


@pytest.mark.parametrize("variant", ["gemma2", "mixtral"])
def test_what_is_not_a_plain_projection_has_no_blocks_further_before(
    variant: str, tmp_path: Path
) -> None:
    [one], [more] = (
        healed(variant, [3], tmp_path / str(n), method="regression", before=n).gaps for n in (1, 3)
    )
    assert one == more


def test_blocks_behind_a_gap_are_refitted_too(tmp_path: Path) -> None:
    options: Any = {"method": "regression", "weighting": "none", "gain": False, "ridge": 0.05}
    plain = healed("llama", [1, 3], tmp_path / "plain", **options)
    more = healed("llama", [1, 3], tmp_path / "more", **options, behind=2)
    # block 2 is in front of a gap; block 6 is too far
    assert [(gap.block, gap.removed) for gap in more.gaps] == [
        (0, [1]), (2, [3]), (4, []), (5, []),
    ]  # fmt: skip
    assert plain.gaps == more.gaps[:2]
    intact, ids_BT = families.loaded("llama"), text()
    for place, block in ((2, 4), (3, 5)):
        wanted_ND = stream_behind(intact, block, ids_BT)
        distances = [
            (stream_behind(families.load(tmp_path / name / "healed"), place, ids_BT) - wanted_ND)
            .square().sum().item()
            for name in ("more", "plain")
        ]  # fmt: skip
        assert distances[0] < distances[1]


@pytest.mark.parametrize("weighting", ["norm", "none"])
@pytest.mark.parametrize("variant", families.by_tier(NORMS, "gemma2"))
def test_gains_equal_plain_least_squares(variant: str, weighting: str, tmp_path: Path) -> None:
    ridge, ids_BT, name = 0.05, text(), NORMS[variant]
    [gap] = healed(variant, [2, 3], tmp_path, ridge=ridge, weighting=weighting).gaps
    assert gap.changed == [name]
    model = families.load(families.saved(variant))
    module: Any = blocks_of(model)[1].get_submodule(name)
    added_ND, after_ND = outputs(model, [module, blocks_of(model)[1]], ids_BT)
    wanted_ND = stream_behind(families.loaded(variant), 3, ids_BT)
    size_N1 = wanted_ND.square().mean(1, keepdim=True).sqrt() if weighting == "norm" else 1.0
    x_ND, missing_ND = added_ND / size_N1, (wanted_ND - after_ND) / size_N1
    squares_D = x_ND.square().sum(0)
    change_D = (x_ND * missing_ND).sum(0) / (squares_D + ridge * squares_D.mean())
    found: Any = blocks_of(families.load(tmp_path / "healed"))[1].get_submodule(name)
    offset = 1.0 if variant.startswith("gemma") else 0.0
    torch.testing.assert_close(
        found.weight.double() + offset, (module.weight.double() + offset) * (1 + change_D),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    # the checkpoint computes what the fit predicted
    computed = stream_behind(families.load(tmp_path / "healed"), 1, ids_BT)
    assert (computed - after_ND - added_ND * change_D).abs().max() <= 1e-5 * after_ND.abs().max()


@pytest.mark.parametrize("variant", families.by_tier(["gemma2", "gemma3_text", "olmo2"], "olmo2"))
def test_a_projection_in_front_of_a_norm_is_refitted(variant: str, tmp_path: Path) -> None:
    gaps = {
        method: healed(variant, [2, 3], tmp_path / method, method=method).gaps[0]
        for method in ("linear", "regression")
    }
    assert gaps["regression"].changed == ["mlp.down_proj", NORMS[variant]]
    after = {method: gap.error_after for method, gap in gaps.items()}
    assert gaps["linear"].error_before is not None
    assert after["regression"] < after["linear"] <= gaps["linear"].error_before  # type: ignore[operator]


@pytest.mark.parametrize("method", ["linear", pytest.param("regression", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", families.by_tier(DOWN, "opt"))
def test_every_family_comes_nearer_to_the_source(variant: str, method: str, tmp_path: Path) -> None:
    no_factor: dict[str, Any] = {} if method == "linear" else {"gain": False}
    record = healed(variant, [2, 4], tmp_path, method=method, ridge=0.3, **no_factor)
    assert [gap.block for gap in record.gaps] == [1, 3]
    changed = {name for gap in record.gaps for name in gap.changed}
    for gap in record.gaps:
        assert gap.changed[-1] == DOWN[variant]
        assert len(gap.changed) <= (1 if method == "linear" else 2)
        assert 0 < gap.effective_rank < 128  # type: ignore[operator]
    short, after = (open_checkpoint(tmp_path / name) for name in ("short", "healed"))
    changed_names = {
        name for name, entry in short.tensors.items() if read(entry) != read(after.tensors[name])
    }
    assert {name.rsplit(".", 1)[0].split(".", 3)[-1] for name in changed_names} <= {
        *changed, *(f"{b}.{name}" for b in (0, 1, 2) for name in changed)
    }  # fmt: skip
    assert changed_names and len(changed_names) <= 4 * len(changed)
    assert [(n, e.shape, e.dtype) for n, e in short.tensors.items()] == [
        (n, e.shape, e.dtype) for n, e in after.tensors.items()
    ]
    ids_BT = text()
    wanted = stream_behind(families.loaded(variant), 4, ids_BT)
    missing = [
        ((stream_behind(families.load(one.directory), 2, ids_BT) - wanted) ** 2).sum()
        for one in (short, after)
    ]
    assert missing[1] < missing[0]


def read(entry: Any) -> bytes:
    return bytes(entry.file.read_bytes()[entry.offset : entry.offset + entry.bytes])


def test_a_strong_ridge_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    healed("llama", [2, 4], tmp_path, ridge=1e12)
    short, after = (logits(families.load(tmp_path / name)) for name in ("short", "healed"))
    assert (short - after).abs().max() <= 1e-6 * short.abs().max()


@pytest.mark.parametrize("method", ["linear", "regression"])
@pytest.mark.parametrize("variant", families.by_tier(["llama", "gpt2", "gpt_neox"]))
def test_streamed_equals_resident(variant: str, method: str, tmp_path: Path) -> None:
    records = [
        healed(variant, [1, 3, 4], tmp_path / str(stream), stream=stream, method=method)
        for stream in (False, True)
    ]
    assert records[0].gaps == records[1].gaps
    files = [tmp_path / str(stream) / "healed" / "model.safetensors" for stream in (False, True)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_checkpoint_in_bfloat16_stays_one(tmp_path: Path) -> None:
    source = families.save(families.build("llama").bfloat16(), tmp_path / "source")
    record = healed(open_checkpoint(source), [2], tmp_path, ridge=0.1)
    tensors = open_checkpoint(tmp_path / "healed").tensors
    assert {entry.dtype for entry in tensors.values()} == {"BF16"}
    assert record.dtype == "float32"
    healed(open_checkpoint(source), [2], tmp_path / "low", ridge=0.1, dtype="bfloat16")


def test_sums_do_not_depend_on_how_tokens_are_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    added, after, wanted = (torch.randn(300, 8, generator=generator) * 100 for _ in range(3))
    found = []
    for size in (1, 7, 300):
        moments = GapSums(8, 8, CPU, weighted=True)
        for start in range(0, 300, size):
            moments.add(*(one[start : start + size] for one in (added, after, wanted)))
        assert moments.products_II.dtype == torch.float64
        found.append(solve(moments, 1e-3).weights_ID)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-11, atol=1e-13)


def test_the_error_of_sums_is_the_error_of_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    added, after, wanted = (torch.randn(50, 6, generator=generator).double() for _ in range(3))
    moments = GapSums(6, 6, CPU, weighted=False)
    moments.add(added, after, wanted)
    change = torch.randn(6, 6, generator=generator).double()
    direct = (added @ change + after - wanted).square().sum().item()
    assert moments.error(Change(change)) == pytest.approx(direct, rel=1e-12)
    best = solve(moments, 1e-9).weights_ID
    direct_best = torch.linalg.lstsq(added, wanted - after).solution
    torch.testing.assert_close(best, direct_best, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gain", [True, False])
def test_a_part_of_the_columns_chooses_the_ridge(
    gain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(4)
    change = torch.randn(12, 40, generator=generator)

    def sums(tokens: int) -> GapSums:
        x_NI, after_ND, noise_ND = (
            torch.randn(tokens, columns, generator=generator) for columns in (12, 40, 40)
        )
        moments = GapSums(12, 40, CPU, weighted=False, gain=gain)
        moments.add(x_NI, after_ND, 1.1 * after_ND + x_NI @ change + 4.0 * noise_ND)
        return moments

    fitted, held_out = sums(20), sums(200)
    errors = {ridge: held_out.error(solve(fitted, ridge)) for ridge in RIDGES}
    all_columns = choose_ridge(fitted, held_out)
    assert all_columns == (min(errors, key=errors.__getitem__), min(errors.values()))
    monkeypatch.setattr(least_squares, "COLUMNS", 10)
    ridge, left = choose_ridge(fitted, held_out)
    part = slice(None, None, 4)
    few = {
        ridge: held_out.columns(part).error(solve(fitted.columns(part), ridge)) for ridge in RIDGES
    }
    assert ridge == min(few, key=few.__getitem__)
    share = held_out.columns(part).missing / held_out.missing
    assert left == pytest.approx(few[ridge] / share, rel=1e-12)
    assert left == pytest.approx(errors[ridge], rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("gain", [True, False])
def test_tokens_themselves_choose_and_add_up_as_their_sums(
    gain: bool, weighted: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(5)
    how = {"weighted": weighted, "gain": gain, "dtype": dtype}
    kinds = (GapSums, GapSums, GapTokens)
    fitted, sums, tokens = (kind(12, 8, CPU, **how) for kind in kinds)
    both = [sums, tokens]
    for count, into in ((40, [fitted]), (5, both), (0, both), (4, both)):
        x_NI, after_ND, noise_ND = (
            torch.randn(count, size, generator=generator) for size in (12, 8, 8)
        )
        for one in into:
            one.add(x_NI, after_ND, 1.2 * after_ND + noise_ND)
    solved = solve(fitted, 0.1)
    close = {"rel": 1e-12 if dtype == torch.float64 else 1e-5}
    part, few = slice(3, 12), slice(None, None, 2)
    assert (solved.gain != 1.0) == gain
    assert tokens.error(solved) == pytest.approx(sums.error(solved), **close)
    assert tokens.relative(tokens.missing) == pytest.approx(sums.relative(sums.missing), **close)
    change = solve(fitted.rows(part).columns(few), 0.1)
    expected = sums.rows(part).columns(few).error(change)
    assert tokens.rows(part).columns(few).error(change) == pytest.approx(expected, **close)
    ridge, left = choose_ridge(fitted, sums)
    assert choose_ridge(fitted, tokens) == (ridge, pytest.approx(left, **close))
    other = copy.deepcopy(fitted)
    tokens.add_to(fitted)
    sums.add_to(other)
    one, same = solve(fitted, 0.1), solve(other, 0.1)
    torch.testing.assert_close(one.weights_ID, same.weights_ID, rtol=1e-5, atol=1e-5)
    assert one.gain == pytest.approx(same.gain, **close)
    assert fitted.wanted == pytest.approx(other.wanted, **close)


def test_a_map_that_does_no_good_elsewhere_is_not_chosen() -> None:
    generator = torch.Generator().manual_seed(2)

    def sums(sign: float) -> GapSums:
        added = torch.randn(64, 4, generator=generator)
        moments = GapSums(4, 4, CPU, weighted=False)
        moments.add(added, torch.zeros(64, 4), sign * added)
        return moments

    assert choose_ridge(sums(1.0), sums(-1.0))[0] is None
    fitted, held_out = sums(1.0), sums(1.0)
    ridge, left = choose_ridge(fitted, held_out)
    assert ridge is not None and left < 1e-3 * held_out.missing
    still = GapSums(4, 4, CPU, weighted=True)
    still.add(torch.zeros(5, 4), torch.zeros(5, 4), torch.ones(5, 4))
    assert not solve(still, 1.0).weights_ID.any()


def test_gaps_and_the_way_through_them() -> None:
    assert gaps_of([4, 0, 1, 6]) == [Gap(0, 2), Gap(4, 5), Gap(6, 7)]
    gap = Gap(2, 4)
    assert steps_of([gap]) == [(0, None), (1, None), (2, None), (3, None), (1, gap)]
    assert steps_of([Gap(0, 1)]) == [(0, None)]


def test_blocks_at_the_start_are_left_as_they_are(tmp_path: Path) -> None:
    record = healed("llama", [0, 3], tmp_path, ridge=0.1)
    assert [(gap.block, gap.removed) for gap in record.gaps] == [(None, [0]), (2, [3])]
    with pytest.raises(UnsupportedModelError, match="lacks the first 2 blocks"):
        healed("llama", [0, 1], tmp_path / "other")


def test_the_last_blocks_may_be_gone(tmp_path: Path) -> None:
    record = healed("llama", [4, 5], tmp_path, ridge=1e-6)
    [gap] = record.gaps
    assert gap.block == 3 and gap.error_after < gap.error_before  # type: ignore[operator]


def test_a_shortened_checkpoint_shortened_again(tmp_path: Path) -> None:
    source = families.opened("llama")
    once = open_checkpoint(families.shortened(source, [1], tmp_path / "once"))
    twice = open_checkpoint(families.shortened(once, [2], tmp_path / "twice"))  # 3 of the source
    record = heal_from(
        twice, source, HealOptions(), tmp_path / "healed",
        calibration=calibration(text()), session=Session(device="cpu"),
    )  # fmt: skip
    assert [(gap.block, gap.removed) for gap in record.gaps] == [(0, [1]), (2, [3])]


def test_a_finished_one_is_left_alone_and_another_replaced(tmp_path: Path) -> None:
    first = healed("llama", [2], tmp_path)
    config = tmp_path / "healed" / "config.json"
    written = config.stat().st_mtime_ns
    assert healed("llama", [2], tmp_path) == first
    assert config.stat().st_mtime_ns == written
    entry = json.loads(config.read_text())["shortllm"]
    assert entry["removed_blocks"] == [2] and entry["healed"]["fingerprint"] == first.fingerprint
    with pytest.raises(OutputError, match=r"ridge: null, now 0\.5.*--overwrite"):
        healed("llama", [2], tmp_path, ridge=0.5)
    assert config.stat().st_mtime_ns == written
    with overwriting():
        assert healed("llama", [2], tmp_path, ridge=0.5).gaps[0].ridge == 0.5


def test_only_what_was_just_shortened_is_healed(tmp_path: Path) -> None:
    source = families.opened("llama")
    healed("llama", [2], tmp_path, ridge=0.1)
    again = open_checkpoint(tmp_path / "healed")
    arguments: dict[str, Any] = {
        "calibration": calibration(text()), "session": Session(device="cpu"),
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="down_proj.*retrained, healed or merged"):
        heal_from(again, source, HealOptions(), tmp_path / "twice", **arguments)
    with pytest.raises(CheckpointError, match="does not say from which model.*shortllm prune"):
        heal_from(source, source, HealOptions(), tmp_path / "none", **arguments)
    short = open_checkpoint(tmp_path / "short")
    with pytest.raises(CheckpointError, match="from 6 blocks.*has 5.*--source"):
        heal_from(short, short, HealOptions(), tmp_path / "own", **arguments)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="contains something else"):
        heal_from(short, source, HealOptions(), tmp_path / "full", **arguments)
    with pytest.raises(OutputError, match="the original model, which is never changed"):
        heal_from(short, source, HealOptions(), tmp_path / "short", **arguments)
    arguments["calibration"] = calibration(text()[:1])
    with pytest.raises(DataError, match="1 sample is too few"):
        heal_from(short, source, HealOptions(), tmp_path / "few", **arguments)


def test_the_projection_is_found_in_bfloat16_and_where_it_adds_nothing() -> None:
    model = families.build("llama")
    with torch.no_grad():
        blocks_of(model)[2].mlp.down_proj.weight.zero_()
    assert [one.name for one in find_added(Decoder(model), [2])[2]][-1] == "mlp.down_proj"
    for variant in OUTPUT:
        found = find_added(Decoder(families.build(variant).bfloat16()), [0, 3])
        expected = [OUTPUT[variant], DOWN[variant]]
        assert [[one.name for one in projections] for projections in found.values()] == [
            expected, expected
        ]  # fmt: skip
    for variant, offset in (("gemma2", 1), ("olmo2", 0)):
        [_, mlp] = find_added(Decoder(families.build(variant).bfloat16()), [1])[1]
        assert (mlp.name, mlp.projection.name) == (NORMS[variant], "mlp.down_proj")
        assert mlp.norm is not None and mlp.norm.offset == offset


def test_the_source_is_left_as_it_was() -> None:
    decoder = Decoder(families.build("llama"))
    before = {name: tensor.clone() for name, tensor in decoder.model.state_dict().items()}
    task = Task(
        decoder=decoder, checkpoint=families.opened("llama"), removed=[2], ids_BT=text(),
        held_out=4, options=HealOptions(ridge=0.1), memory=Session(device="cpu").memory(),
    )  # fmt: skip
    heal_gaps(task)
    for name, tensor in decoder.model.state_dict().items():
        assert torch.equal(tensor, before[name])


# ---- merging


def test_a_merge_is_the_formula() -> None:
    blocks = original_blocks(6)
    once = folded(blocks, 3, 2)
    assert list(once) == [0, 1, 2, 3] and once[3] == {3: -1, 4: 1, 5: 1}
    twice = folded(once, 1, 2)  # W1 + (W2 - W1) + (M3 - W1)
    assert twice == {0: {0: 1}, 1: {1: -1, 2: 1, 3: -1, 4: 1, 5: 1}}
    assert folded(blocks, 0, 1)[0] == {1: 1}


@pytest.mark.parametrize("variant", families.by_tier(["llama", "gpt2", "gemma2", "opt"]))
def test_merged_tensors_are_sums_of_the_files(variant: str) -> None:
    checkpoint = families.opened(variant)
    blocks = blocks_of(families.loaded(variant))
    states = [block.state_dict() for block in blocks]
    one = folded(original_blocks(6), 2, 3)[2]
    for name, tensor in merged_tensors(checkpoint, one):
        w = [state[name] for state in states]
        expected = w[2] + (w[3] - w[2]) + (w[4] - w[2]) + (w[5] - w[2])
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)


def merge(variant: str, target: Path, *, stream: bool | None = None, **options: Any) -> Merging:
    given = {"threshold": -1.0, "max_merged": 2, "interval": 2, **options}
    return merge_from(
        families.opened(variant), options_from(MergeOptions, given), target,
        calibration=calibration(families.token_ids()), session=Session(device="cpu", stream=stream),
    )  # fmt: skip


@pytest.mark.parametrize(
    "variant",
    families.by_tier(["llama", "qwen2", "phi3", "gpt_neox", "opt", "gpt2", "gemma2"], "opt"),
)
def test_the_file_holds_the_merge(variant: str, tmp_path: Path) -> None:
    record = merge(variant, tmp_path / "out", remove=2)
    assert record.kept == [0, 1, 2, 3] and record.removed == [4, 5]
    assert record.sums == {3: {3: -1, 4: 1, 5: 1}}
    whole, small = families.loaded(variant), families.load(tmp_path / "out")
    states = [block.state_dict() for block in blocks_of(whole)]
    for name, tensor in blocks_of(small)[3].state_dict().items():
        expected = states[3][name] + sum(states[k][name] - states[3][name] for k in (4, 5))
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)
    for b in range(3):
        for name, tensor in blocks_of(small)[b].state_dict().items():
            assert torch.equal(tensor, states[b][name])
    ids_BT = families.token_ids()
    ends = [stream_behind(one, -1, ids_BT) for one in (whole, small)]
    cosine = torch.cosine_similarity(*ends, dim=-1).mean().item()
    assert record.cosine == pytest.approx(cosine, abs=1e-5)
    assert lineage(open_checkpoint(tmp_path / "out")).kept == [0, 1, 2, 3]


def test_the_sweep_goes_down_and_keeps_what_is_alike_enough(tmp_path: Path) -> None:
    record = merge("llama", tmp_path / "all", protect_first=1)
    assert [(one.block, one.merged) for one in record.tries] == [(3, [4, 5]), (1, [2, 3])]
    assert record.kept == [0, 1] and all(one.kept for one in record.tries)
    assert record.sums == {1: {1: -1, 2: 1, 3: -1, 4: 1, 5: 1}}
    cosines = sorted(one.cosine for one in merge("llama", tmp_path / "x", remove=1).tries)
    with pytest.raises(ShortLLMError, match="no merge leaves a mean cosine above 0.9999"):
        merge("llama", tmp_path / "none", threshold=0.9999)
    assert cosines and not (tmp_path / "none").exists()
    record = merge("llama", tmp_path / "last", protect_last=2)
    assert record.kept[-2:] == [4, 5] and 4 not in record.sums
    assert math.isfinite(record.cosine)


def test_named_blocks_are_folded_into_the_one_before_each_gap(tmp_path: Path) -> None:
    record = MergeOptions(blocks=[5, 2, 3])
    made = merge_from(
        families.opened("llama"), record, tmp_path / "out",
        calibration=calibration(families.token_ids()), session=Session(device="cpu"),
    )  # fmt: skip
    assert made.kept == [0, 1, 4] and made.removed == [2, 3, 5]
    assert made.sums == {1: {1: -1, 2: 1, 3: 1}, 4: {5: 1}}
    assert [(one.block, one.merged) for one in made.tries] == [(4, [5]), (1, [2, 3])]
    whole, small = families.loaded("llama"), families.load(tmp_path / "out")
    for name, tensor in blocks_of(small)[2].state_dict().items():
        assert torch.equal(tensor, blocks_of(whole)[5].state_dict()[name])
    ids_BT = families.token_ids()
    ends = [stream_behind(one, -1, ids_BT) for one in (whole, small)]
    cosine = torch.cosine_similarity(*ends, dim=-1).mean().item()
    assert made.cosine == pytest.approx(cosine, abs=1e-5)
    for model, value in ((whole, made.intact_perplexity), (small, made.perplexity)):
        with torch.no_grad():
            loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        assert value == pytest.approx(loss.exp().item(), rel=1e-4)


def test_streamed_merges_equal_resident_ones(tmp_path: Path) -> None:
    records = [merge("llama", tmp_path / str(s), stream=s) for s in (False, True)]
    assert records[0].tries == records[1].tries
    files = [tmp_path / str(s) / "model.safetensors" for s in (False, True)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_merge_that_breaks_the_model_is_not_called_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, printed, err = call(
        capfd, "merge", "embedded", "--blocks", "4,5,6,7,8", "--out", str(out)
    )
    record = Merging.load(out / "merge.json")
    assert code == 0
    assert "kept" not in printed and "as named, not alike (below 0.65)" in printed
    assert record.tries[-1].perplexity == record.perplexity > 10 * record.intact_perplexity
    assert f"{number(record.intact_perplexity)} -> {number(record.perplexity)}" in printed
    assert "this merge breaks the model: perplexity on the calibration text rises" in err


def test_a_finished_merge_is_left_alone(tmp_path: Path) -> None:
    first = merge("llama", tmp_path / "out")
    assert merge("llama", tmp_path / "out") == first
    with pytest.raises(OutputError, match="with other choices .remove: null, now 1"):
        merge("llama", tmp_path / "out", remove=1)
    with overwriting():
        assert merge("llama", tmp_path / "out", remove=1) != first


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="other names"):
        merge("mixtral", tmp_path / "out")
    with pytest.raises(ShortLLMError, match="all but 1 are protected"):
        merge("llama", tmp_path / "out", protect_first=3, protect_last=2)
    with pytest.raises(ShortLLMError, match="--remove 5: at most 4 of 5 unprotected blocks"):
        merge("llama", tmp_path / "out", remove=5)
    with pytest.raises(ShortLLMError, match="threshold 1.5: must be less than 1"):
        merge("llama", tmp_path / "out", threshold=1.5)


# ---- commands and runs


def call(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    out, err = capfd.readouterr()
    return int(raised.value.code or 0), out, err


def test_merges_that_cannot_be_are_refused() -> None:
    for options, message in (
        ({"remove": 11}, "at most 10 of 11 unprotected blocks"),
        ({"protect_last": 11}, "are protected"),
        ({"blocks": [0, 3]}, "block 0 has no block before it"),
        ({"blocks": [3, 12]}, "no block 12 among 12"),
        ({"blocks": [3, 3]}, "name each block"),
        ({"blocks": [3], "remove": 2}, "there is no sweep and --remove has no effect"),
    ):
        with pytest.raises(ShortLLMError, match=message):
            check_blocks(options_from(MergeOptions, options), 12)
    for options, message in (
        ({"method": "liner"}, "'liner'. Did you mean 'linear'"),
        ({"ridge": 0}, "ridge 0: must be greater than 0"),
    ):
        with pytest.raises(ShortLLMError, match=message):
            options_from(HealOptions, options)


def test_mistakes_say_what_to_do(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["heal", "nope", "--out", "x"], "no such directory: nope"),
        (["heal", "embedded", "--out", "x"], "does not say from which model"),
        (["heal", "embedded"], "missing option"),
        (["heal", "embedded", "--out", "x", "--ridge", "0"], "--ridge 0.0: must be greater than 0"),
        (["merge", "embedded", "--out", "x", "--blocks", "3,3"], "name each block"),
        (["run", "--heal", "lora"], "lora"),
    ):
        code, out, err = call(capfd, *arguments)
        assert code == 2 and message in err and "Traceback" not in err
        assert out == "" and not list(tmp_path.iterdir())


def test_heal_and_merge_on_the_command_line(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    retraining.shortened(tmp_path)
    data = str(retraining.text(tmp_path / "text.jsonl"))
    flags = ["--data", data, "--samples", "8", "--length", "32"]
    out = str(tmp_path / "healed")
    code, printed, _ = call(capfd, "heal", str(tmp_path / "short"), "--out", out, *flags)
    assert code == 0 and "checkpoint: " in printed and "mlp.down_proj" in printed
    code, printed, _ = call(capfd, "heal", str(tmp_path / "short"), "--out", out, *flags, "--json")
    assert code == 0 and json.loads(printed)["gaps"][0]["removed"] == [2, 3]
    moved = tmp_path / "moved"
    (tmp_path / "whole").rename(moved)
    other = ["--out", str(tmp_path / "other")]
    code, _, err = call(capfd, "heal", str(tmp_path / "short"), *other, *flags)
    assert code == 2 and "Name it with --source" in err
    code, *_ = call(capfd, "heal", str(tmp_path / "short"), *other, *flags, "--source", str(moved))
    assert code == 0 and (tmp_path / "other" / "heal.json").is_file()
    code, printed, _ = call(
        capfd, "merge", str(moved), "--out", str(tmp_path / "merged"), *flags,
        "--threshold", "-1", "--remove", "2",
    )  # fmt: skip
    assert code == 0 and "6 -> 4 blocks" in printed and "perplexity on the" in printed
    assert (tmp_path / "merged" / "merge.json").is_file()


def test_a_recipe_names_healing_or_gives_its_options() -> None:
    assert parse_recipe({"healing": "linear"}, "x").healing == HealOptions(method="linear")
    assert parse_recipe({"healing": "none"}, "x").healing is None
    recipe = changed(Recipe(), {"healing.calibration.samples": 8})
    assert recipe.healing == HealOptions(calibration=HealCalibration(samples=8))
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    with pytest.raises(ShortLLMError, match="unknown field 'healing.ridg'. Did you mean 'ridge'"):
        parse_recipe({"healing": {"ridg": 8}}, "x")


def test_text_to_heal_with_is_more_of_the_text_that_scored() -> None:
    checkpoint = shortllm.open_checkpoint("embedded")
    shared = CalibrationOptions(data="a.txt", samples=3, length=7, bos_every_sample=True)
    found = healing_text(HealOptions(), checkpoint, shared)
    assert (found.data, found.samples, found.length, found.sampler) == ("a.txt", 64, 256, "packed")
    assert found.bos_every_sample
    own = HealOptions(calibration=HealCalibration(data="b.txt", length=32))
    found = healing_text(own, checkpoint, shared)
    assert (found.data, found.length) == ("b.txt", 32)


@pytest.mark.slow
def test_a_quarter_of_the_embedded_model_is_better_healed(tmp_path: Path) -> None:
    recipe = Recipe(
        healing=HealOptions(), evaluation=EvaluationOptions(max_segments=128, continuations=0)
    )
    result = pipeline.run(recipe=recipe, out=tmp_path / "run")
    assert list(result.checkpoints) == ["pruned", "healed"]
    evaluation = Evaluation.load(tmp_path / "run" / "eval.json")
    assert [one.name for one in evaluation.models] == ["original", "pruned", "healed"]
    intact, short, after = (one.perplexity[0].perplexity for one in evaluation.models)
    assert intact < after < short - 0.02
    assert result.healing is not None
    assert result.healing.held_out.healed < result.healing.held_out.shortened
    page = (tmp_path / "run" / "report.html").read_text()
    for part in (
        "Recovery",
        "Regression of the weights",
        "healed, no training",
        "Fitted on 64 samples of",
    ):
        assert part in page
    assert "retraining also learns" not in page
    written = (tmp_path / "run" / "healed" / "heal.json").stat().st_mtime_ns
    pipeline.run(recipe=recipe, out=tmp_path / "run")
    assert (tmp_path / "run" / "healed" / "heal.json").stat().st_mtime_ns == written


SHARED = {
    "stories260K": "stories/valid.jsonl.gz",
    "stories10L": "stories/valid.txt",
    "stories10L-redundant": "stories/valid.jsonl.gz",
    "books5M": "books/valid.jsonl.xz",
}


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_a_quarter_of_a_real_model_is_better_healed(
    name: str, shared: Path, tmp_path: Path
) -> None:
    recipe = Recipe(
        model=str(shared / "models" / name),
        calibration=CalibrationOptions(data=str(shared / "data" / SHARED[name])),
        healing=HealOptions(),
        evaluation=EvaluationOptions(max_segments=128, continuations=0),
    )
    result = pipeline.run(recipe=recipe, out=tmp_path / "run")
    _, short, after = (one.perplexity[0].perplexity for one in result.evaluation.models)
    assert result.healing is not None
    # half the blocks of the redundant model are copies: linear maps find next to nothing to repair,
    # and where the held-out loss does not fall, nothing of the change is kept
    if name == "stories10L-redundant":
        assert after <= short
    else:
        assert after < short
        assert result.healing.strength > 0
    assert shortllm.open_checkpoint(tmp_path / "run" / "healed").block_count == len(
        result.plan.kept
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "regression"])
def test_two_processes_equal_one(method: str, tmp_path: Path) -> None:
    short = families.shortened(families.opened("qwen3"), [1, 3, 4], tmp_path / "short")
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(text()[:13].tolist()))
    options = {"method": method, "file": ids, "samples": 13, "length": text().shape[1]}
    one = shortllm.heal(str(short), tmp_path / "one", **options)
    done = test_scoring.call(
        "heal", short, "--method", method, "--calibration", ids, "--samples", 13, "--length",
        text().shape[1], "--out", tmp_path / "two", launcher=test_scoring.TORCHRUN,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    two = Healing.load(tmp_path / "two" / "heal.json")
    assert (one.samples, one.held_out.samples) == (two.samples, two.held_out.samples) == (13, 3)
    assert two.held_out.healed == pytest.approx(one.held_out.healed, rel=1e-5)
    for a, b in zip(one.gaps, two.gaps, strict=True):
        assert (a.block, a.changed, a.ridge) == (b.block, b.changed, b.ridge)
        assert a.error_after == pytest.approx(b.error_after, rel=1e-5)
    found, expected = (logits(families.load(tmp_path / name)) for name in ("two", "one"))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
