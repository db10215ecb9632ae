"""`DPSMLoss`: alpha by the training call, reductions, and what it refuses."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from dpsm_hf import DPSMLoss, get_alpha_schedule, score_tokens
from tests.reference import reference_loss


def batch(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator), torch.randint(shape[-1], shape[:-1], generator=generator)


def test_signature() -> None:
    parameters = inspect.signature(DPSMLoss).parameters
    assert list(parameters)[:3] == ["vocab_size", "warmup_steps", "schedule"]
    assert parameters["warmup_steps"].default == 10000 and parameters["schedule"].default == "linear"
    assert all(p.kind == p.KEYWORD_ONLY for p in list(parameters.values())[3:])


def test_loss_of_both_shapes_is_the_mix() -> None:
    logits, targets = batch(2, 5, 9)
    criterion = DPSMLoss(9, 10)
    expected = reference_loss(logits.double().view(10, 9), targets.view(10), "dpsm", alpha=0.4).mean()
    for z, y in ((logits, targets), (logits.view(10, 9), targets.view(10))):
        criterion.global_step.fill_(3)  # the call is the fourth
        assert criterion(z, y).item() == pytest.approx(expected.item(), rel=1e-6)


def test_alpha_follows_the_training_calls() -> None:
    logits, targets = batch(3, 9)
    criterion = DPSMLoss(9, warmup_steps=4)
    seen = []
    for _ in range(7):
        seen.append(criterion.alpha)
        criterion(logits, targets)
    assert seen == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0], "the first training call is step 1"
    assert criterion.global_step.item() == 7

    cosine = DPSMLoss(9, warmup_steps=4, schedule="cosine")
    for step in range(1, 7):
        assert cosine.alpha == pytest.approx(0.5 * (1 - math.cos(math.pi * min(1, step / 4))))
        cosine(logits, targets)


def test_evaluation_does_not_advance() -> None:
    logits, targets = batch(3, 9)
    criterion = DPSMLoss(9, warmup_steps=4)
    criterion(logits, targets)
    criterion.eval()
    values = {criterion(logits, targets).item() for _ in range(3)}
    assert criterion.global_step.item() == 1 and len(values) == 1
    assert values.pop() == pytest.approx(reference_loss(logits, targets, "dpsm", alpha=0.25).mean().item(), rel=1e-5)
    criterion.train()
    criterion(logits, targets)
    assert criterion.global_step.item() == 2


def test_state_dict_restores_the_step() -> None:
    logits, targets = batch(3, 9)
    criterion = DPSMLoss(9, warmup_steps=4)
    for _ in range(3):
        criterion(logits, targets)
    fresh = DPSMLoss(9, warmup_steps=4)
    fresh.load_state_dict(criterion.state_dict())
    assert fresh.alpha == criterion.alpha == 1.0 and fresh.eval().alpha == 0.75
    fresh.train()
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert twin.alpha == 1.0 and twin(logits, targets).item() == pytest.approx(fresh(logits, targets).item())
        fresh.global_step.fill_(3)
    assert criterion.global_step.item() == 3, "a copy shares its counter"


def test_reductions() -> None:
    logits, targets = batch(2, 4, 9)
    targets[0, 1] = targets[1, 3] = -100
    options: dict[str, Any] = {"schedule": "constant", "alpha_end": 0.5}
    each = DPSMLoss(9, reduction="none", **options)(logits, targets)
    assert each.shape == (2, 4) and each[0, 1] == 0 and each[1, 3] == 0 and (each != 0).sum() == 6
    assert DPSMLoss(9, reduction="sum", **options)(logits, targets).item() == pytest.approx(each.sum().item())
    assert DPSMLoss(9, **options)(logits, targets).item() == pytest.approx(each.sum().item() / 6)
    targets[:] = -100
    leaf = logits.requires_grad_()
    loss = DPSMLoss(9, **options)(leaf, targets)
    loss.backward()
    assert loss.item() == 0 and (leaf.grad == 0).all()


def test_ignore_index_of_the_module() -> None:
    logits, targets = batch(6, 9)
    targets[:3], targets[3:] = 0, 4
    loss = DPSMLoss(9, ignore_index=0, fixed_alpha=0.0)(logits, targets)
    assert loss.item() == pytest.approx(reference_loss(logits[3:], targets[3:], "ce").mean().item(), rel=1e-5)


def test_other_rules_and_options() -> None:
    logits, targets = batch(6, 9)
    for options in (
        {"scoring_rule": "spherical"},
        {"scoring_rule": "focal", "focal_gamma": 1.5},
        {"scoring_rule": "brier", "score_smoothing": 0.2},
        {"scoring_rule": "ce", "label_smoothing": 0.1, "z_loss": 0.01},
    ):
        expected = reference_loss(logits.double(), targets, **options).mean()
        assert DPSMLoss(9, **options)(logits, targets).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_share_of_the_total_and_a_schedule_object() -> None:
    assert DPSMLoss(9, warmup_steps=0.5, total_steps=8).schedule.resolve(8).warmup == 4
    ready = get_alpha_schedule("step", hold=3)
    criterion = DPSMLoss(9, schedule=ready)
    logits, targets = batch(2, 9)
    seen = []
    for _ in range(5):
        seen.append(criterion.alpha)
        criterion(logits, targets)
    assert seen == [0, 0, 1, 1, 1]
    assert "step" in repr(criterion) and "vocab_size=9" in repr(criterion)


def test_a_fixed_alpha_is_that_of_every_call() -> None:
    logits, targets = batch(3, 9)
    criterion = DPSMLoss(9, fixed_alpha=0.3)
    expected = reference_loss(logits, targets, "dpsm", alpha=0.3).mean().item()
    for _ in range(3):
        assert criterion.alpha == 0.3 and criterion(logits, targets).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fixed_alpha": 0.5, "schedule": "cosine"}, r"fixed_alpha=0.5 takes the place of a schedule"),
        ({"fixed_alpha": 0.5, "alpha_end": 0.7}, r"fixed_alpha=0.5 takes the place of a schedule"),
        ({"fixed_alpha": 1.5}, r"alpha_end=1.5 lies outside"),
        ({"schedule": "quadratic"}, r"alpha_schedule='quadratic' is unknown; choose one of linear, cosine"),
        ({"schedule": "feedback"}, r"schedule='feedback' reads held-out metrics"),
        ({"schedule": get_alpha_schedule("feedback")}, r"schedule='feedback' reads held-out metrics"),
        ({"warmup_steps": 0.1}, r"warmup is 0.1, a share of all steps, but the total is not known"),
        ({"schedule": "late_linear"}, r"hold is 0.5, a share of all steps"),
        ({"schedule": "triangle"}, r"'triangle' schedule needs the total number of steps"),
        ({"reduction": "batchmean"}, r"reduction='batchmean' is unknown; choose mean, sum or none"),
        ({"vocab_size": 1}, r"vocab_size=1 must be at least 2"),
        ({"scoring_rule": "hinge"}, r"scoring_rule='hinge' is unknown"),
        ({"label_smoothing": 0.1, "score_smoothing": 0.1}, r"both smooth"),
        ({"alpha_end": 2.0}, r"alpha_end=2.0 lies outside \[0, 1\]"),
    ],
)
def test_dpsm_loss_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPSMLoss(**{"vocab_size": 9, **options})


def test_wrong_vocabulary() -> None:
    logits, targets = batch(4, 9)
    with pytest.raises(ValueError, match=r"logits have 9 entries a token, but .* vocab_size=10"):
        DPSMLoss(10)(logits, targets)


def test_under_autocast() -> None:
    torch.manual_seed(0)
    hidden, targets = torch.randn(6, 16), batch(6, 9)[1]
    head = torch.nn.Linear(16, 9)
    criterion = DPSMLoss(9, schedule="constant", alpha_end=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(hidden)
        loss = criterion(logits, targets)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    expected = reference_loss(logits.detach().double(), targets, "dpsm", alpha=0.5).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert head.weight.grad is not None and torch.isfinite(head.weight.grad).all()


def test_a_loop_of_ones_own_learns() -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(32, 8), torch.arange(32) % 4
    model, criterion = torch.nn.Linear(8, 4), DPSMLoss(4, warmup_steps=30)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    before = score_tokens(model(inputs), targets).brier.mean()
    for _ in range(60):
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()
    assert criterion.alpha == 1.0
    assert score_tokens(model(inputs), targets).brier.mean() < 0.8 * before
