"""Files that an index names: they must lie in the checkpoint's own directory.

An index comes with a download and is not trusted: a name such as `../other` or `/etc/passwd`, or a
link to such a place, would have a foreign file read and copied into a new checkpoint. The cache of
the Hub is the one layout whose links lead out of a directory, and rightly so:

    models--acme--tiny/snapshots/0123abcd/model-00001-of-00002.safetensors -> ../../blobs/5c5c...


The tensor table of a checkpoint: name -> file, dtype, shape and byte range, without reading the
data.

Safetensors files are read by their header alone, which is checked against the file's length, so
that a truncated or damaged file is an error before any work starts. Pickled files (`.bin`) go
through torch's weights-only loader, memory-mapped, and never execute code.


Quantized checkpoints in the format of compressed-tensors: what a stored tensor stands for.

    X.weight_packed   several weights to an int32        X.weight_shape   rows and columns
    X.weight          8-bit weights, one to a byte       X.weight_scale, ...   beside either

Counted as the weights they stand for, so that a quantized model has the parameters of its source.


Pickled weights (`.bin`): read by torch's weights-only loader, which runs no code.

A pickle is a program, and one that was made to do harm does it when it is loaded. The weights-only
loader knows how to rebuild tensors and nothing else; whatever it refuses is refused here, in one
line. Every command reads such files through this module.
"""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm.errors import CheckpointError
from shortllm.files import parsed_json

if TYPE_CHECKING:
    from torch import Tensor


def named_file(index: Path, name: Any, suffix: str) -> Path:
    """The file `name` beside an index.

    Args:
        suffix: what it must end with.
    Raises:
        CheckpointError: it is not there, lies or leads elsewhere, or is of another kind.
    """
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(
            f"{index} names a shard outside its own directory: {name!r}. It is not read; download "
            "the checkpoint again, from a source you trust"
        )
    if not name.endswith(suffix):
        raise CheckpointError(
            f"{index} names the shard {name!r}, which is no {suffix} file. Download it again"
        )
    path = index.parent / name
    real = _place(path)
    if real is None:
        raise CheckpointError(
            f"{index} names the shard {name}, which is not there. Finish the download of "
            f"{index.parent}"
        )
    if not any(real.is_relative_to(root) for root in _roots(index.parent)):
        raise CheckpointError(
            f"{index} names a shard outside its own directory: {name} is a link to {real}. It is "
            "not read; put the file itself in the place of the link if it belongs there"
        )
    return path


def _place(path: Path) -> Path | None:
    """Where a file really lies; None if there is none."""
    try:
        return path.resolve(strict=True) if path.is_file() else None
    except (OSError, RuntimeError, ValueError):  # too long a name, links in a circle, half letters
        return None


def _roots(directory: Path) -> list[Path]:
    """Where files of a checkpoint may lie: its directory, or the blobs of its Hub cache."""
    directory = directory.resolve()
    if directory.parent.name == "snapshots":
        return [directory, directory.parent.parent / "blobs"]
    return [directory]


SAFETENSORS = "model.safetensors"

SAFETENSORS_INDEX = "model.safetensors.index.json"

PICKLED = "pytorch_model.bin"

PICKLED_INDEX = "pytorch_model.bin.index.json"

MAX_HEADER_BYTES = 100_000_000

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element of each safetensors dtype whose elements are whole bytes."""

ITEM_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits per element of the others."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Which part of a stored tensor's bytes is taken: the same ranges of every row."""

    row_bytes: int
    ranges: tuple[tuple[int, int], ...]
    """First byte and the one behind the last within a row, ascending."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor, or a part of it."""

    name: str
    file: Path
    dtype: str
    """Safetensors code, e.g. `BF16`."""
    shape: tuple[int, ...]
    bytes: int
    offset: int | None
    """First byte of the data inside `file`; None in a pickled file."""
    cut: Cut | None = None
    """With one, shape and bytes are those of the part."""

    @property
    def elements(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)

    def part(self, axis: int, count: int, kept: Sequence[int]) -> TensorEntry:
        """The shares `kept` of `count` equal ones along `axis`.

        Raises:
            CheckpointError: the shares are not whole bytes and rows.
        """
        row_bytes, odd = divmod(self.bytes, math.prod(self.shape[:axis]))
        share_bytes, odd_share = divmod(row_bytes, count)
        if self.cut or odd or odd_share or self.shape[axis] % count:
            raise CheckpointError(
                f"tensor '{self.name}' of shape {list(self.shape)} does not hold {count} equal "
                f"shares along axis {axis}"
            )
        size = self.shape[axis] // count * len(kept)
        ranges = [(share * share_bytes, (share + 1) * share_bytes) for share in kept]
        return replace(
            self,
            shape=(*self.shape[:axis], size, *self.shape[axis + 1 :]),
            bytes=self.bytes // count * len(kept),
            cut=Cut(row_bytes, tuple(_joined(ranges))),
        )


