"""`feedback`: it settles on plants of every kind, stays in its bounds, and depends on the log alone."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsm_hf.rules.feedback import Feedback

GAINS = [1.0, 20.0, 1e3, 1e6]


def run(feedback: Feedback, looks: int, slope: float, gap: float, lag: float = 0.0, noise: float = 0.0) -> list[Any]:
    """Return knob and signal at each look at a plant: the signal tends to ``gap - slope * knob``, late with a lag."""
    history: list[dict[str, float]] = []
    signal, found, chance = gap, [], random.Random(0)
    for step in range(looks):
        knob = feedback.value(step, history)
        signal = lag * signal + (1 - lag) * (gap - slope * knob)
        history.append({"eval_signed_gap": signal + chance.gauss(0, noise), "step": step})
        found.append((knob, signal))
    return found


def sign_changes(signals: list[float]) -> list[int]:
    return [i for i in range(1, len(signals)) if signals[i] * signals[i - 1] < 0]


def made(**options: Any) -> Feedback:
    defaults = dict(start=0.0, low=0.0, high=1.0, gain=2.0, limit=0.1, signal="eval_signed_gap")
    return Feedback(**{**defaults, **options})


@pytest.mark.parametrize("lag", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("slope", [0.15, 1.0, 5.0])
@pytest.mark.parametrize("gain", GAINS)
def test_it_settles_whatever_the_gain(gain: float, slope: float, lag: float) -> None:
    """With gains over six orders of magnitude; smaller ones only take longer."""
    found = run(made(gain=gain), 160, slope, gap=0.13, lag=lag)
    knobs, signals = zip(*found, strict=True)
    assert all(0 <= knob <= 1 for knob in knobs)
    assert max(map(abs, signals[-20:])) < 1e-4 and abs(knobs[-1] - 0.13 / slope) < 1e-3
    # each one halves the gain, so that there are few of them; a lag wants a gain that is smaller yet
    assert len(sign_changes(list(signals))) <= math.log2(max(1.0, gain * slope)) + 2 + 10 * lag


def test_without_halving_a_large_gain_swings_for_ever() -> None:
    _, signals = zip(*run(made(gain=50.0, halving=False), 60, slope=1.0, gap=0.13), strict=True)
    assert len(sign_changes(list(signals))) > 50 and abs(signals[-1]) > 0.02


def test_the_overshoots_are_bounded_by_halves_of_the_limit() -> None:
    signals = [signal for _, signal in run(made(gain=1e9, limit=0.4, start=0.5), 60, slope=1.0, gap=0.123)]
    for n, i in enumerate(sign_changes(signals)):
        assert abs(signals[i]) <= 0.4 / 2**n + 1e-12


def test_a_target_out_of_reach_leaves_it_at_its_bound() -> None:
    found = run(made(high=0.3), 40, slope=0.1, gap=0.5)
    assert found[-1][0] == 0.3
    found = run(made(start=0.2, low=0.1), 40, slope=0.1, gap=-0.5)
    assert found[-1][0] == 0.1


def test_a_change_of_sign_at_a_bound_costs_nothing() -> None:
    """Nothing has overshot where nothing could move."""
    waits = [{"eval_signed_gap": -0.1, "step": i} for i in range(3)]
    assert made(gain=1.0).value(9, [*waits, {"eval_signed_gap": 0.08, "step": 4}]) == pytest.approx(0.08)
    there_and_back = [{"eval_signed_gap": gap, "step": i} for i, gap in enumerate((0.08, -0.06, -0.02, 0.04))]
    assert made(gain=1.0).value(9, there_and_back) == pytest.approx(0.08 - 0.03 - 0.01 + 0.01)


def test_noise_around_zero_moves_nothing_within_the_tolerance() -> None:
    noisy = [knob for knob, _ in run(made(tolerance=0.02), 80, slope=1.0, gap=0.13, noise=0.004)]
    assert abs(noisy[-1] - 0.13) < 0.03 and len(set(noisy[20:])) == 1
    restless = [knob for knob, _ in run(made(), 80, slope=1.0, gap=0.13, noise=0.004)]
    assert len(set(restless[5:20])) > 10, "without a tolerance the noise moves it"
    assert abs(restless[-1] - restless[-20]) < 1e-3, "and uses up its moves"


def test_a_tolerance_is_as_large_as_it_is() -> None:
    history = [{"eval_signed_gap": 0.05, "step": 1}, {"eval_signed_gap": -0.05, "step": 2}]
    assert made(tolerance=0.05).value(5, history) == 0.0
    assert made(tolerance=0.0499, gain=1.0).value(5, history) == pytest.approx(0.05 - 0.025)


# ---- a gain relative to what is logged -----------------------------------------------------------------------------

LOG = [
    {"eval_signed_gap": 0.01, "step": 1},
    {"grad_norm": 2.0, "grad_norm_ce": 4.0, "step": 2},
    {"eval_signed_gap": 0.01, "step": 2},
    {"grad_norm": math.nan, "grad_norm_ce": 8.0, "step": 3},
    {"eval_signed_gap": 0.02, "step": 3},
    {"grad_norm": 0.0, "grad_norm_ce": 0.0, "step": 4},
    {"eval_signed_gap": 0.02, "step": 4},
]


def test_the_gain_is_multiplied_by_the_last_logged_value() -> None:
    values = [made(relative_to="grad_norm").value(step, LOG) for step in (1, 2, 3, 4)]
    assert values == pytest.approx([0.0, 0.04, 0.12, 0.12]), "no move before the first logged value"
    values = [made(relative_to="grad_norm/grad_norm_ce").value(step, LOG) for step in (1, 2, 3, 4)]
    assert values == pytest.approx([0.0, 0.01, 0.02, 0.02]), "no move over a zero"


def test_a_number_of_the_same_entry_counts() -> None:
    history = [{"eval_signed_gap": 0.01, "eval_brier": 0.5, "step": 1}]
    assert made(relative_to="eval_brier").value(1, history) == pytest.approx(0.01)


# ---- a pure function of the log ------------------------------------------------------------------------------------

numbers = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.floats(-0.2, 0.2))
entries = st.fixed_dictionaries({"eval_signed_gap": numbers, "grad_norm": numbers, "step": st.integers(0, 30)})


@settings(deadline=None, max_examples=60, derandomize=True)
@given(history=st.lists(entries, max_size=25), gain=st.floats(-1e9, 1e9), limit=st.floats(1e-3, 2),
       ends=st.tuples(st.floats(-1, 1), st.floats(-1, 1)), relative=st.sampled_from(["", "grad_norm"]))  # fmt: skip
def test_it_stays_in_its_bounds_and_reads_no_future(
    history: list[dict[str, Any]], gain: float, limit: float, ends: tuple[float, float], relative: str
) -> None:
    low, high = sorted(ends)
    feedback = made(start=high, low=low, high=high, gain=gain, limit=limit, relative_to=relative)
    there_and_back = json.loads(json.dumps(history))
    for step in (0, 7, 30):
        value = feedback.value(step, history)
        assert low <= value <= high
        assert value == feedback.value(step, there_and_back)
        assert value == feedback.value(step, [entry for entry in history if entry["step"] <= step])
