"""`score_tokens` as a function of a batch (shapes, chunks, ignored and wrong labels)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import dpsm_hf.rules.losses
from dpsm_hf import Objective, TokenScores, score_tokens
from dpsm_hf.rules.losses import describe_invalid_labels
from dpsm_hf.rules.registry import RULES, SCORING_RULES
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
    monkeypatch.setattr(dpsm_hf.rules.losses, "_CHUNK_ENTRIES", entries)
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
        for objective in (None, *(Objective(rule, alpha=0.5) for rule in SCORING_RULES)):
            scores = score_tokens(leaf, labels, objective)
            if scores.loss is not None:
                scores.loss.sum().backward()
        assert torch.equal(leaf.detach(), logits_before) and torch.equal(labels, labels_before)


# ---- gradient flow -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring_rule", SCORING_RULES)
def test_grad_output_and_weights_per_token(scoring_rule: str) -> None:
    logits, labels = batch(6, 9, dtype=torch.float64)
    weight = torch.tensor([0.0, -2.0, 1e-3, 7.0, 1.0, 0.5], dtype=torch.float64)
    options = {"alpha": 0.3, "z_loss": 0.01}
    _, gradient = backward(logits, labels, Objective(scoring_rule, **options), weight)
    leaf = logits.clone().requires_grad_()
    (reference_loss(leaf, labels, scoring_rule, **options) * weight).sum().backward()
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-13)
    _, whole = backward(logits, labels, Objective(scoring_rule, **options), 1024.0)
    _, unit = backward(logits, labels, Objective(scoring_rule, **options))
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


@pytest.mark.parametrize("scoring_rule", SCORING_RULES)
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, 1e30])
def test_ignored_rows_give_zero_whatever_their_logits(scoring_rule: str, rubbish: float) -> None:
    logits, labels = batch(5, 9)
    labels[[1, 4]] = -100
    smooth = {"score_smoothing": 0.2} if RULES[scoring_rule].score_smoothing else {}
    objective = Objective(scoring_rule, alpha=0.5, z_loss=0.1, **smooth)
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
    fields = set(TokenScores.__dataclass_fields__)
    assert fields == {"loss", "scored", "extra", "varentropy", *TENSORS}
    assert all(f"{name}:" in (TokenScores.__doc__ or "") for name in fields)
