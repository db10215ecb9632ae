"""The Brier score: the squared distance between the predicted distribution and the one-hot label."""

from __future__ import annotations

import math

from ..rows import Parameter, RowScore, RowStatistics, Rule, RuleOptions, with_tail


def score(row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return ``sum_j (p_j - t_j)**2 + (kappa - 1) * sum_j p_j**2`` for the target distribution t, one-hot or smoothed.

    With kappa = 1 it is the Brier score. A larger one weighs the norm of the prediction more, which is smallest for
    the uniform distribution, so that the optimum is less sure than the truth: ``p = t / kappa + (1 - 1 / kappa) / V``
    where that is no negative number.

    Source: Brier, "Verification of Forecasts Expressed in Terms of Probability" (1950).
    """
    (kappa,) = options.parameters
    eps, vocab_size = options.label_smoothing or options.score_smoothing, options.vocab_size
    p, r = row.p_target, row.off_norm
    gap = row.miss - eps  # (1 - eps) - p_y, computed without cancellation
    value = row.brier
    if eps:
        share = eps / vocab_size
        value = (gap + share).square() + r - 2 * share * row.miss + (vocab_size - 1) * share**2
    brier = RowScore(value, 2 * (p * gap - r), 2.0, 0.0, 0.0, -2 * p * (gap * row.miss + r))
    if (more := kappa - 1) != 0:
        norm = p.square() + r
        own = 2 * more * p * (p * row.miss - r)
        brier = brier.plus(RowScore(more * norm, -2 * more * norm, 2 * more, 0.0, 0.0, own))
    return with_tail(brier, row, options)


def kernel(weight, p, q, r, nll, log_sum, norm, mean, power, top, size, epsilon, share, parameters, alpha, SMOOTHING):
    """Compute the same for one row, in Triton."""
    gap = q
    value = q * q + r
    if SMOOTHING > 0:
        gap = q - epsilon
        value = (gap + share) * (gap + share) + r - 2.0 * share * q + (size - 1.0) * share * share
    more = parameters[0] - 1.0
    square = p * p + r
    a = weight * 2.0 * (p * gap - r - more * square)
    target = weight * 2.0 * p * (more * (p * q - r) - (gap * q + r))
    return weight * (value + more * square), a, weight * 2.0 * (1.0 + more), 0.0, weight, target


NORM_WEIGHT = Parameter(
    "norm_weight", 1.0, help="kappa, the weight of the squared norm of the prediction in the Brier score; 1 is the "
    "Brier score itself, more (1.5, say) trains a model that is less sure.",
    allowed=lambda kappa: 0.0 < kappa < math.inf, must="be a positive, finite number",
)  # fmt: skip
RULE = Rule(
    "brier", score, kernel, formula="Σ_j (p_j - [j = y])² + (κ - 1) ‖p‖², κ = `norm_weight` (1)",
    proper="yes, with κ = 1", bounds="[0, 2]", source="Brier (1950)", order=3, parameters=(NORM_WEIGHT,),
    score_smoothing=True,
)  # fmt: skip
