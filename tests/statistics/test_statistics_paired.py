"""Paired comparisons, claims and families of tests: against scipy, statsmodels and published worked examples."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from dpsm_hf.calibration import Interval
from dpsm_hf.statistics import (
    Decision,
    all_of,
    any_of,
    claim_test,
    decide,
    holm,
    holm_family,
    paired_difference,
    paired_ratio,
    standing,
    stars,
    summarize,
)

HOLDS, FAILS, CANNOT_TELL = Decision.HOLDS, Decision.FAILS, Decision.CANNOT_TELL

# Hours of sleep gained by ten patients from two drugs: Student, Biometrika 6 (1908), p. 20; R's data set `sleep`.
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]

# Heights of maize, crossed less self-fertilised, in eighths of an inch: Darwin's, in Fisher's Design of Experiments.
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]

# AUC of two drugs, a part of Wellek's data (2003, p. 212): SAS/STAT User's Guide, TTEST, "Equivalence testing with
# lognormal data".
AUC = np.array([
    (103.4, 90.11), (59.92, 77.71), (68.17, 77.71), (94.54, 97.51), (69.48, 58.21), (72.17, 101.3), (74.37, 79.84),
    (84.44, 96.06), (96.74, 89.30), (94.26, 97.22), (48.52, 61.62), (95.68, 85.80),
]).T  # fmt: skip

# A hand-made table of perplexities, three seeds.
OURS, CE = [31.2, 30.9, 31.6], [31.1, 30.6, 31.35]


def test_student_s_sleep_data() -> None:
    found = paired_difference(SLEEP_1, SLEEP_2)  # R: t.test(extra ~ group, paired = TRUE)
    assert found.t == pytest.approx(-4.0621, abs=5e-5)
    assert found.degrees_of_freedom == 9
    assert found.p_value == pytest.approx(0.002833, abs=5e-7)
    assert found.interval == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)
    assert found.estimate == pytest.approx(-1.58)
    assert found.stars == "**"
    assert (found.values_mean, found.baseline_mean) == pytest.approx((0.75, 2.33))


def test_darwin_s_maize() -> None:
    found = paired_difference(DARWIN, np.zeros(15))
    assert found.t == pytest.approx(2.148, abs=5e-4)  # Fisher (1935), section 17
    assert found.stars == "*"


@pytest.mark.parametrize("pairs", [2, 3, 5, 40])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_differences_are_scipy_s(pairs: int, level: float) -> None:
    rng = np.random.default_rng(pairs)
    x, y = rng.normal(30, 1, (2, pairs))
    found, expected = paired_difference(x, y, level=level), stats.ttest_rel(x, y)
    assert (found.t, found.p_value) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-12)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(level)), rel=1e-10)
    assert (found.pairs, found.level, found.sd) == (pairs, level, pytest.approx(np.std(x - y, ddof=1)))


def test_the_factor_of_the_standard_error_that_few_seeds_bring() -> None:
    for pairs, factor in ((2, 12.706), (3, 4.303)):  # any table of t, two-sided 5 %
        d = np.arange(pairs)
        found = paired_difference(d, np.zeros(pairs))
        assert (found.interval.high - found.estimate) / (found.sd / math.sqrt(pairs)) == pytest.approx(
            factor, abs=5e-4
        )


def test_one_pair_has_a_difference_and_no_interval() -> None:
    for found in (paired_difference([3.0], [1.0]), paired_ratio([3.0], [1.0])):
        assert found.estimate == {"difference": 2.0, "ratio": pytest.approx(3.0)}[found.scale]
        assert all(math.isnan(number) for number in (found.sd, found.t, found.p_value, *found.interval))
        assert not found.zero_variance
        assert found.stars == "n/a"
    claim = claim_test([3.0], [1.0], at_most=100)
    assert claim.decision is CANNOT_TELL
    assert math.isnan(claim.p_value)


def unknown(found) -> bool:
    """Whether nothing is said of the spread."""
    return found.zero_variance and all(math.isnan(number) for number in (found.t, found.p_value, *found.interval))


def test_equal_figures_say_nothing_of_their_spread() -> None:
    found = paired_difference([0.1, 0.7, 0.3], [0.1, 0.7, 0.3])
    assert found.estimate == 0 and unknown(found) and found.stars == "n/a"
    assert claim_test([0.1, 0.7], [0.1, 0.7], at_most=0).decision is CANNOT_TELL
    found = paired_ratio([0.1, 0.7], [0.1, 0.7])
    assert found.estimate == 1 and unknown(found)


@pytest.mark.parametrize("compare", [paired_difference, paired_ratio])
def test_the_order_of_summation_is_no_difference(compare) -> None:
    x = np.array([0.1 + 0.2 + 0.3, 0.7 + 0.2 + 0.1, 1.1 + 2.2 + 3.3])
    y = np.array([0.3 + 0.2 + 0.1, 0.1 + 0.2 + 0.7, 3.3 + 2.2 + 1.1])
    assert (x != y).any()
    found = compare(x, y)
    assert found.estimate == (0 if found.scale == "difference" else 1) and unknown(found)


@pytest.mark.parametrize("compare", [paired_difference, paired_ratio])
def test_rounding_is_no_spread(compare) -> None:
    """Differences that are equal but for rounding would have a p-value of nearly 0."""
    y = np.array([50.3, 50.6, 50.9, 1.0])
    x = y + 0.1 if compare is paired_difference else y * 1.1
    d = x - y if compare is paired_difference else np.log(x) - np.log(y)
    assert len(set(d.tolist())) > 1
    found = compare(x, y)
    assert found.estimate == pytest.approx(0.1 if found.scale == "difference" else 1.1) and unknown(found)
    assert claim_test(x, y, at_least=0.05, scale=found.scale).decision is CANNOT_TELL


def test_figures_without_chance() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = paired_difference([512.0, 513.0], [400.0, 401.0])
    assert (found.estimate, found.sd) == (112, 0) and unknown(found)
    for limit in (500, 100):
        claim = claim_test([512, 513], [400, 401], at_most=limit)
        assert claim.decision is CANNOT_TELL and math.isnan(claim.p_value) and claim.estimate == 112
    assert paired_difference([1.1, 1.1, 1.1], [1.0, 1.0, 1.0]).zero_variance  # the mean of equal numbers is rounded


@pytest.mark.parametrize(
    ("values", "baseline", "message"),
    [
        ([1, 2], [1, 2, 3], "2 values but 3"),
        ([], [], "no pair"),
        ([1, math.nan], [1, 2], r"values\[1\]=nan"),
        ([1, None], [1, 2], r"values\[1\]=nan"),
        ([1, 2], [math.inf, 2], r"baseline\[0\]=inf"),
        ([[1, 2]], [[1, 2]], r"shape \(1, 2\)"),
    ],
)
@pytest.mark.parametrize(
    "compare", [paired_difference, paired_ratio, lambda x, y: claim_test(x, y, at_most=1)], ids=["d", "r", "claim"]
)
def test_pairs_that_are_none(compare, values, baseline, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(values, baseline)


@pytest.mark.parametrize("level", [0, 1, -0.5, 95, math.nan])
def test_levels_out_of_range(level: float) -> None:
    with pytest.raises(ValueError, match="level="):
        paired_difference(OURS, CE, level=level)


def test_the_t_interval_of_three_seeds_covers() -> None:
    rng = np.random.default_rng(0)
    seeds, repetitions = 3, 2000
    shared = rng.normal(0, 5, (repetitions, seeds))  # what both systems owe to the seed cancels
    x = 30.3 + shared + rng.normal(0, 0.2, (repetitions, seeds))
    y = 30.0 + shared + rng.normal(0, 0.1, (repetitions, seeds))
    intervals = np.array([paired_difference(a, b).interval for a, b in zip(x, y, strict=True)])
    covered = ((intervals[:, 0] <= 0.3) & (0.3 <= intervals[:, 1])).mean()
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / repetitions))


# ratios


def test_a_ratio_is_the_difference_of_logarithms() -> None:
    found, expected = paired_ratio(OURS, CE), stats.ttest_rel(np.log(OURS), np.log(CE))
    assert found.estimate == pytest.approx(stats.gmean(np.divide(OURS, CE)))
    assert found.interval == pytest.approx(tuple(np.exp(expected.confidence_interval())), rel=1e-10)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-10)


def fieller(x: np.ndarray, y: np.ndarray, level: float) -> tuple[float, float]:
    """Return Fieller's interval of mean(x) / mean(y): where mean(x - r y) is not significantly different from 0."""
    n = len(x)
    q = stats.t.ppf((1 + level) / 2, n - 1) ** 2 / n
    (xx, xy), (_, yy) = np.cov(x, y)
    a, b, c = y.mean() ** 2 - q * yy, x.mean() * y.mean() - q * xy, x.mean() ** 2 - q * xx
    root = math.sqrt(b**2 - a * c)
    return (b - root) / a, (b + root) / a


