"""Checks of the input of the statistics, and summaries: missing numbers raise an error, they are never dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

# Figures that differ by at most 4 units in the last place are equal: sums in another order differ as much.
_ROUNDING = 4 * np.finfo(np.float64).eps


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation of some runs."""

    count: int
    mean: float
    sd: float


def summarize(values: ArrayLike) -> Summary:
    """Return the mean and the sample standard deviation, ``sqrt(sum (x - mean)**2 / (n - 1))``.

    Args:
        values: finite numbers ``[n]``, one for each run.

    Returns:
        Without values, mean and sd are NaN; with one, the sd is NaN.

    Raises:
        ValueError: for NaN or infinity, naming the place.

    The division by n - 1 (Bessel's correction) makes the variance unbiased.
    """
    x = finite(values, "values")
    return Summary(
        count=len(x),
        mean=float(x.mean()) if len(x) else math.nan,
        sd=float(x.std(ddof=1)) if len(x) > 1 else math.nan,
    )


def finite(values: ArrayLike, name: str) -> np.ndarray:
    """Check numbers and return them as a float64 vector.

    Args:
        values: ``[n]``.
        name: of the argument, for messages.

    Raises:
        ValueError: for another shape, NaN or infinity, naming the place.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1:
        raise ValueError(f"{name} has shape {x.shape}: give a flat list, one number for each run.")
    wrong = np.flatnonzero(~np.isfinite(x))
    if len(wrong):
        raise ValueError(
            f"{name}[{wrong[0]}]={x[wrong[0]]} is no finite number: leave out the runs that have none, with their "
            "partners, and report which they are."
        )
    return x


def finite_pairs(values: ArrayLike, baseline: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Check pairs of numbers and return them as two float64 vectors ``[n]``.

    Raises:
        ValueError: for unequal lengths, no pair at all, NaN or infinity.
    """
    x, y = finite(values, "values"), finite(baseline, "baseline")
    if len(x) != len(y):
        raise ValueError(f"{len(x)} values but {len(y)} of the baseline: give pairs, two runs that share a seed.")
    if not len(x):
        raise ValueError("There is no pair: a comparison needs one run of each system at least.")
    return x, y


def paired_differences(values: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Return ``values - baseline``, with 0 for differences within 4 units in the last place of float64.

    Otherwise figures of the same counts, summed in another order, would have a "significant" difference of 1e-17.

    Args:
        values: of the system ``[n]``, as `finite_pairs` returns them.
        baseline: of the baseline ``[n]``.
    """
    return np.where(_same(values, baseline), 0.0, values - baseline)


def paired_log_ratios(values: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Return ``log(values) - log(baseline)``, with 0 where `paired_differences` has 0.

    Args:
        values: of the system ``[n]``, as `finite_pairs` returns them.
        baseline: of the baseline ``[n]``.

    Raises:
        ValueError: for a number that is not positive, naming the place.
    """
    for name, numbers in (("values", values), ("baseline", baseline)):
        wrong = np.flatnonzero(numbers <= 0)
        if len(wrong):
            raise ValueError(
                f"{name}[{wrong[0]}]={numbers[wrong[0]]} has no logarithm: a ratio is for positive figures; compare "
                "differences instead."
            )
    return np.where(_same(values, baseline), 0.0, np.log(values) - np.log(baseline))


def _same(values: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    return np.abs(values - baseline) <= _ROUNDING * np.maximum(np.abs(values), np.abs(baseline))
