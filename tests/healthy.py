"""Healthy files of every kind that the package reads, small enough to be damaged by thousands."""

from __future__ import annotations

import json
import math
import types
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from architectures import tiny_config
from families import VARIANTS, build, save
from safetensors.torch import load_file, save_file
from test_reporting import TOKENS, make_run, write_config
from transformers import AutoConfig

from shortllm import schemas
from shortllm.benchmark.options import Benchmark
from shortllm.checkpoint.tensors import PICKLED, SAFETENSORS, SAFETENSORS_INDEX
from shortllm.comparison.options import UNITS_FILE, Comparison, UnitsComparison
from shortllm.evaluation.options import Evaluation
from shortllm.healing.options import Healing
from shortllm.pruning.budget import Budget
from shortllm.pruning.planning import build_plan
from shortllm.pruning.quality_target import QualityTarget
from shortllm.pruning.records import TARGET_FILE, BlockScores, PrunePlan, Target
from shortllm.quantizing.options import Quantization
from shortllm.records import DerivedRecord, ModelInfo, Record, ResultFile
from shortllm.reporting.load import RunFile
from shortllm.retraining.options import Retraining

BLOCKS = 4

_SMALL: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "sliding_window": 5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

QUANTIZE_OPTIONS = {"group_size": 32, "act_order": False}

CONFIGS: dict[str, Any] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2, "tie_word_embeddings": True},
    "gemma3_text": {"sliding_window_pattern": 2, "query_pre_attn_scalar": 4},
    "qwen3_moe": {
        "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 4,
        "mlp_only_layers": [1], "decoder_sparse_step": 2,
    },
    "gpt2": None,
    "gemma3": None,
    "smollm3": None,
    "deepseek_v3": None,
    "mamba2": None,
}  # fmt: skip
"""Model type -> arguments beside the small ones: plain blocks, kinds of blocks by a list or by a
number, lists of block numbers, other names of the fields, and a part for the text."""


def write_checkpoint(model_type: str, directory: Path) -> Path:
    """A checkpoint of one of the types above."""
    arguments = CONFIGS[model_type]
    if model_type == "gpt2":
        sizes = {**VARIANTS["gpt2"], "vocab_size": 11, "n_embd": 8, "n_layer": BLOCKS, "n_head": 2}
        config = AutoConfig.for_model("gpt2", **sizes)
    elif arguments is None:
        config = tiny_config(model_type)
    else:
        config = AutoConfig.for_model(model_type, **_SMALL, **arguments)
    return save(build(config), directory)


def share_out(directory: Path, shards: int = 3) -> None:
    """The one file of weights as several with their index."""
    tensors = load_file(directory / SAFETENSORS)
    (directory / SAFETENSORS).unlink()
    weight_map = {
        name: f"model-{1 + place % shards:05d}-of-{shards:05d}.safetensors"
        for place, name in enumerate(sorted(tensors))
    }
    for shard in set(weight_map.values()):
        part = {name: tensors[name] for name, held in weight_map.items() if held == shard}
        save_file(part, directory / shard, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": weight_map,
    }
    (directory / SAFETENSORS_INDEX).write_text(json.dumps(index))


def pickle_weights(directory: Path, *, zipped: bool) -> None:
    """The one file of weights as a `.bin`; the older form names its parts by addresses, which are
    others in every process."""
    tensors = load_file(directory / SAFETENSORS)
    (directory / SAFETENSORS).unlink()
    torch.save(tensors, directory / PICKLED, _use_new_zipfile_serialization=zipped)


# ---- records


