"""Which weights are trained: LoRA adapters, or the head and the last blocks.

No family's names are used: the blocks are the module list that the engine finds, LoRA's targets are
the linear projections inside them, the head is what the model names as its output embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from shortllm.checkpoint.structure import find_blocks, is_projection
from shortllm.errors import ShortLLMError, UnsupportedModelError

if TYPE_CHECKING:
    from shortllm.retraining.options import RetrainOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Where LoRA adapters go, by dotted names in the model."""

    modules: list[str]
    """Linear projections."""
    parameters: list[str]
    """Projections of many experts, stacked in one tensor `[experts, ., .]`."""


def find_targets(model: Any, rank: int) -> Targets:
    """All projections inside the blocks that are at least as wide as the adapters' rank."""
    prefix, blocks = find_blocks(model, model.config)
    modules, parameters = [], []
    for name, module in blocks.named_modules():
        if is_projection(module):
            if min(module.weight.shape) >= rank:
                modules.append(f"{prefix}.{name}")
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape[1:]) >= rank:
                parameters.append(f"{prefix}.{name}.{own}")
    if not modules and not parameters:
        raise UnsupportedModelError(
            f"the blocks of model type '{model.config.model_type}' have no linear projection of "
            f"at least {rank} rows and columns. Give a smaller --rank, or choose another --method"
        )
    return Targets(modules=modules, parameters=parameters)


def add_adapters(model: nn.Module, options: RetrainOptions) -> nn.Module:
    """The model frozen, with a LoRA adapter at every projection of its blocks.

    Adapters of stacked experts cannot have dropout, so a model with any is trained without.
    """
    from peft import LoraConfig, get_peft_model

    targets = find_targets(model, options.rank)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=0.0 if targets.parameters else options.dropout,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        fan_in_fan_out=_stored_transposed(model, targets.modules),
        task_type="CAUSAL_LM",
    )
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def _stored_transposed(model: nn.Module, names: list[str]) -> bool:
    """Whether the projections store their matrix as in x out instead of out x in."""
    return any(not isinstance(model.get_submodule(name), nn.Linear) for name in names)


def train_last_blocks(model: nn.Module, count: int) -> nn.Module:
    """Freeze all but the head and the last `count` blocks; tied embeddings are part of the head."""
    _, blocks = find_blocks(model, model.config)
    if count > len(blocks):
        raise ShortLLMError(f"--blocks {count}: the model has {len(blocks)}. Give at most that")
    model.requires_grad_(False)
    head = model.get_output_embeddings()  # type: ignore[operator]
    for part in [*blocks[len(blocks) - count :], head]:
        part.requires_grad_(True)
    return model


def trainable_parameters(model: nn.Module) -> int:
    """Elements of the weights that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapted_modules(weights: Iterable[str]) -> list[str]:
    """Where adapters are, from the names of a model's weights, in their order."""
    places = dict.fromkeys(
        name.partition(".lora_")[0].removeprefix("base_model.model.")
        for name in weights
        if ".lora_" in name
    )
    return list(places)
