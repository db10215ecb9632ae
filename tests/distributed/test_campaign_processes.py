"""A run of a campaign on two processes: both get Ctrl-C once, save one checkpoint together, and resume from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpsm_hf.campaign.runner.collecting import reached_step
from dpsm_hf.campaign.runner.launching import SETTINGS_NAME, run_folder
from dpsm_hf.campaign.runner.lock import processes_of, ranks_of
from dpsm_hf.campaign.runner.records import read_records
from tests.campaign.campaigns import make_campaign, tiny_arguments

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.usefixtures("warm_processes")]


def test_ctrl_c_with_two_processes(tmp_path: Path) -> None:
    steps = 600
    content = {
        "arguments": tiny_arguments(
            tmp_path, max_steps=steps, eval_strategy="no", save_steps=10**6, logging_steps=10, do_predict=False,
            per_device_train_batch_size=2,
        ),
        "variations": ["ce"],
        "processes": 2,
    }  # fmt: skip
    campaign = make_campaign(**content)
    path = tmp_path / "campaign.json"
    path.write_text(json.dumps({**content, "budget": {"limit": 100.0}, "rungs": [0.5]}), encoding="utf-8")
    folder = run_folder(tmp_path / "out", campaign.order[0])
    runner = Path(__file__).parents[1] / "campaign" / "campaign_runner.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, str(runner), str(path), str(tmp_path / "out"), "1"]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    process = start()
    until = time.monotonic() + 250
    while not (folder / "log.txt").exists() or (folder / "log.txt").read_text().count("'loss'") < 2:
        assert time.monotonic() < until and process.poll() is None, (folder / "log.txt").read_text()[-3000:]
        time.sleep(0.05)
    assert len(ranks_of(folder / SETTINGS_NAME)) == 2
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert processes_of(folder / SETTINGS_NAME) == []
    (record,) = read_records(tmp_path / "out").values()
    assert record.status == "interrupted", record.message
    reached = reached_step(folder)
    assert 0 < reached == record.attempts[0]["to_step"] < steps
    assert {path.name for path in (folder / f"checkpoint-{reached}").glob("rng_state*")} == {
        "rng_state_0.pth", "rng_state_1.pth",
    }  # fmt: skip

    process = start()
    _, said = process.communicate(timeout=280)
    assert process.returncode == 0, said
    (record,) = read_records(tmp_path / "out").values()
    assert record.attempts[1]["from_step"] == reached
    assert [entry["step"] for entry in record.history if "loss" in entry] == list(range(10, steps + 1, 10))
