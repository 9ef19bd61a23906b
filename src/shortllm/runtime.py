"""What a run has around it: device, computation type, memory, versions, other processes."""

from __future__ import annotations

import io
import logging
import os
import platform
import re
import resource
from collections.abc import Iterable, Iterator
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import ByteSize, Field, field_validator

from shortllm import __version__
from shortllm.errors import ShortLLMError, first_line_of
from shortllm.options import Flag, Options

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Anything = TypeVar("Anything")

DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "npu")
"""Kinds of devices that a model can run on, by torch's names."""

_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


@contextmanager
def trusting_remote_code() -> Iterator[None]:
    """Allow the Python code of every checkpoint that is opened within the context.

    Model types that transformers knows never run such code.

    Returns:
        A context.
    """
    before = _trusted.set(True)
    try:
        yield
    finally:
        _trusted.reset(before)


def is_trusted() -> bool:
    """Whether code of checkpoints may be run."""
    return _trusted.get()


Attention = Annotated[
    Literal["sdpa", "eager", "flash_attention_2"] | None,
    Flag(name="--attn"),
    Field(description="Attention implementation. Default: the model's own."),
]
"""Type of the option that says how attention is computed."""


class Trust(Options):
    """Whether Python code that comes with a checkpoint may run."""

    panel: ClassVar[str] = "Safety"

    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with a checkpoint."
    )

    def applied(self) -> AbstractContextManager[None]:
        """A context in which code of checkpoints may run, if these options allow it."""
        return trusting_remote_code() if self.trust_remote_code else nullcontext()


class DeviceOptions(Trust):
    """Where models run, for work that needs a whole model in memory or none at all."""

    panel: ClassVar[str] = "Device and memory"

    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1 or mps.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Computation type. auto: float32 on a CPU, else the checkpoint's own.",
    )

    @field_validator("device", "dtype", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        """`torch.device` and `torch.dtype` by their names."""
        if type(given).__module__ == "torch" or isinstance(given, str):
            return str(given).removeprefix("torch.")
        return given


class Runtime(DeviceOptions):
    """Where and how models run."""

    stream: bool | None = Field(
        default=None,
        description="Read the blocks one at a time from the files. Default: only where the model "
        "does not fit.",
    )
    max_memory: ByteSize | None = Field(
        default=None,
        description="Keep hidden states beyond this size in a file, e.g. 4GiB. Default: half of "
        "the free memory.",
    )


class ScoringRuntime(Runtime):
    """Where and how models run that are scored."""

    attention: Attention = None


def check_device(name: str) -> None:
    """Refuse an unknown device, and CUDA where torch has none; does not load torch."""
    kind, _, number = name.partition(":")
    if kind not in ("auto", *DEVICES) or (":" in name and not number.isdecimal()):
        near = {"gpu": "cuda", "nvidia": "cuda", "metal": "mps"}.get(kind.lower())
        hint = f" Did you mean '{near}'? Available: auto, " if near else " Available: auto, "
        raise ShortLLMError(f"unknown --device '{name}'.{hint}{', '.join(DEVICES)}, cuda:1")
    if kind == "cuda" and torch_is_for_cpus():
        raise ShortLLMError(
            f"--device {name} cannot be used: torch {version('torch')} is built without CUDA. Use "
            "--device cpu, or install a build of torch for your GPU"
        )


def check_attention(attention: str | None, device: torch.device) -> None:
    """Refuse an attention implementation that is not available, before a model is loaded."""
    from transformers.utils import is_flash_attn_2_available

    if attention != "flash_attention_2":
        return
    if device.type != "cuda":
        raise ShortLLMError(
            f"--attn flash_attention_2 works on CUDA devices, not on {device}. Use --attn sdpa"
        )
    if not is_flash_attn_2_available():
        raise ShortLLMError(
            "--attn flash_attention_2 needs flash-attn. Install it with: pip install flash-attn"
        )


def torch_is_for_cpus() -> bool:
    """Whether torch is built without support of GPUs; does not load torch."""
    return version("torch").endswith("+cpu")


def choose_device(name: str = "auto") -> torch.device:
    """`auto` (an accelerator if there is one, else the CPU) or a torch device name."""
    check_device(name)
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ShortLLMError(
            f"--device {name} cannot be used: {first_line_of(error)}. Use --device auto or cpu"
        ) from error
    return device


def choose_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Computation type: `auto` is float32 on a CPU, else the checkpoint's own type."""
    import torch

    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    return torch.float32 if device.type == "cpu" else stored


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on the device; None where it does not say."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    return None


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that share one measurement (`accelerate launch`, `torchrun`)."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def mine(self, samples: torch.Tensor) -> torch.Tensor:
        """This process's share of `[samples, ...]`, which must be one or more."""
        if len(samples) < self.count:
            raise ShortLLMError(
                f"{len(samples)} samples cannot be shared by {self.count} processes. Start "
                f"{len(samples)} or fewer, or ask for more --samples"
            )
        return self.share(samples)

    def share(self, samples: torch.Tensor) -> torch.Tensor:
        """This process's share of `[samples, ...]`; none where there are too few."""
        return samples[self.rank :: self.count]

    def share_of_last_quarter(self, samples: int) -> int:
        """How many of this process's samples are of the last quarter of those of all; one or more
        of all."""
        total = int(self.total(float(samples)))
        border = total - max(1, total // 4)
        return samples - len(range(self.rank, border, self.count))

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.count > 1:
            import torch.distributed

            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        import torch

        tensor = torch.tensor(value, dtype=torch.float64)
        self.add_up([tensor])
        return float(tensor.item())

    def gather(self, own: Anything) -> list[Anything]:
        """What each process has; tensors are on the CPU and may differ in shape."""
        if self.count == 1:
            return [own]
        import torch.distributed

        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, own)
        return found

    def in_order(self, own: torch.Tensor) -> torch.Tensor:
        """What all processes found for their shares of the samples, in the samples' order."""
        import torch

        parts = self.gather(own)
        found = torch.empty(sum(map(len, parts)), *own.shape[1:], dtype=own.dtype)
        for rank, part in enumerate(parts):
            found[rank :: self.count] = part
        return found

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.barrier()


ALONE = Ranks()
"""One process that has all samples."""


def is_main_process() -> bool:
    """Whether this process speaks to the user, of those a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def join_ranks() -> Ranks:
    """The processes this one was launched with; alone unless a launcher said otherwise."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    import torch
    import torch.distributed

    if not torch.distributed.is_initialized():
        both = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(both)
    return Ranks(torch.distributed.get_rank(), count)


def peak_memory() -> int:
    """Peak resident memory of this process, bytes."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    # on Linux that would be at least the memory of the process that started this one
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    import torch
    import transformers

    return {
        "shortllm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bar and no warnings of transformers: what matters is checked and raised here."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


class _Nowhere(io.TextIOBase):
    """Drops what is written; never closed, because libraries keep a reference to it."""

    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Nothing that libraries print, and of these loggers only errors."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with redirect_stdout(_Nowhere()), redirect_stderr(_Nowhere()):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
