"""The suite of Transformers' own Trainer tests: its swap, stand-ins and table, and all of it on a small source."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from benchmarks.hf_trainer_suite import __main__ as suite
from benchmarks.hf_trainer_suite import differences, plugin, source, stand_ins, table
from benchmarks.hf_trainer_suite.columns import COLUMNS
from dpsm_hf import AlphaScheduleCallback, CalibrationCallback, DPSMConfig, DPSMTrainer
from tests.tiny import make_model

TESTS = """
import unittest
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS
from torch import nn
import torch


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))

    def forward(self, x, labels=None):
        return nn.functional.mse_loss(self.slope * x, labels), x


class LineTest(unittest.TestCase):
    def trainer(self, **options):
        rows = [{"x": torch.tensor(float(i)), "labels": torch.tensor(float(i))} for i in range(10)]
        args = TrainingArguments("out", max_steps=2, save_strategy="no", **options)
        return Trainer(model=Line(), args=args, train_dataset=rows, eval_dataset=rows)

    def test_trains(self):
        self.trainer().train()

    def test_counts(self):
        self.assertEqual(len(self.trainer().callback_handler.callbacks), len(DEFAULT_CALLBACKS) + 1)

    def test_no_trainer(self):
        pass

    def test_fails_anyway(self):
        self.trainer()
        self.fail("here")

    @unittest.skip("not here")
    def test_skipped(self):
        pass

    def test_subtests(self):
        self.trainer()
        for i in range(2):
            with self.subTest(i=i):
                self.assertEqual(i, 0)
