"""The trainers over FSDP2 and DeepSpeed in two real processes (gloo): the figures of one process without either."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.sharded_worker import MODELS, STEPS, train

ROOT = Path(__file__).resolve().parents[2]
CASES = [(how, name) for how, names in MODELS.items() for name in (*names, "llama, accumulated")]
CASES += [("zero3", "llama, checkpointed"), ("zero3", "llama_head_lora, falling back")]
pytestmark = pytest.mark.distributed

whole = cache(train)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two processes log, by how the weights are sharded."""

    @cache
    def finished(how: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        folder = tmp_path_factory.mktemp("sharded")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        worker = str(ROOT / "tests" / "distributed" / "sharded_worker.py")
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
            # DeepSpeed compiles its communication, by the ninja that came with it; a build that was killed would
            # leave a lock behind for which all later ones wait
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        }  # fmt: skip
        path = folder / "results.pt"
        done = subprocess.run(
            [*command, worker, how, str(path)],
            env=environment, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        return done, path

    def run(how: str) -> dict[str, Any]:
        if how != "fsdp2" and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed here; make test-deepspeed runs these")
        done, path = finished(how)
        assert done.returncode == 0, done.stderr[-4000:]
        return torch.load(path, weights_only=False)

    return run


@pytest.mark.parametrize(("how", "case"), CASES)
def test_sharded_weights_give_the_figures_of_one_process(how: str, case: str, sharded: Any) -> None:
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
