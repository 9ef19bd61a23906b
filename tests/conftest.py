"""For all tests: offline, one torch thread, and where the real models and data lie."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
os.environ.pop("SHORTLLM_DATA", None)
# shared by the processes of a run, and by runs
os.environ["SHORTLLM_CACHE"] = str(Path(tempfile.gettempdir()) / f"shortllm-tests-{os.getuid()}")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

REPOSITORY = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Without the slow tests each property is tried on fewer examples."""
    few = "not slow" in (config.getoption("markexpr") or "")
    settings.register_profile("here", max_examples=25 if few else 100)
    settings.load_profile("here")


def pytest_collection_finish() -> None:
    """What was imported need not be gone through whenever a model is let go."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of real models and data; tests that use it carry the mark `shared`."""
    directory = Path(os.environ.get("SHORTLLM_SHARED") or REPOSITORY.parent / "shared").resolve()
    if not (directory / "models").is_dir() or not (directory / "data").is_dir():
        pytest.skip(f"no models/ and data/ in {directory}: set SHORTLLM_SHARED")
    return directory


@pytest.fixture(scope="session")
def smollm_gguf(shared: Path) -> Path:
    """SmolLM2-135M-Instruct in 4 bits, as a GGUF file."""
    return shared / "models" / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm(smollm_gguf: Path) -> Path:
    """The directory of the dequantized SmolLM2."""
    from shortllm.checkpoint.dequantize import dequantized

    return dequantized(smollm_gguf)
