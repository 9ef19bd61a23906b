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

import gc
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.errors import CheckpointError, DataError, ResultFileError, ShortLLMError
from shortllm.evaluation import TEMPERATURE, TOP_K, TOP_P
from shortllm.files import fingerprint
from shortllm.meters import Meter, Sampler, bounded_memory, is_out_of_memory, load_average, meter_of
from shortllm.model.blocks import text_config
from shortllm.model.decoder import Decoder
from shortllm.model.loading import load_model, quiet_transformers
from shortllm.recipe import BenchmarkOptions
from shortllm.results.benchmark import (
    UNFINISHED_BENCHMARK,
    Benchmark,
    BenchmarkedModel,
    Measurement,
    PeakMemory,
)
from shortllm.runtime import progress, versions
from shortllm.session import Session
from shortllm.texts import vocabulary

log = logging.getLogger(__name__)

Advance = Callable[[float], None]

STAND_IN_TOKENS = 12
"""Length of the prompt for a model without a tokenizer; about that of the usual prompt."""

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """A model that is measured, its prompt `[T]`, and the context its runs happen in."""

    name: str
    model: Any
    prompt_T: Tensor
    within: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(slots=True)
class _Runs:
    """What the runs of one subject in one cell have shown so far."""

    latencies_s: list[float] = field(default_factory=list)
    first_tokens_s: list[float] = field(default_factory=list)
    utilisation: list[float] = field(default_factory=list)
    memory: PeakMemory | None = None
    failed: bool = False


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


