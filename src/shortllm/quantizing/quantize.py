"""Quantize a checkpoint: fewer bits per weight, written so that plain transformers loads it.

llm-compressor does the work (compressing.py). Needs the `quantize` extra.

    shortllm quantize CHECKPOINT --method gptq --data c4 --out DIR
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from shortllm import __version__
from shortllm.calls import accepts
from shortllm.checkpoint.config import context_length
from shortllm.checkpoint.hub import EMBEDDED, ModelSource
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.data.calibration import Calibration, calibrate
from shortllm.data.options import SampledText
from shortllm.errors import CheckpointError, ShortLLMError
from shortllm.files import require_free
from shortllm.model import Session
from shortllm.model.decoder import Decoder
from shortllm.model.loading import load_model, stored_dtype
from shortllm.progress import progress
from shortllm.quantizing.compressing import (
    LIBRARY,
    Layers,
    compress,
    find_layers,
    quiet_compressor,
    require_device,
    require_extra,
    require_group_size,
)
from shortllm.quantizing.methods import METHODS
from shortllm.quantizing.options import DATA, SAMPLE_LENGTH, SAMPLES, Quantization, QuantizeOptions
from shortllm.registry import cited
from shortllm.runtime import DeviceOptions, versions
from shortllm.surgery.derived import Draft, derive, derived_fingerprint
from shortllm.surgery.origin import held_provenance
from shortllm.surgery.verify import CACHE_ERRORS, bypass_logits, probe_ids

LEFT_BEHIND = {"adapter", "logs"}
"""Directories next to the source's weights that describe its training."""

OWN_FILES = ("generation_config.json", "recipe.yaml")
"""Files of llm-compressor that the source's own replace."""

EMBEDDED_DEFAULTS: dict[str, Any] = {"group_size": 32, "samples": 32, "length": 256}
"""Defaults for the embedded model, whose widths are not multiples of 128."""

NEW_TOKENS = 4
"""How many tokens the written model must generate."""


@accepts(options=QuantizeOptions, runtime=DeviceOptions)
def quantize(
    model: ModelSource,
    out: Path,
    *,
    options: QuantizeOptions,
    runtime: DeviceOptions,
    revision: str | None = None,
) -> Quantization:
    """Write a quantized checkpoint, which plain transformers loads.

    Args:
        model: a checkpoint directory, a Hub id, or a loaded model.
        out: the new checkpoint directory, which also gets quantize.json.
        options: the method and its options; their fields can be given as keywords.
        runtime: where to compute; its fields can be given as keywords.
        revision: of a Hub model.
    Returns:
        The content of quantize.json: the method, its calibration, bytes before and after.
    Raises:
        ShortLLMError: llm-compressor is missing or does not accept the installed packages, the
            group size does not fit the model, or the model does not fit in memory.
        UnsupportedModelError: this model cannot be quantized.
        CheckpointError: the result cannot predict or generate.
        OutputError: `out` contains something else or cannot be written.
    """
    checkpoint = open_checkpoint(model, revision=revision)
    require_free(out, Quantization.FILE)
    options = resolve(options, checkpoint)
    session = Session(runtime)
    check(options, checkpoint, session)
    ids = calibrate(checkpoint, options.calibration) if options.needs_text else None
    return quantize_from(checkpoint, options, out, calibration=ids, session=session)


def quantize_from(
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    target: Path,
    *,
    calibration: Calibration | None,
    session: Session,
) -> Quantization:
    """The same for an open checkpoint; `calibration` is None if the method needs no text."""
    options = resolve(options, checkpoint)
    layers = check(options, checkpoint, session)
    seen = calibration if options.needs_text else None
    expected = derived_fingerprint(
        checkpoint,
        calibration=seen,
        session=session,
        quantize=options.model_dump(mode="json", exclude={"calibration"}),
    )

    draft = partial(_draft, checkpoint, options, layers, seen, session, expected, str(target))
    return derive(
        Quantization,
        target,
        checkpoint,
        draft,
        expected=expected,
        choices=options.model_dump(mode="json"),
    )


def resolve(
    options: QuantizeOptions, checkpoint: Checkpoint, shared: SampledText | None = None
) -> QuantizeOptions:
    """The same options with every default filled in; `shared` text says where BOS goes."""
    method = METHODS.get(options.method)
    defaults = EMBEDDED_DEFAULTS if checkpoint.id == EMBEDDED else {}
    own = {
        name: defaults.get(name, default)
        for name, default in method.options.items()
        if getattr(options, name) is None
    }
    text = options.calibration
    update: dict[str, Any] = {}
    if method.needs_text and text.file is None:
        length = min(SAMPLE_LENGTH, context_length(checkpoint.config) or SAMPLE_LENGTH)
        update = {
            "data": text.data or (EMBEDDED if checkpoint.id == EMBEDDED else DATA),
            "samples": text.samples or defaults.get("samples", SAMPLES),
            "length": text.length or defaults.get("length", length),
        }
    if shared is not None and text.bos_every_sample is None:
        update["bos_every_sample"] = shared.bos_every_sample
    return options.model_copy(update={"calibration": text.model_copy(update=update), **own})


