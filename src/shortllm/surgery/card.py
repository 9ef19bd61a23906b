"""The model card of a checkpoint, README.md: what it is, as its config.json says.

Each stage writes it with its checkpoint; a report writes it again, with what a run measured.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm.checkpoint.config import SHAPES
from shortllm.checkpoint.tensors import read_json, read_tensor_table, unpacked_elements
from shortllm.files import translate_os_errors, write_text
from shortllm.format import counted, percent, short_bytes, short_count, spans
from shortllm.surgery.steps import Step, derived_steps, kept_after

if TYPE_CHECKING:
    from jinja2 import Environment

CARD, ORIGINAL_CARD = "README.md", "README.original.md"

Table = Sequence[Sequence[str]]
"""The names of the columns, and rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a run found out about a checkpoint."""

    tables: Sequence[Table]
    protocol: Sequence[tuple[str, str]]
    command: Sequence[str]
    quality: bool
    """Whether more than sizes was measured."""


def write_card(directory: Path, card: str) -> None:
    """Write the card of a checkpoint; one that came with the original model is kept as
    README.original.md."""
    _keep_original(directory)
    write_text(directory / CARD, card)


def card_of(directory: Path, name: str, measured: Measured | None = None) -> str:
    """The card of a checkpoint, which is loaded by `name`."""
    config = read_json(directory / "config.json")
    steps = derived_steps(str(directory), config)
    origin, blocks = steps[0], len(kept_after(steps))
    fewer = f"{origin.source_blocks} → " if blocks < origin.source_blocks else ""
    template = _templates().get_template("model_card.md.j2")
    text: str = template.render(
        base_model=_hub_id(origin),
        title=f"{origin.source}, {fewer}{counted(blocks, 'block')}",
        source=origin.source,
        revision=(origin.revision or "")[:12],
        shorter=bool(fewer),
        done=[line for number in range(len(steps)) for line in _lines(steps[: number + 1])],
        treated=any(step.healed or step.retrained for step in steps),
        own_loader=SHAPES in config,
        packed=any(step.quantized for step in steps),
        directory=name,
        tables=measured.tables if measured else [_sizes(directory, config, blocks)],
        measured=measured is not None and measured.quality,
        version=steps[-1].version,
        protocol=measured.protocol if measured else [],
        command=measured.command if measured else [],
        papers=list(dict.fromkeys(paper for step in steps for paper in _papers(step))),
    )
    return text + "\n"


# ---- what was done


def _lines(steps: Sequence[Step]) -> Iterator[str]:
    """What the last of some steps did; blocks have their numbers in the original."""
    *earlier, step = steps
    before = kept_after(earlier) if earlier else list(range(step.source_blocks))
    chosen = f"chosen by {step.criterion}" if step.criterion else "chosen by hand"

    def numbered(places: Sequence[int]) -> str:
        return f"block{'s' * (len(places) > 1)} {spans([before[place] for place in places])}"

    if step.removed_blocks:
        counted_so = "of the original (counted from 0)"
        if step.merged:
            yield f"{numbered(step.removed_blocks)} {counted_so} folded into others"
        else:
            yield f"{numbered(step.removed_blocks)} {counted_so} removed, {chosen}"
    for part, places in step.sublayers.items():
        if places:
            yield f"{part} of {numbered(places)} removed, {chosen}"
    if step.width:
        ratio = f", ratio {percent(step.width.ratio)}" if step.width.ratio else ""
        yield f"heads and neurons removed, chosen by {step.width.method}{ratio}"
    if step.healed:
        yield f"healed without training by {step.healed.method}, on {step.healed.data}"
    for one in step.trainings:
        amount = f"{counted(one.steps, 'step')}, {short_count(one.tokens)} tokens"
        yield f"retrained by {one.method}, on {one.data} ({amount})"
    if step.quantized:
        yield f"quantized to {step.quantized.scheme} by {step.quantized.method}"
    if step.prediction_heads == "kept":
        yield "prediction head kept unchanged: it still belongs to the unpruned model"
    elif step.prediction_heads == "dropped":
        yield "prediction head left out"


def _papers(step: Step) -> Iterator[str]:
    """The papers of what one step did."""
    for one in (step, step.healed, *step.trainings, step.quantized):
        if one is not None and one.paper is not None:
            yield one.paper


def _sizes(directory: Path, config: dict[str, Any], blocks: int) -> Table:
    """The figures of a checkpoint before anything is measured."""
    tensors = read_tensor_table(directory)
    parameters = sum(unpacked_elements(tensors, config).values())
    size = sum(entry.bytes for entry in tensors.values())
    return [
        ("", "this model"),
        ("blocks", str(blocks)),
        ("parameters", short_count(parameters)),
        ("bytes on disk", short_bytes(size)),
    ]


def _hub_id(origin: Step) -> str | None:
    """The name of the original model on the Hub; None where it is, or may be, a directory."""
    name = origin.source.partition(":")[0]
    cached = "/" in name and origin.source_fingerprint  # a directory of the Hub's cache
    on_hub = (origin.revision or cached) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    return name if on_hub else None


# ---- files


def _keep_original(checkpoint: Path) -> None:
    """Move a card that is not ours aside; ours, from an earlier stage, may be overwritten."""
    card = checkpoint / CARD
    if not card.exists():
        return
    with translate_os_errors(checkpoint):
        text = card.read_text(encoding="utf-8", errors="replace")
        front = re.match(r"---\n(.*?)^---$", text, flags=re.DOTALL | re.MULTILINE)
        if front is None or "\n- shortllm\n" not in front[1]:  # our tag
            os.replace(card, checkpoint / ORIGINAL_CARD)


def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("shortllm.surgery"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = _escaped
    environment.filters["linked"] = lambda text: re.sub(
        r"arXiv:([\d.]+)", r"[\g<0>](https://arxiv.org/abs/\1)", text
    )
    environment.filters["json"] = lambda text: json.dumps(text, ensure_ascii=False)
    return environment


def _escaped(text: Any) -> str:
    """Data as plain words inside Markdown: no markup, no table border, no line break."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))
