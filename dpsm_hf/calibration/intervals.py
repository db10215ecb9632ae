"""Bootstrap intervals of calibration metrics, resampling blocks of documents since tokens are not independent."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from .grid import CELLS
from .metrics import RANGES, Totals, all_metrics, perplexity

_RANGES = {
    **RANGES, "signed_gap": (-1.0, 1.0), "resolution": (-1.0, 1.0), "bits_per_byte": (0.0, math.inf),
    "nll_entropy_gap": (-math.inf, math.inf), "first_order_log_temperature": (-math.inf, math.inf),
}  # fmt: skip

#: Metrics that noise in the bins biases upwards; their interval is `error_interval`.
NOISE_RAISES = frozenset(
    {"ece_10", "ece_15", "ece_100", "debiased_ece", "adaptive_ece", "smooth_ece", "mce", "reliability"}
)

# Resamples computed at a time.
_AT_A_TIME = 50


class Interval(NamedTuple):
    """A confidence interval; both bounds are NaN if it cannot be computed."""

    low: float
    high: float


def bootstrap(blocks: Totals, *, level: float = 0.95, samples: int = 300, seed: int = 0) -> dict[str, Interval]:
    """Return a confidence interval of each metric by resampling blocks of documents with replacement.

    Means (scores, accuracy, gaps) get the basic bootstrap, `basic_interval`; ECE and the other metrics of
    `NOISE_RAISES` get `error_interval`. Both are clipped to the metric's range.

    Args:
        blocks: sums with the blocks as first axis; blocks without tokens are left out.
        level: of confidence, in (0, 1).
        samples: resamples.
        seed: of the resampling, so that the same tokens give the same interval.

    Raises:
        ValueError: for a level or a number of samples out of range.

    Source: Davison & Hinkley, "Bootstrap Methods and their Application" (1997), section 5.2.
    """
    check_resampling(level, samples)
    kept = blocks.count.sum(-1) > 0
    parts = Totals(*(values[kept] for values in blocks.arrays()))
    whole = Totals(*(values.sum(0) for values in parts.arrays()))
    point = {name: float(value) for name, value in all_metrics(whole).items()}
    number = len(parts.count)
    if number < 2:
        return {name: Interval(math.nan, math.nan) for name in point if name != "tokens"}
    weights = resampling_weights(number, samples, seed)
    found: dict[str, list[np.ndarray]] = {}
    # a float64 matmul is exact for counts below 2**53, and of those many cells are empty
    as_float = [values.astype(np.float64) for values in parts.arrays()]
    occupied = [np.flatnonzero(values.any(0)) for values in as_float[:2]]
    held = [np.ascontiguousarray(values[:, cells]) for values, cells in zip(as_float, occupied, strict=False)]
    for start in range(0, samples, _AT_A_TIME):
        some = weights[start : start + _AT_A_TIME].astype(np.float64)
        with np.errstate(invalid="ignore"):  # 0 * inf: an infinite score in a block that is not drawn
            counts = (_in_cells(_product(some, values), cells) for values, cells in zip(held, occupied, strict=True))
            drawn = Totals(*counts, *(_product(some, values) for values in as_float[2:]))
        for name, values in all_metrics(drawn, smooth_near=point["smooth_ece"]).items():
            found.setdefault(name, []).append(values)
    intervals = {}
    for name, value in point.items():
        if name in ("tokens", "perplexity"):
            continue
        drawn_values = np.concatenate(found.get(name, [np.array([])]))  # no resample may have a metric (bits_per_byte)
        kind = error_interval if name in NOISE_RAISES else basic_interval
        intervals[name] = kind(value, drawn_values, level, _RANGES.get(name, (0.0, 1.0)))
    if "nll" in intervals:
        intervals["perplexity"] = Interval(*(float(perplexity(bound)) for bound in intervals["nll"]))
    return intervals


def _product(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return ``weights @ values`` by PyTorch's threads: NumPy's would compete with these, which spin for a while."""
    found = torch.from_numpy(weights) @ torch.from_numpy(values.reshape(len(values), -1))
    return found.numpy().reshape(len(weights), *values.shape[1:])


