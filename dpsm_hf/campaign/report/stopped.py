"""The table of the ablations that the budget stopped, with the figures that decided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runner.records import Record
from ..verdict.results import Results, setting_of
from .tables import Cell, Table, describe


def stopped_early(results: Results) -> Table | None:
    """Show for every ablation and seed that was stopped at which step that was, by which figure; None without any.

    Args:
        results: of the campaign.
    """
    found: dict[str, tuple[str, str, int, Record]] = {}
    for point in results.campaign.points:
        record = results.record(point)
        if record is not None and record.status == "pruned":  # a run of several studies is told of once
            title = results.campaign.variation(point.variation).title
            found.setdefault(point.run_id, (title, describe(results, setting_of(point)), point.seed, record))
    if not found:
        return None
    settings = list(dict.fromkeys(setting for _, setting, _, _ in found.values()))
    seeds = sorted({seed for _, _, seed, _ in found.values()})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for title, setting, seed, record in found.values():
        cells.setdefault((title, setting), {})[seed] = _why(record)
    rows = [
        [
            Cell(title if len(settings) == 1 else f"{title}; {setting}"),
            *(Cell(by_seed.get(seed, "–")) for seed in seeds),
        ]
        for (title, setting), by_seed in cells.items()
    ]
    decided = [record.decision for *_, record in found.values()]
    notes = [f"{rule[:1].upper()}{rule[1:]}." for rule in dict.fromkeys(d["rule"] for d in decided if "rule" in d)]
    if any(d.get("kind") == "halving" for d in decided):
        notes.append("A mean over the seeds of an ablation that were not stopped is one over those that did better.")
    return Table(
        "Stopped early by the budget's rule",
        ["", *(f"seed {seed}" for seed in seeds)],
        rows,
        notes,
    )


def _why(record: Record) -> str:
    decided: Mapping[str, Any] = record.decision
    if decided.get("kind") == "halving":
        own = decided["figures"].get(record.name)
        kept = [decided["figures"][name] for name in decided["kept"]]
        limit = max((value for value in kept if value is not None), default=None)
        went_on = f"{len(kept)} of {len(decided['figures'])} went on, up to {_shown(limit)}"
        return f"step {decided['step']}: {_shown(own)} ({went_on})"
    if decided.get("kind") == "limit":
        return f"no time left for its {decided['needed_seconds']:,.0f} s"
    return record.message


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5g}"
