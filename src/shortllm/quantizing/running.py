"""Quantization as a stage of `run`: which model is quantized, on which text."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from shortllm.checkpoint.source import Checkpoint
from shortllm.errors import ResultFileError
from shortllm.evaluation.options import Evaluation
from shortllm.evaluation.texts import Texts
from shortllm.model.session import Session
from shortllm.quantizing.options import QUANTIZED, RECORD, Quantization, QuantizeOptions
from shortllm.quantizing.stage import calibration_options, check, quantize
from shortllm.recipe import Recipe
from shortllm.surgery.made import require_free

log = logging.getLogger(__name__)

__all__ = ["asked_by", "best_of", "calibration_options", "quantize_in"]


def asked_by(recipe: Recipe, checkpoint: Checkpoint, session: Session) -> QuantizeOptions | None:
    """How a run quantizes, checked on the model as it is before blocks go.

    Raises:
        ShortLLMError: any of its kinds.
    """
    if recipe.quantization is None:
        return None
    return check(checkpoint, recipe.quantization, session=session)[0]


def quantize_in(
    directory: Path,
    candidates: Mapping[str, Checkpoint],
    options: QuantizeOptions | None,
    texts: Texts,
    session: Session,
) -> Quantization | None:
    """quantized/ in a run directory, unless it is up to date; nothing where nothing is asked.

    Args:
        candidates: the retrained models by name, or the shortened one.
    """
    if options is None:
        return None
    require_free(directory / QUANTIZED, RECORD)
    name = best_of(candidates, texts, session, directory / "eval.json")
    if len(candidates) > 1:
        log.info("%s has the lowest perplexity and is quantized", name)
    return quantize(
        candidates[name],
        options,
        directory / QUANTIZED,
        calibration=texts.quantization,
        session=session,
    )


def best_of(
    candidates: Mapping[str, Checkpoint],
    texts: Texts,
    session: Session,
    evaluation: Path,
) -> str:
    """The name of the model with the lowest perplexity on the first text.

    Args:
        evaluation: an earlier eval.json; a model that stands there is not measured again.
    """
    if len(candidates) == 1:
        return next(iter(candidates))
    from shortllm.data.calibration import tokens_fingerprint
    from shortllm.evaluation.perplexity import measure_perplexity

    text = texts.evaluation[0]
    tokens = tokens_fingerprint(text.segments.ids)
    known = _measured(evaluation, tokens)
    found = {}
    for name, checkpoint in candidates.items():
        if checkpoint.fingerprint in known:
            found[name] = known[checkpoint.fingerprint]
        else:
            decoder = session.decoder(checkpoint)
            found[name] = measure_perplexity(decoder, text, memory=session.memory()).nll
    return min(found, key=lambda name: found[name])


def _measured(evaluation: Path, tokens: str) -> dict[str, float]:
    """Fingerprint of a model -> its mean NLL on the tokens, as far as an eval.json says."""
    try:
        models = Evaluation.load(evaluation).models
    except ResultFileError:
        return {}
    return {
        one.model.fingerprint: entry.nll
        for one in models
        for entry in one.perplexity
        if entry.tokens_fingerprint == tokens
    }
