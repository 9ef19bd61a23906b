"""Whether llm-compressor is installed, and whether it admits the installed packages.

llm-compressor names the newest torch and transformers it was tested with. pip resolves the extra to
versions that fit, but a package upgraded afterwards breaks that without a word.


Which layers of a model are quantized: every linear layer inside the blocks, found by structure.

Embeddings, norms and the head stay as they are. The model is looked at without its weights.


The part of llm-compressor: the linear layers of a model in memory are quantized.

gptq   4-bit weights, symmetric, one scale per group of inputs, rounded one column after another
       so that the columns to come make up for the error (Frantar et al. 2022,
       arXiv:2210.17323); block after block, each on what the quantized ones before it give
int8   8-bit weights rounded to nearest, one scale per row; activations are rounded to 8 bits
       with one scale per token while the model runs; no text is looked at
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shortllm.checkpoint.blocks import find_blocks
from shortllm.checkpoint.config import text_config
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.structure import build_empty
from shortllm.errors import ShortLLMError, UnsupportedModelError
from shortllm.quantizing.options import PER_ROW, QuantizeOptions

LIBRARY = "llmcompressor"

RECORDED = (LIBRARY, "compressed-tensors")
"""Packages whose versions go into the record."""


def require_extra() -> None:
    """Refuse at once if what quantizing takes is not installed, or not in versions that fit.

    Raises:
        ShortLLMError: naming what to install.
    """
    try:
        own = version(LIBRARY)
    except PackageNotFoundError:
        raise ShortLLMError(
            "quantizing needs llm-compressor. Install it with: pip install 'shortllm[quantize]'"
        ) from None
    problems = not_admitted(requires(LIBRARY) or [])
    if problems:
        found = ", ".join(f"{name} {held}" for name, held, _ in problems)
        wanted = " ".join(f"'{name}{asked}'" for name, _, asked in problems)
        raise ShortLLMError(
            f"{LIBRARY} {own} does not admit the installed {found}. Install what it admits, best "
            f"in an environment of its own: pip install 'shortllm[quantize]' {wanted}"
        )


def not_admitted(requirements: Iterable[str]) -> list[tuple[str, str, str]]:
    """(package, installed version, admitted versions) of each requirement that is not met.

    Args:
        requirements: as a package's metadata states them, e.g. `torch<=2.14.0,>=2.10.0`.
    """
    from packaging.requirements import Requirement

    problems = []
    for text in requirements:
        asked = Requirement(text)
        if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
            continue
        try:
            held = version(asked.name)
        except PackageNotFoundError:
            held = "none"
        if held == "none" or not asked.specifier.contains(held, prereleases=True):
            problems.append((asked.name, held, str(asked.specifier)))
    return problems


def extra_versions() -> dict[str, str]:
    """Versions of the packages that only quantizing takes."""
    return {name: version(name) for name in RECORDED}


MOST_UNTOUCHED = 0.1
"""Part of a block's weights that may be in no linear layer (convolutions of state-space blocks)."""

LEAST_GROUP = 16
"""Smaller groups cost as much for their scales as they save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The linear layers of a model, by dotted name."""

    widths: dict[str, int]
    """Layer inside the blocks -> its number of inputs."""
    outside: list[str]
    """Linear layers that are not in the blocks: the head."""


def find_layers(checkpoint: Checkpoint) -> Layers:
    """The layers to quantize.

    Raises:
        UnsupportedModelError: the model is quantized already, is no plain text model, has blocks of
            different widths, or most of its weights are in other layers than linear ones.
    """
    _refuse_kinds(checkpoint)
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
    if not inside or part > MOST_UNTOUCHED:
        name = f" (e.g. '{prefix}.{untouched[0][0]}')" if untouched else ""
        raise UnsupportedModelError(
            f"{part:.0%} of the weights in the blocks of model type '{checkpoint.model_type}' are "
            f"in other layers than linear ones{name}, and only linear ones can be quantized. "
            "Quantize it with a program that knows the type"
        )
    outside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in inside
    ]
    return Layers(
        widths={name: module.in_features for name, module in inside.items()}, outside=outside
    )


