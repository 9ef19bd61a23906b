"""The engine computes what a model rebuilt without the block computes, in every family."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import (
    VARIANTS,
    VOCABULARY,
    build,
    load,
    loaded,
    opened,
    score,
    shortened,
    token_ids,
)
from torch import Tensor, nn

from shortllm import criteria
from shortllm.checkpoint.structure import block_structure
from shortllm.criteria import Scores, resolve
from shortllm.errors import UnsupportedModelError
from shortllm.model import hidden_states, walk
from shortllm.model.decoder import BlockCall, Decoder
from shortllm.model.metrics import next_token_nll
from shortllm.pruning.scoring import Scorer, removals_of


def score_ppl(model: nn.Module, ids_BT: Tensor) -> Scores:
    return score(Decoder(model), ids_BT, "ppl")["ppl"]


@torch.inference_mode()
def plain_perplexity(model: nn.Module, ids_BT: Tensor) -> float:
    """The definition, one sample at a time, with nothing of the engine in it."""
    total = 0.0
    for ids_T in ids_BT:
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1]
        total += F.cross_entropy(logits_TV.double(), ids_T[1:], reduction="sum").item()
    return math.exp(total / (ids_BT.shape[0] * (ids_BT.shape[1] - 1)))


@torch.inference_mode()
def logits_of(model: nn.Module, ids_BT: Tensor) -> Tensor:
    return model(input_ids=ids_BT, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("variant", VARIANTS)
def test_perplexity_without_each_block_equals_that_of_the_rebuilt_model(
    variant: str, tmp_path: Path
) -> None:
    checkpoint, model, ids_BT = opened(variant), loaded(variant), token_ids()
    scores = score_ppl(model, ids_BT)
    assert scores.intact == pytest.approx(plain_perplexity(model, ids_BT), rel=1e-5)
    for b in range(checkpoint.block_count):
        rebuilt = load(shortened(checkpoint, [b], tmp_path / str(b)))
        assert scores.values[b] == pytest.approx(plain_perplexity(rebuilt, ids_BT), rel=1e-5), b
        # the comparison means something only where the block matters
        assert abs(scores.values[b] / scores.intact - 1) > 1e-4, b
    assert scores.importance == scores.values
    assert scores.delta_nll == pytest.approx(
        [math.log(value / scores.intact) for value in scores.values], abs=1e-9
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_bypass_restores_the_model_exactly(variant: str) -> None:
    model, ids_BT = loaded(variant), token_ids(2)
    before = logits_of(model, ids_BT)
    attributes = [set(vars(module)) for module in model.modules()]
    view = Decoder(model)
    with view.without([1, 3]):
        assert not torch.allclose(logits_of(model, ids_BT), before)
    with pytest.raises(KeyError, match="inside"), view.without([2]):
        raise KeyError("inside")
    score_ppl(model, ids_BT)
    assert torch.equal(logits_of(model, ids_BT), before)
    assert [set(vars(module)) for module in model.modules()] == attributes


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_of_the_engine_is_that_of_the_plain_forward(variant: str) -> None:
    """`mean_losses` (used for evaluation) agrees with the model's own logits."""
    model, ids_BT = loaded(variant), token_ids(2)
    expected_N = next_token_nll(
        logits_of(model, ids_BT)[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
    )
    assert walk.mean_losses(Decoder(model), ids_BT, [walk.NOTHING])[0] == pytest.approx(
        expected_N.mean().item(), rel=1e-5
    )


@pytest.mark.parametrize("variant", ["gemma3_text", "opt-projected", "falcon-alibi"])
@pytest.mark.parametrize("limit", [1, 7, 19, 40])
def test_small_slices_and_groups_change_nothing(
    variant: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids_BT = loaded(variant), token_ids()
    whole = score_ppl(model, ids_BT)
    monkeypatch.setattr(walk, "CPU_LOSS_BYTES", limit * VOCABULARY * 8)
    monkeypatch.setattr(walk, "FEWEST_TOKENS", 1)
    monkeypatch.setattr(hidden_states, "CPU_GROUP_TOKENS", limit)
    view = Decoder(model)
    assert walk.slice_tokens(view) == limit
    assert hidden_states.group_size(view, ids_BT.shape[1]) == max(1, limit // ids_BT.shape[1])
    cut = score_ppl(model, ids_BT)
    assert cut.intact == pytest.approx(whole.intact, rel=1e-6)
    assert cut.values == pytest.approx(whole.values, rel=1e-6)


def test_token_slices_cover_each_prediction_once() -> None:
    failed = []
    for samples, length in [(1, 2), (1, 9), (3, 20), (5, 2), (4, 7)]:
        expected_BT = torch.ones(samples, length, dtype=torch.int)
        expected_BT[:, -1] = 0  # nothing follows the last token
        for limit in [1, 2, 5, 6, 7, 18, 19, 20, 38, 1000]:
            seen_BT, sizes = torch.zeros_like(expected_BT), []
            for rows, columns in walk.token_slices(token_ids(samples, length), limit):
                seen_BT[rows, columns] += 1
                sizes.append(seen_BT[rows, columns].numel())
            if not torch.equal(seen_BT, expected_BT) or min(sizes) < 1 or max(sizes) > limit:
                failed.append((samples, length, limit))
    assert not failed


@pytest.mark.parametrize("variant", ["llama", "gpt2", "mixtral", "opt-projected"])
@pytest.mark.parametrize("limit", [10, 10**6])
def test_announced_work_is_the_work_reported(
    variant: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "CPU_LOSS_BYTES", limit * VOCABULARY * 8)
    monkeypatch.setattr(walk, "FEWEST_TOKENS", 1)
    monkeypatch.setattr(hidden_states, "CPU_GROUP_TOKENS", limit)
    view, ids_BT = Decoder(loaded(variant)), token_ids()
    structure = block_structure(view.model.config)
    source: Any = SimpleNamespace(block_count=view.block_count, structure=structure)
    for names in (["ppl"], ["influence"], ["taylor"], ["kl", "relative", "taylor"]):
        steps: list[float] = []
        scorer = Scorer(
            checkpoint=source, open_decoder=lambda: view, ids_BT=ids_BT, advance=steps.append
        )
        asked = [resolve(name) for name in names]
        scorer.score(asked)
        assert sum(steps) == pytest.approx(scorer.work(asked), rel=1e-9), names
        assert all(step > 0 for step in steps)


def test_work_of_a_block_counts_its_parameters() -> None:
    view = Decoder(loaded("llama"))
    one_block = sum(parameter.numel() for parameter in view.blocks[0].parameters())
    assert hidden_states.block_flops(view, 0) == 2 * one_block
    assert hidden_states.head_flops(view) == 2 * 32 * VOCABULARY
    removals = removals_of(6, range(6), range(6))
    assert walk.walk_flops(view, removals, 3, 20) == (
        2 * one_block * 60 * 21 + 2 * 32 * VOCABULARY * 57 * 7
    )


@pytest.mark.parametrize("position", range(6))
def test_removing_a_planted_identity_changes_exactly_nothing(position: int) -> None:
    model = copy.deepcopy(loaded("llama"))
    block = Decoder(model).blocks[position]
    with torch.no_grad():
        for projection in (block.self_attn.o_proj, block.mlp.down_proj):
            projection.weight.zero_()
            projection.bias.zero_()
    scores = score_ppl(model, token_ids())
    assert scores.delta_nll is not None
    assert abs(scores.delta_nll[position]) <= 1e-12
    others = [delta for b, delta in enumerate(scores.delta_nll) if b != position]
    assert min(map(abs, others)) > 1e-4


def test_a_sample_of_two_tokens_can_be_scored() -> None:
    model, ids_BT = loaded("qwen2"), token_ids(1, 2)
    assert score_ppl(model, ids_BT).intact == pytest.approx(
        plain_perplexity(model, ids_BT), rel=1e-5
    )


def test_scores_of_a_broken_model_are_refused() -> None:
    model = copy.deepcopy(loaded("llama"))
    with torch.no_grad():
        Decoder(model).blocks[2].mlp.down_proj.weight.fill_(math.inf)
    with pytest.raises(criteria.CriterionError, match="'ppl' gives (nan|inf) for block 0"):
        criteria.require_finite("ppl", score_ppl(model, token_ids()).values)


class Chatty(nn.Module):
    """A decoder whose blocks may misbehave in one way, as types that walks cannot treat do."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.config = build("llama").config
        self.fault = fault
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList([ChattyBlock(fault) for _ in range(6)])
        self.head = nn.Linear(8, VOCABULARY)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def blocks_in_order(self) -> Iterator[nn.Module]:
        if self.fault == "skips one":
            return iter(list(self.layers)[:-1])
        if self.fault == "repeats one":
            return iter([self.layers[0], *list(self.layers)[:-1]])
        if self.fault == "goes backwards":
            return iter(list(self.layers)[::-1])
        return iter(self.layers)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        stream = self.embed(input_ids)
        state: Any = (
            stream.mean() if self.fault == "hands a tensor on" else {"sum": torch.zeros(())}
        )
        for block in self.blocks_in_order():
            if self.fault == "shares a store":
                state = dict(state, sum=state["sum"] + stream.sum())
            if self.fault == "hands views on" and stream.ndim == 3:
                stream = stream.flatten(0, 1)
            stream = block(stream, state=state)
            if self.fault == "hands a tensor on":
                state = stream.mean()
            if isinstance(stream, tuple):
                stream, state = stream
        return type("Output", (), {"logits": self.head(stream)})


class ChattyBlock(nn.Module):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.linear = nn.Linear(8, 8)

    def forward(self, stream: Tensor, state: Any) -> Any:
        if self.fault == "fills a store":
            state["sum"] = state["sum"] * 0.5 + stream.mean()
            stream = stream + state["sum"]
        stream = stream + torch.tanh(self.linear(stream))
        if self.fault == "hands a second output on":
            return stream if state is None else stream + state["sum"], {"sum": stream.mean()}
        return stream


@pytest.mark.parametrize(
    "fault, message",
    [
        (
            "hands a tensor on",
            "block 1 of 'layers' receives state of earlier blocks besides the stream",
        ),
        (
            "shares a store",
            "block 1 of 'layers' receives state of earlier blocks besides the stream",
        ),
        ("fills a store", "the blocks of 'layers' share state besides the stream"),
        ("hands views on", r"has shape \[8, 8\] for ids of shape \[1, 8\]"),
        ("hands a second output on", "the blocks of 'layers' share state besides the stream"),
        ("skips one", "called 5 of the 6 blocks of 'layers'"),
        (
            "repeats one",
            "called block 0 at place 1 of 'layers'; each block must be called once, in order",
        ),
        (
            "goes backwards",
            "called block 5 at place 0 of 'layers'; each block must be called once, in order",
        ),
    ],
)
def test_a_type_whose_blocks_share_more_than_the_stream_is_refused(
    fault: str, message: str
) -> None:
    for criterion in ("influence", "taylor"):
        with pytest.raises(UnsupportedModelError, match=message):
            score(Decoder(Chatty(fault)), token_ids(1), criterion)


def test_a_type_that_cannot_be_walked_is_scored_by_running_each_model_whole() -> None:
    model, ids_BT = Chatty("fills a store"), token_ids(1)
    decoder = Decoder(model)
    steps: list[float] = []
    scores = score(decoder, ids_BT, "ppl", advance=steps.append)["ppl"]
    assert scores.intact == pytest.approx(plain_perplexity(model, ids_BT), rel=1e-5)
    for b in range(6):
        with decoder.without([b]):
            assert scores.values[b] == pytest.approx(plain_perplexity(model, ids_BT), rel=1e-5)
    removals = removals_of(6, range(6), range(6))
    assert sum(steps) == pytest.approx(walk.walk_flops(decoder, removals, *ids_BT.shape))


def test_a_faultless_small_decoder_of_the_same_kind_is_scored() -> None:
    model = Chatty("none")
    assert score_ppl(model, token_ids()).intact == pytest.approx(
        plain_perplexity(model, token_ids()), rel=1e-5
    )


def test_block_call_finds_the_stream() -> None:
    stream, other = torch.ones(1), torch.zeros(1)
    found, call = BlockCall.split((stream, 1), {"mask": 2})
    assert found is stream
    assert call.on(lambda *args, **kwargs: (args, kwargs), other) == ((other, 1), {"mask": 2})
    found, call = BlockCall.split((), {"hidden_states": stream, "mask": 2})
    assert found is stream
    assert call.on(lambda **kwargs: kwargs, other) == {"mask": 2, "hidden_states": other}