def test_a_ratio_agrees_with_fieller_where_the_spread_is_small() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        y = rng.normal(100, 1, 4)
        x = 0.75 * y * rng.normal(1, 0.02, 4)
        low, high = fieller(x, y, 0.95)
        found = paired_ratio(x, y)
        spread = math.log(found.interval.high / found.estimate) + np.std(np.log(y), ddof=1)
        assert found.interval == pytest.approx((low, high), abs=found.estimate * spread**2)  # alike to first order
        assert spread < 0.1


def test_a_ratio_does_not_depend_on_which_one_is_the_baseline() -> None:
    found, other = paired_ratio(OURS, CE), paired_ratio(CE, OURS)
    assert (1 / other.interval.high, 1 / other.interval.low) == pytest.approx(found.interval, rel=1e-12)
    assert found.p_value == pytest.approx(other.p_value, rel=1e-12)


@pytest.mark.parametrize("wrong", [0.0, -0.1])
def test_a_ratio_needs_positive_figures(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"baseline\[1\]=.* has no logarithm.*differences"):
        paired_ratio([1, 2], [1, wrong])
    with pytest.raises(ValueError, match=r"values\[0\]"):
        claim_test([wrong, 2], [1, 1], at_most=2, scale="ratio")


# claims


def test_equivalence_of_the_sas_example() -> None:
    found = claim_test(*AUC, at_least=0.8, at_most=1.25, scale="ratio")
    assert found.estimate == pytest.approx(0.9412, abs=5e-5)
    assert found.interval == pytest.approx((0.8634, 1.0260), abs=5e-5)
    assert found.decision is HOLDS
    assert found.pairs == 12


