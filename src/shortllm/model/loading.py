"""Load a checkpoint into memory; every difference between its files and the model is an error."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import nn

from shortllm.calls import accepts
from shortllm.checkpoint.config import is_own_code, model_classes, text_config
from shortllm.checkpoint.hub import ModelSource
from shortllm.checkpoint.source import BlockNames, Checkpoint, open_checkpoint, token_ids
from shortllm.checkpoint.structure import auto_class, build_empty
from shortllm.checkpoint.tensors import is_packed
from shortllm.errors import CheckpointError, ShortLLMError
from shortllm.runtime import available_memory, choose_dtype, quiet_transformers

MEMORY_PER_WEIGHTS = 1.15
"""Memory that a model takes, as a multiple of its weights."""

TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Code in a tensor table -> type that models compute in."""

NOT_ITS_CONFIG = "Is its config.json the one that these weights were saved with?"

TEXT_MODEL = """The files are whole, but without {parts}. Take the text model out, copy the \
tokenizer's files, and give TEXT-MODEL instead:

    from transformers import {loaders}
    model = {loader}.from_pretrained({id!r})
    text = AutoModelForCausalLM.from_config(model.config.get_text_config(), dtype=model.dtype)
    setattr(text, text.base_model_prefix, model.get_decoder())
    text.set_output_embeddings(model.get_output_embeddings())
    text.save_pretrained("TEXT-MODEL")"""
"""What to do with a model of text and images without its part for images."""

PROBE_TOKENS = 8
"""Tokens of the forward pass that tries a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The memory that a model needs, and what is free."""

    device: str
    needed: int
    """Bytes of its weights and activations."""
    free: int | None
    """None where the device does not say; then the model is assumed to fit."""

    @property
    def suffices(self) -> bool:
        """Whether the whole model fits."""
        return self.free is None or self.needed <= self.free

    def __str__(self) -> str:
        free = "an unknown amount" if self.free is None else f"{self.free / 2**30:.1f} GiB"
        return f"{self.needed / 2**30:.1f} GiB of memory needed on {self.device}, {free} free"


def room_for(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> Room:
    """The memory that a checkpoint's model needs, and what is free now."""
    needed = round(checkpoint.parameters * dtype.itemsize * MEMORY_PER_WEIGHTS)
    return Room(device=str(device), needed=needed, free=available_memory(device))


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating type most of the checkpoint's elements are in; packed ones say nothing."""
    elements: Counter[str] = Counter()
    for entry in checkpoint.tensors.values():
        elements[entry.dtype] += entry.elements
    return max(TYPES.items(), key=lambda item: elements[item[0]])[1]


def load_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: str = "auto",
    in_4bit: bool = False,
) -> nn.Module:
    """The causal language model of a checkpoint, in evaluation mode, its weights finite.

    With `in_4bit`, bitsandbytes quantizes its projections while they are loaded.
    """
    compute = choose_dtype(dtype, device, stored_dtype(checkpoint))
    _require_described(checkpoint)
    how: dict[str, Any] = {}
    if in_4bit:
        how = {"quantization_config": _nf4(compute), "device_map": {"": device}}
    else:
        _require_memory(checkpoint, device, compute)
    packed = is_packed(checkpoint.raw_config)
    # compressed-tensors shows progress bars for checkpoints in its format
    bars = redirect_stderr(io.StringIO()) if packed else nullcontext()
    with quiet_transformers(), bars:
        trusted = is_own_code(checkpoint.config)
        model = _from_pretrained(checkpoint, dtype=compute, trust_remote_code=trusted, **how)
    if packed:
        with bars, torch.no_grad():  # the first forward pass unpacks the weights
            model(input_ids=torch.zeros((1, 1), dtype=torch.int64), use_cache=False)
    for key, tensor in model.named_parameters():
        require_finite_tensor(checkpoint.id, key, tensor)
    for name, number in token_ids(checkpoint.special_tokens).items():
        setattr(model.config, name, number)
        setattr(model.generation_config, name, number)
    return model.to(device).eval()  # type: ignore[no-any-return]


def use_attention(checkpoint: Checkpoint, model: Any, attention: str) -> None:
    """Let a model on its device compute attention by this implementation."""
    try:
        with quiet_transformers():
            model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise ShortLLMError(
            f"{checkpoint.id} cannot use --attn {attention}: {str(error).splitlines()[0]}"
        ) from error
    if model.config._attn_implementation != attention:
        raise ShortLLMError(
            f"{checkpoint.id} has one attention implementation of its own. Leave out --attn"
        )


