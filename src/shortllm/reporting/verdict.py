"""The one-sentence verdict of the page: what was removed, what it saves, costs and gains."""

from __future__ import annotations

from shortllm.benchmark.options import Measurement
from shortllm.reporting.healing import came_back
from shortllm.reporting.loading import RunResults
from shortllm.reporting.protocol import perplexity_source
from shortllm.reporting.quantizing import quantized_sentence
from shortllm.reporting.wording import change, counted, number, percent
from shortllm.run_directory import PRUNED

METHOD_NAMES = {
    "linear": "Healing by linear maps",
    "lora": "LoRA retraining",
    "full": "Retraining all weights",
    "distill": "Distillation",
    "last-blocks": "Retraining the last blocks",
}
"""What the verdict calls a way of healing."""


def verdict(results: RunResults) -> str:
    """What was removed, what it saves, what it costs, in one sentence."""
    plan = results.plan
    if not plan.removed:
        return f"No block was removed: all {plan.model.blocks} remain."
    saved = percent(plan.reached.parameter_ratio)
    sentence = (
        f"Removing {len(plan.removed)} of {counted(plan.model.blocks, 'block')} saves "
        f"{saved} of the parameters"
    )
    pruned = results.evaluated.get(PRUNED)
    if pruned:
        saved_bytes = percent(1 - pruned.model.bytes / plan.model.bytes)
        sentence += f" and {'' if saved_bytes == saved else f'{saved_bytes} '}of the bytes on disk"
    compared = [
        (source, before, after) for source, (before, after) in _before_and_after(results).items()
    ]
    if not compared:
        return f"{sentence}; the perplexity was not measured.{_gained(results)}"
    source, before, after = compared[0]
    if after == before:
        sentence += f"; perplexity stays at {number(before)} on {source}"
    else:
        verb = "rises" if after > before else "falls"
        sentence += (
            f"; perplexity {verb} from {number(before)} to {number(after)} "
            f"({change(before, after)}) on {source}"
        )
    if len(compared) > 1:
        source, before, after = compared[1]
        move = f"from {number(before)} to" if after != before else "stays at"
        sentence += f", and {move} {number(after)} on {source}"
    return f"{sentence}.{_regained(results)}{quantized_sentence(results)}{_gained(results)}"


def _regained(results: RunResults) -> str:
    """What the best way of healing has brought back, on the first text; empty without healing."""
    before, removed = results.perplexities("original"), results.perplexities(PRUNED)
    for key in (key for key in before if key in removed):
        healed = {
            name: results.perplexities(name)[key]
            for name in results.healed_by
            if key in results.perplexities(name)
        }
        if not healed:
            continue
        best = min(healed, key=lambda name: healed[name].nll)
        share = came_back(before[key], removed[key], healed[best])
        method, reached = METHOD_NAMES[results.healed_by[best]], healed[best].perplexity
        if share is None or share <= 0:
            return f" {method} leads to {number(reached)}."
        return f" {method} brings back {percent(share)} of that ({number(reached)})."
    return ""


SCATTER = 0.3
"""Standard deviation of a latency, as a part of its mean, above which it says nothing."""


def _gained(results: RunResults) -> str:
    """How much faster the shortened model generates; empty where it was not measured."""
    found = results.benchmark
    if found is None:
        return ""
    for one in found.measurements:
        speedup = found.speedup(one)
        if one.model == PRUNED and speedup is not None:
            batch = f"batch {one.batch}, {one.new_tokens} new tokens"
            first = found.find(found.models[0].name, one.batch, one.new_tokens)
            scatter = max(_scatter(each) for each in (first, one) if each is not None)
            if scatter > SCATTER:
                return (
                    " How fast it generates cannot be said: single runs scatter by "
                    f"± {percent(scatter)} ({batch}). Measure on a quiet machine."
                )
            return f" It generates {number(speedup, 3)} times as fast ({batch})."
    return ""


def _scatter(one: Measurement) -> float:
    """Standard deviation of the latency as a part of its mean."""
    return (one.latency_std_s or 0.0) / (one.latency_mean_s or 1.0)


def _before_and_after(results: RunResults) -> dict[str, tuple[float, float]]:
    """Perplexities per text, where original and pruned model saw the same tokens."""
    after = results.perplexities(PRUNED)
    return {
        perplexity_source(entry): (entry.perplexity, after[key].perplexity)
        for key, entry in results.perplexities("original").items()
        if key in after
    }
