"""What each rule is smallest for: at the claimed optimum the expected gradient is zero, and near it points back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dpsm_hf.rules.losses import score_tokens
from dpsm_hf.rules.scoring_rules import Objective

TRUTH = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
V = len(TRUTH)


def expected(p: Tensor, objective: Objective, truth: Tensor = TRUTH) -> tuple[float, Tensor]:
    """The expected loss of the prediction p, and its gradient by p's logits."""
    logits = p.log().expand(len(p), -1).clone().requires_grad_()
    loss = score_tokens(logits, torch.arange(len(p)), objective).loss
    assert loss is not None
    value = (truth * loss).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return float(value.detach()), gradient.sum(0)


def sharpened(exponent: float) -> Tensor:
    power = TRUTH**exponent
    return power / power.sum()


OPTIMA: list[tuple[dict[str, Any], Callable[[], Tensor]]] = [
    *(({"scoring_rule": rule, **options}, lambda: TRUTH) for rule, options in (
        ("ce", {}), ("brier", {}), ("spherical", {}), ("power", {"power_beta": 0.3}), ("power", {"power_beta": 2.0}),
        ("dpsm", {"alpha": 0.4}), ("eaft", {}),
    )),
    *(({"scoring_rule": rule, "label_smoothing": 0.2, "alpha": 0.4}, lambda: 0.8 * TRUTH + 0.2 / V)
      for rule in ("ce", "brier", "dpsm", "spherical")),
    *(({"scoring_rule": rule, "alpha": 1.0, "norm_weight": 1.5}, lambda: TRUTH / 1.5 + (1 - 1 / 1.5) / V)
      for rule in ("brier", "dpsm")),
    ({"scoring_rule": "gce", "gce_q": 0.4}, lambda: sharpened(1 / 0.6)),
]  # fmt: skip


def name_of(value: Any) -> str:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else ""


@pytest.mark.parametrize(("options", "optimum"), OPTIMA, ids=name_of)
def test_the_expected_gradient_vanishes_at_the_claimed_optimum(options: dict[str, Any], optimum: Any) -> None:
    objective, p = Objective(**options), optimum()
    value, gradient = expected(p, objective)
    assert gradient.abs().max() < 1e-12
    for j in range(V):
        nearby = (p.log() + 0.05 * torch.nn.functional.one_hot(torch.tensor(j), V)).softmax(-1)
        other, slope = expected(nearby, objective)
        assert float(slope @ (nearby.log() - p.log())) > 0
        # where a factor lets no gradient through, the value itself need not be smallest there
        assert other > value or options["scoring_rule"] == "eaft"


@pytest.mark.parametrize(("weight", "surer"), [(0.2, False), (-0.2, True)])
@pytest.mark.parametrize("rule", ["ce", "brier", "power", "focal"])
def test_the_entropy_bonus_makes_less_sure_and_its_opposite_surer(rule: str, weight: float, surer: bool) -> None:
    direction = TRUTH.log() - TRUTH.log().mean()  # along it, predictions become surer
    with_bonus, without = (expected(TRUTH, Objective(rule, entropy_weight=w))[1] @ direction for w in (weight, 0.0))
    assert bool(with_bonus < without) is surer


def test_dft_pulls_towards_the_most_likely_label_from_everywhere() -> None:
    for p in (TRUTH, torch.full((V,), 1 / V, dtype=torch.float64), sharpened(0.5)):
        _, gradient = expected(p, Objective("dft"))
        assert int(gradient.argmin()) == 0 and gradient[0] < 0


def test_deft_is_surer_than_the_truth_and_puts_everything_on_one_label_where_that_is_clear() -> None:
    flat = 1 / torch.arange(10, 110, dtype=torch.float64)
    flat = flat / flat.sum()
    p = flat
    for _ in range(200):
        p = flat ** float(1 / (1 - p.square().sum()))
        p = p / p.sum()
    assert expected(p, Objective("deft"), flat)[1].abs().max() < 1e-14 and p.square().sum() > flat.square().sum()
    for p in (TRUTH, sharpened(2.0), sharpened(8.0)):
        _, gradient = expected(p, Objective("deft"))
        assert int(gradient.argmin()) == 0 and gradient[0] < 0


def test_the_focal_loss_is_smallest_for_a_less_sure_prediction() -> None:
    _, gradient = expected(TRUTH, Objective("focal"))
    assert gradient[0] > 0 > gradient[-1]


def test_eaft_does_not_correct_what_is_decided() -> None:
    p = torch.tensor([1e-30, 1e-30, 1e-30, 1.0], dtype=torch.float64)
    _, gradient = expected(p, Objective("eaft"))
    _, of_ce = expected(p, Objective("ce"))
    assert gradient.abs().max() < 1e-25 < of_ce.abs().max()
