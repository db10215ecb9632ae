"""The extra columns of a token against float64 and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dpsm_hf.rules import extra_statistics
from dpsm_hf.rules.extra_statistics import MOMENTS, ExtraStatistics
from dpsm_hf.rules.rows import STATISTICS
from tests.reference import reference_loss

N, V = 23, 61


def rows(dtype: torch.dtype = torch.float64, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(N, V, generator=generator, dtype=torch.float64)).to(dtype), torch.randint(
        V, (N,), generator=generator
    )


def moments_by_autograd(logits: Tensor, labels: Tensor, temperature: float) -> list[Tensor]:
    """Return the NLL at T and its derivatives by log T, each ``[n]``, by differentiating twice in float64."""
    found = []
    for z, y in zip(logits.double(), labels, strict=True):
        log_t = torch.tensor(math.log(temperature), dtype=torch.float64, requires_grad=True)
        nll = torch.nn.functional.cross_entropy((z / log_t.exp())[None], y[None])
        (first,) = torch.autograd.grad(nll, log_t, create_graph=True)
        (second,) = torch.autograd.grad(first, log_t)
        found.append(torch.stack([nll, first, second]).detach())
    return list(torch.stack(found).unbind(-1))


# ---- moments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7, 20.0])
def test_moments_are_the_derivatives_by_log_temperature(temperature: float) -> None:
    logits, labels = rows()
    columns = ExtraStatistics(moments_at=temperature)(logits, labels)
    assert columns.shape == (N, 3) and columns.dtype == torch.float64
    for name, mine, theirs in zip(
        MOMENTS, columns.unbind(-1), moments_by_autograd(logits, labels, temperature), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_of_lower_dtypes_are_scored_in_float32(dtype: torch.dtype) -> None:
    logits, labels = rows(dtype)
    columns = ExtraStatistics(moments_at=1.7)(logits, labels)
    assert columns.dtype == torch.float32
    # the same rounded logits in float64: what is left is float32 arithmetic on logs of up to 20
    for mine, theirs in zip(columns.double().unbind(-1), moments_by_autograd(logits, labels, 1.7), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masked_logits_are_as_if_they_were_not_there(dtype: torch.dtype) -> None:
    logits, labels = rows(dtype)
    labels = labels % (V - 9)
    masked = logits.clone()
    masked[:, V - 9 :] = -math.inf
    for temperature in (0.05, 1.0, 8.0):
        extra = ExtraStatistics(moments_at=temperature, temperature=temperature)
        found, expected = extra(masked, labels), extra(logits[:, : V - 9].contiguous(), labels)
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_label_that_is_masked_is_impossible() -> None:
    logits, labels = rows()
    logits[torch.arange(N), labels] = -math.inf
    assert (ExtraStatistics(moments_at=2.0)(logits, labels)[:, 0] == math.inf).all()


def test_rows_that_are_sure_and_rows_that_know_nothing() -> None:
    sure, flat = torch.full((2, V), -200.0), torch.zeros(2, V)
    sure[:, 5] = 200.0
    labels = torch.tensor([5, 6])
    nll, gradient, curvature = ExtraStatistics(moments_at=1.0)(sure, labels).unbind(-1)
    # u_y - max u = -400, and d/d log T of 400 / T is its opposite, twice its own
    assert nll.tolist() == [0.0, 400.0] and gradient.tolist() == [0.0, -400.0] and curvature.tolist() == [0.0, 400.0]
    nll, gradient, curvature = ExtraStatistics(moments_at=3.0)(flat, labels).unbind(-1)
    torch.testing.assert_close(nll, torch.full((2,), math.log(V)))
    # equal logits are equal at any temperature; the entropy is summed anew, in float32
    assert gradient.abs().max() < 1e-5 and curvature.abs().max() < 1e-5


# ---- scaled scores and classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_scaled_columns_are_the_scores_of_divided_logits(temperature: float) -> None:
    logits, labels = rows()
    labels[:4] = logits[:4].argmax(-1)
    scaled, moments, classes = (extra := ExtraStatistics(temperature=temperature)).split(extra(logits, labels))
    assert tuple(scaled) == STATISTICS and moments == {} and classes is None
    z = logits / temperature
    p = z.softmax(-1)
    for name, expected in {
        "nll": reference_loss(z, labels, "ce"),
        "brier": reference_loss(z, labels, "brier"),
        "spherical": 1 - p[torch.arange(N), labels] / p.norm(dim=-1),
        "confidence": p.amax(-1),
        "correct": (p.argmax(-1) == labels).double(),
        "entropy": torch.distributions.Categorical(logits=z).entropy(),
    }.items():
        torch.testing.assert_close(scaled[name], expected, rtol=1e-12, atol=1e-12, msg=name)


def test_class_probabilities_are_of_the_unscaled_logits() -> None:
    logits, labels = rows()
    wanted = torch.tensor([V - 1, 0, 17])
    extra = ExtraStatistics(temperature=2.0, moments_at=0.7, classes=wanted)
    columns = extra(logits, labels)
    assert columns.shape == (N, extra.width) == (N, 6 + 3 + 3)
    scaled, moments, classes = extra.split(columns)
    assert classes is not None
    torch.testing.assert_close(classes, logits.softmax(-1)[:, wanted], rtol=1e-13, atol=0)
    assert tuple(scaled) == STATISTICS and tuple(moments) == MOMENTS
    torch.testing.assert_close(moments["nll"], reference_loss(logits / 0.7, labels, "ce"), rtol=1e-12, atol=1e-12)
    alone = ExtraStatistics(classes=wanted)
    only = alone.split(alone(logits, labels))
    assert only[0] == {} and only[1] == {} and torch.equal(only[2], classes)  # type: ignore[arg-type]


def test_a_class_probability_is_never_above_one() -> None:
    logits = torch.zeros(200, 3)
    logits[:, 1] = torch.linspace(0, 60, 200)
    p = ExtraStatistics(classes=torch.tensor([0, 1, 2]))(logits, torch.ones(200, dtype=torch.int64))
    assert p.min() >= 0 and p.max() <= 1


# ---- blocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [1, V, 7 * V + 3, N * V])
def test_blocks_do_not_show(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = rows(torch.float32)
    before = logits.clone()
    extra = ExtraStatistics(temperature=1.3, moments_at=2.0, classes=torch.tensor([3, 4]))
    expected = extra(logits, labels)
    monkeypatch.setattr(extra_statistics, "_BLOCK_ENTRIES", entries)
    torch.testing.assert_close(extra(logits, labels), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits, before), "the logits are not its own to change"


def test_no_rows() -> None:
    extra = ExtraStatistics(temperature=1.3, moments_at=2.0, classes=torch.tensor([3]))
    columns = extra(torch.empty(0, V), torch.empty(0, dtype=torch.int64))
    assert columns.shape == (0, 10)
    scaled, moments, classes = extra.split(columns)
    assert all(len(column) == 0 for column in (*scaled.values(), *moments.values()))
    assert classes is not None and classes.shape == (0, 1)
