"""The models of the page: all in memory, used one at a time.

Without names, the page shows the embedded model and two shortened versions of it, kept in

    $XDG_CACHE_HOME/shortllm/demo/<version>-<fingerprint>/
      width/    a quarter of the blocks' parameters removed from heads and neurons
      depth/    a quarter of the blocks removed by their ppl scores

Each version of shortllm and each embedded model has its own directory.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shortllm
from shortllm import __version__
from shortllm.benchmark.meters import Meter, meter_of
from shortllm.checkpoint.config import context_length
from shortllm.checkpoint.hub import EMBEDDED
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.errors import CheckpointError, OutputError, ShortLLMError
from shortllm.files import require_writable
from shortllm.model import Session
from shortllm.model.loading import load_model
from shortllm.pruning.targets import cache_bytes
from shortllm.records import ModelInfo
from shortllm.surgery.origin import lineage

if TYPE_CHECKING:
    import torch

RATIO = 0.25
"""Share of the embedded model that is removed: of its blocks, or of their parameters."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DemoModel:
    """One model in memory, and what its panel shows."""

    name: str
    info: ModelInfo
    kept: list[int]
    """The index of each block in the source model."""
    source_blocks: int
    """Number of blocks of the model it was shortened from."""
    model: Any
    tokenizer: Any
    has_chat_template: bool
    vocabulary: int
    positions: int | None
    """Most tokens of prompt and output together; None where the config sets no limit."""
    cache_bytes: int
    """Bytes of keys and values per token; 0 where the config does not say."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Models:
    """All models of the page; a text is generated under the lock."""

    models: list[DemoModel]
    device: torch.device
    meter: Meter
    lock: threading.Lock = field(default_factory=threading.Lock)

    def named(self, name: str) -> DemoModel:
        """The model with this name, or an error that lists the names."""
        for model in self.models:
            if model.name == name:
                return model
        raise ShortLLMError(
            f"no model is called '{name}'. Available: {', '.join(one.name for one in self.models)}"
        )

    def other_weight_bytes(self, model: DemoModel) -> int:
        """Bytes of the weights of all models but this one."""
        return sum(one.model.get_memory_footprint() for one in self.models if one is not model)


def open_models(locations: Mapping[str, str], session: Session) -> Models:
    """Load every model; a bad checkpoint or missing tokenizer is reported before any is loaded."""
    meter = meter_of(session.device)
    checkpoints = {name: open_checkpoint(location) for name, location in locations.items()}
    tokenizers = {name: load_tokenizer(one) for name, one in checkpoints.items()}
    models = [_load(name, one, tokenizers[name], session) for name, one in checkpoints.items()]
    return Models(models=models, device=session.device, meter=meter)


def _load(name: str, checkpoint: Checkpoint, tokenizer: Any, session: Session) -> DemoModel:
    try:
        origin = lineage(checkpoint)
        kept, source_blocks = origin.kept, origin.blocks
    except CheckpointError:  # not shortened, or its config does not say how
        kept, source_blocks = list(range(checkpoint.block_count)), checkpoint.block_count
    dtype = session.dtype(checkpoint)
    return DemoModel(
        name=name,
        info=checkpoint.info(),
        kept=kept,
        source_blocks=source_blocks,
        model=load_model(checkpoint, device=session.device, dtype=dtype),
        tokenizer=tokenizer,
        has_chat_template=bool(tokenizer.chat_template),
        vocabulary=checkpoint.vocabulary,
        positions=context_length(checkpoint.config),
        cache_bytes=checkpoint.block_count * cache_bytes(checkpoint, dtype),
    )


def embedded_models(session: Session) -> dict[str, str]:
    """Locations of the embedded model and its two shortened versions, by name."""
    checkpoint = open_checkpoint(EMBEDDED)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = cache / "shortllm" / "demo" / f"{__version__}-{checkpoint.fingerprint[:16]}"
    try:
        require_writable(home, 2 * checkpoint.bytes)
    except OutputError as error:
        raise OutputError(
            "the shortened versions of the embedded model are kept in the cache directory, and it "
            "cannot be written. Set XDG_CACHE_HOME to another one, or name models with --model"
        ) from error
    width, depth = _shorten_embedded(home, session)
    return {"original": EMBEDDED, "width": str(width), "depth": str(depth)}


def _shorten_embedded(home: Path, session: Session) -> tuple[Path, Path]:
    """Write `width/` and `depth/` into `home`; each step skips what is up to date."""
    runtime = session.runtime
    width, depth = home / "width", home / "depth"
    options = shortllm.WidthOptions(method="flap", ratio=RATIO)
    shortllm.width(
        EMBEDDED, width, options=options, device=runtime.device, dtype=runtime.dtype, overwrite=True
    )
    scores = shortllm.score(EMBEDDED, out=home / "scores", runtime=runtime, overwrite=True)
    plan = shortllm.plan(scores, ratio=RATIO)
    try:
        shortllm.prune(EMBEDDED, plan, depth, runtime=runtime, overwrite=True)
    except OutputError:  # prune never replaces a damaged checkpoint, but this one is the demo's own
        shutil.rmtree(depth, ignore_errors=True)
        shortllm.prune(EMBEDDED, plan, depth, runtime=runtime, overwrite=True)
    return width, depth
