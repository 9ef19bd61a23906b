"""Models in memory or streamed from files; nothing here depends on the name of a family.

Session           the one model that is open at a time, on which device and in which type
loading.py        a checkpoint in memory         streamed.py   blocks read from files
decoder.py        embed, blocks, head            bypass.py     run without some blocks
walk.py           many removals in one pass      backward.py   gradients, block by block
hidden_states.py  where hidden states are kept   metrics.py    NLL, KL, cosine
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm.options import options_from
from shortllm.runtime import DeviceOptions, Runtime, choose_device, choose_dtype

if TYPE_CHECKING:
    import torch

    from shortllm.checkpoint.source import Checkpoint
    from shortllm.model.decoder import Decoder
    from shortllm.model.hidden_states import StreamMemory

log = logging.getLogger(__name__)


class Session:
    """Device, computation type, and the one model that is open at a time."""

    def __init__(self, runtime: DeviceOptions | None = None, **options: Any) -> None:
        """Take a `Runtime`, or its fields as keywords."""
        kind = type(runtime) if isinstance(runtime, Runtime) else Runtime
        self.runtime = options_from(kind, options, base=runtime)
        self.attention: str | None = getattr(self.runtime, "attention", None)
        self.device = choose_device(self.runtime.device)
        self._held: tuple[Checkpoint, Decoder, str] | None = None

    def release(self) -> None:
        """Free the open model."""
        self._held = None
        gc.collect()

    def decoder(self, checkpoint: Checkpoint) -> Decoder:
        """The checkpoint's decoder, in memory or streamed; another open one is freed first."""
        from shortllm.model.decoder import Decoder
        from shortllm.model.loading import load_model, require_runs, use_attention
        from shortllm.model.streamed import open_streamed

        if not self._is_open(checkpoint):
            self.release()
            if self.streams(checkpoint):
                dtype = self._torch_dtype(checkpoint)
                decoder = open_streamed(checkpoint, device=self.device, dtype=dtype)
            else:
                model = load_model(checkpoint, device=self.device, dtype=self.runtime.dtype)
                require_runs(checkpoint, model)
                decoder = Decoder(model)
            if self.attention is not None:
                use_attention(checkpoint, decoder.model, self.attention)
            # the fingerprint is read now: the directory may be renamed later
            self._held = (checkpoint, decoder, checkpoint.fingerprint)
        assert self._held is not None
        return self._held[1]

    def _is_open(self, checkpoint: Checkpoint) -> bool:
        """Whether this is the open model; a streamed one also needs the same files."""
        if self._held is None or self._held[2] != checkpoint.fingerprint:
            return False
        return not self._held[1].streamed or self._held[0].directory == checkpoint.directory

    def memory(self, directory: Path | None = None) -> StreamMemory:
        """Where hidden states are kept; beyond the limit in a file in `directory`."""
        from shortllm.model.hidden_states import StreamMemory

        return StreamMemory(limit=self.runtime.max_memory, directory=directory)

    def dtype(self, checkpoint: Checkpoint) -> str:
        """Name of the computation type for a checkpoint, e.g. `float32`."""
        return str(self._torch_dtype(checkpoint)).removeprefix("torch.")

    def _torch_dtype(self, checkpoint: Checkpoint) -> torch.dtype:
        from shortllm.model.loading import stored_dtype

        return choose_dtype(self.runtime.dtype, self.device, stored_dtype(checkpoint))

    def streams(self, checkpoint: Checkpoint) -> bool:
        """Whether blocks are read one at a time: as requested, or if the model does not fit."""
        from shortllm.model.loading import room_for

        if self.runtime.stream is not None:
            return self.runtime.stream
        room = room_for(checkpoint, device=self.device, dtype=self._torch_dtype(checkpoint))
        if not room.suffices:
            told = "%s: %s; its blocks are read one at a time from the files (streamed)"
            log.info(told, checkpoint.id, room)
        return not room.suffices
