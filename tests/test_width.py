"""Width pruning: a narrower checkpoint computes what the original with silent groups computes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families
import pytest
import retraining
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import shortllm
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.structure import find_blocks
from shortllm.data.calibration import Calibration, tokens_fingerprint
from shortllm.data.options import CalibrationInfo
from shortllm.errors import (
    BudgetError,
    CriterionError,
    DataError,
    OutputError,
    ShortLLMError,
    UnsupportedModelError,
)
from shortllm.evaluation.options import EvaluationOptions
from shortllm.files import overwriting
from shortllm.healing.least_squares import RIDGES
from shortllm.model import Session
from shortllm.model.decoder import Decoder
from shortllm.options import options_from
from shortllm.retraining.options import RetrainOptions
from shortllm.width_pruning import methods
from shortllm.width_pruning.groups import removed_units
from shortllm.width_pruning.methods import wanda_sp
from shortllm.width_pruning.methods.llm_pruner import taylor_importance
from shortllm.width_pruning.options import NarrowedBlock, WidthOptions, WidthPruning
from shortllm.width_pruning.prune_width import width_from
from shortllm.width_pruning.structure import find_groups

LLAMA_LIKE = ("self_attn.o_proj", "mlp.down_proj")
OUTPUTS = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE,
    "phi3": LLAMA_LIKE,
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
}
"""Family -> what its output projections are called."""

INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)

PLAIN = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"}
"""Families whose config can say that there are fewer heads."""

METHODS = tuple(methods.METHODS.names())

CPU = torch.device("cpu")


def calibration(ids_BT: Tensor | None = None) -> Calibration:
    ids = families.token_ids() if ids_BT is None else ids_BT
    info = CalibrationInfo(
        source="test", sampler="given", samples=len(ids), length=ids.shape[1], bos="none",
        tokens_fingerprint=tokens_fingerprint(ids), fingerprint="test",
    )  # fmt: skip
    return Calibration(ids=ids, info=info)


def narrow(
    checkpoint: Checkpoint | str, target: Path, *, stream: bool | None = None, **options: Any
) -> WidthPruning:
    """The stage on a checkpoint or a family's tiny model."""
    if isinstance(checkpoint, str):
        checkpoint = families.opened(checkpoint)
    given = options_from(WidthOptions, {"ratio": 0.5, **options})
    session = Session(device="cpu", stream=stream)
    return width_from(checkpoint, given, target, calibration=calibration(), session=session)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return find_blocks(model, model.config)[1]


