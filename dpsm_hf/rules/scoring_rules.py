"""Scoring rules of one token, as functions of a few scalars of its row of logits.

For logits ``z`` of shape ``[V]``, target ``y`` and ``p = softmax(z)`` every rule here has a value that depends on the
row only through the *row statistics*, and a gradient of one form::

    dL/dz_j = a * p_j + b * p_j**2 + d + e * [p_j < tail_threshold]    for j != y,        dL/dz_y = target

so nothing of size ``[N, V]`` but the logits and their gradient is ever needed: no one-hot, no stored softmax. The
target is kept out of the sums (``u``, ``Q`` below), hence ``1 - p_y = u / S`` and ``||p||**2 - p_y**2 = Q / S**2``
keep all their digits as ``p_y -> 1``, where the textbook forms cancel::

    m = max z    e_j = exp(z_j - m)    u = sum_{j != y} e_j    Q = sum_{j != y} e_j**2    S = u + e_y
    p_y = e_y / S        q = 1 - p_y = u / S        r = Q / S**2        ||p||**2 = p_y**2 + r

Sources: Brier (1950); Gneiting & Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation" (JASA 2007);
Lin et al., "Focal Loss for Dense Object Detection" (2017); Shao et al., "Language Generation with Strictly Proper
Scoring Rules" (ICML 2024) for the spherical score on tokens and for score smoothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LOSS_TYPES = ("dpsm", "ce", "brier", "spherical", "focal")


@dataclass(frozen=True)
class Objective:
    """Say which scoring rule a token is trained with.

    Args:
        loss_type: one of ``dpsm`` (``(1 - alpha) * CE + alpha * Brier``), ``ce``, ``brier``, ``spherical``, ``focal``.
        alpha: weight of the Brier score in ``dpsm``, in [0, 1]; a float or a 0-d tensor (never differentiated).
        label_smoothing: epsilon of the target distribution ``t = (1 - epsilon) * onehot(y) + epsilon / V``.
        score_smoothing: epsilon of Shao et al. (2024): the Brier or spherical score on epsilon-smoothed labels plus
            ``-(epsilon / V) * sum_{j: p_j < epsilon / V} log p_j``.
        focal_gamma: exponent of the focal loss, at least 0.
        z_loss: weight of ``log(sum_j exp z_j)**2``, at least 0.

    Raises:
        ValueError: for an unknown ``loss_type``, a number out of its range, or options that contradict each other.
    """

    loss_type: str = "dpsm"
    alpha: float | Tensor = 0.0
    label_smoothing: float = 0.0
    score_smoothing: float = 0.0
    focal_gamma: float = 2.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type={self.loss_type!r} is unknown; choose one of {', '.join(LOSS_TYPES)}.")
        if isinstance(self.alpha, Tensor) and self.alpha.dim():
            raise ValueError(f"alpha must be a number or a 0-d tensor, but has shape {tuple(self.alpha.shape)}.")
        # on a device, looking would stall it
        known = not isinstance(self.alpha, Tensor) or self.alpha.device.type == "cpu"
        if known and not 0.0 <= float(self.alpha.detach() if isinstance(self.alpha, Tensor) else self.alpha) <= 1.0:
            raise ValueError(
                f"alpha={self.alpha} lies outside [0, 1], the range of the Brier score's weight in the mix."
            )
        for name in ("label_smoothing", "score_smoothing"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name}={value} lies outside [0, 1); 0 turns it off, 0.1 is a usual value.")
        for name in ("focal_gamma", "z_loss"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}={value} must be a finite number of at least 0.")
        if self.score_smoothing and self.label_smoothing:
            raise ValueError(
                f"score_smoothing={self.score_smoothing} and label_smoothing={self.label_smoothing} both smooth the "
                "labels; set one of them to 0 (in TrainingArguments the latter is label_smoothing_factor)."
            )
        if self.score_smoothing and self.loss_type in ("ce", "focal"):
            raise ValueError(
                f"score_smoothing={self.score_smoothing} smooths the Brier and the spherical score; "
                f"loss_type={self.loss_type!r} has neither. Use label_smoothing (label_smoothing_factor) instead."
            )


class RowStatistics(NamedTuple):
    """The scalars of each row that every rule is computed from; all of shape ``[N]``, float32 or float64."""

    row_max: Tensor  # m = max_j z_j
    normalizer: Tensor  # S = sum_j exp(z_j - m)
    p_target: Tensor  # p_y
    miss: Tensor  # q = 1 - p_y
    off_norm: Tensor  # r = sum_{j != y} p_j**2
    nll: Tensor  # -log p_y, in nats
    correct: Tensor  # bool: y attains the maximum
    mean_logit: Tensor  # mean_j z_j
    entropy: Tensor  # -sum_j p_j log p_j, in nats

    @property
    def confidence(self) -> Tensor:
        """Return the largest probability of each row, ``max_j p_j = 1 / S``."""
        return 1.0 / self.normalizer

    @property
    def log_normalizer(self) -> Tensor:
        """Return ``log sum_j exp z_j = m + log S``."""
        return self.row_max + self.normalizer.log()

    @property
    def brier(self) -> Tensor:
        """Return ``sum_j (p_j - [j = y])**2 = q**2 + r``, in [0, 2]."""
        return self.miss.square() + self.off_norm

    @property
    def spherical(self) -> Tensor:
        """Return ``1 - p_y / ||p|| = r / (n (n + p_y))`` with ``n = ||p||``, in [0, 1]."""
        norm = (self.p_target.square() + self.off_norm).sqrt()
        return self.off_norm / (norm * (norm + self.p_target))


def row_statistics(logits: Tensor, labels: Tensor) -> RowStatistics:
    """Reduce each row of logits to the scalars of `RowStatistics`, in float32 at least.

    Equivalent plain torch, but for digits lost near ``p_y = 1``: ``p = logits.float().softmax(-1)``,
    ``p_target = p.gather(-1, labels)``, ``off_norm = (p**2).sum(-1) - p_target**2`` and so on.

    Args:
        logits: ``[N, V]``, any floating dtype; float64 is kept, everything else is computed in float32.
        labels: ``[N]`` int64, each in ``[0, V)``.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    index = labels.unsqueeze(-1)
    row_max = z.amax(-1, keepdim=True)
    shifted = z - row_max
    weight = shifted.exp()
    target_shifted = shifted.gather(-1, index).squeeze(-1)
    target_weight = weight.gather(-1, index).squeeze(-1)
    # exp(-inf) * -inf would be NaN for vocabulary entries that a model masks out
    entropy_sum = (weight * shifted.clamp_min(torch.finfo(z.dtype).min)).sum(-1)
    weight = weight.scatter_(-1, index, 0.0)
    others = weight.sum(-1)
    normalizer = others + target_weight
    correct = target_shifted >= 0
    log_normalizer = torch.where(correct, others.log1p(), normalizer.log())
    return RowStatistics(
        row_max=row_max.squeeze(-1),
        normalizer=normalizer,
        p_target=target_weight / normalizer,
        miss=others / normalizer,
        off_norm=weight.square_().sum(-1) / normalizer.square(),
        nll=log_normalizer - target_shifted,
        correct=correct,
        mean_logit=z.mean(-1),
        entropy=log_normalizer - entropy_sum / normalizer,
    )


