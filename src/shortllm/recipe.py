"""Every choice of a run in one typed record; its filled-in form stands in run.json.

Unknown keys are refused. A knob starts as a field here and may earn a flag later.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from shortllm.benchmark.options import PROMPT, BenchmarkOptions
from shortllm.data.options import CalibrationOptions
from shortllm.evaluation.options import EvaluationOptions
from shortllm.healing.options import HealOptions
from shortllm.pruning.budget import Budget
from shortllm.published import Published
from shortllm.quantizing.options import QuantizeOptions
from shortllm.records import Record, SpecialToken
from shortllm.retraining.options import RetrainOptions

EMBEDDED_PROMPT = "There was a drum in the school."
EMBEDDED_SEGMENTS = 256
"""The embedded model gets a prompt from its own world and a text that takes seconds."""


class Recipe(Record):
    """A whole run."""

    about: str = Field(default="", description="what it does, in one line")
    model: str = "embedded"
    revision: str | None = None
    special_tokens: dict[SpecialToken, int] = Field(
        default_factory=dict,
        description="token ids where the checkpoint names wrong ones; BOS is put before each text",
    )
    criterion: str = "ppl"
    options: dict[str, Any] = Field(
        default_factory=dict, description="options of the criterion, e.g. {'power': 2}"
    )
    calibration: CalibrationOptions = CalibrationOptions()
    budget: Budget = Budget(ratio=0.25)
    use_published_order: bool = Field(
        default=False, description="remove by the published order of blocks, and score nothing"
    )
    healing: HealOptions | None = Field(
        default=None,
        description="heal the shortened model without training: linear, or its options",
    )
    retraining: list[RetrainOptions] = Field(
        default_factory=list,
        description="ways to heal the shortened model, each from the same start; one or a list",
    )
    quantization: QuantizeOptions | None = Field(
        default=None, description="how the healed model is quantized; default: it is not"
    )
    evaluation: EvaluationOptions = EvaluationOptions()
    benchmark: BenchmarkOptions | None = Field(
        default=None, description="how speed is measured; default: it is not"
    )
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    stream: bool | None = Field(
        default=None,
        description="read blocks one at a time from the files; default: where they do not fit",
    )
    max_memory: int | None = Field(
        default=None, description="bytes of hidden streams in memory; beyond it they go to a file"
    )
    published: Published | None = Field(
        default=None, description="what was published about this model and criterion"
    )

    @field_validator(
        "retraining", mode="before", json_schema_input_type=RetrainOptions | list[RetrainOptions]
    )
    @classmethod
    def _one_or_a_list(cls, given: Any) -> Any:
        return [given] if isinstance(given, (dict, RetrainOptions)) else given

    @field_validator(
        "healing",
        mode="before",
        json_schema_input_type=HealOptions | Literal["linear", "none"] | None,
    )
    @classmethod
    def _a_name_or_options(cls, given: Any) -> Any:
        if isinstance(given, str):
            return None if given == "none" else {"method": given}
        return given

    @property
    def healed(self) -> dict[str, RetrainOptions]:
        """The retrainings by the names of their models: `retrained`, or of several
        `retrained-lora`, `retrained-full`, ...; the second of a method `retrained-lora-2`."""
        if len(self.retraining) == 1:
            return {"retrained": self.retraining[0]}
        named: dict[str, RetrainOptions] = {}
        for options in self.retraining:
            same = sum(other.method == options.method for other in named.values())
            number = f"-{same + 1}" if same else ""
            named[f"retrained-{options.method}{number}"] = options
        return named

    def filled(self, model_type: str) -> Recipe:
        """The same recipe with every default that depends on the model filled in.

        Raises:
            DataError: calibration ids as well as text to take them from.
        """
        from shortllm.checkpoint.hub import EMBEDDED
        from shortllm.data.calibration import resolve_calibration

        embedded = self.model == EMBEDDED
        calibration = resolve_calibration(self.calibration, model_type, embedded=embedded)
        data, every = self.calibration.data, calibration.bos_every_sample
        evaluated = self.evaluation.data
        if not evaluated:
            evaluated = [data] if data else [EMBEDDED] if embedded else ["wikitext2", "ptb"]
        retraining = self.retraining
        if embedded:
            retraining = [
                one.model_copy(update={"data": one.data or EMBEDDED}) for one in retraining
            ]
        return self.model_copy(
            update={
                "retraining": retraining,
                "calibration": calibration,
                "evaluation": self.evaluation.model_copy(
                    update={
                        "data": evaluated,
                        "max_segments": self.evaluation.max_segments
                        or (EMBEDDED_SEGMENTS if embedded else None),
                        "bos": self.evaluation.bos or ("every" if every else "first"),
                        "prompt": self.evaluation.prompt
                        or (EMBEDDED_PROMPT if embedded else PROMPT),
                    }
                ),
            }
        )
