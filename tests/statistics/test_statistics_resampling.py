"""Paired bootstrap and approximate randomisation of documents: exactness, coverage, scipy, Fisher's example.

Sums are drawn at random, to test the estimators.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from dpsm_hf.statistics import DocumentBins, DocumentMeans, approximate_randomization, paired_bootstrap

# Heights of maize, crossed less self-fertilised, in eighths of an inch: Darwin's, in Fisher's Design of Experiments.
DARWIN = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48])


def means(documents: int, seed: int = 0, runs: int = 0, shift: float = 0.1) -> tuple[DocumentMeans, DocumentMeans]:
    """Return NLL sums of two systems with correlated difficulty of documents; the first is worse by `shift`."""
    rng = np.random.default_rng(seed)
    count = rng.integers(20, 80, documents)
    difficulty = rng.normal(3, 1, documents)
    shape = (runs, documents) if runs else (documents,)
    count = np.broadcast_to(count, shape)
    x = count * (difficulty + shift + rng.normal(0, 0.2, shape))
    y = count * (difficulty + rng.normal(0, 0.2, shape))
    return DocumentMeans(x, count), DocumentMeans(y, count)


def bins(documents: int, temperature: float, seed: int, length: int = 50) -> DocumentBins:
    """Return bins of a model over-confident by a temperature, with documents of different difficulty."""
    rng = np.random.default_rng(seed)
    z = rng.normal(1, 1, (documents, 1)) + rng.normal(0, 1, (documents, length))
    confidence = 1 / (1 + np.exp(-np.abs(z)))
    right = rng.random(z.shape) < 1 / (1 + np.exp(-np.abs(z) / temperature))
    place = np.minimum((confidence * 15).astype(int), 14) + 15 * np.arange(documents)[:, None]

    def summed(weights: np.ndarray) -> np.ndarray:
        found = np.bincount(place.ravel(), weights=weights.ravel(), minlength=15 * documents)
        return found.reshape(documents, 15)

    return DocumentBins(summed(np.ones_like(z)), summed(right.astype(float)), summed(confidence))


def ece(b: DocumentBins) -> float:
    gap = b.correct.sum(0) - b.confidence.sum(0)
    return float(np.abs(gap).sum() / b.count.sum())


# figures


def test_figures_are_ratios_of_sums() -> None:
    x, y = means(40)
    found = paired_bootstrap(x, y)
    assert found.values == pytest.approx(x.total.sum() / x.count.sum())
    assert found.estimate == pytest.approx((x.total.sum() - y.total.sum()) / x.count.sum())
    assert found.documents == 40
    ratio = paired_bootstrap(x, y, scale="ratio")
    assert ratio.estimate == pytest.approx(x.total.sum() / y.total.sum())
    perplexity = [DocumentMeans(s.total, s.count, exponentiate=True) for s in (x, y)]
    a, b = (math.exp(s.total.sum() / s.count.sum()) for s in (x, y))
    assert paired_bootstrap(*perplexity).estimate == pytest.approx(a - b)
    assert approximate_randomization(*perplexity).difference == pytest.approx(a - b)


def test_ece_is_that_of_the_bins() -> None:
    x, y = bins(60, 2.0, 0), bins(60, 1.0, 0)
    found = paired_bootstrap(x, y, samples=50)
    assert (found.values, found.baseline) == pytest.approx((ece(x), ece(y)))
    assert found.estimate == pytest.approx(ece(x) - ece(y))


# bootstrap


@pytest.mark.parametrize("scale", ["difference", "ratio"])
def test_the_interval_is_scipy_s_basic_bootstrap(scale: str) -> None:
    x, y = means(30)

    def contrast(document: np.ndarray, axis: int = -1) -> np.ndarray:
        a, b = (s.total[document].sum(axis) / s.count[document].sum(axis) for s in (x, y))
        return a - b if scale == "difference" else np.log(a / b)

    expected = stats.bootstrap(
        (np.arange(30),), contrast, method="basic", vectorized=True, n_resamples=20_000, rng=np.random.default_rng(0)
    )
    found = paired_bootstrap(x, y, scale=scale, samples=20_000)
    interval = np.array(found.interval) if scale == "difference" else np.log(found.interval)
    low, high = expected.confidence_interval
    assert interval == pytest.approx((low, high), abs=0.03 * (high - low))
    assert found.standard_error == pytest.approx(expected.standard_error, rel=0.03)


def test_pairing_takes_out_what_the_documents_have_in_common() -> None:
    x, y = means(100)
    found = paired_bootstrap(x, y)
    unpaired = np.std(x.total / x.count, ddof=1) * math.sqrt(2 / 100)
    assert found.standard_error < 0.3 * unpaired
    assert found.interval.low > 0


def test_the_seed_is_all_that_chance_depends_on() -> None:
    x, y = means(50)
    assert paired_bootstrap(x, y, seed=3) == paired_bootstrap(x, y, seed=3)
    assert paired_bootstrap(x, y, seed=3).interval != paired_bootstrap(x, y, seed=4).interval
    assert approximate_randomization(x, y, seed=3) == approximate_randomization(x, y, seed=3)


def test_many_documents_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = means(50)
    whole = paired_bootstrap(x, y), approximate_randomization(x, y, samples=500)
    monkeypatch.setattr("dpsm_hf.statistics.resampling._AT_A_TIME", 50 * 7)
    part = paired_bootstrap(x, y), approximate_randomization(x, y, samples=500)
    assert part[0].interval == pytest.approx(whole[0].interval, rel=1e-12)
    assert part[1].assignments == 500
    assert part[1].p_value == pytest.approx(whole[1].p_value, abs=0.01)


@pytest.mark.parametrize("scale", ["difference", "ratio"])
def test_the_same_system_twice(scale: str) -> None:
    x, _ = means(20)
    found = paired_bootstrap(x, x, scale=scale)
    assert found.interval == pytest.approx((found.estimate, found.estimate)) == ({"ratio": 1}.get(scale, 0),) * 2
    assert approximate_randomization(x, x).p_value == 1


def test_one_document_has_no_interval() -> None:
    x, y = means(1)
    found = paired_bootstrap(x, y)
    assert math.isfinite(found.estimate)
    assert np.isnan(found.interval).all()
    assert math.isnan(found.standard_error)
    assert approximate_randomization(x, y).p_value == 1


def test_documents_that_are_empty_in_both_do_not_count() -> None:
    x, y = means(20)

    def padded(s: DocumentMeans) -> DocumentMeans:
        return DocumentMeans(np.append(s.total, [0, 0]), np.append(s.count, [0, 0]))

    assert paired_bootstrap(padded(x), padded(y)) == paired_bootstrap(x, y)
    assert approximate_randomization(padded(x), padded(y)) == approximate_randomization(x, y)


def test_a_ratio_to_nothing_has_no_interval() -> None:
    count = np.ones(4)
    right = DocumentMeans(np.array([0, 0, 0, 1.0]), count)
    found = paired_bootstrap(DocumentMeans(count, count), right, scale="ratio", samples=500)
    assert found.estimate == pytest.approx(4)
    assert found.undefined > 0
    assert np.isnan(found.interval).all()
    nothing = paired_bootstrap(DocumentMeans(count, count), DocumentMeans(0 * count, count), scale="ratio")
    assert nothing.estimate == math.inf
    assert np.isnan(nothing.interval).all()


def test_several_runs_are_averaged_and_their_documents_drawn_together() -> None:
    x, y = means(40, runs=3)
    found = paired_bootstrap(x, y, samples=4000)
    each = [
        paired_bootstrap(DocumentMeans(x.total[i], x.count[i]), DocumentMeans(y.total[i], y.count[i]), samples=4000)
        for i in range(3)
    ]
    assert found.estimate == pytest.approx(np.mean([run.estimate for run in each]))
    assert found.interval == pytest.approx(np.mean([run.interval for run in each], axis=0), abs=0.05)
    # the same run three times is no more than once
    same = DocumentMeans(np.stack([x.total[0]] * 3), np.stack([x.count[0]] * 3))
    base = DocumentMeans(np.stack([y.total[0]] * 3), np.stack([y.count[0]] * 3))
    assert paired_bootstrap(same, base, samples=4000).interval == pytest.approx(each[0].interval, rel=1e-9)
    assert approximate_randomization(same, base).p_value == pytest.approx(
        approximate_randomization(DocumentMeans(x.total[0], x.count[0]), DocumentMeans(y.total[0], y.count[0])).p_value
    )


def test_the_bootstrap_covers_the_difference_of_means() -> None:
    found = [paired_bootstrap(*means(60, seed), samples=300).interval for seed in range(400)]
    covered = np.mean([low <= 0.1 <= high for low, high in found])
    assert covered == pytest.approx(0.94, abs=4 * math.sqrt(0.94 * 0.06 / 400))


# temperatures of the two systems; 1 is calibrated, so its ECE is only noise
@pytest.mark.parametrize("temperatures", [(3.0, 1.5), (1.5, 1.1), (1.1, 1.0), (1.0, 1.5)])
def test_the_bootstrap_covers_contrasts_of_errors(temperatures: tuple[float, float]) -> None:
    repetitions = 120
    truth = [0.0 if t == 1 else ece(bins(20_000, t, 10**6)) for t in temperatures]
    covered: dict[str, list[bool]] = {"difference": [], "ratio": []}
    for seed in range(repetitions):
        pair = [bins(128, t, seed) for t in temperatures]
        low, high = paired_bootstrap(*pair, samples=200).interval
        covered["difference"].append(low <= truth[0] - truth[1] <= high)
        low, high = paired_bootstrap(*pair, samples=200, scale="ratio").interval
        covered["ratio"].append(low * truth[1] <= truth[0] <= high * truth[1] if truth[1] else high == math.inf)
    for scale, holds in covered.items():
        assert np.mean(holds) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / repetitions), scale


def test_the_interval_of_errors_is_the_basic_bootstrap_and_what_noise_may_hide() -> None:
    x, y = bins(128, 3.0, 0), bins(128, 1.5, 0)
    found = paired_bootstrap(x, y, samples=2000)
    weights = np.random.default_rng(0).multinomial(128, np.full(128, 1 / 128), size=2000)
    first, second = (s.metric(weights @ s.features[0]) for s in (x, y))
    low, high = np.quantile(first - second, [0.025, 0.975])
    biases = first.mean() - ece(x), second.mean() - ece(y)
    assert min(biases) > 0
    basic = 2 * found.estimate - high, 2 * found.estimate - low
    assert found.interval == pytest.approx((basic[0] - 2**0.5 * biases[0], basic[1] + 2**0.5 * biases[1]), rel=1e-9)
    assert 2**0.5 * max(biases) < 0.2 * (high - low)  # far from 0, little


@pytest.mark.parametrize("seed", range(4))
def test_ratio_and_difference_of_errors_agree(seed: int) -> None:
    for temperatures in ((1.5, 1.4), (1.5, 1.1), (1.0, 1.2), (1.1, 1.0)):
        pair = [bins(64, t, seed) for t in temperatures]
        difference, ratio = (paired_bootstrap(*pair, scale=s, samples=300).interval for s in ("difference", "ratio"))
        assert (difference.low > 0, difference.high < 0) == (ratio.low > 1, ratio.high < 1)
        assert 0 <= ratio.low < ratio.high


def test_bins_without_any_error() -> None:
    x, perfect = bins(20, 1.5, 0), DocumentBins(np.ones((20, 3)), np.ones((20, 3)), np.ones((20, 3)))
    nothing = DocumentBins(x.count, x.confidence, x.confidence)
    found = paired_bootstrap(x, nothing, scale="ratio", samples=100)
    assert found.estimate == math.inf
    assert np.isnan(found.interval).all()
    assert paired_bootstrap(nothing, x, scale="ratio", samples=100).interval.low == 0
    same = paired_bootstrap(perfect, perfect, samples=100)
    assert (same.estimate, same.interval) == (0, (0, 0))


# approximate randomisation


def test_fisher_s_randomisation_of_darwin_s_maize() -> None:
    x, y = DocumentMeans(DARWIN.clip(min=0), np.ones(15)), DocumentMeans((-DARWIN).clip(min=0), np.ones(15))
    found = approximate_randomization(x, y, samples=2**15)
    assert found.exact
    assert found.assignments == 32_768
    assert found.p_value == 1726 / 32_768  # Fisher (1935), section 21: 863 sums as large in each direction
    assert approximate_randomization(x, y, samples=2**15, alternative="greater").p_value == 863 / 32_768
    assert approximate_randomization(x, y, samples=2**15, alternative="less").p_value > 1 - 863 / 32_768


def test_swaps_that_only_round_differently_count_as_large() -> None:
    inches = DARWIN / 8 * 0.1  # no longer exact in binary; 28 sums of Fisher's are ties
    x, y = (
        DocumentMeans(inches.clip(min=0) + 0.3, np.ones(15)),
        DocumentMeans((-inches).clip(min=0) + 0.3, np.ones(15)),
    )
    assert approximate_randomization(x, y, samples=2**15).p_value == 1726 / 32_768
    assert approximate_randomization(x, y, samples=2**15, alternative="greater").p_value == 863 / 32_768
    assert approximate_randomization(y, x, samples=2**15, alternative="less").p_value == 863 / 32_768


def brute_force(x: np.ndarray, y: np.ndarray, metric) -> float:
    """Return the two-sided p-value by swapping one document after the other."""
    observed = abs(metric(x.sum(0)) - metric(y.sum(0)))
    found = []
    for swaps in itertools.product([False, True], repeat=len(x)):
        swap = np.array(swaps)[:, None]
        a, b = np.where(swap, y, x).sum(0), np.where(swap, x, y).sum(0)
        found.append(abs(metric(a) - metric(b)) >= observed - 1e-9)
    return float(np.mean(found))


@pytest.mark.parametrize("seed", range(3))
def test_few_documents_are_swapped_in_every_way(seed: int) -> None:
    x, y = means(7, seed, shift=0.3)
    found = approximate_randomization(x, y)
    assert found.exact
    assert found.assignments == 128
    columns = [np.stack([s.total, s.count], axis=-1) for s in (x, y)]
    assert found.p_value == brute_force(*columns, metric=lambda s: s[0] / s[1])
    perplexity = [DocumentMeans(s.total, s.count, exponentiate=True) for s in (x, y)]
    assert approximate_randomization(*perplexity).p_value == brute_force(
        *columns, metric=lambda s: math.exp(s[0] / s[1])
    )


def test_few_documents_of_bins_are_swapped_in_every_way() -> None:
    x, y = bins(7, 3.0, 0), bins(7, 1.0, 0)
    columns = [np.concatenate([s.count, s.correct - s.confidence], axis=-1) for s in (x, y)]
    found = approximate_randomization(x, y)
    assert found.p_value == brute_force(*columns, metric=lambda s: np.abs(s[15:]).sum() / s[:15].sum())


@pytest.mark.parametrize("alternative", ["two-sided", "less", "greater"])
@pytest.mark.parametrize("documents", [6, 25])
def test_randomisation_is_scipy_s(documents: int, alternative: str) -> None:
    x, y = means(documents, 1, shift=0.05)
    total, count = np.concatenate([x.total, y.total]), np.concatenate([x.count, y.count])

    def statistic(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return total[a].sum(axis) / count[a].sum(axis) - total[b].sum(axis) / count[b].sum(axis)

    expected = stats.permutation_test(
        (np.arange(documents), documents + np.arange(documents)), statistic, permutation_type="samples",
        vectorized=True, n_resamples=9999, alternative=alternative, rng=np.random.default_rng(0),
    )  # fmt: skip
    found = approximate_randomization(x, y, alternative=alternative, samples=9999)
    assert found.exact == (documents == 6)
    assert found.difference == pytest.approx(expected.statistic)
    assert found.p_value == pytest.approx(expected.pvalue, abs=1e-12 if found.exact else 0.02)


def test_random_swaps_come_near_to_all_of_them() -> None:
    x, y = means(12, 4, shift=0.08)
    exact, random = approximate_randomization(x, y), approximate_randomization(x, y, samples=4000)
    assert exact.exact
    assert not random.exact
    assert random.p_value == pytest.approx(exact.p_value, abs=4 * math.sqrt(0.25 / 4000))


def test_p_is_never_nought() -> None:
    x, y = means(200, shift=5.0)
    assert approximate_randomization(x, y, samples=999).p_value == 1 / 1000


def test_p_is_uniform_where_the_systems_are_alike() -> None:
    p = np.array([approximate_randomization(*means(40, seed, shift=0), samples=199).p_value for seed in range(500)])
    for level in (0.05, 0.2, 0.5):
        assert (p <= level).mean() == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 500))


# what cannot be compared


@pytest.mark.parametrize("test", [paired_bootstrap, approximate_randomization])
def test_systems_that_are_not_of_the_same_documents(test) -> None:
    x, y = means(10)
    other, _ = means(11)
    with pytest.raises(ValueError, match=r"10 documents .* and 11 documents"):
        test(x, other)
    with pytest.raises(ValueError, match="DocumentMeans cannot be compared with DocumentBins"):
        test(x, bins(10, 1, 0))
    with pytest.raises(ValueError, match="cannot be compared with DocumentMeans with exponentiate=True"):
        test(x, DocumentMeans(y.total, y.count, exponentiate=True))
    moved = DocumentMeans(y.total, np.roll(y.count, 1))
    with pytest.raises(ValueError, match=r"Document 0 \(run 0\) has .* same_counts=False"):
        test(x, moved)
    assert test(x, moved, same_counts=False).documents == 10
    with pytest.raises(ValueError, match="in 1 run.* in 2 run"):
        test(x, DocumentMeans(np.stack([y.total] * 2), np.stack([y.count] * 2)))


def test_swaps_that_leave_nothing_to_count() -> None:
    x = DocumentMeans(np.array([1.0, 0]), np.array([1, 0]))
    y = DocumentMeans(np.array([0, 1.0]), np.array([0, 1]))
    with pytest.raises(ValueError, match="without any count"):
        approximate_randomization(x, y, same_counts=False)
    assert np.isnan(paired_bootstrap(x, y, same_counts=False).interval).all()


@pytest.mark.parametrize(
    ("total", "count", "message"),
    [
        ([1, 2], [1, 2, 3], "shapes"),
        (1.0, 1.0, "shapes"),
        ([1, math.nan], [1, 2], r"total\[1\]=nan"),
        ([1, math.inf], [1, 2], r"total\[1\]=inf"),
        ([1, 2], [1, -2], "count has -2"),
        ([0, 0], [0, 0], "Nothing was counted in any document of run 0"),
        ([[1, 2], [0, 0]], [[1, 2], [0, 0]], "Nothing was counted in any document of run 1"),
        ([1, 2], [1, 0], "total is not 0 where nothing was counted"),
        ([], [], "Nothing was counted"),
    ],
)
def test_sums_that_are_none(total, count, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DocumentMeans(np.array(total), np.array(count))


def test_bins_that_are_none() -> None:
    ones = np.ones((3, 4))
    with pytest.raises(ValueError, match=r"\[documents, bins\]"):
        DocumentBins(ones[0], ones[0], ones[0])
    with pytest.raises(ValueError, match="shapes"):
        DocumentBins(ones, ones[:, :3], ones)
    with pytest.raises(ValueError, match=r"confidence\[2, 3\]=nan"):
        DocumentBins(ones, ones, np.where(np.arange(12).reshape(3, 4) == 11, np.nan, ones))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: paired_bootstrap(x, y, level=1), "level=1"),
        (lambda x, y: paired_bootstrap(x, y, samples=3), "samples=3"),
        (lambda x, y: paired_bootstrap(x, y, scale="log"), "scale='log'"),
        (lambda x, y: approximate_randomization(x, y, samples=3), "samples=3"),
        (lambda x, y: approximate_randomization(x, y, alternative="both"), "alternative='both'"),
    ],
)
def test_arguments_out_of_range(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*means(5))


def test_a_difference_of_figures_that_overflow() -> None:
    x = DocumentMeans(np.array([2000.0]), np.array([1]), exponentiate=True)
    with pytest.raises(ValueError, match="no difference"):
        approximate_randomization(x, x)
    assert np.isnan(paired_bootstrap(x, x).interval).all()
