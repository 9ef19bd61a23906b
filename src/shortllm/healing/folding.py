"""A map folded into the weights of a projection, for the file and for a model in memory.

    x ─► W ─► M ─► T          becomes          x ─► Tᵀ W ─► M T

Shapes: D outputs of the projection.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.stored import require_stored, stored_name
from shortllm.checkpoint.tensors import read_tensor
from shortllm.errors import UnsupportedModelError
from shortllm.healing.projections import Added
from shortllm.model.decoder import Decoder


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """The new weights of one projection, as they are stored."""

    name: str
    """Of the projection within its block."""
    weight: Tensor
    bias: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """By their names within the block."""
        found = {f"{self.name}.weight": self.weight}
        return found if self.bias is None else found | {f"{self.name}.bias": self.bias}


def require_floats(checkpoint: Checkpoint, b: int, name: str) -> None:
    """Refuse a checkpoint that does not store the weights of a projection as floats of its own.

    Raises:
        UnsupportedModelError: naming the tensor.
    """
    entry = require_stored(checkpoint, b, name, so_that="nothing can be folded into them")
    if entry.dtype not in ("F64", "F32", "F16", "BF16"):
        raise UnsupportedModelError(
            f"{checkpoint.id} stores '{entry.name}' as {entry.dtype}, and nothing can be folded "
            "into quantized weights. Give the unquantized model"
        )


def fold(checkpoint: Checkpoint, b: int, added: Added, change_DD: Tensor) -> Fold:
    """The weights of a projection with the map `I + change_DD` behind it, in their stored type."""
    change_DD = change_DD.cpu()
    weight = read_tensor(checkpoint.tensors[stored_name(checkpoint, b, f"{added.name}.weight")])
    more = weight.double() @ change_DD if added.transposed else change_DD.T @ weight.double()
    entry = checkpoint.tensors.get(stored_name(checkpoint, b, f"{added.name}.bias"))
    bias = None
    if entry is not None:
        held = read_tensor(entry)
        bias = (held.double() + held.double() @ change_DD).to(held.dtype)
    return Fold(added.name, (weight.double() + more).to(weight.dtype), bias)


@contextmanager
def folded_into(decoder: Decoder, folds: Mapping[int, Fold]) -> Iterator[None]:
    """Within the context the decoder computes with other weights, in memory or streamed.

    Args:
        folds: for some blocks the new weights of one projection.
    """
    replaced: list[Any] = []
    try:
        for b, one in folds.items():
            module: Any = decoder.blocks[b].get_submodule(one.name)
            module.forward = _with_weights(module, one, decoder).forward
            replaced.append(module)
        yield
    finally:
        for module in replaced:
            module.__dict__.pop("forward", None)


def _with_weights(module: nn.Module, one: Fold, decoder: Decoder) -> nn.Module:
    """A projection of the same kind with other weights."""
    stand_in: Any = copy.deepcopy(module)

    def parameter(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.to(decoder.device, decoder.dtype), requires_grad=False)

    stand_in.weight = parameter(one.weight)
    if one.bias is not None:
        stand_in.bias = parameter(one.bias)
    return stand_in  # type: ignore[no-any-return]
