"""The status of a campaign: a table of its runs from their records, and the time that the rest will take."""

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
    """Return a table of all runs with their status, and totals below it, from the records only.

    Raises:
        ValueError: naming a record that cannot be read.
    """
    directory = Path(directory).resolve()
    order, names = campaign.order, run_names(campaign)
    records = read_records(directory, order)
    holder = runner_at_work(directory)
    rows: list[tuple[str, ...]] = [("run", "id", "status", "attempts", "time", "trained", "why")]
    rows += [(names[run_id], run_id, *_figures(records.get(run_id), holder is not None)) for run_id in order]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = table([rows[0], tuple("-" * width for width in [*widths[:-1], 3]), *rows[1:]])
    counts = Counter(row[2] for row in rows[1:])
    said = [f"{counts[status]} {status}" for status in (*STATUSES, "stopped", "missing") if counts[status]]
    lines += ["", f"{len(order)} runs: {', '.join(said)}."]
    waiting = [run_id for run_id in order if run_id not in records or records[run_id].status not in SETTLED]
    left = Progress(campaign, order, names).left(records, waiting, 1)
    if waiting and left is not None:
        lines.append(f"What is missing takes about {duration(left)}, one run at a time.")
    lines.append(f"{holder} works on it." if holder else "Nobody works on it.")
    return "\n".join(lines)


def _figures(record: Record | None, at_work: bool) -> tuple[str, ...]:
    if record is None:
        return ("missing", "0", "", "", "")
    # its runner was killed; the next one resumes it
    status = "stopped" if record.status == "running" and not at_work else record.status
    taken = record.seconds if any(attempt.get("seconds") is not None for attempt in record.attempts) else None
    times = ["" if seconds is None else duration(seconds) for seconds in (taken, training_seconds(record))]
    why = record.message if len(record.message) <= _LONGEST else record.message[: _LONGEST - 3] + "..."
    return (status, str(len(record.attempts)), *times, why)
