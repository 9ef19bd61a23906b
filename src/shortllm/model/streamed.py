"""A decoder whose blocks are read from the checkpoint's files when a walk comes to them.

Embeddings, final norm and head are in memory, and one block at a time, while a thread reads the
next one. So a model can be scored that fits neither in memory nor on the GPU.

    decoder = open_streamed(checkpoint, device=device, dtype=torch.bfloat16)
    for b in decoder.through([0, 1, 2]):
        stream = decoder.apply(b, stream, entry.calls[b])

transformers' own loader assigns stored tensors to parameters, since it knows every type's renamings
and merged experts; it gets the tensors of one block at a time. The functions called here are not
part of its public interface (checked with 5.15 to 5.24).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.structure import build_empty, find_blocks
from shortllm.checkpoint.tensors import TensorEntry, read_tensor
from shortllm.errors import CheckpointError, UnsupportedModelError
from shortllm.model.decoder import Decoder
from shortllm.model.loading import check_loading, load_config, require_finite_tensor
from shortllm.runtime import quiet_transformers

STAND_IN_STD = 0.02
"""Standard deviation of the random block weights with which only code is checked."""


def open_streamed(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> Decoder:
    """The decoder of a checkpoint with everything but its blocks in memory."""
    model = build_empty(copy.deepcopy(checkpoint.config), dtype=dtype)
    return Decoder(model, StreamedWeights(checkpoint, model, device=device, dtype=dtype))


class StreamedWeights:
    """The weights of a model that is built on the meta device, block by block."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._id = checkpoint.id
        self._checkpoint = checkpoint
        self._model: Any = model
        self._prefix = find_blocks(model, model.config)[0] + "."
        self._device = device
        self._entries: dict[int | None, list[TensorEntry]] = {}
        for entry in checkpoint.tensors.values():
            if checkpoint.block_names.is_head(entry.name):
                continue
            block = checkpoint.block_names.block_of(entry.name)
            self._entries.setdefault(block, []).append(entry)
        self._empty: dict[str, Tensor] = {
            key: tensor
            for key, tensor in model.state_dict(keep_vars=True).items()
            if key.startswith(self._prefix)
        }
        """Parameters and stored buffers of the blocks, without memory."""
        if getattr(model.config, "quantization_config", None) is not None:
            raise UnsupportedModelError(
                "a quantized checkpoint cannot be read one block at a time. Score it in memory "
                "(--no-stream), or give the unquantized model"
            )
        self._refuse_shared_weights()
        self._loading = load_config(model, device, dtype)
        self._load_outside()

    def through(self, order: Sequence[int]) -> Iterator[int]:
        """The numbers of `order`, each while that block's weights are in the model."""
        with ThreadPoolExecutor(max_workers=1) as thread:
            ahead: Future[dict[str, Tensor]] | None = None
            for place, b in enumerate(order):
                tensors = ahead.result() if ahead is not None else self._read(b)
                following = order[place + 1 : place + 2]
                self._put(b, tensors)
                del tensors
                ahead = thread.submit(self._read, following[0]) if following else None
                try:
                    yield b
                finally:
                    self._take(f"{self._prefix}{b}.")

    @contextmanager
    def holding(self, blocks: Sequence[int]) -> Iterator[None]:
        """Within the context the weights of these blocks are in the model too."""
        for b in blocks:
            self._put(b, self._read(b))
        try:
            yield
        finally:
            for b in blocks:
                self._take(f"{self._prefix}{b}.")

    @contextmanager
    def stand_in(self) -> Iterator[None]:
        """Within the context all blocks have random weights, shared between those of one shape."""
        made: dict[tuple[torch.Size, torch.dtype, type[Tensor]], Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        for key, empty in self._empty.items():
            kind = (empty.shape, empty.dtype, type(empty))
            if kind not in made:
                value = torch.ones(empty.shape)  # numbers that something may be divided by
                if empty.is_floating_point():
                    value = STAND_IN_STD * torch.randn(empty.shape, generator=generator)
                value = value.to(self._device, empty.dtype)
                is_parameter = isinstance(empty, nn.Parameter)
                made[kind] = nn.Parameter(value, requires_grad=False) if is_parameter else value
            self._set(key, made[kind])
        try:
            yield
        finally:
            self._take(self._prefix)

    def _refuse_shared_weights(self) -> None:
        """Refuse weights of several blocks, which are stored in one of them alone."""
        tied = self._model.all_tied_weights_keys
        shared = next((key for key in tied if key.startswith(self._prefix)), None)
        if shared is not None:
            raise UnsupportedModelError(
                f"{self._id}: '{shared}' is a weight that several blocks share, so that they "
                "cannot be read one at a time. Score it in memory (--no-stream)"
            )

    def _load_outside(self) -> None:
        """Everything that is not in a block: tensors from the files, and computed buffers."""
        found = self._load(self._read(None))
        found.missing_keys = {key for key in found.missing_keys if not key.startswith(self._prefix)}
        for empty in self._empty.values():
            empty._is_hf_initialized = True  # type: ignore[attr-defined]  # nothing to draw
        self._model.mark_tied_weights_as_initialized(found)
        self._model._move_missing_keys_from_meta_to_device(set(), {"": self._device}, None, None)
        self._model._initialize_missing_keys(False)
        self._model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
        self._model._adjust_missing_and_unexpected_keys(found)
        self._check(found, found.missing_keys)

    def _put(self, b: int, tensors: dict[str, Tensor]) -> None:
        """Give block `b` its weights."""
        found = self._load(tensors)
        block = f"{self._prefix}{b}."
        self._model._adjust_missing_and_unexpected_keys(found)
        self._check(found, {key for key in found.missing_keys if key.startswith(block)})

    def _take(self, prefix: str) -> None:
        """Let go of the weights whose names begin with `prefix`."""
        for key, empty in self._empty.items():
            if key.startswith(prefix):
                self._set(key, empty)

    def _read(self, b: int | None) -> dict[str, Tensor]:
        """The stored tensors of a block, or of everything outside the blocks."""
        tensors = {}
        for entry in self._entries.get(b, ()):
            tensors[entry.name] = tensor = read_tensor(entry)
            require_finite_tensor(self._id, entry.name, tensor)
        return tensors

    def _load(self, tensors: dict[str, Tensor]) -> Any:
        """Let transformers put stored tensors into the model; returns what it says of them."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        with quiet_transformers():
            found, _ = convert_and_load_state_dict_in_model(
                self._model, tensors, copy.copy(self._loading), None
            )
        return found

    def _check(self, found: Any, missing: Iterable[str]) -> None:
        """Raise what `load_model` raises of a whole checkpoint."""
        if found.conversion_errors:
            name, reason = next(iter(found.conversion_errors.items()))
            raise CheckpointError(f"{self._id}: transformers cannot convert '{name}': {reason}")
        check_loading(self._checkpoint, {**vars(found), "missing_keys": missing})

    def _set(self, key: str, tensor: Tensor) -> None:
        owner, _, name = key.rpartition(".")
        setattr(self._model.get_submodule(owner), name, tensor)
