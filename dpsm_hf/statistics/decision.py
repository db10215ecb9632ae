"""Holds, fails, or cannot tell: what an interval says about a claim, and how claims are joined."""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import Enum

from ..calibration.intervals import Interval


class Decision(str, Enum):
    """What the data say about a claim."""

    HOLDS = "holds"
    FAILS = "fails"
    CANNOT_TELL = "cannot tell"

    def __str__(self) -> str:
        return self.value


def decide(interval: Interval, *, at_least: float | None = None, at_most: float | None = None) -> Decision:
    """Return whether a quantity lies within limits, from its confidence interval.

    Holds if the whole interval lies within the limits (a bound on a limit is within), fails if all of it lies outside
    on one side, else the data cannot tell. So both "holds" and "fails" are conclusions that were tested; neither is
    what is left when the other is not shown. With an interval of level 1 - 2 a, each is wrong with a chance of at
    most a, since either bound is on the wrong side of the truth with a chance of a. (With two limits that are close
    together for the spread, "fails" is wrong with a chance of at most 2 a.)

    Args:
        interval: of the quantity; a NaN bound (one run, say) tells nothing. Bounds may be infinite.
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
    """Return whether all claims hold: fails if one fails, holds if each holds, else it cannot be told.

    Needs no correction for the number of claims: each is tested at its own level (an intersection-union test).

    Raises:
        ValueError: with no claim.

    Source: Kleene's strong three-valued "and"; Berger, "Multiparameter hypothesis testing and acceptance sampling"
    (Technometrics 1982).
    """
    given = _some(decisions)
    if Decision.FAILS in given:
        return Decision.FAILS
    return Decision.CANNOT_TELL if Decision.CANNOT_TELL in given else Decision.HOLDS


def any_of(decisions: Iterable[Decision]) -> Decision:
    """Return whether one claim at least holds: holds if one holds, fails if each fails, else it cannot be told.

    The chance of a false "holds" adds up over the claims: decide each of m claims with an interval of level
    1 - 2 a / m where that matters.

    Raises:
        ValueError: with no claim.

    Source: Kleene's strong three-valued "or"; Bonferroni's inequality.
    """
    given = _some(decisions)
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


def _some(decisions: Iterable[Decision]) -> list[Decision]:
    given = [Decision(decision) for decision in decisions]
    if not given:
        raise ValueError("There is no claim to join.")
    return given
