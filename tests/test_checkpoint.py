"""What is wrong with a checkpoint is found before work starts; the message says what to do."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, config_of, opened, save, saved
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, BertConfig, T5Config

from shortllm.checkpoint.source import open_checkpoint
from shortllm.checkpoint.tensors import (
    PICKLED,
    PICKLED_INDEX,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    load_pickled,
    read_tensor_table,
)
from shortllm.embedded import MODEL_DIR
from shortllm.errors import CheckpointError, ShortLLMError, UnsupportedModelError
from shortllm.model.loading import load_model, stored_dtype

CPU = torch.device("cpu")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A healthy checkpoint that a test may damage."""
    shutil.copytree(saved("llama"), tmp_path / "source")
    return tmp_path / "source"


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file, leaving its data alone."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def rewrite_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    raw = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def shard(directory: Path, *, index: dict[str, str] | None = None) -> None:
    """Two shards and their index, with parts of its weight map changed."""
    tensors = load_file(directory / SAFETENSORS)
    (directory / SAFETENSORS).unlink()
    weight_map = {}
    for i, name in enumerate(sorted(tensors)):
        weight_map[name] = "a.safetensors" if i % 2 else "b.safetensors"
    for file in ("a.safetensors", "b.safetensors"):
        part = {name: tensors[name] for name, place in weight_map.items() if place == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    (directory / SAFETENSORS_INDEX).write_text(
        json.dumps({"weight_map": {**weight_map, **(index or {})}})
    )


# --- what a healthy one says ----------------------------------------------------------------------


def test_a_healthy_checkpoint() -> None:
    checkpoint = open_checkpoint(saved("qwen2"))
    model = build("qwen2")
    info = checkpoint.info()
    assert info.id == str(saved("qwen2"))
    assert (info.model_type, info.blocks, info.revision) == ("qwen2", 6, None)
    assert info.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert info.bytes == 4 * info.parameters
    layers = model.model.layers  # type: ignore[union-attr]
    per_block = [sum(parameter.numel() for parameter in block.parameters()) for block in layers]  # type: ignore[union-attr]
    assert checkpoint.parameters_per_block == per_block
    assert checkpoint.block_names.prefix == "model.layers"
    assert stored_dtype(checkpoint) == torch.float32


def test_a_sharded_checkpoint_is_the_same_table(source: Path) -> None:
    whole = read_tensor_table(source)
    shard(source)
    parts = read_tensor_table(source)
    assert {n: (e.dtype, e.shape) for n, e in parts.items()} == {
        n: (e.dtype, e.shape) for n, e in whole.items()
    }


def test_entries_point_at_the_data(source: Path) -> None:
    raw = (source / SAFETENSORS).read_bytes()
    for name, tensor in load_file(source / SAFETENSORS).items():
        entry = read_tensor_table(source)[name]
        assert entry.offset is not None
        assert raw[entry.offset : entry.offset + entry.bytes] == tensor.numpy().tobytes()


def test_the_fingerprint_follows_the_content(source: Path, tmp_path: Path) -> None:
    original = open_checkpoint(source).fingerprint
    assert open_checkpoint(shutil.copytree(source, tmp_path / "copy")).fingerprint == original
    tensors = load_file(source / SAFETENSORS)
    tensors["model.layers.3.mlp.up_proj.weight"].view(-1)[-1] += 1e-6
    save_file(tensors, source / SAFETENSORS, metadata={"format": "pt"})
    changed = open_checkpoint(source).fingerprint
    assert changed != original
    rewrite_config(source, rms_norm_eps=1e-5)
    assert open_checkpoint(source).fingerprint not in (original, changed)


@pytest.mark.parametrize("pickled", [False, True])
def test_the_fingerprint_sees_the_middle_of_a_tensor(pickled: bool, source: Path) -> None:
    def write(tensors: dict[str, torch.Tensor]) -> str:
        if pickled:
            torch.save(tensors, source / PICKLED)
        else:
            save_file(tensors, source / SAFETENSORS, metadata={"format": "pt"})
        return open_checkpoint(source).fingerprint

    tensors = load_file(source / SAFETENSORS)
    (source / SAFETENSORS).unlink()
    tensors["model.norm.weight"] = torch.zeros(3 * 2**18 + 7)  # three MiB
    before = write(tensors)
    tensors["model.norm.weight"][5000:-5000] += 1e-6
    assert write(tensors) != before


def test_the_fingerprint_of_a_pickled_checkpoint(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / SAFETENSORS)
    (source / SAFETENSORS).unlink()
    torch.save(tensors, source / PICKLED)
    original = open_checkpoint(source).fingerprint
    assert open_checkpoint(shutil.copytree(source, tmp_path / "copy")).fingerprint == original
    tensors["model.layers.3.mlp.up_proj.weight"][20, 20] += 1e-6
    torch.save(tensors, source / PICKLED)
    assert open_checkpoint(source).fingerprint != original


# --- directories ----------------------------------------------------------------------------------


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="no such directory: .*nowhere. Give a checkpoint directory"
    ):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match="no such directory: gpt2.*openai-community/gpt2.*'embedded'"
    ):
        open_checkpoint("gpt2")


