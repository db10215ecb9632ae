"""Values and gradients of every rule: against autograd in float64, against 120-digit arithmetic, and as a theory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpsm_hf.rules.losses import score_tokens
from dpsm_hf.rules.registry import RULES
from dpsm_hf.rules.scoring_rules import SCORING_RULES, Objective, row_statistics, tail_statistics, tail_threshold
from tests.reference import exact_row, reference_gradient, reference_loss

# every rule with every option that it takes, alone and together
SMOOTHINGS: tuple[dict[str, float], ...] = ({}, {"label_smoothing": 0.1}, {"label_smoothing": 0.9})
CASES: list[dict[str, Any]] = [
    *({"scoring_rule": rule.name, **smooth, "z_loss": z}
      for rule in RULES.values() if rule.name != "dpsm" and not rule.parameters
      for smooth in SMOOTHINGS for z in (0.0, 0.01)),
    *({"scoring_rule": rule.name, "score_smoothing": 0.3, "z_loss": z}
      for rule in RULES.values() if rule.name != "dpsm" and rule.score_smoothing for z in (0.0, 0.01)),
    *({"scoring_rule": rule.name, parameter.name: value, "label_smoothing": smooth, "z_loss": z}
      for rule in RULES.values() if rule.name != "dpsm" for parameter in rule.parameters
      for value in sorted({parameter.default, 0.0, 0.5, 1.0, 2.0}) if parameter.allowed(value)
      for smooth in (0.0, 0.1) for z in (0.0, 0.01)),
    *({"scoring_rule": "dpsm", "alpha": 0.3, "norm_weight": 1.5, **smooth}
      for smooth in ({}, {"label_smoothing": 0.1}, {"score_smoothing": 0.3})),
    *({"scoring_rule": rule.name, "entropy_weight": weight, "label_smoothing": smooth}
      for rule in RULES.values() for weight in (0.2, -0.2) for smooth in (0.0, 0.1)),
    {"scoring_rule": "dpsm", "alpha": 0.3, "entropy_weight": 0.2, "score_smoothing": 0.3, "z_loss": 0.01},
    *({"scoring_rule": "dpsm", "alpha": alpha, **smooth, "z_loss": z}
      for alpha in (0.0, 0.3, 0.5, 1.0)
      for smooth in ({}, {"label_smoothing": 0.1}, {"score_smoothing": 0.3})
      for z in (0.0, 0.01)),
]  # fmt: skip


def name_of(case: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in case.items() if value)


def batch(rows: int, vocab_size: int, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64)
    return logits, torch.randint(vocab_size, (rows,), generator=generator)


def value_and_gradient(logits: Tensor, labels: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = score_tokens(leaf, labels, objective).loss
    assert loss is not None
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def assert_equals_autograd(logits: Tensor, labels: Tensor, case: dict[str, Any]) -> None:
    value, gradient = value_and_gradient(logits, labels, Objective(**case))
    expected, expected_gradient = reference_gradient(logits, labels, **case)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-13, atol=1e-13)


# ---- against autograd ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_value_and_gradient_equal_autograd(case: dict[str, Any]) -> None:
    for vocab_size in (2, 5, 31):
        logits, labels = batch(24, vocab_size)
        assert_equals_autograd(logits, labels, case)


def test_score_smoothing_cases_have_a_tail() -> None:
    logits, labels = batch(24, 31)
    share = tail_threshold(Objective("brier", score_smoothing=0.3), 31)
    assert share == pytest.approx(0.3 / 31)
    count, minus_log = tail_statistics(logits, row_statistics(logits, labels), share)
    assert count.min() > 0 and count.max() < 31
    below = logits.softmax(-1) < share
    torch.testing.assert_close(count, below.sum(-1).double())
    torch.testing.assert_close(minus_log, -(logits.log_softmax(-1) * below).sum(-1))
    assert (below.gather(1, labels[:, None])).any(), "no target in the tail: its own entry would be untested"
    assert tail_threshold(Objective("brier"), 31) is None


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_may_be_a_tensor(alpha: float) -> None:
    logits, labels = batch(8, 11)
    expected = value_and_gradient(logits, labels, Objective("dpsm", alpha=alpha))
    for dtype in (torch.float32, torch.float64):
        scalar = torch.tensor(alpha, dtype=dtype, requires_grad=True)
        value, gradient = value_and_gradient(logits, labels, Objective("dpsm", alpha=scalar))
        tolerance = 1e-7 if dtype == torch.float32 else 1e-15
        torch.testing.assert_close(value, expected[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(gradient, expected[1], rtol=tolerance, atol=tolerance)
        assert value.dtype == gradient.dtype == torch.float64
        assert scalar.grad is None


def test_gradcheck() -> None:
    logits, labels = batch(3, 5)
    labels[1] = -100
    for case in ({"scoring_rule": "dpsm", "alpha": 0.4, "z_loss": 0.1}, {"scoring_rule": "spherical"}):
        objective = Objective(**case)
        leaf = logits.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda z, o=objective: score_tokens(z, labels, o).loss, leaf)


def test_second_derivative_is_refused() -> None:
    logits, labels = batch(3, 5)
    loss = score_tokens(logits.requires_grad_(), labels, Objective("brier")).loss
    with pytest.raises(RuntimeError, match="no second derivative: call backward without create_graph=True"):
        torch.autograd.grad(loss.sum(), logits, create_graph=True)


@pytest.mark.parametrize("vocab_size", [2, 257, 50257, 128256])
@pytest.mark.parametrize("scoring_rule", SCORING_RULES)
def test_vocabulary_sizes_in_float32(scoring_rule: str, vocab_size: int) -> None:
    logits, labels = batch(3, vocab_size, seed=vocab_size)
    labels[0] = logits[0].argmax()
    logits = logits.float()
    value, gradient = value_and_gradient(logits, labels, Objective(scoring_rule, alpha=0.5))
    expected, expected_gradient = reference_gradient(logits.double(), labels, scoring_rule, alpha=0.5)
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=2e-7)


# ---- rows that are special -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_uniform_rows(case: dict[str, Any]) -> None:
    logits, labels = torch.full((2, 7), 3.0, dtype=torch.float64), torch.tensor([0, 6])
    assert_equals_autograd(logits, labels, case)


def test_uniform_rows_have_the_known_values() -> None:
    scores = score_tokens(torch.zeros(1, 8), torch.tensor([3]))
    assert scores.nll.item() == pytest.approx(math.log(8))
    assert scores.entropy.item() == pytest.approx(math.log(8))
    assert scores.brier.item() == pytest.approx(1 - 1 / 8)
    assert scores.spherical.item() == pytest.approx(1 - 1 / math.sqrt(8))
    assert scores.confidence.item() == pytest.approx(1 / 8)
    assert scores.correct.item() == 1.0


@pytest.mark.parametrize("case", [c for c in CASES if not c.get("label_smoothing") and not c.get("score_smoothing")],
                         ids=name_of)  # fmt: skip
def test_masked_vocabulary(case: dict[str, Any]) -> None:
    logits, labels = batch(6, 9)
    logits[:, 7:] = -math.inf
    labels = labels % 7
    value, gradient = value_and_gradient(logits, labels, Objective(**case))
    expected, expected_gradient = reference_gradient(logits[:, :7], labels, **case)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient[:, :7], expected_gradient, rtol=1e-13, atol=1e-13)
    assert (gradient[:, 7:] == 0).all()
    # the entropy too is that of the entries that are left
    torch.testing.assert_close(score_tokens(logits, labels).entropy, score_tokens(logits[:, :7], labels).entropy)


def test_target_of_probability_zero() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0]])
    scores = score_tokens(logits, torch.tensor([1]), Objective("brier"))
    p = logits.softmax(-1)[0]
    assert scores.nll.item() == math.inf
    assert scores.loss.item() == pytest.approx((p[0] ** 2 + p[2] ** 2 + 1).item())
    assert scores.spherical.item() == pytest.approx(1.0)


def test_ties_are_correct_for_each_of_them() -> None:
    logits = torch.tensor([[2.0, 2.0, 0.0]]).repeat(3, 1)
    scores = score_tokens(logits, torch.tensor([0, 1, 2]))
    assert scores.correct.tolist() == [1.0, 1.0, 0.0]
    expected, _ = reference_gradient(logits.double(), torch.tensor([0, 1, 2]), "brier")
    torch.testing.assert_close(scores.brier.double(), expected, rtol=1e-6, atol=0)


# ---- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [10, 15, 20, 30, 40, 60, 80, 100])
@pytest.mark.parametrize("scoring_rule", SCORING_RULES)
def test_float32_keeps_its_digits_as_the_target_becomes_certain(scoring_rule: str, gap: int) -> None:
    generator = torch.Generator().manual_seed(gap)
    logits, labels = torch.randn(4, 8, generator=generator), torch.tensor([0, 3, 5, 7])
    logits[torch.arange(4), labels] = logits.amax(-1) + gap
    alpha = gamma = 0.5
    value, gradient = value_and_gradient(logits, labels, Objective(scoring_rule, alpha=alpha, focal_gamma=gamma))
    naive, naive_gradient = reference_gradient(logits, labels, scoring_rule, alpha=alpha, focal_gamma=gamma)
    naive_errors = []
    for row, label in enumerate(labels.tolist()):
        true_value, true_slope = exact_row(logits[row].tolist(), label, scoring_rule, alpha, gamma)
        pairs = ((value[row], naive[row], true_value), (gradient[row, label], naive_gradient[row, label], true_slope))
        for ours, plain, truth in pairs:
            if abs(truth) < 1e-36:  # no normal float32 is near
                assert abs(ours.item()) < 1.1e-36
                continue
            assert ours.item() == pytest.approx(truth, rel=2e-6)
            naive_errors.append(abs(plain.item() - truth) / abs(truth))
    # the point of the row statistics: the textbook form has lost at least three more digits
    assert not naive_errors or not max(naive_errors) < 1e-4


@pytest.mark.parametrize(
    "case", [c for c in CASES if not c.get("label_smoothing") and c.get("norm_weight", 1) == 1], ids=name_of
)
def test_a_target_that_is_certain_in_floating_point(case: dict[str, Any]) -> None:
    logits, labels = torch.zeros(1, 5), torch.tensor([2])
    logits[0, 2] = 300.0  # exp(-300) is 0 in float32
    value, gradient = value_and_gradient(logits, labels, Objective(**{**case, "z_loss": 0.0}))
    share = case.get("score_smoothing", 0.0) / 5 * (case.get("alpha", 0.0) if case["scoring_rule"] == "dpsm" else 1.0)
    if not case.get("score_smoothing"):
        assert value.item() == 0 and (gradient == 0).all()
    else:  # the others are all in the tail: -share * log p_j each, on top of the Brier score of smoothed labels
        assert torch.isfinite(value).all()
        _, expected = reference_gradient(logits.double(), labels, **{**case, "z_loss": 0.0})
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)
        assert gradient[0, 0].item() == pytest.approx(-share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_low_precision_logits(case: dict[str, Any], dtype: torch.dtype) -> None:
    logits, labels = batch(48, 101, scale=3.0)
    labels[:24] = logits[:24].argmax(-1)  # half of the tokens are likely
    low = logits.to(dtype)
    value, gradient = value_and_gradient(low, labels, Objective(**case))
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    truth, true_gradient = reference_gradient(low.double(), labels, **case)
    # computed in float32: a few dozen roundings, of numbers as large as the largest term of the sum
    size = 1 + low.double().logsumexp(-1).square() * case.get("z_loss", 0)
    assert ((value.double() - truth).abs() <= 2e-6 * (truth.abs() + 0.1 * size)).all()
    # stored once: half a unit in the last place of the dtype, on top of float32's error in a p + b p**2 + d
    p = low.double().softmax(-1)
    one_rounding = torch.finfo(dtype).eps / 2 * true_gradient.abs()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    share = (case.get("label_smoothing", 0) + case.get("score_smoothing", 0)) / 101
    # the target's entry is one product, but for what smoothing adds to it
    entry = (share > 0) * torch.nn.functional.one_hot(labels, 101)
    terms = (p + share + entry) * size[:, None] + true_gradient.abs()
    excess = (gradient.double() - true_gradient).abs() - 1.01 * one_rounding - smallest - 3e-6 * terms
    assert excess.max() <= 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_better_than_the_naive_form(dtype: torch.dtype) -> None:
    logits, labels = batch(64, 101, scale=3.0)
    low = logits.to(dtype)
    value, gradient = value_and_gradient(low, labels, Objective("dpsm", alpha=0.5))
    naive, naive_gradient = reference_gradient(low, labels, "dpsm", alpha=0.5)
    truth, true_gradient = reference_gradient(low.double(), labels, "dpsm", alpha=0.5)
    assert (value - truth).abs().max() < 1e-3 * (naive.double() - truth).abs().max()
    large = true_gradient.abs() > 1e-3
    ours, plain = (
        ((g.double() - true_gradient).abs() / true_gradient.abs())[large].max() for g in (gradient, naive_gradient)
    )
    assert ours < 0.51 * torch.finfo(dtype).eps
    assert ours < 0.25 * plain


# ---- theory --------------------------------------------------------------------------------------------------------

distributions = st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4).map(
    lambda w: torch.tensor(w, dtype=torch.float64) / sum(w)
)
PROPER = tuple(rule.name for rule in RULES.values() if rule.proper.startswith("yes"))


def expected_score(p: Tensor, q: Tensor, objective: Objective) -> float:
    """The mean loss of the forecast q when labels are drawn from p, computed by the package."""
    loss = score_tokens(q.log().expand(len(q), -1), torch.arange(len(q)), objective).loss
    assert loss is not None
    return float((p * loss).sum())


@settings(deadline=None, max_examples=100, derandomize=True)
@given(p=distributions, q=distributions, alpha=st.floats(0, 1), scoring_rule=st.sampled_from(PROPER))
def test_the_truth_is_the_best_forecast(p: Tensor, q: Tensor, alpha: float, scoring_rule: str) -> None:
    objective = Objective(scoring_rule, alpha=alpha)
    regret = expected_score(p, q, objective) - expected_score(p, p, objective)
    assert regret >= -1e-12
    if (p - q).abs().max() > 1e-3:
        assert regret > 0, "proper, but not strictly"
    if scoring_rule == "dpsm":  # the divergence of the mix is known
        kl, distance = (p * (p / q).log()).sum().item(), (p - q).square().sum().item()
        assert regret == pytest.approx((1 - alpha) * kl + alpha * distance, abs=1e-12)


def test_the_focal_loss_is_not_proper() -> None:
    p, q = torch.tensor([0.9, 0.1], dtype=torch.float64), torch.tensor([0.8, 0.2], dtype=torch.float64)
    objective = Objective("focal", focal_gamma=2.0)
    assert expected_score(p, q, objective) < expected_score(p, p, objective)
    ce = Objective("focal", focal_gamma=0.0)
    assert expected_score(p, q, ce) > expected_score(p, p, ce)


def test_generalised_cross_entropy_is_not_proper_and_has_its_limits() -> None:
    p, q = torch.tensor([0.9, 0.1], dtype=torch.float64), torch.tensor([0.95, 0.05], dtype=torch.float64)
    objective = Objective("gce")
    assert expected_score(p, q, objective) < expected_score(p, p, objective)
    logits, labels = batch(8, 11)
    p_target = logits.softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    value, _ = value_and_gradient(logits, labels, Objective("gce", gce_q=1.0))
    torch.testing.assert_close(value, 1 - p_target, rtol=1e-14, atol=1e-14)
    for smoothing in (0.0, 0.1):
        limit = value_and_gradient(logits, labels, Objective("gce", gce_q=1e-10, label_smoothing=smoothing))
        ce = value_and_gradient(logits, labels, Objective("ce", label_smoothing=smoothing))
        for ours, expected in zip(limit, ce, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gap", [30.0, 90.0, 120.0])
def test_generalised_cross_entropy_of_an_unlikely_target(gap: float) -> None:
    logits, labels = torch.zeros(1, 8), torch.tensor([3])
    logits[0, 3] = -gap  # p_y underflows in float32 from about 100 on, its power does not
    value, gradient = value_and_gradient(logits, labels, Objective("gce"))
    true_value, true_slope = exact_row(logits[0].tolist(), 3, "gce", 0.0, 0.0)
    assert value.item() == pytest.approx(true_value, rel=2e-6)
    assert gradient[0, 3].item() == pytest.approx(true_slope, rel=1e-5)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(seed=st.integers(0, 2**31), shift=st.floats(-1e3, 1e3), case=st.sampled_from(CASES))
def test_shift_invariance_and_gradient_sum(seed: int, shift: float, case: dict[str, Any]) -> None:
    case = {**case, "z_loss": 0.0}
    logits, labels = batch(4, 9, seed=seed)
    value, gradient = value_and_gradient(logits, labels, Objective(**case))
    assert gradient.sum(-1).abs().max() < 1e-13
    moved, moved_gradient = value_and_gradient(logits + shift, labels, Objective(**case))
    torch.testing.assert_close(moved, value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moved_gradient, gradient, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(seed=st.integers(0, 2**31), vocab_size=st.integers(2, 40), scale=st.floats(0, 200))
def test_statistics_are_consistent(seed: int, vocab_size: int, scale: float) -> None:
    logits, labels = batch(6, vocab_size, scale=scale, seed=seed)
    for z in (logits, logits.float()):
        s = score_tokens(z, labels)
        assert s.loss is None
        slack = 1e-6
        assert (s.brier >= 0).all() and (s.brier <= 2 + slack).all()
        assert (s.spherical >= 0).all() and (s.spherical <= 1 + slack).all()
        assert (s.confidence > 0).all() and (s.confidence <= 1).all()
        assert (s.entropy >= -slack).all() and (s.entropy <= math.log(vocab_size) + slack).all()
        assert (s.nll >= -s.confidence.log() - slack * (1 + s.nll.abs())).all()
        right = s.correct == 1
        torch.testing.assert_close(s.nll[right], -s.confidence[right].log(), rtol=1e-4, atol=1e-6)
        assert (right == (labels == z.argmax(-1))).all() or scale < 1e-3
        p = z.double().softmax(-1)
        torch.testing.assert_close(s.confidence.double(), p.amax(-1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(s.entropy.double(), torch.special.entr(p).sum(-1), rtol=1e-4, atol=1e-6)


def test_focal_without_gamma_is_cross_entropy_and_dpsm_has_the_right_ends() -> None:
    logits, labels = batch(8, 11)
    pairs = [
        (Objective("focal", focal_gamma=0.0), Objective("ce")),
        (Objective("focal", focal_gamma=0.0, label_smoothing=0.1), Objective("ce", label_smoothing=0.1)),
        (Objective("dpsm", alpha=0.0), Objective("ce")),
        (Objective("dpsm", alpha=1.0), Objective("brier")),
    ]
    for left, right in pairs:
        for ours, expected in zip(
            value_and_gradient(logits, labels, left), value_and_gradient(logits, labels, right), strict=True
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-14, atol=1e-14)


def test_cross_entropy_equals_torch() -> None:
    logits, labels = batch(8, 11)
    for smoothing in (0.0, 0.1):
        ours = score_tokens(logits, labels, Objective("ce", label_smoothing=smoothing)).loss
        expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(ours, expected, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(reference_loss(logits, labels, "ce", label_smoothing=smoothing), expected)


# ---- options that cannot be --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring_rule": "crps"}, r"scoring_rule='crps' is unknown; choose one of dpsm, ce, brier, spherical, focal"),
        ({"alpha": 1.5}, r"alpha=1.5 lies outside \[0, 1\]"),
        ({"alpha": -0.1}, r"alpha=-0.1 lies outside"),
        ({"alpha": math.nan}, r"alpha=nan lies outside"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 lies outside \[0, 1\)"),
        ({"score_smoothing": -0.2}, r"score_smoothing=-0.2 lies outside"),
        ({"focal_gamma": -1.0}, r"focal_gamma=-1.0 must be a finite number"),
        ({"gce_q": 1.5}, r"gce_q=1.5 must lie in \(0, 1\]"),
        ({"gce_q": 0.0}, r"gce_q=0.0 must lie in"),
        ({"z_loss": math.inf}, r"z_loss=inf must be a finite number"),
        ({"score_smoothing": 0.1, "label_smoothing": 0.2}, r"score_smoothing=0.1 and label_smoothing=0.2 both smooth"),
        ({"scoring_rule": "ce", "score_smoothing": 0.1}, r"score_smoothing=0.1 .* scoring_rule='ce' has neither"),
        ({"scoring_rule": "focal", "score_smoothing": 0.1}, r"scoring_rule='focal' has neither"),
    ],
)
def test_objective_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**options)
