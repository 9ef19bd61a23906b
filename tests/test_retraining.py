"""Retraining: data into windows, adapters in every family, losses, whole trainings, bad input."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import retraining as tiny
import torch
import transformers
from packaging import version
from safetensors.torch import load_file
from test_cli import call
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import shortllm
from shortllm.checkpoint.source import open_checkpoint
from shortllm.data.sources import open_records
from shortllm.embedded import MODEL_DIR
from shortllm.errors import CheckpointError, DataError, OutputError, ShortLLMError
from shortllm.model.metrics import kl_divergence
from shortllm.reporting.parts import Details, Figure, Terms
from shortllm.reporting.recovery import retraining_parts
from shortllm.retraining import CONFIGS
from shortllm.retraining.corpus import (
    Corpus,
    Document,
    Store,
    documents,
    kind_of,
    open_corpus,
    template_of,
    write_corpus,
)
from shortllm.retraining.distillation import (
    CachedTeacher,
    answer_loss,
    hidden_loss,
    recording,
    soft_loss,
    summed_nll,
    teacher_blocks,
    top_k_loss,
)
from shortllm.retraining.methods import METHODS, TrainingMethod, find_targets
from shortllm.retraining.options import RetrainOptions
from shortllm.retraining.setup import resolve, work_directory
from shortllm.retraining.windows import (
    NO_TARGET,
    Windows,
    collate,
    keeps_apart,
    target_rows,
)
from shortllm.runtime import ALONE
from shortllm.surgery.origin import lineage

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tiny model, whole and shortened, and its data."""
    directory = tmp_path_factory.mktemp("retraining")
    tiny.shortened(directory)
    tiny.text(directory / "text.jsonl")
    tiny.instructions(directory / "alpaca.jsonl")
    return directory


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def weights(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(directory / "model.safetensors")
    return tensors


# ------------------------------------------------------------------ documents


def read(file: Path, tokenizer: Any, **changes: Any) -> list[Document]:
    options = RetrainOptions(**changes)
    records = open_records(str(file))
    return list(documents(records, kind_of(records, options.form), tokenizer, options))


def test_the_answer_alone_has_a_loss_and_ends_the_document(place: Path, tokenizer: Any) -> None:
    found = read(place / "alpaca.jsonl", tokenizer)
    assert len(found) == 40
    for number in (0, 1):
        ids, [(prompt, stop)] = found[number].ids, found[number].spans
        assert stop == len(ids)
        answer = tokenizer.decode(ids[prompt:-1])
        asked = tokenizer.decode(ids[1:prompt])
        assert answer == f"It is {number}, " * (1 + number % 4) + "no more."
        assert asked.endswith("### Response:\n") and f"Say the number {number}." in asked
        assert ("### Input:\nin words" in asked) == (number == 0)
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    whole = read(place / "alpaca.jsonl", tokenizer, loss_on="all")
    assert all(one.targets is None for one in whole)


def test_a_chat_model_gets_its_chat_template(place: Path) -> None:
    chat = AutoTokenizer.from_pretrained(MODEL_DIR)
    chat.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}:\n{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant:\n{% endif %}"
    )
    assert template_of(chat, "auto") == "chat"
    first = read(place / "alpaca.jsonl", chat)[0]
    [(prompt, _)] = first.spans
    assert chat.decode(first.ids[:prompt]) == (
        "<s>user:\nSay the number 0.\n\nin words</s><s>assistant:\n"
    )
    assert chat.decode(first.ids[prompt:]) == "It is 0, no more.</s>"
    alpaca = read(place / "alpaca.jsonl", chat, template="alpaca")[0]
    assert "### Response:" in chat.decode(alpaca.ids)


