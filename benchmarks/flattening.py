"""Two blocks flattened into one (FlattenGPT, arXiv 2602.08858), against the removal of one of them.

The blocks of a gap and the block before it are read at the same input. Of all their heads and
neurons, as many as one block has are kept: the key-value groups with the largest output, and the
neurons with the highest ridge leverage. The down-projection makes up for the neurons that are left
out. In both models, the flattened one and the one without the blocks, the down-projection before
each gap is then refitted, as regression healing does.

    python benchmarks/flattening.py MODEL --blocks 13,14,17 --data TEXT --eval-data OTHER

For models like Llama, without norms of queries and keys. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import shortllm

SAMPLES, LENGTH, BATCH = 48, 256, 8


def input_of(module: nn.Module, call: Callable[[], Any]) -> Tensor:
    """What the first call of a module gets while `call` runs."""
    found: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: found.append(
        args[0] if args else kwargs["hidden_states"]), with_kwargs=True)  # fmt: skip
    call()
    hook.remove()
    return found[0]


def heads_and_neurons(
    model: Any, blocks: list[nn.Module], x_BTd: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each block, read at the same input, what goes into its o_proj and its down_proj."""
    rotary = model.model.rotary_emb(x_BTd, torch.arange(x_BTd.shape[1])[None])
    heads, middle = [], x_BTd
    for block in blocks:
        attention = block.self_attn
        read = block.input_layernorm(x_BTd)
        heads.append(input_of(attention.o_proj, lambda: attention(read, rotary, None)))  # noqa: B023
        middle = middle + attention.o_proj(heads[-1])
    neurons = []
    for block in blocks:
        read = block.post_attention_layernorm(middle)
        neurons.append(input_of(block.mlp.down_proj, lambda: block.mlp(read)))  # noqa: B023
    return heads, neurons


def flatten(model: Any, place: int, blocks: list[nn.Module], ids_BT: Tensor) -> None:
    """Set the weights of block `place` to a flattening of `blocks`, in which it is the first."""
    config, target = model.config, model.model.layers[place]
    groups, size = config.num_key_value_heads, target.self_attn.head_dim
    shared = config.num_attention_heads // groups
    mass = torch.zeros(len(blocks), groups)
    moments = torch.zeros(len(blocks) * config.intermediate_size, dtype=torch.float64).diag()
    outputs = torch.stack([one.self_attn.o_proj.weight.norm(dim=0) for one in blocks])
    for part_BT in ids_BT.split(BATCH):
        x_BTd = input_of(target, lambda: model.model(part_BT, use_cache=False))  # noqa: B023
        heads, neurons = heads_and_neurons(model, blocks, x_BTd)
        strength = torch.stack([one.abs().mean((0, 1)) for one in heads]) * outputs
        mass += strength.view(len(blocks), groups, -1).sum(2)
        rows = torch.cat(neurons, -1).flatten(0, 1).double()
        moments += rows.T @ rows / ids_BT.numel()
    kept = [divmod(int(one), groups) for one in mass.flatten().topk(groups).indices.sort().values]

    def of_groups(name: str, norm: str, each: int) -> Tensor:
        weights = [
            getattr(one.self_attn, name).weight * getattr(one, norm).weight for one in blocks
        ]
        return torch.cat([weights[b].view(groups, each, -1)[g] for b, g in kept])

    read = "input_layernorm"
    queries, keys, values = (
        of_groups(name, read, each)
        for name, each in (("q_proj", shared * size), ("k_proj", size), ("v_proj", size))
    )
    written = torch.cat(
        [blocks[b].self_attn.o_proj.weight.unflatten(1, (groups, -1))[:, g] for b, g in kept], 1
    )
    ridge = 10 * moments.trace() / len(moments)
    leverage = torch.linalg.solve(moments + torch.eye(len(moments)) * ridge, moments).diagonal()
    best = leverage.topk(config.intermediate_size).indices.sort().values
    rest = torch.ones(len(moments), dtype=torch.bool).index_fill(0, best, False)
    gates, ups = (
        torch.cat(
            [getattr(one.mlp, name).weight * one.post_attention_layernorm.weight for one in blocks]
        )[best]
        for name in ("gate_proj", "up_proj")
    )
    down = torch.cat([one.mlp.down_proj.weight for one in blocks], 1)
    own = moments[best][:, best]
    own += torch.eye(len(own)) * 1e-3 * own.trace() / len(own)
    repair = torch.linalg.solve(own, moments[best][:, rest] @ down[:, rest].T.double())
    target.input_layernorm.weight.fill_(1)  # the gains are in the matrices now
    target.post_attention_layernorm.weight.fill_(1)
    attention, mlp = target.self_attn, target.mlp
    for module, weight in {
        attention.q_proj: queries, attention.k_proj: keys, attention.v_proj: values,
        attention.o_proj: written, mlp.gate_proj: gates, mlp.up_proj: ups,
        mlp.down_proj: down[:, best] + repair.T.float(),
    }.items():  # fmt: skip
        module.weight.copy_(weight)


