"""What is handed to a run's script, and what is known of the machine."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dpsm_hf.campaign.runner.launching import (
    check_campaign,
    code_state,
    cores,
    fill_in,
    launch_command,
    launch_environment,
    machine_facts,
    run_folder,
    script_settings,
    visible_devices,
)
from dpsm_hf.campaign.runner.lock import RunnerError
from dpsm_hf.campaign.runner.progress import run_names
from dpsm_hf.campaign.runner.tokenizer import shared_tokenizer
from dpsm_hf.campaign.spec.design import Point, Run
from dpsm_hf.tasks.steps import stop_step
from tests.campaign.campaigns import make_campaign, run_of

ARGUMENTS = {"model_type": "gpt2", "tokenizer_name": "train-bpe", "train_file": "a.txt", "max_steps": 10}


def test_placeholders(tmp_path: Path) -> None:
    run = Run(
        "language-modelling", {"model_name_or_path": "{run:abc}", "x": ["{campaign}/y", 3], "z": {"k": "{run:d}"}}
    )
    assert run.needs == ("abc",)
    assert fill_in(run.arguments, tmp_path) == {
        "model_name_or_path": str(tmp_path / "runs" / "abc"), "x": [f"{tmp_path}/y", 3],
        "z": {"k": str(tmp_path / "runs" / "d")},
    }  # fmt: skip


def test_what_a_run_starts_from_comes_first(tmp_path: Path) -> None:
    campaign = make_campaign(ARGUMENTS, ("ce",))
    first = Run("language-modelling", {**ARGUMENTS, "seed": 9})
    second = Run("language-modelling", {"model_name_or_path": f"{{run:{first.id}}}"})
    point = Point("main", "ce", "tiny", "reference", 7, second.id)
    both = {**campaign.runs, second.id: second, first.id: first}
    campaign = replace(campaign, runs=both, points=(point, *campaign.points))
    assert campaign.order == [first.id, second.id, run_of(campaign, "ce", 1)]
    check_campaign(campaign, tmp_path)
    with pytest.raises(RunnerError, match=f"starts from {{run:{first.id}}}"):
        check_campaign(replace(campaign, runs={second.id: second, **make_campaign(ARGUMENTS, ("ce",)).runs}), tmp_path)


def test_runs_in_a_circle() -> None:
    a, b = Run("language-modelling", {"x": "{run:b}"}), Run("language-modelling", {"x": "{run:a}"})
    campaign = replace(make_campaign(ARGUMENTS, ("ce",)), runs={"a": a, "b": b})
    campaign = replace(campaign, points=(Point("main", "ce", "tiny", "reference", 1, "a"),))
    with pytest.raises(ValueError, match="circle: b -> a -> b"):
        campaign.order  # noqa: B018


def test_settings_keep_checkpoints_to_go_on_from(tmp_path: Path) -> None:
    campaign = make_campaign(ARGUMENTS, ("ce",))

    def settings(**changes: object) -> dict[str, object]:
        run = Run("language-modelling", {**ARGUMENTS, **changes})
        return script_settings(campaign, run, "name", tmp_path)

    plain = settings()
    assert plain["output_dir"] == str(run_folder(tmp_path, Run("language-modelling", ARGUMENTS).id))
    assert (plain["save_strategy"], plain["save_steps"], plain["save_total_limit"]) == ("steps", 0.1, 2)
    assert plain["report_to"] == "none"
    # the best checkpoint can only be kept where it is evaluated
    assert settings(eval_strategy="steps", eval_steps=25)["save_steps"] == 25
    assert settings(save_steps=7)["save_steps"] == 7
    assert (
        "save_steps" not in settings(save_strategy="epoch") and settings(save_strategy="no")["save_strategy"] == "no"
    )
    assert settings(save_total_limit=5)["save_total_limit"] == 5
    run = Run("language-modelling", {**ARGUMENTS, "tokenizer_vocab_size": 300})
    shared = script_settings(campaign, run, "name", tmp_path, tokenizer=tmp_path / "t", stop=0.25)
    assert shared["tokenizer_name"] == str(tmp_path / "t") and "tokenizer_vocab_size" not in shared
    assert shared["stop_at_step"] == 0.25


def test_command_line(tmp_path: Path) -> None:
    command = launch_command(Run("language-modelling", {}, processes=1), tmp_path / "settings.json", 2)
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    assert command[-4:] == ["-m", "dpsm_hf", "clm", str(tmp_path / "settings.json")]
    assert command[command.index("--num_processes") + 1] == "1" and "--multi_gpu" not in command
    two = launch_command(Run("summarization", {}, processes=2), tmp_path / "settings.json", 2)
    assert "--multi_gpu" in two and two[two.index("--num_processes") + 1] == "2"
    assert two[-4:-1] == ["-m", "dpsm_hf", "summarization"]


def test_trackers_get_one_group_a_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_PROJECT", "WANDB_DIR", "WANDB_RESUME", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)
    campaign = make_campaign(ARGUMENTS, ("ce", "brier"), track=("wandb", "tensorboard", "trackio"))
    found = {}
    for run_id in campaign.order:
        run, name = campaign.runs[run_id], run_names(campaign)[run_id]
        settings = script_settings(campaign, run, name, tmp_path)
        assert settings["report_to"] == ["wandb", "tensorboard", "trackio"]
        assert settings["run_name"] == name and settings["project"] == "test-small"
        found[run_id] = launch_environment(campaign, run, name, tmp_path, devices=("3", "1"), threads=4)
    first, second = found.values()
    assert first["WANDB_RUN_GROUP"] == second["WANDB_RUN_GROUP"] == "test-small"
    assert first["WANDB_PROJECT"] == "test" and first["WANDB_RESUME"] == "allow"
    assert first["WANDB_RUN_ID"] != second["WANDB_RUN_ID"]  # and the same after an interrupt
    assert first["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "tensorboard" / "ce/tiny/reference/seed-1")
    assert first["CUDA_VISIBLE_DEVICES"] == "3,1" and first["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    again = launch_environment(campaign, campaign.runs[campaign.order[0]], "name", tmp_path)
    assert again["WANDB_PROJECT"] == "mine" and "CUDA_VISIBLE_DEVICES" not in again
    untracked = launch_environment(make_campaign(ARGUMENTS, ("ce",)), Run("language-modelling", {}), "name", tmp_path)
    assert not any(name.startswith(("WANDB", "TENSORBOARD", "TRACKIO")) for name in untracked)


def test_what_keeps_a_campaign_from_running(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="'mlflow' is unknown"):
        check_campaign(make_campaign(ARGUMENTS, ("ce",), track=("mlflow",)), tmp_path)
    with pytest.raises(RunnerError, match="braces"):
        check_campaign(make_campaign(ARGUMENTS, ("ce",)), tmp_path / "{x}")


def test_runs_on_the_same_texts_share_a_tokenizer(tmp_path: Path) -> None:
    def folder(**changes: object) -> Path | None:
        return shared_tokenizer(Run("language-modelling", {**ARGUMENTS, **changes}), tmp_path)

    assert folder() == folder(seed=3, scoring_rule="brier", max_steps=99, learning_rate=1.0, low_resource=0.1)
    assert folder() != folder(train_file="b.txt") and folder() != folder(tokenizer_vocab_size=999)
    assert folder(tokenizer_name="gpt2") is None
    assert folder(config_name="x") is None
    held = Run("language-modelling", ARGUMENTS, contents={"train_file": "sha256 of its text"})
    assert folder() != shared_tokenizer(held, tmp_path)
    assert folder() != shared_tokenizer(Run("summarization", ARGUMENTS), tmp_path)


def test_names_are_unique() -> None:
    campaign = make_campaign(ARGUMENTS, ("ce", "brier"), seeds=(1, 2))
    assert list(run_names(campaign).values())[:2] == ["ce/tiny/reference/seed-1", "brier/tiny/reference/seed-1"]
    warm = Run("language-modelling", {"warmup_steps": 0.2})
    points = [Point("warm-up", "ce", "tiny", "a/b", 1, warm.id, {"warmup_steps": 0.2})]
    campaign = replace(campaign, points=(*campaign.points, *points), runs={**campaign.runs, warm.id: warm, "p": warm})
    names = run_names(campaign)
    assert names[warm.id] == "ce/tiny/a_b/seed-1/warm-up/warmup_steps-0.2"
    assert names["p"] == "preparation/p"
    assert len(set(names.values())) == len(names)


def test_machine_facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = machine_facts()
    assert facts["device"] and facts["versions"]["torch"] and facts["cores"] == cores() >= 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert visible_devices() == ("2", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == ()
    assert code_state(tmp_path) == {}


def test_commit_and_dirty_flag(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "x")
    head = git("rev-parse", "HEAD").strip()
    assert code_state(tmp_path) == {"commit": head, "dirty": False}
    (tmp_path / "note.txt").write_text("a file that is not tracked changes no result")
    assert code_state(tmp_path)["dirty"] is False
    (tmp_path / "code.py").write_text("2")
    assert code_state(tmp_path) == {"commit": head, "dirty": True}
    (tmp_path / "inside").mkdir()
    assert code_state(tmp_path / "inside") == {}  # somebody else's checkout


def test_the_step_of_a_share() -> None:
    assert stop_step(0.25, 100) == 25 and stop_step(0.25, 100, 10) == 30 and stop_step(0.25, 101) == 26
    assert stop_step(0.07, 100) == 7  # not 8, although 0.07 * 100 is a little more than 7
    assert stop_step(12, 100, 10) == 12


def test_the_runner_needs_no_torch() -> None:
    code = "import sys, dpsm_hf.campaign.runner.running, dpsm_hf.campaign.runner.status; print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout == "False\n"
