"""quantize.json: how a checkpoint was quantized, and what it saved."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator
from typing_extensions import Self

from shortllm.quantizing.options import Method
from shortllm.results.record import Cost, ModelInfo, ResultFile
from shortllm.results.scores import CalibrationInfo

RECORD = "quantize.json"

QUANTIZED = "quantized"
"""Directory of the quantized checkpoint in a run, and its name in results."""


class Quantization(ResultFile):
    """quantize.json: the linear layers of a checkpoint in few bits."""

    model: ModelInfo = Field(description="the checkpoint before")
    method: Method
    scheme: str = Field(description="bits of weights and activations: W4A16, W8A8")
    options: dict[str, Any]
    calibration: CalibrationInfo | None = Field(
        default=None, description="the text that gptq looked at; null where none is"
    )
    layers: int = Field(description="linear layers that were quantized")
    bytes_before: int = Field(description="of all stored tensors")
    bytes_after: int
    device: str
    versions: dict[str, str] = Field(default_factory=dict)
    cost: Cost | None = None

    @model_validator(mode="after")
    def _says_how(self) -> Self:
        """What `described` needs is there."""
        missing = {"group_size", "act_order"} - set(self.options)
        if self.method == "gptq" and missing:
            raise ValueError(f"options of gptq must say {' and '.join(sorted(missing))}")
        return self

    @property
    def described(self) -> str:
        """'GPTQ W4A16, groups of 128, activation order'."""
        if self.method == "int8":
            return "int8 W8A8, one scale per row, activations scaled per token as they come"
        size = self.options["group_size"]
        groups = f"groups of {size}" if size else "one scale per row"
        return f"GPTQ W4A16, {groups}{', activation order' if self.options['act_order'] else ''}"
