"""The time budget of a campaign: which runs have to wait, which are left out, which ablations are stopped early.

The limit is a multiple of the training time of as many runs of the reference, as measured:

    allowed = limit * sum over the planned runs of the reference's training seconds in the same setting

Training seconds are those of the Trainer's log, without evaluation. Ablations that do not fit are left out; they are
considered in the order of the plan, so the last ones go first. Main variations are never left out.

Successive halving stops ablations that are behind at a rung: those of one setting and seed are trained to the same
step and compared by a metric of the regular evaluation there. The choice depends on these values only, so it is the
same whenever the runner was killed in between.

Source: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from ...runtime.files import json_number
from ...tasks.steps import stop_step
from ..spec.design import Budget, Campaign, Point, Setting
from .collecting import newest_state
from .launching import Workplace, run_folder
from .lock import RunnerError
from .progress import duration
from .records import SETTLED, Record


def training_seconds(record: Record | None) -> float | None:
    """Return the seconds a run has trained so far, without evaluation; None if they were not measured."""
    return record.efficiency.get("train_seconds") if record is not None else None


def prunable_runs(campaign: Campaign) -> set[str]:
    """Return the ids of the runs that may be left out: those that belong to ablations only."""
    main = {variation.name for variation in campaign.variations if variation.role == "main"}
    needed = {point.run_id for point in campaign.points if point.variation in main}
    return {point.run_id for point in campaign.points} - needed


# ---- the limit -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ledger:
    """The training time that a campaign may spend, has spent and still has to spend, in seconds."""

    allowed: float  # for all planned runs
    spent: float  # by all runs so far
    reserved: float  # what main runs and running ones still need
    needed: float  # what the run to be started needs
    counted: int  # runs for which the reference's time is known

    @property
    def fits(self) -> bool:
        """Return whether the run to be started fits into the budget."""
        return self.spent + self.reserved + self.needed <= self.allowed


def reference_seconds(campaign: Campaign, records: Mapping[str, Record]) -> dict[str, float]:
    """Return for each run, by id, the mean training time in seconds of the reference's finished runs in its setting.

    If there are none, of those of the same size, data and length; runs without either are missing in the result.
    """
    by_setting: dict[Setting, list[float]] = {}
    by_length: dict[tuple[Any, ...], list[float]] = {}
    for point in campaign.points:
        seconds = training_seconds(records.get(point.run_id))
        if point.variation == campaign.reference and seconds and records[point.run_id].status == "ok":
            by_setting.setdefault(point.setting, []).append(seconds)
            by_length.setdefault(campaign.length(point), []).append(seconds)
    found = {}
    for run_id, point in campaign.planned_points.items():
        times = by_setting.get(point.setting) or by_length.get(campaign.length(point))
        if times:
            found[run_id] = fmean(times)
    return found


def awaited_references(campaign: Campaign, run_id: str) -> list[str]:
    """Return the ids of the reference's runs from whose time the time of a run can be estimated."""
    points = campaign.planned_points

    def comparable(at: Point, point: Point) -> bool:
        return at.setting == point.setting or campaign.length(at) == campaign.length(point)

    others = [i for i, at in points.items() if at.variation == campaign.reference and i != run_id]
    return [i for i in others if comparable(points[i], points[run_id])] if run_id in points else []


