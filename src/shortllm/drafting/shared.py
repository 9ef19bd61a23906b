"""A draft without a second copy in memory: a loaded model without some blocks, of its own weights.

    draft = shortllm.draft_of(model, [2, 3])
    model.generate(**inputs, assistant_model=draft, do_sample=False)

The model's class builds the draft from the config that surgery would write, on the meta device,
which takes no memory. So every block has the number, and with it the place in the cache, that it
has in a shortened checkpoint. Then each tensor of the draft is set to that of the loaded model:

    model     layers.0   layers.1   layers.2   layers.3   layers.4   layers.5
                 =          =                                =          =          the same memory
    draft     layers.0   layers.1                         layers.2   layers.3
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shortllm.calls import accepts
from shortllm.checkpoint.config import block_count, checked_config
from shortllm.checkpoint.hub import ModelSource
from shortllm.checkpoint.loaded import (
    ELSEWHERE,
    model_called,
    refuse_adapters,
    require_in_memory,
    save_configs,
)
from shortllm.checkpoint.options import SurgeryOptions
from shortllm.checkpoint.shorten_config import sliced_axis
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.structure import find_blocks
from shortllm.checkpoint.tensors import TensorEntry
from shortllm.errors import CheckpointError, UnsupportedModelError
from shortllm.files import translate_os_errors
from shortllm.options import OneOrMore
from shortllm.pruning.budget import Budget, check_budget
from shortllm.pruning.prune import chosen_by
from shortllm.pruning.records import PrunePlan, load_plan
from shortllm.records import ModelInfo
from shortllm.runtime import quiet_transformers
from shortllm.surgery.apply import as_read_from_disk, check_removal
from shortllm.surgery.companions import follow_removal
from shortllm.surgery.origin import provenance_of, sendable
from shortllm.surgery.steps import PROVENANCE

WRITTEN = "Or write the draft with `shortllm prune`, and load that"
"""What to do where weights cannot be shared."""


@accepts(surgery=SurgeryOptions)
def draft_of(
    model: ModelSource,
    removed: PrunePlan | Path | OneOrMore[int],
    *,
    surgery: SurgeryOptions,
) -> Any:
    """The loaded model without some blocks, in the same memory, to draft for it.

    The draft has its own config, generation config, block numbers and cache, and the weights are
    those of `model`, which stays as it is. If they are trained or replaced in place, the draft
    follows. Its own parameters do not require gradients, as training them would change `model`: to
    train a draft, take the copy that `shorten` returns. Moving one of the two to another device or
    type gives that one weights of its own. Tensors that have a share for every block (Gemma 3n) are
    copied.

    Args:
        model: a loaded model, on one device and not quantized.
        removed: the numbers of the blocks that the draft lacks, a plan, a plan.json, or a run
            directory. A plan must be for as many blocks of the same model type.
        surgery: `accept_unknown_references`; it can be given as a keyword.
    Returns:
        A model of the same class, in evaluation mode: the `assistant_model` of `generate`, and
        whatever else a model can be. `save_pretrained` writes it as a checkpoint of its own.
    Raises:
        BudgetError: the model lacks such blocks, or none would be left.
        UnsupportedModelError: removing these blocks would give a wrong model, or the weights cannot
            be shared.
        CheckpointError: `model` is not in memory, or the plan is for another kind of model.
    """
    intact = model_called(model)
    if intact is None:
        raise CheckpointError(
            f"a draft shares the weights of a model in memory, and {model} is not in memory. Give "
            f"shortllm.load({model!r}). {WRITTEN}"
        )
    _require_shareable(model, intact)
    place = Path(tempfile.gettempdir())
    with (
        translate_os_errors(place, hint=ELSEWHERE),
        tempfile.TemporaryDirectory(prefix="shortllm-") as directory,
    ):
        described = _described(model, intact, Path(directory))
        blocks, criterion = _blocks(removed, described)
        kept = [block for block in range(described.block_count) if block not in blocks]
        raw = check_removal(described, kept, stored=False)
        generation = follow_removal(described, kept).files.get(Path("generation_config.json"), {})
    raw[PROVENANCE] = sendable(provenance_of(described, blocks, **chosen_by(criterion)))
    draft = _built(intact, as_read_from_disk(intact.config, raw))
    _share(model, intact, draft, kept)
    draft.generation_config = copy.deepcopy(intact.generation_config)
    draft.generation_config.update(**generation)
    # not the temporary directory: where the tokenizer is
    draft.name_or_path = draft.config._name_or_path = intact.name_or_path
    return draft.eval()


def _require_shareable(name: str, model: Any) -> None:
    """Refuse a model whose weights the draft's class could not hold, or not alone."""
    refuse_adapters(name, model)
    require_in_memory(name, model)
    tensors = model.state_dict(keep_vars=True).values()
    devices = sorted({str(tensor.device) for tensor in tensors})
    kinds = {type(tensor).__name__ for tensor in tensors} - {"Parameter", "Tensor"}
    problem = None
    if len(devices) > 1:
        problem = f"lies on several devices ({', '.join(devices)}). Load it on one"
    elif getattr(model.config, "quantization_config", None) is not None or kinds:
        found = f" ({min(kinds)})" if kinds else ""
        problem = f"has quantized or sharded weights{found}. Load it without"
    if problem:
        raise UnsupportedModelError(
            f"a draft cannot share weights with {name}, which {problem}. {WRITTEN}"
        )


