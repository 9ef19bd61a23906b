"""The documents as a reader would follow them: every fenced block of a page, run in order.

    fences(page)           the blocks of a page
    Reader(...)            one page's directory, its stand-ins, and how each kind of block is run
    commands(text)         the command lines of a block

Each block runs unchanged in a directory with small stand-ins under the names the documents use
(`Qwen/Qwen3-0.6B`, `my_text.jsonl`, `runs/qwen3`, ...); built-in texts are small ones too. A
command that would take minutes is first parsed unchanged, then run with the flags of CHEAPER added.
What cannot run here is marked by a comment above its block, `<!-- not run: needs a GPU -->`; its
commands are parsed up to the call of the library.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from stand_ins import STAND_INS, built_in_texts, cache_directory, stand_in

import shortllm
from shortllm import criteria, schemas
from shortllm.checkpoint import references, rules
from shortllm.checkpoint import shorten_config as shortening
from shortllm.cli import main
from shortllm.quantizing.methods import METHODS as quantizing_methods
from shortllm.recipe import load_recipe, parse_recipe, recipe_names
from shortllm.width_pruning.methods import METHODS

REPOSITORY = Path(__file__).parents[1]
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
LANGUAGES = ("sh", "python", "yaml", "json", "text")
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")

# ---- reading


@dataclass(frozen=True, slots=True)
class Fence:
    """A fenced block."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None
    """Why it cannot be run here."""
    follows: bool
    """Whether there is nothing between it and the block before."""

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def fences(page: Path) -> list[Fence]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found, end = [], 0
    for match in FENCE.finditer(text):
        found.append(
            Fence(
                page=page,
                line=text.count("\n", 0, match.start("text")),
                language=match["language"],
                text=match["text"],
                not_run=match["reason"],
                follows=bool(found) and not text[end : match.start()].strip(),
            )
        )
        end = match.end()
    marks = len(re.findall(r"^\s*```", text, re.MULTILINE))
    assert marks == 2 * len(found), f"{page.name}: a block is indented or not closed"
    assert text.count("<!-- not run") == sum(one.not_run is not None for one in found), page.name
    return found


def code_spans(page: Path) -> list[str]:
    """The code in the running text of a page, each on one line."""
    return [" ".join(span.split()) for span in CODE.findall(FENCE.sub("", page.read_text("utf-8")))]


@dataclass(frozen=True, slots=True)
class Command:
    """A command line: words, and the variables set for it."""

    words: list[str]
    variables: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return shlex.join(self.words)


