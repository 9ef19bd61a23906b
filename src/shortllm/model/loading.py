"""Load a checkpoint into memory; anything suspicious is an error, never a guess."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shortllm.checkpoint.config import auto_class, is_own_code, text_config
from shortllm.checkpoint.source import Checkpoint, open_checkpoint, token_ids
from shortllm.checkpoint.tensors import is_packed
from shortllm.errors import CheckpointError, ShortLLMError
from shortllm.model.blocks import build_empty
from shortllm.runtime import available_memory, choose_dtype

log = logging.getLogger(__name__)

ROOM_BESIDE_WEIGHTS = 1.15
"""Free memory that a model in memory takes, as a multiple of its weights."""


PROBE_TOKENS = 8
"""Tokens of the forward by which a model is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a model in memory takes, and what there is."""

    device: str
    needed: int
    """Bytes of its weights, and some beside them."""
    free: int | None
    """None where the device does not say; the model is taken to fit there."""

    @property
    def suffices(self) -> bool:
        """Whether all blocks are to be in memory, unless something else is asked for."""
        return self.free is None or self.needed <= self.free

    def __str__(self) -> str:
        free = "an unknown amount" if self.free is None else f"{self.free / 2**30:.1f} GiB"
        return f"{self.needed / 2**30:.1f} GiB of memory needed on {self.device}, {free} free"


def room_for(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> Room:
    """Whether a checkpoint's model fits into what is free now."""
    return Room(
        device=str(device),
        needed=round(checkpoint.parameters * dtype.itemsize * ROOM_BESIDE_WEIGHTS),
        free=available_memory(device),
    )


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating type most of the checkpoint's elements are in; packed ones say nothing."""
    types = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }
    elements: dict[str, int] = {}
    for entry in checkpoint.tensors.values():
        if entry.dtype in types:
            elements[entry.dtype] = elements.get(entry.dtype, 0) + entry.elements
    if not elements:
        return torch.bfloat16
    return types[max(elements, key=lambda code: elements[code])]


def load_model(checkpoint: Checkpoint, *, device: torch.device, dtype: str = "auto") -> nn.Module:
    """The causal language model of a checkpoint, not training, its weights checked to be finite.

    Raises:
        CheckpointError: tensors missing, unexpected or misshapen (transformers would go on with
            random weights), or NaN or infinite weights, named.
        ShortLLMError: the weights do not fit into the free memory.
    """
    compute = choose_dtype(dtype, device, stored_dtype(checkpoint))
    _require_described(checkpoint)
    _require_memory(checkpoint, device, compute)
    try:
        with quiet_transformers(), quiet_bars(checkpoint):
            model, loading = auto_class(checkpoint.config).from_pretrained(
                checkpoint.directory,
                dtype=compute,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=is_own_code(checkpoint.config),
            )
    except Exception as error:  # whatever the values in a config lead to
        reason = _misshapen(checkpoint) or error
        raise CheckpointError(f"transformers cannot load {checkpoint.id}: {reason}") from error
    check_loading(checkpoint.id, loading)
    if is_packed(checkpoint.raw_config):
        with quiet_bars(checkpoint):
            unpack(model)
    check_finite(checkpoint.id, model)
    for name, number in token_ids(checkpoint.special_tokens).items():
        setattr(model.config, name, number)
        setattr(model.generation_config, name, number)
    return model.to(device).eval()  # type: ignore[no-any-return]


