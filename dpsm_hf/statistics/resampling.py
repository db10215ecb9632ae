"""Compare two systems on the same documents, by the paired bootstrap and by approximate randomisation.

Both account for the choice of the test set; neither accounts for the choice of the seed.

A calibration error (ECE) is biased upwards by noise. The basic bootstrap estimates this bias by ``b = mean of the
resamples - sample``, which is right for errors far from 0. But the error of a calibrated model is all noise: c in the
sample and √2 c in resamples, whose noise has twice the variance, so ``b = (√2 - 1) c`` is only a part of its bias c.
Therefore the bias is allowed to be anything from b to ``(1 + √2) b``, and the whole error if the sample is compatible
with 0. If b is small, the intervals are those of the basic bootstrap. docs/statistics.md has the coverage of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..calibration.intervals import Interval, check_resampling
from .documents import DocumentBins, Documents, paired_features
from .paired import SCALES

# Entries of the largest weight matrix that is held at a time: 64 MiB of float64.
_AT_A_TIME = 2**23

# Ratio of the true bias to b for an error that is all noise: 1 / (√2 - 1).
_ALL_NOISE = 1 + math.sqrt(2)


@dataclass(frozen=True)
class DocumentBootstrap:
    """The difference or ratio of two systems, with its bootstrap interval over documents.

    Attributes:
        scale: "difference" (values - baseline) or "ratio".
        documents: number of documents, without those that are empty in both systems.
        values, baseline: the metric of each system, its mean over the runs.
        estimate: their difference or ratio.
        interval: of the estimate; NaN with fewer than two documents, or if the metric of a resample is undefined.
        standard_error: standard deviation of the difference or log-ratio over the resamples; NaN if it is undefined in
            one.
        undefined: number of resamples without a difference or ratio (a baseline of 0, no counts). A single one makes
            the interval of `DocumentMeans` NaN; that of `DocumentBins` needs only the metrics of both systems.
    """

    scale: str
    documents: int
    values: float
    baseline: float
    estimate: float
    interval: Interval
    level: float
    standard_error: float
    samples: int
    undefined: int


@dataclass(frozen=True)
class Randomization:
    """The result of `approximate_randomization`.

    Attributes:
        documents: number of documents, without those that are empty in both systems.
        difference: values - baseline, the mean over the runs if there are several.
        p_value: share of the sets of swaps with a difference at least as large.
        alternative: "two-sided", "less" or "greater".
        assignments: number of sets of swaps that were tried.
        exact: whether all possible sets were tried.
    """

    documents: int
    difference: float
    p_value: float
    alternative: str
    assignments: int
    exact: bool


def paired_bootstrap(
    values: Documents,
    baseline: Documents,
    *,
    scale: str = "difference",
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
    same_counts: bool = True,
) -> DocumentBootstrap:
    """Return the bootstrap interval of a difference or ratio, resampling the same documents for both systems.

    For `DocumentMeans` it is the basic bootstrap interval ``[2 v - q_high, 2 v - q_low]`` around the estimate v (of
    the logarithms for a ratio). For `DocumentBins`, whose errors are biased upwards by noise, see this module's
    docstring. Several runs are not resampled: their mean metrics are compared. For the variation over seeds see
    `paired_difference`.

    Args:
        values: sums of the system by document, or by block of documents, which is then the unit of resampling.
        baseline: the same of the baseline, on the same documents.
        scale: "difference" or "ratio".
        level: of confidence, in (0, 1).
        samples: number of resamples.
        seed: of the resampling.
        same_counts: raise if a document has different counts in the two systems.

    Raises:
        ValueError: for arguments out of range, or if the two do not belong to the same documents.

    Source: Koehn, "Statistical significance tests for machine translation evaluation" (EMNLP 2004) for pairing;
    Davison & Hinkley, "Bootstrap methods and their application" (1997), section 5.2.
    """
    check_resampling(level, samples)
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; choose one of {', '.join(SCALES)}.")
    x, y = paired_features(values, baseline, same_counts)
    point = values.metric(x.sum(1)).mean(), baseline.metric(y.sum(1)).mean()
    number = x.shape[1]
    estimate = float(_contrast(*point, scale))
    interval, error, undefined = Interval(math.nan, math.nan), math.nan, 0
    if number > 1:
        rng = np.random.default_rng(seed)
        weights = _weights(rng, number, samples)
        parts = [(values.metric(w @ x).mean(0), baseline.metric(w @ y).mean(0)) for w in weights]
        drawn = [np.concatenate(some) for some in zip(*parts, strict=True)]
        contrasts = _contrast(drawn[0], drawn[1], scale)
        undefined = int((~np.isfinite(contrasts)).sum())
        if not undefined and math.isfinite(estimate):
            error = float(contrasts.std(ddof=1))
        if isinstance(values, DocumentBins):
            if np.isfinite(drawn).all() and (scale == "difference" or point[1] > 0):
                v, b = float(point[0]), float(point[1])
                difference = _error_difference(v, drawn[0], b, drawn[1], level)
                interval = difference(1.0)
                if scale == "ratio":
                    interval = _error_ratio(difference, 1e6 * max(v, float(np.max(drawn[0])), b) / b)
        elif math.isfinite(error):
            low, high = np.quantile(contrasts, [(1 - level) / 2, (1 + level) / 2])
            interval = Interval(*(_on_original_scale(2 * estimate - float(q), scale) for q in (high, low)))
    return DocumentBootstrap(
        scale=scale, documents=number, values=float(point[0]), baseline=float(point[1]),
        estimate=_on_original_scale(estimate, scale), interval=interval, level=level, standard_error=error,
        samples=samples, undefined=undefined,
    )  # fmt: skip


def approximate_randomization(
    values: Documents,
    baseline: Documents,
    *,
    alternative: str = "two-sided",
    samples: int = 10_000,
    seed: int = 0,
    same_counts: bool = True,
) -> Randomization:
    """Test the difference of two systems by swapping their outputs, document by document.

    If the systems are the same (the null hypothesis), swapping the two outputs of a document changes nothing. With R
    random sets of swaps, ``p = (1 + #{as large}) / (1 + R)``, which is never 0 and keeps the level of the test. If
    there are at most `samples` possible sets (``2**documents``), all are tried and p is exact. With several runs, the
    outputs of a document are swapped in all runs together.

    Args:
        values, baseline, same_counts: as in `paired_bootstrap`; the unit that is resampled there is swapped here.
        alternative: "two-sided", "less" (values below the baseline) or "greater".
        samples: number of random sets of swaps.
        seed: of the swaps.

    Raises:
        ValueError: for arguments out of range, or if the two do not belong to the same documents.

    Source: Noreen, "Computer-intensive methods for testing hypotheses" (1989); Yeh, "More accurate tests for the
    statistical significance of result differences" (COLING 2000); Phipson & Smyth, "Permutation p-values should never
    be zero" (2010) for the added 1.
    """
    if alternative not in ("two-sided", "less", "greater"):
        raise ValueError(f"alternative={alternative!r} is unknown; choose two-sided, less or greater.")
    if not isinstance(samples, int) or samples < 20:
        raise ValueError(f"samples={samples} must be a whole number from 20 on.")
    x, y = paired_features(values, baseline, same_counts)
    number = x.shape[1]
    exact = number < 63 and 2**number <= samples
    figures = values.metric(x.sum(1)), baseline.metric(y.sum(1))  # [seeds]
    with np.errstate(invalid="ignore"):
        difference = float((figures[0] - figures[1]).mean())
    if not math.isfinite(difference):
        raise ValueError(f"The figures {figures[0]} and {figures[1]} have no difference that could be tested.")
    # for ties: swaps with the same difference add the same numbers in another order
    tolerance = 1e-12 * max(float(np.abs(figures[0]).max()), float(np.abs(figures[1]).max()))
    larger = {"two-sided": np.abs, "less": np.negative, "greater": np.positive}[alternative]
    as_large = tried = 0
    for swap in _swaps(np.random.default_rng(seed), number, 2**number if exact else samples, exact):
        moved = swap @ (y - x)
        swapped = values.metric(x.sum(1)[:, None] + moved), baseline.metric(y.sum(1)[:, None] - moved)
        found = (swapped[0] - swapped[1]).mean(0)
        if not np.isfinite(found).all():
            raise ValueError(
                "Some swaps leave a system without any count: leave out the documents that have a count in one system "
                "only, or compare counts that are the same."
            )
        as_large += int((larger(found) >= larger(difference) - tolerance).sum())
        tried += len(swap)
    p_value = as_large / tried if exact else (1 + as_large) / (1 + tried)
    return Randomization(number, difference, p_value, alternative, tried, exact)


def _contrast(values: np.ndarray, baseline: np.ndarray, scale: str) -> np.ndarray:
    """Return the difference or the log-ratio; not finite where it is undefined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(values) - np.log(baseline) if scale == "ratio" else values - baseline


def _on_original_scale(contrast: float, scale: str) -> float:
    return math.exp(contrast) if scale == "ratio" else contrast


def _parts(rows: int, number: int) -> Iterator[range]:
    """Yield the row indices of a matrix with ``number`` columns in parts of at most `_AT_A_TIME` entries."""
    step = max(1, _AT_A_TIME // number)
    for start in range(0, rows, step):
        yield range(start, min(start + step, rows))


def _weights(rng: np.random.Generator, number: int, samples: int) -> Iterator[np.ndarray]:
    """Yield how often each document is drawn in each resample, ``[part, number]``, `samples` rows in all."""
    for rows in _parts(samples, number):
        yield rng.multinomial(number, np.full(number, 1 / number), size=len(rows)).astype(np.float64)


def _swaps(rng: np.random.Generator, number: int, sets: int, exact: bool) -> Iterator[np.ndarray]:
    """Yield which documents are swapped (0 or 1), ``[part, number]``: all possible sets, or random ones."""
    for rows in _parts(sets, number):
        if exact:
            yield (np.array(rows)[:, None] >> np.arange(number) & 1).astype(np.float64)
        else:
            yield rng.integers(0, 2, size=(len(rows), number)).astype(np.float64)


def _error_bias(value: float, drawn: np.ndarray, level: float) -> tuple[float, float]:
    """Return the least and the greatest bias that noise may have added to a calibration error.

    The least is ``b = max(0, mean(drawn) - value)``, the greatest ``(1 + √2) b``; but all of `value` if the basic
    bootstrap interval of the squared error reaches 0, that is ``2 value**2 <= q_high**2``, as in
    `calibration.intervals.error_interval`.
    """
    least = min(value, max(0.0, float(drawn.mean()) - value))
    at_zero = 2 * value**2 <= float(np.quantile(drawn, (1 + level) / 2)) ** 2
    return least, value if at_zero else min(value, _ALL_NOISE * least)


def _error_difference(
    values: float, drawn_values: np.ndarray, baseline: float, drawn_baseline: np.ndarray, level: float
) -> Callable[[float], Interval]:
    """Return a function of r that computes the interval of ``values - r * baseline`` for two calibration errors.

    The interval is ``[d - most_1 + r least_2 - (q_high - m), d - least_1 + r most_2 + (m - q_low)]``: d is
    ``values - r * baseline`` in the sample, m and q are its mean and quantiles over the resamples, and least and most
    are the biases of the two errors from `_error_bias`. With ``most = least`` it is the basic bootstrap. The biases
    are treated as unrelated, which makes the interval too wide for systems that are nearly the same.
    """
    least, most = _error_bias(values, drawn_values, level)
    baseline_least, baseline_most = _error_bias(baseline, drawn_baseline, level)

    def interval(ratio: float) -> Interval:
        drawn = drawn_values - ratio * drawn_baseline
        middle = float(drawn.mean())
        low, high = (float(q) for q in np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]))
        d = values - ratio * baseline
        return Interval(
            d - most + ratio * baseline_least - (high - middle), d - least + ratio * baseline_most + (middle - low)
        )

    return interval


def _error_ratio(difference: Callable[[float], Interval], far: float) -> Interval:
    """Return the interval of the ratio of two errors: all r up to `far` for which ``difference(r)`` contains 0.

    So it contains 1 exactly if the interval of the difference contains 0. It starts at 0 if the first error could be
    0, and ends at infinity if the second could be 0.

    Source: Fieller, "Some problems in interval estimation" (JRSS B 1954), with a bootstrap interval in place of t.
    """
    from scipy import optimize

    low, high = 0.0, math.inf
    if difference(0.0).low > 0:
        low = float(optimize.brentq(lambda r: difference(r).low, 0.0, far))
    if difference(far).high < 0:
        high = float(optimize.brentq(lambda r: difference(r).high, 0.0, far))
    return Interval(low, high)
