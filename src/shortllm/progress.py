"""How far the work is: a bar on a terminal, lines in a log, and the log of a run.

    with numbered_stages():            a run: its stages are numbered
        expect_stages(6)
        with stage("score"):           [1/6] score
            with progress("scoring by ppl", total) as advance:
                advance(work)

A stage writes a line when its first task begins, one a minute, and one when it ends, to the log of
this module. The command line shows them where standard error goes to a file, and a bar on a
terminal; notebooks have bars too. Every public function is a stage of its own, unless it is called
within one.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Event, Thread

from shortllm.format import duration, plain
from shortllm.runtime import is_main_process

log = logging.getLogger(__name__)

Advance = Callable[[float], None]
"""Called with the amount of work done since its last call, as `progress` yields it."""

LINE_EVERY_S = 60.0

LEAST_PART = 0.01
"""Part of the work from which on the rest of the time is estimated."""


@dataclass(slots=True)
class _Sequence:
    """Stages that are counted together."""

    count: int | None = None
    """None where it is not known yet."""
    begun: int = 0
    since: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class _Task:
    """Work of a known amount."""

    name: str
    total: float
    done: float = 0.0
    since: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        """'healing 34%, 1.9 min left'."""
        part, elapsed = self.done / self.total if self.total else 0.0, time.monotonic() - self.since
        left = f", {_lasting(elapsed / part - elapsed)} left" if part >= LEAST_PART else ""
        return f"{self.name} {part:.0%}{left}"


@dataclass(slots=True)
class _Stage:
    """What is being done, as the user knows it."""

    name: str
    sequence: _Sequence
    number: int
    since: float = field(default_factory=time.monotonic)
    task: _Task | None = None
    announced: bool = False
    over: Event = field(default_factory=Event)

    def __str__(self) -> str:
        """'[2/6] heal'."""
        return f"[{self.number}/{self.sequence.count or '?'}] {self.name}"

    @property
    def elapsed(self) -> str:
        """How long ago the first stage began."""
        return f"{_since(self.sequence.since)} elapsed"

    def begin(self) -> None:
        """Say that it begins, once."""
        if not self.announced:
            self.announced = True
            log.info("%s begins, %s", self, self.elapsed)

    def tell_now_and_then(self) -> None:
        """Say how far it is, every minute until it is over."""
        while not self.over.wait(LINE_EVERY_S):
            if self.announced:
                task = f": {self.task}" if self.task is not None else ""
                log.info("%s%s, %s", self, task, self.elapsed)
            self.begin()

    def end(self) -> None:
        """Say how long it took."""
        log.info("%s done in %s, %s", self, _since(self.since), self.elapsed)


_sequence: ContextVar[_Sequence | None] = ContextVar("sequence", default=None)
_stage: ContextVar[_Stage | None] = ContextVar("stage", default=None)
_bars: ContextVar[bool] = ContextVar("bars", default=True)


@contextmanager
def without_bars() -> Iterator[None]:
    """No bars within the context, on a terminal too."""
    token = _bars.set(False)
    try:
        yield
    finally:
        _bars.reset(token)


@contextmanager
def numbered_stages(count: int | None = None) -> Iterator[None]:
    """Number the stages within the context; `expect_stages` says how many, if that is not known."""
    outer = _stage.get()
    if outer is not None:
        outer.over.set()  # those within speak for it
    tokens = _sequence.set(_Sequence(count)), _stage.set(None)
    try:
        yield
    finally:
        _sequence.reset(tokens[0])
        _stage.reset(tokens[1])


def expect_stages(count: int) -> None:
    """How many stages there will be in all."""
    sequence = _sequence.get()
    if sequence is not None:
        sequence.count = count


@contextmanager
def stage(name: str, *, delayed: bool = False) -> Iterator[None]:
    """A part of the work that has a number; within another stage it belongs to that one.

    Args:
        delayed: say that it begins with its first task or after a minute, since it may end at once
            with a mistake of the user.
    """
    if _stage.get() is not None or not is_main_process():
        yield
        return
    sequence = _sequence.get() or _Sequence(1)
    sequence.begun += 1
    one = _Stage(name, sequence, sequence.begun)
    token = _stage.set(one)
    Thread(target=one.tell_now_and_then, daemon=True).start()
    try:
        if not delayed:
            one.begin()
        yield
        if not one.over.is_set() and (one.announced or _sequence.get() is not None):
            one.end()
    finally:
        one.over.set()
        _stage.reset(token)


@contextmanager
def call_of(function: str) -> Iterator[None]:
    """The stage of a public function, unless it was called within one or within a run."""
    if _sequence.get() is not None:
        yield
        return
    with stage(function, delayed=True):
        yield


@contextmanager
def progress(task: str, total: float) -> Iterator[Advance]:
    """A task of the current stage, with a bar on a terminal; nothing within another task.

    Yields a function to call with the amount of work done since its last call.
    """
    current = _stage.get()
    if not is_main_process() or (current is not None and current.task is not None):
        yield lambda amount: None
        return
    with stage(task):
        one = _stage.get()
        assert one is not None
        one.begin()
        log.debug("%s: %s", one, task)
        one.task = own = _Task(task, total)
        has_bar = (sys.stderr.isatty() or _in_notebook()) and _bars.get()
        try:
            with _bar(one, own) if has_bar else nullcontext(lambda amount: None) as draw:

                def advance(amount: float) -> None:
                    amount = min(amount, total - own.done)  # which may have been an estimate
                    own.done += amount
                    draw(amount)

                yield advance
        finally:
            one.task = None


@contextmanager
def _bar(one: _Stage, task: _Task) -> Iterator[Advance]:
    """A bar with the name and number of the stage, and the time left."""
    named = f"{one}" if one.name == task.name else f"{one}: {task.name}"
    if _in_notebook():  # where rich shows none without ipywidgets
        from tqdm.auto import tqdm

        form = "{l_bar}{bar}| {elapsed} elapsed, {remaining} left"
        with tqdm(total=task.total, desc=named, leave=False, bar_format=form) as drawn:
            yield drawn.update
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(file=sys.stderr),
        transient=True,
    )
    with bar:
        number = bar.add_task(named, total=task.total)
        yield lambda amount: bar.advance(number, amount)


def _in_notebook() -> bool:
    """Whether the code runs in the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def _since(start: float) -> str:
    return _lasting(time.monotonic() - start)


def _lasting(seconds: float) -> str:
    """'45 s', '3.1 min'."""
    return plain(duration(seconds)) if seconds >= 120 else f"{seconds:.0f} s"