def _joined(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same ranges, those that touch as one."""
    first, stop = ranges[0]
    for following in ranges[1:]:
        if following[0] != stop:
            yield first, stop
            first = following[0]
        stop = following[1]
    yield first, stop


def read_tensor_table(directory: Path) -> dict[str, TensorEntry]:
    """All stored tensors of a checkpoint directory, in file order.

    Looks for, in this order: one safetensors file, a safetensors index, one `.bin`, a `.bin` index.

    Raises:
        CheckpointError: no weights, a missing shard, a damaged file, or an index that does not fit.
    """
    if (directory / SAFETENSORS).is_file():
        return _read_safetensors(directory / SAFETENSORS)
    if (directory / SAFETENSORS_INDEX).is_file():
        return _read_sharded(directory / SAFETENSORS_INDEX)
    if (directory / PICKLED).is_file():
        return _read_pickled(directory / PICKLED)
    if (directory / PICKLED_INDEX).is_file():
        return _read_sharded(directory / PICKLED_INDEX)
    raise CheckpointError(
        f"{directory} has a config.json but no weights: expected {SAFETENSORS}, "
        f"{SAFETENSORS_INDEX} "
        f"or {PICKLED}. Was the download finished?"
    )


def weight_files(directory: Path) -> set[str]:
    """Names of the files in `directory` that hold weights or an index of them, in any format."""
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
    indexes = (".safetensors.index.json", ".bin.index.json")
    return {
        path.name
        for path in directory.iterdir()
        if path.name.endswith(suffixes + indexes) or path.name.startswith("tf_model.")
    }


def read_json(path: Path) -> Any:
    """A JSON file of a checkpoint.

    Raises:
        CheckpointError: unreadable or not JSON.
    """
    try:
        return parsed_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Download it again") from error


def _read_sharded(index: Path) -> dict[str, TensorEntry]:
    """The table of a checkpoint whose index maps each tensor to one of several files."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} holds no weight_map. Download it again")
    tables: dict[str, dict[str, TensorEntry]] = {}
    for shard in weight_map.values():
        if not isinstance(shard, str) or shard not in tables:
            tables[str(shard)] = _read_shard(index, shard)
    missing = [name for name, shard in weight_map.items() if name not in tables[shard]]
    if missing:
        raise CheckpointError(
            f"{index} promises tensor '{missing[0]}' in {weight_map[missing[0]]}, which does not "
            "hold it" + (f" ({len(missing)} such tensors)" if len(missing) > 1 else "")
        )
    # what a shard holds and the index leaves out is loaded by transformers too
    return {
        name: entry
        for shard, table in tables.items()
        for name, entry in table.items()
        if weight_map.get(name, shard) == shard
    }


def _read_shard(index: Path, shard: Any) -> dict[str, TensorEntry]:
    """The table of one shard, whose name comes from the index and is not trusted."""
    if index.name == SAFETENSORS_INDEX:
        return _read_safetensors(named_file(index, shard, ".safetensors"))
    return _read_pickled(named_file(index, shard, ".bin"))


def _read_safetensors(path: Path) -> dict[str, TensorEntry]:
    """Parse and check one safetensors header (8 bytes of length, JSON, data)."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            head = stream.read(8)
            header_bytes = int.from_bytes(head, "little")
            if len(head) < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file ({size} bytes). Download it "
                    "again"
                )
            header = _strict_json(stream.read(header_bytes))
            entries = list(_entries(path, header, data_start=8 + header_bytes))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} has a damaged safetensors header ({error}). Download it again"
        ) from error
    _check_layout(path, entries, data_start=8 + header_bytes, size=size)
    return {entry.name: entry for entry in entries}


def _strict_json(text: bytes) -> Any:
    """JSON as the format wants it: an object in UTF-8, without NaN and half characters."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    if not text.startswith(b"{"):
        raise ValueError("it is no table of tensors")
    try:
        header = json.loads(text.decode("utf-8"), parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("lists and objects are nested too deep") from error
    json.dumps(header, ensure_ascii=False).encode("utf-8")
    return header


def _entries(path: Path, header: dict[str, Any], *, data_start: int) -> Iterator[TensorEntry]:
    """Header items as entries, in the order of their data."""
    metadata = header.pop("__metadata__", None) or {}
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata is no table of texts")
    for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
        start, stop = item["data_offsets"]
        shape = tuple(item["shape"])
        if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, stop - start)):
            raise ValueError(f"tensor '{name}' has an impossible shape or place")
        entry = TensorEntry(name, path, item["dtype"], shape, stop - start, data_start + start)
        bits = 8 * ITEM_BYTES.get(entry.dtype, 0) or ITEM_BITS.get(entry.dtype)
        if bits is None:
            raise ValueError(f"tensor '{name}' has the unknown type {entry.dtype!r}")
        if entry.elements * bits != 8 * entry.bytes:
            raise ValueError(
                f"tensor '{name}' of shape {list(shape)} and type {entry.dtype} cannot have "
                f"{entry.bytes} bytes"
            )
        yield entry


def _check_layout(path: Path, entries: list[TensorEntry], *, data_start: int, size: int) -> None:
    """Data must follow the header without gap or overlap and end with the file."""
    position = data_start
    for entry in entries:
        if entry.offset != position:
            raise CheckpointError(
                f"{path} has a damaged header: tensor '{entry.name}' is misplaced"
            )
        position += entry.bytes
    if position != size:
        state = "truncated" if size < position else "longer than its header says"
        raise CheckpointError(
            f"{path} is {state}: {position} bytes expected, {size} found. Download it again"
        )


