"""The searches for a temperature: least NLL, least Brier score, and mean confidence equal to the accuracy.

Each moves on log T by Newton's method within a bracket, from sums over the tokens at one temperature after the other.
They run side by side: one pass over the data takes the sums at the next temperature of each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..rules.extra_statistics import BRIER_MOMENTS, GAP_MOMENTS, MOMENTS, ExtraStatistics
from ..runtime.devices import float64_device

#: Where temperatures are looked for. No scalar repairs a model whose best one lies at either end.
LEAST, MOST = 0.01, 100.0

_TOLERANCE = 1e-6  # of log T
_MOST_PASSES = 60
_AT_THE_END = 1e-3  # in log T from either end


class UnfittableError(ValueError):
    """No temperature is best: nothing to fit on, logits that are NaN, or a score without a minimum."""


class Moments(NamedTuple):
    """Sums over tokens at one temperature: NLL in nats, its first and second derivative by log T, and the tokens."""

    nll: float
    gradient: float
    curvature: float
    tokens: int


#: The sums of a pass by the name of the search that asked for them, and the number of tokens.
Sums = tuple[Mapping[str, Sequence[float]], int]


class TemperatureSearch(ABC):
    """Look for the zero on log T of a derivative, from T = 1 on; where it changes from falling to rising.

    A bracket around it, and a half step where the slope is not positive, make Newton's method safe.
    """

    #: Of the search, and of the sums it takes.
    name: str

    def __init__(self) -> None:
        self._x, self._low, self._high = 0.0, math.log(LEAST), math.log(MOST)
        self._passes = 0
        #: What was found; None as long as nothing was.
        self.temperature: float | None = None
        #: Why nothing will be found, in a sentence.
        self.failure = ""

    @property
    def next(self) -> float | None:
        """Return the temperature that sums are wanted at; None when the search has ended."""
        return None if self.temperature is not None or self.failure else math.exp(self._x)

    @abstractmethod
    def take(self, sums: Sequence[float], tokens: int) -> None:
        """Go on from the sums at the temperature that was asked for."""

    @abstractmethod
    def fail(self, x: float) -> None:
        """End without a temperature, x being the last log T."""

    def _move(self, gradient: float, curvature: float) -> bool:
        """Take a step; return whether it was the last one."""
        self._passes += 1
        x = self._x
        if gradient > 0:
            self._high = min(self._high, x)
        else:
            self._low = max(self._low, x)
        step = -gradient / curvature if curvature > 0 else -math.copysign(0.5, gradient)
        following = x + max(-1.0, min(1.0, step))
        # from an end of the bracket that was visited before, the steps would go round in a circle
        if not self._low <= following <= self._high or (following != x and following in (self._low, self._high)):
            following = (self._low + self._high) / 2
        if abs(following - x) < _TOLERANCE:
            if min(x - math.log(LEAST), math.log(MOST) - x) < _AT_THE_END:
                self.fail(x)
                return False
            self.temperature = math.exp(following)
            return True
        self._x = following
        if self._passes == _MOST_PASSES:
            self.fail(following)
        return False


class NllSearch(TemperatureSearch):
    """Look for the temperature of least NLL, which is convex in 1/T and so has one minimum."""

    name = "nll"

    def __init__(self) -> None:
        super().__init__()
        #: Mean NLL at T = 1, and at the temperature that was found.
        self.before, self.after = math.nan, math.nan
        self.tokens = 0

    def take(self, sums: Sequence[float], tokens: int) -> None:
        """Go on from the sums of `MOMENTS`.

        Raises:
            UnfittableError: if there is no token, a sum is not finite, or the NLL has no minimum.
        """
        nll, gradient, curvature = sums
        x, self.tokens = self._x, tokens
        if not tokens:
            raise UnfittableError(
                "no scored token to fit a temperature on: every label is ignored, or the data is empty."
            )
        if not all(math.isfinite(value) for value in sums):
            raise UnfittableError(
                f"the NLL at temperature {math.exp(x):.4g} is {nll}: a logit is NaN, or a label is impossible "
                "(its logit is masked). Fit on tokens that the model can predict."
            )
        if nll == 0:  # to the last bit, so that nothing points anywhere
            self.fail(math.log(LEAST))
        nll, gradient, curvature = (value / tokens for value in sums)
        if not self._passes:
            self.before = nll
        if self._move(gradient, curvature):
            self.after = nll  # so near the least that nothing is left to add

    def fail(self, x: float) -> None:
        """Raise UnfittableError: without this temperature none is reported."""
        end = "every token is predicted rightly" if x < 0 else "its predictions tell nothing of the labels"
        raise UnfittableError(
            f"the NLL has no minimum between temperatures {LEAST} and {MOST}: it still falls at {math.exp(x):.4g}. "
            f"No temperature is best for this model and these {self.tokens} tokens ({end}); use more data."
        )


class BrierSearch(TemperatureSearch):
    """Look for a temperature of least Brier score, the next minimum downhill from T = 1."""

    name = "brier"

    def take(self, sums: Sequence[float], tokens: int) -> None:
        """Go on from the sums of `BRIER_MOMENTS`."""
        _, gradient, curvature = (value / tokens for value in sums)
        if gradient == 0 and curvature <= 0:  # to the last bit, so that nothing points anywhere
            self.fail(self._x)
        else:
            self._move(gradient, curvature)

    def fail(self, x: float) -> None:
        """End with a sentence."""
        self.failure = (
            f"The Brier score has no minimum between temperatures {LEAST} and {MOST}: the search ended at "
            f"{math.exp(x):.4g}."
        )


class GapSearch(TemperatureSearch):
    """Look for the temperature at which mean confidence is the accuracy; confidence falls as T grows."""

    name = "gap"

    def take(self, sums: Sequence[float], tokens: int) -> None:
        """Go on from the sums of `GAP_MOMENTS`."""
        gap, slope = (value / tokens for value in sums)
        self._gap = gap
        self._move(-gap, -slope)

    def fail(self, x: float) -> None:
        """End with a sentence."""
        side = "above" if self._gap > 0 else "below"
        self.failure = (
            f"Mean confidence is the accuracy at no temperature between {LEAST} and {MOST}: it is still {side} it at "
            f"{math.exp(x):.4g}."
        )


class MomentSums:
    """Add up the moments of tokens at the temperatures of one pass, in float64.

    Args:
        wanted: the temperature of each search that goes on, by its name.
    """

    _COLUMNS = {"nll": MOMENTS, "brier": BRIER_MOMENTS, "gap": GAP_MOMENTS}

    def __init__(self, wanted: Mapping[str, float]) -> None:
        #: What is to be computed of each token.
        self.extra = ExtraStatistics(
            moments_at=wanted.get("nll"), brier_moments_at=wanted.get("brier"), gap_moments_at=wanted.get("gap")
        )
        # the last entry of each counts the tokens
        self._sums: dict[str, Tensor | None] = {name: None for name in self._COLUMNS if name in wanted}

    def add(self, columns: Tensor) -> None:
        """Add the columns of `extra` of the scored tokens, ``[n, width]``."""
        found = self.extra.split(columns)
        parts = {"nll": found.moments, "brier": found.brier_moments, "gap": found.gap_moments}
        home = float64_device(columns.device)
        for name, before in self._sums.items():
            part = parts[name]
            assert part is not None
            wide = part.contiguous().to(home).double()
            sums = torch.cat([wide.sum(0), wide.new_full((1,), float(len(wide)))])
            self._sums[name] = sums if before is None else before + sums

    def finish(self, device: torch.device, over_processes: Callable[[Tensor], Tensor] = lambda sums: sums) -> Sums:
        """Return the sums by search, each summed over the processes, and the number of tokens."""
        tokens, found = 0, {}
        for name, sums in self._sums.items():
            if sums is None:
                sums = torch.zeros(len(self._COLUMNS[name]) + 1, dtype=torch.float64)
            *found[name], count = over_processes(sums.to(float64_device(device))).tolist()
            tokens = int(count)
        return found, tokens


def search(passes: Callable[[Mapping[str, float]], Sums], *searches: TemperatureSearch) -> int:
    """Run searches side by side until each has ended, and return how many passes over the data that took.

    Args:
        passes: called with the next temperature of each search that goes on, by its name; one pass over the data.
        searches: to run.

    Raises:
        UnfittableError: from a search without which there is nothing to report.
    """
    number = 0
    while wanted := {one.name: at for one in searches if (at := one.next) is not None}:
        sums, tokens = passes(wanted)
        number += 1
        for one in searches:
            if one.name in wanted:
                one.take(sums[one.name], tokens)
    return number
