"""Names of blocks in text: a module or tensor, a list of such names, or a pattern for some.

    model.layers.4.mlp.up_proj          a name: the number becomes the new one
    re:.*layers\\.(0|3|7)\\.mlp.*          a regular expression: so do the numbers that it allows
    model.layers.0.self_attn*           a pattern with wildcards: the same

Names under which files refer to a block differ by the program that wrote them (`model.layers`,
`language_model.model.layers`, `layers`), so a name is compared with the checkpoint's own by whole
parts. A rewritten pattern is tried on the names of all tensors and modules: it must match those
that the old one matched, in each of the ways that programs apply patterns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property

NUMBER = re.compile(r"(?<=[./\[])\d+(?=[./\]]|$)")
"""Where a name of a module may have the number of a block."""

SHORT = re.compile(r"((?:layer|block|blk)s?[ ._-]?)(\d+)", re.IGNORECASE)
"""Names such as `layer_3`."""

PLAIN = re.compile(r"(?:[\w./:@-]|\[\d+\])+")
"""Text that can only be a name."""

RANGE = re.compile(r"[.\[]\{?\d+[-:,]\d")
"""Where a name may have several numbers of blocks: `layers.0-5`, `layers.0,1`."""

PREFIX = re.compile(r"(?:re:|regex:|[-+]:)?")
"""What some programs put before a regular expression."""

CONTAINERS = {"layers", "layer", "h", "blocks", "block", "blk"}
"""Usual names of lists of blocks."""

NEUTRAL = {
    "backbone", "base_model", "decoder", "language_model", "llm", "lm", "model", "module",
    "text_model", "thinker", "transformer",
}  # fmt: skip
"""Parts of names before the decoder's list of blocks in one program or another."""

OTHERS = re.compile(r"vision|visual|image|audio|speech|encoder|mtp|nextn|eagle|draft|talker|former")
"""Words in the names of modules that have blocks of their own."""

OURS = {"own", "unclear"}
"""What a prefix may be said to name where it can be the checkpoint's own blocks."""

NEVER = "(?!)"
"""A regular expression that matches nothing."""

EDGE = r"(?!\d)"
"""A regular expression for the end of a number."""

MOST_NUMBERED = 12
"""Modules within a block that are numbered (experts): as many are tried."""

Leaf = tuple[int, int, str]
"""A part of a pattern: its start, its end, and the part before it."""

Matches = Callable[[str], tuple[bool, ...]]
"""Whether a pattern matches a name, in each of some ways."""


@dataclass(frozen=True, slots=True)
class Renamed:
    """What a text that refers to blocks becomes."""

    kind: str
    """`name` or `pattern`."""
    texts: tuple[str, ...] = ()
    """The new text; none if it speaks of removed blocks alone; several for one of a list."""
    problem: str = ""
    """Why it cannot be rewritten."""


@dataclass(frozen=True, slots=True)
class Matched:
    """What a pattern matches, name by name."""

    inside: list[bool]
    """Names of blocks, equally many of each."""
    outside: list[bool]
    blocks: int

    def is_uneven(self) -> bool:
        """Whether blocks differ in what of them is matched."""
        each = len(self.inside) // self.blocks
        parts = (self.inside[start : start + each] for start in range(0, len(self.inside), each))
        return len({tuple(part) for part in parts}) > 1


