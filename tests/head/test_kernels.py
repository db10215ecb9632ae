"""The Triton row pass in Triton's interpreter, against float64; and compiled ahead of time for A100 and H100."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dpsm_hf import linear_scoring_loss
from dpsm_hf.head import kernels
from dpsm_hf.head.row_pass import row_pass
from dpsm_hf.rules.post_ops import PostOps
from dpsm_hf.rules.rows import row_statistics
from dpsm_hf.rules.scoring_rules import SCORING_RULES, Objective
from tests.head import kernel_worker as worker
from tests.reference import reference_gradient

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton", reason="Triton is not installed (it exists on Linux alone)")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the kernel made of every case, from a process that runs Triton's interpreter."""
    path = tmp_path_factory.mktemp("kernel") / "results.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(ROOT / "tests" / "head" / "kernel_worker.py"), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(path, weights_only=False)


def truth(buffer: torch.Tensor, vocab: int, labels: torch.Tensor, post: PostOps, loss: str, **options: float) -> Any:
    """Value, gradient by the head's output and statistics, in float64 by autograd through the definitions."""
    raw = buffer[:, :vocab].double()
    leaf = raw.clone().requires_grad_()
    logits = post(leaf)
    value, slope = reference_gradient(logits.detach(), labels, loss, **options)
    (gradient,) = torch.autograd.grad(logits, leaf, slope)
    row = row_statistics(logits.detach(), labels)
    columns = [row.nll, row.brier, row.spherical, row.confidence, row.correct.double(), row.entropy]
    return value, gradient, torch.stack(columns, -1)


def check(found: dict[str, Any], vocab: int, expected: Any, rtol: float, atol: float) -> None:
    value, gradient, statistics = expected
    scale = value.abs().clamp_min(1.0)
    assert ((found["value"].double() - value).abs() / scale).max() <= 4e-6
    count = found["statistics"].shape[-1]
    torch.testing.assert_close(found["statistics"].double(), statistics[:, :count], rtol=4e-6, atol=2e-6)
    torch.testing.assert_close(found["buffer"][:, :vocab].double(), gradient, rtol=rtol, atol=atol)
    assert (found["buffer"][:, vocab:] == 7).all(), "written beyond the row"


# the interpreter truncates where a GPU rounds: one unit of the last place, not half of one
ROUNDING = {"fp32": (2e-5, 1e-6), "bf16": (2**-7, 1e-6), "fp16": (2**-10, 1e-6)}


@pytest.mark.parametrize(("loss", "option", "post", "dtype"), worker.rules())
def test_every_rule(loss: str, option: str, post: str, dtype: str, results: dict[str, Any]) -> None:
    buffer, labels = worker.chunk(5, 123, worker.DTYPES[dtype])
    expected = truth(buffer, 123, labels, worker.POSTS[post], loss, alpha=0.3, **worker.OPTIONS[option])
    check(results[f"rule/{dtype}/{loss}/{option}/{post}"], 123, expected, *ROUNDING[dtype])


@pytest.mark.parametrize("loss", ["dpsm", "spherical"])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 2), (47, 123), (3, 1000), (2, 9001)])
def test_every_shape(rows: int, vocab: int, loss: str, results: dict[str, Any]) -> None:
    """Vocabularies of one block and of three, the last of them a stub."""
    buffer, labels = worker.chunk(rows, vocab, torch.float32)
    check(results[f"shape/{rows}/{vocab}/{loss}"], vocab, truth(buffer, vocab, labels, PostOps(), loss, alpha=0.3),
          2e-5, 1e-6)  # fmt: skip


@pytest.mark.parametrize("loss", SCORING_RULES)
@pytest.mark.parametrize("kind", ["uniform", "certain"])
def test_extreme_rows(kind: str, loss: str, results: dict[str, Any]) -> None:
    buffer, labels = worker.chunk(9, 200, torch.float32, kind)
    expected = truth(buffer, 200, labels, PostOps(), loss, alpha=0.3)
    found = results[f"kind/{kind}/{loss}"]
    check(found, 200, expected, 2e-5, 1e-6)
    # relative, where the textbook forms keep no digit: 1 - p_y is down to 1e-8 here
    index = labels.unsqueeze(-1)
    own, exact = found["buffer"][:, :200].gather(-1, index).double(), expected[1].gather(-1, index)
    assert ((own - exact).abs() <= 4e-6 * exact.abs()).all()
    # 1e-15: what the definition itself loses in float64
    assert ((found["value"].double() - expected[0]).abs() <= 4e-6 * expected[0].abs() + 1e-15).all()


@pytest.mark.parametrize("loss", SCORING_RULES)
def test_masked_logits(loss: str, results: dict[str, Any]) -> None:
    """A logit of -inf has probability and gradient 0, and leaves the entropy finite."""
    buffer, labels = worker.chunk(9, 200, torch.float32, "masked")
    finite = buffer[:, :200].clone().clamp_min(-1e4)  # exp underflows to 0 in float64 too
    padded = torch.cat([finite, buffer[:, 200:]], -1)
    check(results[f"kind/masked/{loss}"], 200, truth(padded, 200, labels, PostOps(), loss, alpha=0.3), 2e-5, 1e-6)


