"""The focal loss: cross-entropy that gives less weight to tokens the model already predicts well."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..rows import Parameter, RowScore, RowStatistics, Rule, RuleOptions
from . import ce

tl: Any = None  # triton.language, once the Triton functions are made


def score(row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return ``-(1 - p_y)**gamma * log p_y``.

    Source: Lin et al., "Focal Loss for Dense Object Detection" (2017), equation 4.
    """
    (gamma,) = options.parameters
    q, nll = row.miss, row.nll
    modulation = q**gamma
    # q**(gamma - 1) * log p_y tends to -q**gamma as q -> 0, but for gamma < 1 its first factor is infinite there:
    # divide nll by q before multiplying by the power
    ratio = torch.where(q > 0, nll / q, torch.ones_like(q))
    slope = modulation * (1 + gamma * row.p_target * ratio)
    return ce.with_uniform_share(RowScore(modulation * nll, slope, 0.0, 0.0, 0.0, -slope * q), row, options)


def kernel(weight, p, q, r, nll, log_sum, norm, mean, power, top, size, epsilon, share, parameters, alpha, SMOOTHING):
    """Compute the same for one row, in Triton."""
    gamma = parameters[0]
    part = weight * (1.0 - epsilon) if SMOOTHING == 1 else weight  # the rest is the uniform share
    positive = q > 0
    safe = tl.where(positive, q, 1.0)
    modulation = tl.where(positive, tl.exp(gamma * tl.log(safe)), tl.where(gamma == 0.0, 1.0, 0.0))
    slope = modulation * (1.0 + gamma * p * tl.where(positive, nll / safe, 1.0))
    value, a, target = part * modulation * nll, part * slope, -(part * slope * q)
    return ce.uniform_kernel(value, a, target, weight, p, log_sum, mean, size, epsilon, share, SMOOTHING)


GAMMA = Parameter(
    "focal_gamma", 2.0, help="exponent of scoring_rule=focal.", allowed=lambda gamma: 0.0 <= gamma < math.inf,
    must="be a finite number of at least 0",
)  # fmt: skip
RULE = Rule(
    "focal", score, kernel, formula="-(1 - p_y)^γ log p_y", proper="no (γ > 0)", bounds="[0, ∞)",
    source="Lin et al. (2017)", order=5, parameters=(GAMMA,),
)  # fmt: skip
