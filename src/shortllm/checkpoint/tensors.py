"""The tensor table of a checkpoint: name -> file, dtype, shape and byte range, no data read.

Safetensors   the header of each file; the library checks it against the length of the file, so a
              truncated or damaged download is an error before any work starts
Pickled       `.bin` files, by torch's weights-only loader, memory-mapped; it never runs code
Packed        compressed-tensors: `X.weight_packed` with `X.weight_shape` and scales next to it
              counts as the weights it stands for, so a quantized model has its source's parameters

An index of shards comes with a download and is not trusted: a name such as `../other`, or a link to
such a place, would have a foreign file read and copied into a new checkpoint. The cache of the Hub
is the one layout whose links may lead out of a directory:

    models--acme--tiny/snapshots/0123abcd/model-00001-of-00002.safetensors -> ../../blobs/5c5c...
"""

from __future__ import annotations

import json
import math
import pickle
import reprlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm.errors import CheckpointError, first_line_of

if TYPE_CHECKING:
    from torch import Tensor

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"


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
    same_as: str | None = None
    """Name of an earlier tensor of a pickled file in the same memory."""

    @property
    def elements(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        """Whole bytes of one number; at least 1, also where several share a byte."""
        return max(1, self.bytes // max(1, self.elements))

    def part(self, axis: int, count: int, kept: Sequence[int]) -> TensorEntry:
        """The shares `kept` of `count` equal ones along `axis`."""
        row_bytes, odd = divmod(self.bytes, math.prod(self.shape[:axis]))
        share_bytes, odd_share = divmod(row_bytes, count)
        if self.cut or odd or odd_share or self.shape[axis] % count:
            raise CheckpointError(
                f"tensor '{self.name}' of shape {list(self.shape)} does not consist of {count} "
                f"equal shares along axis {axis}"
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
    firsts, stops = {first for first, _ in ranges}, {stop for _, stop in ranges}
    starts = [first for first, _ in ranges if first not in stops]
    return zip(starts, [stop for _, stop in ranges if stop not in firsts], strict=True)


def read_tensor_table(directory: Path) -> dict[str, TensorEntry]:
    """All stored tensors of a checkpoint directory, in file order; safetensors come first."""
    for name, read in (
        (SAFETENSORS, _read_safetensors),
        (SAFETENSORS_INDEX, _read_sharded),
        (PICKLED, _read_pickled),
        (PICKLED_INDEX, _read_sharded),
    ):
        if (directory / name).is_file():
            return read(directory / name)
    raise _no_weights(directory)


def require_weights(directory: Path) -> None:
    """Refuse a directory without weights; opens no file."""
    names = (SAFETENSORS, SAFETENSORS_INDEX, PICKLED, PICKLED_INDEX)
    if not any((directory / name).is_file() for name in names):
        raise _no_weights(directory)


def _no_weights(directory: Path) -> CheckpointError:
    return CheckpointError(
        f"{directory} has a config.json but no weights: expected {SAFETENSORS}, "
        f"{SAFETENSORS_INDEX} or {PICKLED}. Was the download finished?"
    )


def weight_files(directory: Path) -> set[str]:
    """Names of the files in `directory` that hold weights or an index of them, in any format."""
    return {path.name for path in directory.iterdir() if is_weights(path.name)}


def is_weights(name: str) -> bool:
    """Whether a file of this name has weights or an index of them, in any format."""
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
    indexes = (".safetensors.index.json", ".bin.index.json")
    return name.endswith(suffixes + indexes) or name.startswith("tf_model.")


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a JSON file of a checkpoint."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} has no fields. Download it again")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file of a checkpoint as transformers does."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ---- shards


def _read_sharded(index: Path) -> dict[str, TensorEntry]:
    """The table of a checkpoint whose index maps each tensor to one of several files."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map. Download it again")
    is_safe = index.name == SAFETENSORS_INDEX
    read, suffix = (_read_safetensors, ".safetensors") if is_safe else (_read_pickled, ".bin")
    tables: dict[str, dict[str, TensorEntry]] = {}
    for shard in weight_map.values():
        if not isinstance(shard, str) or shard not in tables:
            tables[str(shard)] = read(named_file(index, shard, suffix))
    missing = [name for name, shard in weight_map.items() if name not in tables[shard]]
    if missing:
        raise CheckpointError(
            f"{index} promises tensor '{missing[0]}' in {weight_map[missing[0]]}, which does not "
            "hold it" + (f" ({len(missing)} such tensors)" if len(missing) > 1 else "")
        )
    # transformers also loads tensors that a shard contains and the index leaves out
    return {
        name: entry
        for shard, table in tables.items()
        for name, entry in table.items()
        if weight_map.get(name, shard) == shard
    }


def named_file(index: Path, name: Any, suffix: str) -> Path:
    """The file `name` that an index in the same directory names; it must lie there too."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(
            f"{index} names a shard outside its own directory: {reprlib.repr(name)}. It is not "
            "read; download the checkpoint again, from a source you trust"
        )
    if not name.endswith(suffix):
        raise CheckpointError(
            f"{index} names the shard {reprlib.repr(name)}, which is not a {suffix} file. Download "
            "it again"
        )
    path = index.parent / name
    try:
        real = path.resolve(strict=True) if path.is_file() else None
    except (OSError, RuntimeError, ValueError):  # too long a name, links in a circle, half letters
        real = None
    if real is None:
        raise CheckpointError(
            f"{index} names the shard {name}, which is not there. Finish the download of "
            f"{index.parent}"
        )
    directory = index.parent.resolve()
    roots = [directory]
    if directory.parent.name == "snapshots":
        roots.append(directory.parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{index} names a shard outside its own directory: {name} is a link to {real}. It is "
            "not read; replace the link by the file itself if it belongs there"
        )
    return path


# ---- safetensors


def _read_safetensors(path: Path) -> dict[str, TensorEntry]:
    """The table of one file: 8 bytes of length, a JSON header, data."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass  # the library checks the header, and its byte ranges against the file's length
        with open(path, "rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_bytes))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is truncated, damaged or not a safetensors file ({error}). Download it again"
        ) from error
    header.pop("__metadata__", None)
    table: dict[str, TensorEntry] = {}
    for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
        start, stop = item["data_offsets"]
        shape, offset = tuple(item["shape"]), 8 + header_bytes + start
        table[name] = TensorEntry(name, path, item["dtype"], shape, stop - start, offset)
    return table


# ---- data


def read_tensor(entry: TensorEntry) -> Tensor:
    """The data of one stored tensor, in memory of its own and in its stored type.

    Read, not memory-mapped: mapped pages would count as this process's memory.
    """
    import torch
    from safetensors.torch import _TYPES as TYPES

    if entry.offset is None:
        return load_pickled(entry.file)[entry.name].clone()
    if entry.dtype not in TYPES:
        raise CheckpointError(f"{entry.file}: tensor '{entry.name}' has type {entry.dtype}")
    data = torch.empty(entry.bytes, dtype=torch.uint8)
    with open(entry.file, "rb", buffering=0) as stream:
        stream.seek(entry.offset)
        read_all(stream, memoryview(data.numpy()))  # type: ignore[arg-type]
    return data.view(TYPES[entry.dtype]).view(entry.shape)


def read_all(source: FileIO, buffer: memoryview) -> None:
    """Fill `buffer`: one unbuffered read may return less than requested."""
    while buffer:
        read = source.readinto(buffer)
        if not read:
            raise CheckpointError(f"{source.name} ended early; was it changed meanwhile?")
        buffer = buffer[read:]


# ---- pickled files


def _read_pickled(path: Path) -> dict[str, TensorEntry]:
    """The table of one `.bin`, in which several tensors may share memory."""
    from safetensors.torch import _TYPES as TYPES

    codes = {dtype: code for code, dtype in TYPES.items()}
    table: dict[str, TensorEntry] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in load_pickled(path).items():
        place = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
        )
        same = first.setdefault(place, name) if tensor.numel() else name
        if tensor.dtype not in codes:
            raise CheckpointError(
                f"{path}: tensor '{name}' has type {tensor.dtype}, which safetensors cannot store"
            )
        shape = tuple(tensor.shape)
        table[name] = TensorEntry(
            name,
            path,
            codes[tensor.dtype],
            shape,
            tensor.nbytes,
            None,
            same_as=None if same == name else same,
        )
    return table


def pickled_bytes(entry: TensorEntry) -> memoryview:
    """The data of one tensor of a pickled file, little-endian and contiguous."""
    import torch

    tensor = load_pickled(entry.file)[entry.name]
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def load_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` through the weights-only loader, memory-mapped where possible."""
    return _load_pickled(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _load_pickled(path: Path, changed_ns: int) -> dict[str, Tensor]:
    """The last file's content stays open: its tensors are read one by one."""
    import torch

    try:
        mmap = zipfile.is_zipfile(path)  # files of torch < 1.6 cannot be memory-mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} contains more than tensors and is refused, since loading it could run code. "
            "Convert it to safetensors where you trust it"
        ) from error
    except Exception as error:  # torch's reader raises whatever a damaged file leads to
        raise CheckpointError(
            f"{path} is damaged or truncated ({first_line_of(error)}). Download it again"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and _is_plain(tensor) for name, tensor in content.items()
    ):
        raise CheckpointError(f"{path} is not a plain table of tensors. Convert it to safetensors")
    return content


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor whose elements all have memory of their own.

    Views that repeat their memory let a file of a few bytes stand for any amount.
    """
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return value.device.type == "cpu" and value.nbytes <= value.untyped_storage().nbytes()


# ---- packed weights

PACKED = ".weight_packed"
SHAPE = ".weight_shape"
PACKING_INFO = (SHAPE, ".weight_scale", ".weight_zero_point", ".weight_g_idx")
"""Endings of tensors that only say how to read the packed ones."""


def is_packed(raw_config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a checkpoint of compressed-tensors."""
    found = raw_config.get("quantization_config")
    return isinstance(found, Mapping) and found.get("quant_method") == "compressed-tensors"


def unpacked_elements(
    tensors: Mapping[str, TensorEntry], raw_config: Mapping[str, Any]
) -> dict[str, int]:
    """Tensor name -> number of weights it stands for; 0 for what only says how to read others."""
    counts = {name: entry.elements for name, entry in tensors.items()}
    if not is_packed(raw_config):
        return counts
    for name in tensors:
        layer = name.rpartition(".")[0]
        weights = layer + PACKED in tensors or layer + ".weight" in tensors
        if name.endswith(PACKED) and layer + SHAPE in tensors:
            rows, columns = read_tensor(tensors[layer + SHAPE]).tolist()
            counts[name] = rows * columns
        elif name.endswith(PACKING_INFO) and weights:
            counts[name] = 0
    return counts
