"""A draft made of the weights of a loaded model: what it computes, and that it takes no memory."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import PERIOD, tiny_config
from families import (
    BY_TIER,
    VARIANTS,
    build,
    config_of,
    load,
    loaded,
    opened,
    save,
    shortened,
    token_ids,
)
from torch import Tensor, nn

import shortllm
from shortllm.errors import CheckpointError, ShortLLMError, UnsupportedModelError
from shortllm.runtime import peak_memory, quiet_transformers

REMOVED = [1, 3]

GREEDY: dict[str, Any] = {
    "max_new_tokens": 12, "do_sample": False, "use_cache": True, "pad_token_id": 0
}  # fmt: skip


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=token_ids(2) if ids is None else ids).logits  # type: ignore[no-any-return]


def tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def own_bytes(draft: nn.Module, model: nn.Module) -> int:
    """Bytes of a draft's tensors that are not in the memory of the model."""
    held = {tensor.untyped_storage().data_ptr() for _, tensor in tensors(model)}
    own = {tensor.untyped_storage().data_ptr(): tensor.nbytes for _, tensor in tensors(draft)}
    return sum(size for place, size in own.items() if place not in held)


@pytest.mark.parametrize("variant", BY_TIER)
def test_the_draft_computes_what_the_checkpoint_does(variant: str, tmp_path: Path) -> None:
    model: Any = loaded(variant)
    intact, generated = logits(model), model.generate(token_ids(1, 9), **GREEDY)
    config, generation = repr(model.config), repr(model.generation_config)
    frozen = [parameter.requires_grad for parameter in model.parameters()]

    draft = shortllm.draft_of(model, REMOVED)
    short: Any = shortllm.shorten(model, plan=REMOVED, verify=False)
    assert type(draft) is type(model) and not draft.training
    assert torch.equal(logits(draft), logits(short))
    assert torch.equal(logits(model), intact)
    expected = short.generate(token_ids(1, 9), **GREEDY)
    assert torch.equal(draft.generate(token_ids(1, 9), **GREEDY), expected)
    found, wanted = draft.config.to_dict(), short.config.to_dict()
    assert {key for key in {*found, *wanted} if found.get(key) != wanted.get(key)} <= {
        "_name_or_path", "shortllm"
    }  # fmt: skip
    assert found["shortllm"].items() <= wanted["shortllm"].items()
    assert repr(draft.generation_config) == repr(short.generation_config)

    assert own_bytes(draft, model) == 0
    assert [key for key, _ in tensors(draft)] == [key for key, _ in tensors(short)]
    ties = [len({id(one) for _, one in tensors(each)}) for each in (draft, short)]
    assert ties[0] == ties[1]
    assert not any(parameter.requires_grad for parameter in draft.parameters())

    again = load(save(draft, tmp_path / "again"))
    assert torch.equal(logits(again), logits(short))
    surgery = load(shortened(opened(variant), REMOVED, tmp_path / "surgery"))
    assert [key for key, _ in tensors(again)] == [key for key, _ in tensors(surgery)]

    assert torch.equal(logits(model), intact)
    assert torch.equal(model.generate(token_ids(1, 9), **GREEDY), generated)
    assert (repr(model.config), repr(model.generation_config)) == (config, generation)
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen


@pytest.mark.parametrize("variant", BY_TIER)
def test_assisted_generation_gives_the_tokens_of_the_intact_model(variant: str) -> None:
    # transformers 5.17 cannot draft past a sliding window, whatever the draft (its pull request
    # 48280 corrects that), so the text stays within it
    wider = {"sliding_window": 64} if "sliding_window" in VARIANTS[variant] else {}
    model: Any = build(config_of(variant, **wider))
    draft = shortllm.draft_of(model, REMOVED)
    short = shortllm.shorten(model, plan=REMOVED, verify=False)
    for seed in (1, 2):
        prompt = token_ids(1, 9, seed=seed)
        alone = model.generate(prompt, **GREEDY)
        calls: list[int] = []
        hook = model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        for assistant in (draft, short):
            assert torch.equal(model.generate(prompt, assistant_model=assistant, **GREEDY), alone)
        hook.remove()
        assert len(calls) % 2 == 0  # the two drafted the same, so it ran as often with each
        assert torch.equal(model.generate(prompt, **GREEDY), alone)