@contextmanager
def inputs_of(modules: list[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """Within the context, what each module is given, `[tokens, channels]` for each call."""
    seen: list[list[Tensor]] = [[] for _ in modules]
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, place=place: seen[place].append(args[0].flatten(0, -2).double())
        )
        for place, module in enumerate(modules)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def removed_channels(one: NarrowedBlock, place: int, channels: int) -> Tensor:
    """Which of the inputs of the output projection of the attention (0) or the MLP (1) go."""
    if place == 1:
        return torch.tensor(one.removed_neurons, dtype=torch.long)
    head_dim = channels // one.query_heads
    starts = torch.tensor(one.removed_query_heads, dtype=torch.long) * head_dim
    return (starts[:, None] + torch.arange(head_dim)).flatten()


@torch.no_grad()
def silenced(checkpoint: Path, record: WidthPruning, outputs: tuple[str, str]) -> nn.Module:
    """The original with the columns of removed heads and neurons set to zero, by its own names.

    Where the record speaks of biases they are made here from the intact model's mean inputs.
    """
    model = families.load(checkpoint)
    blocks = blocks_of(model)
    modules = [blocks[one.block].get_submodule(name) for one in record.blocks for name in outputs]
    with inputs_of(modules) as seen:
        model(input_ids=families.token_ids(), use_cache=False)
    for place, (module, given) in enumerate(zip(modules, seen, strict=True)):
        channels = removed_channels(record.blocks[place // 2], place % 2, module.in_features)
        if record.biases and len(channels):
            mean_C = torch.cat(given).mean(0)[channels]
            bias = module.weight[:, channels].double() @ mean_C
            before = 0 if module.bias is None else module.bias
            module.bias = nn.Parameter(before + bias.float())
        module.weight[:, channels] = 0
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=families.token_ids(2, seed=3), use_cache=False).logits


def assert_caches(model: nn.Module) -> None:
    ids = families.token_ids(1, 8)
    texts = [
        model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("variant", families.by_tier(OUTPUTS, "opt"))
@pytest.mark.parametrize("method", METHODS)
def test_narrower_equals_silenced(variant: str, method: str, tmp_path: Path) -> None:
    record = narrow(variant, tmp_path / "out", method=method, shapes="per-block", start=1)
    assert record.shapes == "per-block" and record.biases == (method == "flap")
    model = shortllm.load(tmp_path / "out", dtype=torch.float32).eval()
    expected = silenced(families.saved(variant), record, OUTPUTS[variant])
    difference = (logits(model) - logits(expected)).abs().max().item()
    assert difference <= 1e-5
    intact = (logits(model) - logits(families.loaded(variant))).abs().max().item()
    assert intact > 0.1, "removing these groups changes nothing: the comparison is blind"
    assert_caches(model)
    elements = sum(
        parameter.numel() for parameter in {id(p): p for p in model.parameters()}.values()
    )
    assert elements == record.reached.parameters < record.model.parameters


@pytest.mark.parametrize("variant", families.by_tier(OUTPUTS, "opt"))
def test_uniform_is_a_plain_checkpoint_or_refused(variant: str, tmp_path: Path) -> None:
    options = {"method": "wanda-sp", "shapes": "uniform"}
    if variant not in PLAIN:
        with pytest.raises(UnsupportedModelError, match=f"'{variant}' cannot describe.*per-block"):
            narrow(variant, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        return
    record = narrow(variant, tmp_path / "out", **options)
    model = families.load(tmp_path / "out")  # by transformers alone
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)
    assert config.intermediate_size == 24
    expected = silenced(families.saved(variant), record, OUTPUTS[variant])
    assert (logits(model) - logits(expected)).abs().max().item() <= 1e-5
    assert_caches(model)


def test_uniform_bias_goes_into_the_config_where_it_can(tmp_path: Path) -> None:
    record = narrow("llama-tied", tmp_path / "out", method="flap", shapes="uniform")
    model = families.load(tmp_path / "out")
    assert model.config.attention_bias and model.config.mlp_bias and record.biases
    assert not blocks_of(model)[0].self_attn.q_proj.bias.any()
    expected = silenced(families.saved("llama-tied"), record, LLAMA_LIKE)
    assert (logits(model) - logits(expected)).abs().max().item() <= 1e-5
    with pytest.raises(UnsupportedModelError, match="'self_attn.o_proj.bias'.*--no-bias"):
        narrow("mistral", tmp_path / "mistral", method="flap", shapes="uniform")
    record = narrow("mistral", tmp_path / "mistral", method="flap", shapes="uniform", bias=False)
    assert not record.biases
    families.load(tmp_path / "mistral")


@pytest.mark.parametrize("repair", [False, True])
def test_biases_of_a_checkpoint_in_bfloat16(repair: bool, tmp_path: Path) -> None:
    source = families.save(families.build("qwen3").bfloat16(), tmp_path / "source")
    narrow(open_checkpoint(source), tmp_path / "out", method="flap", ratio=0.4, repair=repair)
    tensors = open_checkpoint(tmp_path / "out").tensors
    assert {entry.dtype for entry in tensors.values()} == {"BF16"}


REPAIRED = {"llama": LLAMA_LIKE, "opt": OUTPUTS["opt"], "gpt2": ("attn.c_proj", "mlp.c_proj")}
"""Families that have biases, call with other shapes, store inputs x outputs."""


@pytest.mark.parametrize("method", ["wanda-sp", "flap"])
@pytest.mark.parametrize("variant", REPAIRED)
@torch.no_grad()
def test_repaired_weights_are_those_of_plain_least_squares(
    variant: str, method: str, tmp_path: Path
) -> None:
    outputs = REPAIRED[variant]
    record = narrow(
        variant, tmp_path / "out", method=method, ratio=0.6, repair=True, shapes="per-block"
    )
    plain = narrow(variant, tmp_path / "plain", method=method, ratio=0.6, shapes="per-block")
    removed = [one.model_copy(update={"repaired": []}) for one in record.blocks]
    assert removed == plain.blocks, "the choice is the method's"
    model = families.load(families.saved(variant))
    written = blocks_of(shortllm.load(tmp_path / "out", dtype=torch.float32))
    changed = 0
    for one in record.blocks:
        reports = iter(one.repaired)
        for place, name in enumerate(outputs):
            module = blocks_of(model)[one.block].get_submodule(name)
            weight_DC = module.weight if isinstance(module, nn.Linear) else module.weight.T
            gone = removed_channels(one, place, weight_DC.shape[1])
            stay = torch.tensor([c for c in range(weight_DC.shape[1]) if c not in gone.tolist()])
            if len(gone):
                with inputs_of([module]) as seen:
                    model(input_ids=families.token_ids(), use_cache=False)
                [given_NC] = map(torch.cat, seen)
                change_KD, bias_D, report = plain_repair(
                    given_NC[:, stay], given_NC[:, gone], weight_DC.double(), stay, gone,
                    bias=record.biases,
                )  # fmt: skip
                found, errors = next(reports), report[1:]
                assert (found.projection, found.ridge) == (name, report[0])
                assert (found.error_before, found.error_after) == pytest.approx(errors, rel=1e-4)
                assert found.error_after <= found.error_before
                weight_DC[:, stay] += change_KD.T.float()
                weight_DC[:, gone] = 0
                if record.biases:
                    before = 0 if module.bias is None else module.bias
                    module.bias = nn.Parameter(before + bias_D.float())
                changed += bool(change_KD.any())
            new = written[one.block].get_submodule(name)
            new_DK = new.weight if isinstance(new, nn.Linear) else new.weight.T
            torch.testing.assert_close(new_DK, weight_DC[:, stay], rtol=0, atol=1e-4)
            if module.bias is not None:
                torch.testing.assert_close(new.bias, module.bias, rtol=0, atol=1e-4)
    assert changed > 4, "no change does better: the comparison is blind"


def plain_repair(
    stay_NK: Tensor, gone_NR: Tensor, weight_DC: Tensor, stay: Tensor, gone: Tensor, *, bias: bool
) -> tuple[Tensor, Tensor, tuple[float | None, float, float]]:
    """Change and bias that make up for channels; the ridge, and the error before and after it on
    the last sample. By the least squares of the equations themselves."""
    lost_ND = gone_NR @ weight_DC[:, gone].T
    length = families.token_ids().shape[1]
    first, last = slice(-length), slice(-length, None)  # of the three samples

    def solved(rows: slice, ridge: float | None) -> tuple[Tensor, Tensor]:
        x, y = stay_NK[rows], lost_ND[rows]
        mean_x, mean_y = (one.mean(0) * bias for one in (x, y))
        x, y = x - mean_x, y - mean_y
        change = torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype)
        if ridge is not None:
            root = (ridge * x.square().sum(0).mean()).sqrt()
            x = torch.cat([x, root * torch.eye(x.shape[1], dtype=x.dtype)])
            change = torch.linalg.lstsq(x, torch.cat([y, torch.zeros_like(change)])).solution
        return change, mean_y - mean_x @ change

    def error(ridge: float | None) -> float:
        change, bias_D = solved(first, ridge)
        left = lost_ND[last] - stay_NK[last] @ change - bias_D
        whole = lost_ND[last] + stay_NK[last] @ weight_DC[:, stay].T
        return float(left.square().sum() / whole.square().sum())

    errors = {ridge: error(ridge) for ridge in (None, *RIDGES)}
    best = min(errors, key=lambda ridge: errors[ridge])
    return *solved(slice(None), best), (best, errors[None], errors[best])


@pytest.mark.slow
def test_repair_lowers_the_loss_on_other_text(tmp_path: Path) -> None:
    options = {"method": "flap", "ratio": 0.3, "data": "embedded", "samples": 24, "device": "cpu"}
    for name, repair in (("plain", False), ("repaired", True)):
        shortllm.width("embedded", tmp_path / name, repair=repair, **options)
    names = [str(tmp_path / name) for name in ("plain", "repaired")]
    found = shortllm.evaluate(
        names, data=["embedded:test"], max_segments=8, continuations=0, device="cpu"
    )
    plain, repaired = (entry.perplexity[0].perplexity for entry in found.models)
    assert repaired < plain


def test_repair_looks_at_text_whatever_the_method(tmp_path: Path) -> None:
    options = {"importance": "random", "repair": True}
    assert WidthOptions(ratio=0.5, **options).choices["seed"] == 1234
    record = narrow("llama", tmp_path / "out", **options)
    assert record.calibration is not None and all(one.repaired for one in record.blocks)
    one_sample = calibration(families.token_ids(1))
    given, session = WidthOptions(ratio=0.5, **options), Session(device="cpu")
    with pytest.raises(DataError, match="--samples 2 or more, or leave --repair out"):
        width_from(
            families.opened("llama"), given, tmp_path / "one", calibration=one_sample,
            session=session,
        )  # fmt: skip


NEW_PROCESS = """
import sys, torch, shortllm
model = shortllm.load(sys.argv[1], dtype=torch.float32).eval()
ids = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(input_ids=ids, use_cache=False).logits, sys.argv[3])
texts = [
    model.generate(ids[:1], max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=0)
    for cache in (True, False)
]
assert torch.equal(*texts)
"""


def test_a_new_process_loads_it(tmp_path: Path) -> None:
    record = narrow("phi3", tmp_path / "out", method="flap", ratio=0.4)
    torch.save(families.token_ids(2, seed=3), tmp_path / "ids")
    command = [sys.executable, "-c", NEW_PROCESS, *(str(tmp_path / n) for n in ("out", "ids", "x"))]
    subprocess.run(command, check=True, capture_output=True)
    expected = silenced(families.saved("phi3"), record, LLAMA_LIKE)
    assert (torch.load(tmp_path / "x") - logits(expected)).abs().max().item() <= 1e-5


def test_plain_loading_of_shapes_per_block_fails_loudly(tmp_path: Path) -> None:
    narrow("llama", tmp_path / "out", method="llm-pruner")
    with pytest.raises(ValueError, match="shortllm.load"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with families.quiet_transformers(), pytest.raises(RuntimeError, match="mismatch"):
        LlamaForCausalLM.from_pretrained(tmp_path / "out")
    model = shortllm.load(tmp_path / "out")
    families.save(model, tmp_path / "again")
    with pytest.raises(ValueError, match="shortllm.load"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(shortllm.load(tmp_path / "again")), logits(model))


def test_other_programs_are_said_to_be_unable(tmp_path: Path) -> None:
    narrow("llama", tmp_path / "out", importance="l1")
    findings = shortllm.export_lint(str(tmp_path / "out"))
    assert {finding.verdict for finding in findings} == {"wrong"}
    summary = shortllm.info(str(tmp_path / "out"), probe=False)
    assert summary.model.parameters_per_block[0] > summary.model.parameters_per_block[2]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (8, 2)])
@pytest.mark.parametrize("shapes", ["uniform", "per-block"])
def test_a_kv_head_goes_with_its_query_heads(
    heads: int, kv_heads: int, shapes: str, tmp_path: Path
) -> None:
    config = families.config_of(
        "llama", num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8
    )
    source = families.save(families.build(config), tmp_path / "source")
    record = narrow(open_checkpoint(source), tmp_path / "out", method="wanda-sp", shapes=shapes)
    model = shortllm.load(tmp_path / "out", dtype=torch.float32).eval()
    group = heads // kv_heads
    for one in record.blocks:
        [kv_head] = one.removed_kv_heads
        assert one.removed_query_heads == list(range(kv_head * group, (kv_head + 1) * group))
        attention = blocks_of(model)[one.block].self_attn
        assert attention.q_proj.out_features == group * attention.k_proj.out_features
        before = blocks_of(families.load(source))[one.block].self_attn
        stay = slice((1 - kv_head) * 8, (2 - kv_head) * 8)
        assert torch.equal(attention.k_proj.weight, before.k_proj.weight[stay])
        stay = slice((1 - kv_head) * 8 * group, (2 - kv_head) * 8 * group)
        assert torch.equal(attention.q_proj.weight, before.q_proj.weight[stay])
        assert torch.equal(attention.o_proj.weight, before.o_proj.weight[:, stay])
    assert_caches(model)


def importances(model: nn.Module, ids_BT: Tensor, kind: str) -> dict[int, tuple[Tensor, Tensor]]:
    """What `taylor_importance` should find in a model of llama's names, by whole passes."""
    samples = [_gradients(model, ids_BT[row : row + 1]) for row in range(len(ids_BT))]
    batch = _gradients(model, ids_BT)
    found = {}
    for b, block in enumerate(blocks_of(model)):

        def value(name: str, b: int = b, block: nn.Module = block) -> Tensor:
            weight = block.get_submodule(name).weight.detach()
            key = f"{b}.{name}"
            first = weight * batch[key]
            second = weight * torch.stack([s[key] ** 2 for s in samples]).mean(0) * weight
            return {
                "first": first.abs(), "vectorised": first, "second": second.abs(),
                "mixed": (first - second / 2).abs(),
            }[kind]  # fmt: skip

        kv_heads = block.self_attn.k_proj.weight.shape[0] // block.self_attn.head_dim
        heads = value(LLAMA_LIKE[0]).T.reshape(kv_heads, -1).sum(1)
        for name in INPUTS[0]:
            heads = heads + value(name).reshape(kv_heads, -1).sum(1)
        neurons = value(LLAMA_LIKE[1]).sum(0) + sum(value(name).sum(1) for name in INPUTS[1])
        found[b] = (heads.abs(), neurons.abs())
    return found


def _gradients(model: nn.Module, ids_BT: Tensor) -> dict[str, Tensor]:
    """Gradient of the mean next-token loss for the projections of each block."""
    blocks = blocks_of(model)
    named = {
        f"{b}.{name}": module.weight
        for b, block in enumerate(blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    with torch.enable_grad():
        for weight in named.values():
            weight.requires_grad_(True)
        loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


def assert_scores_equal_autograd(model: nn.Module, ids_BT: Tensor, kind: Any) -> None:
    expected = importances(model, ids_BT, kind)
    decoder = Decoder(model)
    groups = find_groups(decoder, range(decoder.block_count))
    memory = Session(device="cpu").memory()
    task = methods.Task(
        decoder=decoder, ids_BT=ids_BT, groups=groups, options=WidthOptions(ratio=0.5), counts={},
        memory=memory,
    )  # fmt: skip
    found = taylor_importance(task, kind)
    for b, (heads, neurons) in expected.items():
        torch.testing.assert_close(found[b].heads.float(), heads, rtol=1e-3, atol=0)
        torch.testing.assert_close(found[b].neurons.float(), neurons, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["first", "second", "mixed", "vectorised"])
def test_taylor_scores_equal_autograd(kind: str) -> None:
    model = families.load(families.saved("qwen3"))
    assert_scores_equal_autograd(model, families.token_ids(), kind)


@pytest.mark.shared
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "stories260K" else pytest.mark.slow)
        for name in ("books5M", "stories10L", "stories10L-redundant", "stories260K")
    ],
)
def test_first_order_scores_of_trained_models_equal_autograd(name: str, shared: Path) -> None:
    model = families.load(shared / "models" / name)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (3, 64), generator=generator)
    assert_scores_equal_autograd(model, ids, "first")


