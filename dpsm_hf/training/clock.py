"""The training clock: wall-clock seconds of training, evaluation not counted, and how the log tells them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

#: Ends the names of the entries that tell it: ``train_seconds``, ``eval_train_seconds``, ``eval_<set>_train_seconds``.
CLOCK = "train_seconds"

_History = Iterable[Mapping[str, Any]]


class TrainingClock:
    """Measure the time of training without evaluation; a resumed run goes on from the seconds in its log."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._before = 0.0  # seconds of earlier parts of the run
        self._evaluated = 0.0  # seconds since the start that were evaluation
        self._stopped_at: float | None = None
        self._last_lap = 0.0

    @property
    def stopped(self) -> bool:
        """Return whether an evaluation is in progress."""
        return self._stopped_at is not None

    def reset(self) -> None:
        """Wait for the first batch of another training."""
        self._started = None

    def start(self, log_history: _History) -> None:
        """Start where the log left off, at the first batch of a training; does nothing at later ones."""
        if self._started is None:
            self._before = self._last_lap = self.seconds(log_history)
            self._started, self._evaluated = time.perf_counter(), 0.0

    def seconds(self, log_history: _History) -> float:
        """Return the seconds trained up to now; before the first batch, what the log tells."""
        if self._started is None:
            return seconds_trained(log_history) or 0.0
        now = time.perf_counter() if self._stopped_at is None else self._stopped_at
        return self._before + now - self._started - self._evaluated

    def lap(self, log_history: _History) -> tuple[float, float]:
        """Return the seconds trained up to now, and those since the last call."""
        seconds = self.seconds(log_history)
        since, self._last_lap = seconds - self._last_lap, seconds
        return seconds, since

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Stand still for the length of a context; one inside another changes nothing."""
        if self._stopped_at is not None:
            yield
            return
        self._stopped_at = time.perf_counter()
        try:
            yield
        finally:
            self._evaluated += time.perf_counter() - self._stopped_at
            self._stopped_at = None


def tells_time(entry: Mapping[str, Any]) -> bool:
    """Return whether a log entry says how long was trained."""
    return any(key.endswith(CLOCK) for key in entry)


def seconds_trained(log_history: _History) -> float | None:
    """Return the seconds trained up to the last entry that tells it; None if none does.

    Args:
        log_history: of a trainer's state; that of a resumed run begins with what its checkpoint had logged.
    """
    times = [float(value) for entry in log_history for key, value in entry.items() if key.endswith(CLOCK)]
    return max(times, default=None)
