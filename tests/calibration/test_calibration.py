"""Calibration of tokens against a plain numpy implementation that keeps every token."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsm_hf import TokenCalibration, calibration_curve
from dpsm_hf.calibration import GRID_BINS, METRICS, SCORES
from dpsm_hf.calibration.accumulator import BLOCKS

FIELDS = ("count", "correct", "confidence", "sums", "counts")

# metrics that depend on the number of tokens, not only on shares
OF_SIZE = ("tokens", "ece_10_null", "ece_15_null", "ece_100_null", "debiased_ece")


def oracle(confidence: np.ndarray, correct: np.ndarray, bins: int) -> dict[str, Any]:
    """Bin each token by hand, (lo, hi] with 0 in the first bin, in a plain loop."""
    accuracy, mean, count = [], [], []
    edges = [i / bins for i in range(bins + 1)]
    for lo, hi in pairwise(edges):
        inside = (confidence > lo) & (confidence <= hi) | ((confidence == 0) & (lo == 0))
        count.append(int(inside.sum()))
        accuracy.append(float(np.mean(correct[inside])) if inside.any() else math.nan)
        mean.append(float(np.mean(confidence[inside])) if inside.any() else math.nan)
    gaps = np.abs(np.array(accuracy) - np.array(mean))
    return {
        "edges": edges,
        "accuracy": accuracy,
        "confidence": mean,
        "count": count,
        "ece": float(np.nansum(gaps * count) / len(confidence)),
        "mce": float(np.nanmax(gaps)),
    }


def tokens(number: int = 5000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    confidence = rng.beta(2, 1.5, number)
    confidence[:50] = rng.integers(0, 101, 50) / 100  # some exactly on edges, 0 and 1 among them
    confidence[:2] = 0.0, 1.0
    return confidence, (rng.random(number) < confidence**1.5).astype(np.int64)


def filled(seed: int = 0, number: int = 1000) -> TokenCalibration:
    confidence, correct = tokens(number, seed)
    rng = np.random.default_rng(seed + 100)
    result = TokenCalibration()
    result.update(confidence=confidence, correct=correct, **{name: rng.random(number) for name in SCORES})
    return result


def same(left: TokenCalibration, right: TokenCalibration) -> None:
    for name in FIELDS:
        a, b = getattr(left, name), getattr(right, name)
        assert a.dtype == b.dtype
        if a.dtype == torch.int64:
            assert torch.equal(a, b), name
        else:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("bins", [10, 15, 100])
def test_curve_equals_the_oracle(bins: int, dtype: type) -> None:
    confidence, correct = tokens()
    confidence = confidence.astype(dtype)
    curve = calibration_curve(confidence, correct, bins=bins)
    expected = oracle(confidence.astype(np.float64), correct, bins)
    np.testing.assert_array_equal(curve.count, expected["count"])
    np.testing.assert_allclose(curve.edges, expected["edges"], rtol=0, atol=1e-15)
    np.testing.assert_allclose(curve.accuracy, expected["accuracy"], rtol=1e-13)
    np.testing.assert_allclose(curve.confidence, expected["confidence"], rtol=1e-12)
    assert curve.ece == pytest.approx(expected["ece"], rel=1e-12)
    assert curve.mce == pytest.approx(expected["mce"], rel=1e-12)
    assert curve.count.dtype == np.int64 and curve.count.sum() == len(confidence)


def test_compute_equals_the_oracle() -> None:
    confidence, correct = tokens()
    rng = np.random.default_rng(1)
    scores = {name: rng.random(len(confidence)) for name in SCORES}
    calibration = TokenCalibration()
    calibration.update(confidence=confidence, correct=correct, **scores)
    metrics = calibration.compute()
    for bins in (10, 15, 100):
        assert metrics[f"ece_{bins}"] == pytest.approx(oracle(confidence, correct, bins)["ece"], rel=1e-12)
    assert metrics["mce"] == pytest.approx(oracle(confidence, correct, 15)["mce"], rel=1e-12)
    for name in SCORES:
        assert metrics[name] == pytest.approx(scores[name].mean(), rel=1e-12)
    assert metrics["perplexity"] == pytest.approx(math.exp(scores["nll"].mean()))
    bits = scores["nll"].sum() / math.log(2) / scores["label_bytes"].sum()
    assert metrics["bits_per_byte"] == pytest.approx(bits, rel=1e-12)
    assert set(metrics) == set(METRICS)
    assert metrics["token_accuracy"] == pytest.approx(correct.mean(), rel=1e-13)
    assert metrics["confidence"] == pytest.approx(confidence.mean(), rel=1e-12)
    assert metrics["signed_gap"] == pytest.approx(confidence.mean() - correct.mean(), abs=1e-12)
    assert metrics["tokens"] == len(confidence) == calibration.tokens


@pytest.mark.parametrize("bins", [10, 15, 100])
def test_bins_are_closed_on_the_right(bins: int) -> None:
    edges = [i / bins for i in range(bins + 1)]
    curve = calibration_curve(edges, [1] * (bins + 1), bins=bins)
    assert curve.count.tolist() == [2] + [1] * (bins - 1), "an edge belongs to the bin below it, 0 to the first"
    above = np.nextafter(edges[:-1], 2)
    assert calibration_curve(above, [1] * bins, bins=bins).count.tolist() == [1] * bins


@pytest.mark.parametrize("bins", [GRID_BINS, 1000, 125, 24, 12, 8, 3, 2, 1])
def test_every_edge_of_the_grid(bins: int) -> None:
    calibration = TokenCalibration()
    calibration.update(confidence=np.arange(1, bins + 1) / bins, correct=np.ones(bins))
    assert calibration.curve(bins).count.tolist() == [1] * bins, "an edge belongs to the bin below it"
    calibration.update(confidence=np.nextafter(np.arange(bins) / bins, 1), correct=np.zeros(bins))
    assert calibration.curve(bins).count.tolist() == [2] * bins, "just above an edge the next bin begins"


def test_near_0_and_1_the_grid_is_finer() -> None:
    calibration = TokenCalibration()
    sure = 1 - 10.0 ** -np.arange(4, 8)
    calibration.update(confidence=np.concatenate([1 - sure, sure]), correct=[0, 0, 0, 0, 0, 0, 1, 1])
    curve = calibration.curve(GRID_BINS)
    assert curve.count[0] == curve.count[-1] == 4 and curve.count.sum() == 8
    # two cells hold ranks apart: of the four surest, right ones are surer than wrong ones
    assert calibration.compute()["confidence_auroc"] == 1.0
    assert (calibration.adaptive_curve(8).count == 1).all()


def test_lists_tensors_and_arrays_say_the_same() -> None:
    values, right = [0.1, 0.3, 0.7, 1.0], [True, False, True, True]
    expected = calibration_curve(np.array(values), np.array(right), bins=10)
    for confidence, correct in (
        (values, right),
        (torch.tensor(values, dtype=torch.float64), torch.tensor(right)),
        (torch.tensor(values, dtype=torch.float64, requires_grad=True), [1.0, 0.0, 1.0, 1.0]),
        (np.array(values).reshape(2, 2), torch.tensor([[1, 0], [1, 1]])),
    ):
        curve = calibration_curve(confidence, correct, bins=10)
        np.testing.assert_array_equal(curve.count, expected.count)
        np.testing.assert_array_equal(curve.accuracy, expected.accuracy)
    assert expected.count.tolist() == [1, 0, 1, 0, 0, 0, 1, 0, 0, 1]


def test_known_errors() -> None:
    perfect = calibration_curve([1.0] * 4, [1] * 4)
    assert perfect.ece == perfect.mce == 0.0
    wrong = calibration_curve([1.0] * 4, [0] * 4)
    assert wrong.ece == wrong.mce == 1.0
    half = calibration_curve([0.8] * 10, [1] * 5 + [0] * 5)
    assert half.ece == pytest.approx(0.3)
    assert math.isnan(half.accuracy[0]) and math.isnan(half.confidence[0])


def test_curve_as_json() -> None:
    plain = calibration_curve([0.95, 0.05], [1, 0], bins=10).as_dict()
    assert plain["bins"] == 10 and len(plain["edges"]) == 11
    assert plain["count"] == [1, *[0] * 8, 1] and plain["accuracy"] == [0.0, *[None] * 8, 1.0]
    assert plain["confidence"][0] == pytest.approx(0.05) and plain["confidence"][1] is None
    assert all(type(c) is int for c in plain["count"]) and all(type(e) is float for e in plain["edges"])


def test_an_empty_curve_has_no_error_to_speak_of() -> None:
    curve = TokenCalibration().curve()
    assert curve.ece == 0.0 and math.isnan(curve.mce) and curve.count.sum() == 0
    assert TokenCalibration().adaptive_curve().count.sum() == 0


def test_adaptive_bins_have_equal_mass() -> None:
    confidence, correct = tokens(30000)
    calibration = TokenCalibration()
    calibration.update(confidence=confidence, correct=correct)
    curve = calibration.adaptive_curve(15)
    assert curve.count.sum() == 30000
    assert abs(curve.count - 2000).max() < 60
    assert curve.edges[0] == 0 and curve.edges[-1] == 1 and (np.diff(curve.edges) >= 0).all()
    # close to the definition: sort, cut into 15 groups of equal size
    order = np.argsort(confidence)
    groups = zip(np.array_split(confidence[order], 15), np.array_split(correct[order], 15), strict=True)
    expected = np.mean([abs(c.mean() - a.mean()) for c, a in groups])
    assert calibration.compute()["adaptive_ece"] == pytest.approx(expected, abs=2e-3)


def test_a_crowded_confidence_goes_where_its_middle_is() -> None:
    calibration = TokenCalibration()
    calibration.update(confidence=[0.2] * 5 + [0.8] * 5, correct=[0] * 5 + [1] * 5)
    curve = calibration.adaptive_curve(2)
    assert curve.count.tolist() == [5, 5] and curve.accuracy.tolist() == [0.0, 1.0]
    assert 0.2 <= curve.edges[1] < 0.8
    for low, high in ((4, 6), (6, 4)):  # the cut at 5 goes through one cell, more of which lies on its own side
        calibration = TokenCalibration()
        calibration.update(confidence=[0.2] * low + [0.8] * high, correct=[0] * 10)
        assert calibration.adaptive_curve(2).count.tolist() == [low, high]


def test_adaptive_bins_of_one_confidence() -> None:
    calibration = TokenCalibration()
    calibration.update(confidence=[0.8] * 10, correct=[1] * 5 + [0] * 5)
    assert calibration.compute()["adaptive_ece"] == pytest.approx(0.3)
    curve = calibration.adaptive_curve()
    (bin_,) = np.flatnonzero(curve.count)
    assert curve.edges[bin_] < 0.8 <= curve.edges[bin_ + 1]


# ---- streaming -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15, derandomize=True)
@given(cuts=st.lists(st.integers(0, 400), max_size=6).map(sorted), seed=st.integers(0, 10))
def test_in_pieces_as_at_once(cuts: list[int], seed: int) -> None:
    confidence, correct = tokens(400, seed)
    whole, pieces, merged = TokenCalibration(), TokenCalibration(), TokenCalibration()
    document = np.random.default_rng(seed).integers(0, 1000, 400)
    whole.update(confidence=confidence, correct=correct, nll=-np.log((confidence + 0.1) / 1.1), document=document)
    for lo, hi in zip([0, *cuts], [*cuts, 400], strict=True):
        part = {
            "confidence": confidence[lo:hi],
            "correct": correct[lo:hi],
            "nll": -np.log((confidence[lo:hi] + 0.1) / 1.1),
            "document": document[lo:hi],
        }
        pieces.update(**part)
        other = TokenCalibration()
        other.update(**part)
        assert merged.merge(other) is merged
    same(pieces, whole)
    same(merged, whole)


def test_order_does_not_matter() -> None:
    confidence, correct = tokens(3000)
    rng = np.random.default_rng(2)
    document, nll = rng.integers(0, 500, 3000), rng.exponential(2, 3000)
    columns = {"confidence": confidence, "correct": correct, "document": document, "nll": nll}
    whole, shuffled = TokenCalibration(), TokenCalibration()
    whole.update(**columns)
    order = rng.permutation(3000)
    shuffled.update(**{name: column[order] for name, column in columns.items()})
    same(shuffled, whole)
    parts = []
    for rows in np.array_split(order, 5):
        part = TokenCalibration()
        part.update(**{name: column[rows] for name, column in columns.items()})
        parts.append(part)
    forwards, backwards = TokenCalibration(), TokenCalibration()
    for part in parts:
        forwards.merge(part)
    for part in reversed(parts):
        backwards.merge(part)
    same(forwards, whole)
    same(backwards, whole)
    for name, (low, high) in whole.intervals(samples=50).items():
        assert backwards.intervals(samples=50)[name] == pytest.approx((low, high), rel=1e-9, nan_ok=True), name


def test_documents_are_dealt_out_to_blocks() -> None:
    calibration = TokenCalibration()
    document = torch.tensor([0, 1, 1, BLOCKS, BLOCKS + 1, 5 * BLOCKS + 7])
    calibration.update(confidence=torch.full((6,), 0.5), correct=torch.ones(6), document=document, nll=torch.ones(6))
    tokens_of_block = calibration.count.sum(1)
    assert tokens_of_block[[0, 1, 7]].tolist() == [2, 3, 1] and tokens_of_block.sum() == 6
    assert torch.equal(calibration.counts[:, SCORES.index("nll")], tokens_of_block)


def test_without_documents_each_token_is_one_wherever_the_batches_end() -> None:
    confidence, correct = tokens(300)
    at_once, in_batches = TokenCalibration(), TokenCalibration()
    at_once.update(confidence=confidence, correct=correct)
    for rows in np.array_split(np.arange(300), 7):
        in_batches.update(confidence=confidence[rows], correct=correct[rows])
    same(in_batches, at_once)
    assert at_once.count.sum(1).max() == 3 and at_once.count.sum(1).min() == 2


def test_mask() -> None:
    confidence, correct = tokens(100)
    keep = np.arange(100) % 3 > 0
    masked, short = TokenCalibration(), TokenCalibration()
    poisoned = np.where(keep, confidence, np.nan)  # masked values may be anything
    masked.update(confidence=poisoned, correct=np.where(keep, correct, 7), mask=keep, nll=poisoned)
    short.update(confidence=confidence[keep], correct=correct[keep], nll=confidence[keep])
    same(masked, short)
    masked.update(confidence=confidence, correct=correct, mask=np.zeros(100, bool), nll=confidence)
    same(masked, short)


def test_state_dict_round_trip() -> None:
    calibration, other = filled(), TokenCalibration()
    other.load_state_dict(calibration.state_dict())
    same(other, calibration)
    assert other.compute() == calibration.compute()
    other.update(confidence=[0.5], correct=[1])
    assert other.tokens == calibration.tokens + 1, "the copy writes into the original"


def test_reduce_is_the_sum_over_processes() -> None:
    calibration = filled()
    doubled = calibration.reduce(lambda tensor: tensor * 2)
    assert doubled.tokens == 2 * calibration.tokens
    expected, found = calibration.compute(), doubled.compute()
    for name in METRICS:
        if name not in OF_SIZE:
            assert found[name] == pytest.approx(expected[name], rel=1e-12), name
    # noise falls as the root of the tokens
    assert found["ece_15_null"] == pytest.approx(expected["ece_15_null"] / math.sqrt(2))
    same(filled(), calibration)


def test_scores_given_only_sometimes_are_means_over_those() -> None:
    calibration = TokenCalibration()
    calibration.update(confidence=[0.5, 0.5], correct=[1, 0])
    calibration.update(confidence=[0.5, 0.5], correct=[1, 0], nll=[1.0, 3.0])
    calibration.update(confidence=[0.5] * 6, correct=[1] * 6)
    metrics = calibration.compute()
    assert metrics["nll"] == 2.0 and "brier" not in metrics and metrics["tokens"] == 10


def test_counts_stay_exact_at_any_size() -> None:
    calibration = TokenCalibration()
    calibration.update(confidence=[0.9, 0.9, 0.9], correct=[1, 1, 0], nll=[0.5, 0.25, 0.75])
    for _ in range(30):
        calibration.merge(calibration)
    calibration.update(confidence=[0.9], correct=[1], nll=[0.5])
    assert calibration.tokens == 3 * 2**30 + 1
    curve = calibration.curve()
    assert curve.count.max() == 3 * 2**30 + 1
    assert calibration.correct.sum().item() == 2**31 + 1
    assert curve.accuracy[13] == (2**31 + 1) / (3 * 2**30 + 1)
    assert calibration.compute()["nll"] == pytest.approx(0.5, rel=1e-12)
    assert curve.confidence[13] == pytest.approx(0.9, rel=1e-12)


def test_a_perplexity_beyond_floating_point() -> None:
    for nll, expected in ((800.0, math.inf), (math.inf, math.inf), (700.0, math.exp(700))):
        calibration = TokenCalibration()
        calibration.update(confidence=[0.5], correct=[0], nll=[nll])
        assert calibration.compute()["perplexity"] == expected


def test_bits_per_byte_need_the_bytes_of_every_scored_token() -> None:
    calibration = TokenCalibration()
    calibration.update(confidence=[0.5] * 3, correct=[1] * 3, nll=[math.log(2)] * 3, label_bytes=[4, 0, 2])
    assert calibration.compute()["bits_per_byte"] == pytest.approx(3 / 6)
    calibration.update(confidence=[0.5], correct=[1], nll=[1.0])
    assert "bits_per_byte" not in calibration.compute()
