"""Heal a narrower model without training: the channels that stay make up for those that go.

Of the inputs A of an output projection with the weights W, the channels A_K stay and A_R go. The
weights of those that stay get the change C that leaves the least of

    ‖A_K C - A_R W_R‖² + λ‖C‖²        C = (A_KᵀA_K + λI)⁻¹ A_KᵀA_R W_R

Where the method leaves a bias, A counts relative to its mean, and the bias is the mean of what is
removed less that of the change: mean(A_R) W_R - mean(A_K) C.

The inputs are those in the narrower model: the blocks before are narrower and repaired, and so is
the attention in front of an MLP. The last quarter of the samples chooses the ridge, where no change
is also a choice; the change is then solved on all. Sums are float64, of one sublayer at a time.

Source: the last step of FlattenGPT, arXiv:2602.08858.

Shapes: B samples, T tokens, N tokens of one group, C inputs of an output projection, K of them that
stay, I = K + 1 with a column of ones, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from shortllm.checkpoint.source import Checkpoint
from shortllm.healing.folding import Added, folded_into, refit, watching
from shortllm.healing.least_squares import GapSums, choose_ridge, solve
from shortllm.model.hidden_states import SampleGroups
from shortllm.progress import progress
from shortllm.runtime import ALONE
from shortllm.width_pruning.groups import Removed, Sublayer, without_units
from shortllm.width_pruning.importance import output_weight
from shortllm.width_pruning.methods import Chosen, Task
from shortllm.width_pruning.options import RepairedProjection


@torch.no_grad()
def repair(checkpoint: Checkpoint, task: Task, chosen: Chosen) -> Chosen:
    """The same choice with new weights, and with other biases where the method leaves some."""
    walk = _Walk(checkpoint, task, chosen)
    blocks = range(max(chosen.removed) + 1)
    with progress("repairing", len(blocks)) as advance:
        for b in task.decoder.through(blocks):
            walk.through(b)
            advance(1)
    return walk.found


class _Walk:
    """The hidden state `[B, T, D]` of the narrower model on its way through the blocks."""

    def __init__(self, checkpoint: Checkpoint, task: Task, chosen: Chosen) -> None:
        self._checkpoint, self._task, self._chosen = checkpoint, task, chosen
        self._samples = SampleGroups(task.decoder, task.ids(), task.memory)
        self._stream = self._samples.entering()
        self.found = replace(chosen, biases={}, folds={}, repairs={})

    def through(self, b: int) -> None:
        """Repair block `b`, its attention first, and go through it."""
        gone = self._chosen.removed.get(b)
        if gone is not None:
            groups = self._task.groups[b]
            self._repair(b, groups.attention, gone.heads, before=Removed([], []))
            self._repair(b, groups.mlp, gone.neurons, before=Removed(gone.heads, []))
        with self._narrower(b, gone):
            self._samples.apply(b, self._stream)

    @contextmanager
    def _narrower(self, b: int, gone: Removed | None) -> Iterator[None]:
        """Within the context, block `b` computes without the units `gone`, as far as repaired."""
        decoder, found = self._task.decoder, self.found
        removed = {} if gone is None else {b: gone}
        with (
            folded_into(decoder, {b: found.folds.get(b, {})}),
            without_units(decoder, self._task.groups, removed, found.biases),
        ):
            yield

    def _repair(self, b: int, sublayer: Sublayer, units: list[int], *, before: Removed) -> None:
        """Fit one output projection of block `b`, which lacks the units `before` so far."""
        if not units:
            return
        name, found = sublayer.output, self.found
        kept_C = ~sublayer.removed_C(units)
        with self._narrower(b, before):
            sums = self._measure(b, sublayer, kept_C)
        fitted = fit(*sums, bias=name in self._chosen.biases.get(b, {}))
        if fitted.change_KD is not None:
            change_CD = fitted.change_KD.new_zeros(len(kept_C), fitted.change_KD.shape[1])
            change_CD[kept_C] = fitted.change_KD
            added = Added(name, 1.0, transposed=name in self._task.groups[b].transposed)
            fold = refit(self._checkpoint, b, added, change_CD)
            found.folds[b] = found.folds.get(b, {}) | fold
        if fitted.bias_D is not None:
            found.biases.setdefault(b, {})[name] = fitted.bias_D
        record = RepairedProjection(
            projection=name,
            ridge=fitted.ridge,
            error_before=fitted.error_before,
            error_after=fitted.error_after,
        )
        found.repairs.setdefault(b, []).append(record)

    def _measure(self, b: int, sublayer: Sublayer, kept_C: Tensor) -> tuple[GapSums, GapSums]:
        """Sums over the samples to solve with and over the held-out ones; the last column of X is
        one."""
        decoder, ids_BT = self._task.decoder, self._task.ids()
        weight_CD = output_weight(decoder.blocks[b], self._task.groups[b], sublayer).T
        fitted, held_out = (
            GapSums(int(kept_C.sum()) + 1, weight_CD.shape[1], decoder.device, weighted=False)
            for _ in range(2)
        )
        weight_CD, kept_C = (one.to(fitted.products_II.device) for one in (weight_CD, kept_C))
        last = len(ids_BT) - ALONE.share_of_last_quarter(len(ids_BT))
        for group, rows in enumerate(self._samples.rows):
            with watching(decoder.blocks[b], [sublayer.output]) as seen:
                after_BTD = self._samples.after(b, self._stream, group)
            given_BTC = seen[sublayer.output][0].view(*after_BTD.shape[:2], -1)
            border = min(max(last - rows.start, 0), len(given_BTC))
            for part, sums in ((slice(border), fitted), (slice(border, None), held_out)):
                a_NC = given_BTC[part].flatten(0, 1).to(weight_CD)
                a_NK = a_NC[:, kept_C]
                sums.add(F.pad(a_NK, (0, 1), value=1.0), a_NK @ weight_CD[kept_C], a_NC @ weight_CD)
        return fitted, held_out


@dataclass(frozen=True, slots=True)
class Fit:
    """The repair of one output projection."""

    change_KD: Tensor | None
    """None if no change does better on held-out samples."""
    bias_D: Tensor | None
    ridge: float | None
    error_before: float
    """Squared error on held-out samples relative to the square of the output, with no change."""
    error_after: float


def fit(fitted: GapSums, held_out: GapSums, *, bias: bool) -> Fit:
    """The change and the bias, from sums over the samples to solve with and the held-out ones; the
    latter are added to the former."""
    means = _means(fitted) if bias else None
    tested = centred(held_out, means)
    ridge, left = choose_ridge(centred(fitted, means), tested)
    errors = tested.relative(tested.missing), tested.relative(left)
    held_out.add_to(fitted)
    means = _means(fitted) if bias else None
    change_KD = None if ridge is None else solve(centred(fitted, means), ridge).weights_ID.cpu()
    bias_D = None
    if means is not None:
        mean_K, bias_D = (mean.cpu() for mean in means)
        bias_D = bias_D if change_KD is None else bias_D - mean_K @ change_KD
    return Fit(change_KD, bias_D, ridge, *errors)


def _means(sums: GapSums) -> tuple[Tensor, Tensor]:
    """Mean of X, `[K]`, and of what is missing, `[D]`."""
    count = sums.products_II[-1, -1]
    return sums.products_II[:-1, -1] / count, sums.cross_ID[-1] / count


def centred(sums: GapSums, means: tuple[Tensor, Tensor] | None) -> GapSums:
    """The sums without the column of ones, X and R relative to `means` `[K]` and `[D]`."""
    if means is None:
        return sums.rows(slice(-1))
    mean_K, mean_D = means
    found, count, ones_I = copy.copy(sums), sums.products_II[-1, -1], sums.products_II[:, -1]

    def shifted(sums_IX: Tensor) -> Tensor:
        return sums_IX[:-1] - torch.outer(mean_K, sums_IX[-1])

    found.products_II = shifted(shifted(sums.products_II).T)
    found.cross_ID = shifted(sums.cross_ID - torch.outer(ones_I, mean_D))
    found.missing_D = sums.missing_D - (2 * sums.cross_ID[-1] - count * mean_D) * mean_D
    return found
