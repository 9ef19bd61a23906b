"""Python as people write it: loaded models, torch's own names, one item for a list, wrong calls."""

from __future__ import annotations

import gc
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from families import BY_TIER, build, config_of, load, loaded, opened, save, shortened, token_ids
from torch import nn
from transformers import AutoTokenizer, LlamaModel, T5Config, T5ForConditionalGeneration

import shortllm
from shortllm import embedded
from shortllm.calls import accepts
from shortllm.checkpoint.loaded import directory_of
from shortllm.cli import app
from shortllm.errors import (
    BudgetError,
    CheckpointError,
    CriterionError,
    ResultFileError,
    ShortLLMError,
    UnsupportedModelError,
)
from shortllm.options import Options, keywords_of
from shortllm.recipe import Recipe
from shortllm.runtime import quiet_transformers

REMOVED = [1, 3]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded.MODEL_DIR)


@pytest.fixture(scope="module")
def with_words(tokenizer: Any) -> nn.Module:
    """A model in memory whose vocabulary is that of `tokenizer`."""
    return build(config_of("llama", vocab_size=len(tokenizer)))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    lines = (f"There was a drum in the school of town {n}, and a dog." for n in range(120))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """Token ids to calibrate on, for models without a tokenizer."""
    (tmp_path / "ids.json").write_text(json.dumps(token_ids(8).tolist()))
    return tmp_path / "ids.json"


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=token_ids(2)).logits  # type: ignore[no-any-return]


def state(model: nn.Module) -> dict[str, Any]:
    """All there is to see of a model."""
    model_config, generation = model.config, model.generation_config  # type: ignore[union-attr]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {
        "config": repr(model_config),
        "dtype": model_config.dtype,  # type: ignore[union-attr]
        "generation": repr(generation),
        "training": model.training,
        "weights": weights,
    }


def assert_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name in one.keys() - {"weights"}:
        assert one[name] == other[name], name
    assert one["weights"].keys() == other["weights"].keys()
    for name, tensor in one["weights"].items():
        assert torch.equal(tensor, other["weights"][name]), name


# ---- shorten


@pytest.mark.parametrize("variant", BY_TIER)
def test_a_model_in_memory_is_shortened_as_surgery_does(variant: str, tmp_path: Path) -> None:
    model = loaded(variant)
    before = state(model)
    short = shortllm.shorten(model, blocks=REMOVED, verify=False)
    assert_alike(state(model), before)

    expected = load(shortened(opened(variant), REMOVED, tmp_path / "surgery"))
    assert type(short) is type(expected) and torch.equal(logits(short), logits(expected))
    found, wanted = short.config.to_dict(), expected.config.to_dict()  # type: ignore[union-attr]
    assert found["shortllm"]["removed_blocks"] == REMOVED
    differ = {name for name in {*found, *wanted} if found.get(name) != wanted.get(name)}
    assert differ <= {"shortllm", "_name_or_path"}
    assert repr(short.generation_config) == repr(expected.generation_config)
    assert _numbers(short) == _numbers(expected)

    generating: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    prompt = token_ids(1, 9)
    cached = short.generate(prompt, use_cache=True, **generating)
    assert torch.equal(cached, short.generate(prompt, use_cache=False, **generating))
    again = load(save(short, tmp_path / "again"))
    assert torch.equal(logits(again), logits(short))


def _numbers(model: Any) -> list[int]:
    """The number that each attention has in the cache."""
    return [one.layer_idx for one in model.modules() if hasattr(one, "layer_idx")]


def test_shorten_chooses_and_heals_as_the_stages_do(ids: Path, tmp_path: Path) -> None:
    model, source = loaded("llama"), str(opened("llama").directory)
    scores = shortllm.score(source, file=ids)
    plan = shortllm.plan(scores, remove=2, protect_first=1)
    shortllm.prune(source, plan, tmp_path / "pruned")
    shortllm.heal(tmp_path / "pruned", tmp_path / "healed", file=ids)
    short = shortllm.shorten(model, remove=2, protect_first=1, file=ids, heal="regression")
    assert torch.equal(logits(short), logits(load(tmp_path / "healed")))
    for given in (plan, tmp_path / "plan.json", plan.removed):
        plan.save(str(tmp_path / "plan.json"))
        short = shortllm.shorten(model, plan=given, verify=False)
        assert torch.equal(logits(short), logits(load(tmp_path / "pruned")))


