"""Qualities of whole texts against their forecasts, and the subsequence that ROUGE-L counts."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from dpsm_hf.evaluation.generation.accumulator import on_common_subsequence
from dpsm_hf.evaluation.generation.forecasts import forecast_curve, forecast_figures, forecast_intervals

# ---- the longest common subsequence --------------------------------------------------------------------------------


def first_of_all(a: list[int], b: list[int]) -> list[bool]:
    for size in range(min(len(a), len(b)), -1, -1):
        for places in itertools.combinations(range(len(a)), size):
            rest = iter(b)
            if all(a[i] in rest for i in places):
                return [i in places for i in range(len(a))]
    raise AssertionError


def test_common_subsequence_is_the_first_of_the_longest() -> None:
    rng = random.Random(0)
    for _ in range(600):
        kinds = rng.randint(1, 5)
        a, b = ([rng.randrange(kinds) for _ in range(rng.randint(0, 8))] for _ in range(2))
        assert on_common_subsequence(a, b) == first_of_all(a, b), (a, b)


def test_common_subsequence_of_long_sequences() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 30, 150).tolist(), rng.integers(0, 30, 170).tolist()
    table = np.zeros((151, 171), dtype=int)
    for i, j in itertools.product(range(150), range(170)):
        table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
    marked = [token for token, on in zip(a, on_common_subsequence(a, b), strict=True) if on]
    assert len(marked) == table[-1, -1]
    rest = iter(b)
    assert all(token in rest for token in marked)


# ---- figures of whole texts ----------------------------------------------------------------------------------------


def ranks(values: np.ndarray) -> np.ndarray:
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def test_figures_equal_their_definitions() -> None:
    rng = np.random.default_rng(2)
    confidence, quality = rng.random(60).round(2), rng.random(60).round(1)  # with ties
    found = forecast_figures(confidence, quality)
    assert found["rank_correlation"] == pytest.approx(np.corrcoef(ranks(confidence), ranks(quality))[0, 1], rel=1e-12)
    better, rest = confidence[quality > np.median(quality)], confidence[quality <= np.median(quality)]
    wins = [(b > r) + 0.5 * (b == r) for b in better for r in rest]
    assert found["auroc"] == pytest.approx(np.mean(wins), rel=1e-12)
    assert found["signed_gap"] == pytest.approx(confidence.mean() - quality.mean())
    curve = forecast_curve(confidence, quality)
    assert sum(curve["count"]) == 60
    gaps = [abs(c - q) * n for c, q, n in zip(curve["confidence"], curve["quality"], curve["count"], strict=True)]
    assert found["adaptive_ece"] == pytest.approx(sum(gaps) / 60, rel=1e-12)
    distinct = np.arange(60) / 60
    assert forecast_curve(distinct, quality)["count"] == [6] * 10
    first = quality[:6]
    half = 1.959964 * first.std(ddof=1) / math.sqrt(6)
    assert forecast_curve(distinct, quality)["high"][0] == pytest.approx(first.mean() + half)


def test_resampling_with_weights_is_resampling_rows() -> None:
    rng = np.random.default_rng(3)
    confidence, quality = rng.random(30), rng.random(30).round(1)
    low, high = forecast_intervals(confidence, quality, samples=100, seed=5)["rank_correlation"]
    weights = np.random.default_rng(5).multinomial(30, np.full(30, 1 / 30), size=100)
    drawn = []
    for counts in weights:
        rows = np.repeat(np.arange(30), counts)
        drawn.append(np.arctanh(np.corrcoef(ranks(confidence[rows]), ranks(quality[rows]))[0, 1]))
    middle = np.arctanh(np.corrcoef(ranks(confidence), ranks(quality))[0, 1])
    q_low, q_high = np.quantile(drawn, [0.025, 0.975])
    assert (low, high) == pytest.approx((np.tanh(2 * middle - q_high), np.tanh(2 * middle - q_low)), rel=1e-9)


def test_interval_of_the_rank_correlation_covers_the_truth() -> None:
    rho, covered, runs = 0.5, 0, 60
    truth = 6 / math.pi * math.asin(rho / 2)  # Spearman's of two normals
    rng = np.random.default_rng(0)
    for _ in range(runs):
        x, noise = rng.standard_normal((2, 80))
        y = rho * x + math.sqrt(1 - rho**2) * noise
        confidence, quality = (1 / (1 + np.exp(-v)) for v in (x, y))
        low, high = forecast_intervals(confidence, quality, samples=200)["rank_correlation"]
        covered += low <= truth <= high
    # 95 % of 60 is 57, two standard deviations are 3.4; a 99.9 % lower limit of the binomial
    assert covered >= 51


def test_what_cannot_be_told_is_nan() -> None:
    same = np.full(12, 0.5)
    found = forecast_figures(np.arange(12) / 12, same)
    assert math.isnan(found["rank_correlation"]) and math.isnan(found["auroc"])
    assert math.isnan(forecast_intervals(np.arange(12) / 12, same)["rank_correlation"].low)
    one = forecast_figures(np.array([0.2]), np.array([0.7]))
    assert one["signed_gap"] == pytest.approx(-0.5) and one["adaptive_ece"] == pytest.approx(0.5)
    assert math.isnan(one["rank_correlation"])
    assert math.isnan(forecast_intervals(np.arange(9) / 9, np.arange(9) / 9)["auroc"].low), "too few to resample"


def test_levels_and_resamples_out_of_range() -> None:
    with pytest.raises(ValueError, match="level=95"):
        forecast_intervals(np.zeros(12), np.zeros(12), level=95)
    with pytest.raises(ValueError, match="samples=3"):
        forecast_intervals(np.zeros(12), np.zeros(12), samples=3)
