"""Targets of quality: the most blocks that these allow, found by trying some numbers of them.

    bypassed   several removals in one walk, in memory               -> where to begin
    written    each as the run does it: pruned, healed, retrained,   -> what is taken
               quantized, and measured as `eval` does

`plan` stops after the first. What was measured is in a file, so an interrupted run continues
with the next number. The checkpoints of the best number so far are kept, and become those of the
run.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from shortllm.checkpoint.source import Checkpoint
from shortllm.errors import BudgetError, NotFiniteError, TargetMissedError
from shortllm.evaluation.evaluate import evaluate_models
from shortllm.evaluation.options import EvaluatedModel, EvaluationOptions
from shortllm.evaluation.quality import Requirement, judged
from shortllm.evaluation.texts import EvaluationText
from shortllm.files import PARTIAL
from shortllm.format import counted
from shortllm.model import Session
from shortllm.model.walk import sample_nlls, walk_flops
from shortllm.progress import progress
from shortllm.pruning.budget import Budget
from shortllm.pruning.quality_target import (
    BYPASSED,
    TOGETHER,
    QualityTarget,
    SizeTried,
    most_that_meet,
    require_found,
)
from shortllm.pruning.records import PrunePlan
from shortllm.records import load_current

if TYPE_CHECKING:
    from shortllm.evaluation.tasks import TaskSet

log = logging.getLogger(__name__)

SIZES = f"sizes{PARTIAL}"
"""Directory of a run with what was written of the numbers of blocks that are tried."""


@dataclass(kw_only=True, eq=False)
class SizeSearch:
    """The numbers of blocks that can be removed, and how one of them is tried."""

    directory: Path
    """Of the run."""
    file: str = QualityTarget.FILE
    """The name of what the search writes there."""
    checkpoint: Checkpoint
    session: Session
    budget: Budget
    """With targets of quality, and a number of blocks where a target of size needs that many."""
    sizes: Sequence[int]
    plan_of: Callable[[int], PrunePlan]
    text: EvaluationText
    evaluation: EvaluationOptions
    fingerprint: str
    searched: bool = False
    """Whether each plan takes a search of its own."""
    write: Callable[[Path, PrunePlan], tuple[str, Checkpoint]] | None = None
    """Writes the checkpoints of a run into a directory; name and files of the last one. Without it,
    blocks are bypassed alone."""
    recovers: bool = False
    """Whether what is written is healed, retrained or quantized."""
    tasks: TaskSet | None = None
    hints: Sequence[str] = ()
    """What else may meet the targets."""
    found: QualityTarget = field(init=False)

    def __post_init__(self) -> None:
        self.found = load_current(QualityTarget, self._file, self.fingerprint) or QualityTarget(
            model=self.checkpoint.info(),
            asked=self.budget.quality(),
            at_least=self.budget.remove,
            fingerprint=self.fingerprint,
        )

    @property
    def _file(self) -> Path:
        return self.directory / self.file

    def run(self) -> int:
        """The most blocks that can be removed; the file says what was measured."""
        start, sizes = None, self.sizes
        if self.budget.max_ppl_increase is not None:  # tasks are not for models in pieces
            together = 1 if self.searched else TOGETHER
            start = most_that_meet(self._bypassed, sizes, together=together)
            if not self.recovers:  # what is written computes the same
                sizes = [size for size in sizes if start is not None and size <= start]
        remove = start
        sizes = [size for size in sizes if size >= (self.budget.remove or 0)]
        if self.write is not None and sizes:
            if self.budget.max_ppl_increase is not None:
                start = max(start or 0, sizes[0])
            remove = most_that_meet(self._written, sizes, start=start)
        self._save(remove=remove)
        try:
            found = require_found(self.found, hints=self.hints)
        except TargetMissedError:
            if not self.searched:  # scores of searches stay
                discard_rooms(self.directory)
            raise
        log.info("%s", self.found.described)
        return found

    def take(self, number: int) -> None:
        """Make what was written of a number of blocks that of the run, and delete the rest."""
        for path in self._room(number).glob("*"):
            target = self.directory / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        discard_rooms(self.directory)

    def _room(self, number: int) -> Path:
        return room_of(self.directory, number)

    def _save(self, *, remove: int | None = None, tried: Collection[SizeTried] = ()) -> None:
        update = {"tried": [*self.found.tried, *tried], "remove": remove}
        self.found = self.found.model_copy(update=update)
        self.found.save(self._file)

    @cached_property
    def _intact(self) -> EvaluatedModel:
        return self._measured("original", self.checkpoint)

    def _measured(self, name: str, checkpoint: Checkpoint) -> EvaluatedModel:
        options = self.evaluation.model_copy(update={"continuations": 0, "probe": False})
        tasks = self.tasks if self.budget.min_task_mean is not None else None
        [found] = evaluate_models(
            [(name, checkpoint)], [self.text], options, session=self.session, tasks=tasks
        ).models
        return found

    def _tried(
        self, plan: PrunePlan, name: str, measure: Callable[[], EvaluatedModel], targets: Budget
    ) -> SizeTried:
        intact, requirements = self._intact, list[Requirement]()
        with suppress(NotFiniteError):  # it misses every target
            requirements = judged(targets, measure(), intact)
        one = SizeTried(
            remove=len(plan.removed),
            removed=plan.removed,
            model=name,
            requirements=requirements,
        )
        met = "meets the target" if one.passed else "misses the target"
        log.info("without %s, %s: %s, %s", counted(one.remove, "block"), one.model, one.said, met)
        return one

    def _bypassed(self, sizes: Sequence[int]) -> list[bool]:
        """Measure the perplexity of removals in memory, all in one walk."""
        new = [n for n in sizes if self.found.find(n, bypassed=True) is None]
        if new:
            intact = self._intact
            plans, ids_ST = [self.plan_of(n) for n in new], self.text.segments.ids
            removals = [frozenset(plan.removed) for plan in plans]
            decoder = self.session.decoder(self.checkpoint)
            work = walk_flops(decoder, removals, *ids_ST.shape)
            named = ", ".join(map(str, new))
            with progress(f"perplexity without {named} blocks", work) as advance:
                nlls_MS = sample_nlls(
                    decoder, ids_ST, removals, memory=self.session.memory(), advance=advance
                )
            targets = self.budget.model_copy(update={"min_task_mean": None})

            def measured(nlls: list[float]) -> EvaluatedModel:
                return intact.model_copy(update={"perplexity": [self.text.perplexity(nlls)]})

            pairs = zip(plans, nlls_MS.tolist(), strict=True)
            self._save(
                tried=[
                    self._tried(plan, BYPASSED, partial(measured, nlls), targets)
                    for plan, nlls in pairs
                ]
            )
        return self._passed(sizes, bypassed=True)

    def _written(self, sizes: Sequence[int]) -> list[bool]:
        """Write the checkpoints of a run for each size, and measure the last one."""
        assert self.write is not None
        for number in sizes:
            if self.found.find(number, bypassed=False) is not None:
                continue
            plan = self.plan_of(number)
            name, checkpoint = self.write(self._room(number), plan)
            measure = partial(self._measured, name, checkpoint)
            self._save(tried=[self._tried(plan, name, measure, self.budget)])
            self._discard_worse()
        return self._passed(sizes, bypassed=False)

    def _passed(self, sizes: Sequence[int], *, bypassed: bool) -> list[bool]:
        found = [self.found.find(number, bypassed=bypassed) for number in sizes]
        return [one is not None and one.passed for one in found]

    def _discard_worse(self) -> None:
        """Keep the checkpoints of the largest number that meets the targets; scores all stay."""
        met = [one.remove for one in self.found.tried if one.model != BYPASSED and one.passed]
        best = self._room(max(met)) if met else None
        for room in (self.directory / SIZES).iterdir():
            if room != best:
                for checkpoint in (path for path in room.iterdir() if path.is_dir()):
                    shutil.rmtree(checkpoint)


def plans_of(sizes: Sequence[int], plan_of: Callable[[int], PrunePlan]) -> dict[int, PrunePlan]:
    """The plan of each number of blocks that has one; a span, or a searched set, may lack some."""
    plans, problem = {}, None
    for number in sizes:
        try:
            plans[number] = plan_of(number)
        except BudgetError as error:
            problem = problem or error
    if not plans and problem is not None:
        raise problem
    return plans


def discard_rooms(directory: Path) -> None:
    """Delete what a run wrote of the numbers of blocks that it tried."""
    shutil.rmtree(directory / SIZES, ignore_errors=True)


def room_of(directory: Path, number: int) -> Path:
    """Where a run keeps what it writes of a number of blocks that it tries."""
    return directory / SIZES / str(number)
