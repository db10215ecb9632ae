"""The plan of a campaign before anything starts: runs, tokens, operations, and how long they should take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cost import Cost, run_cost
from .runner.progress import table
from .runner.records import read_records
from .spec.design import Campaign, Point, Setting

SCHEMA = 1

#: What training with evaluation reaches of a machine's matrix products, see docs/campaigns.md. A guess: the first
#: finished run of a size replaces it.
UTILISATION = 0.35

_SIDE = 1024
_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Speed:
    """How fast runs are, evaluation and start included in their time, and where that is known from, in words."""

    flops_per_second: float
    source: str
    each_process: bool = True  # whether a run on several processes is so many times as fast


def make_plan(
    campaign: Campaign, directory: Path | None = None, *, flops_per_second: float | None = None, jobs: int = 1
) -> dict[str, Any]:
    """Return the plan as one JSON object, for so many runs (``jobs``) at a time.

    Finished runs in the campaign's folder tell how long others of their size take, ``flops_per_second`` is of the
    machine that is planned for; without either this one is measured.
    """
    first = {point.run_id: point for point in reversed(campaign.points)}
    costs = {}
    for run_id in campaign.order:
        point = first.get(run_id) or next(p for p in campaign.points if run_id in campaign.runs[p.run_id].needs)
        costs[run_id] = (run_cost(campaign, campaign.runs[run_id], point.size, point.data), point.size)
    speeds = _speeds(campaign, costs, directory, flops_per_second)
    runs = []
    for run_id, (cost, size) in costs.items():
        processes = campaign.runs[run_id].processes
        hours = _hours(cost, speeds[size], processes)
        runs.append({"id": run_id, "size": size, "processes": processes, **vars(cost), "hours": hours})
    return {
        "schema": SCHEMA, "campaign": campaign.name, "title": campaign.title, "scale": campaign.scale, "jobs": jobs,
        "readers": {v.name: v.of for v in campaign.variations if v.of is not None},
        "studies": _studies(campaign),
        "points": [{**vars(point), "settings": dict(point.settings)} for point in campaign.points],
        "preparations": dict(campaign.preparations),
        "runs": runs,
        "speed": {size: vars(speed) if speed else None for size, speed in speeds.items()},
        "total": _total(runs, jobs),
    }  # fmt: skip


def _studies(campaign: Campaign) -> list[dict[str, Any]]:
    found: dict[Setting, list[Point]] = {}
    for point in campaign.points:
        found.setdefault(point.setting, []).append(point)
    seen: set[str] = set()
    rows = []
    for points in sorted(found.values(), key=lambda group: list(campaign.titles["study"]).index(group[0].study)):
        ids, first = {point.run_id for point in points}, points[0]
        rows.append({
            "study": first.study, "title": campaign.titles["study"][first.study], "size": first.size,
            "data": first.data, "settings": dict(first.settings),
            "variations": list(dict.fromkeys(point.variation for point in points)),
            "seeds": list(dict.fromkeys(point.seed for point in points)),
            "runs": len(ids - seen), "shared": len(ids & seen),
        })  # fmt: skip
        seen |= ids
    return rows


def _total(runs: list[dict[str, Any]], jobs: int) -> dict[str, Any]:
    sums = {key: _sum(runs, key) for key in ("tokens", "flops", "hours")}
    wall_clock = None if sums["hours"] is None else sums["hours"] / jobs
    return {"runs": len(runs), **sums, "hours_of_wall_clock": wall_clock}


def _sum(runs: Sequence[Mapping[str, Any]], key: str) -> Any:
    values = [run[key] for run in runs]
    return None if None in values else sum(values)


# ---- speed ---------------------------------------------------------------------------------------------------------


def _speeds(
    campaign: Campaign, costs: Mapping[str, tuple[Cost, str]], directory: Path | None, given: float | None
) -> dict[str, Speed | None]:
    sizes = list(dict.fromkeys(size for _, size in costs.values()))
    if given is not None:
        return dict.fromkeys(sizes, Speed(given, f"{in_units(given)}FLOP/s for each process, as given"))
    measured = _measured(costs, directory)
    if all(size in measured for size in sizes):
        return {size: measured[size] for size in sizes}
    bf16 = any(run.arguments.get("bf16") for run in campaign.runs.values())
    guess = measure_speed(torch.bfloat16 if bf16 else torch.float32)
    return {size: measured.get(size, guess) for size in sizes}


def _measured(costs: Mapping[str, tuple[Cost, str]], directory: Path | None) -> dict[str, Speed]:
    """Return the speed of finished runs, by size."""
    if directory is None or not (directory / "runs").is_dir():
        return {}
    done: dict[str, list[tuple[float, float]]] = {}
    for run_id, record in read_records(directory, list(costs)).items():
        cost, size = costs[run_id]
        if record.status == "ok" and record.seconds > 0 and cost.flops is not None and cost.steps:
            # a run that stopped early has done a part of its plan
            flops = cost.flops * (record.efficiency.get("steps") or cost.steps) / cost.steps
            done.setdefault(size, []).append((flops, record.seconds))
    speeds = {}
    for size, found in done.items():
        flops, seconds = (sum(values) for values in zip(*found, strict=True))
        speeds[size] = Speed(flops / seconds, f"measured: {len(found)} finished run(s)", False)
    return speeds


def measure_speed(dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> Speed | None:
    """Measure this machine's matrix products for half a second, and take a share of that for training.

    None where the device cannot multiply in this type.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = _SIDE * (8 if device.type == "cuda" else 1)
    try:
        a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
        seconds: list[float] = []
        while len(seconds) < 3 or sum(seconds) < 0.5:
            before = clock()
            product = a @ b
            float(product[0, 0])  # waits for the device
            seconds.append(clock() - before)
    except RuntimeError:
        return None
    peak = 2.0 * side**3 / min(seconds)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    words = f"a guess: {UTILISATION:.0%} of the {in_units(peak)}FLOP/s that matrix products reach here ({name})"
    return Speed(UTILISATION * peak, words)