def _in_cells(values: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Return values ``[samples, len(cells)]`` in their cells of ``[samples, CELLS]``, 0 in the others."""
    full = np.zeros((len(values), CELLS))
    full[:, cells] = values
    return full


def resampling_weights(number: int, samples: int, seed: int) -> np.ndarray:
    """Return how often each of ``number`` items occurs in each resample, ``[samples, number]``."""
    return np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=samples)


def block_figures(
    figure: Callable[[np.ndarray], np.ndarray], tokens: np.ndarray, level: float, samples: int, seed: int
) -> np.ndarray:
    """Return the value of a metric in each resample of the blocks that have tokens, ``[samples]``.

    Args:
        figure: computes the metric from weights ``[samples, blocks]``, how often each block occurs in each resample.
        tokens: ``[blocks]``, number of tokens in each block.
        level, samples, seed: as in `bootstrap`.

    Returns:
        ``[samples]``; empty if fewer than two blocks have tokens, which cannot be resampled.
    """
    check_resampling(level, samples)
    kept = np.flatnonzero(tokens)
    if len(kept) < 2:
        return np.empty(0)
    weights = np.zeros((samples, len(tokens)))
    weights[:, kept] = resampling_weights(len(kept), samples, seed)
    return figure(weights)


def basic_interval(value: float, drawn: np.ndarray, level: float, within: tuple[float, float]) -> Interval:
    """Return the basic bootstrap interval ``[2 value - q_high, 2 value - q_low]``, clipped; NaN without finite values.

    Args:
        value: the metric of the sample.
        drawn: ``[samples]``, the metric of each resample; NaN and infinity are left out.
        level: of confidence, in (0, 1).
        within: smallest and largest possible value.

    Source: Davison & Hinkley (1997), section 5.2.
    """
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn) or not math.isfinite(value):
        return Interval(math.nan, math.nan)
    q_low, q_high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(*(float(np.clip(2 * value - q, *within)) for q in (q_high, q_low)))


def error_interval(value: float, drawn: np.ndarray, level: float, within: tuple[float, float]) -> Interval:
    """Return the interval of a calibration error, which noise biases upwards in the sample and more in resamples.

    It is ``[sqrt(max(0, 2 value**2 - q_high**2)), q_high - (mean - value)]``. The lower bound is that of the basic
    bootstrap of the squared error, because noise adds to the square; the upper bound is the percentile minus the bias
    of the resamples. The interval always contains ``value``. For a calibrated model the basic bootstrap rarely reaches
    the true value 0; this interval does, and is wider there (docs/calibration.md has the coverage of both). The
    arguments are those of `basic_interval`.
    """
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn) or not math.isfinite(value):
        return Interval(math.nan, math.nan)
    q_high = float(np.quantile(drawn, (1 + level) / 2))
    low = math.sqrt(max(0.0, 2 * value**2 - q_high**2))
    high = max(value, q_high - max(0.0, float(drawn.mean()) - value))
    return Interval(*(float(np.clip(bound, *within)) for bound in (min(low, value), high)))


def check_resampling(level: float, samples: int) -> None:
    """Raise ValueError unless the level lies in (0, 1) and there are at least 20 resamples."""
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1, 0.95 say.")
    if not isinstance(samples, int) or samples < 20:
        raise ValueError(f"samples={samples} must be a whole number from 20 on: fewer resamples have no tails.")


def wilson(correct: np.ndarray, count: np.ndarray, z: float = 1.959964) -> tuple[np.ndarray, np.ndarray]:
    """Return Wilson's interval of ``correct / count`` for independent tokens; NaN where nothing was counted.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (JASA 1927).
    """
    n = np.where(count > 0, count, np.nan).astype(np.float64)
    share = correct / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)
