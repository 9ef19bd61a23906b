"""SmolLM2-135M-Instruct, dequantized from 4 bits: every stage on a model that people use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from test_quantize import quantizes

import shortllm
from shortllm.data.options import CalibrationOptions
from shortllm.model import Session
from shortllm.surgery.derived import on_probe
from shortllm.width_pruning.structure import find_groups

pytestmark = [pytest.mark.shared, pytest.mark.real]

REMOVED = {3: [12, 13, 14], 6: [5, 13, 14, 16, 17, 18], 9: [5, 12, 13, 14, 15, 16, 17, 18, 21]}
"""Numbers of removed blocks (10, 20, 30 %) -> the blocks."""


@pytest.fixture(scope="session")
def short(smollm_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint without three blocks, verified when it was written."""
    return shortllm.prune(str(smollm_gguf), REMOVED[3], tmp_path_factory.mktemp("real") / "short")


@pytest.fixture
def text(shared: Path) -> CalibrationOptions:
    return CalibrationOptions(
        data=str(shared / "data" / "c4" / "train_sample.jsonl.gz"), samples=4, length=64
    )


def chat(directory: Path) -> str:
    """A conversation by the template of a checkpoint."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
        )
    )


def test_surgery_equals_bypass_in_plain_transformers(smollm: Path, short: Path) -> None:
    original = Session(device="cpu").decoder(shortllm.open_checkpoint(smollm))
    expected, _ = on_probe(original, REMOVED[3])
    loaded, loading = transformers.AutoModelForCausalLM.from_pretrained(
        short, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values())
    decoder = Session(device="cpu").decoder(shortllm.open_checkpoint(short))
    found, _ = on_probe(decoder)
    assert torch.equal(found, expected)
    assert loaded.config.num_hidden_layers == 27
    assert loaded.config.gguf["types"] == {"Q4_1": 210, "Q8_0": 1}


def test_heads_and_neurons_are_found_in_bfloat16_too(smollm: Path) -> None:
    checkpoint = shortllm.open_checkpoint(smollm)
    exact, rounded = (
        find_groups(Session(device="cpu", dtype=dtype).decoder(checkpoint), [0])[0]
        for dtype in ("float32", "bfloat16")
    )
    for one, other in ((exact.attention, rounded.attention), (exact.mlp, rounded.mlp)):
        assert torch.equal(one.unit_of_channel_C, other.unit_of_channel_C)
    assert (exact.attention.units, exact.query_heads, exact.mlp.units) == (3, 3, 1536)


def test_rounding_is_no_mistake_of_a_narrower_model(
    smollm: Path, shared: Path, tmp_path: Path
) -> None:
    """In bfloat16 single tokens of the probe differ by a fifth, in float32 by 1e-5."""
    narrow = tmp_path / "narrow"
    shortllm.width(
        str(smollm), narrow, method="wanda-sp", ratio=0.333, dtype="bfloat16",
        data=str(shared / "data" / "c4" / "train_sample.jsonl.gz"), samples=8, length=128,
    )  # fmt: skip
    whole, less = (shortllm.open_checkpoint(one).parameters for one in (smollm, narrow))
    assert less < 0.8 * whole


def test_a_model_whose_first_block_has_a_small_stream_gets_a_gain(
    smollm: Path, short: Path, shared: Path, tmp_path: Path
) -> None:
    record = heal(short, shared, tmp_path / "healed", "gain")
    assert record.held_out.healed <= record.held_out.shortened
    assert record.gaps[0].gain != 1.0


def test_the_chat_template_goes_along(smollm: Path, short: Path) -> None:
    assert chat(short) == chat(smollm)
    assert "<|im_start|>user\nHi<|im_end|>" in chat(short)


@pytest.mark.slow
def test_scores_are_those_of_the_script_in_docs(
    smollm: Path, text: CalibrationOptions, tmp_path: Path
) -> None:
    scores = shortllm.score(str(smollm), calibration=text, out=tmp_path, dtype="float32")
    script = Path(__file__).parents[1] / "docs" / "reproduce_ppl.py"
    done = subprocess.run(
        [sys.executable, script, smollm, tmp_path], check=True, capture_output=True, text=True
    )
    differences = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(differences) == len(scores.values) == 30
    assert max(differences) < 1e-4


def heal(short: Path, shared: Path, out: Path, method: str) -> shortllm.Healing:
    return shortllm.heal(
        str(short),
        out,
        method=method,
        data=str(shared / "data" / "c4" / "train_sample.jsonl.gz"),
        samples=24,
        length=128,
        dtype="bfloat16",
    )


@pytest.mark.slow
@pytest.mark.parametrize("count", REMOVED)
def test_healing_lowers_held_out_perplexity(
    count: int, smollm_gguf: Path, shared: Path, tmp_path: Path
) -> None:
    short = shortllm.prune(str(smollm_gguf), REMOVED[count], tmp_path / "short", verify=False)
    paths = [short, tmp_path / "linear", tmp_path / "regression"]
    for path in paths[1:]:
        record = heal(short, shared, path, path.name)
        assert record.held_out.source < record.held_out.healed < record.held_out.shortened
        assert record.strength == 1
        assert chat(path) == chat(short)
    found = shortllm.evaluate(
        [str(path) for path in paths],
        data=[str(shared / "data" / "wikitext2" / "wiki.test.raw")],
        length=256,
        max_segments=8,
        dtype="bfloat16",
    )
    before, linear, regression = (one.perplexity[0].perplexity for one in found.models)
    assert regression < linear < before


@pytest.mark.slow
def test_healing_never_ends_worse(smollm_gguf: Path, shared: Path, tmp_path: Path) -> None:
    """Block 11 makes the first token's hidden state large, which no later weight can do."""
    removed = [5, 11, 12, 13, 14, 15, 16, 17, 18]
    short = shortllm.prune(str(smollm_gguf), removed, tmp_path / "short", verify=False)
    record = heal(short, shared, tmp_path / "healed", "linear")
    assert record.strength < 1
    assert record.held_out.healed <= record.held_out.shortened


@pytest.mark.slow
def test_lora_lowers_the_loss(short: Path, shared: Path, tmp_path: Path) -> None:
    record = shortllm.retrain(
        str(short),
        tmp_path / "out",
        data=str(shared / "data" / "alpaca" / "train.jsonl.gz"),
        rows=200,
        max_steps=6,
        batch=4,
        length=128,
        held_out=16,
    )
    curve = [loss for _, loss in record.curves["held_out"]]
    assert record.data.template == "chat"
    assert min(curve) < curve[0]
    assert chat(tmp_path / "out") == chat(short)


@pytest.mark.slow
def test_it_is_timed(smollm: Path, short: Path) -> None:
    found = shortllm.bench([str(smollm), str(short)], new_tokens=[8], warmup=1, runs=2)
    assert [one.model.blocks for one in found.models] == [30, 27]


@pytest.mark.slow
@quantizes
def test_eight_bits(short: Path, tmp_path: Path) -> None:
    record = shortllm.quantize(str(short), tmp_path / "int8", method="int8")
    assert record.bytes_after < record.bytes_before
    assert chat(tmp_path / "int8") == chat(short)