class RowScore(NamedTuple):
    """Value and gradient coefficients of a rule, one of each for a row; see the module's first formula."""

    value: Tensor
    a: Tensor | float  # times p_j
    b: Tensor | float  # times p_j**2
    d: Tensor | float  # constant over the row
    e: Tensor | float  # on the tail, p_j < tail_threshold
    target: Tensor  # the whole gradient of the target's logit

    def scaled(self, weight: float | Tensor) -> RowScore:
        """Return the score of ``weight * rule``."""
        return RowScore(
            weight * self.value,
            weight * self.a,
            weight * self.b,
            weight * self.d,
            weight * self.e,
            weight * self.target,
        )

    def plus(self, other: RowScore) -> RowScore:
        """Return the score of the sum of two rules."""
        return RowScore(
            self.value + other.value,
            self.a + other.a,
            self.b + other.b,
            self.d + other.d,
            self.e + other.e,
            self.target + other.target,
        )


def _log_score(row: RowStatistics, objective: Objective, vocab_size: int) -> RowScore:
    eps = objective.label_smoothing
    value = row.nll
    if eps:
        value = (1 - eps) * value + eps * (row.log_normalizer - row.mean_logit)
    off_target_mass = eps * (vocab_size - 1) / vocab_size
    return RowScore(value, 1.0, 0.0, -eps / vocab_size, 0.0, off_target_mass - row.miss)


def _brier_score(row: RowStatistics, objective: Objective, vocab_size: int) -> RowScore:
    eps = objective.label_smoothing or objective.score_smoothing
    p, r = row.p_target, row.off_norm
    gap = row.miss - eps  # (1 - eps) - p_y, without the cancellation
    value = row.brier
    if eps:
        share = eps / vocab_size
        value = (gap + share).square() + r - 2 * share * row.miss + (vocab_size - 1) * share**2
    return RowScore(value, 2 * (p * gap - r), 2.0, 0.0, 0.0, -2 * p * (gap * row.miss + r))


def _spherical_score(row: RowStatistics, objective: Objective, vocab_size: int) -> RowScore:
    eps = objective.label_smoothing or objective.score_smoothing
    p, r, share = row.p_target, row.off_norm, eps / vocab_size
    norm = (p.square() + r).sqrt()
    expected = (1 - eps) * p + share  # sum_j t_j p_j
    value = row.spherical
    if eps:
        value = value + (eps * p - share) / norm
    target = p / norm**3 * (share * (p * row.miss - r) - (1 - eps) * r)
    return RowScore(value, -share / norm, expected / norm**3, 0.0, 0.0, target)


