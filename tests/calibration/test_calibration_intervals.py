"""Confidence intervals: their coverage of a known truth, and how they are computed.

In the first part labels are drawn from known distributions, so that the true metrics are known.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from benchmarks.coverage import World
from dpsm_hf import TokenCalibration
from dpsm_hf.calibration.intervals import basic_interval, bootstrap, error_interval, wilson
from dpsm_hf.calibration.metrics import _crossing, all_metrics

ERRORS = ("ece_15", "smooth_ece")
COVERED = (*ERRORS, "nll", "brier", "token_accuracy", "signed_gap")


def filled(columns: dict[str, np.ndarray], *, independent: bool = False) -> TokenCalibration:
    calibration = TokenCalibration()
    calibration.update(**{k: v for k, v in columns.items() if not (independent and k == "document")})
    return calibration


# ---- coverage ------------------------------------------------------------------------------------------------------


def test_intervals_cover_the_truth_and_tokens_alone_do_not() -> None:
    world, repetitions, fewer = World(temperature=2.0, correlation=0.2), 200, 40
    truth = world.truth()
    assert truth["ece_15"] == pytest.approx(truth["signed_gap"]) and truth["ece_15"] > 0.1
    hits, naive = dict.fromkeys(COVERED, 0), dict.fromkeys(COVERED, 0)
    for seed in range(repetitions):
        columns = world.sample(seed, documents=150, length=20)
        found = filled(columns).intervals(samples=100)
        for name in COVERED:
            hits[name] += found[name].low <= truth[name] <= found[name].high
        if seed < fewer:
            found = filled(columns, independent=True).intervals(samples=100)
            for name in COVERED:
                naive[name] += found[name].low <= truth[name] <= found[name].high
    # the hits of 200 intervals at 95 % but for one time in a thousand; the 2.5 % tails of only 100 resamples are a
    # little too near, which costs about one hit in a hundred
    least, most = binom.ppf([0.0005, 0.9995], repetitions, [0.94, 0.95])
    for name in COVERED:
        assert least <= hits[name], (name, hits[name] / repetitions)
        if name not in ERRORS:  # metrics whose intervals may cover more often than 95 %
            assert hits[name] <= most, (name, hits[name] / repetitions)
        # intervals that treat tokens as independent are too narrow
        assert naive[name] <= binom.ppf(0.001, fewer, 0.95), (name, naive[name] / fewer)


@pytest.mark.parametrize("world", [World(1.0, 0.0), World(1.1, 0.3)], ids=str)
def test_intervals_of_errors_that_noise_nearly_hides(world: World) -> None:
    truth, repetitions = world.truth(), 30
    if world.temperature == 1.0:
        truth |= dict.fromkeys(ERRORS, 0.0)
    hits = dict.fromkeys(ERRORS, 0)
    for seed in range(repetitions):
        calibration = filled(world.sample(seed, documents=150, length=20))
        found, value = calibration.intervals(samples=100), calibration.compute()
        for name in ERRORS:
            assert found[name].low <= value[name] <= found[name].high
            hits[name] += found[name].low <= truth[name] <= found[name].high
    for name in ERRORS:
        assert hits[name] >= binom.ppf(0.0005, repetitions, 0.94), (name, hits[name] / repetitions)


def test_a_calibrated_model_is_told_by_the_null_level() -> None:
    # the truth, 0, is at the edge of what an ECE can be: see how far above it the figure itself is, and the null level
    world = World(temperature=1.0, correlation=0.0)
    below, errors, nulls, debiased = 0, [], [], 0
    for seed in range(40):
        calibration = filled(world.sample(seed, documents=150, length=20))
        metrics, found = calibration.compute(), calibration.intervals(samples=100)
        errors.append(metrics["ece_15"])
        nulls.append(metrics["ece_15_null"])
        below += found["ece_15"].low <= metrics["ece_15_null"]
        debiased += found["debiased_ece"].low == 0.0
        assert found["signed_gap"].low < 0.02 and found["signed_gap"].high > -0.02
    assert np.mean(errors) == pytest.approx(np.mean(nulls), abs=4 * np.std(errors) / math.sqrt(40))
    assert np.mean(errors) > 0.01
    # the interval of a calibrated model reaches down to the null level; that of an over-confident one does not
    assert below >= binom.ppf(0.001, 40, 0.95)
    assert debiased > 20
    calibration = filled(World(2.0, 0.0).sample(0, documents=150, length=20))
    assert calibration.intervals(samples=100)["ece_15"].low > calibration.compute()["ece_15_null"]


# ---- how they are computed -----------------------------------------------------------------------------------------


def test_the_width_of_a_mean_is_that_of_the_ratio_estimator() -> None:
    columns = World(1.5, 0.3).sample(0, documents=100, length=30)
    keep = np.random.default_rng(0).random(3000) < np.repeat(np.random.default_rng(1).random(100), 30)
    columns = {name: column[keep] for name, column in columns.items()}  # documents of different lengths
    found = filled(columns).intervals(samples=2000)
    size = np.bincount(columns["document"], minlength=100)
    size = size[size > 0]
    for name, column in (("nll", "nll"), ("brier", "brier"), ("token_accuracy", "correct")):
        total = np.bincount(columns["document"], weights=columns[column], minlength=100)
        total = total[np.bincount(columns["document"], minlength=100) > 0]
        mean = total.sum() / size.sum()
        deviation = math.sqrt(((total - mean * size) ** 2).sum()) / size.sum()
        # the width between the 2.5 % tails of 2000 resamples is known to 2 %; curvature adds O(1 / documents)
        assert found[name].high - found[name].low == pytest.approx(2 * 1.96 * deviation, rel=0.08), name
        assert (found[name].high + found[name].low) / 2 == pytest.approx(mean, abs=0.3 * deviation), name


def test_levels_are_nested_and_seeds_repeat() -> None:
    calibration = filled(World(1.5, 0.1).sample(0, documents=60, length=10))
    narrow, wide = calibration.intervals(level=0.5, samples=60), calibration.intervals(level=0.99, samples=60)
    assert set(narrow) == set(calibration.compute()) - {"tokens"}
    for name, (low, high) in narrow.items():
        assert wide[name].low <= low <= high <= wide[name].high, name
    assert calibration.intervals(samples=60, seed=4) == calibration.intervals(samples=60, seed=4)
    assert calibration.intervals(samples=60, seed=4)["nll"] != calibration.intervals(samples=60, seed=5)["nll"]


def test_intervals_stay_in_range() -> None:
    rng = np.random.default_rng(0)
    columns = {"confidence": 1 - rng.random(60) / 100, "correct": np.ones(60), "document": np.arange(60)}
    columns |= {"nll": rng.random(60) / 100, "brier": rng.random(60) / 1000}
    for name, (low, high) in filled(columns).intervals(samples=50).items():
        if name == "confidence_auroc":
            assert math.isnan(low) and math.isnan(high), "no token is wrong"
        elif name == "perplexity":
            assert 1 <= low <= high
        else:
            assert (-1 if name in ("signed_gap", "resolution") else 0) <= low <= high <= 1, name


def test_perplexity_is_the_exponential_of_the_nll() -> None:
    found = filled(World(1.5, 0.1).sample(0, documents=60, length=10)).intervals(samples=50)
    assert found["perplexity"] == pytest.approx([math.exp(bound) for bound in found["nll"]])


def test_one_document_tells_nothing_of_others() -> None:
    columns = World(1.5, 0.1).sample(0, documents=1, length=50)
    found = filled(columns).intervals(samples=20)
    assert found and all(math.isnan(low) and math.isnan(high) for low, high in found.values())
    columns["document"] = np.repeat([0, 9], 25)
    assert math.isfinite(filled(columns).intervals(samples=20)["nll"].low)


def test_an_infinite_nll_leaves_the_other_intervals_alone() -> None:
    columns = World(1.5, 0.1).sample(0, documents=60, length=10)
    expected = filled(columns).intervals(samples=50)
    columns["nll"][7] = math.inf
    columns["label_probability"] = np.exp(-columns["nll"])
    found = filled(columns).intervals(samples=50)
    assert math.isnan(found["nll"].low) and math.isnan(found["perplexity"].high)
    for name in ("ece_15", "brier", "token_accuracy"):
        assert found[name] == expected[name]


def test_documents_without_bytes_of_text() -> None:
    # two documents, one of special tokens only: a resample may draw that one alone
    calibration = TokenCalibration()
    columns = {"confidence": [0.5, 0.6, 0.5, 0.6], "correct": [1, 0, 1, 0], "nll": [1.0, 2.0, 1.0, 3.0]}
    calibration.update(**columns, label_bytes=[3, 4, 0, 0], document=[0, 0, 1, 1])
    found = calibration.intervals(samples=50)
    assert calibration.compute()["bits_per_byte"] == pytest.approx(7 / math.log(2) / 7)
    assert "bits_per_byte" not in found or not found["bits_per_byte"].high < 0
    assert found["nll"].low < 7 / 4 < found["nll"].high


def test_nll_of_some_tokens_and_bytes_of_others_are_no_bits_per_byte() -> None:
    calibration = TokenCalibration()
    calibration.update(confidence=[0.5] * 2, correct=[1, 0], nll=[1.0, 2.0], document=[0, 0])
    with pytest.raises(ValueError, match="label_bytes needs the nll of the same tokens"):
        calibration.update(confidence=[0.5] * 2, correct=[1, 0], label_bytes=[5, 5], document=[1, 1])
    calibration.update(confidence=[0.5], correct=[1], nll=[1.0], label_bytes=[5], document=[1])
    assert "bits_per_byte" not in calibration.compute(), "the bytes of the first two tokens are not known"
    assert "nll" in calibration.intervals(samples=50)


def test_resampled_smooth_errors_are_those_of_the_full_search() -> None:
    blocks = [filled(World(t, 0.1).sample(3, documents=40, length=20)).totals() for t in (1.0, 1.3, 2.0, 4.0)]
    for whole in blocks:
        exact = float(all_metrics(whole)["smooth_ece"])
        for start in (exact, exact / 3, 3 * exact, 0.0, 1.0):
            coarse = float(all_metrics(whole, smooth_near=start)["smooth_ece"])
            # cells of 1/1000, and a search that ends after seven looks
            assert coarse == pytest.approx(exact, abs=1e-3), start


@pytest.mark.parametrize("bend", [1.0, -1.0])
def test_the_short_search_is_a_long_bisection(bend: float) -> None:
    random = np.random.default_rng(0)
    height, slope = random.uniform(0.005, 0.9, 2000), random.uniform(0, 60, 2000)

    def excess(width: np.ndarray) -> np.ndarray:  # falls as the smooth error less its width does, bent either way
        if bend > 0:
            return height * np.exp(-slope * width) - width
        return height - (np.expm1(slope / 10 * width) / 5 + width)

    low, high = np.zeros(2000), np.ones(2000)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = np.where(excess(middle) > 0, middle, low), np.where(excess(middle) > 0, high, middle)
    for near in (0.01, 0.05, 0.2):
        error = np.abs(_crossing(excess, near, 2000) / low - 1)
        assert error.max() < 2e-3, (near, error.max())
        assert not _crossing(lambda width: -width, near, 3).max() > 2e-6  # no error at all


def test_the_basic_interval_mirrors_the_tails() -> None:
    drawn = np.linspace(1.0, 2.0, 101)
    assert basic_interval(1.2, drawn, 0.9, (-9, 9)) == pytest.approx((2.4 - 1.95, 2.4 - 1.05))
    assert basic_interval(1.2, drawn, 0.9, (1.0, 1.2)) == (1.0, 1.2)
    assert basic_interval(1.2, np.append(drawn, math.nan), 0.9, (-9, 9)).low == pytest.approx(0.45)
    assert all(map(math.isnan, basic_interval(1.2, np.array([math.nan]), 0.9, (-9, 9))))


def test_the_interval_of_an_error_holds_the_error() -> None:
    drawn = np.linspace(1.0, 2.0, 101)
    low, high = error_interval(1.4, drawn, 0.9, (0, 9))
    assert low == pytest.approx(math.sqrt(2 * 1.4**2 - 1.95**2)) and high == pytest.approx(1.95 - 0.1)
    assert error_interval(1.2, drawn, 0.9, (0, 9)) == pytest.approx((0.0, 1.65)), "as large as noise alone makes it"
    assert error_interval(3.0, drawn, 0.9, (0, 9)).high == 3.0, "resamples below the value widen nothing"
    assert all(map(math.isnan, error_interval(1.2, np.array([math.nan]), 0.9, (0, 9))))


def test_bootstrap_of_blocks_that_are_all_alike_has_no_width() -> None:
    columns = {"confidence": np.tile([0.3, 0.8], 20), "correct": np.tile([0, 1], 20), "nll": np.tile([0.5, 1.5], 20)}
    calibration = TokenCalibration()
    calibration.update(**columns, document=np.repeat(np.arange(20), 2))
    found = bootstrap(calibration.block_totals(), samples=20)
    for name in ("nll", "ece_15", "ece_100", "adaptive_ece", "token_accuracy", "confidence_auroc"):
        value = calibration.compute()[name]
        assert found[name] == pytest.approx((value, value), abs=1e-9), name


# ---- the band of a curve -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (3, 10), (500, 1000), (1, 1)])
def test_wilsons_interval_is_scipys(right: int, count: int) -> None:
    low, high = wilson(np.array([right, 0]), np.array([count, 0]))
    expected = binomtest(right, count).proportion_ci(method="wilson")
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high), abs=1e-7)
    assert math.isnan(low[1]) and math.isnan(high[1])


def test_the_band_widens_by_the_likeness_of_tokens_in_a_document() -> None:
    columns = World(1.5, 0.4).sample(0, documents=128, length=40)
    grouped, alone = filled(columns).curve(10), filled(columns, independent=True).curve(10)
    low, high = wilson(np.nan_to_num(grouped.accuracy) * grouped.count, grouped.count)
    many = grouped.count > 200
    assert many.sum() >= 5
    assert ((grouped.high - grouped.low)[many] > 1.2 * (high - low)[many]).all()
    # in bins with many tokens it is that of the ratio estimator over documents
    confidence, document = columns["confidence"], columns["document"]
    for i in np.flatnonzero(grouped.count > 500):
        inside = (confidence > i / 10) & (confidence <= (i + 1) / 10)
        size = np.bincount(document[inside], minlength=128)
        right = np.bincount(document[inside], weights=columns["correct"][inside], minlength=128)
        residual = right - right.sum() / size.sum() * size
        deviation = residual.std() * math.sqrt(128) / size.sum()
        assert grouped.high[i] - grouped.low[i] == pytest.approx(2 * 1.96 * deviation, rel=0.03), i
    # of independent tokens the design effect is 1, give or take the root of 2 / 128 blocks
    ratio = (alone.high - alone.low)[many] / (high - low)[many]
    assert (ratio >= 1 - 1e-9).all() and (ratio < math.sqrt(1 + 4 * math.sqrt(2 / 128))).all()
    few = filled({name: column[:360] for name, column in columns.items()}).curve(10)  # nine documents
    np.testing.assert_allclose(few.low, wilson(np.nan_to_num(few.accuracy) * few.count, few.count)[0])
    inside = grouped.count > 0
    assert (grouped.low >= 0)[inside].all() and (grouped.high <= 1)[inside].all()
    assert (grouped.low <= grouped.accuracy)[inside].all() and (grouped.accuracy <= grouped.high)[inside].all()
