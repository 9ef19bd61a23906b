"""Mistakes of first users: what each is answered, with which exit code, and how fast.

    python tools/mistakes.py                         those that need no real model
    python tools/mistakes.py --shared ../shared      also on SmolLM2
    python tools/mistakes.py --json > mistakes.json

Each runs as a command of its own, in a directory of small files that `prepare` writes, without a
network. The script fails if an answer lacks what it must say, has another exit code, shows a
traceback or leaves a file behind, or if a mistake that needs no model takes over 1.5 seconds
of processor time.
`tests/test_mistakes.py` checks the same answers without the times.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 1.5
"""Most seconds for the answer to a mistake that needs neither torch nor a model.

Processor time, which is what the answer takes on a machine that does nothing else.
"""

MISUSE = 2
"""Exit code of a mistake."""

SMOLLM = "smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, slots=True)
class Mistake:
    """A command, and what its answer must contain."""

    command: str
    """After `shortllm`; `{smollm}` is a real model."""
    says: str
    model: bool = False
    """Whether it cannot be seen without opening a model, or loading what the command runs on."""
    code: int = MISUSE


SCORE = "score embedded --out new"
RETRAIN = "retrain embedded --method lora --out new"

MISTAKES = [
    # commands and flags
    Mistake("scor embedded", "Did you mean 'score'?"),
    Mistake("run --remov 2", "--remove"),
    Mistake("score", "missing option '--out'"),
    Mistake("recipes show", "missing argument 'NAME'"),
    Mistake("run --dtype fp16", "'float16'"),
    Mistake("bench embedded --preset papr", "'paper'"),
    Mistake("info embedded --samples 0", "greater than or equal to 1"),
    Mistake("bench embedded --batch x", "--batch x: must be a valid integer"),
    Mistake("eval embedded --prompt", "See: shortllm eval --help"),
    Mistake("info embedded --quiet --verbose", "exclude each other"),
    Mistake("info embedded --overwrite", "no such option: --overwrite"),
    Mistake("cache clean", "Did you mean 'clear'?"),
    Mistake("demo --port 0", "greater than or equal to 1"),
    # devices
    Mistake("run --device gpu", "Did you mean 'cuda'?"),
    Mistake("eval embedded --device cpux", "unknown --device 'cpux'"),
    Mistake(f"{SCORE} --device cuda:one", "unknown --device 'cuda:one'"),
    # criteria and methods
    Mistake("run --criterion perplexity", "Did you mean 'ppl'?"),
    Mistake(f"{SCORE} --criterion taylr", "Did you mean 'taylor'?"),
    Mistake(f"{SCORE} --criterion ppl,ppl", "each once"),
    Mistake("compare-criteria embedded --criterion pll", "Did you mean 'ppl'?"),
    Mistake(f"{SCORE} --option taylor.power=2", "the criteria requested are ppl"),
    Mistake(f"{SCORE} --option power=2", "must have the form CRITERION.NAME=VALUE"),
    Mistake(f"{SCORE} --criterion taylor --option taylor.powr=2", "Did you mean 'power'?"),
    Mistake(f"{SCORE} --criterion taylor --option taylor.power=x", "taylor.power"),
    Mistake("run --heal regresion", "Did you mean 'regression'?"),
    Mistake("run --retrain lorra", "Did you mean 'lora'?"),
    Mistake("run --quantize int3", "Available: "),
    Mistake("retrain embedded --method lorra --out new", "Did you mean 'lora'?"),
    Mistake("heal embedded --method ridge --out new", "Available: "),
    Mistake("width embedded --ratio 0.2 --method flapp --out new", "Did you mean 'flap'?"),
    Mistake("quantize embedded --method rtn4 --out new", "Available: "),
    Mistake("drop-sublayers embedded --criterion nope --remove 2 --out new", "Available: "),
    Mistake(f"{SCORE} --criterion span --option span.size=3", "has no option 'size'"),
    Mistake("compare-criteria embedded --ratios 0.1,2", "--ratios 2: must be less than 1"),
    Mistake("heal embedded --ridge -1 --out new", "--ridge -1.0: must be greater than 0"),
    # conversations
    Mistake("eval embedded --data embedded --apply-chat-template", "has no chat template"),
    Mistake("run --apply-chat-template", "embedded has no chat template"),
    Mistake("eval embedded --data embedded --continuations 1 --system Hi", "--system: embedded"),
    Mistake("eval embedded --tasks boolq --num-fewshot -1", "greater than or equal to 0"),
    Mistake("eval embedded --tasks boolq --fewshot-as-multiturn", "Add --apply-chat-template"),
    Mistake("eval embedded --one-turn 5", "no such directory: 5"),
    Mistake(
        f"{RETRAIN} --template chat --data two.jsonl#prompt=query,completion=reply",
        "Use --template alpaca",
    ),
    # budgets
    Mistake("run --remove x", "must be a valid integer"),
    Mistake("run --remove 0", "greater than or equal to 1"),
    Mistake("run --ratio 20", "less than 1"),
    Mistake("run --remove 2 --ratio 0.5", "several budgets given"),
    Mistake("run --blocks 1,x", "--blocks x"),
    Mistake("run --blocks 6-4", "--blocks 6-4"),
    Mistake("prune embedded --blocks 1,b --out new", "is not a list of block numbers"),
    Mistake("prune embedded --blocks 6-4 --out new", "is not a list of block numbers"),
    Mistake("prune embedded --blocks 3 --plan nothere --out new", "give either --plan"),
    Mistake("run --target-params big", "such as 1.0B or 350M"),
    # models
    Mistake("info nothere", "no such directory: nothere"),
    Mistake("info nope/nope", "HF_HUB_OFFLINE is set"),
    Mistake("info ''", "the model's name is empty"),
    Mistake("info empty", "no config.json"),
    Mistake("info noweights", "Was the download finished?"),
    Mistake("info adapter", "has an adapter"),
    Mistake("info text.txt", "Give the checkpoint's directory"),
    Mistake("info nothere.gguf", "no such file: nothere.gguf"),
    Mistake("eval embedded nothere", "no such directory: nothere"),
    Mistake("export nothere --gguf new.gguf", "no such directory: nothere"),
    Mistake("demo --model nothere", "must have the form NAME=MODEL"),
    Mistake("info @main", "no such directory: @main"),
    # text
    Mistake(f"{SCORE} --data nothere.jsonl", "no such file: nothere.jsonl"),
    Mistake(f"{SCORE} --data wikitex2", "Did you mean 'wikitext2'?"),
    Mistake(f"{SCORE} --data wikitext2:tset", "Did you mean 'test'?"),
    Mistake(f"{SCORE} --data ptb", "HF_HUB_OFFLINE is set"),
    Mistake(f"{SCORE} --data owner/set", "HF_HUB_OFFLINE is set"),
    Mistake(f"{SCORE} --data text.txt#body", "has no column 'body'"),
    Mistake(f"{SCORE} --data two.jsonl", "--columns prompt=ASKED,completion=ANSWER"),
    Mistake(f"{SCORE} --data two.jsonl#repl", "Did you mean 'reply'?"),
    Mistake(f"{SCORE} --data numbers.jsonl", "no column of text"),
    Mistake(f"{SCORE} --data broken.jsonl", "line 1 of broken.jsonl is not JSON"),
    Mistake(f"{SCORE} --data empty", "Name one file in it"),
    Mistake(f"{SCORE} --data picture.png", "cannot tell what kind of data"),
    Mistake(f"{SCORE} --calibration nothere.json", "no such calibration file"),
    Mistake(f"{SCORE} --calibration ids.json --data text.txt", "Leave one of them out"),
    Mistake("eval embedded --data nothere.txt", "no such file: nothere.txt"),
    Mistake("retrain embedded --method full --data nothere.txt --out new", "no such file"),
    Mistake(f"{SCORE} --data text.txt,two.jsonl", "give every source once, with a weight"),
    Mistake(f"{RETRAIN} --data c4:x,alpaca:1", "as in c4:0.5,alpaca:0.5"),
    Mistake(f"{RETRAIN} --data two.jsonl,text.txt", "with a weight above 0"),
    Mistake(f"{RETRAIN} --data two.jsonl --columns prompt", "give FIELD=COLUMN"),
    Mistake(f"{RETRAIN} --data text.txt --max-steps 2 --epochs 1", "Give one of them"),
    Mistake(f"{RETRAIN} --data text.txt --teacher embedded", "an option of --method distill"),
    Mistake(RETRAIN, "the default training data, 'alpaca:train', is not here"),
    Mistake("merge embedded --data nothere --out new", "'nothere' is not here"),
    Mistake("run {smollm}", "the default text, 'bookcorpus:train', is not here"),
    # recipes and files of earlier stages
    Mistake("run --recipe embeded", "Did you mean 'embedded'?"),
    Mistake("run --recipe nothere.yaml", "there is no recipe nothere.yaml"),
    Mistake("run --recipe bad.yaml", "Did you mean 'criterion'?"),
    Mistake("run --set retraining.max_steps", "must have the form FIELD=VALUE"),
    Mistake("recipes show lama", "Available: "),
    Mistake("plan nothere --remove 2", "Score first: shortllm score MODEL --out nothere"),
    Mistake("plan empty --remove 2", "Score first: shortllm score MODEL --out empty"),
    Mistake("plan nothere", "no budget given"),
    Mistake("plan embedded --remove 2", "Score it first: shortllm score embedded --out DIR"),
    Mistake("plan noweights --remove 2", "noweights is a model"),
    Mistake("plan model.gguf --remove 2", "model.gguf is a model"),
    Mistake("prune embedded --plan nothere --out new", "there is no plan in nothere"),
    Mistake("prune embedded --out new", "give either --plan"),
    Mistake("report nothere", "no such directory: nothere"),
    Mistake("report empty", "is not a run"),
    Mistake("report noweights", "is a model, not a run"),
    Mistake("compare noweights", "is a model, not a run"),
    Mistake("compare nothere", "no such directory: nothere"),
    # where results go
    Mistake("prune embedded --blocks 3 --out other", "contains something else"),
    Mistake("prune embedded --blocks 3 --out other --overwrite", "contains something else"),
    Mistake("prune embedded --blocks 3 --out text.txt", "is a file"),
    Mistake("heal embedded --data text.txt --out text.txt", "is a file"),
    Mistake("bench embedded --out text.txt", "is a file"),
    Mistake("compare-criteria --out other", "not a run of shortllm"),
    Mistake("score embedded --out text.txt", "is a file"),
    Mistake("run --out text.txt", "is a file"),
    Mistake("run --out other", "not a run of shortllm"),
    Mistake("eval embedded --out empty", "is a directory; give a file"),
    # what only the model can tell
    Mistake("run --remove 20", "cannot remove 20 of 12 blocks", model=True),
    Mistake("run --blocks 40", "40", model=True),
    Mistake("prune embedded --blocks 40 --out new", "40", model=True),
    Mistake("heal embedded --data embedded --out new", "from which model it was shortened"),
    Mistake(f"{SCORE} --length 5000", "Give --length 512 or less", model=True),
    Mistake(
        "retrain embedded --method distill --out x --data embedded", "original model with --teacher"
    ),
    Mistake("eval embedded --data embedded --tasks bolq", "Did you mean 'boolq'?"),
    Mistake(f"{RETRAIN} --data text.txt", "At least 2 are needed", model=True),
    Mistake(f"{RETRAIN} --data text.txt --load-in-4bit", "needs a CUDA GPU"),
    Mistake(f"{RETRAIN} --data text.txt --report-to wandbb", "Did you mean 'wandb'?"),
    Mistake("{smollm} --out new".join(["score ", " --data text.txt"]), "samples need", model=True),
]


def prepare(directory: Path) -> None:
    """Write the files that the commands name."""
    for name in ("empty", "other", "noweights", "adapter"):
        (directory / name).mkdir()
    (directory / "other" / "letter.txt").write_text("something else\n")
    for name in ("noweights", "adapter"):
        (directory / name / "config.json").write_text('{"model_type": "llama"}')
    (directory / "adapter" / "adapter_config.json").write_text("{}")
    (directory / "text.txt").write_text("a line of text\n")
    (directory / "picture.png").write_bytes(b"\x89PNG")
    (directory / "two.jsonl").write_text('{"query": "How many?", "reply": "Two."}\n')
    (directory / "numbers.jsonl").write_text('{"label": 1}\n')
    (directory / "broken.jsonl").write_text('{"text": \n')
    (directory / "ids.json").write_text("[[1, 2, 3]]")
    (directory / "bad.yaml").write_text("criterio: ppl\n")


def environment() -> dict[str, str]:
    """The environment of the commands: no network, no copies of the built-in texts."""
    kept = {name: value for name, value in os.environ.items() if name != "SHORTLLM_DATA"}
    return {**kept, "HF_HUB_OFFLINE": "1"}


def problem_of(mistake: Mistake, code: int, out: str, err: str) -> str | None:
    """What is wrong with an answer; None if nothing is."""
    if code != mistake.code:
        return f"exit code {code}"
    if "Traceback" in err or out:
        return "a traceback" if "Traceback" in err else "something on standard output"
    last = err.strip().splitlines()[-1] if err.strip() else ""
    if not last.startswith("error: "):
        return f"the last line is not an error: {last}"
    return None if mistake.says in last else f"does not say '{mistake.says}': {last}"


def _cpu_s() -> float:
    """Processor seconds of all commands so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(mistake: Mistake, directory: Path, models: dict[str, str]) -> dict[str, object]:
    """Run one command; its answer, time and problem."""
    command = [sys.executable, "-m", "shortllm", *shlex.split(mistake.command.format(**models))]
    before = set(directory.iterdir())
    started, spent = time.monotonic(), _cpu_s()
    done = subprocess.run(
        command, cwd=directory, env=environment(), capture_output=True, text=True, timeout=600
    )
    seconds, cpu_s = round(time.monotonic() - started, 2), round(_cpu_s() - spent, 2)
    problem = problem_of(mistake, done.returncode, done.stdout, done.stderr)
    left = set(directory.iterdir()) - before
    if problem is None and left:
        problem = f"left behind: {', '.join(path.name for path in left)}"
    if problem is None and cpu_s > LIMIT_S and not mistake.model:
        problem = f"over {LIMIT_S} seconds"
    said = done.stderr.strip().splitlines()[-1:]
    return {
        "command": mistake.command,
        "seconds": seconds,
        "cpu_s": cpu_s,
        "needs_model": mistake.model,
        "said": said[0] if said else "",
        "problem": problem,
    }


def main() -> None:
    """Run all, print a table or JSON; exit code 1 if any answer is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shared", type=Path, help="directory with models/, for a real model")
    parser.add_argument("--only", default="", help="commands that contain this text")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    given = parser.parse_args()
    models = {"smollm": str((given.shared / "models" / SMOLLM).resolve())} if given.shared else {}
    rows = []
    for mistake in MISTAKES:
        if given.only not in mistake.command or ("{" in mistake.command and not models):
            continue
        with tempfile.TemporaryDirectory() as directory:
            prepare(Path(directory))
            rows.append(measure(mistake, Path(directory), models))
        if not given.json:
            row = rows[-1]
            print(f"{row['seconds']:6.2f} s {row['cpu_s']:6.2f} s of processor  {row['command']}")
            print(f"          {row['said']}")
            if row["problem"]:
                print(f"          PROBLEM: {row['problem']}")
    wrong = sum(1 for row in rows if row["problem"])
    if given.json:
        print(json.dumps(rows))
    else:
        quick = max(
            (float(str(row["cpu_s"])) for row in rows if not row["needs_model"]), default=0.0
        )
        print(f"{len(rows)} mistakes, {wrong} with a problem; at most {quick} s without a model")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
