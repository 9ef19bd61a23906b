"""Documents cut into the windows that are trained on, and windows collated into batches.

    stream   documents end to end, cut every `length` tokens: no padding at all      (text)
    fit      whole documents, as many as fit into a window: hardly any padding       (instructions)
    alone    one document per window, padded to the longest of its batch             (instructions)

Where the model can keep the documents of a window apart, positions start at 0 with each and no
document sees another: transformers builds the block-diagonal mask, or the sequence bounds of a
flash kernel, from such positions. Whether it can is tried on the model itself (`keeps_apart`).

Padding is on the right, where earlier positions of a causal model cannot see it, so that no batch
needs a padding mask.

What a teacher predicts at every target can be kept on disk, so that the teacher need not stay in
memory: its k likeliest tokens, 6 bytes each, `WINDOWS_PER_FILE` windows in one Arrow file. A file
is complete or absent: an interrupted pass continues after the files it wrote, and several processes
each write their share. One row per window:

    ids         list of int32 [k]     in the order of the window's targets
    log_probs   list of float16 [k]

B windows, T tokens, N targets, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from shortllm.files import PARTIAL, translate_os_errors
from shortllm.retraining.store import Store
from shortllm.runtime import Ranks

Packing = Literal["stream", "fit", "alone"]

NO_TARGET = -100
"""Label of a token without a loss."""

WINDOWS_PER_FILE = 64
"""Windows whose cached predictions are in one file."""

OPEN_WINDOWS = 64
"""Windows that `fit` tries to fill at a time."""

PROBE_TOKENS = 8
PROBE_TOLERANCE = {torch.float32: 1e-3}
LOW_PRECISION_PROBE_TOLERANCE = 3e-2
"""Largest difference of a document's logits alone and after another, relative to the largest."""


class Windows(Dataset[dict[str, Tensor]]):
    """The windows of a store, in a fixed order."""

    def __init__(
        self,
        store: Store,
        *,
        length: int,
        packing: Packing,
        apart: bool,
        teacher: CachedTeacher | None = None,
    ) -> None:
        self._store = store
        self._apart = apart
        self.teacher = teacher
        if packing == "stream":
            self._spans = _stream(store, length)
        elif packing == "fit":
            self._spans = _fit(store, length)
        else:
            self._spans = [[document] for document in _wholes(store)]

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each window, without padding."""
        return np.array([sum(stop - start for start, stop in spans) for spans in self._spans])

    def __getitem__(self, window: int) -> dict[str, Tensor]:
        """`input_ids`, `labels` and, where documents are kept apart, `position_ids`, each `[T]`."""
        parts = [self._part(start, stop) for start, stop in self._spans[window]]
        item = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        item["labels"][0] = NO_TARGET
        return item if self.teacher is None else {**item, **self.teacher.of(window)}

    def _part(self, start: int, stop: int) -> dict[str, Tensor]:
        """A run of tokens of the store, its documents kept apart or not."""
        starts, prompts = self._store.starts, self._store.prompts
        ids = torch.from_numpy(self._store.ids(start, stop))
        labels = ids.clone()
        positions = torch.arange(stop - start)
        first = int(np.searchsorted(starts, start, side="right")) - 1
        for document in range(first, len(prompts)):
            begin = int(starts[document]) - start
            if begin >= stop - start:
                break
            first_target = begin + int(prompts[document])
            labels[max(begin, 0) : max(first_target, 0)] = NO_TARGET
            if self._apart and begin >= 0:
                positions[begin:] = torch.arange(stop - start - begin)
                labels[begin] = NO_TARGET
        if not self._apart:
            return {"input_ids": ids, "labels": labels}
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


class Segmented(Dataset[dict[str, Tensor]]):
    """Windows to evaluate on, `[windows, length]`, as a data set."""

    def __init__(self, ids_ST: Tensor) -> None:
        self._ids = ids_ST

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, segment: int) -> dict[str, Tensor]:
        labels = self._ids[segment].clone()
        labels[0] = NO_TARGET
        return {"input_ids": self._ids[segment], "labels": labels}


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Windows as a batch `[B, T]`, padded on the right with a document of its own.

    Cached predictions are concatenated, in the order of the targets.
    """
    longest = max(len(item["input_ids"]) for item in items)
    batch = {}
    for name in items[0]:
        if name == "input_ids" or name == "labels" or name == "position_ids":
            batch[name] = torch.stack([_padded(item[name], name, longest) for item in items])
        else:
            batch[name] = torch.cat([item[name] for item in items])
    batch["tokens"] = torch.tensor([len(item["input_ids"]) for item in items])
    return batch


def _padded(values: Tensor, name: str, longest: int) -> Tensor:
    rest = longest - len(values)
    if name == "position_ids":
        return torch.cat([values, torch.arange(rest)])
    return F.pad(values, (0, rest), value=NO_TARGET if name == "labels" else 0)


Spans = list[list[tuple[int, int]]]
"""For each window the runs `[start, stop)` of the store's ids that it is made of."""


def _stream(store: Store, length: int) -> Spans:
    total = store.tokens
    spans = [[(start, min(start + length, total))] for start in range(0, total, length)]
    return [span for span in spans if span[0][1] - span[0][0] > 1]  # one token predicts nothing


def _wholes(store: Store) -> list[tuple[int, int]]:
    starts = store.starts.tolist()
    return list(zip(starts, starts[1:], strict=False))


