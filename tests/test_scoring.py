"""Scores as files: several criteria, several processes, interrupted commands, models that do not
fit."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import children
import pytest
import test_cli
import torch
from families import opened, saved, token_ids

import shortllm
from shortllm import journal
from shortllm.errors import OutputError, ResultFileError, ShortLLMError
from shortllm.model import Session, loading
from shortllm.model.streamed import StreamedWeights
from shortllm.options import options_from
from shortllm.pruning import score as score_module
from shortllm.pruning.records import BlockScores
from shortllm.runtime import Ranks, Runtime

EVERY = "ppl,kl,taylor,influence,relative,angular,lorp,magnitude,greedy,last,random,even"
SAMPLES = 5
"""An odd number, so that two processes get shares of different size."""


@pytest.fixture(scope="module")
def ids_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("ids") / "ids.json"
    file.write_text(json.dumps(token_ids(SAMPLES).tolist()))
    return file


def command(*arguments: object, launcher: list[str] | None = None) -> list[str]:
    return [sys.executable, *(launcher or []), "-m", "shortllm", *map(str, arguments)]


def call(*arguments: object, launcher: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command(*arguments, launcher=launcher), capture_output=True, text=True, env=environment
    )


def equal_scores(found: Path, expected: Path, rel: float = 1e-5) -> None:
    names = sorted(path.name for path in expected.glob("scores*.json"))
    assert sorted(path.name for path in found.glob("scores*.json")) == names
    for name in names:
        one, other = BlockScores.load(found / name), BlockScores.load(expected / name)
        assert one.importance == pytest.approx(other.importance, rel=rel, abs=1e-9), name
        assert one.values == pytest.approx(other.values, rel=rel, abs=1e-9), name
        assert (one.order, one.options) == (other.order, other.options)
        assert one.fingerprint == other.fingerprint
    assert not list(found.glob("*.partial"))


@pytest.fixture(scope="module")
def alone(ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All criteria of the tiny qwen3 in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    shortllm.score(
        str(saved("qwen3")),
        criterion=EVERY.split(","),
        options={"greedy": {"rounds": "2"}},
        calibration=shortllm.CalibrationOptions(file=ids_file),
        out=out,
    )
    return out


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]


@pytest.mark.parametrize(
    "launcher, stream",
    [
        pytest.param(TORCHRUN, "--stream", id="torchrun"),
        pytest.param(ACCELERATE, "--no-stream", id="accelerate", marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(
    launcher: list[str], stream: str, alone: Path, ids_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = call(
        "score", saved("qwen3"), "--criterion", EVERY, "--option", "greedy.rounds=2",
        "--calibration", ids_file, "--out", out, stream, launcher=launcher,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    equal_scores(out, alone)
    assert done.stdout.count("scores: ") == len(EVERY.split(","))  # one process speaks


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("model", ["stories260K", "stories10L", "stories10L-redundant", "books5M"])
def test_every_way_of_scoring_gives_the_same_on_real_models(
    model: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks in memory, streamed, streamed with an interruption, shared by two processes."""
    directory = shared / "models" / model
    file = "books/valid.jsonl.xz" if model == "books5M" else "stories/valid.jsonl.gz"
    data = shared / "data" / file

    def score(name: str, *, stream: bool) -> None:
        shortllm.score(
            str(directory),
            criterion=EVERY.split(","),
            options={"greedy": {"rounds": 1}},
            calibration=shortllm.CalibrationOptions(data=str(data), samples=4, length=64),
            out=tmp_path / name,
            stream=stream,
        )

    score("alone", stream=False)
    score("streamed", stream=True)
    equal_scores(tmp_path / "streamed", tmp_path / "alone")
    with monkeypatch.context() as patch:
        patch.setattr(journal, "MIN_INTERVAL_S", 0.0)
        patch.setattr(journal, "WORK_PER_COMMIT", 0)
        for blocks in (3, 6, 9):  # each try comes a little further, and goes on from there
            with patch.context() as stop:
                stop.setattr(StreamedWeights, "through", stopping(blocks))
                with pytest.raises(KeyboardInterrupt):
                    score("interrupted", stream=True)
            assert list((tmp_path / "interrupted").rglob("position.json"))
        score("interrupted", stream=True)
    equal_scores(tmp_path / "interrupted", tmp_path / "alone")
    done = call(
        "score", directory, "--criterion", EVERY, "--option", "greedy.rounds=1", "--data", data,
        "--samples", 4, "--length", 64, "--out", tmp_path / "two", launcher=TORCHRUN,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    equal_scores(tmp_path / "two", tmp_path / "alone")


def stopping(blocks: int) -> Any:
    """A way through the blocks on which somebody types Ctrl-C after so many of them."""
    through, left = StreamedWeights.through, blocks

    def stopped(self: StreamedWeights, order: Any) -> Any:
        nonlocal left
        for b in through(self, order):
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            yield b

    return stopped


@pytest.mark.shared
def test_criteria_find_the_superfluous_blocks(shared: Path) -> None:
    names = ["ppl", "kl", "taylor", "influence", "relative", "angular", "greedy"]
    options = {"greedy": {"rounds": 5, "protect_first": 0, "protect_last": 0}}
    found = shortllm.score(
        str(shared / "models" / "stories10L-redundant"),
        criterion=names,
        options=options,
        calibration=shortllm.CalibrationOptions(
            data=str(shared / "data" / "stories" / "valid.jsonl.gz")
        ),
    )
    for name, scores in found.items():
        order = sorted(range(10), key=lambda b: scores.importance[b])
        assert sorted(order[:5]) == [1, 3, 5, 7, 9], name


def test_a_process_without_a_sample_is_refused() -> None:
    with pytest.raises(ShortLLMError, match="1 samples cannot be shared by 2 processes"):
        Ranks(rank=1, count=2).mine(token_ids(1))


@pytest.mark.slow
def test_too_many_processes_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    file.write_text(json.dumps(token_ids(1).tolist()))
    done = call(
        "score", saved("llama"), "--calibration", file, "--out", tmp_path / "run",
        launcher=TORCHRUN,
    )  # fmt: skip
    assert done.returncode != 0
    assert "1 samples cannot be shared by 2 processes" in done.stderr


def test_several_criteria_get_a_file_each(alone: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in alone.glob("scores*")) == sorted(
        f"scores-{name}.json" for name in EVERY.split(",")
    )
    with pytest.raises(ResultFileError, match="by several criteria. Give one: .*-angu"):
        shortllm.plan(alone, remove=1)
    plan = shortllm.plan(alone / "scores-taylor.json", remove=2, out=tmp_path / "p")
    assert plan.criterion == "taylor"


def test_finished_scores_are_not_made_again(
    alone: Path, ids_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    score = score_module.score_blocks

    def watched(checkpoint: Any, calibration: Any, criteria: Any, **kwargs: Any) -> Any:
        asked.append([one.name for one in criteria])
        return score(checkpoint, calibration, criteria, **kwargs)

    monkeypatch.setattr(score_module, "score_blocks", watched)
    before = (alone / "scores-kl.json").read_bytes()
    caplog.set_level(logging.INFO)
    again = shortllm.score(
        str(saved("qwen3")),
        criterion=["kl", "taylor", "influence"],
        options={"taylor": {"power": 2}},
        calibration=shortllm.CalibrationOptions(file=ids_file),
        out=alone,
        overwrite=True,
    )
    assert asked == [["taylor"]]  # another option, so another work
    assert (alone / "scores-kl.json").read_bytes() == before
    assert "scores-kl.json is up to date, skipped" in caplog.text
    assert again["taylor"].options["power"] == 2


def test_criteria_without_text_need_no_data(tmp_path: Path) -> None:
    """The tiny model has no tokenizer, and there is no bookcorpus here."""
    found = shortllm.score(
        str(saved("llama")), criterion=["magnitude", "last"], out=tmp_path / "run"
    )
    assert found["magnitude"].calibration is None
    assert not list((tmp_path / "run").glob("calibration*"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--criterion", "ppl,ppl"],
            "--criterion ppl, ppl must name criteria, each once",
        ),
        (["--criterion", ","], "--criterion nothing must name"),
        (["--criterion", "ppl,tailor"], "unknown criterion 'tailor'. Did you mean 'taylor'"),
        (["--option", "taylor.power=2"], "option of criterion 'taylor' was given, but"),
        (["--option", "power=2"], "must have the form CRITERION.NAME=VALUE"),
        (["--attn", "flash_attention_2"], "works on CUDA devices, not on cpu. Use --attn sdpa"),
        (["--max-memory", "4 quarts"], "--max-memory 4 quarts: could not interpret byte unit"),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    message: str,
    ids_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    code, _, printed = test_cli.call(
        capfd, "score", saved("llama"), "--calibration", ids_file, "--out", tmp_path / "run",
        *arguments,
    )  # fmt: skip
    assert code == 2 and message in printed
    assert not (tmp_path / "run").exists()


def test_an_attention_implementation_is_taken_and_counts_as_a_choice(
    ids_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    original = loading.use_attention

    def recorded(checkpoint: Any, model: Any, attention: str) -> None:
        original(checkpoint, model, attention)
        used.append(model.config._attn_implementation)

    monkeypatch.setattr(loading, "use_attention", recorded)
    found = [
        shortllm.score(saved("llama"), file=ids_file, attention=attention, stream=stream)
        for attention, stream in ((None, None), ("eager", False), ("eager", True))
    ]
    assert used == ["eager", "eager"]
    assert found[1].importance == pytest.approx(found[0].importance, rel=1e-4)
    assert found[2].importance == pytest.approx(found[0].importance, rel=1e-4)
    assert found[0].fingerprint != found[1].fingerprint == found[2].fingerprint


def test_scores_keep_the_numbers_of_each_sample(ids_file: Path) -> None:
    scores = shortllm.score(saved("llama"), file=ids_file)
    means = [math.exp(sum(values) / len(values)) for values in scores.samples]
    assert [len(values) for values in scores.samples] == [SAMPLES] * 6
    assert means == pytest.approx(scores.importance, rel=1e-5)


def test_amounts_of_memory() -> None:
    for text, amount in (("4GiB", 4 * 2**30), ("500MB", 500 * 10**6), ("1000", 1000)):
        assert options_from(Runtime, {"max_memory": text}).max_memory == amount
    with pytest.raises(ShortLLMError, match="max_memory GiB: could not parse value and unit"):
        options_from(Runtime, {"max_memory": "GiB"})


# ------------------------------------------------------------------ memory


def test_a_model_that_does_not_fit_is_streamed_and_says_so(
    ids_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = opened("qwen3")
    caplog.set_level(logging.INFO)
    assert not Session().decoder(checkpoint).streamed
    assert caplog.text == ""
    needed = checkpoint.parameters * 4
    monkeypatch.setattr(loading, "available_memory", lambda device: needed)
    assert Session().decoder(checkpoint).streamed
    assert "blocks are read one at a time from the files (streamed)" in caplog.text
    assert not Session(stream=False).decoder(checkpoint).streamed
    monkeypatch.undo()
    assert Session(stream=True).decoder(checkpoint).streamed


def test_a_streamed_model_is_run_from_end_to_end(tmp_path: Path) -> None:
    recipe = shortllm.Recipe(
        stream=True,
        max_memory=10**5,  # streams go to files as well
        budget=shortllm.Budget(remove=2),
        calibration=shortllm.CalibrationOptions(samples=4, length=32),
        evaluation=shortllm.EvaluationOptions(max_segments=4, continuations=2),
    )
    streamed = shortllm.run(recipe=recipe, out=tmp_path / "streamed")
    resident = shortllm.run(
        recipe=recipe.model_copy(update={"stream": False, "max_memory": None}),
        out=tmp_path / "resident",
    )
    assert streamed.plan.removed == resident.plan.removed
    for one, other in zip(streamed.evaluation.models, resident.evaluation.models, strict=True):
        assert one.perplexity[0].nll == pytest.approx(other.perplexity[0].nll, rel=1e-6)
        assert one.samples is None and other.samples is not None
    assert (tmp_path / "streamed" / "pruned" / "model.safetensors").read_bytes() == (
        tmp_path / "resident" / "pruned" / "model.safetensors"
    ).read_bytes()


def test_streams_that_fit_nowhere_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    from shortllm.model.hidden_states import StreamMemory

    memory = StreamMemory(limit=0, directory=tmp_path)
    with pytest.raises(OutputError, match="iB are needed, .* [KMGT]iB are free"):
        memory.allocate((10**9, 10**6), torch.float32, torch.device("cpu"))


# ------------------------------------------------------------------ interrupted


def eagerly(words: list[str]) -> None:
    """A command whose journal is written at every block, as where a block takes its time."""
    journal.MIN_INTERVAL_S = journal.WORK_PER_COMMIT = 0
    children.command(words)


@pytest.mark.shared
@pytest.mark.parametrize("criterion", ["ppl", pytest.param("taylor", marks=pytest.mark.slow)])
def test_a_killed_command_goes_on_where_it_was(
    criterion: str, shared: Path, tmp_path: Path
) -> None:
    model = shared / "models" / "stories10L"
    data = shared / "data" / "stories" / "valid.jsonl.gz"
    killed = tmp_path / "killed"
    words = [
        "score", model, "--stream", "--criterion", criterion, "--data", data, "--samples", 16,
        "--out", killed,
    ]  # fmt: skip
    written = killed / "scoring.partial"
    ended = children.killed_when(
        lambda: list(written.rglob("position.json")), eagerly, [str(word) for word in words]
    )
    assert ended == -signal.SIGKILL
    assert list(written.rglob("position.json"))
    assert not (killed / "scores.json").exists()
    for out in (killed, tmp_path / "whole"):
        shortllm.score(
            str(model),
            criterion=criterion,
            calibration=shortllm.CalibrationOptions(data=str(data), samples=16),
            out=out,
            stream=True,
        )
    equal_scores(killed, tmp_path / "whole", rel=1e-9)
