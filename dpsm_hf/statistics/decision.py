"""Decisions on claims ("holds", "fails", "cannot tell"), their combination, and Holm's correction of p-values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from ..calibration.intervals import Interval


class Decision(str, Enum):
    """The decision on a claim."""

    HOLDS = "holds"
    FAILS = "fails"
    CANNOT_TELL = "cannot tell"

    def __str__(self) -> str:
        return self.value


def decide(interval: Interval, *, at_least: float | None = None, at_most: float | None = None) -> Decision:
    """Decide from its confidence interval whether a quantity lies within limits.

    "Holds" if the whole interval lies within the limits (inclusive), "fails" if all of it lies outside on one side,
    else "cannot tell". So both "holds" and "fails" need evidence; neither is concluded from lack of evidence for the
    other. With an interval of level 1 - 2 a, each is wrong with probability at most a, since each bound is on the
    wrong side of the truth with probability a. (With two limits close together relative to the spread, "fails" is
    wrong with probability at most 2 a.)

    Args:
        interval: of the quantity; bounds may be infinite. A NaN bound (a single run, for example) gives "cannot tell".
        at_least: the lower limit, if any.
        at_most: the upper limit, if any.

    Raises:
        ValueError: with no limit, with NaN as one, or if at_least > at_most.

    Source: Schuirmann (1987) for equivalence by interval; Altman & Bland, "Absence of evidence is not evidence of
    absence" (BMJ 1995), for the third answer.
    """
    low, high = check_limits(at_least, at_most)
    if math.isnan(interval.low) or math.isnan(interval.high):
        return Decision.CANNOT_TELL
    if low <= interval.low and interval.high <= high:
        return Decision.HOLDS
    if interval.high < low or interval.low > high:
        return Decision.FAILS
    return Decision.CANNOT_TELL


class Standing(str, Enum):
    """How a system stands to another on one figure."""

    BETTER = "better"
    WORSE = "worse"
    CANNOT_TELL = "cannot tell"

    def __str__(self) -> str:
        return self.value


def standing(
    ours: float, theirs: float, our_interval: Interval | None, their_interval: Interval | None, *, better: int
) -> Standing:
    """Say whether a figure is better or worse than another: only where their intervals do not overlap.

    Two intervals of 95 % that do not overlap are a stronger condition than a test at 5 %, so this errs on the side of
    "cannot tell". It is for figures of single runs, whose intervals say what other test data would show and not what
    other seeds would.

    Args:
        ours: the figure.
        theirs: what it is compared with.
        our_interval, their_interval: their confidence intervals; None or NaN, where there is none, decides nothing.
        better: 1 where more is better, -1 where less is, 0 where neither is.
    """
    if our_interval is None or their_interval is None or not better:
        return Standing.CANNOT_TELL
    if any(math.isnan(number) for number in (ours, theirs, *our_interval, *their_interval)):
        return Standing.CANNOT_TELL
    # a bootstrap's interval need not hold its estimate
    ours_low, ours_high = min(ours, our_interval.low), max(ours, our_interval.high)
    theirs_low, theirs_high = min(theirs, their_interval.low), max(theirs, their_interval.high)
    if ours_low > theirs_high:
        return Standing.BETTER if better > 0 else Standing.WORSE
    if ours_high < theirs_low:
        return Standing.BETTER if better < 0 else Standing.WORSE
    return Standing.CANNOT_TELL


def all_of(decisions: Iterable[Decision]) -> Decision:
    """Combine claims by "and": fails if one fails, holds if all hold, else cannot tell.

    No correction for the number of claims is needed (an intersection-union test).

    Raises:
        ValueError: with no claim.

    Source: Kleene's strong three-valued "and"; Berger, "Multiparameter hypothesis testing and acceptance sampling"
    (Technometrics 1982).
    """
    return _first_among(decisions, (Decision.FAILS, Decision.CANNOT_TELL, Decision.HOLDS))


def any_of(decisions: Iterable[Decision]) -> Decision:
    """Combine claims by "or": holds if one holds, fails if all fail, else cannot tell.

    The probability of a false "holds" adds up over the claims: to bound it by a, decide each of m claims with an
    interval of level 1 - 2 a / m.

    Raises:
        ValueError: with no claim.

    Source: Kleene's strong three-valued "or"; Bonferroni's inequality.
    """
    return _first_among(decisions, (Decision.HOLDS, Decision.CANNOT_TELL, Decision.FAILS))


def stars(p_value: float) -> str:
    """Return ``***`` for p < .001, ``**`` for p < .01, ``*`` for p < .05, "" for larger p, "n/a" for NaN.

    Raises:
        ValueError: for a p-value outside [0, 1].
    """
    if math.isnan(p_value):
        return "n/a"
    if not 0 <= p_value <= 1:
        raise ValueError(f"p_value={p_value} must lie between 0 and 1.")
    return "*" * sum(p_value < limit for limit in (0.05, 0.01, 0.001))


@dataclass(frozen=True)
class AdjustedTest:
    """The p-value of one test of a family, as it is and adjusted by Holm; NaN for a test that could not be made."""

    p_value: float
    adjusted: float

    @property
    def stars(self) -> str:
        """Return the stars of the adjusted p-value; "n/a" for a missing test."""
        return stars(self.adjusted)


def holm(p_values: Sequence[float | None] | np.ndarray) -> np.ndarray:
    """Return Holm's adjusted p-values, ``max_{j <= i} min(1, (m - j + 1) p_(j))`` for the i-th smallest.

    Rejecting where the adjusted p-value is at most a keeps the probability of any false rejection in the family at
    most a, for any dependence between the tests. A missing test (None, NaN) stays missing and still counts in m, as if
    its p-value were 1: a family does not become smaller because some of its runs failed.

    Args:
        p_values: of the family as declared beforehand, ``[m]``; None or NaN for missing tests.

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
    """Apply `holm` to a family of tests given by name."""
    adjusted = holm(list(p_values.values()))
    return {
        name: AdjustedTest(math.nan if p is None else float(p), float(new))
        for (name, p), new in zip(p_values.items(), adjusted, strict=True)
    }


def check_limits(at_least: float | None, at_most: float | None) -> tuple[float, float]:
    """Return the limits of a claim, infinite where there is none; raises ValueError as `decide` does."""
    if at_least is None and at_most is None:
        raise ValueError("The claim has no limit: give at_least, at_most or both.")
    low = -math.inf if at_least is None else float(at_least)
    high = math.inf if at_most is None else float(at_most)
    if not low <= high:  # also where one is NaN
        raise ValueError(f"at_least={at_least} and at_most={at_most} are no limits: the first must not be larger.")
    return low, high


def _first_among(decisions: Iterable[Decision], order: Sequence[Decision]) -> Decision:
    given = {Decision(decision) for decision in decisions}
    if not given:
        raise ValueError("There is no claim to join.")
    return next(decision for decision in order if decision in given)
