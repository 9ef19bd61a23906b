"""Every choice of a quantization in one record.

quantize.json: how a checkpoint was quantized, and what it saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from shortllm.data.options import CalibrationInfo
from shortllm.errors import DataError, ShortLLMError
from shortllm.records import Cost, ModelInfo, Record, ResultFile

Method = Literal["gptq", "int8"]

DEFAULTS: dict[str, Any] = {"group_size": 128, "data": "c4", "samples": 128, "length": 2048}
"""What stands in the options of gptq where nothing is given: the numbers of arXiv:2210.17323."""

EMBEDDED_DEFAULTS: dict[str, Any] = {"group_size": 32, "samples": 32, "length": 256}
"""The same for the embedded model, whose widths 128 does not divide."""

ONLY_FOR_GPTQ = ("group_size", "act_order", "dampening", "data", "file", "samples", "length")

PER_ROW = 0
"""The group size that stands for one scale per row of a weight, however long."""


class QuantizeOptions(Record):
    """How a checkpoint is quantized; what is not given depends on method and model."""

    method: Method = "gptq"
    group_size: int | None = Field(
        default=None, description="inputs that share a scale; 0: all of a row. Default: 128"
    )
    act_order: bool = Field(
        default=False, description="quantize the columns of the largest activations first"
    )
    dampening: float = Field(
        default=0.01, description="added to the diagonal of the Hessian, part of its mean"
    )
    data: str | None = Field(default=None, description="calibration text; default: c4")
    file: Path | None = Field(default=None, description="token ids given directly, instead of data")
    sampler: Literal["random", "packed"] = "packed"
    samples: int | None = Field(default=None, description="calibration samples; default: 128")
    length: int | None = Field(
        default=None, description="tokens per sample; default: 2048, at most the model's positions"
    )
    seed: int = 1234
    bos_every_sample: bool | None = Field(
        default=None, description="begin every sample with BOS; default: for Gemma types only"
    )

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is looked at."""
        return self.method == "gptq"

    def filled(self, room: int | None) -> QuantizeOptions:
        """The same options with every default filled in.

        Args:
            room: positions the model has; None where it does not say.
        Raises:
            ShortLLMError: options that mean nothing, or nothing to this method.
        """
        self._check()
        if self.method != "gptq":
            return self
        missing = {name: value for name, value in DEFAULTS.items() if getattr(self, name) is None}
        if room is not None and "length" in missing:
            missing["length"] = min(missing["length"], room)
        if self.file is not None:
            for name in ("data", "samples", "length"):
                missing.pop(name, None)
        return self.model_copy(update=missing)

    def _check(self) -> None:
        if self.method != "gptq":
            for name in ONLY_FOR_GPTQ:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ShortLLMError(
                        f"{flag(name)} belongs to --method gptq, and --method {self.method} looks "
                        "at no text and has one scale per row. Leave it out, or choose gptq"
                    )
        if self.file is not None and self.data is not None:
            raise DataError(
                "--calibration gives the token ids to calibrate on, so that --data has no use. "
                "Leave one out"
            )
        if self.group_size is not None and self.group_size < 0:
            raise ShortLLMError(
                f"--group-size {self.group_size} means nothing. Give a size, e.g. 128, or 0 for "
                "one scale per row"
            )
        if not 0 < self.dampening < 1:
            raise ShortLLMError(f"dampening {self.dampening} is no part. Give e.g. 0.01")

    @property
    def scheme(self) -> str:
        """Widths of weights and activations, as the field calls them."""
        return "W4A16" if self.method == "gptq" else "W8A8"


def flag(name: str) -> str:
    """What the command line calls an option."""
    return "--calibration" if name == "file" else "--" + name.replace("_", "-")


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