class Turns:
    """Models that are measured in turn on one device."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        options: BenchmarkOptions,
        device: torch.device,
        meter: Meter,
    ) -> None:
        self.subjects = subjects
        self.options = options
        self._device = device
        self._meter = meter
        self._arguments = _compiling() if options.compile else {}
        self._movable = device.type != "cpu" and len(subjects) > 1

    def measure(
        self, batch: int, new_tokens: int, advance: Advance = lambda runs: None
    ) -> list[Measurement]:
        """One cell of the sweep: a measurement for each subject.

        Args:
            advance: called with the number of runs done since its last call.
        Raises:
            ShortLLMError: a model that was to be compiled and cannot be.
        """
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), quiet_transformers():
            swapped = False
            runs = self._alternate(batch, new_tokens, advance, swapped=False)
            if runs is None:
                swapped = True
                runs = self._alternate(batch, new_tokens, advance, swapped=True)
        assert runs is not None
        return [
            _measurement(one.name, batch, new_tokens, found, swapped=swapped)
            for one, found in zip(self.subjects, runs, strict=True)
        ]

    def _alternate(
        self, batch: int, new_tokens: int, advance: Advance, *, swapped: bool
    ) -> list[_Runs] | None:
        """All runs of a cell, in turn; None where some do not fit beside the other models.

        Args:
            swapped: keep on the device only the model that runs.
        """
        self._forget_shapes()
        found = [_Runs() for _ in self.subjects]
        for number in range(self.options.warmup + self.options.runs):
            for place in in_turn(len(self.subjects), number):
                if not found[place].failed:
                    run = self._run(place, found[place], number, batch, new_tokens, swapped)
                    if not self._fits(run):
                        if self._movable and not swapped:
                            return None
                        found[place] = _Runs(failed=True)
                advance(1)
        return found

    def _run(
        self, place: int, runs: _Runs, number: int, batch: int, new_tokens: int, swapped: bool
    ) -> Callable[[], None]:
        """The run of one subject in one turn, to be called."""
        subject = self.subjects[place]

        def run() -> None:
            self._bring(subject, swapped=swapped)
            torch.manual_seed(self.options.seed + number)
            if number < self.options.warmup - 1:
                self._generate(subject, batch, new_tokens)
            elif number == self.options.warmup - 1:
                runs.memory = self._peak_memory(subject, batch, new_tokens, swapped=swapped)
            else:
                with Sampler(self._meter) as sampler:
                    latency = self._seconds(subject, batch, new_tokens)
                first_token = self._seconds(subject, batch, 1)
                runs.latencies_s.append(latency)
                runs.utilisation.extend(sampler.utilisation)
                runs.first_tokens_s.append(first_token)

        return run

    def _fits(self, run: Callable[[], None]) -> bool:
        """Make a run; False if memory did not suffice, with what it took given back."""
        try:
            with bounded_memory(self._device):
                run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        gc.collect()  # here the traceback no longer holds what the run had made
        self._meter.release()
        return False

    def _bring(self, subject: Subject, *, swapped: bool) -> None:
        """Have the subject on the device, and the other models too unless they are swapped."""
        if self._device.type == "cpu":
            return
        for other in self.subjects:
            if other.model is not subject.model:
                other.model.to(CPU if swapped else self._device)
        if swapped:
            self._meter.release()
        subject.model.to(self._device)

    def _seconds(self, subject: Subject, batch: int, new_tokens: int) -> float:
        """Time of one run from an idle device to an idle device, by the monotonic clock."""
        self._meter.synchronize()
        start = time.perf_counter()
        self._generate(subject, batch, new_tokens)
        self._meter.synchronize()
        return time.perf_counter() - start

    def _peak_memory(
        self, subject: Subject, batch: int, new_tokens: int, *, swapped: bool
    ) -> PeakMemory:
        """Peaks of one run, less the weights of the other models held meanwhile."""
        self._meter.release()
        self._meter.reset()
        with Sampler(self._meter) as sampler:
            self._generate(subject, batch, new_tokens)
            self._meter.synchronize()
            kept = self._meter.peaks()
        models = {id(one.model): one.model for one in self.subjects}
        del models[id(subject.model)]
        others = 0 if swapped else sum(map(weight_bytes, models.values()))
        peaks = {name: sampler.peak(name, kept) for name in PeakMemory.model_fields}
        return PeakMemory(
            **{name: None if peak is None else peak - others for name, peak in peaks.items()}
        )

    def _generate(self, subject: Subject, batch: int, new_tokens: int) -> None:
        """Sample exactly `new_tokens` tokens for each of `batch` copies of the prompt."""
        ids_BT = subject.prompt_T.repeat(batch, 1).to(self._device)
        with subject.within():
            output = subject.model.generate(
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                do_sample=True,
                top_k=TOP_K,
                top_p=TOP_P,
                temperature=TEMPERATURE,
                num_beams=1,
                use_cache=True,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,  # never used: all sequences have one length
                **self._arguments,
            )
        assert output.shape[1] == ids_BT.shape[1] + new_tokens
        if self._arguments and new_tokens > 1 and not hasattr(subject.model, "_compiled_call"):
            raise ShortLLMError(
                f"{subject.name} cannot be compiled: text of model type "
                f"'{subject.model.config.model_type}' is not generated with a static cache. Leave "
                "out --compile"
            )

    def _forget_shapes(self) -> None:
        """Compile anew for every cell: for its shapes alone, as if there were no other.

        A model also remembers its longest static cache (transformers 5), and would use it for
        shorter texts as well.
        """
        if self.options.compile:
            torch.compiler.reset()
            for subject in self.subjects:
                for name in ("_compiled_call", "_previous_max_cache_length"):
                    subject.model.__dict__.pop(name, None)


def in_turn(count: int, number: int) -> list[int]:
    """The order of `count` models in turn `number`: each turn begins with the next one."""
    return [(number + place) % count for place in range(count)]


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    tensors = {id(one): one for one in (*model.parameters(), *model.buffers())}
    return sum(one.numel() * one.element_size() for one in tensors.values())


def _measurement(
    name: str, batch: int, new_tokens: int, runs: _Runs, *, swapped: bool
) -> Measurement:
    """The figures of one model in one cell."""
    if runs.failed:
        return Measurement(model=name, batch=batch, new_tokens=new_tokens, status="out of memory")
    latencies = runs.latencies_s
    mean, median = statistics.fmean(latencies), statistics.median(latencies)
    first = statistics.median(runs.first_tokens_s)
    return Measurement(
        model=name,
        batch=batch,
        new_tokens=new_tokens,
        latencies_s=latencies,
        latency_mean_s=mean,
        latency_std_s=statistics.stdev(latencies) if len(latencies) > 1 else None,
        latency_median_s=median,
        tokens_per_s=batch * new_tokens / mean,
        first_token_s=first,
        per_token_s=(median - first) / (new_tokens - 1) if new_tokens > 1 else None,
        memory=runs.memory,
        utilisation_mean=statistics.fmean(runs.utilisation) if runs.utilisation else None,
        utilisation_max=max(runs.utilisation, default=None),
        swapped=swapped,
    )


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
    room = getattr(text_config(checkpoint.config), "max_position_embeddings", None)
    if isinstance(room, int) and prompt + new_tokens > room:
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


def _compiling() -> dict[str, Any]:
    """What `generate` is told so that it compiles the model, on any device."""
    from transformers import CompileConfig

    config = CompileConfig()
    config._compile_all_devices = True  # without it a CPU is left out without a word
    return {"cache_implementation": "static", "compile_config": config}
