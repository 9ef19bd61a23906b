"""The stage: from a checkpoint to a quantized one."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm.checkpoint.config import context_length
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.data.options import CalibrationOptions
from shortllm.errors import CheckpointError, DataError, ShortLLMError
from shortllm.files import require_writable
from shortllm.model.session import Session
from shortllm.quantizing.compressing import (
    Layers,
    extra_versions,
    find_layers,
    require_extra,
    require_group_size,
)
from shortllm.quantizing.options import RECORD, Quantization, QuantizeOptions
from shortllm.records import Cost
from shortllm.runtime import peak_memory, progress, versions
from shortllm.surgery.apply import require_apart
from shortllm.surgery.made import CARDS, finished, made_fingerprint, require_free

if TYPE_CHECKING:
    from shortllm.data.calibration import Calibration
    from shortllm.model.decoder import Decoder

log = logging.getLogger(__name__)

PLACES = {"data", "file"}
"""Options that say where the text lies: its tokens count instead."""

NEW_TOKENS = 4
"""How many tokens the written model is made to generate."""


def check(
    checkpoint: Checkpoint, options: QuantizeOptions, *, session: Session
) -> tuple[QuantizeOptions, Layers]:
    """Check packages, options, device and model; a run asks this of the model it will shorten.

    Returns the options, every default filled in, and the layers they are meant for.

    Raises:
        ShortLLMError: any of its kinds; nothing heavy has been done.
    """
    options = options.filled(context_length(checkpoint.config))
    require_extra()
    from shortllm.quantizing.compressing import require_device

    require_device(session.device)
    layers = find_layers(checkpoint)
    if options.group_size is not None:
        require_group_size(layers, options.group_size)
    if session.streams(checkpoint):
        raise ShortLLMError(
            f"{checkpoint.id} does not fit into memory, where quantizing must have all of it. Use "
            "a machine with more, or --no-stream if you know better"
        )
    return options, layers


def calibration_options(options: QuantizeOptions | None) -> CalibrationOptions | None:
    """The text that filled-in options ask for; None where none is looked at."""
    if options is None or not options.needs_text:
        return None
    given: dict[str, Any] = {
        "sampler": options.sampler,
        "seed": options.seed,
        "bos_every_sample": options.bos_every_sample,
    }
    if options.file is not None:
        return CalibrationOptions(file=options.file, **given)
    assert options.samples is not None and options.length is not None
    return CalibrationOptions(
        data=options.data,
        samples=options.samples,
        length=options.length,
        **given,
    )


def quantize(
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    target: Path,
    *,
    calibration: Calibration | None,
    session: Session,
) -> Quantization:
    """Quantize a checkpoint, and write the result as checkpoint `target`, with quantize.json.

    A target that is up to date is left alone; another one that this stage made is replaced. What is
    written is loaded again, has to predict and to generate, before it gets its name.

    Args:
        calibration: None where the method looks at no text.
    Raises:
        ShortLLMError: any of its kinds, before the model is loaded wherever that can be known.
    """

    options, layers = check(checkpoint, options, session=session)
    if options.needs_text and calibration is None:
        raise DataError(f"--method {options.method} looks at text. Give --data")
    require_apart(checkpoint.directory, target)
    require_free(target, RECORD)
    expected = made_fingerprint(
        checkpoint,
        calibration=calibration if options.needs_text else None,
        dtype="as stored",
        device=session.device.type,
        without=CARDS,
        options=options.model_dump(mode="json", exclude=PLACES),
    )
    found = finished(target, expected, Quantization, RECORD, under="quantized")
    if found is not None:
        return found
    if (target / RECORD).is_file():
        log.info("%s was quantized by another recipe, and will be replaced", target)
    require_writable(target.absolute().parent, checkpoint.bytes)
    _quantize(checkpoint, options, layers, target, calibration, session, expected)
    return Quantization.load(target / RECORD)


def _quantize(
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    layers: Layers,
    target: Path,
    calibration: Calibration | None,
    session: Session,
    expected: str,
) -> None:
    """Load in the stored type, quantize, write, try out."""
    from shortllm.model.loading import load_model, stored_dtype
    from shortllm.quantizing.compressing import compress, modifier_of
    from shortllm.quantizing.writing import write_quantized

    text = calibration if options.needs_text else None
    session.release()
    started = time.monotonic()
    stored = str(stored_dtype(checkpoint)).removeprefix("torch.")
    model = load_model(checkpoint, device=session.device, dtype=stored)
    with progress(f"quantizing by {options.method}", len(layers.widths)) as advance:
        compress(model, modifier_of(options, layers), text.ids if text else None, advance=advance)
    record = Quantization(
        model=checkpoint.info(),
        method=options.method,
        scheme=options.scheme,
        options=options.model_dump(mode="json", exclude={"method"}),
        calibration=text.info if text else None,
        layers=len(layers.widths),
        bytes_before=checkpoint.bytes,
        bytes_after=0,
        device=session.device.type,
        versions={**versions(), **extra_versions()},
        cost=Cost(seconds=round(time.monotonic() - started, 3), peak_bytes=peak_memory()),
        fingerprint=expected,
    )

    def verify(written: Path) -> None:
        require_usable(str(target), session.decoder(open_checkpoint(written)))

    write_quantized(checkpoint, model, target, record, verify=verify)


def require_usable(name: str, decoder: Decoder) -> None:
    """Refuse a model that predicts nothing finite, or that cannot generate.

    Raises:
        CheckpointError: saying which.
    """
    import torch

    from shortllm.surgery.verify import CACHE_ERRORS, bypass_logits, probe_ids

    ids_BT = probe_ids(decoder.model.config)
    logits_BTV = bypass_logits(decoder)
    predicted, targets = logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
    nll = torch.nn.functional.cross_entropy(predicted, targets)
    if not math.isfinite(nll.item()):
        raise CheckpointError(
            f"{name}: the quantized model predicts nothing finite. Try other calibration --data, "
            "or a smaller --group-size"
        )
    ids_BT = ids_BT[:1].to(decoder.device)
    try:
        made = decoder.model.generate(  # type: ignore[operator]
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
    except CACHE_ERRORS as error:
        raise CheckpointError(f"{name}: the quantized model cannot generate: {error}") from error
    if made.shape[1] != ids_BT.shape[1] + NEW_TOKENS:
        raise CheckpointError(f"{name}: the quantized model generates nothing")
