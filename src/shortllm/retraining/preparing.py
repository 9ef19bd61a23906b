"""Everything that a retraining is made of, checked before a model is loaded.

    Prepared   options filled in, the data tokenized in the work directory, the teacher opened,
               and the fingerprint of it all

The work directory stands beside the target (`NAME.training.partial`) until the target is complete.
It carries the fingerprint of what was asked; work on something else is thrown away.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shortllm.checkpoint.config import context_length
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.data.calibration import BOS_EVERY_SAMPLE
from shortllm.data.rows import Records
from shortllm.data.sources import load_rows, open_records
from shortllm.data.texts import Segments, check_length, vocabulary
from shortllm.errors import DataError, ShortLLMError, UnsupportedModelError
from shortllm.evaluation.options import EvaluationOptions
from shortllm.evaluation.texts import evaluation_segments_of
from shortllm.files import LOCK, PARTIAL, fingerprint, hold, require_writable, write_text
from shortllm.model.session import Session
from shortllm.retraining.distillation import open_teacher
from shortllm.retraining.documents import Kind, documents, kind_of, template_of, written_by
from shortllm.retraining.options import GENERATED, HELD_OUT, RetrainOptions, micro_batch
from shortllm.retraining.store import Corpus, open_corpus, write_corpus
from shortllm.retraining.windows import Packing
from shortllm.runtime import Ranks
from shortllm.surgery.apply import carried_fingerprint, require_apart
from shortllm.surgery.made import CARDS

log = logging.getLogger(__name__)

POLL_S = 0.2
"""How often a process looks whether the main one has written the data."""

STATE_BYTES = {"lora": 0.5, "last-blocks": 8, "full": 24, "distill": 24}
"""Bytes of disk for each parameter: up to two states of float32 weights and AdamW's moments."""

UNFINGERPRINTED = {"data", "eval_data", "teacher", "report_to"}
"""Options that say where something lies: what lies there counts instead."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A retraining about to begin."""

    checkpoint: Checkpoint
    teacher: Checkpoint | None
    options: RetrainOptions
    source: str
    kind: str
    template: Any
    corpus: Corpus
    evaluation: dict[str, Segments]
    work: Path
    fingerprint: str

    @property
    def packing(self) -> Packing:
        """How documents are put into windows."""
        return packing_of(self.options, self.kind)


