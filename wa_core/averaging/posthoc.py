"""Post-hoc averages: which average can be rebuilt from what was kept, and how well. float64; no torch.

Everything that is kept is a weighted sum of checkpoints: a raw checkpoint has the one-hot coefficient vector, a
snapshot of an average the vector of its rule. A weighted sum of kept things is then a weighted sum of checkpoints
too, so making the average that was wanted but never made is a least-squares problem over coefficient vectors,
whatever the size of the model: with the kept vectors as the columns of ``A`` and the wanted one as ``b``,

    minimise ``|A x - b|``  subject to  ``sum(x) = 1``,

the discrete form of Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
arXiv 2312.02696, section 3.2 and appendix C (there the profiles are continuous power functions). Where several
solutions fit equally well, the smallest is taken.

It knows no tensors and no files. The invariant: a plan is returned only when its predicted error and noise gain
are within the given limits; otherwise the refusal says both numbers and what to do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wa_core.averaging.limits import shorten
from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

# How far a coefficient vector's sum may be from 1: rounding over very many folds, nothing more.
_SUM_TOLERANCE = 1e-6
# Weights below this are rounding errors of the solution; dropping them saves reading a whole file each.
_NEGLIGIBLE = 1e-13


@dataclass(frozen=True)
class Kept:
    """Something that can be read back: its name, and what it is as a weighted sum of checkpoints.

    `coefficients` are step -> coefficient, finite and summing to 1.
    """

    name: str
    coefficients: Mapping[int, float]

    @classmethod
    def raw(cls, name: str, *, step: int) -> Kept:
        """The checkpoint of `step` itself."""
        return cls(name, {step: 1.0})


@dataclass(frozen=True)
class RebuildPlan:
    """How to rebuild an average: add up what is kept, times these weights.

    Attributes:
        weights: name -> weight, summing to 1; what is not needed is left out.
        coefficients: step -> coefficient of the average that this gives.
        profile_error: how far those are from the wanted ones, as a part of them: ``|A x - b| / |b|``, Euclidean.
        noise_gain: the sum of the weights' absolute values: rounding errors of what is kept come out up to this
            much larger. 1 for a true average, above it where weights are negative.
    """

    weights: dict[str, float]
    coefficients: dict[int, float]
    profile_error: float
    noise_gain: float


def plan_rebuild(
    kept: Sequence[Kept], wanted: Mapping[int, float], *, max_error: float = 0.05, max_noise_gain: float = 20.0
) -> RebuildPlan:
    """The weights that rebuild `wanted` from `kept` best, among those with a noise gain within its limit.

    Args:
        kept: what can be read back.
        wanted: step -> coefficient, summing to 1; such as ``parse_rule("ema:half_life=500").coefficients(steps)``.
        max_error: the largest profile error to accept.
        max_noise_gain: the largest noise gain to accept.

    Raises:
        InvalidInputError: no rebuild is good enough, code `cannot_rebuild`; or coefficients that are not finite,
            do not sum to 1, or are kept twice under one name.
    """
    _check(kept, wanted)
    steps = sorted({*wanted, *(step for one in kept for step in one.coefficients)})
    matrix, target = _columns([one.coefficients for one in kept], steps), _columns([wanted], steps)[:, 0]
    candidates = _solutions(matrix, target)
    errors = np.linalg.norm(matrix @ candidates - target[:, None], axis=0) / np.linalg.norm(target)
    gains = np.abs(candidates).sum(axis=0)
    chosen = _choose(errors, gains, max_noise_gain=max_noise_gain)
    if not (errors[chosen] <= max_error and gains[chosen] <= max_noise_gain):
        limits = f"at most {max_error:g} and {max_noise_gain:g} are allowed"
        raise _refusal(errors, gains, chosen, limits)
    weights = np.where(np.abs(candidates[:, chosen]) < _NEGLIGIBLE, 0.0, candidates[:, chosen])
    return RebuildPlan(
        weights={one.name: float(weight) for one, weight in zip(kept, weights, strict=True) if weight},
        coefficients={step: float(value) for step, value in zip(steps, matrix @ weights, strict=True) if value},
        profile_error=float(np.linalg.norm(matrix @ weights - target) / np.linalg.norm(target)),
        noise_gain=float(np.abs(weights).sum()),
    )


def _columns(vectors: Sequence[Mapping[int, float]], steps: Sequence[int]) -> NDArray[np.float64]:
    """One column per vector, one row per step."""
    row = {step: index for index, step in enumerate(steps)}
    matrix = np.zeros((len(steps), len(vectors)))
    for column, vector in enumerate(vectors):
        for step, value in vector.items():
            matrix[row[step], column] = value
    return matrix


def _solutions(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """One solution per column, from the plainest (equal weights) to the closest fit; all of them sum to 1.

    The constraint is taken out by ``x = 1/m + Z y`` with an orthonormal ``Z`` whose columns sum to 0; the rest is
    a truncated singular value decomposition. Each solution takes one more singular vector than the one before: the
    error falls and, mostly, the noise gain grows. As ``1/m`` and ``Z y`` are orthogonal, the smallest ``y`` is the
    smallest ``x``. Directions that are only rounding (duplicates, dependent snapshots) are never taken.
    """
    num_kept = matrix.shape[1]
    equal = np.full(num_kept, 1.0 / num_kept)
    # A Householder reflection that takes the first unit vector to the constant one; its other columns sum to 0.
    normal = equal * math.sqrt(num_kept)
    normal[0] += 1.0
    basis = (np.eye(num_kept) - np.outer(normal, normal) / normal[0])[:, 1:]
    left, values, right = np.linalg.svd(matrix @ basis, full_matrices=False)
    # Against the whole matrix: where all that is kept is the same, nothing but rounding is left in `values`.
    cutoff = max(matrix.shape) * np.finfo(np.float64).eps * np.linalg.norm(matrix)
    rank = int(np.sum(values > cutoff))
    parts = (left.T @ (target - matrix @ equal))[:rank] / values[:rank]
    steps = basis @ (right[:rank].T * parts)
    path: NDArray[np.float64] = np.cumsum(np.column_stack([equal, steps]), axis=1)
    return path


def _choose(errors: NDArray[np.float64], gains: NDArray[np.float64], *, max_noise_gain: float) -> int:
    """The closest fit with a noise gain within the limit; failing that, the one with the smallest gain."""
    allowed = np.flatnonzero(gains <= max(max_noise_gain, float(gains.min())))
    return int(allowed[np.argmin(errors[allowed])])


def _check(kept: Sequence[Kept], wanted: Mapping[int, float]) -> None:
    if not kept:
        raise InvalidInputError("nothing is kept, so nothing can be rebuilt; keep checkpoints or snapshots first")
    names = [one.name for one in kept]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidInputError(f"two kept things are named {twice!r}; give each its own name")
    for name, vector in [("the wanted average", wanted), *((repr(one.name), one.coefficients) for one in kept)]:
        total = math.fsum(vector.values()) if all(math.isfinite(value) for value in vector.values()) else math.nan
        if not abs(total - 1.0) <= _SUM_TOLERANCE:
            raise InvalidInputError(
                f"the coefficients of {name} sum to {shorten(total)}; those of an average are finite and sum to "
                f"1, check the steps that they were made from"
            )


def _refusal(
    errors: NDArray[np.float64], gains: NDArray[np.float64], chosen: int, limits: str
) -> InvalidInputError:
    found = f"profile error {errors[chosen]:.3g} at noise gain {gains[chosen]:.3g}"
    closest = int(np.argmin(errors))
    if closest != chosen:
        found += f" (or {errors[closest]:.3g} at {gains[closest]:.3g})"
    return InvalidInputError(
        f"the wanted average cannot be rebuilt well enough from what is kept: the best is {found}, and {limits}; "
        f"keep more checkpoints or snapshots around the steps that it weighs most, ask for an average nearer to "
        f"those that are kept, or allow more",
        code="cannot_rebuild",
    )
