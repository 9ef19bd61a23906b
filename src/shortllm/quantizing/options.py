"""The options of quantization, and the record of what was quantized."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from shortllm.data.options import CalibrationInfo, SampledText
from shortllm.options import Flag, Options
from shortllm.quantizing.methods import METHODS
from shortllm.records import DerivedRecord
from shortllm.registry import described

DATA, SAMPLES, SAMPLE_LENGTH = "c4", 128, 2048
"""Calibration text of arXiv:2210.17323."""

PER_ROW = 0
"""The group size that means one scale per row of a weight, whatever its length."""

QUANTIZED = "quantized"
"""Directory of the quantized checkpoint in a run, and its name in results."""

TEXT_FLAGS = {"file": "calibration", "data": "data", "samples": "samples", "length": "length"}
"""Options of the text that a method without text refuses -> their flags."""

MethodName = Annotated[
    str,
    AfterValidator(lambda name: METHODS.get(name).name),
    Field(json_schema_extra={"enum": METHODS.names()}),
    Flag(metavar="|".join(METHODS.names())),
]


class QuantizeCalibration(SampledText):
    """Calibration text; the defaults are those of the GPTQ paper."""

    data: str | None = Field(
        default=None,
        description="Text: a .txt, .jsonl, .json, .csv or .parquet file, a Hub data set "
        f"name[:config[:split]], or a built-in name. Default: {DATA}.",
    )
    sampler: Literal["random", "packed"] = Field(
        default="packed",
        description="How windows are cut. random: from random documents. packed: one after the "
        "other from all documents joined.",
    )
    samples: int | None = Field(  # type: ignore[assignment]
        default=None, ge=1, description=f"Number of calibration samples. Default: {SAMPLES}."
    )
    length: int | None = Field(  # type: ignore[assignment]
        default=None,
        ge=2,
        description=f"Tokens per calibration sample. Default: {SAMPLE_LENGTH}, at most the model's "
        "positions.",
    )


class QuantizeOptions(Options):
    """How to quantize a checkpoint; defaults that are not given depend on method and model."""

    panel: ClassVar[str] = "Quantization"

    method: MethodName = Field(default="gptq", description="How to quantize. " + described(METHODS))
    group_size: int | None = Field(
        default=None,
        ge=0,
        description="Inputs that share a scale in gptq; 0: all inputs of a row. Default: 128.",
    )
    act_order: Annotated[bool, Flag(name="--act-order")] = Field(
        default=False, description="Let gptq quantize the columns of the largest activations first."
    )
    dampening: float = Field(
        default=0.01,
        gt=0,
        lt=1,
        description="Part of the mean of the Hessian's diagonal that gptq adds to it.",
    )
    calibration: QuantizeCalibration = QuantizeCalibration()

    @model_validator(mode="after")
    def _fits_the_method(self) -> Self:
        """Refuse options that the method does not have, and text that it does not look at."""
        METHODS.require_own_options(self.method, self)
        if not self.needs_text:
            for name, flag in TEXT_FLAGS.items():
                if getattr(self.calibration, name) is not None:
                    raise ValueError(
                        f"--{flag} has no effect: --method {self.method} needs no calibration "
                        "text. Leave it out"
                    )
        return self

    @property
    def needs_text(self) -> bool:
        """Whether the method looks at calibration text."""
        return METHODS.get(self.method).needs_text


class Quantization(DerivedRecord):
    """quantize.json: the linear layers of a checkpoint in fewer bits."""

    FILE: ClassVar[str] = "quantize.json"

    method: MethodName
    scheme: str = Field(description="bits of weights and activations: W4A16, W8A8")
    calibration: CalibrationInfo | None = Field(
        default=None, description="the calibration text; null if the method needs none"
    )
    layers: int = Field(description="number of quantized linear layers")
    bytes_before: int = Field(description="of all stored tensors")
    bytes_after: int
    device: str

    @property
    def described(self) -> str:
        """'GPTQ W4A16, groups of 128, activation order'."""
        method = METHODS.get(self.method)
        return f"{method.label} {self.scheme}, {method.details(self.options)}"
