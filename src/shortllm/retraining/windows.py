"""Documents cut into the windows that are trained on, and windows put together into batches.

    stream   documents end to end, cut every `length` tokens: no padding at all      (text)
    fit      whole documents, as many as fit into a window: hardly any padding       (instructions)
    alone    one document per window, padded to the longest of its batch             (instructions)

Where the model can keep the documents of a window apart, positions start at 0 with each and no
document sees another: transformers makes the block-diagonal mask, or the sequence bounds of a
flash kernel, from such positions. Whether it can is tried on the model itself (`keeps_apart`).

Padding stands on the right, where earlier positions of a causal model cannot see it, so that no
batch needs a padding mask. B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from shortllm.retraining.store import Store

Packing = Literal["stream", "fit", "alone"]

NO_TARGET = -100
"""Label of a token that is not learnt."""

OPEN_WINDOWS = 64
"""Windows that `fit` keeps open at a time to look for room in."""

PROBE_TOKENS = 8
PROBE_TOLERANCE = {torch.float32: 1e-3}
LOW_PRECISION_PROBE_TOLERANCE = 3e-2
"""Largest difference of two logits, relative to the largest, of a document alone and in company."""


class Teacher(Protocol):
    """What a teacher said about the targets of each window, kept on disk."""

    def of(self, window: int) -> dict[str, Tensor]:
        """What the teacher says of a window."""


class Windows(Dataset[dict[str, Tensor]]):
    """The windows of a store, in a fixed order."""

    def __init__(
        self,
        store: Store,
        *,
        length: int,
        packing: Packing,
        apart: bool,
        teacher: Teacher | None = None,
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
        ids = torch.from_numpy(self._store.ids[start:stop].astype(np.int64))
        labels = ids.clone()
        positions = torch.arange(stop - start)
        first = int(np.searchsorted(starts, start, side="right")) - 1
        for document in range(first, len(prompts)):
            begin = int(starts[document]) - start
            if begin >= stop - start:
                break
            learnt_from = begin + int(prompts[document])
            labels[max(begin, 0) : max(learnt_from, 0)] = NO_TARGET
            if self._apart and begin >= 0:
                positions[begin:] = torch.arange(stop - start - begin)
                labels[begin] = NO_TARGET
        if not self._apart:
            return {"input_ids": ids, "labels": labels}
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


class Segmented(Dataset[dict[str, Tensor]]):
    """Evaluation segments `[segments, length]` as windows that are learnt from in no way."""

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

    What a teacher said is put end to end, in the order of the targets.
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
    return nn.functional.pad(values, (0, rest), value=NO_TARGET if name == "labels" else 0)


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

    Tried: the logits of the second must be those it has when it stands alone.
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
