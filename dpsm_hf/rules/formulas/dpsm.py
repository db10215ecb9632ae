"""The mix of cross-entropy and the Brier score; a schedule moves its weight alpha during training."""

from __future__ import annotations

from ..rows import RowScore, RowStatistics, Rule, RuleOptions
from . import brier, ce


def score(row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return ``(1 - alpha) * CE + alpha * Brier``; score smoothing and kappa are the Brier part's."""
    log_part = ce.score(row, options).scaled(1 - options.alpha)
    return log_part.plus(brier.score(row, options).scaled(options.alpha))


def kernel(weight, p, q, r, nll, log_sum, norm, mean, power, top, size, epsilon, share, parameters, alpha, SMOOTHING):
    """Compute the same for one row, in Triton."""
    value, a, b, d, tail, target = ce.kernel(
        weight * (1.0 - alpha),
        p, q, r, nll, log_sum, norm, mean, power, top, size, epsilon, share, parameters, alpha, SMOOTHING,
    )  # fmt: skip
    value_2, a_2, b_2, d_2, tail_2, target_2 = brier.kernel(
        weight * alpha,
        p, q, r, nll, log_sum, norm, mean, power, top, size, epsilon, share, parameters, alpha, SMOOTHING,
    )  # fmt: skip
    return value + value_2, a + a_2, b + b_2, d + d_2, tail + tail_2, target + target_2


RULE = Rule(
    "dpsm", score, kernel, formula="(1 - α) CE + α Brier", proper="yes, at every α, with κ = 1", bounds="[0, ∞)",
    source="this package", order=1, parameters=(brier.NORM_WEIGHT,), score_smoothing=True,
)  # fmt: skip
