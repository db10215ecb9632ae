"""The trainers under FSDP2 and DeepSpeed in two processes (gloo) give the figures of one process without them."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import results_of
from tests.distributed.sharded_worker import MODELS, STEPS, train

CASES = [(how, name) for how, names in MODELS.items() for name in (*names, "llama, accumulated")]
CASES += [("zero3", "llama, checkpointed"), ("zero3", "llama_head_lora, falling back")]
pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("warm_processes")]

whole = cache(train)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """A function from a way of sharding to the logs of two processes with it, which are started once."""

    @cache
    def logs(how: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("sharded")
        return results_of(
            "sharded_worker", folder, how, timeout=600, DS_ACCELERATOR="cpu",
            # DeepSpeed compiles its communication, by the ninja that came with it; a build that was killed would leave
            # a lock behind for which all later ones wait
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            TORCH_EXTENSIONS_DIR=str(folder / "extensions"),
        )  # fmt: skip

    return logs


@pytest.mark.parametrize(("how", "case"), CASES)
def test_sharded_weights_give_the_figures_of_one_process(
    how: str, case: str, sharded: Callable[[str], dict[str, Any]]
) -> None:
    if how != "fsdp2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed here; make test-deepspeed runs these")
    *mine, last = [entry for entry in sharded(how)[case] if {"loss", "eval_loss"} & entry.keys()]
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
