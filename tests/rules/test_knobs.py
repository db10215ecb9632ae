"""Which numbers of the objective can be scheduled, how a schedule is written, what is refused, and what it gives."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from dpsm_hf import DPSMLoss, Objective, available_alpha_schedules, register_alpha_schedule
from dpsm_hf.rules.knob_schedules import parse_knob_schedules
from dpsm_hf.rules.knobs import KNOBS, knobs_of, objective_with
from dpsm_hf.rules.registry import PARAMETERS, RULES
from tests.reference import reference_loss


def test_every_number_of_the_objective_is_a_knob() -> None:
    fields = {f.name for f in dataclasses.fields(Objective)} - {"scoring_rule", "scheduled"}
    assert {knob.field for knob in KNOBS.values()} == fields
    assert {name for name, knob in KNOBS.items() if name != knob.field} == {"label_smoothing_factor"}
    assert set(PARAMETERS) <= set(KNOBS)
    for knob in KNOBS.values():
        assert knob.rules and knob.default == getattr(Objective(knob.rules[0]), knob.field)
        assert knob.problem(math.nan) and knob.problem(-math.inf) and not knob.problem(knob.default)
        assert bool(knob.problem(-5.0)) == (knob.name != "entropy_weight")  # below 0 it is a penalty


def test_a_knob_knows_the_rules_that_it_has_an_effect_on() -> None:
    assert KNOBS["alpha"].rules == ("dpsm",) and KNOBS["focal_gamma"].rules == ("focal",)
    assert KNOBS["gce_q"].rules == ("gce",) and set(KNOBS["z_loss"].rules) == set(RULES)
    assert KNOBS["score_smoothing"].rules == tuple(name for name, rule in RULES.items() if rule.score_smoothing)
    assert {"label_smoothing_factor", "z_loss"} <= set(knobs_of("ce")) and "alpha" not in knobs_of("ce")


# ---- syntax --------------------------------------------------------------------------------------------------------


def values(given: Any, rule: str, knob: str, total: int = 100) -> list[float]:
    schedule = parse_knob_schedules({knob: given}, rule)[knob]
    assert schedule.knob == knob
    return [schedule(step, total) for step in (0, 10, 15, 20, 99)]


@pytest.mark.parametrize(
    ("line", "mapping", "expected"),
    [
        ("linear 0 -> 2 over 0.1 after 10", {"start": 0, "end": 2, "hold": 10}, [0, 0, 1, 2, 2]),
        ("cosine 2->0 over 20", {"schedule": "cosine", "start": 2, "end": 0, "warmup_steps": 20},
         [2, 1, 1 + math.cos(0.75 * math.pi), 0, 0]),
        ("step .5 -> 1.5e0 after 0.2", {"schedule": "step", "start": 0.5, "end": 1.5, "hold": 0.2},
         [0.5, 0.5, 0.5, 1.5, 1.5]),
        ("constant 3", {"schedule": "constant", "end": 3}, [3, 3, 3, 3, 3]),
        ("late_linear 1 -> 2", {"schedule": "late_linear", "start": 1, "end": 2}, [1, 1, 1, 1, 2]),
        ("triangle 0 -> 2", {"schedule": "triangle", "start": 0, "end": 2}, [0, 2, 168 / 89, 158 / 89, 0]),
    ],
)  # fmt: skip
def test_a_line_says_what_a_mapping_says(line: str, mapping: dict[str, Any], expected: list[float]) -> None:
    assert values(line, "focal", "focal_gamma") == pytest.approx(expected, abs=1e-12)
    assert values(mapping, "focal", "focal_gamma") == pytest.approx(expected, abs=1e-12)
    one, two = (parse_knob_schedules({"focal_gamma": entry}, "focal") for entry in (line, mapping))
    assert one == two


@pytest.mark.parametrize("name", [knob for knob in KNOBS if knob != "alpha"])
def test_every_knob_takes_every_ramp_and_feedback(name: str) -> None:
    rule = KNOBS[name].rules[0]
    low, high = next(
        (a, b) for a, b in ((0.2, 0.4), (1.0, 1.5)) if not KNOBS[name].problem(a) + KNOBS[name].problem(b)
    )
    for schedule in available_alpha_schedules():
        ends = {"low": low, "high": high} if schedule == "feedback" else {"end": high}
        ends |= {} if schedule in ("constant", "feedback") else {"start": low}
        found = parse_knob_schedules({name: {"schedule": schedule, **ends}}, rule)[name]
        for step in (0, 50, 99):
            value = found(step, 100, [{"eval_signed_gap": 0.01, "step": 40}])
            assert low - 1e-12 <= value <= high + 1e-12
            made = objective_with(Objective(rule), {name: value})
            assert getattr(made, KNOBS[name].field) == value and made.uses(KNOBS[name].field)


def test_feedback_fills_in_what_is_left_out() -> None:
    given = {"z_loss": {"schedule": "feedback", "low": 0.1, "high": 0.6}}
    feedback = parse_knob_schedules(given, "ce")["z_loss"].options.feedback()
    assert (feedback.start, feedback.gain, feedback.limit, feedback.signal) == (0.1, 2.0, 0.05, "eval_signed_gap")
    assert feedback.halving and not feedback.relative_to and not feedback.tolerance
    said = parse_knob_schedules(given, "ce")["z_loss"].describe(100)
    assert said == (
        "feedback: z_loss starts at 0.1 and moves by 2 * eval_signed_gap after each evaluation, at most 0.05 at a "
        "time, halved at each turn, between 0.1 and 0.6"
    )


FEEDBACK = {"schedule": "feedback", "low": 0, "high": 0.1}


@pytest.mark.parametrize(
    ("rule", "given", "message"),
    [
        ("focal", {"focal_gama": "linear 0 -> 1"}, r"there is no knob 'focal_gama'; did you mean focal_gamma\?"),
        ("ce", {"label_smoothing": "linear 0 -> 1"}, r"no knob 'label_smoothing'; did you mean label_smoothing_f"),
        ("ce", {"focal_gamma": "linear 0 -> 1"}, r"focal_gamma has no effect on scoring_rule='ce'; .*'focal'"),
        ("brier", {"alpha": "linear 0 -> 1"}, r"alpha has no effect on scoring_rule='brier'; .*'dpsm'"),
        ("gce", {"gce_q": "linear 0 -> 1"}, r"s: gce_q: start=0.0 must lie in \(0, 1\]"),
        ("ce", {"label_smoothing_factor": "linear 0 -> 1"}, r"label_smoothing_factor: end=1.0 lies outside \[0, 1\)"),
        ("ce", {"z_loss": {**FEEDBACK, "low": -1}}, r"z_loss: low=-1.0 must be a finite number of at least 0"),
        ("dpsm", {"alpha": {**FEEDBACK, "high": 1.5}}, r"alpha: high=1.5 lies outside \[0, 1\]"),
        ("ce", {"z_loss": {**FEEDBACK, "start": 0.2}}, r"z_loss: start=0.2 does not lie between low=0.0 and hi"),
        ("ce", {"z_loss": {**FEEDBACK, "low": 0.1}}, r"z_loss: low=0.1 is not below high=0.1: the knob could no"),
        ("ce", {"z_loss": {**FEEDBACK, "limit": 0}}, r"z_loss: feedback needs a positive limit.*limit=0.0"),
        ("ce", {"z_loss": {**FEEDBACK, "gain": math.inf}}, r"gain=inf"),
        ("ce", {"z_loss": {**FEEDBACK, "tolerance": -0.1}}, r"z_loss: tolerance=-0.1 must be a finite number"),
        ("ce", {"z_loss": {**FEEDBACK, "relative_to": "a/b/c"}}, r"relative_to='a/b/c' should be one logged number"),
        ("ce", {"z_loss": {**FEEDBACK, "signal": 3}}, r"z_loss: signal=3 should be text, the name of a logged number"),
        ("ce", {"z_loss": {**FEEDBACK, "end": 3}}, r"z_loss: end=3 has no effect on schedule='feedback'; leave"),
        ("ce", {"z_loss": {"schedule": "feedback", "high": 1}}, r"z_loss: feedback needs low"),
        ("ce", {"z_loss": {"start": 0, "end": 1, "gain": 2}}, r"z_loss: gain=2 has no effect on schedule='linear'"),
        ("ce", {"z_loss": {"start": 0, "finish": 1}}, r"z_loss: linear has no 'finish'; choose one of start, end, w"),
        ("ce", {"z_loss": {"start": 0}}, r"z_loss: linear needs end"),
        ("ce", {"z_loss": {"start": "0", "end": 1}}, r"z_loss: start='0' should be a number"),
        ("ce", {"z_loss": {"start": True, "end": 1}}, r"z_loss: start=True should be a number"),
        ("ce", {"z_loss": "quadratic 0 -> 1"}, r"z_loss: schedule='quadratic' is unknown; choose one of linear"),
        ("ce", {"z_loss": {"schedule": 3}}, r"z_loss: schedule=3 is unknown"),
        ("ce", {"z_loss": "0 -> 1"}, r"z_loss: '0 -> 1' is no schedule: write 'linear 0 -> 2 over 0.1'"),
        ("ce", {"z_loss": 0.5}, r"z_loss: 0.5 is no schedule: .* a number that stays is given as z_loss=0.5"),
        ("ce", {"z_loss": "linear 0 -> 1 over 2.5"}, r"z_loss: warmup_steps=2.5 is neither a share .* nor a whole"),
        ("ce", {"z_loss": "constant 1 over 5"}, r"z_loss: warmup_steps=5.0 has no effect on schedule='constant'"),
        ("ce", {"z_loss": {"schedule": "constant", "start": 1, "end": 2}}, r"z_loss: start=1 contradicts .*end=2"),
        ("ce", ["z_loss"], r"knob_schedules=\['z_loss'\] should be keys with values"),
    ],
)  # fmt: skip
def test_refused(rule: str, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_knob_schedules(given, rule)
    assert str(caught.value).startswith("knob_schedules")


@pytest.mark.usefixtures("schedule_registry")
def test_a_schedule_of_ones_own_that_leaves_the_range_is_stopped() -> None:
    register_alpha_schedule("wild")(lambda step, span, options, history: 2.0 if step == 3 else 0.5)
    given = {"gce_q": {"schedule": "wild", "start": 0.5, "end": 1}}
    schedule = parse_knob_schedules(given, "gce")["gce_q"]
    assert schedule(2, 10) == 0.5
    with pytest.raises(ValueError, match=r"the 'wild' schedule gave gce_q=2.0 at step 3, but it must lie in \(0, 1\]"):
        schedule(3, 10)


# ---- DPSMLoss ------------------------------------------------------------------------------------------------------


def test_dpsm_loss_schedules_any_number() -> None:
    logits, targets = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 4, 0, 8])
    criterion = DPSMLoss(
        9, scoring_rule="focal", knob_schedules={"focal_gamma": "linear 0 -> 2 over 4"}, warmup_steps=1
    )
    for gamma in (0.5, 1.0, 1.5, 2.0, 2.0):  # a call counts itself
        expected = reference_loss(logits, targets, "focal", focal_gamma=gamma).mean().item()
        assert criterion(logits, targets).item() == pytest.approx(expected, rel=1e-5)
    mixed = DPSMLoss(9, warmup_steps=2, knob_schedules={"label_smoothing_factor": "linear 0 -> 0.2 over 2"})
    expected = reference_loss(logits, targets, "dpsm", alpha=0.5, label_smoothing=0.1).mean().item()
    assert mixed(logits, targets).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knob_schedules": {"z_loss": FEEDBACK}}, r"z_loss: feedback is not for here: use DPSMTrainer"),
        ({"knob_schedules": {"alpha": "linear 0 -> 1"}}, r"alpha: linear is not for here: alpha's is schedule"),
        ({"knob_schedules": {"z_loss": "linear 0 -> 1 over 9"}, "z_loss": 0.1}, r"z_loss, which is given a value too"),
        ({"knob_schedules": {"z_loss": "linear 0 -> 1"}}, r"warmup is 0.1, a share of all steps"),
        ({"schedule": parse_knob_schedules({"z_loss": "constant 1"}, "ce")["z_loss"]}, r"schedule moves z_loss, not"),
    ],
)
def test_dpsm_loss_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPSMLoss(9, **options)
