"""Damaged recipes: YAML with wrong values, wrong structure, tags, and references that multiply."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import yaml
from fuzz_bench import Act, Bench, check_plan
from healthy import (
    scores_of,
)
from mutations import damaged, damaged_bytes

from shortllm.pruning.planning import build_plan
from shortllm.pruning.records import BlockScores
from shortllm.recipe import DIRECTORY as RECIPES
from shortllm.recipe import Recipe, changed, load_recipe
from shortllm.records import ModelInfo

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
        recipe.retrained  # noqa: B018
        again = changed(recipe, {"calibration.samples": 20, "budget.remove": 1}, "command line")
        assert again.calibration.samples == 20
        resolved = recipe.resolved("llama")
        assert resolved.calibration.data is not None or resolved.calibration.file is not None
        plan = build_plan(recipe.budget, model=bench.model, scores=scores_of(bench.model))
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