def test_a_draft_is_used_where_it_agrees() -> None:
    """Blocks that do nothing are gone without a trace, so that all of the draft is accepted."""
    model: Any = build("llama")
    for block in REMOVED:
        for part in (model.model.layers[block].self_attn.o_proj, model.model.layers[block].mlp):
            for parameter in getattr(part, "down_proj", part).parameters():
                parameter.data.zero_()
    draft = shortllm.draft_of(model, REMOVED)
    draft.generation_config.update(
        num_assistant_tokens=3,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    steps: list[int] = []
    hook = model.register_forward_hook(lambda *_: steps.append(1))
    alone = model.generate(token_ids(1, 9), **GREEDY)
    new_tokens, plain = alone.shape[1] - 9, len(steps)
    assisted = model.generate(token_ids(1, 9), assistant_model=draft, **GREEDY)
    hook.remove()
    assert torch.equal(assisted, alone) and plain == new_tokens
    assert len(steps) - plain == -(-new_tokens // 4)  # three drafted tokens and one of its own


def test_plans_name_the_blocks_too(tmp_path: Path) -> None:
    source = opened("llama").directory
    scores = shortllm.score(source, criterion="magnitude")
    plan = shortllm.plan(scores, remove=2, protect_first=1)
    plan.save(tmp_path / "plan.json")
    model = load(source)
    drafts = [
        shortllm.draft_of(model, given)
        for given in (plan, tmp_path, str(tmp_path / "plan.json"), plan.removed)
    ]
    for draft in drafts:
        assert draft.config.shortllm["removed_blocks"] == plan.removed
        assert torch.equal(logits(draft), logits(drafts[-1]))
    assert drafts[0].config.shortllm["criterion"] == "magnitude"
    assert drafts[-1].config.shortllm["criterion"] is None
    assert shortllm.draft_of(model, 2).config.num_hidden_layers == 5
    with pytest.raises(CheckpointError, match=r"the plan is for .* \(a 'llama' of 6 blocks\), but"):
        shortllm.draft_of(loaded("gpt2"), plan)


def test_a_draft_follows_the_model_and_outlives_it() -> None:
    model: Any = build("llama-tied").train()
    draft = shortllm.draft_of(model, REMOVED)
    short = shortllm.shorten(model, plan=REMOVED, verify=False)
    assert model.training and not draft.training
    before = logits(draft)
    model(input_ids=token_ids(2), labels=token_ids(2)).loss.backward()
    assert all(one.grad is None for one in draft.parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    trained = logits(draft)
    assert not torch.equal(trained, before) and torch.equal(logits(short.eval()), before)
    assert torch.equal(trained, logits(shortllm.shorten(model.eval(), plan=REMOVED, verify=False)))
    del model
    gc.collect()
    assert torch.equal(logits(draft), trained)
    # another type is a copy
    model = build("llama")
    intact, draft = logits(model), shortllm.draft_of(model, REMOVED).to(torch.bfloat16)
    assert torch.equal(logits(model), intact) and logits(draft).dtype == torch.bfloat16


def test_a_draft_has_the_type_and_attention_of_the_model(tmp_path: Path) -> None:
    model: Any = build("mixtral").to(torch.bfloat16)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    model.name_or_path = "owner/model"
    model.generation_config.repetition_penalty = 1.5
    draft = shortllm.draft_of(model, REMOVED)
    assert draft.dtype == torch.bfloat16
    assert draft.config._attn_implementation == draft.config._experts_implementation == "eager"
    assert draft.name_or_path == "owner/model"
    assert draft.generation_config.repetition_penalty == 1.5
    draft.generation_config.num_assistant_tokens = 7
    assert model.generation_config.num_assistant_tokens != 7
    assert shortllm.open_checkpoint(draft).block_count == 4  # a model like any other
    twice = shortllm.draft_of(draft, 0)
    assert twice.config.shortllm["parent"]["removed_blocks"] == REMOVED
    assert own_bytes(twice, model) == 0
    assert shortllm.load(save(draft, tmp_path / "draft")).dtype == torch.bfloat16


@pytest.mark.parametrize("model_type", ["gemma3n_text", "zamba", "qwen3_5", "rwkv", "cohere2"])
def test_what_is_special_about_a_family_is_kept(model_type: str) -> None:
    """Shares for every block, blocks that share weights, towers, states, kinds of attention."""
    model = build(tiny_config(model_type))
    removed = next(one for one in ([1, 2], PERIOD, [4], [5]) if _may_go(model, one))
    draft = shortllm.draft_of(model, removed)
    assert torch.equal(logits(draft), logits(shortllm.shorten(model, plan=removed, verify=False)))
    copied = sum(
        tensor.nbytes
        for name, tensor in tensors(draft)
        if "per_layer" in name and "layers." not in name
    )
    assert own_bytes(draft, model) <= copied and (copied > 0) == (model_type == "gemma3n_text")


def _may_go(model: nn.Module, removed: list[int]) -> bool:
    try:
        return bool(shortllm.shorten(model, plan=removed, verify=False))
    except UnsupportedModelError:
        return False


# ---- what is refused


@pytest.mark.parametrize(
    ("model_type", "removed"),
    [
        ("llama", []),
        ("llama", [6]),
        ("llama", [2, 2]),
        ("llama", list(range(6))),
        ("jamba", [1]),  # whole periods alone
        ("zamba2", [1]),  # a block that others need
        ("modernbert-decoder", [0]),
        ("diffllama", [1]),  # no block
    ],
)
def test_the_refusals_are_those_of_surgery(model_type: str, removed: list[int]) -> None:
    model = build(tiny_config(model_type))
    with pytest.raises(ShortLLMError) as expected:
        shortllm.shorten(model, plan=removed, verify=False)
    with pytest.raises(ShortLLMError) as found:
        shortllm.draft_of(model, removed)
    assert type(found.value) is type(expected.value)
    assert str(found.value) == str(expected.value)


def test_references_to_blocks_without_a_rule_are_refused_unless_accepted() -> None:
    model: Any = build("llama")
    model.config.special_layers = [1, 4]
    with pytest.raises(UnsupportedModelError, match="special_layers"):
        shortllm.draft_of(model, REMOVED)
    draft = shortllm.draft_of(model, REMOVED, accept_unknown_references=True)
    assert draft.config.special_layers == [1, 4]


def test_weights_that_cannot_be_shared_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for source in ("embedded", opened("llama").directory):
        with pytest.raises(CheckpointError, match="is not in memory. Give shortllm.load"):
            shortllm.draft_of(source, 1)
    model: Any = build("llama")
    model.model.layers[0].mlp.up_proj = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="mlp.up_proj' is Identity, where .* Linear"):
        shortllm.draft_of(model, 1)
    model = build("llama")
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(40, 32))
    with pytest.raises(UnsupportedModelError, match=r"shape \[40, 32\], .* shape \[48, 32\]"):
        shortllm.draft_of(model, 1)
    model = build("llama")
    model.model.norm.to("meta")
    with pytest.raises(CheckpointError, match="weights that are not in memory"):
        shortllm.draft_of(model, 1)
    model = build("llama")
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(UnsupportedModelError, match=r"quantized .* `shortllm prune`"):
        shortllm.draft_of(model, 1)
    model = build("llama")
    devices = iter(range(1000))
    real = type(model).state_dict
    monkeypatch.setattr(
        type(model),
        "state_dict",
        lambda self, **how: {
            name: SimpleNamespace(is_meta=False, device=f"cuda:{next(devices) % 2}")
            for name in real(self, **how)
        },
    )
    with pytest.raises(UnsupportedModelError, match=r"several devices \(cuda:0, cuda:1\)"):
        shortllm.draft_of(model, 1)


def test_adapters_are_to_be_merged_first() -> None:
    peft = pytest.importorskip("peft")
    model: Any = build("llama")
    with quiet_transformers():
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match="has adapters. Merge them"):
        shortllm.draft_of(model, 1)


