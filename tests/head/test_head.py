"""What `linear_scoring_loss` promises beside its numbers: reductions, gradients of all kinds, statistics, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsm_hf import linear_scoring_loss
from dpsm_hf.rules.losses import score_tokens
from dpsm_hf.rules.scoring_rules import Objective

N, V, D = 47, 123, 16
IMPLEMENTATIONS = ("torch", "reference")


class Batch:
    """Hidden states, weight, bias and labels, always the same; leaves that want a gradient."""

    def __init__(self, dtype: torch.dtype = torch.float32, n: int = N, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(n, D, generator=g).to(dtype).requires_grad_()
        self.weight = (torch.randn(V, D, generator=g) / 4).to(dtype).requires_grad_()
        self.bias = torch.randn(V, generator=g).to(dtype).requires_grad_()
        self.labels = torch.randint(V, (n,), generator=g)

    def score(self, **options: Any) -> Any:
        arguments: dict[str, Any] = {"bias": self.bias, "alpha": 0.3, "chunk_tokens": 10, **options}
        return linear_scoring_loss(self.hidden, self.weight, self.labels, **arguments)

    def gradients(self) -> list[Tensor]:
        found = [t.grad for t in (self.hidden, self.weight, self.bias)]
        for t in (self.hidden, self.weight, self.bias):
            t.grad = None
        return found  # type: ignore[return-value]


def close(mine: Any, theirs: Any, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


# ---- reductions ----------------------------------------------------------------------------------------------------


def test_reductions_are_the_sum_the_mean_and_each_token() -> None:
    batch = Batch()
    batch.labels[5:9] = -100
    each = batch.score(reduction="none").loss
    assert each.shape == batch.labels.shape and each[5:9].abs().max() == 0
    close(batch.score(reduction="sum").loss, each.sum(), rtol=1e-6)
    close(batch.score().loss, each.sum() / (N - 4), rtol=1e-6)
    close(batch.score(num_items_in_batch=17).loss, each.sum() / 17, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ignored", [0, 20, N])
def test_reduction_none_with_weights_of_tokens(ignored: int, dtype: torch.dtype) -> None:
    batch = Batch(dtype)
    batch.labels[:ignored] = -100
    weights = torch.linspace(-2.0, 3.0, N)
    (weights * batch.score(reduction="none").loss).sum().backward()
    mine = batch.gradients()
    (weights * batch.score(reduction="none", impl="reference").loss).sum().backward()
    rtol = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for m, t in zip(mine, batch.gradients(), strict=True):
        assert m.dtype == dtype
        assert (m - t).float().norm() <= rtol * t.float().norm()


def test_reduction_none_keeps_the_shape_of_the_labels() -> None:
    batch = Batch(n=48)
    hidden, labels = batch.hidden.view(3, 16, D), batch.labels.view(3, 16)
    loss = linear_scoring_loss(hidden, batch.weight, labels, reduction="none").loss
    assert loss is not None and loss.shape == (3, 16)
    flat = linear_scoring_loss(batch.hidden, batch.weight, batch.labels, reduction="none").loss
    assert flat is not None and torch.equal(loss.flatten(), flat)


@pytest.mark.parametrize("tensor", [False, True])
def test_micro_batches_with_one_denominator_are_one_batch(tensor: bool) -> None:
    batch = Batch()
    batch.labels[::4] = -100
    whole = batch.score()
    whole.loss.backward()
    expected = batch.gradients()
    count: Any = int((batch.labels != -100).sum())
    count = torch.tensor(count) if tensor else count
    total = torch.zeros(())
    for part in (slice(0, 5), slice(5, 30), slice(30, None)):
        loss = linear_scoring_loss(
            batch.hidden[part], batch.weight, batch.labels[part], bias=batch.bias, alpha=0.3, num_items_in_batch=count
        ).loss
        assert loss is not None
        loss.backward()
        total += loss.detach()
    close(total, whole.loss.detach(), rtol=1e-6)
    for m, t in zip(batch.gradients(), expected, strict=True):
        close(m, t)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["all ignored", "empty"])
def test_nothing_to_score_is_zero_with_a_graph(kind: str, dtype: torch.dtype, reduction: str) -> None:
    batch = Batch(dtype, n=0 if kind == "empty" else 6)
    batch.labels[:] = -100
    scores = batch.score(reduction=reduction)
    assert scores.loss.requires_grad and scores.loss.abs().sum() == 0
    assert scores.nll.shape == batch.labels.shape and not scores.scored.any()
    scores.loss.sum().backward()
    for leaf, gradient in zip((batch.hidden, batch.weight, batch.bias), batch.gradients(), strict=True):
        assert gradient is not None and gradient.shape == leaf.shape and gradient.dtype == dtype
        assert gradient.abs().sum() == 0
    if reduction == "mean":
        assert batch.score(num_items_in_batch=0).loss == 0


def test_ignored_tokens_may_hold_anything() -> None:
    batch = Batch()
    expected = batch.score()
    expected.loss.backward()
    gradients = batch.gradients()
    padded = torch.full((2 * N, D), float("nan"))
    padded[::2] = batch.hidden.detach()
    padded.requires_grad_()
    labels = torch.full((2 * N,), -7)
    labels[::2] = batch.labels
    loss = linear_scoring_loss(
        padded, batch.weight, labels, bias=batch.bias, alpha=0.3, ignore_index=-7, chunk_tokens=10
    ).loss
    assert loss is not None and torch.equal(loss, expected.loss)
    loss.backward()
    assert padded.grad is not None and torch.equal(padded.grad[::2], gradients[0])
    assert padded.grad[1::2].abs().max() == 0  # not NaN
    assert torch.equal(batch.gradients()[1], gradients[1])


# ---- backward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [0.0, -3.0, 1 / 3, 1e3])
@pytest.mark.parametrize("chunk", [10, N])
def test_grad_output(chunk: int, factor: float, dtype: torch.dtype) -> None:
    batch = Batch(dtype)
    batch.score(reduction="mean", chunk_tokens=chunk).loss.backward()
    once = batch.gradients()
    (batch.score(reduction="mean", chunk_tokens=chunk).loss * factor).backward()
    for m, t in zip(batch.gradients(), once, strict=True):
        rtol = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        # float16 gradients are rounded to multiples of 2**-24 once more
        atol = 2**-24 * max(1.0, abs(factor)) if dtype == torch.float16 else 0.0
        close(m, (t.float() * factor).to(dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("factor", [1.0, 5.0])
@pytest.mark.parametrize(("dtype", "chunk"), [(torch.float32, 10), (torch.bfloat16, 10), (torch.bfloat16, N)])
def test_two_backwards_through_a_retained_graph_add_up(
    dtype: torch.dtype, chunk: int, factor: float, reduction: str
) -> None:
    batch = Batch(dtype)
    loss = batch.score(reduction=reduction, chunk_tokens=chunk).loss.sum() * factor
    loss.backward(retain_graph=True)
    once = batch.gradients()
    copies = [g.clone() for g in once]
    loss.backward(retain_graph=True)
    twice = batch.gradients()
    loss.backward()
    third = batch.gradients()
    for g, copy, second, last in zip(once, copies, twice, third, strict=True):
        assert torch.equal(g, copy), "a later backward wrote into a gradient that was handed out"
        assert torch.equal(second, copy) and torch.equal(last, copy)


def test_gradients_accumulate_and_losses_may_be_added() -> None:
    batch = Batch()
    (batch.score().loss + 2 * batch.score().loss).backward()
    thrice = batch.gradients()
    batch.score().loss.backward()
    for m, t in zip(thrice, batch.gradients(), strict=True):
        close(m, 3 * t)


def test_a_second_backward_through_a_freed_graph_is_an_error() -> None:
    for reduction in ("mean", "none"):
        loss = Batch().score(reduction=reduction).loss.sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="retain_graph=True"):
            loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(reduction: str) -> None:
    batch = Batch()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(batch.score(reduction=reduction).loss.sum(), batch.hidden, create_graph=True)


def test_a_weight_changed_before_the_recomputation_is_an_error() -> None:
    batch = Batch()
    loss = batch.score(reduction="none").loss.sum()
    with torch.no_grad():
        batch.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_weights_get_the_sum_of_both_gradients() -> None:
    ids, labels = torch.arange(20) % V, torch.arange(20) * 7 % V

    def gradient(fused: bool) -> Tensor:
        torch.manual_seed(0)
        embedding = nn.Embedding(V, D)
        hidden = torch.tanh(embedding(ids))
        impl: Any = "torch" if fused else "reference"
        loss = linear_scoring_loss(hidden, embedding.weight, labels, alpha=0.3, impl=impl).loss
        assert loss is not None
        loss.backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad

    close(gradient(True), gradient(False))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "head", "all"])
def test_frozen_parts_get_no_gradient_and_change_no_other(frozen: str, reduction: str) -> None:
    batch = Batch()
    batch.score(reduction=reduction).loss.sum().backward()
    expected = batch.gradients()
    off = {"head": ("weight", "bias"), "all": ("hidden", "weight", "bias")}.get(frozen, (frozen,))
    for name in off:
        getattr(batch, name).requires_grad_(False)
    loss = batch.score(reduction=reduction).loss
    if frozen == "all":
        assert not loss.requires_grad
        return
    loss.sum().backward()
    for name, m, t in zip(("hidden", "weight", "bias"), batch.gradients(), expected, strict=True):
        assert m is None if name in off else torch.equal(m, t), name


def test_no_product_is_made_for_a_gradient_that_nobody_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpsm_hf.head import chunked

    made: list[str] = []
    for name in ("logits", "backward"):
        original = getattr(chunked._LinearChunks, name)
        monkeypatch.setattr(
            chunked._LinearChunks, name, lambda *a, _f=original, _n=name: (made.append(_n), _f(*a))[1]
        )  # fmt: skip
    batch = Batch()
    with torch.no_grad():
        no_grad = batch.score()
    assert not no_grad.loss.requires_grad and set(made) == {"logits"}
    with torch.inference_mode():
        batch.score(reduction="none")
    assert set(made) == {"logits"}
    loss = batch.score()
    assert "backward" in made and torch.equal(loss.loss.detach(), no_grad.loss) and torch.equal(loss.nll, no_grad.nll)


# ---- dtypes, shapes, implementations -------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden_dtype", ["float32", "low"])
def test_autocast_computes_low_and_returns_float32(hidden_dtype: str, low: torch.dtype, reduction: str) -> None:
    batch, plain = Batch(), Batch()
    hidden = batch.hidden if hidden_dtype == "float32" else batch.hidden.to(low)
    with torch.autocast("cpu", dtype=low):
        loss = linear_scoring_loss(hidden, batch.weight, batch.labels, bias=batch.bias, reduction=reduction).loss
        other = F.linear(plain.hidden, plain.weight, plain.bias)
        assert other.dtype == low
    assert loss is not None
    expected = F.cross_entropy(other.float(), batch.labels, reduction=reduction)
    close(loss, expected, rtol=4 * torch.finfo(low).eps, atol=0)
    loss.sum().backward()  # outside of autocast, as is usual
    expected.sum().backward()
    for m, t in zip(batch.gradients(), plain.gradients(), strict=True):
        assert m.dtype == torch.float32
        assert (m - t).norm() <= 2 * torch.finfo(low).eps * t.norm()
    with torch.autocast("cpu", dtype=low):  # and it was computed in the low dtype indeed
        again = linear_scoring_loss(hidden, batch.weight, batch.labels, bias=batch.bias).nll
    full = linear_scoring_loss(batch.hidden, batch.weight, batch.labels, bias=batch.bias).nll
    assert again.dtype == torch.float32 and not torch.allclose(again, full, rtol=1e-5)


def test_strides_and_dimensions_do_not_matter() -> None:
    batch = Batch(n=48)
    expected = batch.score()
    expected.loss.backward()
    gradients = batch.gradients()
    storage = torch.zeros(D, 3, 32)
    hidden = storage.permute(1, 2, 0)[:, ::2]  # [3, 16, D], no dimension contiguous
    assert not hidden.is_contiguous()
    hidden.copy_(batch.hidden.detach().view(3, 16, D))
    hidden.requires_grad_()
    weight = batch.weight.detach().t().contiguous().t().requires_grad_()
    labels = batch.labels.view(3, 16).t().contiguous().t()
    scores = linear_scoring_loss(hidden, weight, labels, bias=batch.bias, alpha=0.3, chunk_tokens=10)
    assert scores.loss is not None
    scores.loss.backward()
    close(scores.loss, expected.loss, rtol=1e-6)
    close(scores.nll, expected.nll, atol=1e-6)
    assert hidden.grad is not None and weight.grad is not None
    close(hidden.grad.reshape(-1, D), gradients[0])
    close(weight.grad, gradients[1])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_implementation_says_the_same(impl: Any) -> None:
    batch = Batch()
    batch.labels[3:10] = -100
    post: dict[str, Any] = {"z_loss": 0.01, "logit_scale": 0.5, "logit_softcap": 3.0, "score_smoothing": 0.1}
    expected = batch.score(entropy=True, **post)
    expected.loss.backward()
    gradients = batch.gradients()
    scores = batch.score(entropy=True, impl=impl, **post)
    scores.loss.backward()
    for m, t in zip(batch.gradients(), gradients, strict=True):
        close(m, t)
    for name, value in vars(expected).items():
        close(getattr(scores, name), value, atol=1e-6)


def test_alpha_may_be_a_tensor() -> None:
    batch = Batch()
    for impl in IMPLEMENTATIONS:
        for step in range(5):
            alpha = step / 5 + 0.05
            as_tensor = batch.score(alpha=torch.tensor(alpha), impl=impl)
            as_float = batch.score(alpha=alpha, impl=impl)
            close(as_tensor.loss, as_float.loss, rtol=1e-6)


# ---- statistics and errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics_are_those_of_score_tokens_and_detached(reduction: str, entropy: bool) -> None:
    batch = Batch()
    batch.labels[::5] = -100
    scores = batch.score(reduction=reduction, entropy=entropy)
    z = F.linear(batch.hidden, batch.weight, batch.bias).detach()
    expected = score_tokens(z, batch.labels, Objective("dpsm", 0.3))
    assert torch.equal(scores.scored, expected.scored)
    assert scores.correct.sum() == expected.correct.sum()
    for name in ("nll", "brier", "spherical", "confidence", "correct"):
        value = getattr(scores, name)
        assert not value.requires_grad and value.shape == (N,)
        close(value, getattr(expected, name), atol=1e-6)
    if entropy:
        close(scores.entropy, expected.entropy, atol=1e-6)
    else:
        assert scores.entropy is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scoring_rule": "hinge"}, "scoring_rule='hinge' is unknown; choose one of"),
        ({"alpha": 1.5}, r"alpha=1\.5 lies outside \[0, 1\]"),
        ({"reduction": "max"}, "reduction='max' is unknown; choose mean, sum or none"),
        ({"reduction": "sum", "num_items_in_batch": 3}, "denominator of a mean, but reduction='sum' takes none"),
        ({"impl": "cuda"}, "impl='cuda' is unknown; choose one of auto, torch"),
        ({"impl": "compile"}, "impl='compile' is unknown; choose one of auto, torch, triton, reference"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be a whole number from 1 on; None chooses"),
        ({"logit_softcap": -1.0}, r"logit_softcap=-1\.0 must be positive and finite; None leaves"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \(123,\), but has \(4,\)"),
        ({"score_smoothing": 0.1, "label_smoothing": 0.1}, "both smooth the labels; set one of them to 0"),
    ],
)
def test_wrong_options_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch().score(**change)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_wrong_inputs_are_named(impl: Any) -> None:
    h, w, y = torch.zeros(2, 3, D), torch.zeros(V, D), torch.zeros(2, 3, dtype=torch.long)
    bad = y.clone()
    bad[1, 2] = V
    cases: list[tuple[Tensor, Tensor, Tensor, str]] = [
        (h, w.t(), y, r"must be \[V, D\] with D=16 .* but is \(16, 123\)"),
        (h, w, y.t(), r"need labels of shape \(2, 3\), but they have \(3, 2\)"),
        (h, w, bad, r"label 123 at position \(1, 2\) lies outside \[0, 123\).*resize_token_embeddings"),
        (h, w, y - 1, r"label -1 at position \(0, 0\) .*if -1 marks padding, replace it by -100"),
        (h, w, y.float(), r"labels must be int64, but are torch.float32; convert them with labels.long\(\)"),
    ]
    if impl != "reference":
        cases.append((h.bfloat16(), w, y, "hidden states are torch.bfloat16 but the head's weight is torch.float32"))
    for hidden, weight, labels, message in cases:
        with pytest.raises(ValueError, match=message):
            linear_scoring_loss(hidden, weight, labels, impl=impl)
