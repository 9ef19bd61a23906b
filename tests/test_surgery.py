"""Shortened checkpoints on disk compute what the original computes with those blocks bypassed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    VARIANTS,
    build,
    config_of,
    load,
    loaded,
    opened,
    save,
    saved,
    shortened,
    token_ids,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Cohere2Config

from shortllm import __version__
from shortllm.checkpoint.shorten_config import shorten_config
from shortllm.checkpoint.source import open_checkpoint
from shortllm.checkpoint.tensors import SAFETENSORS, SAFETENSORS_INDEX, read_tensor_table
from shortllm.checkpoint.writer import write_tensors
from shortllm.errors import CheckpointError, OutputError
from shortllm.files import overwriting
from shortllm.model.decoder import Decoder
from shortllm.papers import SHORTENED_LLAMA
from shortllm.pruning.prune import write_pruned
from shortllm.pruning.records import Pruning
from shortllm.surgery.apply import renumbered_tensors
from shortllm.surgery.companions import carried_files, carried_fingerprint
from shortllm.surgery.verify import bypass_logits, verify_shortened

WRITTEN = ("README.md", "local.json", "prune.json")
"""Files that say what a shortened checkpoint is."""

REMOVED = ([0], [3], [-1], [0, 2, 3])


def all_tensors(directory: Path) -> dict[str, Tensor]:
    """Every stored tensor, by the safetensors library."""
    result: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        result |= load_file(file)
    return result


def assert_same_tensors(found: Path, expected: Path) -> None:
    one, other = all_tensors(found), all_tensors(expected)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def copied(variant: str, target: Path) -> Path:
    """A checkpoint directory that a test may change."""
    shutil.copytree(saved(variant), target)
    return target


@pytest.fixture(scope="module")
def short_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama-tied` without blocks 1 and 4, from one plain file: what other formats must give."""
    target = tmp_path_factory.mktemp("reference") / "short"
    return shortened(opened("llama-tied"), [1, 4], target)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shortened_checkpoint_computes_the_bypass(variant: str, tmp_path: Path) -> None:
    checkpoint, model = opened(variant), loaded(variant)
    for places in REMOVED:
        removed = [place % checkpoint.block_count for place in places]
        target = shortened(checkpoint, removed, tmp_path / "short")
        short = load(target)  # no tensor missing, unexpected or misshapen
        expected = bypass_logits(Decoder(model), removed)
        verify_shortened(variant, Decoder(short), expected)  # with the cache too
        ids_BT = token_ids(2, 24)
        with torch.inference_mode():
            found = short(input_ids=ids_BT, use_cache=False).logits
        reference = bypass_logits_on(model, removed, ids_BT)
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-6)
        assert short.config.num_hidden_layers == checkpoint.block_count - len(removed)
    check_tying(variant, short, target)
    check_generation(short)


def bypass_logits_on(model: nn.Module, removed: list[int], ids_BT: Tensor) -> Tensor:
    with torch.inference_mode(), Decoder(model).without(removed):
        return model(input_ids=ids_BT, use_cache=False).logits  # type: ignore[no-any-return]


def check_tying(variant: str, short: nn.Module, target: Path) -> None:
    """Tied embeddings are one tensor in memory and one on disk."""
    tied = loaded(variant).config.tie_word_embeddings
    head, embeddings = short.get_output_embeddings(), short.get_input_embeddings()  # type: ignore[operator]
    assert (head.weight is embeddings.weight) == tied
    stored = [t for t in read_tensor_table(target).values() if len(t.shape) == 2 and 97 in t.shape]
    assert len(stored) == (1 if tied else 2)
    assert short.config.tie_word_embeddings == tied


def check_generation(short: nn.Module) -> None:
    """The same text with and without a cache."""
    prompt = token_ids(1, 9)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
    }
    cached = short.generate(prompt, use_cache=True, **options)  # type: ignore[operator]
    assert cached.shape == (1, 14)
    assert torch.equal(cached, short.generate(prompt, use_cache=False, **options))  # type: ignore[operator]


