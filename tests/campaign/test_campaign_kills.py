"""kill -9 of the runner and of runs at random moments: no record is lost, no run repeated, no figure changed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dpsm_hf.campaign.runner.launching import SETTINGS_NAME, run_folder
from dpsm_hf.campaign.runner.lock import processes_of, ranks_of
from dpsm_hf.campaign.runner.records import RECORD_NAME, Record, read_records
from dpsm_hf.campaign.spec.design import Budget, Campaign
from tests.campaign.campaigns import make_campaign, run_of, tiny_arguments

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20
JOBS = 2
# What a clock says is another time each time.
_CLOCKS = ("runtime", "per_second", "seconds")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_processes")]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Campaign, Path]:
    """A main run and two ablations, one of which is stopped at half of the steps."""
    folder = tmp_path_factory.mktemp("kills")
    content: dict[str, Any] = {
        "arguments": tiny_arguments(folder, save_steps=1, eval_steps=3, max_steps=6),
        "variations": ["ce"],
        "ablations": ["dpsm", "focal"],
    }
    budget = {"limit": 100.0, "halving_metric": "nll", "halving_keep": 0.5}
    path = folder / "campaign.json"
    path.write_text(json.dumps({**content, "budget": budget, "rungs": [0.5]}), encoding="utf-8")
    return make_campaign(**content, budget=Budget(**budget, halving_rungs=(0.5,))), path


@pytest.fixture(scope="module")
def whole(plan: tuple[Campaign, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """What nobody kills comes to, and about how many seconds a run takes on this machine as it is."""
    output = tmp_path_factory.mktemp("whole") / "whole"
    started = time.monotonic()
    assert finish(plan[1], output) == 0
    # of about four processes, two at a time
    length = (time.monotonic() - started) / 2.5
    records = read_records(output)
    assert sorted(record.status for record in records.values()) == ["ok", "ok", "pruned"]
    assert all(record.metrics for record in records.values() if record.status == "ok")
    return figures(records), length


def start(plan: Path, output: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (output.parent / f"{output.name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("campaign_runner.py")), str(plan), str(output), str(JOBS)],
            env=environment, stdout=log, stderr=log, cwd=ROOT,
        )  # fmt: skip


def finish(plan: Path, output: Path) -> int:
    return start(plan, output).wait(timeout=600)


def figures(records: Mapping[str, Record]) -> dict[str, Any]:
    """What a report would be made of, without times."""

    def timeless(entries: Any) -> Any:
        if isinstance(entries, Mapping):
            return {k: timeless(v) for k, v in entries.items() if not k.endswith(_CLOCKS)}
        return [timeless(entry) for entry in entries] if isinstance(entries, (list, tuple)) else entries

    return {
        run_id: {
            "status": record.status, "message": record.message, "decision": record.decision,
            "metrics": timeless(record.metrics), "calibration": timeless(record.calibration),
            # An entry that holds nothing but the clock is written with a checkpoint that has no other; and the summary
            # at the end has the mean loss of the steps since the last resume.
            "history": [
                timeless(entry)
                for entry in record.history
                if set(timeless(entry)) > {"step", "epoch"} and "train_runtime" not in entry
            ],
        }
        for run_id, record in records.items()
    }  # fmt: skip


def test_one_that_is_killed_is_waited_for_at_a_rung(
    plan: tuple[Campaign, Path], whole: tuple[dict[str, Any], float], tmp_path: Path
) -> None:
    campaign, path = plan
    killed = run_of(campaign, "focal")
    output = tmp_path / "out"
    runner = start(path, output)
    deadline = time.monotonic() + 300
    while not (ranks := ranks_of(run_folder(output, killed) / SETTINGS_NAME)):
        assert runner.poll() is None and time.monotonic() < deadline, (tmp_path / "out.log").read_text()
        time.sleep(0.05)
    ranks[0].kill()
    assert runner.wait(timeout=600) == 1
    records = read_records(output)
    assert records[killed].status == "interrupted"
    other = records[run_of(campaign, "dpsm")]
    assert (other.status, other.decision) == ("paused", {})  # rather than the best of one
    assert finish(path, output) == 0
    assert figures(read_records(output)) == whole[0]


def test_twenty_kills(plan: tuple[Campaign, Path], whole: tuple[dict[str, Any], float], tmp_path: Path) -> None:
    campaign, path = plan
    expected, length = whole
    chance = random.Random(20)
    outputs = [tmp_path / "killed-0"]
    runner: subprocess.Popen[bytes] | None = None
    witness = _Witness(campaign)
    hit = {"runner": 0, "run": 0}
    for _ in range(KILLS):
        if runner is None or runner.poll() is not None:
            if witness.is_over(outputs[-1]):  # once more from nothing, so that every kill has something to hit
                outputs.append(tmp_path / f"killed-{len(outputs)}")
                witness = _Witness(campaign)
            runner = start(path, outputs[-1])
        time.sleep(chance.uniform(0, 0.9) * length)
        processes = [p for i in campaign.order for p in processes_of(run_folder(outputs[-1], i) / SETTINGS_NAME)]
        if processes and chance.random() < 0.5:
            hit["run"] += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(processes).pid, signal.SIGKILL)
        else:
            hit["runner"] += 1
            runner.kill()
            runner.wait()
        witness.look(outputs[-1])
    if runner is not None:
        runner.wait(timeout=600)
    assert min(hit.values()) >= 4, hit
    assert finish(path, outputs[-1]) == 0
    witness.look(outputs[-1])
    for output in outputs:
        assert figures(read_records(output)) == expected
    statuses = [a.get("status") for output in outputs for r in read_records(output).values() for a in r.attempts]
    assert statuses.count("interrupted") >= 5, statuses  # that many kills have hit a run under way


class _Witness:
    """Look at a campaign's records again and again: none is torn or lost, nothing that is done is touched."""

    def __init__(self, campaign: Campaign) -> None:
        self._campaign = campaign
        self._before: dict[str, Record] = {}
        self._settled: dict[str, bytes] = {}

    def is_over(self, output: Path) -> bool:
        return set(self._settled) == set(self._campaign.runs) and (output / "runs").exists()

    def look(self, output: Path) -> None:
        records = read_records(output)  # raises for one that is torn
        for run_id, before in self._before.items():
            assert run_id in records, "a record is lost"
            kept = len(before.attempts) - 1  # the last one may have got its end meanwhile
            assert records[run_id].attempts[:kept] == before.attempts[:kept], "an attempt is lost"
        for run_id, content in self._settled.items():
            assert (run_folder(output, run_id) / RECORD_NAME).read_bytes() == content, "a finished run was repeated"
        for run_id, record in records.items():
            assert len(ranks_of(run_folder(output, run_id) / SETTINGS_NAME)) <= 1, "two processes write one folder"
            if record.status in ("ok", "pruned"):
                self._settled[run_id] = (run_folder(output, run_id) / RECORD_NAME).read_bytes()
        self._before = records