@torch.no_grad()
def require_runs(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuse a model whose own forward fails on a few tokens: its config does not fit together.

    Raises:
        CheckpointError: with what the model's class said.
    """
    count = int(text_config(checkpoint.config).vocab_size)
    ids_BT = torch.arange(PROBE_TOKENS, device=next(model.parameters()).device)[None] % count
    try:
        model(input_ids=ids_BT, use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the values in a config lead to
        raise CheckpointError(
            f"{checkpoint.id} cannot be run: {str(error) or type(error).__name__}. Are the values "
            f"in its config.json those of the model type '{checkpoint.model_type}'?"
        ) from error


def unpack(model: nn.Module) -> None:
    """Have compressed-tensors unpack the weights now: it does so at the first forward."""
    with torch.no_grad():
        model(input_ids=torch.zeros((1, 1), dtype=torch.int64), use_cache=False)


def load(source: str | Path, *, revision: str | None = None, **kwargs: Any) -> Any:
    """A causal language model, as `AutoModelForCausalLM.from_pretrained` gives it.

    Takes checkpoints with a shape per block too, which transformers cannot build, and refuses what
    it would go on with: tensors missing, unexpected or misshapen.

    Args:
        kwargs: of `from_pretrained`, e.g. `dtype` or `device_map`.
    Returns:
        The model, of the class that transformers has for its type.
    Raises:
        CheckpointError: no checkpoint, or one whose tensors do not fit the model.
    """
    checkpoint = open_checkpoint(source, revision=revision)
    _require_described(checkpoint)
    model, loading = auto_class(checkpoint.config).from_pretrained(
        checkpoint.directory, output_loading_info=True, local_files_only=True, **kwargs
    )
    check_loading(checkpoint.id, loading)
    return model


def check_loading(name: str, loading: dict[str, Any]) -> None:
    """Treat every difference between a checkpoint's tensors and the model's as an error.

    Raises:
        CheckpointError: naming the first tensor that is missing, unexpected or misshapen.
    """
    for kind, meaning in (
        ("missing_keys", "does not hold"),
        ("unexpected_keys", "holds, besides what the model has,"),
        ("mismatched_keys", "holds in another shape"),
    ):
        names = sorted(
            str(key[0] if isinstance(key, tuple) else key) for key in loading.get(kind) or ()
        )
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{name} {meaning} tensor '{names[0]}'{more}")


def check_finite(name: str, model: nn.Module) -> None:
    """Refuse NaN and infinite weights, naming the first tensor that holds one."""
    for key, tensor in model.named_parameters():
        require_finite_tensor(name, key, tensor)


def require_finite_tensor(name: str, key: str, tensor: torch.Tensor) -> None:
    """Refuse the tensor `key` of model `name` if it holds NaN or infinite values.

    Raises:
        CheckpointError: it does.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # one pass and no copies, as the mask of finite values would need; NaN goes through
    lowest, highest = torch.aminmax(tensor)
    if not (lowest.isfinite() and highest.isfinite()):
        raise CheckpointError(
            f"{name}: tensor '{key}' holds NaN or infinite values; its scores would mean nothing"
        )


def _require_described(checkpoint: Checkpoint) -> None:
    """The config must not describe a model far larger than what is stored: memory for all of it
    would be taken before the difference is found."""
    described, stored = checkpoint.structure.parameters, checkpoint.parameters
    if "quantization_config" in checkpoint.raw_config or described <= 2 * stored:
        return
    raise CheckpointError(
        f"config.json of {checkpoint.id} describes a model of {described:,} parameters, and its "
        f"files hold {stored:,}. Download both again"
    )


def _misshapen(checkpoint: Checkpoint) -> str | None:
    """What is said of the first tensor that has another shape than the config gives it, if any."""
    model = build_empty(checkpoint.config)
    for name, tensor in model.state_dict().items():
        entry = checkpoint.tensors.get(name)
        if entry is not None and entry.shape != tuple(tensor.shape):
            return (
                f"tensor '{name}' is stored as {list(entry.shape)}, and its config.json describes "
                f"{list(tensor.shape)}. Download both again"
            )
    return None


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


@contextmanager
def quiet_bars(checkpoint: Checkpoint) -> Iterator[None]:
    """No bars of compressed-tensors either, which shows some for checkpoints in its format."""
    if not is_packed(checkpoint.raw_config):
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bar and no advice from transformers: what matters is checked and raised here."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