@pytest.mark.parametrize(
    "variant, pattern",
    [
        ("qwen2", ["full"] * 3 + ["sliding"] * 3),
        ("qwen3", ["full"] * 2 + ["sliding"] * 4),
        ("gemma2", ["sliding", "full"] * 3),
        ("gemma3_text", ["sliding", "sliding", "full", "sliding", "sliding", "full", "sliding"]),
        ("smollm3", ["full", "full", "sliding"] * 2),
    ],
)
def test_the_families_show_their_pattern(variant: str, pattern: list[str]) -> None:
    """Without this the comparisons above would say less than they seem to."""
    config = opened(variant).config
    assert [kind.removesuffix("_attention") for kind in config.layer_types] == pattern
    assert config.sliding_window < token_ids().shape[1]


def test_verify_notices_one_changed_tensor(tmp_path: Path) -> None:
    target = shortened(opened("llama"), [2], tmp_path / "short")
    expected = bypass_logits(Decoder(loaded("llama")), [2])
    tensors = load_file(target / SAFETENSORS)
    tensors["model.layers.3.mlp.up_proj.weight"][5] *= 1.1
    save_file(tensors, target / SAFETENSORS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="short does not compute what the original without"):
        verify_shortened("short", Decoder(load(target)), expected)


def test_verify_notices_swapped_blocks(tmp_path: Path) -> None:
    target = shortened(opened("mistral"), [2], tmp_path / "short")
    expected = bypass_logits(Decoder(loaded("mistral")), [2])
    partner = {"1": "3", "3": "1"}
    swapped = {}
    for name, tensor in load_file(target / SAFETENSORS).items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = partner.get(parts[2], parts[2])
        swapped[".".join(parts)] = tensor
    save_file(swapped, target / SAFETENSORS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="logits differ by .* allowed"):
        verify_shortened("short", Decoder(load(target)), expected)


def test_verify_notices_a_wrong_cache(tmp_path: Path) -> None:
    short = load(shortened(opened("llama"), [2], tmp_path / "short"))
    expected = bypass_logits(Decoder(loaded("llama")), [2])
    blocks = short.model.layers  # type: ignore[union-attr]
    blocks[3].self_attn.layer_idx = 2  # type: ignore[union-attr]
    with pytest.raises(
        CheckpointError, match="short generates other text with a cache than without"
    ):
        verify_shortened("short", Decoder(short), expected)
    blocks[3].self_attn.layer_idx = "three"  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="short cannot generate with a cache"):
        verify_shortened("short", Decoder(short), expected)


def test_narrower_matrices_in_low_precision_are_compared_over_all_tokens(tmp_path: Path) -> None:
    """Rounding that moves the logits of a token or two far is none of the mistakes above."""
    decoder = Decoder(load(opened("llama").directory).bfloat16())
    expected = bypass_logits(decoder, [2])
    noisy, largest = expected.clone(), expected.abs().max()
    noisy[0, 3] += 0.15 * largest * torch.randn(noisy.shape[-1])
    short = load(shortened(opened("llama"), [2], tmp_path / "short")).bfloat16()
    verify_shortened("short", Decoder(short), noisy, narrower=True)
    verify_shortened("short", Decoder(short), expected)
    for wrong, narrower in ((noisy, False), (bypass_logits(decoder, [3]), True)):
        with pytest.raises(CheckpointError, match="logits differ by .* allowed"):
            verify_shortened("short", Decoder(short), wrong, narrower=narrower)
    short.model.layers[3].self_attn.layer_idx = 2  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="other text with a cache than without"):
        verify_shortened("short", Decoder(short), expected, narrower=True)