def test_the_embedded_model_comes_before_a_directory_of_its_name(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    source.rename("embedded")
    assert open_checkpoint("embedded").directory == MODEL_DIR
    assert open_checkpoint("./embedded").directory == Path("embedded")
    assert open_checkpoint(Path("embedded")).directory == Path("embedded")


def test_a_file_instead_of_its_directory(source: Path) -> None:
    with pytest.raises(
        CheckpointError, match=f"is a file. Give the checkpoint's directory: {source}"
    ):
        open_checkpoint(source / SAFETENSORS)


def test_a_directory_of_other_things(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="is not a checkpoint: the directory has no config.json"
    ):
        open_checkpoint(tmp_path)


def test_weights_without_config(source: Path) -> None:
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has weights but no config.json"):
        open_checkpoint(source)


def test_config_without_weights(source: Path) -> None:
    (source / SAFETENSORS).unlink()
    with pytest.raises(
        CheckpointError, match="has a config.json but no weights.*Was the download finished"
    ):
        open_checkpoint(source)


def test_a_hub_id_offline() -> None:
    with pytest.raises(
        CheckpointError,
        match="'nobody/nothing-0.1B' is not a local directory, not in the local Hub cache",
    ):
        open_checkpoint("nobody/nothing-0.1B")
    with pytest.raises(
        CheckpointError, match="'no body/no thing' is neither a directory nor a possible Hub id"
    ):
        open_checkpoint("no body/no thing")


class Hub:
    """`snapshot_download` of a repository that is a local directory."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.snapshot = repository, cache / "0123abcd"

    def __call__(
        self, hub_id: str, *, revision: str | None, allow_patterns: Any, ignore_patterns: Any
    ) -> str:
        assert revision in (None, self.snapshot.name)
        names = [str(p.relative_to(self.repository)) for p in self.repository.rglob("*.*")]
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        for name in filter_repo_objects(names, **patterns):
            self.snapshot.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repository / name, self.snapshot / name)
        return str(self.snapshot)

    def fetched(self) -> set[str]:
        return {path.name for path in self.snapshot.glob("*")}


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(source, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    return fake


def test_a_download_takes_one_copy_of_the_weights(hub: Hub) -> None:
    (hub.repository / "onnx").mkdir()
    for name in (
        "consolidated.safetensors", "consolidated.json", "pytorch_model.bin", "tokenizer.json",
        "onnx/more.safetensors", "onnx/config.json",
    ):  # fmt: skip
        (hub.repository / name).write_text("{}")
    checkpoint = open_checkpoint("acme/tiny")
    assert (checkpoint.revision, checkpoint.directory) == ("0123abcd", hub.snapshot)
    assert hub.fetched() == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"
    }  # fmt: skip


def test_pickled_weights_are_downloaded_where_there_are_no_others(hub: Hub) -> None:
    torch.save(load_file(hub.repository / SAFETENSORS), hub.repository / PICKLED)
    (hub.repository / SAFETENSORS).unlink()
    assert open_checkpoint("acme/tiny").info().blocks == 6
    assert hub.fetched() == {"config.json", "generation_config.json", PICKLED}


def test_the_config_is_checked_before_weights_are_downloaded(hub: Hub) -> None:
    rewrite_config(hub.repository, model_type="vit", architectures=["ViTModel"])
    with pytest.raises(UnsupportedModelError, match="'vit' has no causal language model"):
        open_checkpoint("acme/tiny")
    assert hub.fetched() == {"config.json"}
    (hub.repository / "config.json").unlink()
    (hub.snapshot / "config.json").unlink()
    hub.snapshot.rmdir()
    with pytest.raises(CheckpointError, match="acme/tiny is not a checkpoint: .* no config.json"):
        open_checkpoint("acme/tiny")


# --- config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "config.json is not valid JSON .*Download it again"),
        ("[1]", "config.json has no fields"),
        ("{}", "names no model_type"),
        (b"\xff\xfe\x00", "config.json is not valid JSON"),
    ],
)
def test_a_damaged_config(text: str | bytes, message: str, source: Path) -> None:
    (source / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(source)


def test_an_unknown_model_type(source: Path) -> None:
    rewrite_config(source, model_type="lama")
    with pytest.raises(
        UnsupportedModelError, match="transformers .* cannot read the config of model type 'lama'"
    ):
        open_checkpoint(source)


def test_code_beside_the_config_is_never_run(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda question="": "y")  # transformers would ask
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    rewrite_config(source, model_type="own", auto_map=auto_map)
    code = f"import pathlib\npathlib.Path({str(source / 'ran')!r}).touch()\nclass OwnConfig: ...\n"
    (source / "own.py").write_text(code)
    with pytest.raises(
        UnsupportedModelError,
        match=r"Python code of its own \(own.py\).*'own'. It was not run.*--trust-remote-code",
    ):
        open_checkpoint(source)
    assert not (source / "ran").exists()


def test_a_value_transformers_refuses(source: Path) -> None:
    rewrite_config(source, hidden_size="wide")
    with pytest.raises(
        UnsupportedModelError, match="cannot read the config of model type 'llama'.*hidden_size"
    ):
        open_checkpoint(source)


def test_an_encoder_decoder(tmp_path: Path) -> None:
    config = T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4)
    save(AutoModelForSeq2SeqLM.from_config(config), tmp_path)
    with pytest.raises(UnsupportedModelError, match="model type 't5' is an encoder-decoder"):
        open_checkpoint(tmp_path)


def test_a_masked_language_model(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=97,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=16,
    )
    save(AutoModelForMaskedLM.from_config(config), tmp_path)
    with pytest.raises(
        UnsupportedModelError, match="was saved as BertForMaskedLM, not as a causal language"
    ):
        open_checkpoint(tmp_path)


def test_a_type_without_a_causal_language_model(source: Path) -> None:
    rewrite_config(source, model_type="vit", architectures=["ViTModel"])
    with pytest.raises(
        UnsupportedModelError, match="'vit' has no causal language model in transformers"
    ):
        open_checkpoint(source)


def test_a_base_model_without_head(tmp_path: Path) -> None:
    save(build("llama").model, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(
        UnsupportedModelError, match="was saved as LlamaModel, not .*LlamaForCausalLM"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "count, message",
    [
        (7, r"config says 7 blocks, but no tensor of block 6 \('model.layers.6'\) is stored"),
        (5, "'model.layers.5' lies behind the last of 5 blocks"),
    ],
)
def test_a_wrong_block_count(count: int, message: str, source: Path) -> None:
    rewrite_config(source, num_hidden_layers=count)
    with pytest.raises(UnsupportedModelError, match=message):
        _ = open_checkpoint(source).block_names


def test_no_blocks_at_all(source: Path) -> None:
    rewrite_config(source, num_hidden_layers=0)
    with pytest.raises(UnsupportedModelError, match="'llama' states no block count"):
        _ = open_checkpoint(source).block_names


# --- safetensors files ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_a_truncated_file(size: int, source: Path) -> None:
    whole = (source / SAFETENSORS).stat().st_size
    os.truncate(source / SAFETENSORS, size if size >= 0 else whole + size)
    with pytest.raises(CheckpointError, match="is truncated, damaged or .*Download it again"):
        open_checkpoint(source)


def test_data_too_long(source: Path) -> None:
    with open(source / SAFETENSORS, "ab") as stream:
        stream.write(b"more")
    with pytest.raises(CheckpointError, match="file not fully covered"):
        open_checkpoint(source)


def test_a_pointer_instead_of_the_file(source: Path) -> None:
    """What a clone without git-lfs leaves behind."""
    (source / SAFETENSORS).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    with pytest.raises(CheckpointError, match="or not a safetensors file"):
        open_checkpoint(source)


def damage(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Change fields of one tensor's header item; `...` removes a field."""

    def change(header: dict[str, Any]) -> None:
        item = {**header["model.norm.weight"], **fields}
        header["model.norm.weight"] = {
            key: value for key, value in item.items() if value is not ...
        }

    return change


@pytest.mark.parametrize(
    "change",
    [
        damage(shape=[33]),
        damage(shape=[-32]),
        damage(shape="wide"),
        damage(shape=...),
        damage(data_offsets=...),
        damage(data_offsets=[0]),
        damage(data_offsets=[128, 0]),
        damage(data_offsets=[0.0, 128.0]),
        damage(dtype=["F32"]),
        damage(data_offsets=[64, 192]),
        damage(data_offsets=[10**9, 10**9 + 128]),
        lambda header: header.pop("model.norm.weight"),
        lambda header: header.update(odd=[1, 2]),
    ],
)
def test_a_damaged_header(change: Callable[[dict[str, Any]], None], source: Path) -> None:
    rewrite_header(source / SAFETENSORS, change)
    with pytest.raises(CheckpointError, match="damaged or not .*header: .*Download it again"):
        open_checkpoint(source)


@pytest.mark.parametrize("text", [b"{not json", b"[]", b"3", b"\xff\xff", b'{"a": 1}'])
def test_a_header_without_tensors(text: bytes, source: Path) -> None:
    (source / SAFETENSORS).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match="damaged or not .*Download it again"):
        open_checkpoint(source)