def test_lines_of_a_text_file_make_documents_together(tmp_path: Path, tokenizer: Any) -> None:
    lines = [f"Line {number} of a long text." for number in range(2000)]
    (tmp_path / "book.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = read(tmp_path / "book.txt", tokenizer)
    assert 2 <= len(found) <= 5
    told = "\n".join(tokenizer.decode(document.ids[1:-1]) for document in found)
    assert told.split("\n") == lines


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Say it.", "output": ""}, "row 1 of .* has no output"),
        ({"output": "It."}, "row 1 of .* has no instruction"),
        ("text", "row 1 of .* is a str"),
    ],
)
def test_a_row_without_an_answer_is_named(
    row: Any, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": "Say it.", "output": "It."}, row]
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    with pytest.raises(DataError, match=message):
        read(file, tokenizer)


# ------------------------------------------------------------------ store and windows


def corpus_of(found: list[Document], target: Path, **changes: Any) -> Corpus:
    kwargs = {"held_out": 3, "longest": None, "enough": None, **changes}
    write_corpus(found, target, source="rows", vocabulary=1024, **kwargs)
    return open_corpus(target)


def all_ids(store: Store) -> list[int]:
    ids: list[int] = store.ids.tolist()
    return ids


def test_one_document_in_ten_is_held_out(tmp_path: Path) -> None:
    found = [Document([number, number + 1]) for number in range(1, 101)]
    corpus = corpus_of(found, tmp_path / "corpus")
    assert all_ids(corpus.held_out) == [1, 2, 11, 12, 21, 22]
    assert (corpus.train.documents, corpus.train.tokens) == (97, 194)
    assert corpus.train.starts[:3].tolist() == [0, 2, 4]
    other = corpus_of(found[:-1], tmp_path / "other")
    assert other.held_out.fingerprint == corpus.held_out.fingerprint
    assert other.train.fingerprint != corpus.train.fingerprint


def test_reading_stops_where_there_is_enough(tmp_path: Path) -> None:
    def endless() -> Iterator[Document]:
        while True:
            yield Document([1, 2, 3, 4])

    corpus = corpus_of(endless(), tmp_path / "corpus", enough=42)  # type: ignore[arg-type]
    assert corpus.train.tokens == 44


def test_long_documents_are_cut_and_hopeless_ones_dropped(tmp_path: Path) -> None:
    found = [
        Document([1] * 5), Document([2] * 20, [(4, 20)]), Document([3] * 20, [(12, 20)]),
        Document([4] * 5),
    ]  # fmt: skip
    corpus = corpus_of(found, tmp_path / "corpus", longest=10)
    assert (corpus.cut, corpus.dropped) == (2, 1)
    assert all_ids(corpus.train) == [2] * 10 + [4] * 5


def test_too_little_to_train_on_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="At least 2 are needed"):
        corpus_of([Document([1, 2])], tmp_path / "corpus")
    with pytest.raises(DataError, match="token id 5000 is outside the model's vocabulary"):
        corpus_of([Document([1, 5000])], tmp_path / "corpus")
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_read_across_documents(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(2, 9, (31,), generator=generator).tolist()
    found = [Document(torch.randint(0, 1024, (n,), generator=generator).tolist()) for n in sizes]
    store = corpus_of(found, tmp_path / "corpus", held_out=1).train
    flat = [token for document in found[1:] for token in document.ids]
    assert all_ids(store) == flat and store.documents == 30
    windows = Windows(store, length=16, packing="stream", apart=False)
    for number, item in enumerate(windows):  # type: ignore[arg-type]
        assert item["input_ids"].tolist() == flat[16 * number : 16 * number + 16]
        if number == len(windows) - 1:
            break


@pytest.mark.parametrize("damaged", ["train.ids", "held_out.index", "train.targets", "corpus.json"])
@pytest.mark.parametrize("lost", [4, 9, 16])
def test_a_damaged_corpus_is_an_error(damaged: str, lost: int, tmp_path: Path) -> None:
    corpus_of([Document([1, 2, 3, 4, 5])] * 4, tmp_path / "work" / "corpus")
    file = tmp_path / "work" / "corpus" / damaged
    file.write_bytes(file.read_bytes()[:-lost])
    with pytest.raises(DataError, match=f"is damaged. Delete {tmp_path / 'work'} to start again"):
        open_corpus(tmp_path / "work" / "corpus")


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Documents of 4, 3 and 6 tokens that are trained on: 10.., 20.., 30..; prompts of 2, 0, 1."""
    found = [
        Document([1, 2]), Document([10, 11, 12, 13], [(2, 4)]), Document([20, 21, 22]),
        Document([30, 31, 32, 33, 34, 35], [(1, 6)]),
    ]  # fmt: skip
    return corpus_of(found, tmp_path / "corpus")


def lists(item: dict[str, Tensor]) -> tuple[list[int], ...]:
    return tuple(item[name].tolist() for name in ("input_ids", "labels", "position_ids"))


def test_streamed_windows_waste_nothing_and_begin_anew_with_each_document(corpus: Corpus) -> None:
    windows = Windows(corpus.train, length=8, packing="stream", apart=True)
    no = NO_TARGET
    assert [lists(windows[n]) for n in range(len(windows))] == [
        (
            [10, 11, 12, 13, 20, 21, 22, 30],
            [no, no, 12, 13, no, 21, 22, no],
            [0, 1, 2, 3, 0, 1, 2, 0],
        ),
        ([31, 32, 33, 34, 35], [no, 32, 33, 34, 35], [0, 1, 2, 3, 4]),
    ]
    joined = Windows(corpus.train, length=8, packing="stream", apart=False)[0]
    assert set(joined) == {"input_ids", "labels"}
    assert joined["labels"].tolist() == [no, no, 12, 13, 20, 21, 22, no]


def test_whole_documents_fill_windows_or_stand_alone(corpus: Corpus) -> None:
    fitted = Windows(corpus.train, length=9, packing="fit", apart=True)
    assert fitted.lengths.tolist() == [7, 6]
    assert fitted[0]["input_ids"].tolist() == [10, 11, 12, 13, 20, 21, 22]
    assert fitted[0]["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert fitted[0]["labels"].tolist() == [NO_TARGET, NO_TARGET, 12, 13, NO_TARGET, 21, 22]
    alone = Windows(corpus.train, length=9, packing="alone", apart=False)
    assert alone.lengths.tolist() == [4, 3, 6]
    batch = collate([alone[0], alone[1]])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13], [20, 21, 22, 0]]
    assert batch["labels"][1].tolist() == [NO_TARGET, 21, 22, NO_TARGET]
    assert batch["tokens"].tolist() == [4, 3]


def test_every_turn_of_the_assistant_has_a_loss_in_a_window(tmp_path: Path) -> None:
    found = [Document([1, 2]), Document(list(range(10, 20)), [(2, 4), (7, 9)]), Document([20, 21])]
    store = corpus_of(found, tmp_path / "corpus", held_out=1, longest=8).train
    no = NO_TARGET
    window = Windows(store, length=8, packing="alone", apart=False)[0]
    assert window["labels"].tolist() == [no, no, 12, 13, no, no, no, 17], "cut within a turn"
    stream = Windows(store, length=5, packing="stream", apart=False)
    assert stream[1]["labels"].tolist() == [no, no, 17, 20, 21]


JOINED = ["bloom", "mpt", "opt"]
"""Families whose attention takes no notice of positions; Falcon's does in newer transformers."""

if version.parse(transformers.__version__) < version.parse("5.24"):
    JOINED.append("falcon")


@pytest.mark.parametrize("variant", families.BY_TIER)
def test_documents_are_kept_apart_where_the_family_can(variant: str) -> None:
    model = families.loaded(variant)
    assert keeps_apart(model, families.VOCABULARY) is (variant.split("-")[0] not in JOINED)


@pytest.mark.parametrize("variant", ["llama", "gemma2", "qwen2"])
def test_a_packed_batch_has_the_loss_of_its_documents(variant: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    found = [
        Document(torch.randint(0, families.VOCABULARY, (n,), generator=generator).tolist())
        for n in (4, 9, 7, 12, 3, 10)
    ]
    corpus = corpus_of(found, tmp_path / "corpus", held_out=1)
    model = families.loaded(variant)
    alone = Windows(corpus.train, length=16, packing="alone", apart=False)
    fitted = Windows(corpus.train, length=16, packing="fit", apart=True)
    assert len(fitted) < len(alone)
    one, other = (
        summed_nll(model, collate([windows[n] for n in range(len(windows))])).sum(dim=0)
        for windows in (alone, fitted)
    )
    assert one[1] == other[1] == sum(len(d.ids) - 1 for d in found[1:])
    assert one[0].item() == pytest.approx(other[0].item(), rel=1e-5)


# ------------------------------------------------------------------ what is trained


@pytest.mark.parametrize("variant", families.BY_TIER)
def test_adapters_reach_every_projection_and_merge_exactly(variant: str) -> None:
    """Merged weights compute what the adapter computes at run time."""
    model = families.build(variant)
    modules, experts = find_targets(model, rank=2)
    inside = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split("."))
    ]  # fmt: skip
    assert set(inside) <= set(modules)
    assert len(modules + experts) >= 2 * 6
    adapted = METHODS.get("lora").function(model, RetrainOptions(rank=2, dropout=0.0)).eval()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    ids = families.token_ids()
    with torch.no_grad():
        before = adapted(input_ids=ids).logits
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        at_run_time = adapted(input_ids=ids).logits
        merged = adapted.merge_and_unload()(input_ids=ids).logits
    assert (at_run_time - before).abs().max() > 1e-2
    torch.testing.assert_close(merged, at_run_time, rtol=1e-4, atol=1e-4)


