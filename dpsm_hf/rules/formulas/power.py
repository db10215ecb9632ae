"""The power score, also called Tsallis or density power score: beta leads from cross-entropy to the Brier score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rows import Parameter, RowScore, RowStatistics, Rule, RuleOptions
from . import ce

tl: Any = None  # triton.language, once the Triton functions are made


def score(row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return ``(1 - p_y**beta) / beta + (sum_j p_j**(1 + beta) - 1) / (1 + beta)``.

    It is cross-entropy as beta goes to 0, half of the Brier score at 1, and strictly proper for every beta above 0.

    Source: Basu, Harris, Hjort & Jones, "Robust and Efficient Estimation by Minimising a Density Power Divergence"
    (Biometrika 1998); as a scoring rule Gneiting & Raftery (JASA 2007), section 4.
    """
    (beta,) = options.parameters
    x = row.nll
    # both fractions are x to first order, which cancels in their sum: where x is small it is left out of them
    small = _beyond_first_order(x, 1 + beta) - _beyond_first_order(x, beta)
    large = torch.expm1(-(1 + beta) * x) / (1 + beta) - torch.expm1(-beta * x) / beta
    value = torch.where((1 + beta) * x < 1, small, large)
    power = (-beta * row.nll).exp()
    slope = power * row.miss - row.other_power
    target = -power * row.miss.square() - row.p_target * row.other_power
    plain = RowScore(value + row.other_power / (1 + beta), slope, 1.0, 0.0, 0.0, target)
    return ce.with_uniform_share(plain, row, options)


def _beyond_first_order(x: Tensor, c: float) -> Tensor:
    """Return ``(exp(-c x) - 1 + c x) / c`` for ``c x < 1``, without cancellation."""
    y = c * x
    series = torch.zeros_like(y)
    for n in range(18, 2, -1):  # y**2 / 2 - y**3 / 6 + ..., by Horner
        series = (1.0 - series) * y / n
    return 0.5 * y.square() * (1.0 - series) / c


def kernel(weight, p, q, r, nll, log_sum, norm, mean, power, top, size, epsilon, share, parameters, alpha, SMOOTHING):
    """Compute the same for one row, in Triton."""
    beta = parameters[0]
    part = weight * (1.0 - epsilon) if SMOOTHING == 1 else weight  # the rest is the uniform share
    own = tl.exp(-beta * nll)
    small = series_kernel(nll, 1.0 + beta) - series_kernel(nll, beta)
    large = (p * own - 1.0) / (1.0 + beta) - (own - 1.0) / beta
    value = tl.where((1.0 + beta) * nll < 1.0, small, large) + power / (1.0 + beta)
    target = -(part * (own * q * q + p * power))
    found, a, _, d, tail, target = ce.uniform_kernel(
        part * value, part * (own * q - power), target, weight, p, log_sum, mean, size, epsilon, share, SMOOTHING
    )
    return found, a, part, d, tail, target


def series_kernel(x, c):
    """Compute ``(exp(-c x) - 1 + c x) / c`` for ``c x < 1``, in Triton."""
    y = c * x
    series = y / 11.0
    series = (1.0 - series) * y / 10.0
    series = (1.0 - series) * y / 9.0
    series = (1.0 - series) * y / 8.0
    series = (1.0 - series) * y / 7.0
    series = (1.0 - series) * y / 6.0
    series = (1.0 - series) * y / 5.0
    series = (1.0 - series) * y / 4.0
    series = (1.0 - series) * y / 3.0
    return 0.5 * y * y * (1.0 - series) / c


BETA = Parameter(
    "power_beta", 0.5, help="beta of scoring_rule=power, in (0, 4]; towards 0 it becomes cross-entropy, 1 is half the "
    "Brier score.", allowed=lambda beta: 0.0 < beta <= 4.0, must="lie in (0, 4]",
)  # fmt: skip
RULE = Rule(
    "power", score, kernel, formula="(1 - p_y^β) / β + (Σ_j p_j^(1+β) - 1) / (1 + β), β = `power_beta`", proper="yes",
    bounds="[0, 1/β]", source="Basu et al. (1998)", parameters=(BETA,), exponent=lambda parameters: 1 + parameters[0],
)  # fmt: skip
