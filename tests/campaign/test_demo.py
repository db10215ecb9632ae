"""The demo as a user runs it: real scripts, real text, a minuscule model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpsm_hf.campaign.report.side_by_side import main as report
from dpsm_hf.campaign.runner.records import read_records

ROOT = Path(__file__).resolve().parents[2]
SMALL = "n_embd=16,n_layer=1,n_head=2,n_positions=32"
pytestmark = pytest.mark.usefixtures("warm_processes")


@pytest.mark.slow
def test_the_demo_trains_three_models_and_reports(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "dpsm_hf",
        "demo",
        "--output_dir",
        str(tmp_path),
        "--steps",
        "3",
        "--",
    ]
    command += ["--config_overrides", SMALL, "--block_size", "32", "--eval_steps", "3", "--logging_steps", "1"]
    command += ["--max_train_samples", "64", "--max_eval_samples", "8"]
    # Run from elsewhere: the scripts are found beside the package, not in the working directory.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "100%" in done.stderr  # progress bars reach the terminal
    assert "On this run DPSM" in done.stdout and "perplexity ↓" in done.stdout
    assert done.stdout.count("• ") <= 6
    folder = tmp_path / "clm"
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert any(said.startswith("All runs started from the same weights") for said in results["findings"])
    by_name = {run["name"]: run for run in results["runs"]}
    assert list(by_name) == ["ce", "brier", "dpsm"]
    for run in by_name.values():
        assert run["status"] == "finished"
        for key in ("eval_perplexity", "eval_brier", "eval_ece_10", "eval_ece_15", "eval_ece_100", "train_seconds"):
            assert run["metrics"][key] >= 0, key
        assert run["metrics"]["peak_memory_mb"] > 100 and run["metrics"]["tokens_per_second"] > 0
        assert run["calibration"]["step"] == 3 and sum(run["calibration"]["curve"]["count"]) > 0
    records = {record.arguments["scoring_rule"]: record for record in read_records(folder).values()}
    assert {name: by_name[name]["run"]["id"] for name in by_name} == {n: r.run_id for n, r in records.items()}
    assert not list(folder.glob("runs/*/checkpoint-*"))  # which only a stopped run needs
    logs = {name: record.history for name, record in records.items()}
    # The same weights and the same first batch: before the first update all three see the same NLL.
    first = {name: next(entry["nll"] for entry in log if "nll" in entry) for name, log in logs.items()}
    assert first["ce"] == pytest.approx(first["brier"], abs=1e-6) == pytest.approx(first["dpsm"], abs=1e-6)
    assert [entry["alpha"] for entry in logs["dpsm"] if "alpha" in entry][-1] == 1.0
    # A campaign like any other, whose runs `dpsm report` reads too.
    runs = [str(folder / "runs" / records[name].run_id) for name in ("ce", "dpsm")]
    assert report([*runs, "--output_dir", str(tmp_path / "report")]) == 0
    assert len(json.loads((tmp_path / "report" / "results.json").read_text(encoding="utf-8"))["runs"]) == 2
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Reliability diagrams" in page and "http://" not in page.split("</style>")[1].replace("www.w3.org", "")
    assert (folder / "plots" / "reliability-all.png").stat().st_size > 5000
