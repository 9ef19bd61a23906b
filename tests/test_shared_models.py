"""Real trained models and real text: whole runs, planted redundancy, recorded measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import shortllm
from shortllm import pipeline
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.data.options import CalibrationOptions
from shortllm.data.sources import load_rows
from shortllm.evaluation.options import EvaluationOptions
from shortllm.evaluation.texts import evaluation_segments_of
from shortllm.recipe import Recipe

pytestmark = pytest.mark.shared

TEXT = {
    "stories260K": "stories/valid.jsonl.gz",
    "stories10L": "stories/valid.txt",
    "stories10L-redundant": "stories/valid.jsonl.gz",
    "books5M": "books/valid.jsonl.xz",
}


def sweep(names: Iterable[str], first: Collection[str]) -> list[Any]:
    """Parameters: the `first` of the names; the others are tested under `slow`."""
    return [
        pytest.param(name, marks=() if name in first else pytest.mark.slow)
        for name in sorted(names)
    ]


PLAIN_TRANSFORMERS = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

path, blocks = sys.argv[1], int(sys.argv[2])
model, loading = AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32, output_loading_info=True  # in bfloat16 ties are broken by rounding
)
assert not any(loading.values()), loading
assert model.config.num_hidden_layers == blocks
ids = AutoTokenizer.from_pretrained(path)("Once upon a time", return_tensors="pt").input_ids
texts = [
    model.generate(
        ids, max_new_tokens=24, do_sample=False, use_cache=cache, pad_token_id=0
    )[0].tolist()
    for cache in (True, False)
]
assert texts[0] == texts[1], texts
assert "shortllm" not in sys.modules
"""


@pytest.mark.parametrize("name", sweep(TEXT, first=("books5M", "stories260K")))
def test_run_on_every_shared_model(name: str, shared: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        model=str(shared / "models" / name),
        calibration=CalibrationOptions(data=str(shared / "data" / TEXT[name])),
        budget=shortllm.Budget(remove=1),
        evaluation=EvaluationOptions(max_segments=40, continuations=1, new_tokens=16),
    )
    result = pipeline.run(recipe=recipe, out=tmp_path / "run")
    original, pruned = result.evaluation.models
    assert pruned.model.blocks == original.model.blocks - 1
    assert original.perplexity[0].split == "held-out"
    assert 1 < original.perplexity[0].perplexity < pruned.perplexity[0].perplexity
    subprocess.run(
        [
            sys.executable,
            "-c",
            PLAIN_TRANSFORMERS,
            result.checkpoints["pruned"],
            str(pruned.model.blocks),
        ],
        check=True,
        capture_output=True,
    )


def test_ppl_ranks_exactly_the_superfluous_blocks_as_least_important(shared: Path) -> None:
    scores = shortllm.score(
        str(shared / "models" / "stories10L-redundant"),
        calibration=CalibrationOptions(data=str(shared / "data" / "stories" / "valid.jsonl.gz")),
    )
    plan = shortllm.plan(scores, remove=5, protect_first=0, protect_last=0)
    assert plan.removed == [1, 3, 5, 7, 9]


@pytest.mark.parametrize("name", sweep(TEXT, first=("stories260K",)))
def test_scores_are_reproduced_by_the_script_in_docs(
    name: str, shared: Path, tmp_path: Path
) -> None:
    model = str(shared / "models" / name)
    data = str(shared / "data" / "stories" / "valid.jsonl.gz")
    shortllm.score(
        model, calibration=CalibrationOptions(data=data, samples=4, length=64), out=tmp_path
    )
    script = Path(__file__).parents[1] / "docs" / "reproduce_ppl.py"
    done = subprocess.run(
        [sys.executable, script, model, tmp_path], check=True, capture_output=True, text=True
    )
    differences = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    values = json.loads((tmp_path / "scores.json").read_text())["values"]
    assert len(differences) == len(values)
    assert max(differences) < 1e-5


RECORDED = {
    "stories260K": (5.00, [68.6, 17.1, 11.1, 11.8, 12.0]),
    "stories10L": (4.80, [5.19, 5.38, 5.65, 5.69, 5.48, 5.34, 5.52, 5.40, 5.43, 5.29]),
    "stories10L-redundant": (
        4.61,
        [107.9, 4.61, 22.0, 4.62, 12.9, 4.62, 13.6, 4.61, 12.7, 4.63],
    ),
}
"""Perplexity, whole and without each block, as an independent measurement recorded it beside the
models: 160 windows of 256 tokens of characters 100,000 to 300,000 of stories/valid.txt, BOS before
each."""


