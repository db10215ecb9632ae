"""The power of the paired t-test, from the noncentral t distribution: what few pairs can detect."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..calibration.intervals import Interval


@dataclass(frozen=True)
class PowerNote:
    """What n pairs with a given spread can detect.

    Attributes:
        sd: standard deviation of the differences of the n pairs.
        sd_interval: 95 % interval of the true standard deviation, from chi-squared; NaN for fewer than two pairs.
        detectable: smallest difference detected with probability `power`; NaN for fewer than two pairs.
        alpha: level of the two-sided test.
        sentence: the same in one English sentence.
    """

    pairs: int
    sd: float
    sd_interval: Interval
    detectable: float
    power: float
    alpha: float
    sentence: str


def t_test_power(difference: float, sd: float, pairs: int, *, alpha: float = 0.05, sides: int = 2) -> float:
    """Return the probability that a paired t-test detects a true difference.

    It is ``P(T > t_{1 - alpha / sides, n - 1})`` for T noncentral t with n - 1 degrees of freedom and noncentrality
    ``sqrt(n) |difference| / sd``; with two sides, plus the (tiny) probability of a significant difference of the wrong
    sign.

    Args:
        difference: true mean difference.
        sd: true standard deviation of the differences.
        pairs: n, at least 2.
        alpha: level of the test.
        sides: 2, or 1 for a claim with one limit (in the right direction).

    Raises:
        ValueError: for arguments out of range.

    Source: Cohen, "Statistical power analysis for the behavioral sciences" (1988), chapter 2; Johnson & Welch,
    "Applications of the non-central t-distribution" (Biometrika 1940).
    """
    from scipy import stats

    _check(pairs, alpha, sides)
    if not (math.isfinite(sd) and sd >= 0 and math.isfinite(difference)):
        raise ValueError(f"difference={difference} and sd={sd} must be finite, and sd not negative.")
    if sd == 0:
        return 1.0 if difference else alpha
    critical = float(stats.t.isf(alpha / sides, pairs - 1))
    return _power(math.sqrt(pairs) * abs(difference) / sd, pairs - 1, critical, sides)


def detectable_difference(sd: float, pairs: int, *, power: float = 0.8, alpha: float = 0.05, sides: int = 2) -> float:
    """Return the smallest true difference that a paired t-test detects with probability `power`, in (alpha, 1).

    The other arguments and the errors are those of `t_test_power`.
    """
    from scipy import optimize, stats

    _check(pairs, alpha, sides)
    if not alpha < power < 1:
        raise ValueError(f"power={power} must lie between alpha={alpha} and 1, 0.8 say.")
    if not (math.isfinite(sd) and sd >= 0):
        raise ValueError(f"sd={sd} must be a finite number that is not negative.")
    critical = float(stats.t.isf(alpha / sides, pairs - 1))
    high = 1.0
    while _power(high, pairs - 1, critical, sides) < power:
        high *= 2
    noncentrality = optimize.brentq(lambda nc: _power(nc, pairs - 1, critical, sides) - power, 0.0, high, xtol=1e-10)
    return float(noncentrality) * sd / math.sqrt(pairs)


def pairs_needed(
    difference: float, sd: float, *, power: float = 0.8, alpha: float = 0.05, sides: int = 2, at_most: int = 10_000
) -> int | None:
    """Return how many pairs detect a true difference with probability `power`; None if more than `at_most`.

    The other arguments and the errors are those of `t_test_power`.
    """
    low, high = 1, 2
    while t_test_power(difference, sd, high, alpha=alpha, sides=sides) < power:
        if high >= at_most:
            return None
        low, high = high, min(2 * high, at_most)
    while high - low > 1:
        middle = (low + high) // 2
        if t_test_power(difference, sd, middle, alpha=alpha, sides=sides) < power:
            low = middle
        else:
            high = middle
    return high


def power_note(sd: float, pairs: int, *, power: float = 0.8, alpha: float = 0.05, unit: str = "") -> PowerNote:
    """Return what so many pairs with this spread can detect, in numbers and in one sentence.

    The spread of few differences is itself uncertain: its 95 % interval is
    ``sd sqrt((n - 1) / chi2_{.975})`` to ``sd sqrt((n - 1) / chi2_{.025})``, .52 to 6.3 times sd for three pairs.

    Args:
        sd: observed standard deviation of the differences; NaN with fewer than two pairs.
        pairs: n.
        power: probability of detection.
        alpha: level of the two-sided test.
        unit: put after the numbers, for example "perplexity".

    Raises:
        ValueError: for arguments out of range.

    Source: as `t_test_power`. The power at the observed difference is not reported, since it is a function of the
    p-value alone (Hoenig & Heisey, "The abuse of power", The American Statistician 2001).
    """
    from scipy import stats

    named = "1 pair" if pairs == 1 else f"{pairs} pairs"
    if pairs < 2:
        sentence = f"{named} cannot be tested: the spread over seeds needs two pairs at least."
        return PowerNote(pairs, math.nan, Interval(math.nan, math.nan), math.nan, power, alpha, sentence)
    unit = f" {unit}" if unit else ""
    detectable = detectable_difference(sd, pairs, power=power, alpha=alpha)
    quantiles = stats.chi2.ppf([0.975, 0.025], pairs - 1)
    spread = Interval(*(float(sd * math.sqrt((pairs - 1) / q)) for q in quantiles))
    sentence = (
        f"{named} with a spread of {sd:.3g}{unit} could detect a difference of {detectable:.3g}{unit} or "
        f"more with a chance of {power:.0%} (two-sided test at {alpha:.0%}); the spread itself is only known to "
        f"lie between {spread.low:.3g} and {spread.high:.3g}."
    )
    if sd == 0:
        sentence = f"{named} without any spread: every difference would be detected."
    return PowerNote(pairs, float(sd), spread, detectable, power, alpha, sentence)


def _power(noncentrality: float, degrees: int, critical: float, sides: int) -> float:
    from scipy import stats

    found = float(stats.nct.sf(critical, degrees, noncentrality))
    # P(T < -c) computed as the mirrored tail, because nct.cdf(-c, ...) of scipy 1.17 is NaN for many noncentralities
    return found + float(stats.nct.sf(critical, degrees, -noncentrality)) if sides == 2 else found


def _check(pairs: int, alpha: float, sides: int) -> None:
    if pairs < 2:
        raise ValueError(f"pairs={pairs}: a t-test needs two at least.")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} must lie between 0 and 1, 0.05 say.")
    if sides not in (1, 2):
        raise ValueError(f"sides={sides} must be 1 or 2.")
