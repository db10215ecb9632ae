"""What the runner makes of scripts that fail: full disks, crashes, kills; a fake script fails as it is told."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpsm_hf.campaign.runner import launching
from dpsm_hf.campaign.runner.launching import run_folder
from dpsm_hf.campaign.runner.lock import campaign_lock
from dpsm_hf.campaign.runner.records import Record, read_records, write_record
from dpsm_hf.campaign.runner.running import run_campaign
from dpsm_hf.campaign.runner.status import campaign_status
from dpsm_hf.campaign.spec.design import Budget, Campaign
from tests.campaign.campaigns import make_campaign, run_of

SCRIPT = """
import json, os, pathlib, signal, sys, time
settings = json.loads(pathlib.Path(sys.argv[2]).read_text())
out = pathlib.Path(settings["output_dir"])
way = pathlib.Path(settings["ways"]).read_text() if "ways" in settings else settings["way"]
print("the way is", way, flush=True)
if way == "full disk":
    with open("/dev/full", "w") as file: file.write("x")
if way == "memory": raise MemoryError
if way == "nan": raise FloatingPointError("the training loss is nan at optimizer step 3")
if way == "crash": raise ValueError("wrong")
if way == "kill": os.kill(os.getpid(), signal.SIGKILL)
if way == "nothing": sys.exit(0)
(out / "checkpoint-1").mkdir(exist_ok=True)
(out / "checkpoint-1" / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": []}))
(out / "model.safetensors").write_text("weights")
if way == "older checkpoint": (out / "started.json").write_text(json.dumps({"from_step": 2}))
value = None if way == "nan at the end" else 1.5
outcome = {"metrics": {"last": {"test": {"nll": value}}}, "efficiency": {"train_seconds": 2.0, "steps": 4}}
(out / "outcome.json").write_text(json.dumps(outcome))
"""


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_processes")]


@pytest.fixture(autouse=True)
def fake_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake.py").write_text(SCRIPT)
    monkeypatch.setattr(launching, "PROGRAM", (str(tmp_path / "fake.py"),))


def campaign_of(*ways: str, **more: Any) -> Campaign:
    names = [f"v{number}" for number in range(len(ways))]
    return make_campaign({}, names, own={n: {"way": way, "n": n} for n, way in zip(names, ways, strict=True)}, **more)


def run(campaign: Campaign, folder: Path, **options: Any) -> tuple[int, dict[str, Record], str]:
    said = io.StringIO()
    code = run_campaign(campaign, folder, stream=said, devices=(), **options)
    records = read_records(folder) if (folder / "runs").exists() else {}
    by_name = {r.name.split("/")[0]: r for r in records.values()}
    return code, by_name, said.getvalue()


def test_every_way_to_fail_is_told_apart(tmp_path: Path) -> None:
    campaign = campaign_of("well", "memory", "nan", "crash", "kill", "nothing", "nan at the end")
    code, records, said = run(campaign, tmp_path / "out", jobs=2)
    assert code == 1
    assert {name: r.status for name, r in records.items()} == {
        "v0": "ok", "v1": "oom", "v2": "diverged", "v3": "failed", "v4": "interrupted", "v5": "failed",
        "v6": "diverged",
    }  # fmt: skip
    assert records["v0"].value("nll") == 1.5 and records["v0"].message == ""
    assert records["v0"].efficiency["train_seconds"] == 2.0 and records["v0"].attempts[0]["to_step"] == 4
    assert "nan at optimizer step 3" in records["v2"].message
    assert "exit code 1: ValueError: wrong" in records["v3"].message
    assert "killed (signal 9)" in records["v4"].message and "no results" in records["v5"].message
    assert "not finite" in records["v6"].message
    assert "2 diverged, 2 failed, 1 interrupted, 1 ok, 1 oom." in said
    log = run_folder(tmp_path / "out", run_of(campaign, "v3")) / "log.txt"
    assert "the way is crash" in log.read_text() and str(log) in said
    # what takes room is gone where it is no longer needed, and the results stay
    ok = run_folder(tmp_path / "out", run_of(campaign, "v0"))
    assert not (ok / "checkpoint-1").exists() and (ok / "model.safetensors").exists()

    # the next call leaves alone what is settled
    _, again, _ = run(campaign, tmp_path / "out", jobs=2)
    assert {name: len(r.attempts) for name, r in again.items()} == {
        "v0": 1, "v1": 1, "v2": 1, "v3": 2, "v4": 2, "v5": 2, "v6": 1,
    }  # fmt: skip
    _, retried, _ = run(campaign, tmp_path / "out", retry=("oom", "diverged"), only=["v[126]/*"])
    assert {name: len(retried[name].attempts) for name in ("v0", "v1", "v2", "v3", "v6")} == {
        "v0": 1, "v1": 2, "v2": 2, "v3": 2, "v6": 2,
    }  # fmt: skip
    status = campaign_status(campaign, tmp_path / "out")
    assert "1 ok, 1 oom, 2 diverged, 2 failed, 1 interrupted" in status and "exit code 1: ValueError: wrong" in status


def test_a_full_disk_stops_the_campaign(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    campaign = campaign_of("full disk", "well")
    code, records, said = run(campaign, tmp_path / "out")
    assert code == 3
    assert records["v0"].status == "failed" and "No space left" in records["v0"].message
    assert "v1" not in records
    assert "error: the disk is full" in said and "Make room" in said


def test_one_that_fails_again_and_again_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "way").write_text("crash")
    campaign = make_campaign({"ways": str(tmp_path / "way")}, ("ce",))
    for attempts in (1, 2, 3, 3, 3):
        code, records, _ = run(campaign, tmp_path / "out")
        assert code == 1 and len(records["ce"].attempts) == attempts
    _, records, _ = run(campaign, tmp_path / "out", retry=("failed",))
    assert len(records["ce"].attempts) == 4
    (tmp_path / "way").write_text("well")
    assert run(campaign, tmp_path / "out")[0] == 1
    code, records, said = run(campaign, tmp_path / "out", retry=("failed",))
    assert code == 0 and records["ce"].status == "ok" and "the last one" in said


def test_what_starts_from_a_failed_run_is_not_started(tmp_path: Path) -> None:
    first = make_campaign({"way": "crash"}, ("ce",))
    second = make_campaign({"way": "well", "model_name_or_path": f"{{run:{first.order[0]}}}"}, ("brier",))
    campaign = replace(
        first, runs={**second.runs, **first.runs}, points=(*second.points, *first.points),
        variations=(*first.variations, *second.variations),
    )  # fmt: skip
    code, records, said = run(campaign, tmp_path / "out")
    assert code == 1 and records["ce"].status == "failed" and "brier" not in records
    assert "1 failed, 1 missing" in said


def test_only_and_keep(tmp_path: Path) -> None:
    first = make_campaign({"way": "well"}, ("ce",))
    source = first.order[0]
    second = make_campaign({"way": "well", "model_name_or_path": f"{{run:{source}}}"}, ("brier", "dpsm"))
    campaign = replace(
        first, runs={**first.runs, **second.runs}, points=(*first.points, *second.points),
        variations=(*first.variations, *second.variations),
    )  # fmt: skip
    code, records, _ = run(campaign, tmp_path / "out", only=["brier/*"], keep="records")
    assert code == 0 and set(records) == {"ce", "brier"}  # with what it starts from
    brier = run_folder(tmp_path / "out", run_of(campaign, "brier"))
    settings = json.loads((brier / "settings.json").read_text())
    assert settings["model_name_or_path"] == str(run_folder(tmp_path / "out", source))
    assert not (brier / "model.safetensors").exists()
    assert (run_folder(tmp_path / "out", source) / "model.safetensors").exists()  # others start from it
    assert run(campaign, tmp_path / "out", keep="all")[0] == 0
    assert (run_folder(tmp_path / "out", run_of(campaign, "dpsm")) / "checkpoint-1").exists()


def test_what_is_said_before_anything_starts(tmp_path: Path) -> None:
    campaign = campaign_of("well")
    for options, message in (
        ({"jobs": 0}, "at least one run"),
        ({"retry": ("ok",)}, "retry='ok' is unknown"),
        ({"keep": "some"}, "keep='some'"),
        ({"only": ["nothing*"]}, "only='nothing*' is no run"),
    ):
        code, records, said = run(campaign, tmp_path / "out", **options)  # type: ignore[arg-type]
        assert code == 2 and not records and message in said
    with campaign_lock(tmp_path / "out"):
        code, _, said = run(campaign, tmp_path / "out")
    assert code == 2 and "already" in said
    folder = run_folder(tmp_path / "out", campaign.order[0])
    folder.mkdir(parents=True)
    (folder / "record.json").write_text('{"schema": 1, "torn')
    said = io.StringIO()
    assert run_campaign(campaign, tmp_path / "out", stream=said) == 2
    assert "record.json" in said.getvalue()


def test_devices_are_shared_out(tmp_path: Path) -> None:
    campaign = campaign_of("well", "well", "well")
    said = io.StringIO()
    assert run_campaign(campaign, tmp_path / "out", jobs=3, devices=("4", "7"), stream=said) == 0
    given = [r.attempts[0]["devices"] for r in read_records(tmp_path / "out").values()]
    assert {tuple(devices) for devices in given} == {("4",), ("7",)}  # the third waited for one of them
    big = make_campaign({"way": "well"}, ("ce",))
    (run_id,) = big.runs
    big = replace(big, runs={run_id: replace(big.runs[run_id], processes=3)})
    said = io.StringIO()
    assert run_campaign(big, tmp_path / "big", devices=("4", "7"), stream=said) == 2
    assert "wants 3 devices" in said.getvalue()


def test_a_finished_run_is_taken_from_a_killed_runner(tmp_path: Path) -> None:
    campaign = campaign_of("well")
    run(campaign, tmp_path / "out")
    folder = run_folder(tmp_path / "out", campaign.order[0])
    record = read_records(tmp_path / "out")[campaign.order[0]]
    # as if the runner had been killed between the end of the process and the record of it
    write_record(replace(record, status="running", metrics={}), folder)
    code, records, _ = run(campaign, tmp_path / "out")
    assert code == 0 and records["v0"].status == "ok" and len(records["v0"].attempts) == 1
    assert records["v0"].value("nll") == 1.5
    # and one that had not finished is repeated
    write_record(replace(record, status="running"), folder)
    (folder / "outcome.json").unlink()
    code, records, _ = run(campaign, tmp_path / "out")
    assert [a["status"] for a in records["v0"].attempts] == ["interrupted", "ok"]
    assert "ended without recording how" in records["v0"].attempts[0]["message"]


def test_the_record_says_which_checkpoint_was_really_taken(tmp_path: Path) -> None:
    campaign = campaign_of("older checkpoint", "ok")
    for run_id in campaign.order:
        newest = run_folder(tmp_path / "out", run_id) / "checkpoint-4"
        newest.mkdir(parents=True)
        (newest / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": []}))
    _, records, _ = run(campaign, tmp_path / "out")
    # the second script says nothing: the newest one is what is known
    assert [records[name].attempts[0]["from_step"] for name in ("v0", "v1")] == [2, 4]


def test_ablations_beyond_the_limit_are_left_out(tmp_path: Path) -> None:
    # each takes 2 s by its own account; 1.5 times three runs of the reference are 9 s, so that nothing is left out
    names = ("ce", "brier")
    campaign = make_campaign({"way": "well"}, names, ablations=("dpsm",), budget=Budget(limit=1.5))
    assert run(campaign, tmp_path / "out")[0] == 0
    tight = replace(campaign, budget=Budget(limit=0.9))
    code, records, said = run(tight, tmp_path / "tight")
    assert code == 0
    assert {name: r.status for name, r in records.items()} == {"ce": "ok", "brier": "ok", "dpsm": "pruned"}
    assert records["dpsm"].attempts == [] and "left out" in said and "1 pruned" in said
    assert records["dpsm"].decision["allowed_seconds"] == pytest.approx(5.4)
    # it stays so, whatever is measured later
    assert run(campaign, tmp_path / "tight")[1]["dpsm"].status == "pruned"