def refit(model: Any, place: int, intact: Any, behind: int, ids_BT: Tensor) -> None:
    """Refit the down-projection of block `place` to the intact stream before block `behind`.

    Tokens are weighted by the norm of the target. A quarter of the samples chooses the ridge.
    """
    mlp = model.model.layers[place].mlp
    inputs, targets, weights = [], [], []
    for part_BT in ids_BT.split(BATCH):
        run = lambda of=model, ids=part_BT: of.model(ids, use_cache=False)  # noqa: E731
        inner = input_of(mlp.down_proj, run)
        after = model.model.layers[place + 1]  # blocks at the end are protected
        stream = input_of(after, run) - mlp.down_proj(inner)
        target = input_of(intact.model.layers[behind], lambda run=run: run(intact))
        inputs.append(inner.double())
        targets.append((target - stream).double())
        weights.append(1 / target.double().norm(dim=-1, keepdim=True))
    x_Nf, y_Nd, w_N1 = (torch.cat(one) for one in (inputs, targets, weights))
    fit = 3 * len(ids_BT) // 4
    prior = mlp.down_proj.weight.double().T
    rows, errors = (w_N1 * x_Nf)[:fit].flatten(0, 1), (w_N1 * (y_Nd - x_Nf @ prior))[:fit]
    moments = rows.T @ rows
    identity = torch.eye(len(moments)) * moments.trace() / len(moments)
    changes = [torch.zeros_like(prior)] + [
        torch.linalg.solve(moments + 10.0**power * identity, rows.T @ errors.flatten(0, 1))
        for power in range(-5, 3)
    ]
    held_out = [
        float((w_N1 * (y_Nd - x_Nf @ (prior + one)))[fit:].square().sum()) for one in changes
    ]
    best = changes[held_out.index(min(held_out))]
    mlp.down_proj.weight.copy_((prior + best).T)


@torch.no_grad()
def compare(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Perplexities without the blocks and with them flattened, as they are and refitted."""
    removed = [int(one) for one in arguments.blocks.split(",")]
    models = {"intact": Path(arguments.model), "removed": directory / "removed"}
    shortllm.prune(arguments.model, removed, models["removed"])
    shortllm.score(
        arguments.model, criterion="influence", out=directory / "scored", data=arguments.data,
        samples=SAMPLES, length=LENGTH, dtype="float32",
    )  # fmt: skip
    ids_BT = load_file(directory / "scored" / "calibration.safetensors")["ids"]

    intact = shortllm.load(arguments.model, dtype="float32")
    layers = intact.model.layers
    kept = [block for block in range(len(layers)) if block not in removed]
    for flattens, refits in product((False, True), repeat=2):
        if not flattens and not refits:
            continue
        name = ("flattened" if flattens else "removed") + (", refitted" if refits else "")
        model = shortllm.load(str(models["removed"]), dtype="float32")
        for place, (first, behind) in enumerate(pairwise([*kept, len(layers)])):
            if behind > first + 1 and flattens:
                flatten(model, place, list(layers[first:behind]), ids_BT)
            if behind > first + 1 and refits:
                refit(model, place, intact, behind, ids_BT)
        models[name] = shutil.copytree(models["removed"], directory / name.replace(", ", "-"))
        model.save_pretrained(models[name])
    found = shortllm.evaluate(
        [str(one) for one in models.values()], data=arguments.eval_data.split(","),
        length=512, max_segments=16, continuations=0, dtype="float32",
    )  # fmt: skip
    return {
        name: [one.perplexity for one in model.perplexity]
        for name, model in zip(models, found.models, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--blocks", required=True, metavar="13,14,17")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--eval-data", required=True, help="texts to measure on")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(compare(arguments, Path(directory))))


if __name__ == "__main__":
    main()