def test_sharded_source_gives_the_same(tmp_path: Path, short_llama: Path) -> None:
    source = save(build("llama-tied"), tmp_path / "source", max_shard_size="50KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    target = shortened(open_checkpoint(source), [1, 4], tmp_path / "short")
    assert_same_tensors(target, short_llama)
    assert not (target / SAFETENSORS_INDEX).exists()
    load(target)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickled_source_gives_the_same(zipped: bool, tmp_path: Path, short_llama: Path) -> None:
    source = copied("llama-tied", tmp_path / "source")
    (source / SAFETENSORS).unlink()
    state = build("llama-tied").state_dict()
    assert "lm_head.weight" in state  # tied: two names for one memory
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(source)
    assert checkpoint.parameters == opened("llama-tied").parameters
    target = shortened(checkpoint, [1, 4], tmp_path / "short")
    assert_same_tensors(target, short_llama)
    assert not list(target.glob("*.bin"))
    load(target)


def test_sharded_pickled_source_gives_the_same(tmp_path: Path, short_llama: Path) -> None:
    source = copied("llama-tied", tmp_path / "source")
    tensors = load_file(source / SAFETENSORS)
    (source / SAFETENSORS).unlink()
    names = sorted(tensors)
    weight_map = {
        name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)
    }
    for shard in sorted(set(weight_map.values())):
        part = {name: tensors[name] for name in names if weight_map[name] == shard}
        torch.save(part, source / shard)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    target = shortened(open_checkpoint(source), [1, 4], tmp_path / "short")
    assert_same_tensors(target, short_llama)


def test_pickled_views_are_written_as_they_look(tmp_path: Path) -> None:
    """Transposed, sliced and scalar tensors of a `.bin` are stored contiguously."""
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    table = {
        "t": base.T,
        "slice": base[1:3, 2:],
        "one": torch.tensor(3.5),
        "half": base.half()[::2],
    }
    torch.save(table, tmp_path / "pytorch_model.bin")
    target = tmp_path / "out"
    target.mkdir()
    write_tensors(target, read_tensor_table(tmp_path))
    written = load_file(target / SAFETENSORS)
    assert written.keys() == table.keys()
    assert all(torch.equal(written[name], table[name]) for name in table)


def test_output_in_shards_has_a_right_index(tmp_path: Path, short_llama: Path) -> None:
    limit = 30_000
    target = shortened(opened("llama-tied"), [1, 4], tmp_path / "short", max_shard_bytes=limit)
    assert_same_tensors(target, short_llama)
    index = json.loads((target / SAFETENSORS_INDEX).read_text())
    tensors = all_tensors(target)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    shards = sorted(path.name for path in target.glob("*.safetensors"))
    assert shards == [
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    ]
    assert len(shards) > 2
    for shard in shards:
        with safe_open(target / shard, framework="pt") as stream:
            held = set(stream.keys())
        assert held == {name for name, place in index["weight_map"].items() if place == shard}
        assert sum(tensors[name].nbytes for name in held) <= limit
    load(target)
    assert open_checkpoint(target).block_count == 4


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    target = shortened(opened("llama-tied"), [1, 4], tmp_path / "short", max_shard_bytes=1)
    table = read_tensor_table(target)
    assert len({entry.file for entry in table.values()}) == len(table)
    load(target)


def test_other_files_are_carried_along(tmp_path: Path) -> None:
    source = copied("llama", tmp_path / "source")
    carried = {
        "tokenizer.json": '{"a": 1}',
        "tokenizer_config.json": "{}",
        "generation_config.json": '{"max_length": 7}',
        "chat_template.jinja": "{{ messages }}",
        "LICENSE": "free",
        "extra/vocabulary/words.txt": "one\ntwo\n",
    }
    left = {
        "pytorch_model.bin": "a second copy of the weights",
        "model.onnx": "another",
        "tf_model.h5": "another",
        "pytorch_model.bin.index.json": "{}",
        "onnx/model.onnx": "another",
        ".gitattributes": "of the repository",
    }
    for name, text in {**carried, **left}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    target = shortened(open_checkpoint(source), [5], tmp_path / "short")
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == {*carried, "config.json", *WRITTEN, SAFETENSORS}
    assert all((target / name).read_text() == text for name, text in carried.items())


