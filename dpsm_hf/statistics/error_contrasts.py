"""Intervals for the difference and the ratio of two calibration errors (ECE), which are biased upwards by noise.

The basic bootstrap estimates the bias of the sample by b = mean of the resamples - sample, which is right for errors
far from 0. But the error of a calibrated model is all noise: c in the sample and √2 c in resamples, whose noise has
twice the variance, so that b = (√2 - 1) c is only a part of the bias. Here the bias may be anything from b to
(1 + √2) b, and the whole error where the sample is compatible with 0. Where b is small the intervals are those of the
basic bootstrap. docs/statistics.md has the coverage of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..calibration.intervals import Interval

# Ratio of the true bias to b for an error that is all noise: 1 / (√2 - 1).
_ALL_NOISE = 1 + math.sqrt(2)


class Bias(NamedTuple):
    """Bounds of the bias of an error."""

    least: float
    most: float


def error_bias(value: float, drawn: np.ndarray, level: float) -> Bias:
    """Return bounds of the bias of a calibration error by noise.

    At least ``b = max(0, mean(drawn) - value)``, at most ``(1 + √2) b``; but all of `value` where the basic bootstrap
    of the squared error reaches 0, ``2 value**2 <= q_high**2``, as in `calibration.intervals.error_interval`.

    Args:
        value: the error of the sample.
        drawn: the errors of the resamples ``[samples]``.
        level: of confidence, in (0, 1).
    """
    least = min(value, max(0.0, float(drawn.mean()) - value))
    at_zero = 2 * value**2 <= float(np.quantile(drawn, (1 + level) / 2)) ** 2
    return Bias(least, value if at_zero else min(value, _ALL_NOISE * least))


def error_difference(
    values: float, drawn_values: np.ndarray, baseline: float, drawn_baseline: np.ndarray, level: float
) -> Interval:
    """Return the interval of the difference of two errors.

    ``[d - most_1 + least_2 - (q_high - m), d - least_1 + most_2 + (m - q_low)]``, with d the difference of the sample,
    m and q mean and quantiles of the resampled differences, and the biases of `error_bias`. With ``most = least`` it
    is the basic bootstrap. The two biases are treated as unrelated, which makes the interval too wide for systems that
    are nearly the same.

    Args:
        values, baseline: the errors of the sample.
        drawn_values, drawn_baseline: the errors of the same resamples ``[samples]``.
        level: of confidence, in (0, 1).
    """
    return _scaled_difference(values, drawn_values, baseline, drawn_baseline, level)(1.0)


def error_ratio(
    values: float, drawn_values: np.ndarray, baseline: float, drawn_baseline: np.ndarray, level: float
) -> Interval:
    """Return the interval of the ratio of two errors: all r for which that of ``values - r * baseline`` holds 0.

    So it holds 1 exactly if that of `error_difference` holds 0. It starts at 0 where the first error could be 0, and
    reaches infinity where the second could be 0.

    Args:
        values, baseline: the errors of the sample; the second is positive.
        drawn_values, drawn_baseline: of the same resamples ``[samples]``.
        level: of confidence, in (0, 1).

    Source: Fieller, "Some problems in interval estimation" (JRSS B 1954), with a bootstrap interval in place of t.
    """
    from scipy import optimize

    difference = _scaled_difference(values, drawn_values, baseline, drawn_baseline, level)
    far = 1e6 * max(values, float(np.max(drawn_values)), baseline) / baseline
    low = 0.0
    if difference(0.0).low > 0:
        low = float(optimize.brentq(lambda r: difference(r).low, 0.0, far))
    high = math.inf
    if difference(far).high < 0:
        high = float(optimize.brentq(lambda r: difference(r).high, 0.0, far))
    return Interval(low, high)


def _scaled_difference(
    values: float, drawn_values: np.ndarray, baseline: float, drawn_baseline: np.ndarray, level: float
) -> Callable[[float], Interval]:
    """Return the interval of ``values - ratio * baseline`` as a function of the ratio."""
    first, second = error_bias(values, drawn_values, level), error_bias(baseline, drawn_baseline, level)

    def interval(ratio: float) -> Interval:
        drawn = drawn_values - ratio * drawn_baseline
        middle = float(drawn.mean())
        low, high = (float(q) for q in np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]))
        d = values - ratio * baseline
        return Interval(
            d - first.most + ratio * second.least - (high - middle),
            d - first.least + ratio * second.most + (middle - low),
        )

    return interval
