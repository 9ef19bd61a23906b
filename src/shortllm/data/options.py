"""Which text a stage looks at, and the record of the tokens that were taken from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from shortllm.data.shapes import with_columns
from shortllm.errors import DataError
from shortllm.options import Flag, Options
from shortllm.records import ResultFile

Columns = Annotated[
    str | None,
    Field(
        description="Which columns of --data are what, e.g. prompt=q,completion=a or text=story. "
        "Default: by their names."
    ),
]


class CalibrationOptions(Options):
    """Calibration text; the defaults are those of Shortened LLaMA."""

    panel: ClassVar[str] = "Calibration text"

    data: str | None = Field(
        default=None,
        description="Text: a .txt, .jsonl, .json, .csv or .parquet file, a Hub data set "
        "NAME:CONFIG:SPLIT, or a built-in name. Default: bookcorpus.",
    )
    columns: Annotated[Columns, Flag(metavar="FIELD=COLUMN")] = None
    file: Annotated[Path | None, Flag(name="--calibration")] = Field(
        default=None,
        description="Token ids instead of text: an earlier run, or a JSON list of lists.",
    )
    sampler: Literal["random", "packed"] = Field(
        default="random",
        description="How windows are cut. random: from random documents. packed: one after the "
        "other from all documents joined.",
    )
    samples: int = Field(default=10, ge=1, description="Number of calibration samples.")
    length: int = Field(default=128, ge=2, description="Tokens per calibration sample.")
    seed: int = Field(default=1234, description="Seed of the sampler.")
    bos_every_sample: bool | None = Field(
        default=None,
        description="Start every sample with BOS. Default: only for Gemma models.",
    )

    @property
    def source(self) -> str | None:
        """The data source, with the columns named in it."""
        return with_columns(self.data, self.columns) if self.data else None

    def require_one_source(self) -> None:
        """Refuse text next to token ids, which stand for it."""
        if self.file is not None and (self.data or self.columns) is not None:
            raise DataError(
                "--calibration gives token ids, so --data has no effect. Leave one of them out, "
                "and give the text to measure on as --eval-data"
            )


class CalibrationInfo(ResultFile):
    """calibration.json: where the ids in calibration.safetensors next to it came from."""

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
