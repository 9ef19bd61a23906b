"""Checkpoints that nobody should trust: links that lead out, pickles and code that would be run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import opened, saved
from healthy import share_out
from hub import commit_of, fill_cache
from retraining import options, shortened, text, whole
from safetensors.torch import load_file
from test_cli import call
from transformers import AutoModelForCausalLM

import shortllm
from shortllm import pipeline
from shortllm.checkpoint.source import open_checkpoint
from shortllm.checkpoint.tensors import (
    PICKLED,
    PICKLED_INDEX,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    read_tensor_table,
)
from shortllm.data.options import CalibrationOptions
from shortllm.errors import CheckpointError, DataError, ShortLLMError, UnsupportedModelError
from shortllm.evaluation.options import EvaluationOptions
from shortllm.retraining import trainer
from shortllm.runtime import trusting_remote_code

# ---- links and paths in an index


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint in three shards, and beside it a file that is none of its business."""
    shutil.copytree(saved("llama"), tmp_path / "source")
    share_out(tmp_path / "source")
    shutil.copy(saved("llama") / SAFETENSORS, tmp_path / "secret.safetensors")
    return tmp_path / "source"


def shards_of(source: Path) -> list[str]:
    index = json.loads((source / SAFETENSORS_INDEX).read_text())
    return sorted(set(index["weight_map"].values()))


@pytest.mark.parametrize(
    "to",
    [
        "../secret.safetensors",
        "{root}/secret.safetensors",
        "/etc/passwd",
        "x/../../secret.safetensors",
    ],
)
def test_a_link_out_of_the_checkpoint_is_refused(to: str, sharded: Path) -> None:
    shard = sharded / shards_of(sharded)[1]
    shard.unlink()
    (sharded / "x").mkdir()
    shard.symlink_to(to.format(root=sharded.parent))
    message = "names a shard outside its own directory: model-00002-of-00003.safetensors is a link"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded)


def test_a_link_to_a_directory_outside_is_refused(sharded: Path) -> None:
    elsewhere = sharded.parent / "elsewhere"
    elsewhere.mkdir()
    name = shards_of(sharded)[0]
    (sharded / name).rename(elsewhere / name)
    (sharded / "sub").symlink_to(elsewhere)
    index = json.loads((sharded / SAFETENSORS_INDEX).read_text())
    places = index["weight_map"].items()
    index["weight_map"] = {k: f"sub/{v}" if v == name else v for k, v in places}
    (sharded / SAFETENSORS_INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"outside its own directory: sub/{name} is a link"):
        open_checkpoint(sharded)
    (sharded / "sub").unlink()
    elsewhere.rename(sharded / "sub")
    assert read_tensor_table(sharded).keys() == opened("llama").tensors.keys()


def test_links_within_the_checkpoint_are_followed(sharded: Path) -> None:
    name = shards_of(sharded)[0]
    (sharded / "blob").write_bytes((sharded / name).read_bytes())
    (sharded / name).unlink()
    (sharded / name).symlink_to("blob")
    link = sharded.parent / "link"
    link.symlink_to(sharded)
    for place in (sharded, link):
        assert read_tensor_table(place).keys() == opened("llama").tensors.keys()


def test_links_in_a_circle_are_a_shard_that_is_not_there(sharded: Path) -> None:
    name = shards_of(sharded)[0]
    (sharded / name).unlink()
    (sharded / name).symlink_to(name)
    with pytest.raises(CheckpointError, match=f"names the shard {name}, which is not there"):
        open_checkpoint(sharded)


def test_the_cache_of_the_hub_is_a_checkpoint(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its snapshots are links to blobs beside them; such as lead further are refused."""
    cache = fill_cache(tmp_path / "cache", "acme/tiny", {"main": sharded}, monkeypatch)
    snapshot = cache / "snapshots" / commit_of(sharded)
    link = snapshot / shards_of(sharded)[0]
    assert link.is_symlink() and os.readlink(link).startswith("../../blobs/")
    for source in ("acme/tiny", str(snapshot)):
        assert open_checkpoint(source).tensors.keys() == opened("llama").tensors.keys()
    target = tmp_path / "short"
    shortllm.prune("acme/tiny", [1], target)
    assert not any(path.is_symlink() for path in target.iterdir())
    link.unlink()
    link.symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(CheckpointError, match="outside its own directory"):
        open_checkpoint("acme/tiny")


# ---- pickles


class Malice:
    """Unpickled without care, it makes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place,)


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    return tmp_path / "owned"


