"""The Brier score: the squared distance between the predicted distribution and the one-hot label."""

from __future__ import annotations

from ..rows import RowScore, RowStatistics, Rule, RuleOptions, with_tail


def score(row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return ``sum_j (p_j - t_j)**2`` for the target distribution t, one-hot or smoothed.

    Source: Brier, "Verification of Forecasts Expressed in Terms of Probability" (1950).
    """
    eps, vocab_size = options.label_smoothing or options.score_smoothing, options.vocab_size
    p, r = row.p_target, row.off_norm
    gap = row.miss - eps  # (1 - eps) - p_y, computed without cancellation
    value = row.brier
    if eps:
        share = eps / vocab_size
        value = (gap + share).square() + r - 2 * share * row.miss + (vocab_size - 1) * share**2
    brier = RowScore(value, 2 * (p * gap - r), 2.0, 0.0, 0.0, -2 * p * (gap * row.miss + r))
    return with_tail(brier, row, options)


def kernel(weight, p, q, r, nll, log_sum, norm, mean, size, epsilon, share, parameters, alpha, SMOOTHING):
    """Compute the same for one row, in Triton."""
    gap = q
    value = q * q + r
    if SMOOTHING > 0:
        gap = q - epsilon
        value = (gap + share) * (gap + share) + r - 2.0 * share * q + (size - 1.0) * share * share
    a = weight * 2.0 * (p * gap - r)
    target = -(weight * 2.0 * p * (gap * q + r))
    return weight * value, a, weight * 2.0, 0.0, weight, target


RULE = Rule(
    "brier", score, kernel, formula="Σ_j (p_j - [j = y])²", proper="yes", bounds="[0, 2]", source="Brier (1950)",
    order=3, score_smoothing=True,
)  # fmt: skip
