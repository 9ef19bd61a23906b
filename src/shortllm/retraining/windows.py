"""Documents cut into the windows that are trained on, and windows collated into batches.

    stream   documents end to end, cut every `length` tokens: no padding at all      (text)
    fit      whole documents, as many as fit into a window: hardly any padding       (instructions)
    alone    one document per window, padded to the longest of its batch             (instructions)

Where the model can keep the documents of a window apart, positions start at 0 with each and no
document sees another: transformers builds the block-diagonal mask, or the sequence bounds of a
flash kernel, from such positions. Whether it can is tried on the model itself (`keeps_apart`).

Padding is on the right, where earlier positions of a causal model cannot see it, so that no batch
needs a padding mask.

B windows, T tokens, N targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from shortllm.retraining.corpus import Store
from shortllm.retraining.options import Packing

NO_TARGET = -100
"""Label of a token without a loss."""

OPEN_WINDOWS = 64
"""Windows that `fit` tries to fill at a time."""

PROBE_TOKENS = 8

PROBE_TOLERANCES = 1e-3, 3e-2
"""Largest difference of a document's logits alone and after another, relative to the largest: in
float32, and in a lower precision."""


class Windows(Dataset[dict[str, Tensor]]):
    """The windows of a store, in a fixed order."""

    def __init__(self, store: Store, *, length: int, packing: Packing, apart: bool) -> None:
        self._store = store
        self._apart = apart
        self._spans = _PACKINGS[packing](store, length)
        self.predictions: Callable[[int], dict[str, Tensor]] | None = None
        """What else belongs to a window, by its number: a teacher's cached predictions."""

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each window, without padding."""
        return np.array([sum(stop - start for start, stop in spans) for spans in self._spans])

    def __getitem__(self, window: int) -> dict[str, Tensor]:
        """`input_ids`, `labels` and, where documents are kept apart, `position_ids`, each `[T]`."""
        starts = self._store.starts
        place_T = np.concatenate([np.arange(start, stop) for start, stop in self._spans[window]])
        document_T = np.searchsorted(starts, place_T, side="right") - 1
        within_T = place_T - starts[document_T]
        ids_T = np.asarray(self._store.ids[place_T], dtype=np.int64)
        context_T = ~self._store.has_loss(place_T)
        context_T[0] = True
        if self._apart:
            context_T |= within_T == 0
        item = {"input_ids": ids_T, "labels": np.where(context_T, NO_TARGET, ids_T)}
        if self._apart:  # of a document that began earlier, the window's first token is at 0
            item["position_ids"] = np.minimum(within_T, np.arange(len(place_T)))
        tensors = {name: torch.from_numpy(values) for name, values in item.items()}
        return tensors if self.predictions is None else {**tensors, **self.predictions(window)}


def segmented(ids_ST: Tensor) -> list[dict[str, Tensor]]:
    """Segments to evaluate on, each a window."""
    labels_ST = ids_ST.clone()
    labels_ST[:, 0] = NO_TARGET
    pairs = zip(ids_ST, labels_ST, strict=True)
    return [{"input_ids": ids_T, "labels": labels_T} for ids_T, labels_T in pairs]


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Windows as a batch `[B, T]`, padded on the right; cached predictions are concatenated.

    The positions of padding are all 0: each such token is a document of its own.
    """
    batch = {"tokens": torch.tensor([len(item["input_ids"]) for item in items])}
    for name in items[0]:
        values = [item[name] for item in items]
        if name in ("input_ids", "labels", "position_ids"):
            filler = NO_TARGET if name == "labels" else 0
            batch[name] = pad_sequence(values, batch_first=True, padding_value=filler)
        else:
            batch[name] = torch.cat(values)
    return batch


Spans = list[list[tuple[int, int]]]
"""For each window the runs `[start, stop)` of the store's ids that it is made of."""


def _stream(store: Store, length: int) -> Spans:
    total = store.tokens
    starts = range(0, total - 1, length)  # one token predicts nothing
    return [[(start, min(start + length, total))] for start in starts]


def _alone(store: Store, length: int) -> Spans:
    starts = store.starts.tolist()
    return [[span] for span in zip(starts, starts[1:], strict=False)]


def _fit(store: Store, length: int) -> Spans:
    """Each document into the first open window with room for it."""
    windows: Spans = []
    opened: list[tuple[int, int]] = []  # number of a window, and its room
    for [(start, stop)] in _alone(store, length):
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


_PACKINGS = {"stream": _stream, "fit": _fit, "alone": _alone}


@torch.no_grad()
def keeps_apart(model: nn.Module, vocabulary: int) -> bool:
    """Whether a document's logits are the same after another one, told by positions, as alone."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2 * PROBE_TOKENS)
    ids = torch.randint(0, vocabulary, shape, generator=generator).to(device)
    positions = torch.arange(PROBE_TOKENS, device=device).repeat(2)[None]
    try:
        alone = model(ids[:, PROBE_TOKENS:], use_cache=False).logits
        both = model(ids, position_ids=positions, use_cache=False).logits[:, PROBE_TOKENS:]
    except TypeError:  # the model's forward takes no positions
        return False
    difference = (both - alone).abs().max() / alone.abs().max().clamp_min(1e-30)
    return bool(difference <= PROBE_TOLERANCES[alone.dtype != torch.float32])


def target_rows(labels_BT: Tensor) -> Tensor:
    """Of all positions of a batch, flattened, those whose next token has a loss; int64 `[N]`."""
    next_BT = F.pad(labels_BT[:, 1:], (0, 1), value=NO_TARGET)
    return next_BT.flatten().ne(NO_TARGET).nonzero().squeeze(-1)