@pytest.mark.parametrize("importance", ["l1", "l2"])
def test_magnitude_needs_no_text(importance: str, tmp_path: Path) -> None:
    options = WidthOptions(ratio=0.5, importance=importance)
    checkpoint, session = families.opened("llama"), Session(device="cpu")
    record = width_from(checkpoint, options, tmp_path / "out", calibration=None, session=session)
    assert record.calibration is None
    block = blocks_of(families.loaded("llama"))[1]
    power = 1 if importance == "l1" else 2
    weights = [block.mlp.gate_proj.weight, block.mlp.up_proj.weight, block.mlp.down_proj.weight.T]
    expected = sum(weight.detach().abs().pow(power).sum(1) for weight in weights)
    lowest = sorted(expected.argsort()[:24].tolist())
    assert record.blocks[0].block == 1 and record.blocks[0].removed_neurons == lowest


def test_random_is_seeded(tmp_path: Path) -> None:
    options = {"importance": "random", "ratio": 0.5}
    one, same, other = (
        narrow("llama", tmp_path / str(place), seed=seed, **options).blocks
        for place, seed in enumerate((1, 1, 2))
    )
    assert one == same != other


@torch.no_grad()
def test_wanda_sees_the_outputs_of_narrower_blocks(tmp_path: Path) -> None:
    record = narrow("mistral", tmp_path / "out", method="wanda-sp")
    ids = families.token_ids()
    for b in (0, 3):
        before = record.model_copy(update={"blocks": record.blocks[:b]})
        model = silenced(families.saved("mistral"), before, LLAMA_LIKE)
        modules = [blocks_of(model)[b].get_submodule(name) for name in LLAMA_LIKE]
        with inputs_of(modules) as seen:
            model(input_ids=ids, use_cache=False)
        scores = [
            module.weight.double().abs().mean(0) * torch.cat(given).square().mean(0).sqrt()
            for module, given in zip(modules, seen, strict=True)
        ]
        found = record.blocks[b]
        heads = scores[0].view(2, -1).sum(1)
        assert found.head_importance == pytest.approx(heads.tolist(), rel=1e-4)
        assert found.removed_neurons == sorted(scores[1].argsort()[:24].tolist())