@pytest.mark.parametrize("margin", [0.5, 1.58, 2.0, 3.0])
@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_tost_is_statsmodels(margin: float, alpha: float) -> None:
    p, (_, p_low, _), (_, p_high, _) = ttost_paired(np.array(SLEEP_1), np.array(SLEEP_2), -margin, margin)
    found = claim_test(SLEEP_1, SLEEP_2, at_least=-margin, at_most=margin, alpha=alpha)
    assert (found.p_value, found.p_at_least, found.p_at_most) == pytest.approx((p, p_low, p_high), rel=1e-10)
    assert (found.decision is HOLDS) == (p <= alpha)


def test_tost_on_a_ratio_is_statsmodels_on_logarithms() -> None:
    p, *_ = ttost_paired(*AUC, 0.95, 1.05, transform=np.log)
    assert claim_test(*AUC, at_least=0.95, at_most=1.05, scale="ratio").p_value == pytest.approx(p, rel=1e-10)


@pytest.mark.parametrize("limit", [-0.2, 0.0, 0.2167, 0.3, 0.5])
def test_one_limit_is_the_one_sided_t_test(limit: float) -> None:
    d = np.subtract(OURS, CE)
    at_most, at_least = claim_test(OURS, CE, at_most=limit), claim_test(OURS, CE, at_least=limit)
    assert at_most.p_value == pytest.approx(stats.ttest_1samp(d, limit, alternative="less").pvalue, rel=1e-9)
    assert at_least.p_value == pytest.approx(stats.ttest_1samp(d, limit, alternative="greater").pvalue, rel=1e-9)
    assert math.isnan(at_most.p_at_least)
    assert math.isnan(at_least.p_at_most)
    for found in (at_most, at_least):
        assert (found.decision is HOLDS) == (found.p_value <= 0.05)
        assert (found.decision is FAILS) == (1 - found.p_value < 0.05)
    assert at_most.interval == pytest.approx(tuple(stats.ttest_1samp(d, 0).confidence_interval(0.9)), rel=1e-9)


@given(
    pairs=st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), min_size=2, max_size=6),
    low=st.floats(0.2, 1.0),
    width=st.floats(0.0, 2.0),
    scale=st.sampled_from(["difference", "ratio"]),
)
def test_holds_is_what_tost_says(pairs, low: float, width: float, scale: str) -> None:
    x, y = np.array(pairs).T
    found = claim_test(x, y, at_least=low, at_most=low + width, scale=scale)
    if abs(found.p_value - 0.05) > 1e-9:  # on the edge, rounding decides; NaN is cannot tell
        assert (found.decision is HOLDS) == (found.p_value <= 0.05)


