"""Evaluate confidences as forecasts of a quality in [0, 1], one pair for every text: ranks, bins, intervals.

`dpsm_hf.calibration` has events that happen or do not, and millions of them; here are qualities, and few of them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...calibration import Interval
from ...calibration.intervals import basic_interval, check_resampling, resampling_weights

Array = np.ndarray

#: Bins of equal mass.
FORECAST_BINS = 10

#: Fewer texts than this tell too little of each other to resample.
FEWEST_TEXTS = 10

# Resamples that are computed at a time: a few megabytes for ten thousand texts.
_AT_A_TIME = 50

_NEARLY_ONE = 1 - 1e-9


def forecast_figures(confidence: Array, quality: Array) -> dict[str, float]:
    """Return how well a confidence forecasts a quality, ``[N]`` each in [0, 1]; NaN where that cannot be told.

    ``confidence`` and ``quality`` are their means, ``signed_gap`` the difference (positive: over-confident),
    ``adaptive_ece`` is ``sum_b n_b / n * |quality_b - confidence_b|`` over ten bins of equal mass (biased upwards on
    few texts, as every ECE), ``auroc`` the chance that a text better than the median has a higher confidence than one
    that is not (ties count half), and ``rank_correlation`` is Spearman's, Pearson's of the ranks, mean ranks for ties.

    Source: Spearman, "The proof and measurement of association between two things" (1904); Nguyen & O'Connor,
        "Posterior calibration and exploratory analysis for natural language processing models" (2015) for the bins.
    """
    weights = np.ones((1, len(confidence)))
    found = {name: float(values[0]) for name, values in _weighted(confidence, quality, weights).items()}
    member = _equal_mass(confidence, FORECAST_BINS)
    gaps = np.bincount(member, weights=quality - confidence, minlength=FORECAST_BINS)
    return {**found, "adaptive_ece": float(np.abs(gaps).sum() / len(confidence))}


def forecast_intervals(
    confidence: Array, quality: Array, *, level: float = 0.95, samples: int = 300, seed: int = 0
) -> dict[str, Interval]:
    """Return a confidence interval of each figure but the calibration error, by resampling texts; NaN below ten texts.

    The basic bootstrap, for the rank correlation on the scale of ``artanh``, where its spread hardly depends on it.

    Raises:
        ValueError: for a level or a number of samples out of range.

    Source: Davison & Hinkley, "Bootstrap Methods and their Application" (1997), sections 2.7 and 5.2.
    """
    check_resampling(level, samples)
    number = len(confidence)
    point = {name: float(values[0]) for name, values in _weighted(confidence, quality, np.ones((1, number))).items()}
    if number < FEWEST_TEXTS:
        return {name: Interval(math.nan, math.nan) for name in point}
    weights = resampling_weights(number, samples, seed)
    some = (weights[start : start + _AT_A_TIME].astype(np.float64) for start in range(0, samples, _AT_A_TIME))
    parts = [_weighted(confidence, quality, of_texts) for of_texts in some]
    drawn = {name: np.concatenate([part[name] for part in parts]) for name in point}
    intervals = {}
    for name, value in point.items():
        if name == "rank_correlation":
            low, high = basic_interval(_artanh(value), _artanh(drawn[name]), level, (-math.inf, math.inf))
            intervals[name] = Interval(math.tanh(low), math.tanh(high))
        else:
            within = (-1.0, 1.0) if name == "signed_gap" else (0.0, 1.0)
            intervals[name] = basic_interval(value, drawn[name], level, within)
    return intervals


def forecast_curve(confidence: Array, quality: Array, bins: int = FORECAST_BINS) -> dict[str, Any]:
    """Return mean quality against mean confidence in bins of equal mass, as JSON can hold it.

    ``low`` and ``high`` are the 95 % interval of the mean quality, ``mean -+ 1.96 s / sqrt(n)`` cut to [0, 1]; None
    where a bin has fewer than two texts. Texts of one confidence share a bin.
    """
    member = _equal_mass(confidence, bins)
    count = np.bincount(member, minlength=bins)
    names = ("confidence", "quality", "low", "high")
    found: dict[str, Any] = {"bins": bins, "count": count.tolist(), **{name: [None] * bins for name in names}}
    for index, size in enumerate(count.tolist()):
        if size:
            of_bin = quality[member == index]
            mean = float(of_bin.mean())
            found["confidence"][index], found["quality"][index] = float(confidence[member == index].mean()), mean
            if size > 1:
                half = 1.959964 * float(of_bin.std(ddof=1)) / math.sqrt(size)
                found["low"][index], found["high"][index] = max(0.0, mean - half), min(1.0, mean + half)
    return found


def _weighted(confidence: Array, quality: Array, weights: Array) -> dict[str, Array]:
    """Return the figures for so many copies of each text, ``[samples]`` for weights ``[samples, N]``."""
    total = weights.sum(1)
    found = {"confidence": weights @ confidence / total, "quality": weights @ quality / total}
    found["signed_gap"] = found["confidence"] - found["quality"]
    ranks = _middles(confidence, weights)
    x, y = (part - total[:, None] / 2 for part in (ranks, _middles(quality, weights)))  # the mean rank is N / 2

    def product(a: Array, b: Array) -> Array:
        return np.einsum("sn,sn,sn->s", weights, a, b)

    spread = np.sqrt(product(x, x) * product(y, y))
    better = quality > np.median(quality)
    above = weights[:, better].sum(1)
    pairs = above * (total - above)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = product(x, y) / spread
        found["rank_correlation"] = np.where(spread > 0, np.clip(correlation, -1, 1), np.nan)
        # what lies below the better ones, less the better ones among it
        below = (weights[:, better] * ranks[:, better]).sum(1) - above**2 / 2
        found["auroc"] = np.where(pairs > 0, below / pairs, np.nan)
    return found


def _middles(values: Array, weights: Array) -> Array:
    """Return the weight below each value and half the weight at it, ``[samples, N]``: mean ranks less one half."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(group.max() + 1))
    mass = np.add.reduceat(weights[:, order], starts, axis=1)
    return (np.cumsum(mass, axis=1) - mass / 2)[:, group]


def _equal_mass(confidence: Array, bins: int) -> Array:
    # the rule of calibration.metrics.adaptive_bins: a tie is never cut, it goes where its middle lies
    middle = _middles(confidence, np.ones((1, len(confidence))))[0]
    return np.minimum((middle * bins / len(confidence)).astype(np.int64), bins - 1)


def _artanh(value: Any) -> Any:
    return np.arctanh(np.clip(value, -_NEARLY_ONE, _NEARLY_ONE))
