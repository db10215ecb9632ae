"""Holds, fails or cannot tell: decisions on claims from confidence intervals, and how they are combined."""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import Enum

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

    Holds if the whole interval lies within the limits (inclusive), fails if all of it lies outside on one side, else
    the data cannot tell. So "holds" and "fails" are both tested; neither is the default when the other is not shown.
    With an interval of level 1 - 2 a, each is wrong with probability at most a, since each bound is on the wrong side
    of the truth with probability a. (With two limits close together relative to the spread, "fails" is wrong with
    probability at most 2 a.)

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


def all_of(decisions: Iterable[Decision]) -> Decision:
    """Combine claims by "and": fails if one fails, holds if all hold, else cannot tell.

    No correction for the number of claims is needed (an intersection-union test).

    Raises:
        ValueError: with no claim.

    Source: Kleene's strong three-valued "and"; Berger, "Multiparameter hypothesis testing and acceptance sampling"
    (Technometrics 1982).
    """
    given = _not_empty(decisions)
    if Decision.FAILS in given:
        return Decision.FAILS
    return Decision.CANNOT_TELL if Decision.CANNOT_TELL in given else Decision.HOLDS


def any_of(decisions: Iterable[Decision]) -> Decision:
    """Combine claims by "or": holds if one holds, fails if all fail, else cannot tell.

    The probability of a false "holds" adds up over the claims: to bound it by a, decide each of m claims with an
    interval of level 1 - 2 a / m.

    Raises:
        ValueError: with no claim.

    Source: Kleene's strong three-valued "or"; Bonferroni's inequality.
    """
    given = _not_empty(decisions)
    if Decision.HOLDS in given:
        return Decision.HOLDS
    return Decision.CANNOT_TELL if Decision.CANNOT_TELL in given else Decision.FAILS


def check_limits(at_least: float | None, at_most: float | None) -> tuple[float, float]:
    """Return the limits of a claim, infinite where there is none.

    Raises:
        ValueError: with no limit, with NaN as one, or if at_least > at_most.
    """
    if at_least is None and at_most is None:
        raise ValueError("The claim has no limit: give at_least, at_most or both.")
    low = -math.inf if at_least is None else float(at_least)
    high = math.inf if at_most is None else float(at_most)
    if not low <= high:  # also where one is NaN
        raise ValueError(f"at_least={at_least} and at_most={at_most} are no limits: the first must not be larger.")
    return low, high


def _not_empty(decisions: Iterable[Decision]) -> list[Decision]:
    given = [Decision(decision) for decision in decisions]
    if not given:
        raise ValueError("There is no claim to join.")
    return given
