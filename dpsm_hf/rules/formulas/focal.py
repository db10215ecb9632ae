"""The focal loss: cross-entropy that weighs likely tokens down."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from ..rows import RowScore, RowStatistics
from ..rule import Parameter, Rule, RuleOptions, with_uniform_share


def score(row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return ``-(1 - p_y)**gamma * log p_y``."""
    (gamma,) = options.parameters
    q, nll = row.miss, row.nll
    modulation = q**gamma
    # q**(gamma - 1) * log p_y tends to -q**gamma as q -> 0, but inf * 0 would not: divide before the power
    ratio = torch.where(q > 0, nll / q, torch.ones_like(q))
    slope = modulation * (1 + gamma * row.p_target * ratio)
    return with_uniform_share(RowScore(modulation * nll, slope, 0.0, 0.0, 0.0, -slope * q), row, options)


@functools.cache
def kernel() -> Any:
    """Return the Triton function of the rule, see `Rule`."""
    global tl  # where Triton looks for it
    import triton
    import triton.language as tl

    @triton.jit
    def focal(
        weight, p, q, r, nll, log_sum, norm, mean, size, epsilon, share, parameters, alpha, SMOOTHING: tl.constexpr
    ):
        gamma = parameters[0]
        part = weight * (1.0 - epsilon) if SMOOTHING == 1 else weight
        positive = q > 0
        safe = tl.where(positive, q, 1.0)
        modulation = tl.where(positive, tl.exp(gamma * tl.log(safe)), tl.where(gamma == 0.0, 1.0, 0.0))
        slope = modulation * (1.0 + gamma * p * tl.where(positive, nll / safe, 1.0))
        value = part * modulation * nll
        a = part * slope
        d = 0.0
        target = -(part * slope * q)
        if SMOOTHING == 1:
            value += weight * epsilon * (log_sum - mean)
            a += weight * epsilon
            d = -(weight * share)
            target += weight * epsilon * (p - 1.0 / size)
        return value, a, 0.0, d, 0.0, target

    return focal


RULE = Rule(
    name="focal",
    score=score,
    kernel=kernel,
    formula="-(1 - p_y)^γ log p_y",
    proper="no (γ > 0)",
    bounds="[0, ∞)",
    source="Lin et al. (2017)",
    order=5,
    parameters=(
        Parameter(
            name="focal_gamma",
            default=2.0,
            help="exponent of loss_type=focal.",
            allowed=lambda gamma: 0.0 <= gamma < math.inf,
            must="be a finite number of at least 0",
        ),
    ),
)