def test_a_claim_on_its_limit_is_wrongly_said_to_hold_one_time_in_twenty() -> None:
    rng = np.random.default_rng(1)
    d = rng.normal(0.3, 0.1, (2000, 3))
    said = [claim_test(row, np.zeros(3), at_most=0.3).decision for row in d]
    for answer in (HOLDS, FAILS):
        assert said.count(answer) / 2000 == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 2000))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no limit"),
        ({"at_least": 1.0, "at_most": 0.5}, "at_least=1.0 and at_most=0.5"),
        ({"at_most": math.nan}, "at_most=nan"),
        ({"at_most": 1, "scale": "log"}, "scale='log'"),
        ({"at_most": 1, "alpha": 0.5}, "alpha=0.5"),
        ({"at_most": 0, "scale": "ratio"}, "positive"),
        ({"at_least": -1, "at_most": 1, "scale": "ratio"}, "positive"),
    ],
)
def test_claims_that_are_none(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        claim_test(OURS, CE, **arguments)


# decisions


@pytest.mark.parametrize(
    ("ours", "theirs", "word"),
    [
        ((1.0, (0.9, 1.1)), (2.0, (1.8, 2.2)), "better"),
        ((2.0, (1.8, 2.2)), (1.0, (0.9, 1.1)), "worse"),
        ((1.0, (0.9, 1.85)), (2.0, (1.8, 2.2)), "cannot tell"),  # they overlap
        ((1.0, (0.9, 1.8)), (2.0, (1.8, 2.2)), "cannot tell"),  # they touch
        ((1.0, None), (2.0, (1.8, 2.2)), "cannot tell"),
        ((1.0, (0.9, math.nan)), (2.0, (1.8, 2.2)), "cannot tell"),
        ((math.nan, (0.9, 1.1)), (2.0, (1.8, 2.2)), "cannot tell"),
        ((2.1, (0.9, 1.1)), (2.0, (1.8, 2.2)), "cannot tell"),  # its interval does not hold the figure
    ],
)
def test_better_needs_intervals_that_are_apart(ours, theirs, word: str) -> None:
    (x, x_interval), (y, y_interval) = (
        (figure, None if bounds is None else Interval(*bounds)) for figure, bounds in (ours, theirs)
    )
    assert str(standing(x, y, x_interval, y_interval, better=-1)) == word
    other = {"better": "worse", "worse": "better"}.get(word, word)
    assert str(standing(x, y, x_interval, y_interval, better=1)) == other
    assert str(standing(x, y, x_interval, y_interval, better=0)) == "cannot tell"


@pytest.mark.parametrize(
    ("low", "high", "limits", "expected"),
    [
        (0.1, 0.2, {"at_most": 0.3}, HOLDS),
        (0.1, 0.3, {"at_most": 0.3}, HOLDS),
        (0.1, 0.4, {"at_most": 0.3}, CANNOT_TELL),
        (0.3, 0.4, {"at_most": 0.3}, CANNOT_TELL),
        (0.31, 0.4, {"at_most": 0.3}, FAILS),
        (0.31, 0.4, {"at_least": 0.3}, HOLDS),
        (0.1, 0.4, {"at_least": 0.3}, CANNOT_TELL),
        (0.1, 0.2, {"at_least": 0.3}, FAILS),
        (-0.1, 0.2, {"at_least": -0.3, "at_most": 0.3}, HOLDS),
        (-0.4, 0.2, {"at_least": -0.3, "at_most": 0.3}, CANNOT_TELL),
        (-0.4, 0.4, {"at_least": -0.3, "at_most": 0.3}, CANNOT_TELL),
        (-0.5, -0.4, {"at_least": -0.3, "at_most": 0.3}, FAILS),
        (0.4, 0.5, {"at_least": -0.3, "at_most": 0.3}, FAILS),
        (math.nan, math.nan, {"at_most": 0.3}, CANNOT_TELL),
        (math.nan, 0.2, {"at_most": 0.3}, CANNOT_TELL),
        (math.nan, 0.2, {"at_least": 0.3}, CANNOT_TELL),
        (-math.inf, 0.2, {"at_most": 0.3}, HOLDS),
        (-math.inf, math.inf, {"at_most": 0.3}, CANNOT_TELL),
        (0, 0, {"at_most": 0}, HOLDS),
    ],
)
def test_decide(low: float, high: float, limits: dict[str, float], expected: Decision) -> None:
    assert decide(Interval(low, high), **limits) is expected


def test_decisions_are_words() -> None:
    assert str(Decision.CANNOT_TELL) == "cannot tell"
    assert json.dumps([HOLDS, FAILS]) == '["holds", "fails"]'


def test_joining_claims() -> None:
    assert all_of([HOLDS, HOLDS]) is HOLDS
    assert all_of([HOLDS, CANNOT_TELL]) is CANNOT_TELL
    assert all_of([CANNOT_TELL, FAILS]) is FAILS
    assert any_of([FAILS, FAILS]) is FAILS
    assert any_of([FAILS, CANNOT_TELL]) is CANNOT_TELL
    assert any_of([CANNOT_TELL, HOLDS]) is HOLDS
    assert all_of(["holds", "cannot tell"]) is CANNOT_TELL  # as read from a file
    for join in (all_of, any_of):
        with pytest.raises(ValueError, match="no claim"):
            join([])
        with pytest.raises(ValueError, match="perhaps"):
            join(["perhaps"])


# summaries, stars, families


def test_summaries() -> None:
    found = summarize([2, 4, 4, 4, 5, 5, 7, 9])
    assert (found.count, found.mean, found.sd) == (8, 5, pytest.approx(math.sqrt(32 / 7)))
    one, none = summarize([3.0]), summarize([])
    assert (one.count, one.mean) == (1, 3)
    assert math.isnan(one.sd)
    assert none.count == 0
    assert math.isnan(none.mean)
    assert math.isnan(none.sd)
    with pytest.raises(ValueError, match=r"values\[1\]=nan.*report which"):
        summarize([1, math.nan])


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0, "***"), (0.00099, "***"), (0.001, "**"), (0.00999, "**"), (0.01, "*"), (0.0499, "*"), (0.05, ""), (1, "")],
)
def test_stars(p: float, expected: str) -> None:
    assert stars(p) == expected


