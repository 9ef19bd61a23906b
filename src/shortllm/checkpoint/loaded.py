"""Models that the caller has loaded, as checkpoints that stages can open.

A loaded model goes by a name made of its class, what it was loaded from, and its blocks:

    LlamaForCausalLM(HuggingFaceTB/SmolLM2-135M, 30 blocks)

When it is opened under that name, it is saved with its tokenizer into a temporary directory, and
from there it is a checkpoint like any other. It is saved again only if its content has changed
since. The directory is deleted with the model, or when Python ends.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from shortllm.calls import described
from shortllm.checkpoint.config import block_count
from shortllm.checkpoint.tensors import write_json
from shortllm.errors import CheckpointError, ShortLLMError, first_line_of
from shortllm.files import require_writable, translate_os_errors
from shortllm.runtime import is_trusted, quiet_transformers

ELSEWHERE = "set TMPDIR to another directory"
"""The hint where temporary files cannot be written."""

INSIDE = {
    "merge_and_unload": "merge its adapters, and give model.merge_and_unload()",
    "_orig_mod": "give the model before torch.compile: model._orig_mod",
    "module": "give the model within it: model.module",
    "model": "give the model within it: its attribute 'model'",
}
"""Attribute of what is often taken for a model -> how to get the model."""


@dataclass(slots=True, eq=False)
class _Loaded:
    """A loaded model, and where it was saved."""

    name: str
    model: weakref.ref[Any]
    tokenizer: Any = None
    directory: Path | None = None
    content: str = ""
    """sha256 of what was saved there."""


_LOADED: dict[str, _Loaded] = {}
"""Every loaded model that a function was called with and that is still there, by its name."""


def is_loaded_model(given: Any) -> bool:
    """Whether something is a model of transformers in memory."""
    transformers = sys.modules.get("transformers")  # without it there is none
    return transformers is not None and isinstance(given, transformers.PreTrainedModel)


def name_of(model: Any, tokenizer: Any = None) -> str:
    """The name that a loaded model goes by, under which `directory_of` finds it."""
    start = _start_of_name(model)
    names = chain([f"{start})"], (f"{start}, number {n})" for n in count(2)))
    name = next(name for name in names if model_called(name) in (None, model))
    if model_called(name) is None:
        held = _LOADED[name] = _Loaded(name, weakref.ref(model))
        weakref.finalize(model, _forget, held)
    if tokenizer is not None:
        _LOADED[name].tokenizer = _tokenizer(tokenizer)
    return name


def is_name(source: str) -> bool:
    """Whether this is the name of a loaded model."""
    return re.fullmatch(r"\w+\(.*\d blocks(, number \d+)?\)", source) is not None


def model_called(name: str) -> Any:
    """The loaded model of that name; None if there is none."""
    held = _LOADED.get(name)
    return held.model() if held is not None else None


def directory_of(name: str) -> Path | None:
    """The directory of a loaded model, saved as it is now; None if no model has the name."""
    model = model_called(name)
    if model is None:
        return None
    held = _LOADED[name]
    content = _content(name, model)
    if held.directory is None or held.content != content or not held.directory.is_dir():
        _delete(held)
        held.directory = _saved(name, model)
        held.content = content
    if held.tokenizer is None:
        held.tokenizer = _tokenizer_of(model)
    if held.tokenizer is not None:
        with _saving("the tokenizer of " + name):
            held.tokenizer.save_pretrained(held.directory)
    return held.directory


def refuse(given: Any) -> TypeError:
    """The error for something else than a model."""
    kinds = "a checkpoint directory, a Hub id or a loaded model of transformers"
    if isinstance(given, type):
        how = f"give an instance: {given.__name__}.from_pretrained(...)"
        return TypeError(f"a model is {kinds}, and {given.__name__} is a class; {how}")
    if hasattr(given, "convert_ids_to_tokens"):
        how = "give the model, and this as tokenizer="
    else:
        how = next((how for name, how in INSIDE.items() if _has(given, name)), "")
    return TypeError(f"a model is {kinds}, not {described(given)}" + (f"; {how}" if how else ""))


def require_in_memory(name: str, model: Any) -> None:
    """Refuse a loaded model some of whose weights are elsewhere."""
    for key, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise CheckpointError(
                f"{name} has weights that are not in memory ('{key}' is offloaded, or was never "
                "loaded). Give the directory or Hub id that it was loaded from"
            )


def refuse_adapters(name: str, model: Any) -> None:
    """Refuse a loaded model with adapters that transformers added."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise CheckpointError(
            f"{name} has adapters. Merge them into it first: open it as a peft.PeftModel, and give "
            "model.merge_and_unload()"
        )


