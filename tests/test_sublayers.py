"""Sublayers: a checkpoint with zeroed projections computes what the original without them does."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import families
import pytest
import torch
from safetensors.torch import load_file
from test_criteria import Stopped, counting
from test_width import calibration
from torch import Tensor, nn
from typer.testing import CliRunner

import shortllm
from shortllm import files, journal
from shortllm.checkpoint.source import open_checkpoint
from shortllm.checkpoint.structure import find_blocks
from shortllm.cli import app
from shortllm.errors import (
    BudgetError,
    CheckpointError,
    CriterionError,
    OutputError,
    ShortLLMError,
    UnsupportedModelError,
)
from shortllm.files import overwriting
from shortllm.journal import Journal
from shortllm.model import Session, walk
from shortllm.model.decoder import Decoder
from shortllm.model.hidden_states import StreamMemory
from shortllm.model.metrics import kl_divergence, next_token_nll
from shortllm.model.walk import mean_losses
from shortllm.options import options_from
from shortllm.sublayers import drop as stage
from shortllm.sublayers.criteria import Task
from shortllm.sublayers.criteria.removal import sublayer_ppl
from shortllm.sublayers.options import SublayerDrop, SublayerOptions
from shortllm.sublayers.structure import (
    PARTS,
    Sublayer,
    Variants,
    find_sublayers,
    without_sublayers,
)

SKIPPED = {
    "llama": ("self_attn", "mlp"),
    "qwen3": ("self_attn", "mlp"),
    "phi3": ("self_attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "opt": ("self_attn", "fc2"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
"""Family -> the last module of each part before the stream: what a true bypass leaves out."""

OUTPUTS = {
    **dict.fromkeys(("llama", "qwen3", "phi3", "gemma2"), ("self_attn.o_proj", "mlp.down_proj")),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
}

FREE = {"protect_first": 0, "protect_last": 0}
ALL = [(b, part) for b in range(6) for part in PARTS]


@contextmanager
def skipping(model: nn.Module, variant: str, removed: Iterable[Sublayer]) -> Iterator[None]:
    """Within the context, by the family's own names, parts are not computed at all."""
    _, blocks = find_blocks(model, model.config)
    changed = []
    for b, part in removed:
        module: Any = blocks[b].get_submodule(SKIPPED[variant][PARTS.index(part)])
        attention = part == "attention" and variant != "gemma2"

        def forward(*args: Any, attention: bool = attention, **kwargs: Any) -> Any:
            stream = args[0] if args else kwargs["hidden_states"]
            nothing = torch.zeros(*stream.shape[:-1], 32)
            return (nothing, None) if attention else nothing

        module.forward = forward
        changed.append(module)
    yield
    for module in changed:
        del module.forward


@torch.no_grad()
def logits_of(model: nn.Module, ids_BT: Tensor | None = None) -> Tensor:
    ids = families.token_ids() if ids_BT is None else ids_BT
    return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def plain_logits(variant: str, removed: Iterable[Sublayer]) -> Tensor:
    """Logits of all predictions `[N, V]`."""
    model = families.loaded(variant)
    with skipping(model, variant, removed):
        return logits_of(model)[:, :-1].flatten(0, 1)


def plain_nll(variant: str, removed: Iterable[Sublayer]) -> float:
    logits_NV, ids_BT = plain_logits(variant, removed), families.token_ids()
    return float(next_token_nll(logits_NV, ids_BT[:, 1:].flatten()).double().mean())


def drop(
    variant: str | Path, target: Path, *, stream: bool | None = None, **options: Any
) -> SublayerDrop:
    checkpoint = families.opened(variant) if isinstance(variant, str) else open_checkpoint(variant)
    given = options_from(SublayerOptions, {**FREE, **options})
    return stage.drop_from(
        checkpoint, given, target, calibration=calibration(),
        session=Session(device="cpu", stream=stream),
    )  # fmt: skip


# ------------------------------------------------------------------ what is written