def _fit(store: Store, length: int) -> Spans:
    """Each document into the first open window with room for it."""
    windows: Spans = []
    opened: list[tuple[int, int]] = []  # number of a window, and its room
    for start, stop in _wholes(store):
        size = stop - start
        place = next((i for i, (_, room) in enumerate(opened) if room >= size), None)
        if place is None:
            opened.append((len(windows), length - size))
            windows.append([(start, stop)])
            if len(opened) > OPEN_WINDOWS:
                opened.remove(min(opened, key=lambda window: window[1]))
        else:
            number, room = opened[place]
            windows[number].append((start, stop))
            opened[place] = (number, room - size)
    return windows


@torch.no_grad()
def keeps_apart(model: nn.Module, vocabulary: int) -> bool:
    """Whether two documents in one window, told by their positions, do not see each other.

    Tried: the logits of the second must be those it has when it is alone.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2 * PROBE_TOKENS)
    ids = torch.randint(0, vocabulary, shape, generator=generator).to(device)
    positions = torch.arange(PROBE_TOKENS, device=device).repeat(2)[None]
    was_training = model.training
    model.eval()
    try:
        alone = _logits(model, ids[:, PROBE_TOKENS:])
        both = _logits(model, ids, position_ids=positions)[:, PROBE_TOKENS:]
    except TypeError:  # the model's forward takes no positions
        return False
    finally:
        model.train(was_training)
    difference = (both - alone).abs().max() / alone.abs().max().clamp_min(1e-30)
    return bool(difference <= PROBE_TOLERANCE.get(alone.dtype, LOW_PRECISION_PROBE_TOLERANCE))


def _logits(model: nn.Module, ids: Tensor, **positions: Any) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False, **positions).logits
    return logits


class CachedTeacher:
    """Reads what `write_cache` wrote, window by window."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open = lru_cache(maxsize=16)(_open)

    def of(self, window: int) -> dict[str, Tensor]:
        """`teacher_ids` and `teacher_log_probs`, `[N, k]`, in the order of the targets."""
        number, place = divmod(window, WINDOWS_PER_FILE)
        table = self._open(_file(self._directory, number))
        found = {}
        for name in ("ids", "log_probs"):
            kept_NK = table.column(name)[place].values
            flat = kept_NK.flatten().to_numpy()
            found[f"teacher_{name}"] = torch.tensor(flat).view(-1, kept_NK.type.list_size)
        return found


def _open(path: Path) -> Any:
    """A file of cached predictions, memory-mapped."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


@torch.no_grad()
def write_cache(
    teacher: nn.Module,
    windows: Windows,
    directory: Path,
    *,
    k: int,
    batch: int,
    ranks: Ranks,
    advance: Callable[[float], None],
) -> None:
    """Run the teacher over all windows, and keep its predictions; files that exist are kept.

    `batch` windows go through the teacher at a time; `advance` is called with the number of windows
    done since its last call.
    """
    directory.mkdir(parents=True, exist_ok=True)
    count = -(-len(windows) // WINDOWS_PER_FILE)
    for number in range(ranks.rank, count, ranks.count):
        span = range(number * WINDOWS_PER_FILE, min((number + 1) * WINDOWS_PER_FILE, len(windows)))
        if not _file(directory, number).exists():
            _write_file(_file(directory, number), teacher, windows, span, k, batch)
        advance(len(span) * ranks.count)
    ranks.wait()


def _write_file(
    path: Path, teacher: nn.Module, windows: Windows, span: range, k: int, batch: int
) -> None:
    import pyarrow as pa

    ids, log_probs, first = [], [], [0]
    for start in range(span.start, span.stop, batch):
        items = [windows[window] for window in range(start, min(start + batch, span.stop))]
        kept_NK, log_NK, counts = _likeliest(teacher, collate(items), k)
        ids.append(kept_NK)
        log_probs.append(log_NK)
        for count in counts:
            first.append(first[-1] + count)

    def by_window(parts: list[Tensor]) -> pa.ListArray:
        all_NK = torch.cat(parts)
        flat = pa.array(all_NK.flatten().numpy())
        return pa.ListArray.from_arrays(
            pa.array(first, pa.int32()), pa.FixedSizeListArray.from_arrays(flat, all_NK.shape[1])
        )

    table = pa.table({"ids": by_window(ids), "log_probs": by_window(log_probs)})
    with translate_os_errors(path.parent):
        partial = path.with_name(path.name + PARTIAL)
        with open(partial, "wb") as stream, pa.ipc.new_file(stream, table.schema) as file:
            file.write_table(table)
        os.replace(partial, path)


def _likeliest(
    teacher: nn.Module, batch: dict[str, Tensor], k: int
) -> tuple[Tensor, Tensor, list[int]]:
    """Ids and log-probabilities `[N, K]` of a batch's targets, and the targets of each window."""
    device = next(teacher.parameters()).device
    inputs = {
        name: batch[name].to(device) for name in ("input_ids", "position_ids") if name in batch
    }
    rows_N = target_rows(batch["labels"]).to(device)
    logits_NV = teacher(**inputs, use_cache=False).logits.flatten(0, 1)[rows_N]
    log_NV = F.log_softmax(logits_NV.float(), dim=-1)
    top = log_NV.topk(min(k, log_NV.shape[-1]), dim=-1)
    counts = (batch["labels"][:, 1:] != NO_TARGET).sum(dim=-1).tolist()
    return top.indices.int().cpu(), top.values.half().cpu(), counts


def target_rows(labels_BT: Tensor) -> Tensor:
    """Of all positions of a batch, flattened, those whose next token has a loss; int64 `[N]`."""
    next_BT = F.pad(labels_BT[:, 1:], (0, 1), value=NO_TARGET)
    return next_BT.flatten().ne(NO_TARGET).nonzero().squeeze(-1)


def _file(directory: Path, number: int) -> Path:
    return directory / f"{number:06d}.arrow"