# --- shards and their index -----------------------------------------------------------------------


def test_a_missing_shard(source: Path) -> None:
    shard(source)
    (source / "b.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match="names the shard b.safetensors, which is not there. Finish the"
    ):
        open_checkpoint(source)


@pytest.mark.parametrize(
    "place", ["/etc/passwd", "../other.safetensors", "a/../../x.safetensors", 7, None, ["a"]]
)
def test_a_shard_outside_the_directory(place: Any, source: Path) -> None:
    shutil.copy(source / SAFETENSORS, source.parent / "other.safetensors")
    shard(source, index={"model.norm.weight": place})
    with pytest.raises(CheckpointError, match="names a shard outside its own directory"):
        open_checkpoint(source)


def test_a_promised_tensor_that_is_not_there(source: Path) -> None:
    shard(source, index={"model.layers.6.extra": "a.safetensors", "model.other": "b.safetensors"})
    message = (
        r"promises tensor 'model.layers.6.extra' in a.safetensors, which does not hold it "
        r"\(2 such tensors\)"
    )
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(source)


def test_a_tensor_promised_in_another_shard_than_its_own(source: Path) -> None:
    shard(source)
    index = json.loads((source / SAFETENSORS_INDEX).read_text())
    place = index["weight_map"]["model.norm.weight"]
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[place]
    index["weight_map"]["model.norm.weight"] = other
    (source / SAFETENSORS_INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"promises tensor 'model.norm.weight' in {other}"):
        open_checkpoint(source)


