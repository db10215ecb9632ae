"""The training clock: wall-clock seconds of training, evaluation not counted, and how the log tells them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerState

#: Ends the names of the entries that tell it: ``train_seconds``, ``eval_train_seconds``, ``eval_<set>_train_seconds``.
CLOCK = "train_seconds"

# where a checkpoint tells it: its last log entry may be many steps old
_SAVED_AS = "TrainingClock"

_History = Iterable[Mapping[str, Any]]


class TrainingClock:
    """Measure the time of training without evaluation; a resumed run goes on from the seconds of its checkpoint.

    Every ``state`` is that of the trainer.
    """

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

    def start(self, state: TrainerState) -> None:
        """Start where the state left off, at the first batch of a training; does nothing at later ones."""
        if self._started is None:
            self._before = self._last_lap = self.seconds(state)
            self._started, self._evaluated = time.perf_counter(), 0.0

    def seconds(self, state: TrainerState) -> float:
        """Return the seconds trained up to now; before the first batch, what the state tells."""
        if self._started is None:
            return _told(state)
        now = time.perf_counter() if self._stopped_at is None else self._stopped_at
        return self._before + now - self._started - self._evaluated

    def save(self, state: TrainerState) -> None:
        """Write the seconds trained up to now into a state that is about to be saved."""
        # beside the states of callbacks, which is the one place of a saved state that others may write to
        callbacks: Any = state.stateful_callbacks
        callbacks[_SAVED_AS] = {"args": {}, "attributes": {CLOCK: self.seconds(state)}}

    def lap(self, state: TrainerState) -> tuple[float, float]:
        """Return the seconds trained up to now, and those since the last call."""
        seconds = self.seconds(state)
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


def seconds_trained(log_history: _History) -> float | None:
    """Return the seconds trained up to the last entry of a trainer's log that tells it; None if none does."""
    times = [float(value) for entry in log_history for key, value in entry.items() if key.endswith(CLOCK)]
    return max(times, default=None)


def _told(state: TrainerState) -> float:
    callbacks: Any = state.stateful_callbacks
    saved = callbacks.get(_SAVED_AS, {})
    return max(seconds_trained(state.log_history) or 0.0, saved.get("attributes", {}).get(CLOCK, 0.0))