def prepare(
    checkpoint: Checkpoint,
    options: RetrainOptions,
    target: Path,
    *,
    session: Session,
    ranks: Ranks,
) -> Prepared:
    """Check everything that can be got wrong, tokenize the data, and take its fingerprint.

    Raises:
        ShortLLMError: any of its kinds; nothing heavy has been done.
    """
    checked = check(checkpoint, options, session=session, ranks=ranks)
    options, tokenizer, records, kind = (
        checked.options, checked.tokenizer, checked.records, checked.kind,
    )  # fmt: skip
    teacher = open_teacher(checkpoint, options) if options.method == "distill" else None
    require_apart(checkpoint.directory, target)
    needed = checkpoint.bytes + STATE_BYTES[options.method] * checkpoint.parameters
    require_writable(target.absolute().parent, int(needed))

    base = _base(checkpoint, teacher, options, session)
    work = claim_work(target, fingerprint({**base, "files": _identity(records)}), ranks)
    place = work / "corpus"
    if ranks.is_main and not place.is_dir():
        try:
            _tokenize(place, checkpoint, teacher, options, session, tokenizer, records, kind)
        except ShortLLMError:  # nothing is there to go on with
            shutil.rmtree(work)
            raise
    while not place.is_dir():
        time.sleep(POLL_S)
    corpus = open_corpus(place)
    return Prepared(
        checkpoint=checkpoint,
        teacher=teacher,
        options=options,
        source=records.source if records else GENERATED,
        kind=kind,
        template=checked.template,
        corpus=corpus,
        evaluation=checked.evaluation,
        work=work,
        fingerprint=retrained_fingerprint(base, corpus, checked.evaluation),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checked:
    """What a retraining of a model, or of what is left of it, can begin with."""

    options: RetrainOptions
    tokenizer: Any
    records: Records | None
    kind: str
    template: Any
    evaluation: dict[str, Segments]


def check(
    checkpoint: Checkpoint, options: RetrainOptions, *, session: Session, ranks: Ranks
) -> Checked:
    """Check options, packages, device and data; a run asks this of the model it will shorten.

    Raises:
        ShortLLMError: any of its kinds.
    """
    require_extra(options)
    if checkpoint.raw_config.get("quantization_config"):
        raise UnsupportedModelError(
            f"{checkpoint.id} is quantized, and rounded weights cannot be trained. Retrain the "
            "unquantized checkpoint, then quantize it"
        )
    options = options.filled(positions(checkpoint))
    assert options.length is not None
    check_length(checkpoint, options.length, "--length")
    check_length(checkpoint, options.eval_length, "--eval-length")
    check_device(session, ranks)
    micro_batch(options, ranks.count)
    tokenizer = load_tokenizer(checkpoint)
    records, kind, template = _source(options, tokenizer)
    return Checked(
        options=options,
        tokenizer=tokenizer,
        records=records,
        kind=kind,
        template=template,
        evaluation=evaluation_sets(checkpoint, tokenizer, options),
    )


def require_extra(options: RetrainOptions) -> None:
    """Refuse at once if what training takes is not installed.

    Raises:
        ShortLLMError: naming what to install.
    """
    needed = ["accelerate", "peft"] if options.method == "lora" else ["accelerate"]
    for name in needed:
        if find_spec(name) is None:
            raise ShortLLMError(
                f"retraining by {options.method} needs {name}. Install it with: pip install "
                "'shortllm[train]'"
            )
    for name in options.report_to or ():
        if find_spec(name) is None:
            raise ShortLLMError(
                f"--report-to {name} needs {name}. Install it with: pip install {name}"
            )


def positions(checkpoint: Checkpoint) -> int | None:
    """Positions the model has; None where its config does not say."""
    return context_length(checkpoint.config)


def check_device(session: Session, ranks: Ranks) -> None:
    """Refuse what transformers' Trainer cannot train on.

    Raises:
        ShortLLMError: one of several GPUs by number, or float16.
    """
    if ranks.count == 1 and session.device.index:
        raise ShortLLMError(
            f"training takes the first GPU it sees, not {session.device}. Use --device auto, and "
            f"choose with CUDA_VISIBLE_DEVICES={session.device.index}"
        )
    if session.runtime.dtype == "float16":
        raise ShortLLMError("--dtype float16 cannot be trained. Use bfloat16 or float32")


def packing_of(options: RetrainOptions, kind: str) -> Packing:
    """How documents are put into windows, as asked or as the kind of data has it."""
    if kind != "instructions":
        return "alone" if options.packing is False else "stream"
    return "fit" if options.packing else "alone"


def evaluation_sets(
    checkpoint: Checkpoint, tokenizer: Any, options: RetrainOptions
) -> dict[str, Segments]:
    """Further evaluation sets by name, cut by the protocol of `shortllm eval`.

    Raises:
        DataError: unreadable or too little text, or the same twice.
    """
    bos = "every" if checkpoint.model_type in BOS_EVERY_SAMPLE else "first"
    how = EvaluationOptions(length=options.eval_length, bos=bos, max_segments=options.eval_segments)
    sets: dict[str, Segments] = {}
    for name in options.eval_data:
        rows = load_rows(name, role="evaluation")
        if rows.source in sets:
            raise DataError(f"--eval-data {name} was given twice. Leave one of them out")
        sets[rows.source] = evaluation_segments_of(
            checkpoint, rows, tokenizer, how, option="--eval-length"
        )
    return sets


def _source(options: RetrainOptions, tokenizer: Any) -> tuple[Records | None, str, Any]:
    """The records, what kind they are, and how instructions are put in words."""
    if options.data == GENERATED:
        return None, GENERATED, None
    records = open_records(options.data or "")
    kind = kind_of(records, options.form)
    if kind == "text":
        if options.template != "auto":
            raise ShortLLMError(
                f"--template {options.template} is for instructions, and '{records.source}' is "
                "text. Leave it out, or give rows with instruction and output"
            )
        next(records.texts())  # finds a column that is missing or unclear
        return records, kind, None
    return records, kind, template_of(tokenizer, options.template)


def _identity(records: Records | None) -> Any:
    """By what a changed source is noticed without reading all of it."""
    if records is None:
        return None
    files = [(str(file.resolve()), file.stat()) for file in records.files]
    return [records.source, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)]