def ledger(
    campaign: Campaign, records: Mapping[str, Record], run_id: str, active: Iterable[str] = ()
) -> Ledger | None:
    """Return the ledger before a run is started; None as long as the reference's time for it is not known.

    Args:
        campaign: the campaign.
        records: all records, by run id.
        run_id: the run to be started.
        active: ids of the running ones.
    """
    reference = reference_seconds(campaign, records)
    if run_id not in reference:
        return None
    points, prunable, under_way = campaign.planned_points, prunable_runs(campaign), set(active)
    ratios: dict[str, list[float]] = {}
    for other, seconds in reference.items():
        own = training_seconds(records.get(other))
        if own and records[other].status == "ok":
            ratios.setdefault(points[other].variation, []).append(own / seconds)

    def left(other: str) -> float:
        # a variation without a measured run is assumed to be as fast as the reference
        whole = reference[other] * fmean(ratios.get(points[other].variation, [1.0]))
        return max(0.0, whole - (training_seconds(records.get(other)) or 0.0))

    kept_for = [other for other in reference if other in under_way or other not in prunable]
    open_ones = [i for i in kept_for if i != run_id and (i not in records or records[i].status not in SETTLED)]
    return Ledger(
        allowed=campaign.budget.limit * sum(reference.values()),
        spent=sum(training_seconds(records.get(other)) or 0.0 for other in reference),
        reserved=sum(map(left, open_ones)),
        needed=left(run_id),
        counted=len(reference),
    )


def _limit_decision(campaign: Campaign, account: Ledger) -> tuple[dict[str, Any], str]:
    """Return the decision for the record of a run that is left out, and its message."""
    rule = (
        f"all runs together train at most {campaign.budget.limit:g} times as long as as many runs of "
        f"{campaign.reference}, measured; ablations that do not fit in are left out"
    )
    seconds = {kind: round(getattr(account, kind), 1) for kind in ("allowed", "spent", "reserved", "needed")}
    shown = {kind: f"{value:,.0f} s" if value >= 10 else f"{value:.1f} s" for kind, value in seconds.items()}
    message = (
        f"left out: it needs {shown['needed']}, and with {shown['spent']} spent and {shown['reserved']} kept for main "
        f"variations and runs under way that exceeds the {shown['allowed']} allowed; {rule}"
    )
    written = {f"{kind}_seconds": value for kind, value in seconds.items()}
    return {"kind": "limit", "rule": rule, **written, "runs_counted": account.counted}, message


# ---- successive halving --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cohort:
    """Ablations of one setting and seed, which halving compares with each other."""

    setting: str
    members: tuple[str, ...]


def cohorts(campaign: Campaign) -> list[Cohort]:
    """Return the cohorts that halving compares, each of at least two runs; main runs are in none."""
    if campaign.budget.halving_metric is None:
        return []
    compared = prunable_runs(campaign) - {needed for run in campaign.runs.values() for needed in run.needs}
    groups: dict[tuple[Any, ...], list[str]] = {}
    for run_id, point in campaign.planned_points.items():
        if run_id in compared:
            varied = [f"{key} {value}" for key, value in point.settings.items()]
            words = ", ".join([point.study, point.size, point.data, *varied, f"seed {point.seed}"])
            groups.setdefault((point.setting, point.seed, words), []).append(run_id)
    return [Cohort(key[-1], tuple(members)) for key, members in groups.items() if len(members) > 1]


def check_halving(campaign: Campaign) -> None:
    """Raise RunnerError if halving is to compare ablations that are not evaluated by steps."""
    for run_id in [run_id for cohort in cohorts(campaign) for run_id in cohort.members]:
        strategy = campaign.runs[run_id].arguments.get("eval_strategy")
        if strategy != "steps":
            raise RunnerError(
                f"budget: halving compares evaluations at one step; run {run_id} has eval_strategy={strategy!r}: "
                "set it to steps, with eval_steps, or leave halving_metric out."
            )


def survivors(figures: Mapping[str, float], keep: float) -> list[str]:
    """Return the runs that go on: the share with the lowest values, at least one, and any that equal the last of them.

    Schedules that have not left cross-entropy yet are equal to the last digit. A rung before they do must not choose
    among them by the order of the plan.
    """
    count = max(1, math.ceil(round(len(figures) * keep, 6)))
    ranked = sorted(figures, key=figures.__getitem__)  # stable: among infinite values the order of the plan decides
    last = figures[ranked[count - 1]]
    return [i for i in figures if i in ranked[:count] or (figures[i] == last and math.isfinite(last))]