@pytest.mark.parametrize("text", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": [1]}', "{"])
def test_a_damaged_index(text: str, source: Path) -> None:
    shard(source)
    (source / SAFETENSORS_INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="has no (weight_map|fields)|is not valid JSON"):
        open_checkpoint(source)


# --- pickled files --------------------------------------------------------------------------------


class Malice:
    """Unpickled without care, it makes a directory."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_malicious_pickle_is_refused_and_not_run(
    zipped: bool, source: Path, tmp_path: Path
) -> None:
    (source / SAFETENSORS).unlink()
    content = {"model.norm.weight": torch.ones(32), "x": Malice(tmp_path / "owned")}
    torch.save(content, source / PICKLED, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError,
        match="contains more than tensors and is refused, since loading it could run",
    ):
        open_checkpoint(source)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("keep", [0, 5, 1000, 50_000])
def test_a_truncated_pickle(keep: int, source: Path) -> None:
    torch.save(load_file(source / SAFETENSORS), source / PICKLED)
    (source / SAFETENSORS).unlink()
    os.truncate(source / PICKLED, keep)
    with pytest.raises(CheckpointError, match="is damaged or truncated|contains more than tensors"):
        open_checkpoint(source)


def test_another_pickle_at_the_same_time(tmp_path: Path) -> None:
    file = tmp_path / PICKLED
    for value in (1.0, 2.0):
        torch.save({"a": torch.full([2], value)}, file)
        os.utime(file, (1, 1))
        assert load_pickled(file)["a"].tolist() == [value, value]


@pytest.mark.parametrize(
    "content", [[torch.ones(2)], {"a": 3}, torch.ones(2), {"a": {"b": torch.ones(1)}}]
)
def test_a_pickle_of_other_things(content: Any, source: Path) -> None:
    (source / SAFETENSORS).unlink()
    torch.save(content, source / PICKLED)
    with pytest.raises(CheckpointError, match="is not a plain table of tensors"):
        open_checkpoint(source)


def test_a_pickled_type_safetensors_cannot_hold(source: Path) -> None:
    (source / SAFETENSORS).unlink()
    table = {"q": torch.ones(3, dtype=torch.complex128)}
    torch.save(table, source / PICKLED)
    with pytest.raises(
        CheckpointError, match="tensor 'q' has type torch.complex128, which safetensors"
    ):
        open_checkpoint(source)


def test_a_missing_pickled_shard(source: Path) -> None:
    (source / SAFETENSORS).unlink()
    (source / PICKLED_INDEX).write_text(
        json.dumps({"weight_map": {"model.norm.weight": "one.bin"}})
    )
    with pytest.raises(CheckpointError, match="names the shard one.bin, which is not there"):
        open_checkpoint(source)


# --- loading into memory --------------------------------------------------------------------------


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / SAFETENSORS)
    change(tensors)
    save_file(tensors, directory / SAFETENSORS, metadata={"format": "pt"})


def test_a_healthy_checkpoint_is_loaded() -> None:
    model = load_model(opened("llama"), device=CPU)
    assert next(model.parameters()).dtype == torch.float32
    assert not model.training
    half = load_model(opened("llama"), device=CPU, dtype="bfloat16")
    assert next(half.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number(value: float, source: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.3.self_attn.q_proj.weight"][1, 2] = value

    change_tensors(source, change)
    with pytest.raises(
        CheckpointError, match="'model.layers.3.self_attn.q_proj.weight' contains NaN or infinite"
    ):
        load_model(open_checkpoint(source), device=CPU)


def test_a_tensor_the_model_needs_is_missing(source: Path) -> None:
    change_tensors(source, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(
        CheckpointError, match="tensor 'model.layers.2.mlp.up_proj.weight' is missing"
    ):
        load_model(open_checkpoint(source), device=CPU)


def test_a_tensor_the_model_has_no_place_for(source: Path) -> None:
    change_tensors(source, lambda tensors: tensors.update({"model.layers.2.gate": torch.ones(2)}))
    with pytest.raises(
        CheckpointError, match="tensor 'model.layers.2.gate' is not part of the model"
    ):
        load_model(open_checkpoint(source), device=CPU)


def test_a_tensor_of_another_shape(source: Path) -> None:
    change_tensors(source, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(
        CheckpointError,
        match=r"'model.norm.weight' is stored as \[31\], but its config.json describes \[32\]",
    ):
        load_model(open_checkpoint(source), device=CPU)


def test_a_model_larger_than_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shortllm.model.loading.available_memory", lambda device: 1000)
    with pytest.raises(
        ShortLLMError, match="needs 0.0 GiB as float32 on cpu, 0.0 GiB are free. Try --dtype"
    ):
        load_model(opened("llama"), device=CPU)


def test_a_config_transformers_cannot_build(source: Path) -> None:
    rewrite_config(source, hidden_act="none such")
    with pytest.raises(UnsupportedModelError, match="transformers cannot build model type 'llama'"):
        _ = open_checkpoint(source).block_names


def test_stored_dtype_is_that_of_most_elements(source: Path) -> None:
    assert config_of("llama").num_hidden_layers == 6

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if tensors[name].ndim > 1:
                tensors[name] = tensors[name].to(torch.float16)

    change_tensors(source, change)
    assert stored_dtype(open_checkpoint(source)) == torch.float16