@pytest.mark.parametrize(
    "variant", families.by_tier([*SKIPPED, "gpt_neox-streamed"], "opt", "gpt_neox-streamed")
)
def test_zeroed_equals_skipped(variant: str, tmp_path: Path) -> None:
    variant, _, stream = variant.partition("-")
    made = drop(variant, tmp_path / "short", stream=bool(stream), attention=[1, 4], mlp=[0, 5])
    gone = [(1, "attention"), (4, "attention"), (0, "mlp"), (5, "mlp")]
    original = families.loaded(variant)
    with skipping(original, variant, gone):  # type: ignore[arg-type]
        expected = logits_of(original)
    found = logits_of(families.load(tmp_path / "short"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, logits_of(original), atol=1e-2)
    assert (made.blocks("attention"), made.blocks("mlp"), made.removed_blocks) == (
        [1, 4],
        [0, 5],
        [],
    )


@pytest.mark.parametrize(
    "variant",
    families.by_tier(
        v for v in families.VARIANTS if v not in ("mixtral", "opt-projected", *SKIPPED)
    ),
)
def test_zeroed_equals_zeros_handed_out(variant: str) -> None:
    model = families.build(variant)
    decoder = Decoder(model)
    outputs = find_sublayers(decoder, (1, 3))
    gone: list[Sublayer] = [(1, "attention"), (3, "mlp")]
    with without_sublayers(decoder, outputs, gone):
        expected = logits_of(model)
    intact = logits_of(model)
    for b, part in gone:
        module: Any = decoder.blocks[b].get_submodule(outputs[b][part])
        for parameter in module.parameters():
            parameter.data.zero_()
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, intact, atol=1e-2)


@pytest.mark.parametrize("variant", families.by_tier(["llama", "gpt_neox", "opt"], "opt"))
def test_only_output_projections_change(variant: str, tmp_path: Path) -> None:
    made = drop(variant, tmp_path / "short", attention=[2], mlp=[3])
    before = load_file(families.saved(variant) / "model.safetensors")
    after = load_file(tmp_path / "short" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    prefix = families.opened(variant).block_names.prefix
    names = zip((2, 3), OUTPUTS[variant], strict=True)
    zeroed = [f"{prefix}.{b}.{name}.{kind}" for b, name in names for kind in ("weight", "bias")]
    assert changed == {name for name in zeroed if name in before}
    assert all(
        not after[name].any() and after[name].dtype == before[name].dtype for name in changed
    )
    assert made.zeroed_parameters == sum(before[name].numel() for name in changed)
    assert (made.parameters, made.bytes) == (made.model.parameters, made.model.bytes)
    assert sorted(path.name for path in (tmp_path / "short").iterdir()) == sorted(
        [
            *(path.name for path in families.saved(variant).iterdir()),
            *("README.md", "local.json", SublayerDrop.FILE),
        ]
    )
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    about = config.pop("shortllm")
    assert about["sublayers"] == {"attention": [2], "mlp": [3]} and about["removed_blocks"] == []
    assert config == json.loads((families.saved(variant) / "config.json").read_text())


@pytest.mark.parametrize("variant", ["llama", "gemma2"])
def test_a_block_that_loses_both_is_removed(variant: str, tmp_path: Path) -> None:
    made = drop(variant, tmp_path / "short", attention=[2, 4], mlp=[4, 5])
    assert made.removed_blocks == [4]
    short = open_checkpoint(tmp_path / "short")
    assert short.block_count == 5
    assert (
        made.parameters == short.parameters == made.model.parameters - short.parameters_per_block[0]
    )
    original = families.loaded(variant)
    with skipping(original, variant, [(2, "attention"), (5, "mlp")]):
        with Decoder(original).without([4]):
            expected = logits_of(original)
    found = logits_of(families.load(tmp_path / "short"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    after = load_file(tmp_path / "short" / "model.safetensors")
    zeroed = [name for name in after if name.endswith(("o_proj.weight", "down_proj.weight"))
              and not after[name].any()]  # fmt: skip
    assert sorted(zeroed) == [
        "model.layers.2.self_attn.o_proj.weight", "model.layers.4.mlp.down_proj.weight"
    ]  # fmt: skip


def test_a_checkpoint_that_does_not_compute_what_was_meant_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "zeroed_names", lambda *args: [])
    with pytest.raises(CheckpointError, match="does not compute what the original"):
        drop("llama", tmp_path / "short", attention=[2])
    assert list(tmp_path.iterdir()) == []


def test_what_is_up_to_date_is_left_alone_and_other_things_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "short"
    made = drop("llama", target, criterion="sublayer-influence", remove=2)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "find_sublayers", lambda *args: pytest.fail("worked again"))
        assert drop("llama", target, criterion="sublayer-influence", remove=2) == made
    with pytest.raises(OutputError, match="remove: 2, now 3.*--overwrite"):
        drop("llama", target, criterion="sublayer-influence", remove=3)
    with overwriting():
        other = drop("llama", target, criterion="sublayer-influence", remove=3)
    assert len(other.dropped) == 3 and SublayerDrop.load(target / SublayerDrop.FILE) == other
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="contains something else"):
        drop("llama", tmp_path / "full", attention=[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "short"]


def test_sublayers_of_a_checkpoint_without_some_can_go_too(tmp_path: Path) -> None:
    drop("llama", tmp_path / "one", attention=[2])
    drop(tmp_path / "one", tmp_path / "two", mlp=[3])
    drop("llama", tmp_path / "both", attention=[2], mlp=[3])
    one, both = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "both"))
    assert all(torch.equal(one[name], both[name]) for name in both)
    about = json.loads((tmp_path / "two" / "config.json").read_text())["shortllm"]
    assert about["parent"]["sublayers"] == {"attention": [2], "mlp": []}


