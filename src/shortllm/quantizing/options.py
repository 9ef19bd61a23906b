"""Every choice of a quantization in one record."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from shortllm.errors import DataError, ShortLLMError
from shortllm.results.record import Record

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