def commands(text: str) -> list[Command]:
    """The command lines of a block, without comments."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        words = shlex.split(line, comments=True)
        variables = {}
        if ">" in words:  # where a shell would write what is printed
            words = words[: words.index(">")]
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, variables[name] = words.pop(0).partition("=")
        if words:
            found.append(Command(words, variables))
    return found


# ---- running


def _fields(**values: object) -> list[str]:
    """`--set` for fields of a recipe; `__` means a dot."""
    places = [f"{name.replace('__', '.')}={value}" for name, value in values.items()]
    return [word for place in places for word in ("--set", place)]


BENCH = _fields(
    benchmark__runs=2, benchmark__warmup=1, benchmark__new_tokens=[2], benchmark__batches=[1]
)
STEPS = _fields(
    retraining__max_steps=2,
    retraining__epochs="null",
    retraining__batch=2,
    retraining__micro_batch=2,
    retraining__length=256,
)
DRAFTS = ["--texts", "2", "--new-tokens", "8", "--runs", "1", "--draft-tokens", "2",
          "--measured", "1"]  # fmt: skip
FEW = ["--samples", "4", "--length", "32"]
CHEAPER: list[tuple[str, list[str]]] = [
    ("shortllm run", ["--new-tokens", "2", "--max-segments", "4"]),
    ("shortllm run --data", FEW),
    ("recipes run", ["--new-tokens", "2", "--max-segments", "4", *FEW, *BENCH, *STEPS]),
    ("shortllm run runs/first", [*BENCH, *STEPS, "--limit", "4"]),  # the embedded model's recipe
    ("shortllm run influence", ["--limit", "4"]),
    ("shortllm run --bench", BENCH),
    ("shortllm run --retrain", STEPS),
    ("shortllm compare-units", ["--methods", "ppl,flap", "--batch", "1", "--max-segments", "4"]),
    ("shortllm compare-units", [*FEW, *BENCH, *STEPS]),
    ("shortllm compare-criteria", ["--max-segments", "4", "--random", "2", *FEW]),
    ("shortllm draft", DRAFTS),
    ("shortllm draft --retrain", ["--write", "4", *STEPS]),
    ("shortllm bench", ["--warmup", "1", "--runs", "2", "--new-tokens", "2", "--batch", "1,2"]),
    ("shortllm retrain", ["--max-steps", "2", "--batch", "2", "--length", "256"]),
    ("shortllm heal", ["--samples", "16", "--length", "64"]),
    (
        "--heal regression",
        _fields(healing__calibration__samples=4, healing__calibration__length=32),
    ),
    ("shortllm eval --limit", ["--limit", "4"]),
    ("shortllm eval --max-segments", ["--max-segments", "4"]),
    ("shortllm run --tasks", ["--limit", "4"]),
    ("recipes run my.yaml", ["--limit", "4"]),
    ("shortllm merge", ["--threshold", "0", *FEW]),  # random blocks do not fold into one another
]
"""Flags that are added to a command that has all of these words."""


class Stopped(Exception):
    """The library was called: what was typed could be read."""


class Reader:
    """One page's directory, and how its blocks are run."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch, said: Callable[[], str]) -> None:
        """
        Args:
            directory: an empty one.
            said: what was printed since its last call.
        """
        self.directory, self.patch, self.said = directory / "work", patch, said
        self.names: dict[str, Any] = {"__name__": "page"}
        self.address, self.verbatim = "", True
        self.inputs: list[str] = []
        """What recipes of the page name."""
        self.directory.mkdir()
        for name in ("docs", "tests", "benchmarks", "Makefile", "pyproject.toml"):
            (self.directory / name).symlink_to(REPOSITORY / name)
        patch.chdir(self.directory)
        patch.setenv("SHORTLLM_DATA", str(built_in_texts()))
        patch.setenv("XDG_CACHE_HOME", str(cache_directory() / "home"))
        for registry in (criteria._REGISTRY, METHODS):
            patch.setattr(registry, "_entries", dict(registry._entries))
        per_block = set(rules.PER_BLOCK)
        for module in (rules, shortening):
            patch.setattr(module, "PER_BLOCK", per_block)
        tables = ((per_block, *references.TABLES[0][1:]), *references.TABLES[1:])
        patch.setattr(references, "TABLES", tables)
        patch.setattr("shortllm.quantizing.quantize.SAMPLES", 2)
        patch.setattr("shortllm.quantizing.quantize.SAMPLE_LENGTH", 64)
        patch.setitem(quantizing_methods.get("gptq").options, "group_size", 16)

    def read(self, page: Path) -> None:
        """Run all blocks of a page.

        Raises:
            AssertionError: naming the page and line of the block that does not do what it shows.
        """
        blocks = fences(page)
        for fence in blocks:
            if fence.language == "yaml":  # commands above it may name it
                self.recipe(fence)
        out = ""
        for fence in blocks:
            if fence.language == "sh":
                out = "".join([self.command(one, fence) for one in commands(fence.text)])
            elif fence.language == "python":
                out = self.python(fence)
            elif fence.language == "json":
                json.loads(fence.text)
            elif fence.language == "text" and fence.follows:
                self.output(fence, out)
        for path in self.directory.rglob("*.json"):
            name = "scores" if path.stem.startswith("scores-") else path.stem
            if name in schemas.NAMES:
                Draft202012Validator(schemas.schema(name)).validate(json.loads(path.read_text()))

    # kinds of blocks

    def recipe(self, fence: Fence) -> None:
        """A recipe: every field is one, and it lies where commands of the page look for it."""
        recipe = parse_recipe(yaml.safe_load(fence.text), str(fence))
        self.inputs += [recipe.model, recipe.calibration.data or ""]
        self.inputs += [one.data or "" for one in recipe.retraining]
        Draft202012Validator(schemas.schema("recipe")).validate(yaml.safe_load(fence.text))
        Path("my.yaml").write_text(fence.text, encoding="utf-8")

    def python(self, fence: Fence) -> str:
        """Run Python code, and return what it printed; names stay for the blocks below."""
        self.said()
        code = compile(fence.text, str(fence), "exec")
        files = [file for file in REPOSITORY.glob("docs/*.py") if file.read_text() == fence.text]
        if files:  # a script of ours as it stands: a command of the page runs it
            assert f"python docs/{files[0].name} " in fence.page.read_text(), fence
        elif fence.not_run is None:
            if self.address:
                code = compile(
                    fence.text.replace("http://127.0.0.1:7860", self.address), str(fence), "exec"
                )
            self.provide(re.findall(r'"([^"\n]+)"', fence.text))
            exec(code, self.names)
        return self.said()

    def command(self, command: Command, fence: Fence) -> str:
        """Read a command line, and run it where it can run here; returns what it printed."""
        where = f"{fence}: {command}"
        program, *words = command.words
        with pytest.MonkeyPatch.context() as patch:
            for name, value in command.variables.items():
                self.provide_texts(value)
                patch.setenv(name, value)
            models = [load_recipe(word).model for word in words if word in recipe_names()]
            self.provide([*words, *models, *self.inputs])
            ours = READERS[program](words, where)
            if ours is not None:
                self.parse(ours, where)
            if fence.not_run is not None:
                return ""
            if program == "shortllm":
                return self.call(self.cheap(command.words)[1:], where)
            if program == "python":
                return self.script(words, where)
            assert program in LAUNCHERS, f"{where}: mark the block with <!-- not run: WHY -->"
            return self.process(LAUNCHERS[program] + self.cheap(command.words)[1:], where)

    def check(self, page: Path) -> None:
        """Read the recipes and command lines of a page without running them."""
        blocks = fences(page)
        for fence in blocks:
            if fence.language == "yaml":
                self.recipe(fence)
        for fence in blocks:
            if fence.language == "sh":
                for command in commands(fence.text):
                    self.look(command, f"{fence}: {command}", whole=True)

    def look(self, command: Command, where: str, *, whole: bool = False) -> None:
        """Read a command line, in the running text with arguments left out, up to the library."""
        ours = READERS[command.words[0]](command.words[1:], where)
        if ours is not None:
            self.parse(ours, where, whole=whole)

    def output(self, fence: Fence, out: str) -> None:
        """Every line that a page shows as printed was printed, `...` standing for others.

        Numbers are those printed, but where the command before ran with other flags.
        """
        printed: dict[str, list[list[float]]] = {}
        for line in out.splitlines():
            printed.setdefault(_shape(line), []).append(_numbers(line))
        for line in fence.text.splitlines():
            if line.strip() in ("", "..."):
                continue
            assert _shape(line) in printed, f"{fence}: not printed: {line}\n{out}"
            near = pytest.approx(_numbers(line), rel=0.01)
            alike = any(numbers == near for numbers in printed[_shape(line)])
            assert alike or not self.verbatim, f"{fence}: other numbers: {line}\n{out}"

    # programs

    def parse(self, words: list[str], where: str, *, whole: bool = True) -> None:
        """Have the command line read what was typed, up to the call of the library."""

        def stop(*given: Any, **options: Any) -> None:
            for name in _criteria_in(options):
                criteria.get(name)
            raise Stopped

        with pytest.MonkeyPatch.context() as patch:
            for name in shortllm.__all__:
                if name.islower() and not name.startswith("__") and name != "load":
                    patch.setattr(shortllm, name, stop, raising=False)
            for name in (
                "check",
                "check_recipe",
                "check_scoring",
                "check_scores",
                "check_pruning",
                "check_directory",
            ):
                patch.setattr(f"shortllm.cli.early.{name}", lambda *given: None)
            patch.setattr("shortllm.released.measure_released", stop)
            patch.setattr("shortllm.checkpoint.gguf.cached_models", stop)
            patch.setattr("shortllm.checkpoint.gguf.clear_cache", stop)
            patch.setattr("shortllm.demo.models.open_models", stop)
            patch.setattr("shortllm.demo.models.embedded_models", stop)
            try:
                main(words)
            except Stopped:
                self.said()
            except SystemExit as stopped:
                said = self.said()
                left_out = not whole and ("missing " in said.lower() or ".yaml. See:" in said)
                assert left_out or not stopped.code, f"{where}\n{said}"

    def cheap(self, words: list[str]) -> list[str]:
        """The words with flags behind them that make it a matter of seconds."""
        extra = [flags for need, flags in CHEAPER if set(need.split()) <= set(words)]
        self.verbatim = self.verbatim and not extra
        return [*words, *(flag for flags in extra for flag in flags)]

    def call(self, words: list[str], where: str) -> str:
        """Run a command of ours in this process."""
        self.said()
        if words[0] == "demo":
            return self.demo(words, where)
        with pytest.raises(SystemExit) as stopped:
            main(words)
        said = self.said()
        assert not stopped.value.code, f"{where}\n{said}"
        return said

    def demo(self, words: list[str], where: str) -> str:
        """Start the page; it is served until the test ends."""

        class Pressed:
            def wait(self) -> None:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            module = sys.modules["shortllm.cli.measure"]
            patch.setattr(module, "threading", SimpleNamespace(Event=Pressed))
            with pytest.raises(SystemExit):
                main(words)
        said = self.said()
        found = re.search(r"demo of .*: (http://\S+?)/?\s", said)
        assert found, f"{where}\n{said}"
        self.address = found[1]
        return said

    def script(self, words: list[str], where: str) -> str:
        """`python FILE ...` or `python -c CODE` in this process."""
        self.said()
        if words[0] == "-c":
            exec(words[1], {})
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", words)
                runpy.run_path(words[0], run_name="__main__")
        said = self.said()
        assert said, f"{where} printed nothing"
        return said

    def process(self, words: list[str], where: str) -> str:
        """Launchers of several processes."""
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)
        }  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{where}\n{done.stderr}"
        return done.stdout

    # what is there

    def provide(self, words: Iterable[str]) -> None:
        """Lay stand-ins where a command looks for them."""
        before = ""
        for word in words:
            for name in {word, *re.split(r"[=,]", word)} & STAND_INS.keys():
                if before != "--out" and not Path(name).exists():
                    source = stand_in(name)
                    Path(name).parent.mkdir(parents=True, exist_ok=True)
                    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, name)
            before = word

    def provide_texts(self, directory: str) -> None:
        """The directory of built-in texts under another name."""
        if not Path(directory).exists():
            Path(directory).parent.mkdir(parents=True, exist_ok=True)
            Path(directory).symlink_to(built_in_texts())


