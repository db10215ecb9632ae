"""`score_tokens` as a function of a batch (shapes, chunks, ignored and wrong labels), and `DPSMLoss`."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import dpsm_hf.losses
from dpsm_hf import DPSMLoss, Objective, TokenScores, get_alpha_schedule, score_tokens
from dpsm_hf.losses import describe_invalid_labels
from dpsm_hf.scoring_rules import LOSS_TYPES
from tests.reference import reference_gradient, reference_loss

MIX = Objective("dpsm", alpha=0.4, z_loss=0.01)
TENSORS = ("nll", "brier", "spherical", "confidence", "correct", "entropy")


def batch(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(shape[-1], shape[:-1], generator=generator)


def backward(logits: Tensor, labels: Tensor, objective: Objective = MIX, weight: Any = 1.0) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = score_tokens(leaf, labels, objective).loss
    (loss * weight).sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


# ---- shape, place and layout ---------------------------------------------------------------------------------------


def test_leading_dimensions_are_flattened() -> None:
    logits, labels = batch(2, 3, 11)
    value, gradient = backward(logits, labels)
    flat, flat_gradient = backward(logits.view(6, 11), labels.view(6))
    assert value.shape == (6,) and gradient.shape == logits.shape
    assert torch.equal(value, flat) and torch.equal(gradient.view(6, 11), flat_gradient)


def test_non_contiguous_logits() -> None:
    logits, labels = batch(4, 6, 11)
    expected, expected_gradient = backward(logits[:, :-1].contiguous(), labels[:, 1:].contiguous())
    transposed = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    strided = torch.stack([logits, logits], -1)[..., 0]
    for view in (logits, transposed, strided):
        leaf = view.detach().requires_grad_()
        assert not leaf[:, :-1].is_contiguous()
        loss = score_tokens(leaf[:, :-1], labels[:, 1:], MIX).loss
        loss.sum().backward()
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(leaf.grad[:, :-1], expected_gradient, rtol=1e-6, atol=1e-6)
        assert (leaf.grad[:, -1] == 0).all()


def test_expanded_logits() -> None:
    row = batch(1, 11)[0].requires_grad_()
    labels = torch.tensor([1, 5, 5])
    score_tokens(row.expand(3, 11), labels, MIX).loss.sum().backward()
    _, expected = backward(row.expand(3, 11), labels)
    torch.testing.assert_close(row.grad, expected.sum(0, keepdim=True))


@pytest.mark.parametrize("entries", [1, 25, 60, 2**24])
def test_chunks_do_not_show(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = batch(10, 12)
    labels[3] = -100
    objective = Objective("dpsm", alpha=0.4, score_smoothing=0.3)
    weight = torch.linspace(0.5, 2, 10)
    value, gradient = backward(logits, labels, objective, weight)
    statistics = score_tokens(logits, labels)
    monkeypatch.setattr(dpsm_hf.losses, "_CHUNK_ENTRIES", entries)
    chunked, chunked_gradient = backward(logits, labels, objective, weight)
    torch.testing.assert_close(chunked, value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(chunked_gradient, gradient, rtol=1e-6, atol=1e-7)
    again = score_tokens(logits, labels)
    for name in TENSORS:
        torch.testing.assert_close(getattr(again, name), getattr(statistics, name), rtol=1e-6, atol=1e-7)


def test_the_logits_are_left_as_they_are() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        logits, labels = batch(5, 9, dtype=dtype)
        labels[2] = -100
        logits_before, labels_before = logits.clone(), labels.clone()
        leaf = logits.requires_grad_()
        for objective in (None, *(Objective(rule, alpha=0.5) for rule in LOSS_TYPES)):
            scores = score_tokens(leaf, labels, objective)
            if scores.loss is not None:
                scores.loss.sum().backward()
        assert torch.equal(leaf.detach(), logits_before) and torch.equal(labels, labels_before)


# ---- gradient flow -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_grad_output_and_weights_per_token(loss_type: str) -> None:
    logits, labels = batch(6, 9, dtype=torch.float64)
    weight = torch.tensor([0.0, -2.0, 1e-3, 7.0, 1.0, 0.5], dtype=torch.float64)
    options = {"alpha": 0.3, "z_loss": 0.01}
    _, gradient = backward(logits, labels, Objective(loss_type, **options), weight)
    leaf = logits.clone().requires_grad_()
    (reference_loss(leaf, labels, loss_type, **options) * weight).sum().backward()
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-13)
    _, whole = backward(logits, labels, Objective(loss_type, **options), 1024.0)
    _, unit = backward(logits, labels, Objective(loss_type, **options))
    torch.testing.assert_close(whole, 1024 * unit, rtol=1e-14, atol=0)


def test_weights_scale_the_tail_of_score_smoothing() -> None:
    logits, labels = batch(6, 31, dtype=torch.float64)
    weight = torch.linspace(0, 3, 6, dtype=torch.float64)
    _, gradient = backward(logits, labels, Objective("brier", score_smoothing=0.3), weight)
    _, unit = reference_gradient(logits, labels, "brier", score_smoothing=0.3)
    torch.testing.assert_close(gradient, weight[:, None] * unit, rtol=1e-12, atol=1e-14)


def test_backward_twice_gives_the_same_gradient() -> None:
    logits, labels = batch(6, 9)
    leaf = logits.requires_grad_()
    loss = score_tokens(leaf, labels, MIX).loss.sum()
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss * 2, leaf, retain_graph=True)
    (third,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(first, kept) and torch.equal(third, kept)
    torch.testing.assert_close(second, 2 * kept)


def test_statistics_are_detached_and_no_graph_without_need() -> None:
    logits, labels = batch(6, 9)
    scores = score_tokens(logits.requires_grad_(), labels, MIX)
    assert scores.loss.requires_grad
    assert not any(getattr(scores, name).requires_grad for name in TENSORS)
    assert score_tokens(logits, labels).loss is None
    with torch.no_grad():
        assert not score_tokens(logits, labels, MIX).loss.requires_grad
    assert not score_tokens(logits.detach(), labels, MIX).loss.requires_grad


def test_statistics_with_and_without_an_objective_are_the_same() -> None:
    logits, labels = batch(6, 9)
    labels[0] = -100
    plain, scored = score_tokens(logits, labels), score_tokens(logits.requires_grad_(), labels, MIX)
    for name in (*TENSORS, "scored"):
        assert torch.equal(getattr(plain, name), getattr(scored, name)), name


def test_a_changed_tensor_is_noticed() -> None:
    logits, labels = batch(6, 9)
    logits.requires_grad_()
    doubled = logits * 2
    loss = score_tokens(doubled, labels, MIX).loss
    doubled.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


# ---- ignored tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, 1e30])
def test_ignored_rows_give_zero_whatever_their_logits(loss_type: str, rubbish: float) -> None:
    logits, labels = batch(5, 9)
    labels[[1, 4]] = -100
    smooth = {"score_smoothing": 0.2} if loss_type in ("brier", "spherical", "dpsm") else {}
    objective = Objective(loss_type, alpha=0.5, z_loss=0.1, **smooth)
    value, gradient = backward(logits, labels, objective)
    logits[1], logits[4, 3] = rubbish, rubbish
    dirty, dirty_gradient = backward(logits, labels, objective)
    assert torch.equal(dirty, value) and torch.equal(dirty_gradient, gradient)
    assert (dirty_gradient[[1, 4]] == 0).all() and (dirty[[1, 4]] == 0).all()
    scores = score_tokens(logits, labels)
    assert scores.scored.tolist() == [True, False, True, True, False]
    for name in TENSORS:
        assert (getattr(scores, name)[[1, 4]] == 0).all(), name


def test_everything_ignored_is_zero_with_a_graph() -> None:
    logits, labels = batch(2, 3, 9)
    labels[:] = -100
    leaf = logits.requires_grad_()
    loss = score_tokens(leaf, labels, MIX).loss.sum()
    assert loss.item() == 0 and loss.requires_grad
    loss.backward()
    assert (leaf.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 9), (0, 4, 9), (3, 0, 9)])
def test_empty_batch(shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape, requires_grad=True)
    labels = torch.zeros(shape[:-1], dtype=torch.int64)
    scores = score_tokens(logits, labels, MIX)
    scores.loss.sum().backward()
    assert scores.loss.shape == (0,) and logits.grad.shape == shape
    plain = score_tokens(logits, labels)
    assert all(getattr(plain, name).shape == (0,) for name in TENSORS)


def test_another_ignore_index() -> None:
    logits, labels = batch(4, 9)
    labels[2] = 7
    labels[0] = 3
    scores = score_tokens(logits, labels, MIX, ignore_index=7)
    assert scores.scored.tolist() == (labels != 7).tolist() and not scores.scored[2]
    with pytest.raises(ValueError, match="label -100 at position"):
        score_tokens(logits, torch.full((4,), -100), ignore_index=7)


# ---- wrong input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [9, 50257, -1, -101])
def test_label_out_of_range_is_named(wrong: int) -> None:
    logits, labels = batch(2, 3, 9)
    labels[1, 2], labels[0, 0] = wrong, -100
    for objective in (None, MIX):
        with pytest.raises(ValueError, match=rf"label {wrong} at position \(1, 2\) lies outside \[0, 9\).*-100"):
            score_tokens(logits, labels, objective)
    assert describe_invalid_labels(labels, 9).startswith(f"label {wrong} at position (1, 2)")
    assert describe_invalid_labels(labels.clamp(0, 8), 9) == ""


def test_shapes_that_disagree() -> None:
    logits, labels = batch(2, 3, 9)
    with pytest.raises(ValueError, match=r"logits of shape \(2, 3, 9\) need labels of shape \(2, 3\).* have \(6,\)"):
        score_tokens(logits, labels.view(6))


def test_token_scores_document_their_fields() -> None:
    fields = {name for name in TokenScores.__dataclass_fields__}
    assert fields == {"loss", "scored", *TENSORS}
    assert all(f"{name}:" in (TokenScores.__doc__ or "") for name in fields)


# ---- DPSMLoss ------------------------------------------------------------------------------------------------------


def test_signature() -> None:
    parameters = inspect.signature(DPSMLoss).parameters
    assert list(parameters)[:3] == ["vocab_size", "warmup_steps", "schedule"]
    assert parameters["warmup_steps"].default == 10000 and parameters["schedule"].default == "linear"
    assert all(p.kind == p.KEYWORD_ONLY for p in list(parameters.values())[3:])


def test_loss_of_both_shapes_is_the_mix() -> None:
    logits, targets = batch(2, 5, 9)
    criterion = DPSMLoss(9, 10)
    criterion.global_step.fill_(4)
    expected = reference_loss(logits.double().view(10, 9), targets.view(10), "dpsm", alpha=0.4).mean()
    for z, y in ((logits, targets), (logits.view(10, 9), targets.view(10))):
        criterion.global_step.fill_(4)
        assert criterion(z, y).item() == pytest.approx(expected.item(), rel=1e-6)


def test_alpha_follows_the_training_calls() -> None:
    logits, targets = batch(3, 9)
    criterion = DPSMLoss(9, warmup_steps=4)
    seen = []
    for _ in range(7):
        seen.append(criterion.alpha)
        criterion(logits, targets)
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert criterion.global_step.item() == 7

    cosine = DPSMLoss(9, warmup_steps=4, schedule="cosine")
    for step in range(6):
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
    assert fresh.alpha == criterion.alpha == 0.75
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert twin.alpha == 0.75 and twin(logits, targets).item() == pytest.approx(fresh(logits, targets).item())
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
    loss = DPSMLoss(9, ignore_index=0)(logits, targets)
    assert loss.item() == pytest.approx(reference_loss(logits[3:], targets[3:], "ce").mean().item(), rel=1e-5)


def test_other_rules_and_options() -> None:
    logits, targets = batch(6, 9)
    for options in (
        {"loss_type": "spherical"},
        {"loss_type": "focal", "focal_gamma": 1.5},
        {"loss_type": "brier", "score_smoothing": 0.2},
        {"loss_type": "ce", "label_smoothing": 0.1, "z_loss": 0.01},
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
    assert seen == [0, 0, 0, 1, 1]
    assert "step" in repr(criterion) and "vocab_size=9" in repr(criterion)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "quadratic"}, r"alpha_schedule='quadratic' is unknown; choose one of linear, cosine"),
        ({"schedule": "feedback"}, r"schedule='feedback' reads held-out metrics"),
        ({"schedule": get_alpha_schedule("feedback")}, r"schedule='feedback' reads held-out metrics"),
        ({"warmup_steps": 0.1}, r"warmup is 0.1, a share of all steps, but the total is not known"),
        ({"schedule": "late_linear"}, r"hold is 0.5, a share of all steps"),
        ({"schedule": "triangle"}, r"'triangle' schedule needs the total number of steps"),
        ({"reduction": "batchmean"}, r"reduction='batchmean' is unknown; choose mean, sum or none"),
        ({"vocab_size": 1}, r"vocab_size=1 must be at least 2"),
        ({"loss_type": "hinge"}, r"loss_type='hinge' is unknown"),
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
