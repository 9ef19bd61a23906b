"""What a user chooses about calibration, and the record of the ids that came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from shortllm.records import Record, ResultFile


class CalibrationOptions(Record):
    """Which tokens blocks are scored on; the defaults are those of Shortened LLaMA."""

    data: str | None = Field(default=None, description="data source; default bookcorpus")
    file: Path | None = Field(default=None, description="token ids given directly, instead of data")
    sampler: Literal["random", "packed"] = "random"
    samples: int = Field(default=10, ge=1)
    length: int = Field(default=128, ge=2, description="tokens per sample")
    seed: int = 1234
    bos_every_sample: bool | None = Field(
        default=None, description="begin every sample with BOS; default: for Gemma types only"
    )


class CalibrationInfo(ResultFile):
    """Where the calibration ids came from; they lie next to it in calibration.safetensors."""

    source: str = Field(description="data source as given, or the file the ids were taken from")
    rows: tuple[int, int] | None = Field(
        default=None, description="the span [start, stop) of rows the samples were drawn from"
    )
    sampler: Literal["random", "packed", "given"]
    samples: int
    length: int = Field(description="tokens per sample")
    seed: int | None = None
    bos: Literal["tokenizer", "every-sample", "none"]
    tokens_fingerprint: str = Field(
        description="sha256 of the ids as little-endian int64, with their shape"
    )