# ------------------------------------------------------------------ what is chosen


@pytest.mark.parametrize("variant", families.by_tier(SKIPPED, "gpt_neox", "gemma2"))
def test_one_walk_gives_the_numbers_of_models_one_by_one(variant: str) -> None:
    decoder = Decoder(families.loaded(variant))
    outputs = find_sublayers(decoder, range(6))
    assert {tuple(names.values()) for names in outputs.values()} == {OUTPUTS[variant]}
    sets: list[frozenset[Sublayer]] = [
        frozenset(), *(frozenset({one}) for one in ALL),
        frozenset({(1, "mlp"), (2, "attention"), (2, "mlp"), (5, "mlp")}),
    ]  # fmt: skip
    variants = Variants(decoder, outputs)
    removals = [variants.without(removed) for removed in sets]
    found = mean_losses(variants.as_decoder(), families.token_ids(), removals)
    expected = [plain_nll(variant, removed) for removed in sets]
    assert found == pytest.approx(expected, rel=1e-5)
    assert len({round(value, 4) for value in found}) > 10


@pytest.mark.parametrize("variant", families.by_tier(["llama", "gpt_neox", "gemma2"]))
@pytest.mark.parametrize("parts", ["joint", "mlp"])
def test_perplexity_removes_the_least_missed_one_after_the_other(
    variant: str, parts: str, tmp_path: Path
) -> None:
    made = drop(
        variant, tmp_path / "short", criterion="sublayer-ppl", remove=4, parts=parts,
        protect_first=1,
    )  # fmt: skip
    candidates = [(b, p) for b, p in ALL if b > 0 and parts in ("joint", p)]
    gone: list[Sublayer] = []
    for one in made.dropped:
        left = [other for other in candidates if other not in gone]
        values = {other: plain_nll(variant, [*gone, other]) for other in left}
        best = min(values, key=lambda other: values[other])
        assert (one.block, one.part) == best
        assert one.value == pytest.approx(math.exp(values[best]), rel=1e-5)
        gone.append(best)
    assert made.intact == pytest.approx(math.exp(plain_nll(variant, [])), rel=1e-5)


@pytest.mark.parametrize("variant", families.by_tier(["gpt_neox", "gemma2"], "gemma2"))
def test_divergence_removes_the_least_missed_one_after_the_other(
    variant: str, tmp_path: Path
) -> None:
    made = drop(variant, tmp_path / "short", criterion="sublayer-kl", remove=2, protect_first=3)
    intact = plain_logits(variant, [])
    gone: list[Sublayer] = []
    for one in made.dropped:
        left = [(b, p) for b, p in ALL if b >= 3 and (b, p) not in gone]
        values = {
            other: kl_divergence(intact, plain_logits(variant, [*gone, other])).mean().item()
            for other in left
        }
        best = min(values, key=lambda other: values[other])
        assert (one.block, one.part) == best
        assert one.value == pytest.approx(values[best], rel=1e-4)
        gone.append(best)
    assert made.intact == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    "variant",
    families.by_tier(["llama", "gemma2", "gpt_neox", "gpt_neox-serial"], "gpt_neox"),
)
def test_influence_is_the_similarity_around_each_sublayer(variant: str, tmp_path: Path) -> None:
    model = families.loaded(variant)
    _, blocks = find_blocks(model, model.config)
    seen: dict[tuple[int, str], Tensor] = {}
    names = SKIPPED[variant.partition("-")[0]]

    def remember(b: int, what: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if what == "block":
                seen[b, what] = args[0] if args else kwargs["hidden_states"]
            else:
                seen[b, what] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = []
    for b, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(remember(b, "block"), with_kwargs=True))
        for part, name in zip(PARTS, names, strict=True):
            module = block.get_submodule(name)
            hooks.append(module.register_forward_hook(remember(b, part), with_kwargs=True))
    logits_of(model)
    for handle in hooks:
        handle.remove()
    made = drop(variant, tmp_path / "short", criterion="sublayer-influence", remove=11)
    found = {(one.block, one.part): one.value for one in made.dropped}
    values = [one.value or 0.0 for one in made.dropped]
    assert values == sorted(values)
    for (b, part), value in found.items():
        x = seen[b, "block"].double()
        if part == "mlp" and variant != "gpt_neox":
            x = x + seen[b, "attention"].double()
        y = x + seen[b, part].double()
        cosine = torch.cosine_similarity(x, y, dim=-1).mean().item()
        assert value == pytest.approx(1 - cosine, rel=1e-3)