def _nf4(compute: torch.dtype) -> Any:
    """The 4-bit type of QLoRA, computed in `compute` (arXiv:2305.14314)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


@torch.no_grad()
def require_runs(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuse a model whose own forward pass fails: the values in its config do not fit together."""
    ids_BT = torch.arange(PROBE_TOKENS, device=next(model.parameters()).device)[None]
    ids_BT %= checkpoint.vocabulary
    try:
        model(input_ids=ids_BT, use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # model classes raise whatever a config's values lead to
        raise CheckpointError(
            f"{checkpoint.id} cannot be run: {str(error) or type(error).__name__}. Are the values "
            f"in its config.json those of the model type '{checkpoint.model_type}'?"
        ) from error


@accepts()
def load(source: ModelSource, *, revision: str | None = None, **kwargs: Any) -> Any:
    """A causal language model, as `AutoModelForCausalLM.from_pretrained` returns it.

    Also loads checkpoints with a shape per block, which transformers cannot build, and refuses
    tensors that are missing, unexpected or of another shape.

    Args:
        source: a checkpoint directory, a Hub id, `embedded`, or a loaded model.
        revision: branch, tag or commit of a Hub id.
        kwargs: of `from_pretrained`, e.g. `dtype` or `device_map`.
    Returns:
        The model, of the class that transformers has for its type.
    Raises:
        CheckpointError: not a checkpoint, or one whose tensors do not fit the model.
    """
    checkpoint = open_checkpoint(source, revision=revision)
    _require_described(checkpoint)
    return _from_pretrained(checkpoint, **kwargs)


def _from_pretrained(checkpoint: Checkpoint, **kwargs: Any) -> Any:
    """The model that transformers loads, if all of its tensors are those of the checkpoint."""
    try:
        model, loading = auto_class(checkpoint.config).from_pretrained(
            checkpoint.directory,
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # an error below, naming the tensor
            **kwargs,
        )
    except CheckpointError:
        raise
    except Exception as error:  # model classes raise whatever a config's values lead to
        raise CheckpointError(f"transformers cannot load {checkpoint.id}: {error}") from error
    check_loading(checkpoint, loading)
    return model


def check_loading(checkpoint: Checkpoint, loading: Mapping[str, Any]) -> None:
    """Refuse every difference of tensors; transformers would continue with random ones.

    Prediction heads may be stored too. Some classes ignore them only under the block numbers of one
    published model, and others not at all.
    """
    missing, unexpected, mismatched = (
        sorted(loading.get(f"{kind}_keys") or (), key=str)
        for kind in ("missing", "unexpected", "mismatched")
    )
    built = BlockNames(checkpoint.structure.name, checkpoint.block_count)
    unexpected = [
        key for key in unexpected if not (built.is_head(key) or checkpoint.block_names.is_head(key))
    ]
    for found, problem in (
        (missing, "is missing"),
        (unexpected, "is not part of the model"),
        (mismatched, "is stored as {}, but its config.json describes {}"),
    ):
        if found:
            tensor, *shapes = found[0] if isinstance(found[0], tuple) else (found[0],)
            more = f" ({len(found)} such tensors)" if len(found) > 1 else ""
            said = problem.format(*(list(shape) for shape in shapes))
            advice = _without(checkpoint, found) if found is missing else NOT_ITS_CONFIG
            raise CheckpointError(f"{checkpoint.id}: tensor '{tensor}' {said}{more}. {advice}")


def require_complete(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that lacks tensors of its model; reads no data."""
    built, missing, unexpected = _compared(checkpoint)
    if getattr(checkpoint.config, "quantization_config", None) is not None:
        # quantized weights have other names in the same modules, or next to where they belong in
        # modules that transformers renames by the names of weights
        within = {part for name in unexpected for part in accumulate(name.split("."), _joined)}
        renamed = {_module(name) for name in unexpected} - {_module(name) for name in built}
        within |= {f"{_module(one)}.*" for one in renamed}
        missing = {
            key
            for key in missing
            if not within.intersection((_module(key), f"{_module(_module(key))}.*"))
        }
    check_loading(checkpoint, {"missing_keys": missing})


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _joined(module: str, name: str) -> str:
    return f"{module}.{name}"


def _part(key: str) -> str:
    """The part of the model that a tensor belongs to, e.g. `vision_tower`."""
    return key.removeprefix("model.").partition(".")[0]


def _compared(checkpoint: Checkpoint) -> tuple[set[str], set[str], set[str]]:
    """The tensors of a model, those that transformers would give random values, and the stored ones
    that are not of the model.

    It puts what is stored into the model, since it knows the names on disk, but on the meta device.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model

    meta, model = torch.device("meta"), cast(Any, build_empty(copy.deepcopy(checkpoint.config)))
    tensors = {
        name: torch.empty(entry.shape, dtype=TYPES.get(entry.dtype), device=meta)
        for name, entry in checkpoint.tensors.items()
    }
    with quiet_transformers():
        how = load_config(model, meta, model.dtype)
        for one in how.weight_mapping:
            if getattr(one, "force_cpu", False):  # only huge ones are so, and here nothing is large
                one.force_cpu = False
        found, _ = convert_and_load_state_dict_in_model(model, tensors, how, None)
        model.mark_tied_weights_as_initialized(found)
        model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
        unexpected = set(found.unexpected_keys)
        model._adjust_missing_and_unexpected_keys(found)
    return set(model.state_dict()), set(found.missing_keys), unexpected


def load_config(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """How transformers is to load stored tensors into this model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    return LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
    )


def _without(checkpoint: Checkpoint, missing: Sequence[str]) -> str:
    """What to do about tensors that no file of a checkpoint has."""
    model: Any = build_empty(checkpoint.config)
    tensors = model.state_dict(keep_vars=True)
    parts = (model.get_decoder(), model.get_output_embeddings())
    of_text = {
        id(one)
        for part in parts
        if part is not None
        for one in part.state_dict(keep_vars=True).values()
    }
    is_text_model = text_config(checkpoint.config) is checkpoint.config
    if is_text_model or any(id(tensors[key]) in of_text for key in missing):
        return (
            "The files are whole, so the model was saved without it, or config.json is another "
            "model's. Save the whole model again with transformers' save_pretrained"
        )
    there = set(map(_part, tensors.keys() - set(missing)))
    towers = dict.fromkeys(map(_part, missing))
    left_out = " and ".join(f"parts of {one}" if one in there else one for one in towers)
    text_type = text_config(checkpoint.config).model_type
    if not model_classes(text_type)[0]:
        return (
            f"The files are whole, but without {left_out}, and transformers has no class for the "
            f"text model '{text_type}' alone. Give a model that has them"
        )
    loader = auto_class(checkpoint.config).__name__
    loaders = ", ".join(sorted({"AutoModelForCausalLM", loader}))
    return TEXT_MODEL.format(
        parts=left_out, loaders=loaders, loader=loader, id=str(checkpoint.directory)
    )


def require_finite_tensor(name: str, key: str, tensor: torch.Tensor) -> None:
    """Refuse the tensor `key` of model `name` if it contains NaN or infinite values."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # one pass and no copies, as the mask of finite values would need; NaN goes through
    lowest, highest = torch.aminmax(tensor)
    if not (lowest.isfinite() and highest.isfinite()):
        raise CheckpointError(
            f"{name}: tensor '{key}' contains NaN or infinite values; scores would mean nothing"
        )


def _require_described(checkpoint: Checkpoint) -> None:
    """Refuse a config of a far larger model than is stored, before memory is allocated."""
    described, stored = checkpoint.structure.parameters, checkpoint.parameters
    if "quantization_config" in checkpoint.raw_config or described <= 2 * stored:
        return
    require_complete(checkpoint)
    raise CheckpointError(
        f"config.json of {checkpoint.id} describes a model of {described:,} parameters, but its "
        f"files contain {stored:,}. Download both again"
    )


def _require_memory(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """The weights alone must fit into what is free."""
    needed = checkpoint.parameters * dtype.itemsize
    free = available_memory(device)
    if free is not None and needed > free:
        smaller = " Try --dtype bfloat16" if dtype == torch.float32 else ""
        raise ShortLLMError(
            f"{checkpoint.id} needs {needed / 2**30:.1f} GiB as "
            f"{str(dtype).removeprefix('torch.')} on {device}, "
            f"{free / 2**30:.1f} GiB are free.{smaller}"
        )