def _refuse_kinds(checkpoint: Checkpoint) -> None:
    from shortllm.checkpoint.config import block_shapes

    config = checkpoint.config
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{checkpoint.id} is quantized already. Give the checkpoint it was made from"
        )
    if text_config(config) is not config:
        raise UnsupportedModelError(
            f"model type '{config.model_type}' has other towers around its text decoder, and only "
            "plain text models can be quantized"
        )
    if block_shapes(config) is not None:
        raise UnsupportedModelError(
            f"the blocks of {checkpoint.id} differ in width, so that plain transformers could not "
            "load the result. Make it narrower with --shapes uniform"
        )


def require_group_size(layers: Layers, size: int) -> None:
    """Refuse a group size that does not divide the inputs of every layer.

    Raises:
        ShortLLMError: naming the sizes that do.
    """
    if size == PER_ROW:
        return
    unfit = {name: width for name, width in layers.widths.items() if width % size}
    if not unfit:
        return
    name, width = next(iter(unfit.items()))
    fitting = fitting_sizes(layers)
    sizes = f"a size that divides all: {', '.join(map(str, fitting))}; or " if fitting else ""
    raise ShortLLMError(
        f"--group-size {size} does not divide the {width} inputs of '{name}'. Give {sizes}"
        "--group-size 0 for one scale per row"
    )


def fitting_sizes(layers: Layers) -> list[int]:
    """Group sizes that divide the inputs of every layer, the largest first; none below 16."""
    common = math.gcd(*layers.widths.values())
    return [size for size in range(common, LEAST_GROUP - 1, -1) if common % size == 0]


log = logging.getLogger(__name__)

REFUSALS = (ValueError, RuntimeError, TypeError, KeyError, AttributeError, IndexError)
"""What llm-compressor raises on a model that it cannot trace or does not know."""


def modifier_of(options: QuantizeOptions, layers: Layers) -> Any:
    """The recipe of llm-compressor that the options stand for."""
    with _quiet():
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier

    if options.method == "int8":
        return QuantizationModifier(scheme="W8A8", targets=["Linear"], ignore=layers.outside)
    assert options.group_size is not None
    grouped = {"strategy": "group", "group_size": options.group_size}
    weights = QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=True,
        **({"strategy": "channel"} if options.group_size == PER_ROW else grouped),
    )
    return GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=layers.outside,
        # order and scales by the original place of each column, so that nothing else is stored
        actorder="static" if options.act_order else None,
        dampening_frac=options.dampening,
    )


def compress(
    model: Any,
    modifier: Any,
    ids: torch.Tensor | None,
    *,
    advance: Callable[[float], None] = lambda layers: None,
) -> None:
    """Quantize a model in place, to be written by `save_compressed`.

    Args:
        ids: calibration, int64 [samples, length]; None where the modifier looks at no text.
        advance: called with 1 for each layer that gptq has come to.
    Raises:
        UnsupportedModelError: llm-compressor cannot do it, and says why.
    """
    with _quiet():
        from llmcompressor import oneshot
        from llmcompressor.core import reset_session

    loader: Any = None
    if ids is not None:
        samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
        loader = torch.utils.data.DataLoader(samples, batch_size=1)  # type: ignore[arg-type]
    try:
        with _quiet(advance):
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


def save_compressed(model: Any, directory: Path) -> None:
    """Weights in packed form and the config that says so, as `from_pretrained` reads them."""
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about memory that is in use anyway
        model.save_pretrained(directory, save_compressed=True, max_shard_size="5GB")


def require_device(device: torch.device) -> None:
    """Refuse a device that llm-compressor would not take: it chooses by itself.

    Raises:
        ShortLLMError: another device than the first accelerator, or the CPU beside one.
    """
    accelerator = None
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
    chosen = "cpu" if accelerator is None else accelerator.type
    if device.type == chosen and not device.index:
        return
    raise ShortLLMError(
        f"quantizing takes the first {chosen} device it sees, not {device}. Use --device auto, and "
        "choose or hide devices with CUDA_VISIBLE_DEVICES"
    )


@contextlib.contextmanager
def _quiet(advance: Callable[[float], None] = lambda layers: None) -> Iterator[None]:
    """llm-compressor's own bars and log lines, which go to standard output, kept back.

    Its warnings about layers that could not be quantized as asked go to our log.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # its log begins with the import
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
    tracer = logging.getLogger("torch.fx")
    level = tracer.level
    tracer.setLevel(logging.ERROR)
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ.setdefault(name, "false")  # llm-compressor would set it for good
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.remove(sink)
        tracer.setLevel(level)
        if before is None:
            os.environ.pop(name, None)
