"""The command line: every command by its real entry point, outputs, exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shortllm import __version__
from shortllm.cli import app, main
from shortllm.cli.run import RunFlags, requested_recipe
from shortllm.pruning.budget import Budget
from shortllm.recipe import Recipe

SMALL = ["--samples", "4", "--length", "64"]


SCORED_AND_MEASURED = ("--retrain", "none", "--no-bench", "--tasks", "")
"""The embedded recipe without its stages of minutes."""


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return int(stopped.value.code or 0), out, err


def test_version_and_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert call(capfd, "--version") == (0, f"{__version__}\n", "")
    code, out, _ = call(capfd, "--help")
    assert code == 0
    commands = [command.name for command in app.registered_commands]
    assert len(commands) > 10
    for command in commands:
        assert command in out
        assert call(capfd, command, "--help")[0] == 0


def test_the_stages_one_by_one(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    run_dir, pruned = tmp_path / "run", tmp_path / "pruned"
    code, out, _ = call(capfd, "score", "embedded", "--out", run_dir, *SMALL)
    assert code == 0 and "intact:" in out and "rank" in out
    code, out, _ = call(capfd, "plan", run_dir, "--remove", 2)
    assert code == 0 and "12 -> 10 blocks" in out
    code, out, _ = call(capfd, "prune", "embedded", "--plan", run_dir, "--out", pruned)
    assert code == 0 and str(pruned) in out
    code, out, _ = call(capfd, "prune", "embedded", "--plan", run_dir, "--out", pruned)
    assert code == 0 and "up to date, skipped" in caplog.text
    code, out, _ = call(
        capfd, "eval", "embedded", pruned, "--data", "embedded", "--max-segments", 8, "--json"
    )
    assert code == 0
    measured = json.loads(out)
    assert [model["model"]["blocks"] for model in measured["models"]] == [12, 10]
    code, out, _ = call(capfd, "report", run_dir)
    assert code == 0 and (run_dir / "report.html").is_file()


def test_info_prints_a_table_or_one_line_of_json(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capfd, "info", "embedded")
    assert code == 0 and "12 blocks" in out and "outside" in out and "TFLOP" in out
    assert "kl, ppl" in out and "time" in out and "GFLOP/s" in out and "all in memory" in out
    code, out, _ = call(
        capfd, "info", "embedded", "--no-probe", "--option", "greedy.rounds=2", "--dtype", "float32"
    )
    assert code == 0 and "streamed" in out and "time" not in out and "GFLOP/s" not in out
    code, out, _ = call(capfd, "info", "embedded", "--no-probe", "--json")
    summary = json.loads(out)
    assert summary["probe"] is None
    assert all(one["seconds"] is None and one["peak_bytes"] > 0 for one in summary["estimates"])
    assert out.count("\n") == 1
    assert len(summary["model"]["parameters_per_block"]) == 12
    total = sum(summary["model"]["parameters_per_block"]) + summary["parameters_outside"]
    assert total == summary["model"]["parameters"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nope"], "no such directory: nope"),
        (["info", "nope/nope"], "not a local directory, not in the local Hub cache"),
        (["run", "--remove", "20"], "cannot remove 20 of 12 blocks"),
        (["run", "--remove", "2", "--ratio", "0.5"], "several budgets"),
        (["run", "--criterion", "plp"], "Did you mean 'ppl'"),
        (["run", "--blocks", "1,x"], "--blocks x: must be a valid integer"),
        (["plan", "nowhere", "--remove", "2"], "Score first: shortllm score MODEL --out nowhere"),
        (["prune", "embedded", "--out", "x"], "give either --plan"),
        (["report", "nowhere"], "nowhere"),
        (["run", "--remov", "2"], "no such option"),
        (["score"], "missing option"),
    ],
)
def test_mistakes_exit_with_2_and_say_what_to_do(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capfd, *arguments)
    assert code == 2
    assert message in err and "Traceback" not in err
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_a_range_of_blocks_and_what_prune_did(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "short"
    code, said, _ = call(capfd, "prune", "embedded", "--blocks", "3,5-7", "--out", out)
    assert code == 0
    assert "12 -> 8 blocks, without 3, 5, 6, 7; 8.90 MiB -> " in said and "verified: " in said
    code, said, err = call(capfd, "prune", "embedded", "--blocks", "3", "--out", out)
    assert code == 2 and "removed: [3, 5, 6, 7], now [3]" in err and "--overwrite" in err
    code, _, _ = call(capfd, "prune", "embedded", "--blocks", "3", "--out", out, "--overwrite")
    assert code == 0 and json.loads((out / "config.json").read_bytes())["num_hidden_layers"] == 11


def test_a_criterion_next_to_blocks_has_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    recipe = Recipe(budget=Budget(blocks=[3]), criterion="kl")
    requested_recipe(recipe, RunFlags(), model="embedded", name=None)
    assert "--criterion kl has no effect" in caplog.text


def test_notes_of_libraries_are_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import logging, huggingface_hub, shortllm.cli.output as o; o.show_notes(); "
        "[logging.getLogger(n).warning('from ' + n) for n in ('huggingface_hub', 'shortllm', 'x')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    err = capfd.readouterr().err
    assert [err.count(f"from {name}\n") for name in ("huggingface_hub", "shortllm", "x")] == [1] * 3


def test_ctrl_c_exits_with_130_and_can_be_resumed(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "shortllm",
        "run",
        "--remove",
        "2",
        "--samples",
        "2",
        *SCORED_AND_MEASURED,
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # a test runner in the background may have been started with SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "run" / "calibration.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted. Run the same command again to resume." in err and "Traceback" not in err
    again = subprocess.run(
        [*command, "--continuations", "0", "--max-segments", "8", "--json"],
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert len(json.loads(again.stdout)["removed"]) == 2


def test_import_and_help_load_nothing_heavy() -> None:
    code = """
import sys, shortllm
from shortllm.cli import main
try:
    main(["--help"])
finally:
    heavy = {"torch", "transformers", "datasets", "matplotlib", "gradio"}
    print(heavy & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "set()\n")


def test_public_names_are_all_there() -> None:
    import shortllm

    assert shortllm.__all__ == sorted(shortllm.__all__)
    for name in shortllm.__all__:
        assert getattr(shortllm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'prunee'"):
        _ = shortllm.prunee