def _tokenize(
    place: Path,
    checkpoint: Checkpoint,
    teacher: Checkpoint | None,
    options: RetrainOptions,
    session: Session,
    tokenizer: Any,
    records: Records | None,
    kind: str,
) -> None:
    """Write the corpus, as much of it as the steps will take."""
    held_out = options.held_out or HELD_OUT["instructions" if kind == "instructions" else "text"]
    packing = packing_of(options, kind)
    assert options.length is not None
    if records is None:
        assert teacher is not None
        made = written_by(session, teacher, tokenizer, options)
    else:
        named: Kind = "instructions" if kind == "instructions" else "text"
        made = documents(records, named, tokenizer, options)
    enough = None
    if options.max_steps is not None and packing == "stream":
        enough = options.max_steps * options.batch * options.length
    source = records.source if records else GENERATED
    log.info("tokenizing %s", source)
    write_corpus(
        made,
        place,
        source=source,
        vocabulary=vocabulary(checkpoint),
        held_out=held_out,
        longest=None if packing == "stream" else options.length,
        enough=enough,
    )


def work_directory(target: Path) -> Path:
    """Where the training of a target is kept until the target is complete."""
    return target.with_name(target.name + ".training" + PARTIAL)


def claim_work(target: Path, asked: str, ranks: Ranks) -> Path:
    """The work directory, emptied if it holds work on something else."""
    work = work_directory(target.absolute())
    if ranks.is_main:
        hold(work)
        note = work / "asked.txt"
        earlier = [path for path in work.iterdir() if path.name != LOCK]
        if earlier and (not note.is_file() or note.read_text(encoding="utf-8") != asked):
            log.info("%s holds the work on another recipe, which is thrown away", work)
            for path in earlier:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_text(note, asked)
    ranks.wait()
    return work


def _base(
    checkpoint: Checkpoint, teacher: Checkpoint | None, options: RetrainOptions, session: Session
) -> dict[str, Any]:
    """What a retrained checkpoint depends on, beside the tokens."""
    return {
        "model": checkpoint.fingerprint,
        "other files": carried_fingerprint(checkpoint.directory, without=CARDS),
        "teacher": teacher.fingerprint if teacher else None,
        "options": options.model_dump(mode="json", exclude=UNFINGERPRINTED),
        "dtype": compute_dtype(session),
        "device": session.device.type,
    }


def retrained_fingerprint(
    base: dict[str, Any], corpus: Corpus, evaluation: dict[str, Segments]
) -> str:
    """Of everything that a retrained checkpoint depends on."""
    from shortllm.data.calibration import tokens_fingerprint

    texts = {name: tokens_fingerprint(segments.ids) for name, segments in evaluation.items()}
    tokens = [corpus.train.fingerprint, corpus.held_out.fingerprint]
    return fingerprint({**base, "tokens": tokens, "evaluation": texts})


def compute_dtype(session: Session) -> str:
    """Computation type of a training: bfloat16 on CUDA, float32 elsewhere, or as asked."""
    if session.runtime.dtype != "auto":
        return session.runtime.dtype
    return "bfloat16" if session.device.type == "cuda" else "float32"
