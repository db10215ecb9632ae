"""What few pairs can detect, against statsmodels and published figures; signs over settings and seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from dpsm_hf.statistics import (
    Decision,
    decide,
    detectable_difference,
    pairs_needed,
    power_note,
    sign_agreement,
    t_test_power,
)


@pytest.mark.parametrize("pairs", [2, 3, 5, 30])
@pytest.mark.parametrize("effect", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("sides", [1, 2])
def test_power_is_statsmodels(pairs: int, effect: float, sides: int) -> None:
    kind = {1: "larger", 2: "two-sided"}[sides]
    expected = TTestPower().power(effect, pairs, 0.05, alternative=kind)
    assert t_test_power(effect * 0.1, 0.1, pairs, sides=sides) == pytest.approx(expected, rel=1e-8)


def test_published_sample_sizes() -> None:
    # G*Power 3.1's matched pairs, dz = .5, two-sided .05: 34 pairs have a power of .8078 (R: pwr.t.test gives 33.4)
    assert t_test_power(0.5, 1.0, 34) == pytest.approx(0.8078, abs=5e-5)
    assert pairs_needed(0.5, 1.0) == 34
    assert detectable_difference(1.0, 34) < 0.5 < detectable_difference(1.0, 33)


@pytest.mark.parametrize("pairs", [2, 3, 4, 10])
def test_power_is_how_often_the_test_finds_it(pairs: int) -> None:
    rng = np.random.default_rng(pairs)
    difference = detectable_difference(0.2, pairs)
    d = rng.normal(difference, 0.2, (20_000, pairs))
    found = (stats.ttest_1samp(d, 0, axis=1).pvalue < 0.05).mean()
    assert found == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / 20_000))


def test_the_detectable_difference_has_the_power() -> None:
    for sides in (1, 2):
        for power in (0.5, 0.9):
            difference = detectable_difference(2.0, 3, power=power, alpha=0.01, sides=sides)
            assert t_test_power(difference, 2.0, 3, alpha=0.01, sides=sides) == pytest.approx(power, abs=1e-7)


def test_power_without_spread_and_without_difference() -> None:
    assert t_test_power(0.1, 0, 3) == 1
    assert t_test_power(0, 0, 3) == t_test_power(0, 1, 3, alpha=0.05) == pytest.approx(0.05)
    assert detectable_difference(0, 3) == 0
    assert t_test_power(-0.3, 0.2, 4) == t_test_power(0.3, 0.2, 4)


@pytest.mark.parametrize("difference", [0.3, 0.05, 0.9])
def test_pairs_needed_is_the_first_number_that_will_do(difference: float) -> None:
    pairs = pairs_needed(difference, 0.3)
    assert pairs is not None
    assert t_test_power(difference, 0.3, pairs) >= 0.8 > t_test_power(difference, 0.3, pairs - 1)


def test_pairs_needed_gives_up() -> None:
    assert pairs_needed(0.001, 1.0) is None
    assert pairs_needed(0.0, 1.0) is None
    assert pairs_needed(0.5, 1.0, at_most=33) is None
    assert pairs_needed(0.5, 1.0, at_most=34) == 34
    assert pairs_needed(100.0, 1.0) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: t_test_power(1, 1, 1), "pairs=1"),
        (lambda: t_test_power(1, -1, 3), "sd=-1"),
        (lambda: t_test_power(math.nan, 1, 3), "difference=nan"),
        (lambda: t_test_power(1, 1, 3, alpha=0), "alpha=0"),
        (lambda: t_test_power(1, 1, 3, sides=3), "sides=3"),
        (lambda: detectable_difference(1, 3, power=0.05), "power=0.05"),
        (lambda: detectable_difference(math.nan, 3), "sd=nan"),
        (lambda: power_note(math.nan, 3), "sd=nan"),
    ],
)
def test_arguments_out_of_range(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_note_of_three_pairs() -> None:
    note = power_note(0.1, 3, unit="perplexity")
    assert note.sd_interval == pytest.approx((0.0521, 0.628), abs=5e-4)  # chi-squared with 2: 7.378 and .0506
    assert note.detectable == pytest.approx(detectable_difference(0.1, 3))
    assert note.sentence == (
        f"3 pairs with a spread of 0.1 perplexity could detect a difference of {note.detectable:.3g} perplexity or "
        "more with a chance of 80% (two-sided test at 5%); the spread itself is only known to lie between 0.0521 and "
        "0.628."
    )


def test_the_note_where_there_is_nothing_to_say() -> None:
    for pairs, words in ((0, "0 pairs"), (1, "1 pair")):
        note = power_note(math.nan, pairs)
        assert math.isnan(note.detectable)
        assert note.sentence.startswith(f"{words} cannot be tested")
    assert "without any spread" in power_note(0.0, 3).sentence


# signs


CELLS = {
    "clean": {1: -0.2, 2: -0.1, 3: -0.3},
    "flipped": {1: -0.2, 2: 0.1, 3: None},
    "books": {1: -0.1, 2: 0.0, 3: math.nan},
}


def test_signs_are_counted() -> None:
    found = sign_agreement(CELLS, -1)
    assert (found.same, found.opposite, found.zero, found.missing) == (5, 1, 1, 2)
    assert found.share == pytest.approx(5 / 7)
    assert found.bounds == pytest.approx((5 / 9, 7 / 9))
    assert found.by_setting == {"clean": 1, "flipped": 0.5, "books": 0.5}
    expected = stats.binomtest(5, 7).proportion_ci(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert sign_agreement(CELLS, 1).same == 1


def test_missing_runs_decide_only_where_they_could() -> None:
    assert decide(sign_agreement(CELLS, -1).bounds, at_least=0.75) is Decision.CANNOT_TELL
    assert decide(sign_agreement(CELLS, -1).bounds, at_least=0.5) is Decision.HOLDS
    assert decide(sign_agreement(CELLS, 1).bounds, at_least=0.75) is Decision.FAILS


def test_twelve_of_twelve_are_not_quite_75_per_cent_of_all_there_could_be() -> None:
    found = sign_agreement({s: dict.fromkeys(range(3), 1.0) for s in range(4)}, 1)
    assert found.interval == pytest.approx((0.025 ** (1 / 12), 1.0))  # Clopper and Pearson, all of n
    assert decide(found.interval, at_least=0.75) is Decision.CANNOT_TELL
    assert decide(found.bounds, at_least=0.75) is Decision.HOLDS


def test_infinity_has_a_sign_and_all_missing_has_no_share() -> None:
    assert sign_agreement({"a": {1: math.inf}}, -1).opposite == 1
    found = sign_agreement({"a": {1: None}}, 1)
    assert math.isnan(found.share)
    assert math.isnan(found.interval.low)
    assert math.isnan(found.by_setting["a"])
    assert found.bounds == (0, 1)


@pytest.mark.parametrize(
    ("cells", "arguments", "message"),
    [
        ({}, {"expected": 1}, "no setting"),
        ({"a": {}}, {"expected": 1}, "no setting"),
        (CELLS, {"expected": 0}, "expected=0"),
        (CELLS, {"expected": 1, "level": 1}, "level=1"),
    ],
)
def test_signs_of_nothing(cells, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sign_agreement(cells, **arguments)
