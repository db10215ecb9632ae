"""Campaigns of real runs: their records, trackers, what starts from another run, Ctrl-C, NaN, too little memory."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

import run_clm_dpsm
from dpsm_hf.campaign.runner.collecting import checkpoints, reached_step
from dpsm_hf.campaign.runner.launching import run_folder
from dpsm_hf.campaign.runner.lock import processes_of
from dpsm_hf.campaign.runner.records import Record, read_records
from dpsm_hf.campaign.runner.running import run_campaign
from dpsm_hf.campaign.runner.status import campaign_status
from dpsm_hf.campaign.spec.design import Campaign
from tests.campaign.campaigns import make_campaign, run_of, tiny_arguments

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_processes")]


def wait_for(condition: Callable[[], object], seconds: float = 200) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.05)


def timeless(metrics: Any) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.endswith(("runtime", "per_second", "seconds"))}


# ---- a campaign that nothing happens to -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Campaign, Path, str]:
    """A finished campaign of three runs, one of which starts from another."""
    folder = tmp_path_factory.mktemp("campaign")
    campaign = make_campaign(tiny_arguments(folder, eval_steps=4), ("ce", "dpsm"), track=("tensorboard",))
    source = run_of(campaign, "ce")
    changes = {"model_name_or_path": f"{{run:{source}}}", "tokenizer_name": None, "model_type": None}
    arguments = {k: v for k, v in {**campaign.runs[source].arguments, **changes}.items() if v is not None}
    for name in ("config_overrides", "tokenizer_vocab_size"):
        del arguments[name]
    tuned = make_campaign({**arguments, "max_steps": 2}, ("brier",))
    campaign = replace(
        campaign, runs={**tuned.runs, **campaign.runs}, points=(*tuned.points, *campaign.points),
        variations=(*campaign.variations, *tuned.variations),
    )  # fmt: skip
    said = StringIO()
    assert run_campaign(campaign, folder / "out", jobs=2, stream=said) == 0, said.getvalue()
    return campaign, folder / "out", said.getvalue()


def test_what_a_record_holds(done: tuple[Campaign, Path, str]) -> None:
    campaign, out, said = done
    records = read_records(out)
    assert set(records) == set(campaign.runs)
    for run_id, record in records.items():
        assert record.status == "ok" and record.message == ""
        assert record.arguments == campaign.runs[run_id].arguments
        assert record.command[0] == "python"  # no path of the machine: records are handed on
        assert record.command[-4:] == ["-m", "dpsm_hf", "clm", f"runs/{record.run_id}/settings.json"]
        (attempt,) = record.attempts
        assert attempt["exit_code"] == 0 and attempt["from_step"] == 0
        assert attempt["to_step"] == campaign.runs[run_id].arguments["max_steps"]
        assert 0 < attempt["cpu_seconds"] and 100 < attempt["peak_memory_mb"] < 8000
        assert record.machine["device"] and record.machine["versions"]["transformers"]
        assert record.efficiency["train_seconds"] and record.efficiency["peak_memory_mb"] == attempt["peak_memory_mb"]
        for split in ("validation", "test"):
            nll, perplexity = record.value("nll", split=split), record.value("perplexity", split=split)
            assert nll is not None and perplexity == pytest.approx(math.exp(nll))
        assert record.calibration["test"]["curve"]
        assert [entry["step"] for entry in record.history if "eval_nll" in entry]
        assert not list(run_folder(out, run_id).glob("checkpoint-*"))
    assert said.count(" ok ") == 3 and "the last one" in said
    assert (out / "campaign.yaml").read_text() == "name: test\n"


def test_a_run_starts_from_the_model_of_another(done: tuple[Campaign, Path, str]) -> None:
    campaign, out, _ = done
    records = read_records(out)
    source, tuned = records[run_of(campaign, "ce")], records[run_of(campaign, "brier")]
    assert source.attempts[0]["started"] < tuned.attempts[0]["started"]
    settings = json.loads((run_folder(out, tuned.run_id) / "settings.json").read_text())
    assert settings["model_name_or_path"] == str(run_folder(out, source.run_id))
    first = {r.name.split("/")[0]: next(e["nll"] for e in r.history if "nll" in e) for r in records.values()}
    assert first["brier"] < first["ce"] - 0.2  # where the other one ended, not where a fresh model begins


def test_the_tokenizer_is_trained_once(done: tuple[Campaign, Path, str]) -> None:
    campaign, out, _ = done
    (folder,) = [path for path in (out / "tokenizer").iterdir() if path.is_dir()]
    for variation in ("ce", "dpsm"):
        settings = json.loads((run_folder(out, run_of(campaign, variation)) / "settings.json").read_text())
        assert settings["tokenizer_name"] == str(folder)


def test_tensorboard_has_one_folder_a_campaign(done: tuple[Campaign, Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    campaign, out, _ = done
    for run_id, record in read_records(out).items():
        if campaign.track:
            events = EventAccumulator(str(out / "tensorboard" / record.name))
            events.Reload()
            last = events.Scalars("eval/nll")[-1]
            assert last.value == pytest.approx(record.value("nll", split="validation"), rel=1e-5), run_id


def test_nothing_is_repeated(done: tuple[Campaign, Path, str]) -> None:
    campaign, out, _ = done
    before = {path: path.read_bytes() for path in out.glob("runs/*/record.json")}
    said = StringIO()
    started = time.monotonic()
    assert run_campaign(campaign, out, stream=said) == 0
    assert time.monotonic() - started < 20
    assert {path: path.read_bytes() for path in out.glob("runs/*/record.json")} == before
    assert said.getvalue() == "3 ok.\n"


def test_status(done: tuple[Campaign, Path, str]) -> None:
    campaign, out, _ = done
    text = campaign_status(campaign, out)
    assert text.count(" ok ") == 3 and "3 runs: 3 ok." in text and "Nobody works on it." in text
    more = make_campaign(campaign.runs[run_of(campaign, "ce")].arguments, ("focal",))
    wider = replace(
        campaign, runs={**campaign.runs, **more.runs}, points=(*campaign.points, *more.points),
        variations=(*campaign.variations, *more.variations),
    )  # fmt: skip
    text = campaign_status(wider, out)
    assert "4 runs: 3 ok, 1 missing." in text and "What is missing takes about" in text
    assert campaign_status(campaign, out.parent / "nothing yet").count("missing") == 4


# ---- stopping at a step ---------------------------------------------------------------------------------------------


def test_stopping_at_a_step_changes_no_figure(done: tuple[Campaign, Path, str], tmp_path: Path) -> None:
    campaign, out, _ = done
    run_id = run_of(campaign, "dpsm")
    settings = json.loads((run_folder(out, run_id) / "settings.json").read_text())
    settings |= {"output_dir": str(tmp_path / "out"), "report_to": "none", "save_steps": 100, "eval_on_start": True}
    path = tmp_path / "settings.json"

    def script(**changes: Any) -> dict[str, float]:
        path.write_text(json.dumps({**settings, **changes}))
        return run_clm_dpsm.main([str(path)])

    # a quarter of 8 steps, rounded up to the evaluation at step 4
    with pytest.raises(SystemExit) as stopped:
        script(stop_at_step=0.25)
    assert stopped.value.code == 0
    assert [step for step, _ in checkpoints(tmp_path / "out")] == [4]
    assert not (tmp_path / "out" / "all_results.json").exists()
    with pytest.raises(ValueError, match="lies behind: the checkpoint is at step 4"):
        script(stop_at_step=4)
    resumed, whole = script(), script(output_dir=str(tmp_path / "whole"))

    def figures(results: dict[str, float]) -> dict[str, float]:
        return {k: v for k, v in timeless(results).items() if k.startswith(("eval_", "test_"))}

    assert figures(resumed) == figures(whole) and figures(whole)
    logs = {}
    for name in ("out", "whole"):
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        logs[name] = [timeless(entry) for entry in history if "eval_nll" in entry or "loss" in entry]
    assert logs["out"] == logs["whole"]  # the schedule of alpha too
    # and not evaluated once more where it was resumed
    assert [entry["step"] for entry in logs["out"] if "eval_nll" in entry] == [0, 4, 8]


@pytest.mark.parametrize("stop", ["0", "-1", "2.5"])
def test_steps_that_cannot_be_stopped_at(stop: str, tmp_path: Path) -> None:
    words = [f"--{k}={v}" for k, v in tiny_arguments(tmp_path, output_dir=tmp_path, stop_at_step=stop).items()]
    with pytest.raises(ValueError, match=r"--stop_at_step .* must be"):
        run_clm_dpsm.main(words)


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------

STEPS = 1500  # so that there is time to press it


def start(folder: Path, **content: Any) -> tuple[Campaign, Callable[[], subprocess.Popen[str]]]:
    path = folder / "campaign.json"
    path.write_text(json.dumps({**content, "budget": {"limit": 100.0}, "rungs": [0.5]}), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def runner() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("campaign_runner.py")), str(path), str(folder / "out"), "1"],
            env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    return make_campaign(**content), runner


def the_record(folder: Path) -> Record:
    (record,) = read_records(folder / "out").values()
    return record


def test_ctrl_c_saves_a_checkpoint_and_the_next_call_goes_on(tmp_path: Path) -> None:
    arguments = tiny_arguments(
        tmp_path, max_steps=STEPS, eval_strategy="no", save_steps=10**6, logging_steps=10, do_predict=False
    )
    campaign, runner = start(tmp_path, arguments=arguments, variations=["ce"])
    folder = run_folder(tmp_path / "out", campaign.order[0])

    def training(attempt: int) -> bool:
        text = (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""
        return text.rpartition(f"=== attempt {attempt},")[2].count("'loss'") > 1 and f"attempt {attempt}," in text

    for number, sent in enumerate((signal.SIGINT, signal.SIGTERM), 1):
        process = runner()
        wait_for(lambda: training(number))  # noqa: B023 - called before the loop goes on
        assert processes_of(folder / "settings.json")
        process.send_signal(sent)
        _, said = process.communicate(timeout=200)
        assert process.returncode == 130, said
        assert "saving a checkpoint" in said and "goes on from there" in said
        assert processes_of(folder / "settings.json") == []
        record = the_record(tmp_path)
        attempt = record.attempts[-1]
        assert record.status == attempt["status"] == "interrupted" and len(record.attempts) == number
        assert attempt["from_step"] < attempt["to_step"] == reached_step(folder) < STEPS
        assert "the same command again" in (folder / "log.txt").read_text()  # the script has ended by itself

    # twice: at once, whatever it is doing
    process = runner()
    wait_for(lambda: processes_of(folder / "settings.json"))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130 and processes_of(folder / "settings.json") == []
    assert the_record(tmp_path).attempts[-1]["to_step"] == record.attempts[-1]["to_step"]

    process = runner()
    _, said = process.communicate(timeout=280)
    assert process.returncode == 0, said
    record = the_record(tmp_path)
    assert [a["status"] for a in record.attempts] == ["interrupted"] * 3 + ["ok"]
    assert record.attempts[-1]["from_step"] == record.attempts[1]["to_step"] > 0
    assert [entry["step"] for entry in record.history if "loss" in entry] == list(range(10, STEPS + 1, 10))
    assert record.value("nll", split="validation") is not None


# ---- runs that go wrong by themselves -------------------------------------------------------------------------------


def test_divergence_and_too_little_memory(tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path, tokenizer_vocab_size=301)
    huge = "n_embd=4000000,n_layer=1,n_head=1,n_positions=32"
    campaign = make_campaign(
        arguments, ("nan", "memory"), own={"nan": {"learning_rate": 1e38}, "memory": {"config_overrides": huge}}
    )
    said = StringIO()
    assert run_campaign(campaign, tmp_path / "out", jobs=2, stream=said) == 1
    records = {record.name.split("/")[0]: record for record in read_records(tmp_path / "out").values()}
    assert records["nan"].status == "diverged", records["nan"].message
    assert "optimizer step" in records["nan"].message
    assert records["memory"].status == "oom", records["memory"].message
    assert "allocate" in records["memory"].message
