"""Everything a training needs, checked and tokenized before a model is loaded.

    check     Setup: resolved options, packages, device, data source, evaluation sets
    prepare   Job: the setup, its teacher, the tokenized data, and the fingerprint of it all

The work directory `NAME.training.partial` lies next to the target until the target is complete. It
records what it was started for; work for anything else is deleted.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shortllm.checkpoint.config import context_length, text_config
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.data.calibration import BOS_EVERY_SAMPLE, check_length, tokens_fingerprint
from shortllm.data.chat import template_of
from shortllm.data.rows import Records
from shortllm.data.shapes import with_columns
from shortllm.data.sources import load_rows, mixed, mixture, open_records
from shortllm.errors import DataError, ShortLLMError, UnsupportedModelError
from shortllm.evaluation.options import EvaluationOptions
from shortllm.evaluation.texts import Segments, evaluation_segments_of
from shortllm.files import LOCK, PARTIAL, hold, require_writable, write_text
from shortllm.model import Session
from shortllm.retraining.corpus import (
    Corpus,
    documents,
    kind_of,
    open_corpus,
    write_corpus,
    written_by,
)
from shortllm.retraining.options import (
    GENERATED,
    HELD_OUT,
    Kind,
    Packing,
    RetrainOptions,
    without_gpu,
)
from shortllm.retraining.reporters import require_reporters
from shortllm.runtime import ALONE, Ranks
from shortllm.surgery.derived import derived_fingerprint
from shortllm.surgery.origin import lineage, open_original

log = logging.getLogger(__name__)

LOGS = "logs"
"""Directory of the reporters, first in the work directory, then next to the weights."""

LOCATIONS = {"data", "columns", "eval_data", "teacher", "report_to"}
"""Options that name a place: its content is part of the fingerprint instead."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """One source of the data to train on, and its weight among several."""

    records: Records
    kind: Kind
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setup:
    """A training whose options, packages, device and data have been checked."""

    checkpoint: Checkpoint
    options: RetrainOptions
    """Resolved."""
    length: int
    """Tokens of a window."""
    micro_batch: int
    """Windows that one process takes at a time."""
    session: Session
    ranks: Ranks
    tokenizer: Any
    parts: list[Part]
    """The data to train on; nothing if the teacher writes it."""
    evaluation: dict[str, Segments]

    @property
    def source(self) -> str:
        """The data source with its split filled in; those of a mixture with their weights."""
        if len(self.parts) > 1:
            return ",".join(f"{part.records.source}:{part.weight:g}" for part in self.parts)
        return self.parts[0].records.source if self.parts else GENERATED

    @property
    def kind(self) -> Kind:
        """What the data is; instructions where some of it are."""
        kinds: set[Kind] = {part.kind for part in self.parts}
        return "instructions" if "instructions" in kinds else "text" if kinds else GENERATED

    @property
    def packing(self) -> Packing:
        """How documents are put into windows: as requested, or by the kind of data."""
        if self.kind != "instructions":
            return "alone" if self.options.packing is False else "stream"
        return "fit" if self.options.packing else "alone"

    @property
    def dtype(self) -> str:
        """Computation type: as requested, else bfloat16 on CUDA and float32 elsewhere."""
        if self.session.runtime.dtype != "auto":
            return self.session.runtime.dtype
        return "bfloat16" if self.session.device.type == "cuda" else "float32"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """A training that is ready to run."""

    setup: Setup
    teacher: Checkpoint | None
    work: Path
    corpus: Corpus
    fingerprint: str


def resolve(options: RetrainOptions, checkpoint: Checkpoint) -> RetrainOptions:
    """The options with all defaults that depend on the method or the model filled in."""
    defaults = dict(options.about.defaults)
    room = context_length(checkpoint.config)
    if room is not None:
        defaults["length"] = min(defaults["length"], room)
    if options.max_steps is not None:
        del defaults["epochs"]
    missing = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    resolved = options.model_copy(update=missing)
    if resolved.data is None:
        raise DataError(
            f"--method {options.method} needs text to train on. Give --data, e.g. --data c4"
        )
    return resolved


def check(
    checkpoint: Checkpoint, options: RetrainOptions, *, session: Session, ranks: Ranks = ALONE
) -> Setup:
    """Check options, packages, device and data; a run asks this of the model it will shorten."""
    options.about.require_packages()
    if options.load_in_4bit:
        _require_4bit(session)
    if options.report_to:
        require_reporters(options.report_to)
    if checkpoint.raw_config.get("quantization_config"):
        raise UnsupportedModelError(
            f"{checkpoint.id} is quantized, and rounded weights cannot be trained. Retrain the "
            "unquantized checkpoint, then quantize it"
        )
    options = resolve(options, checkpoint)
    assert options.length is not None
    check_length(checkpoint, options.length, _called("length"))
    every = checkpoint.model_type in BOS_EVERY_SAMPLE
    check_length(checkpoint, options.eval_length, _called("eval_length"), before=int(every))
    if ranks.count == 1 and session.device.index:
        raise ShortLLMError(
            f"training uses the first visible GPU, not {session.device}. Use --device auto, and "
            f"choose with CUDA_VISIBLE_DEVICES={session.device.index}"
        )
    if session.runtime.dtype == "float16":
        raise ShortLLMError("--dtype float16 cannot be trained. Use bfloat16 or float32")
    micro_batch = options.micro_batch_of(ranks.count)
    tokenizer = load_tokenizer(checkpoint)
    return Setup(
        checkpoint=checkpoint,
        options=options,
        length=options.length,
        micro_batch=micro_batch,
        session=session,
        ranks=ranks,
        tokenizer=tokenizer,
        parts=_open_data(options, tokenizer),
        evaluation=_evaluation_sets(checkpoint, tokenizer, options),
    )


def _called(field: str) -> str:
    """An option as one types it: `run` and `draft` have a --length of their own."""
    return f"--{field.replace('_', '-')} (in `run` and `draft`: --set retraining.{field})"


def _require_4bit(session: Session) -> None:
    """Refuse 4-bit weights where bitsandbytes is not at home."""
    if session.device.type != "cuda":
        raise without_gpu(f"this training is on {session.device}")
    if find_spec("bitsandbytes") is None:
        raise ShortLLMError(
            "--load-in-4bit needs bitsandbytes. Install it with: pip install bitsandbytes"
        )


def _open_data(options: RetrainOptions, tokenizer: Any) -> list[Part]:
    """The data to train on, checked as far as the first record of each source."""
    if options.data == GENERATED:
        return []
    parts = []
    for source, weight in mixture(options.data or "").items():
        records = open_records(with_columns(source, options.columns))
        parts.append(Part(records=records, kind=kind_of(records, options.form), weight=weight))
    if any(part.kind == "instructions" for part in parts):
        template_of(tokenizer, options.template)  # raises if the tokenizer has none
    elif options.template != "auto":
        raise ShortLLMError(
            f"--template {options.template} is for conversations, and '{options.data}' is text. "
            "Leave it out, or give conversations"
        )
    return parts


def _evaluation_sets(
    checkpoint: Checkpoint, tokenizer: Any, options: RetrainOptions
) -> dict[str, Segments]:
    """Further evaluation sets by name, cut by the protocol of `shortllm eval`."""
    bos = "every" if checkpoint.model_type in BOS_EVERY_SAMPLE else "first"
    how = EvaluationOptions(length=options.eval_length, bos=bos, max_segments=options.eval_segments)
    sets: dict[str, Segments] = {}
    for name in options.eval_data:
        rows = load_rows(name, role="evaluation")
        if rows.source in sets:
            raise DataError(f"--eval-data {name} was given twice. Leave one of them out")
        sets[rows.source] = evaluation_segments_of(checkpoint, rows, tokenizer, how)
    return sets


def prepare(setup: Setup, target: Path) -> Job:
    """Open the teacher, tokenize the data into the work directory, and compute the fingerprint."""
    checkpoint, about = setup.checkpoint, setup.options.about
    teacher = _open_teacher(checkpoint, setup.options) if about.has_teacher else None
    needed = checkpoint.bytes + about.state_bytes * checkpoint.parameters
    work = work_directory(target.absolute())
    require_writable(work.parent, int(needed))
    if setup.ranks.is_main:
        files: list[Any] | None = None  # names, sizes and times change with the data
        if setup.parts:
            files = [setup.source, *_file_states(part.records for part in setup.parts)]
        _claim(work, _fingerprint(setup, teacher, files=files))
        if not (work / "corpus").is_dir():
            try:
                _tokenize(setup, teacher, work / "corpus")
            except ShortLLMError:  # there is nothing to resume from
                shutil.rmtree(work)
                raise
    setup.ranks.wait()
    corpus = open_corpus(work / "corpus")
    texts = {name: tokens_fingerprint(segments.ids) for name, segments in setup.evaluation.items()}
    tokens = [corpus.train.fingerprint, corpus.held_out.fingerprint]
    fingerprint = _fingerprint(setup, teacher, tokens=tokens, evaluation=texts)
    return Job(setup=setup, teacher=teacher, work=work, corpus=corpus, fingerprint=fingerprint)


def data_state(options: RetrainOptions) -> list[Any]:
    """What changes with the data to train on, known without reading it."""
    if options.data in (None, GENERATED):
        return []
    sources = mixture(options.data or "")
    return _file_states(open_records(with_columns(one, options.columns)) for one in sources)


def _file_states(data: Iterable[Records]) -> list[Any]:
    states = [(str(file.resolve()), file.stat()) for one in data for file in one.files]
    return [(name, at.st_size, at.st_mtime_ns) for name, at in states]


def work_directory(target: Path) -> Path:
    """Where the training of a target is kept until the target is complete."""
    return target.with_name(target.name + ".training" + PARTIAL)


def _open_teacher(checkpoint: Checkpoint, options: RetrainOptions) -> Checkpoint:
    """The model to learn from: the one that is named, or the one the checkpoint came from."""
    teacher = open_original(checkpoint, options.teacher, "--teacher")
    own, other = text_config(checkpoint.config), text_config(teacher.config)
    if own.vocab_size != other.vocab_size:
        raise ShortLLMError(
            f"{teacher.id} has a vocabulary of {other.vocab_size} and {checkpoint.id} one of "
            f"{own.vocab_size}. Name a --teacher with the same tokenizer"
        )
    if options.hidden_weight:
        blocks = lineage(checkpoint).blocks
        if (own.hidden_size, blocks) != (other.hidden_size, teacher.block_count):
            raise ShortLLMError(
                f"--hidden-weight compares the blocks of {checkpoint.id} (width {own.hidden_size}, "
                f"shortened from {blocks} blocks) with those of {teacher.id} (width "
                f"{other.hidden_size}, {teacher.block_count} blocks). Name its original model as "
                "--teacher, or leave --hidden-weight out"
            )
    return teacher


def _claim(work: Path, expected: str) -> None:
    """Lock the work directory, and empty it if its work was for something else."""
    hold(work)
    note = work / "fingerprint.txt"
    earlier = [path for path in work.iterdir() if path.name != LOCK]
    if earlier and (not note.is_file() or note.read_text(encoding="utf-8") != expected):
        log.info("%s contains work for another recipe, which is deleted", work)
        for path in earlier:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_text(note, expected)


def _tokenize(setup: Setup, teacher: Checkpoint | None, place: Path) -> None:
    """Write the corpus, of as many documents as the steps will need."""
    options, streamed = setup.options, setup.packing == "stream"
    longest = None if streamed else setup.length
    if setup.parts:
        streams = [
            (part.weight, documents(part.records, part.kind, setup.tokenizer, options))
            for part in setup.parts
        ]
        found = mixed(streams, lambda one: min(len(one.ids), longest or len(one.ids)))
    else:
        assert teacher is not None
        found = written_by(setup.session, teacher, setup.tokenizer, options)
    enough = None
    if options.max_steps is not None and streamed:
        enough = options.max_steps * options.batch * setup.length
    log.info("tokenizing %s", setup.source)
    write_corpus(
        found,
        place,
        source=setup.source,
        vocabulary=setup.checkpoint.vocabulary,
        held_out=options.held_out or HELD_OUT[setup.kind],
        longest=longest,
        enough=enough,
    )


def _fingerprint(setup: Setup, teacher: Checkpoint | None, **content: Any) -> str:
    """The fingerprint of the setup, its teacher, and of what identifies the data."""
    return derived_fingerprint(
        setup.checkpoint,
        calibration=None,
        session=setup.session,
        dtype=setup.dtype,
        teacher=teacher.fingerprint if teacher else None,
        retraining=setup.options.model_dump(mode="json", exclude=LOCATIONS),
        **content,
    )