def rung_done(record: Record | None) -> int:
    """Return how many rungs a run has passed, having been compared there."""
    decided: Mapping[str, Any] = record.decision if record is not None else {}
    return int(decided["rung"]) + 1 if decided.get("kind") == "halving" else 0


def _halving_decision(
    budget: Budget, cohort: Cohort, rung: int, step: int, figures: Mapping[str, float], names: Mapping[str, str]
) -> dict[str, Any]:
    """Return the decision for the records of all runs that were compared at a rung (numbered from 0)."""
    rule = (
        f"at {budget.halving_rungs[rung]:g} of the steps the best {budget.halving_keep:g} of the ablations of one "
        f"setting and seed go on, and any equal to the last of them, by {budget.halving_metric} on the validation "
        "split (lower is better)"
    )
    place = {"setting": cohort.setting, "rung": rung, "rungs": len(budget.halving_rungs), "step": step}
    found = {names[run_id]: json_number(value) for run_id, value in figures.items()}
    kept = [names[run_id] for run_id in survivors(figures, budget.halving_keep)]
    return {"kind": "halving", "rule": rule, **place, "metric": budget.halving_metric, "figures": found, "kept": kept}


def _explain_halving(decided: Mapping[str, Any], name: str) -> str:
    figures: Mapping[str, float | None] = decided["figures"]
    shown = {other: "not finite" if value is None else f"{value:.6g}" for other, value in figures.items()}
    # within one setting and seed the variation's name, the first part, is enough
    kept = ", ".join(f"{other.split('/')[0]} {shown[other]}" for other in decided["kept"])
    return (
        f"stopped at step {decided['step']} (rung {decided['rung'] + 1} of {decided['rungs']}): {decided['metric']} "
        f"{shown[name]}; of {len(figures)} compared, {len(decided['kept'])} went on: {kept} ({decided['rule']})"
    )


# ---- limit and halving together ------------------------------------------------------------------------------------


