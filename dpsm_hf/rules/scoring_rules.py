"""`Objective`: a scoring rule with its options; `score_rows`: its value and gradient for rows of logits.

Sources: Brier (1950); Gneiting & Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation" (JASA 2007);
Lin et al., "Focal Loss for Dense Object Detection" (2017); Shao et al., "Language Generation with Strictly Proper
Scoring Rules" (ICML 2024) for the spherical score on tokens and for score smoothing.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from torch import Tensor

from .registry import PARAMETERS, RULES, SCORING_RULES, rule_parameter, with_rule_parameters
from .rows import (
    RowNeeds,
    RowScore,
    RowStatistics,
    Rule,
    RuleOptions,
    logits_gradient,
    row_statistics,
    tail_statistics,
)

__all__ = [
    "SCORING_RULES", "Objective", "RowScore", "RowStatistics", "logits_gradient", "row_statistics", "score_rows",
    "tail_statistics", "tail_threshold",
]  # fmt: skip


@dataclass(frozen=True)
@with_rule_parameters
class Objective:
    """A scoring rule with its options: the loss of a token.

    Args:
        scoring_rule: name of a rule in `dpsm_hf.rules.formulas`: ``dpsm`` (``(1 - alpha) * CE + alpha * Brier``),
            ``ce``, ``brier``, ``spherical``, ``focal``, ...
        alpha: weight of the Brier score in ``dpsm``, in [0, 1]; a float or a 0-d tensor, which gets no gradient.
        label_smoothing: epsilon of the target distribution ``t = (1 - epsilon) * onehot(y) + epsilon / V``.
        score_smoothing: epsilon of Shao et al. (2024): the Brier or spherical score on epsilon-smoothed labels plus
            ``-(epsilon / V) * sum_{j: p_j < epsilon / V} log p_j``.
        focal_gamma: exponent of the focal loss, at least 0.
        z_loss: weight of ``log(sum_j exp z_j)**2``, at least 0.
        entropy_weight: lambda of the entropy bonus ``-lambda * H(p)``, added to any rule (Pereyra et al. 2017); below
            0 it makes predictions surer.
        scheduled: fields whose value changes during training; see `uses`.

    The parameters of the other rules, such as ``gce_q``, are further fields.

    Raises:
        ValueError: for an unknown ``scoring_rule``, a number out of its range, or options that contradict each other.
    """

    scoring_rule: str = "dpsm"
    alpha: float | Tensor = 0.0
    label_smoothing: float = 0.0
    score_smoothing: float = 0.0
    focal_gamma: float = rule_parameter("focal_gamma")
    z_loss: float = 0.0
    entropy_weight: float = 0.0
    scheduled: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.scoring_rule not in RULES:
            raise ValueError(
                f"scoring_rule={self.scoring_rule!r} is unknown; choose one of {', '.join(SCORING_RULES)}."
            )
        if isinstance(self.alpha, Tensor) and self.alpha.dim():
            raise ValueError(f"alpha must be a number or a 0-d tensor, but has shape {tuple(self.alpha.shape)}.")
        # reading an alpha that is on an accelerator would synchronise with it
        known = not isinstance(self.alpha, Tensor) or self.alpha.device.type == "cpu"
        if known and not 0.0 <= float(self.alpha.detach() if isinstance(self.alpha, Tensor) else self.alpha) <= 1.0:
            raise ValueError(
                f"alpha={self.alpha} lies outside [0, 1], the range of the Brier score's weight in the mix."
            )
        for name in ("label_smoothing", "score_smoothing"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name}={value} lies outside [0, 1); 0 turns it off, 0.1 is a usual value.")
        for parameter in PARAMETERS.values():
            value = getattr(self, parameter.name)
            if not isinstance(value, numbers.Real) or not parameter.allowed(float(value)):
                raise ValueError(f"{parameter.name}={value} must {parameter.must}.")
        if not 0.0 <= self.z_loss < float("inf"):
            raise ValueError(f"z_loss={self.z_loss} must be a finite number of at least 0.")
        if not math.isfinite(self.entropy_weight):
            raise ValueError(f"entropy_weight={self.entropy_weight} must be a finite number; 0 turns it off.")
        if self.score_smoothing and self.label_smoothing:
            raise ValueError(
                f"score_smoothing={self.score_smoothing} and label_smoothing={self.label_smoothing} both smooth the "
                "labels; set one of them to 0 (in TrainingArguments the latter is label_smoothing_factor)."
            )
        if self.score_smoothing and not self.rule.score_smoothing:
            raise ValueError(
                f"score_smoothing={self.score_smoothing} smooths the Brier and the spherical score; "
                f"scoring_rule={self.scoring_rule!r} has neither. Use label_smoothing (label_smoothing_factor) "
                "instead."
            )

    @property
    def rule(self) -> Rule:
        """Return the scoring rule."""
        return RULES[self.scoring_rule]

    def uses(self, name: str) -> bool:
        """Return whether the objective has the part whose weight is a field: the weight is not 0, or not always.

        Kernels are compiled for the parts that there are. With this, a scheduled weight that begins at 0 compiles
        nothing anew when it has grown.
        """
        return bool(getattr(self, name)) or name in self.scheduled

    @property
    def parameters(self) -> tuple[float, ...]:
        """Return the values of the rule's own parameters."""
        return tuple(getattr(self, parameter.name) for parameter in self.rule.parameters)

    @property
    def needs(self) -> RowNeeds:
        """Return what has to be known of each row."""
        exponent = 2.0 if self.rule.exponent is None else self.rule.exponent(self.parameters)
        return RowNeeds(exponent, self.rule.top_entropy, entropy=self.entropy_weight != 0.0)


def tail_threshold(objective: Objective, vocab_size: int) -> float | None:
    """Return epsilon / V, below which score smoothing adds its log tail; None without score smoothing."""
    return objective.score_smoothing / vocab_size if objective.score_smoothing else None


def score_rows(
    row: RowStatistics, objective: Objective, vocab_size: int, tail: tuple[Tensor, Tensor] | None = None
) -> RowScore:
    """Return the value and the gradient coefficients of the objective for each row.

    Args:
        row: the statistics of the rows, each ``[N]``, with what the objective ``needs``.
        objective: the rule and its options.
        vocab_size: V.
        tail: with score smoothing, for each row the number of entries with ``p_j < tail_threshold`` and the sum of
            their ``-log p_j``, as `tail_statistics` returns them.
    """
    options = RuleOptions(
        vocab_size, objective.alpha, objective.label_smoothing, objective.score_smoothing, objective.parameters, tail
    )
    score = objective.rule.score(row, options)
    if objective.z_loss:
        lse = row.log_normalizer
        slope = 2 * objective.z_loss * lse
        score = score.plus(RowScore(objective.z_loss * lse.square(), slope, 0.0, 0.0, 0.0, slope * row.p_target))
    if bonus := objective.entropy_weight:
        # the gradient of -H is p_j (log p_j + H)
        own = bonus * row.p_target * (row.entropy - row.nll)
        score = score.plus(RowScore(-bonus * row.entropy, bonus * row.entropy, 0.0, 0.0, 0.0, own, bonus))
    return score
