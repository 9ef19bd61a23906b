"""GPTQ: 4-bit weights, symmetric, one scale per group of inputs.

Columns are rounded one after the other, and later columns compensate for the error of earlier ones;
block after block, each on the outputs of the quantized blocks before it.

Source: Frantar et al. 2022, GPTQ, arXiv:2210.17323.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shortllm.papers import GPTQ
from shortllm.quantizing.methods import METHODS, QuantizingMethod

if TYPE_CHECKING:
    from shortllm.quantizing.compressing import Layers
    from shortllm.quantizing.options import QuantizeOptions


def _details(options: Mapping[str, Any]) -> str:
    size = options.get("group_size")
    groups = f"groups of {size}" if size else "one scale per row"
    return f"{groups}{', activation order' if options.get('act_order') else ''}"


@METHODS.register(
    QuantizingMethod(
        name="gptq",
        label="GPTQ",
        scheme="W4A16",
        paper=GPTQ,
        details=_details,
        options={"group_size": 128, "act_order": False, "dampening": 0.01},
        needs_text=True,
    )
)
def gptq(options: QuantizeOptions, layers: Layers) -> Any:
    """4-bit weights, error-compensating, on calibration text."""
    from shortllm.quantizing.compressing import quiet_compressor
    from shortllm.quantizing.options import PER_ROW

    with quiet_compressor():
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor.modifiers.gptq import GPTQModifier

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
        # order and scales by the original place of each column, so nothing else has to be stored
        actorder="static" if options.act_order else None,
        dampening_frac=options.dampening,
    )
