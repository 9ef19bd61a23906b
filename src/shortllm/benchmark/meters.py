"""Meters of a device during a run: when it is done, its peak memory, and its utilisation.

meter_of(device) ─► Meter      synchronize, reset, peaks, sample, release
Sampler(meter)                 a thread that samples during a run

          done when          peak memory                    utilisation
cuda      synchronised       allocator; NVML, device        NVML, whole device
mps       synchronised       allocator, sampled             unknown
cpu       call returns       resident memory of the         CPU time of this process over
                             process                        that of the processors it may use
"""

from __future__ import annotations

import os
import platform
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from shortllm.benchmark.options import PeakMemory
from shortllm.errors import ShortLLMError, install_hint
from shortllm.runtime import available_memory

INTERVAL_S = 0.1
"""Between two samples; NVML itself averages over 1/6 s to 1 s."""

OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "ALLOC_FAILED",
    "bad_alloc",
    "can't start new thread",
)
"""Messages of out-of-memory errors without a class of their own."""


class Sample(PeakMemory):
    """Memory at one moment of a run, and utilisation (0 to 1) since the sample before."""

    utilisation: float | None = None


class Meter:
    """Readings of one device: one that is idle when a call returns, without peaks or a cache."""

    name: str

    def synchronize(self) -> None:
        """Return when the device has finished its work."""

    def reset(self) -> None:
        """Begin a run: forget the peaks so far."""

    def peaks(self) -> Sample:
        """Memory peaks since the last reset, as far as the device keeps them itself."""
        return self.sample()

    def sample(self) -> Sample:
        """Utilisation of the device since the last sample, and memory in use."""
        return Sample()

    def release(self) -> None:
        """Free cached memory."""


def meter_of(device: torch.device) -> Meter:
    """The meter of a device."""
    if device.type == "cpu":
        return _CpuMeter()
    if device.type == "cuda":
        return _CudaMeter(device)
    if device.type == "mps":
        return _MpsMeter()
    raise ShortLLMError(f"device '{device}' cannot be measured. Available: cpu, cuda, mps")


class _CpuMeter(Meter):
    """This process on a CPU, whose work is done when a call returns."""

    def __init__(self) -> None:
        self.name = _processor()
        self._process = psutil.Process()
        affinity = hasattr(os, "sched_getaffinity")
        self._processors = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
        self._keeps_peaks = False
        self._last = _clocks()

    def reset(self) -> None:
        self._last = _clocks()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory so far
            self._keeps_peaks = True
        except OSError:  # not Linux, or a container that refuses the writing
            self._keeps_peaks = False

    def peaks(self) -> Sample:
        if not self._keeps_peaks:
            return Sample()
        lines = Path("/proc/self/status").read_text().splitlines()
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
        return Sample(process_bytes=found[0] if found else None)

    def sample(self) -> Sample:
        (wall, busy), self._last = self._last, _clocks()
        share = (self._last[1] - busy) / max(self._last[0] - wall, 1e-9) / self._processors
        return Sample(utilisation=share, process_bytes=self._process.memory_info().rss)


def _clocks() -> tuple[float, float]:
    """Seconds that went by, and seconds of processor time of this process, to the microsecond.

    The counters of /proc, which psutil reads, move in steps of 10 ms: a short run would show 0.
    """
    return time.perf_counter(), time.process_time()


class _CudaMeter(Meter):
    """A CUDA device by torch's allocator and NVML; a ROCm device by torch's allocator alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.name = torch.cuda.get_device_name(device)
        self._handle = None if torch.version.hip else nvml_handle(device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peaks(self) -> Sample:
        return Sample(
            allocated_bytes=torch.cuda.max_memory_allocated(self._device),
            reserved_bytes=torch.cuda.max_memory_reserved(self._device),
        )

    def sample(self) -> Sample:
        if self._handle is None:
            return Sample()
        busy, used = nvml_reading(self._handle)
        return Sample(utilisation=busy, device_bytes=used)

    def release(self) -> None:
        torch.cuda.empty_cache()


class _MpsMeter(Meter):
    """An Apple GPU, which keeps no peaks: memory is sampled."""

    def __init__(self) -> None:
        self.name = f"{_processor()} GPU"

    def synchronize(self) -> None:
        torch.mps.synchronize()

    def sample(self) -> Sample:
        return Sample(
            allocated_bytes=torch.mps.current_allocated_memory(),
            reserved_bytes=torch.mps.driver_allocated_memory(),
        )

    def release(self) -> None:
        torch.mps.empty_cache()


def nvml_handle(device: torch.device) -> Any:
    """NVML's handle of a device by its UUID: torch and NVML may number devices differently."""
    try:
        import pynvml
    except ImportError as error:
        raise ShortLLMError(
            f"measuring on a CUDA device needs nvidia-ml-py. Install it with: {install_hint('gpu')}"
        ) from error
    identity = str(torch.cuda.get_device_properties(device).uuid)
    try:
        pynvml.nvmlInit()
        prefix = "" if identity.startswith(("GPU-", "MIG-")) else "GPU-"
        return pynvml.nvmlDeviceGetHandleByUUID(prefix + identity)
    except pynvml.NVMLError as error:
        raise ShortLLMError(
            f"NVML does not know the device {device} ({error}). Check the driver with nvidia-smi"
        ) from error


def nvml_reading(handle: Any) -> tuple[float | None, int | None]:
    """Utilisation (0 to 1) and bytes in use of a device, all processes; None if not reported."""
    import pynvml

    def reading(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except pynvml.NVMLError:  # parts of a shared device do not report it
            return None

    return (
        reading(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
        reading(lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)),
    )


class Sampler:
    """Samples a meter from a thread within a `with` block; the last sample is taken at its end."""

    def __init__(self, meter: Meter, interval_s: float = INTERVAL_S) -> None:
        self._meter = meter
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.samples: list[Sample] = []

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.samples.append(self._meter.sample())

    def __enter__(self) -> Sampler:
        self._meter.sample()  # the start of the first interval
        self._thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._stop.set()
        self._thread.join()
        self.samples.append(self._meter.sample())

    @property
    def utilisation(self) -> list[float]:
        """Utilisation of every sample that has it."""
        return [one.utilisation for one in self.samples if one.utilisation is not None]

    def peak(self, name: str, kept: Sample) -> int | None:
        """The highest of the samples and of the device's own peak, in bytes."""
        found = [getattr(one, name) for one in (kept, *self.samples)]
        return max((value for value in found if value is not None), default=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory did not suffice, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in OUT_OF_MEMORY)


@contextmanager
def bounded_memory(device: torch.device) -> Iterator[None]:
    """Within the context, a CPU process that allocates more than is free gets an error.

    Otherwise Linux would grant it and then kill the process. Other devices raise by themselves.
    """
    if device.type != "cpu" or platform.system() != "Linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = psutil.Process().memory_info().data + (available_memory(device) or 0)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _processor() -> str:
    """The processor's model name, or as much as the system reports."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
