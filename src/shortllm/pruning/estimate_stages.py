"""Time of the stages of a run besides scoring, from the same rates of the machine.

    evaluate  2 x (block and head) parameters x tokens
    heal      two models through all blocks, three models' loss on a quarter of the text, and in
              float64 for one gap: products of X, and for each ridge a Cholesky factor of it
    retrain   a step forward, and backward as often as the method needs gradients: of activations
              (lora), of activations and weights (full)
    bench     for each token one call of each block and of the head with one token

Each is for one model, with the defaults of its command. Embedded text, tokenizers, saving and
verifying are not counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shortllm.benchmark.options import BenchmarkOptions
from shortllm.healing.options import SAMPLE_LENGTH, HealCalibration
from shortllm.pruning.machine import MachineRates, Setting
from shortllm.records import Record
from shortllm.retraining.options import RetrainOptions

if TYPE_CHECKING:
    from shortllm.model.decoder import Decoder

EVALUATED = 100_000
"""Tokens of the text that the time of an evaluation is given for."""

PASSES = {"lora": 2.0, "full": 3.0}
"""Operations of a training step relative to those of a forward pass."""


class StageEstimate(Record):
    """Time of one stage for one model."""

    stage: str
    """The command."""
    of: str
    """What takes that long."""
    seconds: float


def stage_estimates(setting: Setting, decoder: Decoder, rates: MachineRates) -> list[StageEstimate]:
    """Each stage of a run besides scoring."""
    steps = [(method, _training(setting, decoder, rates, method)) for method in PASSES]
    tokens = f"{EVALUATED:,} tokens"
    found = [
        StageEstimate(stage="eval", of=tokens, seconds=_forward(decoder, rates, EVALUATED)),
        _healing(setting, decoder, rates),
        *(
            StageEstimate(stage="retrain", of=f"one step of {method}, {of}", seconds=seconds)
            for method, (of, seconds) in steps
        ),
    ]
    if rates.token_s is not None:
        options = BenchmarkOptions()
        runs, [new] = options.warmup + options.runs, options.new_tokens
        of = f"{runs} runs of {new} tokens, batch 1"
        found.append(StageEstimate(stage="bench", of=of, seconds=runs * new * rates.token_s))
    return found


def _forward(decoder: Decoder, rates: MachineRates, tokens: float) -> float:
    """Seconds of a forward pass with the loss."""
    from shortllm.model.hidden_states import head_flops

    head = tokens * head_flops(decoder) / rates.head_flops_per_s
    return _blocks(decoder, rates, tokens) + head


def _blocks(decoder: Decoder, rates: MachineRates, tokens: float) -> float:
    """Seconds in which tokens go through all blocks."""
    from shortllm.model.hidden_states import block_flops

    flops = sum(block_flops(decoder, b) for b in range(decoder.block_count))
    return tokens * flops / rates.block_flops_per_s


def _healing(setting: Setting, decoder: Decoder, rates: MachineRates) -> StageEstimate:
    """The default method, for one gap in the middle."""
    samples = HealCalibration().samples
    tokens = samples * SAMPLE_LENGTH
    inputs, width = _output_projections(setting, decoder)
    columns = (inputs, sum((inputs, width)), inputs)
    """Of X: the MLP's alone, with the attention's, and the MLP's again."""
    ridges = 12
    solving = sum(
        2.0 * tokens * x * (x + 2 * width) + ridges * (x**3 / 3 + 4.0 * x * x * min(width, 512))
        for x in columns
    )
    passing = 2 * _blocks(decoder, rates, tokens) + 3 * _forward(decoder, rates, tokens / 4)
    return StageEstimate(
        stage="heal",
        of=f"one gap, {samples} x {SAMPLE_LENGTH} tokens",
        seconds=passing + solving / rates.float64_flops_per_s,
    )


def _output_projections(setting: Setting, decoder: Decoder) -> tuple[int, int]:
    """Inputs of the projection behind the MLP, and the width of the hidden state."""
    from shortllm.checkpoint.config import text_config

    width = int(text_config(setting.checkpoint.config).hidden_size)
    shapes = [tuple(p.shape[-2:]) for p in decoder.blocks[0].parameters() if p.ndim > 1]
    return max((sum(one) - width for one in shapes if width in one), default=width), width


def _training(
    setting: Setting, decoder: Decoder, rates: MachineRates, method: str
) -> tuple[str, float]:
    """What a step is, and its seconds."""
    from shortllm.retraining.methods import METHODS

    batch = RetrainOptions(method=method).batch
    length = METHODS.get(method).defaults["length"]
    return f"{batch} x {length} tokens", PASSES[method] * _forward(decoder, rates, batch * length)
