"""DEFT: generalised cross-entropy whose exponent is how concentrated the prediction is."""

from __future__ import annotations

from typing import Any

from ..rows import RowScore, RowStatistics, Rule, RuleOptions
from . import ce

tl: Any = None  # triton.language, once the Triton functions are made


def score(row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return ``(1 - p_y**a) / a`` with ``a = sg(sum_j p_j**2)``, where sg lets no gradient through.

    Where the model is unsure, a is small and this is cross-entropy; where it is sure, a label that it finds unlikely
    is hardly learnt.

    Source: arXiv:2602.11424 (2026).
    """
    concentration = row.p_target.square() + row.off_norm
    log_power = -concentration * row.nll
    power = log_power.exp()
    plain = RowScore(-log_power.expm1() / concentration, power, 0.0, 0.0, 0.0, -power * row.miss)
    return ce.with_uniform_share(plain, row, options)


def kernel(weight, p, q, r, nll, log_sum, norm, mean, power, top, size, epsilon, share, parameters, alpha, SMOOTHING):
    """Compute the same for one row, in Triton."""
    part = weight * (1.0 - epsilon) if SMOOTHING == 1 else weight  # the rest is the uniform share
    concentration = norm * norm
    x = concentration * nll
    own = tl.exp(-x)
    # 1 - exp(-x) by Kahan's correction: accurate for small x, where exp(-x) loses the digits of x
    near = (own > 0.5) & (own < 1.0)
    log_own = tl.log(tl.where(near, own, 0.5))
    loss = tl.where(near, (own - 1.0) * x / log_own, tl.where(own < 1.0, 1.0 - own, x))
    value, a, target = part * loss / concentration, part * own, -(part * own * q)
    return ce.uniform_kernel(value, a, target, weight, p, log_sum, mean, size, epsilon, share, SMOOTHING)


RULE = Rule(
    "deft", score, kernel, formula="(1 - p_y^a) / a, a = sg(‖p‖²)", proper="no", bounds="[0, ∞)",
    source="arXiv:2602.11424 (2026)",
)  # fmt: skip
