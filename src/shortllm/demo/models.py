"""The models of the page: opened once, side by side in memory, used one after another."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shortllm.benchmark.interleaved import weight_bytes
from shortllm.benchmark.meters import Meter, meter_of
from shortllm.checkpoint.config import text_config
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.data.texts import vocabulary
from shortllm.errors import CheckpointError, ShortLLMError
from shortllm.model.loading import load_model
from shortllm.model.session import Session
from shortllm.pruning.targets import cache_bytes
from shortllm.records import ModelInfo
from shortllm.surgery.apply import lineage

if TYPE_CHECKING:
    import torch

LONGEST_NAME = 40
"""Characters of a panel's name."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DemoModel:
    """One model in memory, and what its panel says of it."""

    name: str
    info: ModelInfo
    kept: list[int]
    """For each block its number in the model it was cut from."""
    source_blocks: int
    """Blocks of that model."""
    model: Any
    tokenizer: Any
    vocabulary: int
    positions: int | None
    """Tokens of prompt and text together; None where the config names no bound."""
    cache_bytes: int
    """Bytes of keys and values of one token, as far as the config tells."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Models:
    """All models of the page; whoever generates holds the lock."""

    models: list[DemoModel]
    device: torch.device
    meter: Meter
    lock: threading.Lock = field(default_factory=threading.Lock)

    def named(self, name: str) -> DemoModel:
        """The model of a panel.

        Raises:
            ShortLLMError: there is none of this name.
        """
        for model in self.models:
            if model.name == name:
                return model
        raise ShortLLMError(
            f"no model is called '{name}'. Available: {', '.join(one.name for one in self.models)}"
        )

    def weights_beside(self, model: DemoModel) -> int:
        """Bytes of the weights of all other models."""
        return sum(weight_bytes(one.model) for one in self.models if one is not model)


def named_models(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Names and places as a dict.

    Raises:
        ShortLLMError: a name that is blank, too long, or given twice.
    """
    found: dict[str, str] = {}
    for name, place in pairs:
        if not name.strip() or not place.strip():
            raise ShortLLMError(
                f"--model '{name}={place}' is not of the form NAME=MODEL, e.g. healed=runs/short"
            )
        if len(name) > LONGEST_NAME:
            raise ShortLLMError(
                f"the name '{name}' is longer than {LONGEST_NAME} characters. Give a shorter one"
            )
        if name in found:
            raise ShortLLMError(f"two models are called '{name}'. Give each its own name")
        found[name] = place
    return found


def open_models(places: Mapping[str, str], session: Session) -> Models:
    """Open every model by its name; those that cannot be opened are found before any is loaded.

    Raises:
        CheckpointError: one that cannot be read, or has no tokenizer.
        ShortLLMError: the device cannot be measured, or memory does not suffice.
    """
    meter = meter_of(session.device)
    checkpoints = {name: open_checkpoint(place) for name, place in places.items()}
    tokenizers = {name: load_tokenizer(one) for name, one in checkpoints.items()}
    return Models(
        models=[
            _opened(name, checkpoint, tokenizers[name], session)
            for name, checkpoint in checkpoints.items()
        ],
        device=session.device,
        meter=meter,
    )


def _opened(name: str, checkpoint: Checkpoint, tokenizer: Any, session: Session) -> DemoModel:
    try:
        origin = lineage(checkpoint)
        kept, source_blocks = origin.kept, origin.blocks
    except CheckpointError:  # it was not shortened, or does not say how
        kept, source_blocks = list(range(checkpoint.block_count)), checkpoint.block_count
    dtype = session.dtype(checkpoint)
    room = getattr(text_config(checkpoint.config), "max_position_embeddings", None)
    return DemoModel(
        name=name,
        info=checkpoint.info(),
        kept=kept,
        source_blocks=source_blocks,
        model=load_model(checkpoint, device=session.device, dtype=dtype),
        tokenizer=tokenizer,
        vocabulary=vocabulary(checkpoint),
        positions=room if isinstance(room, int) else None,
        cache_bytes=checkpoint.block_count * cache_bytes(checkpoint, dtype),
    )
