"""Successive halving: ablations that are behind at a rung are stopped, by a rule that can be written down.

Ablations of one setting and seed are trained to the same step and compared by the same metric of a regular evaluation
there. Which are stopped follows from the figures alone, so that it comes out the same whenever the runner is killed.

Source: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..spec.design import Budget, Campaign, Point
from .lock import RunnerError
from .records import Record


@dataclass(frozen=True)
class Cohort:
    """Ablations that are compared with each other.

    Args:
        setting: what they have in common, in words.
        members: ids of their runs, in the order of the plan.
    """

    setting: str
    members: tuple[str, ...]


def cohorts(campaign: Campaign) -> list[Cohort]:
    """Return the groups of runs that halving compares; a group of one is none, and main runs are in no group.

    Args:
        campaign: the campaign.
    """
    if campaign.budget.halving_metric is None:
        return []
    role = {variation.name: variation.role for variation in campaign.variations}
    main = {point.run_id for point in campaign.points if role[point.variation] == "main"}
    kept = main | {needed for run in campaign.runs.values() for needed in run.needs}
    groups: dict[tuple[Any, ...], tuple[Point, dict[str, None]]] = {}
    placed: set[str] = set()
    for point in campaign.points:
        if point.run_id in kept or point.run_id in placed or point.scaled:
            continue
        placed.add(point.run_id)
        groups.setdefault((point.setting, point.seed), (point, {}))[1][point.run_id] = None
    return [Cohort(in_words(point), tuple(members)) for point, members in groups.values() if len(members) > 1]


def in_words(point: Point) -> str:
    """Return the setting and seed of a point in words.

    Args:
        point: of the plan.
    """
    varied = [f"{key} {value}" for key, value in point.settings.items()]
    return ", ".join([point.study, point.size, point.data, *varied, f"seed {point.seed}"])


def check_halving(campaign: Campaign) -> None:
    """Look whether the ablations are evaluated where halving is to compare them.

    Args:
        campaign: the campaign.

    Raises:
        RunnerError: evaluations are not by steps, or a rung or the kept share is no share.
    """
    budget = campaign.budget
    if budget.halving_metric is None:
        return
    rungs = budget.halving_rungs
    if list(rungs) != sorted(set(rungs)) or not all(0 < rung < 1 for rung in rungs):
        raise RunnerError(f"budget: halving_rungs {list(rungs)} must be rising shares of the steps between 0 and 1.")
    if not 0 < budget.halving_keep < 1:
        raise RunnerError(f"budget: halving_keep {budget.halving_keep} must lie between 0 and 1.")
    for cohort in cohorts(campaign):
        for run_id in cohort.members:
            strategy = campaign.runs[run_id].arguments.get("eval_strategy")
            if strategy != "steps":
                raise RunnerError(
                    f"budget: halving compares evaluations at one step; run {run_id} has eval_strategy={strategy!r}: "
                    "set it to steps, with eval_steps, or leave halving_metric out."
                )


def figure_at(record: Record, metric: str, step: int) -> float:
    """Return a figure of the evaluation at a step, infinity where it is not finite.

    Args:
        record: of the run.
        metric: with or without the prefix ``eval_``; lower is better.
        step: of the optimizer.

    Raises:
        RunnerError: no evaluation at that step has the metric.
    """
    key = metric if metric.startswith("eval_") else f"eval_{metric}"
    found = [entry for entry in record.history if entry.get("step") == step]
    for entry in found:
        if key in entry:
            value = entry[key]
            return float(value) if value is not None and math.isfinite(value) else math.inf
    names = sorted({name for entry in found for name in entry if name.startswith("eval_")})
    said = f"it has {', '.join(names)}" if names else "there is none"
    raise RunnerError(
        f"budget: halving_metric {metric!r} is in no evaluation of {record.name} at step {step}: {said}."
    )


def has_figure(record: Record, metric: str, step: int) -> bool:
    """Return whether a run was evaluated at a step with the metric.

    Args:
        record: of the run.
        metric: with or without the prefix ``eval_``.
        step: of the optimizer.
    """
    key = metric if metric.startswith("eval_") else f"eval_{metric}"
    return any(entry.get("step") == step and key in entry for entry in record.history)


def survivors(figures: Mapping[str, float], keep: float) -> list[str]:
    """Return the runs that go on: the best share, at least one, and those that equal the last of them.

    Equal to the last digit are schedules that have not left cross-entropy yet: a rung before they do cannot tell them
    apart, and must not choose among them by the order of the plan.

    Args:
        figures: by run id, in the order of the plan; lower is better.
        keep: share that is kept, rounded up.
    """
    count = max(1, math.ceil(round(len(figures) * keep, 6)))
    ranked = sorted(figures, key=figures.__getitem__)  # a stable sort: of those not finite the earlier in the plan
    last = figures[ranked[count - 1]]
    return [i for i in figures if i in ranked[:count] or (figures[i] == last and math.isfinite(last))]


def decision(
    budget: Budget, cohort: Cohort, rung: int, step: int, figures: Mapping[str, float], names: Mapping[str, str]
) -> dict[str, Any]:
    """Return what is written into the records of all runs that were compared at a rung.

    Args:
        budget: with the rule.
        cohort: the runs that belong together.
        rung: number of the rung, from 0.
        step: of the optimizer at which they were compared.
        figures: by run id, in the order of the plan.
        names: of the runs, by id.
    """
    kept = survivors(figures, budget.halving_keep)
    return {
        "kind": "halving",
        "rule": f"at {budget.halving_rungs[rung]:g} of the steps the best {budget.halving_keep:g} of the ablations of "
        f"one setting and seed go on, and any equal to the last of them, by {budget.halving_metric} on the validation "
        "split (lower is better)",
        "setting": cohort.setting,
        "rung": rung,
        "rungs": len(budget.halving_rungs),
        "step": step,
        "metric": budget.halving_metric,
        "figures": {names[run_id]: value if math.isfinite(value) else None for run_id, value in figures.items()},
        "kept": [names[run_id] for run_id in kept],
    }


def explain(decided: Mapping[str, Any], name: str) -> str:
    """Return the sentence for a run that was stopped.

    Args:
        decided: of `decision`.
        name: of the run.
    """
    figures: Mapping[str, float | None] = decided["figures"]

    def shown(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.6g}"

    # one setting and seed: the variation's name, which comes first, tells them apart
    kept = ", ".join(f"{other.split('/')[0]} {shown(figures[other])}" for other in decided["kept"])
    return (
        f"stopped at step {decided['step']} (rung {decided['rung'] + 1} of {decided['rungs']}): {decided['metric']} "
        f"{shown(figures[name])}; of {len(figures)} compared, {len(decided['kept'])} went on: {kept} "
        f"({decided['rule']})"
    )


def rung_done(record: Record | None) -> int:
    """Return how many rungs a run has passed: where it was compared and goes on.

    Args:
        record: of the run.
    """
    decided: Mapping[str, Any] = record.decision if record is not None else {}
    return int(decided["rung"]) + 1 if decided.get("kind") == "halving" else 0


def reached_rung(record: Record | None, rung: int) -> int | None:
    """Return the step at which a run has stopped for a rung, None where it has not.

    Args:
        record: of the run.
        rung: number of the rung, from 0.
    """
    if record is None:
        return None
    stops: Sequence[Mapping[str, Any]] = [a for a in record.attempts if a.get("rung") == rung]
    return next((int(a["to_step"]) for a in stops if a.get("status") == "paused"), None)
