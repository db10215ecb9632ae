"""The time a campaign may take: a multiple of what as many runs of the reference take, by the clock of their records.

    allowed = limit * sum over the planned runs of the reference's training seconds in the same setting

Training seconds are those of the Trainer's log, evaluation excluded. What does not fit is left out: ablations, and
since they are asked in the order of the plan, the last ones first. Main variations are never left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..spec.design import Campaign, Point
from .records import SETTLED, Record

# What decides how long a run of one size on one data set trains.
_LENGTH = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "block_size",
    "max_train_samples",
    "low_resource",
)


@dataclass(frozen=True)
class Ledger:
    """What a campaign may spend, has spent and still has to spend, in seconds of training.

    Args:
        allowed: for all planned runs.
        spent: by all runs so far.
        reserved: for what main runs and those under way still need.
        needed: for the run in question.
        counted: runs that the reference's measurement covers.
    """

    allowed: float
    spent: float
    reserved: float
    needed: float
    counted: int

    @property
    def fits(self) -> bool:
        """Return whether the run fits in."""
        return self.spent + self.reserved + self.needed <= self.allowed


def planned_points(campaign: Campaign) -> dict[str, Point]:
    """Return the first point of each run, by run id.

    Args:
        campaign: the campaign.
    """
    found: dict[str, Point] = {}
    for point in campaign.points:
        if not point.scaled:
            found.setdefault(point.run_id, point)
    return found


def prunable(campaign: Campaign, run_id: str) -> bool:
    """Return whether a run may be left out: it stands for ablations only.

    Args:
        campaign: the campaign.
        run_id: of the run.
    """
    roles = {campaign.variation(p.variation).role for p in campaign.points if p.run_id == run_id}
    return roles == {"ablation"}


def reference_seconds(campaign: Campaign, records: Mapping[str, Record]) -> dict[str, float]:
    """Return what the reference took where a run stands: its mean over seeds, by run id; only what is measured.

    That of the same setting, else that of the same size, data and length.

    Args:
        campaign: the campaign.
        records: so far, by run id.
    """
    by_setting: dict[tuple[Any, ...], list[float]] = {}
    by_length: dict[tuple[Any, ...], list[float]] = {}
    for point in campaign.points:
        seconds = training_seconds(records.get(point.run_id))
        if point.variation == campaign.reference and seconds and records[point.run_id].status == "ok":
            by_setting.setdefault(point.setting, []).append(seconds)
            by_length.setdefault(length(campaign, point), []).append(seconds)
    found = {}
    for run_id, point in planned_points(campaign).items():
        times = by_setting.get(point.setting) or by_length.get(length(campaign, point))
        if times:
            found[run_id] = fmean(times)
    return found


def length(campaign: Campaign, point: Point) -> tuple[Any, ...]:
    """Return what decides how long a run trains: runs that agree in it are as long as each other.

    Args:
        campaign: the campaign.
        point: where the run stands.
    """
    arguments = campaign.runs[point.run_id].arguments
    return (point.size, point.data, *(str(arguments.get(name)) for name in _LENGTH))


def awaited_references(campaign: Campaign, run_id: str) -> list[str]:
    """Return the reference's runs that would tell how long a run takes.

    Args:
        campaign: the campaign.
        run_id: of the run.
    """
    points = planned_points(campaign)
    if run_id not in points:
        return []
    point = points[run_id]
    same = [
        other
        for other, at in points.items()
        if at.variation == campaign.reference
        and (at.setting == point.setting or length(campaign, at) == length(campaign, point))
    ]
    return [other for other in same if other != run_id]


def training_seconds(record: Record | None) -> float | None:
    """Return the seconds a run has trained so far, evaluation excluded; None where nothing was measured.

    Args:
        record: of the run.
    """
    return record.efficiency.get("train_seconds") if record is not None else None


def ledger(
    campaign: Campaign, records: Mapping[str, Record], run_id: str, active: Iterable[str] = ()
) -> Ledger | None:
    """Return the account before a run is started; None as long as the reference is not measured where it stands.

    Args:
        campaign: the campaign.
        records: so far, by run id.
        run_id: of the run that is to start.
        active: ids of the runs under way.
    """
    reference = reference_seconds(campaign, records)
    if run_id not in reference:
        return None
    points = planned_points(campaign)
    ratios: dict[str, list[float]] = {}
    for other, seconds in reference.items():
        own = training_seconds(records.get(other))
        if own and records[other].status == "ok":
            ratios.setdefault(points[other].variation, []).append(own / seconds)

    def left(other: str) -> float:
        # A variation of which no run is measured is taken to be as fast as the reference.
        whole = reference[other] * fmean(ratios.get(points[other].variation, [1.0]))
        return max(0.0, whole - (training_seconds(records.get(other)) or 0.0))

    under_way = set(active)
    reserved = sum(
        left(other)
        for other in reference
        if other != run_id
        and (other not in records or records[other].status not in SETTLED)
        and (other in under_way or not prunable(campaign, other))
    )
    return Ledger(
        allowed=campaign.budget.limit * sum(reference.values()),
        spent=sum(training_seconds(records.get(other)) or 0.0 for other in reference),
        reserved=reserved,
        needed=left(run_id),
        counted=len(reference),
    )


def limit_decision(campaign: Campaign, account: Ledger) -> dict[str, Any]:
    """Return what is written into the record of a run that is left out.

    Args:
        campaign: the campaign.
        account: that it did not fit into.
    """
    return {
        "kind": "limit",
        "rule": f"all runs together train at most {campaign.budget.limit:g} times as long as as many runs of "
        f"{campaign.reference}, measured; ablations that do not fit in are left out",
        "allowed_seconds": round(account.allowed, 1),
        "spent_seconds": round(account.spent, 1),
        "reserved_seconds": round(account.reserved, 1),
        "needed_seconds": round(account.needed, 1),
        "runs_counted": account.counted,
    }


def explain_limit(decided: Mapping[str, Any]) -> str:
    """Return the sentence for a run that is left out.

    Args:
        decided: of `limit_decision`.
    """
    needed, spent, reserved, allowed = (
        f"{value:,.0f} s" if value >= 10 else f"{value:.1f} s"
        for value in (decided[f"{kind}_seconds"] for kind in ("needed", "spent", "reserved", "allowed"))
    )
    return (
        f"left out: it needs {needed}, and with {spent} spent and {reserved} kept for main variations and runs under "
        f"way that exceeds the {allowed} allowed; {decided['rule']}"
    )
