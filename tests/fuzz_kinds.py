"""What the fuzzer damages, and what must then be true.

A kind is a function that lays one damaged input into the bench and returns what is to be done with
it. That either raises a ShortLLMError, or ends after checking that its result is right: by another
reader of the same file, by what the undamaged input gives, or by the file's own sums.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from healthy import (
    BLOCKS,
    CONFIGS,
    pickle_weights,
    plan_of,
    records,
    scores_of,
    share_out,
    spans_of,
    write_checkpoint,
    write_comparison,
    write_run,
    write_units,
)
from mutations import damaged, damaged_bytes, text_of
from safetensors import safe_open

import shortllm
from shortllm import stages
from shortllm.budget import Budget
from shortllm.calibration import Calibration, check_ids, load_calibration, tokens_fingerprint
from shortllm.checkpoint import Checkpoint, open_checkpoint
from shortllm.checkpoint.export_lint import lint_export
from shortllm.checkpoint.shortening import sliced_axis
from shortllm.checkpoint.tensors import (
    PICKLED,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    read_tensor,
)
from shortllm.embedded import MODEL_DIR
from shortllm.errors import ShortLLMError
from shortllm.journal import Journal
from shortllm.planning import build_plan
from shortllm.recipe import Recipe
from shortllm.recipes import DIRECTORY as RECIPES
from shortllm.recipes import changed, load_recipe
from shortllm.reporting.plots import drawing
from shortllm.results.plan import PrunePlan
from shortllm.results.record import ModelInfo
from shortllm.results.scores import BlockScores, CalibrationInfo
from shortllm.session import Session
from shortllm.summary import summarize

Act = Callable[[], None]


class Bench:
    """Where inputs are laid and results are written, and the healthy files they are made from."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = root / "source"
        """The damaged input; what is done with it must not change it."""
        self.out = root / "out"
        """Where results go; empty again after a refusal."""
        self.secret = root / "secret.safetensors"
        """A whole file of weights outside every checkpoint."""

    def clear(self) -> None:
        """Make both directories anew."""
        for directory in (self.source, self.out):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)

    def lay(self, base: Path) -> None:
        """Copy a healthy directory to where it may be damaged."""
        shutil.copytree(base, self.source, dirs_exist_ok=True)

    def kept(self, name: str, make: Callable[[Path], Any]) -> Path:
        """A healthy directory, made at its first use."""
        directory = self.root / "healthy" / name
        if not directory.exists():
            directory.parent.mkdir(parents=True, exist_ok=True)
            make(directory)
        return directory

    def checkpoint(self, model_type: str = "llama", form: str = "plain") -> Path:
        """A healthy checkpoint, its weights in one file, in shards, or pickled."""

        def make(directory: Path) -> None:
            write_checkpoint(model_type, directory)
            if form == "shards":
                share_out(directory)
            elif form != "plain":
                pickle_weights(directory, zipped=form == "zip")

        return self.kept(f"{model_type}-{form}", make)

    @cached_property
    def opened(self) -> Checkpoint:
        return open_checkpoint(self.checkpoint())

    @cached_property
    def model(self) -> ModelInfo:
        return self.opened.info()


# ---- checkpoints


def headers(random: Random, bench: Bench) -> Act:
    """A damaged header of a safetensors file."""
    bench.lay(bench.checkpoint())
    file = bench.source / SAFETENSORS
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    way = random.random()
    if way < 0.15:
        file.write_bytes(damaged_bytes(random, raw))
    elif way < 0.3:
        lengths = [0, 1, 7, length - 1, length + 1, length + 8, len(raw) - 8, len(raw), 10**8]
        lengths += [2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, random.randrange(length)]
        file.write_bytes(random.choice(lengths).to_bytes(8, "little") + raw[8:])
    elif way < 0.4:
        file.write_bytes(raw[: random.randrange(len(raw))])
    else:
        if way < 0.6:
            _displace(random, header)
            text = text_of(header, random)
        else:
            text = damaged(random, header, values=_header_values(header))
        encoded = text.encode()
        file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return lambda: examine(bench, random)