def _focal_score(row: RowStatistics, objective: Objective, vocab_size: int) -> RowScore:
    gamma, eps = objective.focal_gamma, objective.label_smoothing
    q, nll = row.miss, row.nll
    modulation = q**gamma
    # q**(gamma - 1) * log p_y tends to -q**gamma as q -> 0, but inf * 0 would not: divide before the power
    ratio = torch.where(q > 0, nll / q, torch.ones_like(q))
    slope = modulation * (1 + gamma * row.p_target * ratio)
    score = RowScore(modulation * nll, slope, 0.0, 0.0, 0.0, -slope * q)
    if not eps:
        return score
    # the uniform share of the target is scored by the logarithm: at gamma = 0 this is label-smoothed CE
    uniform = RowScore(
        row.log_normalizer - row.mean_logit, 1.0, 0.0, -1.0 / vocab_size, 0.0, row.p_target - 1.0 / vocab_size
    )
    return score.scaled(1 - eps).plus(uniform.scaled(eps))


_RULES: dict[str, Callable[[RowStatistics, Objective, int], RowScore]] = {
    "ce": _log_score,
    "brier": _brier_score,
    "spherical": _spherical_score,
    "focal": _focal_score,
}


def tail_threshold(objective: Objective, vocab_size: int) -> float | None:
    """Return the probability under which score smoothing adds its log tail, or None where there is no such tail."""
    return objective.score_smoothing / vocab_size if objective.score_smoothing else None


def score_rows(
    row: RowStatistics, objective: Objective, vocab_size: int, tail: tuple[Tensor, Tensor] | None = None
) -> RowScore:
    """Return the value and the gradient coefficients of the objective for each row.

    Args:
        row: the statistics of the rows, each ``[N]``.
        objective: the rule and its options.
        vocab_size: V.
        tail: with score smoothing, for each row the number of entries with ``p_j < tail_threshold`` and the sum of
            their ``-log p_j``, as `tail_statistics` returns them.
    """
    if objective.loss_type == "dpsm":
        # score smoothing is defined for the Brier part alone: the log score needs no tail of its own
        log_part = _log_score(row, objective, vocab_size).scaled(1 - objective.alpha)
        brier_part = _with_tail(_brier_score(row, objective, vocab_size), row, objective, vocab_size, tail)
        score = log_part.plus(brier_part.scaled(objective.alpha))
    else:
        rule = _RULES[objective.loss_type]
        score = _with_tail(rule(row, objective, vocab_size), row, objective, vocab_size, tail)
    if objective.z_loss:
        lse = row.log_normalizer
        slope = 2 * objective.z_loss * lse
        score = score.plus(RowScore(objective.z_loss * lse.square(), slope, 0.0, 0.0, 0.0, slope * row.p_target))
    return score


def _with_tail(
    score: RowScore, row: RowStatistics, objective: Objective, vocab_size: int, tail: tuple[Tensor, Tensor] | None
) -> RowScore:
    if tail is None:
        return score
    count, minus_log = tail
    share = objective.score_smoothing / vocab_size
    return RowScore(
        value=score.value + share * minus_log,
        a=score.a + share * count,
        b=score.b,
        d=score.d,
        e=score.e - share,
        target=score.target + share * (count * row.p_target - (row.p_target < share).to(count.dtype)),
    )


def tail_statistics(logits: Tensor, row: RowStatistics, threshold: float) -> tuple[Tensor, Tensor]:
    """Return for each row the count of ``p_j < threshold`` and the sum of their ``-log p_j``; both ``[N]``."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    log_p = z - row.log_normalizer.unsqueeze(-1)
    masked = log_p.exp() < threshold
    return masked.sum(-1).to(z.dtype), -torch.where(masked, log_p, 0.0).sum(-1)


def logits_gradient(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    normalizer: Tensor,
    score: RowScore,
    threshold: float | None = None,
) -> Tensor:
    """Return the gradient of each row's score by its logits, ``[N, V]`` in float32 (float64 for float64 logits).

    Equivalent: ``a * p + b * p**2 + d + e * (p < threshold)`` with the target's entry replaced by ``score.target``.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    p = (z - row_max.unsqueeze(-1)).exp_().div_(normalizer.unsqueeze(-1))
    gradient = (p * _column(score.b)).add_(_column(score.a)).mul_(p).add_(_column(score.d))
    if threshold is not None:
        gradient.add_((p < threshold) * _column(score.e))
    # computed once in float32 and stored once: a * p + b * p**2 - ... would cancel as p_y -> 1
    return gradient.scatter_(-1, labels.unsqueeze(-1), score.target.unsqueeze(-1))


def _column(value: Tensor | float) -> Tensor | float:
    return value.unsqueeze(-1) if isinstance(value, Tensor) and value.dim() else value
