"""Calibration metrics against other implementations and against simulation, on the same inputs."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve as sklearn_curve
from sklearn.metrics import roc_auc_score
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from dpsm_hf import TokenCalibration, calibration_curve
from dpsm_hf.calibration.grid import EDGES, GRID_BINS

BINS = (10, 15, 100)
NUMBER = 20_000


def tokens(seed: int = 0, number: int = NUMBER, sharp: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Over-confident tokens whose confidences lie off every edge of the grid, float32 as a model's are."""
    rng = np.random.default_rng(seed)
    confidence = rng.beta(1.5, sharp, number)
    cell = np.floor(confidence * GRID_BINS)
    # the middle half of a 3000th: float32 neither moves it over an edge nor rounds an edge onto it
    confidence = ((cell + 0.25 + 0.5 * rng.random(number)) / GRID_BINS).astype(np.float32)
    return confidence, (rng.random(number) < confidence**1.7).astype(np.int64)


def filled(confidence: np.ndarray, correct: np.ndarray) -> TokenCalibration:
    calibration = TokenCalibration()
    calibration.update(confidence=confidence, correct=correct)
    return calibration


# ---- curves and errors of calibration ------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", BINS)
def test_the_curve_is_scikit_learns(bins: int) -> None:
    confidence, correct = tokens()
    accuracy, mean = sklearn_curve(correct, confidence.astype(np.float64), n_bins=bins)
    curve = calibration_curve(confidence, correct, bins=bins)
    occupied = curve.count > 0
    np.testing.assert_allclose(curve.accuracy[occupied], accuracy, rtol=0, atol=1e-12)
    np.testing.assert_allclose(curve.confidence[occupied], mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bins", BINS)
def test_ece_and_mce_are_torchmetrics(bins: int) -> None:
    confidence, correct = tokens(number=3000)
    curve = calibration_curve(confidence, correct, bins=bins)
    metrics = filled(confidence, correct).compute()
    for norm, mine in (("l1", curve.ece), ("max", curve.mce)):
        # its sums follow the dtype of its input; in float32, 3000 roundings of 6e-8 that mostly cancel
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            theirs = binary_calibration_error(
                torch.from_numpy(confidence).to(dtype), torch.from_numpy(correct), n_bins=bins, norm=norm
            )
            assert mine == pytest.approx(float(theirs), abs=tolerance), (norm, dtype)
    assert metrics[f"ece_{bins}"] == pytest.approx(curve.ece, abs=1e-14)
    if bins == 15:
        assert metrics["mce"] == pytest.approx(curve.mce, abs=1e-14)


def test_ece_of_a_model_is_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(5000, 40, generator=generator, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits / 2).sample()
    p = logits.softmax(-1)
    calibration = TokenCalibration()
    calibration.update(confidence=p.amax(-1), correct=p.argmax(-1) == labels)
    theirs = multiclass_calibration_error(p, labels, num_classes=40, n_bins=15)  # in float32
    assert calibration.compute()["ece_15"] == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize("bins", BINS)
def test_ece_and_mce_are_netcals(bins: int) -> None:
    netcal = pytest.importorskip("netcal.metrics", reason="netcal is not installed (pip install --no-deps netcal)")
    confidence, correct = tokens()
    curve = calibration_curve(confidence, correct, bins=bins)
    probability = confidence.astype(np.float64)
    assert curve.ece == pytest.approx(float(netcal.ECE(bins).measure(probability, correct)), abs=1e-9)
    assert curve.mce == pytest.approx(float(netcal.MCE(bins).measure(probability, correct)), abs=1e-9)


def test_which_side_of_a_bin_is_closed() -> None:
    edges = np.arange(1, 10) / 10  # exactly the edges of ten bins
    ours = calibration_curve(edges, np.ones(9), bins=10)
    assert ours.count.tolist() == [1] * 9 + [0]
    # scikit-learn's are closed on the right too, but its edges are those of linspace: 3 * 0.1 > 0.3
    _, mean = sklearn_curve(np.ones(9), np.linspace(0, 1, 11)[1:-1], n_bins=10)
    assert len(mean) == 9 and mean[-1] == pytest.approx(0.9)
    # torchmetrics' are closed on the left: one token on the edge 0.5, one in the bin above, which it joins there
    confidence, correct = torch.tensor([0.5, 0.6], dtype=torch.float64), torch.tensor([1, 0])
    assert calibration_curve(confidence, correct, bins=2).ece == pytest.approx((0.5 + 0.6) / 2)
    joined = binary_calibration_error(confidence, correct, n_bins=2)
    assert float(joined) == pytest.approx(abs(0.5 - 0.55))


def test_adaptive_ece_is_that_of_groups_of_equal_size() -> None:
    confidence, correct = tokens(number=NUMBER // 15 * 15)
    order = np.argsort(confidence, kind="stable")
    groups = np.split(correct[order] - confidence[order].astype(np.float64), 15)
    expected = sum(abs(group.sum()) for group in groups) / len(confidence)
    calibration = filled(confidence, correct)
    # at each of the 14 cuts at most half of the tokens of one cell change sides
    largest = int(calibration.count.sum(0).max())
    assert calibration.compute()["adaptive_ece"] == pytest.approx(expected, abs=14 * largest / len(confidence))
    # without ties in a cell only rounding differs
    distinct = (np.arange(300) + 0.5) / 300
    right = (np.random.default_rng(1).random(300) < distinct**2).astype(np.int64)
    expected = sum(abs(group.sum()) for group in np.split(right - distinct, 15)) / 300
    assert filled(distinct, right).compute()["adaptive_ece"] == pytest.approx(expected, abs=1e-12)


# ---- smooth ECE ----------------------------------------------------------------------------------------------------


def smooth_by_quadrature(confidence: np.ndarray, residual: np.ndarray, width: float) -> float:
    """``integral |sum_i K(t, c_i) r_i| / n dt`` by the midpoint rule, reflections written out as images."""
    t = (np.arange(3000) + 0.5) / 3000
    total = np.zeros_like(t)
    for image in (confidence, -confidence, 2 - confidence, 2 + confidence, -2 + confidence, 4 - confidence):
        kernel = np.exp(-((t[:, None] - image) ** 2) / (2 * width**2)) / (math.sqrt(2 * math.pi) * width)
        total += kernel @ residual
    return float(np.abs(total).mean() / len(confidence))


@pytest.mark.parametrize("power", [1.7, 1.0, 0.3])
def test_smooth_ece_is_where_the_error_equals_the_width(power: float) -> None:
    rng = np.random.default_rng(0)
    confidence = (rng.integers(0, 3000, 600) + 0.5) / 3000  # the middle of a cell, as the grid assumes
    correct = rng.random(600) < confidence**power
    width = filled(confidence, correct).compute()["smooth_ece"]
    assert smooth_by_quadrature(confidence, correct - confidence, width) == pytest.approx(width, abs=1e-8)
    # anywhere in its 3000th, a token's kernel is moved by 1/6000 at most: by sqrt(2 / pi) / (6000 width) in total
    moved = np.clip(confidence + (rng.random(600) - 0.5) / 3000, 0, 1)
    width = filled(moved, correct).compute()["smooth_ece"]
    bound = np.abs(correct - moved).mean() * math.sqrt(2 / math.pi) / (6000 * width)
    assert smooth_by_quadrature(moved, correct - moved, width) == pytest.approx(width, abs=bound)


@pytest.mark.parametrize("seed", range(3))
def test_smooth_ece_is_its_authors(seed: int) -> None:
    relplot = pytest.importorskip("relplot", reason="relplot is not installed")
    confidence, correct = tokens(seed)
    probability = confidence.astype(np.float64)
    mine = filled(confidence, correct).compute()["smooth_ece"]
    # at our width their error is that width: the same definition, but for their mesh of 1/1000
    assert relplot.smECE_sigma(probability, correct, sigma=mine) == pytest.approx(mine, abs=1e-3)
    # they halve an interval ten times, so that theirs is the error at a width off by up to 2**-10
    assert relplot.smECE(probability, correct) == pytest.approx(mine, abs=2**-10 + 1 / GRID_BINS)


# ---- ranks, noise, decomposition -----------------------------------------------------------------------------------


def test_auroc_of_confidence_is_scikit_learns() -> None:
    confidence, correct = tokens()
    mine = filled(confidence, correct).compute()["confidence_auroc"]
    # tokens that share a cell count as ties: each such pair is half a pair off at most
    cell = np.searchsorted(EDGES[1:-1], confidence, side="left")
    right, wrong = np.bincount(cell[correct == 1], minlength=4000), np.bincount(cell[correct == 0], minlength=4000)
    tied = (right * wrong).sum() / (right.sum() * wrong.sum())
    assert mine == pytest.approx(roc_auc_score(correct, confidence), abs=tied / 2)
    assert tied < 2e-3
    # on the grid, where ties are ties, to rounding
    middle = (EDGES[cell] + EDGES[cell + 1]) / 2
    assert filled(middle, correct).compute()["confidence_auroc"] == pytest.approx(
        roc_auc_score(correct, cell), abs=1e-12
    )
    for all_of_one_kind in (np.ones(NUMBER), np.zeros(NUMBER)):
        assert math.isnan(filled(confidence, all_of_one_kind).compute()["confidence_auroc"])


def test_debiased_ece_is_the_papers_by_simulation() -> None:
    confidence, _ = tokens(number=1500, sharp=1.5)
    correct = (np.random.default_rng(1).random(1500) < confidence**1.05).astype(np.int64)  # noise is much of its ECE
    curve = calibration_curve(confidence, correct, bins=15)
    occupied = curve.count > 0
    share, count = curve.accuracy[occupied], curve.count[occupied]
    rng = np.random.default_rng(0)
    resamples = 40_000
    drawn = rng.normal(share, np.sqrt(share * (1 - share) / count), (resamples, len(count)))
    errors = (count * np.abs(drawn - curve.confidence[occupied])).sum(1) / count.sum()
    expected = 2 * curve.ece - errors.mean()  # ECE less its bias under resampled labels (Kumar et al. 2019)
    error = 5 * errors.std() / math.sqrt(resamples)
    mine = filled(confidence, correct).compute()["debiased_ece"]
    assert mine == pytest.approx(expected, abs=error)
    assert error < (curve.ece - mine) / 20, "the simulation tells nothing"


def test_null_ece_is_that_of_a_calibrated_model() -> None:
    confidence = tokens(number=5000, sharp=1.5)[0].astype(np.float64)
    rng = np.random.default_rng(0)
    metrics = filled(confidence, np.zeros(5000)).compute()
    right = rng.random((800, 5000)) < confidence
    for bins in BINS:
        index = np.ceil(confidence * bins).astype(int) - 1
        order = np.argsort(index, kind="stable")
        starts = np.searchsorted(index[order], np.unique(index))
        gaps = np.add.reduceat((right - confidence)[:, order], starts, axis=1)
        errors = np.abs(gaps).sum(1) / 5000
        # beside the simulation's error: a gap of n tokens is not quite normal, by O(1/n)
        allowed = 5 * errors.std() / math.sqrt(800) + 0.01 * errors.mean()
        assert metrics[f"ece_{bins}_null"] == pytest.approx(errors.mean(), abs=allowed), bins


def test_murphys_decomposition_is_exact() -> None:
    for seed in range(5):
        confidence, correct = tokens(seed)
        metrics = filled(confidence, correct).compute()
        parts = metrics["reliability"] - metrics["resolution"] + metrics["uncertainty"]
        assert parts == pytest.approx(metrics["top_label_brier"], abs=1e-12)
        brier = np.mean((confidence.astype(np.float64) - correct) ** 2)
        assert metrics["top_label_brier"] == pytest.approx(brier, abs=1e-12)
        # the resolution is the variance of the bins' accuracies, less what varies within them (Stephenson et al. 2008)
        resolution = reliability = 0.0
        for low, high in pairwise(np.arange(16) / 15):
            inside = (confidence > low) & (confidence <= high)
            if not inside.any():
                continue
            c, y = confidence[inside].astype(np.float64), correct[inside]
            reliability += inside.mean() * (y.mean() - c.mean()) ** 2
            resolution += inside.mean() * ((y.mean() - correct.mean()) ** 2 - c.var() + 2 * np.cov(c, y, ddof=0)[0, 1])
        assert metrics["reliability"] == pytest.approx(reliability, abs=1e-12)
        assert metrics["resolution"] == pytest.approx(resolution, abs=1e-12)
        assert metrics["uncertainty"] == pytest.approx(correct.mean() * (1 - correct.mean()), abs=1e-12)


# ---- more tokens than float32 can count ----------------------------------------------------------------------------


def test_beyond_two_to_the_24_tokens_in_one_bin() -> None:
    batch, batches = 2**20, 17
    correct = torch.arange(batch, dtype=torch.int32).remainder_(4).eq_(0).to(torch.int8)
    one, calibration = TokenCalibration(), TokenCalibration()
    one.update(confidence=torch.full((batch,), 0.5), correct=correct)
    for _ in range(batches):
        calibration.merge(one)
    curve = calibration.curve(15)
    assert calibration.tokens == curve.count[7] == batch * batches > 2**24
    assert (curve.accuracy[7], curve.confidence[7], curve.ece) == (0.25, 0.5, 0.25), "exact in binary"

    def theirs(batches: int) -> float:
        confidence, target = torch.full((batch * batches,), 0.5), correct.repeat(batches)
        return float(binary_calibration_error(confidence, target, n_bins=15, validate_args=False))

    assert theirs(4) == pytest.approx(0.25, abs=1e-6)
    # torchmetrics counts in float32, where 2**24 + 1 is 2**24: accuracy 17/64 instead of 1/4
    assert theirs(batches) == pytest.approx(0.5 - 17 / 64, abs=1e-6)
