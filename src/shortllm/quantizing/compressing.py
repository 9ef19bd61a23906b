"""llm-compressor's part: is it installed, which layers are quantized, and the quantization itself.

llm-compressor names the newest torch and transformers it was tested with. pip resolves the extra to
versions that fit, but a package upgraded afterwards breaks that silently.

All linear layers inside the blocks are quantized, found by structure. Embeddings, norms and the
head stay as they are.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch
from torch import nn

from shortllm.checkpoint.config import block_shapes
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.structure import build_empty, find_blocks
from shortllm.errors import ShortLLMError, UnsupportedModelError, install_hint
from shortllm.quantizing.options import PER_ROW
from shortllm.runtime import quiet
from shortllm.surgery.derived import require_text_model, require_unquantized

log = logging.getLogger(__name__)

LIBRARY = "llmcompressor"

REFUSALS = (ValueError, RuntimeError, TypeError, KeyError, AttributeError, IndexError)
"""Errors of llm-compressor for a model that it cannot trace or does not know."""

MAX_UNTOUCHED = 0.1
"""Largest part of a block's weights outside linear layers (convolutions of state-space blocks)."""

MIN_GROUP = 16
"""Scales of smaller groups cost as much as the groups save."""


def require_extra() -> None:
    """Refuse to start if llm-compressor is missing, or does not accept the installed packages."""
    try:
        own = version(LIBRARY)
    except PackageNotFoundError:
        raise ShortLLMError(
            f"quantizing needs llm-compressor. Install it with: {install_hint('quantize')}"
        ) from None
    if problems := not_admitted(requires(LIBRARY) or []):
        found = ", ".join(f"{name} {held}" for name, held, _ in problems)
        wanted = " ".join(f"'{name}{accepted}'" for name, _, accepted in problems)
        raise ShortLLMError(
            f"{LIBRARY} {own} does not accept the installed {found}. Install what it accepts, "
            f"preferably in an environment of its own: pip install 'shortllm[quantize]' {wanted}"
        )


def not_admitted(requirements: Iterable[str]) -> list[tuple[str, str, str]]:
    """(package, installed version, accepted versions) of each requirement that is not met."""
    from packaging.requirements import Requirement

    problems = []
    for text in requirements:
        required = Requirement(text)
        if required.marker is not None and not required.marker.evaluate({"extra": ""}):
            continue
        try:
            held = version(required.name)
        except PackageNotFoundError:
            held = "none"
        if held == "none" or not required.specifier.contains(held, prereleases=True):
            problems.append((required.name, held, str(required.specifier)))
    return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The linear layers of a model, by dotted name."""

    widths: dict[str, int]
    """Layer inside the blocks -> its number of inputs."""
    outside: list[str]
    """Linear layers that are not in the blocks: the head."""


def find_layers(checkpoint: Checkpoint) -> Layers:
    """The layers to quantize."""
    require_unquantized(checkpoint, "it cannot be quantized again")
    require_text_model(checkpoint, "be quantized")
    if block_shapes(checkpoint.config) is not None:
        raise UnsupportedModelError(
            f"the blocks of {checkpoint.id} differ in width, so plain transformers could not "
            "load the result. Make it narrower with --shapes uniform"
        )
    model = build_empty(checkpoint.config)
    prefix, blocks = find_blocks(model, checkpoint.config)
    inside = {
        f"{prefix}.{name}": module
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear)
    }
    weights = {id(module.weight) for module in inside.values()}
    matrices = [(name, p) for name, p in blocks.named_parameters() if p.ndim > 1]
    untouched = [(name, p) for name, p in matrices if id(p) not in weights]
    part = sum(p.numel() for _, p in untouched) / max(1, sum(p.numel() for _, p in matrices))
    if not inside or part > MAX_UNTOUCHED:
        name = f" (e.g. '{prefix}.{untouched[0][0]}')" if untouched else ""
        raise UnsupportedModelError(
            f"{part:.0%} of the weights in the blocks of model type '{checkpoint.model_type}' are "
            f"outside linear layers{name}, and only linear layers can be quantized. Quantize it "
            "with a program that knows the type"
        )
    outside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in inside
    ]
    return Layers(
        widths={name: module.in_features for name, module in inside.items()}, outside=outside
    )


def require_group_size(layers: Layers, size: int) -> None:
    """Refuse a group size that does not divide the inputs of every layer."""
    unfit = [(name, n) for name, n in layers.widths.items() if size != PER_ROW and n % size]
    if unfit:
        name, width = unfit[0]
        fitting = ", ".join(map(str, fitting_sizes(layers)))
        sizes = f"a size that divides all: {fitting}; or " if fitting else ""
        raise ShortLLMError(
            f"--group-size {size} does not divide the {width} inputs of '{name}'. Give {sizes}"
            "--group-size 0 for one scale per row"
        )


def fitting_sizes(layers: Layers) -> list[int]:
    """Group sizes that divide the inputs of every layer, the largest first; none below 16."""
    common = math.gcd(*layers.widths.values())
    return [size for size in range(common, MIN_GROUP - 1, -1) if common % size == 0]


def compress(
    model: Any,
    modifier: Any,
    ids: torch.Tensor | None,
    *,
    advance: Callable[[float], None] = lambda layers: None,
) -> None:
    """Quantize a model in place on calibration ids; `advance` gets 1 for each layer of gptq."""
    with quiet_compressor():
        from llmcompressor import oneshot
        from llmcompressor.core import reset_session

    loader: Any = None
    if ids is not None:
        samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
        loader = torch.utils.data.DataLoader(samples, batch_size=1)  # type: ignore[arg-type]
    try:
        with quiet_compressor(advance):
            oneshot(
                model=model,
                recipe=[modifier],
                dataset=loader,
                pipeline="datafree" if ids is None else "sequential",
            )
    except REFUSALS as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(
            f"llm-compressor cannot quantize model type '{model.config.model_type}': {first}"
        ) from error
    finally:
        reset_session()


def require_device(device: torch.device) -> None:
    """Refuse a device that llm-compressor would not use: it chooses by itself."""
    found = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
    chosen = found.type if found else "cpu"
    if device.type != chosen or device.index:
        raise ShortLLMError(
            f"quantizing uses the first {chosen} device it sees, not {device}. Use --device auto, "
            "and choose devices with CUDA_VISIBLE_DEVICES"
        )


@contextlib.contextmanager
def quiet_compressor(advance: Callable[[float], None] = lambda layers: None) -> Iterator[None]:
    """Within the context, suppress llm-compressor's progress bars and log lines.

    Its warnings about layers that could not be quantized go to our log.
    """
    with quiet():  # its log starts with the import
        import llmcompressor  # noqa: F401
    from loguru import logger

    def listen(message: Any) -> None:
        record = message.record
        if record["function"] == "compress_module_list" and record["level"].name == "INFO":
            advance(1)
        elif record["level"].name in ("WARNING", "ERROR") and ".modifiers." in record["name"]:
            log.warning("llm-compressor: %s", record["message"])

    logger.remove()
    sink = logger.add(listen, level="INFO")
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ.setdefault(name, "false")  # llm-compressor would set it permanently
    try:
        with quiet("torch.fx"):
            yield
    finally:
        logger.remove(sink)
        if before is None:
            os.environ.pop(name, None)
