"""The structural guard: every kept block of the shortened model must be built like its original.

Lowering the block count alone silently changes models whose blocks differ by position: the sixth
block of the new model gets the attention, position code or experts of place six under the weights
of another place. Both models are built on the meta device (no memory for weights), and for every
kept block the structural signature is compared: parameter names and shapes, submodule classes, and
every plain attribute that can reach the forward pass, except those that are the block's own number
or name another block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shortllm.checkpoint.config import text_config
from shortllm.checkpoint.shorten_config import period_hint, sliced_axis
from shortllm.errors import UnsupportedModelError
from shortllm.model.structure import Renumbering, Signature, _signatures, difference


def check_signatures(original: Any, shortened: Any, kept: Sequence[int]) -> None:
    """Build both configs on the meta device and compare every kept block with its original.

    Args:
        original: transformers config of the whole model.
        shortened: transformers config after the rules.
        kept: original numbers of the kept blocks, ascending.
    Raises:
        UnsupportedModelError: naming the block and the attribute that would be wrong.
    """
    before, outside_before = _signatures(original)
    after, outside_after = _signatures(shortened)
    if len(after) != len(kept):
        raise UnsupportedModelError(
            f"model type '{original.model_type}': asked for {len(kept)} blocks, the shortened "
            f"config builds {len(after)}"
        )
    places = max(1, text_config(original).num_hidden_layers // len(before))
    numbers = Renumbering(kept, len(before), places)
    for new, old in enumerate(kept):
        problem = difference(before[old], after[new], old, numbers)
        if problem:
            raise UnsupportedModelError(
                f"removing these blocks from model type '{original.model_type}' would turn block "
                f"{old} into a "
                f"different block: {problem}. No rule covers this yet.{period_hint(original)}"
            )
    expected = _sliced(outside_before, len(before), len(kept))
    for place in {**expected, **outside_after}:
        was, shape = expected.get(place, "absent"), outside_after.get(place, "absent")
        if was == shape:
            continue
        raise UnsupportedModelError(
            f"removing blocks from model type '{original.model_type}' would change tensors "
            "outside the blocks: "
            f"{place} is {shape} instead of {was}. No rule covers this yet"
        )


def _sliced(outside: Signature, count: int, kept: int) -> Signature:
    """Shapes outside the blocks after the shares of removed blocks are cut out of them."""
    result = dict(outside)
    for place, shape in outside.items():
        axis = sliced_axis(place)
        if axis is not None:
            share = shape[axis] // count
            result[place] = (*shape[:axis], share * kept, *shape[axis + 1 :])
    return result