def _hours(cost: Cost, speed: Speed | None, processes: int) -> float | None:
    if cost.flops is None or speed is None:
        return None
    return cost.flops / speed.flops_per_second / (processes if speed.each_process else 1) / 3600


# ---- text ----------------------------------------------------------------------------------------------------------


def in_units(value: float | None) -> str:
    """Return a large number with a prefix of its unit: ``1.5 G``; "unknown" for None."""
    if value is None:
        return "unknown"
    for unit, letter in _UNITS:
        if value >= unit:
            return f"{value / unit:.3g} {letter}"
    return f"{value:.3g} "


def in_hours(hours: float | None) -> str:
    """Return a time for people: minutes below two hours, days above two."""
    if hours is None:
        return "unknown"
    if hours < 2:
        return f"{hours * 60:.1f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"


def render_plan(plan: Mapping[str, Any], *, every_run: bool = False) -> str:
    """Return a plan as text."""
    total = plan["total"]
    lines = [f"{plan['title']} ({plan['campaign']}, scale {plan['scale']}): {total['runs']} runs", ""]
    rows = [["study", "size", "data", "setting", "variations", "seeds", "runs", "shared"]]
    for study in plan["studies"]:
        counts = [len(study["variations"]), len(study["seeds"]), study["runs"], study["shared"]]
        rows.append([study["study"], study["size"], study["data"], _setting(study), *map(str, counts)])
    lines += table(rows)
    for name, of in plan["readers"].items():
        lines.append(f"{name} has no runs of its own: it reads those of {of} after temperature scaling")
    if titles := plan["preparations"].values():
        lines += ["", f"and {len(titles)} run(s) whose model others start from: {', '.join(titles)}"]
    lines += ["", *table(_by_size(plan)), ""]
    lines += [f"speed of {size}: {speed['source'] if speed else 'unknown'}" for size, speed in plan["speed"].items()]
    lines.append(
        f"in all: {_amount(total['tokens'], 'tokens')}, {_amount(total['flops'], 'FLOP')}; without start-up and "
        f"evaluation {in_hours(total['hours'])} of runs, {in_hours(total['hours_of_wall_clock'])} with {plan['jobs']} "
        "at a time"
    )
    if every_run:
        lines += ["", *table(_each_run(plan))]
    return "\n".join(lines)


def _amount(value: float | None, unit: str) -> str:
    return f"unknown {unit}" if value is None else f"{in_units(value)}{unit}"


def _setting(entry: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in entry["settings"].items()) or "-"


def _by_size(plan: Mapping[str, Any]) -> list[list[str]]:
    rows = [["size", "parameters", "runs", "steps a run", "tokens a run", "FLOP a run", "time a run", "time in all"]]
    shown = {"steps": "{:,}".format, "tokens": in_units, "flops": in_units, "hours": in_hours}
    for size in plan["speed"]:
        runs = [run for run in plan["runs"] if run["size"] == size]
        spreads = [_spread([run[key] for run in runs], show) for key, show in shown.items()]
        parameters = _spread([run["parameters"] for run in runs], in_units)
        rows.append([size, parameters, str(len(runs)), *spreads, in_hours(_sum(runs, "hours"))])
    return rows


def _spread(values: Sequence[Any], show: Callable[[Any], str]) -> str:
    """Return the range of values in words; "unknown" where one is None."""
    if None in values:
        return "unknown"
    low, high = show(min(values)).strip(), show(max(values)).strip()
    return low if low == high else f"{low} to {high}"


def _each_run(plan: Mapping[str, Any]) -> list[list[str]]:
    rows = [["run", "study", "variation", "size", "data", "seed", "setting", "tokens", "time"]]
    runs = {run["id"]: run for run in plan["runs"]}
    for run_id, title in plan["preparations"].items():
        run = runs[run_id]
        rows.append([run_id, "-", title, run["size"], "-", "-", "-", in_units(run["tokens"]), in_hours(run["hours"])])
    for point in plan["points"]:
        run = runs[point["run_id"]]
        place = [str(point[key]) for key in ("run_id", "study", "variation", "size", "data", "seed")]
        cost = ["reads this run"] * 2 if point["scaled"] else [in_units(run["tokens"]), in_hours(run["hours"])]
        rows.append([*place, _setting(point), *cost])
    return rows
