"""What is read from a run's folder that a kill has left half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpsm_hf.campaign.runner.attempts import recover
from dpsm_hf.campaign.runner.collecting import collect
from dpsm_hf.campaign.runner.records import Record, read_records

STATE = {"global_step": 4, "log_history": [{"step": 2, "loss": 3.0, "tokens_per_second": 100.0, "train_seconds": 1.5}]}


@pytest.mark.parametrize("results", ["", '{"eval_nll": 1.', "\x00\x00"])
def test_a_half_written_file_is_a_missing_one(results: str, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "abc"
    (folder / "calibration").mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps(STATE))
    (folder / "all_results.json").write_text(results)
    (folder / "calibration" / "eval-step-000004.json").write_text(results)
    record = Record("abc", "ce/1", "language-modelling", {}, "running", attempts=[{"from_step": 0}])
    found = recover(record, tmp_path)
    assert (found.status, found.metrics, found.calibration) == ("interrupted", {}, {})
    assert found.efficiency["tokens_per_second"] == 100.0 and read_records(tmp_path)["abc"].status == "interrupted"
    (folder / "trainer_state.json").write_text(results)
    assert not collect(record, folder).history
