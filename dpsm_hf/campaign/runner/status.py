"""How far a campaign is: a table of its runs from their records, and what is still missing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ..spec.design import Campaign
from .budget import training_seconds
from .lock import runner_at_work
from .progress import Progress, duration, run_names, table
from .records import SETTLED, STATUSES, Record, read_records

_LONGEST = 100


def campaign_status(campaign: Campaign, directory: str | Path) -> str:
    """Return a table of all runs with their status, and sums below it; only records are read.

    Args:
        campaign: the campaign.
        directory: its folder.

    Raises:
        ValueError: a record cannot be read; it is named.
    """
    directory = Path(directory).resolve()
    order, names = campaign.order, run_names(campaign)
    records = read_records(directory, order)
    holder = runner_at_work(directory)
    rows: list[tuple[str, ...]] = [("run", "id", "status", "attempts", "time", "trained", "why")]
    rows += [_row(run_id, names[run_id], records.get(run_id), holder is not None) for run_id in order]
    lines = table(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines.insert(1, "  ".join("-" * width for width in widths[:-1]) + "  " + "-" * 3)
    counts = Counter(_status(records.get(run_id), holder is not None) for run_id in order)
    said = [f"{counts[status]} {status}" for status in (*STATUSES, "stopped", "missing") if counts[status]]
    lines += ["", f"{len(order)} runs: {', '.join(said)}."]
    waiting = [run_id for run_id in order if run_id not in records or records[run_id].status not in SETTLED]
    left = Progress(campaign, order, names).left(records, waiting, 1)
    if waiting and left is not None:
        lines.append(f"What is missing takes about {duration(left)}, one run at a time.")
    lines.append(f"{holder} works on it." if holder else "Nobody works on it.")
    return "\n".join(lines)


def _status(record: Record | None, at_work: bool) -> str:
    if record is None:
        return "missing"
    # Its runner was killed: the next one takes it up again.
    return "stopped" if record.status == "running" and not at_work else record.status


def _row(run_id: str, name: str, record: Record | None, at_work: bool) -> tuple[str, ...]:
    if record is None:
        return (name, run_id, "missing", "0", "", "", "")
    times = [attempt["seconds"] for attempt in record.attempts if attempt.get("seconds") is not None]
    trained = training_seconds(record)
    why = record.message if len(record.message) <= _LONGEST else record.message[: _LONGEST - 3] + "..."
    return (
        name,
        run_id,
        _status(record, at_work),
        str(len(record.attempts)),
        duration(sum(times)) if times else "",
        duration(trained) if trained is not None else "",
        why,
    )
