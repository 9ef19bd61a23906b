"""JSON schemas of recipes and result files, for editors and for programs that read them.

shortllm recipes schema > recipe.schema.json     that of a recipe
python tools/make_schemas.py                     all of them, into docs/schemas/
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

RECIPE = "recipe"
"""The schema of a recipe, a YAML file that users write."""

_HOME = {
    RECIPE: "recipe.Recipe",
    "belongs_to": "retraining.adapter.AdapterOrigin",
    "bench": "benchmark.options.Benchmark",
    "calibration": "data.options.CalibrationInfo",
    "comparison": "comparison.options.Comparison",
    "draft": "drafting.options.Drafting",
    "eval": "evaluation.options.Evaluation",
    "heal": "healing.options.Healing",
    "merge": "merging.options.Merging",
    "plan": "pruning.records.PrunePlan",
    "prune": "pruning.records.Pruning",
    "quality": "pruning.quality_target.QualityTarget",
    "quantize": "quantizing.options.Quantization",
    "retrain": "retraining.options.Retraining",
    "scores": "pruning.records.BlockScores",
    "sublayers": "sublayers.options.SublayerDrop",
    "target": "pruning.records.Target",
    "units": "comparison.options.UnitsComparison",
    "width": "width_pruning.options.WidthPruning",
}
"""Name of a file, without `.json` -> its record."""

NAMES = tuple(_HOME)


def schema(name: str) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a kind of file, one of `NAMES`."""
    module, _, record = _HOME[name].rpartition(".")
    kind = getattr(import_module(f"shortllm.{module}"), record)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema()}