def test_a_shortened_model_is_of_the_type_and_mode_of_the_given_one() -> None:
    model = build("llama").to(torch.bfloat16).train()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    model.name_or_path = "owner/model"  # type: ignore[assignment]
    short = shortllm.shorten(model, plan=2)
    assert short.dtype == torch.bfloat16 and short.training
    assert short.config._attn_implementation == "eager"
    assert short.name_or_path == "owner/model"
    twice = shortllm.shorten(short, plan=0, verify=False)
    assert twice.config.shortllm["source"] == "LlamaForCausalLM(owner/model, 5 blocks)"
    assert twice.config.shortllm["parent"]["source"] == "LlamaForCausalLM(owner/model, 6 blocks)"


def test_a_directory_is_shortened_in_the_type_it_is_stored_in(tmp_path: Path) -> None:
    stored = save(build("llama").to(torch.float16), tmp_path / "half")
    short = shortllm.shorten(stored, blocks=[2], verify=False)
    assert short.dtype == torch.float16 and len(short.model.layers) == 5
    assert short.name_or_path == str(stored)


def test_trainer_takes_a_shortened_model(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    short = shortllm.shorten(loaded("llama"), blocks=REMOVED, verify=False)
    before = state(short)["weights"]
    rows = [{"input_ids": row, "labels": row} for row in token_ids(2)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", use_cpu=True, learning_rate=0.1
    )
    with quiet_transformers():
        Trainer(short, arguments, train_dataset=rows).train()
    changed = [not torch.equal(before[name], one) for name, one in short.state_dict().items()]
    assert sum(changed) > len(changed) / 2


# ---- loaded models wherever a model is taken


def test_every_function_that_takes_a_model_takes_a_loaded_one() -> None:
    found = set()
    for name in shortllm.__all__:
        function = getattr(shortllm, name)
        if inspect.isfunction(function):
            for one in inspect.signature(function).parameters.values():
                if one.name in ("model", "models", "source"):
                    found.add(name)
                    assert "ModelSource" in str(one.annotation), name
    assert found == {
        "bench", "compare_criteria", "compare_units", "draft_of", "drop_sublayers", "evaluate",
        "export", "export_lint", "heal", "info", "load", "load_adapter", "merge", "open_checkpoint",
        "prune", "quantize", "retrain", "run", "score", "shorten", "width",
    }  # fmt: skip


def test_a_loaded_model_goes_through_all_stages(
    with_words: nn.Module, tokenizer: Any, text: Path, tmp_path: Path
) -> None:
    name = "LlamaForCausalLM(6 blocks)"
    directory = save(with_words, tmp_path / "model")
    tokenizer.save_pretrained(directory)
    some: dict[str, Any] = {"data": text, "samples": 2, "length": 16}

    scores = shortllm.score(with_words, tokenizer=tokenizer, **some)
    assert scores.model.id == name
    assert scores.importance == shortllm.score(directory, **some).importance
    plan = shortllm.plan(scores, target_params="80K")  # opens the model by its name
    assert shortllm.info(with_words, probe=False).model == scores.model
    pruned = shortllm.prune(with_words, plan, tmp_path / "pruned")
    assert (pruned / "tokenizer.json").is_file()
    assert json.loads((pruned / "config.json").read_text())["shortllm"]["source"] == name

    short = shortllm.load(pruned)
    healing = shortllm.heal(short, tmp_path / "healed", data=text, samples=4, length=16)
    assert healing.source.id == name
    found = shortllm.evaluate(
        [with_words, short, pruned], data=text, length=32, max_segments=4, tokenizer=tokenizer
    ).models
    assert [one.name for one in found] == [name, _named(short, pruned), "pruned"]
    assert found[1].perplexity[0].nll == found[2].perplexity[0].nll != found[0].perplexity[0].nll


def _named(short: Any, place: Path) -> str:
    return f"LlamaForCausalLM({place.name}, {len(short.model.layers)} blocks)"


def test_a_run_of_a_loaded_model(
    with_words: nn.Module, tokenizer: Any, text: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    done = shortllm.run(
        with_words,
        blocks=2,
        data=text,
        length=16,
        eval_length=16,
        max_segments=2,
        continuations=0,
        tokenizer=tokenizer,
    )
    assert done.directory == Path("runs/LlamaForCausalLM-6-blocks-blocks2")
    assert "LlamaForCausalLM(6 blocks)" in done.report.read_text()
    assert shortllm.load(done.checkpoints["pruned"]).config.num_hidden_layers == 5


def test_a_loaded_model_is_saved_again_only_if_it_changed() -> None:
    model = build("llama")
    checkpoint = shortllm.open_checkpoint(model)
    name, first, fingerprint = checkpoint.id, checkpoint.directory, checkpoint.fingerprint
    written = (first / "model.safetensors").stat()
    assert shortllm.open_checkpoint(model).directory == first
    assert (first / "model.safetensors").stat() == written
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1  # type: ignore[union-attr,index]
    changed = shortllm.open_checkpoint(model)
    assert changed.id == name and changed.fingerprint != fingerprint
    assert changed.directory.is_dir() and not first.exists()
    assert directory_of(name) == changed.directory
    del model
    gc.collect()
    assert not changed.directory.exists()
    with pytest.raises(CheckpointError, match="was a model in memory, and is no longer there"):
        shortllm.open_checkpoint(name)


def test_models_of_one_name_are_told_apart() -> None:
    one, other = build("gpt2"), build("gpt2", seed=5)
    assert shortllm.open_checkpoint(one).id == "GPT2LMHeadModel(6 blocks)"
    assert shortllm.open_checkpoint(other).id == "GPT2LMHeadModel(6 blocks, number 2)"
    assert shortllm.open_checkpoint(one).id == "GPT2LMHeadModel(6 blocks)"


def test_the_tokenizer_is_found_where_the_model_was_loaded_from(
    with_words: nn.Module, tokenizer: Any, text: Path, tmp_path: Path
) -> None:
    source = save(with_words, tmp_path / "model")
    some: dict[str, Any] = {"data": text, "samples": 2, "length": 16}
    with pytest.raises(CheckpointError, match="Give it as tokenizer=AutoTokenizer.from_pretrained"):
        shortllm.score(load(source), **some)
    tokenizer.save_pretrained(tmp_path / "words")
    by_place = shortllm.score(load(source), tokenizer=tmp_path / "words", **some)
    tokenizer.save_pretrained(source)
    assert shortllm.score(load(source), **some).importance == by_place.importance


# ---- torch's names, one item for a list, flags as keywords


def test_types_and_devices_of_torch_are_taken_as_their_names() -> None:
    runtime = shortllm.Runtime(device=torch.device("cuda:1"), dtype=torch.bfloat16)  # type: ignore[arg-type]
    assert runtime == shortllm.Runtime(device="cuda:1", dtype="bfloat16")
    scores = shortllm.score(
        opened("llama").directory,
        criterion="magnitude",
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    assert scores.dtype == "bfloat16"


def test_one_item_stands_for_a_list_of_it(tmp_path: Path) -> None:
    assert shortllm.Budget(blocks=3).blocks == [3]  # type: ignore[arg-type]
    evaluation = shortllm.EvaluationOptions(data=Path("a.txt"), tasks="boolq")  # type: ignore[arg-type]
    assert (evaluation.data, evaluation.tasks) == (["a.txt"], ["boolq"])
    assert shortllm.BenchmarkOptions(batches=4).batches == [4]  # type: ignore[arg-type]
    assert shortllm.RetrainOptions(report_to="none").report_to == ["none"]  # type: ignore[arg-type]
    assert shortllm.RetrainOptions(eval_data=["a", Path("b")]).eval_data == ["a", "b"]  # type: ignore[list-item]
    with pytest.raises(ResultFileError, match="no such directory: nothere"):
        shortllm.compare("nothere")
    with pytest.raises(CriterionError, match="'nothere' is neither a criterion"):
        shortllm.compare_units("embedded", methods="nothere")
    one = shortllm.prune(opened("gpt2").directory, 2, tmp_path / "short", verify=False)
    assert shortllm.open_checkpoint(one).block_count == 5
    same = shortllm.prune(opened("gpt2").directory, out=one, blocks=2, verify=False)
    assert same == one  # which is up to date


def test_flags_of_a_run_are_keywords(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Recipe] = []

    def stop(recipe: Recipe, *_: Any) -> None:
        asked.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr("shortllm.pipeline._prepare", stop)
    for given in (
        {"heal": "regression", "retrain": "lora", "quantize": "int8", "bench": True},
        {"healing": "regression", "retraining": ["lora"], "quantization": "int8", "benchmark": {}},
    ):
        with pytest.raises(KeyboardInterrupt):
            shortllm.run("embedded", ratio=0.2, data="c4", tasks="boolq", **given)
    assert (
        asked[0]
        == asked[1]
        == Recipe(
            budget=shortllm.Budget(ratio=0.2),
            calibration=shortllm.CalibrationOptions(data="c4"),
            evaluation=shortllm.EvaluationOptions(tasks=["boolq"]),
            healing=shortllm.HealOptions(method="regression"),
            retraining=[shortllm.RetrainOptions(method="lora")],
            quantization=shortllm.QuantizeOptions(method="int8"),
            benchmark=shortllm.BenchmarkOptions(),
        )
    )
    with pytest.raises(KeyboardInterrupt):
        shortllm.run(recipe=asked[0], heal="none", retrain="none", quantize="none", bench=False)
    off = asked[-1]
    assert (off.healing, off.retraining, off.quantization, off.benchmark) == (None, [], None, None)


OTHERWISE = {
    "--option", "--set", "--json", "--help", "--preset", "--gguf", "--quiet", "--verbose",
}  # fmt: skip
"""Flags that are structured in Python, or have no meaning there."""


def test_every_flag_of_a_command_is_a_keyword_of_its_function() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    checked = 0
    for name, command in commands.items():
        function = getattr(shortllm, {"eval": "evaluate"}.get(name, name.replace("-", "_")), None)
        if not inspect.isfunction(function):
            continue
        parameters = inspect.signature(function).parameters.values()
        known = {one.name for one in parameters}
        for one in parameters:
            if isinstance(one.annotation, type) and issubclass(one.annotation, Options):
                known |= keywords_of(one.annotation).keys()
        flags = {flag for one in command.params for flag in one.opts if flag.startswith("--")}
        missing = {flag for flag in flags - OTHERWISE if flag[2:].replace("-", "_") not in known}
        allowed = {"compare-units": {"--batch"}}
        assert missing == allowed.get(name, set()), name
        checked += 1
    assert checked >= 17


# ---- wrong calls


E = "embedded"
MODEL, WORDS = "a model is a checkpoint directory, a Hub id or a loaded model", "tokenizer= is"
Wrong = tuple[Callable[[], Any], type[Exception], str]


def llama() -> Any:
    return loaded("llama")


def words() -> Any:
    return AutoTokenizer.from_pretrained(embedded.MODEL_DIR)


def scores() -> Any:
    return shortllm.score(E, criterion="even")


def on_meta() -> Any:
    with torch.device("meta"):
        return type(llama())(llama().config)


def t5() -> Any:
    small = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(small)


def deleted() -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        return directory


class Wrapped(nn.Module):
    """What a library puts around a model."""

    def __init__(self) -> None:
        super().__init__()
        self.module = llama()


WRONG: dict[str, Wrong] = {
    # models
    "no model": (lambda: shortllm.score(None), TypeError, f"score.*{MODEL}"),
    "a number": (lambda: shortllm.info(7), TypeError, "not 7.*shortllm.info.model,"),
    "a list": (lambda: shortllm.score([E]), TypeError, r"not \['embedded'\]"),
    "no name": (lambda: shortllm.info(" "), CheckpointError, "name is empty"),
    "a class": (
        lambda: shortllm.shorten(type(llama()), remove=1), TypeError,
        r"give an instance: LlamaForCausalLM.from_pretrained\(",
    ),
    "a tokenizer": (lambda: shortllm.score(words()), TypeError, "and this as tokenizer="),
    "a config": (lambda: shortllm.info(llama().config), TypeError, "of type LlamaConfig"),
    "a module": (lambda: shortllm.info(nn.Linear(2, 2)), TypeError, "of type Linear"),
    "a wrapped model": (lambda: shortllm.info(Wrapped()), TypeError, "model.module"),
    "an open checkpoint": (lambda: shortllm.info(opened("llama")), TypeError, "type Checkpoint"),
    "a model without a head": (
        lambda: shortllm.info(LlamaModel(llama().config)), UnsupportedModelError,
        "saved as LlamaModel, not as a causal language model",
    ),
    "an encoder-decoder": (lambda: shortllm.info(t5()), UnsupportedModelError, "encoder-decoder"),
    "no weights": (
        lambda: shortllm.prune(on_meta(), 1, "x"), CheckpointError, "not in memory.*Hub id",
    ),
    "a deleted directory": (
        lambda: shortllm.info(Path(deleted())), CheckpointError, "no such directory: /",
    ),
    "one of several": (lambda: shortllm.evaluate([E, None]), TypeError, f"evaluate.*{MODEL}"),
    "none of several": (lambda: shortllm.evaluate([]), ShortLLMError, "no model to evaluate"),
    "several, unlisted": (
        lambda: shortllm.evaluate(E, "short"), TypeError, r"Call shortllm.evaluate\(models, ",
    ),
    "a teacher": (
        lambda: shortllm.retrain(E, "x", method="distill", teacher=3), TypeError,
        f"retrain.*{MODEL}.*not 3",
    ),
    # tokenizers
    "a model as tokenizer": (
        lambda: shortllm.score(llama(), tokenizer=llama()), TypeError, f"score.*{WORDS}",
    ),
    "no such tokenizer": (
        lambda: shortllm.score(llama(), tokenizer=deleted()), CheckpointError,
        "there is no tokenizer in",
    ),
    "a tokenizer for a directory": (
        lambda: shortllm.score(E, tokenizer=words()), ShortLLMError, "has its own. Leave it out",
    ),
    "a tokenizer where no model is": (
        lambda: shortllm.plan(scores(), remove=1, tokenizer=words()), TypeError,
        r"plan\(\) has no argument 'tokenizer'",
    ),
    # arguments
    "too few": (
        lambda: shortllm.prune(E, [1]), TypeError,
        r"missing a required argument: 'out'. Call shortllm.prune\(model, plan, out\) or ",
    ),
    "a directory in the place of a plan": (
        lambda: shortllm.prune(E, "x", blocks=[1]), TypeError, r"prune\(model, blocks=\[3, 4\]",
    ),
    "neither plan nor blocks": (
        lambda: shortllm.prune(E, out="x"), BudgetError, "either --plan plan.json or --blocks 3,4",
    ),
    "plan and blocks": (lambda: shortllm.prune(E, [1], "x", blocks=2), BudgetError, "give either"),
    "names as blocks": (
        lambda: shortllm.prune(E, blocks="first", out="x"), TypeError,
        "blocks='first' does not fit. blocks: the numbers of the blocks to remove",
    ),
    "none": (lambda: shortllm.prune(), TypeError, "argument: 'model'"),
    "a record unnamed": (
        lambda: shortllm.plan(scores(), shortllm.Budget(remove=2)), TypeError,
        r"plan\(\): too many positional arguments. Call shortllm.plan\(scores, \*, out=None, .*\)",
    ),
    "an unknown one": (
        lambda: shortllm.plan(scores(), remov=2), TypeError, "Did you mean 'remove'?",
    ),
    "unknown to this function": (
        lambda: shortllm.info(E, overwrite=True), TypeError, "no argument 'overwrite'",
    ),
    "a number as plan": (
        lambda: shortllm.prune(E, 1.5, "x"), TypeError, "plan=1.5 does not fit. plan: a plan, a pl",
    ),
    "scores as plan": (
        lambda: shortllm.prune(E, scores(), "x"), TypeError, "plan=an object of type BlockScores",
    ),
    "a list as scores": (
        lambda: shortllm.plan([1, 2], remove=1), TypeError, r"scores=\[1, 2\] does not fit",
    ),
    "a number as directory": (lambda: shortllm.run(E, out=3), TypeError, "out=3 does not fit"),
    "a number as run": (lambda: shortllm.report(3), TypeError, "run_dir: a directory of a fin"),
    "no such run": (lambda: shortllm.report("nothere"), ResultFileError, "no such directory: not"),
    "no such run of several": (
        lambda: shortllm.compare("nothere"), ResultFileError, "no such directory: nothere",
    ),
    "a number as criterion": (
        lambda: shortllm.score(E, criterion=3), TypeError, "criterion: a name, or several",
    ),
    "a misspelt criterion": (
        lambda: shortllm.shorten(E, remove=2, criterion="pll"), CriterionError, "Did you mean 'ppl",
    ),
    "options of no criterion": (
        lambda: shortllm.score(E, criterion="taylor", options={"power": 2}), TypeError,
        "for each criterion its options, e.g. ",
    ),
    "options of a model": (
        lambda: shortllm.load(E, devce="cpu"), CheckpointError, "keyword argument 'devce'",
    ),
    "a type of a model": (lambda: shortllm.load(E, dtype="fp17"), CheckpointError, "fp17"),
    "special tokens": (
        lambda: shortllm.open_checkpoint(E, special_tokens={"boss": 1}), TypeError, "`bos`, `eos`",
    ),
    "callbacks": (
        lambda: shortllm.retrain(E, "x", callbacks=print), TypeError, "of transformers.TrainerCal",
    ),
    # records and their fields
    "a name as record": (
        lambda: shortllm.score(E, runtime="cuda"), TypeError, "runtime='cuda' does not fit",
    ),
    "a recipe's name": (lambda: shortllm.run(recipe=E), TypeError, "recipe: every choice"),
    "another record": (
        lambda: shortllm.heal(E, "x", options=shortllm.Runtime(device="cpu")), ShortLLMError,
        "unknown field 'device'. Available: attention",
    ),
    "a runtime that cannot be": (
        lambda: shortllm.retrain(E, "x", runtime=shortllm.Runtime(stream=True)), ShortLLMError,
        "unknown field 'stream'",
    ),
    "fields unnamed": (lambda: shortllm.Budget(3), TypeError, r"by name: Budget\(.* remove=\.\.\."),  # type: ignore[misc]
    "a misspelt field": (
        lambda: shortllm.HealOptions(rigde=1), ShortLLMError, "HealOptions: .*mean 'ridge'",  # type: ignore[call-arg]
    ),
    "a value of a field": (
        lambda: shortllm.Recipe(budget=3), ShortLLMError, "Recipe: budget 3: must be",  # type: ignore[arg-type]
    ),
    "a text for a number": (
        lambda: shortllm.plan(scores(), remove="six"), ShortLLMError, "remove six: must be a valid",
    ),
    "half a block": (
        lambda: shortllm.plan(scores(), remove=2.5), ShortLLMError, "remove 2.5: must be",
    ),
    "no budget": (lambda: shortllm.shorten(E), BudgetError, "no budget given"),
    "two budgets": (
        lambda: shortllm.shorten(E, plan=[1], remove=1), BudgetError, "Leave one of them out",
    ),
    "a list as text": (
        lambda: shortllm.score(E, data=["a", "b"]), ShortLLMError, "data a,b: must be",
    ),
    "a type of no computation": (
        lambda: shortllm.score(E, dtype=torch.int8), ShortLLMError, "dtype int8: must be 'auto'",
    ),
    "a short name of a type": (
        lambda: shortllm.score(E, dtype="fp16"), ShortLLMError, "dtype fp16: must be 'auto'",
    ),
    "a device": (lambda: shortllm.score(E, device=0), ShortLLMError, "device 0: must be"),
    "a device of torch": (
        lambda: shortllm.score(E, device=torch.device("meta")), ShortLLMError, "unknown --device",
    ),
    "a method": (lambda: shortllm.run(E, retrain="lorra"), ShortLLMError, "Did you mean 'lora'"),
    "how to heal": (
        lambda: shortllm.shorten(E, remove=2, heal="regresion"), ShortLLMError, "'regression'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_answered_with_the_right_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, kind, said = WRONG[name]
    with pytest.raises(kind, match=said) as raised:
        call()
    assert type(raised.value).__module__.partition(".")[0] in ("builtins", "shortllm")
    assert "\n" not in str(raised.value) and list(tmp_path.iterdir()) == []


def test_what_a_function_is_called_with_is_converted() -> None:
    @accepts()
    def function(where: Path, numbers: list[int], *, name: str = "a") -> Any:
        """Give back what came."""
        return where, numbers, name

    assert function("x", range(3)) == (Path("x"), [0, 1, 2], "a")
    assert function("x", torch.tensor([4, 5]), name="b") == (Path("x"), [4, 5], "b")
    with pytest.raises(TypeError, match=r"name=3 does not fit. Call shortllm.function\(where, "):
        function("x", [], name=3)