@torch.no_grad()
def test_flap_ranks_heads_and_neurons_in_one_list(tmp_path: Path) -> None:
    record = narrow("mistral", tmp_path / "out", method="flap", ratio=0.3)
    model = families.load(families.saved("mistral"))
    entries = []
    for b, block in enumerate(blocks_of(model)):
        modules = [block.get_submodule(name) for name in LLAMA_LIKE]
        with inputs_of(modules) as seen:
            model(input_ids=families.token_ids(), use_cache=False)
        for is_head, module, given in zip((True, False), modules, seen, strict=True):
            raw = torch.cat(given).var(0) * module.weight.double().square().sum(0)
            standard = (raw - raw.mean()) / raw.std(correction=0)
            units = standard.view(2, -1).mean(1) if is_head else standard
            # hidden 32, head_dim 8, two query heads for each kv head
            freed = 2 * 8 * 32 * (2 + 2 / 2) if is_head else 3 * 32
            units = [(s, b, is_head, unit, freed) for unit, s in enumerate(units.tolist())]
            assert len({one.block for one in record.blocks}) == 6
            entries += units
    total = sum(entry[4] for entry in entries)
    gone = {
        (one.block, is_head, unit)
        for one in record.blocks
        for is_head, units in ((True, one.removed_kv_heads), (False, one.removed_neurons))
        for unit in units
    }
    freed = sum(entry[4] for entry in entries if entry[1:4] in gone)
    assert freed == pytest.approx(0.3 * total, abs=2 * 8 * 32 * 3)
    worst_kept: list[Any] = []
    for b in range(6):
        for is_head in (True, False):
            own = sorted(e for e in entries if e[1] == b and e[2] == is_head)
            assert own[-1][1:4] not in gone, "the best of each block stays"
            worst_kept += [e for e in own[:-1] if e[1:4] not in gone]
    assert max(e[0] for e in entries if e[1:4] in gone) <= min(worst_kept)[0]


