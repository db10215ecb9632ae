"""``knob_schedules``: schedules for any number of the objective, from the mapping that a user writes.

::

    {"focal_gamma": "linear 0 -> 2 over 0.1",
     "label_smoothing_factor": {"schedule": "cosine", "start": 0, "end": 0.1, "warmup_steps": 500, "hold": 0.2},
     "z_loss": {"schedule": "feedback", "low": 0, "high": 0.01, "gain": 0.5, "signal": "eval_signed_gap"}}
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .knobs import KNOBS, knobs_of
from .schedules import KnobSchedule, ScheduleOptions, available_alpha_schedules, checked_schedule, schedule_lengths

_RAMP = ("start", "end", "warmup_steps", "hold")
_FEEDBACK = ("start", "low", "high", "gain", "limit", "signal", "relative_to", "tolerance")
_TEXTS = ("signal", "relative_to")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_SHORT = re.compile(
    rf"(?P<schedule>\w+) +(?P<start>{_NUMBER})(?: *-> *(?P<end>{_NUMBER}))?"
    rf"(?: +over +(?P<warmup_steps>{_NUMBER}))?(?: +after +(?P<hold>{_NUMBER}))?"
)
_EXAMPLE = "'linear 0 -> 2 over 0.1' or keys with values, schedule, start, end, warmup_steps, hold"


def parse_knob_schedules(given: Any, scoring_rule: str, place: str = "knob_schedules") -> dict[str, KnobSchedule]:
    """Return the schedules that a mapping describes, by knob, with everything in it checked.

    Args:
        given: of each knob its schedule: a line, ``"linear 0 -> 2 over 0.1 after 0.2"`` (``over`` the warm-up,
            ``after`` the hold), or a mapping of ``schedule`` ("linear" if left out), ``start`` and ``end``,
            ``warmup_steps`` (0.1) and ``hold``; of "feedback" ``low``, ``high``, ``start`` (``low``), ``gain`` (2),
            ``limit`` (a tenth of the way from low to high), ``signal`` ("eval_signed_gap"), ``relative_to`` and
            ``tolerance``.
        scoring_rule: that is trained.
        place: where it was written, for messages.

    Raises:
        ValueError: for a knob that there is not or that has no effect on the rule, an option that there is not or that
            has no effect on the schedule, or a value out of its range; with the name, the value and the remedy.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{place}={given!r} should be keys with values: of each knob its schedule, {_EXAMPLE}.")
    return {name: _schedule(name, entry, scoring_rule, f"{place}: {name}: ") for name, entry in given.items()}


def _schedule(name: str, entry: Any, scoring_rule: str, prefix: str) -> KnobSchedule:
    where = prefix.partition(":")[0]
    if name not in KNOBS:
        raise ValueError(f"{where}: there is no knob {name!r}; {_nearest(name, knobs_of(scoring_rule))}")
    knob = KNOBS[name]
    if scoring_rule not in knob.rules:
        raise ValueError(
            f"{where}: {name} has no effect on scoring_rule={scoring_rule!r}; leave it out, or choose scoring_rule="
            f"{' or '.join(map(repr, knob.rules))}. Those with an effect here: {', '.join(knobs_of(scoring_rule))}."
        )
    options = _from_line(entry, prefix) if isinstance(entry, str) else entry
    if not isinstance(options, Mapping):
        raise ValueError(
            f"{prefix}{entry!r} is no schedule: write {_EXAMPLE}; a number that stays is given as {name}={entry!r}."
        )
    options = dict(options)
    schedule = options.pop("schedule", "linear")
    if not isinstance(schedule, str) or schedule not in available_alpha_schedules():
        known = ", ".join(available_alpha_schedules())
        raise ValueError(f"{prefix}schedule={schedule!r} is unknown; choose one of {known}.")
    _check_options(schedule, options, prefix)
    if schedule == "feedback":
        return _feedback(name, options, prefix)
    needed = ("end",) if schedule == "constant" else ("start", "end")
    if missing := [label for label in needed if label not in options and name != "alpha"]:
        raise ValueError(f"{prefix}{schedule} needs {' and '.join(missing)}, the value it goes from or to.")
    hold = options.get("hold")
    start = options.get("start", options.get("end") if schedule == "constant" else None)
    settings = ScheduleOptions(end=options.get("end", 1.0), warmup_steps=options.get("warmup_steps", 0.1))
    return checked_schedule(name, schedule, settings, start=start, hold=hold, prefix=prefix)


def _from_line(line: str, prefix: str) -> dict[str, Any]:
    match = _SHORT.fullmatch(line.strip())
    if match is None:
        raise ValueError(f"{prefix}{line!r} is no schedule: write {_EXAMPLE}.")
    found: dict[str, Any] = {k: v if k == "schedule" else float(v) for k, v in match.groupdict().items() if v}
    if found["schedule"] == "constant" and "end" not in found:
        found["end"] = found.pop("start")
    return found


def _check_options(schedule: str, options: Mapping[str, Any], prefix: str) -> None:
    """Check names and kinds of the options of a schedule."""
    known = _FEEDBACK if schedule == "feedback" else _RAMP
    for label, value in options.items():
        if label not in {*_RAMP, *_FEEDBACK}:
            raise ValueError(f"{prefix}{schedule} has no {label!r}; {_nearest(label, known)}")
        read = schedule_lengths(schedule).get(label, True)
        if label not in known or not read:
            raise ValueError(f"{prefix}{label}={value!r} has no effect on schedule={schedule!r}; leave it out.")
        text, number = isinstance(value, str), isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (text if label in _TEXTS else number):
            kind = "text, the name of a logged number" if label in _TEXTS else "a number"
            raise ValueError(f"{prefix}{label}={value!r} should be {kind}.")


def _feedback(name: str, options: Mapping[str, Any], prefix: str) -> KnobSchedule:
    if missing := [label for label in ("low", "high") if label not in options and name != "alpha"]:
        raise ValueError(f"{prefix}feedback needs {' and '.join(missing)}, between which the knob stays.")
    low, high = float(options.get("low", 0.0)), float(options.get("high", 1.0))
    start, tolerance = float(options.get("start", low)), float(options.get("tolerance", 0.0))
    if not low < high:
        raise ValueError(f"{prefix}low={low} is not below high={high}: the knob could not move.")
    if not low <= start <= high:
        raise ValueError(f"{prefix}start={start} does not lie between low={low} and high={high}.")
    if not 0.0 <= tolerance < float("inf"):
        raise ValueError(f"{prefix}tolerance={tolerance} must be a finite number of at least 0.")
    names = str(options.get("relative_to", "")).split("/")
    if len(names) > 2 or (len(names) == 2 and not all(names)):
        raise ValueError(
            f"{prefix}relative_to={options['relative_to']!r} should be one logged number, or two with a slash."
        )
    settings = ScheduleOptions(
        start, high, gain=float(options.get("gain", 2.0)), limit=float(options.get("limit", (high - low) / 10)),
        metric=options.get("signal", "eval_signed_gap"), low=low, high=high,
        relative_to=options.get("relative_to", ""), tolerance=tolerance, halving=True,
    )  # fmt: skip
    return checked_schedule(name, "feedback", settings, start=start, hold=None, prefix=prefix)


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(names)}."
