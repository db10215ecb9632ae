"""The example runs as it stands, in a folder of its own."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # it reads all docstrings of the standard library
def test_the_example_runs(tmp_path: Path) -> None:
    example = ROOT / "examples" / "sft_dpsm.py"
    assert len(example.read_text("utf-8").splitlines()) <= 40
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, example], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    metrics = ast.literal_eval(done.stdout.splitlines()[-1])
    assert set(metrics) == {"eval_nll", "eval_brier", "eval_ece_15", "eval_entropy"}
    assert 0 < metrics["eval_nll"] < 7 and (tmp_path / "out" / "sft-dpsm" / "calibration").is_dir()
