"""A shortened model that drafts for the intact one: chosen, written and measured.

    write     the intact model writes texts: half to choose by, half to measure on
    score     the blocks, on what it wrote to choose by
    accept    what it accepts of a draft of every size, in one walk     -> tokens per step
    time      some sizes and lengths, with shared weights               -> time of a step
    measure   the drafts with the highest gain, in turn with the model alone
    prune     the fastest one; then it is healed and trained, and measured again

Every size and length is predicted from the times and from what is accepted; no checkpoint is
written to choose. What is up to date is skipped.

shortllm draft MODEL --out drafts --retrain distill
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from shortllm.benchmark.assisted import AssistedText, differs_by_a_tie
from shortllm.benchmark.meters import meter_of
from shortllm.calls import accepts
from shortllm.checkpoint.hub import ModelSource, is_gguf, named_revision
from shortllm.checkpoint.options import SurgeryOptions
from shortllm.criteria import resolve
from shortllm.data.calibration import Calibration, calibrate, calibration_of
from shortllm.data.options import CalibrationOptions
from shortllm.drafting.acceptance import accepted_from, accepted_without, summed_up
from shortllm.drafting.gain import best_length, gain_of, predicted
from shortllm.drafting.options import (
    PLAIN,
    Accepted,
    DraftCosts,
    Drafting,
    DraftOptions,
    DraftSize,
    MeasuredDraft,
    RecoveredDraft,
)
from shortllm.drafting.prepare import (
    FEWEST_SAMPLES,
    RECOVERY,
    RETRAINED,
    Run,
    budget_of,
    prepare,
    spread,
)
from shortllm.drafting.shared import draft_of
from shortllm.drafting.timing import (
    TIMED_TEXTS,
    alone,
    helped,
    measure_costs,
    step_time,
    timed_in_turn,
    writers_of_costs,
)
from shortllm.drafting.written import (
    TRAINING,
    Text,
    Written,
    texts_of,
    write_texts,
    write_training_texts,
)
from shortllm.files import fingerprint, overwriting, releasing
from shortllm.healing.heal import heal_from, healing_text
from shortllm.healing.options import HealOptions
from shortllm.model.loading import load_model
from shortllm.model.walk import NOTHING, walk_flops
from shortllm.pipeline import opened_within
from shortllm.progress import numbered_stages, progress, stage
from shortllm.pruning.planning import build_plan
from shortllm.pruning.prune import prune_from, prune_gguf
from shortllm.pruning.records import BlockScores, PrunePlan, Pruning
from shortllm.pruning.score import score_in, text_to_heal_with
from shortllm.pruning.size_search import plans_of
from shortllm.records import load_current
from shortllm.retraining.retrain import retrain_from
from shortllm.run_directory import HEALED
from shortllm.runtime import Runtime, versions

log = logging.getLogger(__name__)


@releasing()
@accepts(drafting=DraftOptions, runtime=Runtime, surgery=SurgeryOptions)
def draft(
    model: ModelSource = "embedded",
    *,
    drafting: DraftOptions,
    runtime: Runtime,
    surgery: SurgeryOptions,
    criterion: str = "acceptance",
    options: dict[str, Any] | None = None,
    out: Path | None = None,
    revision: str | None = None,
    command: Sequence[str] = (),
) -> Drafting:
    """Choose which blocks a draft can do without, and how many tokens it drafts at a time.

    Writes the shortened checkpoint with the highest measured gain, draft.json and draft.html. What
    is up to date is skipped; an interrupted call is resumed.

    Args:
        model: a checkpoint directory, a Hub id, or a loaded model.
        drafting: the text, sizes and lengths, and how the draft is healed and trained; its fields
            can be given as keywords, e.g. `retrain="distill"`.
        runtime: where to compute; its fields can be given as keywords.
        surgery: `accept_unknown_references`; it can be given as a keyword.
        criterion: how to choose the blocks.
        options: of the criterion, e.g. `{"inner": "acceptance"}` for `greedy`.
        out: the directory. Default: `runs/<model>-draft`.
        revision: of a Hub model.
        command: the command line, for run.json.
    Returns:
        Every number of blocks with what is accepted and gained, predicted and measured.
    Raises:
        ShortLLMError: any kind, before the model is loaded wherever that can be known.
    """
    from shortllm.reporting import write_draft

    run = prepare(model, drafting, runtime, criterion, options or {}, out, revision, command)
    with numbered_stages(run.stages), overwriting():  # the choices have been compared
        found = _stages(run)
    write_draft(run.directory)
    log.info("%s", found.verdict)
    return found


# ---- the stages


def _stages(run: Run) -> Drafting:
    """All stages in order."""
    with stage("write"):
        written = write_texts(
            run.checkpoint, run.prompts, run.options, run.session, run.tokenizer, run.directory
        )
    with stage("score"):
        run.plans = plans_of(run.sizes, partial(_plan, run, cache(partial(_scores, run, written))))
    found = _known(run, written)
    with stage("accept"):
        if not found.sizes:
            found = _kept(run, found, sizes=_accepted(run, written))
    with stage("time"):
        if found.costs is None:
            costs = _costs(run, written)
            sizes = [predicted(one, costs) for one in found.sizes]
            found = _kept(run, found, costs=costs, sizes=sizes)
    assert found.costs is not None
    with stage("measure"):
        if not found.measured:
            best = max(found.sizes, key=lambda one: one.predicted or 0.0)
            chosen = spread([one.remove for one in found.sizes], run.options.measured, best.remove)
            drafts = [
                (PLAIN, one, draft_of(run.model, one.removed))
                for one in found.sizes
                if one.remove in chosen
            ]
            found = _kept(run, found, measured=_measured(run, written, found.costs, drafts))
    size = next(one for one in found.sizes if one.remove == found.best_plain.remove)
    with stage("prune"):
        _prune(run, run.plans[size.remove])
    return _recovered(run, written, found, size)


def _prune(run: Run, plan: PrunePlan) -> None:
    """Write the checkpoint, and of a GGUF file also one."""
    prune_from(run.checkpoint, plan, run.directory / PLAIN, session=run.session)
    if is_gguf(named_revision(run.source, run.revision)[0]):
        target, record = run.directory / f"{PLAIN}.gguf", run.directory / PLAIN / Pruning.FILE
        # it is written after the checkpoint
        if not target.is_file() or target.stat().st_mtime_ns < record.stat().st_mtime_ns:
            prune_gguf(run.source, plan, target, revision=run.revision)


def _known(run: Run, written: Written) -> Drafting:
    """What an earlier call with the same inputs found, or nothing yet."""
    options, device = run.options, run.session.device
    expected = fingerprint(
        {
            "model": run.checkpoint.fingerprint,
            "texts": [one.info.tokens_fingerprint for one in written.parts],
            "plans": [plan.removed for plan in run.plans.values()],
            "criterion": [run.criterion.name, run.criterion.options],
            "prompts": run.prompts.words,
            "options": options.model_dump(mode="json", exclude=RECOVERY),
            "dtype": run.session.dtype(run.checkpoint),
            "device": [device.type, meter_of(device).name, torch.get_num_threads()],
        }
    )
    return load_current(Drafting, run.directory / Drafting.FILE, expected) or Drafting(
        model=run.checkpoint.info(),
        criterion=run.criterion.name,
        temperature=options.temperature,
        prompts=run.prompts.words,
        texts=sum(len(part.ids) for part in written.parts),
        new_tokens=options.new_tokens,
        tokens=written.tokens,
        sizes=[],
        dtype=run.session.dtype(run.checkpoint),
        device_name=meter_of(device).name,
        threads=torch.get_num_threads(),
        versions=versions(),
        fingerprint=expected,
    )


def _kept(run: Run, found: Drafting, **update: Any) -> Drafting:
    """The record with more in it, in its file."""
    found = found.model_copy(update=update)
    found.save(run.directory / Drafting.FILE)
    return found


def _scores(run: Run, written: Written, number: int | None) -> BlockScores:
    """The scores of the blocks on the texts to choose by; those of a search for one size."""
    chosen, directory = run.criterion, run.directory
    if number is not None:
        chosen = resolve(chosen.name, {**chosen.options, "remove": number})
        directory = directory / "scores" / str(number)
    healing = text_to_heal_with(run.checkpoint, [chosen], CalibrationOptions())
    # a criterion that reads no text leaves the texts of the directory as they are
    [scores] = score_in(
        directory, run.checkpoint, [chosen], written.choosing, run.session, healing=healing
    ).values()
    return scores


def _plan(run: Run, scores: Callable[[int | None], BlockScores], number: int) -> PrunePlan:
    """The blocks that go."""
    found = scores(number if run.criterion.needs == "sets" else None)
    budget = budget_of(run.options, number)
    return build_plan(budget, model=run.checkpoint.info(), scores=found)


def _accepted(run: Run, written: Written) -> list[DraftSize]:
    """What is accepted of each size, on the texts to choose by and on the others."""
    decoder = run.session.decoder(run.checkpoint)
    removals = [frozenset(plan.removed) for plan in run.plans.values()]
    work = sum(walk_flops(decoder, [NOTHING, *removals], *part.ids.shape) for part in written.parts)
    with progress(f"what is accepted of {len(removals)} drafts", work) as advance:
        choosing, held_out = (
            accepted_without(
                decoder, part, removals, run.options.temperature,
                memory=run.session.memory(), advance=advance,
            )
            for part in written.parts
        )  # fmt: skip
    sums: Callable[[Any], Accepted] = partial(summed_up, most=run.options.draft_tokens)
    return [
        DraftSize(removed=sorted(removed), chosen_on=sums(one), held_out=sums(other))
        for removed, one, other in zip(removals, choosing, held_out, strict=True)
    ]


def _costs(run: Run, written: Written) -> DraftCosts:
    """The times of a token and of a step, for the fewest and the most blocks."""
    plans = [*run.plans.values()]
    drafts = {
        len(plan.removed): draft_of(run.model, plan.removed) for plan in (plans[0], plans[-1])
    }
    most = run.options.draft_tokens
    lengths = sorted({1, (1 + most) // 2, most})
    texts = texts_of(written.choosing)[:TIMED_TEXTS]
    work = writers_of_costs(len(drafts), len(lengths)) * len(texts) * run.options.runs
    with progress("timing tokens and steps", work) as advance:
        return measure_costs(run.model, drafts, texts, lengths, run.options, advance)


def _measured(
    run: Run,
    written: Written,
    costs: DraftCosts,
    drafts: Sequence[tuple[str, DraftSize, Any]],
) -> list[MeasuredDraft]:
    """Drafts that help to write the texts to measure on, in turn with the model alone."""
    texts, options, greedy = texts_of(written.held_out), run.options, run.options.temperature == 0
    writers = [
        alone(run.model, options),
        *(helped(run.model, one, size.draft_tokens or 1, options) for _, size, one in drafts),
    ]
    work = len(writers) * len(texts) * options.runs
    with progress(f"measuring {len(drafts)} drafts", work) as advance:
        plain, *others = timed_in_turn(writers, texts, options.runs, advance)
    found = []
    for (name, size, _), helped_texts in zip(drafts, others, strict=True):
        assert size.draft_tokens is not None and size.predicted is not None
        steps = sum(one.steps for one in helped_texts)
        tokens = sum(len(one.ids) for one in helped_texts)
        drafted = sum(one.drafted for one in helped_texts)
        found.append(
            MeasuredDraft(
                name=name,
                removed=size.removed,
                draft_tokens=size.draft_tokens,
                predicted=size.predicted,
                predicted_here=gain_of(size.held_out, size.draft_tokens, size.cost or 0.0, costs),
                speedup=tokens / steps / step_time(helped_texts, plain),
                tokens_per_s=tokens / sum(one.seconds for one in helped_texts),
                alone_tokens_per_s=tokens / sum(one.seconds for one in plain),
                tokens_per_step=tokens / steps,
                kept=(tokens - steps) / max(drafted, 1),
                near_ties=_near_ties(run, texts, helped_texts) if greedy else 0,
            )
        )
    return found


def _near_ties(run: Run, texts: Sequence[Text], assisted: Sequence[AssistedText]) -> int:
    """Texts that came out otherwise with a draft, where rounding chose between two tokens."""
    return sum(
        differs_by_a_tie(run.model, text.prompt_T, text.ids, other.ids, text=f"text {number}")
        for number, (text, other) in enumerate(zip(texts, assisted, strict=False))  # first run
    )


def _measured_again(
    run: Run, written: Written, found: Drafting, size: DraftSize, names: Sequence[str]
) -> Drafting:
    """What is accepted and gained after healing and training, unless it is known; what an earlier
    call healed or trained stays."""
    known = {one.name: one.fingerprint for one in found.recovered}
    made = {name: opened_within(run.directory, name) for name in names}
    new = {name: one for name, one in made.items() if known.get(name) != one.fingerprint}
    if not new:
        return found
    assert found.costs is not None and size.cost is not None
    recovered = [one for one in found.recovered if one.name not in new]
    drafts = []
    for name, checkpoint in new.items():
        dtype = run.session.dtype(run.checkpoint)
        live = load_model(checkpoint, device=run.session.device, dtype=dtype)
        texts = accepted_from(run.model, live, written.held_out, run.options.temperature)
        after = summed_up(texts, run.options.draft_tokens)
        length, predicted = best_length(after, size.cost, found.costs)
        recovered.append(
            RecoveredDraft(
                name=name, before=size.held_out, after=after, fingerprint=checkpoint.fingerprint
            )
        )
        best = size.model_copy(
            update={"held_out": after, "draft_tokens": length, "predicted": predicted}
        )
        drafts.append((name, best, live))
    before = [one for one in found.measured if one.name not in new]
    measured = [*before, *_measured(run, written, found.costs, drafts)]
    return _kept(run, found, measured=measured, recovered=recovered)


def _to_heal_with(run: Run, options: HealOptions, text: Calibration | None) -> Calibration:
    """The text that is named, or that the intact model wrote, one document after the other; of
    little text shorter samples."""
    own = healing_text(options, run.checkpoint)
    if text is None:
        return calibrate(run.checkpoint, own)
    assert own.length is not None
    ids = [one for text in texts_of(text) for one in (*text.prompt_T.tolist(), *text.ids)]
    length = min(own.length, len(ids) // FEWEST_SAMPLES)
    pieces = [ids[n : n + length] for n in range(0, len(ids) - length + 1, length)]
    documents = [(piece, (0, length)) for piece in pieces[: own.samples]]
    return calibration_of(documents, source=TRAINING, fingerprint=text.info.fingerprint)


def _recovered(run: Run, written: Written, found: Drafting, size: DraftSize) -> Drafting:
    """Heal and train the draft, and measure what comes of it."""
    options, session = run.options, run.session
    made: list[str] = []
    if not options.recovers:
        return found
    shortened, text = opened_within(run.directory, PLAIN), None
    if options.further_texts:
        with stage("write texts to train with"):
            text = write_training_texts(
                run.checkpoint, run.prompts.further, options, session, run.tokenizer, run.directory
            )
    if options.healing is not None:
        with stage("heal"):
            heal_from(
                shortened, run.checkpoint, options.healing, run.directory / HEALED,
                calibration=_to_heal_with(
                    run, options.healing, text if options.heals_on_written else None
                ),
                session=session,
            )  # fmt: skip
        made.append(HEALED)
    if options.retraining is not None:
        data = options.retraining.data or str(run.directory / TRAINING)
        training = options.retraining.model_copy(update={"data": data})
        with stage(f"retrain by {training.method}"):
            retrain_from(shortened, training, run.directory / RETRAINED, session=session)
        made.append(RETRAINED)
    with stage("measure again"):
        return _measured_again(run, written, found, size, made)
