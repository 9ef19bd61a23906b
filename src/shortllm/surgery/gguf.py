"""Remove blocks from a GGUF file, without touching a quantized byte.

    shortllm prune model.gguf --blocks 12,13 --out short.gguf

Tensors of block N are called `blk.N.*`. Those of kept blocks are copied under their new numbers;
the metadata is edited by the tables below. What llama.cpp computes from a block's number, and not
from the metadata, must still be right for every kept block, else the removal is refused. The origin
is in the metadata, under `shortllm.provenance`, as it is in config.json of other checkpoints.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

from shortllm import __version__
from shortllm.checkpoint.gguf import PROVENANCE_KEY, SCALED_BY_COUNT, GgufFile, read_gguf
from shortllm.checkpoint.writer import copy_range
from shortllm.errors import CheckpointError, OutputError, UnsupportedModelError
from shortllm.files import partial_file, require_file_target
from shortllm.format import what_is_left
from shortllm.progress import progress
from shortllm.surgery.origin import original_place, sendable, write_local
from shortllm.surgery.steps import PROVENANCE, steps_of

log = logging.getLogger(__name__)

UNKNOWN_HASH = "0" * 64
"""Stands for the hash of the source until it is known: it is computed while tensors are copied."""

STRING = (8,)
"""The type of text in the metadata."""

BLOCK = re.compile(r"blk\.(?P<number>\d+)\.(?P<rest>.+)")

NOT_PER_BLOCK = {"rope.dimension_sections", "classifier.output_labels"}
"""Lists that do not speak of blocks, also where they are as long as the model by chance."""

LEADING = {"leading_dense_block_count", "hash_layer_count"}
"""Counts of leading blocks: the new value is how many of those blocks are kept."""

FIXED_PERIODS = {
    "afmoe": 4,
    "cohere2": 4,
    "exaone-moe": 4,
    "gemma-embedding": 6,
    "gemma2": 2,
    "gemma3": 6,
    "gpt-oss": 2,
    "llama4": 4,
    "smallthinker": 4,
    "smollm3": 4,
}
"""Architecture -> every how many blocks llama.cpp builds another kind, by a number in its code."""

WINDOWED_PERIODS = {"exaone4": 4, "olmo2": 4}
"""The same, of architectures where only files that state a sliding window have one."""

PERIOD_KEYS = ("full_attention_interval", "interleave_moe_layer_step", "moe_every_n_layers")
"""Keys that say every how many blocks llama.cpp builds another kind."""

KINDS_BY_COUNT: dict[str, Callable[[GgufFile, int], bool]] = {
    "command-r": lambda file, blocks: blocks >= 64,
    "deepseek2": lambda file, blocks: (
        blocks in (26, 27)
        or (blocks == 48 and len(file.value("tokenizer.ggml.tokens", ())) == 128_256)
    ),
}
"""Architecture -> which of two kinds of model llama.cpp reads, by the block count."""

UNIFORM = {
    "apertus", "arcee", "bitnet", "bloom", "chatglm", "codeshell", "command-r", "dbrx", "deci",
    "deepseek", "deepseek2", "dots1", "ernie4_5", "ernie4_5-moe", "exaone", "falcon", "falcon-h1",
    "gemma", "glm4", "glm4moe", "gpt2", "gptneox", "granite", "granitehybrid", "granitemoe",
    "hunyuan-dense", "hunyuan-moe", "internlm2", "jais", "jamba", "lfm2", "lfm2moe", "llama",
    "mamba", "mamba2", "minicpm", "mpt", "nemotron", "nemotron_h", "olmo", "olmoe", "orion",
    "phi2", "phi3", "phimoe", "plamo2", "qwen", "qwen2", "qwen2moe", "qwen2vl", "qwen3",
    "qwen35", "qwen35moe", "qwen3moe", "qwen3next", "qwen3vl", "qwen3vlmoe", "refact", "seed_oss",
    "stablelm", "starcoder", "starcoder2", "xverse",
}  # fmt: skip
"""Architectures whose blocks llama.cpp builds from the metadata and the stored tensors alone."""

REFUSED = {
    "baichuan": "llama.cpp chooses its position code by the block count",
    "gemma3n": "llama.cpp fixes the block from which keys and values are shared",
    "gemma4": "its keys and values are shared, and its embeddings have a share for every block",
}
"""Architecture -> why its blocks cannot be removed from the file."""

REFUSED_IF = {
    "rescale_every_n_layers": "the weights are scaled by the number of their block",
    "attention.shared_kv_layers": "the last blocks use keys and values of others",
    "n_deepstack_layers": "image features enter the first blocks by number",
}
"""Keys that must be absent or 0 -> the reason."""


def shorten_gguf(file: GgufFile, removed: Sequence[int], out: Path, **how: Any) -> None:
    """Write the GGUF file `out` without the blocks `removed`.

    Args:
        how: further entries of the provenance, e.g. `criterion`, or the `source` and `revision`
            of a file on the Hub.
    Raises:
        CheckpointError: the tensors of `file` are not those of its blocks.
        UnsupportedModelError: llama.cpp would run the result incorrectly.
        OutputError: `out` cannot be written, or is the source.
    """
    kept = kept_blocks(file, removed)
    tensors, settings = renumbered(file, kept), shortened_settings(file, kept)
    if out.exists() and out.samefile(file.path):
        raise OutputError(
            f"{out} is the original model, which is never changed. Choose another --out"
        )
    require_file_target(out)
    needed = sum(int(tensor.n_bytes) for tensor in tensors.values())
    provenance = {
        "version": __version__,
        "source": file.path.name,
        "source_sha256": UNKNOWN_HASH,
        "source_blocks": file.blocks,
        "removed_blocks": sorted(removed),
        **how,
        "parent": sendable(file.provenance),
    }
    with (
        partial_file(out, needed_bytes=needed) as partial,
        progress(f"writing {out.name}", needed) as advance,
        ThreadPoolExecutor(1) as thread,
    ):
        digest = thread.submit(lambda: file.sha256)
        changed = settings | {PROVENANCE_KEY: json.dumps(provenance)}
        write_header(file, tensors, changed, partial)
        copy_tensors(file, tensors, partial, advance)
        written = read_gguf(partial)
        _verify(written, file, tensors)
        _fill_in_hash(written, digest.result())
    sizes = (path.stat().st_size for path in (file.path, out))
    log.info("%s", what_is_left(file.path.name, file.blocks, removed, *sizes))
    steps = steps_of(str(file.path), {PROVENANCE: file.provenance})
    place = None if how.get("revision") else file.path.absolute()
    write_local(out, original_place(place, steps))


# ---- which blocks may go


def kept_blocks(file: GgufFile, removed: Sequence[int]) -> list[int]:
    """The blocks that stay, if llama.cpp will run them as before."""
    gone = set(removed)
    if not gone or not gone < set(range(file.blocks)):
        raise UnsupportedModelError(
            f"{file.path} has blocks 0 to {file.blocks - 1}. Remove some of them, not "
            f"{sorted(gone)}"
        )
    kept = [block for block in range(file.blocks) if block not in gone]
    if reason := _reason_against(file, kept):
        raise UnsupportedModelError(
            f"blocks of {file.path} (architecture '{file.architecture}') cannot be removed: "
            f"{reason}"
        )
    return kept


def _reason_against(file: GgufFile, kept: Sequence[int]) -> str | None:
    """Why llama.cpp would run the kept blocks incorrectly; None if it would not."""
    name = file.architecture
    if name in REFUSED:
        return REFUSED[name]
    for key, reason in REFUSED_IF.items():
        if file.setting(key):
            return f"{reason} ({key})"
    usual, width = SCALED_BY_COUNT.get(name), file.setting("embedding_length")
    if usual in (file.blocks, len(kept)) and width != file.setting(
        "attention.head_count"
    ) * file.setting("attention.key_length"):
        return f"llama.cpp scales the attention of a model of {usual} blocks in a way of its own"
    kind_of = KINDS_BY_COUNT.get(name)
    if kind_of and kind_of(file, file.blocks) != kind_of(file, len(kept)):
        return f"llama.cpp reads a model of {len(kept)} blocks as one of another kind"
    if name == "minicpm" and file.setting("residual_scale") is None:
        return "the file does not state residual_scale, and llama.cpp computes it from the count"
    period = _period(file)
    if period is None:
        return "no rule says how llama.cpp builds its blocks"
    moved = [old for new, old in enumerate(kept) if old % period != new % period]
    if moved:
        return (
            f"llama.cpp builds every {period} blocks in one pattern, by their numbers, and block "
            f"{moved[0]} would get the place of another kind. Remove whole periods of {period} "
            "blocks (--period-aligned)"
        )
    return None


def _period(file: GgufFile) -> int | None:
    """After how many blocks llama.cpp repeats what it builds by number; None if it is not known."""
    fixed = FIXED_PERIODS.get(file.architecture, 1 if file.architecture in UNIFORM else None)
    if file.architecture in WINDOWED_PERIODS:
        windowed = file.setting("attention.sliding_window")
        fixed = WINDOWED_PERIODS[file.architecture] if windowed else 1
    window = file.setting("attention.sliding_window_pattern")
    if isinstance(window, list):  # says it for every block
        fixed = 1
    elif window is not None:
        fixed = int(window)
    given = [file.setting(key) or 1 for key in PERIOD_KEYS]
    return None if fixed is None else math.lcm(fixed, *given)


# ---- the new file


def renumbered(file: GgufFile, kept: Sequence[int]) -> dict[str, Any]:
    """New name -> tensor of the reader, in the order of the file; prediction heads stay."""
    new_number = _new_numbers(file, kept)
    tensors, stored = {}, set()
    for tensor in file.reader.tensors:
        match = BLOCK.fullmatch(tensor.name)
        if match is None:
            tensors[tensor.name] = tensor
            continue
        stored.add(number := int(match["number"]))
        if number in new_number:
            tensors[f"blk.{new_number[number]}.{match['rest']}"] = tensor
    if stored != set(range(file.blocks + file.heads)):
        raise CheckpointError(
            f"the metadata of {file.path} names {file.blocks + file.heads} blocks, but its tensors "
            f"are those of {len(stored)}. Download it again"
        )
    return tensors


def _new_numbers(file: GgufFile, kept: Sequence[int]) -> dict[int, int]:
    """Old number -> new one, of the kept blocks and of the prediction heads behind them."""
    heads = range(file.blocks, file.blocks + file.heads)
    return {old: new for new, old in enumerate([*kept, *heads])}


def shortened_settings(file: GgufFile, kept: Sequence[int]) -> dict[str, Any]:
    """The changed metadata: block counts, and lists with one entry per block."""
    stays = _new_numbers(file, kept)
    changed: dict[str, Any] = {"block_count": len(stays)}
    for name, value in file.settings.items():
        if name in LEADING:
            changed[name] = sum(block < value for block in kept)
        elif isinstance(value, list) and name not in NOT_PER_BLOCK:
            if len(value) not in (file.blocks, file.blocks + file.heads):
                raise UnsupportedModelError(
                    f"{file.path}: the list '{name}' has {len(value)} entries for {file.blocks} "
                    "blocks, and no rule says what they mean"
                )
            changed[name] = [value[block] for block in stays if block < len(value)]
    return {f"{file.architecture}.{name}": value for name, value in changed.items()}


def write_header(
    file: GgufFile, tensors: dict[str, Any], changed: dict[str, Any], out: Path
) -> None:
    """Write the metadata and the table of tensors; what does not change is copied as bytes."""
    reader, new = file.reader, dict(changed)
    fields = {k: field for k, field in reader.fields.items() if not k.startswith("GGUF.")}
    ends = [field.offset for field in fields.values()][1:] + [reader.tensors[0].field.offset]
    entries = [
        _entry(file, key, new.pop(key), field.types)
        if key in new
        else reader.data[field.offset : end].tobytes()
        for (key, field), end in zip(fields.items(), ends, strict=True)
    ]
    entries += [_entry(file, key, value, STRING) for key, value in new.items()]
    table, start = [], 0
    for name, tensor in tensors.items():
        shape = tensor.shape.tolist()
        table += [
            _text(file, name), _numbers(file, "u4", len(shape)), _numbers(file, "u8", *shape),
            _numbers(file, "u4", tensor.tensor_type), _numbers(file, "u8", start),
        ]  # fmt: skip
        start += _aligned(file, int(tensor.n_bytes))
    version = int(reader.fields["GGUF.version"].contents()) & 0xFFFF
    head = [
        b"GGUF",
        _numbers(file, "u4", version),
        _numbers(file, "u8", len(tensors), len(entries)),
    ]
    out.write_bytes(b"".join([*head, *entries, *table]))


def _entry(file: GgufFile, key: str, value: Any, types: Sequence[int]) -> bytes:
    """One entry of the metadata."""
    kind, inner = types[0], types[-1]
    start = _text(file, key) + _numbers(file, "u4", kind)
    if kind == STRING[0]:
        return start + _text(file, value)
    number = file.reader.gguf_scalar_to_np[inner]().dtype.str[1:]
    if kind == inner:
        return start + _numbers(file, number, value)
    size = _numbers(file, "u4", inner) + _numbers(file, "u8", len(value))
    return start + size + _numbers(file, number, *value)


def _numbers(file: GgufFile, kind: str, *values: Any) -> bytes:
    import numpy as np

    return np.array(values, np.dtype(file.byte_order + kind)).tobytes()


def _text(file: GgufFile, text: str) -> bytes:
    return _numbers(file, "u8", len(text.encode())) + text.encode()


def copy_tensors(
    file: GgufFile, tensors: dict[str, Any], out: Path, advance: Callable[[int], None]
) -> None:
    """Append the bytes of tensors as they are in the file; neighbours are copied together."""
    ranges: list[tuple[int, int]] = []
    for tensor in tensors.values():
        start, size = int(tensor.data_offset), int(tensor.n_bytes)
        if ranges and start == _aligned(file, ranges[-1][1]):
            ranges[-1] = ranges[-1][0], start + size
        else:
            ranges.append((start, start + size))
    with open(out, "r+b", buffering=0) as stream:
        stream.seek(0, os.SEEK_END)
        for start, end in ranges:
            _pad(file, stream)
            copy_range(file.path, start, end - start, stream, advance)
        _pad(file, stream)


def _aligned(file: GgufFile, position: int) -> int:
    return position + -position % file.alignment


def _pad(file: GgufFile, stream: FileIO) -> None:
    stream.write(b"\0" * (_aligned(file, stream.tell()) - stream.tell()))


def _fill_in_hash(file: GgufFile, digest: str) -> None:
    """Write the hash of the source into the provenance, which is in the header."""
    with open(file.path, "r+b") as stream:
        header = stream.read(file.reader.data_offset)
        stream.seek(header.rindex(UNKNOWN_HASH.encode()))
        stream.write(digest.encode())


def _verify(written: GgufFile, file: GgufFile, tensors: dict[str, Any]) -> None:
    """Whether the new file's header names the tensors that were to be written."""
    found = {t.name: (t.tensor_type, t.shape.tolist()) for t in written.reader.tensors}
    expected = {name: (t.tensor_type, t.shape.tolist()) for name, t in tensors.items()}
    if found != expected:
        raise CheckpointError(
            f"the file written from {file.path} does not have the tensors it should have; it was "
            "deleted. Please report this"
        )
