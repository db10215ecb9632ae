"""Schedules of the numbers of an objective: pure functions of the step, the total steps and the held-out metrics.

A schedule keeps no state, so training that resumes at a step has exactly the value of that step. With ``s`` the
optimizer steps done, ``T`` their total, ``H`` the hold (steps before the value moves) and ``W`` the warm-up (steps of
the ramp), ``value = start * (1 - shape(s)) + end * shape(s)`` with ``shape(s)`` in [0, 1]:

=============  ===========================================================================================
``linear``     ``min(1, (s - H) / W)``, 0 before H
``cosine``     ``(1 - cos(pi * min(1, (s - H) / W))) / 2``, 0 before H
``constant``   1 at every step: the value is ``end`` throughout (the fixed-alpha ablations)
``late_linear``  as ``linear``, with a hold of half of training unless given: CE first, then a ramp
``step``       0 before H, 1 from H on (half of training unless given): a hard switch
``triangle``   up over W after H, then down to 0 at the last step: CE, mix, CE
``feedback``   moved after each evaluation against a signal of the held-out data, see `dpsm_hf.rules.feedback`
=============  ===========================================================================================

Alpha, the weight of the Brier score in the mix, is the knob that is scheduled by default; `dpsm_hf.rules.knobs` lists
the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from .feedback import Feedback, LogHistory
from .knobs import KNOBS


@dataclass(frozen=True)
class ScheduleOptions:
    """The options of a schedule as the user gave them; a length is in steps if >= 1, a share of the total if < 1.

    From ``gain`` on they are those of "feedback": see `Feedback`. It moves between ``low`` and ``high``, or, where
    these are not given, between the smaller and the larger of ``start`` and ``end``.
    """

    start: float = 0.0
    end: float = 1.0
    warmup_steps: float = 0.1
    hold: float = 0.0
    gain: float = 2.0
    limit: float = 0.1
    metric: str = "eval_signed_gap"
    low: float | None = None
    high: float | None = None
    relative_to: str = ""
    tolerance: float = 0.0
    halving: bool = False

    def feedback(self) -> Feedback:
        """Return what these options mean to "feedback"."""
        low, high = sorted((self.start, self.end))
        return Feedback(
            start=self.start, low=low if self.low is None else self.low, high=high if self.high is None else self.high,
            gain=self.gain, limit=self.limit, signal=self.metric, relative_to=self.relative_to,
            tolerance=self.tolerance, halving=self.halving,
        )  # fmt: skip


@dataclass(frozen=True)
class ScheduleSpan:
    """The lengths of a schedule in optimizer steps, resolved for one training run."""

    total: int
    warmup: int
    hold: int


ScheduleFunction = Callable[[int, ScheduleSpan, ScheduleOptions, LogHistory], float]


def _ramp(step: int, span: ScheduleSpan) -> float:
    if step < span.hold:
        return 0.0
    return 1.0 if span.warmup <= 0 else min(1.0, (step - span.hold) / span.warmup)


def _up_and_down(step: int, span: ScheduleSpan) -> float:
    peak = span.hold + span.warmup
    if step < peak:
        return _ramp(step, span)
    # the last step has number T - 1: there the value is back at its start
    return max(0.0, 1.0 - (step - peak) / max(1, span.total - 1 - peak))


def _along(shape: Callable[[int, ScheduleSpan], float]) -> ScheduleFunction:
    """Return the schedule ``start * (1 - shape) + end * shape``."""

    def value(step: int, span: ScheduleSpan, options: ScheduleOptions, history: LogHistory) -> float:
        share = shape(step, span)
        # in this form shapes 0 and 1 give start and end exactly
        return options.start * (1.0 - share) + options.end * share

    return value


_constant = _along(lambda step, span: 1.0)
_switch = _along(lambda step, span: float(step >= span.hold))


def _feedback(step: int, span: ScheduleSpan, options: ScheduleOptions, history: LogHistory) -> float:
    return options.feedback().value(step, history)


@dataclass(frozen=True)
class _Registered:
    function: ScheduleFunction
    start: float
    hold: float
    uses_warmup: bool
    uses_hold: bool
    needs_total: bool


_SCHEDULES: dict[str, _Registered] = {}


def register_alpha_schedule(
    name: str,
    *,
    start: float = 0.0,
    hold: float = 0.0,
    uses_warmup: bool = True,
    uses_hold: bool = True,
    needs_total: bool = False,
) -> Callable[[ScheduleFunction], ScheduleFunction]:
    """Make a function of your own available as ``alpha_schedule=name`` and in ``knob_schedules``; a decorator.

    Args:
        name: the value of ``alpha_schedule`` that selects it.
        start, hold: defaults of ``alpha_start`` and of the hold for this schedule.
        uses_warmup, uses_hold: whether the function reads ``span.warmup`` and ``span.hold``; a user's hold that is
            not read is an error.
        needs_total: whether the function reads ``span.total``.

    Example::

        @register_alpha_schedule("square_root")
        def square_root(step, span, options, history):
            return options.end * min(1.0, step / max(1, span.warmup)) ** 0.5

    Raises:
        ValueError: if the name is taken.
    """
    if name in _SCHEDULES:
        raise ValueError(f"a schedule named {name!r} exists already; choose another name.")

    def register(function: ScheduleFunction) -> ScheduleFunction:
        _SCHEDULES[name] = _Registered(function, start, hold, uses_warmup, uses_hold, needs_total)
        return function

    return register


register_alpha_schedule("linear")(_along(_ramp))
register_alpha_schedule("cosine")(_along(lambda step, span: 0.5 * (1.0 - math.cos(math.pi * _ramp(step, span)))))
register_alpha_schedule("constant", uses_warmup=False, uses_hold=False)(_constant)
register_alpha_schedule("late_linear", hold=0.5)(_along(_ramp))
register_alpha_schedule("step", hold=0.5, uses_warmup=False)(_switch)
register_alpha_schedule("triangle", needs_total=True)(_along(_up_and_down))
register_alpha_schedule("feedback", uses_warmup=False, uses_hold=False)(_feedback)


def available_alpha_schedules() -> list[str]:
    """Return the names that `get_alpha_schedule` knows, including those registered by others."""
    return list(_SCHEDULES)


def schedule_lengths(name: str) -> dict[str, bool]:
    """Return whether a schedule reads ``warmup_steps`` and ``hold``."""
    return {"warmup_steps": _SCHEDULES[name].uses_warmup, "hold": _SCHEDULES[name].uses_hold}


@dataclass(frozen=True)
class KnobSchedule:
    """A named schedule with its options; call it with the step and the total steps to get the knob's value.

    Args:
        name: of the schedule.
        options: of the schedule.
        knob: the number of the objective that it moves, a name of `KNOBS`.
    """

    name: str
    options: ScheduleOptions
    knob: str = "alpha"

    def resolve(self, total_steps: int) -> ScheduleSpan:
        """Return the schedule's lengths in steps; shares are rounded up, as Transformers rounds ``warmup_steps``.

        Raises:
            ValueError: if the total is needed and not known (``total_steps`` of 0).
        """
        registered, options = _SCHEDULES[self.name], self.options
        lengths = {"warmup": options.warmup_steps, "hold": options.hold}
        for name, used in (("warmup", registered.uses_warmup), ("hold", registered.uses_hold)):
            if used and 0.0 < lengths[name] < 1.0 and total_steps <= 0:
                raise ValueError(
                    f"{name} is {lengths[name]}, a share of all steps, but the total is not known; "
                    "give it in steps (>= 1) or give total_steps."
                )
        if registered.needs_total and total_steps <= 0:
            raise ValueError(f"the {self.name!r} schedule needs the total number of steps; give total_steps.")
        # 1e-9: 0.1 * 1000 must be 100 and not, for a rounding error, 101
        warmup, hold = (math.ceil(v * total_steps - 1e-9) if 0.0 < v < 1.0 else int(v) for v in lengths.values())
        return ScheduleSpan(total_steps, warmup, hold)

    def check(self, total_steps: int) -> None:
        """Raise the ValueError that calling the schedule with this total would raise, if any."""
        self(0, total_steps)

    def __call__(self, step: int, total_steps: int, log_history: LogHistory = ()) -> float:
        """Return the value in the optimizer step that follows ``step`` finished ones.

        Raises:
            ValueError: if the schedule returns a value out of the knob's range, which only a registered one of your
                own can.
        """
        value = float(_SCHEDULES[self.name].function(step, self.resolve(total_steps), self.options, log_history))
        if problem := KNOBS[self.knob].problem(value):
            what = problem.removeprefix("lies ") if problem.startswith("lies ") else f"but it {problem}"
            raise ValueError(f"the {self.name!r} schedule gave {self.knob}={value} at step {step}, {what}.")
        return value

    def describe(self, total_steps: int) -> str:
        """Return a one-line description of how the knob moves, in steps, for the log."""
        span, options, registered = self.resolve(total_steps), self.options, _SCHEDULES[self.name]
        if self.name == "constant":
            return f"constant: {self.knob} = {options.end:g} at every step"
        if self.name == "feedback":
            return options.feedback().describe(self.knob)
        parts = [f"{self.name}: {self.knob} {options.start:g} -> {options.end:g}"]
        if registered.uses_hold and span.hold:
            parts.append(f"from step {span.hold}")
        if registered.uses_warmup:
            parts.append(f"over {span.warmup} steps")
        if self.name == "triangle" and span.hold + span.warmup < total_steps - 1:
            parts.append(f"and back to {options.start:g} at the last")
        return " ".join(parts) + f" (of {total_steps})"

    def reaches_end(self, total_steps: int) -> bool:
        """Return whether training gets as far as the end: at the end of the ramp or at the last step.

        For "feedback", whose value depends on the measurements, it is always True.
        """
        if self.name == "feedback":
            return True
        span, last = self.resolve(total_steps), max(0, total_steps - 1)
        steps = (min(span.hold + span.warmup, last), last)
        return any(abs(self(step, total_steps) - self.options.end) < 1e-12 for step in steps)


#: The former name, from when only alpha had a schedule.
AlphaSchedule = KnobSchedule


def get_alpha_schedule(
    name: str,
    *,
    warmup_steps: float = 0.1,
    start: float | None = None,
    end: float = 1.0,
    hold: float | None = None,
    gain: float = 2.0,
    limit: float = 0.1,
    metric: str = "eval_signed_gap",
) -> KnobSchedule:
    """Return a schedule of alpha by name, with its options checked.

    Args:
        name: one of `available_alpha_schedules`.
        warmup_steps: length of the ramp: optimizer steps if >= 1, a share of all steps if below 1, no ramp if 0.
        start, end: alpha before and after the ramp, in [0, 1]; ``start`` defaults to 0.
        hold: length of the phase before the ramp or the switch, in the same unit as ``warmup_steps``; None takes the
            schedule's default.
        gain, limit, metric: of "feedback": see `Feedback`. The gain stays what it is; in ``knob_schedules`` it is
            halved at each turn.

    Raises:
        ValueError: for an unknown name (with the list), an alpha outside [0, 1], a negative length, a hold given to
            a schedule without one, or a ``start`` given to "constant".
    """
    options = ScheduleOptions(
        0.0 if start is None else start, end, warmup_steps, 0.0 if hold is None else hold, gain, limit, metric
    )
    return checked_schedule("alpha", name, options, start=start, hold=hold, prefix="alpha_")


def checked_schedule(
    knob: str, name: str, options: ScheduleOptions, *, start: float | None, hold: float | None, prefix: str
) -> KnobSchedule:
    """Return a schedule of a knob with its options checked.

    Args:
        knob: a name of `KNOBS`.
        name: one of `available_alpha_schedules`.
        options: of the schedule, without the defaults of ``start`` and ``hold`` that the schedule has.
        start, hold: as the user gave them; None for the schedule's default.
        prefix: of the options' names in messages.

    Raises:
        ValueError: see `get_alpha_schedule`; the message has the option's name, its value and the remedy.
    """
    if name not in _SCHEDULES:
        raise ValueError(
            f"{prefix}schedule={name!r} is unknown; choose one of {', '.join(_SCHEDULES)} "
            "(or register your own with register_alpha_schedule)."
        )
    registered = _SCHEDULES[name]
    end = options.end
    if name == "constant" and start is not None and start != end:
        raise ValueError(
            f"{prefix}start={start} contradicts {prefix}schedule='constant', which stays at {prefix}end={end}."
        )
    if hold is not None and not registered.uses_hold:
        raise ValueError(f"{prefix}hold={hold} has no effect on {prefix}schedule={name!r}; leave it out.")
    options = replace(
        options,
        start=registered.start if start is None else start,
        hold=registered.hold if hold is None else hold,
    )
    levels = {"low": options.low, "high": options.high, "start": options.start, "end": end}
    for label, level in levels.items():
        if level is not None and (problem := KNOBS[knob].problem(level)):
            raise ValueError(f"{prefix}{label}={level} {problem}.")
    for label, value in (("warmup_steps", options.warmup_steps), ("hold", options.hold)):
        if not 0.0 <= value < math.inf:
            raise ValueError(
                f"{prefix}{label}={value} must be 0 or more: >= 1 is steps, below 1 a share of all steps."
            )
        if value > 1.0 and value != int(value):
            raise ValueError(f"{prefix}{label}={value} is neither a share (below 1) nor a whole number of steps.")
    if not options.limit > 0.0 or not math.isfinite(options.gain):
        place = "" if prefix == "alpha_" else prefix
        raise ValueError(
            f"{place}feedback needs a positive limit and a finite gain, not limit={options.limit}, "
            f"gain={options.gain}."
        )
    return KnobSchedule(name, options, knob)
