"""Cross-entropy: the logarithmic score."""

from __future__ import annotations

import functools
from typing import Any

from ..rows import RowScore, RowStatistics
from ..rule import Rule, RuleOptions


def score(row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return ``-log p_y``, or its mean over the smoothed label."""
    eps, vocab_size = options.label_smoothing, options.vocab_size
    value = row.nll
    if eps:
        value = (1 - eps) * value + eps * (row.log_normalizer - row.mean_logit)
    off_target_mass = eps * (vocab_size - 1) / vocab_size
    return RowScore(value, 1.0, 0.0, -eps / vocab_size, 0.0, off_target_mass - row.miss)


@functools.cache
def kernel() -> Any:
    """Return the Triton function of the rule, see `Rule`."""
    global tl  # where Triton looks for it
    import triton
    import triton.language as tl

    @triton.jit
    def ce(
        weight, p, q, r, nll, log_sum, norm, mean, size, epsilon, share, parameters, alpha, SMOOTHING: tl.constexpr
    ):
        value = nll
        d = 0.0
        target = 0.0
        if SMOOTHING == 1:
            value = (1.0 - epsilon) * nll + epsilon * (log_sum - mean)
            d = -(weight * share)
            target = weight * (epsilon * (size - 1.0) / size)
        return weight * value, weight, 0.0, d, 0.0, target - weight * q

    return ce


RULE = Rule(
    name="ce",
    score=score,
    kernel=kernel,
    formula="-log p_y",
    proper="yes",
    bounds="[0, ∞)",
    source="Good (1952)",
    order=2,
)