def test_last_blocks_and_head_alone_are_trained() -> None:
    model, method = families.build("llama"), METHODS.get("last-blocks")
    method.function(model, RetrainOptions(method="last-blocks", blocks=2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(
        name.startswith(("model.layers.4.", "model.layers.5.", "lm_head.")) for name in trained
    )
    assert "lm_head.weight" in trained and "model.norm.weight" not in trained
    with pytest.raises(ShortLLMError, match="the model has 6"):
        method.function(model, RetrainOptions(method="last-blocks", blocks=7))


# ------------------------------------------------------------------ losses


def test_the_loss_is_transformers_own(place: Path) -> None:
    model = families.loaded("llama")
    ids = families.token_ids()
    labels = ids.clone()
    labels[:, :4] = NO_TARGET
    batch = {"input_ids": ids, "labels": labels}
    expected = model(input_ids=ids, labels=labels).loss.item()
    count = int((labels[:, 1:] != NO_TARGET).sum())
    assert answer_loss(model, batch).item() / count == pytest.approx(expected, rel=1e-5)
    nll, targets = summed_nll(model, batch).sum(dim=0).tolist()
    assert (nll / targets, targets) == (pytest.approx(expected, rel=1e-5), count)


def test_soft_losses_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(5, 11, generator=generator) for _ in range(2))
    whole = kl_divergence(teacher, student).sum().item()
    assert soft_loss(teacher, student, 1.0).item() == pytest.approx(whole, rel=1e-6)
    halved = 4 * kl_divergence(teacher / 2, student / 2).sum().item()
    assert soft_loss(teacher, student, 2.0).item() == pytest.approx(halved, rel=1e-6)

    top = torch.log_softmax(teacher, dim=-1).topk(3)
    p = torch.softmax(teacher, dim=-1)
    q = torch.softmax(student, dim=-1).gather(-1, top.indices)
    rest_p, rest_q = 1 - top.values.exp().sum(-1), 1 - q.sum(-1)
    by_hand = (top.values.exp() * (top.values - q.log())).sum()
    by_hand += (rest_p * (rest_p.log() - rest_q.log())).sum()
    found = top_k_loss(top.indices, top.values, student)
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert 0 < found.item() < whole  # a coarser view sees less
    assert torch.isclose(p.gather(-1, top.indices).log(), top.values).all()


def test_hidden_states_are_compared_across_the_gap(place: Path) -> None:
    """A student that lacks blocks which do nothing has no hidden loss at all."""
    source = families.build("llama")
    with torch.no_grad():
        for block in tiny.REMOVED:
            source.model.layers[block].self_attn.o_proj.weight.zero_()
            source.model.layers[block].self_attn.o_proj.bias.zero_()
            source.model.layers[block].mlp.down_proj.weight.zero_()
            source.model.layers[block].mlp.down_proj.bias.zero_()
    kept = [0, 1, 4, 5]
    assert teacher_blocks(kept, 6) == [0, 3, 4, 5]
    student = families.build(families.config_of("llama", num_hidden_layers=4))
    student.load_state_dict(source.state_dict(), strict=False)
    for new, old in enumerate(kept):
        student.model.layers[new].load_state_dict(source.model.layers[old].state_dict())
    ids = families.token_ids()
    with recording(student, range(4)) as one, recording(source, range(6)) as other:
        student(input_ids=ids)
        source(input_ids=ids)
    rows = torch.arange(ids.numel())
    assert hidden_loss(one, other, teacher_blocks(kept, 6), rows).item() == pytest.approx(
        0, abs=1e-9
    )
    assert hidden_loss(one, other, kept, rows).item() == pytest.approx(0, abs=1e-9)
    shifted = {block: output * 2 for block, output in one.items()}
    assert hidden_loss(shifted, other, kept, rows).item() == pytest.approx(len(rows), rel=1e-5)


def test_a_cached_teacher_says_what_the_teacher_says(corpus: Corpus, tmp_path: Path) -> None:
    teacher = families.loaded("llama")
    windows = Windows(corpus.train, length=8, packing="stream", apart=True)
    cache = CachedTeacher(tmp_path)
    cache.write(teacher, windows, k=4, batch=2, ranks=ALONE)
    windows.predictions = cache.predictions
    batch = collate([windows[1], windows[0]])
    rows = target_rows(batch["labels"])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        logits = teacher(**inputs, use_cache=False).logits.flatten(0, 1)[rows]
        expected = logits.log_softmax(dim=-1).topk(4)
    assert batch["teacher_ids"].tolist() == expected.indices.tolist()
    torch.testing.assert_close(
        batch["teacher_log_probs"].float(), expected.values, rtol=1e-3, atol=1e-3
    )


def test_an_interrupted_cache_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shortllm.retraining.distillation.WINDOWS_PER_FILE", 2)
    corpus = corpus_of([Document([1, 2, 3, n]) for n in range(4)], tmp_path / "corpus")
    windows = Windows(corpus.train, length=4, packing="stream", apart=False)
    teacher, cache = families.loaded("llama"), tmp_path / "cache"

    def predictions() -> list[list[float]]:
        cached = CachedTeacher(cache)
        cached.write(teacher, windows, k=3, batch=1, ranks=ALONE)
        return [cached.predictions(n)["teacher_log_probs"].tolist() for n in range(3)]

    before = predictions()
    assert [len(rows) for rows in before] == [3, 3, 3]
    first, second = sorted(cache.iterdir())
    stamp = first.stat().st_mtime_ns
    second.unlink()
    assert predictions() == before
    assert first.stat().st_mtime_ns == stamp and sorted(cache.iterdir()) == [first, second]


def test_lineage_goes_back_through_every_shortening(tmp_path: Path, place: Path) -> None:
    short = open_checkpoint(place / "short")
    assert lineage(short).kept == [0, 1, 4, 5]
    twice = open_checkpoint(families.shortened(short, [1], tmp_path / "twice"))
    assert lineage(twice).kept == [0, 4, 5]
    assert lineage(twice).source == "whole"
    with pytest.raises(ShortLLMError, match="does not say from which model"):
        lineage(open_checkpoint(place / "whole"))


# ------------------------------------------------------------------ whole trainings


TRAININGS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "data": "alpaca.jsonl", "length": 256},
    "lora-packed": {"method": "lora", "data": "alpaca.jsonl", "length": 400, "packing": True},
    "full": {"method": "full", "data": "text.jsonl"},
    "checkpointed": {"method": "full", "data": "text.jsonl", "gradient_checkpointing": True},
    "last-blocks": {"method": "last-blocks", "data": "text.jsonl", "blocks": 1},
    "distill": {"method": "distill", "data": "text.jsonl", "hidden_weight": 0.5},
    "distill-cached": {"method": "distill", "data": "text.jsonl", "top_k": 8},
    "distill-generated": {"method": "distill", "data": "generated", "generate": 40},
}


