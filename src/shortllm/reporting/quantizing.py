"""What quantization has come to, in a sentence of the verdict."""

from __future__ import annotations

from shortllm.quantizing.options import QUANTIZED
from shortllm.reporting.loading import RunResults
from shortllm.reporting.wording import number, percent, short_bytes


def quantized_sentence(results: RunResults) -> str:
    """Bytes and perplexity of the quantized model, on the first text; empty without one."""
    record, found = results.quantization, results.evaluated.get(QUANTIZED)
    if record is None or found is None:
        return ""
    part = percent(found.model.bytes / results.plan.model.bytes)
    sentence = (
        f" Quantized ({record.scheme}) it takes {short_bytes(found.model.bytes)}, {part} of the "
        "original"
    )
    if found.perplexity:
        sentence += f", at a perplexity of {number(found.perplexity[0].perplexity)}"
    return f"{sentence}."