# ---- memory of the process

MEASURED = """
import sys, torch, shortllm
from shortllm.runtime import peak_memory
from families import build, config_of
torch.set_num_threads(1)
how, new_tokens = sys.argv[1], int(sys.argv[2])
model = build(config_of("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
                        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=2048))
how_to = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
draft = None
with torch.inference_mode():
    if how == "alone":
        model.generate(torch.ones(1, 9, dtype=torch.long), **how_to)
    else:
        draft = (shortllm.draft_of(model, [3, 4, 7]) if how == "shared"
                 else shortllm.shorten(model, plan=[3, 4, 7], verify=False))
        model.generate(torch.ones(1, 9, dtype=torch.long), assistant_model=draft, **how_to)
print(peak_memory(), sum(p.nbytes for p in (draft or model).parameters()))
"""


def test_the_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    program = "from shortllm.runtime import peak_memory; print(peak_memory())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert 2**23 < int(done.stdout) < peak_memory() / 2


@pytest.mark.slow
def test_the_process_needs_memory_for_the_cache_alone() -> None:
    new_tokens = 64
    peak = {how: _peak(how, new_tokens) for how in ("alone", "shared", "copied")}
    weights = peak["shared"][1]
    cache = 2 * 9 * 512 * 4 * (9 + new_tokens)
    assert peak["shared"][0] - peak["alone"][0] < cache + 2**24 < weights / 3
    assert peak["copied"][0] - peak["alone"][0] > 0.9 * weights


def _peak(how: str, new_tokens: int) -> tuple[int, int]:
    """Peak memory of a process that generates so, and the bytes of what drafts."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, how, str(new_tokens)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    peak, size = done.stdout.split()[-2:]
    return int(peak), int(size)