def test_removed_units_by_the_papers_formula() -> None:
    assert removed_units(32, 128, 0.25) == 8
    assert removed_units(32, 128, 0.2) == 6  # 820 of 4096 channels
    assert removed_units(11008, 1, 0.25) == 2752
    assert removed_units(172, 1, 0.25) == 43


@pytest.mark.parametrize("ratio", [0.1, 0.99])
def test_a_ratio_that_removes_no_head_or_all_names_those_that_work(
    ratio: float, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match=r"Ratios that work: 0.25 \(1 of 4 heads\), 0.5 \(2"):
        narrow("opt", tmp_path / "out", method="wanda-sp", ratio=ratio)


def test_a_list_keeps_one_head_and_neuron_of_each_block(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="one of each in every block stays. Give"):
        narrow("opt", tmp_path / "out", method="flap", ratio=0.9)
    record = narrow("opt", tmp_path / "out", method="flap", ratio=0.7)
    assert all(len(one.removed_kv_heads) < one.kv_heads for one in record.blocks)


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("mixtral", "not one attention and one MLP"),
        ("olmo2", "all are coupled"),
        ("falcon", "all are coupled"),
        ("bloom", "differ by more than their projections"),
    ],
)
def test_models_whose_heads_cannot_go_are_refused_by_name(
    variant: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"'{variant}' cannot be made narrower.*{reason}"
    ):
        narrow(variant, tmp_path / "out", method="wanda-sp")


