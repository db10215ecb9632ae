"""Multiple tests: Holm's correction over a family that was declared before looking at the data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .paired import stars


@dataclass(frozen=True)
class AdjustedTest:
    """A test of a family, its own and its adjusted p-value; NaN for a test that could not be made."""

    p_value: float
    adjusted: float

    @property
    def stars(self) -> str:
        """Return the stars of the adjusted p-value; "n/a" for a missing test."""
        return stars(self.adjusted)


def holm(p_values: Sequence[float | None] | np.ndarray) -> np.ndarray:
    """Return Holm's adjusted p-values, ``max_{j <= i} min(1, (m - j + 1) p_(j))`` for the i-th smallest.

    Rejecting where the adjusted value is below a keeps the probability of any false rejection in the family below a,
    for any dependence between the tests. A missing test (None, NaN) stays missing and still counts in m, as if its
    p-value were 1: a family does not become smaller because some of its runs failed.

    Args:
        p_values: of the declared family ``[m]``, None or NaN for missing tests.

    Returns:
        ``[m]``, NaN where missing.

    Raises:
        ValueError: for a p-value outside [0, 1].

    Source: Holm, "A simple sequentially rejective multiple test procedure" (Scandinavian Journal of Statistics 1979).
    """
    p = np.array([math.nan if value is None else value for value in p_values], dtype=np.float64)
    wrong = np.flatnonzero((p < 0) | (p > 1))
    if len(wrong):
        raise ValueError(f"p_values[{wrong[0]}]={p[wrong[0]]} must lie between 0 and 1.")
    missing = np.isnan(p)
    order = np.argsort(np.where(missing, 1.0, p), kind="stable")
    steps = np.where(missing, 1.0, p)[order] * (len(p) - np.arange(len(p)))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    adjusted[missing] = math.nan
    return adjusted


def holm_family(p_values: Mapping[str, float | None]) -> dict[str, AdjustedTest]:
    """Apply `holm` to a family of tests by name.

    Args:
        p_values: by the name of the test, None or NaN for missing tests.

    Raises:
        ValueError: for a p-value outside [0, 1].
    """
    adjusted = holm(list(p_values.values()))
    return {
        name: AdjustedTest(math.nan if p is None else float(p), float(new))
        for (name, p), new in zip(p_values.items(), adjusted, strict=True)
    }