@pytest.mark.parametrize("criterion", ["sublayer-ppl", "sublayer-influence"])
def test_streamed_equals_resident(
    criterion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = drop("gemma3_text", tmp_path / "one", criterion=criterion, remove=4)
    monkeypatch.setattr(walk, "TOGETHER", 5)
    two = drop("gemma3_text", tmp_path / "two", criterion=criterion, remove=4, stream=True)
    assert [(d.block, d.part) for d in one.dropped] == [(d.block, d.part) for d in two.dropped]
    for a, b in zip(one.dropped, two.dropped, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-5)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


def test_interrupted_rounds_go_on_where_they_were(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(journal, "MIN_INTERVAL_S", 0.0)
    monkeypatch.setattr(journal, "WORK_PER_COMMIT", 0)
    decoder, ids_BT = families.streamed("llama"), families.token_ids()
    outputs = find_sublayers(decoder, range(6))
    through, read = decoder.through, []

    def attempt(stop_after: int | None, work: Journal | None = None) -> Any:
        read.clear()
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "through", counting(through, read, stop_after=stop_after))
            task = Task(
                decoder=decoder, outputs=outputs, candidates=ALL, remove=3, ids_BT=ids_BT,
                memory=StreamMemory(), journal=work or Journal(None, ""),
            )  # fmt: skip
            return sublayer_ppl(task)

    expected = attempt(None)
    whole = len(read)
    with pytest.raises(Stopped):
        attempt(10, Journal(tmp_path / "work", "w"))
    assert attempt(None, Journal(tmp_path / "work", "w")) == expected
    assert len(read) <= whole - 10 + 2


def test_interrupted_while_choosing_it_says_that_it_can_resume(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupted: set[Path] = set()
    monkeypatch.setattr(files, "_interrupted", interrupted)

    def attempt() -> SublayerDrop:
        return drop("llama", tmp_path / "out", criterion="sublayer-influence", remove=2)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "Task", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            attempt()
    assert interrupted == {tmp_path / "out.choosing.partial"} and files.can_resume()
    assert len(attempt().dropped) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("mixtral", "'mixtral' cannot lose single sublayers: block 1 is not one attention and one"),
        ("opt-projected", "block 1 changes the hidden state even if .* return zeros"),
    ],
)
def test_models_whose_sublayers_cannot_go_are_refused(
    variant: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        drop(variant, tmp_path / "short", attention=[1])
    assert list(tmp_path.iterdir()) == []


def test_impossible_choices_are_refused_before_the_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "decoder", lambda *args: pytest.fail("the model was loaded"))
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, CriterionError, "nothing says which sublayers to remove. Give --criterion"),
        ({"criterion": "sublayer-ppl"}, CriterionError, "with --remove 4"),
        ({"criterion": "sublayer-pp", "remove": 2}, ShortLLMError, "Did you mean 'sublayer-ppl'"),
        ({"remove": 2}, CriterionError, "nothing says which sublayers to remove"),
        ({"remove": 2, "mlp": [3]}, CriterionError, "so --criterion and --remove have no effect"),
        ({"criterion": "sublayer-ppl", "remove": 12}, BudgetError, "Give 1 to 11"),
        (
            {"criterion": "sublayer-ppl", "remove": 5, "parts": "mlp", "protect_first": 2},
            BudgetError,
            r"4 may go \(mlp of 4 unprotected blocks\). Give 1 to 4, or pass",
        ),
        ({"attention": [6]}, BudgetError, "--attention 6: the model has blocks 0 to 5"),
        ({"mlp": [1, 1]}, BudgetError, "--mlp names a block twice: 1,1"),
        ({"mlp": [*range(6)], "attention": [*range(6)]}, BudgetError, "every sublayer is named"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            drop("llama", tmp_path / "short", **options)


def test_the_command_says_that_zeros_save_nothing(tmp_path: Path) -> None:
    def said(*arguments: object) -> str:
        given = ["drop-sublayers", str(families.saved("llama")), *map(str, arguments)]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, result.output
        return result.stdout

    text = said("--attention", "1,3", "--mlp", 3, "--out", tmp_path / "short")
    assert "1 of 3 sublayers are zeros now" in text
    assert "They still take memory and time" in text
    assert "block 3 lost both sublayers and was removed" in text
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(families.token_ids().tolist()))
    text = said(
        "--criterion", "sublayer-ppl", "--remove", 2, "--calibration", ids,
        "--out", tmp_path / "chosen", "--json",
    )  # fmt: skip
    record = json.loads(text)
    assert len(record["dropped"]) == 2 and record["intact"] > 1
    assert isinstance(shortllm.SublayerDrop.model_validate(record), SublayerDrop)
