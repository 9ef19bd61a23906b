"""The training methods: which weights each trains, towards what, with which defaults.

    METHODS.get("lora")     label, help, paper, defaults, own options, needed packages
    METHODS.get(name).make_trainable(model, options)

To add a method, decorate a function that sets what is trained; nothing else needs its name. The
defaults are those of Shortened LLaMA (arXiv:2402.02834): LoRA on instructions, all weights on
packed text. Importing this module does not load torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from shortllm.errors import ShortLLMError
from shortllm.papers import DISTILLATION, LAST_BLOCKS, LORA, SHORTENED_LLAMA, Paper
from shortllm.registry import Registry, first_line

if TYPE_CHECKING:
    from torch import nn

    from shortllm.retraining.options import RetrainOptions

    MakeTrainable = Callable[[nn.Module, RetrainOptions], nn.Module]

INSTRUCTION_DEFAULTS: Mapping[str, Any] = {
    "data": "alpaca",
    "length": 256,
    "learning_rate": 1e-4,
    "schedule": "linear",
    "weight_decay": 0.0,
    "epochs": 2.0,
}

TEXT_DEFAULTS: Mapping[str, Any] = {
    "length": 2048,
    "learning_rate": 1e-4,
    "schedule": "cosine",
    "weight_decay": 0.1,
    "epochs": 1.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way of training."""

    name: str
    label: str
    """What a sentence calls it, e.g. 'LoRA retraining'."""
    help: str
    """What is trained, towards what; one line."""
    paper: Paper
    function: MakeTrainable
    defaults: Mapping[str, Any] = field(default_factory=lambda: TEXT_DEFAULTS)
    """Option -> its value where none is given."""
    options: tuple[str, ...] = ()
    """Options that only this method has."""
    packages: tuple[str, ...] = ("accelerate",)
    freezes: bool = False
    """Whether most weights stay as they are, so they can be kept in the computation type."""
    has_teacher: bool = False
    state_bytes: float = 24
    """Bytes of disk per parameter: two states of float32 weights and AdamW's moments."""

    def make_trainable(self, model: nn.Module, options: RetrainOptions) -> nn.Module:
        """The model with the method's weights set to train, wrapped by peft for adapters."""
        return self.function(model, options)

    def require_packages(self) -> None:
        """Refuse to start without the packages that training needs."""
        for name in self.packages:
            if find_spec(name) is None:
                raise ShortLLMError(
                    f"retraining by {self.name} needs {name}. Install it with: pip install "
                    "'shortllm[train]'"
                )

    def versions(self) -> dict[str, str]:
        """Versions of those packages."""
        return {name: version(name) for name in self.packages}


METHODS = Registry[Method]("retraining method", ShortLLMError)


def method(name: str, **about: Any) -> Callable[[MakeTrainable], MakeTrainable]:
    """Register a function that sets which weights are trained; its docstring is the help."""

    def register(function: MakeTrainable) -> MakeTrainable:
        METHODS.add(name, Method(name=name, help=first_line(function), function=function, **about))
        return function

    return register


@method(
    "lora",
    label="LoRA retraining",
    paper=LORA,
    defaults=INSTRUCTION_DEFAULTS,
    options=("rank", "alpha", "dropout"),
    packages=("accelerate", "peft"),
    freezes=True,
    state_bytes=0.5,
)
def lora(model: nn.Module, options: RetrainOptions) -> nn.Module:
    """LoRA adapters on every projection, merged into the weights."""
    from shortllm.retraining.trainable import add_adapters

    return add_adapters(model, options)


@method(
    "full",
    label="Retraining all weights",
    paper=SHORTENED_LLAMA,
)
def full(model: nn.Module, options: RetrainOptions) -> nn.Module:
    """All weights, continued pretraining."""
    return model.requires_grad_(True)


@method(
    "distill",
    label="Distillation",
    paper=DISTILLATION,
    options=("teacher", "temperature", "top_k", "hidden_weight", "generate"),
    has_teacher=True,
)
def distill(model: nn.Module, options: RetrainOptions) -> nn.Module:
    """All weights, towards the predictions of the original model."""
    return model.requires_grad_(True)


@method(
    "last-blocks",
    label="Retraining the last blocks",
    paper=LAST_BLOCKS,
    defaults=INSTRUCTION_DEFAULTS,
    options=("blocks",),
    freezes=True,
    state_bytes=8,
)
def last_blocks(model: nn.Module, options: RetrainOptions) -> nn.Module:
    """The head and the last blocks."""
    from shortllm.retraining.trainable import train_last_blocks

    return train_last_blocks(model, options.blocks)


def owner_of(option: str) -> Method | None:
    """The method that an option belongs to; None if all have it."""
    return next((one for one in METHODS if option in one.options), None)


def defaults_text(option: str) -> str:
    """The default of an option for each method, for its help: '256 for lora, 2048 for full'."""

    def shown(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    methods_of: dict[str, list[str]] = {}
    for one in METHODS:
        if option in one.defaults:
            methods_of.setdefault(shown(one.defaults[option]), []).append(one.name)
    if len(methods_of) == 1 and sum(map(len, methods_of.values())) == len(METHODS.names()):
        return next(iter(methods_of))
    return ", ".join(f"{value} for {' and '.join(names)}" for value, names in methods_of.items())
