"""What a person sees while a campaign runs: one line a run, and how long the rest will take."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import TextIO

from ..spec.design import Campaign
from .records import SETTLED, Record


def duration(seconds: float) -> str:
    """Return a duration as people say it: 45 s, 3 min 20 s, 2 h 05 min.

    Args:
        seconds: of the duration.
    """
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose columns are aligned to the left.

    Args:
        rows: with the same number of cells each.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def run_names(campaign: Campaign) -> dict[str, str]:
    """Return a name for each run, unique in the campaign: variation, size, data, seed, and what else a study varies.

    Args:
        campaign: the campaign.
    """
    names: dict[str, str] = {}
    for run_id, point in campaign.planned_points.items():
        parts = [point.variation, point.size, point.data, f"seed-{point.seed}"]
        if point.study != "main":
            parts.append(point.study)
        parts += [f"{key}-{value}" for key, value in point.settings.items()]
        names[run_id] = "/".join(part.replace("/", "_") for part in parts if part)
    for run_id in campaign.runs:
        names.setdefault(run_id, f"preparation/{campaign.preparations.get(run_id, run_id)}")
    seen = list(names.values())
    return {run_id: name if seen.count(name) == 1 else f"{name}/{run_id}" for run_id, name in names.items()}


class Progress:
    """Lines about the runs of a campaign, and on a terminal a last line that tells what is under way.

    Args:
        campaign: the campaign.
        order: ids of its runs.
        names: of the runs, by id.
        stream: where to write; standard error by default.
    """

    def __init__(
        self, campaign: Campaign, order: list[str], names: Mapping[str, str], stream: TextIO | None = None
    ) -> None:
        self._numbers = {run_id: number for number, run_id in enumerate(order, 1)}
        self._names = names
        points = campaign.planned_points
        self._kinds = {run_id: campaign.length(points[run_id]) for run_id in order if run_id in points}
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._shown = 0.0

    def say(self, text: str) -> None:
        """Write a line."""
        if self._live:
            self._stream.write("\r\033[K")
        self._stream.write(text + "\n")
        self._stream.flush()

    def ended(self, run_id: str, status: str, seconds: float, message: str, left: float | None) -> None:
        """Write the line of a run whose process has ended.

        Args:
            run_id: of the run.
            status: one of `records.STATUSES`.
            seconds: that it took.
            message: why it is not ok.
            left: seconds that the rest will take; None where unknown.
        """
        rest = "" if left is None else "  the last one" if left == 0 else f"  about {duration(left)} left"
        why = f"  {message}" if message else ""
        self.say(f"{self._head(run_id)}  {status}  {duration(seconds)}{rest}{why}")

    def tick(self, active: Mapping[str, float], estimate: Callable[[], float | None]) -> None:
        """Rewrite the last line, on a terminal and once a second.

        Args:
            active: seconds since their start, by the ids of the runs under way.
            estimate: gives the seconds that the rest will take; None where unknown.
        """
        now = time.monotonic()
        if not self._live or now - self._shown < 1:
            return
        self._shown = now
        parts = [f"{self._head(run_id)} {duration(seconds)}" for run_id, seconds in active.items()]
        left = estimate()
        rest = "" if left is None else f" · about {duration(left)} left"
        line = " · ".join(parts) + rest
        self._stream.write("\r\033[K" + line[: shutil.get_terminal_size((100, 24)).columns - 1])
        self._stream.flush()

    def _head(self, run_id: str) -> str:
        total = len(self._numbers)
        return f"[{self._numbers.get(run_id, 0):>{len(str(total))}}/{total}] {self._names.get(run_id, run_id)}"

    def left(self, records: Mapping[str, Record], waiting: Iterable[str], jobs: int) -> float | None:
        """Return how long the rest will take, by the time of the runs that are done; None before there is one.

        Args:
            records: so far, by run id.
            waiting: ids of the runs that are not done.
            jobs: runs at a time.
        """
        taken: dict[object, list[float]] = {}
        for run_id, record in records.items():
            seconds = sum(attempt.get("seconds") or 0.0 for attempt in record.attempts)
            if record.status == "ok" and seconds:
                taken.setdefault(self._kinds.get(run_id), []).append(seconds)
        if not taken:
            return None
        overall = fmean(seconds for times in taken.values() for seconds in times)
        total = 0.0
        for run_id in waiting:
            if run_id in records and records[run_id].status in SETTLED:
                continue
            spent = sum(a.get("seconds") or 0.0 for a in records[run_id].attempts) if run_id in records else 0.0
            total += max(0.0, fmean(taken.get(self._kinds.get(run_id), [overall])) - spent)
        return total / jobs
