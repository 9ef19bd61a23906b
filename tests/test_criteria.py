"""Every criterion: what it computes, and that streamed, shared, cut or interrupted passes agree."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import BY_TIER, VOCABULARY, loaded, opened, score, streamed, token_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shortllm import criteria, journal
from shortllm.criteria import Scores, resolve
from shortllm.criteria.lorp import cluster_count, spectral_clusters
from shortllm.errors import CriterionError, UnsupportedModelError
from shortllm.journal import Journal
from shortllm.model import Session, hidden_states, walk
from shortllm.model.backward import block_weights, walk_back
from shortllm.model.decoder import Decoder
from shortllm.model.hidden_states import StreamMemory
from shortllm.model.metrics import next_token_nll, reduce_powers
from shortllm.model.streamed import open_streamed
from shortllm.pruning.score import score_blocks
from shortllm.runtime import ALONE

WITH_TEXT = criteria.names_by_need("logits", "gradients", *criteria.OBSERVED)
SEARCHES = criteria.names_by_need("sets")
"""Tested in test_search.py."""
EVERY = [one.name for one in criteria.listed() if one.needs not in ("sets", "choices")]
"""All that need no questions; the criterion that does is tested in test_task_criterion.py."""
SOME_VARIANTS = ["llama-tied", "mixtral", "gpt2", "gemma3_text", "opt-projected", "smollm3"]
"""Tied embeddings, merged experts, a Conv1D family, two kinds of blocks, projections outside the
blocks, blocks without positions."""

GREEDY = {"greedy": {"rounds": 3, "protect_first": 1, "protect_last": 0}}


def test_criteria_are_listed_by_what_they_need() -> None:
    every = [
        "ppl", "kl", "acceptance", "taylor", "magnitude", "influence", "relative", "angular",
        "lorp", "task", "greedy", "last", "random", "even",
    ]  # fmt: skip
    assert criteria.help_text() == f"{', '.join(every)}; searches: local, evolve, auto, dp, span"
    left_out = ("acceptance", "task", "random")
    assert criteria.compared() == [name for name in every if name not in left_out]
    assert criteria.names() == sorted([*every, *SEARCHES])


def agree(found: dict[str, Scores], expected: dict[str, Scores], rel: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, scores in expected.items():
        assert found[name].importance == pytest.approx(scores.importance, rel=rel, abs=1e-9), name
        assert found[name].values == pytest.approx(scores.values, rel=rel, abs=1e-9), name
        assert found[name].order == scores.order
        if scores.spans is not None:
            for one, other in zip(found[name].spans or [], scores.spans, strict=True):
                assert one == pytest.approx(other, rel=rel, abs=1e-6)


# ------------------------------------------------------------------ what is computed


def hidden_streams(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """The stream entering each block and leaving the last, `[L+1, B, T, D]`, by plain hooks."""
    streams: list[Tensor] = []
    blocks = Decoder(model).blocks

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        streams.append((args[0] if args else kwargs["hidden_states"]).clone())

    def after(module: nn.Module, args: Any, output: Any) -> None:
        streams.append((output[0] if isinstance(output, tuple) else output).clone())

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(after))
    with torch.no_grad():
        model(input_ids=ids_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(streams)


@pytest.mark.parametrize("variant", SOME_VARIANTS)
def test_stream_criteria_follow_their_definitions(variant: str) -> None:
    model, ids_BT = loaded(variant), token_ids()
    found = score(Decoder(model), ids_BT, "influence", "relative", "angular")
    h_LBTD = hidden_streams(model, ids_BT).double()
    before, after = h_LBTD[:-1], h_LBTD[1:]
    cos = torch.cosine_similarity(before, after, dim=-1).mean((1, 2))
    assert found["influence"].importance == pytest.approx((1 - cos).tolist(), rel=1e-4)
    relative = ((after - before).norm(dim=-1) / after.norm(dim=-1)).mean((1, 2))
    assert found["relative"].importance == pytest.approx(relative.tolist(), rel=1e-5)
    last = h_LBTD[:, :, -1]
    spans = found["angular"].spans
    assert spans is not None
    count = len(last) - 1
    assert [len(row) for row in spans] == list(range(count, 0, -1))
    for n in range(1, count + 1):
        for start in range(count - n + 1):
            c = torch.cosine_similarity(last[start], last[start + n], dim=-1)
            expected = (c.arccos() / math.pi).mean().item()
            assert spans[n - 1][start] == pytest.approx(expected, rel=1e-4), (n, start)
    assert found["angular"].importance == spans[0]


@pytest.mark.parametrize("variant", SOME_VARIANTS)
def test_divergence_is_that_of_the_plain_distributions(variant: str) -> None:
    model, ids_BT = loaded(variant), token_ids()
    decoder = Decoder(model)
    found = score(decoder, ids_BT, "kl")["kl"]
    with torch.no_grad():
        intact = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        for b in range(decoder.block_count):
            with decoder.without([b]):
                logits = model(input_ids=ids_BT, use_cache=False).logits
            without = logits[:, :-1].double().log_softmax(-1)
            kl = (intact.exp() * (intact - without)).sum(-1).mean().item()
            assert found.importance[b] == pytest.approx(kl, rel=1e-4), b
    assert found.intact == 0.0
    assert min(found.importance) > 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("variant", SOME_VARIANTS)
def test_acceptance_is_that_of_two_models_run_apart(variant: str, temperature: float) -> None:
    model, ids_BT = loaded(variant), token_ids()
    decoder = Decoder(model)
    options = {"acceptance": {"temperature": temperature}}
    found = score(decoder, ids_BT, "acceptance", options=options)["acceptance"]
    intact = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].detach().double()
    for b in range(decoder.block_count):
        expected = rejected_by_loop(intact, without_blocks(decoder, [b], ids_BT), temperature)
        assert found.importance[b] == pytest.approx(expected, abs=1e-5), b
    assert found.intact == 0.0
    assert 0 < max(found.importance) <= 1


def without_blocks(decoder: Decoder, removed: list[int], ids_BT: Tensor) -> Tensor:
    """Logits of the predictions of a whole model without some blocks, float64."""
    with torch.no_grad(), decoder.without(removed):
        logits = decoder.model(input_ids=ids_BT, use_cache=False).logits
    return logits[:, :-1].double()


def rejected_by_loop(intact_BTV: Tensor, drafted_BTV: Tensor, temperature: float) -> float:
    """1 - sum over v of min(p, q), or whether the likeliest tokens differ, prediction after
    prediction."""
    values = []
    pairs = zip(intact_BTV.flatten(0, 1), drafted_BTV.flatten(0, 1), strict=True)
    for p_V, q_V in pairs:
        if temperature:
            p_V, q_V = (p_V / temperature).softmax(-1), (q_V / temperature).softmax(-1)
            values.append(1.0 - torch.minimum(p_V, q_V).sum().item())
        else:
            values.append(float(p_V.argmax() != q_V.argmax()))
    return sum(values) / len(values)


def plain_products(model: nn.Module, ids_BT: Tensor) -> dict[int, dict[str, Tensor]]:
    """Weight times gradient of every block weight, by autograd that holds everything."""
    model = copy.deepcopy(model).requires_grad_(True)
    logits = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
    next_token_nll(logits, ids_BT[:, 1:].flatten()).mean().backward()
    return {
        b: {
            name: weight.detach() * weight.grad
            for name, weight in block_weights(block).items()
            if weight.grad is not None
        }
        for b, block in enumerate(Decoder(model).blocks)
    }


@pytest.mark.parametrize("variant", BY_TIER)
@pytest.mark.parametrize("stream", [False, True])
def test_taylor_equals_plain_autograd_for_each_weight(
    variant: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_states, "CPU_GROUP_TOKENS", 40)  # two groups, whose gradients add up
    ids_BT = token_ids()
    expected = plain_products(loaded(variant), ids_BT)
    decoder = streamed(variant) if stream else Decoder(loaded(variant))
    seen: list[int] = []

    def receive(b: int, products: dict[str, Tensor]) -> None:
        seen.append(b)
        assert products.keys() == block_weights(decoder.blocks[b]).keys()
        assert expected[b].keys() <= products.keys()
        for name, product in products.items():
            plain = expected[b].get(name, torch.zeros(()))
            scale = plain.abs().max().item()
            torch.testing.assert_close(
                product, plain.expand_as(product), rtol=1e-4, atol=1e-4 * scale
            )

    walk_back(decoder, ids_BT, range(decoder.block_count), receive, ranks=ALONE)
    assert seen == list(reversed(range(decoder.block_count)))


def test_weights_are_matrices_and_norms_but_not_biases() -> None:
    names = set(block_weights(Decoder(loaded("llama")).blocks[0]))
    projections = {f"self_attn.{p}_proj.weight" for p in "qkvo"}
    projections |= {f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert names == projections | {"input_layernorm.weight", "post_attention_layernorm.weight"}


@pytest.mark.parametrize("variant", ["llama", "mixtral"])
def test_magnitude_reads_the_stored_weights(variant: str) -> None:
    decoder, checkpoint = Decoder(loaded(variant)), opened(variant)
    found = score(decoder, token_ids(), "magnitude", checkpoint=checkpoint)["magnitude"]
    for b, block in enumerate(decoder.blocks):
        total = sum(w.abs().double().sum().item() for w in block_weights(block).values())
        assert found.importance[b] == pytest.approx(total, rel=1e-6)


def test_reductions() -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)]
    kinds: dict[Any, Callable[[Tensor], Tensor]] = {
        "sum": torch.sum, "mean": torch.mean, "max": torch.max, "prod": torch.prod,
    }  # fmt: skip
    for power, of_weights, of_block in itertools.product((1, 2), kinds, kinds):
        powers = [x.double().abs() ** power for x in tensors]
        rows = [x.sum(dim=1) if x.ndim > 1 else x for x in powers]
        parts = [kinds[of_weights](x) for x in rows]
        expected = kinds[of_block](torch.stack(parts)).item()
        if "prod" in (of_weights, of_block):
            expected = math.log(expected)
        found = reduce_powers(tensors, power=power, over_weights=of_weights, over_block=of_block)
        assert found == pytest.approx(expected, rel=1e-6), (power, of_weights, of_block)


def test_a_matrix_stored_with_a_column_per_output_is_reduced_by_outputs() -> None:
    checkpoint = opened("gpt2")
    one = resolve("magnitude", {"over_weights": "max"})
    found = score_blocks(checkpoint, None, [one], session=Session())["magnitude"]
    for b, block in enumerate(loaded("gpt2").transformer.h):
        projections = [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]
        outputs = [module.weight.abs().sum(dim=0) for module in projections]
        norms = [block.ln_1.weight.abs(), block.ln_2.weight.abs()]
        expected = sum(one.max().item() for one in (*outputs, *norms))
        assert found.importance[b] == pytest.approx(expected, rel=1e-5)


def plain_similarities(model: nn.Module, ids_BT: Tensor) -> list[list[float]]:
    """Mean cosine over all tokens of the inputs of each pair of blocks."""
    h_LBTD = hidden_streams(model, ids_BT)[:-1].double()
    return [
        [torch.cosine_similarity(one, other, dim=-1).mean().item() for other in h_LBTD]
        for one in h_LBTD
    ]


def plain_partition(similarity: list[list[float]], count: int) -> list[set[int]]:
    """Of all partitions the one with the lowest cost of k-means on the spectral embedding."""
    affinity = (np.array(similarity) + 1) / 2
    degree = affinity.sum(axis=0)
    laplacian = np.eye(len(affinity)) - affinity / np.sqrt(np.outer(degree, degree))
    points = np.linalg.eigh(laplacian)[1][:, :count]
    points /= np.linalg.norm(points, axis=1)[:, None]

    def cost(labels: tuple[int, ...]) -> float:
        own = [points[[one == c for one in labels]] for c in set(labels)]
        return float(sum(((part - part.mean(axis=0)) ** 2).sum() for part in own))

    best = min(itertools.product(range(count), repeat=len(points)), key=cost)
    return [{b for b, label in enumerate(best) if label == c} for c in set(best)]


def plain_lorp_order(similarity: list[list[float]], clusters: list[set[int]]) -> list[int]:
    last = len(similarity) - 1

    def mean_of_pairs(blocks: set[int]) -> tuple[float, int]:
        pairs = list(itertools.combinations(blocks, 2))
        mean = sum(similarity[i][j] for i, j in pairs) / len(pairs) if pairs else -2.0
        return mean, max(blocks)

    def most_redundant(blocks: set[int], cluster: set[int]) -> int:
        def redundancy(b: int) -> tuple[float, int]:
            total = sum(similarity[b][c] for c in cluster - {b})
            return round(total / max(1, len(cluster) - 1), 12), b

        return max(blocks - {0, last}, key=redundancy)

    order = [most_redundant(c, c) for c in sorted(clusters, key=mean_of_pairs) if c - {0, last}]
    order.reverse()
    while len(order) < last - 1:
        remaining = [(c - set(order), c) for c in clusters if c - set(order) - {0, last}]
        order.append(most_redundant(*max(remaining, key=lambda pair: mean_of_pairs(pair[0]))))
    return [*order, last, 0]


@pytest.mark.parametrize("variant", SOME_VARIANTS)
@pytest.mark.parametrize("clusters", [None, 2, 3, 4])
def test_lorp_takes_from_spectral_clusters_in_turn(variant: str, clusters: int | None) -> None:
    model, ids_BT = loaded(variant), token_ids()
    options = {"lorp": {"clusters": clusters}}
    found = score(Decoder(model), ids_BT, "lorp", options=options)["lorp"]
    similarity = plain_similarities(model, ids_BT)
    pairs = list(itertools.combinations(range(len(similarity)), 2))
    locality = -math.log2(sum(similarity[i][j] for i, j in pairs) / len(pairs))
    count = clusters or (2 if locality >= 1 else 3 if locality >= 0.7 else 4)
    partition = plain_partition(similarity, count)
    for cluster in partition:
        for b in cluster:
            others = [similarity[b][other] for other in cluster - {b}]
            expected = sum(others) / len(others) if others else 0.0
            assert found.values[b] == pytest.approx(expected, rel=1e-4)
    order = sorted(range(len(similarity)), key=lambda b: found.importance[b])
    assert order == plain_lorp_order(similarity, partition)


@pytest.mark.parametrize(
    ("mean", "count"),
    [(-0.1, 2), (0.0, 2), (0.5, 2), (0.51, 3), (0.615, 3), (0.616, 4), (0.9, 4), (1.0, 4)],
)
def test_lorp_has_more_clusters_where_distant_blocks_are_alike(mean: float, count: int) -> None:
    similarity = [[1.0 if i == j else mean for j in range(6)] for i in range(6)]
    assert cluster_count(similarity) == count


def test_lorp_on_planted_clusters() -> None:
    """Blocks 0 to 2, 3 to 6 and 7 to 9 are alike among themselves, the second group most."""
    groups = [range(3), range(3, 7), range(7, 10)]
    similarity_LL = torch.full((10, 10), 0.1, dtype=torch.float64)
    for group, alike in zip(groups, (0.7, 0.9, 0.8), strict=True):
        similarity_LL[group.start : group.stop, group.start : group.stop] = alike
    similarity_LL[4, 3:7] += 0.05
    similarity_LL[3:7, 4] += 0.05
    similarity_LL.fill_diagonal_(1.0)
    assert spectral_clusters(similarity_LL, 3) == [list(group) for group in groups]
    found: Scores = resolve("lorp", {"clusters": 3}).call(similarity_LL)
    order = sorted(range(10), key=lambda b: found.importance[b])
    # one of each cluster, the most alike first; then the second, until one block of it is left;
    # of the others one more each, and last the ends of the model
    assert order == [4, 8, 2, 6, 5, 7, 1, 3, 9, 0]


def test_lorp_refuses_what_cannot_be_clustered() -> None:
    for clusters in (0, 7):
        with pytest.raises(
            CriterionError, match=rf"lorp.clusters {clusters} must be between 1 and 6"
        ):
            score(
                Decoder(loaded("llama")),
                token_ids(),
                "lorp",
                options={"lorp": {"clusters": clusters}},
            )
    with pytest.raises(CriterionError, match="'lorp' gives nan for block 0"):
        resolve("lorp").call(torch.full((4, 4), math.nan))


@pytest.mark.parametrize("inner", ["ppl", "influence", "taylor", "angular", "magnitude", "lorp"])
@pytest.mark.parametrize("variant", ["llama", "gemma3_text"])
def test_greedy_scores_anew_in_the_shortened_model(inner: str, variant: str) -> None:
    decoder, ids_BT = Decoder(loaded(variant)), token_ids()
    blocks = range(decoder.block_count)
    options = {"greedy": {"inner": inner, "rounds": 3, "protect_first": 1, "protect_last": 0}}
    found = score(decoder, ids_BT, "greedy", checkpoint=opened(variant), options=options)["greedy"]
    removed: list[int] = []
    for _ in range(3):
        kept = [b for b in blocks if b not in removed]
        with without(decoder, removed) as short:
            inside = score(short, ids_BT, inner, checkpoint=kept_checkpoint(variant, kept))
        importance = dict(zip(kept, inside[inner].importance, strict=True))
        free = [b for b in kept if b > 0]
        removed.append(min(free, key=lambda b: (importance[b], -b)))
    assert found.order == removed
    assert found.importance[0] == max(found.importance)  # it was protected
    assert [found.importance[b] for b in removed] == [0.0, 1.0, 2.0]
    assert sorted(found.importance) == [float(b) for b in blocks]


@pytest.mark.parametrize("inner", ["kl", "acceptance"])
@pytest.mark.parametrize("variant", ["llama", "gemma3_text"])
def test_greedy_compares_with_the_intact_model_in_every_round(inner: str, variant: str) -> None:
    decoder, ids_BT = Decoder(loaded(variant)), token_ids()
    options = {"greedy": {"inner": inner, "rounds": 3, "protect_first": 0, "protect_last": 0}}
    found = score(decoder, ids_BT, "greedy", checkpoint=opened(variant), options=options)["greedy"]
    intact = without_blocks(decoder, [], ids_BT)
    removed: list[int] = []
    for _ in range(3):
        values = {}
        for b in set(range(decoder.block_count)) - set(removed):
            other = without_blocks(decoder, [*removed, b], ids_BT)
            if inner == "kl":
                p, q = intact.log_softmax(-1), other.log_softmax(-1)
                values[b] = (p.exp() * (p - q)).sum(-1).mean().item()
            else:
                values[b] = rejected_by_loop(intact, other, 1.0)
        removed.append(min(values, key=lambda b: (values[b], -b)))
    assert found.order == removed
    last = max(removed, key=removed.index)
    assert found.values[last] == pytest.approx(values[last], abs=1e-5)


class without:
    """A decoder of a copy of the model that really lacks the blocks."""

    def __init__(self, decoder: Decoder, removed: list[int]) -> None:
        model: Any = copy.deepcopy(decoder.model)
        kept = [b for b in range(decoder.block_count) if b not in removed]
        owner, _, name = decoder.blocks_name.rpartition(".")
        holder = model.get_submodule(owner)
        setattr(holder, name, nn.ModuleList([getattr(holder, name)[b] for b in kept]))
        config = model.config
        config.num_hidden_layers = len(kept)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[b] for b in kept]
        self.short = Decoder(model)

    def __enter__(self) -> Decoder:
        return self.short

    def __exit__(self, *error: object) -> None:
        return None


def kept_checkpoint(variant: str, kept: list[int]) -> Any:
    """A checkpoint of which only the blocks `kept` are seen, numbered anew."""
    whole = opened(variant)

    class Kept:
        block_count = len(kept)
        structure = whole.structure

        @staticmethod
        def block_weights(b: int) -> Any:
            return whole.block_weights(kept[b])

    return Kept


def test_baselines() -> None:
    found = score(Decoder(loaded("llama")), token_ids(), "last", "random", "even")
    assert found["last"].importance == [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert sorted(found["random"].importance) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert resolve("random", {"seed": 1}).call(32) != resolve("random", {"seed": 2}).call(32)
    first = [b for b, rank in enumerate(resolve("even").call(32)) if rank < 3]
    assert first == [7, 16, 24] or max(first) - min(first) >= 14
    assert sorted(resolve("even").call(7)) == [float(b) for b in range(7)]


# ------------------------------------------------------------------ a block that does nothing


@pytest.mark.parametrize("position", range(6))
def test_a_planted_identity_is_found_at_every_position(position: int) -> None:
    model = copy.deepcopy(loaded("llama"))
    block: Any = Decoder(model).blocks[position]
    with torch.no_grad():
        for projection in (block.self_attn.o_proj, block.mlp.down_proj):
            projection.weight.zero_()
            projection.bias.zero_()
    assert not torch.allclose(model.model.norm.weight, torch.ones(32), atol=0.1)  # type: ignore[union-attr, operator, arg-type]
    source: Any = stored_weights(model)
    names = ["influence", "relative", "taylor", "magnitude", "angular"]
    found = score(Decoder(model), token_ids(), *names, checkpoint=source)
    for name in names:
        importance = found[name].importance
        others = [value for b, value in enumerate(importance) if b != position]
        assert importance[position] < 0.9 * min(others), name
    for name in ("influence", "relative", "angular"):
        assert found[name].importance[position] == pytest.approx(0.0, abs=1e-3), name
    exact = score(Decoder(model), token_ids(), "ppl", "kl")
    assert exact["ppl"].values[position] == exact["ppl"].intact
    assert exact["kl"].values[position] == 0.0
    assert exact["ppl"].delta_nll is not None
    assert exact["ppl"].delta_nll[position] == 0.0


def stored_weights(model: nn.Module) -> Any:
    """The blocks of a live model as a checkpoint shows them to criteria of weights."""
    import tempfile

    from families import save

    from shortllm.checkpoint.source import open_checkpoint

    directory = tempfile.mkdtemp()
    return open_checkpoint(save(model, Path(directory)))


# ------------------------------------------------------------------ the same numbers every way


@pytest.mark.parametrize("variant", BY_TIER)
def test_streamed_equals_resident(variant: str) -> None:
    checkpoint, ids_BT = opened(variant), token_ids()
    resident = score(
        Decoder(loaded(variant)), ids_BT, *EVERY, checkpoint=checkpoint, options=GREEDY
    )
    found = score(streamed(variant), ids_BT, *EVERY, checkpoint=checkpoint, options=GREEDY)
    agree(found, resident)


@pytest.mark.parametrize("stream", [False, True])
def test_several_at_once_equal_each_alone(stream: bool) -> None:
    decoder = streamed("qwen3") if stream else Decoder(loaded("qwen3"))
    checkpoint, ids_BT = opened("qwen3"), token_ids()
    together = score(decoder, ids_BT, *EVERY, checkpoint=checkpoint, options=GREEDY)
    for name in EVERY:
        options = GREEDY if name == "greedy" else None
        alone = score(decoder, ids_BT, name, checkpoint=checkpoint, options=options)
        agree(alone, {name: together[name]}, rel=1e-9)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("limit", [1, 20, 40])
def test_groups_stacks_and_files_change_nothing(
    stream: bool, limit: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variant, ids_BT = "gemma3_text", token_ids()
    expected = score(Decoder(loaded(variant)), ids_BT, *WITH_TEXT)
    monkeypatch.setattr(hidden_states, "CPU_GROUP_TOKENS", limit)
    monkeypatch.setattr(walk, "CPU_LOSS_BYTES", limit * VOCABULARY * 8)
    monkeypatch.setattr(walk, "FEWEST_TOKENS", 1)
    monkeypatch.setattr(walk, "stacked_streams", lambda decoder, entry: 3)
    decoder = streamed(variant) if stream else Decoder(loaded(variant))
    memory = StreamMemory(limit=100, directory=tmp_path / "spilled")
    agree(score(decoder, ids_BT, *WITH_TEXT, memory=memory), expected)
    assert list((tmp_path / "spilled").iterdir()) == []  # files were used and are gone


def test_streams_in_low_precision_keep_the_ranking() -> None:
    checkpoint, ids_BT = opened("llama"), token_ids(8, 60)
    full = score(streamed("llama"), ids_BT, "ppl", "taylor", "influence", checkpoint=checkpoint)
    half = score(
        streamed("llama", torch.bfloat16), ids_BT, "ppl", "taylor", "influence",
        checkpoint=checkpoint,
    )  # fmt: skip
    for name in full:
        assert half[name].importance == pytest.approx(full[name].importance, rel=0.05), name


# ------------------------------------------------------------------ interrupted passes


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "name, after",
    [
        *((name, after) for name in [*WITH_TEXT, "greedy"] for after in (1, 3, 5)),
        *((name, after) for name in ("taylor", "greedy") for after in (7, 10)),
    ],
)
def test_an_interrupted_streamed_pass_goes_on_where_it_was(
    name: str, after: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(journal, "MIN_INTERVAL_S", 0.0)
    monkeypatch.setattr(journal, "WORK_PER_COMMIT", 0)
    checkpoint, ids_BT = opened("qwen3"), token_ids()
    options = GREEDY if name == "greedy" else None
    expected = score(streamed("qwen3"), ids_BT, name, checkpoint=checkpoint, options=options)
    decoder = streamed("qwen3")
    read: list[int] = []
    monkeypatch.setattr(decoder, "through", counting(decoder.through, read, stop_after=after))

    def attempt() -> dict[str, Scores]:
        return score(
            decoder, ids_BT, name, checkpoint=checkpoint, options=options,
            journal=Journal(tmp_path / "scoring", "same work"),
        )  # fmt: skip

    with pytest.raises(Stopped):
        attempt()
    first = len(read)
    read.clear()
    monkeypatch.setattr(decoder, "through", counting(type(decoder).through.__get__(decoder), read))
    agree(attempt(), expected, rel=1e-9)
    whole: list[int] = []
    decoder = streamed("qwen3")
    monkeypatch.setattr(decoder, "through", counting(decoder.through, whole))
    score(decoder, ids_BT, name, checkpoint=checkpoint, options=options)
    assert len(read) <= len(whole) - first + 2  # what was done was not done again
    # what another work left behind is not taken for this one's
    assert Journal(tmp_path / "scoring", "other work").part("logits").position() is None


def counting(through: Any, read: list[int], stop_after: int | None = None) -> Any:
    def counted(order: Any) -> Any:
        for b in through(order):
            if len(read) == stop_after:
                raise Stopped
            read.append(b)
            yield b

    return counted


def test_a_journal_survives_a_stop_while_it_is_written(tmp_path: Path) -> None:
    work = Journal(tmp_path / "work", "w")
    work.commit({"at": 1}, {"a": torch.ones(3), "b": torch.zeros(2)})
    work.commit({"at": 2}, {"b": torch.full((2,), 5.0)}, keep=["a"])
    (tmp_path / "work" / "b-2.safetensors.partial").write_bytes(b"half")
    again = Journal(tmp_path / "work", "w")
    assert again.position() == {"at": 2}
    assert again.tensor("a").tolist() == [1.0, 1.0, 1.0]
    assert again.tensor("b").tolist() == [5.0, 5.0]
    assert sorted(p.name for p in (tmp_path / "work").glob("*.safetensors")) == [
        "a-0.safetensors",
        "b-1.safetensors",
    ]
    (tmp_path / "work" / "a-0.safetensors").unlink()
    assert Journal(tmp_path / "work", "w").position() is None


# ------------------------------------------------------------------ routes


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # other work slows it
@given(
    st.integers(1, 7).flatmap(
        lambda count: st.tuples(
            st.just(count), st.lists(st.frozensets(st.integers(0, count - 1)), min_size=1)
        )
    )
)
def test_a_route_takes_each_stream_through_its_blocks_and_no_others(
    case: tuple[int, list[frozenset[int]]],
) -> None:
    count, removals = case
    route = walk.Route.of(removals, count)
    passed: dict[int, list[int]] = {0: []}
    for step in route.steps:
        for source, copied in step.split:
            assert copied not in passed
            passed[copied] = list(passed[source])
        for stream in step.through.get(0, []):
            passed[stream].append(step.block)
        assert len(set(map(tuple, passed.values()))) == len(passed)  # nothing is done twice
        having = step.block not in removals[0]
        assert (step.first is not None) == having
        if step.first is not None:
            assert passed[step.first] == [b for b in range(step.block + 1) if b not in removals[0]]
    assert len(passed) == route.streams == len(set(removals))
    for removed, stream in zip(removals, route.final, strict=True):
        assert passed[stream] == [b for b in range(count) if b not in removed]


def test_single_removals_take_the_fewest_passes() -> None:
    route = walk.Route.of([frozenset(), *(frozenset([b]) for b in range(32))], 32)
    assert sum(step.passes for step in route.steps) == 32 * 33 // 2


# ------------------------------------------------------------------ options and refusals


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("influense", {}, r"unknown criterion 'influense'. Did you mean 'influence'\? Available"),
        ("taylor", {"powr": 1}, r"'taylor' has no option 'powr'. Did you mean 'power'\?"),
        ("taylor", {"power": "3"}, "taylor.power must be one of 1, 2, not '3'"),
        ("ppl", {"x": 1}, "criterion 'ppl' has no option 'x'; it has no options"),
        ("random", {"seed": "one"}, "random.seed 'one' is not of type int"),
        ("greedy", {"inner": "pppl"}, "unknown criterion 'pppl'"),
        ("greedy", {"inner": "greedy"}, "greedy.inner cannot be 'greedy'"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CriterionError, match=message):
        resolve(name, options)


def test_options_from_a_command_line_are_converted() -> None:
    assert resolve("taylor", {"power": "2", "over_weights": "max"}).options == {
        "power": 2,
        "over_weights": "max",
        "over_block": "sum",
    }
    assert resolve("greedy", {"rounds": "4"}).options["rounds"] == 4


def test_greedy_refuses_more_rounds_than_blocks_are_free() -> None:
    options = {"greedy": {"rounds": 5}}  # one block is protected at each end
    with pytest.raises(CriterionError, match="cannot remove 5 of 6 blocks.*between 1 and 4"):
        score(
            Decoder(loaded("llama")), token_ids(), "greedy",
            checkpoint=opened("llama"), options=options,
        )  # fmt: skip


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="'ppl' is already registered by shortllm.criteria.remov"):
        criteria.criterion("ppl", needs="nothing", paper="")(lambda blocks: [0.0] * blocks)


def test_a_model_that_cannot_be_walked_can_still_be_measured_intact() -> None:
    decoder, ids_BT = Decoder(loaded("llama")), token_ids()
    [expected] = walk.mean_losses(decoder, ids_BT, [walk.NOTHING])
    decoder._obstacle = "the blocks are in the way"
    assert walk.mean_losses(decoder, ids_BT, [walk.NOTHING]) == pytest.approx([expected], rel=1e-6)
    with pytest.raises(UnsupportedModelError, match="in the way"):
        score(decoder, ids_BT, "influence")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("variant", SOME_VARIANTS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_gpu_gives_the_numbers_of_the_cpu(variant: str, stream: bool) -> None:
    checkpoint, ids_BT, cuda = opened(variant), token_ids(), torch.device("cuda")
    expected = score(
        Decoder(loaded(variant)), ids_BT, *EVERY, checkpoint=checkpoint, options=GREEDY
    )
    if stream:
        decoder = open_streamed(checkpoint, device=cuda, dtype=torch.float32)
    else:
        decoder = Decoder(copy.deepcopy(loaded(variant)).to(cuda))
    found = score(decoder, ids_BT, *EVERY, checkpoint=checkpoint, options=GREEDY)
    agree(found, expected, rel=1e-3)