@dataclass(frozen=True)
class BlockTexts:
    """How texts name the blocks of a checkpoint, and what becomes of them."""

    prefixes: Sequence[str]
    """What is before a block's number in names of tensors and of modules."""
    tensors: Iterable[str]
    new_number: Mapping[int, int]
    """Number of each kept block, and of prediction heads behind the last -> the new one."""
    total: int
    """Blocks, and prediction heads numbered like them."""

    def renamed(self, text: str) -> Renamed | None:
        """What becomes of a text; None if it names no single block of the decoder."""
        if not re.search(r"\d|\\d", text):
            return None
        if any(self._kin(text[: one.start()]) in OURS for one in RANGE.finditer(text)):
            return Renamed("name", problem="it names several blocks at once")
        if PLAIN.fullmatch(text) or SHORT.fullmatch(text):
            return self._name(text)
        parts = re.split(r"(\s*[,;]\s*)", text)
        if len(parts) > 1 and all(map(PLAIN.fullmatch, parts[::2])):
            return self._list(parts[::2], parts[1])
        if re.search(r"\s", text):
            held = any(re.search(rf"{re.escape(p)}\.\d", text) for p in self.prefixes)
            return Renamed("name", problem="it names a block within other text") if held else None
        return self._pattern(text)

    # ---- names

    def _name(self, text: str) -> Renamed | None:
        for match in NUMBER.finditer(text):
            kin = self._kin(text[: match.start() - 1].replace("/", "."))
            if kin == "other":
                return None
            if kin == "unclear":
                return Renamed("name", problem="it is not clear whose block it names")
            if kin == "own":
                return self._numbered(text[: match.start()], match[0], text[match.end() :])
        for prefix in self.prefixes:
            flat = re.escape(prefix.replace(".", "_"))
            if found := re.fullmatch(rf"((?:.*_)?{flat}_)(\d+)((?:_.*)?)", text):
                return self._numbered(*found.groups())
        short = SHORT.fullmatch(text)
        return self._numbered(short[1], short[2], "") if short else None

    def _numbered(self, before: str, number: str, after: str) -> Renamed | None:
        if int(number) >= self.total:
            return None
        if int(number) not in self.new_number:
            return Renamed("name")
        new = str(self.new_number[int(number)])
        children = sorted({rest.split(".")[1] for rest in self._rests if rest.count(".") == 1})
        longer = any(str(n) != new and str(n).startswith(new) for n in self.new_number.values())
        if number != new and not after and longer and before.endswith(".") and children:
            # some programs take it for the start of a name: block 1 for blocks 10 to 19 too
            return Renamed("name", tuple(f"{before}{new}.{child}" for child in children))
        return Renamed("name", (before + new.zfill(len(number) * number.startswith("0")) + after,))

    def _list(self, names: Sequence[str], comma: str) -> Renamed | None:
        found = [self._name(name) for name in names]
        if problem := next((one.problem for one in found if one and one.problem), ""):
            return Renamed("name", problem=problem)
        if not any(found):
            return None
        texts = [
            text
            for name, one in zip(names, found, strict=True)
            for text in (one.texts if one else (name,))
        ]
        return Renamed("name", (comma.join(texts),) if texts else ())

    def _kin(self, prefix: str) -> str | None:
        """Whose blocks a prefix names: `own`, `other`, `unclear`; None if it names none."""
        if prefix in self.prefixes or prefix == "blk":
            return "own"
        if any(prefix == one or prefix.endswith("." + one) for one in self._other_prefixes):
            return "other"
        ours, theirs = (
            any(prefix.endswith("." + one) or one.endswith("." + prefix) for one in prefixes)
            for prefixes in (self.prefixes, self._other_prefixes)
        )
        if ours or theirs:
            return "unclear" if ours and theirs else "own" if ours else "other"
        *parts, last = prefix.split(".")
        if last not in self._containers:
            return None
        if OTHERS.search(prefix):
            return "other"
        return "own" if set(parts) <= NEUTRAL else "unclear"

    @cached_property
    def _containers(self) -> set[str]:
        return CONTAINERS | {prefix.rpartition(".")[2] for prefix in self.prefixes}

    @cached_property
    def _other_prefixes(self) -> set[str]:
        """What is before the first number in names of tensors outside the blocks."""
        found = {name[: m.start() - 1] for name in self.tensors if (m := NUMBER.search(name))}
        return found - set(self.prefixes)

    # ---- patterns

    def _pattern(self, text: str) -> Renamed | None:
        prefix = PREFIX.match(text)[0]  # type: ignore[index]
        body = text.removeprefix(prefix)
        tests = _tests(body, is_expression=bool(prefix))
        leaves = [one for one in _leaves(body, 0, len(body), "") if self._numbers(body, one)]
        known = [leaf for leaf in leaves if self._is_container(leaf[2])]
        if not tests:
            return None
        before = [self._matched(test(body), old=True) for test in tests]
        inside, outside = (
            any(any(matched) for matched in each)
            for each in ([one.inside for one in before], [one.outside for one in before])
        )
        stays = before == [self._matched(test(body), old=False) for test in tests]
        if stays and (not leaves or outside and not inside) or (not inside and OTHERS.search(body)):
            return None
        ways = [[], known, *([one] for one in leaves)] if inside or not known else [known]
        for chosen in ways:
            for edge, wide in (("", False), (EDGE, False), ("", True), (EDGE, True)):
                new = self._replaced(body, chosen, edge, wide)
                try:
                    after = [self._matched(test(new), old=False) for test in tests]
                except re.error:
                    continue
                if before != after:
                    continue
                if not inside and not outside and NEVER in new:
                    return Renamed("pattern")
                uneven = known or chosen or any(one.is_uneven() for one in before)
                return Renamed("pattern", (prefix + new,)) if uneven else None
        return Renamed("pattern", problem="it cannot be said with the new numbers")

    def _is_container(self, before: str) -> bool:
        words = re.findall(r"[A-Za-z]+", before)
        return bool(words) and words[-1] in self._containers

    def _numbers(self, body: str, leaf: Leaf, wide: bool | None = None) -> list[int]:
        """The block numbers that a part of a pattern allows, if not all or none.

        Args:
            wide: whether more digits may follow where the part allows any continuation.
        """
        if wide is None:
            return self._numbers(body, leaf, False) or self._numbers(body, leaf, True)
        core, tail = _split(body[leaf[0] : leaf[1]])
        try:
            test = re.compile(f"(?:{core})" + (".*" if wide and tail.strip("$") else ""))
        except re.error:
            return []
        found = [n for n in range(self.total) if core and test.fullmatch(str(n))]
        return [] if len(found) == self.total or test.fullmatch("mlp") else found

    def _replaced(self, body: str, leaves: Iterable[Leaf], edge: str, wide: bool) -> str:
        for leaf in sorted(leaves, reverse=True):
            old = self._numbers(body, leaf, wide)
            new = sorted(self.new_number[n] for n in old if n in self.new_number)
            core, tail = _split(body[leaf[0] : leaf[1]])
            opening = "(" if core.startswith("(") and not core.startswith("(?") else "(?:"
            several = f"{opening}{'|'.join(map(str, new))})"
            said = several if len(new) > 1 else "".join(map(str, new)) or NEVER
            start = "^" * core.startswith("^")
            body = f"{body[: leaf[0]]}{start}{said}{edge if tail else ''}{tail}{body[leaf[1] :]}"
        return body

    def _matched(self, matches: Matches, *, old: bool) -> Matched:
        """Which names of kept blocks, and of what is outside, a pattern matches."""
        inside = [matches(pair[0 if old else 1]) for pair in self._pairs]
        return Matched(
            [found for one in inside for found in one],
            [found for name in self._outside for found in matches(name)],
            len(self.new_number),
        )

    @cached_property
    def _rests(self) -> set[str]:
        """What follows a block's number in names of its tensors and modules."""
        found = {""}
        for name in self.tensors:
            match = NUMBER.search(name)
            if match and name[: match.start() - 1] in self.prefixes:
                rest = name[match.end() :]
                if all(int(n) < MOST_NUMBERED for n in NUMBER.findall(rest)):
                    found |= {rest[:end] for end, sign in enumerate(rest) if sign == "."} | {rest}
        return found

    @cached_property
    def _pairs(self) -> list[tuple[str, str]]:
        """Names of tensors and modules before and after, without those of removed blocks."""
        places = {*self.prefixes, *(p.rpartition(".")[2] for p in self.prefixes), "model.layers"}
        return [
            (f"{place}.{old}{rest}", f"{place}.{new}{rest}")
            for old, new in self.new_number.items()
            for place in sorted(places)
            for rest in sorted(self._rests)
        ]

    @cached_property
    def _outside(self) -> list[str]:
        own = tuple(prefix + "." for prefix in self.prefixes)
        return [name for name in self.tensors if not name.startswith(own)]


