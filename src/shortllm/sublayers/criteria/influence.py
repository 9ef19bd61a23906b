"""How much each sublayer turns the hidden state, from one pass over the intact model.

Shapes: B samples, T tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shortllm.papers import WHAT_MATTERS
from shortllm.sublayers.criteria import CRITERIA, Ranking, SublayerCriterion, Task

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.model.decoder import Decoder, Entry
    from shortllm.sublayers.structure import Outputs, Part


@CRITERIA.register(
    SublayerCriterion(
        name="sublayer-influence", label="Sublayer influence", value="1 - cos", paper=WHAT_MATTERS
    )
)
def sublayer_influence(task: Task) -> Ranking:
    """The smallest change of the hidden state's direction.

    1 - cos(hidden state before, after) of each sublayer, mean over tokens; in [0, 2]. The effect of
    attention is measured in the block without its MLP. If the MLP reads what the attention wrote,
    the state before it is the one after the attention; if both read the same (parallel blocks), it
    is the one entering the block, and the effect of the MLP is measured without the attention.
    """
    import torch

    from shortllm.model.hidden_states import SampleGroups, block_flops, group_size
    from shortllm.model.walk import walk_flops
    from shortllm.progress import progress
    from shortllm.sublayers.structure import PARTS

    decoder, outputs, ids_BT = task.decoder, task.outputs, task.ids_BT
    sums = {(b, part): 0.0 for b in sorted(outputs) for part in PARTS}
    size = len(ids_BT) if decoder.streamed else group_size(decoder, ids_BT.shape[1])
    work = walk_flops(decoder, [frozenset()], *ids_BT.shape, head=False)
    with progress("scoring sublayers by influence", work) as advance, torch.no_grad():
        for start in range(0, len(ids_BT), size):
            groups = SampleGroups(decoder, ids_BT[start : start + size])
            stream_BTD = groups.entering()
            for b in decoder.through(range(decoder.block_count)):
                for rows, entry in groups:
                    before_BTD = stream_BTD[rows].to(decoder.device)
                    after_BTD = decoder.apply(b, before_BTD, entry.calls[b])
                    if b in outputs:
                        found = _similarities(decoder, outputs, b, entry, before_BTD, after_BTD)
                        for part, value in zip(PARTS, found, strict=True):
                            sums[b, part] += value
                    stream_BTD[rows] = after_BTD.to(stream_BTD)
                advance(block_flops(decoder, b) * groups.ids_BT.numel())
    values = {one: 1.0 - sums[one] / ids_BT.numel() for one in task.candidates}
    order = sorted(values, key=lambda one: (values[one], -one[0], PARTS.index(one[1])))
    return Ranking(order=[(one, values[one]) for one in order])


def _similarities(
    decoder: Decoder, outputs: Outputs, b: int, entry: Entry, before_BTD: Tensor, after_BTD: Tensor
) -> tuple[float, float]:
    """Sums over tokens of cos(before, after), of the attention and of the MLP."""

    from shortllm.model.metrics import cosine
    from shortllm.sublayers.structure import without_sublayers

    def without(part: Part) -> Tensor:
        with without_sublayers(decoder, outputs, [(b, part)]):
            return decoder.apply(b, before_BTD, entry.calls[b])

    def total(one_BTD: Tensor, other_BTD: Tensor) -> float:
        return float(cosine(one_BTD.flatten(2), other_BTD.flatten(2)).double().sum().item())

    without_mlp_BTD = without("mlp")
    attention = total(before_BTD, without_mlp_BTD)
    seen: list[Tensor] = []
    output = decoder.blocks[b].get_submodule(outputs[b]["mlp"])
    handle = output.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        decoder.apply(b, before_BTD, entry.calls[b])
        without_attention_BTD = without("attention")
    finally:
        handle.remove()
    intact, alone = (given.float() for given in seen)
    if bool((intact - alone).abs().max() <= 1e-5 * intact.abs().max()):
        return attention, total(before_BTD, without_attention_BTD)
    return attention, total(without_mlp_BTD, after_BTD)
