"""Which text a stage looks at, and the record of the tokens that were taken from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from shortllm.data.shapes import with_columns
from shortllm.data.sources import GENERATED, mixture, prompts_of
from shortllm.errors import DataError
from shortllm.options import Flag, Options
from shortllm.records import Record, ResultFile

Columns = Annotated[
    str | None,
    Field(
        description="Which columns of --data are what, e.g. prompt=q,completion=a or text=story. "
        "Default: by their names."
    ),
]


class SampledText(Options):
    """Text that samples are cut from; the defaults are those of Shortened LLaMA."""

    panel: ClassVar[str] = "Calibration text"

    data: str | None = Field(
        default=None,
        description="Text: a .txt, .jsonl, .json, .csv or .parquet file, a Hub data set "
        "NAME:CONFIG:SPLIT, a built-in name, or a mixture with weights, as in "
        "c4:0.5,alpaca:0.5. Default: bookcorpus.",
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

    @property
    def is_written(self) -> bool:
        """Whether the model writes any of it."""
        return any(prompts_of(name) is not None for name in mixture(self.source or ""))

    @property
    def texts(self) -> dict[str, float]:
        """Every source of rows and its weight; of text that the model writes itself, its prompts'
        source."""
        found = mixture(self.source) if self.source else {}
        return {prompts_of(name) or name: weight for name, weight in found.items()}

    @property
    def only_answers(self) -> bool:
        """Whether only what the assistant says counts."""
        return False

    @property
    def temperature(self) -> float:
        """That of text that the model writes itself."""
        return 1.0

    def require_one_source(self) -> None:
        """Refuse text next to token ids, which stand for it."""
        if self.file is not None and (self.data or self.columns) is not None:
            raise DataError(
                "--calibration gives token ids, so --data has no effect. Leave one of them out, "
                "and give the text to measure on as --eval-data"
            )


class CalibrationOptions(SampledText):
    """Text that blocks are scored on, of which answers alone may count, or the model's own text.

    Where only answers count, a sample begins with a conversation, and others follow until it is
    full; the end of the last one is cut off. The sampler says which conversations: random ones, or
    all in order.
    """

    answers_only: Annotated[bool, Flag(name="--answers-only")] = Field(
        default=False,
        description="Of conversations, only what the assistant says counts, in every criterion. "
        "Plain text in a mixture counts as a whole.",
    )
    generated_temperature: float = Field(
        default=1.0,
        gt=0,
        description="Sampling temperature for `--data generated:PROMPTS`.",
    )

    @property
    def only_answers(self) -> bool:
        """Whether only what the assistant says counts."""
        return self.answers_only

    @property
    def temperature(self) -> float:
        """That of text that the model writes itself."""
        return self.generated_temperature


class CalibrationPart(Record):
    """One source of a mixture."""

    source: str
    rows: tuple[int, int] = Field(description="the span [start, stop) the samples were drawn from")
    samples: int


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
    parts: list[CalibrationPart] | None = Field(
        default=None, description="the sources of a mixture; null for a single source"
    )
    counted: int | None = Field(
        default=None, description="predictions that count, by the tensor `counted`; null: all"
    )
    temperature: float | None = Field(
        default=None, description="of text that the model wrote itself; null: it wrote none"
    )
    tokens_fingerprint: str = Field(
        description="sha256 of the ids as little-endian int64, with their shape; where not all "
        "tokens count, also of which do"
    )

    def drawn_from(self) -> Iterator[tuple[str, int]]:
        """Each source, and the end of the row range used."""
        parts: Sequence[CalibrationPart | CalibrationInfo] = self.parts or [self]
        for source, rows in ((one.source, one.rows) for one in parts):
            if rows is not None:
                yield source.removeprefix(f"{GENERATED}:"), rows[1]
