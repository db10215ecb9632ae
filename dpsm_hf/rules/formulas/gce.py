"""Generalised cross-entropy: q interpolates between cross-entropy (q towards 0) and ``1 - p_y`` (q = 1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..rows import Parameter, RowScore, RowStatistics, Rule, RuleOptions
from . import ce

tl: Any = None  # triton.language, once the Triton functions are made


def score(row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return ``(1 - p_y**q) / q``.

    Source: Zhang & Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels"
    (NeurIPS 2018), section 3.2.
    """
    (exponent,) = options.parameters
    return with_exponent(exponent, row, options)


def with_exponent(exponent: float | Tensor, row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return the score for an exponent, one for all rows or one for each, ``[N]``; no gradient goes through it."""
    # computed from log p_y, which is accurate where p_y is close to 1 and where p_y underflows
    log_power = -exponent * row.nll
    power = log_power.exp()
    plain = RowScore(-log_power.expm1() / exponent, power, 0.0, 0.0, 0.0, -power * row.miss)
    return ce.with_uniform_share(plain, row, options)


def kernel(weight, p, q, r, nll, log_sum, norm, mean, power, top, size, epsilon, share, parameters, alpha, SMOOTHING):
    """Compute the same for one row, in Triton."""
    return exponent_kernel(parameters[0], weight, p, q, nll, log_sum, mean, size, epsilon, share, SMOOTHING)


def exponent_kernel(exponent, weight, p, q, nll, log_sum, mean, size, epsilon, share, SMOOTHING):
    """Compute `with_exponent` for one row, in Triton."""
    part = weight * (1.0 - epsilon) if SMOOTHING == 1 else weight  # the rest is the uniform share
    x = exponent * nll
    power = tl.exp(-x)
    # 1 - exp(-x) by Kahan's correction: accurate for small x, where exp(-x) loses the digits of x
    near = (power > 0.5) & (power < 1.0)
    log_power = tl.log(tl.where(near, power, 0.5))
    loss = tl.where(near, (power - 1.0) * x / log_power, tl.where(power < 1.0, 1.0 - power, x))
    value, a, target = part * loss / exponent, part * power, -(part * power * q)
    return ce.uniform_kernel(value, a, target, weight, p, log_sum, mean, size, epsilon, share, SMOOTHING)


EXPONENT = Parameter(
    "gce_q", 0.7, help="q of scoring_rule=gce, in (0, 1]; towards 0 it becomes cross-entropy.",
    allowed=lambda q: 0.0 < q <= 1.0, must="lie in (0, 1]",
)  # fmt: skip
RULE = Rule(
    "gce", score, kernel, formula="(1 - p_y^q) / q, q = `gce_q`", proper="no", bounds="[0, 1/q]",
    source="Zhang & Sabuncu (2018)", parameters=(EXPONENT,),
)  # fmt: skip
