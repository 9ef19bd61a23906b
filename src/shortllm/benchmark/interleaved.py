"""Interleaved runs of several models on one device: one cell of a sweep, and its figures."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shortllm.benchmark.meters import Sampler, bounded_memory, is_out_of_memory, meter_of
from shortllm.benchmark.options import BenchmarkOptions, Measurement, PeakMemory
from shortllm.errors import ShortLLMError
from shortllm.evaluation.options import SAMPLING
from shortllm.progress import Advance
from shortllm.runtime import quiet_transformers

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """A model that is measured, its prompt `[T]`, and the context its runs happen in."""

    name: str
    model: Any
    prompt_T: Tensor
    within: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(slots=True)
class Runs:
    """Figures of one candidate's runs in one cell so far."""

    latencies_s: list[float] = field(default_factory=list)
    first_tokens_s: list[float] = field(default_factory=list)
    utilisation: list[float] = field(default_factory=list)
    memory: PeakMemory | None = None
    failed: bool = False


class InterleavedRuns:
    """Models that are measured in turn on one device."""

    def __init__(
        self, candidates: Sequence[Candidate], options: BenchmarkOptions, device: torch.device
    ) -> None:
        self.candidates = candidates
        self.options = options
        self._device = device
        self._meter = meter_of(device)
        self._arguments: dict[str, Any] = {}
        """More arguments of `generate`."""
        if options.compile:
            from transformers import CompileConfig

            config = CompileConfig()
            config._compile_all_devices = True  # without it a CPU is silently left out
            self._arguments = {"cache_implementation": "static", "compile_config": config}
        self._movable = device.type != "cpu" and len(candidates) > 1

    def measure(
        self, batch: int, new_tokens: int, advance: Advance = lambda runs: None
    ) -> list[Measurement]:
        """One cell of the sweep: a measurement for each candidate."""
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), quiet_transformers():
            runs = self._alternate(batch, new_tokens, advance, swapped=False)
            swapped = not runs
            runs = runs or self._alternate(batch, new_tokens, advance, swapped=True)
        return [
            measurement_of(one.name, batch, new_tokens, found, swapped=swapped)
            for one, found in zip(self.candidates, runs, strict=True)
        ]

    def _alternate(
        self, batch: int, new_tokens: int, advance: Advance, *, swapped: bool
    ) -> list[Runs]:
        """All runs of a cell, in turn; none if some do not fit next to the other models.

        With `swapped`, only the model that runs is on the device.
        """
        self._forget_shapes()
        found = [Runs() for _ in self.candidates]
        for number in range(self.options.warmup + self.options.runs):
            for place in in_turn(len(self.candidates), number):
                if not found[place].failed:
                    turn = (self.candidates[place], found[place], number, batch, new_tokens)
                    if not self._fits(partial(self._run, *turn, swapped)):
                        if self._movable and not swapped:
                            return []
                        found[place] = Runs(failed=True)
                advance(1)
        return found

    def _run(
        self, candidate: Candidate, runs: Runs, number: int, batch: int, new_tokens: int,
        swapped: bool,
    ) -> None:  # fmt: skip
        """The run of one candidate in one turn."""
        self._bring(candidate, swapped=swapped)
        torch.manual_seed(self.options.seed + number)
        if number < self.options.warmup - 1:
            self._generate(candidate, batch, new_tokens)
        elif number == self.options.warmup - 1:
            runs.memory = self._peak_memory(candidate, batch, new_tokens, swapped=swapped)
        else:
            with Sampler(self._meter) as sampler:
                latency = self._seconds(candidate, batch, new_tokens)
            first_token = self._seconds(candidate, batch, 1)
            runs.latencies_s.append(latency)
            runs.utilisation.extend(sampler.utilisation)
            runs.first_tokens_s.append(first_token)

    def _fits(self, run: Callable[[], None]) -> bool:
        """Make a run; False if memory did not suffice, which is then freed."""
        try:
            with bounded_memory(self._device):
                run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        gc.collect()  # here the traceback no longer keeps the run's tensors alive
        self._meter.release()
        return False

    def _bring(self, candidate: Candidate, *, swapped: bool) -> None:
        """Have the candidate on the device, and the other models too unless they are swapped."""
        if self._device.type == "cpu":
            return
        for other in self.candidates:
            if other.model is not candidate.model:
                other.model.to(CPU if swapped else self._device)
        if swapped:
            self._meter.release()
        candidate.model.to(self._device)

    def _seconds(self, candidate: Candidate, batch: int, new_tokens: int) -> float:
        """Time of one run from an idle device to an idle device, by the monotonic clock."""
        self._meter.synchronize()
        start = time.perf_counter()
        self._generate(candidate, batch, new_tokens)
        self._meter.synchronize()
        return time.perf_counter() - start

    def _peak_memory(
        self, candidate: Candidate, batch: int, new_tokens: int, *, swapped: bool
    ) -> PeakMemory:
        """Peaks of one run, minus the weights of the other models in memory."""
        self._meter.release()
        self._meter.reset()
        with Sampler(self._meter) as sampler:
            self._generate(candidate, batch, new_tokens)
            self._meter.synchronize()
            kept = self._meter.peaks()
        models = {id(one.model): one.model for one in self.candidates}
        del models[id(candidate.model)]
        others = 0 if swapped else sum(one.get_memory_footprint() for one in models.values())
        peaks = {name: sampler.peak(name, kept) for name in PeakMemory.model_fields}
        return PeakMemory(
            **{name: None if peak is None else peak - others for name, peak in peaks.items()}
        )

    def _generate(self, candidate: Candidate, batch: int, new_tokens: int) -> None:
        """Sample exactly `new_tokens` tokens for each of `batch` copies of the prompt."""
        ids_BT = candidate.prompt_T.repeat(batch, 1).to(self._device)
        with candidate.within():
            output = candidate.model.generate(
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                do_sample=True,
                num_beams=1,
                use_cache=True,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,  # never used: all sequences have one length
                **SAMPLING,
                **self._arguments,
            )
        assert output.shape[1] == ids_BT.shape[1] + new_tokens
        if self._arguments and new_tokens > 1 and not hasattr(candidate.model, "_compiled_call"):
            raise ShortLLMError(
                f"{candidate.name} cannot be compiled: text of model type "
                f"'{candidate.model.config.model_type}' is not generated with a static cache. "
                "Leave out --compile"
            )

    def _forget_shapes(self) -> None:
        """Compile again for every cell: for its shapes alone, as if there were no other.

        A model also remembers its longest static cache (transformers 5), and would use it for
        shorter texts as well.
        """
        if self.options.compile:
            torch.compiler.reset()
            for candidate in self.candidates:
                for name in ("_compiled_call", "_previous_max_cache_length"):
                    candidate.model.__dict__.pop(name, None)


def in_turn(count: int, number: int) -> list[int]:
    """The order of `count` models in turn `number`: each turn begins with the next one."""
    return [(number + place) % count for place in range(count)]


def measurement_of(
    name: str, batch: int, new_tokens: int, runs: Runs, *, swapped: bool
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
