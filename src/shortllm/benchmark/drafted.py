"""How fast a model writes with the help of drafts, against the model alone.

    for each kind of prompts, for each new-token length:
        runs    alone, draft A, draft B | draft A, draft B, alone | ...    one text after the other

Each draft comes with each number of drafted tokens. Greedy text with a draft must be that of the
model alone, token by token; from a near tie of the two likeliest tokens on it may differ, which is
counted.

    shortllm bench MODEL --draft SHORT --draft-tokens 2,4,8
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shortllm.benchmark.assisted import (
    AssistedText,
    check_assisted,
    differs_by_a_tie,
    generate_assisted,
    generate_plain,
)
from shortllm.benchmark.bench import load_on_cpu, require_room
from shortllm.benchmark.interleaved import in_turn
from shortllm.benchmark.meters import bounded_memory, is_out_of_memory, meter_of
from shortllm.benchmark.options import (
    BenchmarkOptions,
    Drafted,
    DraftedMeasurement,
    DraftedOptions,
    DraftModel,
)
from shortllm.benchmark.prompts import Prompts, load_prompts
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.data.chat import Prompt
from shortllm.errors import CheckpointError, ShortLLMError
from shortllm.evaluation.statistics import standard_error
from shortllm.files import fingerprint
from shortllm.model import Session
from shortllm.progress import progress

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRuns:
    """A model and what is to draft for it, checked and not loaded yet."""

    checkpoint: Checkpoint
    drafts: Mapping[str, Checkpoint]
    prompts: Sequence[Prompts]
    options: BenchmarkOptions
    drafted: DraftedOptions

    def fingerprint(self, session: Session) -> str:
        """Of everything the figures depend on, except for other work on the machine."""
        models = [(None, self.checkpoint), *self.drafts.items()]
        return fingerprint(
            {
                "models": [(name, one.fingerprint) for name, one in models],
                "prompts": [[(p.ids, p.ends) for p in one.prompts] for one in self.prompts],
                "options": self.options.model_dump(mode="json", exclude={"batches", "prompt"}),
                "drafted": self.drafted.model_dump(mode="json"),
                "dtype": [session.dtype(one) for _, one in models],
                "device": [session.device.type, meter_of(session.device).name],
                "threads": torch.get_num_threads(),
            }
        )


def check_drafts(
    checkpoint: Checkpoint,
    drafts: Mapping[str, Checkpoint],
    options: BenchmarkOptions,
    drafted: DraftedOptions,
) -> DraftRuns:
    """The measurement to make, after checking that it can begin."""
    if options.compile:
        raise ShortLLMError(
            "--compile generates with a static cache, from which tokens that were not accepted "
            "cannot be taken back. Leave out --compile, or --draft"
        )
    for name, draft in drafts.items():
        require_same_tokens(checkpoint, draft, name)
    prompts = load_prompts(checkpoint, drafted.prompts)
    longest = max(len(one.ids) for kind in prompts for one in kind.prompts)
    for one in (checkpoint, *drafts.values()):
        require_room(one, longest, options)
    for draft in drafts.values():
        check_assisted(checkpoint.config, draft.config, longest + max(options.new_tokens))
    if any(kind.template == "alpaca" for kind in prompts):
        log.info("%s has no chat template: requests are in the format of Alpaca", checkpoint.id)
    return DraftRuns(
        checkpoint=checkpoint, drafts=drafts, prompts=prompts, options=options, drafted=drafted
    )


def require_same_tokens(checkpoint: Checkpoint, draft: Checkpoint, name: str) -> None:
    """Refuse a draft whose token ids mean something else."""
    hint = "A draft needs the tokens of its model: give one made from it by `draft` or `prune`"
    if checkpoint.vocabulary != draft.vocabulary:
        raise CheckpointError(
            f"the draft {name} has a vocabulary of {draft.vocabulary} and {checkpoint.id} one of "
            f"{checkpoint.vocabulary}. {hint}"
        )
    own, other = (load_tokenizer(one).get_vocab() for one in (checkpoint, draft))
    for token in sorted({*own.items()} ^ {*other.items()})[:1]:
        raise CheckpointError(
            f"the tokenizers of {checkpoint.id} and of the draft {name} differ, for example in "
            f"token {token[1]} ('{token[0]}'). {hint}"
        )


def measure_drafts(asked: DraftRuns, session: Session) -> Drafted:
    """Every draft with each number of drafted tokens, on each kind of prompts."""
    options, drafted = asked.options, asked.drafted
    try:
        with bounded_memory(session.device):
            model, *others = (
                load_on_cpu(one, options.attention, session).to(session.device)
                for one in (asked.checkpoint, *asked.drafts.values())
            )
            writers = [
                _Writer(draft=name, draft_tokens=length, live=live)
                for name, live in zip(asked.drafts, others, strict=True)
                for length in dict.fromkeys(drafted.draft_tokens)
            ]
            found = _all_kinds(model, writers, asked)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ShortLLMError(
            f"{asked.checkpoint.id} and its drafts do not fit into memory together. Give fewer "
            "drafts, or a smaller --dtype"
        ) from error
    return Drafted(
        drafts=[DraftModel(name=name, model=one.info()) for name, one in asked.drafts.items()],
        measurements=found,
        temperature=drafted.temperature,
        fingerprint=asked.fingerprint(session),
    )


@dataclass(slots=True, kw_only=True)
class _Writer:
    """A draft with a number of drafted tokens, and what was written with it."""

    draft: str
    draft_tokens: int
    live: Any
    texts: list[AssistedText] = field(default_factory=list)
    ties: set[int] = field(default_factory=set)
    """Numbers of the texts that differ from a near tie on."""


def _all_kinds(
    model: Any, writers: Sequence[_Writer], asked: DraftRuns
) -> list[DraftedMeasurement]:
    """The measurements of all kinds of prompts and all lengths."""
    options, found = asked.options, []
    cells = [
        (kind, new_tokens)
        for kind in asked.prompts
        for new_tokens in dict.fromkeys(options.new_tokens)
    ]
    runs = len(cells) * (options.warmup + options.runs) * (1 + len(writers))
    with progress("measuring with drafts", runs) as advance:
        for kind, new_tokens in cells:
            alone = _take_turns(model, writers, kind, new_tokens, asked, lambda: advance(1))
            found += [_measurement(alone, writer, kind, new_tokens) for writer in writers]
    return found


def _take_turns(
    model: Any,
    writers: Sequence[_Writer],
    kind: Prompts,
    new_tokens: int,
    asked: DraftRuns,
    done: Callable[[], None],
) -> list[AssistedText]:
    """The measured texts of the model alone; those with drafts are kept in their writers."""
    options, temperature = asked.options, asked.drafted.temperature
    alone: list[AssistedText] = []
    for writer in writers:
        writer.texts, writer.ties = [], set()
    for run in range(-options.warmup, options.runs):
        number = run % len(kind.prompts)
        prompt, texts = kind.prompts[number], dict[int, AssistedText]()
        prompt_T = torch.tensor(prompt.ids)
        more: dict[str, Any] = {
            "temperature": temperature,
            "seed": options.seed + options.warmup + run,
            "ends": prompt.ends,
        }
        for place in in_turn(1 + len(writers), run):
            if place == 0:
                texts[0] = generate_plain(model, prompt_T, new_tokens, **more)
            else:
                one = writers[place - 1]
                texts[place] = generate_assisted(
                    model, one.live, prompt_T, new_tokens, draft_tokens=one.draft_tokens, **more
                )
            done()
        for place, writer in enumerate(writers, 1):
            tie = not temperature and _is_tie(model, prompt, texts[0], texts[place], writer, kind)
            if run >= 0:
                writer.texts.append(texts[place])
                writer.ties |= {number} if tie else set()
        if run >= 0:
            alone.append(texts[0])
    return alone


def _is_tie(
    model: Any,
    prompt: Prompt,
    alone: AssistedText,
    text: AssistedText,
    writer: _Writer,
    kind: Prompts,
) -> bool:
    """Whether text with a draft differs from a near tie on; any other difference is an error."""
    name = (
        f"prompt {kind.prompts.index(prompt)} of {kind.source} ({kind.kind}; {writer.draft}, "
        f"{writer.draft_tokens} tokens at a time)"
    )
    return differs_by_a_tie(model, torch.tensor(prompt.ids), alone.ids, text.ids, text=name)


def _measurement(
    alone: Sequence[AssistedText], writer: _Writer, kind: Prompts, new_tokens: int
) -> DraftedMeasurement:
    """The figures of one draft with one number of drafted tokens."""
    texts, count = writer.texts, len(kind.prompts)
    per_text = [
        statistics.fmean(len(one.ids) / one.steps for one in texts[number::count])
        for number in range(min(count, len(texts)))
    ]
    alone_s, drafted_s = (
        [one.seconds / len(one.ids) for one in written] for written in (alone, texts)
    )
    alone_rate, drafted_rate = (
        sum(len(one.ids) for one in written) / sum(one.seconds for one in written)
        for written in (alone, texts)
    )
    return DraftedMeasurement(
        draft=writer.draft,
        prompts=kind.kind,
        source=kind.source,
        template=kind.template,
        draft_tokens=writer.draft_tokens,
        new_tokens=new_tokens,
        texts=len(per_text),
        alone_s=alone_s,
        drafted_s=drafted_s,
        alone_tokens_per_s=alone_rate,
        drafted_tokens_per_s=drafted_rate,
        speedup=statistics.median(
            before / after for before, after in zip(alone_s, drafted_s, strict=True)
        ),
        steps=sum(one.steps for one in texts),
        drafted=sum(one.drafted for one in texts),
        accepted=sum(one.accepted for one in texts),
        tokens_per_step=statistics.fmean(per_text),
        tokens_per_step_stderr=standard_error(per_text),
        near_ties=len(writer.ties),
    )
