"""The spherical score: one minus the cosine between the predicted distribution and the one-hot label."""

from __future__ import annotations

from ..rows import RowScore, RowStatistics, Rule, RuleOptions, with_tail


def score(row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return ``1 - sum_j t_j p_j / ||p||`` for the target distribution t, one-hot or smoothed.

    Sources: Gneiting & Raftery (JASA 2007), section 3; on tokens Shao et al. (ICML 2024).
    """
    eps = options.label_smoothing or options.score_smoothing
    p, r, share = row.p_target, row.off_norm, eps / options.vocab_size
    norm = (p.square() + r).sqrt()
    expected = (1 - eps) * p + share  # sum_j t_j p_j
    value = row.spherical
    if eps:
        value = value + (eps * p - share) / norm
    target = p / norm**3 * (share * (p * row.miss - r) - (1 - eps) * r)
    return with_tail(RowScore(value, -share / norm, expected / norm**3, 0.0, 0.0, target), row, options)


def kernel(weight, p, q, r, nll, log_sum, norm, mean, power, top, size, epsilon, share, parameters, alpha, SMOOTHING):
    """Compute the same for one row, in Triton."""
    cube = norm * norm * norm
    value = r / (norm * (norm + p))
    expected = p
    own = r
    a = 0.0
    if SMOOTHING > 0:
        value += (epsilon * p - share) / norm
        expected = (1.0 - epsilon) * p + share
        own = (1.0 - epsilon) * r - share * (p * q - r)
        a = -(share / norm)
    return weight * value, weight * a, weight * (expected / cube), 0.0, weight, -(weight * (p / cube * own))


RULE = Rule(
    "spherical", score, kernel, formula="1 - p_y / ‖p‖", proper="yes", bounds="[0, 1]",
    source="Gneiting & Raftery (2007); on tokens Shao et al. (2024)", order=4, score_smoothing=True,
)  # fmt: skip
