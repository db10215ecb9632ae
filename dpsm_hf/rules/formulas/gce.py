"""Generalised cross-entropy: between cross-entropy (q towards 0) and the probability of an error (q = 1)."""

from __future__ import annotations

import functools
from typing import Any

from ..rows import RowScore, RowStatistics
from ..rule import Parameter, Rule, RuleOptions, with_uniform_share


def score(row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return ``(1 - p_y**q) / q``."""
    (exponent,) = options.parameters
    # through log p_y, which keeps its digits where p_y is close to 1 and where it underflows
    log_power = -exponent * row.nll
    power = log_power.exp()
    plain = RowScore(-log_power.expm1() / exponent, power, 0.0, 0.0, 0.0, -power * row.miss)
    return with_uniform_share(plain, row, options)


@functools.cache
def kernel() -> Any:
    """Return the Triton function of the rule, see `Rule`."""
    global tl  # where Triton looks for it
    import triton
    import triton.language as tl

    @triton.jit
    def gce(
        weight, p, q, r, nll, log_sum, norm, mean, size, epsilon, share, parameters, alpha, SMOOTHING: tl.constexpr
    ):
        exponent = parameters[0]
        part = weight * (1.0 - epsilon) if SMOOTHING == 1 else weight
        x = exponent * nll
        power = tl.exp(-x)
        # 1 - exp(-x) by Kahan's correction: exact to rounding where exp(-x) has lost the digits of x
        near = (power > 0.5) & (power < 1.0)
        log_power = tl.log(tl.where(near, power, 0.5))
        loss = tl.where(near, (power - 1.0) * x / log_power, tl.where(power < 1.0, 1.0 - power, x))
        value = part * loss / exponent
        a = part * power
        d = 0.0
        target = -(part * power * q)
        if SMOOTHING == 1:
            value += weight * epsilon * (log_sum - mean)
            a += weight * epsilon
            d = -(weight * share)
            target += weight * epsilon * (p - 1.0 / size)
        return value, a, 0.0, d, 0.0, target

    return gce


RULE = Rule(
    name="gce",
    score=score,
    kernel=kernel,
    formula="(1 - p_y^q) / q, q = `gce_q`",
    proper="no",
    bounds="[0, 1/q]",
    source="Zhang & Sabuncu (2018)",
    parameters=(
        Parameter(
            name="gce_q",
            default=0.7,
            help="q of loss_type=gce, in (0, 1]; towards 0 it becomes cross-entropy.",
            allowed=lambda q: 0.0 < q <= 1.0,
            must="lie in (0, 1]",
        ),
    ),
)
