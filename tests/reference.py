"""The scoring rules written a second time, from their definitions: oracles that share no formula with the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext

import torch
from torch import Tensor


def reference_loss(
    logits: Tensor,
    labels: Tensor,
    scoring_rule: str,
    *,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    score_smoothing: float = 0.0,
    focal_gamma: float = 2.0,
    gce_q: float = 0.7,
    z_loss: float = 0.0,
    entropy_weight: float = 0.0,
    norm_weight: float = 1.0,
    power_beta: float = 0.5,
    eaft_alpha: float = 1.0,
    eaft_divisor: float = 3.0,
) -> Tensor:
    """Score each row with one-hot targets and stored softmaxes, in the dtype of the logits; differentiable."""
    vocab_size = logits.shape[-1]
    one_hot = torch.nn.functional.one_hot(labels, vocab_size).to(logits.dtype)
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    smoothed = (1 - label_smoothing) * one_hot + label_smoothing / vocab_size
    epsilon = label_smoothing or score_smoothing
    target = (1 - epsilon) * one_hot + epsilon / vocab_size

    def log_score() -> Tensor:
        return -(smoothed * log_p).sum(-1)

    def tail() -> Tensor:
        share = score_smoothing / vocab_size
        return -share * torch.where(p < share, log_p, torch.zeros_like(log_p)).sum(-1)

    def brier() -> Tensor:
        return (p - target).square().sum(-1) + (norm_weight - 1) * p.square().sum(-1)

    def spherical() -> Tensor:
        return 1 - (target * p).sum(-1) / p.square().sum(-1).sqrt()

    def focal() -> Tensor:
        p_y, log_p_y = (one_hot * p).sum(-1), (one_hot * log_p).sum(-1)
        return (1 - label_smoothing) * -((1 - p_y) ** focal_gamma) * log_p_y - label_smoothing * log_p.mean(-1)

    def gce() -> Tensor:
        p_y = (one_hot * p).sum(-1)
        return (1 - label_smoothing) * (1 - p_y**gce_q) / gce_q - label_smoothing * log_p.mean(-1)

    def of_label(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """A rule of log p_y and p, whose uniform share of a smoothed label is scored by the logarithm."""
        return (1 - label_smoothing) * loss((one_hot * log_p).sum(-1), p) - label_smoothing * log_p.mean(-1)

    def power(log_p_y: Tensor, p: Tensor) -> Tensor:
        beta = power_beta
        return (1 - (beta * log_p_y).exp()) / beta + ((p ** (1 + beta)).sum(-1) - 1) / (1 + beta)

    def deft(log_p_y: Tensor, p: Tensor) -> Tensor:
        exponent = p.square().sum(-1).detach()
        return (1 - (exponent * log_p_y).exp()) / exponent

    def eaft(log_p_y: Tensor, p: Tensor) -> Tensor:
        top = p.detach().sort(descending=True).values[..., :20]
        top = top / top.sum(-1, keepdim=True)
        return (torch.special.entr(top).sum(-1) / eaft_divisor) ** eaft_alpha * -log_p_y

    values = {
        "power": lambda: of_label(power),
        "dft": lambda: of_label(lambda log_p_y, p: -log_p_y.exp().detach() * log_p_y),
        "deft": lambda: of_label(deft),
        "eaft": lambda: of_label(eaft),
        "ce": log_score,
        "brier": lambda: brier() + tail() if score_smoothing else brier(),
        "spherical": lambda: spherical() + tail() if score_smoothing else spherical(),
        "focal": focal,
        "gce": gce,
    }
    value = (
        (1 - alpha) * values["ce"]() + alpha * values["brier"]() if scoring_rule == "dpsm" else values[scoring_rule]()
    )
    value = value + z_loss * logits.logsumexp(-1).square() if z_loss else value
    return value - entropy_weight * torch.special.entr(p).sum(-1) if entropy_weight else value


def reference_gradient(logits: Tensor, labels: Tensor, scoring_rule: str, **options: float) -> tuple[Tensor, Tensor]:
    """Return the value of each row, and autograd's gradient of the sum of them."""
    leaf = logits.detach().clone().requires_grad_()
    value = reference_loss(leaf, labels, scoring_rule, **options)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def exact_row(
    logits: Sequence[float], label: int, scoring_rule: str, alpha: float, gamma: float
) -> tuple[float, float]:
    """Return the value and the gradient of the target's logit, by textbook formulas in 120-digit arithmetic."""
    with localcontext() as context:
        context.prec = 120
        weights = [Decimal(z).exp() for z in logits]
        total = sum(weights, Decimal(0))
        p = [w / total for w in weights]
        t = [Decimal(int(j == label)) for j in range(len(p))]
        p_y = p[label]
        slope = [p[j] * (t[j] - p_y) for j in range(len(p))]  # dp_j / dz_y
        ce, d_ce = -p_y.ln(), p_y - 1
        brier = sum(((a - b) ** 2 for a, b in zip(p, t, strict=True)), Decimal(0))
        d_brier = sum((2 * (p[j] - t[j]) * slope[j] for j in range(len(p))), Decimal(0))
        norm = sum((a * a for a in p), Decimal(0)).sqrt()
        spherical = 1 - p_y / norm
        d_spherical = -slope[label] / norm + p_y * sum((p[j] * slope[j] for j in range(len(p))), Decimal(0)) / norm**3
        g = Decimal(gamma)
        focal = -((1 - p_y) ** g) * p_y.ln()
        d_focal = (g * (1 - p_y) ** (g - 1) * p_y.ln() - (1 - p_y) ** g / p_y) * slope[label]
        a, q, beta = Decimal(alpha), Decimal("0.7"), Decimal("0.5")
        power_sum = sum((x ** (1 + beta) for x in p), Decimal(0))
        concentration = sum((x * x for x in p), Decimal(0))
        top = sorted(p, reverse=True)[:20]
        entropy = -sum(((x / sum(top)) * (x / sum(top)).ln() for x in top), Decimal(0))
        found = {
            "ce": (ce, d_ce),
            "brier": (brier, d_brier),
            "spherical": (spherical, d_spherical),
            "focal": (focal, d_focal),
            "power": (
                (1 - p_y**beta) / beta + (power_sum - 1) / (1 + beta),
                -(p_y ** (beta - 1)) * slope[label]
                + sum((p[j] ** beta * slope[j] for j in range(len(p))), Decimal(0)),
            ),
            "dft": (-p_y * p_y.ln(), p_y * d_ce),
            "deft": ((1 - p_y**concentration) / concentration, p_y**concentration * d_ce),
            "eaft": (entropy / 3 * ce, entropy / 3 * d_ce),
            "gce": ((1 - p_y**q) / q, -(p_y ** (q - 1)) * slope[label]),
            "dpsm": ((1 - a) * ce + a * brier, (1 - a) * d_ce + a * d_brier),
        }
        value, slope_y = found[scoring_rule]
        return float(value), float(slope_y)
