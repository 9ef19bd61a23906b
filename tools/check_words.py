"""Find retired words in documents, code, comments and identifiers: see tools/retired_words.txt.

    python tools/check_words.py            path:line: what was found -> what to write
    python tools/check_words.py --count    how often each is found, and in which files
    python tools/check_words.py FILE ...   in these files only

Exit code 1 if anything is found.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
LIST = Path(__file__).with_name("retired_words.txt")
READ = (
    "README.md", "CONTRIBUTING.md", "docs/*.md", "docs/*.py", "src/**/*.py", "src/**/*.yaml",
    "src/**/*.j2", "tools/**/*.py", "mkdocs.yml", "Makefile",
)  # fmt: skip
"""What is read: neither the history in CHANGELOG, nor data."""

DATA = {f"src/shortllm/embedded/{name}.py" for name in ("world", "words", "questions")}
"""Files whose words are the text that the embedded model was trained on."""

BLANK = r"""(?:[\s_#>*-]|"\s*f?")+"""
"""What a blank of a pattern matches: also a line break within a sentence, comment or string."""


@dataclass(frozen=True)
class Retired:
    """A pattern of the list."""

    source: str
    pattern: re.Pattern[str]
    advice: str


def retired_words() -> list[Retired]:
    """The patterns of the list, with word boundaries that identifiers have too."""
    found = []
    for line in LIST.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            source, _, advice = line.partition(" -> ")
            inner = source.replace(" ", BLANK)
            pattern = re.compile(rf"(?<![A-Za-z])(?:{inner})(?![A-Za-z])", re.IGNORECASE)
            found.append(Retired(source, pattern, advice))
    return found


def findings(path: Path, words: list[Retired]) -> Iterator[tuple[int, str, Retired]]:
    """Line, text and pattern of every match in a file."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", text)  # RunDirectory reads as Run_Directory
    for word in words:
        for match in word.pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield line, " ".join(match[0].split()), word


def paths(given: list[Path]) -> list[Path]:
    """The files to read, in order."""
    found = given or [path for pattern in READ for path in REPOSITORY.glob(pattern)]
    own = {path.resolve() for path in found}
    return sorted(path for path in own if path.relative_to(REPOSITORY).as_posix() not in DATA)


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--count", action="store_true", help="print sums only")
    arguments = parser.parse_args()
    words = retired_words()
    by_word: Counter[str] = Counter()
    by_file: Counter[str] = Counter()
    for path in paths(arguments.files):
        name = path.relative_to(REPOSITORY).as_posix()
        for line, text, word in sorted(findings(path, words), key=lambda one: one[0]):
            by_word[word.source] += 1
            by_file[name] += 1
            if not arguments.count:
                print(f"{name}:{line}: {text} -> {word.advice}")
    if arguments.count:
        for table in (by_word, by_file):
            print("\n".join(f"{count:5} {name}" for name, count in table.most_common()), "\n")
    if by_word:
        print(f"{by_word.total()} retired words in {len(by_file)} files", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
