"""Cross-entropy, the logarithmic score."""

from __future__ import annotations

from ..rows import RowScore, RowStatistics, Rule, RuleOptions


def score(row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return ``-sum_j t_j log p_j`` for the target distribution t, one-hot (``-log p_y``) or smoothed.

    Source: Good, "Rational Decisions" (1952).
    """
    eps, vocab_size = options.label_smoothing, options.vocab_size
    value = row.nll
    if eps:
        value = (1 - eps) * value + eps * (row.log_normalizer - row.mean_logit)
    off_target_mass = eps * (vocab_size - 1) / vocab_size
    return RowScore(value, 1.0, 0.0, -eps / vocab_size, 0.0, off_target_mass - row.miss)


def kernel(weight, p, q, r, nll, log_sum, norm, mean, power, top, size, epsilon, share, parameters, alpha, SMOOTHING):
    """Compute the same for one row, in Triton."""
    value = nll
    d = 0.0
    target = 0.0
    if SMOOTHING == 1:
        value = (1.0 - epsilon) * nll + epsilon * (log_sum - mean)
        d = -(weight * share)
        target = weight * (epsilon * (size - 1.0) / size)
    return weight * value, weight, 0.0, d, 0.0, target - weight * q


def with_uniform_share(plain: RowScore, row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return the label-smoothed form of a rule that depends on p_y only, such as the focal loss.

    It is ``(1 - epsilon) * rule + epsilon * (-mean_j log p_j)``: the uniform part of the smoothed label is scored by
    the logarithm, so that a rule that equals cross-entropy becomes label-smoothed cross-entropy.
    """
    epsilon, share = options.label_smoothing, 1.0 / options.vocab_size
    if not epsilon:
        return plain
    uniform = RowScore(row.log_normalizer - row.mean_logit, 1.0, 0.0, -share, 0.0, row.p_target - share)
    return plain.scaled(1 - epsilon).plus(uniform.scaled(epsilon))


def uniform_kernel(value, a, target, weight, p, log_sum, mean, size, epsilon, share, SMOOTHING):
    """Add the uniform part of `with_uniform_share` to a rule already scaled by ``1 - epsilon``, in Triton."""
    d = 0.0
    if SMOOTHING == 1:
        value += weight * epsilon * (log_sum - mean)
        a += weight * epsilon
        d = -(weight * share)
        target += weight * epsilon * (p - 1.0 / size)
    return value, a, 0.0, d, 0.0, target


RULE = Rule("ce", score, kernel, formula="-log p_y", proper="yes", bounds="[0, ∞)", source="Good (1952)", order=2)