"""


@pytest.mark.parametrize("name", ["ce", "ce_bare", "dpsm"])
def test_the_swap_gives_plain_arguments_the_settings_of_its_column(name: str, tmp_path: Path) -> None:
    column = COLUMNS[name]
    kind: Any = plugin.in_place_of(Trainer, DPSMTrainer, column)
    plain = kind(model=make_model("llama"), args=TrainingArguments(str(tmp_path), report_to="none"))
    assert isinstance(plain, DPSMTrainer) and kind.__name__ == "Trainer"
    found = plain.dpsm.scoring_rule, plain.dpsm.fused_head
    assert found == (("ce", "off") if name != "dpsm" else (DPSMConfig.scoring_rule, DPSMConfig.fused_head))
    kinds = {type(callback) for callback in plain.callback_handler.callbacks}
    assert ({AlphaScheduleCallback, CalibrationCallback} <= kinds) == column.callbacks
    own = kind(model=make_model("llama"), args=DPSMConfig(str(tmp_path), scoring_rule="brier", report_to="none"))
    assert own.dpsm.scoring_rule == "brier"


def test_stand_ins_load_as_from_a_cache_that_was_filled_online(tmp_path: Path, monkeypatch: Any) -> None:
    names = ("gpt2", "roneneldan/TinyStories-33M")
    monkeypatch.setattr(stand_ins, "NAMES", {name: stand_ins.NAMES[name] for name in names})
    home = stand_ins.hub_cache(tmp_path / "home")
    for name in names:
        there: dict[str, Any] = {"cache_dir": str(home / "hub"), "local_files_only": True}
        tokenizer, model = (
            AutoTokenizer.from_pretrained(name, **there),
            AutoModelForCausalLM.from_pretrained(name, **there),
        )
        ids = tokenizer("hello world", return_tensors="pt").input_ids
        assert tokenizer.decode(ids[0]) == "hello world" and bool(torch.isfinite(model(ids).logits).all())
    (home / "mine").touch()
    assert stand_ins.hub_cache(tmp_path / "home") == home and (home / "mine").exists()  # made once


def outcome(what: str, trainers: int = 1, error: str = "") -> table.Outcome:
    return table.Outcome(what, trainers, error)


def test_the_table_compares_what_makes_a_trainer_and_passes_with_transformers(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(differences, "CROSS_ENTROPY", {"test_b": "it counts"})
    monkeypatch.setattr(table, "REFUSALS", ("no meaning",))
    ce = {"t.py::test_a": outcome("passed"), "t.py::test_b[x]": outcome("failed", 1, "two more")}
    ce |= {
        "t.py::test_c": outcome("failed", 1, "oh"),
        "t.py::test_d": outcome("failed"),
        "t.py::test_e": outcome("passed", 0),
    }
    stock = {
        test: outcome("failed" if test.endswith("_d") else "passed", found.trainers) for test, found in ce.items()
    }
    dpsm = {test: outcome("failed", found.trainers, "DPSM has no meaning here") for test, found in ce.items()}
    found = table.rows({"stock": stock, "ce": ce, "dpsm": dpsm})
    verdicts = [(row.name, row.verdict, row.reason) for row in found]
    assert verdicts == [
        ("test_a", "same", ""), ("test_b", "differs", "it counts"), ("test_c", "open", ""),
        ("test_d", "not comparable", ""), ("test_e", "not comparable", "makes no trainer"),
    ]  # fmt: skip
    assert [row.dpsm for row in found] == ["refused"] * 3 + ["failed"] * 2
    assert table.unexplained(found) == ["t.py::test_c"]
    assert "| DPSMTrainer, ce | 1 of 3 | 0 | 1 | 1 |" in table.page(found, "# Heading")
    table.write_csv(found, tmp_path / "suite.csv")
    assert table.rows(table.earlier(tmp_path / "suite.csv")) == found  # a partial run keeps the other rows
    assert table.earlier(tmp_path / "none.csv") == {}


def test_a_source_that_is_none_and_a_clone_that_fails_say_what_to_do(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(FileNotFoundError, match="name the folder that `git clone"):
        source.checked(tmp_path)
    monkeypatch.setattr(source, "URL", str(tmp_path / "nothing"))
    with pytest.raises(RuntimeError, match=r"with --source FOLDER"):
        source.downloaded(tmp_path / "cache")
    assert not (tmp_path / "cache" / source.tag()).exists()


def test_a_clone_holds_the_tests_at_the_installed_version(tmp_path: Path, monkeypatch: Any) -> None:
    made = tmp_path / "transformers"
    (made / source.TESTS).mkdir(parents=True)
    (made / source.TESTS / "test_one.py").write_text("", encoding="utf-8")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "one"], ["tag", source.tag()]):
        subprocess.run(["git", "-C", str(made), *command], check=True)
    monkeypatch.setattr(source, "URL", made.as_uri())
    folder = source.downloaded(tmp_path / "cache")
    assert (folder / source.TESTS / "test_one.py").exists() and folder.name == f"v{transformers.__version__}"
    assert source.described(folder).startswith("commit ") and source.described(tmp_path) == "a folder without git"


@pytest.mark.slow
def test_the_whole_suite_on_a_small_source(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "transformers"
    (folder / source.TESTS).mkdir(parents=True)
    for path in (folder / "tests", folder / source.TESTS):
        (path / "__init__.py").touch()
    (folder / source.TESTS / "test_line.py").write_text(TESTS, encoding="utf-8")
    (folder / source.TESTS / "test_broken.py").write_text("import nothing_of_this_name", encoding="utf-8")
    monkeypatch.setattr(stand_ins, "NAMES", {})
    written, page = tmp_path / "suite.csv", tmp_path / "page.md"
    command = ["--source", str(folder), "--cache", str(tmp_path), "--csv", str(written), "--page", str(page)]
    assert suite.main([*command, "--columns", "stock", "ce"]) == 1  # nobody gave a reason for test_counts
    with written.open(encoding="utf-8") as file:
        found = {row["test"].rsplit("::", 1)[-1]: row for row in csv.DictReader(file)}
    outcomes = {name: (row["stock"], row["ce"], row["ce_bare"], row["trainers"]) for name, row in found.items()}
    assert outcomes == {
        "test_trains": ("passed", "passed", "", "1"),
        "test_counts": ("passed", "failed", "passed", "1"),
        "test_no_trainer": ("passed", "passed", "", "0"),
        "test_fails_anyway": ("failed", "failed", "", "1"),
        "test_skipped": ("skipped", "skipped", "", "0"),
        "test_subtests": ("failed", "failed", "", "1"),
        "tests/trainer/test_broken.py": ("failed", "failed", "", "0"),
    }
    assert "2 are comparable" in page.read_text(encoding="utf-8")
    assert not (folder / "out").exists()
