"""Variable projection: a law that is linear in its coefficients is searched in its exponents alone.

For given exponents the best coefficients >= 0 are known in closed form, so what is searched is the residual that they
leave (Golub & Pereyra 1973, SIAM J. Numer. Anal. 10:413). Two dimensions are left of the Chinchilla law's five, and the
valleys between offset, coefficients and exponents, along which joint searches stop early, are gone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megamup.scaling.laws.base import LOG_COEFFICIENTS, FloatArray, SumOfPowers


@dataclass(frozen=True)
class Face:
    """Least squares on a subset of the coefficients, the others at 0; leading axes: a batch of exponents."""

    columns: tuple[int, ...]
    coefficients: FloatArray
    """(..., f): the optimum on this face."""
    rss: FloatArray
    """(...,): residual sum of squares there."""
    q: FloatArray
    """(..., n, f): orthonormal columns of the face's basis B = QR."""
    r: FloatArray
    """(..., f, f)"""


def faces(basis: FloatArray, y: FloatArray) -> Iterator[Face]:
    """Least squares of `y` (n,) on every non-empty subset of the k columns of `basis` (..., n, k).

    With nonnegative coefficients the optimum is the best feasible one of these 2^k - 1; k is 3 at most.
    """
    k = basis.shape[-1]
    for size in range(k, 0, -1):
        for columns in itertools.combinations(range(k), size):
            q, r = np.linalg.qr(basis[..., columns])
            # Columns that rounding can't tell apart: no coefficients of this face mean anything.
            r = r + 1e-300 * np.eye(size)
            projected = np.einsum("...nf,n->...f", q, y)
            coefficients = np.linalg.solve(r, projected[..., np.newaxis])[..., 0]
            residual = y - np.einsum("...nf,...f->...n", q, projected)
            yield Face(columns, coefficients, np.sum(residual**2, axis=-1), q, r)


@dataclass(frozen=True)
class Projected:
    """The residual of a law as a function of its exponents, at their best coefficients, by least squares."""

    law: SumOfPowers
    log_x: FloatArray
    y: FloatArray
    weights: FloatArray
    """(n,): what each difference is multiplied by."""

    def __call__(self, exponents: FloatArray, which: object = None) -> tuple[FloatArray, FloatArray]:
        """Residuals (s, n) and their derivative by the exponents (s, n, q).

        The derivative is P dB β - (B⁺)ᵀ dBᵀ r (Golub & Pereyra 1973, eq. 4.9): B is the basis, P the projection off its
        columns, β the coefficients, r the residual.
        """
        del which
        basis = self._basis(exponents)
        by_exponent = basis[..., np.newaxis] * self.law.powers_gradient(self.log_x)  # (s, n, k, q)
        y = self.y * self.weights
        best = np.full(len(exponents), np.inf)
        residual = np.zeros((len(exponents), len(y)))
        jacobian = np.zeros((len(exponents), len(y), exponents.shape[-1]))
        for face in faces(basis, y):
            take = np.all(face.coefficients >= 0, axis=-1) & (face.rss < best)
            if not take.any():
                continue
            best = np.where(take, face.rss, best)
            columns = list(face.columns)
            q, r, beta = face.q[take], face.r[take], face.coefficients[take]
            rest = np.einsum("snf,sf->sn", basis[take][..., columns], beta) - y
            derivative = by_exponent[take][:, :, columns, :]  # (s, n, f, q)
            along = np.einsum("snfq,sf->snq", derivative, beta)
            along = along - q @ (q.swapaxes(1, 2) @ along)
            turned = np.einsum("snfq,sn->sfq", derivative, rest)
            residual[take] = rest
            jacobian[take] = along - q @ np.linalg.solve(r.swapaxes(1, 2), turned)
        return residual, jacobian

    def theta(self, exponents: FloatArray) -> FloatArray:
        """θ (s, p) of the whole law, with the best coefficients of each of the exponents (s, q)."""
        basis = self._basis(exponents)
        best = np.full(len(exponents), np.inf)
        found = np.zeros((len(exponents), basis.shape[-1]))
        for face in faces(basis, self.y * self.weights):
            take = np.all(face.coefficients >= 0, axis=-1) & (face.rss < best)
            best = np.where(take, face.rss, best)
            found[take] = 0.0
            found[np.ix_(take, face.columns)] = face.coefficients[take]
        with np.errstate(divide="ignore"):
            logs = np.maximum(np.log(found), LOG_COEFFICIENTS[0])
        return np.concatenate([logs, exponents], axis=-1)

    def _basis(self, exponents: FloatArray) -> FloatArray:
        """Weighted terms without their coefficients: (s, n, k)."""
        return np.exp(self.law.log_powers(exponents, self.log_x)) * self.weights[:, np.newaxis]