def test_stars_of_no_test_and_of_no_probability() -> None:
    assert stars(math.nan) == "n/a"
    with pytest.raises(ValueError, match=r"p_value=1\.5"):
        stars(1.5)


def test_holm_by_hand() -> None:
    # the example of Wikipedia's "Holm-Bonferroni method": of .005, .01, .03, .04 the first two are rejected at .05
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_on_benjamini_and_hochberg_s_example() -> None:
    # JRSS B 57 (1995), section 4: 15 endpoints of a trial, of which control of the family rejects the first three
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528,
         0.7590, 1.0]  # fmt: skip
    assert list(np.flatnonzero(holm(p) < 0.05)) == [0, 1, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 40])
def test_holm_is_statsmodels(size: int) -> None:
    p = np.random.default_rng(size).random(size).round(2) ** 3  # with ties
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1], rel=1e-12)


def test_a_missing_test_stays_missing_and_counts() -> None:
    found = holm([0.01, None, 0.04, math.nan])
    assert np.isnan(found[[1, 3]]).all()
    assert found[[0, 2]] == pytest.approx([0.04, 0.12])  # as in a family of four
    assert np.isnan(holm([None, None])).all()
    assert len(holm([])) == 0


def test_a_family_by_name() -> None:
    family = holm_family({"nll": 0.001, "ece": None, "brier": 0.02})
    assert list(family) == ["nll", "ece", "brier"]
    assert (family["nll"].adjusted, family["brier"].adjusted) == pytest.approx((0.003, 0.04))
    assert [test.stars for test in family.values()] == ["**", "n/a", "*"]
    assert family["brier"].p_value == 0.02
    assert math.isnan(family["ece"].p_value)
    with pytest.raises(ValueError, match=r"p_values\[1\]=1\.2"):
        holm([0.5, 1.2])


def test_holm_keeps_the_family_s_error() -> None:
    rng = np.random.default_rng(2)
    shared = rng.normal(size=(4000, 1))
    z = 0.7 * shared + math.sqrt(1 - 0.49) * rng.normal(size=(4000, 5))  # five tests that depend on each other
    p = 2 * stats.norm.sf(np.abs(z))
    wrong = np.mean([(holm(row) < 0.05).any() for row in p])
    assert wrong < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 4000)
