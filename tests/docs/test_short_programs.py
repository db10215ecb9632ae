"""The programs under examples/ run as they stand, in one process and a folder of their own, on real text."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from dpsm_hf import TemperatureScaler

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
#: What lies elsewhere: tests/trl runs the one that needs TRL.
ELSEWHERE = {"sft_dpsm"}
FIGURES = ("nll", "brier", "ece_15")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function from an example's name and its arguments to the names that it leaves behind."""
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()

    def start(name: str, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    yield start
    datasets.enable_progress_bars()


def check(metrics: Mapping[str, Any], vocabulary: int, prefix: str = "eval_") -> None:
    """Look at figures of a model that learned something: better than a uniform guess, every score in its range."""
    uniform = torch.tensor(float(vocabulary)).log()
    assert 0 < metrics[f"{prefix}nll"] < uniform
    assert 0 < metrics[f"{prefix}brier"] < 1 and 0 <= metrics[f"{prefix}ece_15"] < 0.3


def test_swap_trainer(run: Any) -> None:
    names = run("swap_trainer")
    check(names["metrics"], 300)
    assert names["trainer"].alpha == 1.0  # plain TrainingArguments train with the defaults
    assert len(list(Path("out/swap-trainer/calibration").glob("*.json"))) == 1


def test_own_training_loop(run: Any) -> None:
    names = run("own_training_loop")
    check(names["metrics"], 300, prefix="")
    assert names["metrics"]["tokens"] == 64 * 63 and names["criterion"].global_step == 40


def test_lora(run: Any) -> None:
    names = run("lora")
    check(names["after"], 300)
    assert names["after"]["eval_nll"] < names["before"]["eval_nll"]
    assert {path.name for path in Path("out/lora/adapter").glob("adapter*")} == {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    row = names["rows"]["test"].with_format("torch")[:1]["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(names["again"](row).logits, names["model"].eval()(row).logits)


def test_temperature(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("temperature")
    metrics = names["metrics"]
    check(metrics, 300)
    assert metrics["eval_signed_gap"] > 0 and names["scaler"].temperature > 1  # over-confident, and mended
    assert metrics["eval_nll_scaled"] < metrics["eval_nll"] and metrics["eval_ece_15_scaled"] < metrics["eval_ece_15"]
    assert names["model"].generation_config.temperature == TemperatureScaler.load("out/temperature").temperature
    assert "The assert statement" in capsys.readouterr().out


def test_seq2seq(run: Any) -> None:
    metrics = run("seq2seq")["metrics"]
    check(metrics, 600)
    assert 0 < metrics["eval_rougeL"] <= 1 and 0 <= metrics["eval_generated_ece_15"] <= 1


def test_calibration_of_any_trainer(run: Any) -> None:
    metrics = run("calibration_of_any_trainer")["metrics"]
    check(metrics, 300)
    assert {path.name for path in Path("out/any-trainer/calibration").iterdir()} >= {
        "eval-step-000015.json", "eval-step-000030.json", "eval-step-000030.png"
    }  # fmt: skip


def test_reliability_diagram(run: Any) -> None:
    names = run("reliability_diagram")
    assert Path("out/one.png").stat().st_size > 10_000 and "<svg" in Path("out/both.svg").read_text("utf-8")
    assert list(names["both"].ece) == ["diagram eval-step-000020", "diagram eval-step-000040"]
    assert len(Path("out/both.csv").read_text("utf-8").splitlines()) == 1 + 2 * 15
    Path("out/both.csv").unlink()
    again = run("reliability_diagram", *names["files"])  # as on a command line, from files that are there
    assert again["both"].ece == names["both"].ece and Path("out/both.csv").exists() and "tokenizer" not in again


def test_all_are_short_run_here_and_listed() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    page = (ROOT / "docs" / "short-programs.md").read_text("utf-8")
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names - ELSEWHERE <= tested
    assert set(re.findall(r"`examples/(\w+)\.py`", page)) == names
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text("utf-8").splitlines()) <= 40, path.name
    notebooks = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert set(re.findall(r"`notebooks/(\w+\.ipynb)`", page)) == notebooks
