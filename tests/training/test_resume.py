"""After kill -9 and a resume from the last checkpoint training ends where it would have ended: the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.resume_worker import KILL_AFTER, RUNS, STEPS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of every run."""
    folder = tmp_path_factory.mktemp("resume")
    worker = str(ROOT / "tests" / "training" / "resume_worker.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, worker, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed_run_ends_with_the_same_parameters(name: str, runs: Path) -> None:
    whole, resumed = (torch.load(runs / f"{kind}-{name}.pt", weights_only=True) for kind in ("whole", "resumed"))
    assert all(torch.equal(a, b) for a, b in zip(whole["parameters"], resumed["parameters"], strict=True))
    assert whole["alpha"] == resumed["alpha"] and whole["gamma"] == resumed["gamma"]
    assert [step for step, _ in whole["alpha"]] == list(range(1, STEPS + 1))


def test_the_schedules_moved_alpha_after_the_kill(runs: Path) -> None:
    """Otherwise the test above would prove little."""
    for name in ("linear", "cosine", "late_linear", "step", "triangle", "feedback"):
        alphas = dict(torch.load(runs / f"whole-{name}.pt", weights_only=True)["alpha"])
        assert len({alphas[step] for step in range(KILL_AFTER, STEPS + 1)}) > 1, name
    gammas = dict(torch.load(runs / "whole-knobs.pt", weights_only=True)["gamma"])
    assert len({gammas[step] for step in range(1, STEPS + 1)}) > 3
    assert len({gammas[step] for step in range(KILL_AFTER, STEPS + 1)}) > 1
