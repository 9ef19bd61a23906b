"""The least-squares map of one gap, from sums over tokens alone.

A projection adds `M` to the stream, which then is `Z`, and `H` is where the stream should be.
Replacing `M` by `M T` with `T = I + D` leaves `R - M D`, with `R = H - Z` what is missing, so that

    min_T  ‖(M T + Y) - H‖² + λ‖T - I‖²    is    min_D  ‖M D - R‖² + λ‖D‖²    (Y = Z - M)

and its answer `D = (MᵀM + λI)⁻¹ MᵀR` needs two matrices, whatever the number of tokens. How much
of the error is left on other tokens follows from the same sums of theirs.

Where we differ from the paper: by default the error of each token counts in parts of the token's
own mean square in `H`, which is what the norm at the entry of the next block will divide it by.
Streams hold a few tokens of a hundred times the size of all others; with every token counted alike
(`weighting="none"`, the formula above) these alone decide, and the others may be left worse.

Source: Shopkhoev et al. 2025, ReplaceMe, arXiv:2505.02819; the sums are float64 throughout.

Shapes: N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 100.0)
"""How strongly the map is held back, in parts of the mean square of `M` summed over tokens."""


class Moments:
    """Sums over tokens of what the map depends on."""

    def __init__(self, width: int, device: torch.device, *, weighted: bool) -> None:
        """
        Args:
            weighted: count each token in parts of its own mean square in H.
        """
        if device.type == "mps":  # which has no float64
            device = torch.device("cpu")
        zeros = torch.zeros((width, width), dtype=torch.float64, device=device)
        self.weighted = weighted
        self.products_DD = zeros
        """MᵀM"""
        self.cross_DD = zeros.clone()
        """MᵀR"""
        self.missing = 0.0
        """‖R‖²"""
        self.wanted = 0.0
        """‖H‖²"""
        self.tokens = 0

    def add(self, added_ND: Tensor, after_ND: Tensor, wanted_ND: Tensor) -> None:
        """Take in more tokens: what is added to the stream, the stream then, where it should be."""
        added_ND, after_ND, wanted_ND = (
            given.to(self.products_DD.device).double() for given in (added_ND, after_ND, wanted_ND)
        )
        if self.weighted and len(wanted_ND):
            floor = torch.finfo(torch.float32).tiny
            scale_N1 = wanted_ND.square().mean(1, keepdim=True).clamp_min(floor).rsqrt()
            added_ND, after_ND, wanted_ND = (
                given * scale_N1 for given in (added_ND, after_ND, wanted_ND)
            )
        missing_ND = wanted_ND - after_ND
        self.products_DD += added_ND.T @ added_ND
        self.cross_DD += added_ND.T @ missing_ND
        self.missing += missing_ND.square().sum().item()
        self.wanted += wanted_ND.square().sum().item()
        self.tokens += len(added_ND)

    def plus(self, other: Moments) -> Moments:
        """Those of both sets of tokens."""
        both = Moments(len(self.products_DD), self.products_DD.device, weighted=self.weighted)
        both.products_DD = self.products_DD + other.products_DD
        both.cross_DD = self.cross_DD + other.cross_DD
        both.missing = self.missing + other.missing
        both.wanted = self.wanted + other.wanted
        both.tokens = self.tokens + other.tokens
        return both

    def error(self, change_DD: Tensor) -> float:
        """‖M D - R‖²"""
        linear = (change_DD * self.cross_DD).sum()
        square = (change_DD * (self.products_DD @ change_DD)).sum()
        return self.missing - 2 * linear.item() + square.item()

    def relative(self, error: float) -> float:
        """A squared error in parts of ‖H‖²."""
        return error / self.wanted if self.wanted else 0.0


def penalty(moments: Moments, ridge: float) -> float:
    """λ of a ridge: so many times the mean eigenvalue of MᵀM."""
    return ridge * moments.products_DD.diagonal().mean().item()


def solve(moments: Moments, ridge: float) -> Tensor:
    """`D` of the map `T = I + D`, float64 `[D, D]`; zero where nothing is added to the stream."""
    held = penalty(moments, ridge)
    if not held:
        return torch.zeros_like(moments.cross_DD)
    matrix_DD = moments.products_DD.clone()
    matrix_DD.diagonal().add_(held)
    return torch.cholesky_solve(moments.cross_DD, torch.linalg.cholesky(matrix_DD))


def effective_rank(moments: Moments, ridge: float) -> float:
    """How many directions of `M` the map is free in: sum of e / (e + λ) over eigenvalues of MᵀM."""
    held = penalty(moments, ridge)
    values_D = torch.linalg.eigvalsh(moments.products_DD).clamp_min(0.0)
    return float((values_D / (values_D + held)).sum().item()) if held else 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """How strongly a map is held back, and what it does on held-out tokens."""

    ridge: float | None
    """None: no map of those tried does better there than none at all."""
    before: float
    """‖R‖² in parts of ‖H‖²"""
    after: float


def choose_ridge(fitted: Moments, held_out: Moments, ridges: Sequence[float] = RIDGES) -> Choice:
    """The ridge whose map, solved on some tokens, leaves the least squared error on others."""
    best, least = None, held_out.missing
    for ridge in ridges:
        left = held_out.error(solve(fitted, ridge))
        if left < least:
            best, least = ridge, left
    return Choice(best, held_out.relative(held_out.missing), held_out.relative(least))


def forced(fitted: Moments, held_out: Moments, ridge: float) -> Choice:
    """A ridge that was asked for, whatever it does on held-out tokens."""
    left = held_out.error(solve(fitted, ridge))
    return Choice(ridge, held_out.relative(held_out.missing), held_out.relative(left))