def retrain(place: Path, out: Path, model: str = "short", **changes: Any) -> shortllm.Retraining:
    if changes.get("data", "generated") != "generated":
        changes["data"] = str(place / changes["data"])
    return shortllm.retrain(str(place / model), out, **{**tiny.QUICK, **changes}, device="cpu")


@pytest.mark.parametrize("name", TRAININGS)
def test_every_method_ends_with_a_plain_checkpoint(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "retrained"
    record = retrain(place, out, **TRAININGS[name])
    held_out = dict(record.curves["held_out"])
    assert list(held_out) == [0, 2, 4, 6], "also before the first step"
    assert record.best_step == min([2, 4, 6], key=lambda step: held_out[step])
    assert record.steps == 6 and record.stopped == "steps"
    assert shortllm.Retraining.load(out / "retrain.json") == record

    found, before = weights(out), weights(place / "short")
    assert found.keys() == before.keys()
    changed = {key for key in found if not torch.equal(found[key], before[key])}
    projections = {key for key in found if "layers" in key and key.endswith("proj.weight")}
    if record.method == "lora":
        assert changed == projections
    elif record.method == "last-blocks":
        assert changed and all("layers.3." in key or "lm_head" in key for key in changed)
    else:
        assert changed >= projections
    families.load(out)
    assert not work_directory(out).exists()
    entry = json.loads((out / "config.json").read_text())["shortllm"]
    assert entry["removed_blocks"] == tiny.REMOVED
    assert entry["retrained"]["fingerprint"] == record.fingerprint
    assert (out / "tokenizer.json").read_bytes() == (MODEL_DIR / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("switch", [None, "use_rslora", "use_dora"])
def test_the_adapter_at_run_time_is_the_merged_checkpoint(
    switch: str | None, place: Path, tmp_path: Path
) -> None:
    from peft import PeftConfig, PeftModel

    given = {switch: True} if switch else {}
    record = retrain(
        place, tmp_path / "out", method="lora", data="alpaca.jsonl", length=256, **given
    )
    assert len(record.adapted) == 4 * 7
    config = PeftConfig.from_pretrained(tmp_path / "out" / "adapter")
    switches = {name: True for name in ("use_rslora", "use_dora") if getattr(config, name)}
    assert switches == given
    names = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert any("magnitude" in name for name in names) == (switch == "use_dora")
    base = AutoModelForCausalLM.from_pretrained(place / "short", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    merged = families.load(tmp_path / "out")
    ids = families.token_ids()
    with torch.no_grad():
        one, other = (model(input_ids=ids).logits for model in (adapted, merged))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_mixture_of_text_and_instructions(place: Path, tmp_path: Path) -> None:
    data = f"{place / 'alpaca.jsonl'}:0.75,{place / 'text.jsonl'}:0.25"
    record = shortllm.retrain(
        str(place / "short"), tmp_path / "out", device="cpu",
        options=tiny.options(data=data, length=256),
    )  # fmt: skip
    assert (record.data.source, record.data.kind, record.data.packing) == (
        data, "instructions", "alone",
    )  # fmt: skip
    assert record.data.template == "alpaca" and record.steps == 6


def test_dora_of_stacked_experts_is_refused() -> None:
    with pytest.raises(ShortLLMError, match="stacks the weights of its experts.*--use-dora"):
        METHODS.get("lora").function(families.build("mixtral"), RetrainOptions(use_dora=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_adapters_of_a_4_bit_model_are_merged_into_its_own_weights(
    place: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    options = tiny.options(data=str(place / "alpaca.jsonl"), length=256, load_in_4bit=True)
    record = shortllm.retrain(
        str(place / "short"), tmp_path / "out", options=options, device="cuda"
    )
    assert len(record.adapted) == 4 * 7
    found, before = weights(tmp_path / "out"), weights(place / "short")
    assert {key: t.dtype for key, t in found.items()} == {k: t.dtype for k, t in before.items()}
    assert max((found[key] - before[key]).abs().max() for key in found) < 0.1


def test_callbacks_of_the_trainer(place: Path, tmp_path: Path) -> None:
    class Steps(transformers.TrainerCallback):  # type: ignore[misc]
        seen: list[int] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen.append(state.global_step)

    steps = Steps()
    shortllm.retrain(
        str(place / "short"), tmp_path / "out", callbacks=[steps],
        options=tiny.options(data=str(place / "text.jsonl"), method="full"),
    )  # fmt: skip
    assert steps.seen == [1, 2, 3, 4, 5, 6]


def test_what_is_up_to_date_is_skipped_and_another_recipe_is_not(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    first = retrain(place, out, method="full", data="text.jsonl")
    stamp, before = (out / "model.safetensors").stat().st_mtime_ns, weights(out)["lm_head.weight"]
    caplog.set_level("INFO", logger="shortllm")
    assert retrain(place, out, method="full", data="text.jsonl") == first
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    assert "up to date, skipped" in caplog.text
    with pytest.raises(OutputError, match=r"seed: 1234, now 5.*--overwrite"):
        retrain(place, out, method="full", data="text.jsonl", seed=5)
    assert torch.equal(weights(out)["lm_head.weight"], before)
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in out.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "plain").stat().st_mode}  # follow the umask
    second = retrain(place, out, method="full", data="text.jsonl", seed=5, overwrite=True)
    assert second.fingerprint != first.fingerprint
    assert "will be replaced" in caplog.text
    assert not torch.equal(weights(out)["lm_head.weight"], before)


SLOW_VARIANTS = [pytest.param(name, marks=pytest.mark.slow) for name in ("phi3", "gemma2")]


@pytest.mark.parametrize("variant", ["gpt2", "mixtral", "opt", *SLOW_VARIANTS])
def test_any_family_is_retrained_into_the_files_it_came_in(variant: str, tmp_path: Path) -> None:
    tiny.whole(tmp_path / "model", variant)
    tiny.text(tmp_path / "text.jsonl", 12)
    record = retrain(tmp_path, tmp_path / "out", model="model", data="text.jsonl", max_steps=2)
    found, before = weights(tmp_path / "out"), weights(tmp_path / "model")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert len(changed) >= 6 * 2 and len(record.adapted) >= 6 * 2
    assert record.data.boundaries == ("joined" if variant == "opt" else "apart")
    families.load(tmp_path / "out")


def test_evaluation_sets_are_measured_as_eval_measures_them(place: Path, tmp_path: Path) -> None:
    record = retrain(
        place, tmp_path / "out", method="full", data="text.jsonl", eval_data=["embedded"],
        eval_length=64, eval_segments=5,
    )  # fmt: skip
    measured = shortllm.evaluate(
        [str(tmp_path / "out")],
        options=shortllm.EvaluationOptions(
            data=["embedded"], length=64, max_segments=5, continuations=0
        ),
    )
    curve = dict(record.curves["embedded:test"])
    expected = measured.models[0].perplexity[0].nll
    assert curve[record.best_step] == pytest.approx(expected, rel=1e-5)


def test_training_stops_early_and_in_time(place: Path, tmp_path: Path) -> None:
    wild = {"method": "full", "data": "text.jsonl", "learning_rate": 1.0, "max_steps": 40}
    record = retrain(place, tmp_path / "wild", **wild, patience=2)
    assert (record.stopped, record.best_step) == ("patience", record.steps - 4)
    record = retrain(place, tmp_path / "short", method="full", data="text.jsonl", max_minutes=1e-6)
    assert (record.stopped, record.steps, record.best_step) == ("minutes", 1, 1)


def test_tokens_are_counted_without_padding(place: Path, tmp_path: Path) -> None:
    changes = {"method": "full", "data": "alpaca.jsonl", "length": 256, "max_steps": None}
    record = retrain(place, tmp_path / "out", **changes, epochs=2)
    assert record.tokens_seen == 2 * record.data.tokens
    assert record.data.boundaries == "alone" and record.data.template == "alpaca"


def test_a_bfloat16_checkpoint_stays_one(place: Path, tmp_path: Path) -> None:
    model = families.load(place / "whole").to(torch.bfloat16)
    tiny.whole(tmp_path / "half")
    families.save(model, tmp_path / "half")
    retrain(tmp_path, tmp_path / "out", model="half", method="full", data=place / "text.jsonl")
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_shipped_configurations_are_what_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    names = sorted(file.name for file in CONFIGS.glob("*.yaml"))
    assert names == ["ddp_8gpu.yaml", "fsdp_8gpu.yaml"]
    for name in names:
        assert load_config_from_file(str(CONFIGS / name)).num_processes == 8


def test_the_report_shows_the_curves(place: Path, tmp_path: Path) -> None:
    record = retrain(
        place, tmp_path / "out", method="distill", data="text.jsonl", eval_data=["embedded"],
        eval_length=64, eval_segments=5,
    )  # fmt: skip
    figure, details = retraining_parts(record, "out")
    assert isinstance(figure, Figure) and isinstance(details, Details)
    assert figure.svg.startswith("<svg") and "embedded:test" in figure.svg
    assert figure == retraining_parts(record, "out")[0]
    first = record.curves["held_out"][0][1]
    assert f"{record.steps} steps, held-out loss {first:.3f} → " in details.summary
    [terms] = details.parts
    assert isinstance(terms, Terms) and dict(terms.rows)["teacher"] == "whole"


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "alpaca.jsonl", "length": 8}, "At least 2 are needed"),
        ({"method": "full"}, "--method full needs text to train on"),
        ({"data": "nowhere.jsonl"}, "no such file"),
        ({"data": "empty.jsonl"}, "has no rows"),
        ({"data": "text.jsonl", "length": 600}, "600 tokens exceed the 512 positions"),
        ({"data": "text.jsonl", "max_steps": 0}, "max_steps 0: must be greater than 0"),
        ({"data": "text.jsonl", "epochs": 1}, "--max-steps and --epochs both set the duration"),
        (
            {"data": "text.jsonl", "temperature": 2},
            "--temperature is an option of --method distill",
        ),
        (
            {"data": "text.jsonl", "method": "full", "rank": 4},
            "--rank is an option of --method lora",
        ),
        ({"data": "text.jsonl", "micro_batch": 3}, "--micro-batch 3 does not divide the 4"),
        ({"data": "text.jsonl", "template": "chat"}, "--template chat is for conversations"),
        ({"data": "alpaca.jsonl", "template": "chat"}, "has no chat template"),
        ({"data": "generated"}, "text that a teacher writes"),
        ({"data": "text.jsonl", "rank": 64}, "have no linear projection"),
        ({"data": "text.jsonl", "length": 9999}, r"--length \(.*--set retraining.length\) \d+ or"),
        ({"data": "text.jsonl", "report_to": ["tensorbord"]}, "Did you mean 'tensorboard'"),
        ({"data": "text.jsonl", "report_to": ["wandb"]}, "pip install wandb"),
        ({"data": "text.jsonl", "report_to": ["all", "none"]}, "--report-to all stands alone"),
        ({"data": "text.jsonl", "load_in_4bit": True}, "needs a CUDA GPU.* on cpu"),
        ({"data": "text.jsonl", "eval_data": ["embedded", "embedded"]}, "given twice"),
        (
            {"data": "text.jsonl", "method": "distill", "top_k": 4, "hidden_weight": 1.0},
            "Leave one of them out",
        ),
        ({"data": "text.jsonl", "method": "distill", "teacher": "./no"}, "no such directory"),
    ],
)
def test_bad_options_are_refused(
    changes: dict[str, Any], message: str, place: Path, tmp_path: Path
) -> None:
    (place / "empty.jsonl").write_text("")
    with pytest.raises(ShortLLMError, match=message):
        retrain(place, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
    assert not (work_directory(tmp_path / "out") / "states").exists()


def test_a_directory_with_other_things_is_refused_untouched(place: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="contains something else"):
        retrain(place, tmp_path, method="full", data="text.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_missing_extra_is_named_before_anything_else(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "shortllm.retraining.methods.find_spec", lambda name: None if name == "peft" else "there"
    )
    with pytest.raises(ShortLLMError, match=r"needs peft.*pip install 'shortllm\[train\]'"):
        retrain(place, tmp_path / "out", data="alpaca.jsonl", length=256)


def test_defaults_are_the_paper_s(place: Path) -> None:
    model = open_checkpoint(place / "short")
    lora = resolve(RetrainOptions(), model)
    assert (lora.data, lora.length, lora.learning_rate, lora.epochs) == ("alpaca", 256, 1e-4, 2.0)
    assert (lora.rank, lora.alpha, lora.dropout, lora.batch) == (8, 16, 0.05, 64)
    assert (lora.warmup(1556), lora.warmup(50)) == (100, 5)
    full = resolve(RetrainOptions(method="full", data="c4"), model)
    assert (full.length, full.schedule) == (512, "cosine"), "the model has 512 positions"
    assert lora.micro_batch_of(1) == 16 and lora.micro_batch_of(8) == 8
    with pytest.raises(ShortLLMError, match="cannot be divided among 3 processes"):
        lora.micro_batch_of(3)


def test_every_method_is_described_once() -> None:
    for one in METHODS:
        assert one.label and one.help.endswith(".") and one.paper
        assert {*one.defaults, *one.options} <= RetrainOptions.model_fields.keys()
        assert one.name in (RetrainOptions.model_fields["method"].description or "")
    owned = [option for one in METHODS for option in one.options]
    assert len(owned) == len(set(owned))


def test_a_new_method_needs_no_other_edit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def norms(model: nn.Module, options: RetrainOptions) -> nn.Module:
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
        return model

    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    METHODS.register(TrainingMethod(name="norms", label="Norms", freezes=True))(norms)
    changes = {"data": "text.jsonl", "learning_rate": 1e-2}
    with pytest.raises(
        ShortLLMError, match="--rank is an option of --method lora, and the method is norms"
    ):
        retrain(place, tmp_path / "out", method="norms", rank=4, **changes)
    retrain(place, tmp_path / "out", method="norms", **changes)
    found, before = weights(tmp_path / "out"), weights(place / "short")
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert changed and all("norm" in name for name in changed)


def test_the_command_prints_what_came_of_it(
    capfd: pytest.CaptureFixture[str], place: Path, tmp_path: Path
) -> None:
    arguments = [
        "retrain", place / "short", "--data", place / "alpaca.jsonl", "--length", 256,
        "--max-steps", 2, "--batch", 4, "--held-out", 4, "--out", tmp_path / "out",
    ]  # fmt: skip
    code, out, _ = call(capfd, *arguments)
    assert code == 0
    assert "held_out" in out and "lora: 2 steps" in out and f"checkpoint: {tmp_path / 'out'}" in out
    code, out, _ = call(capfd, *arguments, "--json")
    record = json.loads(out)
    assert code == 0 and record["steps"] == 2 and out.count("\n") == 1
    assert all(math.isfinite(loss) for _, loss in record["curves"]["held_out"])
    code, out, err = call(capfd, "retrain", place / "short", "--out", tmp_path / "out2")
    assert code == 2 and "alpaca" in err and not out
    assert "shortllm.retraining" in sys.modules


def test_an_adapter_goes_onto_its_own_checkpoint_alone(place: Path, tmp_path: Path) -> None:
    """On the model before pruning it would change other blocks."""
    out, short = tmp_path / "out", place / "short"
    retrain(place, out, method="lora", data="alpaca.jsonl", length=256, max_steps=2)
    adapter = out / "adapter"
    assert "4 blocks" in (adapter / "README.md").read_text()
    adapted = shortllm.load_adapter(short, adapter)
    assert any("lora" in name for name, _ in adapted.named_parameters())
    loaded = shortllm.load(short)
    assert shortllm.load_adapter(loaded, adapter).peft_config
    with pytest.raises(CheckpointError, match="belongs to short, 4 blocks, but .* has 6"):
        shortllm.load_adapter(place / "whole", adapter)
    with pytest.raises(CheckpointError, match="but .* has other weights"):
        shortllm.load_adapter(out, adapter)
    (adapter / "belongs_to.json").unlink()
    with pytest.raises(CheckpointError, match="does not say which checkpoint it belongs to"):
        shortllm.load_adapter(short, adapter)
