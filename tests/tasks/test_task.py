"""Tasks by name: the commands that they are, a third one in one file, and what may be imported without torch."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import run_clm_dpsm
import run_summarization_dpsm
from dpsm_hf import tasks
from dpsm_hf.__main__ import main as dpsm
from dpsm_hf.campaign.cost import run_cost
from dpsm_hf.campaign.runner.launching import check_campaign, launch_command
from dpsm_hf.campaign.spec.loading import load_campaign
from dpsm_hf.campaign.verdict.claims import claims_of
from dpsm_hf.tasks import TaskEntry, get_task
from dpsm_hf.tasks.summarization import Summarization
from tests.tasks.summarization_run import DOCSTRINGS, FRESH_BART, TINY, TRAIN_BPE, arguments

TRANSLATION = '''
"""Translation, for a test: pairs as in summarisation, with metrics of the test split under another name."""
from dataclasses import dataclass, field

from dpsm_hf.tasks import summarization


@dataclass
class DataTrainingArguments(summarization.DataTrainingArguments):
    direction: str = field(default="en-de", metadata={"help": "Languages."})


class Translation(summarization.Summarization):
    data_class = DataTrainingArguments
    hub_task = "translation"
    test_prefix = "translated"

    def check(self):
        super().check()
        if self.data_args.direction == "de-de":
            raise ValueError("--direction de-de is no translation.")
'''


@pytest.fixture
def translation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "translation_task.py").write_text(TRANSLATION)
    monkeypatch.syspath_prepend(tmp_path)
    entry = TaskEntry("translation_task", "Translation", "translate", "train a translator")
    monkeypatch.setitem(tasks.TASKS, "translation", entry)


def test_the_scripts_are_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_clm_dpsm.main == get_task("language-modelling").main
    assert run_summarization_dpsm.main == get_task("summarization").main
    for command, option in (("clm", "--block_size"), ("summarization", "--max_source_length")):
        with pytest.raises(SystemExit, match="0"):
            dpsm([command, "--help"])
        said = capsys.readouterr().out
        assert said.startswith(f"usage: dpsm {command} ") and option in said
    with pytest.raises(KeyError):
        get_task("translation")


@pytest.mark.usefixtures("translation")
def test_a_third_task_is_a_file_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dpsm(["--help"]) == 0 and "translate      train a translator" in capsys.readouterr().out
    out = tmp_path / "out"
    words = [*arguments(out, *DOCSTRINGS, *FRESH_BART, *TRAIN_BPE), "--direction", "de-en", "--max_steps", "1"]
    assert dpsm(["translate", *words, "--do_train", "--do_predict"]) == 0
    assert "translated_nll" in (out / "all_results.json").read_text()
    capsys.readouterr()
    assert dpsm(["translate", *words, "--do_train", "--direction", "de-de"]) == 2
    assert "error: --direction de-de is no translation." in capsys.readouterr().err.splitlines()


@pytest.mark.usefixtures("translation")
def test_a_campaign_of_a_third_task(tmp_path: Path) -> None:
    base = {
        "dataset_name": "python-docstrings", "model_type": "bart", "config_overrides": TINY,
        "tokenizer_name": "train-bpe", "do_train": True, "do_eval": True, "do_predict": True,
        "eval_strategy": "steps", "eval_steps": 5, "fit_temperature": True, "max_steps": 10, "max_target_length": 20,
    }  # fmt: skip
    content = {
        "name": "third", "task": "translation", "seeds": [1], "base": base, "sizes": {"tiny": {}},
        "data": {"docstrings": {"arguments": {"direction": "de-en"}}}, "reference": "ce", "brier": "brier",
        "variations": {name: {"arguments": {"scoring_rule": name}} for name in ("ce", "brier")},
        "studies": {"main": {"variations": ["ce"]}},
    }  # fmt: skip
    path = tmp_path / "third.yaml"
    path.write_text(yaml.safe_dump(content))
    campaign = load_campaign(path)
    check_campaign(campaign, tmp_path)
    (run,) = campaign.runs.values()
    assert run.arguments["direction"] == "de-en"
    assert launch_command(run, tmp_path / "settings.json", 1)[-4:-1] == ["-m", "dpsm_hf", "translate"]
    cost = run_cost(campaign, run)
    assert cost.tokens == 10 * 8 * (1024 + 20) and cost.flops
    assert {claim.metric for claim in claims_of("translation")} >= {"perplexity", "ece_15"}
    content["data"] = {"docstrings": {"arguments": {"direction": "de-de"}}}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="de-de is no translation"):
        load_campaign(path)


def test_a_model_tells_its_task() -> None:
    from transformers import BartConfig, GPT2Config

    assert tasks.task_of_model(BartConfig()) is Summarization
    assert tasks.task_of_model(GPT2Config()) is get_task("language-modelling")


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import dpsm_hf", ("torch", "transformers", "matplotlib")),
        ("from dpsm_hf.__main__ import main; main(['--help'])", ("torch", "transformers", "matplotlib")),
        ("from dpsm_hf import DPSMTrainer", ("matplotlib",)),
    ],
)
def test_what_is_imported_late(code: str, absent: tuple[str, ...]) -> None:
    told = f"{code}; import sys; print([name for name in {absent} if name in sys.modules])"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_garbage_is_looked_for_after_the_imports_and_not_during_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "class Late:\n    @staticmethod\n    def main(words, prog):\n        print(prog, gc.isenabled())\n"
    (tmp_path / "imported_late.py").write_text(f"import gc\n{code}print('import', gc.isenabled())\n")
    (tmp_path / "imported_never.py").write_text("raise ImportError('broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("late", "never"):
        monkeypatch.setitem(tasks.TASKS, name, TaskEntry(f"imported_{name}", "Late", name, "for a test"))
    assert dpsm(["late"]) == 0
    assert capsys.readouterr().out.splitlines() == ["import False", "dpsm late True"]
    with pytest.raises(ImportError, match="broken"):
        dpsm(["never"])
    assert gc.isenabled()
