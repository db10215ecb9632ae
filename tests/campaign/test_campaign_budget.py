"""What a campaign may spend, and which ablations are stopped: on records made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dpsm_hf.campaign.runner import budget
from dpsm_hf.campaign.runner.budget import Pruning
from dpsm_hf.campaign.runner.launching import Workplace
from dpsm_hf.campaign.runner.lock import RunnerError
from dpsm_hf.campaign.runner.progress import Progress, duration, run_names
from dpsm_hf.campaign.runner.records import Record
from dpsm_hf.campaign.spec.design import Budget, Campaign, Point
from tests.campaign.campaigns import make_campaign, run_of

ARGUMENTS = {"max_steps": 100, "eval_strategy": "steps", "eval_steps": 10, "block_size": 8}


def record(
    campaign: Campaign, variation: str, seconds: float | None, status: str = "ok", seed: int = 1, **more: Any
) -> Record:
    run_id = run_of(campaign, variation, seed)
    run = campaign.runs[run_id]
    return Record(
        run_id, run_names(campaign)[run_id], run.task, run.arguments, status,
        efficiency={"train_seconds": seconds}, **more,
    )  # fmt: skip


def by_id(*records: Record) -> dict[str, Record]:
    return {r.run_id: r for r in records}


def pruning(campaign: Campaign, records: dict[str, Record], folder: Path, said: list[str] | None = None) -> Pruning:
    place = Workplace(campaign, folder, run_names(campaign), records)
    return Pruning(place, (said if said is not None else []).append)


# ---- the limit ------------------------------------------------------------------------------------------------------


def test_the_limit_is_a_multiple_of_measured_reference_runs() -> None:
    campaign = make_campaign(ARGUMENTS, ("ce", "brier"), ablations=("dpsm", "focal"), budget=Budget(limit=1.1))
    assert budget.ledger(campaign, {}, run_of(campaign, "dpsm")) is None  # nothing measured, nothing to say
    records = by_id(record(campaign, "ce", 100.0), record(campaign, "brier", 130.0))
    account = budget.ledger(campaign, records, run_of(campaign, "dpsm"))
    assert account is not None
    assert account.allowed == pytest.approx(1.1 * 4 * 100)
    assert account.spent == 230 and account.needed == 100 and account.reserved == 0
    assert account.fits


def test_main_runs_are_reserved_for_and_never_left_out(tmp_path: Path) -> None:
    campaign = make_campaign(ARGUMENTS, ("ce", "brier"), ablations=("dpsm",), seeds=(1, 2), budget=Budget(limit=0.7))
    records = by_id(record(campaign, "ce", 100.0), record(campaign, "brier", 100.0))
    said: list[str] = []
    rules = pruning(campaign, records, tmp_path, said)
    # 420 s are allowed; 200 are spent and 200 kept for the main runs of the second seed
    left_out = rules.left_out(run_of(campaign, "dpsm"), ())
    assert left_out is not None and left_out.status == "pruned"
    assert left_out.decision["kind"] == "limit" and left_out.decision["allowed_seconds"] == 420
    assert left_out.decision["reserved_seconds"] == 200 and "left out" in left_out.message
    records |= by_id(record(campaign, "ce", 300.0, seed=2))  # the reference itself has become slow
    assert rules.left_out(run_of(campaign, "brier", 2), ()) is None
    assert not said
    records |= by_id(record(campaign, "brier", 900.0))
    assert rules.left_out(run_of(campaign, "brier", 2), ()) is None
    assert "never left out" in said[0]
    rules.left_out(run_of(campaign, "brier", 2), ())
    assert len(said) == 1


def test_without_ablations_the_budget_decides_nothing_and_nobody_is_told(tmp_path: Path) -> None:
    # as in the demo, whose file has no budget
    campaign = make_campaign(ARGUMENTS, ("ce", "brier"), seeds=(1, 2), budget=Budget())
    records = by_id(record(campaign, "ce", 100.0), record(campaign, "brier", 900.0))
    said: list[str] = []
    assert pruning(campaign, records, tmp_path, said).left_out(run_of(campaign, "brier", 2), ()) is None
    assert not said


def test_a_slow_variation_is_expected_to_stay_slow() -> None:
    campaign = make_campaign(ARGUMENTS, ("ce",), ablations=("dpsm",), seeds=(1, 2), budget=Budget(limit=1.2))
    records = by_id(
        record(campaign, "ce", 100.0), record(campaign, "dpsm", 180.0), record(campaign, "ce", 100, seed=2)
    )
    account = budget.ledger(campaign, records, run_of(campaign, "dpsm", 2))
    assert account is not None and account.needed == pytest.approx(180)
    assert not account.fits


def test_what_an_interrupted_run_has_done_is_not_needed_again() -> None:
    campaign = make_campaign(ARGUMENTS, ("ce",), ablations=("dpsm",), budget=Budget(limit=1.0))
    records = by_id(record(campaign, "ce", 100.0), record(campaign, "dpsm", 60.0, "interrupted"))
    account = budget.ledger(campaign, records, run_of(campaign, "dpsm"))
    assert account is not None and account.spent == 160 and account.needed == 40 and account.fits


def test_the_reference_of_the_same_length_stands_in() -> None:
    campaign = make_campaign(ARGUMENTS, ("ce", "dpsm"))
    other = Point("warm-up", "dpsm", "tiny", "reference", 1, run_of(campaign, "dpsm"), {"warmup_steps": 0.2})
    longer = make_campaign({**ARGUMENTS, "max_steps": 300}, ("dpsm",))
    far = Point("long", "dpsm", "tiny", "reference", 1, run_of(longer, "dpsm"))
    run_ids = {other.run_id: campaign.runs[other.run_id], far.run_id: longer.runs[far.run_id]}
    campaign = Campaign(
        **{**vars(campaign), "points": (campaign.points[0], other, far), "runs": {**campaign.runs, **run_ids}}
    )
    found = budget.reference_seconds(campaign, by_id(record(campaign, "ce", 50.0)))
    assert found[other.run_id] == 50
    assert far.run_id not in found
    assert budget.awaited_references(campaign, other.run_id) == [run_of(campaign, "ce")]
    assert budget.awaited_references(campaign, far.run_id) == []


def test_a_run_of_a_main_point_and_an_ablation_is_main() -> None:
    campaign = make_campaign(ARGUMENTS, ("ce",), ablations=("dpsm",))
    assert run_of(campaign, "dpsm") in budget.prunable_runs(campaign)
    shared = Point("other", "ce", "tiny", "reference", 1, run_of(campaign, "dpsm"))
    campaign = Campaign(**{**vars(campaign), "points": (*campaign.points, shared)})
    assert run_of(campaign, "dpsm") not in budget.prunable_runs(campaign)
    assert budget.cohorts(Campaign(**{**vars(campaign), "budget": Budget(halving_metric="nll")})) == []


def test_ablations_wait_for_the_reference(tmp_path: Path) -> None:
    campaign = make_campaign(ARGUMENTS, ("ce",), ablations=("dpsm",))
    records: dict[str, Record] = {}
    rules = pruning(campaign, records, tmp_path)
    ce, dpsm = run_of(campaign, "ce"), run_of(campaign, "dpsm")
    assert rules.waits(dpsm, None, {ce}, lambda run_id: False)
    assert rules.waits(dpsm, None, (), lambda run_id: run_id == ce)
    assert not rules.waits(dpsm, None, (), lambda run_id: False)  # it will never be known
    assert not rules.waits(ce, None, (), lambda run_id: True)
    records |= by_id(record(campaign, "ce", 10.0))
    assert not rules.waits(dpsm, None, {ce}, lambda run_id: True)


# ---- successive halving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figures", "keep", "kept"),
    [
        ({"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0}, 0.5, ["b", "c"]),
        ({"a": 3.0, "b": 1.0, "c": 2.0}, 0.5, ["b", "c"]),  # the worse half of three is one
        ({"a": 1.0, "b": 1.0}, 0.5, ["a", "b"]),  # nothing tells them apart
        ({"a": 2.0, "b": 1.0, "c": 2.0, "d": 3.0}, 0.5, ["a", "b", "c"]),
        ({"a": math.inf, "b": 9.0}, 0.5, ["b"]),
        ({"a": math.inf, "b": math.inf}, 0.1, ["a"]),
        ({"a": 2.0}, 0.5, ["a"]),
        ({str(i): float(i) for i in range(10)}, 0.3, ["0", "1", "2"]),
    ],
)
def test_survivors(figures: dict[str, float], keep: float, kept: list[str]) -> None:
    assert budget.survivors(figures, keep) == kept


HALVING = Budget(limit=100.0, halving_metric="nll", halving_rungs=(0.25, 0.5), halving_keep=0.5)
ABLATIONS = ("dpsm", "focal", "spherical", "fixed")


def at_rung(campaign: Campaign, variation: str, figure: float | None, rung: int = 0, **more: Any) -> Record:
    steps = [30, 50][: rung + 1]
    return record(
        campaign, variation, 10.0, "paused",
        history=[{"step": step, "eval_nll": figure} for step in steps],
        attempts=[{"rung": r, "status": "paused", "to_step": step} for r, step in enumerate(steps)],
        **more,
    )  # fmt: skip


def test_the_worse_half_is_stopped_once_all_are_there(tmp_path: Path) -> None:
    campaign = make_campaign(ARGUMENTS, ("ce",), ablations=ABLATIONS, seeds=(1, 2), budget=HALVING)
    records = by_id(*(at_rung(campaign, v, f) for v, f in zip(ABLATIONS, (3.0, None, 1.5), strict=False)))
    rules = pruning(campaign, records, tmp_path)
    fixed = run_of(campaign, "fixed")
    assert rules.next_rung(fixed) == 0 and rules.next_rung(run_of(campaign, "ce")) is None
    assert rules.decide((), lambda run_id: run_id == fixed) == {}
    assert rules.decide({fixed}, lambda run_id: False) == {}
    records |= by_id(at_rung(campaign, "fixed", 1.0))
    decided = rules.decide((), lambda run_id: False)
    assert {records[i].name.split("/")[0]: r.status for i, r in decided.items()} == {
        "dpsm": "pruned", "focal": "pruned", "spherical": "paused", "fixed": "paused",
    }  # fmt: skip
    stopped = decided[run_of(campaign, "focal")]
    assert stopped.decision["figures"] == {
        "dpsm/tiny/reference/seed-1": 3.0, "focal/tiny/reference/seed-1": None,
        "spherical/tiny/reference/seed-1": 1.5, "fixed/tiny/reference/seed-1": 1.0,
    }  # fmt: skip
    assert stopped.decision["rung"] == 0 and stopped.decision["step"] == 30
    assert "nll not finite; of 4 compared, 2 went on: spherical 1.5, fixed 1 (at 0.25 of" in stopped.message
    assert "best 0.5 of the ablations" in stopped.message
    assert budget.rung_done(decided[fixed]) == 1


def test_a_decision_that_was_half_written_comes_out_the_same(tmp_path: Path) -> None:
    campaign = make_campaign(ARGUMENTS, ("ce",), ablations=ABLATIONS, budget=HALVING)
    records = by_id(*(at_rung(campaign, v, f) for v, f in zip(ABLATIONS, (3.0, 4.0, 1.5, 1.0), strict=True)))
    whole = pruning(campaign, records, tmp_path).decide((), lambda run_id: False)
    for written in range(1, len(whole)):
        part = {**records, **dict(list(whole.items())[:written])}
        rest = pruning(campaign, part, tmp_path).decide((), lambda run_id: False)
        assert {**part, **rest} == {**records, **whole}
    assert pruning(campaign, {**records, **whole}, tmp_path).decide((), lambda run_id: False) == {}


def test_the_second_rung_compares_those_that_are_left(tmp_path: Path) -> None:
    campaign = make_campaign(ARGUMENTS, ("ce",), ablations=ABLATIONS, budget=HALVING)
    records = by_id(*(at_rung(campaign, v, f) for v, f in zip(ABLATIONS, (3.0, 4.0, 1.5, 1.0), strict=True)))
    records |= pruning(campaign, records, tmp_path).decide((), lambda run_id: False)
    kept = {i: r for i, r in records.items() if r.status == "paused"}
    records |= by_id(*(
        at_rung(campaign, r.name.split("/")[0], f, 1, decision=r.decision)
        for r, f in zip(kept.values(), (1.2, 1.3), strict=True)
    ))  # fmt: skip
    decided = pruning(campaign, records, tmp_path).decide((), lambda run_id: False)
    assert [(records[i].name.split("/")[0], r.status, r.decision["step"]) for i, r in decided.items()] == [
        ("spherical", "paused", 50), ("fixed", "pruned", 50),
    ]  # fmt: skip
    rules = pruning(campaign, {**records, **decided}, tmp_path)
    assert rules.next_rung(run_of(campaign, "spherical")) is None


def test_one_that_has_come_further_is_compared_rung_by_rung(tmp_path: Path) -> None:
    campaign = make_campaign(ARGUMENTS, ("ce",), ablations=ABLATIONS[:2], budget=HALVING)
    # both were interrupted at step 60, before there was a rule
    records = by_id(*(
        record(
            campaign, variation, 10.0, "interrupted",
            history=[{"step": 30, "eval_nll": at_30}, {"step": 50, "eval_nll": at_50}],
        )
        for variation, at_30, at_50 in (("dpsm", 1.0, 3.0), ("focal", 2.0, 2.0))
    ))  # fmt: skip
    for run_id in records:
        checkpoint = tmp_path / "runs" / run_id / "checkpoint-60"
        checkpoint.mkdir(parents=True)
        state = {"global_step": 60, "max_steps": 100, "eval_steps": 10}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    decided = pruning(campaign, records, tmp_path).decide((), lambda run_id: False)
    assert {r.decision["rung"] for r in decided.values()} == {0}
    assert decided[run_of(campaign, "focal")].status == "pruned"
    assert decided[run_of(campaign, "dpsm")].status == "interrupted"  # and goes on


def test_one_that_failed_is_not_waited_for_and_meets_the_rule_later(tmp_path: Path) -> None:
    campaign = make_campaign(ARGUMENTS, ("ce",), ablations=ABLATIONS[:3], budget=HALVING)
    records = by_id(at_rung(campaign, "dpsm", 3.0), at_rung(campaign, "focal", 2.0))
    records |= by_id(record(campaign, "spherical", 1.0, "failed"))
    decided = pruning(campaign, records, tmp_path).decide((), lambda run_id: False)
    assert {records[i].name.split("/")[0]: r.status for i, r in decided.items()} == {
        "dpsm": "pruned",
        "focal": "paused",
    }
    records |= decided | by_id(at_rung(campaign, "spherical", 2.5))
    late = pruning(campaign, records, tmp_path).decide((), lambda run_id: False)
    assert [r.status for r in late.values()] == ["paused"]  # second of three: within the better half, rounded up


def test_seeds_and_settings_are_compared_separately() -> None:
    campaign = make_campaign(ARGUMENTS, ("ce",), ablations=ABLATIONS[:2], seeds=(1, 2), budget=HALVING)
    assert [len(cohort.members) for cohort in budget.cohorts(campaign)] == [2, 2]
    alone = make_campaign(ARGUMENTS, ("ce",), ablations=("dpsm",), budget=HALVING)
    assert budget.cohorts(alone) == []
    assert budget.cohorts(make_campaign(ARGUMENTS, ("ce",), ablations=ABLATIONS)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"halving_rungs": (0.5, 0.25)}, "rising shares"),
        ({"halving_rungs": (0.5, 1.0)}, "rising shares"),
        ({"halving_keep": 1.0}, "between 0 and 1"),
    ],
)
def test_halving_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**{**vars(HALVING), **changes})


def test_halving_needs_evaluations_by_steps() -> None:
    arguments = {**ARGUMENTS, "eval_strategy": "epoch"}
    campaign = make_campaign(arguments, ("ce",), ablations=ABLATIONS[:2], budget=HALVING)
    with pytest.raises(RunnerError, match="eval_strategy='epoch'"):
        budget.check_halving(campaign)


def test_a_metric_that_no_evaluation_has(tmp_path: Path) -> None:
    campaign = make_campaign(
        ARGUMENTS, ("ce",), ablations=ABLATIONS[:2], budget=Budget(limit=100, halving_metric="eval_ece_99")
    )
    records = by_id(at_rung(campaign, "dpsm", 1.0), at_rung(campaign, "focal", 1.0))
    with pytest.raises(RunnerError, match=r"'eval_ece_99' is in no evaluation of dpsm.*it has eval_nll"):
        pruning(campaign, records, tmp_path).decide((), lambda run_id: False)


# ---- times ----------------------------------------------------------------------------------------------------------


def test_times_for_people() -> None:
    assert [duration(s) for s in (0, 59.4, 59.6, 3599, 7500)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "59 min 59 s",
        "2 h 05 min",
    ]


def test_the_rest_is_estimated_from_what_is_done() -> None:
    campaign = make_campaign(ARGUMENTS, ("ce", "brier", "dpsm"))
    progress = Progress(campaign, campaign.order, run_names(campaign))
    assert progress.left({}, campaign.order, 1) is None
    done = record(campaign, "ce", 80.0, attempts=[{"seconds": 40.0}, {"seconds": None}, {"seconds": 60.0}])
    half = record(campaign, "brier", 80.0, "interrupted", attempts=[{"seconds": 30.0}])
    assert progress.left(by_id(done, half), campaign.order[1:], 1) == pytest.approx(70 + 100)
    assert progress.left(by_id(done, half), campaign.order[1:], 2) == pytest.approx(85)
