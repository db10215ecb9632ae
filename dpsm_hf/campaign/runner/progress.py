"""The progress shown while a campaign runs: one line per run, and an estimate of the remaining time."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import TextIO

from ..spec.design import Campaign
from .records import SETTLED, Record


def duration(seconds: float) -> str:
    """Return a duration in words: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose columns are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def run_names(campaign: Campaign) -> dict[str, str]:
    """Return a unique name for each run by id: variation, size, data, seed, and what else a study varies."""
    names: dict[str, str] = {}
    for run_id, point in campaign.planned_points.items():
        study = "" if point.study == "main" else point.study
        varied = (f"{key}-{value}" for key, value in point.settings.items())
        parts = [point.variation, point.size, point.data, f"seed-{point.seed}", study, *varied]
        names[run_id] = "/".join(part.replace("/", "_") for part in parts if part)
    for run_id in campaign.runs:
        names.setdefault(run_id, f"preparation/{campaign.preparations.get(run_id, run_id)}")
    seen = Counter(names.values())
    return {run_id: name if seen[name] == 1 else f"{name}/{run_id}" for run_id, name in names.items()}


class Progress:
    """Write a line for each run that ends and, on a terminal, keep a last line with the running ones."""

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
        """Write the line of a run that has ended; ``left`` is how many seconds the rest takes, None if unknown."""
        rest = "" if left is None else "  the last one" if left == 0 else f"  about {duration(left)} left"
        why = f"  {message}" if message else ""
        self.say(f"{self._head(run_id)}  {status}  {duration(seconds)}{rest}{why}")

    def tick(self, active: Mapping[str, float], estimate: Callable[[], float | None]) -> None:
        """Rewrite the last line; only on a terminal, and at most once a second."""
        now = time.monotonic()
        if not self._live or now - self._shown < 1:
            return
        self._shown = now
        parts = [f"{self._head(run_id)} {duration(seconds)}" for run_id, seconds in active.items()]
        if (left := estimate()) is not None:
            parts.append(f"about {duration(left)} left")
        self._stream.write("\r\033[K" + " · ".join(parts)[: shutil.get_terminal_size((100, 24)).columns - 1])
        self._stream.flush()

    def _head(self, run_id: str) -> str:
        total = len(self._numbers)
        return f"[{self._numbers.get(run_id, 0):>{len(str(total))}}/{total}] {self._names.get(run_id, run_id)}"

    def left(self, records: Mapping[str, Record], waiting: Iterable[str], jobs: int) -> float | None:
        """Return how many seconds the rest will take, by the time of the finished runs; None before the first."""
        taken: dict[object, list[float]] = {}
        for run_id, record in records.items():
            if record.status == "ok" and record.seconds:
                taken.setdefault(self._kinds.get(run_id), []).append(record.seconds)
        if not taken:
            return None
        overall = fmean(seconds for times in taken.values() for seconds in times)
        total = 0.0
        for run_id in waiting:
            if run_id not in records or records[run_id].status not in SETTLED:
                spent = records[run_id].seconds if run_id in records else 0.0
                total += max(0.0, fmean(taken.get(self._kinds.get(run_id), [overall])) - spent)
        return total / jobs