def _read_pickled(path: Path) -> dict[str, TensorEntry]:
    """The table of one `.bin`; of tensors that share memory (tied weights) the first name stays."""
    from safetensors.torch import _TYPES as TYPES

    codes = {dtype: code for code, dtype in TYPES.items()}
    table: dict[str, TensorEntry] = {}
    seen: set[tuple[object, ...]] = set()
    for name, tensor in load_pickled(path).items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        if tensor.dtype not in codes:
            raise CheckpointError(
                f"{path}: tensor '{name}' has type {tensor.dtype}, not storable here"
            )
        table[name] = TensorEntry(
            name, path, codes[tensor.dtype], tuple(tensor.shape), tensor.nbytes, None
        )  # fmt: skip
    return table


def pickled_bytes(entry: TensorEntry) -> memoryview:
    """The data of one tensor of a pickled file, little-endian and contiguous."""
    import torch

    tensor = load_pickled(entry.file)[entry.name]
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_tensor(entry: TensorEntry) -> Tensor:
    """The data of one stored tensor, in memory of its own and in its stored type.

    Read, not memory-mapped: mapped pages would count as this process's memory for as long as the
    system likes to keep them.

    Raises:
        CheckpointError: the file ended early, or its type is not known to torch.
    """
    import torch
    from safetensors.torch import _TYPES as TYPES

    if entry.offset is None:
        return load_pickled(entry.file)[entry.name].clone()
    if entry.dtype not in TYPES:
        raise CheckpointError(f"{entry.file}: tensor '{entry.name}' has type {entry.dtype}")
    data = torch.empty(entry.bytes, dtype=torch.uint8)
    view = memoryview(data.numpy())  # type: ignore[arg-type]
    with open(entry.file, "rb", buffering=0) as stream:
        stream.seek(entry.offset)
        position = 0
        while position < entry.bytes:
            count = stream.readinto(view[position:])
            if not count:
                raise CheckpointError(f"{entry.file} ended early; was it changed meanwhile?")
            position += count
    return data.view(TYPES[entry.dtype]).view(entry.shape)


PACKED = ".weight_packed"

SHAPE = ".weight_shape"

BESIDE = (SHAPE, ".weight_scale", ".weight_zero_point", ".weight_g_idx")


def is_packed(raw_config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a checkpoint in this format."""
    held = raw_config.get("quantization_config")
    return isinstance(held, Mapping) and held.get("quant_method") == "compressed-tensors"


def unpacked_elements(
    tensors: Mapping[str, TensorEntry], raw_config: Mapping[str, Any]
) -> dict[str, int]:
    """Tensor name -> number of weights it stands for; 0 for what only says how to read others."""
    counts = {name: entry.elements for name, entry in tensors.items()}
    if not is_packed(raw_config):
        return counts
    for name in tensors:
        layer = name.rpartition(".")[0]
        if name.endswith(PACKED) and layer + SHAPE in tensors:
            rows, columns = read_tensor(tensors[layer + SHAPE]).tolist()
            counts[name] = rows * columns
        elif name.endswith(BESIDE) and (layer + PACKED in tensors or layer + ".weight" in tensors):
            counts[name] = 0
    return counts


SETTLED_NS = 100_000_000
"""From this age on a changed file has another time; clocks of file systems are coarse."""


def load_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` through the weights-only loader, memory-mapped where the file allows.

    Raises:
        CheckpointError: the file is damaged, or holds anything but tensors (it could run code).
    """
    changed_ns = max(path.stat().st_mtime_ns, path.stat().st_ctime_ns)
    if time.time_ns() - changed_ns < SETTLED_NS:
        return _load(path)
    return _remembered(path, changed_ns)


@lru_cache(maxsize=1)
def _remembered(path: Path, changed_ns: int) -> dict[str, Tensor]:
    """The last file's content: its tensors are asked for one by one."""
    return _load(path)


def _load(path: Path) -> dict[str, Tensor]:
    import torch

    for mmap in (True, False):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} holds more than tensors and is refused, since loading it could run code. "
                "Convert it to safetensors where you trust it"
            ) from error
        except Exception as error:  # whatever torch's reader stumbles over
            if mmap:
                continue  # files of torch < 1.6 cannot be memory-mapped
            raise CheckpointError(
                f"{path} is damaged or truncated ({_reason(error)}). Download it again"
            ) from error
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and _is_plain(tensor) for name, tensor in content.items()
        ):
            raise CheckpointError(
                f"{path} is not a plain table of tensors. Convert it to safetensors"
            )
        return content
    raise AssertionError("unreachable")


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor with memory of its own behind every element.

    A view that repeats its memory lets a file of a few bytes stand for any amount.
    """
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return value.device.type == "cpu" and value.nbytes <= value.untyped_storage().nbytes()


def _reason(error: Exception) -> str:
    """The first line of a foreign error."""
    return str(error).split("\n", 1)[0] or type(error).__name__
