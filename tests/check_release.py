"""Whether a release would work: what is in the archives, and the package alone, without extras.

    make release-check

builds the sdist and from it the wheel into dist/, compares the wheel with one built from the tree,
installs it into a new environment, imports every module there, runs `--help` of every command and
says how long `shortllm --help` takes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from pathlib import Path
from zipfile import ZipFile

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "src/shortllm"
DIST = REPOSITORY / "dist"

MOST_SECONDS = 3.0
"""`shortllm --help` on a processor: far above what it takes, and other work does not count."""

EXTRAS = (
    "accelerate", "gradio", "llmcompressor", "lm_eval", "peft", "pynvml",
)  # fmt: skip
"""What only the extras bring."""

ALONE = f"""
import importlib, importlib.util, pkgutil, shortllm

brought = [name for name in {EXTRAS!r} if importlib.util.find_spec(name)]
assert not brought, f"the package alone brings {{brought}}"
names = [one.name for one in pkgutil.walk_packages(shortllm.__path__, "shortllm.")]
for name in names:
    importlib.import_module(name)
for name in shortllm.__all__:
    getattr(shortllm, name)
print(len(names), "modules can be imported without any extra")
"""


def run(*command: str | Path, cwd: Path = REPOSITORY) -> str:
    """The standard output of a command that succeeds; else the check ends here.

    Nothing but the environment itself is seen: neither this checkout nor the user's packages.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=clean | {"PYTHONNOUSERSITE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        named = " ".join(map(str, command))
        sys.exit(f"{named} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def tracked() -> set[str]:
    """Every file of the repository; none in an unpacked sdist, which has no git."""
    if not (REPOSITORY / ".git").exists():
        return set()
    return {name for name in run("git", "ls-files", "-z").split("\0") if name}


def build(scratch: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it, in dist/; one built from the tree holds the same."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST)
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", scratch)
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted(DIST.iterdir()))
    [sdist], [wheel], [other] = DIST.glob("*.tar.gz"), DIST.glob("*.whl"), scratch.glob("*.whl")
    if contents(wheel) != contents(other):
        sys.exit("the wheel built from the sdist is not the one built from the tree")
    return sdist, wheel


def contents(wheel: Path) -> dict[str, bytes]:
    """Name of each file in a wheel -> what it holds."""
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def check_files(sdist: Path, wheel: Path) -> None:
    """The wheel holds the package and nothing else, the sdist the whole repository."""
    files = tracked()
    package = {name.removeprefix("src/") for name in files if name.startswith(f"{PACKAGE}/")}
    held = {name for name in contents(wheel) if ".dist-info/" not in name}
    if not files:
        return print("no git here: the files of the archives are not compared")
    require_same("the wheel", held, package)
    with tarfile.open(sdist) as archive:
        packed = {one.name.partition("/")[2] for one in archive.getmembers() if one.isfile()}
    require_same("the sdist", packed - {"PKG-INFO"}, files)
    for archive in (sdist, wheel):
        print(f"{archive.name}: {archive.stat().st_size / 1e6:.1f} MB")


def require_same(name: str, held: set[str], wanted: set[str]) -> None:
    """End the check where an archive lacks files or holds others."""
    if held != wanted:
        sys.exit(f"{name} lacks {sorted(wanted - held)} and holds {sorted(held - wanted)}")


def install(wheel: Path, place: Path) -> Path:
    """A new environment with the wheel, without extras; the directory of its programs."""
    venv.create(place, with_pip=True)
    programs = place / ("Scripts" if sys.platform == "win32" else "bin")
    pip = [programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pinned = [*pip, "--constraint", REPOSITORY / "constraints.txt"]
    run(*pinned, "torch")
    run(*pinned, wheel)
    return programs


def check_commands(programs: Path, version: str, elsewhere: Path) -> None:
    """Every command explains itself, and the embedded model is there."""
    shortllm = programs / "shortllm"
    said = run(shortllm, "--version", cwd=elsewhere).strip()
    if said != version:
        sys.exit(f"shortllm --version says {said}, and the wheel is {version}")
    names = re.findall(r"^│ ([a-z][a-z-]*) ", run(shortllm, "--help", cwd=elsewhere), re.MULTILINE)
    if not names:
        sys.exit("shortllm --help lists no commands")
    names = [name for name in names if run(shortllm, name, "--help", cwd=elsewhere)]
    run(shortllm, "info", "embedded", "--no-probe", cwd=elsewhere)
    print(f"{len(names)} commands explain themselves: {', '.join(names)}")


def time_help(programs: Path, elsewhere: Path, rounds: int = 3) -> tuple[float, float]:
    """Seconds of `shortllm --help`, and of them those on a processor; the best of a few."""
    taken = []
    for _ in range(rounds):
        start, before = time.perf_counter(), os.times()
        run(programs / "shortllm", "--help", cwd=elsewhere)
        after, seconds = os.times(), time.perf_counter() - start
        busy = sum(after[2:4]) - sum(before[2:4])  # of the processes that were waited for
        taken.append((seconds, busy))
    return min(one for one, _ in taken), min(one for _, one in taken)


def main() -> None:
    """All of it; ends with 1 at the first thing that is wrong."""
    with tempfile.TemporaryDirectory(prefix="shortllm-release-") as scratch:
        elsewhere = Path(scratch)
        sdist, wheel = build(elsewhere / "from-tree")
        check_files(sdist, wheel)
        programs = install(wheel, elsewhere / "environment")
        print(run(programs / "python", "-c", ALONE, cwd=elsewhere), end="")
        check_commands(programs, wheel.name.split("-")[1], elsewhere)
        seconds, busy = time_help(programs, elsewhere)
    print(f"shortllm --help: {seconds:.2f} s, {busy:.2f} s on a processor; best of three")
    if busy > MOST_SECONDS:
        sys.exit(f"shortllm --help takes more than {MOST_SECONDS:g} s on a processor")


if __name__ == "__main__":
    main()