def check(options: QuantizeOptions, checkpoint: Checkpoint, session: Session) -> Layers:
    """Check packages, device and model before anything heavy; returns the layers to quantize."""
    require_extra()
    require_device(session.device)
    layers = check_model(options, checkpoint)
    if session.streams(checkpoint):
        raise ShortLLMError(
            f"{checkpoint.id} does not fit in memory, and quantizing needs all of it. Use a "
            "machine with more memory"
        )
    return layers


def check_model(options: QuantizeOptions, checkpoint: Checkpoint) -> Layers:
    """Check that the layers of a model can be quantized by resolved options."""
    layers = find_layers(checkpoint)
    if options.group_size is not None:
        require_group_size(layers, options.group_size)
    return layers


def refusal(checkpoint: Checkpoint) -> str | None:
    """Why a model cannot be quantized with the default options; None where it can."""
    try:
        check_model(resolve(QuantizeOptions(), checkpoint), checkpoint)
    except ShortLLMError as error:
        return str(error)
    return None


def _draft(
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    layers: Layers,
    calibration: Calibration | None,
    session: Session,
    expected: str,
    name: str,
) -> Draft:
    """Load the model in its stored type, quantize it, and describe the new checkpoint."""
    method = METHODS.get(options.method)
    session.release()
    stored = str(stored_dtype(checkpoint)).removeprefix("torch.")
    model = load_model(checkpoint, device=session.device, dtype=stored)
    with progress(f"quantizing by {options.method}", len(layers.widths)) as advance:
        ids = calibration.ids if calibration else None
        compress(model, method.function(options, layers), ids, advance=advance)
    record = {
        "method": options.method,
        "scheme": method.scheme,
        "options": options.model_dump(mode="json", exclude={"method", "calibration"}),
        "calibration": calibration.info if calibration else None,
        "layers": len(layers.widths),
        "bytes_before": checkpoint.bytes,
        "device": session.device.type,
        "versions": {
            **versions(),
            **{one: version(one) for one in (LIBRARY, "compressed-tensors")},
        },
    }
    how = {
        "version": __version__,
        "method": options.method,
        "paper": cited(method),
        "scheme": method.scheme,
        "group_size": options.group_size,
        "calibration": calibration.info.tokens_fingerprint if calibration else None,
        "fingerprint": expected,
    }
    return Draft(
        record=record,
        config=checkpoint.raw_config,
        provenance={**held_provenance(checkpoint), "quantized": how},
        bytes=checkpoint.bytes,
        write=lambda directory, advance: _save(checkpoint, model, directory),
        finish=partial(_packed, checkpoint),
        verify=lambda written: require_usable(name, session.decoder(open_checkpoint(written))),
        leave=LEFT_BEHIND,
        adds=checkpoint.unbuilt,
    )


def _save(checkpoint: Checkpoint, model: Any, directory: Path) -> None:
    """Save weights in packed form and their config; keep the source's own generation config."""
    with quiet_compressor(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about memory that is used anyway
        model.save_pretrained(directory, save_compressed=True, max_shard_size="5GB")
    for name in OWN_FILES:
        (directory / name).unlink(missing_ok=True)
        if (checkpoint.directory / name).is_file():
            shutil.copyfile(checkpoint.directory / name, directory / name)


def _packed(checkpoint: Checkpoint, directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The size of the written weights, and the config entry that describes their form."""
    written = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    size = open_checkpoint(directory).bytes
    form = written["quantization_config"]
    if added := {name.rpartition(".")[0] for name in checkpoint.unbuilt}:
        form["ignore"] = [*(form.get("ignore") or ()), *sorted(added)]
    return {"bytes_after": size}, {"quantization_config": form}


def require_usable(name: str, decoder: Decoder) -> None:
    """Refuse a model whose predictions are not finite, or that cannot generate."""
    ids_BT = probe_ids(decoder.model.config)
    logits_BTV = bypass_logits(decoder)
    predicted, targets = logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
    nll = torch.nn.functional.cross_entropy(predicted, targets)
    if not math.isfinite(nll.item()):
        raise CheckpointError(
            f"{name}: the predictions of the quantized model are not finite. Try other calibration "
            "--data, or a smaller --group-size"
        )
    ids_BT = ids_BT[:1].to(decoder.device)
    try:
        written = decoder.model.generate(  # type: ignore[operator]
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
    except CACHE_ERRORS as error:
        raise CheckpointError(f"{name}: the quantized model cannot generate: {error}") from error
    if written.shape[1] != ids_BT.shape[1] + NEW_TOKENS:
        raise CheckpointError(f"{name}: the quantized model generates nothing")
