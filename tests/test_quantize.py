"""Quantization: how small, how good, read by plain transformers, and as a stage of a run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import families
import pytest
import torch

import shortllm
from shortllm import pipeline
from shortllm.checkpoint.source import open_checkpoint
from shortllm.checkpoint.tensors import read_tensor
from shortllm.cli import main
from shortllm.data.calibration import calibrate
from shortllm.data.options import CalibrationOptions
from shortllm.errors import DataError, OutputError, ShortLLMError, UnsupportedModelError
from shortllm.evaluation.options import Evaluation, EvaluationOptions
from shortllm.evaluation.texts import prepare_texts
from shortllm.healing.options import HealOptions
from shortllm.model import Session
from shortllm.model.loading import load_model, stored_dtype
from shortllm.options import options_from
from shortllm.quantizing import compressing as packages
from shortllm.quantizing.compressing import find_layers, fitting_sizes, require_group_size
from shortllm.quantizing.methods import METHODS
from shortllm.quantizing.options import (
    QUANTIZED,
    Quantization,
    QuantizeCalibration,
    QuantizeOptions,
)
from shortllm.quantizing.quantize import check, resolve
from shortllm.recipe import Recipe
from shortllm.reporting.load import load_results
from shortllm.reporting.runs_page import compared_models
from shortllm.retraining.options import RetrainOptions

CPU = torch.device("cpu")
SMALL = {"samples": 16, "length": 128}
PLAIN_TRANSFORMERS = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, loading = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(loading.values()), loading
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("There was a drum in the school.", return_tensors="pt").input_ids
made = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
assert "shortllm" not in sys.modules
print(made[0].tolist())
"""


def obstacle() -> str | None:
    """Why nothing can be quantized here, if so: no extra, or one that admits other versions."""
    try:
        packages.require_extra()
    except ShortLLMError as error:
        return str(error)
    return None


quantizes = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))


HOW: dict[str, dict[str, Any]] = {
    "gptq": {**SMALL},
    "per-row": {**SMALL, "group_size": 0, "act_order": True},
    "int8": {"method": "int8"},
}