def test_quantized_weights_are_refused_by_name(tmp_path: Path) -> None:
    source = families.save(families.build("llama"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="source is quantized, so rows and columns"):
        narrow(open_checkpoint(source), tmp_path / "out", method="flap", repair=True)


UNIFORM = ("gemma", "gemma3_text", "granite", "smollm3", "starcoder2")
PER_BLOCK = ("gpt2", "gptj", "phi", "falcon-new", "opt-projected")


@pytest.mark.parametrize("variant", families.by_tier([*UNIFORM, *PER_BLOCK]))
def test_further_families(variant: str, tmp_path: Path) -> None:
    blocks = families.opened(variant).block_count
    record = narrow(variant, tmp_path / "out", importance="l2", start=0, end=blocks)
    shapes = "uniform" if variant in UNIFORM else "per-block"
    assert record.shapes == shapes  # and what was written computes what it should, says the stage


def test_groups_of_a_fused_matrix_are_its_own_rows() -> None:
    groups = find_groups(Decoder(families.loaded("phi3")), [0])[0]
    # q of 4 heads, then k and v of 2, each of 8 rows; the first kv head has the first two q heads
    expected = [0] * 16 + [1] * 16 + ([0] * 8 + [1] * 8) * 2
    assert groups.attention.unit_of_row_R["self_attn.qkv_proj"].tolist() == expected
    assert groups.mlp.unit_of_row_R["mlp.gate_up_proj"].tolist() == [*range(48), *range(48)]
    groups = find_groups(Decoder(families.loaded("gpt_neox")), [0])[0]
    interleaved = [head for head in range(4) for _ in range(24)]
    assert groups.attention.unit_of_row_R["attention.query_key_value"].tolist() == interleaved


@pytest.mark.parametrize("options", [
    {"method": "llm-pruner", "importance": "mixed"},
    {"method": "wanda-sp"},
    {"method": "flap"},
    {"method": "flap", "repair": True},
])  # fmt: skip
def test_streamed_equals_resident(options: dict[str, Any], tmp_path: Path) -> None:
    resident = narrow("gemma2", tmp_path / "resident", stream=False, **options)
    streamed = narrow("gemma2", tmp_path / "streamed", stream=True, **options)
    for one, other in zip(resident.blocks, streamed.blocks, strict=True):
        assert one.removed_kv_heads == other.removed_kv_heads
        assert one.removed_neurons == other.removed_neurons
    found = [shortllm.load(tmp_path / name) for name in ("resident", "streamed")]
    torch.testing.assert_close(logits(found[0]), logits(found[1]), rtol=0, atol=1e-5)


def test_what_is_up_to_date_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    narrow("llama", target, method="wanda-sp")
    written = (target / WidthPruning.FILE).stat().st_mtime_ns
    narrow("llama", target, method="wanda-sp")
    assert (target / WidthPruning.FILE).stat().st_mtime_ns == written
    with overwriting():
        assert narrow("llama", target, method="flap", ratio=0.4).method == "flap"
    assert json.loads((target / "config.json").read_text())["shortllm"]["width"]["ratio"] == 0.4
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="contains something else"):
        narrow("llama", tmp_path / "other")