def _tests(body: str, *, is_expression: bool) -> list[Callable[[str], Matches]]:
    """The ways in which programs may apply a pattern; none if it is not one."""

    def expression(pattern: str) -> Matches:
        found = re.compile(pattern)
        return lambda name: tuple(
            one(name) is not None for one in (found.match, found.search, found.fullmatch)
        )

    def wildcards(pattern: str) -> Matches:
        found = re.compile(translate(pattern))
        return lambda name: (found.match(name) is not None,)

    only_expression = is_expression or re.search(r"[\\()|^$+{]", body) is not None
    tests: list[Callable[[str], Matches]] = [] if only_expression else [wildcards]
    if only_expression or not re.search(r"(?<![.\])])\*", body):
        try:
            re.compile(body)
        except re.error:
            return tests
        tests.append(expression)
    return tests


def _split(leaf: str) -> tuple[str, str]:
    """A part of a pattern without what allows any continuation, and that."""
    tail = re.search(r"(?:(?<=[\d\])])(?:\.\*|\.\+|\*)\D*|(?:\.\*|\.\+|\*|\$)+)$", leaf)
    return (leaf[: tail.start()], tail[0]) if tail else (leaf, "")


def _leaves(body: str, start: int, stop: int, before: str) -> Iterator[Leaf]:
    """The parts of a pattern between dots, `|` and groups with dots."""
    first, leaf, place = before, start, start
    while place < stop:
        sign, following = body[place], body[place + 1 : place + 2]
        end, inner = place + 1, None
        if sign == "\\":
            end = place + 2
        elif sign == "[":
            end = (body.find("]", place + 2, stop) + 1) or stop
        elif sign == "(":
            close = _closing(body, place, stop)
            head = re.compile(r"\((?:\?(?:[:=!]|<[=!]|P?<\w+>))?").match(body, place)
            inside = head.end() if head else place + 1
            end = close + 1
            inner = (inside, close) if re.search(r"\\?\.(?![*+?{])|/", body[inside:close]) else None
        divides = sign in "|/" or (sign == "\\" and following in ("/", "."))
        divides = divides or (sign == "." and following not in ("*", "+", "?", "{"))
        if divides or inner:
            if leaf < place:
                yield leaf, place, before
                before = body[leaf:place]
            if inner:
                yield from _leaves(body, *inner, before)
            before = first if sign == "|" else before
            leaf = end
        place = end
    if leaf < stop:
        yield leaf, stop, before


def _closing(body: str, place: int, stop: int) -> int:
    """Where the group that opens at `place` ends."""
    depth = 0
    while place < stop:
        if body[place] == "\\":
            place += 1
        elif body[place] in "()":
            depth += 1 if body[place] == "(" else -1
            if not depth:
                return place
        place += 1
    return stop