def example(annotation: Any, name: str = "") -> Any:
    """A value that fits a type annotation: something in every list and dict, and no null."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return example(arguments[0], name)
    if origin is Literal:
        return arguments[0]
    if origin in (Union, types.UnionType):
        return example(next(one for one in arguments if one is not type(None)), name)
    if origin is list:
        return [example(arguments[0], name)] * 2
    if origin is tuple:
        return tuple(example(one, name) for one in arguments)
    if origin is dict:
        return {example(arguments[0]): example(arguments[1], name)}
    if isinstance(annotation, type) and issubclass(annotation, ModelInfo):
        return small_model()
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return of(annotation)
    simple = {str: f"some {name}", int: 3, float: 0.5, bool: True, Any: 1, Path: Path("some/file")}
    return simple[annotation]


NEEDED: dict[str, dict[str, Any]] = {
    "Retraining": {"method": "lora"},
    "Quantization": {"method": "gptq"},
    "MeasuredDraft": {"name": "draft"},
}
"""Records that do not take every string -> what they take."""


def of(kind: type[Any], **fields: Any) -> Any:
    """A record whose other fields are examples of their types."""
    fields = {**NEEDED.get(kind.__name__, {}), **fields}
    others = {
        name: example(field.annotation, name)
        for name, field in kind.model_fields.items()
        if name not in fields
    }
    return kind(**fields, **others)


def small_model(blocks: int = BLOCKS, name: str = "acme/tiny") -> ModelInfo:
    return ModelInfo(
        id=name,
        revision="0123456789abcdef",
        model_type="llama",
        blocks=blocks,
        parameters=100 * blocks + 50,
        parameters_per_block=[100] * blocks,
        bytes=2 * (100 * blocks + 50),
        fixed={0: "it contains the norm after the embeddings"},
        fingerprint="ab" * 32,
    )


def scores_of(model: ModelInfo, **fields: Any) -> BlockScores:
    """Scores of every block of a model."""
    values = [12.5 + abs(block - 2) for block in range(model.blocks)]
    common: dict[str, Any] = {
        "model": model, "criterion": "ppl", "importance": values, "values": values, "intact": 11.0,
        "delta_nll": [math.log(value / 11.0) for value in values], "dtype": "float32",
        "calibration": TOKENS, "options": {"power": 2}, "fingerprint": "5c" * 32,
    }  # fmt: skip
    return BlockScores(**common | fields)


def spans_of(model: ModelInfo) -> BlockScores:
    """Scores of blocks and of spans of them."""
    spans = [
        [0.1 * length + 0.01 * start for start in range(model.blocks - length + 1)]
        for length in range(1, model.blocks + 1)
    ]
    return scores_of(model, criterion="angular", spans=spans)


def plan_of(model: ModelInfo) -> PrunePlan:
    budget = Budget(remove=1, protect_first=1, protect_last=0)
    return build_plan(budget, model=model, scores=scores_of(model))


@cache
def records() -> dict[type[ResultFile], list[ResultFile]]:
    """Healthy records of every class that is a result file."""
    model = small_model()
    ordered = scores_of(model, criterion="greedy", order=[2, 1])
    local = scores_of(model, criterion="local", removed=[2], order=[2])
    searched = of(BlockScores, **local.model_dump(exclude={"search"}))
    own: dict[type[ResultFile], list[ResultFile]] = {
        BlockScores: [scores_of(model), spans_of(model), ordered, searched],
        PrunePlan: [plan_of(model)],
        Comparison: [comparison()],
        Benchmark: [benchmark()],
        Quantization: [of(Quantization, options=QUANTIZE_OPTIONS)],
        Target: [of(Target, model=model, asked={"target_speedup": 1.3}, remove=1)],
        QualityTarget: [of(QualityTarget, asked={"max_ppl_increase": "5%"})],
    }
    return {kind: own.get(kind) or [of(kind)] for kind in kinds_of(ResultFile)}


def kinds_of(base: type[Any]) -> list[type[Any]]:
    """Every class of result file there is."""
    for name in schemas.NAMES:  # loads their modules
        schemas.schema(name)
    return [
        kind for below in base.__subclasses__() for kind in (below, *kinds_of(below))
        if kind.__module__.startswith("shortllm.") and kind not in (DerivedRecord, RunFile)
    ]  # fmt: skip


def comparison() -> Comparison:
    def contender(name: str) -> dict[str, Any]:
        sets = [
            {"order": list(range(1, 1 + size)), "nll": 2.4, "perplexity": 11.5} for size in (1, 2)
        ]
        return {"criterion": name, "source": "arXiv:2402.02834", "scores": "5c" * 32, "sets": sets}

    return of(
        Comparison,
        budgets=[{"blocks": 1, "ratios": [0.25]}, {"blocks": 2, "ratios": [0.5]}],
        criteria=[contender("ppl"), contender("magnitude")],
        random=[contender("random"), contender("random")],
        calibration=TOKENS,
    )


def benchmark(*names: str, fingerprints: tuple[str, ...] = ()) -> Benchmark:
    names = names or ("original", "pruned")
    models = [
        {
            "name": name,
            "model": small_model(BLOCKS - place).model_copy(
                update={"fingerprint": fingerprints[place] if fingerprints else "ab" * 32}
            ),
            "head_parameters": 88, "prompt_tokens": 7, "dtype": "float32",
        }
        for place, name in enumerate(names)
    ]  # fmt: skip
    measurements = [
        {
            "model": name, "batch": batch, "new_tokens": 32, "status": "ok",
            "latencies_s": [0.5 - 0.1 * place, 0.51 - 0.1 * place],
            "latency_mean_s": 0.505 - 0.1 * place, "latency_std_s": 0.007,
            "latency_median_s": 0.505 - 0.1 * place, "tokens_per_s": 63.0, "first_token_s": 0.02,
            "per_token_s": 0.015, "memory": {"process_bytes": 10**8}, "utilisation_mean": 0.9,
            "utilisation_max": 1.0,
        }
        for batch in (1, 4)
        for place, name in enumerate(names)
    ]  # fmt: skip
    drafts = [{key: one[key] for key in ("name", "model")} for one in models[1:2] or models]
    texts = [
        {
            "draft": drafts[0]["name"], "prompts": kind, "source": "built-in", "template": template,
            "draft_tokens": 4, "new_tokens": 32, "texts": 2, "alone_s": [0.016, 0.018],
            "drafted_s": [0.012, 0.013], "alone_tokens_per_s": 58.8, "drafted_tokens_per_s": 80.0,
            "speedup": 1.36, "steps": 20, "drafted": 76, "accepted": 44, "tokens_per_step": 3.2,
            "tokens_per_step_stderr": 0.2, "near_ties": 1,
        }
        for kind, template in (("text", None), ("chat", "chat"))
    ]  # fmt: skip
    drafted = {
        "drafts": drafts,
        "measurements": texts,
        "temperature": 0.0,
        "fingerprint": "cd" * 32,
    }
    return of(Benchmark, models=models, measurements=measurements, drafted=drafted, device="cpu")


# ---- run directories


def write_run(directory: Path) -> Path:
    """A finished run with every stage, as its files lie."""
    make_run(directory)
    plan = PrunePlan.load(directory / "plan.json")
    evaluation = Evaluation.load(directory / "eval.json")
    pruned = evaluation.models[1]
    original, short = plan.model.fingerprint, "cd" * 32
    pruned = pruned.model_copy(
        update={"model": pruned.model.model_copy(update={"fingerprint": short})}
    )
    names = {"healed": "ee" * 32, "retrained": "ef" * 32, "quantized": "f0" * 32}
    others = [
        pruned.model_copy(
            update={
                "name": name,
                "model": pruned.model.model_copy(update={"fingerprint": fingerprint}),
            }
        )
        for name, fingerprint in names.items()
    ]
    evaluation.model_copy(update={"models": [evaluation.models[0], pruned, *others]}).save(
        directory / "eval.json"
    )
    done = {
        "healed": {"method": "linear", "data": "c4", "blocks": [4]},
        "retrained": {"method": "lora", "data": "alpaca", "steps": 3, "tokens": 4096},
        "quantized": {"method": "gptq", "scheme": "some scheme"},
    }
    for name in names:
        write_config(directory / name, plan, **{name: done[name]})
    of(Target, model=plan.model, asked={"target_params": 1e6}).save(directory / TARGET_FILE)
    of(Healing, model=pruned.model, method="linear").save(directory / "healed" / Healing.FILE)
    curves = {
        "train": [(1, 2.5), (2, 2.4), (3, 2.2)],
        "held_out": [(0, 2.6), (3, 2.3)],
        "wikitext2": [(0, 2.8), (3, 2.5)],
    }
    of(Retraining, model=pruned.model, method="lora", curves=curves).save(
        directory / "retrained" / Retraining.FILE
    )
    of(Quantization, model=pruned.model, method="gptq", options=QUANTIZE_OPTIONS).save(
        directory / "quantized" / Quantization.FILE
    )
    benchmark(fingerprints=(original, short)).save(directory / "bench.json")
    return directory


def write_comparison(directory: Path) -> Path:
    """A finished comparison of criteria."""
    make_run(directory)
    for name in ("plan.json", "scores.json", "eval.json"):
        (directory / name).unlink()
    comparison().save(directory / "comparison.json")
    return directory


def write_units(directory: Path) -> Path:
    """A finished comparison of width and depth."""
    make_run(directory)
    (directory / "plan.json").unlink()
    names = ("ppl", "flap")
    candidates = [
        {
            "name": name,
            "unit": unit,
            "parameters": 900_000,
            "missed": 0.01,
            "healed": f"{name}-healed",
            "retrained": None,
        }
        for name, unit in zip(names, ("depth", "width"), strict=True)
    ]
    units = of(
        UnitsComparison, candidates=candidates, healing={"method": "linear"}, retraining=None
    )
    units.save(directory / UNITS_FILE)
    evaluation = Evaluation.load(directory / "eval.json")
    original, pruned = evaluation.models
    measured = [name + way for name in names for way in ("", "-healed")]
    models = [original, *(pruned.model_copy(update={"name": name}) for name in measured)]
    evaluation.model_copy(update={"models": models}).save(directory / "eval.json")
    benchmark("original", *names).save(directory / "bench.json")
    return directory
