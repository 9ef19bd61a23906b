"""What a model is made of and what scoring it would take, from its tensor table alone."""

from __future__ import annotations

from shortllm.checkpoint.source import Checkpoint
from shortllm.results import ModelInfo, Record

FLOAT32_BYTES = 4


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
    scoring_flops: float
    """Floating-point operations of scoring all blocks by `ppl`, dense blocks assumed."""
    scoring_bytes: int
    """Memory of scoring in float32: weights, streams of one group, one slice of the head."""

    def saved_by(self, blocks: int) -> tuple[float, float]:
        """Parts of the parameters and of the bytes that go with `blocks` average blocks."""
        share = blocks / self.model.blocks
        parameters = sum(self.model.parameters_per_block) * share / self.model.parameters
        return parameters, sum(self.bytes_per_block) * share / self.model.bytes


def summarize(checkpoint: Checkpoint, *, samples: int = 10, length: int = 128) -> ModelSummary:
    """Sizes of a checkpoint's parts, and the cost of scoring `samples` of `length` tokens by `ppl`.

    FLOPs = 2 x parameters of a block x tokens x L(L+1)/2, and the head once per candidate.
    """
    from shortllm.model.blocks import text_config
    from shortllm.model.walk import CPU_GROUP_TOKENS, CPU_LOSS_BYTES
    from shortllm.planning import Budget, protected_blocks

    info = checkpoint.info()
    config = text_config(checkpoint.config)
    head = config.vocab_size * config.hidden_size
    tokens = samples * length
    walk = sum(2.0 * n * (b + 1) for b, n in enumerate(info.parameters_per_block)) * tokens
    streams = (info.blocks + 1) * max(length, CPU_GROUP_TOKENS) * config.hidden_size
    return ModelSummary(
        model=info,
        parameters_outside=info.parameters - sum(info.parameters_per_block),
        bytes_per_block=_bytes_per_block(checkpoint),
        protected=protected_blocks(Budget(ratio=0.5), info),
        samples=samples,
        length=length,
        scoring_flops=walk + 2.0 * head * tokens * (info.blocks + 1),
        scoring_bytes=(info.parameters + streams) * FLOAT32_BYTES + CPU_LOSS_BYTES,
    )


def _bytes_per_block(checkpoint: Checkpoint) -> list[int]:
    totals = [0] * checkpoint.block_count
    for entry in checkpoint.tensors.values():
        block = checkpoint.block_names.block_of(entry.name)
        if block is not None:
            totals[block] += entry.bytes
    return totals
