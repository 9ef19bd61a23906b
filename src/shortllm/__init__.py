"""Make large language models shorter: score the blocks of any Hugging Face decoder, remove,
measure.

    import shortllm

    scores = shortllm.score("Qwen/Qwen3-0.6B")
    plan = shortllm.plan(scores, remove=6)
    shortllm.prune("Qwen/Qwen3-0.6B", plan, "qwen3-short")

The names below are loaded when first used, so that `import shortllm` loads neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from shortllm.benchmark.options import Benchmark as Benchmark
    from shortllm.benchmark.options import BenchmarkOptions as BenchmarkOptions
    from shortllm.checkpoint.source import Checkpoint as Checkpoint
    from shortllm.checkpoint.source import open_checkpoint as open_checkpoint
    from shortllm.comparison.criteria import compare_criteria as compare_criteria
    from shortllm.comparison.options import Comparison as Comparison
    from shortllm.comparison.width_vs_depth import compare_units as compare_units
    from shortllm.data.options import CalibrationOptions as CalibrationOptions
    from shortllm.drafting.shared import draft_of as draft_of
    from shortllm.errors import ShortLLMError as ShortLLMError
    from shortllm.evaluation.evaluate import evaluate as evaluate
    from shortllm.evaluation.options import Evaluation as Evaluation
    from shortllm.evaluation.options import EvaluationOptions as EvaluationOptions
    from shortllm.gate import check as check
    from shortllm.healing.heal import heal as heal
    from shortllm.healing.options import Healing as Healing
    from shortllm.healing.options import HealOptions as HealOptions
    from shortllm.live import shorten as shorten
    from shortllm.measure import bench as bench
    from shortllm.merging.merge import merge as merge
    from shortllm.merging.options import MergeOptions as MergeOptions
    from shortllm.merging.options import Merging as Merging
    from shortllm.model.loading import load as load
    from shortllm.pipeline import run as run
    from shortllm.pruning.budget import Budget as Budget
    from shortllm.pruning.estimate import info as info
    from shortllm.pruning.planning import plan as plan
    from shortllm.pruning.prune import prune as prune
    from shortllm.pruning.records import BlockScores as BlockScores
    from shortllm.pruning.records import PrunePlan as PrunePlan
    from shortllm.pruning.score import score as score
    from shortllm.push import push_to_hub as push_to_hub
    from shortllm.quantizing.options import Quantization as Quantization
    from shortllm.quantizing.options import QuantizeOptions as QuantizeOptions
    from shortllm.quantizing.quantize import quantize as quantize
    from shortllm.recipe import Recipe as Recipe
    from shortllm.reporting import compare as compare
    from shortllm.reporting import report as report
    from shortllm.retraining.adapter import load_adapter as load_adapter
    from shortllm.retraining.options import Retraining as Retraining
    from shortllm.retraining.options import RetrainOptions as RetrainOptions
    from shortllm.retraining.retrain import retrain as retrain
    from shortllm.runtime import Runtime as Runtime
    from shortllm.runtime import trusting_remote_code as trusting_remote_code
    from shortllm.sublayers.drop import drop_sublayers as drop_sublayers
    from shortllm.sublayers.options import SublayerDrop as SublayerDrop
    from shortllm.sublayers.options import SublayerOptions as SublayerOptions
    from shortllm.surgery.export import export as export
    from shortllm.surgery.export_lint import export_lint as export_lint
    from shortllm.width_pruning.options import WidthOptions as WidthOptions
    from shortllm.width_pruning.options import WidthPruning as WidthPruning
    from shortllm.width_pruning.prune_width import width as width

_NAMES = {
    "benchmark.options": ("Benchmark", "BenchmarkOptions"),
    "checkpoint.source": ("Checkpoint", "open_checkpoint"),
    "comparison.criteria": ("compare_criteria",),
    "comparison.options": ("Comparison",),
    "comparison.width_vs_depth": ("compare_units",),
    "data.options": ("CalibrationOptions",),
    "drafting.shared": ("draft_of",),
    "errors": ("ShortLLMError",),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.options": ("Evaluation", "EvaluationOptions"),
    "gate": ("check",),
    "healing.heal": ("heal",),
    "healing.options": ("HealOptions", "Healing"),
    "live": ("shorten",),
    "measure": ("bench",),
    "merging.merge": ("merge",),
    "merging.options": ("MergeOptions", "Merging"),
    "model.loading": ("load",),
    "pipeline": ("run",),
    "pruning.budget": ("Budget",),
    "pruning.estimate": ("info",),
    "pruning.planning": ("plan",),
    "pruning.prune": ("prune",),
    "pruning.records": ("BlockScores", "PrunePlan"),
    "pruning.score": ("score",),
    "push": ("push_to_hub",),
    "quantizing.options": ("Quantization", "QuantizeOptions"),
    "quantizing.quantize": ("quantize",),
    "recipe": ("Recipe",),
    "reporting": ("compare", "report"),
    "retraining.adapter": ("load_adapter",),
    "retraining.options": ("RetrainOptions", "Retraining"),
    "retraining.retrain": ("retrain",),
    "runtime": ("Runtime", "trusting_remote_code"),
    "sublayers.drop": ("drop_sublayers",),
    "sublayers.options": ("SublayerDrop", "SublayerOptions"),
    "surgery.export": ("export",),
    "surgery.export_lint": ("export_lint",),
    "width_pruning.options": ("WidthOptions", "WidthPruning"),
    "width_pruning.prune_width": ("width",),
}
"""The public names by the module that each is loaded from. No module is called like one of them."""

_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"shortllm.{_HOME[name]}"), name)
    raise AttributeError(f"module 'shortllm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
