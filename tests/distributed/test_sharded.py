"""The trainers under FSDP2 and DeepSpeed in two processes (gloo) give the figures of one process without them."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import results_of
from tests.distributed.sharded_worker import MODELS, STEPS, train

CASES = [(how, name) for how, names in MODELS.items() for name in (*names, "llama, accumulated")]
CASES += [("zero3", "llama, checkpointed"), ("zero3", "llama_head_lora, falling back")]
pytestmark = pytest.mark.distributed

whole = cache(train)


@pytest.fixture(scope="module")
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The logs of two processes with one way of sharding."""
    if request.param != "fsdp2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed here; make test-deepspeed runs these")
    folder = tmp_path_factory.mktemp("sharded")
    return results_of(
        "sharded_worker", folder, request.param, timeout=600, DS_ACCELERATOR="cpu",
        # DeepSpeed compiles its communication, by the ninja that came with it; a build that was killed would leave a
        # lock behind for which all later ones wait
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        TORCH_EXTENSIONS_DIR=str(folder / "extensions"),
    )  # fmt: skip


@pytest.mark.parametrize(("sharded", "case"), CASES, indirect=["sharded"])
def test_sharded_weights_give_the_figures_of_one_process(case: str, sharded: dict[str, Any]) -> None:
    *mine, last = [entry for entry in sharded[case] if {"loss", "eval_loss"} & entry.keys()]
    *theirs, expected = [
        entry for entry in whole(case.split(",")[0], 16, fused_head="off") if {"loss", "eval_loss"} & entry.keys()
    ]
    assert len(mine) == len(theirs) == STEPS
    for step, (found, wanted) in enumerate(zip(mine, theirs, strict=True)):
        for key in ("loss", "grad_norm", "nll", "brier"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-5), (step, key)
    assert last["eval_tokens"] == expected["eval_tokens"]
    for key in ("eval_nll", "eval_brier", "eval_confidence", "eval_ece_15"):  # eval_loss is a mean over batches
        assert last[key] == pytest.approx(expected[key], rel=1e-5), key
