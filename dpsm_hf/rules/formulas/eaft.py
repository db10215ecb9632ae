"""Entropy-adaptive fine-tuning: cross-entropy times how undecided the model is between its most likely tokens."""

from __future__ import annotations

import math
from typing import Any

from ..rows import TOP_TOKENS, Parameter, RowScore, RowStatistics, Rule, RuleOptions
from . import ce

tl: Any = None  # triton.language, once the Triton functions are made


def score(row: RowStatistics, options: RuleOptions) -> RowScore:
    """Return ``sg(entropy / divisor)**alpha * -log p_y``, where sg lets no gradient through.

    The entropy is that of the softmax over the 20 largest logits, in nats. LLaMA-Factory (``use_eaft_loss``) divides
    by 3; axolotl (``eaft``) at first did not, and now divides by log 20, as the paper does.

    Source: "Entropy-Adaptive Fine-Tuning" (2026, arXiv:2601.02151).
    """
    exponent, divisor = options.parameters
    assert row.top_entropy is not None  # asked for by `top_entropy`
    weight = (row.top_entropy / divisor) ** exponent
    return ce.with_uniform_share(RowScore(weight * row.nll, weight, 0.0, 0.0, 0.0, -weight * row.miss), row, options)


def kernel(weight, p, q, r, nll, log_sum, norm, mean, power, top, size, epsilon, share, parameters, alpha, SMOOTHING):
    """Compute the same for one row, in Triton."""
    part = weight * (1.0 - epsilon) if SMOOTHING == 1 else weight  # the rest is the uniform share
    decided = top <= 0.0
    own = tl.exp(parameters[0] * tl.log(tl.where(decided, 1.0, top / parameters[1])))
    own = tl.where(decided, tl.where(parameters[0] == 0.0, 1.0, 0.0), own)
    value, a, target = part * own * nll, part * own, -(part * own * q)
    return ce.uniform_kernel(value, a, target, weight, p, log_sum, mean, size, epsilon, share, SMOOTHING)


EXPONENT = Parameter(
    "eaft_alpha", 1.0, help="exponent of the token weight of scoring_rule=eaft; 0 is cross-entropy.",
    allowed=lambda alpha: 0.0 <= alpha < math.inf, must="be a finite number of at least 0",
)  # fmt: skip
DIVISOR = Parameter(
    "eaft_divisor", 3.0, help=f"what scoring_rule=eaft divides the entropy of the {TOP_TOKENS} most likely tokens "
    "by: 3 as LLaMA-Factory, 1 as axolotl at first, log 20 = 2.9957 as the paper.",
    allowed=lambda divisor: 0.0 < divisor < math.inf, must="be a positive, finite number",
)  # fmt: skip
RULE = Rule(
    "eaft", score, kernel, formula="sg(H_20 / `eaft_divisor`)^`eaft_alpha` · CE, H_20 the entropy of the top 20",
    proper="no", bounds="[0, ∞)", source="arXiv:2601.02151 (2026)", parameters=(EXPONENT, DIVISOR), top_entropy=True,
)  # fmt: skip
