"""Summaries of few runs, comparisons of two systems on the same seeds, and tests of claims about them.

Missing numbers raise an error; they are never dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..calibration.intervals import Interval
from .decision import Decision, check_limits, decide, stars

SCALES = ("difference", "ratio")

# Numbers that differ by at most this share of themselves count as equal: sums in another order differ as much.
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
    x = _finite(values, "values")
    mean, sd = (float(x.mean()) if len(x) else math.nan), (float(x.std(ddof=1)) if len(x) > 1 else math.nan)
    return Summary(len(x), mean, sd)


@dataclass(frozen=True)
class PairedComparison:
    """The comparison of a system with its baseline over the same seeds.

    Attributes:
        scale: "difference" (values - baseline) or "ratio" (values / baseline).
        estimate: the mean difference, or the geometric mean of the ratios.
        sd: of the differences, or of the log-ratios; NaN for one pair.
        interval: t interval of the estimate, of that level, NaN for one pair.
        t: statistic for "no difference"; NaN as the p-value.
        p_value: two-sided; NaN for one pair, and where all differences are the same.
        zero_variance: all differences are the same (but for rounding), so that the runs say nothing of their spread:
            interval, t and p are NaN. The estimate of a figure without chance (bytes, FLOPs) needs no test.
    """

    scale: str
    pairs: int
    values_mean: float
    baseline_mean: float
    estimate: float
    sd: float
    interval: Interval
    level: float
    t: float
    degrees_of_freedom: int
    p_value: float
    zero_variance: bool

    @property
    def stars(self) -> str:
        """Return the stars of the p-value, see `stars`."""
        return stars(self.p_value)


def paired_difference(values: ArrayLike, baseline: ArrayLike, *, level: float = 0.95) -> PairedComparison:
    """Compare two systems by the differences of their runs with the same seed.

    ``d_i = values_i - baseline_i``; ``t = mean(d) / (sd(d) / sqrt(n))`` with n - 1 degrees of freedom; interval
    ``mean(d) ± t_{(1 + level) / 2, n - 1} sd(d) / sqrt(n)``. At 95 % the factor of the standard error is 12.7 for two
    pairs and 4.3 for three. It assumes roughly normal differences, which fewer than ten pairs cannot confirm.

    Args:
        values: of the system ``[n]``, finite.
        baseline: of the baseline ``[n]``, in the same order of seeds.
        level: of confidence, in (0, 1).

    Returns:
        With one pair, sd, interval, t and p are NaN; interval, t and p also where all differences are the same.

    Raises:
        ValueError: for unequal lengths, no pair, NaN, infinity, or a level out of range.

    Source: Student, "The probable error of a mean" (Biometrika 1908).
    """
    return _compare("difference", values, baseline, level)


def paired_ratio(values: ArrayLike, baseline: ArrayLike, *, level: float = 0.95) -> PairedComparison:
    """Compare two systems by the ratios of their runs with the same seed.

    The interval is the exponential of the t interval of ``log(values_i / baseline_i)``. Fieller's interval of
    ``mean(values) / mean(baseline)`` is not used: with three pairs it is unbounded if the baseline's mean is less than
    4.3 standard errors from 0, it depends on which system is the baseline, and it assumes additive noise, while times,
    perplexities and calibration errors vary by factors. For a spread of a few per cent the two nearly agree.

    Arguments, result and errors are those of `paired_difference`; numbers that are not positive raise too.

    Source: Kirkwood, "Geometric means and measures of dispersion" (Biometrics 1979). The alternative: Fieller, "Some
    problems in interval estimation" (JRSS B 1954).
    """
    return _compare("ratio", values, baseline, level)


def _compare(scale: str, values: ArrayLike, baseline: ArrayLike, level: float) -> PairedComparison:
    x, y = _finite_pairs(values, baseline)
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1, 0.95 say.")
    d = _paired(x, y, scale)
    mean, sd, constant = _moments(d)
    t, p = _student(d, 0.0, "two-sided")
    back = math.exp if scale == "ratio" else float
    return PairedComparison(
        scale=scale, pairs=len(d), values_mean=float(x.mean()), baseline_mean=float(y.mean()), estimate=back(mean),
        sd=sd, interval=Interval(*map(back, _t_interval(d, level))), level=level, t=t, degrees_of_freedom=len(d) - 1,
        p_value=p, zero_variance=constant,
    )  # fmt: skip


@dataclass(frozen=True)
class ClaimTest:
    """The test of a claim that a difference or a ratio lies within limits.

    Attributes:
        estimate: the mean difference, or the geometric mean of the ratios.
        interval: t interval of the estimate, of level 1 - 2 alpha.
        at_least, at_most: the limits, infinite where there is none.
        alpha: greatest probability of "holds" for a claim that is wrong.
        p_at_least, p_at_most: one-sided p-values of the null hypotheses "below at_least" and "above at_most"; NaN
            without that limit.
        p_value: the larger of the two.
    """

    scale: str
    pairs: int
    estimate: float
    interval: Interval
    at_least: float
    at_most: float
    alpha: float
    p_at_least: float
    p_at_most: float
    p_value: float
    decision: Decision


def claim_test(
    values: ArrayLike,
    baseline: ArrayLike,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    scale: str = "difference",
    alpha: float = 0.05,
) -> ClaimTest:
    """Test the claim that ``values - baseline`` (or the ratio) lies within limits, over runs of the same seeds.

    With both limits this is TOST, the two one-sided t-tests of equivalence: ``t_low = (mean(d) - at_least) / se`` and
    ``t_high = (mean(d) - at_most) / se``, p the larger of the two. With one limit it is one one-sided test: of
    non-inferiority if the limit is a tolerated loss, of superiority if it is a gain. "Holds" is the same as
    p <= alpha. "Fails" is the test of the opposite, see `decide`.

    Args:
        values: of the system ``[n]``; positive on the ratio scale.
        baseline: of the baseline ``[n]``, in the same order of seeds.
        at_least: lower limit of the difference or of the ratio (0.95, for example).
        at_most: upper limit.
        scale: "difference", or "ratio", which tests the logarithms as `paired_ratio` does.
        alpha: greatest probability of "holds" for a wrong claim; the interval has the level 1 - 2 alpha.

    Returns:
        With one pair, or with differences that are all the same, interval and p are NaN and the decision is "cannot
        tell": nothing is known of the spread.

    Raises:
        ValueError: for limits, scale, alpha or numbers out of range.

    Source: Schuirmann, "A comparison of the two one-sided tests procedure and the power approach" (Journal of
    Pharmacokinetics and Biopharmaceutics 1987); on logarithms, FDA, "Statistical approaches to establishing
    bioequivalence" (2001).
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; choose one of {', '.join(SCALES)}.")
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha={alpha} must lie between 0 and 0.5, 0.05 say.")
    low, high = check_limits(at_least, at_most)
    x, y = _finite_pairs(values, baseline)
    lowest, highest = low, high
    if scale == "ratio":
        if (at_least is not None and low <= 0) or high <= 0:
            raise ValueError(f"at_least={at_least}, at_most={at_most}: limits of a ratio are positive, 0.95 say.")
        lowest, highest = -math.inf if at_least is None else math.log(low), float(np.log(high))
    d = _paired(x, y, scale)
    p_low = _student(d, lowest, "greater")[1] if at_least is not None else math.nan
    p_high = _student(d, highest, "less")[1] if at_most is not None else math.nan
    interval = _t_interval(d, 1 - 2 * alpha)
    back = math.exp if scale == "ratio" else float
    return ClaimTest(
        scale=scale, pairs=len(d), estimate=back(float(d.mean())), interval=Interval(*map(back, interval)),
        at_least=low, at_most=high, alpha=alpha, p_at_least=p_low, p_at_most=p_high,
        p_value=float(np.fmax(p_low, p_high)), decision=decide(interval, at_least=lowest, at_most=highest),
    )  # fmt: skip