def _described(name: str, model: Any, directory: Path) -> Checkpoint:
    """A loaded model as surgery sees it, with its configs in a directory, and without weights."""
    save_configs(name, directory)
    raw, config = checked_config(name, directory)
    tensors = {
        key: TensorEntry(
            key, directory, str(tensor.dtype), tuple(tensor.shape), tensor.nbytes, None
        )
        for key, tensor in model.state_dict().items()
    }
    return Checkpoint(name, directory, None, raw, config, tensors)


def _blocks(
    removed: PrunePlan | Path | list[int], described: Checkpoint
) -> tuple[list[int], str | None]:
    """The blocks that go, ascending, and the criterion that chose them."""
    if isinstance(removed, list):
        model = ModelInfo(
            id=described.id,
            model_type=described.model_type,
            blocks=described.block_count,
            parameters=described.parameters,
            bytes=described.bytes,
            fingerprint="",
        )
        check_budget(Budget(blocks=removed), model)
        return sorted(removed), None
    plan = removed if isinstance(removed, PrunePlan) else load_plan(removed)
    if (plan.model.model_type, plan.model.blocks) != (described.model_type, described.block_count):
        raise CheckpointError(
            f"the plan is for {plan.model.id} (a '{plan.model.model_type}' of {plan.model.blocks} "
            f"blocks), but {described.id} is a '{described.model_type}' of "
            f"{described.block_count}. Give the numbers of the blocks, or a plan for this model"
        )
    return plan.removed, plan.criterion


def _built(intact: Any, config: Any) -> Any:
    """The model of a config, of the class of another one, without memory for weights."""
    kinds = ("attn_implementation", "experts_implementation")
    chosen = {kind: _chosen(intact.config, f"_{kind}") for kind in kinds}
    with quiet_transformers(), torch.device("meta"):
        return type(intact)._from_config(config, dtype=intact.dtype, **chosen)


def _chosen(config: Any, kind: str) -> dict[str, Any]:
    """The implementation that a config names, and those of the configs within it."""
    inner = {name: getattr(config, name, None) for name in config.sub_configs}
    found = {name: getattr(one, kind) for name, one in inner.items() if one is not None}
    return {"": getattr(config, kind), **found}


def _share(name: str, intact: Any, draft: Any, kept: Sequence[int]) -> None:
    """Set each tensor of a draft to that of the loaded model; tied ones stay tied."""
    count = block_count(intact.config)
    ours = _modules(draft, range(len(kept)))
    theirs = _modules(intact, kept)
    shared: dict[int, nn.Parameter] = {}
    for place in {**ours, **theirs}:
        module, original = ours.get(place), theirs.get(place)
        if module is None or original is None or type(module) is not type(original):
            raise _changed(name, place, original, module)
        for key, tensor in original._parameters.items():
            if tensor is not None and id(tensor) not in shared:
                part = _part(tensor.detach(), f"{place}.{key}", count, kept)
                shared[id(tensor)] = nn.Parameter(part, requires_grad=False)
            built, new = module._parameters.get(key), shared.get(id(tensor))
            if getattr(built, "shape", None) != getattr(new, "shape", None):
                raise _changed(name, f"{place}.{key}", new, built)
            module._parameters[key] = new
        module._buffers.update(original._buffers)
        module._non_persistent_buffers_set |= original._non_persistent_buffers_set
        # some modules keep a tensor as a plain attribute
        vars(module).update({k: t for k, t in vars(original).items() if isinstance(t, Tensor)})


def _changed(name: str, place: str, found: Any, built: Any) -> UnsupportedModelError:
    """The error where a loaded model differs from what its class builds."""
    are = [
        f"a tensor of shape {list(one.shape)}"
        if isinstance(one, Tensor)
        else "nothing"
        if one is None
        else type(one).__name__
        for one in (found, built)
    ]
    return UnsupportedModelError(
        f"a draft cannot share weights with {name}, which was changed after it was loaded: "
        f"'{place}' is {are[0]}, where its class builds {are[1]}. Load it again. {WRITTEN}"
    )


def _part(tensor: Tensor, name: str, count: int, kept: Sequence[int]) -> Tensor:
    """A tensor itself, or the shares of the kept blocks if it has one for every block."""
    axis = sliced_axis(name)
    if axis is None:
        return tensor
    shares = tensor.chunk(count, axis)
    return torch.cat([shares[block] for block in kept], axis)


def _modules(model: Any, blocks: Sequence[int]) -> dict[str, nn.Module]:
    """The modules of a model by name, of its blocks only these, under the numbers 0, 1, ..."""
    name, found = find_blocks(model, model.config)
    inside = {
        f"{name}.{new}.{place}": module
        for new, old in enumerate(blocks)
        for place, module in found[old].named_modules()
    }
    outside = {
        place: module for place, module in model.named_modules() if not place.startswith(f"{name}.")
    }
    return outside | inside
