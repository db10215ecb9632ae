"""The temperature that `DPSMTrainer` fits: of which weights, on which rows, and what is reported with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from dpsm_hf import CalibrationCallback, ReliabilityDisplay, TemperatureScaler
from tests.evaluation_trainers import float64_logits, make_trainer
from tests.tiny import SEQ2SEQ, VOCAB, make_data


@pytest.mark.parametrize("fused_head", ["on", "off"])
@pytest.mark.parametrize("name", ["gpt2", "llama_lora", "bart"])
def test_temperature_and_scaled_metrics(name: str, fused_head: str, tmp_path: Path) -> None:
    held_out = make_data(name, 12)
    trainer = make_trainer(tmp_path, name, fit_temperature=True, calibration_dataset=held_out, fused_head=fused_head)
    trainer.train()  # on rows that the calibration split shares, so that there is something to be sure of
    metrics = trainer.evaluate()
    shifted = name not in SEQ2SEQ
    oracle = TemperatureScaler.fit(*float64_logits(trainer.model, held_out, shifted=shifted))
    saved = TemperatureScaler.load(tmp_path)
    assert saved == trainer.temperature_scaler and saved.split == "calibration" and saved.tokens == oracle.tokens
    assert metrics["eval_temperature"] == saved.temperature == pytest.approx(oracle.temperature, rel=1e-4)
    logits, labels = float64_logits(trainer.model, trainer.eval_dataset, shifted=shifted)
    p = (logits / saved.temperature).softmax(-1)
    p_y = p.gather(1, labels[:, None])[:, 0]
    assert metrics["eval_nll_scaled"] == pytest.approx(-p_y.log().mean().item(), rel=1e-5)
    brier = (p - torch.nn.functional.one_hot(labels, VOCAB)).square().sum(-1).mean().item()
    assert metrics["eval_brier_scaled"] == pytest.approx(brier, rel=1e-5)
    assert metrics["eval_confidence_scaled"] == pytest.approx(p.amax(-1).mean().item(), rel=1e-5)
    assert metrics["eval_nll"] != metrics["eval_nll_scaled"] and "eval_token_accuracy_scaled" not in metrics
    on_the_split = trainer.evaluate(held_out.select(range(12)))
    assert on_the_split["eval_nll_scaled"] < on_the_split["eval_nll"]


def test_a_temperature_is_of_the_weights_it_was_fitted_for(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fit_temperature=True, calibration_dataset=make_data("gpt2", 12), max_steps=6)
    trainer.train()
    assert "eval_temperature" in trainer.evaluate()
    first = trainer.temperature_scaler
    assert trainer.fit_temperature() is first, "fitted again for the same weights"
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(2.0)
    assert trainer.temperature_scaler is None
    second = trainer.fit_temperature()
    assert second.temperature != first.temperature
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)
    trainer.use_temperature(2.0)
    trainer.args.fit_temperature = False
    assert trainer.evaluate()["eval_temperature"] == 2.0
    trainer.train()
    assert "eval_temperature" not in trainer.evaluate()


def test_writes_that_raise_no_version_and_another_set_are_seen(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, fit_temperature=True, calibration_dataset=make_data("gpt2", 12), max_steps=6)
    trainer.train()
    first = trainer.fit_temperature()
    weight = trainer.model.lm_head.weight
    weight.data.copy_(1.5 * weight.data)  # as who keeps averaged weights does
    assert trainer.temperature_scaler is None
    assert trainer.fit_temperature().temperature != first.temperature
    trainer.calibration_dataset = make_data("gpt2", 12).select(range(9))
    assert trainer.temperature_scaler is None
    with pytest.raises(ValueError, match="is eval_dataset itself"):
        trainer.calibration_dataset = trainer.eval_dataset
    tokens = sum(label != -100 for row in trainer.calibration_dataset["labels"] for label in row[1:])
    trainer.evaluate()
    assert trainer.temperature_scaler.tokens == tokens


def test_adapters_switched_off_have_a_temperature_of_their_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "llama_lora", calibration_dataset=make_data("llama_lora", 12))
    trainer.train()
    fitted = trainer.fit_temperature()
    with trainer.model.disable_adapter():
        assert trainer.temperature_scaler is None
    assert trainer.temperature_scaler is fitted


def test_an_evaluation_survives_what_no_temperature_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, fit_temperature=True, calibration_dataset=make_data("gpt2", 12))
    with torch.no_grad():
        trainer.model.lm_head.weight.zero_()  # every temperature is as good
    passes = count_passes(trainer)
    metrics = trainer.evaluate()
    assert "no temperature was fitted, and no metric is reported after scaling" in caplog.text
    assert math.isfinite(metrics["eval_nll"]) and "eval_temperature" not in metrics
    after_first = len(passes)
    trainer.evaluate()
    assert len(passes) == after_first > 1, "tried again for the same weights"


def count_passes(trainer: Any) -> list[float]:
    """Return a list that grows with every pass over the calibration split."""
    passes: list[float] = []
    moments = trainer._moments
    trainer._moments = lambda loader, temperature, *more: (
        passes.append(temperature),
        moments(loader, temperature, *more),
    )[1]
    return passes


def test_no_temperature_is_fitted_while_training(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, fit_temperature=True, calibration_dataset=make_data("gpt2", 12), eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_nll" in entry]
    assert len(logged) == 2 and not any("eval_temperature" in entry for entry in logged)
    assert "eval_temperature" in trainer.evaluate()


def test_the_file_of_an_evaluation_has_before_and_after(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, fit_temperature=True, calibration_dataset=make_data("gpt2", 12), classwise_tokens=3
    )
    trainer.add_callback(CalibrationCallback())
    trainer.train()
    metrics = trainer.evaluate()
    record = json.loads((tmp_path / "calibration" / "eval-step-000004.json").read_text(encoding="utf-8"))
    assert record["temperature"] == metrics["eval_temperature"]
    assert record["metrics"]["ece_15"] == metrics["eval_ece_15"]
    assert record["scaled"]["metrics"]["ece_15"] == metrics["eval_ece_15_scaled"]
    assert sum(record["scaled"]["curve"]["count"]) == record["tokens"] == metrics["eval_tokens"]
    assert set(record["intervals"]) == set(record["scaled"]["intervals"])
    assert len(record["classwise"]["classes"]) == 3 and record["classwise"]["ece"] == metrics["eval_classwise_ece"]
    picture = ReliabilityDisplay.from_json(record, name="gpt2").save(tmp_path / "diagram.svg")
    assert picture.stat().st_size > 1000


def test_temperature_while_generating(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, "bart", fit_temperature=True, calibration_dataset=make_data("bart", 12),
        predict_with_generate=True, generation_max_length=6,
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_nll_scaled"]) and metrics["eval_temperature"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit_temperature": True}, "needs data to fit on: pass calibration_dataset="),
        ({"calibration_dataset": "eval"}, "calibration_dataset is eval_dataset itself"),
        ({"calibration_dataset": make_data("gpt2", 11)}, "calibration_dataset is eval_dataset itself"),
        ({"calibration_dataset": make_data("gpt2", 20).select(range(16))}, "is train_dataset itself"),
        ({"calibration_dataset": Dataset.from_list([])}, "calibration_dataset is empty"),
        ({"classwise_tokens": -1}, "classwise_tokens=-1 must be 0"),
    ],
)
def test_refused_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    if options.get("calibration_dataset") == "eval":
        same = make_data("gpt2", 11)
        options = {"eval_dataset": same, "calibration_dataset": same}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_a_temperature_needs_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no data to fit a temperature on"):
        make_trainer(tmp_path).fit_temperature()
    ignored = make_data("gpt2", 4).map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.raises(ValueError, match="no scored token to fit a temperature on"):
        make_trainer(tmp_path).fit_temperature(ignored)


def test_persistent_workers_never_give_another_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(passes: Any, **options: Any) -> TemperatureScaler:
        sums, _ = passes({"nll": 1.0})
        return TemperatureScaler(1 + sums["nll"][0])  # random labels have no best temperature

    monkeypatch.setattr(TemperatureScaler, "fit_passes", fit)
    sets = {"eval_dataset": make_data("gpt2", 11), "calibration_dataset": make_data("gpt2", 6).select([5, 1, 2])}
    found = []
    for persistent in (False, True):
        workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": persistent}
        trainer = make_trainer(tmp_path, fit_temperature=True, **sets, **workers)
        metrics = [trainer.evaluate(), trainer.evaluate(sets["calibration_dataset"]), trainer.evaluate()]
        found.append([(m["eval_nll"], m["eval_tokens"], m["eval_temperature"]) for m in metrics])
    assert found[0] == found[1] and found[0][0] == found[0][2] != found[0][1]