def _student(d: np.ndarray, null: float, alternative: str) -> tuple[float, float]:
    """Return Student's t for the null hypothesis "the mean is `null`", and its p-value; NaN without a spread."""
    from scipy import stats

    mean, sd, constant = _moments(d)
    if len(d) < 2 or constant:
        return math.nan, math.nan
    t = (mean - null) / (sd / math.sqrt(len(d)))
    tail = {"two-sided": -abs(t), "less": t, "greater": -t}[alternative]
    return t, float(stats.t.cdf(tail, len(d) - 1)) * (2 if alternative == "two-sided" else 1)


def _t_interval(d: np.ndarray, level: float) -> Interval:
    """Return ``mean ± t sd / sqrt(n)``; NaN for one value and for values that are all the same."""
    from scipy import stats

    mean, sd, constant = _moments(d)
    if len(d) < 2 or constant:
        return Interval(math.nan, math.nan)
    half = float(stats.t.ppf((1 + level) / 2, len(d) - 1)) * sd / math.sqrt(len(d))
    return Interval(mean - half, mean + half)


def _moments(d: np.ndarray) -> tuple[float, float, bool]:
    """Return the mean, the standard deviation, and whether all values are the same."""
    if len(d) < 2:
        return float(d[0]), math.nan, False
    if np.all(d == d[0]):  # rounding: the computed mean of equal numbers may differ from them
        return float(d[0]), 0.0, True
    return float(d.mean()), float(d.std(ddof=1)), False


def _finite(values: ArrayLike, name: str) -> np.ndarray:
    """Return numbers as a float64 vector; raise ValueError unless they are a flat list of finite ones."""
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


def _finite_pairs(values: ArrayLike, baseline: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of numbers as two float64 vectors ``[n]``; raise ValueError unless they are pairs."""
    x, y = _finite(values, "values"), _finite(baseline, "baseline")
    if len(x) != len(y):
        raise ValueError(f"{len(x)} values but {len(y)} of the baseline: give pairs, two runs that share a seed.")
    if not len(x):
        raise ValueError("There is no pair: a comparison needs one run of each system at least.")
    return x, y


def _paired(values: np.ndarray, baseline: np.ndarray, scale: str) -> np.ndarray:
    """Return the differences, or the logarithms of the ratios, without what is only rounding.

    Figures that are equal but for rounding differ by 0: otherwise those of the same counts, summed in another order,
    would have a "significant" difference of 1e-17. Differences that are equal but for rounding are made equal.
    """
    same = np.abs(values - baseline) <= _ROUNDING * np.maximum(np.abs(values), np.abs(baseline))
    if scale == "difference":
        return _levelled(np.where(same, 0.0, values - baseline), max(np.abs(values).max(), np.abs(baseline).max()))
    for name, numbers in (("values", values), ("baseline", baseline)):
        wrong = np.flatnonzero(numbers <= 0)
        if len(wrong):
            raise ValueError(
                f"{name}[{wrong[0]}]={numbers[wrong[0]]} has no logarithm: a ratio is for positive figures; compare "
                "differences instead."
            )
    ours, theirs = np.log(values), np.log(baseline)
    return _levelled(np.where(same, 0.0, ours - theirs), max(1.0, np.abs(ours).max(), np.abs(theirs).max()))


def _levelled(d: np.ndarray, size: float) -> np.ndarray:
    """Return differences of figures of this size, all the same where they differ by rounding alone."""
    return np.full_like(d, d[0]) if np.ptp(d) <= _ROUNDING * size else d
