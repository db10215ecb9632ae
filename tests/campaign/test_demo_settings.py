"""The demo's bookkeeping, driven with a stand-in for the training script that writes the same files at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dpsm_hf.campaign import demo
from dpsm_hf.campaign.runner import launching
from dpsm_hf.campaign.runner.launching import run_folder
from dpsm_hf.campaign.runner.lock import campaign_lock
from dpsm_hf.campaign.runner.progress import run_names
from dpsm_hf.campaign.runner.records import read_records
from dpsm_hf.campaign.spec.design import Campaign
from tests.campaign.campaigns import make_campaign, run_of

SCRIPT = """
import json, os, pathlib, signal, sys, time
settings = json.loads(pathlib.Path(sys.argv[2]).read_text())
out, loss = pathlib.Path(settings["output_dir"]), settings["scoring_rule"]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(loss + " ")
print("training", loss, settings["seed"], settings["max_steps"])
print("\\r 10%\\r 50%\\r100%", file=sys.stderr)
if loss == os.environ.get("FAIL"):
    raise ValueError("out of luck")
if loss == os.environ.get("INTERRUPT"):
    os.kill(int(os.environ["DPSM_RUNNER_PID"]), signal.SIGINT)
    time.sleep(60)
nll = {"ce": 4.0, "brier": 5.0, "dpsm": 4.1}[loss]
entry = {"step": 3, "eval_nll": nll, "eval_loss": nll, "eval_train_seconds": 1.0}
state = {"global_step": 3, "log_history": [{"step": 3, "loss": nll, "train_seconds": 1.0}, entry]}
(out / "trainer_state.json").write_text(json.dumps(state))
sure = {"perplexity_low": 2.0**nll - 0.1, "perplexity_high": 2.0**nll + 0.1}
outcome = {"metrics": {"last": {"validation": {"nll": nll, "perplexity": 2.0**nll, **sure}}}}
(out / "outcome.json").write_text(json.dumps(outcome))
"""

pytestmark = pytest.mark.usefixtures("warm_processes")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Campaign:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "calls").write_text("")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(launching, "PROGRAM", (str(tmp_path / "train.py"),))
    made = make_campaign({"max_steps": 3})
    words = {"ce": "cross-entropy", "brier": "Brier", "dpsm": "DPSM"}
    variations = tuple(replace(v, title=words[v.name]) for v in made.variations)
    titles = {"size": {"tiny": "A stand-in"}, "data": {"reference": "nothing"}}
    return replace(made, variations=variations, titles=titles, test_split="validation")


def calls(tmp_path: Path) -> list[str]:
    text = (tmp_path / "calls").read_text()
    (tmp_path / "calls").write_text("")
    return text.split()


@pytest.mark.slow
def test_three_runs_and_a_page_and_only_what_is_missing_is_repeated(
    job: Campaign, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.run_demo(job, tmp_path / "out") == 0
    assert calls(tmp_path) == ["ce", "brier", "dpsm"]
    printed = capsys.readouterr()
    assert "On this run DPSM loses to cross-entropy" in printed.out and "report.html" in printed.out
    assert "[2/3] Brier" in printed.err and "training dpsm 1 3" in printed.err and "100%" in printed.err
    folder = run_folder(tmp_path / "out", run_of(job, "brier"))
    assert f"-> {folder}\n" in printed.err and "=== attempt" not in printed.err
    record = read_records(tmp_path / "out")[run_of(job, "brier")]
    assert (record.status, record.arguments["seed"], record.attempts[0]["exit_code"]) == ("ok", 1, 0)
    assert record.machine["versions"]["torch"] and record.efficiency["peak_memory_mb"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "A stand-in, on nothing." in page

    assert demo.run_demo(job, tmp_path / "out") == 0
    assert calls(tmp_path) == [] and capsys.readouterr().err.count("already done with the same settings, kept") == 3
    (run_folder(tmp_path / "out", run_of(job, "dpsm")) / "record.json").unlink()
    assert demo.run_demo(job, tmp_path / "out") == 0
    assert calls(tmp_path) == ["dpsm"]


def test_other_settings_are_other_runs() -> None:
    plain = demo.load_demo("clm")
    assert set(demo.load_demo("clm", steps=400, seed=42).runs) == set(plain.runs)
    for other in (
        demo.load_demo("clm", steps=9),
        demo.load_demo("clm", seed=1),
        demo.load_demo("clm", extra=["--weight_decay", "0"]),
        demo.load_demo("clm", extra=["--weight_decay=0", "--gradient_checkpointing"]),
    ):
        assert len(other.runs) == 3 and not set(other.runs) & set(plain.runs)
    with pytest.raises(ValueError, match="weight_decays"):
        demo.load_demo("clm", extra=["--weight_decays", "0"])
    with pytest.raises(ValueError, match="without an argument's name"):
        demo.load_demo("clm", extra=["0"])


@pytest.mark.parametrize("preset", demo.PRESETS)
def test_runs_differ_in_the_loss_alone(preset: str) -> None:
    campaign = demo.load_demo(preset, steps=5, seed=7, extra=["--lr_scheduler_type", "linear"])
    losses = ["ce", "brier", "dpsm"] + (["dpsm"] if preset == "finetune" else [])  # the last with alpha .5 throughout
    assert [campaign.runs[run_id].arguments["scoring_rule"] for run_id in campaign.order] == losses
    # One run of the slow preset is evaluated before training too; the others begin with the same weights.
    own = ("scoring_rule", "alpha_schedule", "alpha_end", *(("eval_on_start",) if preset == "finetune" else ()))
    before = [bool(campaign.runs[run_id].arguments.get("eval_on_start")) for run_id in campaign.order]
    assert before == ([True, False, False, False] if preset == "finetune" else [True] * 3)
    rest = [{k: v for k, v in run.arguments.items() if k not in own} for run in campaign.runs.values()]
    assert all(arguments == rest[0] for arguments in rest)
    assert (rest[0]["lr_scheduler_type"], rest[0]["max_steps"], rest[0]["seed"]) == ("linear", 5, 7)


def test_runs_of_other_code_or_versions_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs_are_kept() -> bool:
        (tmp_path / "runs" / "abc").mkdir(parents=True, exist_ok=True)
        demo.forget_other_code(tmp_path)
        return (tmp_path / "runs" / "abc").exists()

    assert not runs_are_kept()  # nobody knows by what they were made
    assert runs_are_kept()
    monkeypatch.setattr(demo, "versions", lambda: {"torch": "0.1"})
    with campaign_lock(tmp_path):  # a runner works in the folder
        assert runs_are_kept()
    assert not runs_are_kept()
    assert runs_are_kept()
    monkeypatch.setattr(demo, "source_digest", lambda: "changed")
    assert not runs_are_kept()


def test_what_reads_runs_is_no_part_of_their_code(tmp_path: Path) -> None:
    for room in ("campaign", "training"):
        (tmp_path / room).mkdir()
    digests = []
    for name in ("training/a.py", "campaign/b.py", "campaign_like.py"):
        (tmp_path / name).write_text("x = 1\n")
        digests.append(demo.source_digest(tmp_path))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.slow
def test_a_failing_run_is_shown_and_the_others_go_on(
    job: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAIL", "brier")
    assert demo.run_demo(job, tmp_path / "out") == 1
    assert calls(tmp_path) == ["ce", "brier", "dpsm"]
    printed = capsys.readouterr()
    assert "failed" in printed.err and "exit code 1: ValueError: out of luck (log: " in printed.err
    said = " ".join(printed.out.split())
    assert "The run 'brier' failed and is not compared: exit code 1: ValueError: out of luck." in said
    monkeypatch.delenv("FAIL")
    assert demo.run_demo(job, tmp_path / "out") == 0
    assert calls(tmp_path) == ["brier"]


@pytest.mark.slow
def test_an_interrupt_keeps_finished_runs_and_reports_on_them(
    job: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INTERRUPT", "brier")
    assert demo.run_demo(job, tmp_path / "out") == 130
    assert calls(tmp_path) == ["ce", "brier"]
    printed = capsys.readouterr()
    assert "What is done is kept; the same command goes on from there" in printed.err and "report.html" in printed.out
    assert read_records(tmp_path / "out")[run_of(job, "brier")].status == "interrupted"
    monkeypatch.delenv("INTERRUPT")
    assert demo.run_demo(job, tmp_path / "out") == 0
    assert calls(tmp_path) == ["brier", "dpsm"]


def test_wrong_options_end_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_HUB_OFFLINE", "COLUMNS", "TQDM_MININTERVAL"):
        monkeypatch.setenv(name, "1")  # to be taken back in the end
    with pytest.raises(SystemExit):
        demo.main(["--steps", "0"])
    assert "at least one step" in capsys.readouterr().err
    assert demo.main(["--output_dir", str(tmp_path), "--", "--learning_rat", "1"]) == 2
    assert "learning_rat" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_is_seen_of_a_run(tmp_path: Path, job: Campaign, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = job.order[0]
    shown = demo.FollowedRuns(tmp_path, job, job.order, run_names(job))
    log = run_folder(tmp_path, run_id) / "log.txt"
    log.parent.mkdir(parents=True)
    log.write_text("=== attempt 1 ===\nan earlier attempt\n=== attempt 2 ===\n{'loss': '7.1', 'epoch': '0.1'}\n")
    shown.show(run_id)
    written = (
        "\r 10%|#  | 1/10\r\x1b[K",
        "{'eval_nll': '5.3', 'eval_mce': '0.2', 'eval_ece_15': '0.01', 'epoch': '0.1'}\n",
        "  eval_mce    =  0.2\n  eval_nll",
        "    =  5.3\n",
        "\r 90%|## | 9/10",  # a line that is not over
    )
    with log.open("a", newline="") as file:
        for part in written:
            file.write(part)
            file.flush()
            shown.show(run_id)
    seen = capsys.readouterr().err
    assert "earlier" not in seen and f"[1/3] cross-entropy -> {log.parent}\n" in seen
    assert "{'loss': '7.1', 'epoch': '0.1'}" in seen and " 90%|## | 9/10" in seen
    assert "eval_nll 5.3, eval_ece_15 0.01, epoch 0.1\n" in seen and "  eval_nll    =  5.3" in seen
    assert "mce" not in seen
    log.unlink()
    log.write_text("=== attempt 3 ===\nagain\n")
    shown.ended(run_id, "ok", 61.0, "", 0)
    seen = capsys.readouterr().err  # in a line of its own
    assert seen.startswith("\n[1/3] ce") and seen.endswith("ok  1 min 01 s  the last one\n")


def test_records_say_what_broke(tmp_path: Path, job: Campaign) -> None:
    demo.forget_other_code(tmp_path)
    folder = run_folder(tmp_path, job.order[0])
    folder.mkdir(parents=True)
    (folder / "record.json").write_text("{")
    with pytest.raises(ValueError, match=r"record.json is not JSON .*; delete it and repeat the run"):
        demo.run_demo(job, tmp_path)
    assert not json.loads((tmp_path / "code.json").read_text())["versions"] == {}
