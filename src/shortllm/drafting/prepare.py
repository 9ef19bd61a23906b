"""What can be checked of a draft before the model is loaded: sizes, criterion, prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortllm import run_directory as rundir
from shortllm.benchmark.prompts import load_prompts
from shortllm.checkpoint.config import context_length
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.criteria import Criterion, resolve
from shortllm.data.chat import Prompt
from shortllm.drafting.options import TRAINING_TEXTS, DraftOptions
from shortllm.errors import BudgetError, DataError, ShortLLMError
from shortllm.files import require_free
from shortllm.format import counted
from shortllm.healing.heal import check_healable
from shortllm.healing.options import Healing
from shortllm.model import Session
from shortllm.pipeline import check_any_removal
from shortllm.pruning.budget import Budget, check_budget, removal_options
from shortllm.pruning.quality_target import sizes_of
from shortllm.pruning.records import PrunePlan
from shortllm.records import ModelInfo
from shortllm.run_directory import HEALED
from shortllm.runtime import Runtime

RETRAINED = "retrained"
"""Directory of the draft that was trained, and its name."""


def default_directory(model: str) -> Path:
    """`runs/<model>-draft`."""
    return Path("runs") / f"{rundir.short_name(model)}-draft"


@dataclass(slots=True, kw_only=True)
class Run:
    """A draft whose inputs have been read and checked; nothing heavy has been done."""

    directory: Path
    checkpoint: Checkpoint
    source: str
    """The model as it was given."""
    revision: str | None
    session: Session
    options: DraftOptions
    criterion: Criterion
    sizes: list[int]
    asked: list[str]
    """What the model writes to, in words."""
    prompts: list[Prompt]
    training_prompts: list[Prompt]
    tokenizer: Any
    plans: dict[int, PrunePlan] = field(default_factory=dict)

    @property
    def stages(self) -> int:
        """How many there are."""
        ways = sum(map(bool, (self.options.healing, self.options.retraining)))
        return 6 + (2 + ways if ways else 0)

    @property
    def model(self) -> Any:
        """The intact model, in memory."""
        return self.session.decoder(self.checkpoint).model


def prepare(
    model: str,
    options: DraftOptions,
    runtime: Runtime,
    criterion: str,
    of_criterion: Mapping[str, Any],
    out: Path | None,
    revision: str | None,
    command: Sequence[str],
) -> Run:
    """Read, check and resolve everything before the first heavy step, and write run.json."""
    directory, session = out or default_directory(model), Session(runtime)
    checkpoint = open_checkpoint(model, revision=rundir.pinned(model, revision, directory))
    info, chosen = checkpoint.info(), resolve(criterion, of_criterion)
    sizes = _sizes(options, info, searched=chosen.needs == "sets")
    amount = removal_options(chosen, budget_of(options, sizes[-1]), info)
    chosen = resolve(criterion, {**amount, **of_criterion})
    check_any_removal(checkpoint, budget_of(options, sizes[0]))
    if session.streams(checkpoint):
        raise ShortLLMError(
            f"{checkpoint.id} does not fit into memory, and a draft is chosen by what the whole "
            "model writes. Use a smaller --dtype or another --device"
        )
    if options.write is not None and not options.recovers:
        raise ShortLLMError("--write has no effect without --heal or --retrain. Leave it out")
    if options.retraining is not None:
        options.retraining.about.require_packages()
        require_free(directory / RETRAINED, "retrain.json")
    if options.healing is not None:
        require_free(directory / HEALED, Healing.FILE)
        check_healable(options.healing, checkpoint, session)
    asked, prompts, training_prompts = _asked(checkpoint, options)
    choices = {
        "model": checkpoint.id,
        "criterion": criterion,
        "options": chosen.options,
        **options.model_dump(mode="json", exclude_none=True),
        **runtime.model_dump(mode="json"),
    }
    rundir.claim_directory(directory, checkpoint, choices)
    rundir.write_run_file(directory, choices, checkpoint, command)
    return Run(
        directory=directory,
        checkpoint=checkpoint,
        source=model,
        revision=revision,
        session=session,
        options=options,
        criterion=chosen,
        sizes=sizes,
        asked=asked,
        prompts=prompts,
        training_prompts=training_prompts,
        tokenizer=load_tokenizer(checkpoint),
    )


def budget_of(options: DraftOptions, remove: int) -> Budget:
    """A number of blocks, with the blocks that the options protect."""
    ends = options.model_dump(include={"protect_first", "protect_last", "period_aligned"})
    return Budget.model_validate({"remove": remove, **ends})


def _sizes(options: DraftOptions, model: ModelInfo, *, searched: bool) -> list[int]:
    """The numbers of blocks to try; of a search, which takes long, those to measure alone."""
    if options.remove is not None:
        check_budget(budget_of(options, options.remove), model)
        return [options.remove]
    sizes = sizes_of(budget_of(options, 1), model)
    low, high = (round(part * model.blocks) for part in (options.least, options.most))
    found = [number for number in sizes if low <= number <= max(high, 1)]
    if not found:
        raise BudgetError(
            f"no draft has {low} to {high} of {model.blocks} blocks removed: the numbers that can "
            f"be removed are {sizes[0]} to {sizes[-1]}. Change --least or --most, or pass "
            "--protect-first 0 --protect-last 0"
        )
    return spread(found, options.measured) if searched else found


def spread(sizes: Sequence[int], count: int, best: int | None = None) -> list[int]:
    """Some of the sizes, as evenly as can be, and the best one in the place of its neighbour."""
    last, count = len(sizes) - 1, min(count, len(sizes))
    picked = {round(last * n / max(count - 1, 1)) for n in range(count)}
    if best is not None and (place := sizes.index(best)) not in picked:
        picked.remove(min(picked, key=lambda one: abs(one - place)))
        picked.add(place)
    return [sizes[place] for place in sorted(picked)]


def _asked(
    checkpoint: Checkpoint, options: DraftOptions
) -> tuple[list[str], list[Prompt], list[Prompt]]:
    """What the model is to write to, in words; the prompts; and those of texts to train with."""
    more = (options.write or TRAINING_TEXTS) if options.recovers else 0
    found = load_prompts(checkpoint, options.prompts, options.texts + more)
    asked = [prompt for one in found for prompt in one.prompts[: options.texts]]
    if len(asked) < 2:
        raise DataError(
            f"{found[0].source} has one prompt, and a draft is measured on other texts than it is "
            "chosen by. Give more --prompts"
        )
    room = context_length(checkpoint.config) or math.inf
    longest = max(len(one.ids) for one in asked)
    if longest + options.new_tokens > room:
        raise DataError(
            f"{longest} tokens of a prompt and {options.new_tokens} new ones exceed the {room} "
            f"positions of {checkpoint.id}. Give --new-tokens {int(room) - longest} or less"
        )
    others = [prompt for one in found for prompt in one.prompts[options.texts :]]
    words = [
        f"{counted(len(one.prompts[: options.texts]), 'prompt')} ({one.kind}) from {one.source}"
        + (", in the format of Alpaca" if one.template == "alpaca" else "")
        for one in found
    ]
    return words, asked, [*asked[::2], *others]
