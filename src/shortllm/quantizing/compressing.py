"""The part of llm-compressor: the linear layers of a model in memory are quantized.

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
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from shortllm.errors import ShortLLMError, UnsupportedModelError
from shortllm.quantizing.layers import Layers
from shortllm.quantizing.options import PER_ROW, QuantizeOptions

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
