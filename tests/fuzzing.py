"""Damaged files by the thousand: each gives a right result or a clear error, at once.

    python tests/fuzzing.py --inputs 20000 --seed 0      all kinds, a page of figures
    python tests/fuzzing.py --only 'configs:1234'        one input again, with its traceback

Every input follows from the seed, its kind and its number. It fails if it takes longer than
`LIMIT_S` or more than `LIMIT_BYTES` of memory, if anything but a ShortLLMError is raised, if the
message of one is no message, if the result is wrong, if the input was changed, or if something is
left behind after a refusal. See fuzz_kinds.py for what is damaged, mutations.py for how.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

if __name__ == "__main__":
    import conftest  # noqa: F401  # offline, one thread

from fuzz_bench import Act, Bench
from fuzz_kinds import KINDS

from shortllm.errors import ShortLLMError
from shortllm.runtime import quiet_transformers

LIMIT_S = 20.0
"""Far beyond what an input takes on a busy machine."""

LIMIT_BYTES = 512 * 2**20
"""Memory beyond all that was used before."""

LONGEST_MESSAGE = 3000
"""Characters; a longer one holds data."""

Kind = Callable[[Random, Bench], Act]


class TookTooLong(BaseException):
    """Not to be caught by anything that is tested."""


@dataclass(frozen=True)
class Outcome:
    """What became of one input."""

    name: str
    """`kind:number`, by which it is made again."""
    verdict: str
    """`right`, `refused` or `failed`."""
    seconds: float
    said: str
    """The message of a refusal; of a failure where it happened."""


def judge(name: str, kind: Kind, bench: Bench, *, seed: int, limit_s: float = LIMIT_S) -> Outcome:
    """Make one input, do what is done with it, and say what became of it."""
    random = Random(f"{seed}:{name}")
    bench.clear()
    act = kind(random, bench)
    before, peak = _listing(bench.source), peak_bytes()
    started = time.perf_counter()
    try:
        with _limited(limit_s):
            act()
        verdict, said = "right", ""
    except ShortLLMError as error:
        verdict, said = "refused", str(error)
        problem = _unclear(said) or _left_behind(bench)
        if problem:
            verdict, said = "failed", problem
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of Rust code are no Exceptions
        verdict, said = "failed", _place(error)
    seconds = time.perf_counter() - started
    if verdict != "failed" and _listing(bench.source) != before:
        verdict, said = "failed", "the input was changed"
    if verdict != "failed" and peak_bytes() - peak > LIMIT_BYTES:
        verdict, said = "failed", f"{(peak_bytes() - peak) / 2**20:.0f} MiB of memory were taken"
    return Outcome(name, verdict, seconds, said)


def _unclear(message: str) -> str | None:
    """Why a message is none that a user can read."""
    if len(message) < 15:
        return f"the message says nothing: {message!r}"
    if len(message) > LONGEST_MESSAGE:
        return f"a message of {len(message)} characters: {message[:200]}..."
    try:
        message.encode()
    except UnicodeEncodeError:
        return f"the message cannot be printed: {message[:200]!r}"
    return None


def _left_behind(bench: Bench) -> str | None:
    found = sorted(str(path.relative_to(bench.out)) for path in bench.out.rglob("*"))
    return f"left behind: {', '.join(found[:5])}" if found else None


def _listing(directory: Path) -> dict[str, tuple[int, int, bytes | str]]:
    """Every file below a directory: its mode, when it was changed, and what it holds."""
    found = {}
    for path in sorted(directory.rglob("*")):
        state = path.lstat()
        held = (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        )
        found[str(path)] = (state.st_mode, state.st_mtime_ns, held)
    return found


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _place(error: BaseException) -> str:
    """What was raised, and the last place in the package or in these files."""
    if os.environ.get("SHORTLLM_DEBUG"):
        traceback.print_exception(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "shortllm" in f.filename or Path(f.filename).parent == HERE]
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
    text = " ".join(str(error).split())
    return f"{type(error).__name__} at {place}: {text[:160]}"


HERE = Path(__file__).parent


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise TookTooLong inside after so many seconds."""

    def stop(signum: int, frame: object) -> None:
        raise TookTooLong(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def shares(inputs: int) -> dict[str, int]:
    """How many inputs each kind gets."""
    whole = sum(share for _, share in KINDS.values())
    return {name: max(1, round(inputs * share / whole)) for name, (_, share) in KINDS.items()}


def fuzz(names: list[str], bench: Bench, *, seed: int) -> list[Outcome]:
    """Judge inputs by their names, `kind:number`."""
    outcomes = []
    here = Path.cwd()
    gc.collect()
    gc.freeze()  # what the libraries hold need not be walked through each time a model is let go
    os.chdir(bench.root)  # where a tag of YAML would leave its file
    try:
        with quiet_transformers():
            for name in names:
                kind, _ = KINDS[name.partition(":")[0]]
                outcomes.append(judge(name, kind, bench, seed=seed))
                if sys.stderr.isatty() and len(outcomes) % 50 == 0:
                    print(f"\r{len(outcomes)} of {len(names)}", end="", file=sys.stderr)
    finally:
        os.chdir(here)
        gc.unfreeze()
    return outcomes


def summary(outcomes: list[Outcome], *, seed: int, seconds: float) -> str:
    """One page."""
    lines = [
        f"{len(outcomes)} damaged inputs, seed {seed}, {seconds:.0f} s",
        f"{'kind':14} {'inputs':>7} {'right':>7} {'refused':>8} {'failed':>7} {'seconds':>8} "
        f"{'slowest':>9}",
    ]
    kinds = list(dict.fromkeys(outcome.name.partition(":")[0] for outcome in outcomes))
    for kind in [*kinds, ""]:
        own = [one for one in outcomes if one.name.startswith(kind)]
        counts = [sum(one.verdict == v for one in own) for v in ("right", "refused", "failed")]
        slowest = max(own, key=lambda one: one.seconds)
        lines.append(
            f"{kind or 'all':14} {len(own):7} {counts[0]:7} {counts[1]:8} {counts[2]:7} "
            f"{sum(one.seconds for one in own):8.1f} {slowest.seconds:7.2f} s  {slowest.name}"
        )
    different = {_words(one.said) for one in outcomes if one.verdict == "refused"}
    lines.append(f"different messages: {len(different)}")
    failures: dict[str, list[Outcome]] = {}
    for one in outcomes:
        if one.verdict == "failed":
            failures.setdefault(one.said.partition(": ")[0], []).append(one)
    for place, same in sorted(failures.items(), key=lambda item: -len(item[1])):
        lines.append(f"\nFAILED {len(same)} x {same[0].said}")
        lines.append(f"  python tests/fuzzing.py --seed {seed} --only '{same[0].name}'")
        del place
    return "\n".join(lines)


def _words(message: str) -> str:
    """A message without names and numbers."""
    return " ".join(word for word in message.split() if word.isalpha())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help=f"one of {', '.join(KINDS)}")
    parser.add_argument("--only", help="one input, as KIND:NUMBER")
    parser.add_argument("--messages", action="store_true", help="print an example of each refusal")
    asked = parser.parse_args()
    if asked.only:
        os.environ["SHORTLLM_DEBUG"] = "1"
        names = [asked.only]
    elif asked.kind:
        names = [f"{asked.kind}:{number}" for number in range(asked.inputs)]
    else:
        names = [
            f"{kind}:{n}" for kind, count in shares(asked.inputs).items() for n in range(count)
        ]
    with tempfile.TemporaryDirectory(prefix="shortllm-fuzz-") as directory:
        started = time.perf_counter()
        outcomes = fuzz(names, Bench(Path(directory).resolve()), seed=asked.seed)
        print(summary(outcomes, seed=asked.seed, seconds=time.perf_counter() - started))
    if asked.messages or asked.only:
        shown = {_words(one.said): one for one in outcomes if one.verdict == "refused"}
        for one in shown.values():
            print(f"\n{one.name}: {one.said}")
    return int(any(one.verdict == "failed" for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
