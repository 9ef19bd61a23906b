"""The repository as a tree with a line per file, as CONTRIBUTING shows it.

A Python file is described by the first sentence of its docstring and a page by its heading; what
has neither, and what is described together, stands in `DESCRIBED`. After adding a file:

    python tests/file_tree.py --write
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "CONTRIBUTING.md"
BLOCK = re.compile(r"(?<=<!-- tree -->\n```text\n).*?(?=```\n<!-- /tree -->)", re.DOTALL)
PACKAGE = "src/shortllm"

DESCRIBED = {
    ".ci/run": "what continuous integration runs",
    ".github/workflows/docs.yml": "the documentation builds without a warning",
    ".github/workflows/publish.yml": "a tag is built, checked and published",
    ".github/workflows/tests.yml": "the same as .ci/run on the oldest and newest Python",
    ".gitignore": "what is no part of the repository",
    "CHANGELOG.md": "what users get, version by version",
    "CITATION.cff": "how to cite this and the paper behind it",
    "CONTRIBUTING.md": "how the code is laid out, how to add to it, habits, this tree",
    "LICENSE": "Apache-2.0",
    "Makefile": "environments, checks, runs",
    "README.md": "what it is, what it does, what was measured",
    "constraints.txt": "versions known to work together",
    "mkdocs.yml": "the site: theme, plugins, pages in their order",
    "pyproject.toml": "the package: dependencies, extras, tools",
    "benchmarks/gpu.sh": "the benchmarks of one GPU, one after the other",
    "docs/images/*": "pictures in the documents",
    "docs/schemas/*": "JSON schemas of recipes and result files",
    "docs/study.json": "the numbers of study.md",
    "docs/site.css": "how the site looks beside its theme",
    "docs/reproduce_perplexity.py": "the script of reproduce_perplexity.md",
    "docs/reproduce_ppl.py": "the script of reproduce_ppl.md",
    f"{PACKAGE}/py.typed": "says that the package carries types",
    f"{PACKAGE}/demo/page.css": "how the page looks",
    f"{PACKAGE}/embedded/model/*": "the embedded model, its tokenizer, how it was trained",
    f"{PACKAGE}/embedded/tasks/*": "its task sets, described for lm-evaluation-harness",
    f"{PACKAGE}/recipes/*.yaml": "a whole run each",
    f"{PACKAGE}/reporting/templates/*": "the page, its style, and the model card",
    f"{PACKAGE}/retraining/configs/*": "how `accelerate launch` shares a training out over 8 GPUs",
}
"""File, or pattern of files that share a line -> what the line says."""

PASSED_BY = {"PKG-INFO", "__pycache__", "build", "dist", "runs", "site", ".git"}
"""What else lies in a tree without git: what building, running and testing leave."""


def tracked() -> list[str]:
    """Every file of the repository; without git (an unpacked sdist) every file that is there."""
    if (REPOSITORY / ".git").exists():
        command = ["git", "ls-files", "-z"]
        listed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
        return [name for name in listed.stdout.split("\0") if name]
    found = []
    for directory, folders, files in os.walk(REPOSITORY):
        folders[:] = [one for one in folders if not _is_passed_by(one)]
        place = Path(directory).relative_to(REPOSITORY)
        found += [(place / name).as_posix() for name in files if not _is_passed_by(name)]
    return found


def _is_passed_by(name: str) -> bool:
    return name in PASSED_BY or fnmatch(name, "*.egg-info") or fnmatch(name, ".[vmprh]*")


def described(name: str) -> tuple[str, str]:
    """The line that a file belongs to, and what it says.

    Raises:
        LookupError: nothing says what the file is.
    """
    for pattern, text in DESCRIBED.items():
        if fnmatch(name, pattern):
            return pattern.removesuffix("*"), text
    path = REPOSITORY / name
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        text = " ".join(text.split("\n\n")[0].split())
    elif path.suffix == ".md":
        text = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    else:
        text = ""
    if not text:
        raise LookupError(f"{name} has no docstring. Write one, or describe it in {__file__}")
    return name, re.split(r"(?<=[a-z`)])\. ", text)[0].rstrip(".")


def tree() -> str:
    """A line per file below its folder; the files of a folder stand before its folders."""
    lines = dict(described(name) for name in tracked())
    text: list[str] = []
    folders: list[str] = []
    for name in sorted(lines, key=_place):
        *above, own = name.removesuffix("/").split("/")
        own += "/" * name.endswith("/")
        shared = len(os.path.commonprefix([folders, above]))
        for depth, folder in enumerate(above[shared:], start=shared):
            text.append(f"{'  ' * depth}{folder}/")
        folders = above
        text.append(f"{'  ' * len(above) + own:<32}{lines[name]}")
    return "\n".join(text) + "\n"


def _place(name: str) -> list[tuple[bool, bool, str]]:
    """What tree lines are sorted by: patterns behind the files they stand among."""
    *above, own = name.split("/")
    return [*((True, False, folder) for folder in above), (False, own.startswith("*"), own)]


def main() -> None:
    """Print the tree, or write it into CONTRIBUTING."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into CONTRIBUTING.md")
    if not parser.parse_args().write:
        print(tree(), end="")
        return
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(lambda _: tree(), page), encoding="utf-8")


if __name__ == "__main__":
    main()
