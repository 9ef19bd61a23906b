"""Text that the intact model writes: to choose a draft by, to measure it on, to train it with.

    calibration.*            texts to choose by: prompts, and what the model wrote, which counts
    held-out/calibration.*   the same to measure on
    written.jsonl            both, to read
    training.jsonl           further texts, sampled from the whole distribution, if they are read

A draft must write what the intact model writes, so no other text tells as much about it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortllm.benchmark.assisted import generate_plain
from shortllm.checkpoint.source import Checkpoint
from shortllm.data.calibration import INFO_FILE, Calibration, calibration_of, load_calibration
from shortllm.data.chat import Prompt, Span
from shortllm.data.generated import VERSION, WRITTEN_AT_ONCE, continued
from shortllm.data.options import CalibrationInfo
from shortllm.drafting.options import DraftOptions
from shortllm.drafting.prepare import Asked
from shortllm.files import fingerprint, write_text
from shortllm.model import Session
from shortllm.progress import progress
from shortllm.records import load_current

HELD_OUT = "held-out"
"""Directory of the texts to measure on."""

TRAINING = "training.jsonl"


Document = tuple[list[int], Span]
"""Token ids, and the span of those that the model wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A prompt `[T]`, and the tokens that the intact model wrote to it."""

    prompt_T: Tensor
    ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Written:
    """What the intact model wrote."""

    choosing: Calibration
    held_out: Calibration

    @property
    def tokens(self) -> int:
        """All that it wrote."""
        return sum(len(one.ids) for part in self.parts for one in texts_of(part))

    @property
    def parts(self) -> tuple[Calibration, Calibration]:
        """The texts to choose by, and those to measure on."""
        return self.choosing, self.held_out


def texts_of(calibration: Calibration) -> list[Text]:
    """The texts of a calibration, whose prompts do not count."""
    found = []
    for ids_T, counted_T in zip(calibration.ids, calibration.tokens_counted(), strict=True):
        start = int(counted_T.int().argmax())
        found.append(Text(prompt_T=ids_T[:start], ids=ids_T[counted_T].tolist()))
    return found


def write_texts(
    checkpoint: Checkpoint,
    asked: Asked,
    options: DraftOptions,
    session: Session,
    tokenizer: Any,
    directory: Path,
) -> Written:
    """What the model writes to the prompts, unless the directory has it."""
    prompts, border = [*asked.choosing, *asked.held_out], len(asked.choosing)
    expected = _fingerprint(checkpoint, prompts, session, options, border, options.temperature)
    places = (directory, directory / HELD_OUT)
    found = [_earlier(place, expected) for place in places]
    if None in found:
        model = session.decoder(checkpoint).model
        documents: list[Document] = []
        with progress("writing texts", len(prompts) * options.new_tokens) as advance:
            for number, one in enumerate(prompts):
                text = generate_plain(
                    model, torch.tensor(one.ids), options.new_tokens, ends=one.ends,
                    temperature=options.temperature, seed=options.seed + number,
                )  # fmt: skip
                documents.append(([*one.ids, *text.ids], (len(one.ids), len(one.ids + text.ids))))
                advance(options.new_tokens)
        about = {
            "source": "; ".join(asked.words),
            "seed": options.seed,
            "temperature": options.temperature,
        }
        made = [
            calibration_of(part, fingerprint=expected, **about)
            for part in (documents[:border], documents[border:])
        ]
        for place, part in zip(places, made, strict=True):
            part.save(place)
        found = [*made]
    choosing, held_out = found
    assert choosing is not None and held_out is not None
    written = Written(choosing=choosing, held_out=held_out)
    rows = [
        {"prompt": tokenizer.decode(one.prompt_T), "completion": tokenizer.decode(one.ids)}
        for part in written.parts
        for one in texts_of(part)
    ]
    _write_rows(directory / "written.jsonl", rows)
    return written


def write_training_texts(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    options: DraftOptions,
    session: Session,
    tokenizer: Any,
    directory: Path,
) -> Calibration:
    """A further text for each prompt, sampled from the whole distribution, and their file."""
    expected = _fingerprint(checkpoint, prompts, session, options)
    place = directory / "training"
    found = _earlier(place, expected)
    if found is None:
        model, written = session.decoder(checkpoint).model, dict[int, Document]()
        with progress("writing texts to train with", len(prompts)) as advance:
            for batch in _batches(prompts):
                texts = continued(
                    model, [prompts[number].ids for number in batch],
                    new_tokens=options.new_tokens, seed=options.seed + len(written),
                    ends=prompts[batch[0]].ends,
                )  # fmt: skip
                for number, ids in zip(batch, texts, strict=True):
                    written[number] = ids, (len(prompts[number].ids), len(ids))
                advance(len(batch))
        found = calibration_of(
            [written[number] for number in range(len(prompts))],
            fingerprint=expected, source="prompts", seed=options.seed, temperature=1.0,
        )  # fmt: skip
        found.save(place)
    begins = tokenizer("").input_ids[:1]  # added to every text that is read again
    rows = []
    for one in texts_of(found):
        ids = [*one.prompt_T.tolist(), *one.ids]
        rows.append({"text": tokenizer.decode(ids[len(begins) if ids[:1] == begins else 0 :])})
    _write_rows(directory / TRAINING, rows)
    return found


def _batches(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Places of prompts whose texts end with the same tokens."""
    kinds: dict[tuple[int, ...], list[int]] = {}
    for place, one in enumerate(prompts):
        kinds.setdefault(tuple(one.ends), []).append(place)
    for places in kinds.values():
        for first in range(0, len(places), WRITTEN_AT_ONCE):
            yield places[first : first + WRITTEN_AT_ONCE]


def _earlier(place: Path, expected: str) -> Calibration | None:
    """The texts of an earlier call with the same inputs."""
    if load_current(CalibrationInfo, place / INFO_FILE, expected) is None:
        return None
    return load_calibration(place)


def _fingerprint(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    session: Session,
    options: DraftOptions,
    *choices: float,
) -> str:
    """Of all that the texts depend on."""
    return fingerprint(
        {
            "version": VERSION,
            "model": checkpoint.fingerprint,
            "dtype": session.dtype(checkpoint),
            "device": session.device.type,
            "prompts": [[one.ids, one.ends] for one in prompts],
            "choices": [options.new_tokens, options.seed, *choices],
        }
    )


def _write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """JSON lines, unless the file has them: training looks at its time."""
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
