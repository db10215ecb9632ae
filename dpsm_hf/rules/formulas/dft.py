"""Dynamic fine-tuning: cross-entropy times the probability of the label, through which no gradient goes."""

from __future__ import annotations

from ..rows import RowScore, RowStatistics, Rule, RuleOptions
from . import ce


def score(row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return ``-sg(p_y) * log p_y``, where sg lets no gradient through.

    The same as ``loss_type="dft"`` of TRL and ``use_dft_loss`` of LLaMA-Factory. A label that the model finds unlikely
    is hardly learnt. The gradient is that of ``-p_y``: its optimum puts everything on the most likely label.

    Source: Wu et al., "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification"
    (2025, arXiv:2508.05629).
    """
    p = row.p_target
    return ce.with_uniform_share(RowScore(p * row.nll, p, 0.0, 0.0, 0.0, -p * row.miss), row, options)


def kernel(weight, p, q, r, nll, log_sum, norm, mean, power, top, size, epsilon, share, parameters, alpha, SMOOTHING):
    """Compute the same for one row, in Triton."""
    part = weight * (1.0 - epsilon) if SMOOTHING == 1 else weight  # the rest is the uniform share
    value, a, target = part * p * nll, part * p, -(part * p * q)
    return ce.uniform_kernel(value, a, target, weight, p, log_sum, mean, size, epsilon, share, SMOOTHING)


RULE = Rule(
    "dft", score, kernel, formula="-sg(p_y) log p_y", proper="no", bounds="[0, 1/e]", source="Wu et al. (2025)",
)  # fmt: skip
