"""int8: 8-bit weights rounded to nearest, one scale per row.

Activations are rounded to 8 bits while the model runs, with one scale per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shortllm.quantizing.methods import METHODS, QuantizingMethod

if TYPE_CHECKING:
    from shortllm.quantizing.compressing import Layers
    from shortllm.quantizing.options import QuantizeOptions


@METHODS.register(
    QuantizingMethod(
        name="int8",
        label="int8",
        scheme="W8A8",
        details=lambda options: "one scale per row, activations scaled per token while it runs",
    )
)
def int8(options: QuantizeOptions, layers: Layers) -> Any:
    """8-bit weights and activations, needs no calibration text."""
    from shortllm.quantizing.compressing import quiet_compressor

    with quiet_compressor():
        from llmcompressor.modifiers.quantization import QuantizationModifier

    return QuantizationModifier(scheme="W8A8", targets=["Linear"], ignore=layers.outside)