class Pruning:
    """Decide from the records which runs wait, are left out or are stopped; it writes nothing itself.

    Args:
        place: what all runs of the campaign share.
        say: shows a line to the user.
    """

    def __init__(self, place: Workplace, say: Callable[[str], None]) -> None:
        self._campaign, self._directory, self._names = place.campaign, place.directory, place.names
        self._records, self._say = place.records, say
        self._prunable, self._cohorts = prunable_runs(place.campaign), cohorts(place.campaign)
        self._members = {run_id for cohort in self._cohorts for run_id in cohort.members}
        self._warned = False

    # ---- before a start

    def next_rung(self, run_id: str) -> int | None:
        """Return the number of the rung that a run has to pause at next; None if it may run to the end."""
        rung = rung_done(self._records.get(run_id))
        return rung if run_id in self._members and rung < len(self._campaign.budget.halving_rungs) else None

    def waits(self, run_id: str, rung: int | None, active: Collection[str], may_start: Callable[[str], bool]) -> bool:
        """Return whether a run has to wait: at a rung for the others, or until the reference's time is measured."""
        if rung is not None and self._reached(run_id, rung, active) is not None:
            return True
        if run_id not in self._prunable or run_id in reference_seconds(self._campaign, self._records):
            return False
        return any(other in active or may_start(other) for other in awaited_references(self._campaign, run_id))

    def left_out(self, run_id: str, active: Collection[str]) -> Record | None:
        """Return the record of a run to be left out of the budget; None if it fits or is never left out."""
        account = ledger(self._campaign, self._records, run_id, active)
        if account is None or account.fits:
            return None
        if run_id in self._prunable:
            return self._pruned(run_id, *_limit_decision(self._campaign, account))
        if self._prunable and not self._warned:  # a budget without ablations decides nothing, so that nobody asks
            self._warned = True
            more = duration(account.reserved + account.needed)
            self._say(
                f"Note: training will take longer than the budget of {duration(account.allowed)}: "
                f"{duration(account.spent)} are spent, and main variations, which are never left out, need {more} "
                "more. They go on; ablations that do not fit are left out."
            )
        return None

    def _pruned(self, run_id: str, decided: dict[str, Any], message: str) -> Record:
        run = self._campaign.runs[run_id]
        record = self._records.get(run_id) or Record(run_id, self._names[run_id], run.task, dict(run.arguments))
        return replace(record, status="pruned", message=message, decision=decided)

    # ---- at a rung

    def decide(self, active: Collection[str], may_start: Callable[[str], bool]) -> dict[str, Record]:
        """Return new records, with the decision, of all runs that can be compared now: those kept and those stopped.

        Raises:
            RunnerError: if no evaluation at the step has the metric.
        """
        found: dict[str, Record] = {}
        rungs = range(len(self._campaign.budget.halving_rungs))
        for cohort, rung in [(cohort, rung) for cohort in self._cohorts for rung in rungs]:
            reached = {run_id: self._reached(run_id, rung, active) for run_id in cohort.members}
            steps = {run_id: step for run_id, step in reached.items() if step is not None}
            going_on = [run_id for run_id in steps if self._records[run_id].status not in SETTLED]
            undecided = [run_id for run_id in going_on if rung_done(self._records[run_id]) == rung]
            behind = [run_id for run_id, step in reached.items() if step is None]
            if not undecided or any(run_id in active or may_start(run_id) for run_id in behind):
                continue  # another one may still reach this rung
            step = max(steps[run_id] for run_id in undecided)
            figures = self._figures(steps, undecided, step)
            decided = _halving_decision(self._campaign.budget, cohort, rung, step, figures, self._names)
            for run_id in undecided:
                name = self._names[run_id]
                if name in decided["kept"]:
                    found[run_id] = replace(self._records[run_id], decision=decided)
                else:
                    found[run_id] = self._pruned(run_id, decided, _explain_halving(decided, name))
        return found

    def _figures(self, there: Iterable[str], undecided: Collection[str], step: int) -> dict[str, float]:
        """Return the metric at a step of the runs that reached it; infinity if it is not finite.

        Raises:
            RunnerError: if an undecided run has no such evaluation.
        """
        metric = str(self._campaign.budget.halving_metric)
        key = metric if metric.startswith("eval_") else f"eval_{metric}"
        figures = {}
        for run_id in there:
            record = self._records[run_id]
            at_step = [entry for entry in record.history if entry.get("step") == step]
            found = [entry[key] for entry in at_step if key in entry]
            if found:
                figures[run_id] = float(found[0]) if found[0] is not None and math.isfinite(found[0]) else math.inf
            elif run_id in undecided:  # a run that went past the rung need not have been evaluated there
                names = sorted({name for entry in at_step for name in entry if name.startswith("eval_")})
                said = f"it has {', '.join(names)}" if names else "there is none"
                raise RunnerError(
                    f"budget: halving_metric {metric!r} is in no evaluation of {record.name} at step {step}: {said}."
                )
        return figures

    def _reached(self, run_id: str, rung: int, active: Collection[str]) -> int | None:
        """Return the step of a rung if a run has reached it, paused there or not; else None."""
        record = self._records.get(run_id)
        if record is None or run_id in active:
            return None
        stops = (a for a in record.attempts if a.get("rung") == rung and a.get("status") == "paused")
        stopped = next((int(attempt["to_step"]) for attempt in stops), None)
        if stopped is not None or record.status == "pruned":
            return stopped
        state = newest_state(run_folder(self._directory, run_id))
        if not state.get("max_steps"):
            return None
        step = stop_step(self._campaign.budget.halving_rungs[rung], state["max_steps"], state.get("eval_steps"))
        return step if state["global_step"] >= step else None
