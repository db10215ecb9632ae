"""Steps that are given as a number or as a share of all, as the Trainer takes them."""

from __future__ import annotations

import math


def stop_step(stop_at_step: float, max_steps: int, eval_steps: float | None = None) -> int:
    """Return the optimizer step to stop at.

    Args:
        stop_at_step: 1 or more counts steps, below 1 is a share of all.
        max_steps: of the whole run.
        eval_steps: between evaluations; a share is rounded up to the next one. None does not round.
    """
    if stop_at_step >= 1:
        return int(stop_at_step)
    # The product of a share and a number of steps may exceed the whole number it stands for by a rounding error.
    step = math.ceil(round(stop_at_step * max_steps, 6))
    return math.ceil(step / eval_steps) * int(eval_steps) if eval_steps else step
