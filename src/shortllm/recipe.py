"""Every choice of a run in one record; its resolved values are saved to run.json.

A recipe composes the options of the stages. Unknown keys are refused. Flags of `shortllm run`, the
keys of a .yaml recipe and the keywords of `shortllm.run` are its fields.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from shortllm import criteria
from shortllm.benchmark.options import BenchmarkOptions
from shortllm.checkpoint.hub import EMBEDDED
from shortllm.data.options import CalibrationOptions
from shortllm.evaluation.options import EvaluationOptions
from shortllm.healing.options import HealOptions, MethodName
from shortllm.options import Flag, Nested
from shortllm.pruning.budget import Budget
from shortllm.published import Published
from shortllm.quantizing.options import QuantizeOptions
from shortllm.records import SpecialToken
from shortllm.retraining.options import RetrainOptions
from shortllm.runtime import Runtime

CRITERION_HELP = f"Rule that scores the blocks: {criteria.help_text()}."

CONTINUATIONS = 5
"""Generated samples per model in a run."""

HIDDEN = Flag(hidden=True)


class Recipe(Runtime):
    """A whole run."""

    panel: ClassVar[str] = "Scoring"

    about: Annotated[str, HIDDEN] = Field(default="", description="What it does, in one line.")
    model: Annotated[str, HIDDEN] = Field(
        default="embedded", description="Checkpoint directory, Hub id, or 'embedded'."
    )
    revision: Annotated[str | None, Flag(panel="Recipe")] = Field(
        default=None, description="Branch, tag or commit of a Hub model, as in MODEL@REVISION."
    )
    special_tokens: Annotated[dict[SpecialToken, int], HIDDEN] = Field(
        default_factory=dict,
        description="Token ids where the checkpoint names wrong ones. A BOS is added to each text.",
    )
    criterion: str = Field(default="ppl", description=CRITERION_HELP)
    options: Annotated[dict[str, Any], HIDDEN] = Field(
        default_factory=dict, description="Options of the criterion, e.g. {'power': 2}."
    )
    budget: Budget = Budget(ratio=0.25)
    use_published_order: bool = Field(
        default=False,
        description="Remove blocks in the order that the recipe has as published; score nothing.",
    )
    calibration: CalibrationOptions = CalibrationOptions()
    healing: Annotated[HealOptions | None, Nested(skip=True), HIDDEN] = Field(
        default=None,
        description="How to repair the shortened model without training: a method, or its options.",
    )
    retraining: Annotated[list[RetrainOptions], HIDDEN] = Field(
        default_factory=list,
        description="How to retrain the shortened model: one way or several, each from the same "
        "start.",
    )
    quantization: Annotated[QuantizeOptions | None, Nested(skip=True), HIDDEN] = Field(
        default=None, description="How to quantize the best model. Default: not at all."
    )
    evaluation: Annotated[
        EvaluationOptions,
        Nested(
            rename={
                "data": "eval_data",
                "length": "eval_length",
                "bos": "eval_bos",
                "seed": "eval_seed",
            }
        ),
    ] = EvaluationOptions()
    benchmark: Annotated[BenchmarkOptions | None, Nested(skip=True)] = Field(
        default=None, description="How to measure speed and memory. Default: not at all."
    )
    published: Annotated[Published | None, HIDDEN] = Field(
        default=None, description="What was published about this model and criterion."
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
        json_schema_input_type=HealOptions | MethodName | Literal["none"] | None,
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

    def resolved(self, model_type: str) -> Recipe:
        """The same recipe with every default that depends on the model filled in."""
        from shortllm.data.calibration import resolve_calibration
        from shortllm.evaluation.evaluate import resolve_evaluation

        embedded = self.model == EMBEDDED
        calibration = resolve_calibration(self.calibration, model_type, embedded=embedded)
        every = bool(calibration.bos_every_sample)
        evaluation = resolve_evaluation(
            self.evaluation,
            embedded=embedded,
            every=every,
            continuations=CONTINUATIONS,
            calibrated_on=self.calibration.data,
        )
        retraining = self.retraining
        if embedded:
            retraining = [
                one.model_copy(update={"data": one.data or EMBEDDED}) for one in retraining
            ]
        return self.model_copy(
            update={
                "retraining": retraining,
                "calibration": calibration,
                "evaluation": evaluation,
            }
        )
