"""How fast models generate and how much memory it takes: several models, measured in turn.

    for each new-token length, for each batch size (a cell of the sweep):
        warm-up        model A, model B, model A, ...        the last one tells the peak memory
        measured runs  A B | B A | A B | ...                 latency and utilisation, then the time
                                                             to the first token in a run of its own

The models take turns run by run, and each turn begins with another one, so that what drifts (heat,
clocks, other work on the machine) hits all alike. Text is made by the model's own `generate`, with
the end-of-text token barred, so that every run does the same work. A cell that does not fit into
memory is recorded as such and the sweep goes on; where the models only do not fit side by side, all
but the one that runs wait off the device.

    shortllm bench MODEL SHORT --batch 1,16 --new-tokens 128 --out bench
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortllm.benchmark.interleaved import CPU, Subject, Turns
from shortllm.benchmark.meters import Meter, load_average, meter_of
from shortllm.benchmark.options import (
    UNFINISHED_BENCHMARK,
    Benchmark,
    BenchmarkedModel,
    BenchmarkOptions,
)
from shortllm.checkpoint.config import context_length
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.data.texts import vocabulary
from shortllm.errors import CheckpointError, DataError, ResultFileError, ShortLLMError
from shortllm.evaluation.perplexity import TEMPERATURE, TOP_K, TOP_P
from shortllm.files import fingerprint
from shortllm.model.decoder import Decoder
from shortllm.model.loading import load_model
from shortllm.model.session import Session
from shortllm.runtime import progress, quiet_transformers, versions

log = logging.getLogger(__name__)

STAND_IN_TOKENS = 12
"""Length of the prompt for a model without a tokenizer; about that of the usual prompt."""


def check_options(options: BenchmarkOptions) -> None:
    """Refuse what cannot be measured.

    Raises:
        ShortLLMError: a number below its least.
    """
    for flag, numbers, least in (
        ("--batch", options.batches, 1),
        ("--new-tokens", options.new_tokens, 1),
        ("--warmup", [options.warmup], 2 if options.compile else 1),
        ("--runs", [options.runs], 1),
    ):
        if not numbers or min(numbers) < least:
            given = ",".join(map(str, numbers)) or "nothing"
            why = " with --compile, of which the first compiles" if least > 1 else ""
            raise ShortLLMError(f"{flag} {given} is too few{why}. Give {least} or more")


def benchmark_fingerprint(
    checkpoints: Mapping[str, Checkpoint], options: BenchmarkOptions, session: Session, meter: Meter
) -> str:
    """Of everything the figures depend on, but for what else the machine is doing."""
    return fingerprint(
        {
            "models": [(name, one.fingerprint) for name, one in checkpoints.items()],
            "options": options.model_dump(mode="json"),
            "dtype": [session.dtype(one) for one in checkpoints.values()],
            "device": [session.device.type, meter.name, torch.get_num_threads()],
        }
    )


def check_speed(
    checkpoints: Mapping[str, Checkpoint], options: BenchmarkOptions, session: Session
) -> dict[str, Tensor]:
    """The prompt `[T]` of each model, once it is clear that the sweep can begin.

    Raises:
        ShortLLMError: options that cannot be met.
    """
    check_options(options)
    _check_attention(options, session.device)
    prompts = {name: prompt_ids(one, options.prompt) for name, one in checkpoints.items()}
    for name, checkpoint in checkpoints.items():
        _check_positions(checkpoint, len(prompts[name]), max(options.new_tokens))
    return prompts


def measure_speed(
    checkpoints: Mapping[str, Checkpoint],
    options: BenchmarkOptions,
    *,
    session: Session,
    directory: Path | None = None,
) -> Benchmark:
    """Every cell of the sweep for every model, by name.

    Args:
        session: device and computation type; its own model is not used.
        directory: where finished cells are kept, so that an interrupted sweep goes on.
    Raises:
        ShortLLMError: options that cannot be met, before any model is loaded where that is known.
        CheckpointError: a model that cannot be loaded.
    """
    prompts = check_speed(checkpoints, options, session)
    meter = meter_of(session.device)
    subjects = [
        Subject(
            name=name,
            model=_load(checkpoint, options.attention, session),
            prompt_T=prompts[name],
        )
        for name, checkpoint in checkpoints.items()
    ]
    return sweep(
        subjects,
        [_described(one, checkpoints[one.name], session) for one in subjects],
        options,
        device=session.device,
        fingerprint=benchmark_fingerprint(checkpoints, options, session, meter),
        directory=directory,
    )


def sweep(
    subjects: Sequence[Subject],
    models: Sequence[BenchmarkedModel],
    options: BenchmarkOptions,
    *,
    device: torch.device,
    fingerprint: str,
    directory: Path | None = None,
) -> Benchmark:
    """Every cell of the sweep for models that are in memory.

    Args:
        models: what the result says of each subject.
        fingerprint: of everything the figures depend on.
        directory: as for `measure_speed`.
    """
    meter = meter_of(device)
    turns = Turns(subjects, options, device, meter)
    kept = None if directory is None else directory / UNFINISHED_BENCHMARK
    result = None if kept is None else _unfinished(kept, fingerprint)
    if result is None:
        result = Benchmark(
            models=list(models),
            measurements=[],
            prompt=options.prompt,
            top_k=TOP_K,
            top_p=TOP_P,
            temperature=TEMPERATURE,
            seed=options.seed,
            warmup=options.warmup,
            runs=options.runs,
            compiled=options.compile,
            attention=options.attention,
            device=device.type,
            device_name=meter.name,
            threads=torch.get_num_threads(),
            load_average=load_average(),
            versions=versions(),
            fingerprint=fingerprint,
        )
    cells = [
        (batch, new_tokens)
        for new_tokens in dict.fromkeys(options.new_tokens)
        for batch in dict.fromkeys(options.batches)
        if result.find(subjects[0].name, batch, new_tokens) is None
    ]
    runs = len(cells) * len(subjects) * (options.warmup + options.runs)
    with progress("measuring", runs) as advance:
        for batch, new_tokens in cells:
            found = [*result.measurements, *turns.measure(batch, new_tokens, advance)]
            result = result.model_copy(update={"measurements": found})
            if kept is not None:
                result.save(kept)
    return result


def _unfinished(path: Path, expected: str) -> Benchmark | None:
    """What an interrupted sweep of the same models and options has left."""
    try:
        earlier = Benchmark.load(path)
    except ResultFileError:
        return None
    if earlier.fingerprint != expected:
        return None
    log.info("%s holds %d measurements, goes on from there", path, len(earlier.measurements))
    return earlier


def prompt_ids(checkpoint: Checkpoint, prompt: str) -> Tensor:
    """Token ids `[T]` of the prompt; arbitrary ones for a model without a tokenizer.

    Raises:
        DataError: no token comes of it.
    """
    try:
        tokenizer = load_tokenizer(checkpoint)
    except CheckpointError:
        log.info(
            "%s has no tokenizer: its prompt is %d arbitrary tokens", checkpoint.id, STAND_IN_TOKENS
        )
        return torch.arange(1, STAND_IN_TOKENS + 1) % vocabulary(checkpoint)
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise DataError(
            f"the prompt '{prompt}' has no tokens for {checkpoint.id}. Give a longer one"
        )
    return torch.tensor(ids)


def _check_positions(checkpoint: Checkpoint, prompt: int, new_tokens: int) -> None:
    """Refuse longer texts than the model has positions for."""
    room = context_length(checkpoint.config)
    if room is not None and prompt + new_tokens > room:
        raise DataError(
            f"{prompt} tokens of the prompt and {new_tokens} new ones exceed the {room} positions "
            f"of {checkpoint.id}. Give --new-tokens {room - prompt} or less"
        )


def _check_attention(options: BenchmarkOptions, device: torch.device) -> None:
    """Refuse an attention implementation that is not there, before a model is loaded."""
    from transformers.utils import is_flash_attn_2_available

    if options.attention != "flash_attention_2":
        return
    if device.type != "cuda":
        raise ShortLLMError(
            f"--attn flash_attention_2 works on CUDA devices, not on {device}. Use --attn sdpa"
        )
    if not is_flash_attn_2_available():
        raise ShortLLMError(
            "--attn flash_attention_2 needs flash-attn. Install it with: pip install flash-attn"
        )


def _load(checkpoint: Checkpoint, attention: str | None, session: Session) -> Any:
    """The model in main memory, from where it goes to the device for its runs."""
    model: Any = load_model(checkpoint, device=CPU, dtype=session.dtype(checkpoint))
    if attention is None:
        return model
    try:
        with quiet_transformers():
            model.to(session.device).set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise ShortLLMError(
            f"{checkpoint.id} cannot use --attn {attention}: {str(error).splitlines()[0]}"
        ) from error
    if model.config._attn_implementation != attention:
        raise ShortLLMError(
            f"{checkpoint.id} has one attention implementation of its own. Leave out --attn"
        )
    return model.to(CPU)


def _described(subject: Subject, checkpoint: Checkpoint, session: Session) -> BenchmarkedModel:
    return BenchmarkedModel(
        name=subject.name,
        model=checkpoint.info(),
        head_parameters=Decoder(subject.model).head_elements,
        prompt_tokens=len(subject.prompt_T),
        dtype=session.dtype(checkpoint),
    )
