"""The walk: many shortened models in one pass over the blocks.

Each shortened model is a set of removed blocks. Two of them compute the same until the first block
that one has and the other lacks, so the walk carries one stream for all that agree so far. At a
block that some of them lack, the stream stays as it is for those, and goes through the block for
the others. With "nothing removed" and each single block removed this is

    before   intact, entering block b        without 0, ..., without b-1
    after    block b (intact)                block b of each of them, and without b = old intact

L(L+1)/2 block passes instead of the L(L-1) of running each shortened model on its own, with the
same numbers, since each stream meets the same blocks in the same order. Where blocks get other
weights in front of a gap (`Healed`), streams part there too.

If the blocks' weights are in memory, one group of samples at a time goes through all blocks, so
that activations stay in a CPU's cache. If they are read from files, all samples go through one
block before the next is read. The head is applied in slices of tokens: full logits never exist.

Shapes: B samples, T tokens each, D width, V vocabulary, N predictions of one slice, S streams.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shortllm.errors import UnsupportedModelError
from shortllm.journal import Journal
from shortllm.model.decoder import Decoder, Entry
from shortllm.model.hidden_states import (
    GPU_GROUP_TOKENS,
    SampleGroups,
    StreamMemory,
    block_flops,
    group_size,
    head_flops,
)
from shortllm.model.metrics import next_token_nll
from shortllm.progress import Advance
from shortllm.runtime import ALONE, Ranks

Consume = Callable[[int, Tensor, Tensor, Tensor], None]
Removals = Sequence[Collection[int]]

Value = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(logits_NV, first_NV, target_N)` -> a number for each prediction `[N]`."""

CPU_LOSS_BYTES = 64 * 2**20
GPU_LOSS_BYTES = 2**30
"""Bound on the temporaries of one slice of the head: logits and intermediates of the loss."""

FEWEST_TOKENS = 64
"""Of one slice, even above that bound: reading a large head for fewer takes longer than its use."""

TOGETHER = 128
"""Sets of a long list that are measured in one walk: each has a stream of its own at the end."""

NOTHING: frozenset[int] = frozenset()
"""The removal that leaves a model intact."""

GONE = 2**31
"""Stands for the version of a removed block; after all others in order."""


class Observer(Protocol):
    """Looks at the stream of the first removal on its way through the blocks."""

    state: dict[str, Tensor]
    """What it has gathered; an interrupted walk saves it, and restores it in place."""

    def __call__(self, b: int, before_BTD: Tensor, after_BTD: Tensor, rows: slice) -> None:
        """The samples `rows` enter block `b` as `before_BTD` and leave it as `after_BTD`."""


class Healed(Protocol):
    """Other weights that blocks of shortened models have after healing."""

    def version(self, b: int, removed: Collection[int]) -> int:
        """The number of the weights that the kept block `b` has without `removed`; 0: its own."""

    def applied(self, b: int, version: int) -> AbstractContextManager[None]:
        """Within the context, block `b` computes with these weights."""


class _Unhealed:
    """Every block has its own weights."""

    def version(self, b: int, removed: Collection[int]) -> int:
        return 0

    def applied(self, b: int, version: int) -> AbstractContextManager[None]:
        return nullcontext()


UNHEALED = _Unhealed()


@dataclass(frozen=True, slots=True)
class Step:
    """What happens at one block."""

    block: int
    split: list[tuple[int, int]]
    """Streams to copy before the block is applied: (from, to)."""
    through: dict[int, list[int]]
    """Streams that go through the block, by the version of its weights."""
    first: int | None
    """That of the first removal, if it is among them."""

    @property
    def passes(self) -> int:
        """How many streams go through the block."""
        return sum(map(len, self.through.values()))


@dataclass(frozen=True, slots=True)
class Route:
    """The steps of a walk; blocks that no shortened model has are left out."""

    steps: list[Step]
    streams: int
    final: list[int]
    """The stream of each removal after the last block."""

    @staticmethod
    def of(removals: Removals, count: int, healed: Healed = UNHEALED) -> Route:
        """How to reach all `removals` of a model of `count` blocks with the fewest block passes."""
        alike: list[tuple[int, list[int]]] = [(0, list(range(len(removals))))]
        streams, steps = 1, []
        for b in range(count):
            split, after = [], []
            through: dict[int, list[int]] = {}
            for stream, members in alike:
                versions: dict[int, list[int]] = {}
                for m in members:
                    version = GONE if b in removals[m] else healed.version(b, removals[m])
                    versions.setdefault(version, []).append(m)
                own = stream  # of the first of them; the others get copies
                for version in sorted(versions):
                    if own != stream:
                        split.append((stream, own))
                        streams += 1
                    if version != GONE:
                        through.setdefault(version, []).append(own)
                    after.append((own, versions[version]))
                    own = streams
            alike = after
            if through:
                first = next((stream for stream, members in after if 0 in members), None)
                passing = {stream for group in through.values() for stream in group}
                steps.append(Step(b, split, through, first if first in passing else None))
        final = {member: stream for stream, members in alike for member in members}
        return Route(steps, streams, [final[m] for m in range(len(removals))])