def save_configs(name: str, directory: Path) -> None:
    """Write what the files of a loaded model say besides its weights."""
    model = model_called(name)
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    with _saving(name):
        config.save_pretrained(directory)
        generation = json.loads(model.generation_config.to_json_string())
    write_json(directory / "generation_config.json", generation)


def _has(given: Any, name: str) -> bool:
    return getattr(given, name, None) is not None


def _start_of_name(model: Any) -> str:
    """The name of a loaded model without its end."""
    place = str(model.name_or_path or "")
    if Path(place).exists() or place.count("/") > 1 or place.startswith((".", "/", "~")):
        place = Path(place).name  # a directory of this machine
    blocks = block_count(model.config)
    return f"{type(model).__name__}({place}{', ' if place else ''}{blocks} blocks"


def _content(name: str, model: Any) -> str:
    """sha256 of config and weights."""
    import torch

    digest = hashlib.sha256(
        repr((model.config, getattr(model, "generation_config", None))).encode()
    )
    require_in_memory(name, model)
    for key, tensor in model.state_dict().items():
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _saved(name: str, model: Any) -> Path:
    """A new temporary directory with the model; saving changes nothing of it."""
    refuse_adapters(name, model)
    place = Path(tempfile.gettempdir())
    require_writable(place, model.get_memory_footprint(), hint=ELSEWHERE)
    before = {key: getattr(model.config, key, None) for key in ("architectures", "dtype")}
    with _saving(name):
        directory = Path(tempfile.mkdtemp(prefix="shortllm-"))
        try:
            model.save_pretrained(directory)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        finally:
            for key, value in before.items():
                setattr(model.config, key, value)
    return directory


@contextmanager
def _saving(what: str) -> Iterator[None]:
    """Turn errors of transformers while it saves something into a CheckpointError."""
    place = Path(tempfile.gettempdir())
    try:
        with quiet_transformers(), translate_os_errors(place, hint=ELSEWHERE):
            yield
    except ShortLLMError:
        raise
    except Exception as error:  # model classes raise whatever their values lead to
        raise CheckpointError(
            f"{what} cannot be saved ({first_line_of(error)}). Correct that, or give the directory "
            "or Hub id that it was loaded from"
        ) from error


def _tokenizer(given: Any) -> Any:
    """The tokenizer that was given, itself or as the name or directory of one."""
    if isinstance(given, (str, Path)):
        return _read_tokenizer(str(given))
    inner = getattr(given, "tokenizer", given)  # of a processor
    if isinstance(given, type) or not hasattr(inner, "convert_ids_to_tokens"):
        raise TypeError(
            "tokenizer= is a tokenizer of transformers, or the directory or Hub id of one, not "
            f"{described(given)}"
        )
    return given


def _read_tokenizer(place: str, **how: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(place, trust_remote_code=is_trusted(), **how)
    except Exception as error:  # tokenizers raise whatever the values in their files lead to
        raise CheckpointError(
            f"there is no tokenizer in '{place}' that transformers can load "
            f"({first_line_of(error)}). Give tokenizer= another one"
        ) from error


def _tokenizer_of(model: Any) -> Any:
    """The tokenizer where the model was loaded from, if that is on this machine; else None."""
    try:
        return _read_tokenizer(str(model.name_or_path), local_files_only=True)
    except CheckpointError:
        return None


def _delete(held: _Loaded) -> None:
    if held.directory is not None:
        shutil.rmtree(held.directory, ignore_errors=True)


def _forget(held: _Loaded) -> None:
    """Delete what was saved of a model that is gone."""
    _delete(held)
    if _LOADED.get(held.name) is held:
        del _LOADED[held.name]
