"""The demo's bookkeeping, driven with a stand-in for the training script that writes the same files at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dpsm_hf.campaign.comparison import demo
from dpsm_hf.runtime.child_process import run_child

SCRIPT = """
import json, os, pathlib, signal, sys
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
out, loss = pathlib.Path(options["--output_dir"]), options["--loss_type"]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(loss + " ")
print("training", loss, options["--seed"], options["--max_steps"])
print("\\r 10%\\r 50%\\r100%", file=sys.stderr)
if loss == os.environ.get("FAIL"):
    raise SystemExit("out of luck")
if loss == os.environ.get("INTERRUPT"):
    os.kill(os.getppid(), signal.SIGINT)
    raise SystemExit(130)
ballast = bytearray(b"1") * (200 << 20) if loss == "brier" else None
nll = {"ce": 4.0, "brier": 5.0, "dpsm": 4.1}[loss]
entry = {"step": 3, "eval_nll": nll, "eval_loss": nll, "eval_train_seconds": 1.0}
state = {"global_step": 3, "log_history": [{"step": 3, "loss": nll, "train_seconds": 1.0}, entry]}
(out / "trainer_state.json").write_text(json.dumps(state))
(out / "all_results.json").write_text(json.dumps({"eval_nll": nll, "eval_perplexity": 2.0**nll}))
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "calls").write_text("")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(demo, "PROGRAM", (str(tmp_path / "train.py"),))
    monkeypatch.setattr(demo, "PACKAGE", tmp_path)
    monkeypatch.setattr(demo, "make_tokenizer", lambda preset, directory: directory / "tokenizer")
    return demo.Preset("clm", "title", "subtitle", "python-docs", ("text",), 300, 3, {"learning_rate": "1"})


def calls(tmp_path: Path) -> list[str]:
    text = (tmp_path / "calls").read_text()
    (tmp_path / "calls").write_text("")
    return text.split()


def test_three_runs_and_a_report(job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run_demo(job, tmp_path / "out") == 0
    assert calls(tmp_path) == ["ce", "brier", "dpsm"]
    printed = capsys.readouterr()
    assert "On this run DPSM loses to cross-entropy" in printed.out and "report.html" in printed.out
    assert "[2/3] Brier" in printed.err and "training dpsm 42 3" in printed.err and "100%" in printed.err
    run = json.loads((tmp_path / "out" / "brier" / "run.json").read_text())
    assert run["status"] == "finished" and run["seed"] == 42 and run["exit_code"] == 0 and run["seconds"] > 0
    assert run["versions"]["torch"] and run["command"][run["command"].index("--loss_type") + 1] == "brier"
    assert (tmp_path / "out" / "brier" / "log.txt").read_text().splitlines() == ["training brier 42 3", "100%"]


def test_peak_memory_is_that_of_each_child(job: Any, tmp_path: Path) -> None:
    demo.run_demo(job, tmp_path / "out")
    peaks = {
        loss: json.loads((tmp_path / "out" / loss / "run.json").read_text())["peak_memory_mb"] for loss in demo.LOSSES
    }
    # A child starts out as a copy of this process, whose own size is therefore the least that can be seen.
    assert peaks["brier"] >= 200
    assert peaks["brier"] >= peaks["dpsm"]


def test_only_what_is_missing_is_repeated(job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    demo.run_demo(job, out)
    calls(tmp_path)
    assert demo.run_demo(job, out) == 0
    assert calls(tmp_path) == [] and "kept" in capsys.readouterr().err
    (out / "dpsm" / "trainer_state.json").unlink()
    assert demo.run_demo(job, out) == 0
    assert calls(tmp_path) == ["dpsm"]


@pytest.mark.parametrize("change", ["steps", "seed", "extra", "code", "broken"])
def test_other_settings_or_code_repeat_every_run(change: str, job: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    demo.run_demo(job, out)
    calls(tmp_path)
    options: dict[str, Any] = {"steps": {"steps": 9}, "seed": {"seed": 1}, "extra": {"extra": ["--weight_decay", "0"]}}
    if change == "code":
        (tmp_path / "train.py").write_text(SCRIPT + "\n# changed")
    if change == "broken":
        for loss in demo.LOSSES:
            (out / loss / "run.json").write_text("{")
    assert demo.run_demo(job, out, **options.get(change, {})) == 0
    assert calls(tmp_path) == ["ce", "brier", "dpsm"]


def test_a_failing_run_is_shown_and_the_others_go_on(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAIL", "brier")
    assert demo.run_demo(job, tmp_path / "out") == 1
    assert calls(tmp_path) == ["ce", "brier", "dpsm"]
    printed = capsys.readouterr()
    assert "The brier run failed with exit code 1" in printed.err and "    out of luck" in printed.err
    assert "The run 'brier' failed and is not compared: exit code 1: out of luck." in " ".join(printed.out.split())
    monkeypatch.delenv("FAIL")
    assert demo.run_demo(job, tmp_path / "out") == 0
    assert calls(tmp_path) == ["brier"]


def test_an_interrupt_keeps_finished_runs_and_reports_on_them(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INTERRUPT", "brier")
    assert demo.run_demo(job, tmp_path / "out") == 130
    assert calls(tmp_path) == ["ce", "brier"]
    printed = capsys.readouterr()
    assert "Finished runs are kept (ce)" in printed.err and "report.html" in printed.out
    assert json.loads((tmp_path / "out" / "brier" / "run.json").read_text())["status"] == "interrupted"
    monkeypatch.delenv("INTERRUPT")
    assert demo.run_demo(job, tmp_path / "out") == 0
    assert calls(tmp_path) == ["brier", "dpsm"]


def test_commands_differ_in_the_loss_alone(tmp_path: Path, job: Any) -> None:
    commands = [
        demo.build_command(
            job, loss, tmp_path / "run", tmp_path / "tokenizer", 5, 7, ["--lr_scheduler_type", "linear"]
        )
        for loss in demo.LOSSES
    ]
    assert {tuple(word for word in command if word not in demo.LOSSES) for command in commands} == {
        tuple(word for word in commands[0] if word != "ce")
    }
    assert commands[0][:2] == [sys.executable, str(tmp_path / "train.py")] and commands[0][-1] == "linear"


def test_wrong_options_end_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--steps", "0"])
    assert "at least one step" in capsys.readouterr().err


def test_what_is_seen_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys\n"
        "print({'loss': '7.1', 'epoch': '0.1'})\n"
        "sys.stdout.write('\\r 10%|#  | 1/10\\r\\x1b[K')\n"
        "print({'eval_nll': '5.3', 'eval_mce': '0.2', 'eval_ece_15': '0.01', 'epoch': '0.1'})\n"
        "print('  eval_mce    =  0.2')\n"
        "print('  eval_nll    =  5.3')\n"
        "sys.stdout.write('\\r 90%|## | 9/10')\n"  # a line that is not over
    )
    run_child([sys.executable, "-c", code], tmp_path / "log.txt", shown=demo.brief)
    seen = capsys.readouterr().err
    assert "{'loss': '7.1', 'epoch': '0.1'}" in seen and " 90%|## | 9/10" in seen
    assert "eval_nll 5.3, eval_ece_15 0.01, epoch 0.1\n" in seen and "  eval_nll    =  5.3" in seen
    assert "mce" not in seen and (tmp_path / "log.txt").read_text().count("mce") == 2


def test_a_child_killed_by_a_signal_is_told_apart(tmp_path: Path) -> None:
    code = "import os, signal; print('bye', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    result = run_child([sys.executable, "-c", code], tmp_path / "log.txt")
    assert result.exit_code == -9 and result.tail == ("bye",)
