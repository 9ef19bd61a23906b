"""Goldens: what the command line prints, writes and fingerprints, kept in tests/golden/.

    python tests/golden.py --write                 all of them, after a change made on purpose
    python tests/golden.py --write help            the help texts only

help/           `--help` of the program and of each command, 100 columns wide
run/            the files of one small run of the embedded model, without times and versions
fingerprints/   the fingerprint in each file that a few small commands write, on a CPU

Everything goes through `shortllm.cli` and files, so that modules can move without touching this.
Decimal numbers are rounded to four digits, and compared with a tolerance.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("help", "run", "fingerprints")
TYPER = GOLDEN / "typer.txt"
"""The version of typer that the help texts were written with: each wraps in its own way."""
WIDTH = 100
TOLERANCE = 5e-3

DECIMAL = re.compile(r"(?<![\w.])[-−]?\d+\.\d+(?:e[-+]?\d+)?(?![\w.])")

SMALL = ["--samples", "2", "--length", "32", "--device", "cpu"]
"""Options of every command that looks at calibration text."""

RUN = [
    "run", "embedded", "--out", "run", "--remove", "3", *SMALL,
    "--eval-length", "64", "--max-segments", "4", "--continuations", "1", "--new-tokens", "4",
    "--heal", "linear", "--retrain", "none", "--no-bench", "--set", "evaluation.tasks=[]",
]  # fmt: skip
RUN_FILES = (
    "run.json", "calibration.json", "scores.json", "plan.json", "eval.json", "healed/heal.json",
    "README.md", "report.html",
)  # fmt: skip

TEXT = ["--data", "embedded", *SMALL]
CRITERIA = (
    "ppl", "kl", "taylor", "magnitude", "influence", "relative", "angular", "greedy", "last",
    "random", "even", "local", "evolve", "auto",
)  # fmt: skip
QUICK = {
    "base": [
        *(["score", "embedded", "--criterion", one, "--out", f"score-{one}", *SMALL]
          for one in CRITERIA),
        ["score", "embedded", "--criterion", "taylor", "--option", "taylor.power=2",
         "--out", "score-option", *SMALL],
        ["plan", "score-ppl", "--remove", "2", "--out", "plan-remove.json"],
        ["plan", "score-angular", "--ratio", "0.3", "--out", "plan-ratio.json"],
        ["plan", "score-taylor", "--target-params", "4M", "--out", "plan-params/plan.json"],
        ["prune", "embedded", "--plan", "plan-remove.json", "--out", "pruned"],
        ["prune", "embedded", "--blocks", "4,5", "--out", "pruned-blocks"],
        ["eval", "embedded", "pruned", "--data", "embedded", "--max-segments", "2",
         "--device", "cpu", "--out", "eval.json"],
        ["eval", "embedded", "--data", "embedded", "--length", "64", "--bos", "every",
         "--max-segments", "2", "--continuations", "1", "--new-tokens", "2", "--device", "cpu",
         "--out", "eval-options.json"],
        ["heal", "pruned", "--out", "healed", *TEXT],
        ["merge", "embedded", "--blocks", "5,6", "--out", "merged", *TEXT],
        ["merge", "embedded", "--threshold", "0.9", "--remove", "2", "--out", "merged-sweep",
         *TEXT],
        *(["width", "embedded", "--method", method, "--ratio", "0.5", "--out", f"width-{method}",
           *TEXT] for method in ("llm-pruner", "wanda-sp", "flap")),
        ["drop-sublayers", "embedded", "--criterion", "sublayer-influence", "--remove", "2",
         "--out", "dropped", *TEXT],
        ["drop-sublayers", "embedded", "--attention", "3", "--mlp", "7", "--out", "dropped-named",
         *TEXT],
        ["compare-criteria", "embedded", "--criterion", "ppl,magnitude", "--ratios", "0.25",
         "--random", "2", "--max-segments", "2", "--out", "comparison", *TEXT],
    ],
    "training": [
        *(["retrain", "pruned", "--method", method, "--data", "embedded", "--max-steps", "1",
           "--batch", "2", "--length", "32", "--rows", "40", "--held-out", "2",
           "--device", "cpu", "--out", f"retrained-{method}"]
          for method in ("lora", "full", "distill", "last-blocks")),
    ],
    "units": [
        ["compare-units", "embedded", "--methods", "ppl,llm-pruner", "--ratio", "0.5",
         "--max-segments", "2", "--retrain", "none", "--batch", "1",
         "--set", "evaluation.tasks=[]", "--set", "evaluation.continuations=0",
         "--set", "benchmark.new_tokens=[2]", "--set", "benchmark.runs=1",
         "--set", "benchmark.warmup=1", "--out", "units", *SMALL],
    ],
    "quantizing": [
        ["quantize", "pruned", "--method", "gptq", "--group-size", "96", *TEXT, "--out", "gptq"],
        ["quantize", "pruned", "--method", "int8", "--device", "cpu", "--out", "int8"],
    ],
}  # fmt: skip
"""File of fingerprints -> the commands whose files carry them. All start from `embedded`."""

OF_THE_MACHINE = ("bench.json",)
"""Files whose fingerprint has the name of the processor in it."""

MADE_FIRST = [["prune", "embedded", "--blocks", "4,5", "--out", "pruned"]]
"""What the commands of every file but `base` start from."""


@contextlib.contextmanager
def inside(directory: Path) -> Iterator[None]:
    """Work in a directory, so that no path of this machine gets into a file."""
    before = Path.cwd()
    directory.mkdir(parents=True, exist_ok=True)
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def shortllm(command: list[str]) -> None:
    """Run a command line in this process; its output is shown only if it fails."""
    from shortllm.cli import main

    told, before = io.StringIO(), sys.argv
    sys.argv = ["shortllm", *command]  # a run records the command
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            main(command)
    except SystemExit as ended:
        if ended.code:
            raise AssertionError(f"shortllm {' '.join(command)}\n{told.getvalue()}") from None
    finally:
        sys.argv = before


def help_texts() -> dict[str, str]:
    """File name -> the help of a command, which the file is called after."""
    from typer import rich_utils
    from typer.main import get_command

    from shortllm.cli import app

    found: dict[str, str] = {}

    def add(command: Any, name: str) -> None:
        context = command.make_context(
            name, [], resilient_parsing=True, terminal_width=WIDTH, color=False
        )
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):  # typer prints panels, and returns plain text
            text = context.get_help() or ""
        lines = [line.rstrip() for line in (shown.getvalue() + text).strip("\n").splitlines()]
        found[f"{name.replace(' ', '_')}.txt"] = "\n".join(lines) + "\n"
        for own, child in getattr(command, "commands", {}).items():
            add(child, f"{name} {own}")

    settings = {"MAX_WIDTH": WIDTH, "COLOR_SYSTEM": None, "FORCE_TERMINAL": None}
    with mock.patch.multiple(rich_utils, **settings):
        add(get_command(app), "shortllm")
    return found


def run_files(work: Path) -> dict[str, str]:
    """File name -> what a small run wrote, without what differs between two equal runs."""
    with inside(work):
        shortllm(RUN)
    return {
        name.replace("/", "_"): normalised(work / "run" / name) for name in RUN_FILES
    }  # fmt: skip


def normalised(path: Path) -> str:
    """The text of a result file without times, versions, memory, and digits beyond the fourth."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return (
            json.dumps(_plain(json.loads(text)), indent=1, ensure_ascii=False, sort_keys=True)
            + "\n"
        )
    from shortllm import __version__

    text = re.sub(r"(<dt>versions</dt><dd>)[^<]*", r"\1VERSIONS", text)
    text = re.sub(r"^- versions: .*$", "- versions: VERSIONS", text, flags=re.MULTILINE)
    text = text.replace(f"shortllm {__version__}", "shortllm VERSION")
    text = re.sub(r"<style>.*?</style>", "<style/>", text, flags=re.DOTALL)
    text = re.sub(r"<svg.*?</svg>", _plot, text, flags=re.DOTALL)
    text = DECIMAL.sub(lambda found: _rounded(found[0]), text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _plain(value: Any, key: str = "") -> Any:
    if key in ("seconds", "peak_bytes") or (key == "shortllm" and isinstance(value, str)):
        return key.upper()
    if key == "versions":
        return {name: "VERSION" for name in sorted(value)}
    if isinstance(value, dict):
        plain = {name: _plain(one, name) for name, one in value.items()}
        # arithmetic made the weights of a healed model: not equal bytes on every machine
        if value.get("name") == "healed":
            plain["model"]["fingerprint"] = "OF WEIGHTS"
        if "healed" in [one.get("name") for one in value.get("models", [])]:
            plain["fingerprint"] = "OF WEIGHTS"
        return plain
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return value


def _plot(found: re.Match[str]) -> str:
    """What a plot says, without how it is drawn."""
    label = re.search(r'aria-label="([^"]*)"', found[0])
    words = [one.strip() for one in re.findall(r"<text[^>]*>([^<]*)</text>", found[0])]
    return f"<svg>{label[1] if label else ''}\n" + "\n".join(filter(None, words)) + "\n</svg>"


def _rounded(number: str) -> str:
    digits = re.sub(r"\D", "", number).lstrip("0")
    if len(digits) <= 4 or "e" in number:
        return number
    return f"{float(number.replace('−', '-')):.4g}".replace("-", "−" if "−" in number else "-")


def fingerprints(work: Path, kind: str) -> dict[str, str]:
    """File, and the entry in it -> the fingerprint there, of everything the commands wrote."""
    with inside(work):
        for command in QUICK[kind] if kind == "base" else MADE_FIRST + QUICK[kind]:
            shortllm(command)
    found = {}
    for path in work.rglob("*.json"):
        name = path.relative_to(work).as_posix()
        if "/." not in f"/{name}" and path.name not in OF_THE_MACHINE:
            found.update(_fingerprints_in(json.loads(path.read_text(encoding="utf-8")), name))
    return dict(sorted(found.items()))


def _fingerprints_in(content: Any, name: str) -> Iterator[tuple[str, str]]:
    """Those of the inputs of a file or a checkpoint; those of models are of weights."""
    if isinstance(content, dict):
        if isinstance(content.get("fingerprint"), str):
            yield name, content["fingerprint"]
        if isinstance(content.get("shortllm"), dict):  # provenance in a config.json
            own = content["shortllm"]
            yield from _fingerprints_in(own, f"{name}: shortllm")
            for key, value in own.items():
                yield from _fingerprints_in(value, f"{name}: shortllm.{key}")


def difference(expected: str, found: str) -> str:
    """A readable diff; empty where texts are equal but for the last digits of decimal numbers."""
    if DECIMAL.sub("#", expected) == DECIMAL.sub("#", found) and all(
        math.isclose(float(one), float(other), rel_tol=TOLERANCE, abs_tol=1e-6)
        for one, other in zip(_decimals(expected), _decimals(found), strict=True)
    ):
        return ""
    lines = difflib.unified_diff(
        expected.splitlines(), found.splitlines(), "golden", "found", lineterm="", n=2
    )
    return "\n".join(lines)


def _decimals(text: str) -> list[str]:
    return [one.replace("−", "-") for one in DECIMAL.findall(text)]


def made(kind: str, work: Path) -> dict[str, str]:
    """File name -> text, of one kind of goldens."""
    if kind == "help":
        return help_texts()
    if kind == "run":
        return run_files(work)
    return {f"{one}.json": fingerprint_text(work / one, one) for one in QUICK}


def fingerprint_text(work: Path, kind: str) -> str:
    """The fingerprints of some commands as a JSON file."""
    return json.dumps(fingerprints(work, kind), indent=1) + "\n"


def kept(kind: str) -> list[Path]:
    """The files of a kind of goldens."""
    return sorted((GOLDEN / kind).glob("*.*"))


def main() -> None:
    """Write the goldens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", nargs="*", choices=KINDS, required=True, help="default: all")
    for kind in parser.parse_args().write or KINDS:
        with tempfile.TemporaryDirectory() as scratch:
            texts = made(kind, Path(scratch).resolve())
        directory = GOLDEN / kind
        directory.mkdir(parents=True, exist_ok=True)
        for path in kept(kind):
            path.unlink()
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")
        if kind == "help":
            TYPER.write_text(version("typer") + "\n", encoding="utf-8")
        print(f"{directory}: {len(texts)} files")


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    main()
