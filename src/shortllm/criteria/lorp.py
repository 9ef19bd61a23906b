"""Blocks in turn from clusters of blocks whose inputs are alike.

S_ij is the mean cosine of the hidden states entering blocks i and j. Where it is high for distant
blocks too, what the model does is spread over its depth, and there are more clusters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from shortllm.criteria import PLACE, Scores, criterion, require_finite
from shortllm.errors import CriterionError
from shortllm.papers import LORP

if TYPE_CHECKING:
    from torch import Tensor

CLUSTERS = ((1.0, 2), (0.7, 3), (-math.inf, 4))
"""Lower bounds of the representation locality score, and the number of clusters above each."""

ITERATIONS = 100
"""Of k-means, at most."""


@criterion("lorp", needs="similarities", label=PLACE, paper=LORP)
def take_from_clusters(similarity_LL: Tensor, *, clusters: int | None = None) -> Scores:
    """Place in an order that takes blocks from clusters of blocks whose inputs are alike.

    First the most redundant block of every cluster goes, then always the next of the cluster whose
    remaining blocks are most alike. The redundancy of a block, its value, is its mean similarity to
    all other blocks of its cluster, whether they are removed or not. The first and the last block
    count as members, and come last. The paper leaves open the order of the first round (here: the
    cluster that is most alike first), a cluster of one block (least alike), and equals (later block
    first). A block that a budget protects is passed over.

    Args:
        similarity_LL: mean cosine of the hidden states entering each pair of blocks.
        clusters: their number; default: 2 to 4, by -log2 of the mean similarity of two blocks.
    """
    blocks = len(similarity_LL)
    require_finite("lorp", similarity_LL.mean(dim=1).tolist())
    if clusters is not None and not 1 <= clusters <= blocks:
        raise CriterionError(
            f"lorp.clusters {clusters} must be between 1 and {blocks}, the number of blocks"
        )
    similarity = similarity_LL.tolist()
    found = spectral_clusters(similarity_LL, clusters or min(blocks, cluster_count(similarity)))
    redundancy = [0.0] * blocks
    for cluster in found:
        for b in cluster:
            others = [similarity[b][other] for other in cluster if other != b]
            redundancy[b] = sum(others) / len(others) if others else 0.0
    order = _order(similarity, found, redundancy)
    return Scores(importance=[float(order.index(b)) for b in range(blocks)], values=redundancy)


def cluster_count(similarity: Sequence[Sequence[float]]) -> int:
    """How many clusters, by the representation locality score -log2(mean similarity of two)."""
    mean = _alikeness(similarity, range(len(similarity)))
    locality = -math.log2(mean) if mean > 0 else math.inf
    return next(count for bound, count in CLUSTERS if locality >= bound)


def _alikeness(similarity: Sequence[Sequence[float]], blocks: Collection[int]) -> float:
    """Mean similarity of two of the blocks; of a single block less than any."""
    pairs = [similarity[i][j] for i, j in combinations(sorted(blocks), 2)]
    return sum(pairs) / len(pairs) if pairs else -math.inf


def _order(
    similarity: Sequence[Sequence[float]],
    clusters: Sequence[Collection[int]],
    redundancy: Sequence[float],
) -> list[int]:
    """All blocks in removal order."""
    ends = {0, len(similarity) - 1}
    left = [set(cluster) for cluster in clusters if not ends.issuperset(cluster)]
    order: list[int] = []

    def alikeness(cluster: set[int]) -> tuple[float, int]:
        return _alikeness(similarity, cluster), max(cluster)

    def take(cluster: set[int]) -> None:
        order.append(max(cluster - ends, key=lambda b: (redundancy[b], b)))
        cluster.remove(order[-1])

    for cluster in sorted(left, key=alikeness, reverse=True):
        take(cluster)
    while left := [cluster for cluster in left if cluster - ends]:
        take(max(left, key=alikeness))
    return [*order, *sorted(ends, reverse=True)]


def spectral_clusters(similarity_LL: Tensor, count: int) -> list[list[int]]:
    """At most `count` clusters by normalised spectral clustering of the affinities (S + 1) / 2.

    k-means on the unit rows of the leading eigenvectors of D^-1/2 A D^-1/2 (Ng, Jordan and Weiss).
    """
    import torch

    affinity_LL = (similarity_LL.double() + 1) / 2
    scale_L = affinity_LL.sum(dim=1).rsqrt()
    _, vectors_LL = torch.linalg.eigh(scale_L[:, None] * affinity_LL * scale_L)
    points_LK = vectors_LL[:, -count:]
    points_LK = points_LK / points_LK.norm(dim=1, keepdim=True).clamp_min(1e-30)
    labels = k_means(points_LK, count)
    return [[b for b, own in enumerate(labels) if own == label] for label in sorted(set(labels))]


def k_means(points_LK: Tensor, count: int) -> list[int]:
    """The cluster of each point. Deterministic: the best run of those that start at each point.

    Of a run, each next centre starts at the point farthest from those before.
    """
    import torch

    best: tuple[float, list[int]] = (math.inf, [])
    for start in range(len(points_LK)):
        chosen = [start]
        while len(chosen) < count:
            distance_L = torch.cdist(points_LK, points_LK[chosen]).min(dim=1).values
            chosen.append(int(distance_L.argmax()))
        centres_CK, labels_L = points_LK[chosen], None
        for _ in range(ITERATIONS):
            nearest_L = torch.cdist(points_LK, centres_CK).argmin(dim=1)
            if labels_L is not None and bool((nearest_L == labels_L).all()):
                break
            labels_L = nearest_L
            for c in set(labels_L.tolist()):
                centres_CK[c] = points_LK[labels_L == c].mean(dim=0)
        assert labels_L is not None
        cost = float((points_LK - centres_CK[labels_L]).square().sum())
        if cost < best[0] - 1e-12:
            best = (cost, labels_L.tolist())
    return best[1]
