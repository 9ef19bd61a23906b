"""The experts of a block: what their output is proportional to, in memory and in the files.

Routing weights multiply whole outputs of experts. So what all experts add together is multiplied,
channel by channel, by multiplying the rows of those channels in every expert's last matrix:

    Σ_e p_e W_e h_e  ⊙ f      =      Σ_e p_e (diag(f) W_e) h_e

transformers keeps the matrices of all experts in one parameter `[E, D, I]`, files may hold a tensor
for each expert under another name. Both are found without names: parameters by what the output does
when their channels are multiplied, stored tensors by their values.

Shapes: E experts, D width, I inputs of an expert's last matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tensors import read_tensor
from shortllm.surgery.derived import stored_name

FLOATS = ("F64", "F32", "F16", "BF16")
"""Stored types that are not quantized."""


LARGE = 256.0
"""A factor with which a small part of the output shows too. All that are tried are powers of two:
nothing is rounded."""


@dataclass(frozen=True, slots=True)
class Factor:
    """What a stored tensor is multiplied by, in place of a copy of it."""

    value: Tensor
    """One number, or one for each channel, in a shape that multiplies the tensor."""
    dtype: torch.dtype
    """The stored type, to which products are rounded."""
    offset: int = 0
    """What is added before, and subtracted afterwards: see `NormGains`."""

    def times(self, tensor: Tensor) -> Tensor:
        """The product, as it will be stored, in the type that the tensor has."""
        if tensor.dim() > 2:  # one expert after the other, as the product is in a larger type
            product = torch.empty_like(tensor)
            for place, part in zip(product, tensor, strict=True):
                place.copy_(self.times(part))
            return product
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        product = (wide + self.offset) * self.value - self.offset
        return product.to(self.dtype).to(tensor.dtype)


@dataclass(frozen=True, slots=True)
class Output:
    """A parameter of experts, one axis of which is the channels of what they return."""

    name: str
    """Within the block."""
    axis: int
    """Counted from the end."""
    dtype: torch.dtype
    stored: Mapping[str, int] = field(default_factory=dict)
    """The tensors that it is stored as, by their names within the block, and the axis in each."""

    def factor(self, factor_D: Tensor) -> Factor:
        """The factor for these channels."""
        return Factor(along(factor_D, self.axis), self.dtype)

    def weights(
        self, checkpoint: Checkpoint, b: int, factor: Factor
    ) -> Iterator[tuple[str, Tensor]]:
        """The stored tensors of block `b` multiplied, by their names within it, one at a time."""
        for name, axis in self.stored.items():
            held = read_tensor(checkpoint.tensors[stored_name(checkpoint, b, name)])
            yield name, replace(factor, value=along(factor.value.flatten(), axis)).times(held)


def along(factor_D: Tensor, axis: int) -> Tensor:
    """Factors in a shape that multiplies an axis, counted from the end."""
    return factor_D.float().view(-1, *[1] * (-1 - axis))


def around_stacked(block: nn.Module) -> list[str]:
    """Names of the modules that hold matrices of several experts, and of those around them, the
    outer ones first."""
    names: list[str] = []
    for name, module in block.named_modules():
        if name and any(one.dim() == 3 for one in module.parameters(recurse=False)):
            parts = name.split(".")
            names += [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return list(dict.fromkeys(names))


def find_outputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, int] | None:
    """The parameters which have to be multiplied to multiply the channels of what a module returns,
    and the axis of each from the end; None if there are no such.

    A parameter belongs to them if only those channels of the output change whose part of it does.
    All of them together must multiply the output by exactly what they are multiplied by.
    """

    def returned(found: Mapping[str, int], factor_D: Tensor) -> Tensor:
        own = {
            name: weights[name] * along(factor_D, axis).to(weights[name])
            for name, axis in found.items()
        }
        given = [one.clone() if isinstance(one, Tensor) else one for one in args]
        output: Tensor = torch.func.functional_call(module, own, tuple(given), dict(kwargs))
        return output.float().flatten(0, -2)

    weights = dict(module.named_parameters())
    intact_ND = returned({}, torch.ones(1))
    width = intact_ND.shape[-1]
    allowed = 4 * torch.finfo(next(iter(weights.values())).dtype).eps * intact_ND.abs().max()

    def equal(one_ND: Tensor, other_ND: Tensor) -> bool:
        return bool((one_ND - other_ND).abs().max() <= allowed)

    places = torch.arange(width, device=intact_ND.device)
    odd_D = places % 2 == 1
    found: dict[str, int] = {}
    for name, weight in weights.items():
        first = 1 if weight.dim() == 3 else 0  # not the axis of experts
        for axis in range(first - weight.dim(), 0):
            if weight.shape[axis] == width:
                half_ND = returned({name: axis}, torch.where(odd_D, LARGE, 1.0))
                if equal(half_ND[:, ~odd_D], intact_ND[:, ~odd_D]) and not equal(
                    half_ND[:, odd_D], intact_ND[:, odd_D]
                ):
                    found[name] = axis
    factor_D = 2.0 ** (places % 3)
    if not found or not equal(returned(found, factor_D) / factor_D, intact_ND):
        return None
    return found


def find_stored(
    checkpoint: Checkpoint, b: int, weight: Tensor, axis: int
) -> tuple[dict[str, int], torch.dtype] | None:
    """The tensors of block `b` that a parameter is stored as, which axis of each is `axis` of the
    parameter, and their type; None if it is not stored as floats, whole or expert by expert."""
    found: dict[str, int] = {}
    types: set[torch.dtype] = set()
    missing = set(range(len(weight)))
    shapes = [sorted(weight.shape), sorted(weight.shape[1:])]
    for name, entry in checkpoint.tensors.items():
        if checkpoint.block_names.block_of(name) != b or sorted(entry.shape) not in shapes:
            continue
        if entry.dtype not in FLOATS:
            continue
        held = read_tensor(entry)
        there = held.to(weight.device, weight.dtype)
        for turned in (False, True)[: there.dim()]:
            experts = _equal_parts(weight, there.mT if turned else there)
            if experts:
                own = name.removeprefix(stored_name(checkpoint, b, ""))
                found[own] = -3 - axis if turned else axis
                types.add(held.dtype)
                missing -= experts
                break
    return (found, types.pop()) if not missing and len(types) == 1 else None


def _equal_parts(weight: Tensor, stored: Tensor) -> set[int]:
    """The experts whose part of a parameter equals a stored tensor; all, if the whole does."""
    if stored.shape == weight.shape:
        return set(range(len(weight))) if torch.equal(stored, weight) else set()
    if stored.shape != weight.shape[1:]:
        return set()
    first = (weight[:, 0] == stored[0]).view(len(weight), -1).all(1)
    return {e for e in first.nonzero().flatten().tolist() if torch.equal(weight[e], stored)}