def test_an_output_inside_the_source_is_not_carried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copied("llama", tmp_path / "source")
    monkeypatch.chdir(source)
    Path("extra").mkdir()
    Path("extra/words.txt").write_text("one")
    before = carried_fingerprint(source)
    for name in ("runs/a/run.json", "deep/er/model.onnx", "made.partial/x", "made/b.partial"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    checkpoint = open_checkpoint(".")
    for target in (Path("short"), Path("short"), Path("empty/short")):
        shortened(checkpoint, [2], target)
        found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
        assert found == {
            "config.json", "generation_config.json", *WRITTEN, SAFETENSORS, "extra/words.txt"
        }  # fmt: skip
    again = carried_fingerprint(Path("short"))
    assert carried_fingerprint(source) == before == again
    Path("extra/words.txt").write_text("two")
    assert carried_fingerprint(source) != before


def test_the_target_itself_is_not_carried(tmp_path: Path) -> None:
    source = copied("llama", tmp_path / "source")
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "notes.txt").touch()
    assert carried_files(source) == [Path("a/notes.txt"), Path("generation_config.json")]
    assert carried_files(source, source / "a" / "b") == [Path("generation_config.json")]
    assert carried_files(source, source / "a") == [Path("generation_config.json")]


@pytest.mark.parametrize("target", [".", "..", "../source"])
def test_the_source_is_never_replaced(target: str, tmp_path: Path) -> None:
    source = copied("llama", tmp_path / "source")
    with pytest.raises(OutputError, match="the original model, which is never changed"):
        shortened(open_checkpoint(source), [2], source / target)
    assert open_checkpoint(source).fingerprint == opened("llama").fingerprint


def test_a_source_of_symbolic_links_is_written_as_files(tmp_path: Path) -> None:
    """The Hub cache holds snapshots of links."""
    source = tmp_path / "snapshot"
    source.mkdir()
    for path in saved("llama-tied").iterdir():
        os.symlink(path, source / path.name)
    target = shortened(open_checkpoint(source), [1], tmp_path / "short")
    assert not any(path.is_symlink() for path in target.iterdir())
    load(target)


def test_config_says_where_the_checkpoint_comes_from(tmp_path: Path) -> None:
    checkpoint = opened("qwen2")
    target = shortened(checkpoint, [4, 1], tmp_path / "a", criterion="ppl")
    config = json.loads((target / "config.json").read_text())
    entry = {
        "version": __version__,
        "source": saved("qwen2").name,
        "source_fingerprint": checkpoint.fingerprint,
        "revision": None,
        "source_blocks": 6,
        "removed_blocks": [1, 4],
        "draft_reads": {"original": [2, 3], "now": [1, 2]},
        "criterion": "ppl",
        "paper": str(SHORTENED_LLAMA),
        "parent": None,
        "fingerprint": Pruning.load(target / "prune.json").fingerprint,
    }
    assert config["shortllm"] == entry
    again = shortened(open_checkpoint(target), [0], tmp_path / "b")
    second = json.loads((again / "config.json").read_text())["shortllm"]
    assert second["parent"] == entry
    assert (second["source_blocks"], second["removed_blocks"]) == (4, [0])
    short = load(again)
    verify_shortened("twice", Decoder(short), bypass_logits(Decoder(loaded("qwen2")), [0, 1, 4]))
    save(short, tmp_path / "c")  # the entry outlives transformers' own saving
    assert open_checkpoint(tmp_path / "c").raw_config["shortllm"]["parent"] == entry


def test_fields_that_do_not_concern_blocks_stay_as_they_are(tmp_path: Path) -> None:
    before = opened("gemma3_text").raw_config
    target = shortened(opened("gemma3_text"), [0, 3], tmp_path / "short")
    after = json.loads((target / "config.json").read_text())
    changed = {key for key in {*before, *after} if before.get(key) != after.get(key)}
    periods = {"sliding_window_pattern", "_sliding_window_pattern"}
    assert changed == {"num_hidden_layers", "layer_types", "shortllm", *periods}


def test_a_period_under_two_names_changes_under_both() -> None:
    config = Cohere2Config(num_hidden_layers=8)
    raw = {**config.to_dict(), "sliding_window_pattern": 4, "layer_switch": 4}
    for kept, period in (([0, 1, 2, 5, 6, 7], 6), ([0, 2, 3, 4, 5, 6, 7], None)):
        short = shorten_config(raw, config, kept)
        assert short.get("layer_switch") == short.get("sliding_window_pattern") == period