def walk(
    decoder: Decoder,
    ids_BT: Tensor,
    removals: Removals,
    *,
    consume: Consume | None = None,
    observe: Sequence[Observer] = (),
    healed: Healed = UNHEALED,
    advance: Advance = lambda work: None,
    memory: StreamMemory | None = None,
    journal: Journal | None = None,
) -> None:
    """Run every shortened model on the samples.

    Args:
        removals: for each shortened model the blocks it lacks.
        healed: other weights that blocks of these models have.
        consume: called as `consume(m, logits_NV, first_NV, target_N)` for each slice of predictions
            and each place `m` in `removals`, first with `m = 0`, whose logits are also `first_NV`.
            Without it no logits are computed.
        observe: see the stream of `removals[0]` pass through the blocks.
        advance: called with the floating-point operations done since its last call.
        journal: where the progress of a walk over streamed blocks is kept.
    """
    memory, journal = memory or StreamMemory(), journal or Journal(None, "")
    route = Route.of(removals, decoder.block_count, healed)
    obstacle = decoder.obstacle()
    is_healed = healed is not UNHEALED
    if obstacle is not None and (observe or decoder.streamed or is_healed):
        raise UnsupportedModelError(obstacle)
    if obstacle is not None:
        _run_whole(decoder, ids_BT, removals, consume, advance)
        return
    size = len(ids_BT) if decoder.streamed else group_size(decoder, ids_BT.shape[1])
    for start in range(0, len(ids_BT), size):
        chunk = _Chunk(decoder, ids_BT[start : start + size], start, route, healed, memory)
        with torch.no_grad():
            chunk.run(observe, advance, journal if decoder.streamed else Journal(None, ""))
            if consume is not None:
                chunk.head(consume, advance)


