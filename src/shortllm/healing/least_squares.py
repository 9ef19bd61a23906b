"""The least-squares fit of one gap, from sums over tokens alone.

A change `C` of the block before a gap adds `X C` where `R` is missing; `unknowns.py` says what X
and R are. It is the one that leaves the least of

    ‖X C - R‖² + λ‖C‖²        C = (XᵀX + λI)⁻¹ XᵀR

which needs two matrices, whatever the number of tokens. The error that is left on other tokens
follows from the same sums over them, or from these tokens themselves (`GapTokens`). A factor α for
the whole hidden state behind the gap (`gain.py`) is one more unknown, a = α - 1, of
‖X C + a Z - R‖², and needs one more matrix, XᵀZ:

    C = (XᵀX + λI)⁻¹ (XᵀR - a XᵀZ)        a from the one equation that is left

The attention of the block adds to the hidden state too; the weights of its output projection are
solved together with those of the MLP's. What a changed attention does to the MLP behind it is not
linear, so the change of the attention is kept alone, X is read again, and the MLP's projection is
solved against what is left.

Where we differ from the paper of the map: by default the error of each token is relative to the
token's own mean square in `H`, by which the norm at the start of the next block will divide it. A
few tokens have hidden states a hundred times the size of all others; if every token counts alike
(`weighting="none"`, the formula above) these alone decide, and the others may get worse.

Source of the map: Shopkhoev et al. 2025, ReplaceMe, arXiv:2505.02819. Sums are float64; where the
model computes in half precision, products of the tokens of one group are float32.

Shapes: D width, I columns of X, N tokens of one group.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shortllm.runtime import Ranks

COLUMNS = 512
"""About how many columns of R choose the ridge."""

TOGETHER = 128
"""Columns of R that are solved at once, or of XᵀX that are added to."""

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 100.0)
"""Ridge strengths to choose from, relative to the mean square of `X` summed over tokens."""

LEAST_GAIN = 0.25
"""Factors of the hidden state that are smaller, or larger than its inverse, are not believed."""


@dataclass(frozen=True, slots=True)
class Change:
    """A solution: what is added to weights, and what the hidden state is then multiplied by."""

    weights_ID: Tensor
    gain: float = 1.0


class GapSums:
    """Sums over tokens that a change depends on."""

    def __init__(
        self,
        columns: int,
        width: int,
        device: torch.device,
        *,
        weighted: bool,
        gain: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        """No tokens yet.

        Args:
            weighted: each token counts relative to its own mean square in H.
            gain: whether a factor for the whole hidden state is one of the unknowns.
            dtype: of the products of the tokens of one `add`; those of all are added in float64.
        """
        if device.type == "mps":  # which has no float64
            device = torch.device("cpu")
        self.weighted, self.dtype = weighted, dtype
        self.products_II = torch.zeros((columns, columns), dtype=torch.float64, device=device)
        """XᵀX"""
        self.cross_ID = torch.zeros((columns, width), dtype=torch.float64, device=device)
        """XᵀR"""
        self.missing_D = torch.zeros(width, dtype=torch.float64, device=device)
        """‖R‖² of each column"""
        self.wanted = 0.0
        """‖H‖²"""
        self.stretch_ID = torch.zeros_like(self.cross_ID) if gain else None
        """XᵀZ"""
        self.existing_D = torch.zeros(width, dtype=torch.float64, device=device)
        """‖Z‖² of each column"""
        self.overlap_D = torch.zeros(width, dtype=torch.float64, device=device)
        """<Z, R> of each column"""

    def add(
        self, x_NI: Tensor, after_ND: Tensor, wanted_ND: Tensor, state_ND: Tensor | None = None
    ) -> None:
        """Take in more tokens.

        Args:
            x_NI: X.
            after_ND: what there is, usually the hidden state.
            wanted_ND: what there should be.
            state_ND: the hidden state that tokens count relative to; default: `wanted_ND`.
        """
        state_ND = wanted_ND if state_ND is None else state_ND
        x_NI, after_ND, wanted_ND, state_ND = (
            given.to(self.missing_D.device, self.dtype)
            for given in (x_NI, after_ND, wanted_ND, state_ND)
        )
        if self.weighted and len(wanted_ND):
            floor = torch.finfo(torch.float32).tiny
            scale_N1 = state_ND.square().mean(1, keepdim=True).clamp_min(floor).rsqrt()
            x_NI, after_ND, wanted_ND = (given * scale_N1 for given in (x_NI, after_ND, wanted_ND))
        self.wanted += wanted_ND.square().sum().item()
        self._add(x_NI, after_ND, wanted_ND - after_ND)

    def _add(self, x_NI: Tensor, after_ND: Tensor, missing_ND: Tensor) -> None:
        """Add to the sums."""
        _add_product(self.products_II, x_NI, x_NI)
        _add_product(self.cross_ID, x_NI, missing_ND)
        self.missing_D += missing_ND.square().sum(0)
        if self.stretch_ID is not None:
            _add_product(self.stretch_ID, x_NI, after_ND)
            self.existing_D += after_ND.square().sum(0)
            self.overlap_D += (after_ND * missing_ND).sum(0)

    def add_to(self, total: GapSums) -> None:
        """Add these sums to those over other tokens; in place, as the matrices may be large."""
        total.products_II += self.products_II
        total.cross_ID += self.cross_ID
        total.missing_D += self.missing_D
        total.wanted += self.wanted
        if total.stretch_ID is not None and self.stretch_ID is not None:
            total.stretch_ID += self.stretch_ID
        total.existing_D += self.existing_D
        total.overlap_D += self.overlap_D

    def add_up(self, ranks: Ranks) -> None:
        """Add the sums of all processes."""
        wanted = torch.tensor(self.wanted, dtype=torch.float64)
        sums = [self.products_II, self.cross_ID, self.missing_D, wanted]
        if self.stretch_ID is not None:
            sums += [self.stretch_ID, self.existing_D, self.overlap_D]
        ranks.add_up(sums)
        self.wanted = wanted.item()

    def rows(self, chosen: slice) -> GapSums:
        """The sums for some columns of X, as views."""
        found = copy.copy(self)
        found.products_II = self.products_II[chosen, chosen]
        found.cross_ID = self.cross_ID[chosen]
        if self.stretch_ID is not None:
            found.stretch_ID = self.stretch_ID[chosen]
        return found

    def columns(self, chosen: slice) -> GapSums:
        """The sums for some columns of R, as views; `wanted` stays that of all."""
        found = copy.copy(self)
        found.cross_ID, found.missing_D = self.cross_ID[:, chosen], self.missing_D[chosen]
        if self.stretch_ID is not None:
            found.stretch_ID = self.stretch_ID[:, chosen]
            found.existing_D, found.overlap_D = self.existing_D[chosen], self.overlap_D[chosen]
        return found

    @property
    def missing(self) -> float:
        """‖R‖²"""
        return self.missing_D.sum().item()

    @property
    def existing(self) -> float:
        """‖Z‖²"""
        return self.existing_D.sum().item()

    @property
    def overlap(self) -> float:
        """<Z, R>"""
        return self.overlap_D.sum().item()

    def error(self, change: Change) -> float:
        """‖α X C + a Z - R‖²"""
        weights_ID, gain, a = change.weights_ID, change.gain, change.gain - 1.0
        linear = gain * _dot(weights_ID, self.cross_ID) + a * self.overlap
        square = gain**2 * _dot(weights_ID, self.products_II @ weights_ID) + a**2 * self.existing
        if self.stretch_ID is not None:
            square += 2 * a * gain * _dot(weights_ID, self.stretch_ID)
        return self.missing - 2 * linear + square

    def relative(self, error: float) -> float:
        """A squared error relative to ‖H‖²."""
        return error / self.wanted if self.wanted else 0.0


class GapTokens(GapSums):
    """The tokens themselves, which choose a ridge but solve nothing: where they are fewer than X
    has columns, they take less memory than sums over them."""

    def __init__(self, columns: int, width: int, device: torch.device, **options: Any) -> None:
        """No tokens yet; the arguments are those of `GapSums`."""
        super().__init__(0, width, device, **options)
        self.tokens: list[tuple[Tensor, Tensor, Tensor]] = []
        """X, Z and R of each group of tokens, relative to their hidden states"""

    def _add(self, x_NI: Tensor, after_ND: Tensor, missing_ND: Tensor) -> None:
        """Keep the tokens."""
        self.missing_D += missing_ND.square().sum(0)
        self.tokens.append((x_NI, after_ND, missing_ND))

    def add_to(self, total: GapSums) -> None:
        """Add the sums over these tokens to others in place."""
        total.wanted += self.wanted
        for tokens in self.tokens:
            total._add(*tokens)

    def rows(self, chosen: slice) -> GapTokens:
        """The tokens with some columns of X, as views."""
        found = copy.copy(self)
        found.tokens = [(x_NI[:, chosen], z_ND, r_ND) for x_NI, z_ND, r_ND in self.tokens]
        return found

    def columns(self, chosen: slice) -> GapTokens:
        """The tokens with some columns of R, as views; `wanted` stays that of all."""
        found = copy.copy(self)
        found.missing_D = self.missing_D[chosen]
        found.tokens = [
            (x_NI, z_ND[:, chosen], r_ND[:, chosen]) for x_NI, z_ND, r_ND in self.tokens
        ]
        return found

    def error(self, change: Change) -> float:
        """‖α X C + a Z - R‖²"""
        weights_ID, a = change.gain * change.weights_ID, change.gain - 1.0
        left = 0.0
        for tokens in self.tokens:
            x_NI, after_ND, missing_ND = (one.to(weights_ID.dtype) for one in tokens)
            left += (x_NI @ weights_ID + a * after_ND - missing_ND).square().sum().item()
        return left


def penalty(sums: GapSums, ridge: float) -> float:
    """λ of a ridge: that many times the mean eigenvalue of XᵀX."""
    return ridge * sums.products_II.diagonal().sum().item() / max(len(sums.products_II), 1)


def solve(
    sums: GapSums, ridge: float, *, diagonal: bool = False, overwrite: bool = False
) -> Change:
    """The change, float64 `[I, D]`; zero if `X` is zero. With `diagonal`, a diagonal matrix.

    With `overwrite`, XᵀX is lost, and no other matrix of its size is in memory.
    """
    held = penalty(sums, ridge)
    factor_II = None if diagonal or not held else _cholesky(sums.products_II, held, overwrite)

    def inverse(given_ID: Tensor) -> Tensor:
        """(XᵀX + λI)⁻¹ of it."""
        if not held:
            return torch.zeros_like(given_ID)
        if factor_II is None:
            return torch.diag(given_ID.diagonal() / (sums.products_II.diagonal() + held))
        solved_ID = given_ID.mT.clone(memory_format=torch.contiguous_format).mT
        torch.linalg.solve_triangular(factor_II, solved_ID, upper=False, out=solved_ID)
        torch.linalg.solve_triangular(factor_II.mT, solved_ID, upper=True, out=solved_ID)
        return solved_ID

    width = sums.cross_ID.shape[1]
    starts = [0] if diagonal else range(0, width, TOGETHER)
    parts = [slice(start, width if diagonal else start + TOGETHER) for start in starts]
    a = _gain(sums, inverse, parts)
    change_ID = torch.empty_like(sums.cross_ID)
    for part in parts:
        missing_ID = sums.cross_ID[:, part]
        if sums.stretch_ID is not None and a:
            missing_ID = missing_ID - a * sums.stretch_ID[:, part]
        change_ID[:, part] = inverse(missing_ID) / (1.0 + a)
    return Change(change_ID, 1.0 + a)


def _gain(sums: GapSums, inverse: Callable[[Tensor], Tensor], parts: Iterable[slice]) -> float:
    """The factor of the hidden state minus 1; 0 where it is not wanted, or not believed."""
    if sums.stretch_ID is None:
        return 0.0
    explained, overlap = 0.0, sums.overlap
    for part in parts:
        solved_ID = inverse(sums.stretch_ID[:, part])
        explained += _dot(sums.stretch_ID[:, part], solved_ID)
        overlap -= _dot(sums.cross_ID[:, part], solved_ID)
    unexplained = sums.existing - explained
    if not unexplained > 1e-12 * sums.existing:  # X can also do what the gain does
        return 0.0
    a = overlap / unexplained
    return a if LEAST_GAIN <= 1.0 + a <= 1.0 / LEAST_GAIN else 0.0


def _cholesky(matrix_II: Tensor, diagonal: float, overwrite: bool) -> Tensor:
    """The lower Cholesky factor of a symmetric matrix plus a number on its diagonal.

    It is solved in place, and by column, so that no other matrix of this size is in memory.
    """
    factor_II = (matrix_II if overwrite else matrix_II.clone()).mT
    factor_II.diagonal().add_(diagonal)
    torch.linalg.cholesky(factor_II, out=factor_II)
    return factor_II


def _add_product(total: Tensor, one_NI: Tensor, other_NJ: Tensor) -> None:
    """Add XᵀY, with no other matrix of this size in memory."""
    if one_NI.dtype == total.dtype:
        total.addmm_(one_NI.T, other_NJ)
        return
    for start in range(0, len(total), TOGETHER):
        rows = slice(start, start + TOGETHER)
        total[rows] += one_NI[:, rows].T @ other_NJ


def _dot(one: Tensor, other: Tensor) -> float:
    """The sum of the products of all elements, with no third matrix in memory."""
    return torch.einsum("ij,ij->", one, other).item()


def effective_rank(sums: GapSums, ridge: float, *, diagonal: bool = False) -> float:
    """In how many directions of `X` it is free: sum of e / (e + λ) over eigenvalues of XᵀX."""
    held, products_II = penalty(sums, ridge), sums.products_II
    values_I = products_II.diagonal() if diagonal else torch.linalg.eigvalsh(products_II)
    values_I = values_I.clamp_min(0.0)
    return float((values_I / (values_I + held)).sum().item()) if held else 0.0


def choose_ridge(
    fitted: GapSums, held_out: GapSums, given: float | None = None, *, diagonal: bool = False
) -> tuple[float | None, float]:
    """The ridge whose change, solved on some tokens, leaves the least squared error on others; and
    that error. Where none is given, no change at all is also a choice.

    Wide models choose by a part of the columns of R, evenly spread, as one ridge is for all of
    them; the error is then that of this part relative to what is missing there.
    """
    few = slice(None, None, 1 if diagonal else max(fitted.cross_ID.shape[1] // COLUMNS, 1))
    some, others = fitted.columns(few), held_out.columns(few)
    ridges = (given,) if given else RIDGES
    left, best = min(
        (others.error(solve(some, ridge, diagonal=diagonal)), ridge) for ridge in ridges
    )
    if others.missing:
        left *= held_out.missing / others.missing
    if given or left < held_out.missing:
        return best, left
    return None, held_out.missing
