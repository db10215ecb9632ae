"""DEFT: generalised cross-entropy whose exponent is how concentrated the prediction is."""

from __future__ import annotations

from ..rows import RowScore, RowStatistics, Rule, RuleOptions
from . import gce


def score(row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return ``(1 - p_y**a) / a`` with ``a = sg(sum_j p_j**2)``, where sg lets no gradient through.

    Where the model is unsure, a is small and this is cross-entropy; where it is sure, a label that it finds unlikely
    is hardly learnt.

    Source: arXiv:2602.11424 (2026).
    """
    return gce.with_exponent(row.p_target.square() + row.off_norm, row, options)


def kernel(weight, p, q, r, nll, log_sum, norm, mean, power, top, size, epsilon, share, parameters, alpha, SMOOTHING):
    """Compute the same for one row, in Triton."""
    return gce.exponent_kernel(norm * norm, weight, p, q, nll, log_sum, mean, size, epsilon, share, SMOOTHING)


RULE = Rule(
    "deft", score, kernel, formula="(1 - p_y^a) / a, a = sg(‖p‖²)", proper="no", bounds="[0, ∞)",
    source="arXiv:2602.11424 (2026)",
)  # fmt: skip