def test_the_pickle_would_do_harm(owned: Path) -> None:
    """What the tests below take for granted."""
    pickle.loads(pickle.dumps(Malice(owned)))
    assert owned.exists()


@pytest.fixture
def malicious(tmp_path: Path, owned: Path) -> Path:
    """A whole model with a tokenizer, whose `.bin` would make a file."""
    source = whole(tmp_path / "malicious")
    tensors: dict[str, Any] = load_file(source / SAFETENSORS)
    (source / SAFETENSORS).unlink()
    torch.save({**tensors, "x": Malice(owned)}, source / PICKLED)
    return source


def commands(model: Path, place: Path) -> dict[str, Callable[[], Any]]:
    """Every command that opens a model."""
    name, rows = str(model), str(text(place / "rows.jsonl"))
    ids = CalibrationOptions(data=rows, samples=2, length=16)
    measured = EvaluationOptions(data=[rows], length=16, max_segments=2, continuations=0)
    recipe = shortllm.Recipe(
        model=name, calibration=ids, evaluation=measured, budget=shortllm.Budget(remove=1)
    )
    return {
        "info": lambda: shortllm.info(name, probe=False),
        "score": lambda: shortllm.score(name, calibration=ids),
        "score by weights": lambda: shortllm.score(name, criterion="magnitude"),
        "prune": lambda: shortllm.prune(name, [1], place / "out"),
        "prune unverified": lambda: shortllm.prune(name, [1], place / "out", verify=False),
        "eval": lambda: shortllm.evaluate([name], options=measured),
        "run": lambda: pipeline.run(recipe=recipe, out=place / "out"),
        "heal": lambda: shortllm.heal(name, place / "out", data=rows),
        "merge": lambda: shortllm.merge(name, place / "out", data=rows, samples=2, length=16),
        "width": lambda: shortllm.width(
            name, place / "out", options=shortllm.WidthOptions(ratio=0.5, importance="l1")
        ),
        "drop-sublayers": lambda: shortllm.drop_sublayers(
            name, place / "out", options=shortllm.SublayerOptions(mlp=[1])
        ),
        "retrain": lambda: shortllm.retrain(name, place / "out", options=options(data=rows)),
        "quantize": lambda: shortllm.quantize(name, place / "out"),
        "bench": lambda: shortllm.bench([name]),
        "draft": lambda: shortllm.draft(name, out=place / "out"),
        "load": lambda: shortllm.load(name),
        "export-lint": lambda: shortllm.export_lint(name),
        "compare-criteria": lambda: shortllm.compare_criteria(name, out=place / "out"),
    }


def test_no_command_runs_a_malicious_pickle(malicious: Path, owned: Path, tmp_path: Path) -> None:
    for name, command in commands(malicious, tmp_path).items():
        with pytest.raises(CheckpointError, match="refused, since loading it could run code"):
            command()
        assert not owned.exists(), name
        assert not (tmp_path / "out").exists(), name


def test_nor_one_among_shards(malicious: Path, owned: Path) -> None:
    name = "pytorch_model-00001-of-00001.bin"
    (malicious / PICKLED).rename(malicious / name)
    index = {"weight_map": {key: name for key in opened("llama").tensors}}
    (malicious / PICKLED_INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="refused, since loading it could run code"):
        open_checkpoint(malicious)
    assert not owned.exists()