@torch.no_grad()
def _run_whole(
    decoder: Decoder,
    ids_BT: Tensor,
    removals: Removals,
    consume: Consume | None,
    advance: Advance,
) -> None:
    """Run each shortened model by its own forward: where blocks cannot be called one by one."""
    size = max(1, slice_tokens(decoder) // ids_BT.shape[1])
    for start in range(0, len(ids_BT), size):
        ids = ids_BT[start : start + size].to(decoder.device)
        target_N = ids[:, 1:].flatten()
        first_NV: Tensor | None = None
        for m, removed in enumerate(removals):
            with decoder.without(removed):
                logits_BTV = decoder.model(input_ids=ids, use_cache=False).logits
            logits_NV = logits_BTV[:, :-1].flatten(0, 1)
            first_NV = logits_NV if first_NV is None else first_NV
            if consume is not None:
                consume(m, logits_NV, first_NV, target_N)
            kept = (b for b in range(decoder.block_count) if b not in removed)
            advance(sum(block_flops(decoder, b) for b in kept) * ids.numel())
            advance(head_flops(decoder) * len(target_N))


class _Chunk:
    """Samples that go through the blocks together, and their streams `[S, B, T, D]`."""

    def __init__(
        self,
        decoder: Decoder,
        ids_BT: Tensor,
        start: int,
        route: Route,
        healed: Healed,
        memory: StreamMemory,
    ) -> None:
        self.decoder = decoder
        self.ids_BT = ids_BT.to(decoder.device)
        self.start = start
        self.route = route
        self.healed = healed
        self.groups = SampleGroups(decoder, self.ids_BT, memory)
        self.streams = self.groups.allocate(route.streams)

    def run(self, observe: Sequence[Observer], advance: Advance, journal: Journal) -> None:
        """Take all streams through the blocks."""
        decoder, route = self.decoder, self.route
        self.groups.entering(self.streams[0])
        state = {name: tensor for observer in observe for name, tensor in observer.state.items()}
        done = self._resume(journal, state)
        for step in route.steps[:done]:
            advance(self._work(step))
        steps = route.steps[done:]
        for step, b in zip(steps, decoder.through([step.block for step in steps]), strict=True):
            for source, copy in step.split:
                self.streams[copy] = self.streams[source]
            for version, streams in step.through.items():
                with self.healed.applied(b, version):
                    for rows, entry in self.groups:
                        self._apply(b, streams, rows, entry, step.first, observe)
            advance(self._work(step))
            done += 1
            if journal.due():
                journal.commit({"steps": done}, {"streams": self._used(done), **state})

    def _apply(
        self,
        b: int,
        through: Sequence[int],
        rows: slice,
        entry: Entry,
        first: int | None,
        observe: Sequence[Observer],
    ) -> None:
        """Take the samples `rows` of some streams through block `b`."""
        together = stacked_streams(self.decoder, entry)
        for place in range(0, len(through), together):
            streams = through[place : place + together]
            # a single stream is a view; several are copied together
            which = slice(streams[0], streams[0] + 1) if len(streams) == 1 else list(streams)
            before_SBTD = self.streams[which, rows].to(self.decoder.device)
            call = entry.call(self.decoder, b, len(streams))
            after_BTD = self.decoder.apply(b, before_SBTD.flatten(0, 1), call)
            after_SBTD = after_BTD.reshape(*before_SBTD.shape[:2], *after_BTD.shape[1:])
            if first is not None and first in streams:
                seen = slice(self.start + rows.start, self.start + rows.stop)
                i = streams.index(first)
                for observer in observe:
                    observer(b, before_SBTD[i], after_SBTD[i], seen)
            self.streams[which, rows] = after_SBTD.to(self.streams)

    def _work(self, step: Step) -> float:
        return block_flops(self.decoder, step.block) * self.ids_BT.numel() * step.passes

    def _used(self, done: int) -> Tensor:
        """The streams that exist after `done` steps."""
        return self.streams[: 1 + sum(len(step.split) for step in self.route.steps[:done])]

    def _resume(self, journal: Journal, state: dict[str, Tensor]) -> int:
        """Restore the state of an interrupted walk; returns the steps it had done."""
        position = journal.position()
        if position is None:
            return 0
        done = int(position["steps"])
        self._used(done).copy_(journal.tensor("streams"))
        for name, tensor in state.items():
            tensor.copy_(journal.tensor(name))
        return done

    def head(self, consume: Consume, advance: Advance) -> None:
        """Apply final norm and head, and hand out logits, one slice of tokens at a time."""
        decoder, ids_BT = self.decoder, self.ids_BT
        with decoder.tail() as logits:
            for rows, columns in token_slices(ids_BT, slice_tokens(decoder)):
                ids, target_N = ids_BT[rows, columns], targets(ids_BT, rows, columns)
                first_NV: Tensor | None = None
                for m, stream in enumerate(self.route.final):
                    piece = self.streams[stream, rows, columns].to(decoder.device)
                    logits_NV = logits(piece, ids).flatten(0, 1)
                    first_NV = logits_NV if first_NV is None else first_NV
                    consume(m, logits_NV, first_NV, target_N)
                    advance(head_flops(decoder) * len(target_N))


def mean_values(
    decoder: Decoder,
    ids_BT: Tensor,
    removals: Removals,
    values: Sequence[Value],
    *,
    counted_BT: Tensor | None = None,
    ranks: Ranks = ALONE,
    observe: Sequence[Observer] = (),
    healed: Healed = UNHEALED,
    advance: Advance = lambda work: None,
    memory: StreamMemory | None = None,
    journal: Journal | None = None,
) -> list[list[float]]:
    """Means over all counted predictions of all processes, per value and shortened model."""
    means_VMB = sample_means(
        decoder, ids_BT, removals, values, counted_BT=counted_BT, observe=observe, healed=healed,
        advance=advance, memory=memory, journal=journal,
    )  # fmt: skip
    # by the part of a sample that counts, so that whole samples weigh exactly 1
    weight_B = predictions_of(ids_BT, counted_BT) / (ids_BT.shape[1] - 1)
    totals_VM = (means_VMB * weight_B).sum(dim=2)
    ranks.add_up([totals_VM])
    return (totals_VM / ranks.total(weight_B.sum().item())).tolist()


def sample_means(
    decoder: Decoder,
    ids_BT: Tensor,
    removals: Removals,
    values: Sequence[Value],
    *,
    counted_BT: Tensor | None = None,
    observe: Sequence[Observer] = (),
    healed: Healed = UNHEALED,
    advance: Advance = lambda work: None,
    memory: StreamMemory | None = None,
    journal: Journal | None = None,
) -> Tensor:
    """Means over the predictions of each sample, `[values, shortened models, samples]`, float64.

    Args:
        counted_BT: the tokens whose prediction counts, at least one of each sample; default: all.
    """
    samples, predictions = len(ids_BT), ids_BT.shape[1] - 1
    counted_N = None if counted_BT is None else counted_BT[:, 1:].flatten().cpu()
    totals_VMB = torch.zeros(len(values), len(removals), samples, dtype=torch.float64)
    seen = [0] * len(removals)  # slices come in the order of the samples

    def consume(m: int, logits_NV: Tensor, first_NV: Tensor, target_N: Tensor) -> None:
        start, stop = seen[m], seen[m] + len(target_N)
        sample_N = torch.arange(start, stop) // predictions
        seen[m] = stop
        for i, value in enumerate(values):
            found_N = value(logits_NV, first_NV, target_N).cpu().double().expand(len(sample_N))
            if counted_N is not None:
                found_N = found_N.where(counted_N[start:stop], 0.0)
            totals_VMB[i, m].index_add_(0, sample_N, found_N)

    if samples:
        walk(
            decoder, ids_BT, removals, consume=consume, observe=observe, healed=healed,
            advance=advance, memory=memory, journal=journal,
        )  # fmt: skip
    return totals_VMB / predictions_of(ids_BT, counted_BT)


def predictions_of(ids_BT: Tensor, counted_BT: Tensor | None) -> Tensor:
    """How many predictions of each sample count, `[B]`, float64."""
    if counted_BT is None:
        return torch.full((len(ids_BT),), float(ids_BT.shape[1] - 1), dtype=torch.float64)
    return counted_BT[:, 1:].sum(dim=1).cpu().double()


def sample_nlls(
    decoder: Decoder,
    ids_BT: Tensor,
    removals: Removals,
    *,
    ranks: Ranks = ALONE,
    advance: Advance = lambda work: None,
    memory: StreamMemory | None = None,
    journal: Journal | None = None,
) -> Tensor:
    """Mean NLLs, nats, of each shortened model on each sample of all processes, `[M, B]`."""
    [own_MB] = sample_means(
        decoder, ids_BT, removals, [target_nll], advance=advance, memory=memory, journal=journal
    )
    return ranks.in_order(own_MB.T).T


def target_nll(logits_NV: Tensor, first_NV: Tensor, target_N: Tensor) -> Tensor:
    """The NLL of each target, as a number for `sample_means`."""
    return next_token_nll(logits_NV, target_N)


def mean_losses(
    decoder: Decoder,
    ids_BT: Tensor,
    removals: Removals,
    *,
    value: Value = target_nll,
    intact: Collection[int] | None = None,
    counted_BT: Tensor | None = None,
    together: int | None = None,
    ranks: Ranks = ALONE,
    healed: Healed = UNHEALED,
    advance: Advance = lambda work: None,
    memory: StreamMemory | None = None,
    journal: Journal | None = None,
) -> list[float]:
    """The mean of `value` for each shortened model; by default its NLL, nats.

    Args:
        intact: the removal whose logits `value` is given as the first ones.
    """
    first = [] if intact is None else [intact]
    journal, found = journal or Journal(None, ""), []
    for start in range(0, len(removals), together or len(removals) or 1):
        chunk = removals[start : start + together] if together else removals
        [means] = mean_values(
            decoder, ids_BT, [*first, *chunk], [value], counted_BT=counted_BT, ranks=ranks,
            healed=healed, advance=advance, memory=memory, journal=journal.part(f"sets-{start}"),
        )  # fmt: skip
        found += means[len(first) :]
    return found


def targets(ids_BT: Tensor, rows: slice, columns: slice) -> Tensor:
    """The tokens to be predicted at the positions of a slice, `[N]`."""
    return ids_BT[rows, columns.start + 1 : columns.stop + 1].flatten()


def token_slices(ids_BT: Tensor, limit: int) -> Iterator[tuple[slice, slice]]:
    """Slices of `limit` tokens of all positions but a sample's last; whole samples if they fit."""
    samples, length = ids_BT.shape
    columns = min(length - 1, limit)
    rows = max(1, limit // (length - 1))
    for row in range(0, samples, rows):
        for column in range(0, length - 1, columns):
            yield slice(row, row + rows), slice(column, min(column + columns, length - 1))


def stacked_streams(decoder: Decoder, entry: Entry) -> int:
    """Streams of a group in one call; one on a CPU, where others must not change its numbers."""
    if decoder.device.type == "cpu":
        return 1
    return max(1, GPU_GROUP_TOKENS // entry.ids_BT.numel())


def slice_tokens(decoder: Decoder) -> int:
    """Tokens whose logits exist at once."""
    limit = CPU_LOSS_BYTES if decoder.device.type == "cpu" else GPU_LOSS_BYTES
    copies = 8 if decoder.dtype.itemsize == 4 else decoder.dtype.itemsize + 8
    return max(FEWEST_TOKENS, limit // (decoder.vocabulary * copies))


def walk_flops(
    decoder: Decoder, removals: Removals, samples: int, length: int, *, head: bool = True
) -> float:
    """Floating-point operations of `walk`: the total of what its `advance` is told."""
    if decoder.obstacle() is not None:
        kept = (b for removed in removals for b in range(decoder.block_count) if b not in removed)
        blocks = sum(block_flops(decoder, b) for b in kept)
    else:
        steps = Route.of(removals, decoder.block_count).steps
        blocks = sum(block_flops(decoder, step.block) * step.passes for step in steps)
    heads = head_flops(decoder) * len(removals) * samples * (length - 1) if head else 0.0
    return blocks * samples * length + heads
