"""`feedback`: a number of the objective that evaluations move, as a pure function of the log.

After each evaluation the knob u moves against a signal y of held-out data, positive where the model is too confident::

    u <- clip(u + clip(K_n * s * y, -D_n, D_n), low, high)        K_n = gain / 2**n    D_n = limit / 2**n

n counts how often the move has turned round so far, where `halving` is on. So it cannot swing for ever: where a
larger u lowers the signal, the n-th overshoot is at most D_n, whatever the gain, until a move is small enough not to
overshoot. What many turns have used up does not come back: the knob settles, and does not follow what keeps
moving. (Halving at a change of sign is that of RPROP, Riedmiller & Braun 1993, without its growth; Kesten, 1958, lets
the gain of stochastic approximation fall with the changes of sign.) s is 1, or the last logged value of one number, or
of one divided by another. Signals within `tolerance` of 0 are taken as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LogHistory = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Feedback:
    """How evaluations move a knob; the module's first lines have the formula.

    Args:
        start, low, high: where the knob begins, and between what it stays.
        gain: K; negative where the knob has to fall for a model that is too confident.
        limit: the most that the knob moves after the first evaluation.
        signal: the logged number that moves it, such as ``eval_signed_gap``.
        relative_to: the logged number that the gain is multiplied by, such as ``grad_norm``, or two of them as a
            quotient, ``grad_norm/grad_norm_ce``; empty for none.
        tolerance: signals of at most this size move nothing.
        halving: whether each turn of the knob's way, from up to down or back, halves gain and limit.
    """

    start: float
    low: float
    high: float
    gain: float
    limit: float
    signal: str
    relative_to: str = ""
    tolerance: float = 0.0
    halving: bool = True

    def value(self, step: int, history: LogHistory) -> float:
        """Return the knob at a step.

        Args:
            step: optimizer steps done; entries of later steps are not read.
            history: the trainer's log, in order.
        """
        value, factor, last = self.start, 1.0, 0.0
        scale = dict.fromkeys(self.scale_names(), math.nan)
        for entry in history:
            if entry.get("step", 0) > step:
                continue
            scale |= {name: number for name in scale if (number := _number(entry.get(name))) is not None}
            signal = _number(entry.get(self.signal))
            if signal is None or abs(signal) <= self.tolerance:
                continue
            move = self.gain * _quotient(*scale.values()) * signal
            if math.isnan(move):  # without a logged number to scale by there is no move
                continue
            if self.halving and move * last < 0:
                factor /= 2
            limit = factor * self.limit
            before, value = value, min(self.high, max(self.low, value + min(limit, max(-limit, factor * move))))
            if value != before:  # at a bound the signal may change its sign without anything having overshot
                last = value - before
        return value

    def scale_names(self) -> list[str]:
        """Return the logged numbers that the gain is multiplied and divided by; none, one or two."""
        return self.relative_to.split("/") if self.relative_to else []

    def read(self) -> list[str]:
        """Return every logged number that the knob depends on."""
        return [self.signal, *self.scale_names()]

    def describe(self, knob: str) -> str:
        """Return in a line how the knob moves."""
        scale = f" * {self.relative_to}" if self.relative_to else ""
        tail = ", halved at each turn" if self.halving else ""
        tail += f", not for signals within {self.tolerance:g}" if self.tolerance else ""
        return (
            f"feedback: {knob} starts at {self.start:g} and moves by {self.gain:g}{scale} * {self.signal} after each "
            f"evaluation, at most {self.limit:g} at a time{tail}, between {self.low:g} and {self.high:g}"
        )


def _number(value: Any) -> float | None:
    """Return a logged number if it is one and finite."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _quotient(over: float = 1.0, under: float = 1.0) -> float:
    return over / under if under else math.nan