def test_depth_and_width_again_after_width(tmp_path: Path) -> None:
    narrow("qwen2", tmp_path / "narrow", method="flap", ratio=0.3)
    narrower = open_checkpoint(tmp_path / "narrow")
    families.shortened(narrower, [1, 4], tmp_path / "short")
    short = shortllm.load(tmp_path / "short", dtype=torch.float32).eval()
    decoder = Decoder(shortllm.load(tmp_path / "narrow", dtype=torch.float32).eval())
    with decoder.without([1, 4]):
        expected = logits(decoder.model)
    assert torch.equal(logits(short), expected)
    options = {"importance": "l1", "ratio": 0.2, "start": 0, "end": 6}
    before = [
        len(one.removed_neurons)
        for one in WidthPruning.load(tmp_path / "narrow" / WidthPruning.FILE).blocks
    ]
    source = families.save(families.build("gpt_neox"), tmp_path / "source")
    narrow(open_checkpoint(source), tmp_path / "first", importance="l1", ratio=0.25, start=0, end=2)
    again = narrow(
        open_checkpoint(tmp_path / "first"), tmp_path / "second", **{**options, "ratio": 0.34}
    )
    assert before and [one.query_heads for one in again.blocks] == [3, 3, 4, 4, 4, 4]


@pytest.mark.slow
def test_the_other_commands_take_shapes_per_block(tmp_path: Path) -> None:
    source = retraining.whole(tmp_path / "source", "qwen2")
    data = retraining.text(tmp_path / "text.jsonl")
    narrower = str(tmp_path / "out")
    shortllm.width(
        str(source), narrower, method="flap", ratio=0.3, data=str(data), length=32, samples=4,
        device="cpu",
    )  # fmt: skip
    evaluation = EvaluationOptions(data=[str(data)], max_segments=4, length=32, continuations=0)
    measured = [
        shortllm.evaluate([narrower], options=evaluation, device="cpu", stream=stream)
        for stream in (False, True)
    ]
    resident, streamed = (one.models[0].perplexity[0].perplexity for one in measured)
    assert resident == pytest.approx(streamed, rel=1e-5)
    assert AutoTokenizer.from_pretrained(narrower)("a").input_ids
    benchmark = shortllm.bench(
        [narrower],
        options=shortllm.BenchmarkOptions(new_tokens=[4], warmup=1, runs=1),
        out=tmp_path / "bench.json",
        device="cpu",
    )
    assert benchmark.measurements[0].status == "ok"
    for method in ("lora", "full"):
        trained = RetrainOptions(
            method=method, data=str(data), **{**retraining.QUICK, "max_steps": 2}
        )
        retrained = tmp_path / method
        shortllm.retrain(narrower, retrained, options=trained, device="cpu")
        shapes = json.loads((retrained / "config.json").read_text())["per_block_shapes"]
        assert shapes == json.loads(Path(narrower, "config.json").read_text())["per_block_shapes"]
        assert shortllm.load(retrained).config.model_type == "qwen2"
    shorter = shortllm.shorten(shortllm.load(narrower), blocks=2)
    shorter.save_pretrained(tmp_path / "shorter")
    assert "per_block_shapes" in (tmp_path / "shorter" / "config.json").read_text()


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"ratio": 1.0}, "ratio 1.0: must be less than 1"),
        ({"method": "flip"}, "unknown width method 'flip'. Did you mean 'flap'"),
        ({"method": "flap", "importance": "l1"}, "importance is an option of --method llm-pruner"),
        ({"method": "wanda-sp", "bias": True}, "bias is an option of --method flap"),
        ({"method": "flap", "neuron_ratio": 0.5}, "one list, so --neuron-ratio has no effect"),
        ({"start": 5, "end": 5}, "the model has 6"),
        ({"shapes": "uniform"}, "--start 0 --end 6"),
    ):
        with pytest.raises(ShortLLMError, match=message):
            narrow("llama", tmp_path / "out", **options)


def test_a_score_that_is_not_finite_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    def broken(*args: Any) -> Tensor:
        return torch.tensor([1.0, float("nan")])

    monkeypatch.setattr(wanda_sp, "weighted_input", broken)
    with pytest.raises(CriterionError, match="head 1 of block 0"):
        narrow("llama", tmp_path / "out", method="wanda-sp")