DTYPES = [
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL",
    "C64",
    "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "f32", "XX", "F8_E4M3FNUZ",
]  # fmt: skip


def _header_values(header: dict[str, Any]) -> list[Any]:
    """Items and parts of items that nearly fit."""
    items = [item for name, item in header.items() if name != "__metadata__"]
    sizes: list[Any] = [size for item in items for size in (item["shape"], item["data_offsets"])]
    return [*DTYPES, *items[:5], *sizes[:10], [0, 0], [128, 0], [-8, 0], [2**62, 2], [0.0, 128.0]]


def _displace(random: Random, header: dict[str, Any]) -> None:
    """Move, grow, shrink, exchange or rename tensors."""
    names = [name for name in header if name != "__metadata__"]
    one, other = random.sample(names, 2)
    start, stop = header[one]["data_offsets"]
    step = random.choice((1, 2, 4, 8, 64, 10**6, 2**40, 2**63))
    random.choice(
        [
            lambda: header[one].update(data_offsets=[start + step, stop + step]),
            lambda: header[one].update(data_offsets=[start - step, stop - step]),
            lambda: header[one].update(data_offsets=[start, stop + step]),
            lambda: header[one].update(data_offsets=[stop, start]),
            lambda: header[one].update(data_offsets=header[other]["data_offsets"]),
            lambda: header[one].update(dtype=random.choice(DTYPES)),
            lambda: header[one].update(shape=header[one]["shape"][::-1]),
            lambda: header[one].update(shape=[*header[one]["shape"], 1]),
            lambda: header[one].update(shape=[*header[one]["shape"], 0]),
            lambda: header[one].update(shape=[-size for size in header[one]["shape"]]),
            lambda: header.update({one: header[other], other: header[one]}),
            lambda: header.update({one.replace(".1.", ".2."): header.pop(one)}),
            lambda: header.update({random.choice(["x", "", f"{one}.x", "é"]): header.pop(one)}),
            lambda: header.update(empty={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
            lambda: header.pop(one),
        ]
    )()


def indexes(random: Random, bench: Bench) -> Act:
    """A damaged index, or shards that are not where it says."""
    bench.lay(bench.checkpoint(form="shards"))
    if not bench.secret.exists():
        shutil.copy(bench.checkpoint() / SAFETENSORS, bench.secret)
    file = bench.source / SAFETENSORS_INDEX
    index = json.loads(file.read_text())
    shards = sorted(set(index["weight_map"].values()))
    way = random.random()
    if way < 0.2:
        file.write_bytes(damaged_bytes(random, file.read_bytes()))
    elif way < 0.4:
        _move_shard(random, bench, random.choice(shards))
    else:
        outside = [str(bench.secret), f"../{bench.secret.name}", f"x/../../{bench.secret.name}"]
        odd = [".", "..", "", "config.json", file.name, "a\x00b", "a" * 300, "\ud800", "x/y", "~"]
        places = [*shards, *outside, *odd, "./" + shards[0], shards[0].upper(), f"{shards[0]}/"]
        if way < 0.55:
            index["weight_map"] = {
                name: random.choice(places) if random.random() < 0.1 else place
                for name, place in index["weight_map"].items()
            }
            file.write_text(text_of(index, random))
        else:
            file.write_text(damaged(random, index, values=places))
    return lambda: examine(bench, random)


def _move_shard(random: Random, bench: Bench, name: str) -> None:
    """Something else where a shard was."""
    shard = bench.source / name
    data = shard.read_bytes()
    shard.unlink()
    inside = bench.source / "blob"
    what = random.choice(["nothing", "directory", "outside", "inside", "loop", "cut", "damaged"])
    if what == "directory":
        shard.mkdir()
    elif what == "outside":
        shard.symlink_to(
            random.choice([bench.secret, Path("..") / bench.secret.name, "/etc/passwd"])
        )
    elif what == "inside":
        inside.write_bytes(data)
        shard.symlink_to("blob")
    elif what == "loop":
        shard.symlink_to(name)
    elif what == "cut":
        shard.write_bytes(data[: random.randrange(len(data))])
    elif what == "damaged":
        shard.write_bytes(damaged_bytes(random, data))


def pickles(random: Random, bench: Bench) -> Act:
    """A damaged `.bin`."""
    bench.lay(bench.checkpoint(form=random.choice(["zip", "legacy"])))
    file = bench.source / PICKLED
    file.write_bytes(damaged_bytes(random, file.read_bytes()))

    def act() -> None:
        checkpoint = open_checkpoint(bench.source)
        try:  # mapped as shortllm reads it, so that sums over the data are not looked at
            expected = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # of torch < 1.6
            expected = torch.load(file, map_location="cpu", weights_only=True)
        for name, tensor in expected.items():
            if name in checkpoint.tensors:
                assert torch.equal(read_tensor(checkpoint.tensors[name]), tensor)
            else:  # stored once where it shares memory with another
                stored = (expected[other] for other in checkpoint.tensors)
                assert any(tensor.data_ptr() == other.data_ptr() for other in stored)
        _shorten(bench, checkpoint, random)

    return act


def configs(random: Random, bench: Bench) -> Act:
    """A damaged config.json."""
    model_type = random.choice([*CONFIGS, *SMALL_CONFIGS, *SMALL_CONFIGS])
    bench.lay(bench.checkpoint(model_type))
    file = bench.source / "config.json"
    raw = json.loads(file.read_text())
    if random.random() < 0.1:
        file.write_bytes(damaged_bytes(random, file.read_bytes()))
    elif random.random() < 0.3:
        _misconfigure(random, raw)
        file.write_text(text_of(raw, random))
    else:
        file.write_text(damaged(random, raw, values=[*CONFIG_VALUES, *raw.values()]))
    return lambda: examine(bench, random)


SMALL_CONFIGS = ("llama", "qwen2", "gpt2")
"""Those of which a model is built in no time."""

CONFIG_VALUES: list[Any] = [
    *CONFIGS, "t5", "bert", "vit", "lama", "LlamaForCausalLM", "GPT2LMHeadModel",
    ["LlamaForCausalLM"], ["full_attention"] * 3, ["sliding_attention"] * 5, ["nothing"] * BLOCKS,
    [0, 1, 2, 3], [-1], [7], {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "yarn"},
    "bfloat16", "silu", "relu", "none", 5, 7, 16, 10**6, 10**9, 4.0, 4.5, -4,
]  # fmt: skip

COUNTS = ("num_hidden_layers", "n_layer", "num_attention_heads", "num_key_value_heads", "head_dim")
COUNTS += ("hidden_size", "vocab_size", "intermediate_size", "num_experts", "sliding_window")
COUNTS += ("max_position_embeddings", "max_window_layers", "decoder_sparse_step", "n_head")


def _misconfigure(random: Random, raw: dict[str, Any]) -> None:
    """Fields that speak of the blocks get values that are nearly possible, or far too large."""
    part = raw.get("text_config") if random.random() < 0.7 else None
    part = part if isinstance(part, dict) else raw
    counts = [field for field in COUNTS if field in part] or ["num_hidden_layers"]
    lists = [field for field, value in part.items() if isinstance(value, list)] or ["layer_types"]
    random.choice(
        [
            lambda: part.update({random.choice(counts): random.choice([0, -1, 1, 3, 5, 10**9])}),
            lambda: part.update(
                {random.choice(counts): random.choice([2**63, 1e9, "4", None, []])}
            ),
            lambda: part.update({random.choice(lists): random.choice([[], [0], ["x"], None, "x"])}),
            lambda: part.update(layer_types=["full_attention"] * random.choice([0, 1, 3, 5, 100])),
            lambda: part.update(architectures=random.choice([None, [], ["X"], [1], "X", {}])),
            lambda: part.update(model_type=random.choice(["", 1, None, [], {}, "x" * 999, "t5"])),
            lambda: part.update(
                quantization_config={"quant_method": random.choice(["gptq", 1, {}])}
            ),
            lambda: part.update(quantization_config={"quant_method": "compressed-tensors"}),
            lambda: part.update(per_block_shapes=random.choice([[], {}, [{}] * BLOCKS, 7, [None]])),
            lambda: part.update(auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "o.O"}),
            lambda: part.update(shortllm=random.choice([1, [], "x", {"removed_blocks": "x"}])),
            lambda: part.update(dtype=random.choice(["float99", 1, [], "float16", "int8"])),
            lambda: part.update(pad_token_id=random.choice([-1, 10**9, "x", [1], 1.5])),
            lambda: part.update(rope_parameters=random.choice([{}, [], {"rope_type": 1}, 5, "x"])),
            lambda: raw.update(text_config=random.choice([{}, [], 1, {"model_type": "llama"}])),
        ]
    )()


def examine(bench: Bench, random: Random) -> None:
    """Everything that reads a checkpoint, and surgery on it.

    Right is what the library of the format reads as well, and a shortened checkpoint that holds
    exactly the tensors of the kept blocks.
    """
    checkpoint = open_checkpoint(bench.source)
    stored = stored_tensors(bench.source)
    found = {name: (entry.dtype, entry.shape) for name, entry in checkpoint.tensors.items()}
    assert found == {name: held[:2] for name, held in stored.items()}, "another table than stored"
    for name, entry in checkpoint.tensors.items():
        tensor = read_tensor(entry)
        assert tensor.nbytes == entry.bytes
        assert tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == stored[name][2]
    if (bench.source / "config.json").read_bytes() == (
        bench.checkpoint() / "config.json"
    ).read_bytes():
        checkpoint.__dict__["structure"] = bench.opened.structure  # the same config builds the same
    info = checkpoint.info()
    assert sum(info.parameters_per_block) <= info.parameters
    assert len(info.parameters_per_block) == info.blocks
    if random.random() < 0.3:
        assert summarize(checkpoint, probe=False).parameters_outside >= 0
    lint_export(checkpoint)
    _shorten(bench, checkpoint, random)


def _shorten(bench: Bench, checkpoint: Checkpoint, random: Random) -> None:
    """Remove one or two blocks, a quarter of the times with all checks of the result."""
    count = checkpoint.block_count
    removed = sorted(random.sample(range(count), random.choice((1, 1, 2)) if count > 2 else 1))
    plan = build_plan(Budget(blocks=removed), model=checkpoint.info())
    target = bench.out / "short"
    session = Session(device="cpu", stream=False) if random.random() < 0.25 else None
    stages.prune(checkpoint, plan, target, session=session)
    check_shortened(checkpoint, plan, target)


def check_shortened(checkpoint: Checkpoint, plan: PrunePlan, target: Path) -> None:
    """A shortened checkpoint opens, and holds exactly what the plan keeps."""
    short = open_checkpoint(target)
    assert short.block_count == len(plan.kept)
    names = short.block_names.prefix
    expected = Counter[Any]()
    for name, entry in checkpoint.tensors.items():
        block = checkpoint.block_names.block_of(name)
        if block is None and not checkpoint.block_names.is_head(name):
            shape, axis = list(entry.shape), sliced_axis(name)
            if axis is not None:  # it holds a share of every block
                shape[axis] = shape[axis] * len(plan.kept) // checkpoint.block_count
            expected[name, entry.dtype, tuple(shape)] += 1
        elif block in plan.kept:
            rest = name[len(names) :].split(".", 2)[2]
            expected[f"{names}.{plan.kept.index(block)}.{rest}", entry.dtype, entry.shape] += 1
    held = stored_tensors(target)
    assert expected == Counter((name, *one[:2]) for name, one in held.items())
    for name, entry in checkpoint.tensors.items():
        block = checkpoint.block_names.block_of(name)
        outside = block is None and not checkpoint.block_names.is_head(name)
        if outside and sliced_axis(name) is None:
            assert read_tensor(entry).view(-1).view(torch.uint8).numpy().tobytes() == held[name][2]


def stored_tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and data of every stored tensor, as the library of the format reads them."""
    if (directory / SAFETENSORS).exists():
        files = [directory / SAFETENSORS]
        weight_map = None
    else:
        weight_map = json.loads((directory / SAFETENSORS_INDEX).read_text())["weight_map"]
        files = [directory / name for name in dict.fromkeys(weight_map.values())]
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():
                if weight_map is None or (directory / weight_map.get(name, file)) == file:
                    part = stream.get_slice(name)
                    data = stream.get_tensor(name).contiguous().view(-1).view(torch.uint8)
                    shape = tuple(part.get_shape())
                    found[name] = (part.get_dtype(), shape, data.numpy().tobytes())
    return found


# ---- recipes

HEALTHY_RECIPES = {
    "embedded": (RECIPES / "embedded.yaml").read_text(),
    "published": """about: everything that a recipe can hold
model: acme/tiny
revision: main
special_tokens: {bos: 1, eos: 2}  # wrong ones are named
criterion: ppl
options: {power: 2}
calibration: {data: bookcorpus, samples: 10, bos_every_sample: false}
budget: {remove: 1, protect_first: 1, protect_last: 0}
healing: {method: linear, ridge: 0.1}
retraining:
  method: lora
  data: alpaca
  learning_rate: 1e-4
quantization: {method: gptq, group_size: 32}
evaluation: {data: [wikitext2, ptb], bos: first, tasks: [paper]}
benchmark: {batches: [1], new_tokens: [128]}
published:
  source: arXiv:2402.02834
  criterion: ppl
  order: [0, 3, 1, 2]
  values: [38.28, null, 66, 83]
  released:
    perplexity:
      first: {"wikitext2:test": 20.2}
""",
}

YAML_PIECES = [
    "&a [*a]", "!!python/object/apply:os.system ['touch owned']", "!!python/name:os.system",
    "!!python/tuple [1, 2]", "!!binary aGVsbG8=", "!!set {a, b}", "!!timestamp 2001-01-01",
    "!own 1",
    "!!omap [a: 1]", "!!float x", "!!int 'x'", "*unknown", "&x 1", "<<: *x", "{<<: [1]}",
    "{? [a] : 1}",
    "2001-12-14t21:59:43.10-05:00", "0o17", "0x1F", "1:30:00", "1_000", ".nan", ".inf", "-.inf",
    "~",
    "no", "'", '"', "|", ">-", "? a", "- - - -", "[" * 2000 + "]" * 2000,
    "{a: " * 2000 + "}" * 2000,
    "%YAML 9.9", "---", "...", "\t", "\x07", "\u2028", "@", "`", "#", ": :", "1" * 5000, "1e400",
]  # fmt: skip


def _laughs(fan: int, depth: int) -> str:
    """Lists of lists of lists, each by reference: exponential where it is written out."""
    lines = ["l0: &l0 [x, x]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * fan)}]" for n in range(1, depth)]
    return "\n".join(lines)


def _merges(fan: int, depth: int) -> str:
    """The same by merging of tables."""
    lines = ["m0: &m0 {a: 1, b: 2}"]
    lines += [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * fan)}]}}" for n in range(1, depth)]
    return "\n".join(lines)


def recipes(random: Random, bench: Bench) -> Act:
    """A damaged recipe."""
    name = random.choice(list(HEALTHY_RECIPES))
    text, content = HEALTHY_RECIPES[name], copy.deepcopy(_content(name))
    way = random.random()
    if way < 0.15:
        data = damaged_bytes(random, text.encode())
    elif way < 0.35:
        lines = text.splitlines(keepends=True)
        place = random.randrange(len(lines))
        piece = random.choice(YAML_PIECES)
        key, colon, _ = lines[place].partition(":")
        lines[place] = random.choice([f"{key}{colon} {piece}\n", f"{piece}\n{lines[place]}"])
        data = "".join(lines).encode()
    elif way < 0.4:
        fan, depth = random.choice((2, 9, 10)), random.choice((3, 9, 30))
        key = random.choice(["options", "about", "calibration", "retraining", "budget"])
        made = random.choice([_laughs, _merges])(fan, depth)
        letter = "l" if made.startswith("l0") else "m"
        data = f"{made}\n{key}: *{letter}{depth - 1}\n".encode()
        if random.random() < 0.7:  # in the place where anything may stand
            indented = "\n".join(f"  {line}" for line in made.splitlines())
            data = f"options:\n{indented}\n".encode()
    else:
        data = damaged(random, content, values=_recipe_values(content)).encode()
    file = bench.source / "own.yaml"
    file.write_bytes(data)

    def act() -> None:
        recipe = load_recipe(file)
        dumped = recipe.model_dump(mode="json")
        assert Recipe.model_validate(json.loads(json.dumps(dumped, allow_nan=False))) == recipe
        assert not Path("owned").exists()
        recipe.healed  # noqa: B018
        again = changed(recipe, {"calibration.samples": 20, "budget.remove": 1}, "command line")
        assert again.calibration.samples == 20
        filled = recipe.filled("llama")
        assert filled.calibration.data is not None or filled.calibration.file is not None
        for options in filled.retraining:
            options.filled(64)
        if filled.quantization is not None:
            filled.quantization.filled(64)
        plan = build_plan(recipe.budget, model=bench.model, scores=_scored(bench.model))
        check_plan(plan, recipe.budget, bench.model)

    return act


@cache
def _content(name: str) -> Any:
    return yaml.safe_load(HEALTHY_RECIPES[name])


def _recipe_values(content: dict[str, Any]) -> list[Any]:
    """Values of other fields, and such as a recipe may hold."""
    return [
        *content.values(), "ppl", "auto", "lora", "full", "distill", "gptq", "int8", "every",
        "linear",
        {"method": "lora"}, {"method": "none"}, [{"method": "full"}], {"remove": 1}, {"ratio": 0.5},
        {"remove": 10**9}, {"blocks": [1]}, {"blocks": [1, 1]}, {"param_ratio": 0.2},
        {"remove": 1.0},
        {"protect_first": 10**9, "remove": 1}, {"ratio": 0.25, "protect_last": -1}, [], 1e-4,
        "1e-4",
    ]  # fmt: skip


def _scored(model: ModelInfo) -> BlockScores:
    return scores_of(model)


# ---- result files


def result_files(random: Random, bench: Bench) -> Act:
    """A damaged record of any kind."""
    kinds = records()
    kind = random.choice(list(kinds))
    tree = random.choice(kinds[kind]).model_dump(mode="json")
    file = bench.source / "record.json"
    if random.random() < 0.2:
        file.write_bytes(damaged_bytes(random, json.dumps(tree).encode()))
    else:
        file.write_text(damaged(random, tree))

    def act() -> None:
        found = kind.load(file)
        found.save(bench.out / "again.json")
        again = kind.load(bench.out / "again.json")
        assert again == found, "another record after saving and loading"
        str(found)
        for name, value in vars(kind).items():
            if isinstance(value, property):
                getattr(found, name)

    return act


BUDGETS = [
    {"remove": 1}, {"remove": 2}, {"ratio": 0.25}, {"ratio": 0.5}, {"param_ratio": 0.2},
    {"remove": 1, "protect_first": 0, "protect_last": 0}, {"remove": 2, "contiguous": True},
    {"param_ratio": 0.3, "contiguous": True}, {"remove": 2, "period_aligned": True},
    {"blocks": [1, 2]}, {"remove": 1, "contiguous": False},
]  # fmt: skip


def plans(random: Random, bench: Bench) -> Act:
    """Damaged scores, and a plan by them."""
    healthy = [
        scores_of(bench.model), spans_of(bench.model),
        scores_of(bench.model, criterion="greedy", order=[2, 1]),
        scores_of(bench.model, criterion="local", removed=[1, 2], order=[2, 1]),
    ]  # fmt: skip
    scores = random.choice(healthy)
    (bench.source / "scores.json").write_text(damaged(random, scores.model_dump(mode="json")))
    budget = Budget.model_validate(random.choice(BUDGETS))

    def act() -> None:
        found = BlockScores.load(bench.source / "scores.json")
        plan = shortllm.plan(bench.source / "scores.json", budget, out=bench.out / "plan.json")
        assert PrunePlan.load(bench.out / "plan.json") == plan
        assert plan.model == found.model
        check_plan(plan, budget, found.model)

    return act


def check_plan(plan: PrunePlan, budget: Budget, model: ModelInfo) -> None:
    """What is true of every plan."""
    assert sorted([*plan.kept, *plan.removed]) == list(range(model.blocks))
    assert plan.kept and plan.removed
    assert sorted(plan.order) == plan.removed
    assert not set(plan.removed) & set(plan.protected)
    if budget.remove is not None:
        assert len(plan.removed) == budget.remove
    if budget.param_ratio is not None:
        assert plan.reached.parameter_ratio >= budget.param_ratio
    assert math.isclose(plan.reached.block_ratio, len(plan.removed) / model.blocks)


def surgeries(random: Random, bench: Bench) -> Act:
    """A damaged plan, carried out on a healthy checkpoint."""
    plan = plan_of(bench.model)
    file = bench.source / "plan.json"
    if random.random() < 0.1:
        file.write_bytes(damaged_bytes(random, json.dumps(plan.model_dump(mode="json")).encode()))
    else:
        tree = plan.model_dump(mode="json")
        if random.random() < 0.4:
            removed = sorted(random.sample(range(BLOCKS), random.randint(0, BLOCKS)))
            kept = [block for block in range(BLOCKS) if block not in removed]
            tree |= {"removed": removed, "kept": kept, "order": removed}
            file.write_text(json.dumps(tree))
        else:
            file.write_text(damaged(random, tree))

    def act() -> None:
        target = bench.out / "short"
        shortllm.prune(str(bench.opened.directory), file, target, verify=False)
        check_shortened(bench.opened, PrunePlan.load(file), target)

    return act


def reports(random: Random, bench: Bench) -> Act:
    """A run directory with one damaged file, and its page."""
    name = random.choice(["run", "run", "run", "comparison", "units"])
    make: dict[str, Callable[[Path], Any]] = {
        "run": write_run, "comparison": write_comparison, "units": write_units,
    }  # fmt: skip
    base = bench.kept(f"reported-{name}", make[name])
    run = bench.out / "run"
    shutil.copytree(base, run)
    file = random.choice(sorted(run.rglob("*.json")))
    if random.random() < 0.1:
        file.write_bytes(damaged_bytes(random, file.read_bytes()))
    elif random.random() < 0.05:
        file.unlink()
    else:
        file.write_text(damaged(random, json.loads(file.read_text())))
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def act() -> None:
        with nullcontext() if random.random() < 0.15 else _undrawn():
            report()

    def report() -> None:
        try:
            if name == "units":
                from shortllm.reporting import write_units as write

                page = write(run)
            elif random.random() < 0.2 and name == "run":
                page = bench.out / "compare.html"
                shortllm.compare([run], out=page)
            else:
                page = shortllm.report(run)
        except ShortLLMError:
            after = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}
            assert after == before, "a refused report has changed the run"
            shutil.rmtree(run)
            raise
        text = page.read_text(encoding="utf-8")
        assert text.rstrip().endswith("</html>")
        assert "<script>alert" not in text
        assert not list(bench.out.rglob("*.partial"))

    return act


@contextmanager
def _undrawn() -> Iterator[None]:
    """Plots are made, but not drawn, which would take most of the time."""
    drawn = drawing._as_inline_svg
    drawing._as_inline_svg = lambda figure, alt: "<svg></svg>"
    try:
        yield
    finally:
        drawing._as_inline_svg = drawn


def calibrations(random: Random, bench: Bench) -> Act:
    """Damaged token ids, in each form that they are given in."""
    ids = torch.arange(24).reshape(3, 8) % 11
    info = CalibrationInfo(
        source="x", sampler="packed", samples=3, length=8, bos="none", fingerprint="f",
        tokens_fingerprint=tokens_fingerprint(ids),
    )  # fmt: skip
    Calibration(ids=ids, info=info).save(bench.source)
    given = bench.source / "ids.json"
    given.write_text(json.dumps(ids.tolist()))
    file = random.choice([given, *sorted(bench.source.glob("calibration.*"))])
    if file.suffix == ".json" and random.random() < 0.8:
        file.write_text(
            damaged(random, json.loads(file.read_text()), values=[0, 1, 10, 11, [1, 2]])
        )
    else:
        file.write_bytes(damaged_bytes(random, file.read_bytes()))
    asked = given if file == given else random.choice([bench.source, *bench.source.glob("calib*")])

    def act() -> None:
        found = load_calibration(asked)
        check_ids(found.ids, 11)
        assert found.ids.dtype == torch.int64 and found.ids.ndim == 2
        assert found.info.tokens_fingerprint == tokens_fingerprint(found.ids)
        assert int(found.ids.min()) >= 0 and int(found.ids.max()) < 11

    return act


# ---- what an interrupted pass leaves, and tokenizers


def journals(random: Random, bench: Bench) -> Act:
    """A damaged journal: what it says is what was said, or nothing."""
    position, tensor = {"done": 3, "sums": [1.5, 2.5]}, torch.arange(6.0)
    place = bench.out / "journal"
    Journal(place, "f" * 64).commit(position, {"sums": tensor, "more": tensor + 1})
    file = random.choice(sorted(path for path in place.iterdir() if path.is_file()))
    if file.suffix == ".json" and random.random() < 0.7:
        file.write_text(damaged(random, json.loads(file.read_text())))
    else:
        file.write_bytes(damaged_bytes(random, file.read_bytes()))

    def act() -> None:
        journal = Journal(place, "f" * 64)
        found = journal.position()
        if found is not None:
            assert found == position
            assert torch.equal(journal.tensor("sums"), tensor)
            assert torch.equal(journal.tensor("more"), tensor + 1)

    return act


def _with_tokenizer(directory: Path) -> None:
    """A small checkpoint with the embedded model's tokenizer."""
    write_checkpoint("llama", directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, directory / name)


def tokenizers(random: Random, bench: Bench) -> Act:
    """A damaged tokenizer: refused, or one that gives token ids."""
    from shortllm.checkpoint.tokenizer import load_tokenizer

    bench.lay(bench.kept("with-tokenizer", _with_tokenizer))
    file = bench.source / random.choice(["tokenizer_config.json", "tokenizer.json"])
    if random.random() < 0.3:
        file.write_bytes(damaged_bytes(random, file.read_bytes()))
    else:
        file.write_text(damaged(random, json.loads(file.read_text())))

    def act() -> None:
        tokenizer = load_tokenizer(open_checkpoint(bench.source))
        ids = tokenizer("There was a drum in the school.")["input_ids"]
        assert all(isinstance(token, int) for token in ids)

    return act


KINDS: dict[str, tuple[Callable[[Random, Bench], Act], float]] = {
    "headers": (headers, 4),
    "indexes": (indexes, 3),
    "pickles": (pickles, 1),
    "configs": (configs, 3),
    "recipes": (recipes, 4),
    "result files": (result_files, 5),
    "plans": (plans, 2),
    "surgeries": (surgeries, 1),
    "reports": (reports, 1),
    "calibrations": (calibrations, 1),
    "journals": (journals, 0.5),
    "tokenizers": (tokenizers, 0.5),
}
"""Name -> the kind, and its share of the inputs."""
