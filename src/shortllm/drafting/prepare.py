"""What can be checked of a draft before the model is loaded: sizes, criterion, prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice, zip_longest
from pathlib import Path
from typing import Any

from shortllm import run_directory as rundir
from shortllm.benchmark.assisted import check_assisted
from shortllm.benchmark.prompts import load_prompts
from shortllm.checkpoint.config import context_length
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.criteria import Criterion, resolve
from shortllm.data.chat import Prompt
from shortllm.drafting.options import DraftOptions
from shortllm.errors import BudgetError, DataError, ShortLLMError
from shortllm.files import differs, require_free
from shortllm.format import counted
from shortllm.healing.heal import check_healable
from shortllm.healing.options import Healing
from shortllm.model import Session
from shortllm.pipeline import check_any_removal
from shortllm.pruning.budget import Budget, check_budget, removal_options
from shortllm.pruning.quality_target import sizes_of
from shortllm.pruning.records import PrunePlan
from shortllm.records import ModelInfo
from shortllm.retraining import setup
from shortllm.retraining.options import GENERATED
from shortllm.run_directory import HEALED
from shortllm.runtime import Runtime

RETRAINED = "retrained"
"""Directory of the draft that was trained, and its name."""

RECOVERY = {"healing", "retraining", "write"}
"""Options that can be added to a finished draft, and left out again."""

FEWEST_SAMPLES = 4
"""Samples to heal with: one of them is held out."""

FEWEST_TOKENS = 32
"""Tokens of such a sample."""


def default_directory(model: str) -> Path:
    """`runs/<model>-draft`."""
    return Path("runs") / f"{rundir.short_name(model)}-draft"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the intact model writes to."""

    words: list[str]
    """The same in words, by kind."""
    choosing: list[Prompt]
    held_out: list[Prompt]
    further: list[Prompt]
    """One for each text to heal and train with: the kinds take turns."""


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
    prompts: Asked
    tokenizer: Any
    plans: dict[int, PrunePlan] = field(default_factory=dict)

    @property
    def stages(self) -> int:
        """How many there are."""
        ways = sum(map(bool, (self.options.healing, self.options.retraining)))
        return 6 + (ways + 1 if ways else 0) + bool(self.options.further_texts)

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
    of_criterion = _at_temperature(criterion, of_criterion, options.temperature)
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
    if options.write is not None and not options.further_texts:
        why = (
            "as they read text of their own" if options.recovers else "without --heal or --retrain"
        )
        raise ShortLLMError(f"--write has no effect {why}. Leave it out")
    if options.retraining is not None:
        data = options.retraining.data or GENERATED  # by the intact model, later on
        setup.check(
            checkpoint, options.retraining.model_copy(update={"data": data}), session=session
        )
        require_free(directory / RETRAINED, "retrain.json")
    if options.healing is not None:
        require_free(directory / HEALED, Healing.FILE)
    prompts = _asked(checkpoint, options)
    if options.heals_on_written:
        _check_enough(prompts.further, options)
    recovery = options.model_dump(mode="json", include=RECOVERY, exclude_none=True)
    if options.further_texts:
        recovery["write"] = options.further_texts
    choices = {
        "model": checkpoint.id,
        "criterion": criterion,
        "options": chosen.options,
        "sizes": sizes,
        **options.model_dump(mode="json", exclude=RECOVERY),
        **runtime.model_dump(mode="json"),
        **recovery,
    }
    rundir.claim_directory(directory, checkpoint, choices)
    if options.healing is not None:
        check_healable(options.healing, checkpoint, session)
    earlier = rundir.run_file(directory).get("recipe", {})
    kept = {} if differs(earlier, choices) else {n: earlier[n] for n in RECOVERY & earlier.keys()}
    rundir.write_run_file(directory, {**kept, **choices}, checkpoint, command)
    return Run(
        directory=directory,
        checkpoint=checkpoint,
        source=model,
        revision=revision,
        session=session,
        options=options,
        criterion=chosen,
        sizes=sizes,
        prompts=prompts,
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


def _at_temperature(
    criterion: str, given: Mapping[str, Any], temperature: float
) -> Mapping[str, Any]:
    """The options of a criterion, which measures drafts as they will be sampled. For greedy text it
    keeps its own temperature: few tokens change when one block goes, and their number says less
    than the probabilities do."""
    if temperature == 0 or "temperature" not in resolve(criterion, given).options:
        return given
    return {"temperature": temperature, **given}


def _asked(checkpoint: Checkpoint, options: DraftOptions) -> Asked:
    """The prompts of each kind: of the first ones, every other one is to measure on."""
    found = load_prompts(checkpoint, options.prompts, options.texts + options.further_texts)
    firsts = [one.prompts[: options.texts] for one in found]
    for one, prompts in zip(found, firsts, strict=True):
        if len(prompts) < 2:
            raise DataError(
                f"{one.source} has one prompt, and a draft is measured on other texts than it is "
                "chosen by. Give --prompts that have more"
            )
    choosing = [prompt for prompts in firsts for prompt in prompts[::2]]
    held_out = [prompt for prompts in firsts for prompt in prompts[1::2]]
    own = [[*one.prompts[: options.texts : 2], *one.prompts[options.texts :]] for one in found]
    others = [prompt for turn in zip_longest(*own) for prompt in turn if prompt is not None]
    further = list(islice(cycle(others), options.further_texts))
    room = context_length(checkpoint.config) or math.inf
    longest = max(len(one.ids) for one in (*choosing, *held_out, *further))
    if longest + options.new_tokens > room:
        raise DataError(
            f"{longest} tokens of a prompt and {options.new_tokens} new ones exceed the {room} "
            f"positions of {checkpoint.id}. Give --new-tokens {int(room) - longest} or less"
        )
    longest = max(len(one.ids) for one in (*choosing, *held_out))
    check_assisted(checkpoint.config, checkpoint.config, longest + options.new_tokens)
    words = [
        f"{counted(len(prompts), 'prompt')} ({one.kind}) from {one.source}"
        + (", in the format of Alpaca" if one.template == "alpaca" else "")
        for one, prompts in zip(found, firsts, strict=True)
    ]
    return Asked(words=words, choosing=choosing, held_out=held_out, further=further)


def _check_enough(prompts: Sequence[Prompt], options: DraftOptions) -> None:
    """Refuse to heal on less text than a few samples have."""
    most = sum(len(one.ids) + options.new_tokens for one in prompts)
    if most < FEWEST_SAMPLES * FEWEST_TOKENS:
        raise DataError(
            f"{counted(len(prompts), 'text')} with {options.new_tokens} new tokens are {most} "
            f"tokens with their prompts, and {FEWEST_SAMPLES * FEWEST_TOKENS} or more are needed "
            "to heal with. Give a higher --write or --new-tokens"
        )