def test_a_safetensors_index_names_no_pickle(malicious: Path, owned: Path) -> None:
    index = {"weight_map": {key: PICKLED for key in opened("llama").tensors}}
    (malicious / SAFETENSORS_INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names the shard 'pytorch_model.bin', which is no"):
        open_checkpoint(malicious)
    assert not owned.exists()


def test_a_pickle_that_repeats_its_memory_is_refused(tmp_path: Path) -> None:
    """A few bytes that stand for a terabyte."""
    source = shutil.copytree(saved("llama"), tmp_path / "source")
    (source / SAFETENSORS).unlink()
    torch.save({"x": torch.ones(1).expand(2**38)}, source / PICKLED)
    with pytest.raises(CheckpointError, match="is not a plain table of tensors"):
        open_checkpoint(source)


def test_token_ids_are_never_unpickled(tmp_path: Path, owned: Path) -> None:
    for name in ("calibration.safetensors", "ids.json", "ids.pt"):
        torch.save({"ids": Malice(owned)}, tmp_path / name)
        with pytest.raises(DataError):
            shortllm.score("embedded", calibration=CalibrationOptions(file=tmp_path / name))
    assert not owned.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_checkpoint_with_an_adapter_beside_it_is_refused(
    name: str, tmp_path: Path, owned: Path
) -> None:
    """transformers would load the model that it names, and lay it over that."""
    source = shutil.copytree(saved("llama"), tmp_path / "source")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(saved("qwen2"))}
    (source / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"x": Malice(owned)}, source / name)
    with pytest.raises(CheckpointError, match="has an adapter .adapter_config.json., which"):
        open_checkpoint(source)
    assert not owned.exists()


# ---- what an interrupted training leaves


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Any]:
    """A training that was stopped after its last state: model, target, options."""
    short, target = shortened(tmp_path), tmp_path / "retrained"
    chosen = options(data=str(text(tmp_path / "rows.jsonl")))

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trainer.ObjectiveTrainer, "load_best", stop)
        with pytest.raises(KeyboardInterrupt):
            shortllm.retrain(str(short), target, options=chosen, device="cpu")
    return short, target, chosen


def newest(target: Path) -> Path:
    state = trainer.last_state(target.with_name("retrained.training.partial") / "states")
    assert state is not None
    return state


def test_the_state_that_was_left_is_sound(interrupted: tuple[Path, Path, Any]) -> None:
    short, target, chosen = interrupted
    trainer.require_loadable(newest(target))
    assert shortllm.retrain(str(short), target, options=chosen, device="cpu").steps == 6


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin"]
)
def test_a_malicious_state_of_a_training_is_refused(
    name: str, interrupted: tuple[Path, Path, Any], owned: Path
) -> None:
    short, target, chosen = interrupted
    torch.save({"state": Malice(owned)}, newest(target) / name)
    with pytest.raises(CheckpointError, match=f"{name} contains more than .* it could run code"):
        shortllm.retrain(str(short), target, options=chosen, device="cpu")
    assert not owned.exists() and not target.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json"])
def test_a_damaged_state_of_a_training_says_what_to_delete(
    name: str, interrupted: tuple[Path, Path, Any]
) -> None:
    short, target, chosen = interrupted
    state = newest(target)
    os.truncate(state / name, 100)
    with pytest.raises(CheckpointError, match=f"{name} is damaged. Delete {state} to resume from"):
        shortllm.retrain(str(short), target, options=chosen, device="cpu")
    shutil.rmtree(state)
    assert shortllm.retrain(str(short), target, options=chosen, device="cpu").steps == 6


# ---- Python code that comes with a checkpoint

CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({ran!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model of a type of its own, with its code, that notes that it was run."""
    source = whole(tmp_path / "own")
    config = json.loads((source / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (source / "config.json").write_text(json.dumps(config))
    (source / "own.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    for module in ("dynamic_module_utils", "utils.hub"):
        monkeypatch.setattr(f"transformers.{module}.HF_MODULES_CACHE", str(tmp_path / "code"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("builtins.input", lambda question="": "y")  # transformers would ask
    return source


def test_no_command_runs_the_code_of_a_checkpoint_unasked(
    own: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, command in commands(own, tmp_path).items():
        with pytest.raises(UnsupportedModelError, match="was not run.*with --trust-remote-code"):
            command()
        assert not (tmp_path / "ran").exists(), name
    code, _, error = call(capfd, "info", own)
    assert code == 2 and "comes with Python code of its own (own.py)" in error
    assert "\n" not in error.strip() and not (tmp_path / "ran").exists()


def test_with_the_flag_every_stage_works(
    own: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = str(text(tmp_path / "rows.jsonl"))
    short, retrained, run = tmp_path / "short", tmp_path / "retrained", tmp_path / "run"
    flag = "--trust-remote-code"
    common = ("--samples", "2", "--length", "16", "--data", rows, flag)
    measured = ("--length", "16", "--max-segments", "2", "--data", rows, flag)
    for arguments in (
        ("info", str(own), "--no-probe", flag),
        ("score", str(own), *common, "--out", str(run)),
        ("score", str(own), "--criterion", "taylor", "--stream", *common, "--out", str(run) + "2"),
        ("plan", str(run), "--remove", "2"),
        ("prune", str(own), "--plan", str(run), "--out", str(short), flag),
        ("eval", str(own), str(short), *measured),
        ("export-lint", str(short), flag),
    ):
        code, _, error = call(capfd, *arguments)
        assert code == 0, (arguments, error)
    assert (tmp_path / "ran").exists()
    assert (short / "own.py").read_text() == (own / "own.py").read_text()
    with pytest.raises(UnsupportedModelError, match="--trust-remote-code"):
        open_checkpoint(short)  # one command's flag says nothing of the next
    with trusting_remote_code():
        assert open_checkpoint(short).block_count == 4
        quick = options(data=rows, method="lora")
        shortllm.retrain(str(short), retrained, options=quick, device="cpu")
        assert type(shortllm.load(retrained)).__name__ == "OwnModel"
    model = AutoModelForCausalLM.from_pretrained(retrained, trust_remote_code=True)
    assert model.config.num_hidden_layers == 4 and (retrained / "own.py").exists()
    with pytest.raises(UnsupportedModelError, match="--trust-remote-code"):
        shortllm.shorten(model, blocks=2)
    shorter = shortllm.shorten(model, blocks=2, trust_remote_code=True)
    assert type(shorter).__name__ == "OwnModel" and shorter.config.num_hidden_layers == 3


def test_a_whole_run_with_the_flag(
    own: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = str(text(tmp_path / "rows.jsonl"))
    code, _, error = call(
        capfd, "run", str(own), "--trust-remote-code", "--data", rows, "--samples", "2",
        "--length", "16", "--eval-length", "16", "--max-segments", "2",
        "--continuations", "1", "--new-tokens", "4",
        "--remove", "2", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert code == 0, error
    assert (tmp_path / "run" / "pruned" / "own.py").exists()


@pytest.mark.parametrize(
    "auto_map, message",
    [
        ({"AutoConfig": "own.OwnConfig"}, "must name classes .* AutoModelForCausalLM"),
        (["own"], "must name classes for"),
        (
            {"AutoConfig": "other/repo--own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
            "names code of another repository .other/repo--own., which no revision pins",
        ),
        (
            {"AutoConfig": "../own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
            "names code of another repository",
        ),
        (
            {"AutoConfig": "gone.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
            "names the code gone.py, which is missing",
        ),
    ],
)
def test_code_that_is_not_in_the_checkpoint(auto_map: Any, message: str, own: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    with trusting_remote_code(), pytest.raises(ShortLLMError, match=message):
        open_checkpoint(own)


def test_types_that_transformers_knows_are_never_loaded_by_other_code(
    own: Path, tmp_path: Path
) -> None:
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(
        json.dumps({**config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    with trusting_remote_code():
        assert open_checkpoint(own).block_count == 6
        shortllm.prune(str(own), [1], tmp_path / "short")
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_with_code_names_the_flag(tmp_path: Path) -> None:
    source = whole(tmp_path / "source")
    file = source / "tokenizer_config.json"
    content = {**json.loads(file.read_text()), "tokenizer_class": "OwnTokenizer"}
    content["auto_map"] = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    file.write_text(json.dumps(content))
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (source / "own.py").write_text(code)
    rows = CalibrationOptions(data=str(text(tmp_path / "rows.jsonl")), samples=2, length=16)
    with pytest.raises(CheckpointError, match="tokenizer .* Python code.*--trust-remote-code"):
        shortllm.score(str(source), calibration=rows)
    assert not (tmp_path / "ran").exists()