class Made(dict[str, Path]):
    """The embedded model by each method, once it is needed."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    def __missing__(self, name: str) -> Path:
        shortllm.quantize("embedded", self.directory / name, **HOW[name])
        self[name] = self.directory / name
        return self[name]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("quantized"))


def perplexities(*models: str | Path) -> list[float]:
    found = shortllm.evaluate(
        [str(model) for model in models],
        options=EvaluationOptions(data=["embedded"], max_segments=64, continuations=0),
    )
    return [one.perplexity[0].perplexity for one in found.models]


@pytest.mark.slow
@quantizes
def test_it_is_as_small_as_its_bits_say(made: dict[str, Path]) -> None:
    embedded = open_checkpoint("embedded")
    inside = sum(embedded.parameters_per_block)
    norms = 2 * 192 * embedded.block_count
    weights, rest = inside - norms, embedded.parameters - inside + norms
    rows = sum(
        entry.shape[0]
        for entry in embedded.tensors.values()
        if embedded.block_names.block_of(entry.name) is not None and len(entry.shape) == 2
    )
    shapes = 84 * 2 * 8  # the shape of each layer, two int64
    expected = {
        "gptq": weights // 2 + weights // 32 * 2 + shapes,
        "per-row": weights // 2 + rows * 2 + shapes,
        "int8": weights + rows * 2,
    }
    for name, directory in ((name, made[name]) for name in HOW):
        checkpoint = open_checkpoint(directory)
        assert checkpoint.bytes == expected[name] + 2 * rest
        record = Quantization.load(directory / Quantization.FILE)
        assert (record.bytes_before, record.bytes_after) == (embedded.bytes, checkpoint.bytes)
        assert record.layers == 84 and record.model.fingerprint == embedded.fingerprint


@pytest.mark.slow
@quantizes
def test_it_is_counted_as_the_weights_it_stands_for(made: dict[str, Path]) -> None:
    embedded = open_checkpoint("embedded").info()
    for directory in map(made.__getitem__, HOW):
        info = open_checkpoint(directory).info()
        assert info.parameters == embedded.parameters
        assert info.parameters_per_block == embedded.parameters_per_block
        assert stored_dtype(open_checkpoint(directory)) == torch.bfloat16


@quantizes
def test_what_is_not_in_a_linear_layer_of_a_block_is_unchanged(made: dict[str, Path]) -> None:
    before, after = open_checkpoint("embedded"), open_checkpoint(made["gptq"])
    kept = [name for name in before.tensors if name in after.tensors]
    assert len(kept) == 1 + 1 + 2 * 12  # embeddings, final norm, two norms per block
    for name in kept:
        assert torch.equal(read_tensor(before.tensors[name]), read_tensor(after.tensors[name]))


@pytest.mark.slow
@quantizes
def test_perplexity_stays_within_a_hundredth(made: dict[str, Path]) -> None:
    before, *after = perplexities("embedded", *map(made.__getitem__, HOW))
    for one in after:
        assert before * 0.99 < one < before * 1.01
        assert one != before


@pytest.mark.slow
@quantizes
def test_gptq_beats_rounding_to_nearest_on_the_calibration_text() -> None:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    from shortllm.quantizing.compressing import compress

    embedded = open_checkpoint("embedded")
    options = resolve(options_from(QuantizeOptions, {"group_size": 96, **SMALL}), embedded)
    layers = check(options, embedded, Session(device="cpu"))
    ids_BT = calibrate(embedded, options.calibration).ids
    gptq = METHODS.get("gptq").function(options, layers)
    nearest = QuantizationModifier(config_groups=gptq.config_groups, ignore=gptq.ignore)
    logits = {}
    for name, modifier in (("whole", None), ("gptq", gptq), ("nearest", nearest)):
        model: Any = load_model(embedded, device=CPU, dtype="float32")
        if modifier is not None:
            compress(model, modifier, ids_BT if name == "gptq" else None)
        with torch.no_grad():
            logits[name] = model(input_ids=ids_BT).logits.log_softmax(-1)
    kl = {
        name: torch.nn.functional.kl_div(
            logits[name], logits["whole"], log_target=True, reduction="sum"
        ).item()
        for name in ("gptq", "nearest")
    }
    assert 0 < kl["gptq"] < 0.8 * kl["nearest"]


@quantizes
@pytest.mark.parametrize(
    "method",
    [*(pytest.param(one, marks=pytest.mark.slow) for one in ("gptq", "per-row")), "int8"],
)
def test_plain_transformers_in_another_process_reads_and_generates(
    method: str, made: dict[str, Path]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_TRANSFORMERS, str(made[method])],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout)
    checkpoint = open_checkpoint(made[method])
    model: Any = load_model(checkpoint, device=CPU, dtype="bfloat16")
    ids = torch.tensor([written[:-12]])
    ours = model.generate(
        ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert ours[0].tolist() == written


@pytest.mark.slow
@quantizes
def test_the_config_says_where_it_comes_from(made: dict[str, Path]) -> None:
    config = json.loads((made["gptq"] / "config.json").read_text())
    record = Quantization.load(made["gptq"] / Quantization.FILE)
    entry = config["shortllm"]
    assert entry["source"] == "embedded" and entry["removed_blocks"] == []
    assert entry["quantized"]["fingerprint"] == record.fingerprint
    assert record.calibration is not None
    assert entry["quantized"]["calibration"] == record.calibration.tokens_fingerprint
    assert (record.calibration.samples, record.calibration.length) == (16, 128)
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["actorder"]) == (4, 32, None)
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert {"llmcompressor", "compressed-tensors", "torch"} <= record.versions.keys()
    ordered = json.loads((made["per-row"] / "config.json").read_text())["quantization_config"]
    weights = ordered["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["actorder"]) == ("channel", "static")


@quantizes
def test_the_same_again_is_skipped_and_other_options_are_not(tmp_path: Path) -> None:
    out = tmp_path / "int8"
    options = QuantizeOptions(method="int8")
    shortllm.quantize("embedded", out, options=options)
    first = (out / "model.safetensors").stat().st_ino
    shortllm.quantize("embedded", out, options=options)
    assert (out / "model.safetensors").stat().st_ino == first
    (out / Quantization.FILE).write_text(
        (out / Quantization.FILE).read_text().replace('"int8"', '"gptq"', 1)
    )
    config = json.loads((out / "config.json").read_text())
    config["shortllm"]["fingerprint"] = "another"
    (out / "config.json").write_text(json.dumps(config))
    record = shortllm.quantize("embedded", out, options=options)
    assert (out / "model.safetensors").stat().st_ino != first
    assert record.method == "int8" and record.calibration is None
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


@pytest.mark.slow
@quantizes
def test_what_cannot_be_done_to_a_quantized_checkpoint_is_refused(
    made: dict[str, Path], tmp_path: Path
) -> None:
    model = str(made["gptq"])
    with pytest.raises(UnsupportedModelError, match="magnitude looks at weights"):
        shortllm.score(model, criterion="magnitude")
    with pytest.raises(UnsupportedModelError, match="taylor looks at weights"):
        shortllm.score(
            model,
            criterion="taylor",
            calibration=CalibrationOptions(data="embedded", samples=1, length=16),
        )
    with pytest.raises(UnsupportedModelError, match="Retrain the unquantized"):
        shortllm.retrain(
            model, tmp_path / "retrained", options=RetrainOptions(data="embedded", max_steps=1)
        )
    with pytest.raises(UnsupportedModelError, match="is quantized, so .* quantized again"):
        shortllm.quantize(model, tmp_path / "twice", options=QuantizeOptions(method="int8"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@quantizes
def test_blocks_of_a_quantized_checkpoint_can_go(made: dict[str, Path], tmp_path: Path) -> None:
    calibration = CalibrationOptions(data="embedded", samples=2, length=32)
    scores = shortllm.score(str(made["gptq"]), calibration=calibration)
    plan = shortllm.plan(scores, remove=2)
    shortllm.prune(str(made["gptq"]), plan, tmp_path / "short")
    shorter = open_checkpoint(tmp_path / "short")
    assert shorter.block_count == 10
    assert shorter.parameters == open_checkpoint("embedded").parameters - plan.reached.parameters


# ---- what is refused before anything is loaded


def test_group_sizes_that_do_not_fit_are_named() -> None:
    layers = find_layers(open_checkpoint("embedded"))
    assert set(layers.widths.values()) == {192, 480} and len(layers.widths) == 84
    assert layers.outside == ["lm_head"]
    assert fitting_sizes(layers) == [96, 48, 32, 24, 16]
    with pytest.raises(ShortLLMError, match=r"128 does not divide the 192 inputs.* 96, 48, 32"):
        require_group_size(layers, 128)
    for size in (0, *fitting_sizes(layers)):
        require_group_size(layers, size)


def test_where_no_group_size_fits_one_scale_per_row_is_left() -> None:
    layers = find_layers(families.opened("llama"))
    narrow = type(layers)(widths={"a": 64, "b": 172}, outside=[])
    assert fitting_sizes(narrow) == []
    with pytest.raises(ShortLLMError, match=r"64 inputs of 'a'\. Give --group-size 0") as caught:
        require_group_size(narrow, 128)
    assert "divides all" not in str(caught.value)


def test_options_without_effect_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "int8", "group_size": 32}, "--group-size is an option of --method gptq"),
        ({"method": "int8", "data": "c4"}, "--data has no effect: --method int8 needs no calib"),
        ({"group_size": -1}, "group_size -1: must be greater than or equal to 0"),
        ({"dampening": 0.0}, "dampening 0.0: must be greater than 0"),
    ]
    for options, problem in cases:
        with pytest.raises(ShortLLMError, match=problem):
            options_from(QuantizeOptions, options)


def test_ids_and_text_together_are_refused() -> None:
    with pytest.raises(DataError, match="--calibration gives token ids"):
        calibrate(open_checkpoint("embedded"), CalibrationOptions(data="c4", file=Path("ids.json")))


def test_defaults_are_the_papers_and_fit_the_model() -> None:
    tiny = families.opened("llama")
    filled = resolve(QuantizeOptions(), tiny)
    text, room = filled.calibration, tiny.config.max_position_embeddings
    assert (filled.group_size, text.samples, text.length, text.data) == (128, 128, room, "c4")
    embedded = resolve(QuantizeOptions(), open_checkpoint("embedded"))
    text = embedded.calibration
    assert (embedded.group_size, text.samples, text.length, text.data) == (32, 32, 256, "embedded")
    assert resolve(QuantizeOptions(method="int8"), tiny).calibration.data is None


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_weights_outside_linear_layers_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="outside linear layers"):
        find_layers(families.opened(family))


def test_without_the_extra_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages, "version", missing)
    with pytest.raises(SystemExit) as stop:
        main(["quantize", "embedded", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "pip install 'shortllm[quantize]'" in capsys.readouterr().err
    with pytest.raises(ShortLLMError, match="needs llm-compressor"):
        pipeline.run(recipe=Recipe(quantization=QuantizeOptions()), out=tmp_path / "run")
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_versions_that_are_not_admitted_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"llmcompressor": "0.14.0.1", "transformers": "5.18.0", "torch": "2.13.0+cpu"}
    asked = [
        "transformers<=5.17.0,>=5.15.0",
        "torch<=2.13.0,>=2.10.0",
        "absent>=1; extra == 'dev'",
    ]
    monkeypatch.setattr(packages, "version", held.__getitem__)
    monkeypatch.setattr(packages, "requires", lambda name: asked)
    with pytest.raises(ShortLLMError) as caught:
        packages.require_extra()
    text = str(caught.value)
    assert "does not accept the installed transformers 5.18.0." in text
    assert "pip install 'shortllm[quantize]' 'transformers<=5.17.0,>=5.15.0'" in text
    held["transformers"] = "5.17.0"
    packages.require_extra()


@quantizes
def test_a_target_that_holds_something_else_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="contains something else"):
        shortllm.quantize("embedded", tmp_path, options=QuantizeOptions(method="int8"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.shared
@pytest.mark.slow
@quantizes
@pytest.mark.parametrize(
    ("name", "text", "group_size", "part", "worse"),
    [
        ("books5M", "books/valid.jsonl.xz", 64, 0.38, 1.03),
        ("stories10L", "stories/valid.jsonl.gz", 0, 0.21, 1.15),
    ],
)
def test_real_models_shrink_and_stay_good(
    name: str, text: str, group_size: int, part: float, worse: float, shared: Path, tmp_path: Path
) -> None:
    model, data = str(shared / "models" / name), str(shared / "data" / text)
    record = shortllm.quantize(
        model, tmp_path / "out", data=data, group_size=group_size, samples=16, length=256
    )
    assert record.bytes_after < part * record.bytes_before
    how = EvaluationOptions(data=[data], length=256, max_segments=24, continuations=0)
    before, after = shortllm.evaluate([model, str(tmp_path / "out")], options=how).models
    ratio = after.perplexity[0].perplexity / before.perplexity[0].perplexity
    assert 0.99 < ratio < worse and ratio != 1


# ---- as a stage of a run

RECIPE = Recipe(
    budget=shortllm.Budget(remove=2),
    calibration=CalibrationOptions(samples=4, length=64),
    healing=HealOptions.model_validate({"calibration": {"samples": 8, "length": 64}}),
    retraining=[
        RetrainOptions.model_validate(
            {
                "method": method, "length": 64, "batch": 2, "max_steps": 4, "eval_every": 2,
                "held_out": 4, "report_to": [], "learning_rate": rate,
            }
        )
        for method, rate in (("lora", 3e-3), ("full", 1e-3))
    ],
    quantization=QuantizeOptions(calibration=QuantizeCalibration(samples=8, length=64)),
    evaluation=EvaluationOptions(max_segments=12, continuations=0),
)  # fmt: skip


@pytest.fixture(scope="module")
def retrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "run"
    pipeline.run(recipe=RECIPE, out=directory)
    return directory


@pytest.mark.slow
@quantizes
def test_a_run_quantizes_the_best_of_the_healed_and_retrained_models(retrained: Path) -> None:
    models = {one.name: one for one in Evaluation.load(retrained / "eval.json").models}
    ways = ["healed", "retrained-lora", "retrained-full"]
    assert list(models) == ["original", "pruned", *ways, QUANTIZED]
    record = Quantization.load(retrained / QUANTIZED / Quantization.FILE)
    best = min(ways, key=lambda name: models[name].perplexity[0].nll)
    assert record.model.id == best
    assert record.model.fingerprint == models[best].model.fingerprint
    assert models[QUANTIZED].model.bytes < 0.32 * models[best].model.bytes
    assert models[QUANTIZED].model.parameters == models[best].model.parameters
    after, before = models[QUANTIZED].perplexity[0], models[best].perplexity[0]
    assert before.perplexity * 0.98 < after.perplexity < before.perplexity * 1.02
    entry = json.loads((retrained / QUANTIZED / "config.json").read_text())["shortllm"]
    assert len(entry["removed_blocks"]) == 2 and entry["quantized"]
    assert ("healed" if best == "healed" else "retrained") in entry
    assert not (retrained / QUANTIZED / "retrain.json").exists()


@pytest.mark.slow
@quantizes
def test_what_is_measured_was_not_calibrated_on(retrained: Path) -> None:
    record = Quantization.load(retrained / QUANTIZED / Quantization.FILE)
    [measured] = Evaluation.load(retrained / "eval.json").models[0].perplexity
    assert record.calibration is not None
    assert record.calibration.source == "embedded:calibration"
    assert measured.source == "embedded:test"
    recipe = RECIPE.model_copy(
        update={
            "evaluation": EvaluationOptions(data=["embedded:calibration"], max_segments=12),
        }
    ).resolved("llama")
    assert recipe.quantization is not None
    embedded = open_checkpoint("embedded")
    text = resolve(recipe.quantization, embedded, recipe.calibration).calibration
    texts = prepare_texts(
        embedded,
        recipe.calibration,
        recipe.evaluation,
        scoring=False,
        quantization=text,
    )
    assert texts.quantization is not None and texts.quantization.info.rows is not None
    assert texts.evaluation[0].rows.start >= texts.quantization.info.rows[1]
    assert texts.evaluation[0].held_out


@pytest.mark.slow
@quantizes
def test_the_report_shows_it(retrained: Path) -> None:
    page = (retrained / "report.html").read_text()
    text = re.sub(r"<[^>]+>", " ", page)
    assert "GPTQ W4A16, groups of 32; 70 linear layers of" in text
    assert re.search(r"Quantized to W4A16, it takes 2\.\d+\WMB \(\d+\.\d\W% of the original", text)
    assert "8 samples of 64 tokens from embedded:calibration" in text
    card = (retrained / QUANTIZED / "README.md").read_text()
    assert "| quantized |" in card
    results = load_results(retrained)
    assert results.quantization is not None
    [one] = [one for one in compared_models({"run": results}) if one.name == QUANTIZED]
    assert (one.kind, one.quantized_by, one.healed_by) == ("quantized", "gptq", None)


@pytest.mark.slow
@quantizes
def test_the_same_run_again_does_nothing(retrained: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in retrained.glob("*/model.safetensors")}
    before = (retrained / "eval.json").stat().st_mtime_ns
    pipeline.run(recipe=RECIPE, out=retrained)
    assert files == {
        path: path.stat().st_mtime_ns for path in retrained.glob("*/model.safetensors")
    }
    assert (retrained / "eval.json").stat().st_mtime_ns == before


@pytest.mark.slow
@quantizes
def test_the_best_is_found_without_an_earlier_evaluation(retrained: Path, tmp_path: Path) -> None:
    recipe = RECIPE.resolved("llama")
    texts = prepare_texts(
        open_checkpoint("embedded"), recipe.calibration, recipe.evaluation, scoring=False
    )
    names = ("retrained-lora", "retrained-full")
    candidates = {name: open_checkpoint(retrained / name) for name in names}
    session = Session(device="cpu")
    known = pipeline.best_of(candidates, texts, session, retrained / "eval.json")
    assert pipeline.best_of(candidates, texts, session, tmp_path / "eval.json") == known


@quantizes
@pytest.mark.parametrize(
    ("flags", "method"),
    [
        (["--quantize", "int8"], "int8"),
        pytest.param(["--quantize", "none"], None, marks=pytest.mark.slow),
    ],
)
def test_the_flag_of_run(
    flags: list[str],
    method: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["run", "embedded", "--remove", "1", "--retrain", "none", "--no-bench", "--samples"]
    words += ["2", "--length", "32", "--max-segments", "4", "--continuations", "0", "--json"]
    words += ["--set", "evaluation.tasks=[]", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        main([*words, *flags])
    assert stop.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert (QUANTIZED in printed["checkpoints"]) == (method is not None)
    if method is not None:
        record = Quantization.load(tmp_path / "run" / QUANTIZED / Quantization.FILE)
        assert (record.method, record.model.id) == (method, "pruned")


@quantizes
def test_the_command_prints_sizes_and_one_line_of_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "int8")
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as stop:
            main(["quantize", "embedded", "--method", "int8", "--out", out, *more])
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        if more:
            assert json.loads(printed)["scheme"] == "W8A8"
        else:
            assert re.search(r"bytes\s+9,337,344\s+4,8\d\d,\d\d\d\s+52", printed)
