"""The extra columns of a token against float64 and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dpsm_hf.rules import extra_statistics
from dpsm_hf.rules.extra_statistics import MOMENTS, ExtraStatistics
from dpsm_hf.rules.rows import STATISTICS, row_statistics
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


def value_by(kind: str, logits: Tensor, labels: Tensor, log_t: Tensor) -> Tensor:
    """Return the Brier score, or confidence less correctness, of one row at T, with a graph."""
    p = (logits / log_t.exp()).softmax(-1)
    if kind == "gap":
        return p.amax() - float(p.argmax() == labels)
    return (p - torch.nn.functional.one_hot(labels, len(p))).square().sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7, 20.0])
@pytest.mark.parametrize("kind", ["brier", "gap"])
def test_the_other_moments_are_derivatives_by_log_temperature_too(kind: str, temperature: float) -> None:
    logits, labels = rows()
    labels[:4] = logits[:4].argmax(-1)
    extra = ExtraStatistics(**{f"{kind}_moments_at": temperature})  # type: ignore[arg-type]
    found = getattr(extra.split(extra(logits, labels)), f"{kind}_moments")
    for mine, z, y in zip(found, logits, labels, strict=True):
        log_t = torch.tensor(math.log(temperature), dtype=torch.float64, requires_grad=True)
        value = value_by(kind, z, y, log_t)
        (first,) = torch.autograd.grad(value, log_t, create_graph=True)
        (second,) = torch.autograd.grad(first, log_t)
        expected = torch.stack([value, first, second])[: len(mine)].detach()
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_other_moments_of_lower_dtypes_are_scored_in_float32(dtype: torch.dtype) -> None:
    logits, labels = rows(dtype)
    extra = ExtraStatistics(brier_moments_at=1.3, gap_moments_at=0.8)
    # float32 arithmetic on logs of up to 20, weighed by probabilities
    torch.testing.assert_close(extra(logits, labels).double(), extra(logits.double(), labels), rtol=1e-5, atol=2e-5)


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
        extra = ExtraStatistics((temperature,), temperature, temperature, temperature)
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
    found = (extra := ExtraStatistics(temperatures=(temperature, 7.0))).split(extra(logits, labels))
    scaled, far = found.scaled
    assert tuple(scaled) == STATISTICS and found.moments is None and found.classes is None
    assert torch.equal(far["nll"], row_statistics(logits / 7.0, labels).nll)
    z = logits / temperature
    p = z.softmax(-1)
    for name, expected in {
        "nll": reference_loss(z, labels, "ce"),
        "brier": reference_loss(z, labels, "brier"),
        "spherical": 1 - p[torch.arange(N), labels] / p.norm(dim=-1),
        "confidence": p.amax(-1),
        "correct": (p.argmax(-1) == labels).double(),
        "entropy": torch.distributions.Categorical(logits=z).entropy(),
        "varentropy": (p * p.log().square()).sum(-1) - (p * p.log()).sum(-1).square(),
    }.items():
        torch.testing.assert_close(scaled[name], expected, rtol=1e-12, atol=1e-12, msg=name)


def test_class_probabilities_are_of_the_unscaled_logits() -> None:
    logits, labels = rows()
    wanted = torch.tensor([V - 1, 0, 17])
    extra = ExtraStatistics(temperatures=(2.0,), moments_at=0.7, classes=wanted)
    columns = extra(logits, labels)
    assert columns.shape == (N, extra.width) == (N, 7 + 3 + 3)
    found = extra.split(columns)
    assert found.classes is not None and found.moments is not None
    torch.testing.assert_close(found.classes, logits.softmax(-1)[:, wanted], rtol=1e-13, atol=0)
    assert tuple(found.scaled[0]) == STATISTICS and found.moments.shape[-1] == len(MOMENTS)
    torch.testing.assert_close(found.moments[:, 0], reference_loss(logits / 0.7, labels, "ce"), rtol=1e-12, atol=1e-12)
    alone = ExtraStatistics(classes=wanted)
    only = alone.split(alone(logits, labels))
    assert only.scaled == () and only.moments is None and torch.equal(only.classes, found.classes)  # type: ignore[arg-type]


def test_a_class_probability_is_never_above_one() -> None:
    logits = torch.zeros(200, 3)
    logits[:, 1] = torch.linspace(0, 60, 200)
    p = ExtraStatistics(classes=torch.tensor([0, 1, 2]))(logits, torch.ones(200, dtype=torch.int64))
    assert p.min() >= 0 and p.max() <= 1


@pytest.mark.parametrize("autocast", [False, True])
def test_groups_get_the_sum_of_their_probabilities(autocast: bool) -> None:
    logits, labels = rows(torch.float32)
    groups = torch.arange(V - 9) % 3  # further tokens belong to the last group
    extra = ExtraStatistics(groups=groups, number_of_groups=4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = extra.split(extra(logits, labels)).groups
    p = logits.double().softmax(-1)
    expected = torch.stack([p[:, : V - 9][:, groups == g].sum(-1) for g in range(3)] + [p[:, V - 9 :].sum(-1)], -1)
    assert found is not None and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


# ---- blocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [1, V, 7 * V + 3, N * V])
def test_blocks_do_not_show(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = rows(torch.float32)
    before = logits.clone()
    extra = ExtraStatistics((1.3,), 2.0, 1.1, 0.9, torch.tensor([3, 4]), torch.arange(V) % 3, 3)
    expected = extra(logits, labels)
    monkeypatch.setattr(extra_statistics, "_BLOCK_ENTRIES", entries)
    torch.testing.assert_close(extra(logits, labels), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits, before), "the logits are not its own to change"


def test_no_rows() -> None:
    extra = ExtraStatistics((1.3,), 2.0, 1.1, 0.9, torch.tensor([3]), torch.arange(V) % 4, 4)
    columns = extra(torch.empty(0, V), torch.empty(0, dtype=torch.int64))
    assert columns.shape == (0, 20)
    found = extra.split(columns)
    assert all(len(column) == 0 for column in found.scaled[0].values())
    shapes = [
        part.shape for part in (found.moments, found.brier_moments, found.gap_moments, found.classes, found.groups)
    ]
    assert shapes == [(0, 3), (0, 3), (0, 2), (0, 1), (0, 4)]