def _criteria_in(options: dict[str, Any]) -> Iterator[str]:
    given = options.get("criterion", ())
    yield from [given] if isinstance(given, str) else given


POWER = re.compile(r" × #[⁻⁰¹²³⁴-⁹]+|(?<=#)\s[kMG](?=B)")
"""Of a number without its digits: "# × #⁻⁵", and the M of "# MB"."""

NUMBER = re.compile(r"\N{MINUS SIGN}?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def _shape(line: str) -> str:
    """A line without its numbers and their powers of ten, marks of the best and the space between
    its columns."""
    line = POWER.sub("", NUMBER.sub("#", line))
    return " ".join(line.replace("*", " ").split())


def _numbers(line: str) -> list[float]:
    plain = str.maketrans({",": "", "\N{MINUS SIGN}": "-"})
    return [float(number.translate(plain)) for number in NUMBER.findall(line)]


# ---- what reads the words of a program; returns those of ours, if it starts us


def _read_ours(words: list[str], where: str) -> list[str]:
    return words


def _read_make(words: list[str], where: str) -> None:
    subprocess.run(["make", "--dry-run", *words], cwd=REPOSITORY, check=True, capture_output=True)


def _read_pip(words: list[str], where: str) -> None:
    assert words[0] in ("install", "download"), where
    extras = shortllm_extras()
    for word in words[1:]:
        match = re.fullmatch(r"(?:shortllm|\.)(?:\[([\w,]+)\])?", word)
        if match is not None:
            assert set(filter(None, (match[1] or "").split(","))) <= extras, where


def shortllm_extras() -> set[str]:
    """The extras that pyproject.toml declares."""
    text = (REPOSITORY / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))


