"""What a model is made of and what scoring it would take, without loading it."""

from __future__ import annotations

from shortllm.checkpoint.source import Checkpoint
from shortllm.estimate import Estimate, Options, Probe, Setting, estimates, probe_machine
from shortllm.results.record import ModelInfo, Record


class ModelSummary(Record):
    """`shortllm info` as data."""

    model: ModelInfo
    parameters_outside: int
    """Elements outside the blocks: embeddings, final norm, head."""
    bytes_per_block: list[int]
    protected: list[int]
    """Blocks that are protected by default."""
    samples: int
    length: int
    device: str
    dtype: str
    """Computation type."""
    probe: Probe | None
    estimates: list[Estimate]
    """Of each kind of pass, with the model in memory and streamed."""
    streamed: bool
    """Whether blocks would be read one at a time now, where nothing else is asked for."""
    why: str
    """Memory needed and free, which decides it."""

    def saved_by(self, blocks: int) -> tuple[float, float]:
        """Parts of the parameters and of the bytes that go with `blocks` average blocks."""
        share = blocks / self.model.blocks
        parameters = sum(self.model.parameters_per_block) * share / self.model.parameters
        return parameters, sum(self.bytes_per_block) * share / self.model.bytes


def summarize(
    checkpoint: Checkpoint,
    *,
    samples: int = 10,
    length: int = 128,
    device: str = "auto",
    dtype: str = "auto",
    options: Options | None = None,
    probe: bool = True,
) -> ModelSummary:
    """Sizes of a checkpoint's parts, and what it takes to score `samples` of `length` tokens.

    Args:
        options: for a criterion its options.
        probe: measure the machine for two seconds; without, no times are foretold.
    """
    from shortllm.budget import Budget, protected_blocks
    from shortllm.model.loading import room_for, stored_dtype
    from shortllm.runtime import choose_device, choose_dtype

    info = checkpoint.info()
    chosen = choose_device(device)
    setting = Setting(
        checkpoint=checkpoint,
        device=chosen,
        dtype=choose_dtype(dtype, chosen, stored_dtype(checkpoint)),
        samples=samples,
        length=length,
        options=options or {},
    )
    room = room_for(checkpoint, device=chosen, dtype=setting.dtype)
    measured = probe_machine(setting) if probe else None
    return ModelSummary(
        model=info,
        parameters_outside=info.parameters - sum(info.parameters_per_block),
        bytes_per_block=checkpoint.bytes_per_block,
        protected=protected_blocks(Budget(ratio=0.5), info),
        samples=samples,
        length=length,
        device=str(chosen),
        dtype=str(setting.dtype).removeprefix("torch."),
        probe=measured,
        estimates=estimates(setting, measured),
        streamed=not room.suffices,
        why=str(room),
    )