def test_progress_counts_the_bytes_written(tmp_path: Path) -> None:
    steps: list[int] = []
    entries = renumbered_tensors(opened("gpt2"), [0, 1, 3, 4, 5])
    write_tensors(tmp_path, entries, advance=steps.append)
    assert sum(steps) == sum(entry.bytes for entry in read_tensor_table(tmp_path).values())


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def stop_surgery(monkeypatch: pytest.MonkeyPatch, *, verifying: bool) -> None:
    """Interrupt surgery while it writes tensors, or while the result is verified."""
    if verifying:
        monkeypatch.setattr("shortllm.pruning.prune._verifying", lambda *a: stop)
    else:
        monkeypatch.setattr("shortllm.surgery.derived.write_tensors", stop)


@pytest.mark.parametrize("verifying", [False, True])
def test_an_interrupted_surgery_leaves_nothing(
    verifying: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_surgery(monkeypatch, verifying=verifying)
    with pytest.raises(KeyboardInterrupt):
        shortened(opened("llama"), [1], tmp_path / "short")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verifying", [False, True])
def test_an_interrupted_surgery_keeps_the_earlier_result(
    verifying: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = shortened(opened("llama"), [1], tmp_path / "short")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    stop_surgery(monkeypatch, verifying=verifying)
    with pytest.raises(KeyboardInterrupt):
        shortened(opened("llama"), [2, 3], target)
    assert list(tmp_path.iterdir()) == [target]
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_an_earlier_result_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = shortened(opened("llama"), [1], tmp_path / "short", max_shard_bytes=30_000)
    (target / "stale.txt").write_text("of yesterday")
    (tmp_path / "short.partial").mkdir()
    (tmp_path / "short.partial" / "junk").write_text("of a killed process")
    with pytest.raises(OutputError, match=r"removed: \[1\], now \[2, 3\].*--overwrite"):
        write_pruned(opened("llama"), [0, 1, 4, 5], target)
    assert load(target).config.num_hidden_layers == 5
    with overwriting():
        write_pruned(opened("llama"), [0, 1, 4, 5], target)
    assert list(tmp_path.iterdir()) == [target]
    assert {path.name for path in target.iterdir()} == {
        *(path.name for path in saved("llama").iterdir()), *WRITTEN
    }  # fmt: skip
    assert load(target).config.num_hidden_layers == 4


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="[0-9]+ KiB are needed, 1,000 bytes are free"):
        shortened(opened("llama"), [1], tmp_path / "short")
    assert list(tmp_path.iterdir()) == []


def test_copying_without_the_kernels_help_gives_the_same(
    tmp_path: Path, short_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "copy_file_range")
    assert_same_tensors(shortened(opened("llama-tied"), [1, 4], tmp_path / "short"), short_llama)


@pytest.mark.parametrize("padding", [0, 8, 123, 2048, 4088])
def test_data_keeps_its_place_within_a_page(padding: int, tmp_path: Path) -> None:
    """Then the kernel copies whole pages; whatever the length of the source's header."""
    tensors = {name: torch.full((2048,), float(i)) for i, name in enumerate("abc")}
    save_file(tensors, tmp_path / SAFETENSORS)
    raw = (tmp_path / SAFETENSORS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length] + b" " * padding
    (tmp_path / SAFETENSORS).write_bytes(
        len(header).to_bytes(8, "little") + header + raw[8 + length :]
    )
    before = read_tensor_table(tmp_path)
    (tmp_path / "out").mkdir()
    write_tensors(tmp_path / "out", {name: before[name] for name in "ac"})
    after = read_tensor_table(tmp_path / "out")
    for name in "ac":
        old, new = before[name].offset, after[name].offset
        assert old is not None and new is not None and new % 8 == 0
        assert (new - old) % 4096 == 0 or padding == 123
    written = load_file(tmp_path / "out" / SAFETENSORS)
    assert all(torch.equal(written[name], tensors[name]) for name in "ac")


def test_short_writes_are_continued(
    tmp_path: Path, short_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One write may move less than asked: 2 GiB at most on Linux."""
    from shortllm.checkpoint import writer

    class Reluctant:
        def __init__(self, out: Any) -> None:
            self.out = out

        def write(self, data: Any) -> int:
            return self.out.write(memoryview(data)[:1000])  # type: ignore[no-any-return]

    plain = writer._write_all
    monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.setattr(writer, "_write_all", lambda out, data: plain(Reluctant(out), data))  # type: ignore[arg-type]
    assert_same_tensors(shortened(opened("llama-tied"), [1, 4], tmp_path / "short"), short_llama)


def test_a_source_that_shrinks_meanwhile_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copied("llama", tmp_path / "source")
    checkpoint = open_checkpoint(source)
    os.truncate(source / SAFETENSORS, 20_000)
    with pytest.raises(CheckpointError, match="ended early"):
        shortened(checkpoint, [0], tmp_path / "short")
    assert not (tmp_path / "short").exists()


def test_mixed_types_in_one_file(tmp_path: Path) -> None:
    source = copied("llama", tmp_path / "source")
    tensors = load_file(source / SAFETENSORS)
    kinds = (torch.bfloat16, torch.float32, torch.float16, torch.int8, torch.float64)
    mixed = {
        name: t.to(kinds[i % len(kinds)]) for i, (name, t) in enumerate(sorted(tensors.items()))
    }
    mixed["model.layers.2.odd"] = torch.arange(
        3, dtype=torch.uint8
    )  # bytes that shift what follows
    mixed["model.layers.4.empty"] = torch.empty(0, 4)
    save_file(mixed, source / SAFETENSORS, metadata={"format": "pt"})
    target = shortened(open_checkpoint(source), [0, 3], tmp_path / "short")
    written = load_file(target / SAFETENSORS)
    new_number = {1: 0, 2: 1, 4: 2, 5: 3}
    expected = {}
    for name, tensor in mixed.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in new_number:
                continue
            parts[2] = str(new_number[int(parts[2])])
        expected[".".join(parts)] = tensor
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])
    for entry in read_tensor_table(target).values():  # readers map the file and need alignment
        item = max(1, entry.bytes // max(1, entry.elements))
        assert entry.offset is not None and entry.offset % item == 0


def test_unknown_types_pass_through_byte_for_byte(tmp_path: Path) -> None:
    source = copied("llama", tmp_path / "source")
    raw = (source / SAFETENSORS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    data = raw[8 + length :]
    packed = {}
    for block in range(6):  # four bits an element: six elements in three bytes
        packed[block] = bytes([block, 17 * block, 255 - block])
        place = {"dtype": "F4", "shape": [6], "data_offsets": [len(data), len(data) + 3]}
        header[f"model.layers.{block}.mlp.packed"] = place
        data += packed[block]
    text = json.dumps(header).encode()
    (source / SAFETENSORS).write_bytes(len(text).to_bytes(8, "little") + text + data)
    target = shortened(open_checkpoint(source), [1], tmp_path / "short")
    table = read_tensor_table(target)
    written = (target / SAFETENSORS).read_bytes()
    for new, old in enumerate([0, 2, 3, 4, 5]):
        entry = table[f"model.layers.{new}.mlp.packed"]
        assert (entry.dtype, entry.shape) == ("F4", (6,))
        assert entry.offset is not None
        assert written[entry.offset : entry.offset + entry.bytes] == packed[old]


def test_keeping_all_blocks_copies_the_checkpoint(tmp_path: Path) -> None:
    write_pruned(opened("falcon-new"), range(6), tmp_path / "same")
    assert_same_tensors(tmp_path / "same", saved("falcon-new"))


def test_one_block_can_be_left(tmp_path: Path) -> None:
    checkpoint = opened("smollm3")
    short = load(shortened(checkpoint, [0, 1, 3, 4, 5], tmp_path / "short"))
    verify_shortened(
        "one", Decoder(short), bypass_logits(Decoder(loaded("smollm3")), [0, 1, 3, 4, 5])
    )


def test_more_than_ten_blocks_are_renumbered_by_number(tmp_path: Path) -> None:
    """Names sort as text (10 before 2); the order of blocks must not follow."""
    model = build(config_of("qwen3", num_hidden_layers=13))
    checkpoint = open_checkpoint(save(model, tmp_path / "source"))
    removed = [2, 9, 11]
    short = load(shortened(checkpoint, removed, tmp_path / "short"))
    verify_shortened("long", Decoder(short), bypass_logits(Decoder(model), removed))