@pytest.mark.parametrize("name", sweep(RECORDED, first=("stories260K",)))
def test_scores_and_perplexity_equal_an_independent_measurement(
    name: str, shared: Path, tmp_path: Path
) -> None:
    text = (shared / "data" / "stories" / "valid.txt").read_text(encoding="utf-8")
    (tmp_path / "text.json").write_text(json.dumps([text[100_000:300_000]]))
    model = str(shared / "models" / name)
    windows = EvaluationOptions(
        data=[str(tmp_path / "text.json")],
        length=255,  # tokens behind BOS
        bos="every",
        max_segments=160,
        continuations=0,
    )
    intact, without = RECORDED[name]
    measured = shortllm.evaluate([model], options=windows)
    assert measured.models[0].perplexity[0].perplexity == pytest.approx(intact, abs=0.005)

    checkpoint = shortllm.open_checkpoint(model)
    tokenizer = load_tokenizer(checkpoint)
    rows = load_rows(str(tmp_path / "text.json"))
    ids = evaluation_segments_of(checkpoint, rows, tokenizer, windows).ids
    (tmp_path / "ids.json").write_text(json.dumps(ids.tolist()))
    scores = shortllm.score(model, calibration=CalibrationOptions(file=tmp_path / "ids.json"))
    assert scores.intact == pytest.approx(intact, abs=0.005)
    for value, recorded in zip(scores.values, without, strict=True):
        assert value == pytest.approx(recorded, abs=0.06 if recorded > 10 else 0.005)


def test_perplexity_equals_a_plain_loop_over_segments(shared: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(shared / "models" / "books5M")
    text = shared / "data" / "wikipedia" / "wiki_demo.txt"
    measured = shortllm.evaluate(
        [path],
        options=EvaluationOptions(data=[str(text)], max_segments=20, continuations=0),
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = text.read_text(encoding="utf-8").split("\n")[:-1]
    ids = tokenizer("\n\n".join(rows), add_special_tokens=False, verbose=False).input_ids
    stream = torch.tensor([tokenizer.bos_token_id, *ids])[: 20 * 128].view(20, 128)
    with torch.no_grad():
        loss = model(input_ids=stream, labels=stream, use_cache=False).loss
    assert measured.models[0].perplexity[0].perplexity == pytest.approx(loss.exp().item(), rel=1e-5)


@pytest.mark.parametrize("name", sweep(TEXT, first=("stories260K",)))
def test_bos_before_every_128_tokens_equals_a_plain_loop(name: str, shared: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, text = str(shared / "models" / name), shared / "data" / "wikipedia" / "wiki_demo.txt"
    [measured] = shortllm.evaluate(
        [path],
        options=EvaluationOptions(data=[str(text)], bos="every", length=128, max_segments=20),
        dtype="float32",
    ).models
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = text.read_text(encoding="utf-8").split("\n")[:-1]
    ids = tokenizer("\n\n".join(rows), add_special_tokens=False, verbose=False).input_ids
    losses = []
    for i in range(20):
        segment = torch.tensor([[tokenizer.bos_token_id, *ids[128 * i : 128 * (i + 1)]]])
        with torch.no_grad():
            losses.append(model(input_ids=segment, labels=segment).loss)
    found = measured.perplexity[0]
    assert (found.length, found.predictions) == (128, 20 * 128)
    assert found.perplexity == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-5)


@pytest.mark.parametrize("criterion", ["taylor", "magnitude"])
@pytest.mark.parametrize("name", sweep(TEXT, first=("stories260K",)))
def test_reductions_over_rows_are_the_published_ones(
    name: str, criterion: str, shared: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    path = str(shared / "models" / name)
    ids = torch.randint(3, 500, (4, 64), generator=torch.Generator().manual_seed(0))
    (tmp_path / "ids.json").write_text(json.dumps(ids.tolist()))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model(input_ids=ids, labels=ids).loss.backward()
    for reduction in ("sum", "mean", "max"):
        scores = shortllm.score(
            path,
            criterion=criterion,
            options={criterion: {"over_weights": reduction}},
            calibration=CalibrationOptions(file=tmp_path / "ids.json"),
            dtype="float32",
        )
        for b, block in enumerate(model.model.layers):
            total = 0.0
            for weight in block.parameters():
                product = (weight * weight.grad if criterion == "taylor" else weight).abs()
                rows = product.sum(dim=1) if product.ndim == 2 else product
                reduced = {"sum": rows.sum(), "mean": rows.mean(), "max": rows.max()}[reduction]
                total += reduced.item()
            assert scores.importance[b] == pytest.approx(total, rel=1e-4), (reduction, b)
