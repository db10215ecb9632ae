"""Alpha at every step of every schedule, what is refused, and what is said about it."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsm_hf import AlphaSchedule, available_alpha_schedules, get_alpha_schedule, register_alpha_schedule
from dpsm_hf.rules import schedules as module

BUILT_IN = ["linear", "cosine", "constant", "late_linear", "step", "triangle", "feedback"]


def alphas(schedule: AlphaSchedule, total: int, steps: list[int] | None = None) -> list[float]:
    return [schedule(step, total) for step in (range(total) if steps is None else steps)]


# ---- values --------------------------------------------------------------------------------------------------------


def test_the_names() -> None:
    assert available_alpha_schedules() == BUILT_IN


def test_linear() -> None:
    schedule = get_alpha_schedule("linear", warmup_steps=10)
    assert alphas(schedule, 100, [0, 1, 5, 9, 10, 11, 99]) == [0.0, 0.1, 0.5, 0.9, 1.0, 1.0, 1.0]
    assert alphas(get_alpha_schedule("linear", warmup_steps=10, hold=5), 100, [0, 4, 5, 10, 15, 99]) == [
        0, 0, 0, 0.5, 1, 1,
    ]  # fmt: skip
    assert get_alpha_schedule("linear")(50, 1000) == 0.5, "a tenth of all steps is the default"


def test_cosine() -> None:
    schedule = get_alpha_schedule("cosine", warmup_steps=10)
    for step in range(30):
        assert schedule(step, 100) == pytest.approx(0.5 * (1 - math.cos(math.pi * min(1, step / 10))), abs=1e-15)
    assert schedule(0, 100) == 0 and schedule(10, 100) == 1 and schedule(5, 100) == pytest.approx(0.5)
    held = get_alpha_schedule("cosine", warmup_steps=10, hold=20)
    assert held(19, 100) == held(20, 100) == 0 and held(25, 100) == pytest.approx(0.5) and held(30, 100) == 1


def test_constant() -> None:
    for alpha in (0.0, 0.3, 1.0):
        assert set(alphas(get_alpha_schedule("constant", end=alpha), 20)) == {alpha}
        assert get_alpha_schedule("constant", end=alpha)(7, 0) == alpha, "needs no total"


def test_late_linear_holds_half_of_training_unless_told() -> None:
    schedule = get_alpha_schedule("late_linear", warmup_steps=0.2)
    assert alphas(schedule, 100, [0, 49, 50, 60, 70, 99]) == [0, 0, 0, 0.5, 1, 1]
    told = get_alpha_schedule("late_linear", warmup_steps=0.2, hold=0.1)
    assert alphas(told, 100, [9, 10, 20, 30]) == [0, 0, 0.5, 1]
    assert get_alpha_schedule("late_linear", warmup_steps=20, hold=0)(10, 100) == 0.5


def test_step_switches_at_once() -> None:
    schedule = get_alpha_schedule("step", start=0.2, end=0.9)
    assert alphas(schedule, 100, [0, 49, 50, 99]) == [0.2, 0.2, 0.9, 0.9]
    assert alphas(get_alpha_schedule("step", hold=7), 100, [6, 7]) == [0, 1]
    assert get_alpha_schedule("step", hold=0)(0, 100) == 1


def test_triangle_is_back_at_the_last_step() -> None:
    schedule = get_alpha_schedule("triangle", warmup_steps=10)
    assert alphas(schedule, 31, [0, 5, 10, 20, 30]) == [0, 0.5, 1, 0.5, 0]
    held = get_alpha_schedule("triangle", warmup_steps=10, hold=10, start=0.2, end=0.6)
    assert alphas(held, 41, [0, 10, 20, 40]) == [0.2, 0.2, 0.6, 0.2]
    assert held(15, 41) == held(30, 41) == pytest.approx(0.4)
    assert schedule(31, 31) == 0 and schedule(500, 31) == 0, "past the end it stays at the start"
    assert get_alpha_schedule("triangle", warmup_steps=50)(9, 10) == pytest.approx(0.18), "longer than training"


@pytest.mark.parametrize("name", ["linear", "cosine", "triangle", "late_linear", "step"])
def test_start_and_end_may_be_reversed(name: str) -> None:
    up = get_alpha_schedule(name, start=0.1, end=0.8)
    down = get_alpha_schedule(name, start=0.8, end=0.1)
    for step in range(0, 101, 5):
        assert down(step, 101) == pytest.approx(0.9 - up(step, 101), abs=1e-15)
    assert down(0, 101) == 0.8


def test_lengths() -> None:
    for value, total, expected in ((0.1, 1000, 100), (0.1, 1001, 101), (0.5, 7, 4), (0.001, 10, 1), (1, 10, 1),
                                   (1.0, 10, 1), (25, 10, 25), (0, 10, 0), (0.999, 1000, 999), (0.07, 100, 7),
                                   (0.29, 100, 29)):  # fmt: skip
        assert get_alpha_schedule("linear", warmup_steps=value).resolve(total).warmup == expected, (value, total)
        assert get_alpha_schedule("step", hold=value).resolve(total).hold == expected, (value, total)


def test_extreme_warmups() -> None:
    assert alphas(get_alpha_schedule("linear", warmup_steps=0), 5) == [1.0] * 5
    assert alphas(get_alpha_schedule("cosine", warmup_steps=0, hold=2), 5) == [0, 0, 1, 1, 1]
    assert alphas(get_alpha_schedule("linear", warmup_steps=1), 3) == [0.0, 1.0, 1.0]
    assert alphas(get_alpha_schedule("linear", warmup_steps=100), 5) == [0.0, 0.01, 0.02, 0.03, 0.04]
    assert get_alpha_schedule("triangle", warmup_steps=0)(0, 5) == 1.0
    assert get_alpha_schedule("linear", warmup_steps=10)(10**9, 0) == 1.0, "steps need no total"


lengths = st.one_of(st.floats(0, 1, exclude_max=True), st.integers(0, 200))
unit = st.floats(0, 1)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(name=st.sampled_from(BUILT_IN[:-1]), start=unit, end=unit, warmup=lengths, hold=lengths,
       total=st.integers(1, 150), step=st.integers(0, 300))  # fmt: skip
def test_alpha_stays_between_its_ends(
    name: str, start: float, end: float, warmup: float, hold: float, total: int, step: int
) -> None:
    options: dict[str, Any] = {"warmup_steps": warmup, "end": end}
    if name != "constant":
        options.update(start=start, hold=hold)
    alpha = get_alpha_schedule(name, **options)(step, total)
    assert 0 <= alpha <= 1
    if name != "constant":
        assert min(start, end) - 1e-15 <= alpha <= max(start, end) + 1e-15


@settings(deadline=None, max_examples=100, derandomize=True)
@given(name=st.sampled_from(["linear", "cosine", "late_linear", "step"]), start=unit, end=unit, warmup=lengths,
       hold=lengths, total=st.integers(2, 80))  # fmt: skip
def test_ramps_are_monotone(name: str, start: float, end: float, warmup: float, hold: float, total: int) -> None:
    values = alphas(get_alpha_schedule(name, start=start, end=end, warmup_steps=warmup, hold=hold), total)
    signed = [b - a if end >= start else a - b for a, b in pairwise(values)]
    assert min(signed) >= -1e-15


# ---- feedback ------------------------------------------------------------------------------------------------------

HISTORY = [
    {"loss": 3.0, "step": 5},
    {"eval_signed_gap": 0.02, "step": 10},
    {"eval_signed_gap": math.nan, "step": 20},
    {"eval_signed_gap": None, "step": 25},
    {"eval_signed_gap": 0.5, "step": 30},
    {"eval_signed_gap": -0.01, "step": 40},
    {"eval_signed_gap": -math.inf, "step": 45},
    {"eval_signed_gap": 0.04, "step": 50},
]


def test_feedback_follows_the_gap() -> None:
    schedule = get_alpha_schedule("feedback", gain=2.0, limit=0.1)
    assert [round(schedule(step, 100, HISTORY), 12) for step in (0, 9, 10, 29, 30, 40, 49, 50, 99)] == [
        0, 0, 0.04, 0.04, 0.14, 0.12, 0.12, 0.2, 0.2,
    ]  # fmt: skip
    assert schedule(99, 100) == 0.0, "no evaluation yet"


def test_feedback_is_a_pure_function_of_the_history() -> None:
    schedule = get_alpha_schedule("feedback")
    there_and_back = json.loads(json.dumps(HISTORY))
    copy = [dict(entry) for entry in HISTORY]
    for step in range(0, 60, 5):
        expected = schedule(step, 100, HISTORY)
        assert schedule(step, 100, HISTORY) == expected == schedule(step, 7, there_and_back)
        seen = [entry for entry in HISTORY if entry["step"] <= step]
        assert schedule(step, 100, seen) == expected, "it read the future"
    assert repr(copy) == repr(HISTORY)


def test_feedback_stays_in_its_bounds() -> None:
    over = [{"eval_signed_gap": 1.0, "step": i} for i in range(50)]
    under = [{"eval_signed_gap": -1.0, "step": 50 + i} for i in range(50)]
    schedule = get_alpha_schedule("feedback", start=0.3, end=0.7)
    assert schedule(100, 100, over) == 0.7 and schedule(100, 100, over + under) == 0.3
    assert schedule(0, 100, over) == pytest.approx(0.4)
    assert get_alpha_schedule("feedback", start=0.7, end=0.3)(100, 100, over) == 0.7
    # each move is clipped, not their sum: it turns round at once
    assert schedule(50, 100, over + under) == pytest.approx(0.6)


def test_feedback_of_another_metric() -> None:
    schedule = get_alpha_schedule("feedback", metric="eval_dev_signed_gap", gain=1.0)
    assert schedule(9, 10, [{"eval_signed_gap": 0.05, "step": 1}, {"eval_dev_signed_gap": 0.03, "step": 1}]) == 0.03


@settings(deadline=None, max_examples=100, derandomize=True)
@given(gaps=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=20), start=unit, end=unit,
       gain=st.floats(-10, 10), limit=st.floats(0.01, 1))  # fmt: skip
def test_feedback_never_leaves_its_bounds(
    gaps: list[float], start: float, end: float, gain: float, limit: float
) -> None:
    history = [{"eval_signed_gap": gap, "step": i} for i, gap in enumerate(gaps)]
    schedule = get_alpha_schedule("feedback", start=start, end=end, gain=gain, limit=limit)
    previous = start
    for step in range(len(gaps)):
        alpha = schedule(step, 100, history)
        assert min(start, end) <= alpha <= max(start, end)
        assert abs(alpha - previous) <= limit + 1e-12
        previous = alpha


# ---- registering ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("schedule_registry")
def test_a_third_party_schedule() -> None:
    @register_alpha_schedule("square_root")
    def square_root(step: int, span: Any, options: Any, history: Any) -> float:
        return options.end * min(1.0, step / span.warmup) ** 0.5

    assert "square_root" in available_alpha_schedules()
    schedule = get_alpha_schedule("square_root", warmup_steps=0.5)
    assert schedule(2, 16) == 0.5 and schedule(8, 16) == 1.0
    assert schedule.describe(16) == "square_root: alpha 0 -> 1 over 8 steps (of 16)"
    with pytest.raises(ValueError, match="'square_root' exists already"):
        register_alpha_schedule("square_root")


@pytest.mark.usefixtures("schedule_registry")
def test_what_a_registered_schedule_declares_counts() -> None:
    register_alpha_schedule("sudden", start=0.4, hold=3, uses_warmup=False)(module._switch)
    assert alphas(get_alpha_schedule("sudden"), 5) == [0.4, 0.4, 0.4, 1, 1]
    register_alpha_schedule("flat", uses_hold=False, needs_total=True)(module._constant)
    with pytest.raises(ValueError, match="alpha_hold=3 has no effect on alpha_schedule='flat'"):
        get_alpha_schedule("flat", hold=3)
    with pytest.raises(ValueError, match="'flat' schedule needs the total number of steps"):
        get_alpha_schedule("flat", warmup_steps=5)(0, 0)


@pytest.mark.usefixtures("schedule_registry")
def test_a_registered_schedule_may_arrive_at_the_very_last_step() -> None:
    register_alpha_schedule("whole")(lambda step, span, options, history: step / (span.total - 1))
    assert get_alpha_schedule("whole").reaches_end(50)
    register_alpha_schedule("short")(lambda step, span, options, history: step / span.total)
    assert not get_alpha_schedule("short").reaches_end(50)


@pytest.mark.usefixtures("schedule_registry")
@pytest.mark.parametrize("bad", [1.5, -0.1, math.nan])
def test_a_schedule_that_leaves_the_range_is_stopped(bad: float) -> None:
    register_alpha_schedule("wild")(lambda step, span, options, history: bad if step == 3 else 0.5)
    schedule = get_alpha_schedule("wild")
    assert schedule(2, 10) == 0.5
    with pytest.raises(ValueError, match=rf"'wild' schedule gave alpha={bad} at step 3, outside \[0, 1\]"):
        schedule(3, 10)


def test_a_built_in_name_is_taken() -> None:
    with pytest.raises(ValueError, match="'linear' exists already; choose another name"):
        register_alpha_schedule("linear")


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("quadratic", {}, r"alpha_schedule='quadratic' is unknown; choose one of linear, .*feedback .*register"),
        ("linear", {"start": -0.1}, r"alpha_start=-0.1 lies outside \[0, 1\]"),
        ("linear", {"end": 1.1}, r"alpha_end=1.1 lies outside \[0, 1\]"),
        ("linear", {"end": math.nan}, r"alpha_end=nan lies outside"),
        ("linear", {"warmup_steps": -1}, r"alpha_warmup_steps=-1 must be 0 or more"),
        ("linear", {"warmup_steps": math.inf}, r"alpha_warmup_steps=inf must be 0 or more"),
        ("linear", {"warmup_steps": 1.5}, r"alpha_warmup_steps=1.5 is neither a share .* nor a whole number"),
        ("linear", {"hold": -2}, r"alpha_hold=-2 must be 0 or more"),
        ("linear", {"hold": 10.25}, r"alpha_hold=10.25 is neither"),
        ("constant", {"hold": 3}, r"alpha_hold=3 has no effect on alpha_schedule='constant'"),
        ("feedback", {"hold": 3}, r"alpha_hold=3 has no effect on alpha_schedule='feedback'"),
        ("constant", {"start": 0.2}, r"alpha_start=0.2 contradicts alpha_schedule='constant'.*alpha_end=1.0"),
        ("feedback", {"limit": 0.0}, r"limit=0.0"),
        ("feedback", {"gain": math.inf}, r"gain=inf"),
    ],
)
def test_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_alpha_schedule(name, **options)


def test_constant_takes_its_own_end_as_start() -> None:
    assert get_alpha_schedule("constant", start=0.3, end=0.3)(5, 10) == 0.3


def test_shares_need_a_total() -> None:
    for total in (0, -1):
        with pytest.raises(ValueError, match=r"warmup is 0.1, a share of all steps, but the total is not known"):
            get_alpha_schedule("linear").check(total)
        with pytest.raises(ValueError, match=r"hold is 0.5, a share"):
            get_alpha_schedule("step").check(total)
    for name in ("constant", "feedback"):
        get_alpha_schedule(name).check(0)
    get_alpha_schedule("linear", warmup_steps=5).check(0)


# ---- what is said --------------------------------------------------------------------------------------------------


def test_descriptions() -> None:
    def say(name: str, total: int = 100, **options: Any) -> str:
        return get_alpha_schedule(name, **options).describe(total)

    assert say("linear") == "linear: alpha 0 -> 1 over 10 steps (of 100)"
    assert say("linear", start=0.2, end=0.5, hold=5) == "linear: alpha 0.2 -> 0.5 from step 5 over 10 steps (of 100)"
    assert say("cosine", warmup_steps=0.333) == "cosine: alpha 0 -> 1 over 34 steps (of 100)"
    assert say("constant", end=0.5) == "constant: alpha = 0.5 at every step"
    assert say("late_linear") == "late_linear: alpha 0 -> 1 from step 50 over 10 steps (of 100)"
    assert say("step") == "step: alpha 0 -> 1 from step 50 (of 100)"
    assert say("triangle") == "triangle: alpha 0 -> 1 over 10 steps and back to 0 at the last (of 100)"
    feedback = say("feedback", start=0.3, gain=1.5)
    assert "starts at 0.3" in feedback and "1.5 * eval_signed_gap" in feedback and "at most 0.1 at a time" in feedback
    assert "between 0.3 and 1" in feedback


@pytest.mark.parametrize(
    ("name", "options", "total", "expected"),
    [
        ("linear", {}, 100, True),
        ("linear", {"warmup_steps": 99}, 100, True),  # at the last step, s = 99
        ("linear", {"warmup_steps": 100}, 100, False),
        ("linear", {"warmup_steps": 1000}, 100, False),
        ("linear", {"hold": 95}, 100, False),
        ("linear", {"start": 0.4, "end": 0.4, "warmup_steps": 1000}, 100, True),
        ("cosine", {"warmup_steps": 1000}, 100, False),
        ("constant", {"end": 0.3}, 1, True),
        ("late_linear", {}, 100, True),
        ("late_linear", {"warmup_steps": 0.6}, 100, False),
        ("step", {}, 100, True),
        ("step", {"hold": 100}, 100, False),
        ("triangle", {}, 100, True),
        ("triangle", {"warmup_steps": 200}, 100, False),
        ("feedback", {}, 100, True),
    ],
)
def test_reaches_end(name: str, options: dict[str, Any], total: int, expected: bool) -> None:
    schedule = get_alpha_schedule(name, **options)
    assert schedule.reaches_end(total) is expected
    if name != "feedback":
        assert expected == any(abs(schedule(s, total) - schedule.options.end) < 1e-12 for s in range(total))
