"""The training clock as the log tells it: wall-clock seconds of training, evaluation not counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

#: Ends the names of the entries that tell it: ``train_seconds``, ``eval_train_seconds``, ``eval_<set>_train_seconds``.
CLOCK = "train_seconds"


def tells_time(entry: Mapping[str, Any]) -> bool:
    """Return whether a log entry says how long was trained."""
    return any(key.endswith(CLOCK) for key in entry)


def seconds_trained(log_history: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the seconds trained up to the last entry that tells it; None if none does.

    Args:
        log_history: of a trainer's state; that of a resumed run begins with what its checkpoint had logged.
    """
    times = [float(value) for entry in log_history for key, value in entry.items() if key.endswith(CLOCK)]
    return max(times, default=None)