@pytest.mark.parametrize("name", ["float", "scalar", "rows"])
def test_the_weight_scales_the_gradient_alone(name: str, results: dict[str, Any]) -> None:
    buffer, labels = worker.chunk(7, 123, torch.float32)
    value, gradient, statistics = truth(buffer, 123, labels, PostOps(), "dpsm", alpha=0.3)
    weight = torch.linspace(0.1, 2.0, 7).double().unsqueeze(-1) if name == "rows" else 0.5
    check(results[f"weight/{name}"], 123, (value, gradient * weight, statistics), 2e-5, 1e-6)


@pytest.mark.parametrize("name", ["statistics", "value"])
def test_without_gradient_the_logits_stay(name: str, results: dict[str, Any]) -> None:
    buffer, labels = worker.chunk(7, 123, torch.float32)
    value, _, statistics = truth(buffer, 123, labels, PostOps(), "dpsm", alpha=0.3)
    found = results[f"untouched/{name}"]
    assert torch.equal(found["buffer"], buffer)
    torch.testing.assert_close(found["statistics"].double(), statistics, rtol=4e-6, atol=2e-6)
    if name == "statistics":
        assert found["value"] is None
    else:
        torch.testing.assert_close(found["value"].double(), value, rtol=4e-6, atol=2e-6)


@pytest.mark.parametrize(("post", "kind", "vocab"), worker.SPREADS)
def test_varentropy(post: str, kind: str, vocab: int, results: dict[str, Any]) -> None:
    """The variance of log p, by the kernel and by the row pass in torch, against its definition in float64."""
    buffer, labels = worker.spread_chunk(kind, vocab)
    p = worker.POSTS[post](buffer[:, :vocab].double()).softmax(-1)
    log_p = p.log().clamp_min(-1e4)
    mean = (p * log_p).sum(-1, keepdim=True)
    expected = (p * (log_p - mean).square()).sum(-1)
    found = results[f"varentropy/{post}/{kind}/{vocab}"]["statistics"]
    _, plain = row_pass(buffer[:, :vocab], labels, None, worker.POSTS[post], entropy=True, varentropy=True)
    without = row_pass(buffer[:, :vocab], labels, None, worker.POSTS[post], entropy=True)[1]
    assert torch.equal(plain[:, :6], without), "the others stay the same to the bit"
    for statistics in (found, plain):
        assert statistics.shape == (3, 7)
        # the kernel takes a difference of squares: of logs of up to 30
        torch.testing.assert_close(statistics[:, 6].double(), expected, rtol=2e-5, atol=1e-4)
    torch.testing.assert_close(plain[:, 6].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_head_with_the_kernel_is_the_head_without(results: dict[str, Any]) -> None:
    for name, expected in results["head/reference"].items():
        torch.testing.assert_close(results["head/triton"][name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_on_a_cpu_without_the_interpreter_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernels.why_not(torch.device("cpu")) and not kernels.why_not(torch.device("cuda"))
    with pytest.raises(ValueError, match="impl='triton' runs on CUDA, but the hidden states are on cpu"):
        linear_scoring_loss(torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64), impl="triton")


def test_without_triton_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_installed", lambda: False)
    assert "pip install triton" in kernels.why_not(torch.device("cuda"))


def test_alpha_and_weight_are_no_part_of_what_is_compiled() -> None:
    """Whatever moves during training must not compile the kernel again."""
    options = dict(row_weight=False, entropy=False, gradient=True)
    one, two = (kernels.constants(Objective("dpsm", alpha), PostOps(scale), **options)
                for alpha, scale in ((0.0, 1.0), (0.7, 0.5)))  # fmt: skip
    assert one == two


@pytest.mark.parametrize("field", ["label_smoothing", "score_smoothing", "z_loss"])
def test_a_scheduled_weight_that_leaves_zero_compiles_nothing_anew(field: str) -> None:
    def compiled(value: float, scheduled: bool) -> dict[str, Any]:
        options: dict[str, Any] = {field: value, "scheduled": frozenset({field} if scheduled else ())}
        return kernels.constants(
            Objective("dpsm", 0.3, **options), PostOps(), row_weight=False, entropy=False, gradient=True
        )

    assert compiled(0.0, True) == compiled(0.1, True) == compiled(0.1, False) != compiled(0.0, False)


@pytest.mark.parametrize("name", ["z_loss", "label", "score"])
def test_a_part_whose_weight_is_still_zero_changes_nothing(name: str, results: dict[str, Any]) -> None:
    without, with_it = results["scheduled/none"], results[f"scheduled/{name}"]
    for key in ("value", "statistics", "buffer"):
        torch.testing.assert_close(with_it[key], without[key], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("variant", ["statistics", *SCORING_RULES, "dpsm, softcap"])
def test_it_compiles_ahead_of_time(variant: str, architecture: int) -> None:
    from dpsm_hf.measuring.kernel_report import VARIANTS, compile_ahead

    found = compile_ahead(architecture, "bf16", *VARIANTS[variant])
    assert 0 < found.registers <= 128, found  # two programs of 256 threads an SM at the least
    assert found.spill_bytes <= 32, found
    if variant in ("ce", "dpsm"):
        assert found.spill_bytes == 0, found
