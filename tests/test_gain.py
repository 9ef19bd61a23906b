"""A factor for the hidden state behind a gap: exact in every family, and solved with the rest."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_healing import healed, logits, stream_behind, text
from torch import Tensor

from shortllm.checkpoint.source import open_checkpoint
from shortllm.errors import UnsupportedModelError
from shortllm.healing import heal
from shortllm.healing.folding import folded_into
from shortllm.healing.gain import divisors, find_scalable
from shortllm.healing.least_squares import GapSums, solve
from shortllm.healing.methods import Healed
from shortllm.healing.options import HeldOut
from shortllm.model.decoder import Decoder
from shortllm.surgery.derived import stored_name

CPU = torch.device("cpu")
NOT_SCALABLE = ("opt-projected",)
"""A norm behind the addition."""
READERS = {"olmo2": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}}
"""Projections with no norm in front."""


def test_each_block_is_divided_by_the_factors_before_it() -> None:
    assert divisors({1: 2.0, 4: 3.0}, [0, 1, 3, 4, 6]) == {3: 2.0, 4: 2.0, 6: 6.0}
    assert divisors({}, [0, 1]) == {}


@pytest.mark.parametrize(
    "variant",
    families.by_tier(
        [one for one in families.VARIANTS if one not in NOT_SCALABLE],
        "llama-tied",
        "gemma2",
        "olmo2",
        "mixtral",
    ),
)
def test_new_weights_compute_what_a_factor_does(variant: str, tmp_path: Path) -> None:
    model = families.build(variant)
    with torch.no_grad():  # next to a small hidden state the epsilon of a norm counts
        model.get_input_embeddings().weight.mul_(30.0)  # type: ignore[operator, union-attr]
    source = open_checkpoint(families.save(model, tmp_path))
    decoder, gains = Decoder(model), {1: 1.7, 3: 0.6}
    blocks = range(decoder.block_count)
    found = find_scalable(source, decoder, blocks[2:])
    assert found is not None and set(found) == set(blocks[2:])
    for one in found.values():
        assert {name.split(".")[-1] for name in one.readers} == READERS.get(variant, set())
    before = logits(model)
    with folded_into(decoder, {}, gains):
        expected = logits(model)
    assert (expected - before).norm() > 1e-3 * before.norm()
    factors = divisors(gains, blocks)
    with folded_into(
        decoder, {b: found[b].divided(source, b, by, {}) for b, by in factors.items()}
    ):
        in_memory = logits(model)
    tensors = load_file(tmp_path / "model.safetensors")
    for b, divisor in factors.items():
        for name, tensor in found[b].weights(source, b, divisor, {}):
            tensors[stored_name(source, b, name)] = tensor
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    written = logits(families.load(tmp_path))
    for computed in (in_memory, written):
        assert (computed - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("variant", NOT_SCALABLE)
def test_a_model_that_does_not_ignore_the_scale_gets_no_factor(
    variant: str, tmp_path: Path
) -> None:
    assert find_scalable(families.opened(variant), Decoder(families.loaded(variant)), [2]) is None
    with pytest.raises(UnsupportedModelError, match="do not ignore the scale of the hidden state"):
        healed(variant, [2], tmp_path, method="gain")
    assert not (tmp_path / "healed").exists()


def rows(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """X, Z and H of 200 tokens, float64, where H is about 1.3 times what it should be."""
    generator = torch.Generator().manual_seed(seed)
    x_NI, after_ND = (torch.randn(200, n, generator=generator).double() for n in (6, 4))
    change_ID = 0.3 * torch.randn(6, 4, generator=generator).double()
    noise_ND = 0.1 * torch.randn(200, 4, generator=generator).double()
    return x_NI, after_ND, 1.3 * after_ND + x_NI @ change_ID + noise_ND


@pytest.mark.parametrize("weighted", [True, False])
def test_the_factor_is_one_more_unknown_of_plain_least_squares(weighted: bool) -> None:
    x_NI, after_ND, wanted_ND = rows()
    sums = GapSums(6, 4, CPU, weighted=weighted, gain=True)
    for part in (slice(70), slice(70, None)):
        sums.add(x_NI[part], after_ND[part], wanted_ND[part])
    change = solve(sums, 1e-9)
    size_N1 = wanted_ND.square().mean(1, keepdim=True).sqrt() if weighted else 1.0
    x_NI, after_ND, wanted_ND = (one / size_N1 for one in (x_NI, after_ND, wanted_ND))
    # unknowns: 6 x 4 weights, and the factor of all four columns
    columns = torch.block_diag(*[x_NI] * 4)
    matrix = torch.cat([columns, after_ND.T.reshape(-1, 1)], dim=1)
    solution = torch.linalg.lstsq(matrix, wanted_ND.T.reshape(-1)).solution
    assert change.gain == pytest.approx(solution[-1].item(), rel=1e-6)
    expected_ID = solution[:-1].view(4, 6).T / solution[-1]
    torch.testing.assert_close(change.weights_ID, expected_ID, rtol=1e-5, atol=1e-7)
    left_ND = change.gain * (after_ND + x_NI @ change.weights_ID) - wanted_ND
    assert sums.error(change) == pytest.approx(left_ND.square().sum().item(), rel=1e-9)


def test_a_factor_that_nobody_would_believe_is_not_taken() -> None:
    x_NI, after_ND, _ = rows()
    for wanted_ND in (-after_ND, 9.0 * after_ND, 0.1 * after_ND):
        sums = GapSums(6, 4, CPU, weighted=False, gain=True)
        sums.add(x_NI, after_ND, wanted_ND)
        assert solve(sums, 1e-3).gain == 1.0
    zero = GapSums(6, 4, CPU, weighted=True, gain=True)
    zero.add(*(torch.zeros(5, n) for n in (6, 4, 4)))
    assert solve(zero, 1.0).gain == 1.0


@pytest.mark.parametrize("removed", [[1, 4], [2, 4]])
@pytest.mark.parametrize("variant", families.by_tier(["llama-tied", "gemma2", "olmo2"], "olmo2"))
@pytest.mark.parametrize("method", ["gain", "regression"])
def test_the_checkpoint_computes_what_the_fit_predicted(
    method: str,
    variant: str,
    removed: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    better = HeldOut(samples=4, source=1.0, shortened=3.0, healed=2.0)
    monkeypatch.setattr(heal, "_measure", lambda task, healing: better)  # keep the whole change
    found = healed(variant, removed, tmp_path, method=method)
    short, after = (open_checkpoint(tmp_path / name) for name in ("short", "healed"))
    product = 1.0
    for gap in found.gaps:
        assert gap.block is not None and gap.gain > 0
        assert (gap.changed == []) is (method == "gain")
        assert (gap.ridge is None) is (method == "gain")
        assert gap.error_after <= gap.error_before  # type: ignore[operator]
        product *= gap.gain
    assert product != 1.0
    # the hidden state is the healed one of the fit, divided by the factors
    last = found.gaps[-1]
    kept = [b for b in range(6) if b not in removed]
    wanted_ND = stream_behind(families.loaded(variant), max(last.removed), text())
    states = [
        stream_behind(families.load(one.directory), kept.index(last.block), text())  # type: ignore[arg-type]
        for one in (short, after)
    ]
    size_N1 = wanted_ND.square().mean(1, keepdim=True)
    held_out = slice(len(wanted_ND) * 3 // 4, None)
    before, left = (
        (((state - wanted_ND) ** 2) / size_N1)[held_out].sum().item()
        for state in (states[0], product * states[1])
    )
    assert left < before
    assert [(n, e.shape, e.dtype) for n, e in short.tensors.items()] == [
        (n, e.shape, e.dtype) for n, e in after.tensors.items()
    ]


def test_half_of_a_change_is_half_of_its_factor() -> None:
    healing = Healed(gaps=[], folds={}, gains={1: 1.5, 3: 0.8})
    weaker = heal._weaker(None, healing, 0.5)  # type: ignore[arg-type]
    assert weaker.gains == pytest.approx({1: 1.25, 3: 0.9})
    assert heal._weaker(None, healing, 0.0).gains == {}  # type: ignore[arg-type]


def test_a_factor_in_bfloat16_is_rounded_into_the_weights(tmp_path: Path) -> None:
    source = open_checkpoint(families.save(families.build("llama").bfloat16(), tmp_path / "source"))
    record = healed(source, [1, 4], tmp_path, method="gain")
    assert any(gap.gain != 1.0 for gap in record.gaps)
    tensors = open_checkpoint(tmp_path / "healed").tensors
    assert {entry.dtype for entry in tensors.values()} == {"BF16"}


@pytest.mark.parametrize("stream", [False, True])
def test_streamed_blocks_get_the_same_factor(stream: bool, tmp_path: Path) -> None:
    record = healed("llama", [1, 3], tmp_path, method="regression", stream=stream)
    other = healed("llama", [1, 3], tmp_path / "other", method="regression", stream=False)
    assert [one.gain for one in record.gaps] == [one.gain for one in other.gaps]
    files = [one / "healed" / "model.safetensors" for one in (tmp_path, tmp_path / "other")]
    assert files[0].read_bytes() == files[1].read_bytes()
