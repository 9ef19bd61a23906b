"""The training methods: which weights each trains, towards what, with which defaults.

To add a method, decorate a function that sets which weights of a model are trained; options, help,
recipes and reports learn the rest from its entry. No family's names are used: the blocks are the
module list that the engine finds, the head is what the model names as its output embeddings.

The defaults are those of Shortened LLaMA (arXiv:2402.02834): LoRA on instructions, all weights on
packed text. Importing this module does not load torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from shortllm.errors import ShortLLMError, UnsupportedModelError, install_hint
from shortllm.papers import DISTILLATION, LAST_BLOCKS, LORA, SHORTENED_LLAMA
from shortllm.registry import MethodRegistry, RegisteredMethod

if TYPE_CHECKING:
    from torch import nn

    from shortllm.retraining.options import RetrainOptions

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


@dataclass(frozen=True, kw_only=True)
class TrainingMethod(RegisteredMethod):
    """A registered method: gets a model and options, returns the model with its weights chosen."""

    defaults: Mapping[str, Any] = field(default_factory=lambda: TEXT_DEFAULTS)
    """Option that all methods have -> its value where none is given."""
    packages: tuple[str, ...] = ("accelerate",)
    freezes: bool = False
    """Whether most weights stay as they are, so they can be kept in the computation type."""
    has_teacher: bool = False
    state_bytes: float = 24
    """Bytes of disk per parameter: two states of float32 weights and AdamW's moments."""

    def require_packages(self) -> None:
        """Refuse to start without the packages that training needs."""
        for name in self.packages:
            if find_spec(name) is None:
                raise ShortLLMError(
                    f"retraining by {self.name} needs {name}. Install it with: "
                    f"{install_hint('train')}"
                )

    def versions(self) -> dict[str, str]:
        """Versions of those packages."""
        return {name: version(name) for name in self.packages}


METHODS = MethodRegistry[TrainingMethod]("retraining method", ShortLLMError)


@METHODS.register(
    TrainingMethod(
        name="lora",
        label="LoRA retraining",
        paper=LORA,
        options={
            "rank": 8,
            "alpha": 16,
            "dropout": 0.05,
            "use_rslora": False,
            "use_dora": False,
            "load_in_4bit": False,
        },
        defaults=INSTRUCTION_DEFAULTS,
        packages=("accelerate", "peft"),
        freezes=True,
        state_bytes=0.5,
    )
)
def lora(model: Any, options: RetrainOptions) -> nn.Module:
    """Low-rank adapters on every projection, merged into the weights."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from torch.nn import Linear

    modules, experts = find_targets(model, options.rank)
    if experts and options.use_dora:
        raise UnsupportedModelError(
            f"model type '{model.config.model_type}' stacks the weights of its experts, for which "
            "peft has no DoRA. Leave --use-dora out"
        )
    if options.load_in_4bit:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=options.gradient_checkpointing
        )
    stored_in_by_out = any(not isinstance(model.get_submodule(name), Linear) for name in modules)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=0.0 if experts else options.dropout,  # peft has none for stacked experts
        target_modules=modules,
        target_parameters=experts or None,
        fan_in_fan_out=stored_in_by_out,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        task_type="CAUSAL_LM",
    )
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def find_targets(model: Any, rank: int) -> tuple[list[str], list[str]]:
    """All projections inside the blocks that are at least as wide as the adapters' rank.

    Dotted names of linear modules, and of parameters that stack many experts `[experts, ., .]`.
    """
    from torch.nn import Linear

    from shortllm.checkpoint.structure import find_blocks, is_projection

    prefix, blocks = find_blocks(model, model.config)
    modules, experts = [], []
    for name, module in blocks.named_modules():
        if is_projection(module):
            linear = isinstance(module, Linear)  # packed weights have another shape
            if (
                min((module.in_features, module.out_features) if linear else module.weight.shape)
                >= rank
            ):
                modules.append(f"{prefix}.{name}")
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape[1:]) >= rank:
                experts.append(f"{prefix}.{name}.{own}")
    if not modules and not experts:
        raise UnsupportedModelError(
            f"the blocks of model type '{model.config.model_type}' have no linear projection of "
            f"at least {rank} rows and columns. Give a smaller --rank, or choose another --method"
        )
    return modules, experts


@METHODS.register(
    TrainingMethod(name="full", label="Retraining all weights", paper=SHORTENED_LLAMA)
)
def full(model: nn.Module, options: RetrainOptions) -> nn.Module:
    """All weights, continued pretraining."""
    return model.requires_grad_(True)


@METHODS.register(
    TrainingMethod(
        name="distill",
        label="Distillation",
        paper=DISTILLATION,
        options={
            "teacher": None,
            "temperature": 1.0,
            "top_k": None,
            "hidden_weight": 0.0,
            "generate": None,
        },
        has_teacher=True,
    )
)
def distill(model: nn.Module, options: RetrainOptions) -> nn.Module:
    """All weights, towards the predictions of the original model."""
    return model.requires_grad_(True)


@METHODS.register(
    TrainingMethod(
        name="last-blocks",
        label="Retraining the last blocks",
        paper=LAST_BLOCKS,
        options={"blocks": 3},
        defaults=INSTRUCTION_DEFAULTS,
        freezes=True,
        state_bytes=8,
    )
)
def last_blocks(model: Any, options: RetrainOptions) -> nn.Module:
    """The head and the last blocks."""
    from shortllm.checkpoint.structure import find_blocks

    _, blocks = find_blocks(model, model.config)
    if options.blocks > len(blocks):
        raise ShortLLMError(
            f"--blocks {options.blocks}: the model has {len(blocks)}. Give at most that"
        )
    trained: nn.Module = model.requires_grad_(False)
    head = model.get_output_embeddings()  # also the embeddings, where they are tied
    for part in [*blocks[len(blocks) - options.blocks :], head]:
        part.requires_grad_(True)
    return trained


def default_of(option: str) -> Any:
    """The default of an option that only one method has."""
    return next(one.options[option] for one in METHODS if option in one.options)


def defaults_text(option: str) -> str:
    """The default of an option for each method, for its help: '256 for lora, 2048 for full'."""
    methods_of: dict[str, list[str]] = {}
    for one in METHODS:
        if option in one.defaults:
            value = one.defaults[option]
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            methods_of.setdefault(shown, []).append(one.name)
    if list(map(sorted, methods_of.values())) == [METHODS.names()]:
        return next(iter(methods_of))
    return ", ".join(f"{value} for {' and '.join(names)}" for value, names in methods_of.items())