def _read_python(words: list[str], where: str) -> list[str] | None:
    if words[0] == "-c":
        compile(words[1], where, "exec")
    elif words[:2] == ["-m", "shortllm"]:
        return words[2:]
    elif words[0] == "-m":
        assert importlib.util.find_spec(words[1]), f"{where}: no module {words[1]}"
    else:
        source = (REPOSITORY / words[0]).read_text()
        for word in words[1:]:
            if word.startswith("--"):
                assert f'"{word}"' in source, f"{where}: no {word} in {words[0]}"
    return None


def _launched(parser: argparse.ArgumentParser, words: list[str], where: str) -> list[str]:
    given = parser.parse_args(words)
    assert given.module and given.training_script == "shortllm", where
    return list(given.training_script_args)


def _read_torchrun(words: list[str], where: str) -> list[str]:
    from torch.distributed.run import get_args_parser

    return _launched(get_args_parser(), words, where)


def _read_accelerate(words: list[str], where: str) -> list[str]:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch", where
    return _launched(launch_command_parser(), words[1:], where)


def _read_lm_eval(words: list[str], where: str) -> None:
    from lm_eval._cli import HarnessCLI

    HarnessCLI()._parser.parse_args(["run", *words])


def _read_sh(words: list[str], where: str) -> None:
    assert (REPOSITORY / words[0]).is_file(), where


READERS: dict[str, Callable[[list[str], str], list[str] | None]] = {
    "sh": _read_sh,
    "shortllm": _read_ours,
    "make": _read_make,
    "pip": _read_pip,
    "python": _read_python,
    "torchrun": _read_torchrun,
    "accelerate": _read_accelerate,
    "lm_eval": _read_lm_eval,
}
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
}
