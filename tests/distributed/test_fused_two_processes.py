"""The fused head under DDP and FSDP2 in two real processes (gloo): the gradients of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import cases
from tests.distributed.fused_worker import DDP_CASES, FSDP_CASES, PART_CASES, gradients
from tests.distributed.processes import results_of

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("warm_processes")]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of every case in two processes."""
    return results_of("fused_worker", tmp_path_factory.mktemp("fused"))


@pytest.mark.parametrize(("name", "find_unused"), DDP_CASES)
def test_ddp_equals_one_process(name: str, find_unused: bool, two: Any) -> None:
    whole, parts = cases.one_step(name, "dpsm", 16, 1, fused_head="off"), two[f"ddp/{name}/{find_unused}"]
    difference = (parts["gradient"] - whole["gradient"]).norm() / whole["gradient"].norm()
    assert difference <= 1e-5
    for key in ("loss", "nll", "brier", "token_accuracy", "confidence"):
        assert parts["logs"][key] == pytest.approx(whole["logs"][key], rel=2e-6), key


@pytest.mark.parametrize("name", PART_CASES)
def test_gradients_of_the_parts_are_those_of_one_process(name: str, two: Any) -> None:
    whole = cases.one_step(name, "dpsm", 16, 1, log_component_grad_norms=True)
    parts = two[f"parts/{name}"]
    assert (parts["gradient"] - whole["gradient"]).norm() <= 1e-5 * whole["gradient"].norm()
    for key in ("grad_norm_ce", "grad_norm_brier"):
        assert parts["logs"][key] == pytest.approx(whole["logs"][key], rel=1e-5), key


@pytest.mark.parametrize(("name", "units"), FSDP_CASES)
def test_fsdp2_equals_one_process(name: str, units: str, two: Any) -> None:
    whole, parts = gradients(name, None), two[f"fsdp/{name}/{units}"]
    torch.testing.assert_close(parts["loss"], whole["loss"], rtol=2e-6, atol=0)
    assert parts["gradients"].keys() == whole["gradients"].keys()
    of_the_head = any("lm_head" in key or "wte" in key or "shared" in key for key in whole["gradients"])
    assert of_the_head == (name not in ("llama_dora", "llama_prompt"))
    for key, gradient in whole["gradients"].items():
        assert (parts["gradients"][key] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, key
