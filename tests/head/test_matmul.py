"""Matrix products by either library are those of float64, for any strides, and the choice between them holds."""

from __future__ import annotations

import pytest
import torch

from dpsm_hf.head import matmul as products
from dpsm_hf.head.scoring_loss import linear_scoring_loss


@pytest.fixture(params=["oneDNN", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: request.param == "oneDNN")
    monkeypatch.setattr(products, "_WORTH_IT", 1)
    return str(request.param)


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "rows of a wider matrix"])
@pytest.mark.parametrize(("n", "m", "k"), [(1, 1, 1), (1, 123, 40), (47, 5003, 64), (47, 64, 5003), (130, 1000, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_equal_float64(library: str, strides: str, n: int, m: int, k: int, bias: bool) -> None:
    torch.manual_seed(0)

    def matrix(rows: int) -> torch.Tensor:
        if strides == "transposed":
            return torch.randn(k, rows).t()
        return torch.randn(rows, k + 7)[:, :k] if strides != "contiguous" else torch.randn(rows, k)

    left, right = matrix(n), matrix(m)
    offset = torch.randn(m) if bias else None
    out = torch.full((n, m), torch.nan)
    result = products.product(left, right, offset, out)
    expected = left.double() @ right.double().t() + (0.0 if offset is None else offset.double())
    # k roundings of terms whose sizes add up to |left| @ |right|
    bound = torch.finfo(torch.float32).eps * (left.abs().double() @ right.abs().double().t() + 1) * (k**0.5 + 4)
    assert ((result - expected).abs() <= bound).all()
    assert (result.data_ptr() == out.data_ptr()) == (library == "torch")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_with_torch(library: str, dtype: torch.dtype) -> None:
    left, right = torch.randn(5, 8, dtype=dtype), torch.randn(6, 8, dtype=dtype)
    assert not products.by_onednn(left, 6)
    assert torch.equal(products.product(left, right), left @ right.t())


def test_small_products_and_a_switched_off_onednn_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: True)
    large = torch.zeros(2**11, 2**11)
    assert products.by_onednn(large, 1) and not products.by_onednn(large[1:], 1)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products.by_onednn(large, 1)


def test_an_operator_that_has_changed_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Without:
        def __getattr__(self, name: str) -> None:
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "mkldnn", Without())
    products._onednn_is_faster.cache_clear()
    try:
        assert products._onednn_is_faster() is False
    finally:
        products._onednn_is_faster.cache_clear()


@pytest.mark.parametrize("chunk_tokens", [None, 16, 33])
def test_the_head_is_the_same_by_either_library(library: str, chunk_tokens: int | None) -> None:
    torch.manual_seed(0)
    n, d, v = 100, 24, 5003
    labels = torch.randint(v, (n,))
    found = []
    for dtype, impl in ((torch.float32, "torch"), (torch.float64, "reference")):
        torch.manual_seed(1)
        hidden, weight, bias = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((n, d), (v, d), (v,)))
        scored = linear_scoring_loss(
            hidden, weight, labels, bias=bias, scoring_rule="dpsm", alpha=0.4, impl=impl, chunk_tokens=chunk_tokens
        )
        scored.loss.backward()
        found.append((scored.loss, hidden.grad, weight.grad, bias.grad))
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=1e-6)
