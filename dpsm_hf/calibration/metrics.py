"""Calibration metrics (ECE and others) from counts and sums on the grid of confidence.

Every function takes arrays whose last axis is the cells of `dpsm_hf.calibration.grid`. Leading axes, if any, are
resamples of the same tokens, and the function returns one number for each resample.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy import fft

from .grid import CELLS, GRID_BINS, first_cells

Array = np.ndarray

#: Scores that a caller may give for each token; ``label_bytes`` is the length in bytes of the label's text.
SCORES = ("nll", "brier", "spherical", "entropy", "varentropy", "label_probability", "label_bytes")

#: Smallest and largest value of each score.
RANGES = {
    "nll": (0.0, math.inf), "brier": (0.0, 2.0), "spherical": (0.0, 1.0), "entropy": (0.0, math.inf),
    "varentropy": (0.0, math.inf), "label_probability": (0.0, 1.0), "label_bytes": (0.0, math.inf),
}  # fmt: skip

#: Everything that is summed over tokens; the last is ``(confidence - correct)**2``.
SUMMED = (*SCORES, "top_label_brier")

#: Every metric that `TokenCalibration.compute` returns.
METRICS = (
    *SUMMED, "perplexity", "bits_per_byte", "nll_entropy_gap", "first_order_log_temperature", "token_accuracy",
    "confidence", "signed_gap", "ece_10", "ece_15", "ece_100", "ece_10_null", "ece_15_null", "ece_100_null",
    "debiased_ece", "adaptive_ece", "smooth_ece", "mce", "reliability", "resolution", "uncertainty",
    "confidence_auroc", "tokens",
)  # fmt: skip

_LOWER_IS_BETTER = (
    "nll", "perplexity", "bits_per_byte", "brier", "top_label_brier", "spherical", "ece_10", "ece_15", "ece_100",
    "debiased_ece", "adaptive_ece", "smooth_ece", "classwise_ece", "mce", "reliability",
)  # fmt: skip

_LARGEST_EXPONENT = 700.0  # exp of 710 overflows a float64

_LAST_DEVIATION = 9.0  # standard deviations at which a Gaussian is below 1e-17

_MOST_STEPS = 20  # towards the smooth ECE of resamples
_LEAST_WIDTH = 1e-6  # of the kernel, where a bracket of the smooth ECE begins
_COARSE_CELLS = 1000  # cells for the smooth ECE of resamples, in place of 3000, to save time


@dataclass(frozen=True)
class Totals:
    """Counts and sums of a set of tokens.

    Args:
        count: ``[..., CELLS]`` tokens.
        correct: ``[..., CELLS]`` tokens whose prediction is the label.
        confidence: ``[..., CELLS]`` sum of confidences.
        sums: ``[..., len(SUMMED)]`` sums of the scores.
        counts: ``[..., len(SUMMED)]`` tokens for which each score was given.
    """

    count: Array
    correct: Array
    confidence: Array
    sums: Array
    counts: Array

    @cached_property
    def tokens(self) -> Array:
        """Return the number of tokens, ``[...]``."""
        return self.count.sum(-1)

    @cached_property
    def below(self) -> Array:
        """Return the number of tokens in the cells below and half of those in the cell itself, ``[..., CELLS]``."""
        return np.cumsum(self.count, axis=-1) - self.count / 2

    @cached_property
    def gaps(self) -> Array:
        """Return right tokens less the sum of confidences, ``[..., CELLS]``."""
        return self.correct - self.confidence

    @cached_property
    def variances(self) -> Array:
        """Return the sum of ``c * (1 - c)`` over tokens with the mean confidence of their cell, ``[..., CELLS]``."""
        mean = self.confidence / np.maximum(self.count, 1)
        return self.count * np.clip(mean * (1 - mean), 0, None)

    def arrays(self) -> tuple[Array, ...]:
        """Return the arrays in the order of the arguments."""
        return self.count, self.correct, self.confidence, self.sums, self.counts


def bare_name(name: str) -> str:
    """Return the name of a metric without what says of which interval or temperature it is."""
    return re.sub("_(scaled(_by_[a-z]+)?|low|high)$", "", name)


def lower_is_better(name: str) -> bool:
    """Return whether lower values of a metric are better; a prefix (``eval_``) and a suffix (``_low``) are ignored."""
    bare = bare_name(name)
    if re.search("(^|_)temperature_[a-z]+$", bare):  # temperature_brier is no Brier score
        return False
    return any(bare == known or bare.endswith(f"_{known}") for known in _LOWER_IS_BETTER)


def all_metrics(totals: Totals, *, smooth_near: float | None = None) -> dict[str, Array]:
    """Return every metric of `METRICS` whose scores were given; formulas and sources are in docs/calibration.md.

    Args:
        totals: with at least one token in each resample.
        smooth_near: for resamples, the smooth ECE of the sample; theirs is then searched near it on a coarser grid.
    """
    found: dict[str, Array] = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for i, name in enumerate(SUMMED):
            if totals.counts[..., i].any():
                found[name] = totals.sums[..., i] / totals.counts[..., i]
    if "nll" in found:
        found["perplexity"] = perplexity(found["nll"])
        found |= _bits_per_byte(totals)
        found |= _temperature_signals(totals)
    tokens = totals.tokens
    accuracy = totals.correct.sum(-1) / tokens
    found["token_accuracy"] = accuracy
    found["confidence"] = totals.confidence.sum(-1) / tokens
    found["signed_gap"] = found["confidence"] - accuracy
    for bins in (10, 15, 100):
        found[f"ece_{bins}"] = equal_width_ece(totals, bins)
    for bins in (10, 15, 100):
        found[f"ece_{bins}_null"] = null_ece(totals, bins)
    found["debiased_ece"] = debiased_ece(totals)
    found["adaptive_ece"] = adaptive_ece(totals)
    found["smooth_ece"] = smooth_ece(totals, near=smooth_near)
    found["mce"] = maximum_error(totals)
    found["reliability"] = reliability(totals)
    found["uncertainty"] = accuracy * (1 - accuracy)
    # generalised resolution (Stephenson et al. 2008), which includes the variation within bins, so that
    # top_label_brier = reliability - resolution + uncertainty is exact
    found["resolution"] = found["reliability"] + found["uncertainty"] - found["top_label_brier"]
    found["confidence_auroc"] = confidence_auroc(totals)
    found["tokens"] = tokens
    return found


def _bits_per_byte(totals: Totals) -> dict[str, Array]:
    """Return bits per byte of text, ``sum nll / (ln 2 * sum bytes)``; NaN if some tokens have no byte length.

    `TokenCalibration.update` takes bytes only together with NLL, so equal counts mean the same tokens.
    """
    nll, length = SUMMED.index("nll"), SUMMED.index("label_bytes")
    size = totals.sums[..., length]
    known = (size > 0) & (totals.counts[..., nll] == totals.counts[..., length])
    if not known.any():
        return {}
    return {"bits_per_byte": np.where(known, totals.sums[..., nll] / (np.log(2) * np.where(known, size, 1)), np.nan)}


def _temperature_signals(totals: Totals) -> dict[str, Array]:
    """Return what NLL says of a temperature to first order, where nll, entropy and varentropy have the same tokens.

    ``nll_entropy_gap = mean(nll - entropy)`` is the derivative of the mean NLL by 1/T at T = 1, and
    ``first_order_log_temperature = sum(nll - entropy) / sum(varentropy)`` the Newton step from there: about log T of
    the temperature that NLL fits.
    """
    nll, entropy, spread = (SUMMED.index(name) for name in ("nll", "entropy", "varentropy"))
    counts = totals.counts
    if not (counts[..., entropy].any() and np.array_equal(counts[..., nll], counts[..., entropy])):
        return {}
    excess = totals.sums[..., nll] - totals.sums[..., entropy]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {"nll_entropy_gap": excess / counts[..., nll]}
        if np.array_equal(counts[..., nll], counts[..., spread]):
            total = totals.sums[..., spread]
            found["first_order_log_temperature"] = np.where(total > 0, excess / total, np.nan)
    return found


def perplexity(nll: Array | float) -> Array:
    """Return ``exp(nll)``; infinity instead of an overflow."""
    nll = np.asarray(nll)
    return np.where(nll > _LARGEST_EXPONENT, np.inf, np.exp(np.minimum(nll, _LARGEST_EXPONENT)))


def in_bins(values: Array, bins: int) -> Array:
    """Sum the cells ``[..., CELLS]`` over equal-width bins, ``[..., bins]``."""
    return np.add.reduceat(values, first_cells(bins), axis=-1)


def equal_width_ece(totals: Totals, bins: int) -> Array:
    """Return ``sum_b n_b / n * |accuracy_b - confidence_b|`` over equal-width bins (Naeini et al. 2015)."""
    gaps = in_bins(totals.gaps, bins)
    return np.abs(gaps).sum(-1) / totals.tokens


def maximum_error(totals: Totals, bins: int = 15) -> Array:
    """Return ``max_b |accuracy_b - confidence_b|`` over the equal-width bins with tokens (Naeini et al. 2015)."""
    count = in_bins(totals.count, bins)
    gaps = np.abs(in_bins(totals.gaps, bins))
    return np.where(count > 0, gaps / np.maximum(count, 1), 0.0).max(-1)


def reliability(totals: Totals, bins: int = 15) -> Array:
    """Return ``sum_b n_b / n * (accuracy_b - confidence_b)**2`` (Murphy 1973)."""
    count = in_bins(totals.count, bins)
    gaps = in_bins(totals.gaps, bins)
    return (gaps**2 / np.maximum(count, 1)).sum(-1) / totals.tokens


def null_ece(totals: Totals, bins: int) -> Array:
    """Return the expected ECE of a perfectly calibrated model with these confidences.

    ``sum_b n_b / n * sqrt(2 / pi * v_b / n_b)`` with ``v_b`` the mean of ``c * (1 - c)`` in the bin: the expected
    absolute value of a normally distributed gap. It assumes independent tokens; correlated ones raise it a little.
    """
    return np.sqrt(2 / np.pi * in_bins(totals.variances, bins)).sum(-1) / totals.tokens


def debiased_ece(totals: Totals, bins: int = 15) -> Array:
    """Return the ECE minus the expected contribution of noise in the bins, at least 0.

    ``ece - sum_b n_b / n * (E|g_b + e_b| - |g_b|)`` with the observed gap ``g_b`` and ``e_b`` normal with variance
    ``accuracy_b (1 - accuracy_b) / n_b``: the debiased estimator of Kumar, Liang & Ma (2019), with the expectation in
    closed form instead of simulated.
    """
    count = in_bins(totals.count, bins)
    occupied = np.maximum(count, 1)
    accuracy = in_bins(totals.correct, bins) / occupied
    gap = np.abs(accuracy - in_bins(totals.confidence, bins) / occupied)
    deviation = np.sqrt(accuracy * (1 - accuracy) / occupied)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(deviation > 0, gap / deviation, np.inf)
        folded = deviation * np.sqrt(2 / np.pi) * np.exp(-(ratio**2) / 2) + gap * _erf(ratio / np.sqrt(2))
    # without variance there is nothing to subtract
    expected = np.where(deviation > 0, folded, gap)
    return np.maximum(0.0, (count * (2 * gap - expected)).sum(-1) / totals.tokens)


def adaptive_bins(count: Array, bins: int = 15) -> Array:
    """Return the bin of each cell, ``[..., CELLS]``, such that bins hold about equal numbers of tokens.

    Cells are not divided: each goes to the bin in which its middle token falls.
    """
    middle = np.cumsum(count, axis=-1) - count / 2
    total = np.maximum(count.sum(-1, keepdims=True), 1)
    return np.minimum((middle * bins / total).astype(np.int64), bins - 1)


def adaptive_ece(totals: Totals, bins: int = 15) -> Array:
    """Return the ECE over bins of equal mass (Nguyen & O'Connor 2015)."""
    index = adaptive_bins(totals.count, bins)
    lead, rows = index.shape[:-1], index.size // CELLS
    flat = (index.reshape(rows, CELLS) + bins * np.arange(rows)[:, None]).reshape(-1)
    gaps = np.bincount(flat, weights=(totals.gaps).reshape(-1), minlength=rows * bins)
    return np.abs(gaps).reshape(*lead, bins).sum(-1) / totals.tokens


def smooth_ece(totals: Totals, *, near: float | None = None) -> Array:
    """Return the smooth calibration error (Błasiok & Nakkiran 2024).

    ``smECE_s = integral |sum_i K_s(t, c_i) (y_i - c_i) / n| dt`` with a Gaussian kernel reflected at 0 and 1, at the
    width ``s`` where ``smECE_s = s``. Tokens are placed at the middle of their cell of width 1/3000. Convolution with
    the reflected Gaussian is a multiplication of the cosine series.

    Args:
        totals: with at least one token in each resample.
        near: as ``smooth_near`` of `all_metrics`.
    """
    lead = totals.count.shape[:-1]
    cells = GRID_BINS if near is None else _COARSE_CELLS
    residual = in_bins(totals.gaps.reshape(-1, CELLS), cells) / totals.tokens.reshape(-1, 1)
    series = fft.dct(residual, axis=-1)

    def error(width: Array) -> Array:
        # what the kernel multiplies by less than 1e-17 changes no figure
        number = min(cells, 1 + math.ceil(_LAST_DEVIATION / (np.pi * width.min())))
        kernel = np.exp(-0.5 * (np.pi * np.arange(number) * width[:, None]) ** 2)
        smoothed = fft.idct(series[:, :number] * kernel, n=cells, axis=-1, overwrite_x=True)
        return np.abs(smoothed, out=smoothed).sum(-1)

    # smECE_s falls as s grows, so smECE_s = s has one solution
    if near is not None:
        return _crossing(lambda width: error(width) - width, max(near, 1e-4), len(residual)).reshape(lead)
    low, high = np.zeros(len(residual)), np.ones(len(residual))
    for _ in range(30):
        width = (low + high) / 2
        above = error(width) > width
        low, high = np.where(above, width, low), np.where(above, high, width)
    return ((low + high) / 2).reshape(lead)


def _crossing(excess: Callable[[Array], Array], near: float, rows: int) -> Array:
    """Return where falling functions cross 0 in (0, 1], ``[rows]``, by regula falsi (Illinois) from a bracket of 16.

    It ends when no step moves by more than a thousandth, after five or so; a bisection takes twelve for as much.
    """
    low, high = np.full(rows, near / 4), np.full(rows, min(4 * near, 1.0))
    below, beyond = excess(low), excess(high)
    if (below <= 0).any():
        low = np.where(below > 0, low, _LEAST_WIDTH)
        below = excess(low)
    if (beyond > 0).any():
        high = np.where(beyond > 0, 1.0, high)
        beyond = excess(high)

    def chord() -> Array:  # where the straight line between both ends crosses 0
        found: Array = low + (high - low) * below / np.maximum(below - beyond, 1e-300)
        return np.maximum(found, _LEAST_WIDTH)

    side = np.zeros(rows)
    width = chord()
    for _ in range(_MOST_STEPS):
        here = excess(width)
        above = here > 0
        # an end that stays twice is given half its weight, or the other one would creep
        beyond, below = (
            np.where(above & (side > 0), beyond / 2, beyond),
            np.where(~above & (side < 0), below / 2, below),
        )
        low, below = np.where(above, width, low), np.where(above, here, below)
        high, beyond = np.where(above, high, width), np.where(above, beyond, here)
        side = np.where(above, 1.0, -1.0)
        before, width = width, chord()
        if (np.abs(width - before) <= 1e-3 * before).all():
            break
    return width


def confidence_auroc(totals: Totals) -> Array:
    """Return the probability that a correct token has a higher confidence than a wrong one (area under the ROC curve).

    Tokens in one cell count as ties, half each. NaN if all tokens are correct, or none.
    """
    right = totals.correct.astype(np.float64)
    wrong = totals.count - totals.correct
    below = np.cumsum(wrong, axis=-1) - wrong / 2
    pairs = right.sum(-1) * wrong.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(pairs > 0, (right * below).sum(-1) / pairs, np.nan)


def _erf(x: Array) -> Array:
    return torch.erf(torch.from_numpy(np.ascontiguousarray(x))).numpy()
