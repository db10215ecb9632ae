"""--help of the scripts: their own options under headings, everything behind --help_all."""

from __future__ import annotations

import dataclasses
import re

import pytest
from transformers import TrainingArguments

from dpsm_hf.__main__ import main as dpsm
from dpsm_hf.tasks import TASKS, get_task
from dpsm_hf.tasks.option_help import EVERYDAY
from dpsm_hf.training.arguments import DPSMArguments


@pytest.fixture(params=list(TASKS))
def task(request):
    return get_task(request.param), TASKS[request.param].command


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        dpsm(list(words))
    return capsys.readouterr().out


def options_in(text: str) -> list[str]:
    return re.findall(r"^  (?:-h, )?--(\w+)", text, re.MULTILINE)


def test_help_has_the_own_options_and_the_everyday_ones(task, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    kind, command = task
    text = shown(capsys, command, "--help")
    names = options_in(text)
    fields = [field.name for part in kind.argument_classes() for field in dataclasses.fields(part) if field.init]
    foreign = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {name for name in fields if name not in foreign} <= {*names, "generation_config", "sortish_sampler"}
    assert set(names) & foreign <= set(EVERYDAY) and len(set(names) & foreign) > 20
    assert len(text.splitlines()) < 420, "the whole of it had 934"
    assert "--help_all lists" in text and "DPSM_HF_TRACEBACK=1" in text
    assert names.index("scoring_rule") < names.index("model_name_or_path") < names.index("learning_rate")
    headings = [line for line in text.splitlines() if re.fullmatch(r"\S.*:", line)]
    assert "The loss, its schedule, and what is measured:" in headings and len(headings) >= 7


@pytest.mark.parametrize("spelling", ["--help_all", "--help-all"])
def test_help_all_has_every_option_once(task, capsys, spelling):
    kind, command = task
    names = options_in(shown(capsys, command, spelling))
    fields = [field.name for part in kind.argument_classes() for field in dataclasses.fields(part) if field.init]
    assert sorted(set(fields)) == sorted(name for name in names if name in fields)
    assert {name for name in names if name not in fields and not name.startswith("no_")} == {
        "help", "help_all", "config"
    }  # fmt: skip


def test_every_everyday_option_and_every_dpsm_option_exists():
    known = {field.name for task in TASKS for part in get_task(task).argument_classes() for field in
             dataclasses.fields(part)}  # fmt: skip
    assert set(EVERYDAY) <= known and {field.name for field in dataclasses.fields(DPSMArguments)} <= known
